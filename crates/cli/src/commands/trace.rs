//! `nacre image trace`: runs a lazy image, and writes it again with what the run read first.
//!
//! What is written is the very image that was admitted and run: the same blobs of data, other metadata.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nacre_guest::{
    bundle::{Overrides, Runtime},
    images::PullError,
    lazy::{LazyError, LazyImage, LazyMount, LazyStore},
    service::ImageService,
};
use nacre_lazy::{artifact::Artifact, build::LazyRetrace, trace::Recorder};
use nacre_oci::{
    copy::{self, CopyOptions, EncryptLayers, ExistingSignatures, Source},
    crypt::Recipients,
    manifest::{Manifest, verify_manifest},
    source::ImageSource,
    transport::open_sink,
    trust::LookasideConfig,
};
use nacre_sys::signals::send_to_child;
use rustix::process::Signal;

use super::{
    copy::{Signing, location, report},
    mounts,
};
use crate::{
    args::{Global, lazy::TraceArgs},
    exit::Usage,
    setup::{self, Setup},
};

/// How long a run has to end after it was told to.
const GRACE: Duration = Duration::from_secs(10);

pub(crate) fn trace(global: &Global, args: &TraceArgs) -> anyhow::Result<()> {
    setup::privileged()?;
    // What the arguments get wrong is said before anything runs.
    let recipients = Recipients::from_args(&args.encrypt)?;
    let signing = Signing::of(&args.sign)?;
    let runtime = Runtime::find(args.process.runtime.as_deref())?;
    let setup = Setup::new(global, args.json)?.with_keys(&args.keys).with_lazy(&args.lazy);
    let setup = setup.with(&args.trust, &args.keys.broker, &args.registry)?;
    let lookaside = match &setup.config.trust.registries_d {
        Some(dir) => LookasideConfig::load_dir(dir)?,
        None => LookasideConfig::default(),
    };
    let service = setup.service()?;
    let sink = open_sink(&location(&args.destination, service.client())?, service.client())?;
    let store = LazyStore::open(service.lazy_options().clone())?;
    let (image, source) = open(&service, &store, &args.image)?;
    let admission = image.admission.clone().context("the image was not admitted here")?;
    let raw = verify_manifest(source.manifest(Some(admission.manifest()))?, admission.manifest())?;
    let artifact = Artifact::parse(&Manifest::parse(raw.get())?)?;
    check_recipients(&artifact, args)?;
    let key = artifact.unwrap(service.images().keyring())?;

    let recorder = Arc::new(Recorder::default());
    let chunks = image.chunks.as_ref().context("an index of an ordinary image has no place for a trace")?;
    chunks.record(Arc::clone(&recorder));
    let target = image.own_target()?;
    let mounted = store.mount(image, &target, service.lazy_front())?;
    let overrides = super::run::overrides(&args.process);
    let seconds = args.seconds.map(Duration::from_secs);
    let ran = run(&service, &mounted, &overrides, &runtime, seconds);
    let written = ran.and_then(|code| {
        let trace = recorder.trace();
        if code != 0 {
            setup.progress.note(&format!("the run ended with {code}; what it read until then is the trace"));
        }
        anyhow::ensure!(!trace.is_empty(), "the run read nothing of the image's files: there is no trace to write");
        let sealed = artifact.sealed;
        let retrace =
            LazyRetrace { source: Arc::clone(&source), artifact, key, directory: store.directory().to_owned(), trace };
        let options = CopyOptions {
            encrypt: sealed.then_some((&recipients, &EncryptLayers::All)),
            remake: Some(&retrace),
            // They are of an image without this trace.
            signatures: ExistingSignatures::Remove,
            sign: signing.sign(),
            lookaside: Some(&lookaside),
            progress: &*setup.progress,
            ..CopyOptions::default()
        };
        let copied = copy::copy(&Source::admitted(&*source, admission.admitted())?, &*sink, &options)?;
        Ok((copied, retrace.trace.len()))
    });
    if let Err((_, error)) = mounted.unmount() {
        tracing::warn!("{error}");
    }
    let (copied, places) = written?;
    setup.progress.note(&format!("the trace has {places} chunks"));
    report(args.json, &copied, Some(("trace", places.into())))
}

/// Opens the first of a name's locations that has the image, and keeps hold of it.
fn open(service: &ImageService, store: &LazyStore, text: &str) -> anyhow::Result<(LazyImage, Arc<dyn ImageSource>)> {
    let locations = service.locations(text)?;
    let last = locations.len().saturating_sub(1);
    for (position, location) in locations.iter().enumerate() {
        let source: Arc<dyn ImageSource> = Arc::from(service.source(location)?);
        match store.lazy_image(service.images(), Arc::clone(&source)) {
            Err(LazyError::Pull(PullError::Transport(error))) if error.is_not_found() && position < last => {}
            image => return Ok((image?, source)),
        }
    }
    Err(Usage(format!("'{text}' has no registry to search")).into())
}

/// Says at once what would only be refused when the run is over.
fn check_recipients(artifact: &Artifact, args: &TraceArgs) -> anyhow::Result<()> {
    let problem = match (artifact.sealed, args.encrypt.is_empty()) {
        (true, true) => "the image is encrypted, and with a trace it has another key: say for whom with --encrypt",
        (false, false) => {
            "--encrypt: the image is not encrypted; that is done where it is made, by `image copy --lazy`"
        }
        _ => return Ok(()),
    };
    Err(Usage(problem.into()).into())
}

/// Runs the image's container until it ends, or is ended; gives its exit code. What it says goes to standard error: standard output is
/// for what is written.
fn run(
    service: &ImageService,
    mounted: &LazyMount,
    overrides: &Overrides,
    runtime: &Runtime,
    time: Option<Duration>,
) -> anyhow::Result<i32> {
    let _aside = Aside::new().context("standard output")?;
    thread::scope(|scope| {
        // It is closed when the run has ended.
        let (running, ended) = mpsc::channel::<()>();
        if let Some(time) = time {
            thread::Builder::new()
                .name("nacre-trace".into())
                .spawn_scoped(scope, move || {
                    for (wait, signal) in [(time, Signal::TERM), (GRACE, Signal::KILL)] {
                        if ended.recv_timeout(wait) != Err(mpsc::RecvTimeoutError::Timeout) {
                            return;
                        }
                        send_to_child(signal);
                    }
                })
                .context("a thread that ends the run")?;
        }
        let (manifest, config) = (&mounted.image.manifest, &mounted.image.config);
        let code = mounts::run_mounted(service, manifest, mounted.target(), config, overrides, runtime);
        drop(running);
        code
    })
}

/// Standard output goes where standard error goes, as long as this lives.
struct Aside(OwnedFd);

impl Aside {
    fn new() -> std::io::Result<Self> {
        let own = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(Self(own))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Err(error) = rustix::stdio::dup2_stdout(&self.0) {
            tracing::error!("standard output is lost: {error}");
        }
    }
}

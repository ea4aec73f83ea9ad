//! Lazy images: made by `image copy --lazy`, mounted by `image mount`, run by `run --lazy`.
//!
//! `mount` serves in the background as `disk open` does: this program again, with the same arguments and a variable that says so, which writes a
//! line to its standard output, a pipe to us, when the image is mounted.

use std::{
    env,
    fs::File,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nacre_core::SecretArray;
use nacre_guest::{
    bundle::{Overrides, Runtime},
    lazy::{Front, LazyMount, LazyOptions, LazyStore},
    service::ImageService,
};
use nacre_lazy::{
    artifact::{Artifact, ImageBlobs, blob_id, metadata_stream},
    build::{DataBlob, LazyRemake, Report, Shared},
    cache::Cache,
    fetch::Fetcher,
    image::{Metadata, Table},
    keys::Domain,
    reader::{Reader, Shared as ReaderShared},
    source::BlobId,
};
use nacre_oci::{
    copy::CopyError,
    crypt::Keyring,
    manifest::{Index, Manifest, Platform, verify_manifest},
    source::ImageSource,
    unpack::Limits,
};
use nacre_sys::end::EndSignals;
use serde_json::{Value, json};

use crate::{
    args::{
        Global, RunArgs,
        lazy::{Front as FrontArg, LazyArgs, MakeLazyArgs, MountArgs},
    },
    exit::Usage,
    output,
    progress::size,
    setup::{self, Setup},
};

/// Tells a process that it is the one in the background; see `MountArgs::detached`.
const DETACHED: &str = "NACRE_LAZY_DETACHED";
/// How often it is looked whether the image is still mounted.
const LOOK: Duration = Duration::from_millis(500);

/// The exit code.
pub(crate) fn mount(global: &Global, args: &MountArgs) -> anyhow::Result<i32> {
    if !args.foreground && !args.detached {
        return detach();
    }
    if args.detached {
        rustix::process::setsid().context("a session of its own")?;
    }
    setup::privileged()?;
    nacre_sys::memory::share_one_heap();
    let end = EndSignals::hold()?;
    let setup = Setup::new(global, false)?.with_keys(&args.keys);
    let service = setup.with(&args.trust, &args.keys.broker, &args.registry)?.service()?;
    let store = store(&service, &args.lazy)?;
    let image = service.open_lazy(&store, &args.image)?;
    let mounted = store.mount(image, &args.target)?;
    output::line(format_args!("{} {} {}", mounted.target().display(), mounted.kind(), mounted.image.manifest))?;
    if args.detached {
        leave(&store)?;
    }
    let reader = Arc::clone(&mounted.image.reader);
    if args.complete {
        // It ends with the process; what is missing then is fetched another time.
        thread::spawn(move || match reader.complete(&mut |_| true) {
            Ok(()) => tracing::info!("all of the image is here"),
            Err(error) => tracing::warn!("the image stays incomplete: {error}"),
        });
    }
    serve(mounted, &end).map(|()| 0)
}

/// Until it is unmounted, or we are told to end.
fn serve(mut mounted: LazyMount, end: &EndSignals) -> anyhow::Result<()> {
    loop {
        let told = end.wait_for(LOOK)?;
        if !told && mounted.is_mounted() {
            continue;
        }
        match mounted.unmount() {
            Ok(()) => return Ok(()),
            Err((back, error)) => {
                tracing::error!("{error}; it stays mounted");
                mounted = *back;
            }
        }
    }
}

fn detach() -> anyhow::Result<i32> {
    let mut child = Command::new("/proc/self/exe")
        .args(env::args_os().skip(1))
        .env(DETACHED, "true")
        .stdout(Stdio::piped())
        .spawn()
        .context("the process that serves the image cannot be started")?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(64 << 10).read_to_string(&mut said).context("the process that serves the image")?;
    }
    if said.is_empty() {
        let status = child.wait().context("the process that serves the image")?;
        return Ok(status.code().unwrap_or(output::Exit::Other as i32));
    }
    output::line(said.trim_end())?;
    Ok(0)
}

/// Leaves the terminal, the directory and the caller's pipe: who waits for the mount has it. What is logged from here on is in a file.
fn leave(store: &LazyStore) -> anyhow::Result<()> {
    let path = store.directory().join("log");
    let log = File::options().append(true).create(true).open(&path);
    let log = log.with_context(|| path.display().to_string())?;
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    env::set_current_dir("/").context("/")?;
    rustix::stdio::dup2_stderr(&log)?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

fn store(service: &ImageService, args: &LazyArgs) -> anyhow::Result<LazyStore> {
    let directory = service.images().store().root().join("lazy");
    let front = match args.front {
        FrontArg::Auto => Front::Best,
        FrontArg::Erofs => Front::Erofs,
        FrontArg::Fuse => Front::Fuse,
    };
    Ok(LazyStore::open(LazyOptions {
        cache: args.cache.clone().unwrap_or_else(|| directory.join("chunks")),
        directory,
        cache_limit: args.cache_limit.0,
        patience: Duration::from_secs(args.patience),
        front,
    })?)
}

/// Whether `umount` is about a lazy image: then it is done. The process that serves it sees that and ends.
pub(crate) fn unmount(target: &Path) -> anyhow::Result<bool> {
    let Ok(target) = std::fs::canonicalize(target) else { return Ok(false) };
    // Ours have their metadata among some store's mounts, or the name that we give to FUSE.
    let ours = match mounted(&target)? {
        Some((kind, source)) if kind == "erofs" => source.contains("/lazy/mounts/"),
        Some((kind, source)) => kind == "fuse.nacre" && source == "nacre-lazy",
        None => false,
    };
    if !ours {
        return Ok(false);
    }
    nacre_sys::fs::unmount(&target)?;
    Ok(true)
}

/// The type and the source of what is mounted on a directory, by /proc/self/mountinfo (proc(5)).
fn mounted(target: &Path) -> anyhow::Result<Option<(String, String)>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    let at = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let path = front.split(' ').nth(4)?.replace("\\040", " ");
        let (kind, rest) = back.split_once(' ')?;
        let source = rest.split(' ').next()?;
        (Path::new(&path) == target).then(|| (kind.to_owned(), source.to_owned()))
    };
    Ok(text.lines().filter_map(at).next_back())
}

/// Runs a lazy image; gives the exit code of its process.
pub(crate) fn run(
    service: &ImageService,
    args: &RunArgs,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let lazy = store(service, &args.lazy_options)?;
    let image = service.open_lazy(&lazy, &args.image)?;
    let target = image.own_target()?;
    let mounted = lazy.mount(image, &target)?;
    let ran = run_mounted(service, &mounted, overrides, runtime);
    // Whatever the container left running holds the mount; its bundle has gone.
    if let Err((_, error)) = mounted.unmount() {
        tracing::warn!("{error}");
    }
    ran
}

fn run_mounted(
    service: &ImageService,
    mounted: &LazyMount,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let bundle = service.mount_lazy_bundle(mounted, overrides)?;
    let path = &bundle.record().path;
    let code = runtime.run(path);
    ImageService::unmount_bundle(service.images().store(), path)?;
    Ok(code?)
}

/// What `image copy --lazy` does with images. `open` opens a location that a person named.
pub(crate) fn remake(
    args: &MakeLazyArgs,
    keyring: &Keyring,
    open: impl Fn(&str) -> anyhow::Result<Box<dyn ImageSource>>,
    platform: &Platform,
) -> anyhow::Result<LazyRemake> {
    let domain = args.domain_key_file.as_deref().map(domain).transpose()?;
    let mut shared = Vec::new();
    for name in &args.dedup_from {
        shared.push(share(Arc::from(open(name)?), keyring, platform).with_context(|| format!("--dedup-from {name}"))?);
    }
    Ok(LazyRemake {
        domain,
        level: args.level,
        chunk: u32::try_from(args.chunk_size.0).map_err(|_| Usage("--chunk-size is too large".into()))?,
        threads: thread::available_parallelism().map_or(2, usize::from),
        limits: Limits::default(),
        shared,
        reports: Mutex::default(),
    })
}

fn domain(path: &Path) -> anyhow::Result<Domain> {
    let bytes = nacre_core::SecretBytes::new(std::fs::read(path).with_context(|| path.display().to_string())?);
    let secret: SecretArray<32> = bytes.to_array().ok_or_else(|| {
        Usage(format!("{}: a domain key has 32 bytes, this file has {}", path.display(), bytes.len()))
    })?;
    Ok(Domain::new(&secret))
}

/// Opens a lazy image whose chunks are to be shared. Nothing of it is believed: a chunk is shared where its bytes are what the build makes.
fn share(source: Arc<dyn ImageSource>, keyring: &Keyring, platform: &Platform) -> anyhow::Result<Shared> {
    let mut raw = source.manifest(None)?.peek().clone();
    if raw.is_index() {
        let digest = Index::parse(&raw)?.choose(platform)?.digest;
        raw = verify_manifest(source.manifest(Some(&digest))?, &digest)?.into_inner();
    }
    let artifact = Artifact::parse(&Manifest::parse(&raw)?)?;
    let key = artifact.unwrap(keyring)?;
    let mut stream = metadata_stream(&*source, &artifact)?;
    let mut nowhere = tempfile::tempfile().context("a temporary file")?;
    let metadata = Metadata::read(&mut stream, &artifact.metadata.digest, key.as_ref(), &mut nowhere)?;
    metadata.check_blobs(&artifact.blobs())?;
    let (table, summary, blobs) = Table::new(metadata, artifact.table_blob());
    let from = Arc::new(ImageBlobs::new(Arc::clone(&source), &artifact));
    let reading = ReaderShared::new(Fetcher::new(None::<Cache>, Duration::from_secs(30)));
    let entries = Reader::new(reading, from, table, summary, blobs.clone()).entries()?;
    let data = artifact.data;
    Ok(Shared {
        blobs: blobs.iter().map(|blob| DataBlob { digest: blob.digest, size: blob.size }).collect(),
        entries,
        open: Box::new(move |blob| {
            let id = BlobId { digest: blob.digest, size: blob.size };
            let found = data.iter().find(|layer| blob_id(layer) == Some(id));
            let missing = || CopyError::Unsupported(format!("the image has no blob {id}"));
            Ok(source.blob(found.ok_or_else(missing)?)?)
        }),
    })
}

/// What was made, for `--json`.
pub(crate) fn reports(remake: &LazyRemake) -> Value {
    let reports = remake.reports.lock().unwrap_or_else(PoisonError::into_inner);
    let one = |report: &Report| {
        json!({
            "layers": report.layers,
            "entries": report.entries,
            "content_bytes": report.content_bytes,
            "new_chunks": report.new_chunks,
            "new_bytes": report.new_bytes,
            "shared_bytes": report.shared_bytes,
            "metadata_bytes": report.metadata_bytes,
            "table_bytes": report.table_bytes,
        })
    };
    reports.iter().map(one).collect()
}

/// What was made, for people.
pub(crate) fn note(remake: &LazyRemake, progress: &dyn nacre_core::Progress) {
    for report in remake.reports.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        progress.note(&format!(
            "{} of files in {} entries: {} stored in {} chunks, {} shared, {} of metadata",
            size(report.content_bytes),
            report.entries,
            size(report.new_bytes),
            report.new_chunks,
            size(report.shared_bytes),
            size(report.metadata_bytes + report.table_bytes),
        ));
    }
}

//! Lazy images that are used: `image mount`, `umount`, `complete`, `daemon`, and `run --lazy`.
//!
//! A command admits the image and has its key unwrapped, by its own policy, keys and environment; the daemon (`lazyd`) does the rest. `--foreground`,
//! and users without privileges, whose mounts nobody else sees, serve in their own process.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nacre_core::Digest;
use nacre_guest::{
    bundle::{Overrides, Runtime},
    lazy::{self, Front, LazyMount, LazyOptions, LazyStore},
    service::ImageService,
    store::Store,
};
use nacre_lazyd::{self as lazyd, ByDaemon, MountRequest, Program, Request, Shown, Station};
use nacre_oci::manifest::ImageConfig;
use nacre_sys::end::EndSignals;

use crate::{
    args::{
        Global, RunArgs,
        lazy::{DaemonCommand, MountArgs},
    },
    exit::{self, Damaged, Missing, Usage},
    output::{self, Exit},
    setup::{self, Setup},
};

/// How often it is looked whether the image is still mounted.
const LOOK: Duration = Duration::from_millis(500);

/// The directory of lazy images of a store.
fn directory(store: &Store) -> PathBuf {
    store.root().join("lazy")
}

/// The exit code.
pub(crate) fn mount(global: &Global, args: &MountArgs) -> anyhow::Result<i32> {
    setup::privileged()?;
    if args.foreground {
        return foreground(global, args);
    }
    if nacre_sys::userns::is_inside() {
        let text = "mounts of a user end with the command that made them: run as root, use `nacre run --lazy`, or --foreground";
        return Err(Usage(text.into()).into());
    }
    let target = fs::canonicalize(&args.target).with_context(|| args.target.display().to_string())?;
    let seen = fs::metadata(&target).with_context(|| target.display().to_string())?;
    let service = service(global, args)?;
    let request = MountRequest {
        target: Some(target),
        seen: Some((seen.dev(), seen.ino())),
        front: service.lazy_front(),
        options: service.lazy_options().clone(),
        complete: args.complete,
        lent: false,
    };
    let granted = service.grant_lazy(&args.image)?;
    if granted.lent.is_some() {
        let text =
            format!("the keys of {} are lent, and this command ends: --foreground renews their leases", args.image);
        return Err(Usage(text).into());
    }
    let mounted = lazyd::ask_to_mount(&program(global), granted.grant, request, false)?;
    output::line(format_args!("{} {} {}", mounted.target.display(), mounted.front, mounted.manifest))?;
    Ok(0)
}

fn service(global: &Global, args: &MountArgs) -> anyhow::Result<ImageService> {
    let setup = Setup::new(global, false)?.with_keys(&args.keys).with_lazy(&args.lazy);
    setup.with(&args.trust, &args.keys.broker, &args.registry)?.service()
}

/// How this program is called to be the daemon that serves lazy images.
fn program(global: &Global) -> Program {
    let exit = |error: &anyhow::Error| exit::of(error) as u8;
    Program { name: "nacre", command: &["image", "daemon"], log: global.log.clone(), exit }
}

/// A service whose bundles have their lazy images mounted by the daemon, where its mounts are to be seen here.
pub(crate) fn by_daemon(global: &Global, service: ImageService, bound: bool) -> ImageService {
    if nacre_sys::userns::is_inside() {
        return service;
    }
    let (options, front) = (service.lazy_options().clone(), service.lazy_front());
    service.with_mounter(Arc::new(ByDaemon { program: program(global), options, front, bound }))
}

/// Serves one image in this process.
fn foreground(global: &Global, args: &MountArgs) -> anyhow::Result<i32> {
    nacre_sys::memory::share_one_heap();
    let end = EndSignals::hold()?;
    let service = service(global, args)?;
    let store = LazyStore::open(service.lazy_options().clone())?;
    let image = service.open_lazy(&store, &args.image)?;
    let mounted = store.mount(image, &args.target, service.lazy_front())?;
    output::line(format_args!(
        "{} {} {}",
        mounted.target().display(),
        mounted.served().name(),
        mounted.image.manifest
    ))?;
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
        if let Some(why) = mounted.image.lent.as_ref().and_then(|tenure| tenure.ended()) {
            let why = why.to_owned();
            let detached = mounted.detach();
            // In the tree or not, it is served no more.
            drop(mounted);
            let lost = anyhow::Error::new(Damaged(why));
            return Err(match detached {
                Ok(()) => lost.context("the image was unmounted"),
                Err(error) => lost.context(format!("the image is served no more, and is still in the tree ({error})")),
            });
        }
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

/// Whether `umount` is about a lazy image: then it is done.
pub(crate) fn unmount(target: &Path) -> anyhow::Result<bool> {
    // Of what nobody serves any more, no attribute can be read.
    let parent = std::path::absolute(target)?.parent().map(Path::to_owned).unwrap_or_default();
    let found = fs::canonicalize(target).or_else(|_| {
        let name = target.file_name().ok_or(std::io::ErrorKind::NotFound)?;
        fs::canonicalize(parent).map(|parent| parent.join(name))
    });
    let Ok(target) = found else { return Ok(false) };
    // Which store it is of, it says itself.
    let mounts = nacre_sys::fs::mounts().context("/proc/self/mountinfo")?;
    let Some(lazy) = mounts.iter().rfind(|mount| mount.target == target).and_then(lazy_of) else { return Ok(false) };
    if let Some(daemon) = Station::here(&lazy)?.connected()? {
        match daemon.ask(&Request::Unmount { target: target.clone() }, &[]) {
            Err(error) if exit::of(&error) == Exit::NotFound => {}
            answered => return answered.map(|_| true),
        }
    }
    // A process of its own serves it and will see it, or nobody does.
    nacre_sys::fs::unmount(&target)?;
    lazy::clean(&lazy)?;
    Ok(true)
}

/// The directory of lazy images that a mount is of: its source is the metadata of EROFS, or the directory of FUSE, below `mounts`.
fn lazy_of(mount: &nacre_sys::fs::MountEntry) -> Option<PathBuf> {
    let place = match mount.kind.as_str() {
        "erofs" => mount.source.parent()?,
        kind if kind.strip_prefix("fuse.") == Some(lazy::SUBTYPE) => &mount.source,
        _ => return None,
    };
    let mounts = place.parent()?;
    (mounts.ends_with("lazy/mounts")).then(|| mounts.parent().map(Path::to_owned))?
}

/// Fetches all of an image.
pub(crate) fn complete(global: &Global, what: &str) -> anyhow::Result<()> {
    setup::privileged()?;
    let lazy = directory(&Setup::new(global, false)?.store()?);
    let none = || Missing(format!("{what}: no daemon serves lazy images of this store here"));
    let daemon = Station::here(&lazy)?.connected()?.ok_or_else(none)?;
    // Where there is such a directory, it is what is meant.
    let directory = fs::canonicalize(what).ok().and_then(|path| path.to_str().map(str::to_owned));
    let what = directory.unwrap_or_else(|| what.to_owned());
    daemon.ask(&Request::Complete { what }, &[]).map(drop)
}

/// The exit code.
pub(crate) fn daemon(global: &Global, command: &DaemonCommand) -> anyhow::Result<i32> {
    match command {
        DaemonCommand::Keep(args) => lazyd::keep(&program(global), args),
        DaemonCommand::Serve(args) => lazyd::serve(&program(global), args),
        DaemonCommand::Restart => {
            setup::privileged()?;
            Station::here(&directory(&Setup::new(global, false)?.store()?))?.restart().map(|()| 0)
        }
    }
}

/// The mounts of a store.
pub(crate) fn shown(store: &Store) -> anyhow::Result<Vec<Shown>> {
    lazyd::all(&directory(store))
}

/// Runs a lazy image; gives the exit code of its process.
pub(crate) fn run(
    global: &Global,
    service: &ImageService,
    args: &RunArgs,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let (options, front) = (service.lazy_options().clone(), service.lazy_front());
    if nacre_sys::userns::is_inside() {
        return run_alone(service, &args.image, options, front, overrides, runtime);
    }
    let station = Station::here(&options.directory)?;
    let granted = service.grant_lazy(&args.image)?;
    let lent = granted.lent.is_some();
    let request = MountRequest { target: None, seen: None, front, options, complete: false, lent };
    let mounted = lazyd::ask_to_mount(&program(global), granted.grant, request, true)?;
    drop(granted.opened);
    if let Some(tenure) = &granted.lent {
        let (station, target) = (station.clone(), mounted.target.clone());
        let cut = move || station.connected()?.map(|daemon| daemon.ask(&Request::Cut { target }, &[])).transpose();
        let end = move |why: &str| {
            tracing::error!("{why}; the image is taken away");
            if let Err(error) = cut() {
                tracing::error!("{error:#}");
            }
        };
        tenure.give_to(|| false, end);
    }
    let (manifest, config) = (mounted.manifest.parse()?, serde_json::from_value(mounted.config)?);
    let ran = run_mounted(service, &manifest, &mounted.target, &config, overrides, runtime);
    // Whatever the container left running holds the mount; its bundle has gone. The daemon would see our end as well.
    let unmounted = station.connected().and_then(|daemon| match daemon {
        Some(daemon) => daemon.ask(&Request::Unmount { target: mounted.target }, &[]).map(drop),
        None => Ok(()),
    });
    if let Err(error) = unmounted {
        tracing::warn!("{error:#}");
    }
    ran
}

/// The same, served by this process.
fn run_alone(
    service: &ImageService,
    image: &str,
    options: LazyOptions,
    front: Front,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let lazy = LazyStore::open(options)?;
    let image = service.open_lazy(&lazy, image)?;
    let target = image.own_target()?;
    let mounted = lazy.mount(image, &target, front)?;
    let (manifest, config) = (&mounted.image.manifest, &mounted.image.config);
    let ran = run_mounted(service, manifest, mounted.target(), config, overrides, runtime);
    if let Err((_, error)) = mounted.unmount() {
        tracing::warn!("{error}");
    }
    ran
}

pub(super) fn run_mounted(
    service: &ImageService,
    manifest: &Digest,
    mounted: &Path,
    config: &ImageConfig,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let bundle = service.mount_lazy_bundle(manifest, mounted, config, overrides)?;
    let path = &bundle.record().path;
    let code = runtime.run(path);
    ImageService::unmount_bundle(service.images().store(), path)?;
    Ok(code?)
}

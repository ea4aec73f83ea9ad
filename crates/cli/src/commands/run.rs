//! `nacre run`: pull, mount, run, clean up.

use nacre_guest::{
    bundle::{Overrides, Runtime},
    images::PulledImage,
    service::ImageService,
};

use crate::{
    args::{Global, ProcessArgs, RunArgs},
    setup::{self, Setup},
};

/// Runs an image; gives the exit code of its process.
pub(crate) fn run(global: &Global, args: &RunArgs) -> anyhow::Result<i32> {
    setup::privileged()?;
    let setup = Setup::new(global, false)?.with_keys(&args.keys).with_lazy(&args.lazy_options);
    let service = setup.with(&args.trust, &args.keys.broker, &args.registry)?.service()?;
    let service = super::mounts::by_daemon(global, service, true);
    let runtime = Runtime::find(args.process.runtime.as_deref())?;
    let overrides = overrides(&args.process);
    if args.lazy {
        return super::mounts::run(global, &service, args, &overrides, &runtime);
    }
    let pulled = if args.offline { open(&service, &args.image)? } else { service.pull(&args.image)? };
    run_pulled(&service, &pulled, &overrides, &runtime)
}

pub(crate) fn overrides(args: &ProcessArgs) -> Overrides {
    Overrides {
        args: (!args.command.is_empty()).then(|| args.command.clone()),
        // What stands after `--` is the whole command, as `ctr run` takes it.
        entrypoint: (!args.command.is_empty()).then(Vec::new),
        env: args.env.clone(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        read_only: args.read_only,
        ..Overrides::default()
    }
}

/// Runs a pulled image in a bundle that goes afterwards.
pub(crate) fn run_pulled(
    service: &ImageService,
    pulled: &PulledImage,
    overrides: &Overrides,
    runtime: &Runtime,
) -> anyhow::Result<i32> {
    let store = service.images().store();
    let bundle = service.mount_own_bundle(pulled, overrides)?;
    let path = &bundle.record().path;
    let code = runtime.run(path);
    ImageService::unmount_bundle(store, path)?;
    Ok(code?)
}

fn open(service: &ImageService, text: &str) -> anyhow::Result<PulledImage> {
    let name = super::find(service.images().store(), &service.locations(text).unwrap_or_default(), text)?;
    Ok(service.images().open(&name)?)
}

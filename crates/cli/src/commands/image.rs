//! `nacre image`: pull, ls, verify, rm, gc, umount; the others are in modules of their own.

use std::path::Path;

use nacre_guest::{
    bundle::Overrides,
    images::PulledImage,
    service::ImageService,
    store::{ImageRecord, RefRecord, Store, StoreError},
};
use nacre_lazyd::Shown;
use nacre_oci::{
    reference::{ImageRef, Location},
    trust::{Admission, Signer},
};
use serde_json::{Value, json};

use crate::{
    args::{Global, ImageCommand, LookArgs, PullArgs, VerifyArgs},
    output,
    progress::size,
    setup::{self, Setup},
};

/// The exit code.
pub(crate) fn image(global: &Global, command: &ImageCommand) -> anyhow::Result<i32> {
    match command {
        ImageCommand::Pull(args) => pull(global, args),
        ImageCommand::Copy(args) => super::copy::copy(global, args),
        ImageCommand::Index(args) => super::index::index(global, args),
        ImageCommand::Mount(args) => return super::mounts::mount(global, args),
        ImageCommand::Complete { what } => super::mounts::complete(global, what),
        ImageCommand::Daemon(command) => return super::mounts::daemon(global, command),
        ImageCommand::Trace(args) => super::trace::trace(global, args),
        ImageCommand::Ls { json } => list(global, *json),
        ImageCommand::Inspect(args) => super::inspect::inspect(global, args),
        ImageCommand::Verify(args) => verify(global, args),
        ImageCommand::Rm { images } => remove(global, images),
        ImageCommand::Gc { json } => collect(global, *json),
        ImageCommand::Umount { bundle } => unmount(global, bundle),
    }
    .map(|()| 0)
}

fn pull(global: &Global, args: &PullArgs) -> anyhow::Result<()> {
    if args.bundle.is_some() && nacre_sys::userns::is_inside() {
        anyhow::bail!("--bundle needs root: a user's mounts end with the command that made them; use `nacre run`");
    }
    setup::privileged()?;
    let setup = Setup::new(global, args.json)?.with_keys(&args.keys);
    let service = setup.with(&args.trust, &args.keys.broker, &args.registry)?.service()?;
    let service = super::mounts::by_daemon(global, service, false);
    let pulled = service.pull(&args.image)?;
    if let Some(bundle) = &args.bundle {
        service.mount_bundle(&pulled, bundle, &overrides_of_bundle(&pulled))?;
    }
    if args.json {
        return output::json(&pulled_json(&args.image, &pulled, args.bundle.as_deref()));
    }
    Ok(output::line(pulled.image.manifest)?)
}

/// A bundle without a command is still wanted for its files; as of other unpackers, it then has a shell to run.
fn overrides_of_bundle(pulled: &PulledImage) -> Overrides {
    let process = &pulled.image.config.config;
    let none = process.entrypoint.is_empty() && process.cmd.is_empty();
    Overrides { args: none.then(|| vec!["sh".to_owned()]), ..Overrides::default() }
}

fn pulled_json(name: &str, pulled: &PulledImage, bundle: Option<&Path>) -> Value {
    json!({
        "image": name,
        "manifest": pulled.image.manifest,
        "layers": pulled.image.layers,
        "lazy": pulled.image.lazy,
        "fetched": pulled.fetched,
        "admission": admission_json(&pulled.admission),
        "bundle": bundle,
    })
}

fn admission_json(admission: &Admission) -> Value {
    let admitted = admission.admitted();
    json!({
        "kind": admission.kind().to_string(),
        "policy": admitted.policy(),
        "rule": admitted.rule(),
        "signers": admitted.signers().iter().map(signer_json).collect::<Vec<_>>(),
    })
}

fn signer_json(signer: &Signer) -> Value {
    json!({ "scheme": format!("{:?}", signer.scheme).to_lowercase(), "who": signer.who, "digest": signer.digest })
}

fn list(global: &Global, json: bool) -> anyhow::Result<()> {
    setup::privileged()?;
    let store = Setup::new(global, json)?.store()?;
    let mut images = Vec::new();
    for name in store.names()? {
        images.extend(store.image(&name.manifest)?.map(|image| (name, image)));
    }
    let mounts = super::mounts::shown(&store)?;
    if json {
        return output::json(&listed_json(&store, &images, &mounts)?);
    }
    let row = |(name, image): &(RefRecord, ImageRecord)| {
        let bytes = image_bytes(&store, image);
        let layers = if image.lazy.is_some() { "lazy".into() } else { image.layers.len().to_string() };
        vec![name.name.clone(), image.manifest.short(), layers, size(bytes), name.pulled.clone()]
    };
    let rows: Vec<Vec<String>> = images.iter().map(row).collect();
    output::table(&["NAME", "MANIFEST", "LAYERS", "SIZE", "PULLED"], &rows)?;
    if mounts.is_empty() {
        return Ok(());
    }
    let row = |mount: &Shown| {
        let failure = mount.failure.as_ref().map(|failure| format!("{} at {}", failure.reason, failure.at));
        let local = format!("{} of {}", size(mount.local_bytes), size(mount.total_bytes));
        let state = match mount {
            Shown { leaving: true, .. } => "unmounted, in use",
            Shown { complete: true, .. } => "complete",
            Shown { completing: true, .. } => "completing",
            _ => "",
        };
        let target = mount.target.display().to_string();
        vec![target, mount.name.clone(), mount.front.clone(), local, state.into(), failure.unwrap_or_default()]
    };
    let rows: Vec<Vec<String>> = mounts.iter().map(row).collect();
    output::line("")?;
    Ok(output::table(&["MOUNT", "NAME", "FRONT", "LOCAL", "STATE", "LAST FAILURE"], &rows)?)
}

/// Every image with its mounts; one that is mounted and was not pulled has no layers.
fn listed_json(store: &Store, images: &[(RefRecord, ImageRecord)], mounts: &[Shown]) -> anyhow::Result<Vec<Value>> {
    let of = |manifest: &str| mounts.iter().filter(|mount| mount.manifest == manifest).collect::<Vec<_>>();
    let mut list = Vec::new();
    for (name, image) in images {
        let mut one = stored_json(store, name, image);
        one["mounts"] = serde_json::to_value(of(&image.manifest.to_string()))?;
        list.push(one);
    }
    let mut manifests: Vec<&str> = mounts.iter().map(|mount| mount.manifest.as_str()).collect();
    manifests.sort_unstable();
    manifests.dedup();
    let stored = |manifest: &str| images.iter().any(|(_, image)| image.manifest.to_string() == manifest);
    for manifest in manifests.into_iter().filter(|manifest| !stored(manifest)) {
        let here = of(manifest);
        list.push(json!({
            "name": here.first().map(|mount| &mount.name),
            "manifest": manifest,
            "chain": [],
            "bytes": 0,
            "pulled": Value::Null,
            "admitted": Value::Null,
            "layers": [],
            "lazy": Value::Null,
            "mounts": here,
        }));
    }
    Ok(list)
}

/// Bytes of an image's file content, in all layers; of a lazy one, wherever they are. Layers that are shared count for each image.
fn image_bytes(store: &Store, image: &ImageRecord) -> u64 {
    if let Some(lazy) = &image.lazy {
        return lazy.content_bytes;
    }
    let records = image.stack.iter().filter_map(|id| store.layer_record(id).ok().flatten());
    records.map(|record| record.applied.content_bytes).sum()
}

pub(super) fn stored_json(store: &Store, name: &RefRecord, image: &ImageRecord) -> Value {
    json!({
        "name": name.name,
        "manifest": image.manifest,
        "chain": name.chain,
        "bytes": image_bytes(store, image),
        "pulled": name.pulled,
        "admitted": name.admitted,
        "layers": image.layers,
        "lazy": image.lazy,
    })
}

/// The stored image of a name, unless the remote one is asked for or there is none.
pub(super) fn stored(service: &ImageService, args: &LookArgs) -> anyhow::Result<Option<RefRecord>> {
    if args.remote {
        return Ok(None);
    }
    // What is no location may still be a digest.
    match super::find(service.images().store(), &service.locations(&args.image).unwrap_or_default(), &args.image) {
        Err(StoreError::NoImage { .. }) => Ok(None),
        found => Ok(Some(found?)),
    }
}

fn verify(global: &Global, VerifyArgs { look: args, broker, trust }: &VerifyArgs) -> anyhow::Result<()> {
    setup::privileged()?;
    let service = Setup::new(global, true)?.with(trust, broker, &args.registry)?.service()?;
    let (place, admission) = match stored(&service, args)? {
        Some(name) => ("in the store", service.images().verify_stored(&name)?),
        None => ("at its source", service.with_source(&args.image, |source| service.images().verify(source))?),
    };
    if args.json {
        let mut all = admission_json(&admission);
        if let Some(fields) = all.as_object_mut() {
            fields.insert("image".into(), admission.admitted().image().into());
            fields.insert("manifest".into(), admission.manifest().to_string().into());
        }
        return output::json(&all);
    }
    output::line(format_args!("{} ({place}) is trusted: {}", admission.admitted().image(), admission.kind()))?;
    output::line(format_args!("manifest   {}", admission.manifest()))?;
    output::line(format_args!("rule       {} of {}", admission.admitted().rule(), admission.admitted().policy()))?;
    for signer in admission.admitted().signers() {
        output::line(format_args!("signed by  {} ({:?}, over {})", signer.who, signer.scheme, signer.digest))?;
    }
    Ok(())
}

fn remove(global: &Global, images: &[String]) -> anyhow::Result<()> {
    setup::privileged()?;
    let setup = Setup::new(global, false)?;
    let store = setup.store()?;
    let registries = setup.registries_conf()?;
    let result = images.iter().try_for_each(|text| {
        let locations: Vec<Location> = match Location::has_transport(text) {
            true => vec![text.parse()?],
            // What is no name may still be a digest.
            false => registries.candidates(text).unwrap_or_default().into_iter().map(docker).collect(),
        };
        let removed = store.remove(&super::find(&store, &locations, text)?)?;
        anyhow::Ok(output::line(removed.name)?)
    });
    // Also when one of several is not there.
    store.collect()?;
    result
}

fn docker(name: ImageRef) -> Location {
    Location::Docker(name.with_default_tag())
}

fn collect(global: &Global, json: bool) -> anyhow::Result<()> {
    setup::privileged()?;
    let collected = Setup::new(global, json)?.store()?.collect()?;
    if json {
        return output::json(&json!({
            "layers": collected.layers,
            "bytes": collected.bytes,
            "staging": collected.staging,
            "busy": collected.busy,
        }));
    }
    let (layers, bytes) = (collected.layers.len(), size(collected.bytes));
    output::line(format_args!(
        "{layers} layers removed, {bytes}; {} leftovers of killed processes",
        collected.staging
    ))?;
    if collected.busy > 0 {
        output::line(format_args!("{} unused layers are in use right now and stay", collected.busy))?;
    }
    Ok(())
}

fn unmount(global: &Global, bundle: &Path) -> anyhow::Result<()> {
    setup::privileged()?;
    if super::mounts::unmount(bundle)? {
        return Ok(());
    }
    Ok(ImageService::unmount_bundle(&Setup::new(global, false)?.store()?, bundle)?)
}

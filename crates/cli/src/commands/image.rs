//! `nacre image`: pull, ls, inspect, verify, rm, gc, umount.

use std::path::Path;

use anyhow::Context as _;
use nacre_guest::{
    bundle::Overrides,
    images::PulledImage,
    service::ImageService,
    store::{ImageRecord, RefRecord, Store, StoreError},
};
use nacre_oci::{
    reference::{ImageRef, Location},
    trust::{Admission, Signer},
};
use serde_json::{Value, json};

use crate::{
    args::{Global, ImageCommand, InspectArgs, PullArgs, VerifyArgs},
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
        ImageCommand::Mount(args) => return super::lazy::mount(global, args),
        ImageCommand::Ls { json } => list(global, *json),
        ImageCommand::Inspect(args) => inspect(global, args),
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
    if json {
        let list: Vec<Value> = images.iter().map(|(name, image)| stored_json(&store, name, image)).collect();
        return output::json(&list);
    }
    let row = |(name, image): &(RefRecord, ImageRecord)| {
        let bytes = layer_bytes(&store, image);
        let layers = image.layers.len().to_string();
        vec![name.name.clone(), image.manifest.short(), layers, size(bytes), name.pulled.clone()]
    };
    let rows: Vec<Vec<String>> = images.iter().map(row).collect();
    Ok(output::table(&["NAME", "MANIFEST", "LAYERS", "SIZE", "PULLED"], &rows)?)
}

/// Bytes of file content of an image's layers. Layers that are shared count for each image.
fn layer_bytes(store: &Store, image: &ImageRecord) -> u64 {
    let records = image.stack.iter().filter_map(|id| store.layer_record(id).ok().flatten());
    records.map(|record| record.applied.content_bytes).sum()
}

fn stored_json(store: &Store, name: &RefRecord, image: &ImageRecord) -> Value {
    json!({
        "name": name.name,
        "manifest": image.manifest,
        "chain": name.chain,
        "bytes": layer_bytes(store, image),
        "pulled": name.pulled,
        "admitted": name.admitted,
        "layers": image.layers,
    })
}

/// The stored image of a name, unless the remote one is asked for or there is none.
fn stored(service: &ImageService, args: &InspectArgs) -> anyhow::Result<Option<RefRecord>> {
    if args.remote {
        return Ok(None);
    }
    // What is no location may still be a digest.
    match super::find(service.images().store(), &service.locations(&args.image).unwrap_or_default(), &args.image) {
        Err(StoreError::NoImage { .. }) => Ok(None),
        found => Ok(Some(found?)),
    }
}

fn inspect(global: &Global, args: &InspectArgs) -> anyhow::Result<()> {
    setup::privileged()?;
    let service = Setup::new(global, true)?.without_policy(&args.broker, &args.registry)?.service()?;
    let (name, manifest, config) = match stored(&service, args)? {
        Some(name) => {
            let store = service.images().store();
            let image = store.image(&name.manifest)?.context("the image has gone meanwhile")?;
            let manifest = store.image_manifest(&image.manifest)?.unwrap_or_default();
            (stored_json(store, &name, &image), manifest, serde_json::to_value(&image.config)?)
        }
        None => {
            let found = service.with_source(&args.image, |source| service.images().inspect(source))?;
            let name = json!({ "name": found.name, "chain": found.chain });
            (name, found.manifest, serde_json::to_value(&found.config)?)
        }
    };
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let mut all = name;
    if let Some(fields) = all.as_object_mut() {
        fields.insert("manifest_document".into(), manifest);
        fields.insert("config".into(), config);
    }
    if args.json {
        return output::json(&all);
    }
    Ok(show_inspected(&all)?)
}

fn show_inspected(all: &Value) -> std::io::Result<()> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    for key in ["name", "manifest", "pulled", "admitted"] {
        if let Some(value) = all.get(key) {
            output::line(format_args!("{key:<10} {}", text(value)))?;
        }
    }
    for (digest, what) in
        all.get("chain").and_then(Value::as_array).into_iter().flatten().rev().zip(["manifest", "index"])
    {
        output::line(format_args!("{what:<10} {}", text(digest)))?;
    }
    let config = |pointer: &str| all.pointer(pointer).map(Value::to_string).unwrap_or_default();
    if all["config"].is_null() {
        output::line(
            "lazy       its config and its tree are in the metadata, layer 0; the table is layer 1, data the others",
        )?;
    } else {
        let platform = (text(&all["config"]["os"]), text(&all["config"]["architecture"]));
        output::line(format_args!("platform   {}/{}", platform.0, platform.1))?;
        output::line(format_args!(
            "command    {} {}",
            config("/config/config/Entrypoint"),
            config("/config/config/Cmd")
        ))?;
    }
    for (index, layer) in
        all.pointer("/manifest_document/layers").and_then(Value::as_array).into_iter().flatten().enumerate()
    {
        let bytes = size(layer["size"].as_u64().unwrap_or_default());
        output::line(format_args!(
            "layer {index:<4} {} {bytes:>11} {}",
            text(&layer["digest"]),
            text(&layer["mediaType"])
        ))?;
    }
    Ok(())
}

fn verify(global: &Global, VerifyArgs { image: args, trust }: &VerifyArgs) -> anyhow::Result<()> {
    setup::privileged()?;
    let service = Setup::new(global, true)?.with(trust, &args.broker, &args.registry)?.service()?;
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
    if super::lazy::unmount(bundle)? {
        return Ok(());
    }
    Ok(ImageService::unmount_bundle(&Setup::new(global, false)?.store()?, bundle)?)
}

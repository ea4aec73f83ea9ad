//! `nacre image inspect`: what an image is, and of a lazy image what it is made of.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use nacre_guest::{images::Inspected, service::ImageService};
use nacre_lazy::{
    artifact::{Artifact, ArtifactError, ImageBlobs, is_lazy, read_metadata},
    cache::Cache,
    erofs::Image,
    fetch::Fetcher,
    image::Table,
    reader::{Counts, Reader, Shared, Survey},
};
use nacre_oci::{
    manifest::{Manifest, Platform, RawManifest},
    reference::Location,
    source::ImageSource,
};
use serde_json::{Value, json};

use super::{
    image::{stored, stored_json},
    lazy,
};
use crate::{
    args::{Global, InspectArgs},
    exit::Usage,
    output,
    progress::size,
    setup::{self, Setup},
};

/// How long a table is waited for where its source fails.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn inspect(global: &Global, args: &InspectArgs) -> anyhow::Result<()> {
    setup::privileged()?;
    let setup = Setup::new(global, true)?.with_keys(&args.keys);
    let setup = setup.without_policy(&args.keys.broker, &args.look.registry)?;
    let (service, platform) = (setup.service()?, lazy::platform(setup.config.image.platform.as_deref())?);
    let mut lazily = None;
    let (name, manifest, config) = match stored(&service, &args.look)? {
        Some(name) => {
            let store = service.images().store();
            let image = store.image(&name.manifest)?.context("the image has gone meanwhile")?;
            let manifest = store.image_manifest(&image.manifest)?.unwrap_or_default();
            (stored_json(store, &name, &image), manifest, serde_json::to_value(&image.config)?)
        }
        None => {
            let found = service.with_source(&args.look.image, |source| service.images().inspect(source))?;
            let name = json!({ "name": found.name, "chain": found.chain });
            let mut config = serde_json::to_value(&found.config)?;
            if let Some(looked) = lazy_of(&service, &found, args, &platform)? {
                config = looked.config;
                lazily = Some(looked.shown);
            }
            (name, found.manifest, config)
        }
    };
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let mut all = name;
    if let Some(fields) = all.as_object_mut() {
        fields.insert("manifest_document".into(), manifest);
        fields.insert("config".into(), config);
        if let Some(lazily) = lazily {
            fields.insert("lazy".into(), lazily);
        } else if !args.shared_with.is_empty() {
            return Err(Usage("--shared-with is for lazy images; this is none".into()).into());
        }
    }
    if args.look.json {
        return output::json(&all);
    }
    show_inspected(&all)
}

fn show_inspected(all: &Value) -> anyhow::Result<()> {
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
    if !all["config"].is_null() {
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
    match &all["lazy"] {
        Value::Null => Ok(()),
        lazily => show_lazy(lazily),
    }
}

/// What is said of a lazy image.
struct Looked {
    shown: Value,
    config: Value,
}

/// `None`: it is no lazy image.
fn lazy_of(
    service: &ImageService,
    found: &Inspected,
    args: &InspectArgs,
    platform: &Platform,
) -> anyhow::Result<Option<Looked>> {
    let manifest = Manifest::parse(&RawManifest::new(found.manifest.clone(), None)?)?;
    if !is_lazy(&manifest) {
        return Ok(None);
    }
    let location: Location = found.name.parse()?;
    let artifact = Artifact::parse(&manifest)?;
    let mut shown = outside(&artifact);
    let opened = match open(service, Arc::from(service.source(&location)?), &artifact) {
        // Without a key there is this much to be seen, for everybody.
        Err(error) if args.keys.decryption_key.is_empty() && error.is::<ArtifactError>() => {
            shown.insert("locked".into(), format!("{error:#}").into());
            anyhow::ensure!(args.shared_with.is_empty(), "--shared-with: {error:#}");
            return Ok(Some(Looked { shown: shown.into(), config: Value::Null }));
        }
        opened => opened?,
    };
    let Opened { metadata_says, config, survey } = opened;
    shown.extend(metadata_says);
    shown.extend(inside(&survey, &artifact));
    let mut shares = Vec::new();
    for name in &args.shared_with {
        let other = other(service, name, platform).with_context(|| format!("--shared-with {name}"))?;
        let counts = survey.shared_with(&other).map(counts);
        shares.push(json!({ "image": name, "shared": counts }));
    }
    if !shares.is_empty() {
        shown.insert("shared_with".into(), shares.into());
    }
    Ok(Some(Looked { shown: shown.into(), config }))
}

fn other(service: &ImageService, name: &str, platform: &Platform) -> anyhow::Result<Survey> {
    let location = service.locations(name)?.into_iter().next().context("it names no image")?;
    let source: Arc<dyn ImageSource> = Arc::from(service.source(&location)?);
    let artifact = Artifact::parse(&lazy::manifest(&*source, platform)?)?;
    Ok(open(service, source, &artifact)?.survey)
}

type Fields = serde_json::Map<String, Value>;

fn fields(value: Value) -> Fields {
    match value {
        Value::Object(fields) => fields,
        _ => Fields::new(),
    }
}

/// What everybody sees.
fn outside(artifact: &Artifact) -> Fields {
    fields(json!({
        "encrypted": artifact.sealed,
        "metadata_bytes": artifact.metadata.size,
        "table_bytes": artifact.table.as_ref().map_or(0, |table| table.size),
        "data_bytes": artifact.data.iter().map(|blob| blob.size).sum::<u64>(),
        "data_blobs": artifact.data.len(),
    }))
}

struct Opened {
    metadata_says: Fields,
    config: Value,
    survey: Survey,
}

fn open(service: &ImageService, source: Arc<dyn ImageSource>, artifact: &Artifact) -> anyhow::Result<Opened> {
    let key = artifact.unwrap(service.images().keyring())?;
    let mut erofs = tempfile::tempfile_in(service.images().store().root()).context("a temporary file in the store")?;
    let metadata = read_metadata(&*source, artifact, key.as_ref(), &mut erofs, None)?;
    metadata.check_blobs(&artifact.blobs())?;
    let inodes = Image::open(erofs)?.inodes();
    let summary = metadata.summary;
    let metadata_says = fields(json!({
        "content_bytes": summary.content_bytes.get(),
        "device_bytes": summary.device_bytes.get(),
        "inodes": inodes,
    }));
    let config = serde_json::from_slice(&metadata.config).context("the image's config")?;
    let (table, summary, blobs) = Table::new(metadata, artifact.table_blob());
    let from = Arc::new(ImageBlobs::new(source, artifact));
    let reading = Shared::new(Fetcher::new(None::<Cache>, PATIENCE));
    let survey = Reader::new(reading, from, table, summary, blobs).survey()?;
    Ok(Opened { metadata_says, config, survey })
}

fn counts(counts: Counts) -> Value {
    json!({ "chunks": counts.chunks, "plain_bytes": counts.plain, "stored_bytes": counts.stored })
}

/// What the table says.
fn inside(survey: &Survey, artifact: &Artifact) -> Fields {
    let blob = |(layer, of_it): (&nacre_oci::manifest::Descriptor, &Counts)| json!({ "digest": layer.digest, "size": layer.size, "used": counts(*of_it) });
    let (zstd, raw) = (survey.zstd, survey.raw);
    let all = zstd.chunks + raw.chunks;
    fields(json!({
        "chunks": {
            "zstd": counts(zstd),
            "raw": counts(raw),
            "zeroes": counts(survey.zeroes),
            "average_plain": (zstd.plain + raw.plain).checked_div(all),
            "average_stored": (zstd.stored + raw.stored).checked_div(all),
        },
        "repeated": survey.repeated.map(counts),
        "trace": counts(survey.trace),
        "blobs": artifact.data.iter().zip(&survey.blobs).map(blob).collect::<Vec<_>>(),
    }))
}

fn show_lazy(lazily: &Value) -> anyhow::Result<()> {
    let number = |pointer: &str| lazily.pointer(pointer).and_then(Value::as_u64).unwrap_or_default();
    let bytes = |pointer: &str| size(number(pointer));
    let sealed = if lazily["encrypted"] == true { "encrypted" } else { "not encrypted" };
    output::line(format_args!(
        "lazy       {sealed}: {} of metadata, {} of table, {} in {} data blobs",
        bytes("/metadata_bytes"),
        bytes("/table_bytes"),
        bytes("/data_bytes"),
        number("/data_blobs")
    ))?;
    if let Some(locked) = lazily["locked"].as_str() {
        return Ok(output::line(format_args!(
            "locked     {locked}; with its key (--decryption-key) there is more to see"
        ))?);
    }
    output::line(format_args!("content    {} in {} inodes", bytes("/content_bytes"), number("/inodes")))?;
    for (what, name) in [("zstd", "zstd"), ("raw", "as it is"), ("zeroes", "zeroes")] {
        let of = |part: &str| format!("/chunks/{what}/{part}");
        let (chunks, plain, stored) = (number(&of("chunks")), bytes(&of("plain_bytes")), bytes(&of("stored_bytes")));
        output::line(format_args!("chunks     {chunks:>9} {name:<9} {plain:>11} stored in {stored:>11}"))?;
    }
    let average = (bytes("/chunks/average_plain"), bytes("/chunks/average_stored"));
    output::line(format_args!("average    {} stored in {}", average.0, average.1))?;
    let shared = |value: &Value| match value["chunks"].as_u64() {
        Some(chunks) => {
            format!("{chunks} chunks, {} stored once", size(value["stored_bytes"].as_u64().unwrap_or_default()))
        }
        None => "too many chunks to tell".to_owned(),
    };
    output::line(format_args!("repeated   {}", shared(&lazily["repeated"])))?;
    for other in lazily["shared_with"].as_array().into_iter().flatten() {
        let name = other["image"].as_str().unwrap_or_default();
        output::line(format_args!("shared     {} with {name}", shared(&other["shared"])))?;
    }
    for (number, blob) in lazily["blobs"].as_array().into_iter().flatten().enumerate() {
        let used = &blob["used"];
        let (chunks, stored) = (used["chunks"].as_u64(), used["stored_bytes"].as_u64());
        let of = size(blob["size"].as_u64().unwrap_or_default());
        let (chunks, stored) = (chunks.unwrap_or_default(), size(stored.unwrap_or_default()));
        output::line(format_args!("data {number:<5} {chunks} chunks, {stored} of {of}"))?;
    }
    let trace = match number("/trace/chunks") {
        0 => "none".to_owned(),
        chunks => format!("{chunks} chunks, {} stored", bytes("/trace/stored_bytes")),
    };
    Ok(output::line(format_args!("trace      {trace}"))?)
}

//! `nacre image index`: makes an ordinary image mountable where it is.

use std::sync::{Mutex, PoisonError};

use nacre_lazy::index::build::{IndexRemake, IndexReport};
use nacre_oci::{
    copy::{self, Copied, CopyOptions, EncryptLayers, ExistingSignatures, Platforms, Remake, Source},
    crypt::{Keyring, Recipients},
    manifest::Compression,
    reference::Location,
    transport::{open_sink, open_source},
    unpack::Limits,
};
use serde_json::{Value, json};

use super::copy::{Signing, admitted, location, shipping};
use crate::{
    args::{Global, index::IndexArgs},
    exit::Usage,
    output,
    progress::size,
    setup::Setup,
};

pub(crate) fn index(global: &Global, args: &IndexArgs) -> anyhow::Result<()> {
    let mut setup = Setup::new(global, args.json)?;
    setup.add_registry(&args.registry);
    let config = &setup.config;
    let (client, lookaside) = shipping(&setup, args.registries_d.as_deref())?;
    let platforms = match config.image.platform.as_deref() {
        Some(platform) => Platforms::One(platform.parse()?),
        None => Platforms::Host,
    };
    let keyring = Keyring::from_args(&args.decryption_key)?;
    let recipients = Recipients::from_args(&args.encrypt)?;
    let signing = Signing::of(&args.sign)?;
    let from = location(&args.image, &client)?;
    let to = args.to.as_deref().map(|text| location(text, &client)).transpose()?;
    let beside = to.as_ref().unwrap_or(&from);
    if !matches!(beside, Location::Docker(_) | Location::OciDir { .. }) {
        let problem =
            format!("{beside}: an index lies beside an image at a registry or in an OCI layout; name one, with --to");
        return Err(Usage(problem).into());
    }
    let source = open_source(&from, &client)?;
    let sink = open_sink(beside, &client)?;
    let source = match &args.policy {
        Some(policy) => admitted(&*source, policy, &lookaside, &platforms)?,
        None => Source::without_policy(&*source)?,
    };
    let remake = IndexRemake { span: args.span.0, limits: Limits::default(), reports: Mutex::default() };
    let options = CopyOptions {
        platforms,
        decrypt: (!args.decryption_key.is_empty()).then_some(&keyring),
        encrypt: (!args.encrypt.is_empty()).then_some((&recipients, &EncryptLayers::All)),
        remake: Some(&remake as &dyn Remake),
        attach: true,
        signatures: ExistingSignatures::Remove,
        sign: signing.sign(),
        lookaside: Some(&lookaside),
        progress: &*setup.progress,
        ..CopyOptions::default()
    };
    let copied = copy::copy(&source, &*sink, &options)?;
    let reports = remake.reports.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(report) = reports.last() else { anyhow::bail!("{from} has nothing that could be indexed") };
    note(report, &*setup.progress);
    if args.json {
        return output::json(&to_json(report, &copied));
    }
    Ok(output::line(copied.digest)?)
}

fn name(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "tar",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}

fn bytes(report: &IndexReport) -> u64 {
    report.metadata_bytes + report.pages_bytes
}

/// Of the layers' bytes.
fn percentage(report: &IndexReport) -> f64 {
    let layers: u64 = report.layers.iter().map(|layer| layer.size).sum();
    bytes(report) as f64 * 100.0 / (layers.max(1) as f64)
}

/// What was made, for people.
fn note(report: &IndexReport, progress: &dyn nacre_core::Progress) {
    for layer in report.layers.iter().filter(|layer| layer.spooled > 0) {
        progress.note(&format!(
            "layer {}: its {} stream has no border within {} of its {}, so whoever reads there decodes all before it, once, into a file beside \
             the mount: recompress it in more and smaller frames, or make a lazy image",
            layer.digest.short(),
            name(layer.compression),
            size(layer.spooled),
            size(layer.tar_bytes),
        ));
    }
    let spans: u64 = report.layers.iter().map(|layer| layer.spans).sum();
    progress.note(&format!(
        "{} of files in {} layers: {} spans, {} of index ({:.2} % of the layers) in {:.1} s",
        size(report.content_bytes),
        report.layers.len(),
        spans,
        size(bytes(report)),
        percentage(report),
        report.time.as_secs_f64(),
    ));
}

fn to_json(report: &IndexReport, copied: &Copied) -> Value {
    let layer = |layer: &nacre_lazy::index::build::IndexedLayer| {
        json!({
            "digest": layer.digest,
            "size": layer.size,
            "codec": name(layer.compression),
            "encrypted": layer.encrypted,
            "tar_bytes": layer.tar_bytes,
            "spans": layer.spans,
            "longest_span": layer.longest,
            "decoded_into_a_file": layer.spooled,
        })
    };
    json!({
        "digest": copied.digest,
        "subject": copied.images.first().map(|image| image.from),
        "layers": report.layers.iter().map(layer).collect::<Vec<_>>(),
        "content_bytes": report.content_bytes,
        "metadata_bytes": report.metadata_bytes,
        "pages_bytes": report.pages_bytes,
        "window_bytes": report.window_bytes,
        "index_bytes": bytes(report),
        "percentage": percentage(report),
        "seconds": report.time.as_secs_f64(),
        "signatures_made": copied.signatures_made,
    })
}

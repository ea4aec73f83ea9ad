//! Lazy images as `image copy --lazy` makes them.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nacre_core::SecretArray;
use nacre_lazy::{
    artifact::{Artifact, ImageBlobs, blob_id, read_metadata},
    build::{DataBlob, LazyRemake, Report, Shared},
    cache::Cache,
    fetch::Fetcher,
    image::Table,
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
use serde_json::{Value, json};

use crate::{args::lazy::MakeLazyArgs, exit::Usage, progress::size};

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

/// The manifest that a source has, of an index the one for the platform; nobody vouches for it.
pub(crate) fn manifest(source: &dyn ImageSource, platform: &Platform) -> anyhow::Result<Manifest> {
    let mut raw = source.manifest(None)?.peek().clone();
    if raw.is_index() {
        let digest = Index::parse(&raw)?.choose(platform)?.digest;
        raw = verify_manifest(source.manifest(Some(&digest))?, &digest)?.into_inner();
    }
    Ok(Manifest::parse(&raw)?)
}

/// The platform that is configured, or this machine's.
pub(crate) fn platform(configured: Option<&str>) -> anyhow::Result<Platform> {
    Ok(configured.map(str::parse).transpose()?.unwrap_or_else(Platform::host))
}

/// Opens a lazy image whose chunks are to be shared. Nothing of it is believed: a chunk is shared where its bytes are what the build makes.
fn share(source: Arc<dyn ImageSource>, keyring: &Keyring, platform: &Platform) -> anyhow::Result<Shared> {
    let artifact = Artifact::parse(&manifest(&*source, platform)?)?;
    let key = artifact.unwrap(keyring)?;
    let mut nowhere = tempfile::tempfile().context("a temporary file")?;
    let metadata = read_metadata(&*source, &artifact, key.as_ref(), &mut nowhere, None)?;
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

//! The signatures that an image has at its source, and how others are added at the destination.
//!
//! cosign keeps the signatures of a manifest in an artifact under the tag `sha256-<hex>.sig`, a layer each; adding one is writing
//! that artifact with a layer more. Newer ones are artifacts of their own, whose `subject` is the manifest.

use std::{collections::BTreeMap, sync::atomic::AtomicBool};

use nacre_core::{Digest, Verified};
use serde_json::json;

use super::{CopiedImage, CopyError, ExistingSignatures, Job, layer};
use crate::{
    manifest::{Descriptor, Manifest, ManifestError, RawManifest, media, verify_manifest},
    source::{SignatureStorage, TransportError},
};

/// The tag of cosign's signatures of a manifest.
pub(super) fn cosign_tag(manifest: &Digest) -> String {
    format!("{}-{}.sig", manifest.algorithm().name(), manifest.hex())
}

/// Copies the signatures of everything that was copied; how many there were.
pub(super) fn keep(
    job: &Job<'_>,
    root: &RawManifest,
    copied: &RawManifest,
    images: &[CopiedImage],
) -> Result<usize, CopyError> {
    let Some(storage) = job.source.signatures() else { return Ok(0) };
    if job.options.signatures == ExistingSignatures::Remove {
        return Ok(0);
    }
    let mut pairs = vec![(*root.digest(), *copied.digest())];
    pairs.extend(images.iter().map(|image| (image.from, image.to)).filter(|pair| pair.0 != *root.digest()));
    let mut kept = 0;
    for (from, to) in pairs {
        kept += keep_native(job, storage, &from, &to)?;
        kept += keep_tagged(job, storage, &from, &to)?;
        kept += keep_referrers(job, storage, &from, &to)?;
    }
    Ok(kept)
}

/// Refuses to lose signatures; one of another manifest is worth nothing.
fn unchanged(count: usize, from: &Digest, to: &Digest) -> Result<(), CopyError> {
    if count == 0 || from == to {
        return Ok(());
    }
    Err(CopyError::SignaturesLost { count, reason: format!("they sign {from}, and the copy's manifest is {to}") })
}

/// What a destination says that stores no signatures of a kind.
fn lost(count: usize) -> impl Fn(TransportError) -> CopyError {
    move |error| match error {
        TransportError::Unsupported { .. } => CopyError::SignaturesLost { count, reason: error.to_string() },
        other => other.into(),
    }
}

fn keep_native(job: &Job<'_>, storage: &dyn SignatureStorage, from: &Digest, to: &Digest) -> Result<usize, CopyError> {
    let found = storage.native(from)?;
    unchanged(found.len(), from, to)?;
    for signature in &found {
        job.sink.put_native_signature(to, signature.peek()).map_err(lost(found.len()))?;
    }
    Ok(found.len())
}

fn keep_tagged(job: &Job<'_>, storage: &dyn SignatureStorage, from: &Digest, to: &Digest) -> Result<usize, CopyError> {
    let tag = cosign_tag(from);
    let Some(raw) = storage.tagged(&tag)? else { return Ok(0) };
    let raw = raw.peek();
    let manifest = Manifest::parse(raw).map_err(CopyError::manifest(job.source))?;
    let count = manifest.layers.len();
    unchanged(count, from, to)?;
    copy_blobs(job, &manifest)?;
    if existing(job, &tag)?.is_some() {
        put_signatures(job, &tag, manifest.layers)?;
    } else {
        job.sink.put_tagged(raw, &tag).map_err(lost(count))?;
    }
    Ok(count)
}

fn keep_referrers(
    job: &Job<'_>,
    storage: &dyn SignatureStorage,
    from: &Digest,
    to: &Digest,
) -> Result<usize, CopyError> {
    let found = storage.referrers(from, Some(media::SIGSTORE_BUNDLE))?;
    unchanged(found.len(), from, to)?;
    let invalid = CopyError::manifest(job.source);
    for descriptor in &found {
        let raw: Verified<RawManifest> =
            verify_manifest(storage.by_digest(&descriptor.digest)?, &descriptor.digest).map_err(&invalid)?;
        copy_blobs(job, &Manifest::parse(raw.get()).map_err(&invalid)?)?;
        job.sink.put_manifest(raw.get()).map_err(lost(found.len()))?;
    }
    Ok(found.len())
}

/// Copies the blobs of an artifact.
fn copy_blobs(job: &Job<'_>, manifest: &Manifest) -> Result<(), CopyError> {
    let stop = AtomicBool::new(false);
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        layer::verbatim(job, blob, &nacre_core::NoProgress, &stop)?;
    }
    Ok(())
}

/// The destination's signatures of a manifest as they are there now.
fn existing(job: &Job<'_>, tag: &str) -> Result<Option<Manifest>, CopyError> {
    let Some(raw) = job.sink.tagged(tag)? else { return Ok(None) };
    let place = job.sink.location().to_string();
    Manifest::parse(raw.peek()).map(Some).map_err(|source| CopyError::Manifest { place, source })
}

/// Writes cosign's signatures of a manifest: `layers`, after those that the destination has, which are kept. Their blobs are there
/// already.
fn put_signatures(job: &Job<'_>, tag: &str, layers: Vec<Descriptor>) -> Result<(), CopyError> {
    let count = layers.len();
    let mut manifest = existing(job, tag)?.unwrap_or_else(|| Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: None,
        config: Descriptor::of(media::OCI_CONFIG, b""),
        layers: Vec::new(),
        subject: None,
        annotations: BTreeMap::new(),
    });
    for layer in layers {
        if !manifest.layers.contains(&layer) {
            manifest.layers.push(layer);
        }
    }
    // It is an image by its form, and readers compare its config with its layers.
    let diff_ids: Vec<Digest> = manifest.layers.iter().map(|layer| layer.digest).collect();
    let config = json!({
        "architecture": "",
        "config": {},
        "os": "",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string().into_bytes();
    manifest.config = Descriptor::of(media::OCI_CONFIG, &config);
    job.sink.put_blob(&mut config.as_slice(), Some(&manifest.config))?;
    let invalid = |source| CopyError::Manifest { place: job.sink.location().to_string(), source };
    let bytes = serde_json::to_vec(&manifest)
        .map_err(|source| invalid(ManifestError::Json { what: "signature manifest", source }))?;
    let raw = RawManifest::new(bytes, Some(media::OCI_MANIFEST)).map_err(invalid)?;
    job.sink.put_tagged(&raw, tag).map_err(lost(count))
}

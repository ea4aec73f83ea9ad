//! Copies the signatures that an image has at its source.

use std::sync::atomic::AtomicBool;

use nacre_core::{Digest, Verified};

use super::{
    CopiedImage, CopyError, ExistingSignatures, Job, layer,
    store::{self, Attachment},
};
use crate::{
    manifest::{Manifest, RawManifest, media, verify_manifest},
    reference::Location,
    source::{SignatureStorage, TransportError},
    trust::{SIGNATURE_LIMIT, SIGNATURES_LIMIT, decode_blob, signature_tag},
};

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
        kept += keep_gpg(job, storage, &from, &to)?;
        kept += keep_attachments(job, storage, &from, &to)?;
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
fn lost(count: usize) -> impl Fn(CopyError) -> CopyError {
    move |error| match error {
        CopyError::Transport(error @ TransportError::Unsupported { .. }) => {
            CopyError::SignaturesLost { count, reason: error.to_string() }
        }
        other => other,
    }
}

/// Those that are stored beside the image, GPG's and (in directories) cosign's, and those of the lookaside.
fn keep_gpg(job: &Job<'_>, storage: &dyn SignatureStorage, from: &Digest, to: &Digest) -> Result<usize, CopyError> {
    let mut found: Vec<Vec<u8>> = storage.native(from)?.into_iter().map(|blob| blob.peek().clone()).collect();
    if let (Location::Docker(image), Some(lookaside)) = (job.source.location(), job.options.lookaside) {
        for number in 1..=SIGNATURES_LIMIT {
            let Some(url) = lookaside.read_url(image, from, number) else { break };
            let Some(blob) = storage.get(&url, SIGNATURE_LIMIT)? else { break };
            found.push(blob.peek().clone());
        }
    }
    unchanged(found.len(), from, to)?;
    for signature in &found {
        match decode_blob(signature) {
            Some((payload, annotations)) => store::put_cosign(job, to, &[Attachment { payload, annotations }]),
            None => store::put_gpg(job, to, signature),
        }
        .map_err(lost(found.len()))?;
    }
    Ok(found.len())
}

/// cosign's, under the signature tag.
fn keep_attachments(
    job: &Job<'_>,
    storage: &dyn SignatureStorage,
    from: &Digest,
    to: &Digest,
) -> Result<usize, CopyError> {
    let Some(raw) = storage.tagged(&signature_tag(from))? else { return Ok(0) };
    let manifest = Manifest::parse(raw.peek()).map_err(CopyError::manifest(job.source))?;
    let layers = || manifest.layers.iter().filter(|layer| layer.media_type == media::COSIGN_PAYLOAD);
    let count = layers().count();
    unchanged(count, from, to)?;
    if count > SIGNATURES_LIMIT {
        let what = format!("the number of signatures of {from}");
        let place = job.source.location().to_string();
        return Err(TransportError::TooLarge { what, place, limit: SIGNATURES_LIMIT as u64 }.into());
    }
    let mut attachments = Vec::new();
    for layer in layers() {
        let payload = storage.small_blob(layer, SIGNATURE_LIMIT)?.peek().clone();
        let (expected, found) = (layer.digest, Digest::of(layer.digest.algorithm(), &payload));
        if found != expected {
            let what = format!("a signature of {from}");
            return Err(TransportError::DigestMismatch { what, expected, found }.into());
        }
        attachments.push(Attachment { payload, annotations: layer.annotations.clone() });
    }
    store::put_cosign(job, to, &attachments).map_err(lost(count))?;
    Ok(count)
}

/// Sigstore bundles among the referrers.
fn keep_referrers(
    job: &Job<'_>,
    storage: &dyn SignatureStorage,
    from: &Digest,
    to: &Digest,
) -> Result<usize, CopyError> {
    let found = storage.referrers(from, Some(media::SIGSTORE_BUNDLE))?;
    unchanged(found.len(), from, to)?;
    let invalid = CopyError::manifest(job.source);
    let stop = AtomicBool::new(false);
    for descriptor in &found {
        let raw: Verified<RawManifest> =
            verify_manifest(storage.by_digest(&descriptor.digest)?, &descriptor.digest).map_err(&invalid)?;
        let manifest = Manifest::parse(raw.get()).map_err(&invalid)?;
        if matches!(job.sink.location(), Location::Dir(_) | Location::DockerArchive { .. }) {
            let reason = format!("{} stores no sigstore bundles", job.sink.location());
            return Err(CopyError::SignaturesLost { count: found.len(), reason });
        }
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            layer::verbatim(job, blob, &nacre_core::NoProgress, &stop)?;
        }
        job.sink.put_manifest(raw.get())?;
    }
    Ok(found.len())
}

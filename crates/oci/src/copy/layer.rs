//! Copies one layer, through the steps of its plan.

use std::{io::Read, sync::atomic::AtomicBool};

use nacre_core::{Digest, Hasher, Task};

use super::{
    CopyError, Job,
    plan::LayerPlan,
    streams::{self, Checked, DiffIdTee, DigestCheck, Watched},
};
use crate::{
    crypt::{self, DecryptingReader},
    manifest::{Compression, Descriptor},
};

/// Annotations that say something of a layer's compressed bytes, and are wrong when those change.
const OF_THE_BYTES: [&str; 3] =
    ["containerd.io/snapshot/stargz/", "io.containers.zstd-chunked.", "io.containers.estargz."];

/// A layer to copy, and the digest of its uncompressed content, where the config was read.
pub(super) struct Layer<'a> {
    pub(super) plan: &'a LayerPlan,
    pub(super) diff_id: Option<Digest>,
}

/// Copies a layer; gives its descriptor at the destination, and whether it was there already.
pub(super) fn copy(job: &Job<'_>, layer: &Layer<'_>, stop: &AtomicBool) -> Result<(Descriptor, bool), CopyError> {
    let plan = layer.plan;
    let task = job.options.progress.begin(&format!("layer {}", plan.source.digest.short()), Some(plan.source.size));
    if plan.verbatim() {
        let mut descriptor = plan.source.clone();
        descriptor.media_type.clone_from(&plan.media_type);
        let reused = verbatim(job, &plan.source, task.as_ref(), stop)?;
        return Ok((descriptor, reused));
    }
    let descriptor = transform(job, layer, task.as_ref(), stop)?;
    task.done(match (plan.decrypt, plan.encrypt) {
        (true, true) => "encrypted for others",
        (true, false) => "decrypted",
        (false, true) => "encrypted",
        (false, false) => "recompressed",
    });
    Ok((descriptor, false))
}

/// Copies a blob as it is; whether the destination had it already.
pub(super) fn verbatim(
    job: &Job<'_>,
    descriptor: &Descriptor,
    task: &dyn Task,
    stop: &AtomicBool,
) -> Result<bool, CopyError> {
    if job.sink.has_blob(descriptor)? {
        task.done("already there");
        return Ok(true);
    }
    put(job, open(job, descriptor, task, stop)?, &descriptor.digest, Some(descriptor))?;
    task.done("copied");
    Ok(false)
}

/// The blob as it comes, checked.
pub(super) fn open<'a>(
    job: &Job<'_>,
    descriptor: &Descriptor,
    task: &'a dyn Task,
    stop: &'a AtomicBool,
) -> Result<Checked<'a>, CopyError> {
    Ok(Checked {
        inner: job.source.blob(descriptor)?,
        hasher: Some(Hasher::new(descriptor.digest.algorithm())),
        left: descriptor.size,
        descriptor: descriptor.clone(),
        place: job.source.location().to_string(),
        task,
        stop,
    })
}

/// Writes a stream that must then have been read to its end; where it failed, its own error is the one that is told.
pub(super) fn put<R: Read>(
    job: &Job<'_>,
    content: R,
    what: &Digest,
    expected: Option<&Descriptor>,
) -> Result<((Digest, u64), R), CopyError> {
    let mut content = Watched::new(content);
    match job.sink.put_blob(&mut content, expected) {
        Err(error) if !content.failed() => Err(error.into()),
        stored => {
            let content = content.outcome(&what.to_string())?;
            Ok((stored?, content))
        }
    }
}

/// Sends a layer through the steps of its plan.
fn transform(job: &Job<'_>, layer: &Layer<'_>, task: &dyn Task, stop: &AtomicBool) -> Result<Descriptor, CopyError> {
    let plan = layer.plan;
    let in_layer = |source| CopyError::Crypt { layer: plan.source.digest.to_string(), source };
    let damaged = |source| CopyError::Stream { what: plan.source.digest.to_string(), source };
    let mut descriptor = plan.source.clone();
    let mut stream: Box<dyn Read + Send> = Box::new(open(job, &plan.source, task, stop)?);
    if plan.decrypt {
        stream = decrypt(job, layer, stream)?;
        descriptor = crypt::strip_encryption(&descriptor).map_err(in_layer)?;
    }
    if let Some(recompress) = plan.recompress {
        let compression = plan.compression.unwrap_or(Compression::None);
        stream = streams::decompress(stream, compression).map_err(damaged)?;
        if let Some(diff_id) = layer.diff_id {
            stream = Box::new(DigestCheck::new(stream, "the uncompressed layer", diff_id, job.options.layer_limit));
        }
        stream = streams::compress(stream, recompress.to, recompress.level).map_err(damaged)?;
        descriptor.annotations.retain(|name, _| !OF_THE_BYTES.iter().any(|prefix| name.starts_with(prefix)));
    }
    let recipients = if plan.encrypt { job.options.encrypt.map(|(recipients, _)| recipients) } else { None };
    if let Some(recipients) = recipients {
        let stream = crypt::encrypt_layer(&descriptor, stream, recipients).map_err(in_layer)?;
        let ((digest, size), stream) = put(job, stream, &plan.source.digest, None)?;
        descriptor = stream.finish(digest, size).map_err(in_layer)?;
    } else {
        (descriptor.digest, descriptor.size) = put(job, stream, &plan.source.digest, None)?.0;
    }
    descriptor.media_type.clone_from(&plan.media_type);
    Ok(descriptor)
}

/// The decrypted layer, which ends only when it is what was encrypted.
pub(super) fn decrypt<'a>(
    job: &Job<'_>,
    layer: &Layer<'_>,
    stream: Box<dyn Read + Send + 'a>,
) -> Result<Box<dyn Read + Send + 'a>, CopyError> {
    let source = &layer.plan.source;
    let in_layer = |error| CopyError::Crypt { layer: source.digest.to_string(), source: error };
    // A plan decrypts only where there is a keyring.
    let keys = job.options.decrypt.ok_or_else(|| CopyError::NotReadToEnd(source.digest.to_string()))?;
    let secret = keys.unwrap(source).map_err(in_layer)?;
    let stream = DecryptingReader::new(source, stream, &secret, layer.diff_id.as_ref()).map_err(in_layer)?;
    // Encryptors that compress in the same run recorded the uncompressed layer's digest: then the reader leaves its check to us. Where
    // the layer is decompressed anyway, that is done already.
    match layer.diff_id.filter(|diff_id| diff_id == secret.digest() && layer.plan.recompress.is_none()) {
        None => Ok(Box::new(stream)),
        Some(diff_id) => {
            let compression = layer.plan.compression.unwrap_or(Compression::None);
            let tee = DiffIdTee::new(stream, compression, diff_id, job.options.layer_limit);
            Ok(Box::new(tee.map_err(|error| CopyError::Stream { what: source.digest.to_string(), source: error })?))
        }
    }
}

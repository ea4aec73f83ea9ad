//! Making something else of an image than a copy: another crate gets its layers, verified, and says what the manifest is.
//!
//! Choosing platforms, rewriting indexes, signing and committing stay the copy's.

use std::{
    io::Read,
    sync::atomic::{AtomicBool, Ordering},
};

use nacre_core::{Digest, Progress, Task};

use super::{
    CopiedLayer, CopyError, Job,
    layer::{self, Layer},
    plan::ImagePlan,
    streams::{self, DigestCheck},
};
use crate::{
    crypt::{self, LayerDecryptor, LayerParts, PublicOptions, Recipients},
    manifest::{Compression, Descriptor, ImageConfig, Manifest, RawManifest},
};

/// Makes something of an image's layers.
pub trait Remake: Sync {
    /// Whether it is for this manifest; what it is not for is copied. An artifact has no layers that are tars, and no config of an image.
    fn wants(&self, manifest: &Manifest, artifact: bool) -> bool {
        let _ = manifest;
        !artifact
    }

    /// Stores what is made, and gives the manifest.
    ///
    /// # Errors
    /// [`CopyError`]: the destination is then left as it was.
    fn remake(&self, image: &Remaking<'_>) -> Result<Remade, CopyError>;
}

/// What was made.
pub struct Remade {
    /// Its manifest.
    pub manifest: Manifest,
    /// What is said of its blobs.
    pub layers: Vec<CopiedLayer>,
}

/// A layer that is read as it is stored.
pub struct StoredLayer<'a> {
    /// Its descriptor.
    pub descriptor: &'a Descriptor,
    /// How its tar is compressed.
    pub compression: Compression,
    /// The digest that its tar must have.
    pub diff_id: Digest,
    /// Where it is encrypted: what decrypts all of it, and checks that at its end; and what decrypts parts.
    pub secret: Option<(LayerDecryptor, LayerParts)>,
}

/// An image whose layers can be read.
pub struct Remaking<'a> {
    job: &'a Job<'a>,
    raw: &'a RawManifest,
    manifest: &'a Manifest,
    plan: &'a ImagePlan,
    /// Of an image: parsed, and its bytes.
    config: Option<(ImageConfig, Vec<u8>)>,
    stop: AtomicBool,
}

impl<'a> Remaking<'a> {
    pub(super) fn new(
        job: &'a Job<'a>,
        raw: &'a RawManifest,
        manifest: &'a Manifest,
        plan: &'a ImagePlan,
        config: Option<(ImageConfig, Vec<u8>)>,
    ) -> Self {
        Self { job, raw, manifest, plan, config, stop: AtomicBool::new(false) }
    }

    /// The manifest as it is.
    pub fn manifest(&self) -> &Manifest {
        self.manifest
    }

    /// A descriptor of the manifest.
    pub fn subject(&self) -> Descriptor {
        self.raw.descriptor()
    }

    /// The config's bytes, which have the digest that the manifest says; of an artifact none.
    pub fn config(&self) -> &[u8] {
        self.config.as_ref().map(|(_, bytes)| &bytes[..]).unwrap_or_default()
    }

    /// For whom what is made is to be encrypted.
    pub fn recipients(&self) -> Option<&Recipients> {
        self.job.options.encrypt.map(|(recipients, _)| recipients)
    }

    /// Where people see what happens.
    pub fn progress(&self) -> &dyn Progress {
        self.job.options.progress
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.plan.layers.len()
    }

    /// Reads the uncompressed tar of a layer. The stream ends without an error only if the blob, what was encrypted, and the tar have
    /// the digests that the manifest, the key's document and the config say.
    ///
    /// # Errors
    /// [`CopyError`]; whatever `read` gives comes back.
    pub fn layer<T>(
        &self,
        index: usize,
        read: impl FnOnce(&mut dyn Read, &dyn Task) -> Result<T, CopyError>,
    ) -> Result<T, CopyError> {
        let missing = || CopyError::Unsupported(format!("the image has no layer {index}"));
        let plan = self.plan.layers.get(index).ok_or_else(missing)?;
        let (config, _) = self.config.as_ref().ok_or_else(missing)?;
        let diff_id = *config.rootfs.diff_ids.get(index).ok_or_else(missing)?;
        let what = plan.source.digest.to_string();
        if plan.compression.is_none() || (crypt::is_encrypted(&plan.source) && !plan.decrypt) {
            let problem = format!("layer {what} is encrypted: give its key with --decryption-key");
            return Err(CopyError::Unsupported(problem));
        }
        let damaged = |source| CopyError::from_stream(&what, source);
        let task = self.progress().begin(&format!("layer {}", plan.source.digest.short()), Some(plan.source.size));
        let mut stream: Box<dyn Read + Send + '_> =
            Box::new(layer::open(self.job, &plan.source, task.as_ref(), &self.stop)?);
        if plan.decrypt {
            stream = layer::decrypt(self.job, &Layer { plan, diff_id: Some(diff_id) }, stream)?;
        }
        let stream = streams::decompress(stream, plan.compression.unwrap_or(Compression::None)).map_err(damaged)?;
        let limit = self.job.options.layer_limit;
        let mut stream = DigestCheck::new(stream, "the uncompressed layer", diff_id, limit);
        let outcome = read(&mut stream, task.as_ref())?;
        // Whoever read it may have stopped before the end, where the checks are.
        if std::io::copy(&mut stream, &mut std::io::sink()).map_err(damaged)? > 0 {
            return Err(CopyError::NotReadToEnd(what));
        }
        Ok(outcome)
    }

    /// Reads a layer as it is stored. `read` gets the blob's bytes, and what it takes to make the tar of them; whether what was
    /// encrypted, and the tar, are what they should be is for `read` to check. The blob's own digest is checked here.
    ///
    /// # Errors
    /// [`CopyError`]; whatever `read` gives comes back.
    pub fn stored_layer<T>(
        &self,
        index: usize,
        read: impl FnOnce(&mut dyn Read, StoredLayer<'_>, &dyn Task) -> Result<T, CopyError>,
    ) -> Result<T, CopyError> {
        let missing = || CopyError::Unsupported(format!("the image has no layer {index}"));
        let plan = self.plan.layers.get(index).ok_or_else(missing)?;
        let (config, _) = self.config.as_ref().ok_or_else(missing)?;
        let diff_id = *config.rootfs.diff_ids.get(index).ok_or_else(missing)?;
        let what = plan.source.digest.to_string();
        let in_layer = |source| CopyError::Crypt { layer: what.clone(), source };
        let secret = match crypt::is_encrypted(&plan.source) {
            false => None,
            true => {
                let Some(keys) = self.job.options.decrypt else {
                    let problem = format!("layer {what} is encrypted: give its key with --decryption-key");
                    return Err(CopyError::Unsupported(problem));
                };
                let public = PublicOptions::of(&plan.source).map_err(in_layer)?;
                let secret = keys.unwrap(&plan.source).map_err(in_layer)?;
                let decryptor = secret.decryptor(&public).map_err(in_layer)?.with_diff_id(&diff_id);
                Some((decryptor, secret.parts(&public).map_err(in_layer)?))
            }
        };
        let Some(compression) = plan.compression else {
            return Err(CopyError::Unsupported(format!("layer {what} is of a type that is not known")));
        };
        let task = self.progress().begin(&format!("layer {}", plan.source.digest.short()), Some(plan.source.size));
        let mut stream = layer::open(self.job, &plan.source, task.as_ref(), &self.stop)?;
        let stored = StoredLayer { descriptor: &plan.source, compression, diff_id, secret };
        let outcome = read(&mut stream, stored, task.as_ref())?;
        let damaged = |source| CopyError::from_stream(&what, source);
        if std::io::copy(&mut stream, &mut std::io::sink()).map_err(damaged)? > 0 {
            return Err(CopyError::NotReadToEnd(what));
        }
        Ok(outcome)
    }

    /// Stores a new blob.
    ///
    /// # Errors
    /// [`CopyError`], also of the stream
    pub fn put(&self, content: &mut dyn Read, media_type: &str) -> Result<Descriptor, CopyError> {
        let nothing = Digest::sha256(b"");
        let ((digest, size), _) = layer::put(self.job, content, &nothing, None)?;
        Ok(Descriptor::new(media_type, digest, size))
    }

    /// Whether the destination has a blob.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn has(&self, descriptor: &Descriptor) -> Result<bool, CopyError> {
        Ok(self.job.sink.has_blob(descriptor)?)
    }

    /// Copies a blob of this image as it is; whether the destination had it already.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn copy(&self, descriptor: &Descriptor) -> Result<bool, CopyError> {
        let task = self.progress().begin(&format!("blob {}", descriptor.digest.short()), Some(descriptor.size));
        layer::verbatim(self.job, descriptor, task.as_ref(), &self.stop)
    }

    /// Copies a blob of another image, whose digest is checked.
    ///
    /// # Errors
    /// [`CopyError`]
    pub fn put_verbatim(&self, content: &mut dyn Read, descriptor: &Descriptor) -> Result<(), CopyError> {
        layer::put(self.job, content, &descriptor.digest, Some(descriptor)).map(drop)
    }

    /// Gives up: streams of other threads end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

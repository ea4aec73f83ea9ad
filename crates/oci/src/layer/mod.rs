//! One layer, from its blob as it comes from a source to files in a staging directory, as a streamed pipeline:
//!
//! ```text
//! thread 1   read ─▶ size, blob digest ─▶ decrypt (HMAC, digest of the plaintext)
//! thread 2   decompress ─▶ diff_id, expansion limit
//! caller     tar ─▶ files
//! ```
//!
//! Between the threads go buffers of fixed number and size, which come back to be filled again, so that memory does not depend on the
//! layer: some 3 MiB, and a zstd window of at most [`Limits::zstd_window_bytes`](crate::unpack::Limits::zstd_window_bytes).
//!
//! Files are written before the last check can be made, so only [`apply_layer`]'s `Ok` makes them good: all of size, blob digest, HMAC,
//! plaintext digest, the compression's own checksums, diff_id and the tar's end hold then. After an error the caller removes the staging
//! directory ([`remove_tree`](crate::unpack::remove_tree)); nothing may look into it before. Where bytes turn out to be damaged in the
//! middle, the rest is read and hashed all the same (not unpacked), so that the error says what is really wrong: another blob than was
//! asked for, a wrong key, or an image that was built damaged.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
};

use nacre_core::{Digest, Task, Untrusted, Verified};

pub use decompress::{DecompressError, Decompressor, decompress_all};

use crate::{
    crypt::{CryptError, LayerSecret, PublicOptions},
    manifest::{Compression, Descriptor, LayerType, ManifestError},
    unpack::{AppliedLayer, LimitExceeded, UnpackError, UnpackOptions},
};

mod decompress;
mod pipeline;

/// What opens an encrypted layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerKey<'a> {
    /// The unwrapped key.
    pub secret: &'a LayerSecret,
    /// What stands beside it in the clear.
    pub public: &'a PublicOptions,
}

/// What is known of a layer before its blob comes.
#[derive(Clone, Debug)]
pub struct LayerPlan<'a> {
    /// From the manifest: digest and size of the blob.
    pub descriptor: &'a Descriptor,
    /// What its media type says.
    pub layer_type: LayerType,
    /// From the image's config: the digest of the uncompressed tar.
    pub diff_id: Digest,
    /// For an encrypted layer.
    pub key: Option<LayerKey<'a>>,
    /// How it is applied.
    pub options: &'a UnpackOptions,
}

impl<'a> LayerPlan<'a> {
    /// A plan for the layer of a manifest.
    ///
    /// # Errors
    /// [`ManifestError`]: its media type is no layer's.
    pub fn new(
        descriptor: &'a Descriptor,
        diff_id: Digest,
        key: Option<LayerKey<'a>>,
        options: &'a UnpackOptions,
    ) -> Result<Self, ManifestError> {
        Ok(Self { descriptor, layer_type: LayerType::parse(&descriptor.media_type)?, diff_id, key, options })
    }
}

/// Why a layer is not there. What it left in the staging directory is to be removed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob could not be read to its end.
    #[error("layer {digest}: reading the blob failed: {source}")]
    Read {
        /// The blob.
        digest: Digest,
        /// The source's answer.
        source: io::Error,
    },
    /// The blob is not as long as its descriptor says.
    #[error("layer {digest}: size mismatch: the manifest says {expected} bytes, the blob has {}{found}", if .found > .expected { "at least " } else { "" })]
    Size {
        /// The blob.
        digest: Digest,
        /// As the manifest says.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// The blob is another one than the manifest names.
    #[error("layer: blob digest mismatch: the manifest says {expected}, the blob has {found}")]
    Digest {
        /// As the manifest says.
        expected: Digest,
        /// As it is.
        found: Digest,
    },
    /// It is encrypted and there is no key, or the other way round.
    #[error("layer {digest}: its media type says that it is {}encrypted, but a key was {}given", if *.encrypted { "" } else { "not " }, if *.encrypted { "not " } else { "" })]
    Key {
        /// The blob.
        digest: Digest,
        /// What the media type says.
        encrypted: bool,
    },
    /// It cannot be decrypted.
    #[error("layer {digest}: {source}")]
    Decrypt {
        /// The blob.
        digest: Digest,
        /// Why.
        source: CryptError,
    },
    /// It cannot be decompressed.
    #[error("layer {digest}: {format} data is corrupt: {reason}")]
    Corrupt {
        /// The blob.
        digest: Digest,
        /// gzip or zstd.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// It is larger than it may be.
    #[error("layer {digest}: {source}")]
    Limit {
        /// The blob.
        digest: Digest,
        /// Which limit.
        source: LimitExceeded,
    },
    /// The uncompressed tar is another one than the image's config names.
    #[error("layer {digest}: diff_id mismatch: the config says {expected}, the uncompressed tar has {found}")]
    DiffId {
        /// The blob.
        digest: Digest,
        /// As the config says.
        expected: Digest,
        /// As it is.
        found: Digest,
    },
    /// It cannot be unpacked.
    #[error("layer {digest}: {source}")]
    Unpack {
        /// The blob.
        digest: Digest,
        /// Why.
        source: UnpackError,
    },
    /// A thread could not be started.
    #[error("layer {digest}: a thread could not be started: {source}")]
    Thread {
        /// The blob.
        digest: Digest,
        /// The system's answer.
        source: io::Error,
    },
}

impl LayerError {
    /// Whether content, key or digests are not what they should be, so that the image is not to be trusted; otherwise it may work another time.
    pub fn is_integrity(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Thread { .. } => false,
            Self::Unpack { source, .. } => source.is_invalid_layer(),
            _ => true,
        }
    }
}

/// Reads a layer's blob and applies it to `root`, a new, empty directory that nobody else can reach. `progress` advances by blob bytes.
///
/// What the `Ok` says is verified: the blob's size and digest, what its encryption promises, and the tar's diff_id. Nothing is synced.
///
/// # Errors
/// [`LayerError`]; then `root` holds things that must not be used.
pub fn apply_layer<R: Read + Send>(
    stream: R,
    plan: &LayerPlan<'_>,
    root: OwnedFd,
    progress: &dyn Task,
) -> Result<Verified<AppliedLayer>, LayerError> {
    let digest = plan.descriptor.digest;
    if plan.layer_type.encrypted != plan.key.is_some() {
        return Err(LayerError::Key { digest, encrypted: plan.layer_type.encrypted });
    }
    let decryptor = plan
        .key
        .map(|key| key.secret.decryptor(key.public).map(|decryptor| decryptor.with_diff_id(&plan.diff_id)))
        .transpose()
        .map_err(|source| LayerError::Decrypt { digest, source })?;
    let found = pipeline::run(stream, plan, decryptor, root, progress)?;
    Untrusted::new(found).verify_into(|found| {
        if found.diff_id == plan.diff_id {
            Ok(found.layer)
        } else {
            Err(LayerError::DiffId { digest, expected: plan.diff_id, found: found.diff_id })
        }
    })
}

/// Whether the blob is the tar and its digest the diff_id's kind, so that it is hashed once.
fn is_plain(plan: &LayerPlan<'_>) -> bool {
    plan.layer_type.compression == Compression::None
        && !plan.layer_type.encrypted
        && plan.descriptor.digest.algorithm() == plan.diff_id.algorithm()
}

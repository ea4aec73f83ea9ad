//! The shipping side: copies an image from one transport to another, and on the way chooses platforms, converts between OCI and
//! Docker manifests, recompresses, decrypts, encrypts and signs.
//!
//! A layer is one stream: source → digest check → decrypt → decompress → diff_id check → compress → encrypt → sink; only the steps
//! that are wanted. Nothing is held in memory but manifests and configs. What no option changes stays the same to the byte, and
//! so does its digest. The sink shows nothing before `commit`, which comes last, so a copy that fails leaves the destination as it was
//! (at a registry: blobs that nothing names).
//!
//! The caller decides whether the source may be copied at all: see [`Source`].

mod image;
mod layer;
mod parallel;
mod plan;
mod remake;
mod sign;
mod signatures;
mod store;
mod streams;

use std::io;

use nacre_core::{Digest, Progress, Verified};

use crate::{
    crypt::{CryptError, Keyring, Recipients},
    manifest::{Compression, Descriptor, Index, ManifestError, Platform, RawManifest, verify_manifest},
    source::{ImageSink, ImageSource, TransportError},
    trust::{Admitted, LookasideConfig, sign::SignError},
};

pub use plan::EncryptLayers;
pub use remake::{Remade, Remake, Remaking, StoredLayer};
pub use sign::{Sign, SigningKey};

/// How deep indexes may be in one another.
const DEPTH_LIMIT: usize = 3;

/// What is copied: a transport, and the one manifest or index of it that may be. Nothing else is copied, whatever the source says by
/// then.
pub struct Source<'a> {
    /// Where blobs and further manifests come from.
    transport: &'a dyn ImageSource,
    /// What may be copied.
    manifest: Verified<RawManifest>,
}

impl<'a> Source<'a> {
    /// The manifest that the policy let in; or the index, where that was judged alone.
    ///
    /// # Errors
    /// [`CopyError::Transport`], [`CopyError::Manifest`]
    pub fn admitted(transport: &'a dyn ImageSource, admitted: &Admitted) -> Result<Self, CopyError> {
        let raw = transport.manifest(Some(admitted.manifest()))?;
        let manifest = verify_manifest(raw, admitted.manifest()).map_err(CopyError::manifest(transport))?;
        Ok(Self { transport, manifest })
    }

    /// The image that the location names now, without any policy: for people who copy what is theirs. Where the location has a
    /// digest, the manifest has it.
    ///
    /// # Errors
    /// [`CopyError::Transport`], [`CopyError::Manifest`]
    pub fn without_policy(transport: &'a dyn ImageSource) -> Result<Self, CopyError> {
        let raw = transport.manifest(None)?;
        let pinned = transport.location().image_ref().and_then(|reference| reference.digest().copied());
        let digest = pinned.unwrap_or(*raw.peek().digest());
        let manifest = verify_manifest(raw, &digest).map_err(CopyError::manifest(transport))?;
        tracing::info!("{} ({digest}) is copied without a policy", transport.location());
        Ok(Self { transport, manifest })
    }
}

/// Which images of an index are copied.
#[derive(Clone, Debug, Default)]
pub enum Platforms {
    /// The one for this machine.
    #[default]
    Host,
    /// The one for another machine.
    One(Platform),
    /// All, and the index.
    All,
}

/// What kind of manifest is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OCI image manifest v1.
    Oci,
    /// Docker image manifest v2, schema 2.
    Docker,
}

/// What becomes of the signatures that the source has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExistingSignatures {
    /// They are copied; where that cannot be, because the manifest changes or the destination stores none, the copy is refused.
    #[default]
    Keep,
    /// They are left behind.
    Remove,
}

/// How layers are compressed at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recompress {
    /// The compression.
    pub to: Compression,
    /// The compressor's level; `None` is its default.
    pub level: Option<u32>,
}

/// What a copy changes. The default changes nothing.
pub struct CopyOptions<'a> {
    /// Which images of an index.
    pub platforms: Platforms,
    /// The manifests' format; `None` keeps it, unless the destination or encryption needs the other one.
    pub format: Option<Format>,
    /// The layers' compression; `None` keeps it, but compresses plain tars for registries and OCI layouts.
    pub compression: Option<Recompress>,
    /// Keys for layers that are encrypted at the source, all of which are then decrypted; `None` leaves them as they are.
    pub decrypt: Option<&'a Keyring>,
    /// For whom layers are encrypted, and which.
    pub encrypt: Option<(&'a Recipients, &'a EncryptLayers)>,
    /// Makes something else of images; `None` copies their layers.
    pub remake: Option<&'a dyn Remake>,
    /// What is made is about the image, and is put beside it, without a name.
    pub attach: bool,
    /// Signatures of the source.
    pub signatures: ExistingSignatures,
    /// Who signs the copy, as what.
    pub sign: Option<Sign<'a>>,
    /// Where registries' GPG signatures are read and written that the registry itself does not store (registries.d).
    pub lookaside: Option<&'a LookasideConfig>,
    /// How many blobs are copied at once.
    pub parallel: usize,
    /// The most bytes of a layer when it is decompressed.
    pub layer_limit: u64,
    /// Shows the copy.
    pub progress: &'a dyn Progress,
}

impl Default for CopyOptions<'_> {
    fn default() -> Self {
        Self {
            platforms: Platforms::default(),
            format: None,
            compression: None,
            decrypt: None,
            encrypt: None,
            remake: None,
            attach: false,
            signatures: ExistingSignatures::default(),
            sign: None,
            lookaside: None,
            parallel: 3,
            layer_limit: 256 << 30,
            progress: &nacre_core::NoProgress,
        }
    }
}

/// What a copy did.
#[derive(Clone, Debug)]
pub struct Copied {
    /// The digest of the manifest or index that the destination names now.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Whether it is another one than the source's.
    pub changed: bool,
    /// The images: one, or those of the index.
    pub images: Vec<CopiedImage>,
    /// How many signatures were copied along.
    pub signatures_kept: usize,
    /// How many were made.
    pub signatures_made: usize,
}

/// What became of one image.
#[derive(Clone, Debug)]
pub struct CopiedImage {
    /// The manifest's digest at the source.
    pub from: Digest,
    /// The manifest's digest at the destination.
    pub to: Digest,
    /// The machine it is for, where the index says so.
    pub platform: Option<Platform>,
    /// The layers, the bottom one first.
    pub layers: Vec<CopiedLayer>,
}

/// What became of one layer.
#[derive(Clone, Debug)]
pub struct CopiedLayer {
    /// Its digest at the source.
    pub from: Digest,
    /// Its digest at the destination.
    pub to: Digest,
    /// Its size at the destination.
    pub size: u64,
    /// Its media type at the destination.
    pub media_type: String,
    /// Whether the destination had it already.
    pub reused: bool,
}

/// Why an image was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source or the destination failed, or what came from the source is not what it should be.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A manifest or config is not valid.
    #[error("{place}: {source}")]
    Manifest {
        /// Where it came from.
        place: String,
        /// What is wrong.
        source: ManifestError,
    },
    /// A layer was not decrypted or encrypted.
    #[error("layer {layer}: {source}")]
    Crypt {
        /// Its digest at the source.
        layer: String,
        /// Why.
        source: CryptError,
    },
    /// A layer's compressed data are damaged.
    #[error("{what}: the stream is damaged: {source}")]
    Stream {
        /// The blob.
        what: String,
        /// The decompressor's complaint.
        source: io::Error,
    },
    /// A layer becomes larger than it may.
    #[error("a layer has more bytes when it is decompressed than are allowed (raise the limit if that is right)")]
    Bomb,
    /// A destination took less than all of a blob.
    #[error("{0}: the destination did not read it to its end")]
    NotReadToEnd(String),
    /// What was asked for does not go together.
    #[error("{0}")]
    Unsupported(String),
    /// Nothing else could be made of the image.
    #[error(transparent)]
    Remake(Box<dyn std::error::Error + Send + Sync>),
    /// No signature could be made.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Signatures would be lost.
    #[error(
        "the source has {count} signatures, which cannot be kept: {reason}; leave them behind with --remove-signatures"
    )]
    SignaturesLost {
        /// How many.
        count: usize,
        /// Why.
        reason: String,
    },
}

impl CopyError {
    /// The error that a stream wraps, or one that says that the stream is damaged.
    fn from_stream(what: &str, error: io::Error) -> Self {
        let error = match error.downcast::<Self>() {
            Ok(inner) => return inner,
            Err(error) => error,
        };
        let error = match error.downcast::<TransportError>() {
            Ok(inner) => return Self::Transport(inner),
            Err(error) => error,
        };
        match error.downcast::<CryptError>() {
            Ok(source) => Self::Crypt { layer: what.into(), source },
            Err(source) => Self::Stream { what: what.into(), source },
        }
    }

    fn manifest(place: &dyn ImageSource) -> impl Fn(ManifestError) -> Self + use<> {
        let place = place.location().to_string();
        move |source| Self::Manifest { place: place.clone(), source }
    }
}

/// Copies an image.
///
/// # Errors
/// [`CopyError`]; the destination then is as it was before.
pub fn copy(source: &Source<'_>, sink: &dyn ImageSink, options: &CopyOptions<'_>) -> Result<Copied, CopyError> {
    let job = Job { source: source.transport, sink, options };
    let signer = options.sign.as_ref().map(|sign| sign.prepare(sink.location())).transpose()?;
    let root = job.choose(source.manifest.get())?;
    let (mut images, mut manifests) = (Vec::new(), Vec::new());
    let copied = job.manifest(&root, None, 0, &mut images, &mut manifests)?;
    let signatures_kept = signatures::keep(&job, &root, &copied, &images)?;
    let signatures_made = signer.map_or(Ok(0), |signer| signer.sign(&job, &manifests))?;
    if options.attach {
        sink.attach(&copied)?
    } else {
        sink.commit(&copied)?
    }
    Ok(Copied {
        digest: *copied.digest(),
        media_type: copied.media_type().into(),
        changed: copied.digest() != root.digest(),
        images,
        signatures_kept,
        signatures_made,
    })
}

/// One copy.
struct Job<'a> {
    source: &'a dyn ImageSource,
    sink: &'a dyn ImageSink,
    options: &'a CopyOptions<'a>,
}

impl Job<'_> {
    /// The manifest that is copied: of an index the one for the platform, or the index.
    fn choose(&self, root: &RawManifest) -> Result<RawManifest, CopyError> {
        let invalid = CopyError::manifest(self.source);
        let mut raw = root.clone();
        for _ in 0..DEPTH_LIMIT {
            if !raw.is_index() || matches!(self.options.platforms, Platforms::All) {
                return Ok(raw);
            }
            let wanted = match &self.options.platforms {
                Platforms::One(platform) => platform.clone(),
                Platforms::Host | Platforms::All => Platform::host(),
            };
            let index = Index::parse(&raw).map_err(&invalid)?;
            let digest = index.choose(&wanted).map_err(&invalid)?.digest;
            raw = self.fetch(&digest)?;
        }
        Err(CopyError::Unsupported(format!("indexes are more than {DEPTH_LIMIT} deep in one another")))
    }

    /// A manifest of the source that has the digest.
    fn fetch(&self, digest: &Digest) -> Result<RawManifest, CopyError> {
        let raw = self.source.manifest(Some(digest))?;
        Ok(verify_manifest(raw, digest).map_err(CopyError::manifest(self.source))?.into_inner())
    }

    /// Copies what a manifest or index names, but not itself; gives it as it is to be at the destination, and adds it to
    /// `manifests`.
    fn manifest(
        &self,
        raw: &RawManifest,
        entry: Option<&Descriptor>,
        depth: usize,
        images: &mut Vec<CopiedImage>,
        manifests: &mut Vec<RawManifest>,
    ) -> Result<RawManifest, CopyError> {
        if !raw.is_index() {
            let (copied, layers) = image::copy(self, raw, entry)?;
            let platform = entry.and_then(|entry| entry.platform.clone());
            images.push(CopiedImage { from: *raw.digest(), to: *copied.digest(), platform, layers });
            manifests.push(copied.clone());
            return Ok(copied);
        }
        if depth >= DEPTH_LIMIT {
            let problem = format!("indexes are more than {DEPTH_LIMIT} deep in one another");
            return Err(CopyError::Unsupported(problem));
        }
        let copied = image::copy_index(self, raw, depth, images, manifests)?;
        manifests.push(copied.clone());
        Ok(copied)
    }
}

//! Why an image was not pulled.

use nacre_core::Digest;
use nacre_lazy::artifact::ArtifactError;
use nacre_oci::{
    crypt::CryptError, layer::LayerError, manifest::ManifestError, reference::ReferenceError, source::TransportError,
    trust::TrustError,
};

use crate::store::StoreError;

/// Why an image was not pulled, opened or verified.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// It could not be fetched.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A manifest or config is not what it must be.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The name is none.
    #[error(transparent)]
    Reference(ReferenceError),
    /// The policy, or the rules for the kinds of image, refuse it.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Its admission could not be measured.
    #[error(transparent)]
    Event(#[from] nacre_attest::eventlog::runtime::RuntimeLogError),
    /// It is not unpacked, but mounted.
    #[error(
        "{0} is a lazy image, which is not pulled: mount it with `nacre image mount`, or run it with `nacre run --lazy`"
    )]
    Lazy(String),
    /// It is no lazy image after all, or its key is not to be had.
    #[error(transparent)]
    LazyKey(ArtifactError),
    /// Indexes of indexes of indexes.
    #[error("{image}: more than {depth} indexes lead to its manifest")]
    IndexDepth {
        /// The image.
        image: String,
        /// The limit.
        depth: usize,
    },
    /// The image has more layers than can be mounted.
    #[error("the image has {layers} different layers; at most {limit} can be mounted: build it with fewer")]
    TooManyLayers {
        /// How many it has.
        layers: usize,
        /// The limit.
        limit: usize,
    },
    /// The key of an encrypted layer is not to be had, so the image is not valid here.
    #[error("layer {index} ({}) is encrypted, and its key could not be unwrapped: {source}", .digest.short())]
    Key {
        /// Its place in the manifest, from 0.
        index: usize,
        /// The blob.
        digest: Digest,
        /// Why.
        source: CryptError,
    },
    /// A layer was refused, or could not be applied. Nothing of it is left.
    #[error("layer {index}: {source}")]
    Layer {
        /// Its place in the manifest, from 0.
        index: usize,
        /// The blob.
        digest: Digest,
        /// Why.
        source: LayerError,
    },
    /// What the layers need of each other contradicts itself.
    #[error("layer {id} does not fit on the layers below it: {source}")]
    Stack {
        /// The layer.
        id: crate::store::LayerId,
        /// Why.
        source: nacre_oci::unpack::UnpackError,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

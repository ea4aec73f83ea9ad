//! The manifest of an index, and what it has to do with its image.

use nacre_core::{Algorithm, Digest};
use nacre_oci::{
    crypt::{self, CryptError, Keyring, LayerParts, PublicOptions},
    manifest::{Descriptor, Manifest},
};

use super::{
    format::{ARTIFACT_TYPE, LayerEntry, METADATA_TYPE, PAGES_TYPE},
    metadata::IndexMetadata,
};
use crate::{artifact::blob_id, format::SEALED, keys::MetadataKey, source::BlobId};

/// Why a manifest is no index of an image.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// It is something else.
    #[error("this is no index of an image: {0}")]
    Kind(String),
    /// It is that of another image.
    #[error("the index is about {found}, not about the image {expected}")]
    Subject {
        /// As it says.
        found: String,
        /// The image.
        expected: Digest,
    },
    /// Its layers are not the image's.
    #[error("layer {index} is {inside} in the index, and {outside} in the image")]
    Layer {
        /// Which.
        index: usize,
        /// As the index says.
        inside: String,
        /// As the image says.
        outside: String,
    },
    /// Its own key cannot be unwrapped.
    #[error("the index's key: {0}")]
    Key(#[source] CryptError),
    /// The key of a layer cannot be unwrapped.
    #[error("layer {digest} is encrypted, and its key: {source}")]
    LayerKey {
        /// The layer.
        digest: Digest,
        /// Why.
        source: CryptError,
    },
    /// The key of a layer is not the one that the index was made with.
    #[error("the key of layer {0} is not the one that the index was made with")]
    OtherKey(Digest),
}

/// What decrypts a layer; `None` for one that is in the clear.
pub type LayerKey = Option<LayerParts>;

/// What an index consists of.
#[derive(Clone, Debug)]
pub struct IndexArtifact {
    /// Metadata: names, attributes, layers, where pages are.
    pub metadata: Descriptor,
    /// Windows and pages; an image without content has none.
    pub pages: Option<Descriptor>,
    /// Whether it is encrypted.
    pub sealed: bool,
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

impl IndexArtifact {
    /// Reads the manifest of an index, which must be about `image`.
    ///
    /// # Errors
    /// [`IndexError`]
    pub fn parse(manifest: &Manifest, image: &Digest) -> Result<Self, IndexError> {
        let kind = |text: String| Err(IndexError::Kind(text));
        if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return kind(format!("its artifactType is not {ARTIFACT_TYPE}"));
        }
        match &manifest.subject {
            Some(subject) if subject.digest == *image => {}
            other => {
                let found = other.as_ref().map_or("nothing".to_owned(), |subject| subject.digest.to_string());
                return Err(IndexError::Subject { found, expected: *image });
            }
        }
        let sealed = manifest.layers.first().is_some_and(|layer| layer.media_type.ends_with(SEALED));
        let suffix = if sealed { SEALED } else { "" };
        let (metadata, pages) = match manifest.layers.as_slice() {
            [metadata] => (metadata, None),
            [metadata, pages] => (metadata, Some(pages)),
            other => return kind(format!("it has {} layers, not one or two", other.len())),
        };
        for (layer, expected) in [(Some(metadata), METADATA_TYPE), (pages, PAGES_TYPE)] {
            let Some(layer) = layer else { continue };
            if layer.media_type.strip_suffix(suffix) != Some(expected) {
                return kind(format!("a layer is of type {}, not {expected}{suffix}", shown(&layer.media_type)));
            }
            if layer.digest.algorithm() != Algorithm::Sha256 {
                return kind(format!("a layer has the digest {}, which is no SHA-256", layer.digest));
            }
        }
        Ok(Self { metadata: metadata.clone(), pages: pages.cloned(), sealed })
    }

    /// The index's key, where it is encrypted.
    ///
    /// # Errors
    /// [`IndexError::Key`]
    pub fn unwrap(&self, keyring: &Keyring) -> Result<Option<MetadataKey>, IndexError> {
        if !self.sealed {
            return Ok(None);
        }
        Ok(Some(MetadataKey::new(keyring.unwrap(&self.metadata).map_err(IndexError::Key)?.into_key())))
    }

    /// The blob of windows and pages; an empty one where there is none.
    pub fn pages_blob(&self) -> BlobId {
        self.pages.as_ref().and_then(blob_id).unwrap_or(BlobId { digest: [0; 32], size: 0 })
    }

    /// The blobs of the index and of its image, which are at one place.
    pub fn descriptors<'a>(&'a self, image: &'a Manifest) -> impl Iterator<Item = &'a Descriptor> {
        std::iter::once(&self.metadata).chain(&self.pages).chain(&image.layers)
    }
}

/// Unwraps the keys of an image's encrypted layers.
///
/// # Errors
/// [`IndexError::LayerKey`]
pub fn unwrap_layers(image: &Manifest, keyring: &Keyring) -> Result<Vec<LayerKey>, IndexError> {
    let key = |layer: &Descriptor| {
        let wrong = |source| IndexError::LayerKey { digest: layer.digest, source };
        let public = PublicOptions::of(layer).map_err(wrong)?;
        keyring.unwrap(layer).and_then(|secret| secret.parts(&public)).map_err(wrong)
    };
    image.layers.iter().map(|layer| crypt::is_encrypted(layer).then(|| key(layer)).transpose()).collect()
}

impl IndexMetadata {
    /// Checks that the index has the layers of the image, all of them, in their order, and was made with these keys of encrypted ones.
    ///
    /// # Errors
    /// [`IndexError`]
    pub fn check_layers(&self, image: &Manifest, keys: &[LayerKey]) -> Result<(), IndexError> {
        let id = |entry: &LayerEntry| BlobId { digest: entry.digest, size: entry.size.get() };
        for index in 0..self.layers.len().max(image.layers.len()) {
            let (inside, outside) = (self.layers.get(index), image.layers.get(index));
            let (Some(entry), Some(layer), true) =
                (inside, outside, inside.map(id) == outside.and_then(blob_id) && inside.is_some())
            else {
                return Err(IndexError::Layer {
                    index,
                    inside: inside.map_or("missing".to_owned(), |entry| id(entry).to_string()),
                    outside: outside.map_or("missing".to_owned(), |layer| layer.digest.to_string()),
                });
            };
            let key = keys.get(index).and_then(Option::as_ref);
            let name = key.map_or([0; 32], LayerParts::name);
            if name != entry.key || key.is_some() != crypt::is_encrypted(layer) {
                return Err(IndexError::OtherKey(layer.digest));
            }
        }
        Ok(())
    }
}

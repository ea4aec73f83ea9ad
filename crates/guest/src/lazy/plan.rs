//! What an image is read by: a lazy image's own metadata, or the index of an ordinary one. Whoever opens an image, here or for another
//! process, now or again, goes the same way.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_core::Untrusted;
use nacre_lazy::{
    artifact::{Artifact, fetch_metadata},
    device::DeviceReader,
    image::{Metadata, OpenError, Table},
    index::{IndexArtifact, IndexMetadata, IndexReader, LayerKey, reader::MakeFile},
    keys::MetadataKey,
    reader::{Reader, Shared},
    source::Blobs,
};
use nacre_oci::{
    crypt::LayerParts,
    manifest::{Descriptor, ImageConfig, Manifest},
    source::ImageSource,
};

use super::{
    LazyError, Place, check,
    grant::{Grant, IndexGrant},
};

/// What an image is read by.
pub(super) enum Plan {
    /// A lazy image.
    Lazy(Arc<Artifact>),
    /// An ordinary image and its index.
    Index(Arc<ByIndex>),
}

pub(super) struct ByIndex {
    pub(super) artifact: IndexArtifact,
    pub(super) image: Manifest,
    pub(super) config: Vec<u8>,
    pub(super) keys: Vec<LayerKey>,
}

/// Metadata that were verified, and what they are of.
pub(super) enum Opened {
    Lazy(Box<Metadata>, Arc<Artifact>),
    Index(Box<IndexMetadata>, Arc<ByIndex>),
}

/// What reads an image.
pub(super) struct Parts {
    pub(super) config: ImageConfig,
    pub(super) config_bytes: Vec<u8>,
    pub(super) reader: Arc<dyn DeviceReader>,
    pub(super) chunks: Option<Arc<Reader>>,
}

/// A copy, for another process or another part of this one.
pub(super) fn copy_of(keys: &[LayerKey]) -> Vec<LayerKey> {
    keys.iter().map(|key| key.as_ref().map(|key| LayerParts::from_secret(&key.to_secret()))).collect()
}

impl Plan {
    /// That of a grant.
    pub(super) fn of(grant: &Grant) -> Result<Self, LazyError> {
        let image = Manifest::parse(&grant.manifest)?;
        Ok(match &grant.index {
            None => Self::Lazy(Arc::new(Artifact::parse(&image)?)),
            Some(IndexGrant { manifest, config, layer_keys }) => {
                let artifact = IndexArtifact::parse(&Manifest::parse(manifest)?, grant.manifest.digest())?;
                Self::Index(Arc::new(ByIndex { artifact, image, config: config.clone(), keys: copy_of(layer_keys) }))
            }
        })
    }

    /// The metadata blob.
    pub(super) fn metadata(&self) -> &Descriptor {
        match self {
            Self::Lazy(artifact) => &artifact.metadata,
            Self::Index(index) => &index.artifact.metadata,
        }
    }

    /// All blobs.
    pub(super) fn descriptors(&self) -> Vec<Descriptor> {
        match self {
            Self::Lazy(artifact) => artifact.descriptors().cloned().collect(),
            Self::Index(index) => index.artifact.descriptors(&index.image).cloned().collect(),
        }
    }

    /// Reads the metadata blob and verifies all of it; its EROFS image goes to a file.
    pub(super) fn read(
        &self,
        blob: &mut dyn Read,
        key: Option<&MetadataKey>,
        erofs: &mut File,
    ) -> Result<Opened, OpenError> {
        let expected = &self.metadata().digest;
        Ok(match self {
            Self::Lazy(artifact) => {
                Opened::Lazy(Box::new(Metadata::read(blob, expected, key, erofs)?), Arc::clone(artifact))
            }
            Self::Index(index) => {
                Opened::Index(Box::new(IndexMetadata::read(blob, expected, key, erofs)?), Arc::clone(index))
            }
        })
    }

    /// The same, from where the image is. A copy of the blob is left where another process may have to go on.
    pub(super) fn fetch(
        &self,
        source: &dyn ImageSource,
        key: Option<&MetadataKey>,
        erofs: &mut File,
        copy: Option<&mut File>,
    ) -> Result<Opened, OpenError> {
        fetch_metadata(source, self.metadata(), erofs, copy, |blob, erofs| self.read(blob, key, erofs))
    }
}

impl Opened {
    /// Has the tree judged, before the kernel sees it.
    pub(super) fn judge(&self, place: &Place) -> Result<(), LazyError> {
        check(
            place,
            match self {
                Self::Lazy(metadata, _) => metadata.summary.device_bytes.get(),
                Self::Index(metadata, _) => metadata.summary.device_bytes.get(),
            },
        )
    }

    /// What reads the image; long spans of layers are decoded into files of its place.
    pub(super) fn parts(self, shared: &Arc<Shared>, blobs: Arc<dyn Blobs>, place: &Place) -> Result<Parts, LazyError> {
        let shared = Arc::clone(shared);
        match self {
            Self::Lazy(mut metadata, artifact) => {
                metadata.check_blobs(&artifact.blobs())?;
                let config = ImageConfig::of_verified(&metadata.config)?;
                let config_bytes = std::mem::take(&mut metadata.config);
                let (table, summary, data) = Table::new(*metadata, artifact.table_blob());
                let reader = Arc::new(Reader::new(shared, blobs, table, summary, data));
                Ok(Parts { config, config_bytes, chunks: Some(Arc::clone(&reader)), reader })
            }
            Self::Index(metadata, index) => {
                let ByIndex { artifact, image, config: config_bytes, keys } = &*index;
                metadata.check_layers(image, keys)?;
                let config = ImageConfig::verify(Untrusted::new(config_bytes.clone()), image)?.into_inner();
                let (keys, make_file) = (copy_of(keys), make_file(place.path()));
                let reader = IndexReader::new(shared, blobs, *metadata, keys, artifact.pages_blob(), make_file);
                Ok(Parts { config, config_bytes: config_bytes.clone(), reader: Arc::new(reader), chunks: None })
            }
        }
    }
}

/// Files without names in the image's directory.
fn make_file(directory: &Path) -> Box<MakeFile> {
    let (directory, number) = (directory.to_owned(), AtomicU64::new(0));
    Box::new(move || {
        let path = directory.join(format!("span-{}", number.fetch_add(1, Ordering::Relaxed)));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    })
}

//! Ordinary images, read where they are by an index that somebody made of them.
//!
//! Invariant: an index is used only if the policy lets it in as it lets in an image of the same name, and if it is about the manifest that
//! was admitted. Whatever else is found beside the image is left alone.

use std::{
    fs::{self, File},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_lazy::{
    index::{IndexArtifact, IndexMetadata, IndexReader, format::ARTIFACT_TYPE, reader::MakeFile},
    source::Blobs,
};
use nacre_oci::{
    manifest::Manifest,
    source::{ImageSource, SignatureStorage},
    trust::Admission,
};

use super::{LazyError, LazyImage, LazyStore, Place, check, io_error};
use crate::images::Images;

/// Indexes of one image that are looked at.
const CANDIDATES: usize = 16;

impl LazyStore {
    /// Opens an ordinary image by its index.
    pub(super) fn indexed(
        &self,
        images: &Images,
        source: &Arc<dyn ImageSource>,
        image: &Manifest,
        admission: Admission,
    ) -> Result<LazyImage, LazyError> {
        let mut tried = Vec::new();
        let storage = source.signatures();
        let found = storage.map(|storage| storage.referrers(admission.manifest(), Some(ARTIFACT_TYPE)));
        // Registries that only append have the newest at the end.
        for candidate in found.transpose().map_err(crate::images::PullError::from)?.unwrap_or_default().iter().rev() {
            if tried.len() == CANDIDATES {
                break;
            }
            let Some(storage) = storage else { break };
            match self.by_index(images, source, image, &admission, storage, candidate) {
                Ok(Opened { config, config_bytes, reader, place }) => {
                    let manifest = *admission.manifest();
                    tracing::info!("{} is read by the index {}", source.location(), candidate.digest);
                    let admission = Some(admission);
                    return Ok(LazyImage { manifest, admission, config, config_bytes, reader, chunks: None, place });
                }
                Err(error) => tried.push(format!("{}: {error}", candidate.digest.short())),
            }
        }
        Err(LazyError::NoIndex { image: source.location().to_string(), tried })
    }

    fn by_index(
        &self,
        images: &Images,
        source: &Arc<dyn ImageSource>,
        image: &Manifest,
        admission: &Admission,
        storage: &dyn SignatureStorage,
        candidate: &nacre_oci::manifest::Descriptor,
    ) -> Result<Opened, LazyError> {
        let (manifest, _) = images.admit_artifact(&**source, storage, &candidate.digest)?;
        let artifact = IndexArtifact::parse(&manifest, admission.manifest())?;
        let key = artifact.unwrap(images.keyring())?;
        let (config, config_bytes) = images.config_of(&**source, image)?;
        let mut place = Place::new(&self.mounts())?;
        let path = place.metadata();
        let stream = source.blob(&artifact.metadata).map_err(io::Error::other);
        let mut stream = stream.map_err(io_error("fetch the index", &path))?;
        let expected = &artifact.metadata.digest;
        let metadata = IndexMetadata::read(&mut stream, expected, key.as_ref(), &mut place.erofs)?;
        let keys = metadata.layer_keys(image, images.keyring())?;
        check(&place, metadata.summary.device_bytes.get())?;
        let blobs: Arc<dyn Blobs> = Arc::new(artifact.blobs(Arc::clone(source), image));
        let shared = Arc::clone(&self.shared);
        let make_file = make_file(place.path());
        let reader = IndexReader::new(shared, blobs, metadata, keys, artifact.pages_blob(), make_file);
        Ok(Opened { config, config_bytes, reader: Arc::new(reader), place })
    }
}

struct Opened {
    config: nacre_oci::manifest::ImageConfig,
    config_bytes: Vec<u8>,
    reader: Arc<IndexReader>,
    place: Place,
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

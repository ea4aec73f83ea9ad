//! Ordinary images, read where they are by an index that somebody made of them.
//!
//! Invariant: an index is used only if the policy lets it in as it lets in an image of the same name, and if it is about the manifest that
//! was admitted. Whatever else is found beside the image is left alone.

use std::{fs::File, sync::Arc};

use nacre_lazy::{
    artifact::ImageBlobs,
    index::{IndexArtifact, format::ARTIFACT_TYPE, unwrap_layers},
};
use nacre_oci::{
    manifest::{Descriptor, Manifest},
    source::{ImageSource, SignatureStorage},
    trust::Admission,
};

use super::{
    LazyError, LazyImage, LazyStore, Place,
    grant::IndexGrant,
    io_error,
    plan::{ByIndex, Plan, copy_of},
};
use crate::images::{Images, PullError};

/// Indexes of one image that are looked at.
const CANDIDATES: usize = 16;

/// An ordinary image that was opened by an index, and what another process opens it by.
pub(super) struct Indexed {
    pub(super) image: LazyImage,
    pub(super) grant: IndexGrant,
    pub(super) key: Option<nacre_lazy::keys::MetadataKey>,
}

impl LazyStore {
    /// Opens an ordinary image by its index.
    pub(super) fn indexed(
        &self,
        images: &Images,
        source: &Arc<dyn ImageSource>,
        image: &Manifest,
        admission: Admission,
    ) -> Result<Indexed, LazyError> {
        let mut tried = Vec::new();
        let storage = source.signatures();
        let found = storage.map(|storage| storage.referrers(admission.manifest(), Some(ARTIFACT_TYPE)));
        // Registries that only append have the newest at the end.
        for candidate in found.transpose().map_err(PullError::from)?.unwrap_or_default().iter().rev() {
            if tried.len() == CANDIDATES {
                break;
            }
            let Some(storage) = storage else { break };
            match self.by_index(images, source, image, &admission, storage, candidate) {
                Ok(mut indexed) => {
                    tracing::info!("{} is read by the index {}", source.location(), candidate.digest);
                    indexed.image.admission = Some(admission);
                    return Ok(indexed);
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
        candidate: &Descriptor,
    ) -> Result<Indexed, LazyError> {
        let (raw, manifest, _admitted) = images.admit_artifact(&**source, storage, &candidate.digest)?;
        let artifact = IndexArtifact::parse(&manifest, admission.manifest())?;
        let (keys, lent) =
            images.lend(|keyring| Ok::<_, LazyError>((artifact.unwrap(keyring)?, unwrap_layers(image, keyring)?)));
        let (key, layer_keys) = keys?;
        let (_, config) = images.config_of(&**source, image)?;
        let grant = IndexGrant { manifest: raw, config: config.clone(), layer_keys: copy_of(&layer_keys) };
        let plan = Plan::Index(Arc::new(ByIndex { artifact, image: image.clone(), config, keys: layer_keys }));
        let mut place = Place::new(&self.mounts())?;
        let path = place.blob();
        let mut copy = File::create_new(&path).map_err(io_error("make the file", &path))?;
        let opened = plan.fetch(&**source, key.as_ref(), &mut place.erofs, Some(&mut copy))?;
        opened.judge(&place)?;
        let blobs = Arc::new(ImageBlobs::of(Arc::clone(source), &plan.descriptors()));
        let image = self.opened(opened, blobs, *admission.manifest(), place)?.lent(lent);
        Ok(Indexed { image, grant, key })
    }
}

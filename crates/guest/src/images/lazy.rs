//! Lazy images: admitted like any other, and read where they are.

use std::sync::Arc;

use nacre_attest::client::Tenure;
use nacre_lazy::{artifact::Artifact, keys::MetadataKey};
use nacre_oci::{
    manifest::{Manifest, RawManifest},
    reference::Location,
    source::ImageSource,
    trust::Admission,
};

use super::{Images, PullError, describe, now};
use crate::store::RefRecord;

/// A lazy image that was admitted.
pub struct AdmittedLazy {
    /// Its manifest, as it came.
    pub raw: RawManifest,
    /// The same.
    pub manifest: Manifest,
    /// The proof.
    pub admission: Admission,
    /// What the store keeps of its name.
    pub name: RefRecord,
}

/// What it takes to mount a lazy image.
#[derive(Debug)]
pub struct LazyAccess {
    /// Where it is.
    pub location: Location,
    /// Its manifest.
    pub manifest: RawManifest,
    /// Its key, where it is encrypted.
    pub key: Option<MetadataKey>,
    /// Where that was lent: to be given to whoever keeps it.
    pub lent: Option<Arc<Tenure>>,
}

impl Images {
    /// The manifest of an image that is read where it is, and the proof that it may be.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn admit_lazy(&self, source: &dyn ImageSource) -> Result<(Manifest, Admission), PullError> {
        let resolved = self.resolve(source)?;
        let (admission, _) = self.admit(&resolved, source.location(), source.signatures())?;
        self.measure(&admission, source.location())?;
        Ok((resolved.manifest, admission))
    }

    /// The same, with what the store keeps of it. Signatures that were kept may do.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn admit_lazy_named(&self, source: &dyn ImageSource) -> Result<AdmittedLazy, PullError> {
        let resolved = self.resolve(source)?;
        let (admission, recording) = self.admit_from(&resolved, source.location(), source.signatures())?;
        self.measure(&admission, source.location())?;
        let name = RefRecord {
            name: source.location().to_string(),
            manifest: *resolved.raw().digest(),
            chain: resolved.digests(),
            indexes: resolved.indexes(),
            pulled: now(),
            admitted: describe(&admission),
            signatures: serde_json::to_value(recording).unwrap_or_default(),
        };
        Ok(AdmittedLazy { raw: resolved.raw().clone(), manifest: resolved.manifest, admission, name })
    }

    /// Unwraps the key of a lazy image that was admitted.
    ///
    /// # Errors
    /// [`PullError::LazyKey`]
    pub(crate) fn lazy_access(
        &self,
        location: Location,
        raw: RawManifest,
        manifest: &Manifest,
    ) -> Result<LazyAccess, PullError> {
        let artifact = Artifact::parse(manifest).map_err(PullError::LazyKey)?;
        let (unwrapped, lent) = self.lend(|keyring| artifact.unwrap(keyring));
        Ok(LazyAccess { location, manifest: raw, key: unwrapped.map_err(PullError::LazyKey)?, lent })
    }
}

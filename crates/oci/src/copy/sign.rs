//! Signs what is being copied.

use super::{
    CopyError, Job,
    store::{self, Attachment},
};
use crate::{
    manifest::RawManifest,
    reference::{ImageRef, Location},
    source::TransportError,
    trust::sign::{CosignKey, GpgKey},
};

/// A key, and the form of its signatures.
#[derive(Clone, Copy, Debug)]
pub enum SigningKey<'a> {
    /// A cosign signature under the tag `sha256-<hex>.sig`, which all verifiers know.
    Cosign(&'a CosignKey),
    /// A sigstore bundle among the image's referrers, as cosign writes since version 3.
    Bundle(&'a CosignKey),
    /// GPG simple signing.
    Gpg(&'a GpgKey),
}

/// Who signs a copy, as what.
#[derive(Clone, Debug)]
pub struct Sign<'a> {
    /// The keys; each signs.
    pub keys: Vec<SigningKey<'a>>,
    /// The name that is signed; `None` is that of the destination, which only registries and docker archives have.
    pub identity: Option<ImageRef>,
}

/// [`Sign`], with a name.
pub(super) struct Signer<'a> {
    keys: &'a [SigningKey<'a>],
    identity: ImageRef,
}

impl<'a> Sign<'a> {
    /// Settles, before anything is copied, what will be signed.
    pub(super) fn prepare(&'a self, destination: &Location) -> Result<Signer<'a>, CopyError> {
        if matches!(destination, Location::DockerArchive { .. }) {
            return Err(CopyError::Unsupported("a docker archive stores no signatures".into()));
        }
        let identity = self.identity.as_ref().or(destination.image_ref()).cloned().ok_or_else(|| {
            CopyError::Unsupported(format!("{destination} has no name to be signed: give one with --sign-identity"))
        })?;
        Ok(Signer { keys: &self.keys, identity: identity.with_default_tag() })
    }
}

impl Signer<'_> {
    /// Signs all manifests: verifiers may look at the index, or at the machine's image alone. Gives the number of signatures.
    pub(super) fn sign(&self, job: &Job<'_>, manifests: &[RawManifest]) -> Result<usize, CopyError> {
        let mut made = 0;
        for manifest in manifests {
            for key in self.keys {
                self.sign_one(job, manifest, *key)?;
                made += 1;
            }
        }
        Ok(made)
    }

    fn sign_one(&self, job: &Job<'_>, manifest: &RawManifest, key: SigningKey<'_>) -> Result<(), CopyError> {
        let digest = manifest.digest();
        match key {
            SigningKey::Gpg(key) => store::put_gpg(job, digest, &key.sign(digest, &self.identity)?),
            SigningKey::Cosign(key) => {
                let signature = key.sign(digest, &self.identity)?;
                let attachment = Attachment { payload: signature.payload, annotations: signature.layer.annotations };
                store::put_cosign(job, digest, &[attachment])
            }
            SigningKey::Bundle(_) if matches!(job.sink.location(), Location::Dir(_)) => {
                let what = "sigstore bundles (sign in cosign's older form instead)".into();
                Err(TransportError::Unsupported { what, place: job.sink.location().to_string() }.into())
            }
            SigningKey::Bundle(key) => {
                let artifact = key.bundle(manifest, &self.identity)?;
                for (descriptor, bytes) in &artifact.blobs {
                    job.sink.put_blob(&mut bytes.as_slice(), Some(descriptor))?;
                }
                Ok(job.sink.put_manifest(&artifact.manifest)?)
            }
        }
    }
}

//! Makes the signatures that [`trust`](super) verifies, for `copy`: cosign with a private key, and GPG with an exported secret key.
//!
//! What is made here is bytes; storing them is the caller's: a [`CosignSignature`] is a layer of the artifact under its tag, a
//! [`BundleArtifact`] a manifest among the image's referrers, a GPG signature a file of the lookaside or of `dir:`.

mod cosign;
mod gpg;
mod key_file;

use nacre_core::Digest;

pub use self::{
    cosign::{BundleArtifact, CosignKey, CosignSignature, referrers_index, referrers_tag},
    gpg::GpgKey,
};
use super::payload::Payload;
use crate::{manifest::ManifestError, reference::ImageRef};

/// Who made a signature, in its `optional` part.
const CREATOR: &str = concat!("nacre ", env!("CARGO_PKG_VERSION"));

/// Why no signature was made.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The private key cannot be read.
    #[error("private key: {0}")]
    Key(String),
    /// The passphrase is wrong or missing.
    #[error("private key: {0}; give the passphrase that it was encrypted with")]
    Passphrase(&'static str),
    /// The key is of a kind that we do not sign with.
    #[error(
        "private key: {0} is not supported (PKCS#8 or SEC1 keys of P-256 and P-384, PKCS#8 Ed25519, and cosign's encrypted form are)"
    )]
    Unsupported(String),
    /// The key must not sign.
    #[error("GPG key: {0}")]
    Unusable(#[from] super::SignatureError),
    /// There is no such key in the file.
    #[error("no secret key {0} that can sign")]
    NoSuchKey(String),
    /// The signature could not be computed.
    #[error("signing: {0}")]
    Sign(String),
    /// The name says too little to be signed.
    #[error("{0}: a signature needs a name with a tag or a digest")]
    NameOnly(ImageRef),
    /// What was made is no manifest. A fault of ours.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// What is signed: this manifest has this name.
fn payload(digest: &Digest, reference: &ImageRef) -> Result<Payload, SignError> {
    if reference.tag().is_none() && reference.digest().is_none() {
        return Err(SignError::NameOnly(reference.clone()));
    }
    Ok(Payload { digest: *digest, reference: reference.clone() })
}

//! Why a layer was not encrypted or decrypted.

use nacre_core::Digest;

use crate::manifest::ManifestError;

/// Why a layer was not encrypted or decrypted.
#[derive(Debug, thiserror::Error)]
pub enum CryptError {
    /// The media type has no `+encrypted`.
    #[error("layer of type '{0}' is not encrypted")]
    NotEncrypted(String),
    /// The media type says that it is encrypted already.
    #[error("layer of type '{0}' is encrypted already: it is not encrypted a second time")]
    AlreadyEncrypted(String),
    /// The media type is no layer's.
    #[error("'{media_type}' cannot be encrypted")]
    NotALayer {
        /// The type.
        media_type: String,
        /// Why not.
        source: ManifestError,
    },
    /// An annotation of the layer is missing, too large or malformed.
    #[error("annotation {name}: {problem}")]
    Annotation {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A key was unwrapped, but what came out is not the document that it should be. Nothing of it is shown, since it is secret.
    #[error("the unwrapped layer key is not valid: {0}")]
    PrivateOptions(String),
    /// The ciphertext is not what was encrypted.
    #[error(
        "layer authentication failed: the HMAC of the ciphertext does not match: it was changed, or the key is wrong"
    )]
    Mac,
    /// The ciphertext is genuine, but what it decrypts to is not what was encrypted (another nonce, or a key of another layer).
    #[error("decrypted layer: digest mismatch: its encryptor recorded {expected}, the content has {found}")]
    Digest {
        /// As the encryptor recorded it.
        expected: Digest,
        /// As it was.
        found: Digest,
    },
    /// The cipher itself refused, which it has no reason to.
    #[error("AES-256-CTR failed in the cryptographic library")]
    Cipher,
}

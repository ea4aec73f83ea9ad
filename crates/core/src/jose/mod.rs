//! JOSE objects: keys (RFC 7517), encryption (RFC 7516) and signatures (RFC 7515), with the few algorithms that Nacre speaks.
//!
//! | file | what |
//! |---|---|
//! | `b64` | base64url without padding |
//! | `pem` | the blocks of a PEM file |
//! | `key` | public and private keys, from PEM and DER |
//! | `curve` | P-256, the curve that the broker spends its time with |
//! | `jwk` | the same as JWK, thumbprints |
//! | `kdf` | the Concat KDF of ECDH-ES |
//! | `wrap` | how a content key is wrapped for a recipient |
//! | `jwe` | the JWE serialisations: compact, flattened, general |
//! | `jws` | compact JWS with JSON claims |
//!
//! Invariants: the key fixes the algorithm, the header only has to agree; `none` does not exist; a header that asks for something we do
//! not know (`crit`, `zip`) refuses the object; content keys and shared secrets are zeroized; RSA private operations run only in
//! aws-lc-rs, in constant time (RUSTSEC-2023-0071).

pub mod b64;
mod curve;
mod jwe;
mod jwk;
mod jws;
mod kdf;
mod key;
mod pem;
mod wrap;

pub use curve::P256PrivateKey;
pub use jwe::{Jwe, Recipient, encrypt};
pub use jwk::Jwk;
pub use jws::{sign_compact, verify_compact, verify_signature};
pub use key::{PrivateKey, PublicKey, RsaPrivateKey, RsaPublicKey};
pub use wrap::KeyAlgorithm;

/// What is wrong with a key, an encrypted or a signed object.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JoseError {
    /// Bytes that are no object of the kind.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// `JWE`, `JWS`, `JWK`, `private key`, `public key`.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Something that is well-formed and that we do not do.
    #[error("unsupported {what} '{name}'")]
    Unsupported {
        /// `key algorithm`, `content encryption`, `curve`…
        what: &'static str,
        /// Its name as it was found.
        name: String,
    },
    /// The algorithm cannot be used with the key.
    #[error("algorithm {algorithm} does not go with a key of type {key}")]
    AlgorithmMismatch {
        /// The algorithm asked for.
        algorithm: String,
        /// The key's type.
        key: &'static str,
    },
    /// The private key is encrypted with a password.
    #[error("the private key is encrypted: decrypt it first (openssl pkey -in KEY -out PLAIN)")]
    EncryptedKey,
    /// None of the keys opens the object.
    #[error("none of the {keys} private keys opens any of the {recipients} recipients' wrapped keys")]
    NoKeyFits {
        /// How many keys were tried.
        keys: usize,
        /// How many recipients the object has.
        recipients: usize,
    },
    /// The content key opened, the content did not.
    #[error("JWE content failed authentication: it was changed, or its header was")]
    ContentTampered,
    /// The signature is not the key's.
    #[error("JWS signature does not verify with the given key")]
    BadSignature,
    /// A cryptographic operation failed for no reason that its library gives.
    #[error("cryptographic operation failed: {0}")]
    Crypto(&'static str),
}

impl JoseError {
    pub(crate) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed { what, why: why.into() }
    }

    /// Untrusted names go into messages, so they are cut there.
    pub(crate) fn unsupported(what: &'static str, name: &str) -> Self {
        Self::Unsupported { what, name: name.chars().take(80).collect() }
    }
}

//! Public keys of cosign signatures and transparency logs: SubjectPublicKeyInfo of ECDSA P-256 and P-384, RSA from 2048 bits, Ed25519.
//!
//! cosign hashes with SHA-256 whatever the key; newer sigstore clients take SHA-384 with P-384. Both are accepted for that curve.

use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject as _};
use spki::{ObjectIdentifier, SubjectPublicKeyInfoRef, der::Decode as _};

use super::error::SignatureError;

const ID_EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const SECP256R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ID_ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    P256,
    P384,
    Rsa,
    Ed25519,
}

/// A public key that signatures are verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    kind: Kind,
    spki: Vec<u8>,
    raw: Vec<u8>,
}

impl PublicKey {
    /// Reads a PEM file with one `PUBLIC KEY`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let spki =
            SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|error| format!("no PEM public key: {error}"))?;
        Self::from_spki(&spki)
    }

    /// Reads a DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_spki(der: &[u8]) -> Result<Self, String> {
        let info = SubjectPublicKeyInfoRef::from_der(der).map_err(|error| format!("no public key: {error}"))?;
        let curve = || info.algorithm.parameters_oid().map_err(|error| format!("no named curve: {error}"));
        let kind = match info.algorithm.oid {
            ID_EC_PUBLIC_KEY => match curve()? {
                SECP256R1 => Kind::P256,
                SECP384R1 => Kind::P384,
                other => return Err(format!("curve {other} is not supported (P-256 and P-384 are)")),
            },
            RSA_ENCRYPTION => Kind::Rsa,
            ID_ED25519 => Kind::Ed25519,
            other => return Err(format!("key type {other} is not supported (ECDSA, RSA and Ed25519 are)")),
        };
        let raw = info.subject_public_key.as_bytes().ok_or("the public key has unused bits")?.to_vec();
        Ok(Self { kind, spki: der.to_vec(), raw })
    }

    /// The key as DER SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// How messages call it: the SHA-256 of the SubjectPublicKeyInfo.
    pub fn fingerprint(&self) -> String {
        nacre_core::Digest::sha256(&self.spki).to_string()
    }

    pub(crate) fn is_ecdsa(&self) -> bool {
        matches!(self.kind, Kind::P256 | Kind::P384)
    }

    /// Checks a signature over `message`.
    ///
    /// # Errors
    /// [`SignatureError::Invalid`]
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        let algorithms: &[&'static dyn VerificationAlgorithm] = match self.kind {
            Kind::P256 => &[&signature::ECDSA_P256_SHA256_ASN1],
            Kind::P384 => &[&signature::ECDSA_P384_SHA256_ASN1, &signature::ECDSA_P384_SHA384_ASN1],
            Kind::Rsa => &[&signature::RSA_PKCS1_2048_8192_SHA256],
            Kind::Ed25519 => &[&signature::ED25519],
        };
        let holds = algorithms
            .iter()
            .any(|algorithm| UnparsedPublicKey::new(*algorithm, &self.raw).verify(message, signature).is_ok());
        if holds { Ok(()) } else { Err(SignatureError::Invalid(format!("not by key {}", self.fingerprint()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_is_refused() {
        for pem in ["", "nonsense", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"] {
            assert!(PublicKey::from_pem(pem.as_bytes()).is_err(), "{pem}");
        }
        assert!(PublicKey::from_spki(&[0x30; 40]).is_err());
    }
}

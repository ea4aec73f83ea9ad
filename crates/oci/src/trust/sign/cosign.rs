//! cosign signatures with a private key: the payload and its layer for the tag `sha256-<hex>.sig`, and sigstore bundles v0.3 for the
//! referrers.
//!
//! Our bundles have the image's name as the name of the statement's subject, which cosign leaves out: with it, a policy can tell the
//! images of one key apart.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Digest, SecretBytes};
use p256::ecdsa::signature::Signer as _;
use p384::ecdsa::signature::hazmat::PrehashSigner as _;
use pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, EncodePublicKey as _};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use spki::der::pem;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{CREATOR, SignError, key_file, payload};
use crate::{
    manifest::{Descriptor, Index, Manifest, RawManifest, media},
    reference::ImageRef,
    trust::{bundle, collect, payload::PayloadType},
};

/// A private key that signs as cosign does.
pub struct CosignKey(Inner);

enum Inner {
    P256(Box<p256::ecdsa::SigningKey>),
    P384(Box<p384::ecdsa::SigningKey>),
    Ed25519(Box<Ed25519KeyPair>),
}

impl std::fmt::Debug for CosignKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CosignKey(…)")
    }
}

/// A cosign signature of an image.
#[derive(Debug)]
pub struct CosignSignature {
    /// The blob: what was signed.
    pub payload: Vec<u8>,
    /// The layer of the signature artifact, with the signature in its annotations.
    pub layer: Descriptor,
    /// The artifact's tag in the image's repository.
    pub tag: String,
    /// The same, as `dir:` stores it.
    pub native: Vec<u8>,
}

/// A sigstore bundle as an artifact among an image's referrers.
#[derive(Debug)]
pub struct BundleArtifact {
    /// The artifact's manifest; its subject is the image.
    pub manifest: RawManifest,
    /// The blobs that it needs: the empty config and the bundle.
    pub blobs: Vec<(Descriptor, Vec<u8>)>,
    /// How an index of referrers lists it.
    pub descriptor: Descriptor,
}

impl CosignKey {
    /// Reads a private key: PKCS#8 or SEC1 PEM, or cosign's encrypted form with its passphrase (which may be empty, but must be given).
    ///
    /// # Errors
    /// [`SignError`]
    pub fn from_pem(file: &[u8], passphrase: Option<&SecretBytes>) -> Result<Self, SignError> {
        match key_file::read(file, passphrase)? {
            key_file::PrivateKey::Pkcs8(der) => Self::from_pkcs8(&der),
            key_file::PrivateKey::Sec1(der) => {
                if let Ok(key) = p256::SecretKey::from_sec1_der(&der) {
                    return Ok(Self(Inner::P256(Box::new(key.into()))));
                }
                if let Ok(key) = p384::SecretKey::from_sec1_der(&der) {
                    return Ok(Self(Inner::P384(Box::new(key.into()))));
                }
                Err(SignError::Unsupported("this EC key".into()))
            }
        }
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, SignError> {
        if let Ok(key) = p256::ecdsa::SigningKey::from_pkcs8_der(der) {
            return Ok(Self(Inner::P256(Box::new(key))));
        }
        if let Ok(key) = p384::ecdsa::SigningKey::from_pkcs8_der(der) {
            return Ok(Self(Inner::P384(Box::new(key))));
        }
        if let Ok(key) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            return Ok(Self(Inner::Ed25519(Box::new(key))));
        }
        Err(SignError::Unsupported("this PKCS#8 key".into()))
    }

    /// Makes a new P-256 key.
    pub fn generate() -> Self {
        Self(Inner::P256(Box::new(p256::ecdsa::SigningKey::random(&mut rand_core::OsRng))))
    }

    /// The private key, encrypted as cosign and skopeo read it.
    ///
    /// # Errors
    /// [`SignError`]: of the keys, only ECDSA can be written.
    pub fn to_encrypted_pem(&self, passphrase: &SecretBytes) -> Result<String, SignError> {
        let der = match &self.0 {
            Inner::P256(key) => key.to_pkcs8_der(),
            Inner::P384(key) => key.to_pkcs8_der(),
            Inner::Ed25519(_) => return Err(SignError::Unsupported("writing an Ed25519 key".into())),
        };
        let der = der.map_err(|error| SignError::Key(error.to_string()))?;
        key_file::encrypt(der.as_bytes(), passphrase)
    }

    /// The public key, for policies.
    ///
    /// # Errors
    /// [`SignError::Key`]
    pub fn public_pem(&self) -> Result<String, SignError> {
        let der = match &self.0 {
            Inner::P256(key) => key.verifying_key().to_public_key_der().map(|der| der.as_bytes().to_vec()),
            Inner::P384(key) => key.verifying_key().to_public_key_der().map(|der| der.as_bytes().to_vec()),
            Inner::Ed25519(key) => {
                // SubjectPublicKeyInfo of Ed25519 is this prefix and the key, RFC 8410.
                Ok([b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00", key.public_key().as_ref()].concat())
            }
        };
        let der = der.map_err(|error| SignError::Key(error.to_string()))?;
        pem::encode_string("PUBLIC KEY", pem::LineEnding::LF, &der).map_err(|error| SignError::Key(error.to_string()))
    }

    /// Signs with SHA-256, whatever the curve, as cosign does.
    fn sign_bytes(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        match &self.0 {
            Inner::P256(key) => {
                let signature: p256::ecdsa::DerSignature = key.sign(message);
                Ok(signature.as_bytes().to_vec())
            }
            Inner::P384(key) => {
                let signature: p384::ecdsa::DerSignature = key
                    .sign_prehash(Digest::sha256(message).as_bytes())
                    .map_err(|error| SignError::Sign(error.to_string()))?;
                Ok(signature.as_bytes().to_vec())
            }
            Inner::Ed25519(key) => Ok(key.sign(message).as_ref().to_vec()),
        }
    }

    /// Signs that the manifest or index of `digest` has the name `reference`.
    ///
    /// # Errors
    /// [`SignError`]
    pub fn sign(&self, digest: &Digest, reference: &ImageRef) -> Result<CosignSignature, SignError> {
        let optional = serde_json::json!({"creator": CREATOR, "timestamp": OffsetDateTime::now_utc().unix_timestamp()});
        let payload = payload(digest, reference)?.encode(PayloadType::Cosign, &optional);
        let signature = STANDARD.encode(self.sign_bytes(&payload)?);
        let annotations = BTreeMap::from([(collect::SIGNATURE_ANNOTATION.to_owned(), signature)]);
        let native = collect::encode_blob(&payload, &annotations);
        let layer = Descriptor { annotations, ..Descriptor::of(media::COSIGN_PAYLOAD, &payload) };
        Ok(CosignSignature { payload, layer, tag: collect::signature_tag(digest), native })
    }

    /// Signs the manifest or index as a sigstore bundle.
    ///
    /// # Errors
    /// [`SignError`]
    pub fn bundle(&self, image: &RawManifest, reference: &ImageRef) -> Result<BundleArtifact, SignError> {
        let name = payload(image.digest(), reference)?.reference.to_string();
        let statement = serde_json::json!({
            "_type": bundle::STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {image.digest().algorithm().name(): image.digest().hex()}}],
            "predicateType": bundle::PREDICATE_TYPE,
            "predicate": {},
        })
        .to_string();
        let message = bundle::pre_authentication_encoding(bundle::PAYLOAD_TYPE, statement.as_bytes());
        let public = self.public_pem()?;
        let (_, der) = pem::decode_vec(public.as_bytes()).map_err(|error| SignError::Key(error.to_string()))?;
        let json = serde_json::json!({
            "mediaType": media::SIGSTORE_BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": STANDARD.encode(Digest::sha256(&der).as_bytes())}},
            "dsseEnvelope": {
                "payload": STANDARD.encode(&statement),
                "payloadType": bundle::PAYLOAD_TYPE,
                "signatures": [{"sig": STANDARD.encode(self.sign_bytes(&message)?)}],
            },
        });
        artifact(image, json.to_string().into_bytes())
    }
}

fn artifact(image: &RawManifest, json: Vec<u8>) -> Result<BundleArtifact, SignError> {
    let config = Descriptor::of(media::OCI_EMPTY, b"{}");
    let layer = Descriptor::of(media::SIGSTORE_BUNDLE, &json);
    let mut annotations = BTreeMap::from([
        ("dev.sigstore.bundle.content".to_owned(), "dsse-envelope".to_owned()),
        ("dev.sigstore.bundle.predicateType".to_owned(), bundle::PREDICATE_TYPE.to_owned()),
    ]);
    if let Ok(created) =
        OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH).format(&Rfc3339)
    {
        annotations.insert("org.opencontainers.image.created".into(), created);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: Some(media::SIGSTORE_BUNDLE.into()),
        config: config.clone(),
        layers: vec![layer.clone()],
        subject: Some(image.descriptor()),
        annotations: annotations.clone(),
    };
    let manifest = RawManifest::new(to_json(&manifest)?, Some(media::OCI_MANIFEST))?;
    let descriptor =
        Descriptor { annotations, artifact_type: Some(media::SIGSTORE_BUNDLE.into()), ..manifest.descriptor() };
    Ok(BundleArtifact { manifest, blobs: vec![(config, b"{}".to_vec()), (layer, json)], descriptor })
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>, SignError> {
    serde_json::to_vec(value).map_err(|error| SignError::Sign(error.to_string()))
}

/// The tag under which the referrers of a manifest are listed where a registry has no referrers API.
pub fn referrers_tag(subject: &Digest) -> String {
    format!("{}-{}", subject.algorithm().name(), subject.hex())
}

/// The index for [`referrers_tag`]: what it lists now, if there is one, and the new artifact.
///
/// # Errors
/// [`SignError::Manifest`]: what is there is no index.
pub fn referrers_index(existing: Option<&RawManifest>, artifact: &Descriptor) -> Result<RawManifest, SignError> {
    let mut manifests = match existing {
        Some(raw) => Index::parse(raw)?.manifests,
        None => Vec::new(),
    };
    manifests.retain(|entry| entry.digest != artifact.digest);
    manifests.push(artifact.clone());
    let index =
        Index { schema_version: 2, media_type: Some(media::OCI_INDEX.into()), manifests, annotations: BTreeMap::new() };
    Ok(RawManifest::new(to_json(&index)?, Some(media::OCI_INDEX))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::PublicKey;

    #[test]
    fn an_encrypted_key_opens_with_its_passphrase_only() {
        let key = CosignKey::generate();
        let pass = SecretBytes::new(b"correct".to_vec());
        let pem = key.to_encrypted_pem(&pass).unwrap();
        assert!(pem.starts_with("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n"));
        let again = CosignKey::from_pem(pem.as_bytes(), Some(&pass)).unwrap();
        assert_eq!(again.public_pem().unwrap(), key.public_pem().unwrap());
        let old = pem.replace("SIGSTORE", "COSIGN");
        assert!(CosignKey::from_pem(old.as_bytes(), Some(&pass)).is_ok());
        let wrong = SecretBytes::new(b"wrong".to_vec());
        assert!(matches!(CosignKey::from_pem(pem.as_bytes(), Some(&wrong)), Err(SignError::Passphrase(_))));
        assert!(matches!(CosignKey::from_pem(pem.as_bytes(), None), Err(SignError::Passphrase(_))));
        assert_eq!(format!("{key:?}"), "CosignKey(…)");
    }

    #[test]
    fn key_files_out_of_range_are_refused_before_they_cost_anything() {
        let body = |n: &str| {
            let json = format!(
                r#"{{"kdf":{{"name":"scrypt","params":{{"N":{n},"r":8,"p":1}},"salt":""}},"cipher":{{"name":"nacl/secretbox","nonce":""}},"ciphertext":""}}"#
            );
            pem::encode_string("ENCRYPTED SIGSTORE PRIVATE KEY", pem::LineEnding::LF, json.as_bytes()).unwrap()
        };
        let pass = SecretBytes::new(Vec::new());
        for n in ["0", "1", "3", "1099511627776", "9223372036854775807", "-2", "1.5", "\"2\""] {
            assert!(matches!(CosignKey::from_pem(body(n).as_bytes(), Some(&pass)), Err(SignError::Key(_))), "{n}");
        }
        for text in ["", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(CosignKey::from_pem(text.as_bytes(), Some(&pass)).is_err());
        }
    }

    #[test]
    fn keys_of_each_kind_sign_what_their_public_keys_verify() {
        let p384 = p384::SecretKey::random(&mut rand_core::OsRng);
        let p384: zeroize::Zeroizing<String> = p384.to_pkcs8_pem(pem::LineEnding::LF).unwrap();
        let ed = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
        let ed = pem::encode_string("PRIVATE KEY", pem::LineEnding::LF, ed.as_ref()).unwrap();
        let keys = [
            CosignKey::generate(),
            CosignKey::from_pem(p384.as_bytes(), None).unwrap(),
            CosignKey::from_pem(ed.as_bytes(), None).unwrap(),
        ];
        for key in keys {
            let public = PublicKey::from_pem(key.public_pem().unwrap().as_bytes()).unwrap();
            let signature = key.sign_bytes(b"message").unwrap();
            public.verify(b"message", &signature).unwrap();
            assert!(public.verify(b"massage", &signature).is_err());
            assert!(public.verify(b"message", &[]).is_err());
        }
    }

    #[test]
    fn a_name_without_tag_is_not_signed() {
        let error = CosignKey::generate().sign(&Digest::sha256(b""), &"r.example/a".parse().unwrap()).unwrap_err();
        assert!(matches!(error, SignError::NameOnly(_)));
    }
}

//! Sigstore bundles, v0.3, as cosign 3 attaches them to an image through the referrers API.
//!
//! ```text
//! {"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial": {"publicKey": {"hint": s}, …},
//!  "dsseEnvelope": {"payload": b64, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": b64}]}
//!  | "messageSignature": {"messageDigest": {"algorithm": "SHA2_256", "digest": b64}, "signature": b64}}
//! ```
//!
//! The envelope holds an in-toto statement of type `https://sigstore.dev/cosign/sign/v1` whose subject is the image's digest; a message
//! signature is over the manifest's bytes. Neither signs a name, unless the subject has one (ours do). Verified with keys only: a
//! bundle with a certificate needs a log's inclusion proof, which is not read.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::Digest;

use super::{
    error::SignatureError,
    json::{Fields, Json, JsonError},
    payload::SIGNATURE_LIMIT,
    public_key::PublicKey,
};
use crate::{
    manifest::{RawManifest, media},
    reference::ImageRef,
};

pub(super) const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
pub(super) const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";
pub(super) const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// The most signatures of an envelope, and subjects of a statement.
const ENTRIES_LIMIT: usize = 64;

/// A bundle of which nothing was checked yet.
#[derive(Debug)]
pub struct Bundle(Content);

#[derive(Debug)]
enum Content {
    Envelope { payload: Vec<u8>, payload_type: String, signatures: Vec<Vec<u8>> },
    Message { digest: Option<Vec<u8>>, signature: Vec<u8> },
}

/// What a bundle says, once its signature held.
#[derive(Debug)]
pub(super) struct Statement {
    /// Which of the manifests it is for.
    pub(super) digest: Digest,
    /// The name that was signed with it, where one was.
    pub(super) reference: Option<ImageRef>,
    /// Whose key it was.
    pub(super) key: String,
}

impl Bundle {
    /// Takes a bundle apart. Pure; for fuzzing too.
    ///
    /// # Errors
    /// [`SignatureError::Malformed`]
    pub fn parse(bytes: &[u8]) -> Result<Self, SignatureError> {
        if bytes.len() > SIGNATURE_LIMIT {
            return Err(SignatureError::malformed("bundle", format!("larger than {SIGNATURE_LIMIT} bytes")));
        }
        Self::from_json(bytes).map_err(|error| SignatureError::malformed("bundle", error))
    }

    fn from_json(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut top = Json::parse(bytes)?.into_fields("")?;
        let media_type = top.string("mediaType")?;
        if media_type != media::SIGSTORE_BUNDLE {
            return Err(JsonError::at(
                "mediaType",
                format!("is '{media_type:.100}', not '{}'", media::SIGSTORE_BUNDLE),
            ));
        }
        let mut material = top.fields("verificationMaterial")?;
        if material.take("publicKey").is_none() {
            return Err(JsonError::at(
                "verificationMaterial",
                "has no publicKey: only bundles signed with a key are read",
            ));
        }
        match (top.take("dsseEnvelope"), top.take("messageSignature")) {
            (Some(envelope), None) => envelope.into_fields("dsseEnvelope").and_then(Self::envelope),
            (None, Some(message)) => message.into_fields("messageSignature").and_then(Self::message),
            _ => Err(JsonError::at("bundle", "exactly one of dsseEnvelope and messageSignature must be there")),
        }
    }

    fn envelope(mut fields: Fields) -> Result<Self, JsonError> {
        let payload = base64_field(&mut fields, "payload")?;
        let payload_type = fields.string("payloadType")?;
        let entries = fields.required("signatures")?.into_array("dsseEnvelope.signatures")?;
        if entries.is_empty() || entries.len() > ENTRIES_LIMIT {
            return Err(JsonError::at("dsseEnvelope.signatures", format!("has {} entries", entries.len())));
        }
        let signatures = entries
            .into_iter()
            .map(|entry| base64_field(&mut entry.into_fields("dsseEnvelope.signatures")?, "sig"))
            .collect::<Result<_, _>>()?;
        Ok(Self(Content::Envelope { payload, payload_type, signatures }))
    }

    fn message(mut fields: Fields) -> Result<Self, JsonError> {
        let signature = base64_field(&mut fields, "signature")?;
        let digest = match fields.take("messageDigest") {
            Some(value) => {
                let mut digest = value.into_fields("messageSignature.messageDigest")?;
                let algorithm = digest.string("algorithm")?;
                if algorithm != "SHA2_256" {
                    let problem = format!("is '{algorithm:.40}', not 'SHA2_256'");
                    return Err(JsonError::at("messageSignature.messageDigest.algorithm", problem));
                }
                Some(base64_field(&mut digest, "digest")?)
            }
            None => None,
        };
        Ok(Self(Content::Message { digest, signature }))
    }

    /// Checks the signature with any of the keys, and which of the manifests it is for.
    pub(super) fn verify(&self, keys: &[PublicKey], chain: &[&RawManifest]) -> Result<Statement, SignatureError> {
        match &self.0 {
            Content::Envelope { payload, payload_type, signatures } => {
                if payload_type != PAYLOAD_TYPE {
                    return Err(SignatureError::malformed("bundle", format!("payloadType is '{payload_type:.100}'")));
                }
                let message = pre_authentication_encoding(payload_type, payload);
                let key = signatures
                    .iter()
                    .find_map(|signature| keys.iter().find(|key| key.verify(&message, signature).is_ok()))
                    .ok_or_else(|| not_by(keys))?;
                let (digest, reference) = statement(payload, chain)?;
                Ok(Statement { digest, reference, key: key.fingerprint() })
            }
            Content::Message { digest, signature } => {
                for manifest in chain {
                    let Some(key) = keys.iter().find(|key| key.verify(manifest.bytes(), signature).is_ok()) else {
                        continue;
                    };
                    if digest.as_ref().is_some_and(|digest| digest.as_slice() != manifest.digest().as_bytes()) {
                        return Err(SignatureError::malformed("bundle", "messageDigest is not of what was signed"));
                    }
                    return Ok(Statement { digest: *manifest.digest(), reference: None, key: key.fingerprint() });
                }
                Err(not_by(keys))
            }
        }
    }
}

fn not_by(keys: &[PublicKey]) -> SignatureError {
    let keys: Vec<String> = keys.iter().map(PublicKey::fingerprint).collect();
    SignatureError::Invalid(format!("not by key {}", keys.join(", ")))
}

/// DSSE: what is really signed.
pub(super) fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

fn statement(payload: &[u8], chain: &[&RawManifest]) -> Result<(Digest, Option<ImageRef>), SignatureError> {
    let subjects = subjects(payload).map_err(|error| SignatureError::malformed("statement", error))?;
    let mut found = None;
    for (digest, name) in subjects {
        if super::names_one_of(&digest, chain) {
            let reference = name
                .map(|name| name.parse())
                .transpose()
                .map_err(|error: crate::reference::ReferenceError| SignatureError::malformed("statement", error))?;
            return Ok((digest, reference));
        }
        found = Some(digest);
    }
    match found {
        Some(found) => Err(super::wrong_digest(found, chain)),
        None => Err(SignatureError::malformed("statement", "has no subject with a digest")),
    }
}

fn subjects(payload: &[u8]) -> Result<Vec<(Digest, Option<String>)>, JsonError> {
    let mut statement = Json::parse(payload)?.into_fields("")?;
    let kind = statement.string("_type")?;
    if kind != STATEMENT_TYPE {
        return Err(JsonError::at("_type", format!("is '{kind:.100}', not '{STATEMENT_TYPE}'")));
    }
    let predicate = statement.string("predicateType")?;
    if predicate != PREDICATE_TYPE {
        return Err(JsonError::at("predicateType", format!("is '{predicate:.100}', not '{PREDICATE_TYPE}'")));
    }
    let entries = statement.required("subject")?.into_array("subject")?;
    if entries.len() > ENTRIES_LIMIT {
        return Err(JsonError::at("subject", format!("has {} entries", entries.len())));
    }
    let mut subjects = Vec::new();
    for entry in entries {
        let mut subject = entry.into_fields("subject")?;
        let name = subject.optional_string("name")?.filter(|name| !name.is_empty());
        for (algorithm, value) in subject.required("digest")?.into_object("subject.digest")? {
            let value = value.into_string("subject.digest")?;
            if let Ok(digest) = format!("{algorithm}:{value}").parse() {
                subjects.push((digest, name.clone()));
            }
        }
    }
    Ok(subjects)
}

fn base64_field(fields: &mut Fields, name: &str) -> Result<Vec<u8>, JsonError> {
    let place = fields.place(name);
    STANDARD.decode(fields.string(name)?).map_err(|error| JsonError::at(&place, format!("is not base64: {error}")))
}

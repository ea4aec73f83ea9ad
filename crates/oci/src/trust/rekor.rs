//! A transparency log's promise that it has an entry, as cosign keeps it in `dev.sigstore.cosign/bundle`:
//!
//! ```text
//! {"SignedEntryTimestamp": b64, "Payload": {"body": b64, "integratedTime": n, "logIndex": n, "logID": s}}
//! ```
//!
//! The promise is an ECDSA signature over the canonical JSON (RFC 8785) of the payload; the body is a `hashedrekord` 0.0.1 that must be
//! about this very signature, key and payload. Verified offline; whether the log really keeps the entry is not asked.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::Digest;
use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer, pem::PemObject as _};

use super::{
    error::SignatureError,
    json::{Fields, Json, JsonError},
    public_key::PublicKey,
};

/// The most bytes of a promise.
const PROMISE_LIMIT: usize = 1 << 20;

/// What the log is said to have an entry of.
pub(super) struct Logged<'a> {
    /// The signer's SubjectPublicKeyInfo or certificate, DER.
    pub(super) key_or_certificate: &'a [u8],
    /// The raw signature.
    pub(super) signature: &'a [u8],
    /// What was signed.
    pub(super) payload: &'a [u8],
}

/// A promise of which nothing was checked yet.
#[derive(Debug)]
pub struct Promise {
    timestamp: Vec<u8>,
    canonical: Vec<u8>,
    body: Vec<u8>,
    integrated: i64,
}

impl Promise {
    /// Takes a promise apart. Pure; for fuzzing too.
    ///
    /// # Errors
    /// [`SignatureError::Log`]
    pub fn parse(bytes: &[u8]) -> Result<Self, SignatureError> {
        if bytes.len() > PROMISE_LIMIT {
            return Err(SignatureError::Log(format!("larger than {PROMISE_LIMIT} bytes")));
        }
        Self::from_json(bytes).map_err(log)
    }

    fn from_json(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut top = Json::parse(bytes)?.into_fields("")?;
        let timestamp = base64_field(&mut top, "SignedEntryTimestamp")?;
        let mut payload = top.fields("Payload")?;
        top.finish()?;
        let body_text = payload.string("body")?;
        let body = decode(&body_text, "Payload.body")?;
        let integrated = payload.required("integratedTime")?.into_integer("Payload.integratedTime")?;
        let index = payload.required("logIndex")?.into_integer("Payload.logIndex")?;
        let id = payload.string("logID")?;
        payload.finish()?;
        // Keys sorted, no white space, strings escaped as little as possible: serde_json writes strings as RFC 8785 wants them.
        let canonical = format!(
            "{{\"body\":{},\"integratedTime\":{integrated},\"logID\":{},\"logIndex\":{index}}}",
            serde_json::Value::from(body_text),
            serde_json::Value::from(id),
        );
        Ok(Self { timestamp, canonical: canonical.into_bytes(), body, integrated })
    }

    /// Checks that one of the logs made the promise, and that it is about `logged`. Gives the time of the entry, Unix seconds.
    ///
    /// # Errors
    /// [`SignatureError::Log`]
    pub(super) fn verify(&self, logs: &[PublicKey], logged: &Logged<'_>) -> Result<i64, SignatureError> {
        if !logs.iter().any(|key| key.is_ecdsa() && key.verify(&self.canonical, &self.timestamp).is_ok()) {
            return Err(SignatureError::Log("not signed by any rekorPublicKey of the rule".into()));
        }
        let entry = Entry::parse(&self.body).map_err(log)?;
        if entry.key_or_certificate != logged.key_or_certificate {
            return Err(SignatureError::Log("it is about another key".into()));
        }
        if entry.signature != logged.signature {
            return Err(SignatureError::Log("it is about another signature".into()));
        }
        if entry.hash != Digest::sha256(logged.payload).hex() {
            return Err(SignatureError::Log("it is about another payload".into()));
        }
        Ok(self.integrated)
    }
}

/// A `hashedrekord`. The log has signed it, so that unknown fields are its affair.
struct Entry {
    key_or_certificate: Vec<u8>,
    signature: Vec<u8>,
    hash: String,
}

impl Entry {
    fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut entry = Json::parse(bytes)?.into_fields("body")?;
        let (kind, version) = (entry.string("kind")?, entry.string("apiVersion")?);
        if kind != "hashedrekord" || version != "0.0.1" {
            return Err(JsonError::at("body", format!("is a {kind:.40} {version:.40}, not a hashedrekord 0.0.1")));
        }
        let mut spec = entry.fields("spec")?;
        let mut hash = spec.fields("data")?.fields("hash")?;
        let algorithm = hash.string("algorithm")?;
        if algorithm != "sha256" {
            return Err(JsonError::at("body.spec.data.hash.algorithm", format!("is '{algorithm:.40}', not 'sha256'")));
        }
        let mut signature = spec.fields("signature")?;
        let pem = base64_field(&mut signature.fields("publicKey")?, "content")?;
        Ok(Self {
            key_or_certificate: key_or_certificate(&pem)
                .ok_or_else(|| JsonError::at("body.spec.signature.publicKey", "is no PEM key or certificate"))?,
            signature: base64_field(&mut signature, "content")?,
            hash: hash.string("value")?.to_ascii_lowercase(),
        })
    }
}

fn key_or_certificate(pem: &[u8]) -> Option<Vec<u8>> {
    if let Ok(key) = SubjectPublicKeyInfoDer::from_pem_slice(pem) {
        return Some(key.to_vec());
    }
    CertificateDer::from_pem_slice(pem).ok().map(|certificate| certificate.to_vec())
}

fn base64_field(fields: &mut Fields, name: &str) -> Result<Vec<u8>, JsonError> {
    let place = fields.place(name);
    decode(&fields.string(name)?, &place)
}

fn decode(text: &str, at: &str) -> Result<Vec<u8>, JsonError> {
    STANDARD.decode(text).map_err(|error| JsonError::at(at, format!("is not base64: {error}")))
}

fn log(error: JsonError) -> SignatureError {
    SignatureError::Log(error.to_string().chars().take(400).collect())
}

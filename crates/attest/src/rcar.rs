//! The messages of the key broker protocol (RCAR: Request, Challenge, Attestation, Response), version 0.4, as Trustee speaks it.
//!
//! ```text
//! POST /kbs/v0/auth     Request      → Challenge, Set-Cookie: kbs-session-id
//! POST /kbs/v0/attest   Attestation  → {"token": JWT}
//! GET  /kbs/v0/resource/<repository>/<type>/<tag>  → flattened JWE to the TEE key
//! ```
//!
//! Every parser here is pure, takes bytes, and refuses what is longer than its limit. The binding between the TEE's evidence and the
//! session is [`report_data`]: whoever changes the nonce, the TEE key or the additional evidence changes the hash.

use std::fmt;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_core::{Algorithm, AnchorState, Digest};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::jcs::{self, JcsError};

/// The protocol version that we say.
pub const VERSION: &str = "0.4.0";
/// Bytes of a Request at most.
pub const LONGEST_REQUEST: usize = 64 * 1024;
/// Bytes of a Challenge at most.
pub const LONGEST_CHALLENGE: usize = 64 * 1024;
/// Bytes of an Attestation at most: evidence with its event logs and init data.
pub const LONGEST_ATTESTATION: usize = 4 * 1024 * 1024;
/// Bytes of a token reply at most.
pub const LONGEST_TOKEN: usize = 1024 * 1024;
/// Bytes of an error body that are read.
pub const LONGEST_ERROR: usize = 64 * 1024;
/// The session cookie's name.
pub const SESSION_COOKIE: &str = "kbs-session-id";
/// The header that says which version of a resource was released.
pub const VERSION_HEADER: &str = "nacre-resource-version";
/// The header with the id of a lease, where a resource is lent.
pub const LEASE_HEADER: &str = "nacre-lease";
/// The header with the lease's seconds.
pub const LEASE_SECONDS_HEADER: &str = "nacre-lease-seconds";
/// Bytes of the messages about leases and anchors at most.
pub const LONGEST_STATE: usize = 4096;
const ERROR_PREFIX: &str = "https://github.com/confidential-containers/kbs/errors/";

/// A message that is none.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Longer than its limit.
    #[error("{what} of {length} bytes: at most {limit} are accepted")]
    TooLong {
        /// The message.
        what: &'static str,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// Not the JSON that it should be.
    #[error("malformed {what}: {source}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A member that is none.
    #[error("malformed {what}: {why}")]
    Invalid {
        /// The member.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Another protocol version.
    #[error("protocol version '{0}' is not supported: {VERSION} and any other 0.x from 0.1 on are")]
    Version(String),
    /// The state of an anchor is none.
    #[error("malformed anchor: a state is 64 bytes in base64")]
    Anchor,
    /// The TEE's name is none.
    #[error("'{0}' is not the name of a TEE")]
    Tee(String),
    /// The runtime data has no canonical form.
    #[error("runtime data: {0}")]
    Canonical(#[from] JcsError),
}

fn parse<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8], limit: usize) -> Result<T, MessageError> {
    if bytes.len() > limit {
        return Err(MessageError::TooLong { what, length: bytes.len(), limit });
    }
    serde_json::from_slice(bytes).map_err(|source| MessageError::Malformed { what, source })
}

/// The guest asks for a challenge.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Request {
    /// The version that the guest speaks.
    pub version: String,
    /// The TEE's name: `snp`, `tdx`, `sgx`, `sim`…
    pub tee: String,
    /// What the TEE needs beyond this.
    #[serde(rename = "extra-params", default)]
    pub extra_params: Value,
}

impl Request {
    /// A request for a TEE, in our version.
    pub fn new(tee: &str) -> Self {
        Self {
            version: VERSION.into(),
            tee: tee.into(),
            extra_params: json!({"supported-hash-algorithms": ["sha384"]}),
        }
    }

    /// Reads a request and checks that we can speak its version.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let request: Self = parse("Request", bytes, LONGEST_REQUEST)?;
        check_version(&request.version)?;
        let name_is_fine = (1..=32).contains(&request.tee.len())
            && request.tee.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'));
        if !name_is_fine {
            return Err(MessageError::Tee(request.tee.chars().take(40).collect()));
        }
        Ok(request)
    }
}

/// Any 0.x from 0.1: since then the messages that we use have only gained members. No peer is locked out for its patch level.
fn check_version(version: &str) -> Result<(), MessageError> {
    let bad = || MessageError::Version(version.chars().take(40).collect());
    let mut parts = version.split('.');
    let mut number = || {
        let part = parts.next().filter(|part| !part.is_empty() && part.len() <= 5)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<u32>().ok())?
    };
    match (number(), number(), number()) {
        (Some(0), Some(minor), Some(_)) if minor >= 1 && parts.next().is_none() => Ok(()),
        _ => Err(bad()),
    }
}

/// The broker answers with a nonce.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Challenge {
    /// 32 random bytes in standard base64; used as a text.
    pub nonce: String,
    /// What the TEE needs beyond this; an empty string where there is nothing.
    #[serde(rename = "extra-params", default)]
    pub extra_params: Value,
}

impl Challenge {
    /// Reads a challenge.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        parse("Challenge", bytes, LONGEST_CHALLENGE)
    }
}

/// The init data as it is sent beside the evidence.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct InitDataMessage {
    /// `toml`.
    pub format: String,
    /// The exact text that was measured.
    pub body: String,
}

/// What the evidence is bound to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct RuntimeData {
    /// The challenge's nonce.
    pub nonce: String,
    /// The TEE's public key, a JWK; kept as it was sent, because the binding covers all of it.
    #[serde(rename = "tee-pubkey")]
    pub tee_pubkey: Value,
}

/// Evidence of the CPU's TEE and of devices.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct CompositeEvidence {
    /// The TEE's own evidence.
    pub primary_evidence: Value,
    /// A JSON text with the evidence of devices, or an empty one.
    #[serde(default)]
    pub additional_evidence: String,
}

/// The guest proves what it is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Attestation {
    /// The init data, where the guest was started with one.
    #[serde(rename = "init-data", default)]
    pub init_data: Option<InitDataMessage>,
    /// What the evidence is bound to.
    #[serde(rename = "runtime-data")]
    pub runtime_data: RuntimeData,
    /// The evidence.
    #[serde(rename = "tee-evidence")]
    pub tee_evidence: CompositeEvidence,
}

impl Attestation {
    /// Reads an attestation.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        parse("Attestation", bytes, LONGEST_ATTESTATION)
    }
}

/// The reply to an attestation.
#[derive(Clone, Deserialize, PartialEq, Eq, Serialize)]
pub struct TokenReply {
    /// The EAR token.
    pub token: String,
}

impl TokenReply {
    /// Reads a reply.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        parse("token reply", bytes, LONGEST_TOKEN)
    }
}

impl fmt::Debug for TokenReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenReply(…)")
    }
}

/// The reply to the renewal of a lease.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct LeaseReply {
    /// For how long it is good from now on.
    pub seconds: u32,
}

impl LeaseReply {
    /// Reads a reply.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        parse("lease reply", bytes, LONGEST_STATE)
    }
}

/// The state of an anchor: base64 of its 64 bytes ([`AnchorState::to_bytes`]), or null where nothing was ever stored.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct AnchorMessage {
    /// The state.
    pub state: Option<String>,
}

fn anchor_state(text: &str) -> Result<AnchorState, MessageError> {
    let bytes = BASE64_STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.map(|bytes| AnchorState::from_bytes(&bytes)).ok_or(MessageError::Anchor)
}

impl AnchorMessage {
    /// A message of a state.
    pub fn of(state: Option<&AnchorState>) -> Self {
        Self { state: state.map(|state| BASE64_STANDARD.encode(state.to_bytes())) }
    }

    /// Reads a state.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Option<AnchorState>, MessageError> {
        let message: Self = parse("anchor", bytes, LONGEST_STATE)?;
        message.state.map(|text| anchor_state(&text)).transpose()
    }
}

/// Moves an anchor on, from the state that is expected.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AdvanceMessage {
    /// Base64 of the state that is expected; null for an anchor that is new.
    pub expected: Option<String>,
    /// Base64 of the state that is to take its place.
    pub next: String,
}

impl AdvanceMessage {
    /// A message of two states.
    pub fn new(expected: Option<&AnchorState>, next: &AnchorState) -> Self {
        let text = |state: &AnchorState| BASE64_STANDARD.encode(state.to_bytes());
        Self { expected: expected.map(text), next: text(next) }
    }

    /// Reads the two states: what is expected, and what takes its place.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<(Option<AnchorState>, AnchorState), MessageError> {
        let message: Self = parse("anchor", bytes, LONGEST_STATE)?;
        let expected = message.expected.map(|text| anchor_state(&text)).transpose()?;
        Ok((expected, anchor_state(&message.next)?))
    }
}

/// An anchor holds something else than was expected.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct AnchorRefusal {
    /// As [`ErrorBody::kind`].
    #[serde(rename = "type")]
    pub kind: String,
    /// As [`ErrorBody::detail`].
    pub detail: String,
    /// What it holds.
    pub state: Option<String>,
}

/// What every refusal says.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    /// A URI whose last segment names the kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is wrong, for people.
    pub detail: String,
}

impl ErrorBody {
    /// An error of a kind.
    pub fn new(variant: &str, detail: impl Into<String>) -> Self {
        Self { kind: format!("{ERROR_PREFIX}{variant}"), detail: detail.into() }
    }

    /// The last segment of the kind.
    pub fn variant(&self) -> &str {
        self.kind.rsplit('/').next().unwrap_or_default()
    }

    /// Reads an error body; `None` when it is none (a proxy's page, say).
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        parse("error body", bytes, LONGEST_ERROR).ok()
    }
}

/// The 64 bytes that the TEE signs: SHA-384 of the canonical JSON of additional evidence, nonce and TEE key, zero-padded.
///
/// # Errors
/// [`MessageError::Canonical`] for a TEE key that has no canonical form.
pub fn report_data(runtime: &RuntimeData, additional_evidence: &str) -> Result<[u8; 64], MessageError> {
    let bound = json!({
        "additional-evidence": additional_evidence,
        "nonce": runtime.nonce,
        "tee-pubkey": runtime.tee_pubkey,
    });
    let digest = Digest::of(Algorithm::Sha384, &jcs::canonical(&bound)?);
    let mut data = [0; 64];
    for (slot, byte) in data.iter_mut().zip(digest.as_bytes()) {
        *slot = *byte;
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_we_can_speak() {
        let request = |version: &str| Request::parse(json!({"version": version, "tee": "sim"}).to_string().as_bytes());
        for good in ["0.4.0", "0.1.0", "0.4.9", "0.5.0"] {
            assert!(request(good).is_ok(), "{good}");
        }
        for bad in
            ["", "0", "0.4", "0.0.1", "1.0.0", "0.4.0.1", "0.4.x", "0.+4.0", "-0.4.0", "0.999999.0", "0.4.0 ", "٠.4.0"]
        {
            assert!(matches!(request(bad), Err(MessageError::Version(_))), "{bad}");
        }
    }

    #[test]
    fn malformed_messages_are_refused() {
        for bytes in [&b""[..], b"{}", b"[]", b"\xff", br#"{"version":"0.4.0"}"#, br#"{"version":4,"tee":"sim"}"#] {
            assert!(Request::parse(bytes).is_err());
            assert!(Attestation::parse(bytes).is_err());
            assert!(Challenge::parse(bytes).is_err());
            assert!(TokenReply::parse(bytes).is_err());
        }
        for tee in ["", "SIM", "../x", &"x".repeat(33)] {
            let text = json!({"version": "0.4.0", "tee": tee}).to_string();
            assert!(matches!(Request::parse(text.as_bytes()), Err(MessageError::Tee(_))), "{tee}");
        }
        assert!(matches!(Request::parse(&vec![b' '; LONGEST_REQUEST + 1]), Err(MessageError::TooLong { .. })));
        assert!(matches!(Attestation::parse(&vec![b' '; LONGEST_ATTESTATION + 1]), Err(MessageError::TooLong { .. })));
    }

    #[test]
    fn report_data_is_the_hash_of_the_canonical_form() {
        let runtime = RuntimeData {
            nonce: "bm9uY2U=".into(),
            tee_pubkey: json!({"y": "Yg", "kty": "EC", "x": "YQ", "crv": "P-256", "alg": "ECDH-ES+A256KW"}),
        };
        let canonical = r#"{"additional-evidence":"","nonce":"bm9uY2U=","tee-pubkey":{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"YQ","y":"Yg"}}"#;
        let data = report_data(&runtime, "").unwrap();
        assert_eq!(data[..48], *Digest::of(Algorithm::Sha384, canonical.as_bytes()).as_bytes());
        assert_eq!(data[48..], [0; 16]);
        assert_ne!(report_data(&runtime, "{}").unwrap(), data);
        assert_ne!(report_data(&RuntimeData { nonce: "x".into(), ..runtime }, "").unwrap(), data);
    }
}

//! Attestation keys (AK) of TPMs, enrolled by who made the TPM: off unless the settings name authorities of EK certificates (`ek_roots`).
//!
//! ```text
//! candidate ─▶ EK certificate, EK, AK checked ─▶ session whose nonce is the secret ─▶ credential ─▶ TPM ─▶ answer = nonce ─▶ recorded
//! platforms   tpm-ek/<SHA-256 of the EK, hex>   JSON [`Enrolment`]
//! ```
//!
//! A TPM has one AK here: another one replaces it. One that an operator revoked stays, and cannot be enrolled again until it is forgotten.
//! The secret works once, as any session's nonce, for the very keys that it was made for.

use std::path::Path;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::{
    enrolment::{Candidate, Challenge, Enrolled},
    evidence::{Claims, hex},
    rcar::MessageError,
};
use nacre_core::Digest;
use nacre_verify::tpm::enrol::{EkRoots, Eligible};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    ApiError, AuditEntry, Broker, BrokerError,
    admin::now,
    broker::{LOCAL, entry},
};

/// Bytes of the authorities at most.
const LONGEST_ROOTS: u64 = 4 << 20;
/// TPMs that are enrolled at most.
pub(crate) const MOST_ENROLLED: usize = 10_000;
const TPM: &str = "tpm";

/// A TPM whose attestation key is known.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Enrolment {
    /// The TPM: SHA-256 of its EK, hex.
    pub name: String,
    /// The AK: `SubjectPublicKeyInfo`, base64.
    pub ak: String,
    /// Who issued the EK certificate.
    pub issuer: String,
    /// Since when, in seconds since 1970.
    pub enrolled: i64,
    /// When the EK certificate ends.
    pub until: i64,
    /// Since when it counts no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<i64>,
}

/// What became of an attempt to record an AK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    Done,
    Revoked,
    Full,
}

/// The authorities that the settings name.
pub(crate) fn roots(dir: &Path, file: Option<&Path>) -> Result<Option<EkRoots>, BrokerError> {
    use std::io::Read as _;
    let Some(file) = file else { return Ok(None) };
    let path = dir.join(file);
    let mut pem = Vec::new();
    let read = std::fs::File::open(&path).and_then(|file| file.take(LONGEST_ROOTS).read_to_end(&mut pem));
    read.map_err(|source| BrokerError::Io { path: path.clone(), source })?;
    let roots = EkRoots::parse(&pem);
    roots.map(Some).map_err(|error| BrokerError::Invalid(format!("ek_roots = '{}': {error}", path.display())))
}

fn refused(why: impl Into<String>) -> ApiError {
    ApiError::new(403, "EnrolmentRefused", why)
}

fn malformed(error: &MessageError) -> ApiError {
    match error {
        MessageError::TooLong { .. } => ApiError::new(413, "InvalidRequest", error.to_string()),
        _ => ApiError::bad_request(error.to_string()),
    }
}

/// What a session is for: these keys, and nothing that a guest can ask for by `/auth`.
fn purpose(candidate: &Candidate) -> String {
    let keys = Candidate { answer: None, ..candidate.clone() };
    format!("enrolment:{}", hex(Digest::sha256(&keys.to_json()).as_bytes()))
}

impl Broker {
    fn eligible(&self, body: &[u8]) -> Result<(Candidate, Eligible), ApiError> {
        let off = || {
            ApiError::new(
                404,
                "EnrolmentOff",
                "this broker enrols no TPMs: its operator names the authorities of EK certificates (ek_roots in broker.toml)",
            )
        };
        let roots = self.ek_roots.as_ref().ok_or_else(off)?;
        let candidate = Candidate::parse(body).map_err(|error| malformed(&error))?;
        match roots.check(&candidate, now()) {
            Ok(eligible) => Ok((candidate, eligible)),
            Err(error) => Err(self.refuse("", refused(error.to_string()))),
        }
    }

    fn refuse(&self, name: &str, error: ApiError) -> ApiError {
        self.audit_refusal(AuditEntry {
            detail: error.detail.clone(),
            ..entry("enrolment refused", TPM, name.to_owned())
        });
        error
    }

    /// Begins to enrol an AK: what only the TPM with that EK can answer to.
    pub(crate) fn begin_enrolment(&self, body: &[u8]) -> Result<Challenge, ApiError> {
        let (candidate, eligible) = self.eligible(body)?;
        if self.store.config()?.enrolment(&eligible.name).is_some_and(|known| known.revoked.is_some()) {
            return Err(self.refuse(&eligible.name, revoked(&eligible.name)));
        }
        let opened = self.sessions.open(&purpose(&candidate))?;
        let secret = BASE64_STANDARD.decode(&opened.nonce).ok().and_then(|nonce| <[u8; 32]>::try_from(nonce).ok());
        let secret = secret.ok_or_else(|| ApiError::new(500, "InternalError", "a nonce is not 32 bytes"))?;
        match eligible.challenge(&secret) {
            Ok((credential, secret)) => Ok(Challenge { enrolment: opened.id, credential, secret }),
            Err(error) => Err(self.refuse(&eligible.name, refused(error.to_string()))),
        }
    }

    /// Records an AK whose TPM gave the secret.
    pub(crate) fn finish_enrolment(&self, id: &str, body: &[u8]) -> Result<Enrolled, ApiError> {
        let (candidate, eligible) = self.eligible(body)?;
        let (purpose_of, nonce) = self.sessions.spend(id)?;
        // It is spent; that it goes at once only makes room.
        let _ = self.sessions.close(id);
        let name = eligible.name.clone();
        let answer = candidate.answer.as_ref().map(|answer| BASE64_STANDARD.encode(answer));
        // Compared by digests, and there is no second try.
        let same = answer.is_some_and(|answer| Digest::sha256(answer.as_bytes()) == Digest::sha256(nonce.as_bytes()));
        if purpose_of != purpose(&candidate) || !same {
            let why = "the answer is not the secret, or the secret was made for other keys: this key is in no TPM that this EK is in";
            return Err(self.refuse(&name, refused(why)));
        }
        let enrolment = Enrolment {
            name: eligible.name,
            ak: BASE64_STANDARD.encode(&eligible.ak),
            issuer: eligible.issuer,
            enrolled: now(),
            until: eligible.until,
            revoked: None,
        };
        let mut audit = entry("attestation key enrolled", TPM, name.clone());
        audit.detail = format!("{} by {}", short(&eligible.ak), enrolment.issuer);
        match self.store.enrol(&enrolment, audit)? {
            Recorded::Done => Ok(Enrolled { name }),
            Recorded::Revoked => Err(self.refuse(&name, revoked(&name))),
            Recorded::Full => {
                let why =
                    format!("{MOST_ENROLLED} TPMs are enrolled, which is the most: an operator has to forget some");
                Err(self.refuse(&name, ApiError::new(507, "EnrolmentFull", why)))
            }
        }
    }

    /// Adds what is known of the AK to the claims of a TPM: nothing that a guest sends has this name.
    pub(crate) fn add_enrolment(&self, claims: &mut Claims) -> Result<(), ApiError> {
        let ak =
            claims.claims.get("ak_public").and_then(|ak| ak.as_str()).and_then(|ak| BASE64_STANDARD.decode(ak).ok());
        let config = self.store.config()?;
        let Some(known) = ak.and_then(|ak| config.enrolled_ak(&BASE64_STANDARD.encode(ak))) else { return Ok(()) };
        if known.revoked.is_none() && now() <= known.until {
            let enrolled = json!({"name": known.name, "issuer": known.issuer, "since": known.enrolled});
            if let Some(claims) = claims.claims.as_object_mut() {
                claims.insert("enrolled".into(), enrolled);
            }
        }
        Ok(())
    }

    /// The TPMs whose AK is known, those that were revoked among them.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn enrolments(&self) -> Result<Vec<Enrolment>, BrokerError> {
        Ok(self.store.config()?.enrolments().cloned().collect())
    }

    /// Lets the AK of a TPM count no more; `forget` removes it, so that the TPM can be enrolled again. Says whether it was known.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn revoke_enrolment(&self, name: &str, forget: bool) -> Result<bool, BrokerError> {
        self.revoke_enrolment_as(LOCAL, name, forget)
    }

    pub(crate) fn revoke_enrolment_as(&self, actor: &str, name: &str, forget: bool) -> Result<bool, BrokerError> {
        if self.store.config()?.enrolment(name).is_none() {
            return Ok(false);
        }
        let event = if forget { "attestation key forgotten" } else { "attestation key revoked" };
        self.store.revoke_enrolment(name, forget, now(), entry(event, actor, name.to_owned()))
    }
}

fn revoked(name: &str) -> ApiError {
    refused(format!("an operator revoked this TPM ({name:.16}…): he has to forget it before it is enrolled again"))
}

fn short(ak: &[u8]) -> String {
    Digest::sha256(ak).short()
}

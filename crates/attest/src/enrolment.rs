//! The messages by which a TPM's attestation key (AK) is enrolled at a broker: proof that it is in the TPM that an EK certificate is about.
//!
//! ```text
//! POST /kbs/v0/enrolment        Candidate               → Challenge: a secret, made for the EK and the AK's name (TPM2_MakeCredential)
//! POST /kbs/v0/enrolment/<id>   Candidate with answer   → {"name"}: the secret, which only that TPM gives (TPM2_ActivateCredential)
//! ```
//!
//! All bytes are base64. Public areas are `TPMT_PUBLIC`, as the TPM has them, since what is proved is the digest over them.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use crate::rcar::MessageError;

/// Bytes of a message at most.
pub const LONGEST: usize = 32 * 1024;
const LONGEST_CERTIFICATE: usize = 16 * 1024;
/// Bytes of a public area, a credential or a secret at most.
const LONGEST_AREA: usize = 1024;

/// A key that wants to be enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The certificate of the TPM's endorsement key (EK), DER.
    pub ek_certificate: Vec<u8>,
    /// The public area of the EK.
    pub ek_public: Vec<u8>,
    /// The public area of the AK.
    pub ak_public: Vec<u8>,
    /// The secret of the challenge, in the second message.
    pub answer: Option<Vec<u8>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct CandidateMessage {
    ek_certificate: String,
    ek_public: String,
    ak_public: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<String>,
}

/// What a candidate has to answer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// Names the attempt.
    pub enrolment: String,
    /// `TPM2B_ID_OBJECT`, without its length.
    pub credential: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`, without its length.
    pub secret: Vec<u8>,
}

#[derive(Deserialize, Serialize)]
struct ChallengeMessage {
    enrolment: String,
    credential: String,
    secret: String,
}

/// What came of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Enrolled {
    /// The name of the TPM at the broker: of its EK.
    pub name: String,
}

fn limited(what: &'static str, bytes: &[u8], limit: usize) -> Result<(), MessageError> {
    match bytes.len() {
        length if length > limit => Err(MessageError::TooLong { what, length, limit }),
        _ => Ok(()),
    }
}

fn decoded(what: &'static str, text: &str, limit: usize) -> Result<Vec<u8>, MessageError> {
    let wrong = |why: String| MessageError::Invalid { what, why };
    let bytes = BASE64_STANDARD.decode(text).map_err(|error| wrong(format!("not base64: {error}")))?;
    limited(what, &bytes, limit)?;
    Ok(bytes)
}

impl Candidate {
    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        const WHAT: &str = "enrolment";
        limited(WHAT, bytes, LONGEST)?;
        let message: CandidateMessage =
            serde_json::from_slice(bytes).map_err(|source| MessageError::Malformed { what: WHAT, source })?;
        Ok(Self {
            ek_certificate: decoded("ek_certificate", &message.ek_certificate, LONGEST_CERTIFICATE)?,
            ek_public: decoded("ek_public", &message.ek_public, LONGEST_AREA)?,
            ak_public: decoded("ak_public", &message.ak_public, LONGEST_AREA)?,
            answer: message.answer.map(|answer| decoded("answer", &answer, LONGEST_AREA)).transpose()?,
        })
    }

    /// The message.
    pub fn to_json(&self) -> Vec<u8> {
        let message = CandidateMessage {
            ek_certificate: BASE64_STANDARD.encode(&self.ek_certificate),
            ek_public: BASE64_STANDARD.encode(&self.ek_public),
            ak_public: BASE64_STANDARD.encode(&self.ak_public),
            answer: self.answer.as_ref().map(|answer| BASE64_STANDARD.encode(answer)),
        };
        // Strings always serialise.
        serde_json::to_vec(&message).unwrap_or_default()
    }
}

impl Challenge {
    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        const WHAT: &str = "challenge of an enrolment";
        limited(WHAT, bytes, LONGEST)?;
        let message: ChallengeMessage =
            serde_json::from_slice(bytes).map_err(|source| MessageError::Malformed { what: WHAT, source })?;
        let is_name = |text: &str| {
            (1..=200).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if !is_name(&message.enrolment) {
            return Err(MessageError::Invalid { what: WHAT, why: "its name is none".into() });
        }
        Ok(Self {
            credential: decoded("credential", &message.credential, LONGEST_AREA)?,
            secret: decoded("secret", &message.secret, LONGEST_AREA)?,
            enrolment: message.enrolment,
        })
    }

    /// The message.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "enrolment": self.enrolment,
            "credential": BASE64_STANDARD.encode(&self.credential),
            "secret": BASE64_STANDARD.encode(&self.secret),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_and_others_are_refused() {
        let candidate =
            Candidate { ek_certificate: vec![1; 9], ek_public: vec![2], ak_public: vec![3], answer: Some(vec![4; 32]) };
        assert_eq!(Candidate::parse(&candidate.to_json()).unwrap(), candidate);
        let first = Candidate { answer: None, ..candidate.clone() };
        assert_eq!(Candidate::parse(&first.to_json()).unwrap(), first);
        let long = Candidate { ek_certificate: vec![1; LONGEST_CERTIFICATE + 1], ..first.clone() };
        assert!(matches!(Candidate::parse(&long.to_json()), Err(MessageError::TooLong { .. })));
        assert!(matches!(Candidate::parse(&vec![b' '; LONGEST + 1]), Err(MessageError::TooLong { .. })));
        for bad in [&b""[..], b"{}", br#"{"ek_certificate":"*","ek_public":"","ak_public":""}"#] {
            assert!(Candidate::parse(bad).is_err());
        }
        let challenge = Challenge { enrolment: "a-b_c".into(), credential: vec![1], secret: vec![2; 256] };
        assert_eq!(Challenge::parse(challenge.to_json().to_string().as_bytes()).unwrap(), challenge);
        for name in ["", "a/b", "../x", "a?b"] {
            let challenge = Challenge { enrolment: name.into(), ..challenge.clone() };
            assert!(Challenge::parse(challenge.to_json().to_string().as_bytes()).is_err(), "{name}");
        }
    }
}

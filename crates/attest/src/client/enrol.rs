//! The guest's side of enrolment: the attestation key of its TPM becomes one that the broker knows.

use super::{BrokerConfig, Call, ClientError, Credential, JSON, Transport, accept};
use crate::{
    attesters::tpm::TpmAttester,
    enrolment::{Candidate, Challenge, Enrolled, LONGEST},
};

/// Enrols the attestation key of a TPM at a broker; gives the TPM's name there.
///
/// # Errors
/// [`ClientError`]: the TPM has no EK certificate, the broker does not enrol, or does not trust who made the TPM.
pub fn enrol(config: &BrokerConfig, attester: &TpmAttester) -> Result<Enrolled, ClientError> {
    let transport = Transport::new(config)?;
    let candidate = attester.candidate()?;
    let (first, second) = ("enrolment", "the answer of an enrolment");
    let post = |step, path: &str, candidate: &Candidate| {
        let body = candidate.to_json();
        accept(step, transport.call(step, path, Credential::None, Call::Post(JSON, &body), LONGEST)?)
    };
    let reply = post(first, "/kbs/v0/enrolment", &candidate)?;
    let challenge = Challenge::parse(&reply.body).map_err(|source| ClientError::Message { step: first, source })?;
    let answer = Some(attester.activate(&challenge)?);
    let path = format!("/kbs/v0/enrolment/{}", challenge.enrolment);
    let reply = post(second, &path, &Candidate { answer, ..candidate })?;
    serde_json::from_slice(&reply.body).map_err(|error| ClientError::Answer { step: second, why: error.to_string() })
}

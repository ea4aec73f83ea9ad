//! TPM 2.0: a quote, signed by an attestation key (AK), with the PCRs that it covers and, at best, the event log that gives them.
//!
//! The evidence is that of other guests' agents, with a log beside it:
//!
//! ```text
//! {"ak_public": base64 of SubjectPublicKeyInfo,
//!  "tpm_quote": {"message": base64, "signature": base64, "pcrs": [24 × hex, SHA-256]},
//!  "event_log": base64 or null}
//! ```
//!
//! Checked: the signature, which PCRs are covered, that their digest is that of the PCRs sent, the replay of the log. **Not** checked here:
//! whose AK it is. A verifier cannot know; a broker adds what it knows of AKs that were enrolled ([`enrol`]), and the appraisal policy compares
//! others with the reference value `trusted_aks`: whoever puts an AK there has seen that it is a restricted key of a TPM that he trusts.
//!
//! The extra data are the first 32 bytes of the report data. Init data are extended into PCR 8, which held zeros.

pub mod enrol;
pub(crate) mod wire;

use std::collections::BTreeMap;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
};
use nacre_attest::{
    eventlog,
    evidence::{Claims, EvidenceError, Expected, Verifier, hex},
};
use nacre_core::{Algorithm, Digest, Verified};
use serde::Deserialize;
use serde_json::{Map, Value};

use self::wire::{Hash, PCRS, Signature};
use crate::{
    checked::{Genuine, InitField},
    dcap::{collateral::base64, tcb::unhex},
    logs,
    rules::TpmRules,
    x509::Key,
};

/// The TEE's name in the protocol.
pub const TEE: &str = "tpm";
const ALG_SHA256: u16 = 0x000b;
/// Where init data are extended into.
const INIT_DATA_PCR: u32 = 8;
/// The PCRs that the firmware, the boot loader and we extend, and log: those beyond have other writers, who log elsewhere or not at all.
const LOGGED: [u32; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14];
/// Bytes of a quote, of a signature and of a key at most.
const LONGEST: usize = 4096;

#[derive(Deserialize)]
struct Evidence {
    ak_public: String,
    tpm_quote: QuoteMessage,
    event_log: Option<String>,
}

#[derive(Deserialize)]
struct QuoteMessage {
    message: String,
    signature: String,
    pcrs: Vec<String>,
}

fn malformed(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Malformed { tee: TEE, why: why.into() }
}

fn refused(why: impl Into<String>) -> EvidenceError {
    EvidenceError::Refused { tee: TEE, why: why.into() }
}

/// Checks quotes of TPMs.
#[derive(Clone, Debug, Default)]
pub struct TpmVerifier {
    rules: TpmRules,
}

impl TpmVerifier {
    /// A verifier by these rules.
    pub fn new(rules: TpmRules) -> Self {
        Self { rules }
    }

    /// Checks evidence.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    pub fn genuine(&self, evidence: &Value) -> Result<Genuine, EvidenceError> {
        let evidence: Evidence =
            serde_json::from_value(evidence.clone()).map_err(|error| malformed(error.to_string()))?;
        let decode =
            |what: &str, text: &str, limit| base64(text, limit).map_err(|why| malformed(format!("{what}: {why}")));
        let message = decode("message", &evidence.tpm_quote.message, LONGEST)?;
        let signature = decode("signature", &evidence.tpm_quote.signature, LONGEST)?;
        let ak = decode("ak_public", &evidence.ak_public, LONGEST)?;
        check_signature(&ak, &message, &signature)?;
        let quote = wire::quote(&message).map_err(|why| malformed(format!("quote: {why}")))?;
        let pcrs = covered(&quote, &evidence.tpm_quote.pcrs)?;
        if let Some(missing) = self.rules.pcrs.iter().find(|pcr| !pcrs.contains_key(pcr)) {
            return Err(refused(format!("the quote does not cover PCR {missing}")));
        }
        let mut genuine = Genuine {
            tee: TEE,
            claims: claims(&evidence.ak_public, &quote, &pcrs),
            logs: Value::Null,
            report_data: quote.extra.to_vec(),
            init_data: InitField::Pcr(pcrs.get(&INIT_DATA_PCR).cloned().unwrap_or_default()),
            measurement: hex(quote.digest),
        };
        match &evidence.event_log {
            Some(log) => {
                let log = decode("event_log", log, eventlog::LONGEST)?;
                let logged = pcrs.into_iter().filter(|(pcr, _)| LOGGED.contains(pcr)).collect();
                logs::add(&mut genuine, &log, logs::pcrs(logged))
                    .map_err(|source| EvidenceError::EventLog { tee: TEE, source })?;
            }
            None if self.rules.require_log => return Err(refused("there is no event log")),
            None => {}
        }
        Ok(genuine)
    }
}

fn check_signature(ak: &[u8], message: &[u8], signature: &[u8]) -> Result<(), EvidenceError> {
    let key =
        Key::from_spki(ak).ok_or_else(|| malformed("ak_public is no public key that we know (RSA, P-256, P-384)"))?;
    let signature = wire::signature(signature).map_err(|why| malformed(format!("signature: {why}")))?;
    let holds = match (signature, &key) {
        (Signature::RsaSsa(Hash::Sha256, bytes), Key::Rsa(_)) => {
            key.verifies(&RSA_PKCS1_2048_8192_SHA256, message, bytes)
        }
        (Signature::RsaSsa(Hash::Sha384, bytes), Key::Rsa(_)) => {
            key.verifies(&RSA_PKCS1_2048_8192_SHA384, message, bytes)
        }
        (Signature::RsaPss(Hash::Sha256, bytes), Key::Rsa(_)) => {
            key.verifies(&RSA_PSS_2048_8192_SHA256, message, bytes)
        }
        (Signature::RsaPss(Hash::Sha384, bytes), Key::Rsa(_)) => {
            key.verifies(&RSA_PSS_2048_8192_SHA384, message, bytes)
        }
        (Signature::Ecdsa(Hash::Sha256, r, s), Key::P256(_)) => {
            fixed(r, s, 32).is_some_and(|bytes| key.verifies(&ECDSA_P256_SHA256_FIXED, message, &bytes))
        }
        (Signature::Ecdsa(Hash::Sha384, r, s), Key::P384(_)) => {
            fixed(r, s, 48).is_some_and(|bytes| key.verifies(&ECDSA_P384_SHA384_FIXED, message, &bytes))
        }
        _ => false,
    };
    match holds {
        true => Ok(()),
        false => Err(EvidenceError::Certificate {
            tee: TEE,
            what: "the quote's signature".into(),
            why: "it is not that of the attestation key".into(),
        }),
    }
}

/// r and s, each with zeros before it up to a length.
fn fixed(r: &[u8], s: &[u8], length: usize) -> Option<Vec<u8>> {
    let padded = |number: &[u8]| Some([&vec![0; length.checked_sub(number.len())?][..], number].concat());
    Some([padded(r)?, padded(s)?].concat())
}

/// The PCRs that a quote covers, with their values: those that were sent, if their digest is the quoted one.
fn covered(quote: &wire::Quote<'_>, sent: &[String]) -> Result<BTreeMap<u32, Vec<u8>>, EvidenceError> {
    let [selection] = quote.selections.as_slice() else {
        return Err(malformed("the quote is not of one bank of PCRs"));
    };
    if selection.hash != ALG_SHA256 {
        return Err(malformed("the quote is not of the SHA-256 bank"));
    }
    if u32::try_from(sent.len()) != Ok(PCRS) {
        return Err(malformed(format!("{} PCRs were sent, and {PCRS} are expected", sent.len())));
    }
    let mut pcrs = BTreeMap::new();
    let mut all = Vec::new();
    for (number, text) in (0..).zip(sent) {
        let value = unhex(text).filter(|value| value.len() == 32);
        let value = value.ok_or_else(|| malformed(format!("PCR {number} is not 32 bytes in hex")))?;
        if selection.pcrs.contains(&number) {
            all.extend_from_slice(&value);
            pcrs.insert(number, value);
        }
    }
    // The hash function is that of the signature; both are those of the scheme, and one of the two gives it.
    let is_digest = |algorithm| Digest::of(algorithm, &all).as_bytes() == quote.digest;
    match is_digest(Algorithm::Sha256) || is_digest(Algorithm::Sha384) {
        true => Ok(pcrs),
        false => Err(refused("the PCRs that were sent are not those that the TPM quoted")),
    }
}

fn claims(ak: &str, quote: &wire::Quote<'_>, pcrs: &BTreeMap<u32, Vec<u8>>) -> Value {
    let mut claims = Map::new();
    claims.insert("ak_public".into(), ak.into());
    claims.insert("report_data".into(), hex(quote.extra).into());
    claims.insert("init_data".into(), pcrs.get(&INIT_DATA_PCR).map(|value| hex(value)).into());
    claims.insert("reset_count".into(), quote.resets.into());
    claims.insert("restart_count".into(), quote.restarts.into());
    claims.insert("firmware_version".into(), format!("{:016x}", quote.firmware).into());
    for (number, value) in pcrs {
        claims.insert(format!("pcr{number:02}"), hex(value).into());
    }
    Value::Object(claims)
}

impl Verifier for TpmVerifier {
    fn tee(&self) -> &'static str {
        TEE
    }

    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        self.genuine(evidence)?.bound(expected)
    }
}

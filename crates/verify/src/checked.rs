//! From evidence that is genuine to evidence that is somebody's: the binding to a session.

use nacre_attest::{
    evidence::{Claims, EvidenceError, Expected, hex},
    initdata::InitData,
};
use nacre_core::{Algorithm, Digest, Hasher, Untrusted, Verified};
use serde_json::Value;

/// Where a TEE has the digest of the init data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum InitField {
    /// In a field of its own, cut or padded.
    Field(Vec<u8>),
    /// Extended into a SHA-256 PCR that held zeros.
    Pcr(Vec<u8>),
}

impl InitField {
    fn of(&self, init_data: &InitData) -> Vec<u8> {
        match self {
            Self::Field(field) => init_data.fit::<64>().iter().copied().take(field.len()).collect(),
            Self::Pcr(_) => pcr_of(&init_data.fit()),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Field(bytes) | Self::Pcr(bytes) => bytes,
        }
    }
}

/// What a PCR holds that the init data's digest was extended into.
fn pcr_of(digest: &[u8; 32]) -> Vec<u8> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(&[0; 32]);
    hasher.update(digest);
    let digest: Digest = hasher.finish();
    digest.as_bytes().to_vec()
}

/// Evidence that is genuine and keeps the rules; whose it is, is open.
#[derive(Clone, Debug)]
pub struct Genuine {
    pub(crate) tee: &'static str,
    pub(crate) claims: Value,
    pub(crate) logs: Value,
    /// As much of the report data as the TEE has.
    pub(crate) report_data: Vec<u8>,
    pub(crate) init_data: InitField,
    pub(crate) measurement: String,
}

impl Genuine {
    /// The claims, for who looks at evidence that was made for somebody else. Nothing may be released for their sake.
    pub fn claims(&self) -> &Value {
        &self.claims
    }

    /// Event logs, as policies see them beside the claims; null where there are none.
    pub fn logs(&self) -> &Value {
        &self.logs
    }

    /// What the guest had signed.
    pub fn report_data(&self) -> &[u8] {
        &self.report_data
    }

    /// Checks that it is this session's, of this TEE key, with this init data.
    ///
    /// # Errors
    /// [`EvidenceError::ReportData`], [`EvidenceError::InitData`].
    pub fn bound(self, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError> {
        Untrusted::new(self).verify_into(|genuine| {
            let tee = genuine.tee;
            // TPMs have room for less than 64 bytes; 32 of a hash are enough.
            let bound = expected.report_data.get(..genuine.report_data.len()).unwrap_or_default();
            if genuine.report_data.len() < 32 || genuine.report_data != bound {
                let (found, expected) = (hex(&genuine.report_data), hex(expected.report_data));
                return Err(EvidenceError::ReportData { tee, found, expected });
            }
            let measured = hex(genuine.init_data.bytes());
            if let Some(init_data) = expected.init_data {
                let sent = hex(&genuine.init_data.of(init_data));
                if sent != measured {
                    return Err(EvidenceError::InitData { tee, sent, measured });
                }
            }
            Ok(Claims {
                tee,
                claims: genuine.claims,
                logs: genuine.logs,
                report_data: hex(expected.report_data),
                init_data: measured,
                measurement: genuine.measurement,
                simulated: false,
            })
        })
    }
}

//! The ports between a TEE and the rest: an [`Attester`] in the guest makes evidence, a [`Verifier`] at the broker checks it.

use std::sync::Arc;

use nacre_core::Verified;
use serde_json::Value;

use crate::{eventlog::runtime::RuntimeLog, initdata::InitData, sample, sim};

/// Evidence could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AttesterError {
    /// A file of the TEE could not be read.
    #[error("{tee}: {what} '{path}' could not be read: {source}")]
    Io {
        /// The TEE.
        tee: &'static str,
        /// What the file is.
        what: &'static str,
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A key could not be used.
    #[error("{tee}: {what}: {source}")]
    Key {
        /// The TEE.
        tee: &'static str,
        /// What the key is.
        what: &'static str,
        /// Why.
        source: nacre_core::jose::JoseError,
    },
    /// The TEE does not have the init data.
    #[error(
        "{tee}: this guest was started with init data of digest {measured}, and is given init data of digest {given}: start it with those, or give it the others"
    )]
    InitData {
        /// The TEE.
        tee: &'static str,
        /// Of what was given, hex.
        given: String,
        /// In the TEE's field, hex.
        measured: String,
    },
    /// The TEE is not as it should be.
    #[error("{tee}: {why}")]
    Refused {
        /// The TEE.
        tee: &'static str,
        /// Why.
        why: String,
    },
    /// The TPM did not do it.
    #[error("tpm: {0}")]
    Tpm(#[from] nacre_tpm::TpmError),
    /// The event log cannot be used.
    #[error(transparent)]
    Log(#[from] crate::eventlog::runtime::RuntimeLogError),
}

/// Makes evidence, in the guest.
pub trait Attester: Send + Sync {
    /// The TEE's name in the protocol.
    fn tee(&self) -> &'static str;

    /// Evidence that carries `report_data`.
    ///
    /// # Errors
    /// [`AttesterError`].
    fn evidence(&self, report_data: &[u8; 64]) -> Result<Value, AttesterError>;

    /// The init data that the TEE was started with and that its evidence is bound to.
    fn init_data(&self) -> Option<&InitData>;

    /// The TPM, where that is the TEE: its attestation key can be enrolled at a broker.
    fn enrols(&self) -> Option<&crate::attesters::tpm::TpmAttester> {
        None
    }

    /// The event log that run-time events are recorded in, where the TEE has a register for them.
    fn runtime_log(&self) -> Option<&Arc<RuntimeLog>> {
        None
    }

    /// Whether this is no TEE at all but a simulation of one.
    fn simulated(&self) -> bool {
        false
    }
}

/// Why evidence does not hold.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// Not evidence of this TEE.
    #[error("malformed {tee} evidence: {why}")]
    Malformed {
        /// The TEE.
        tee: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Nobody that we trust vouches for it.
    #[error(
        "{tee} evidence is signed by platform {platform}, which is not trusted here; add its public key if it should be"
    )]
    UnknownPlatform {
        /// The TEE.
        tee: &'static str,
        /// The name that the evidence gives.
        platform: String,
    },
    /// The signature is wrong.
    #[error("{tee} evidence: {source}")]
    Signature {
        /// The TEE.
        tee: &'static str,
        /// Why.
        source: nacre_core::jose::JoseError,
    },
    /// Evidence of another session or of another TEE key.
    #[error(
        "{tee} evidence is not bound to this session's nonce and TEE key: report data is {found}, expected {expected}"
    )]
    ReportData {
        /// The TEE.
        tee: &'static str,
        /// In the evidence, hex.
        found: String,
        /// By the session, hex.
        expected: String,
    },
    /// The init data is not the one that was measured.
    #[error("{tee} evidence: the init data sent has digest {sent}, the evidence was measured with {measured}")]
    InitData {
        /// The TEE.
        tee: &'static str,
        /// Of the text that was sent, hex.
        sent: String,
        /// In the evidence, hex.
        measured: String,
    },
    /// A certificate that does not vouch for it.
    #[error("{tee} evidence: {what}: {why}")]
    Certificate {
        /// The TEE.
        tee: &'static str,
        /// Which certificate or list.
        what: String,
        /// Expired, revoked, signed by somebody else, of another chip.
        why: String,
    },
    /// What the vendor publishes, and a verifier needs, is missing or past its time.
    #[error("{tee} evidence: {why} (fill the cache: nacre broker collateral import)")]
    Collateral {
        /// The TEE.
        tee: &'static str,
        /// What is missing, or since when it is no good.
        why: String,
    },
    /// Of a guest or a platform that the rules do not admit, genuine or not.
    #[error("{tee} evidence is refused: {why}")]
    Refused {
        /// The TEE.
        tee: &'static str,
        /// Which rule, and what was found.
        why: String,
    },
    /// The event log is not the one that was measured.
    #[error("{tee} evidence: event log: {source}")]
    EventLog {
        /// The TEE.
        tee: &'static str,
        /// What is wrong with it.
        source: crate::eventlog::LogError,
    },
}

/// What the session demands of evidence.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The report data.
    pub report_data: &'a [u8; 64],
    /// The init data that was sent beside the evidence.
    pub init_data: Option<&'a InitData>,
    /// The time that certificates and collateral are judged by, in seconds since 1970.
    pub now: i64,
}

/// What verified evidence says.
#[derive(Clone, Debug, PartialEq)]
pub struct Claims {
    /// The TEE's name; policies find the claims under `input.<tee>`.
    pub tee: &'static str,
    /// The TEE's claims, an object.
    pub claims: Value,
    /// Claims that policies see beside them and that are too long for a token: event logs. An object, or null.
    pub logs: Value,
    /// The report data, hex.
    pub report_data: String,
    /// The measured digest of the init data, hex; empty where there was none.
    pub init_data: String,
    /// The measurement, for logs and stories.
    pub measurement: String,
    /// Whether all this is simulated.
    pub simulated: bool,
}

/// Checks evidence, at the broker. Pure: time and collateral come with the verifier.
pub trait Verifier: Send + Sync {
    /// The TEE's name in the protocol.
    fn tee(&self) -> &'static str;

    /// Checks evidence against what the session demands.
    ///
    /// # Errors
    /// [`EvidenceError`] says which check failed.
    fn verify(&self, evidence: &Value, expected: &Expected<'_>) -> Result<Verified<Claims>, EvidenceError>;
}

/// Whether a TEE of this name is none at all but a simulation of one.
pub fn is_simulation(tee: &str) -> bool {
    matches!(tee, sim::TEE | sample::TEE)
}

/// Bytes in lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

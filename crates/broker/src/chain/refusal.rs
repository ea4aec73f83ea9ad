//! A guest that was refused: at which stage, and what was found in place of what.

use nacre_attest::{eventlog::LogError, evidence::EvidenceError};
use serde::{Deserialize, Serialize};

use super::{Check, Stage, StageId, Verdict, short};
use crate::ApiError;

/// Why a guest was refused.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Refusal {
    stage: StageId,
    what: String,
    expected: Vec<String>,
    found: Option<String>,
    pub(super) reason: String,
}

/// An attestation that was refused: what the guest is told, and what people are shown.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) error: ApiError,
    pub(crate) refusal: Box<Refusal>,
    /// Who it says it is; empty where it did not come so far.
    pub(crate) guest: String,
}

impl Refused {
    pub(crate) fn new(
        stage: StageId,
        what: &str,
        expected: impl IntoIterator<Item = String>,
        found: Option<&str>,
        error: ApiError,
    ) -> Self {
        let refusal = Refusal {
            stage,
            what: what.into(),
            expected: expected.into_iter().take(super::MOST_VALUES).map(|text| short(&text)).collect(),
            found: found.map(short),
            reason: short(&error.detail),
        };
        Self { error, refusal: Box::new(refusal), guest: String::new() }
    }

    pub(crate) fn of(self, guest: String) -> Self {
        Self { guest, ..self }
    }

    /// Evidence that does not hold. `platforms` are the simulated platforms that are trusted.
    pub(crate) fn evidence(error: &EvidenceError, platforms: Vec<String>) -> Self {
        let api = ApiError::new(401, "EvidenceVerification", error.to_string());
        let one = |stage, what: &str, expected: &str, found: &str| {
            Self::new(stage, what, [expected.to_owned()], Some(found), api.clone())
        };
        let hardware = |what: &str, expected: &str, found: &str| one(StageId::Hardware, what, expected, found);
        match error {
            EvidenceError::Malformed { why, .. } => hardware("Evidence", "evidence of this TEE", why),
            EvidenceError::UnknownPlatform { platform, .. } => {
                Self::new(StageId::Hardware, "Platform key", platforms, Some(platform), api)
            }
            EvidenceError::Signature { source, .. } => {
                hardware("Signature of the evidence", "that of the key it names", &source.to_string())
            }
            EvidenceError::Certificate { what, why, .. } => {
                hardware(&short(what), "in its time, not revoked, up to the vendor's root", why)
            }
            EvidenceError::Collateral { why, .. } => {
                hardware("Collateral", "what the vendor publishes, in its time", why)
            }
            EvidenceError::Refused { why, .. } => hardware("Rules of verify.toml", "a guest that they admit", why),
            EvidenceError::ReportData { found, expected, .. } => one(StageId::Session, "Report data", expected, found),
            EvidenceError::InitData { sent, measured, .. } => {
                one(StageId::Configuration, "Digest of the init data", measured, sent)
            }
            EvidenceError::EventLog { source: LogError::Replay { register, replayed, measured }, .. } => {
                one(StageId::Firmware, &format!("Event log, register {register}"), measured, replayed)
            }
            EvidenceError::EventLog { source, .. } => {
                one(StageId::Firmware, "Event log", "one that the registers bear out", &source.to_string())
            }
        }
    }
}

impl From<ApiError> for Refused {
    /// What was refused before or after the evidence was verified.
    fn from(error: ApiError) -> Self {
        let (stage, what, expected) = match error.variant {
            "TeeKey" => (StageId::Session, "TEE key", "a public key that secrets can be sent to"),
            "InitData" => (StageId::Configuration, "Init data", "init data in TOML"),
            "UnsupportedEvidence" => (StageId::Hardware, "Evidence of devices", "none"),
            "SimulatedTee" => (StageId::Hardware, "Evidence", "a TEE that is not simulated"),
            "PolicyEngineError" => (StageId::Session, "Appraisal policy", "trust claims"),
            _ => (StageId::Session, "Message", "an attestation that can be read"),
        };
        let found = error.detail.clone();
        Self::new(stage, what, [expected.to_owned()], Some(&found), error)
    }
}

impl Refusal {
    pub(super) fn chain(&self) -> Vec<Stage> {
        StageId::ALL.iter().map(|id| self.stage(*id)).collect()
    }

    fn stage(&self, id: StageId) -> Stage {
        let title = id.title().to_owned();
        if id != self.stage {
            let why = format!("The attestation was refused at “{}”: nothing of this is known.", self.stage.title());
            return Stage { id, title, verdict: Verdict::NotChecked, why, claim: None, checks: Vec::new() };
        }
        let check = Check {
            what: self.what.clone(),
            expected: self.expected.clone(),
            more: 0,
            found: self.found.clone(),
            verdict: Verdict::Failed,
            by: String::new(),
        };
        Stage { id, title, verdict: Verdict::Failed, why: self.reason.clone(), claim: None, checks: vec![check] }
    }
}

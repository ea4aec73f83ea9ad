//! Which TEEs the broker knows: the hardware's verifiers, with the collateral and the rules of its directory, `sim` by the platform keys
//! of its database, and `sample`, which has nothing to be known by.
//!
//! ```text
//! collateral/    what vendors publish, filled by `nacre broker collateral import`; names as in nacre_verify's cache
//! verify.toml    rules that differ from the strict defaults; read when the broker opens, unknown names refused
//! ```

use std::path::{Path, PathBuf};

use nacre_attest::{
    evidence::{Claims, EvidenceError, Expected, Verifier as _},
    sample::{self, SampleVerifier},
    sim,
};
use nacre_core::Verified;
use nacre_verify::{Cache, Rules, Verifiers};
use serde_json::Value;

use crate::{ApiError, Broker, BrokerError, chain::Refused};

const RULES: &str = "verify.toml";
const COLLATERAL: &str = "collateral";
/// Bytes of the rules at most.
const LONGEST_RULES: u64 = 64 * 1024;

/// Where a broker's collateral is: for who fills it, also while the broker runs.
pub fn collateral_dir(dir: &Path) -> PathBuf {
    dir.join(COLLATERAL)
}

/// The verifiers of a broker's directory.
pub(crate) fn open(dir: &Path) -> Result<Verifiers, BrokerError> {
    let path = dir.join(RULES);
    let invalid = |why: String| BrokerError::Invalid(format!("{}: {why}", path.display()));
    let rules = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Rules::default(),
        Err(error) => return Err(invalid(error.to_string())),
        Ok(file) if file.len() > LONGEST_RULES => return Err(invalid("longer than any rules".into())),
        Ok(_) => {
            let text = std::fs::read_to_string(&path).map_err(|error| invalid(error.to_string()))?;
            toml::from_str(&text).map_err(|error| invalid(error.message().to_owned()))?
        }
    };
    if rules != Rules::default() {
        tracing::info!(?rules, "evidence is judged by other rules than the default ones");
    }
    Verifiers::new(Cache::directory(collateral_dir(dir)), &rules)
        .map_err(|error| BrokerError::Invalid(error.to_string()))
}

impl Broker {
    /// Whether guests of this TEE can be verified here.
    pub(crate) fn check_tee(&self, tee: &str) -> Result<(), ApiError> {
        if matches!(tee, sim::TEE | sample::TEE) || self.verifiers.get(tee).is_some() {
            return Ok(());
        }
        let names = self.verifiers.names().join(", ");
        Err(ApiError::bad_request(format!(
            "TEE '{tee}' is not supported by this broker: {names}, {} and {} are",
            sim::TEE,
            sample::TEE
        )))
    }

    /// Verifies evidence of a TEE that [`check_tee`](Self::check_tee) admitted.
    pub(crate) fn verify(
        &self,
        tee: &str,
        evidence: &Value,
        expected: &Expected<'_>,
    ) -> Result<Verified<Claims>, Refused> {
        let result = match self.verifiers.get(tee) {
            Some(verifier) => verifier.verify(evidence, expected),
            None if tee == sample::TEE => SampleVerifier.verify(evidence, expected),
            None => self.store.config().map_err(ApiError::from)?.sim().verify(evidence, expected),
        };
        result.map_err(|error: EvidenceError| Refused::evidence(&error, self.trusted_platforms()))
    }

    /// The simulated platforms that are trusted, for people.
    fn trusted_platforms(&self) -> Vec<String> {
        let config = self.store.config().ok();
        config.map(|config| config.platform_names(sim::TEE)).unwrap_or_default()
    }
}

//! Attestation results: EAT Attestation Results (EAR) as ES256 JWT, in Trustee's profile.
//!
//! ```text
//! eat_profile  "tag:github.com,2024:confidential-containers/Trustee"
//! iat nbf exp  seconds since 1970, by the broker's clock; Trustee writes no nbf, and iat is in its place then
//! iss          the broker's name
//! ear.verifier-id  {build, developer}
//! submods.cpu0 {"ear.status", "ear.trustworthiness-vector", "ear.appraisal-policy-id", "ear.veraison.annotated-evidence": {
//!                 "<tee>": {…}, "report_data", "runtime_data_claims": {"nonce","tee-pubkey"}, "init_data", "init_data_claims"}}
//! nacre.simulated  true, only when the TEE is a simulation
//! ```
//!
//! The status is the worst tier of the vector (AR4SI §2.3): 0, ±1 none; −32…31 affirming; −96…95 warning; beyond contraindicated.

use std::collections::BTreeMap;

use nacre_core::jose::{JoseError, Jwk, PrivateKey, PublicKey, sign_compact, verify_compact};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::evidence::is_simulation;

/// The profile.
pub const PROFILE: &str = "tag:github.com,2024:confidential-containers/Trustee";
/// The claims of a trustworthiness vector.
pub const TRUST_CLAIMS: [&str; 8] = [
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
];

/// What a vector says, worst last.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing is said.
    None,
    /// As it should be.
    Affirming,
    /// Something should be looked at.
    Warning,
    /// Not to be trusted.
    Contraindicated,
}

impl Status {
    /// The tier of one value.
    pub fn of(value: i8) -> Self {
        match value {
            -1..=1 => Self::None,
            -32..=31 => Self::Affirming,
            -96..=95 => Self::Warning,
            _ => Self::Contraindicated,
        }
    }

    /// The name in a token.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Affirming => "affirming",
            Self::Warning => "warning",
            Self::Contraindicated => "contraindicated",
        }
    }
}

/// Trust claims by name.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct TrustVector(BTreeMap<String, i8>);

impl TrustVector {
    /// A vector of what a policy gave; claims that it left out are 0.
    ///
    /// # Errors
    /// The name of a claim that does not exist.
    pub fn new(claims: BTreeMap<String, i8>) -> Result<Self, String> {
        if let Some(unknown) = claims.keys().find(|name| !TRUST_CLAIMS.contains(&name.as_str())) {
            return Err(unknown.clone());
        }
        let mut all: BTreeMap<String, i8> = TRUST_CLAIMS.iter().map(|name| ((*name).to_owned(), 0)).collect();
        all.extend(claims);
        Ok(Self(all))
    }

    /// The worst tier.
    pub fn status(&self) -> Status {
        self.0.values().map(|value| Status::of(*value)).max().unwrap_or(Status::None)
    }

    /// A claim's value.
    pub fn get(&self, name: &str) -> i8 {
        self.0.get(name).copied().unwrap_or_default()
    }
}

/// The appraisal of one submodule.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Appraisal {
    /// The worst tier of the vector.
    #[serde(rename = "ear.status")]
    pub status: Status,
    /// The vector.
    #[serde(rename = "ear.trustworthiness-vector")]
    pub vector: TrustVector,
    /// The policy that gave it.
    #[serde(rename = "ear.appraisal-policy-id")]
    pub policy_id: String,
    /// What was measured, and what it was bound to.
    #[serde(rename = "ear.veraison.annotated-evidence")]
    pub evidence: Value,
}

/// Who appraised.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct VerifierId {
    /// The program and its version.
    pub build: String,
    /// Who makes it.
    pub developer: String,
}

/// The claims of a token.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Ear {
    /// [`PROFILE`].
    pub eat_profile: String,
    /// Issued at.
    pub iat: i64,
    /// Not before; `iat`, where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<i64>,
    /// Expires.
    pub exp: i64,
    /// The broker's name.
    pub iss: String,
    /// Who appraised.
    #[serde(rename = "ear.verifier-id")]
    pub verifier: VerifierId,
    /// The appraisals, by submodule.
    pub submods: BTreeMap<String, Appraisal>,
    /// Whether the TEE is a simulation.
    #[serde(rename = "nacre.simulated", default, skip_serializing_if = "std::ops::Not::not")]
    pub simulated: bool,
}

/// Why a token does not hold.
#[derive(Debug, thiserror::Error)]
pub enum EarError {
    /// Not signed by the key that it should be signed by.
    #[error("attestation token: {0}")]
    Signature(#[from] JoseError),
    /// Signed, but not an EAR of our profile.
    #[error("attestation token: not an EAR of profile {PROFILE}: {0}")]
    Malformed(String),
    /// Expired or not yet valid.
    #[error("attestation token is valid from {nbf} to {exp} (seconds since 1970), and it is {now}: attest again")]
    Time {
        /// Not before.
        nbf: i64,
        /// Expires.
        exp: i64,
        /// The time by which it was judged.
        now: i64,
    },
}

impl Ear {
    /// Signs the claims with a broker's token key.
    ///
    /// # Errors
    /// [`EarError::Signature`] for a key that cannot sign.
    pub fn issue(&self, key: &PrivateKey) -> Result<String, EarError> {
        let kid = Jwk::from_public(&key.public()).thumbprint()?;
        Ok(sign_compact(key, Some(&kid), self)?)
    }

    /// Verifies a token by a broker's token key. The caller judges the time with [`check_time`](Self::check_time).
    ///
    /// # Errors
    /// [`EarError`].
    pub fn verify(token: &str, key: &PublicKey) -> Result<nacre_core::Verified<Self>, EarError> {
        let claims = verify_compact(token, key)?.into_inner();
        nacre_core::Untrusted::new(claims).verify_into(|claims| {
            let ear: Self = serde_json::from_value(claims).map_err(|e| EarError::Malformed(e.to_string()))?;
            if ear.eat_profile != PROFILE {
                return Err(EarError::Malformed(format!("its profile is '{:.100}'", ear.eat_profile)));
            }
            if ear.submods.is_empty() || ear.submods.len() > 64 {
                return Err(EarError::Malformed(format!("{} submodules", ear.submods.len())));
            }
            if ear.submods.values().any(|module| module.status != module.vector.status()) {
                return Err(EarError::Malformed("a status that its trust vector does not give".into()));
            }
            if ear.exp <= ear.iat {
                return Err(EarError::Malformed("it expires before it was issued".into()));
            }
            Ok(ear)
        })
    }

    /// Judges the validity period.
    ///
    /// # Errors
    /// [`EarError::Time`].
    pub fn check_time(&self, now: i64) -> Result<(), EarError> {
        let nbf = self.nbf.unwrap_or(self.iat);
        if now < nbf || now >= self.exp {
            return Err(EarError::Time { nbf, exp: self.exp, now });
        }
        Ok(())
    }

    /// The TEE key that the token is for, as the guest sent it.
    pub fn tee_pubkey(&self) -> Option<&Value> {
        self.submods.get("cpu0")?.evidence.get("runtime_data_claims")?.get("tee-pubkey")
    }

    /// Whether the token is of a simulation: it is marked, or its evidence is of a TEE that is none. Other brokers know no mark.
    pub fn is_simulation(&self) -> bool {
        let says =
            |evidence: &Value| evidence.as_object().is_some_and(|all| all.keys().any(|name| is_simulation(name)));
        self.simulated || self.submods.values().any(|module| says(&module.evidence))
    }

    /// The worst status of all submodules.
    pub fn status(&self) -> Status {
        self.submods.values().map(|module| module.status).max().unwrap_or(Status::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ear() -> Ear {
        let vector = TrustVector::new([("executables".to_owned(), 3)].into()).unwrap();
        let module = Appraisal {
            status: vector.status(),
            vector,
            policy_id: "default".into(),
            evidence: serde_json::json!({"runtime_data_claims": {"tee-pubkey": {"kty": "EC"}}}),
        };
        Ear {
            eat_profile: PROFILE.into(),
            iat: 100,
            nbf: Some(100),
            exp: 200,
            iss: "broker".into(),
            verifier: VerifierId { build: "b".into(), developer: "d".into() },
            submods: [("cpu0".to_owned(), module)].into(),
            simulated: false,
        }
    }

    #[test]
    fn tiers_are_those_of_ar4si() {
        for (value, status) in [
            (0, Status::None),
            (-1, Status::None),
            (1, Status::None),
            (2, Status::Affirming),
            (31, Status::Affirming),
            (-32, Status::Affirming),
            (32, Status::Warning),
            (-33, Status::Warning),
            (95, Status::Warning),
            (-96, Status::Warning),
            (96, Status::Contraindicated),
            (-97, Status::Contraindicated),
            (i8::MIN, Status::Contraindicated),
        ] {
            assert_eq!(Status::of(value), status, "{value}");
        }
        assert!(TrustVector::new([("hardwear".to_owned(), 2)].into()).is_err());
    }

    #[test]
    fn tokens_verify_by_their_key_only_and_in_their_time() {
        let key = PrivateKey::generate_p256();
        let token = ear().issue(&key).unwrap();
        let read = Ear::verify(&token, &key.public()).unwrap().into_inner();
        assert_eq!(read, ear());
        assert_eq!(read.tee_pubkey().unwrap()["kty"], "EC");
        assert!(read.check_time(100).is_ok() && read.check_time(199).is_ok());
        assert!(read.check_time(99).is_err() && read.check_time(200).is_err());
        assert!(Ear::verify(&token, &PrivateKey::generate_p256().public()).is_err());
        let mut other = ear();
        other.eat_profile = "x".into();
        let mut liar = ear();
        liar.submods.get_mut("cpu0").unwrap().status = Status::None;
        let mut empty = ear();
        empty.submods.clear();
        let mut ended = ear();
        ended.exp = 100;
        for bad in [other, liar, empty, ended] {
            assert!(Ear::verify(&bad.issue(&key).unwrap(), &key.public()).is_err());
        }
    }
}

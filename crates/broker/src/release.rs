//! From a token to a resource: `GET /resource/…`.
//!
//! token sound and in time ─▶ simulation allowed ─▶ release policy ─▶ resource there ─▶ audit entry on disk ─▶ JWE to the TEE key.
//! The policy is asked before the store, so that who may not have a resource does not learn whether there is one.

use std::sync::Arc;

use nacre_attest::ear::{Ear, Status, TRUST_CLAIMS};
use nacre_core::{
    ResourcePath,
    jose::{KeyAlgorithm, PublicKey, Recipient, encrypt},
};
use serde_json::{Value, json};

use crate::{
    ApiError, AuditEntry, Broker,
    admin::now,
    appraise::{guest_name, tee_key},
    broker::{entry, policy_name, resource_policy_scopes},
    policy,
};

/// What the guest shows.
pub(crate) enum Proof {
    /// An attestation token.
    Token(String),
    /// A session that has attested.
    Session(String),
}

impl Broker {
    /// The token behind a proof, in its time.
    fn ear(&self, proof: &Proof) -> Result<Arc<Ear>, ApiError> {
        let refuse = |e: nacre_attest::ear::EarError| ApiError::new(401, "TokenVerifierError", e.to_string());
        let ear = match proof {
            Proof::Session(id) => self.sessions.ear(id)?,
            Proof::Token(token) => {
                Arc::new(Ear::verify(token, &self.keys.token.public()).map_err(refuse)?.into_inner())
            }
        };
        ear.check_time(now()).map_err(refuse)?;
        Ok(ear)
    }

    /// The resource as a JWE to the TEE key of the proof's token.
    pub(crate) fn release(&self, proof: &Proof, path: &ResourcePath, query: &Value) -> Result<String, ApiError> {
        let ear = self.ear(proof)?;
        let key = tee_key(ear.tee_pubkey().unwrap_or(&Value::Null))?;
        let mut audit = AuditEntry {
            measurement: measurement(&ear).to_owned(),
            simulated: ear.simulated,
            ..entry("released", &guest_name(&key), path.to_string())
        };
        match self.decide(&ear, path, query, &mut audit) {
            Ok(()) => {}
            Err(error) => {
                audit.event = "release refused".into();
                audit.detail.clone_from(&error.detail);
                self.audit_refusal(audit);
                return Err(error);
            }
        }
        let secret = self
            .store
            .resource(path)?
            .ok_or_else(|| ApiError::new(404, "ResourceNotFound", format!("there is no resource {path}")))?;
        let jwe = encrypt(secret.expose(), &[recipient(&key)])
            .map_err(|e| ApiError::new(400, "JweError", format!("the TEE key cannot be encrypted to: {e}")))?
            .to_json();
        self.store.audit(audit)?;
        Ok(jwe)
    }

    fn decide(&self, ear: &Ear, path: &ResourcePath, query: &Value, audit: &mut AuditEntry) -> Result<(), ApiError> {
        self.check_simulation(ear.simulated)?;
        let (scope, text) = self.policy_for(path)?;
        audit.policy = policy_name(&scope, &text);
        let deny = |why: &str| {
            let doubts = doubts(ear);
            ApiError::new(
                403,
                "PolicyDeny",
                format!("resource policy {} denies {path} to a guest that is {doubts}{why}", audit.policy),
            )
        };
        let input = serde_json::to_value(ear).map_err(|_| deny(": unreadable token"))?;
        let data = json!({
            "plugin": "resource",
            "resource-path": [path.repository(), path.kind(), path.tag()],
            "query": query,
        });
        match policy::evaluate(&text, policy::ALLOW, input, Some(data), self.store.references()?) {
            Ok(Value::Bool(true)) => Ok(()),
            Ok(Value::Bool(false)) => Err(deny("")),
            Ok(_) => Err(deny(": its 'allow' is no boolean")),
            Err(why) => Err(deny(&format!(": it failed: {why}"))),
        }
    }

    fn policy_for(&self, path: &ResourcePath) -> Result<(String, String), ApiError> {
        for (scope, key) in resource_policy_scopes(path) {
            if let Some(text) = self.store.policy(&key)? {
                return Ok((scope, text));
            }
        }
        Err(ApiError::new(403, "PolicyDeny", "this broker has no resource policy, so it releases nothing"))
    }
}

/// Trustee's clients read RSA-OAEP-256 for RSA keys.
fn recipient(key: &PublicKey) -> Recipient<'_> {
    let recipient = Recipient::new(key);
    if matches!(key, PublicKey::Rsa(_)) { recipient.algorithm(KeyAlgorithm::RsaOaep256) } else { recipient }
}

/// What the appraisal found wrong, as the guest can read it in its token anyway: `warning (executables 33, measurement 0123456789ab…)`.
fn doubts(ear: &Ear) -> String {
    let mut found: Vec<String> = Vec::new();
    for module in ear.submods.values() {
        let doubtful = |name: &&&str| Status::of(module.vector.get(name)) > Status::Affirming;
        for name in TRUST_CLAIMS.iter().filter(doubtful) {
            let what = match *name {
                "executables" => "its executables are not recognised",
                "hardware" => "its hardware is not recognised",
                "configuration" => "its configuration is not known to be good",
                other => other,
            };
            found.push(format!("{what} ({name} = {})", module.vector.get(name)));
        }
    }
    let status = ear.status().name();
    match measurement(ear) {
        _ if found.is_empty() => status.to_owned(),
        "" => format!("{status}: {}", found.join(", ")),
        measured => format!("{status}: {}; it measured {:.24}…", found.join(", "), measured),
    }
}

fn measurement(ear: &Ear) -> &str {
    ear.submods
        .get("cpu0")
        .and_then(|module| module.evidence.as_object())
        .and_then(|evidence| evidence.values().find_map(|claims| claims.get("measurement")))
        .and_then(Value::as_str)
        .unwrap_or_default()
}

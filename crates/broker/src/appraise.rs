//! From evidence to a token: `/auth` and `/attest`.
//!
//! ```text
//! nonce spent ─▶ message ─▶ nonce equal ─▶ TEE key sound ─▶ init data sound ─▶ evidence verified (bound to nonce, TEE key and
//! init data) ─▶ appraisal policy ─▶ EAR token
//! ```

use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::{
    ear::{Appraisal, Ear, PROFILE, TrustVector, VerifierId},
    evidence::{Claims, Expected, is_simulation},
    initdata::InitData,
    rcar::{Attestation, Challenge, MessageError, Request, report_data},
};
use nacre_core::{
    Digest,
    jose::{Jwk, PublicKey},
};
use serde_json::{Value, json};

use crate::{
    ApiError, AuditEntry, Broker,
    admin::now,
    broker::{entry, policy_name},
    chain::{self, Refused, StageId},
    metrics::count,
    policy,
    release::Guest,
    store::{
        guests::{Attested, Expectation, GuestRecord, Outcome},
        sessions::Opened,
    },
};

/// Where the token has the measurement, whatever its name in the TEE's claims is.
pub(crate) const MEASUREMENT: &str = "nacre.measurement";
/// Init data entries longer than this are in the token only by their digest, so that it fits into a header.
const LONGEST_CLAIM: usize = 200;

fn refused(variant: &'static str, detail: impl Into<String>) -> ApiError {
    ApiError::new(401, variant, detail)
}

fn malformed(error: &MessageError) -> ApiError {
    match error {
        MessageError::TooLong { .. } => ApiError::new(413, "InvalidRequest", error.to_string()),
        _ => ApiError::bad_request(error.to_string()),
    }
}

impl Broker {
    /// Opens a session.
    pub(crate) fn auth(&self, body: &[u8]) -> Result<(Opened, Challenge), ApiError> {
        let request = Request::parse(body).map_err(|e| malformed(&e))?;
        self.check_tee(&request.tee)?;
        self.check_simulation(is_simulation(&request.tee))?;
        let opened = self.sessions.open(&request.tee)?;
        let challenge = Challenge { nonce: opened.nonce.clone(), extra_params: Value::String(String::new()) };
        Ok((opened, challenge))
    }

    /// The one gate for simulated TEEs, beside the policies.
    pub(crate) fn check_simulation(&self, simulated: bool) -> Result<(), ApiError> {
        if simulated && !self.settings.allow_simulated {
            return Err(ApiError::new(
                403,
                "SimulatedTee",
                "this broker releases nothing to simulated TEEs; for demos and tests, set allow_simulated = true in its broker.toml",
            ));
        }
        Ok(())
    }

    /// Appraises the evidence of a session; gives the token. The session's nonce is spent whatever comes of it.
    pub(crate) fn attest(&self, session: &str, body: &[u8]) -> Result<String, ApiError> {
        let (tee, nonce) = self.sessions.spend(session)?;
        // A session of an enrolment is none for evidence.
        self.check_tee(&tee)?;
        match self.appraise(&tee, &nonce, body) {
            Ok((ear, audit, record)) => {
                let signer = self.store.config()?;
                let token =
                    ear.issue(signer.token_keys().signer()).map_err(|e| refused("TokenIssue", e.to_string()))?;
                let record = record.kept(self.settings.most_guests)?;
                self.sessions.attested(session, ear.clone(), audit, record)?;
                self.known_tokens.keep(&token, Guest::new(ear)?);
                count(&self.metrics.attested);
                Ok(token)
            }
            Err(Refused { error, refusal, guest }) => {
                count(&self.metrics.attestation_refused);
                // It is spent; that it goes at once only makes room.
                let _ = self.sessions.close(session);
                let audit = AuditEntry {
                    detail: error.detail.clone(),
                    simulated: is_simulation(&tee),
                    ..entry("attestation refused", &tee, String::new())
                };
                let record = GuestRecord {
                    time: now(),
                    guest,
                    measurement: String::new(),
                    simulated: is_simulation(&tee),
                    tee,
                    outcome: Outcome::Refused(refusal),
                };
                self.audit_refusal_of(audit, Some(record.kept(self.settings.most_guests)?));
                Err(error)
            }
        }
    }

    fn appraise(&self, tee: &str, nonce: &str, body: &[u8]) -> Result<(Arc<Ear>, AuditEntry, GuestRecord), Refused> {
        let message = Attestation::parse(body).map_err(|e| malformed(&e))?;
        if message.runtime_data.nonce != nonce {
            let error = refused("NonceMismatch", "the nonce is not this session's");
            let found = Some(message.runtime_data.nonce.as_str());
            return Err(Refused::new(StageId::Session, "Nonce", [nonce.to_owned()], found, error));
        }
        let key = tee_key(&message.runtime_data.tee_pubkey)?;
        self.judge(tee, &message, &key).map_err(|refused| refused.of(guest_name(&key)))
    }

    /// The evidence of a message whose nonce is the session's.
    fn judge(
        &self,
        tee: &str,
        message: &Attestation,
        key: &PublicKey,
    ) -> Result<(Arc<Ear>, AuditEntry, GuestRecord), Refused> {
        if !message.tee_evidence.additional_evidence.is_empty() {
            return Err(refused("UnsupportedEvidence", "evidence of additional devices is not supported").into());
        }
        let init_data = match &message.init_data {
            None => None,
            Some(init) if init.format == "toml" => {
                Some(InitData::parse(&init.body).map_err(|e| refused("InitData", e.to_string()))?)
            }
            Some(init) => {
                return Err(refused("InitData", format!("init data format '{:.40}' is not toml", init.format)).into());
            }
        };
        let bound =
            report_data(&message.runtime_data, &message.tee_evidence.additional_evidence).map_err(|e| malformed(&e))?;
        let expected = Expected { report_data: &bound, init_data: init_data.as_ref(), now: now() };
        let mut claims = self.verify(tee, &message.tee_evidence.primary_evidence, &expected)?.into_inner();
        if tee == nacre_verify::tpm::TEE {
            self.add_enrolment(&mut claims)?;
        }
        self.check_simulation(claims.simulated)?;

        let mut evidence = json!({
            tee: claims.claims,
            "report_data": claims.report_data,
            "runtime_data_claims": message.runtime_data,
            "init_data": claims.init_data,
            MEASUREMENT: claims.measurement,
        });
        let init_claims = |longest: usize| {
            init_data.as_ref().map(|init| {
                init.entries()
                    .iter()
                    .map(|(name, text)| {
                        let long = text.len() > longest;
                        (
                            name.clone(),
                            if long { Digest::sha256(text.as_bytes()).to_string() } else { text.clone() }.into(),
                        )
                    })
                    .collect::<serde_json::Map<String, Value>>()
            })
        };
        let mut input = evidence.clone();
        // Logs are for policies: a token has no room for them.
        if let (Some(Value::Object(known)), Value::Object(logs)) = (input.get_mut(tee), &claims.logs) {
            known.extend(logs.clone());
        }
        set(&mut input, "init_data_claims", init_claims(usize::MAX));
        set(&mut evidence, "init_data_claims", init_claims(LONGEST_CLAIM));

        let Trusted { vector, policy, expected } = self.trust(tee, input, &claims.claims)?;
        let ear = Arc::new(self.result(vector, evidence, claims.simulated));
        let audit = audit_entry(&ear, &claims, key, policy.clone());
        let record = GuestRecord {
            time: ear.iat,
            tee: tee.to_owned(),
            guest: audit.actor.clone(),
            measurement: claims.measurement,
            simulated: claims.simulated,
            outcome: Outcome::Attested(Attested { policy, ear: ear.clone(), expected }),
        };
        Ok((ear, audit, record))
    }

    /// By the policy of the TEE's class, where it has one; by that of all CPUs otherwise.
    fn trust(&self, tee: &str, input: Value, claims_of: &Value) -> Result<Trusted, ApiError> {
        let config = self.store.config()?;
        let own = policy::class_of(tee);
        let found = [own.as_str(), policy::DEFAULT_CPU]
            .into_iter()
            .find_map(|id| config.policy(&format!("attestation/{id}")).map(|policy| (id, policy)));
        let (id, policy) = found.ok_or_else(|| refused("PolicyEngineError", "there is no attestation policy"))?;
        let refuse = |why: String| refused("PolicyEngineError", format!("attestation policy {id}: {why}"));
        let known = config.references();
        let (claims, asked) = policy.appraise(input, known.clone()).map_err(refuse)?;
        let claims = serde_json::from_value(claims).map_err(|e| refuse(format!("trust_claims: {e}")))?;
        let vector = TrustVector::new(claims).map_err(|name| refuse(format!("'{name:.40}' is no trust claim")))?;
        let now = now();
        let expected = asked.into_iter().filter(|name| !chain::is_of_another(tee, name)).map(|name| {
            let value = known.get(&name).filter(|value| value.expires > now);
            let found = chain::counterpart(tee, claims_of, &name);
            (name, value.map(|value| Expectation::of(value, found)))
        });
        Ok(Trusted { vector, policy: policy_name(id, policy.text()), expected: expected.collect() })
    }

    fn result(&self, vector: TrustVector, evidence: Value, simulated: bool) -> Ear {
        let iat = now();
        let module = Appraisal { status: vector.status(), vector, policy_id: "default".into(), evidence };
        Ear {
            eat_profile: PROFILE.into(),
            iat,
            nbf: Some(iat),
            exp: iat + i64::from(self.settings.token_lifetime_seconds),
            iss: self.settings.name.clone(),
            verifier: VerifierId {
                build: concat!("nacre-broker ", env!("CARGO_PKG_VERSION")).into(),
                developer: "https://github.com/nacre-storage/nacre".into(),
            },
            submods: [("cpu0".to_owned(), module)].into(),
            simulated,
        }
    }
}

/// What a policy gave, by which name it is known, and what it asked for.
struct Trusted {
    vector: TrustVector,
    policy: String,
    expected: BTreeMap<String, Option<Expectation>>,
}

fn set(object: &mut Value, name: &str, value: Option<serde_json::Map<String, Value>>) {
    if let (Value::Object(members), Some(value)) = (object, value) {
        members.insert(name.into(), Value::Object(value));
    }
}

/// The TEE key of a message, which must be one that we can encrypt to.
pub(crate) fn tee_key(value: &Value) -> Result<PublicKey, ApiError> {
    let jwk: Jwk = serde_json::from_value(value.clone()).map_err(|e| refused("TeeKey", format!("tee-pubkey: {e}")))?;
    jwk.to_public().map_err(|e| refused("TeeKey", format!("tee-pubkey: {e}")))
}

/// A guest in the audit log: its TEE key's thumbprint.
pub(crate) fn guest_name(key: &PublicKey) -> String {
    format!("guest:{}", Jwk::from_public(key).thumbprint().unwrap_or_default())
}

fn audit_entry(ear: &Ear, claims: &Claims, key: &PublicKey, policy: String) -> AuditEntry {
    let vector = &ear.submods.values().next().map(|module| module.vector.clone()).unwrap_or_default();
    AuditEntry {
        measurement: claims.measurement.clone(),
        policy,
        detail: format!(
            "{}: {} (executables {}, hardware {}, configuration {})",
            claims.tee,
            ear.status().name(),
            vector.get("executables"),
            vector.get("hardware"),
            vector.get("configuration")
        ),
        simulated: claims.simulated,
        ..entry("attested", &guest_name(key), String::new())
    }
}

//! From a token to a resource, `GET /resource/…`; leases and anchors, which are asked for with the same tokens and by the same policies.
//!
//! token sound and in time ─▶ simulation allowed ─▶ release policy ─▶ resource there ─▶ audit entry on disk ─▶ JWE to the TEE key.
//! The policy is asked before the store, so that who may not have a resource does not learn whether there is one.

use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::ear::{Ear, Status, TRUST_CLAIMS};
use nacre_core::{
    AnchorState, ResourcePath,
    jose::{KeyAlgorithm, PublicKey, Recipient, encrypt},
};
use serde_json::{Value, json};

use crate::{
    ApiError, AuditEntry, Broker,
    admin::{self, now},
    appraise::{MEASUREMENT, guest_name, tee_key},
    broker::{entry, policy_name, resource_policy_scopes},
    metrics::count,
    policy::{self, Policy},
    store::{
        anchors::Advance,
        config::Config,
        leases::{self, Lease},
        resources::Resource,
    },
};

/// What the guest shows.
pub(crate) enum Proof {
    /// An attestation token.
    Token(String),
    /// A session that has attested.
    Session(String),
}

/// A resource on its way to a guest.
#[derive(Debug)]
pub(crate) struct Released {
    /// The JWE to the guest's TEE key.
    pub(crate) jwe: String,
    /// The version that is in it.
    pub(crate) version: u32,
    /// The id of the lease and its seconds, where it is lent.
    pub(crate) lease: Option<(String, u32)>,
}

/// A guest that showed a token in its time.
#[derive(Clone)]
pub(crate) struct Guest {
    ear: Arc<Ear>,
    key: PublicKey,
}

impl Guest {
    pub(crate) fn new(ear: Arc<Ear>) -> Result<Self, ApiError> {
        let key = tee_key(ear.tee_pubkey().unwrap_or(&Value::Null))?;
        Ok(Self { ear, key })
    }

    pub(crate) fn name(&self) -> String {
        guest_name(&self.key)
    }

    pub(crate) fn measurement(&self) -> &str {
        measurement(&self.ear)
    }

    fn entry(&self, event: &str, path: &ResourcePath) -> AuditEntry {
        AuditEntry {
            measurement: self.measurement().to_owned(),
            simulated: self.ear.simulated,
            ..entry(event, &self.name(), path.to_string())
        }
    }
}

impl Broker {
    /// The guest behind a proof.
    pub(crate) fn guest(&self, proof: &Proof) -> Result<Guest, ApiError> {
        let refuse = |why: String| ApiError::new(401, "TokenVerifierError", why);
        let guest = match proof {
            Proof::Session(id) => Guest::new(self.sessions.ear(id)?)?,
            Proof::Token(token) => {
                let config = self.store.config()?;
                let named = admin::key_id(token).unwrap_or_default();
                let key = config.token_keys().by_id(&named).ok_or_else(|| {
                    refuse(
                        "attestation token: it is not signed by a key of this broker that is in use: attest again"
                            .into(),
                    )
                })?;
                match self.known_tokens.get(token) {
                    Some(guest) => guest,
                    None => {
                        let ear = Ear::verify(token, key).map_err(|e| refuse(e.to_string()))?.into_inner();
                        let guest = Guest::new(Arc::new(ear))?;
                        self.known_tokens.keep(token, guest.clone());
                        guest
                    }
                }
            }
        };
        guest.ear.check_time(now()).map_err(|e| refuse(e.to_string()))?;
        Ok(guest)
    }

    /// The resource as a JWE to the TEE key of the proof's token.
    pub(crate) fn release(
        &self,
        proof: &Proof,
        path: &ResourcePath,
        query: &BTreeMap<String, String>,
    ) -> Result<Released, ApiError> {
        let guest = self.guest(proof)?;
        let version = query
            .get("version")
            .map(|text| text.parse::<u32>().map_err(|_| ApiError::bad_request("version: a number")))
            .transpose()?;
        let mut audit = guest.entry("released", path);
        self.allow("resource", &guest, path, query, &mut audit)?;
        let (resource, secret) = self.store.resource(path, version)?.ok_or_else(|| {
            let version = version.map(|version| format!(" version {version}")).unwrap_or_default();
            ApiError::new(404, "ResourceNotFound", format!("there is no resource {path}{version}"))
        })?;
        let jwe = encrypt(secret.expose(), &[recipient(&guest.key)])
            .map_err(|e| ApiError::new(400, "JweError", format!("the TEE key cannot be encrypted to: {e}")))?
            .to_json();
        audit.detail = format!("version {}", resource.version);
        let lease = resource.lease_seconds.map(|seconds| (leases::new_id(), seconds));
        match &lease {
            None => self.store.audit(audit)?,
            Some((id, seconds)) => {
                audit.detail = format!("{}, lent for {seconds} s", audit.detail);
                self.store.grant(id, lease_of(&guest, &resource, *seconds), audit)?;
            }
        }
        count(&self.metrics.released);
        Ok(Released { jwe, version: resource.version, lease })
    }

    /// Renews a lease for a guest that has attested again since; gives its seconds.
    pub(crate) fn renew(&self, proof: &Proof, id: &str) -> Result<u32, ApiError> {
        let guest = self.guest(proof)?;
        let gone = || ApiError::new(404, "LeaseNotFound", "there is no such lease: fetch the resource again");
        let lease = self.store.lease(id)?.ok_or_else(gone)?;
        let path: ResourcePath = lease.path.parse().map_err(|_| gone())?;
        let mut audit = guest.entry("lease renewed", &path);
        audit.detail = format!("lease {}", lease.name);
        let refused = |variant: &'static str, why: String| {
            let detail = format!("lease {} of {path}: {why}", lease.name);
            let entry = AuditEntry { detail: detail.clone(), ..guest.entry("renewal refused", &path) };
            self.audit_refusal(entry);
            ApiError::new(403, variant, detail)
        };
        if lease.revoked.is_some() || self.store.resource_info(&path)?.is_none() {
            return Err(refused("LeaseRevoked", "it was revoked: give the resource up".into()));
        }
        if lease.ends <= now() {
            return Err(refused("LeaseEnded", "it has ended: give the resource up, and fetch it again".into()));
        }
        if lease.measurement != guest.measurement() {
            return Err(refused("LeaseForeign", "it was granted to a guest with another measurement".into()));
        }
        if lease.guest == guest.name() {
            return Err(ApiError::new(
                401,
                "LeaseNeedsAttestation",
                "a lease is renewed by a new attestation, not by the one that it was granted to: attest again",
            ));
        }
        self.allow("resource", &guest, &path, &BTreeMap::new(), &mut audit)?;
        let (name, now) = (guest.name(), now());
        let renewed = self.store.change_lease(id, Some(audit), move |lease| {
            if lease.revoked.is_some() || lease.ends <= now {
                return None;
            }
            lease.guest.clone_from(&name);
            (lease.renewed, lease.ends) = (now, now + i64::from(lease.seconds));
            Some(lease.seconds)
        })?;
        count(&self.metrics.renewed);
        renewed.ok_or_else(|| refused("LeaseRevoked", "it was revoked: give the resource up".into()))
    }

    /// Ends a lease at its holder's wish.
    pub(crate) fn give_up(&self, proof: &Proof, id: &str) -> Result<(), ApiError> {
        let guest = self.guest(proof)?;
        let Some(lease) = self.store.lease(id)? else { return Ok(()) };
        let entry = AuditEntry {
            detail: format!("lease {}", lease.name),
            measurement: guest.measurement().to_owned(),
            ..entry("lease given up", &guest.name(), lease.path)
        };
        let now = now();
        self.store.change_lease(id, Some(entry), move |lease| {
            lease.ends = lease.ends.min(now);
            Some(())
        })?;
        Ok(())
    }

    /// An anchor of a volume.
    pub(crate) fn anchor(&self, proof: &Proof, path: &ResourcePath) -> Result<Option<AnchorState>, ApiError> {
        let guest = self.guest(proof)?;
        self.allow("anchor", &guest, path, &BTreeMap::new(), &mut guest.entry("anchor", path))?;
        Ok(self.store.anchor(&anchor_key(path))?)
    }

    /// Moves an anchor on, from the state that is expected.
    pub(crate) fn advance(
        &self,
        proof: &Proof,
        path: &ResourcePath,
        expected: Option<AnchorState>,
        next: AnchorState,
    ) -> Result<Advance, ApiError> {
        let guest = self.guest(proof)?;
        let mut audit = guest.entry("volume taken over", path);
        self.allow("anchor", &guest, path, &BTreeMap::new(), &mut audit)?;
        audit.detail = format!("fence {}", next.fence);
        Ok(self.store.advance_anchor(&anchor_key(path), expected, next, audit)?)
    }

    /// Asks the policy; logs a refusal.
    fn allow(
        &self,
        plugin: &str,
        guest: &Guest,
        path: &ResourcePath,
        query: &BTreeMap<String, String>,
        audit: &mut AuditEntry,
    ) -> Result<(), ApiError> {
        self.decide(plugin, &guest.ear, path, query, audit).inspect_err(|error| {
            count(&self.metrics.release_refused);
            let event = if audit.event == "lease renewed" { "renewal refused" } else { "release refused" };
            self.audit_refusal(AuditEntry { event: event.into(), detail: error.detail.clone(), ..audit.clone() });
        })
    }

    fn decide(
        &self,
        plugin: &str,
        ear: &Ear,
        path: &ResourcePath,
        query: &BTreeMap<String, String>,
        audit: &mut AuditEntry,
    ) -> Result<(), ApiError> {
        self.check_simulation(ear.simulated)?;
        let config = self.store.config()?;
        let (scope, policy) = policy_for(&config, path)?;
        audit.policy = policy_name(&scope, policy.text());
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
            "plugin": plugin,
            "resource-path": [path.repository(), path.kind(), path.tag()],
            "query": query,
        });
        match policy.evaluate(policy::ALLOW, input, Some(data), config.references()) {
            Ok(Value::Bool(true)) => Ok(()),
            Ok(Value::Bool(false)) => Err(deny("")),
            Ok(_) => Err(deny(": its 'allow' is no boolean")),
            Err(why) => Err(deny(&format!(": it failed: {why}"))),
        }
    }
}

fn anchor_key(path: &ResourcePath) -> String {
    format!("{}/{}", path.repository(), path.tag())
}

fn lease_of(guest: &Guest, resource: &Resource, seconds: u32) -> Lease {
    let now = now();
    Lease {
        name: String::new(),
        path: resource.path.clone(),
        version: resource.version,
        guest: guest.name(),
        measurement: guest.measurement().to_owned(),
        granted: now,
        renewed: now,
        ends: now + i64::from(seconds),
        seconds,
        revoked: None,
    }
}

fn policy_for<'a>(config: &'a Config, path: &ResourcePath) -> Result<(String, &'a Policy), ApiError> {
    resource_policy_scopes(path)
        .into_iter()
        .find_map(|(scope, key)| Some((scope, config.policy(&key)?.as_ref())))
        .ok_or_else(|| ApiError::new(403, "PolicyDeny", "this broker has no resource policy, so it releases nothing"))
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
    let module = ear.submods.get("cpu0");
    module.and_then(|module| module.evidence.get(MEASUREMENT)?.as_str()).unwrap_or_default()
}

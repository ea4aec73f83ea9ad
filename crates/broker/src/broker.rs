//! The broker, without HTTP: opened from its directory, administered directly, asked by guests through [`crate::server`].

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::sim;
use nacre_core::{
    Digest, ResourcePath, SecretBytes,
    jose::{Jwk, PrivateKey, PublicKey},
};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    AuditEntry, BrokerError, ReferenceValue, Settings,
    admin::now,
    files::{self, Keys},
    policy,
    sessions::Sessions,
    store::Store,
};

/// Bytes of a resource at most.
pub(crate) const LONGEST_RESOURCE: usize = 4 * 1024 * 1024;
/// Values of one reference value at most.
const MOST_VALUES: usize = 1024;
/// A reference value without an end of its own ends after a year.
const REFERENCE_LIFETIME: i64 = 365 * 86_400;
/// The actor of changes that are made without HTTP, by whoever can open the directory.
const LOCAL: &str = "local";

/// How a new broker is made.
#[derive(Clone, Debug, Default)]
pub struct InitOptions {
    /// Host names and addresses that the certificate is for, besides localhost.
    pub names: Vec<String>,
    /// The settings, as `broker.toml` will say them.
    pub settings: Settings,
}

/// A key broker.
pub struct Broker {
    pub(crate) settings: Settings,
    pub(crate) keys: Keys,
    pub(crate) store: Store,
    pub(crate) sessions: Sessions,
    pub(crate) verifiers: nacre_verify::Verifiers,
    dir: PathBuf,
    refusals: Mutex<Refusals>,
}

/// Refusals that anybody can cause are logged only so often, so that nobody can fill the disk with them.
struct Refusals {
    since: Instant,
    count: u32,
    suppressed: u64,
}

const MOST_REFUSALS: u32 = 120;
const REFUSALS_PER: Duration = Duration::from_secs(60);

impl Broker {
    /// Makes a broker in an empty or new directory: keys, certificate, database, default policies.
    ///
    /// # Errors
    /// [`BrokerError`], [`BrokerError::Exists`] among them.
    pub fn init(dir: &Path, options: &InitOptions) -> Result<Self, BrokerError> {
        files::create(dir, &options.names)?;
        let keys = files::read_keys(dir)?;
        let store = Store::create(&dir.join(files::DATABASE), &keys.master)?;
        for (event, key, id, text) in [
            ("attestation policy set", "attestation/default_cpu", policy::DEFAULT_CPU, policy::DEFAULT_CPU_TEXT),
            ("resource policy set", "resource", "", policy::DEFAULT_RESOURCE_TEXT),
        ] {
            store.set_policy(key, text, policy_entry(event, LOCAL, id, text))?;
        }
        files::write_settings(dir, &options.settings)?;
        Self::assemble(dir, keys, store)
    }

    /// Opens a broker. Only one process can have it open.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn open(dir: &Path) -> Result<Self, BrokerError> {
        files::read_settings(dir)?;
        let keys = files::read_keys(dir)?;
        let store = Store::open(&dir.join(files::DATABASE), &keys.master)?;
        Self::assemble(dir, keys, store)
    }

    fn assemble(dir: &Path, keys: Keys, store: Store) -> Result<Self, BrokerError> {
        let settings = files::read_settings(dir)?;
        if settings.allow_simulated {
            tracing::warn!("this broker releases resources to guests that only simulate a TEE (allow_simulated)");
        }
        let lifetime = Duration::from_secs(settings.session_lifetime_seconds.into());
        let sessions = Sessions::new(lifetime, settings.most_sessions);
        let refusals = Mutex::new(Refusals { since: Instant::now(), count: 0, suppressed: 0 });
        let verifiers = crate::verifiers::open(dir)?;
        Ok(Self { settings, keys, store, sessions, verifiers, dir: dir.to_owned(), refusals })
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The certificate that guests pin, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.keys.tls_cert_pem
    }

    /// The public key that tokens are signed with: guests pin it too.
    pub fn token_key(&self) -> PublicKey {
        self.keys.token.public()
    }

    /// Reads the administrator's private key, while it still lies where `init` put it.
    ///
    /// # Errors
    /// [`BrokerError`]: it was moved away, as it should be, or is damaged.
    pub fn admin_key(&self) -> Result<PrivateKey, BrokerError> {
        let path = self.dir.join(files::ADMIN_KEY);
        let bytes = std::fs::read(&path)
            .map(zeroize::Zeroizing::new)
            .map_err(|source| BrokerError::Io { path: path.clone(), source })?;
        Ok(PrivateKey::from_bytes(&bytes)?)
    }

    /// Keeps a resource, sealed.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn put_resource(&self, path: &ResourcePath, value: &[u8]) -> Result<(), BrokerError> {
        self.put_resource_as(LOCAL, path, value)
    }

    pub(crate) fn put_resource_as(&self, actor: &str, path: &ResourcePath, value: &[u8]) -> Result<(), BrokerError> {
        if value.len() > LONGEST_RESOURCE {
            return Err(BrokerError::Invalid(format!(
                "resource of {} bytes: at most {LONGEST_RESOURCE} are kept",
                value.len()
            )));
        }
        self.store.put_resource(path, value, entry("resource set", actor, path.to_string()))
    }

    /// Removes a resource; says whether there was one.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn delete_resource(&self, path: &ResourcePath) -> Result<bool, BrokerError> {
        self.delete_resource_as(LOCAL, path)
    }

    pub(crate) fn delete_resource_as(&self, actor: &str, path: &ResourcePath) -> Result<bool, BrokerError> {
        self.store.delete_resource(path, entry("resource deleted", actor, path.to_string()))
    }

    /// The paths of all resources.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resources(&self) -> Result<Vec<String>, BrokerError> {
        self.store.resources()
    }

    /// Sets an appraisal policy; `default_cpu` is the one that is used.
    ///
    /// # Errors
    /// [`BrokerError::Policy`] for a text that is none.
    pub fn set_attestation_policy(&self, id: &str, text: &str) -> Result<(), BrokerError> {
        self.set_attestation_policy_as(LOCAL, id, text)
    }

    pub(crate) fn set_attestation_policy_as(&self, actor: &str, id: &str, text: &str) -> Result<(), BrokerError> {
        if id != policy::DEFAULT_CPU {
            return Err(BrokerError::Invalid(format!(
                "attestation policy '{id:.100}': only {} is used",
                policy::DEFAULT_CPU
            )));
        }
        policy::check(text, policy::TRUST_CLAIMS).map_err(BrokerError::Policy)?;
        self.store.set_policy(
            &format!("attestation/{id}"),
            text,
            policy_entry("attestation policy set", actor, id, text),
        )
    }

    /// Sets the release policy of a scope: a repository, `repository/type`, a whole path, or all (an empty scope). The most specific one decides.
    ///
    /// # Errors
    /// [`BrokerError::Policy`] for a text that is none.
    pub fn set_resource_policy(&self, scope: &str, text: &str) -> Result<(), BrokerError> {
        self.set_resource_policy_as(LOCAL, scope, text)
    }

    pub(crate) fn set_resource_policy_as(&self, actor: &str, scope: &str, text: &str) -> Result<(), BrokerError> {
        policy::check(text, policy::ALLOW).map_err(BrokerError::Policy)?;
        self.store.set_policy(
            &resource_policy_key(scope)?,
            text,
            policy_entry("resource policy set", actor, scope, text),
        )
    }

    /// The release policy of exactly this scope.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resource_policy(&self, scope: &str) -> Result<Option<String>, BrokerError> {
        self.store.policy(&resource_policy_key(scope)?)
    }

    /// Sets a reference value; it ends after a year where no end (seconds since 1970) is given.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn add_reference_value(&self, id: &str, values: Vec<Value>, expires: Option<i64>) -> Result<(), BrokerError> {
        self.add_reference_value_as(LOCAL, id, values, expires)
    }

    pub(crate) fn add_reference_value_as(
        &self,
        actor: &str,
        id: &str,
        values: Vec<Value>,
        expires: Option<i64>,
    ) -> Result<(), BrokerError> {
        let fine = (1..=200).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
        if !fine || values.len() > MOST_VALUES {
            return Err(BrokerError::Invalid(format!(
                "reference value '{id:.100}': a name of 200 printable characters and {MOST_VALUES} values at most"
            )));
        }
        let value = ReferenceValue { values, expires: expires.unwrap_or_else(|| now() + REFERENCE_LIFETIME) };
        let mut entry = entry("reference value set", actor, id.to_owned());
        entry.detail = format!("{} values, until {}", value.values.len(), value.expires);
        self.store.set_reference(id, &value, entry)
    }

    /// Takes a message as Trustee's reference value provider reads it: `{"version","type":"sample","payload": base64 of {"id": value or
    /// [values]}}`, and beyond that `"expires"` in seconds since 1970.
    pub(crate) fn add_reference_message(&self, actor: &str, message: &[u8]) -> Result<(), BrokerError> {
        let invalid = |why: String| BrokerError::Invalid(format!("reference value message: {why}"));
        let message: ReferenceMessage = serde_json::from_slice(message).map_err(|e| invalid(e.to_string()))?;
        if message.kind != "sample" || !message.version.starts_with("0.1") {
            return Err(invalid("version 0.1.x and type sample are read".into()));
        }
        let payload = BASE64_STANDARD.decode(&message.payload).map_err(|e| invalid(e.to_string()))?;
        let values: std::collections::BTreeMap<String, Value> =
            serde_json::from_slice(&payload).map_err(|e| invalid(e.to_string()))?;
        for (id, value) in values {
            let values = match value {
                Value::Array(values) => values,
                one => vec![one],
            };
            self.add_reference_value_as(actor, &id, values, message.expires)?;
        }
        Ok(())
    }

    /// A reference value that has not expired.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn reference_value(&self, id: &str) -> Result<Option<ReferenceValue>, BrokerError> {
        Ok(self.store.references()?.remove(id))
    }

    /// Trusts a simulated platform. Its guests still get nothing while the settings do not allow simulation.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn add_sim_platform_key(&self, key: &PublicKey) -> Result<(), BrokerError> {
        self.add_sim_platform_key_as(LOCAL, key)
    }

    pub(crate) fn add_sim_platform_key_as(&self, actor: &str, key: &PublicKey) -> Result<(), BrokerError> {
        let name = Jwk::from_public(key).thumbprint()?;
        let mut entry = entry("platform trusted", actor, format!("{}/{name}", sim::TEE));
        entry.simulated = true;
        self.store.add_platform(sim::TEE, &name, &key.to_pem()?, entry)
    }

    /// The audit log after entry number `after`, oldest first; its chain is verified.
    ///
    /// # Errors
    /// [`BrokerError::Damaged`] when it was changed.
    pub fn audit(&self, after: u64, most: usize) -> Result<Vec<AuditEntry>, BrokerError> {
        self.store.audit_entries(after, most)
    }

    /// Logs a refusal, as long as there are not too many.
    pub(crate) fn audit_refusal(&self, mut entry: AuditEntry) {
        tracing::warn!(
            event = entry.event,
            actor = entry.actor,
            subject = entry.subject,
            detail = entry.detail,
            "refused"
        );
        {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if refusals.since.elapsed() >= REFUSALS_PER {
                refusals.since = Instant::now();
                refusals.count = 0;
            }
            if refusals.count >= MOST_REFUSALS {
                refusals.suppressed += 1;
                return;
            }
            refusals.count += 1;
            let suppressed = std::mem::take(&mut refusals.suppressed);
            if suppressed > 0 {
                entry.detail = format!("{} ({suppressed} refusals before this one were not logged)", entry.detail);
            }
        }
        if let Err(error) = self.store.audit(entry) {
            tracing::error!(%error, "a refusal could not be logged");
        }
    }

    /// A resource as it is, for whoever has the broker's directory: not how guests get it.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resource(&self, path: &ResourcePath) -> Result<Option<SecretBytes>, BrokerError> {
        self.store.resource(path)
    }
}

#[derive(Deserialize)]
struct ReferenceMessage {
    version: String,
    #[serde(rename = "type")]
    kind: String,
    payload: String,
    #[serde(default)]
    expires: Option<i64>,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").field("dir", &self.dir).finish_non_exhaustive()
    }
}

pub(crate) fn entry(event: &str, actor: &str, subject: String) -> AuditEntry {
    AuditEntry { event: event.into(), actor: actor.into(), subject, ..AuditEntry::default() }
}

fn policy_entry(event: &str, actor: &str, id: &str, text: &str) -> AuditEntry {
    AuditEntry { policy: policy_name(id, text), ..entry(event, actor, id.to_owned()) }
}

/// A policy in the audit log: its id and the start of its digest.
pub(crate) fn policy_name(id: &str, text: &str) -> String {
    format!("{}@{}", if id.is_empty() { "default" } else { id }, Digest::sha256(text.as_bytes()).short())
}

fn resource_policy_key(scope: &str) -> Result<String, BrokerError> {
    if scope.is_empty() {
        return Ok("resource".into());
    }
    // One to three segments of a path, checked by filling up the rest.
    let missing = 3usize.saturating_sub(scope.split('/').count());
    let filled = format!("{scope}{}", "/x".repeat(missing));
    filled.parse::<ResourcePath>().map_err(|e| BrokerError::Invalid(format!("policy scope: {e}")))?;
    Ok(format!("resource/{scope}"))
}

/// The keys of the release policies of a path, the most specific first.
pub(crate) fn resource_policy_scopes(path: &ResourcePath) -> [(String, String); 4] {
    let kind = format!("{}/{}", path.repository(), path.kind());
    [path.to_string(), kind, path.repository().to_owned(), String::new()].map(|scope| {
        let key = if scope.is_empty() { "resource".into() } else { format!("resource/{scope}") };
        (scope, key)
    })
}

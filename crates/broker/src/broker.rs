//! The broker, without HTTP: opened from its directory, administered directly, asked by guests through [`crate::server`].

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
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
    AuditEntry, BrokerError, PutOptions, ReferenceValue, Settings,
    admin::now,
    files::{self, Keys, OpenMaster},
    metrics::Metrics,
    policy,
    storage::{
        embedded::Embedded,
        postgres::{Address, Postgres},
    },
    store::{Store, guests::Kept, sessions::Sessions},
    tokens::KnownTokens,
};

/// Bytes of a resource at most.
pub(crate) const LONGEST_RESOURCE: usize = 4 * 1024 * 1024;
/// Values of one reference value at most.
pub(crate) const MOST_VALUES: usize = 1024;
/// A reference value without an end of its own ends after a year.
const REFERENCE_LIFETIME: i64 = 365 * 86_400;
/// The actor of changes that are made without HTTP, by whoever can open the directory.
pub(crate) const LOCAL: &str = "local";

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
    pub(crate) store: Arc<Store>,
    pub(crate) sessions: Sessions,
    pub(crate) known_tokens: KnownTokens,
    pub(crate) verifiers: nacre_verify::Verifiers,
    pub(crate) ek_roots: Option<nacre_verify::tpm::enrol::EkRoots>,
    pub(crate) metrics: Metrics,
    pub(crate) dir: PathBuf,
}

impl Broker {
    /// Makes a broker in an empty or new directory: keys, certificate, database, default policies. Its master key is in a file.
    ///
    /// # Errors
    /// [`BrokerError`], [`BrokerError::Exists`] among them.
    pub fn init(dir: &Path, options: &InitOptions) -> Result<Self, BrokerError> {
        Self::init_with(dir, options, &files::only_files)
    }

    /// [`init`](Self::init) with other master keys than files: `masters` opens what the settings name.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn init_with(dir: &Path, options: &InitOptions, masters: &OpenMaster<'_>) -> Result<Self, BrokerError> {
        files::check_settings(&options.settings).map_err(BrokerError::Invalid)?;
        files::create(dir, &options.names, &options.settings)?;
        let store = open_store(dir, &options.settings, masters, true)?;
        for (event, key, id, text) in [
            ("attestation policy set", "attestation/default_cpu", policy::DEFAULT_CPU, policy::DEFAULT_CPU_TEXT),
            ("resource policy set", "resource", "", policy::DEFAULT_RESOURCE_TEXT),
        ] {
            store.set_policy(key, text, policy_entry(event, LOCAL, id, text))?;
        }
        files::write_settings(dir, &options.settings)?;
        Self::assemble(dir, store)
    }

    /// Opens a broker. Of an embedded one, only one process can have it open.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn open(dir: &Path) -> Result<Self, BrokerError> {
        Self::open_with(dir, &files::only_files)
    }

    /// [`open`](Self::open) with other master keys than files.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn open_with(dir: &Path, masters: &OpenMaster<'_>) -> Result<Self, BrokerError> {
        let store = open_store(dir, &files::read_settings(dir)?, masters, false)?;
        Self::assemble(dir, store)
    }

    fn assemble(dir: &Path, store: Store) -> Result<Self, BrokerError> {
        let (settings, mut keys) = (files::read_settings(dir)?, files::read_keys(dir)?);
        if settings.allow_simulated {
            tracing::warn!("this broker releases resources to guests that only simulate a TEE (allow_simulated)");
        }
        let lifetime = Duration::from_secs(settings.session_lifetime_seconds.into());
        let store = Arc::new(store);
        if let Some(key) = keys.first_token.take() {
            store.keep_token_key(key)?;
            files::remove_token_key(dir)?;
        }
        let sessions = Sessions::new(store.clone(), lifetime, settings.most_sessions);
        let verifiers = crate::verifiers::open(dir)?;
        let ek_roots = crate::enrolment::roots(dir, settings.ek_roots.as_deref())?;
        Ok(Self {
            settings,
            keys,
            store,
            sessions,
            known_tokens: KnownTokens::default(),
            verifiers,
            ek_roots,
            metrics: Metrics::default(),
            dir: dir.to_owned(),
        })
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
        self.keys.token.clone()
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
        self.put_resource_as(LOCAL, path, value, PutOptions::default()).map(drop)
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
        Ok(self.resource_list("")?.into_iter().map(|resource| resource.path).collect())
    }

    /// Sets an appraisal policy: `<tee>_cpu` for a TEE's class, `default_cpu` for those that have none.
    ///
    /// # Errors
    /// [`BrokerError::Policy`] for a text that is none.
    pub fn set_attestation_policy(&self, id: &str, text: &str) -> Result<(), BrokerError> {
        self.set_attestation_policy_as(LOCAL, id, text)
    }

    pub(crate) fn set_attestation_policy_as(&self, actor: &str, id: &str, text: &str) -> Result<(), BrokerError> {
        if !policy::is_class(id) {
            return Err(BrokerError::Invalid(format!(
                "attestation policy '{id:.100}': {} and <tee>_cpu, as in snp_cpu, are used",
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
        let key = resource_policy_key(scope)?;
        Ok(self.store.config()?.policy(&key).map(|policy| policy.text().to_owned()))
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
        if !crate::reference::is_name(id) || values.len() > MOST_VALUES {
            return Err(BrokerError::Invalid(format!(
                "reference value '{id:.100}': a name of 200 printable characters and {MOST_VALUES} values at most"
            )));
        }
        let expires = expires.unwrap_or_else(|| now() + REFERENCE_LIFETIME);
        let value = ReferenceValue { values, expires, issuer: String::new() };
        if self.settings.signed_references_only {
            return Err(BrokerError::Invalid(
                "this broker takes signed reference documents only (signed_references_only in its broker.toml)".into(),
            ));
        }
        let mut entry = entry("reference value set", actor, id.to_owned());
        entry.detail = format!("{} values, until {}", value.values.len(), value.expires);
        self.store.set_reference(id, &value, entry)
    }

    /// Takes a message as Trustee's reference value provider reads it: `{"version","type":"sample","payload": base64 of {"id": value or
    /// [values]}}`, and beyond that `"expires"` in seconds since 1970.
    pub(crate) fn add_reference_message(&self, actor: &str, message: &[u8]) -> Result<(), BrokerError> {
        let invalid = |why: String| BrokerError::Invalid(format!("reference value message: {why}"));
        let message: ReferenceMessage = serde_json::from_slice(message).map_err(|e| invalid(e.to_string()))?;
        if message.kind == crate::reference::SIGNED {
            return self.import_references_as(actor, &message.payload).map(drop);
        }
        if message.kind == crate::reference::CORIM {
            let bytes = BASE64_STANDARD.decode(&message.payload).map_err(|e| invalid(e.to_string()))?;
            return self.import_corim_as(actor, &bytes).map(drop);
        }
        if message.kind != "sample" || !message.version.starts_with("0.1") {
            let kinds = format!("{} and {}", crate::reference::SIGNED, crate::reference::CORIM);
            return Err(invalid(format!("version 0.1.x and types sample, {kinds} are read")));
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
        Ok(self.store.config()?.reference(id).cloned())
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
    pub(crate) fn audit_refusal(&self, entry: AuditEntry) {
        self.audit_refusal_of(entry, None);
    }

    /// [`audit_refusal`](Self::audit_refusal), of a guest that is kept for people as well.
    pub(crate) fn audit_refusal_of(&self, entry: AuditEntry, guest: Option<Kept>) {
        tracing::warn!(
            event = entry.event,
            actor = entry.actor,
            subject = entry.subject,
            detail = entry.detail,
            "refused"
        );
        if let Err(error) = self.store.audit_refusal(entry, guest) {
            tracing::error!(%error, "a refusal could not be logged");
        }
    }

    /// The names of the master keys that open the database.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn masters(&self) -> Result<Vec<String>, BrokerError> {
        self.store.masters()
    }

    /// The name of the master key that this broker was opened with.
    pub fn master_in_use(&self) -> String {
        self.store.master_id()
    }

    /// Seals by another master key (`file:PATH`, made where it is not there, or what `masters` opens) and names it in the settings. The old
    /// one opens nothing any more, unless it is kept for replicas that still have it. With `reseal`, every record is sealed anew, too.
    ///
    /// # Errors
    /// [`BrokerError`]; a rotation that failed leaves a broker that opens with the old or with both.
    pub fn rotate_master(
        &self,
        name: &str,
        masters: &OpenMaster<'_>,
        keep_old: bool,
        reseal: bool,
    ) -> Result<(), BrokerError> {
        let settings = Settings { master_key: name.to_owned(), ..self.settings.clone() };
        files::make_master(&self.dir, &settings)?;
        let (old, new) = (self.store.master_id(), files::open_master(&self.dir, &settings, masters)?);
        if new.id() == old {
            return Err(BrokerError::Invalid(format!("{} is the master key that is in use", new.describe())));
        }
        self.store.add_master(&new, entry("master key added", LOCAL, new.id()))?;
        // Both open the database until the settings name the new one.
        files::replace_setting(&self.dir, "master_key", name)?;
        if !keep_old {
            self.store.remove_master(&old, entry("master key forgotten", LOCAL, old.clone()))?;
        }
        if reseal {
            self.store.new_data_key(entry("records sealed anew", LOCAL, String::new()))?;
        }
        Ok(())
    }

    /// Lets a master key open the database no more.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] for the one in use, and for one that opens nothing.
    pub fn forget_master(&self, name: &str) -> Result<(), BrokerError> {
        self.store.remove_master(name, entry("master key forgotten", LOCAL, name.to_owned()))
    }

    /// Where the database is, for people.
    pub fn database(&self) -> String {
        self.store.describe()
    }

    /// A resource as it is, for whoever has the broker's directory: not how guests get it.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn resource(&self, path: &ResourcePath) -> Result<Option<SecretBytes>, BrokerError> {
        Ok(self.store.resource(path, None)?.map(|(_, value)| value))
    }
}

fn open_store(dir: &Path, settings: &Settings, masters: &OpenMaster<'_>, new: bool) -> Result<Store, BrokerError> {
    let master = files::open_master(dir, settings, masters)?;
    match &settings.database {
        Some(url) => {
            let file = |name: &Option<PathBuf>| name.as_ref().map(|name| dir.join(name));
            let (password, ca) = (file(&settings.database_password_file), file(&settings.database_ca));
            let address = Address::parse(url, password.as_ref(), ca.as_ref())?;
            Store::open(Postgres::open(address)?, master)
        }
        None if new => Store::open(Embedded::create(&dir.join(files::DATABASE))?, master),
        None => Store::open(Embedded::open(&dir.join(files::DATABASE))?, master),
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

pub(crate) fn resource_policy_key(scope: &str) -> Result<String, BrokerError> {
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

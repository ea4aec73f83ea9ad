//! The broker's database (redb): everything but keys and settings.
//!
//! ```text
//! table        key                      value
//! meta         "format"                 "nacre-broker-1"
//! resources    repository/type/tag      nonce ‖ AES-256-GCM(master key, resource) ‖ tag, AAD = "nacre-broker resource " ‖ key
//! policies     attestation/<id>         Rego
//!              resource[/<scope>]       Rego; the scope is a repository, repository/type or a whole path
//! references   id                       JSON {"values":[…],"expires":seconds since 1970}
//! platforms    tee/thumbprint           PEM public key
//! audit        number, from 1           JSON [`AuditEntry`]; `previous` chains the entries by SHA-256
//! ```
//!
//! Every change is one transaction, on disk when the call returns, with its audit entry in it. Sealed values cannot be moved to
//! another path. Random nonces: 2^32 resources under one master key.

use std::{collections::BTreeMap, path::Path};

use nacre_core::{Digest, ResourcePath, SecretArray, SecretBytes, aead::AeadKey};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{BrokerError, admin::now};

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const RESOURCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("resources");
const POLICIES: TableDefinition<'_, &str, &str> = TableDefinition::new("policies");
const REFERENCES: TableDefinition<'_, &str, &str> = TableDefinition::new("references");
const PLATFORMS: TableDefinition<'_, &str, &str> = TableDefinition::new("platforms");
const AUDIT: TableDefinition<'_, u64, &str> = TableDefinition::new("audit");
const FORMAT: &str = "nacre-broker-1";

/// A reference value: what a measurement is compared with.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceValue {
    /// The values that are good.
    pub values: Vec<Value>,
    /// When they cease to be, in seconds since 1970.
    pub expires: i64,
}

/// One line of the audit log.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct AuditEntry {
    /// From 1, without gaps.
    #[serde(default)]
    pub number: u64,
    /// Seconds since 1970.
    #[serde(default)]
    pub time: i64,
    /// `attested`, `attestation refused`, `released`, `release refused`, or what an administrator did.
    pub event: String,
    /// Who: a guest (`<tee>:<TEE key's thumbprint>`), an administrator, or `local`.
    pub actor: String,
    /// What it is about: a resource's path, a policy's or a reference value's id.
    #[serde(default)]
    pub subject: String,
    /// The guest's measurement.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub measurement: String,
    /// The policy that decided, with the start of its digest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// Why, or what came of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Whether the guest only simulates a TEE.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simulated: bool,
    /// SHA-256 of the entry before, as it is stored.
    #[serde(default)]
    pub previous: String,
}

pub(crate) struct Store {
    database: Database,
    master: AeadKey,
}

fn fail<E: Into<redb::Error>>(doing: &'static str) -> impl Fn(E) -> BrokerError {
    move |error| BrokerError::Database { doing, source: Box::new(error.into()) }
}

fn resource_aad(path: &str) -> Vec<u8> {
    format!("nacre-broker resource {path}").into_bytes()
}

impl Store {
    pub(crate) fn create(path: &Path, master: &SecretArray<32>) -> Result<Self, BrokerError> {
        let database = Database::create(path).map_err(fail("create"))?;
        let store = Self { database, master: AeadKey::new(master) };
        let write = store.begin()?;
        write.open_table(META).map_err(fail("create"))?.insert("format", FORMAT).map_err(fail("create"))?;
        write.open_table(RESOURCES).map_err(fail("create"))?;
        write.open_table(POLICIES).map_err(fail("create"))?;
        write.open_table(REFERENCES).map_err(fail("create"))?;
        write.open_table(PLATFORMS).map_err(fail("create"))?;
        write.open_table(AUDIT).map_err(fail("create"))?;
        write.commit().map_err(fail("create"))?;
        Ok(store)
    }

    pub(crate) fn open(path: &Path, master: &SecretArray<32>) -> Result<Self, BrokerError> {
        let database = Database::open(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => BrokerError::Running(path.to_owned()),
            other => fail("open")(other),
        })?;
        let store = Self { database, master: AeadKey::new(master) };
        match store.get(META, "format")? {
            Some(format) if format == FORMAT => Ok(store),
            other => {
                Err(BrokerError::Damaged { what: "its format".into(), why: format!("{other:?} instead of {FORMAT}") })
            }
        }
    }

    fn begin(&self) -> Result<WriteTransaction, BrokerError> {
        self.database.begin_write().map_err(fail("begin"))
    }

    fn get(&self, table: TableDefinition<'_, &str, &str>, key: &str) -> Result<Option<String>, BrokerError> {
        let read = self.database.begin_read().map_err(fail("read"))?;
        let table = read.open_table(table).map_err(fail("read"))?;
        Ok(table.get(key).map_err(fail("read"))?.map(|value| value.value().to_owned()))
    }

    /// All entries of a table whose keys start so.
    fn list(
        &self,
        table: TableDefinition<'_, &str, &str>,
        prefix: &str,
    ) -> Result<BTreeMap<String, String>, BrokerError> {
        let read = self.database.begin_read().map_err(fail("read"))?;
        let table = read.open_table(table).map_err(fail("read"))?;
        let mut found = BTreeMap::new();
        for entry in table.range(prefix..).map_err(fail("read"))? {
            let (key, value) = entry.map_err(fail("read"))?;
            if !key.value().starts_with(prefix) {
                break;
            }
            found.insert(key.value().to_owned(), value.value().to_owned());
        }
        Ok(found)
    }

    /// Sets or removes a text, with its audit entry.
    fn set(
        &self,
        table: TableDefinition<'_, &str, &str>,
        key: &str,
        value: Option<&str>,
        entry: AuditEntry,
    ) -> Result<bool, BrokerError> {
        let write = self.begin()?;
        let existed = {
            let mut table = write.open_table(table).map_err(fail("write"))?;
            let before = match value {
                Some(value) => table.insert(key, value),
                None => table.remove(key),
            };
            before.map_err(fail("write"))?.is_some()
        };
        append(&write, entry)?;
        write.commit().map_err(fail("commit"))?;
        Ok(existed)
    }

    pub(crate) fn put_resource(&self, path: &ResourcePath, value: &[u8], entry: AuditEntry) -> Result<(), BrokerError> {
        let key = path.to_string();
        let sealed = self.master.seal_random(&resource_aad(&key), value);
        let write = self.begin()?;
        write
            .open_table(RESOURCES)
            .map_err(fail("write"))?
            .insert(key.as_str(), sealed.as_slice())
            .map_err(fail("write"))?;
        append(&write, entry)?;
        write.commit().map_err(fail("commit"))
    }

    pub(crate) fn delete_resource(&self, path: &ResourcePath, entry: AuditEntry) -> Result<bool, BrokerError> {
        let write = self.begin()?;
        let existed = write
            .open_table(RESOURCES)
            .map_err(fail("write"))?
            .remove(path.to_string().as_str())
            .map_err(fail("write"))?
            .is_some();
        append(&write, entry)?;
        write.commit().map_err(fail("commit"))?;
        Ok(existed)
    }

    pub(crate) fn resource(&self, path: &ResourcePath) -> Result<Option<SecretBytes>, BrokerError> {
        let key = path.to_string();
        let read = self.database.begin_read().map_err(fail("read"))?;
        let table = read.open_table(RESOURCES).map_err(fail("read"))?;
        let Some(sealed) = table.get(key.as_str()).map_err(fail("read"))? else { return Ok(None) };
        let mut plain =
            self.master.open_random(&resource_aad(&key), sealed.value()).map_err(|_| BrokerError::Sealed(key))?;
        Ok(Some(SecretBytes::new(std::mem::take(&mut *plain))))
    }

    pub(crate) fn resources(&self) -> Result<Vec<String>, BrokerError> {
        let read = self.database.begin_read().map_err(fail("read"))?;
        let table = read.open_table(RESOURCES).map_err(fail("read"))?;
        table.iter().map_err(fail("read"))?.map(|entry| Ok(entry.map_err(fail("read"))?.0.value().to_owned())).collect()
    }

    pub(crate) fn set_policy(&self, key: &str, text: &str, entry: AuditEntry) -> Result<(), BrokerError> {
        self.set(POLICIES, key, Some(text), entry).map(drop)
    }

    pub(crate) fn policy(&self, key: &str) -> Result<Option<String>, BrokerError> {
        self.get(POLICIES, key)
    }

    pub(crate) fn set_reference(&self, id: &str, value: &ReferenceValue, entry: AuditEntry) -> Result<(), BrokerError> {
        let text = serde_json::to_string(value).map_err(|e| BrokerError::Invalid(e.to_string()))?;
        self.set(REFERENCES, id, Some(&text), entry).map(drop)
    }

    /// The reference values that have not expired.
    pub(crate) fn references(&self) -> Result<BTreeMap<String, ReferenceValue>, BrokerError> {
        let now = now();
        let mut live = BTreeMap::new();
        for (id, text) in self.list(REFERENCES, "")? {
            let value: ReferenceValue = serde_json::from_str(&text)
                .map_err(|e| BrokerError::Damaged { what: format!("reference value {id}"), why: e.to_string() })?;
            if value.expires > now {
                live.insert(id, value);
            }
        }
        Ok(live)
    }

    pub(crate) fn add_platform(&self, tee: &str, name: &str, pem: &str, entry: AuditEntry) -> Result<(), BrokerError> {
        self.set(PLATFORMS, &format!("{tee}/{name}"), Some(pem), entry).map(drop)
    }

    pub(crate) fn platforms(&self, tee: &str) -> Result<Vec<String>, BrokerError> {
        Ok(self.list(PLATFORMS, &format!("{tee}/"))?.into_values().collect())
    }

    /// Adds an entry of its own; it is on disk when this returns.
    pub(crate) fn audit(&self, entry: AuditEntry) -> Result<(), BrokerError> {
        let write = self.begin()?;
        append(&write, entry)?;
        write.commit().map_err(fail("commit"))
    }

    /// Entries after number `after`, oldest first. The chain is verified on the way.
    pub(crate) fn audit_entries(&self, after: u64, most: usize) -> Result<Vec<AuditEntry>, BrokerError> {
        let read = self.database.begin_read().map_err(fail("read"))?;
        let table = read.open_table(AUDIT).map_err(fail("read"))?;
        let mut entries = Vec::new();
        let mut previous = match table.get(after).map_err(fail("read"))? {
            Some(text) => Some(Digest::sha256(text.value().as_bytes()).hex()),
            None if after == 0 => Some(String::new()),
            None => None,
        };
        for item in table.range(after.saturating_add(1)..).map_err(fail("read"))?.take(most) {
            let (number, text) = item.map_err(fail("read"))?;
            let damaged =
                |why: &str| BrokerError::Damaged { what: format!("audit entry {}", number.value()), why: why.into() };
            let entry: AuditEntry = serde_json::from_str(text.value()).map_err(|e| damaged(&e.to_string()))?;
            if entry.number != number.value() || previous.is_some_and(|hash| hash != entry.previous) {
                return Err(damaged("it does not follow from the entry before"));
            }
            previous = Some(Digest::sha256(text.value().as_bytes()).hex());
            entries.push(entry);
        }
        Ok(entries)
    }
}

fn append(write: &WriteTransaction, mut entry: AuditEntry) -> Result<(), BrokerError> {
    let mut table = write.open_table(AUDIT).map_err(fail("audit"))?;
    let (number, previous) = match table.last().map_err(fail("audit"))? {
        Some((number, text)) => (number.value() + 1, Digest::sha256(text.value().as_bytes()).hex()),
        None => (1, String::new()),
    };
    entry.number = number;
    entry.time = now();
    entry.previous = previous;
    let text = serde_json::to_string(&entry).map_err(|e| BrokerError::Invalid(e.to_string()))?;
    table.insert(number, text.as_str()).map_err(fail("audit"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_resource_cannot_be_moved_or_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.redb");
        let master = SecretArray::random();
        let store = Store::create(&file, &master).unwrap();
        let [a, b]: [ResourcePath; 2] = ["r/k/a", "r/k/b"].map(|text| text.parse().unwrap());
        store.put_resource(&a, b"hunter2", AuditEntry::default()).unwrap();
        assert_eq!(store.resource(&a).unwrap().unwrap().expose(), b"hunter2");
        assert!(store.resource(&b).unwrap().is_none());
        let write = store.begin().unwrap();
        {
            let mut table = write.open_table(RESOURCES).unwrap();
            let sealed = table.get("r/k/a").unwrap().unwrap().value().to_vec();
            table.insert("r/k/b", sealed.as_slice()).unwrap();
        }
        write.commit().unwrap();
        assert!(matches!(store.resource(&b), Err(BrokerError::Sealed(_))));
        drop(store);
        assert!(!std::fs::read(&file).unwrap().windows(7).any(|window| window == b"hunter2"));
        let store = Store::open(&file, &SecretArray::random()).unwrap();
        assert!(matches!(store.resource(&a), Err(BrokerError::Sealed(_))));
    }

    #[test]
    fn the_audit_log_is_a_chain() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("x.redb"), &SecretArray::random()).unwrap();
        for event in ["a", "b", "c"] {
            store.audit(AuditEntry { event: event.into(), ..AuditEntry::default() }).unwrap();
        }
        let events = |after| store.audit_entries(after, 10).unwrap().into_iter().map(|e| e.event).collect::<String>();
        assert_eq!((events(0), events(1), events(3)), ("abc".into(), "bc".into(), String::new()));
        let write = store.begin().unwrap();
        {
            let mut table = write.open_table(AUDIT).unwrap();
            let text = table.get(2).unwrap().unwrap().value().replace(r#""b""#, r#""x""#);
            table.insert(2, text.as_str()).unwrap();
        }
        write.commit().unwrap();
        assert!(matches!(store.audit_entries(0, 10), Err(BrokerError::Damaged { .. })));
    }
}

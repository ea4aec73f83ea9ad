//! What the broker keeps, on any [`Storage`]: records, sealed one and all.
//!
//! | module | what |
//! |---|---|
//! | `keyring` | data keys, wrapped by master keys; how a record is sealed |
//! | `audit` | the audit log, a chain |
//! | `config` | policies, reference values, platforms: what decides, held in memory as of a revision |
//! | `resources` | resources and their versions |
//! | `leases`, `anchors` | who holds a resource until when; how far volumes have come |
//! | `tokens` | the keys that sign attestation tokens |
//! | `sessions` | nonces that work once |
//! | `guests` | what was found of guests, for people |
//! | `migrate` | what format 1 kept, sealed as format 2 does |
//!
//! Invariants: a record opens only at the table and key that it was sealed for, so that whoever writes to the database can neither
//! make one nor move one, only remove it or put an older one of the same place back; a change has its audit entry in the same transaction.

pub(crate) mod anchors;
pub(crate) mod audit;
pub(crate) mod config;
pub(crate) mod guests;
pub(crate) mod keyring;
pub(crate) mod leases;
mod migrate;
pub(crate) mod resources;
pub(crate) mod sessions;
pub(crate) mod tokens;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use nacre_core::SecretBytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    ApiError, BrokerError, MasterKey,
    storage::{Database, Lane, Storage, StorageError, Table, Tx},
};
pub use audit::AuditEntry;
use config::Config;
pub use config::ReferenceValue;
use keyring::{Keyring, Keys};

/// Rows of one kind that are held in memory at most.
const MOST_ROWS: usize = 100_000;

/// A part of a list: what comes after a name, so many at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) after: Option<String>,
    pub(crate) most: usize,
}

impl Page {
    /// All there is.
    pub(crate) const ALL: Self = Self { after: None, most: MOST_ROWS };

    /// As a query says it: `after=NAME&most=N`.
    pub(crate) fn of(query: &BTreeMap<String, String>) -> Result<Self, ApiError> {
        let most = query.get("most").map_or(Ok(MOST_ROWS), |text| text.parse::<usize>());
        let most = most.ok().filter(|most| (1..=MOST_ROWS).contains(most));
        let most = most.ok_or_else(|| ApiError::bad_request(format!("most: a number from 1 to {MOST_ROWS}")))?;
        Ok(Self { after: query.get("after").filter(|after| !after.is_empty()).cloned(), most })
    }
}

/// The broker's records.
pub(crate) struct Store {
    database: Database,
    keys: Arc<Keys>,
    config: Mutex<Option<Arc<Config>>>,
    refusals: audit::Refusals,
    leases: leases::Cursor,
}

impl Store {
    /// Opens the records in a storage; a new one gets its data key, one of format 1 its new form.
    pub(crate) fn open(storage: impl Storage + 'static, master: Arc<dyn MasterKey>) -> Result<Self, BrokerError> {
        let database = Database::new(storage);
        migrate::check_master(&database, master.as_ref())?;
        let keyring = Keyring::load_or_make(&database, master.as_ref())?;
        let keys = Arc::new(Keys::new(keyring, master));
        migrate::seal_what_is_plain(&database, &keys)?;
        Ok(Self {
            database,
            keys,
            config: Mutex::default(),
            refusals: audit::Refusals::default(),
            leases: leases::Cursor::default(),
        })
    }

    /// Whether the storage is one that replicas share.
    pub(crate) fn is_shared(&self) -> bool {
        self.database.is_shared()
    }

    pub(crate) fn describe(&self) -> String {
        self.database.describe()
    }

    /// Whether the database answers.
    pub(crate) fn probe(&self) -> Result<(), BrokerError> {
        self.database.view(|tx| Ok(tx.get(Table::Meta, "revision").map(drop)?))
    }

    /// Reads records.
    pub(crate) fn view<T>(
        &self,
        mut look: impl FnMut(&mut Records<'_, '_>) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        self.database.view(|tx| look(&mut Records { tx, keys: &self.keys }))
    }

    /// Changes records, durably when this returns; the audit entry is part of it.
    pub(crate) fn change<T: Send + 'static>(
        &self,
        entry: AuditEntry,
        mut change: impl FnMut(&mut Records<'_, '_>) -> Result<T, BrokerError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        self.update(Lane::Log, move |records| {
            let value = change(records)?;
            audit::append(records.tx, entry.clone())?;
            Ok(value)
        })
    }

    /// Changes records without an audit entry, or with more than one.
    pub(crate) fn update<T: Send + 'static>(
        &self,
        lane: Lane,
        mut change: impl FnMut(&mut Records<'_, '_>) -> Result<T, BrokerError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let (keys, shared) = (self.keys.clone(), self.is_shared());
        self.database.update(lane, move |tx| {
            if shared {
                keys.follow(tx)?;
            }
            change(&mut Records { tx, keys: &keys })
        })
    }

    /// The configuration, as it is committed.
    pub(crate) fn config(&self) -> Result<Arc<Config>, BrokerError> {
        let held = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let current = self.view(|records| config::revision(records.tx))?;
        if let Some(held) = held.filter(|held| held.revision == current) {
            return Ok(held);
        }
        let loaded = Arc::new(self.view(Config::load)?);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Some(loaded.clone());
        Ok(loaded)
    }
}

/// A transaction that opens and seals.
pub(crate) struct Records<'a, 'b> {
    pub(crate) tx: &'a mut Tx<'b>,
    keys: &'a Keys,
}

impl Records<'_, '_> {
    pub(crate) fn get(&mut self, table: Table, key: impl AsRef<[u8]>) -> Result<Option<SecretBytes>, BrokerError> {
        let key = key.as_ref();
        let Some(sealed) = self.tx.get(table, key)? else { return Ok(None) };
        self.keys.open(self.tx, table, key, &sealed).map(Some)
    }

    pub(crate) fn put(&mut self, table: Table, key: impl AsRef<[u8]>, value: &[u8]) -> Result<(), BrokerError> {
        let key = key.as_ref();
        let sealed = self.keys.seal(table, key, value)?;
        self.tx.put(table, key, sealed);
        Ok(())
    }

    pub(crate) fn delete(&mut self, table: Table, key: impl AsRef<[u8]>) -> Result<bool, BrokerError> {
        let key = key.as_ref();
        let existed = self.tx.get(table, key)?.is_some();
        if existed {
            self.tx.delete(table, key);
        }
        Ok(existed)
    }

    pub(crate) fn get_json<T: DeserializeOwned>(
        &mut self,
        table: Table,
        key: impl AsRef<[u8]>,
    ) -> Result<Option<T>, BrokerError> {
        let key = key.as_ref();
        self.get(table, key)?.map(|bytes| from_json(table, key, bytes.expose())).transpose()
    }

    pub(crate) fn put_json(
        &mut self,
        table: Table,
        key: impl AsRef<[u8]>,
        value: &impl Serialize,
    ) -> Result<(), BrokerError> {
        let text = serde_json::to_vec(value).map_err(|e| BrokerError::Invalid(e.to_string()))?;
        self.put(table, key, &text)
    }

    /// Opened rows whose keys begin with `prefix` and come after `after`.
    pub(crate) fn list(
        &mut self,
        table: Table,
        prefix: &str,
        after: Option<&[u8]>,
        most: usize,
    ) -> Result<Vec<(String, SecretBytes)>, BrokerError> {
        let rows = self.tx.list(table, prefix, after, most)?;
        rows.into_iter()
            .map(|(key, sealed)| {
                let value = self.keys.open(self.tx, table, &key, &sealed)?;
                Ok((String::from_utf8_lossy(&key).into_owned(), value))
            })
            .collect()
    }
}

pub(crate) fn from_json<T: DeserializeOwned>(table: Table, key: &[u8], bytes: &[u8]) -> Result<T, BrokerError> {
    serde_json::from_slice(bytes).map_err(|e| BrokerError::Damaged {
        what: format!("{} {}", table.name(), String::from_utf8_lossy(key)),
        why: e.to_string(),
    })
}

impl From<StorageError> for BrokerError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

#[cfg(test)]
mod tests;

//! Data keys seal the records; master keys wrap the data keys.
//!
//! ```text
//! keys  data/<number>/<master key's id>   the data key of that number, wrapped
//! meta  data-key                          the number of the one that seals, decimal
//! record = number (u32 LE) ‖ nonce (12) ‖ AES-256-GCM ciphertext ‖ tag (16)
//!          key = HMAC-SHA-256(data key, "nacre-broker record" 0x00 table 0x00 key), AAD = number
//! ```
//!
//! A key of its own for each record: 2^32 values of one record may be sealed with random nonces, and a record opens at its own place only.
//! Another master key wraps the same data keys anew; nothing else is written then. A data key is replaced by sealing all records anew.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use nacre_core::{SecretArray, SecretBytes, aead::AeadKey};
use ring::hmac;

use crate::{
    BrokerError, MasterKey,
    storage::{Database, Lane, Table, Tx},
};

const NUMBER: usize = 4;

/// The data keys.
pub(crate) struct Keyring {
    active: u32,
    keys: BTreeMap<u32, hmac::Key>,
}

fn data_key(number: u32) -> String {
    format!("data/{number}/")
}

/// What a wrapped data key is bound to.
fn label(number: u32) -> String {
    format!("nacre-broker data key {number}")
}

impl Keyring {
    /// Loads the data keys; makes the first one in a database that has none.
    pub(super) fn load_or_make(database: &Database, master: &dyn MasterKey) -> Result<Self, BrokerError> {
        if let Some(keyring) = database.view(|tx| Self::load(tx, master))? {
            return Ok(keyring);
        }
        // Wrapped before the transaction, which may run more than once.
        let wrapped = master.wrap(&label(1), &SecretArray::random())?;
        let id = master.id();
        database.update(Lane::Log, move |tx| {
            // Another replica may have been first.
            if tx.get(Table::Meta, "data-key")?.is_none() {
                tx.put(Table::Meta, "data-key", "1");
                tx.put(Table::Keys, data_key(1) + &id, wrapped.clone());
            }
            Ok(())
        })?;
        database
            .view(|tx| Self::load(tx, master))?
            .ok_or_else(|| BrokerError::Damaged { what: "its data key".into(), why: "it is gone again".into() })
    }

    fn load(tx: &mut Tx<'_>, master: &dyn MasterKey) -> Result<Option<Self>, BrokerError> {
        let Some(active) = tx.get(Table::Meta, "data-key")? else { return Ok(None) };
        let damaged = |why: &str| BrokerError::Damaged { what: "its data keys".into(), why: why.into() };
        let active = std::str::from_utf8(&active).ok().and_then(|text| text.parse().ok());
        let active: u32 = active.ok_or_else(|| damaged("the number of the one in use is none"))?;
        let (mut keys, mut others) = (BTreeMap::new(), Vec::new());
        for (name, wrapped) in tx.list(Table::Keys, "data/", None, super::MOST_ROWS)? {
            let name = String::from_utf8_lossy(&name).into_owned();
            let mut parts = name.splitn(3, '/').skip(1);
            let number: Option<u32> = parts.next().and_then(|number| number.parse().ok());
            let (Some(number), Some(id)) = (number, parts.next()) else { return Err(damaged("a name is none")) };
            if id == master.id() {
                let key = master.unwrap(&label(number), &wrapped)?;
                keys.insert(number, hmac::Key::new(hmac::HMAC_SHA256, key.expose()));
            } else if !others.contains(&id.to_owned()) {
                others.push(id.to_owned());
            }
        }
        if !keys.contains_key(&active) {
            return Err(BrokerError::OtherMasterKey { ours: master.describe(), others: others.join(", ") });
        }
        Ok(Some(Self { active, keys }))
    }

    fn seal(&self, number: u32, table: Table, key: &[u8], value: &[u8]) -> Result<Vec<u8>, BrokerError> {
        let record = self.record_key(number, table, key).ok_or_else(|| sealed(table, key))?;
        let number = number.to_le_bytes();
        Ok([&number[..], &record.seal_random(&number, value)].concat())
    }

    fn record_key(&self, number: u32, table: Table, key: &[u8]) -> Option<AeadKey> {
        let mut context = hmac::Context::with_key(self.keys.get(&number)?);
        for part in [b"nacre-broker record\0", table.name().as_bytes(), b"\0", key] {
            context.update(part);
        }
        let derived = SecretArray::<32>::fill(|slot| slot.copy_from_slice(context.sign().as_ref()));
        Some(AeadKey::new(&derived))
    }
}

/// The data keys as they are known; another replica may have made a new one.
pub(crate) struct Keys {
    keyring: RwLock<Keyring>,
    master: RwLock<Arc<dyn MasterKey>>,
}

impl Keys {
    pub(super) fn new(keyring: Keyring, master: Arc<dyn MasterKey>) -> Self {
        Self { keyring: RwLock::new(keyring), master: RwLock::new(master) }
    }

    pub(super) fn master(&self) -> Arc<dyn MasterKey> {
        self.master.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keyring(&self) -> RwLockReadGuard<'_, Keyring> {
        self.keyring.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn seal(&self, table: Table, key: &[u8], value: &[u8]) -> Result<Vec<u8>, BrokerError> {
        let keyring = self.keyring();
        keyring.seal(keyring.active, table, key, value)
    }

    /// Opens a record; loads the data keys again where one is needed that is not known yet.
    pub(super) fn open(
        &self,
        tx: &mut Tx<'_>,
        table: Table,
        key: &[u8],
        bytes: &[u8],
    ) -> Result<SecretBytes, BrokerError> {
        let (number, rest) = bytes.split_first_chunk::<NUMBER>().ok_or_else(|| sealed(table, key))?;
        let known = u32::from_le_bytes(*number);
        if !self.keyring().keys.contains_key(&known) {
            self.reload(tx)?;
        }
        let record = self.keyring().record_key(known, table, key).ok_or_else(|| sealed(table, key))?;
        let mut plain = record.open_random(number, rest).map_err(|_| sealed(table, key))?;
        Ok(SecretBytes::new(std::mem::take(&mut *plain)))
    }

    /// Sees to it that what is written is sealed with the data key that is in use by now: one that a replica replaced is known to nobody soon.
    pub(super) fn follow(&self, tx: &mut Tx<'_>) -> Result<(), BrokerError> {
        let active = tx.get(Table::Meta, "data-key")?.unwrap_or_default();
        if active != self.keyring().active.to_string().as_bytes() {
            self.reload(tx)?;
        }
        Ok(())
    }

    fn reload(&self, tx: &mut Tx<'_>) -> Result<(), BrokerError> {
        let master = self.master();
        if let Some(loaded) = Keyring::load(tx, master.as_ref())? {
            let mut keyring = self.keyring.write().unwrap_or_else(PoisonError::into_inner);
            keyring.active = loaded.active;
            keyring.keys.extend(loaded.keys);
        }
        Ok(())
    }

    /// The data keys, wrapped by another master key: rows to write.
    fn wrapped_by(&self, database: &Database, new: &dyn MasterKey) -> Result<Vec<(String, Vec<u8>)>, BrokerError> {
        let (master, mut rows) = (self.master(), Vec::new());
        let id = master.id();
        for (name, wrapped) in database.view(|tx| Ok(tx.list(Table::Keys, "data/", None, super::MOST_ROWS)?))? {
            let name = String::from_utf8_lossy(&name).into_owned();
            let number = name.strip_suffix(&id).and_then(|start| start.strip_prefix("data/")?.strip_suffix('/'));
            if let Some(number) = number.and_then(|number| number.parse::<u32>().ok()) {
                let key = master.unwrap(&label(number), &wrapped)?;
                rows.push((data_key(number) + &new.id(), new.wrap(&label(number), &key)?));
            }
        }
        Ok(rows)
    }
}

fn sealed(table: Table, key: &[u8]) -> BrokerError {
    BrokerError::Sealed(format!("{} {}", table.name(), String::from_utf8_lossy(key)))
}

impl super::Store {
    /// Wraps the data keys by another master key too. Brokers with either of them can open the database from here on.
    pub(crate) fn add_master(&self, new: &Arc<dyn MasterKey>, entry: super::AuditEntry) -> Result<(), BrokerError> {
        let rows = self.keys.wrapped_by(&self.database, new.as_ref())?;
        self.change(entry, move |records| {
            for (name, wrapped) in &rows {
                records.tx.put(Table::Keys, name.as_str(), wrapped.as_slice());
            }
            Ok(())
        })?;
        *self.keys.master.write().unwrap_or_else(PoisonError::into_inner) = new.clone();
        Ok(())
    }

    /// Forgets what a master key wrapped, so that it opens nothing any more.
    pub(crate) fn remove_master(&self, id: &str, entry: super::AuditEntry) -> Result<(), BrokerError> {
        if id == self.keys.master().id() {
            return Err(BrokerError::Invalid(format!(
                "master key {id} is the one in use: rotate to another one first"
            )));
        }
        let id = id.to_owned();
        self.change(entry, move |records| {
            let rows = records.tx.list(Table::Keys, "data/", None, super::MOST_ROWS)?;
            let end = format!("/{id}");
            let gone: Vec<_> = rows.into_iter().filter(|(name, _)| name.ends_with(end.as_bytes())).collect();
            if gone.is_empty() {
                return Err(BrokerError::Invalid(format!("no data key is wrapped by a master key {id}")));
            }
            gone.into_iter().for_each(|(name, _)| records.tx.delete(Table::Keys, name));
            Ok(())
        })
    }

    /// The id of the master key that this store was opened with.
    pub(crate) fn master_id(&self) -> String {
        self.keys.master().id()
    }

    /// The ids of the master keys that open this database.
    pub(crate) fn masters(&self) -> Result<Vec<String>, BrokerError> {
        let rows = self.database.view(|tx| Ok(tx.list(Table::Keys, "data/", None, super::MOST_ROWS)?))?;
        let mut ids: Vec<String> = rows
            .iter()
            .filter_map(|(name, _)| std::str::from_utf8(name).ok()?.splitn(3, '/').nth(2).map(str::to_owned))
            .collect();
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// Makes a new data key and seals every record with it, in one transaction; the old data key is forgotten.
    pub(crate) fn new_data_key(&self, entry: super::AuditEntry) -> Result<(), BrokerError> {
        let masters = self.masters()?;
        let (master, new) = (self.keys.master(), SecretArray::<32>::random());
        if masters.iter().any(|id| *id != master.id()) {
            return Err(BrokerError::Invalid(format!(
                "data keys are wrapped by several master keys ({}): remove all but the one in use first",
                masters.join(", ")
            )));
        }
        let number = self.keys.keyring().active + 1;
        let wrapped = master.wrap(&label(number), &new)?;
        let (id, keys) = (master.id(), self.keys.clone());
        // Known from here on, in use only when it is committed.
        self.keys
            .keyring
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .keys
            .insert(number, hmac::Key::new(hmac::HMAC_SHA256, new.expose()));
        self.change(entry, move |records| {
            let mut rows = Vec::new();
            for table in
                Table::ALL.into_iter().filter(|table| !matches!(table, Table::Meta | Table::Keys | Table::Audit))
            {
                rows.extend(records.tx.list(table, "", None, usize::MAX)?.into_iter().map(|row| (table, row)));
            }
            rows.extend(
                records
                    .tx
                    .list(Table::Keys, "token", None, super::MOST_ROWS)?
                    .into_iter()
                    .map(|row| (Table::Keys, row)),
            );
            for (table, (key, old)) in rows {
                let plain = keys.open(records.tx, table, &key, &old)?;
                let new = keys.keyring().seal(number, table, &key, plain.expose())?;
                records.tx.put(table, key, new);
            }
            for (name, _) in records.tx.list(Table::Keys, "data/", None, super::MOST_ROWS)? {
                records.tx.delete(Table::Keys, name);
            }
            records.tx.put(Table::Keys, data_key(number) + &id, wrapped.as_slice());
            records.tx.put(Table::Meta, "data-key", number.to_string());
            Ok(())
        })?;
        self.database.view(|tx| self.keys.reload(tx))
    }
}

//! Leases: who holds which resource, and until when.
//!
//! ```text
//! leases  SHA-256 of the lease's id, hex   JSON [`Lease`]
//! ```
//!
//! A guest knows the id (32 random bytes, base64url) and shows it to renew; the database knows its hash, whose start is the lease's name
//! for people. A lease that ended stays for a day, so that its guest is told why, and goes when others come.

use std::sync::atomic::{AtomicU64, Ordering};

use nacre_core::{Digest, SecretArray, jose::b64};
use serde::{Deserialize, Serialize};

use super::{AuditEntry, MOST_ROWS, Page, Records, Store, audit, from_json};
use crate::{
    BrokerError,
    admin::now,
    storage::{Lane, Table},
};

/// A lease that ended is kept for so long.
const KEPT: i64 = 86_400;
/// Leases that are looked at, to remove old ones, for each that comes.
const SWEEP: usize = 16;
/// Leases that are read at a time.
const AT_ONCE: usize = 1000;

/// Who holds a resource, and until when.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// Its name for people: the start of its id's hash.
    #[serde(default)]
    pub name: String,
    /// The resource.
    pub path: String,
    /// The version of it that was released.
    pub version: u32,
    /// The guest: the thumbprint of the TEE key of its latest attestation.
    pub guest: String,
    /// What the guest measured.
    pub measurement: String,
    /// When it began, in seconds since 1970.
    pub granted: i64,
    /// When it was granted or renewed last.
    pub renewed: i64,
    /// When it ends, unless it is renewed.
    pub ends: i64,
    /// For how long it is granted and renewed.
    pub seconds: u32,
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<i64>,
}

/// What a revocation is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revocation {
    /// One lease, by its name or the start of it.
    Lease(String),
    /// All leases of a resource.
    Resource(String),
    /// All leases of guests with a measurement.
    Measurement(String),
}

impl Revocation {
    fn covers(&self, lease: &Lease) -> bool {
        match self {
            Self::Lease(name) => !name.is_empty() && lease.name.starts_with(name),
            Self::Resource(path) => lease.path == *path,
            Self::Measurement(measurement) => !measurement.is_empty() && lease.measurement == *measurement,
        }
    }
}

/// Where the next look for old leases begins.
#[derive(Default)]
pub(super) struct Cursor(AtomicU64);

fn key(id: &str) -> String {
    Digest::sha256(id.as_bytes()).hex()
}

fn name(key: &str) -> String {
    key.chars().take(16).collect()
}

/// A new lease's id.
pub(crate) fn new_id() -> String {
    b64::encode(SecretArray::<32>::random().expose())
}

impl Store {
    /// Keeps a new lease, with the audit entry of its release.
    pub(crate) fn grant(&self, id: &str, lease: Lease, entry: AuditEntry) -> Result<(), BrokerError> {
        let (key, from) = (key(id), self.leases.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed));
        self.update(Lane::Log, move |records| {
            let start = format!("{from:016x}");
            for (old, bytes) in records.list(Table::Leases, "", Some(start.as_bytes()), SWEEP)? {
                let lease: Lease = from_json(Table::Leases, old.as_bytes(), bytes.expose())?;
                if lease.ends + KEPT < now() {
                    records.tx.delete(Table::Leases, old);
                }
            }
            records.put_json(Table::Leases, &key, &lease)?;
            audit::append(records.tx, entry.clone()).map(drop)
        })
    }

    /// A lease by its id.
    pub(crate) fn lease(&self, id: &str) -> Result<Option<Lease>, BrokerError> {
        let key = key(id);
        self.view(|records| {
            let lease = records.get_json::<Lease>(Table::Leases, &key)?;
            Ok(lease.map(|lease| Lease { name: name(&key), ..lease }))
        })
    }

    /// Changes a lease, as it is by then; `None` where it is not there any more, or `change` wants it to be as it is.
    pub(crate) fn change_lease<T: Send + 'static>(
        &self,
        id: &str,
        entry: Option<AuditEntry>,
        mut change: impl FnMut(&mut Lease) -> Option<T> + Send + 'static,
    ) -> Result<Option<T>, BrokerError> {
        let key = key(id);
        self.update(Lane::Log, move |records| {
            let Some(mut lease) = records.get_json::<Lease>(Table::Leases, &key)? else { return Ok(None) };
            let Some(done) = change(&mut lease) else { return Ok(None) };
            records.put_json(Table::Leases, &key, &lease)?;
            if let Some(entry) = &entry {
                audit::append(records.tx, entry.clone())?;
            }
            Ok(Some(done))
        })
    }

    fn all(records: &mut Records<'_, '_>) -> Result<Vec<(String, Lease)>, BrokerError> {
        Self::some(records, None, MOST_ROWS)
    }

    fn some(
        records: &mut Records<'_, '_>,
        after: Option<&str>,
        most: usize,
    ) -> Result<Vec<(String, Lease)>, BrokerError> {
        let rows = records.list(Table::Leases, "", after.map(str::as_bytes), most)?;
        rows.into_iter()
            .map(|(key, bytes)| {
                let lease: Lease = from_json(Table::Leases, key.as_bytes(), bytes.expose())?;
                let name = name(&key);
                Ok((key, Lease { name, ..lease }))
            })
            .collect()
    }

    /// Leases of resources whose paths begin so; a page begins after a lease's name.
    pub(crate) fn leases(&self, prefix: &str, page: &Page) -> Result<Vec<Lease>, BrokerError> {
        self.view(|records| {
            // A name is the start of a key, and '~' comes after what keys are made of.
            let mut after = page.after.as_ref().map(|name| format!("{name}~"));
            let (mut found, mut looked_at) = (Vec::new(), 0);
            while found.len() < page.most && looked_at < MOST_ROWS {
                let asked = page.most.max(AT_ONCE).min(MOST_ROWS - looked_at);
                let rows = Self::some(records, after.as_deref(), asked)?;
                looked_at += rows.len();
                let ended = rows.len() < asked;
                after = rows.last().map(|(key, _)| key.clone());
                let own = rows.into_iter().map(|(_, lease)| lease).filter(|lease| lease.path.starts_with(prefix));
                found.extend(own.take(page.most - found.len()));
                if ended {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Revokes what is covered and has not ended, of resources whose paths begin so; gives how many that are.
    pub(crate) fn revoke(
        &self,
        revocation: &Revocation,
        prefix: &str,
        entry: AuditEntry,
    ) -> Result<usize, BrokerError> {
        let (revocation, prefix) = (revocation.clone(), prefix.to_owned());
        self.update(Lane::Log, move |records| {
            let now = now();
            let is_one = |lease: &Lease| {
                revocation.covers(lease)
                    && lease.path.starts_with(&prefix)
                    && lease.revoked.is_none()
                    && lease.ends > now
            };
            let covered: Vec<_> = Self::all(records)?.into_iter().filter(|(_, lease)| is_one(lease)).collect();
            for (key, lease) in &covered {
                records.put_json(Table::Leases, key, &Lease { revoked: Some(now), ..lease.clone() })?;
            }
            let mut entry = entry.clone();
            entry.detail = format!("{} leases revoked", covered.len());
            audit::append(records.tx, entry)?;
            Ok(covered.len())
        })
    }
}

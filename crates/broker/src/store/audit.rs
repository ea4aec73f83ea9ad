//! The audit log: a chain of entries, in the order in which they were committed, whichever replica made them.
//!
//! ```text
//! audit  number (u64 BE, from 1)  JSON [`AuditEntry`]; `previous` is the SHA-256 of the entry before, as it is stored
//! meta   audit                    {"number": of the last entry, "hash": its SHA-256}
//! meta   refusals                 {"since": seconds, "count": refusals logged since}
//! ```

use std::sync::{Mutex, PoisonError};

use nacre_core::Digest;
use serde::{Deserialize, Serialize};

use super::{Store, guests::Kept};
use crate::{
    BrokerError,
    admin::now,
    storage::{Lane, Table, Tx},
};

/// Refusals that anybody can cause are logged only so often, so that nobody can fill the disk with them.
const MOST_REFUSALS: u32 = 120;
const REFUSALS_PER: i64 = 60;

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

/// The last entry of the log. Whoever keeps it elsewhere sees later whether entries up to it were changed or removed.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct AuditHead {
    /// Its number; 0 where there is none.
    pub number: u64,
    /// Its SHA-256, as it is stored.
    pub hash: String,
}

pub(super) fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

fn damaged(what: String, why: impl Into<String>) -> BrokerError {
    BrokerError::Damaged { what, why: why.into() }
}

pub(super) fn head(tx: &mut Tx<'_>) -> Result<AuditHead, BrokerError> {
    match tx.get(Table::Meta, "audit")? {
        None => Ok(AuditHead::default()),
        Some(bytes) => super::from_json(Table::Meta, b"audit", &bytes),
    }
}

fn put_json(tx: &mut Tx<'_>, name: &str, value: &impl Serialize) -> Result<(), BrokerError> {
    let text = serde_json::to_vec(value).map_err(|e| BrokerError::Invalid(e.to_string()))?;
    tx.put(Table::Meta, name, text);
    Ok(())
}

pub(super) fn set_head(tx: &mut Tx<'_>, head: &AuditHead) -> Result<(), BrokerError> {
    put_json(tx, "audit", head)
}

/// Adds an entry to the log; gives its number.
pub(super) fn append(tx: &mut Tx<'_>, mut entry: AuditEntry) -> Result<u64, BrokerError> {
    let last = head(tx)?;
    entry.number = last.number + 1;
    entry.time = now();
    entry.previous = last.hash;
    let text = serde_json::to_string(&entry).map_err(|e| BrokerError::Invalid(e.to_string()))?;
    set_head(tx, &AuditHead { number: entry.number, hash: Digest::sha256(text.as_bytes()).hex() })?;
    tx.put(Table::Audit, key(entry.number), text);
    Ok(entry.number)
}

#[derive(Default, Deserialize, Serialize)]
struct Window {
    since: i64,
    count: u32,
}

/// What a replica remembers of refusals that it did not log.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Unlogged>);

#[derive(Default)]
struct Unlogged {
    count: u64,
    closed_until: i64,
}

impl Store {
    /// Adds an entry that changes nothing else.
    pub(crate) fn audit(&self, entry: AuditEntry) -> Result<(), BrokerError> {
        self.change(entry, |_| Ok(()))
    }

    /// Adds a refusal, and the record of the guest that was refused to attest, unless there were too many in this minute, at all replicas
    /// together.
    pub(crate) fn audit_refusal(&self, entry: AuditEntry, guest: Option<Kept>) -> Result<(), BrokerError> {
        let unlogged = {
            let mut unlogged = self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner);
            if now() < unlogged.closed_until {
                unlogged.count += 1;
                return Ok(());
            }
            std::mem::take(&mut unlogged.count)
        };
        let closed_until = self.update(Lane::Log, move |records| {
            let mut window: Window = match records.tx.get(Table::Meta, "refusals")? {
                None => Window::default(),
                Some(bytes) => super::from_json(Table::Meta, b"refusals", &bytes)?,
            };
            let now = now();
            if now >= window.since + REFUSALS_PER || window.since > now {
                window = Window { since: now, count: 0 };
            }
            if window.count >= MOST_REFUSALS {
                return Ok(Some(window.since + REFUSALS_PER));
            }
            window.count += 1;
            put_json(records.tx, "refusals", &window)?;
            let mut entry = entry.clone();
            if unlogged > 0 {
                entry.detail = format!("{} ({unlogged} refusals before this one were not logged)", entry.detail);
            }
            let number = append(records.tx, entry)?;
            if let Some(guest) = &guest {
                guest.put(records, number)?;
            }
            Ok(None)
        })?;
        if let Some(until) = closed_until {
            let mut held = self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner);
            held.closed_until = until;
            held.count += unlogged + 1;
        }
        Ok(())
    }

    /// Entries after number `after`, oldest first; their chain is verified, up to the head where they reach it.
    pub(crate) fn audit_entries(&self, after: u64, most: usize) -> Result<Vec<AuditEntry>, BrokerError> {
        self.view(|records| {
            let last = head(records.tx)?;
            let mut previous = match after {
                0 => Some(String::new()),
                _ => records.tx.get(Table::Audit, key(after))?.map(|text| Digest::sha256(&text).hex()),
            };
            let mut entries = Vec::new();
            for (row, text) in records.tx.list(Table::Audit, "", (after > 0).then_some(&key(after)[..]), most)? {
                let number = row.try_into().map(u64::from_be_bytes).unwrap_or_default();
                let what = format!("audit entry {number}");
                let entry: AuditEntry =
                    serde_json::from_slice(&text).map_err(|e| damaged(what.clone(), e.to_string()))?;
                let expected = after + entries.len() as u64 + 1;
                if entry.number != number || number != expected {
                    return Err(damaged(what, format!("entry {expected} is missing")));
                }
                if previous.is_some_and(|hash| hash != entry.previous) {
                    return Err(damaged(what, "it does not follow from the entry before"));
                }
                let hash = Digest::sha256(&text).hex();
                if number == last.number && hash != last.hash {
                    return Err(damaged(what, "it is not the entry that was the last one"));
                }
                previous = Some(hash);
                entries.push(entry);
            }
            // Replicas may have added some since the head was read, never taken any away.
            let reached = after + entries.len() as u64;
            if entries.len() < most && reached < last.number {
                return Err(damaged(format!("audit entry {}", reached + 1), "it is missing"));
            }
            Ok(entries)
        })
    }

    /// Entries after number `after` whose actor is this one, until a time, and whether these are all: `most` entries are looked at.
    pub(crate) fn audit_of(
        &self,
        actor: &str,
        after: u64,
        until: i64,
        most: usize,
    ) -> Result<(Vec<AuditEntry>, bool), BrokerError> {
        const AT_ONCE: usize = 1000;
        self.view(|records| {
            let (mut found, mut last, mut left) = (Vec::new(), after, most);
            loop {
                let asked = AT_ONCE.min(left);
                let rows = records.tx.list(Table::Audit, "", Some(&key(last)), asked)?;
                left -= rows.len();
                let ended = rows.len() < asked;
                for (_, text) in rows {
                    let entry: AuditEntry = super::from_json(Table::Audit, b"", &text)?;
                    if entry.time > until {
                        return Ok((found, true));
                    }
                    last = entry.number;
                    if entry.actor == actor {
                        found.push(entry);
                    }
                }
                if left == 0 || ended {
                    return Ok((found, ended));
                }
            }
        })
    }

    /// The last entry's number and hash.
    pub(crate) fn audit_head(&self) -> Result<AuditHead, BrokerError> {
        self.view(|records| head(records.tx))
    }

    /// The hash of an entry as it is stored.
    pub(crate) fn audit_hash(&self, number: u64) -> Result<Option<String>, BrokerError> {
        self.view(|records| Ok(records.tx.get(Table::Audit, key(number))?.map(|text| Digest::sha256(&text).hex())))
    }
}

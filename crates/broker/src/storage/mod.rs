//! The port behind which the broker keeps everything: named tables of bytes by bytes, changed by serializable transactions.
//!
//! | module | what |
//! |---|---|
//! | `transaction` | [`Tx`]: what a change sees, its own writes included |
//! | `group` | many callers' changes in one commit |
//! | `migrate` | what the embedded format 1 becomes
//! | `embedded` | redb in a file: one process |
//! | `postgres` | PostgreSQL, or what speaks its protocol and has serializable transactions: several replicas |
//!
//! Invariants: a change that was acknowledged is durable, sessions of the embedded storage excepted, which end with the process; a change is
//! whole or not at all; two changes never both believe what only one of them could have seen. A change is a function that may run
//! several times, and has no other effect than what it writes.

pub(crate) mod embedded;
mod group;
mod migrate;
pub(crate) mod postgres;
mod transaction;

use std::{fmt, sync::Arc};

use crate::BrokerError;

pub(crate) use transaction::{Read, Tx, Writes};

/// The tables. `docs/formats/broker.md` says what is in each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Table {
    /// The format, the revision of the configuration, the head of the audit log.
    Meta,
    /// Data keys, wrapped by master keys; token keys.
    Keys,
    /// Resources: what is known of them but their values.
    Resources,
    /// The values of resources, by version.
    Values,
    /// Policies.
    Policies,
    /// Reference values, and who may sign them.
    References,
    /// Platforms that are trusted.
    Platforms,
    /// Administrators.
    Admins,
    /// Sessions.
    Sessions,
    /// Leases.
    Leases,
    /// What was found of guests that attested, or were refused.
    Guests,
    /// Anchors of volumes.
    Anchors,
    /// The audit log.
    Audit,
}

impl Table {
    pub(crate) const ALL: [Self; 13] = [
        Self::Meta,
        Self::Keys,
        Self::Resources,
        Self::Values,
        Self::Policies,
        Self::References,
        Self::Platforms,
        Self::Admins,
        Self::Sessions,
        Self::Leases,
        Self::Guests,
        Self::Anchors,
        Self::Audit,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Keys => "keys",
            Self::Resources => "resources",
            Self::Values => "values",
            Self::Policies => "policies",
            Self::References => "references",
            Self::Platforms => "platforms",
            Self::Admins => "admins",
            Self::Sessions => "sessions",
            Self::Leases => "leases",
            Self::Guests => "guests",
            Self::Anchors => "anchors",
            Self::Audit => "audit",
        }
    }
}

/// Changes that do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Whatever ends in the audit log, whose head serialises it.
    Log,
    /// Sessions alone.
    Sessions,
}

/// Why the database did not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    /// It says no.
    #[error("broker database, {doing}: {source}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// It does not answer.
    #[error("the broker's database does not answer ({why}): is it running, and is `database` in broker.toml right?")]
    Unavailable {
        /// Why.
        why: String,
    },
    /// There is no room.
    #[error("the broker's database has no room left: free space on its disk; nothing of this change was kept ({why})")]
    Full {
        /// What it says.
        why: String,
    },
    /// Another change came between, again and again.
    #[error("broker database: {tries} tries to commit met other changes: try again")]
    Conflict {
        /// How often.
        tries: u32,
    },
    /// The broker ends.
    #[error("broker database: the broker is ending")]
    Ending,
}

/// A change.
pub(crate) type Change = Box<dyn FnMut(&mut Tx<'_>) -> Result<(), BrokerError> + Send>;

/// Where the tables are.
pub(crate) trait Storage: Send + Sync {
    /// Reads: what is seen is committed. Only the embedded storage gives a snapshot of several reads.
    fn view(&self, look: &mut dyn FnMut(&mut Tx<'_>) -> Result<(), BrokerError>) -> Result<(), BrokerError>;

    /// Makes a change; when this returns well, it is durable.
    fn update(&self, lane: Lane, change: Change) -> Result<(), BrokerError>;

    /// Whether it is shared with other replicas.
    fn is_shared(&self) -> bool;

    /// What it is, for people.
    fn describe(&self) -> String;
}

/// The tables, with results.
pub(crate) struct Database(Box<dyn Storage>);

impl Database {
    pub(crate) fn new(storage: impl Storage + 'static) -> Self {
        Self(Box::new(storage))
    }

    /// Reads.
    pub(crate) fn view<T>(
        &self,
        mut look: impl FnMut(&mut Tx<'_>) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        let mut found = None;
        self.0.view(&mut |tx| {
            found = Some(look(tx)?);
            Ok(())
        })?;
        found.ok_or(BrokerError::Storage(StorageError::Ending))
    }

    /// Changes. The function may run more than once; what counts is what its last run wrote and gave.
    pub(crate) fn update<T: Send + 'static>(
        &self,
        lane: Lane,
        mut change: impl FnMut(&mut Tx<'_>) -> Result<T, BrokerError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let result = Arc::new(std::sync::Mutex::new(None));
        let slot = result.clone();
        self.0.update(
            lane,
            Box::new(move |tx| {
                let value = change(tx)?;
                *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(value);
                Ok(())
            }),
        )?;
        let value = result.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        value.ok_or(BrokerError::Storage(StorageError::Ending))
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.0.is_shared()
    }

    pub(crate) fn describe(&self) -> String {
        self.0.describe()
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Database").field(&self.describe()).finish()
    }
}

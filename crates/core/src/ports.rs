//! The ports: what a part of Nacre needs from outside it, as traits, so that tests, guests and operators give each their own.

use std::time::Duration;

use time::OffsetDateTime;

use crate::{ResourceUri, SecretBytes};

/// A time that may decide whether a key or a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrustedTime {
    /// The time, UTC.
    pub now: OffsetDateTime,
    /// Who says so, for messages: `the system clock`, `the broker's signed time`.
    pub source: &'static str,
}

/// Where the time comes from by which validity periods are judged.
///
/// A guest's clock is its host's, who may turn it back to make an expired key good again; so a guest's clock answers `None` until
/// a broker has signed a time, and what has a validity period is refused until then.
pub trait Clock: Send + Sync {
    /// The time, where there is one that nobody untrusted can set.
    fn now(&self) -> Option<TrustedTime>;
}

/// The machine's clock, for operators on machines of their own.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Option<TrustedTime> {
        Some(TrustedTime { now: OffsetDateTime::now_utc(), source: "the system clock" })
    }
}

/// Why a key or another resource was not released.
#[derive(Debug, thiserror::Error)]
pub enum KeySourceError {
    /// There is nothing by that name.
    #[error("{uri}: no such resource at {source_name}")]
    NotFound {
        /// What was asked for.
        uri: ResourceUri,
        /// Who was asked.
        source_name: String,
    },
    /// Somebody decided that we must not have it.
    #[error("{uri}: {source_name} refused to release it: {reason}")]
    Denied {
        /// What was asked for.
        uri: ResourceUri,
        /// Who was asked.
        source_name: String,
        /// The reason given.
        reason: String,
    },
    /// The answer could not be had or understood.
    #[error("{uri}: could not be fetched from {source_name}")]
    Failed {
        /// What was asked for.
        uri: ResourceUri,
        /// Who was asked.
        source_name: String,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Releases secrets by name: a key broker, or what stands in for one.
pub trait KeySource: Send + Sync {
    /// Fetches one resource.
    ///
    /// # Errors
    /// [`KeySourceError`]: not there, refused, or not to be had.
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError>;
}

/// Shows people what takes long, so that no library prints.
pub trait Progress: Send + Sync {
    /// A task starts: `name` is for people, `total` its length in bytes, where that is known.
    fn begin(&self, name: &str, total: Option<u64>) -> Box<dyn Task>;

    /// Something worth a line happened: a retry, a mirror that failed.
    fn note(&self, message: &str);
}

/// A task on display; it ends when it is dropped.
pub trait Task: Send + Sync {
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);

    /// The task waits before it tries again.
    fn waiting(&self, why: &str, delay: Duration);

    /// The task ended well; `outcome` says how (`unpacked`, `already here`).
    fn done(&self, outcome: &str);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&self, _name: &str, _total: Option<u64>) -> Box<dyn Task> {
        Box::new(Self)
    }

    fn note(&self, _message: &str) {}
}

impl Task for NoProgress {
    fn advance(&self, _bytes: u64) {}
    fn waiting(&self, _why: &str, _delay: Duration) {}
    fn done(&self, _outcome: &str) {}
}

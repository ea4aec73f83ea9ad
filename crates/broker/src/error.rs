//! What goes wrong: [`BrokerError`] for whoever runs the broker, [`ApiError`] for whoever talks to it.

use std::path::PathBuf;

use nacre_attest::rcar::ErrorBody;

use crate::{master::MasterKeyError, storage::StorageError};

/// The broker cannot start, or cannot keep what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// A file of the broker's directory.
    #[error("broker: '{path}': {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the broker's directory says something else than it should.
    #[error("broker: '{path}': {why}", path = path.display())]
    BadFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There is a broker already.
    #[error("broker: '{path}' is not empty: open it, or give another directory", path = .0.display())]
    Exists(PathBuf),
    /// The database.
    #[error(transparent)]
    Storage(StorageError),
    /// The master key.
    #[error("master key: {0}")]
    Master(MasterKeyError),
    /// The database belongs to brokers with another master key.
    #[error(
        "the database was sealed by other master keys ({others}) and not by {ours}: give the broker its own master key, or its own database"
    )]
    OtherMasterKey {
        /// The one that was tried.
        ours: String,
        /// Those that open it.
        others: String,
    },
    /// A broker runs on this directory.
    #[error("broker: a broker is running on '{path}': administer it by its address (--url)", path = .0.display())]
    Running(PathBuf),
    /// A sealed record does not open.
    #[error("{0} does not open with this broker's keys: whoever can write to the database changed or moved it")]
    Sealed(String),
    /// A record is not what was written.
    #[error("broker database: {what} is damaged: {why}")]
    Damaged {
        /// Which record.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A policy that does not compile or does not belong here.
    #[error("policy: {0}")]
    Policy(String),
    /// An argument that is none.
    #[error("{0}")]
    Invalid(String),
    /// A key.
    #[error("broker key: {0}")]
    Key(#[from] nacre_core::jose::JoseError),
    /// The certificate or the TLS configuration.
    #[error("broker TLS: {0}")]
    Tls(String),
    /// The address.
    #[error("broker cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A refusal over HTTP: a status and a body as Trustee's clients read it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{variant} ({status}): {detail}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The last segment of the error's type.
    pub variant: &'static str,
    /// What is wrong, for whoever asked. Nothing secret.
    pub detail: String,
}

impl ApiError {
    pub(crate) fn new(status: u16, variant: &'static str, detail: impl Into<String>) -> Self {
        Self { status, variant, detail: detail.into() }
    }

    pub(crate) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(400, "InvalidRequest", detail)
    }

    /// The body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody::new(self.variant, self.detail.clone())
    }
}

impl From<BrokerError> for ApiError {
    /// What is the caller's fault is said; what is ours is logged and not said.
    fn from(error: BrokerError) -> Self {
        match error {
            BrokerError::Policy(why) => Self::new(400, "ParsePolicyError", why),
            BrokerError::Invalid(why) => Self::bad_request(why),
            BrokerError::Storage(error) => {
                tracing::error!(%error, "broker failure");
                let (status, what) = match error {
                    StorageError::Full { .. } => (507, "the broker's disk is full: nothing of this was kept"),
                    _ => (503, "the broker's database does not answer: try again"),
                };
                Self::new(status, "StorageError", what)
            }
            error => {
                tracing::error!(%error, "broker failure");
                Self::new(500, "InternalError", "the broker failed; its log says why")
            }
        }
    }
}

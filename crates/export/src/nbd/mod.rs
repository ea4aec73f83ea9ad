//! The NBD server: a block store for whoever speaks the Network Block Device protocol, over socket files and TCP, under TLS where wanted.
//!
//! What of the protocol is there is in `docs/formats/nbd.md`. A connection has a thread of its own from accept to close, or several where
//! the store is slow (`session`); nothing that one client does, or does not do, holds up another or the end of the server.
//!
//! - [`wire`]: the bytes, as pure functions. - [`handshake`]: options up to the choice of the export.
//! - `batch`, `session`, `reply`: requests in, carried out, replies out. - `transport`, `tls`, `listen`: sockets.

mod batch;
pub mod handshake;
mod listen;
mod reply;
mod server;
mod session;
mod tls;
mod transport;
pub mod wire;

use std::{io, time::Duration};

pub use self::{listen::Listen, server::NbdServer, tls::Tls, transport::Channel};

/// How a server is to be.
#[derive(Clone)]
pub struct NbdSettings {
    /// Where it listens; at least one address.
    pub listen: Vec<Listen>,
    /// What the export is called. The empty name means it always.
    pub name: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the store makes zeroes faster than it takes data, so that clients may be told.
    pub fast_zeroes: bool,
    /// The certificate, where there is to be TLS.
    pub tls: Option<Tls>,
    /// The most clients at a time; the next is sent away.
    pub max_connections: usize,
    /// How long a client may take for its handshake.
    pub handshake_time: Duration,
    /// How long clients may take for their last replies when the server ends.
    pub stop_time: Duration,
}

impl NbdSettings {
    /// The most clients at a time.
    pub const MAX_CONNECTIONS: usize = 64;

    /// Listening at one address, with everything else as most people want it.
    pub fn new(listen: Listen) -> Self {
        Self {
            listen: vec![listen],
            name: String::new(),
            read_only: false,
            fast_zeroes: false,
            tls: None,
            max_connections: Self::MAX_CONNECTIONS,
            handshake_time: Duration::from_secs(20),
            stop_time: Duration::from_secs(5),
        }
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The address cannot be listened at.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// Which.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No address was given.
    #[error("an NBD server needs an address to listen at")]
    NoAddress,
    /// The name is too long.
    #[error("the name of an export has at most 4096 bytes, not {0}")]
    Name(usize),
    /// Certificate or key are of no use.
    #[error("TLS: {0}")]
    Tls(String),
    /// The system has no more threads or descriptors.
    #[error("cannot start the NBD server: {0}")]
    Start(#[source] io::Error),
}

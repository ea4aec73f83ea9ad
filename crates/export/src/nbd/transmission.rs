//! The transmission phase alone, for a client with whom there is nothing to negotiate: the kernel, which is told by other means.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{Arc, atomic::AtomicBool},
};

use nacre_core::BlockError;

use super::{
    session::{Session, Shared, Turns},
    transport::{Socket, SocketChannel},
    wire::{Terms, transmission},
};
use crate::{Served, nbd::NbdSettings, sectors::Sectors};

/// A store for clients that begin with requests, and take simple replies. When the store grows, whoever told the client its size tells it
/// the new one; its requests are served up to there from then on.
#[derive(Clone)]
pub struct Transmission {
    shared: Arc<Shared>,
    read_only: bool,
}

impl Transmission {
    /// Of this store. Nobody else may write to it.
    pub fn new(store: Served, read_only: bool) -> Self {
        let shared = Shared { sectors: Sectors::new(store), fast_zeroes: false, stopping: AtomicBool::new(false) };
        Self { shared: Arc::new(shared), read_only }
    }

    /// What a client has to be told of it: the transmission flags.
    pub fn flags(&self) -> u16 {
        use transmission::{CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES};
        let writes = if self.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES };
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | writes
    }

    /// How large the store is now, in bytes.
    pub fn size(&self) -> u64 {
        self.shared.sectors.store().size()
    }

    /// Serves a client until it goes.
    ///
    /// # Errors
    /// The connection broke, or what came was no request.
    pub fn serve(&self, socket: UnixStream) -> io::Result<()> {
        let socket = Socket::Unix(socket);
        socket.prepare()?;
        let session = Session {
            shared: self.shared.clone(),
            // The time is for handshakes only.
            transport: SocketChannel::new(socket, None, NbdSettings::HANDSHAKE_TIME).into_transport()?,
            terms: Terms { size: self.size(), read_only: self.read_only, structured: false },
            hears_of_growth: true,
            inbox: Turns::new(),
        };
        session.run().map_err(io::Error::other)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn flush(&self) -> Result<(), BlockError> {
        self.shared.sectors.flush()
    }
}

//! Sockets, plain or under TLS, as the two phases of a connection use them.
//!
//! The handshake reads exactly what it needs from a [`Channel`], so that nothing that came in the clear is ever taken for something that
//! came under TLS. The transmission phase takes as much as there is from a [`Transport`], which one thread may read while another
//! writes.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};
use rustls::{ServerConfig, ServerConnection};

/// What the kernel may hold of replies that the client has not taken yet.
const SEND_BUFFER: usize = 1 << 20;
/// The most buffers that the kernel takes at once.
const MAX_SLICES: usize = 1024;
/// Bytes of TLS records that are read at once.
const TLS_INPUT: usize = 256 << 10;
/// Bytes of TLS records that are gathered before they are sent.
const TLS_OUTPUT: usize = 48 << 10;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Sets what makes a socket fast, and sees to it that a dead client is noticed.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.set_nonblocking(false)?,
            Self::Tcp(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                sockopt::set_socket_keepalive(socket, true)?;
            }
        }
        // More than the system's default maximum where we may; it is a matter of speed only.
        if sockopt::set_socket_send_buffer_size_force(self, SEND_BUFFER).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(self, SEND_BUFFER);
        }
        Ok(())
    }

    /// A second handle of the same socket.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
        })
    }

    /// Ends reading, or both ways. That the other side has gone before is no error.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(socket) => socket.shutdown(how),
            Self::Tcp(socket) => socket.shutdown(how),
        };
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.set_read_timeout(timeout).and_then(|()| socket.set_write_timeout(timeout)),
            Self::Tcp(socket) => socket.set_read_timeout(timeout).and_then(|()| socket.set_write_timeout(timeout)),
        }
    }

    fn receive(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Unix(socket) => (&*socket).read_vectored(buffers),
                Self::Tcp(socket) => (&*socket).read_vectored(buffers),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    fn send(&self, mut buffers: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut buffers, 0);
        while !buffers.is_empty() {
            let some = buffers.get(..buffers.len().min(MAX_SLICES)).unwrap_or_default();
            match sendmsg(self, some, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut buffers, sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// What the handshake goes over.
pub trait Channel: Read + Write {
    /// Whether it is under TLS now.
    fn is_tls(&self) -> bool;

    /// Whether it can be put under TLS.
    fn has_tls(&self) -> bool;

    /// Puts it under TLS.
    ///
    /// # Errors
    /// That could not be agreed on, or the client's certificate is not one of those that are trusted.
    fn start_tls(&mut self) -> io::Result<()>;
}

/// A socket with a time until which everything has to be done.
struct Timed {
    socket: Socket,
    deadline: Instant,
}

impl Timed {
    fn arm(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_timeouts(Some(left))
    }
}

/// What a time-out of a socket says, by a name that people understand.
fn timed<T>(result: io::Result<T>) -> io::Result<T> {
    result
        .map_err(|error| if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error })
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        timed(self.socket.receive(&mut [IoSliceMut::new(buffer)]))
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.arm()?;
        timed(self.socket.send(&mut [IoSlice::new(buffer)]))?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket during the handshake.
pub(crate) struct SocketChannel {
    timed: Timed,
    config: Option<Arc<ServerConfig>>,
    tls: Option<Box<ServerConnection>>,
}

impl SocketChannel {
    /// Everything has to be done within `time`.
    pub(crate) fn new(socket: Socket, config: Option<Arc<ServerConfig>>, time: Duration) -> Self {
        Self { timed: Timed { socket, deadline: Instant::now() + time }, config, tls: None }
    }

    /// The handshake is over.
    pub(crate) fn into_transport(self) -> io::Result<Transport> {
        let Self { timed: Timed { socket, .. }, tls, .. } = self;
        socket.set_timeouts(None)?;
        Ok(match tls {
            None => Transport::Plain { socket, sending: Mutex::new(()) },
            Some(connection) => Transport::Tls(Box::new(TlsTransport {
                socket,
                connection: Mutex::new(connection),
                input: Mutex::new(TlsInput { records: vec![0; TLS_INPUT], start: 0, end: 0 }),
                sending: Mutex::new(Vec::new()),
            })),
        })
    }
}

impl Read for SocketChannel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.timed).read(buffer),
            None => self.timed.read(buffer),
        }
    }
}

impl Write for SocketChannel {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.timed).write(buffer),
            None => self.timed.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => rustls::Stream::new(&mut **tls, &mut self.timed).flush(),
            None => Ok(()),
        }
    }
}

impl Channel for SocketChannel {
    fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    fn has_tls(&self) -> bool {
        self.config.is_some()
    }

    fn start_tls(&mut self) -> io::Result<()> {
        let config = self.config.clone().ok_or(io::ErrorKind::Unsupported)?;
        let mut connection = Box::new(ServerConnection::new(config).map_err(io::Error::other)?);
        while connection.is_handshaking() {
            connection.complete_io(&mut self.timed)?;
        }
        self.tls = Some(connection);
        Ok(())
    }
}

/// What requests come from and replies go to.
pub(crate) enum Transport {
    Plain { socket: Socket, sending: Mutex<()> },
    Tls(Box<TlsTransport>),
}

impl Transport {
    /// Waits for bytes and fills the buffers with what there is; 0 at the end. Only one thread at a time may do so.
    pub(crate) fn receive(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain { socket, .. } => socket.receive(buffers),
            Self::Tls(tls) => tls.receive(buffers),
        }
    }

    /// Sends all of this, and nothing else in between.
    pub(crate) fn send(&self, buffers: &mut [IoSlice<'_>]) -> io::Result<()> {
        match self {
            Self::Plain { socket, sending } => {
                let _alone = lock(sending);
                socket.send(buffers)
            }
            Self::Tls(tls) => tls.send(buffers),
        }
    }

    /// Says goodbye and closes both ways.
    pub(crate) fn close(&self) {
        match self {
            Self::Plain { socket, .. } => socket.shutdown(Shutdown::Both),
            Self::Tls(tls) => tls.close(),
        }
    }
}

/// A socket under TLS. Records are received and sent without holding the lock on the connection.
pub(crate) struct TlsTransport {
    socket: Socket,
    connection: Mutex<Box<ServerConnection>>,
    input: Mutex<TlsInput>,
    /// Records on their way out: they have to go in the order in which they were made.
    sending: Mutex<Vec<u8>>,
}

/// Records that were received and not yet opened.
struct TlsInput {
    records: Vec<u8>,
    start: usize,
    end: usize,
}

impl TlsTransport {
    fn receive(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut input = lock(&self.input);
        let TlsInput { records, start, end } = &mut *input;
        loop {
            let filled = self.open(records.get(*start..*end).unwrap_or_default(), start, buffers)?;
            if filled > 0 {
                return Ok(filled);
            }
            *start = 0;
            *end = self.socket.receive(&mut [IoSliceMut::new(records)])?;
            if *end == 0 {
                return Ok(0);
            }
        }
    }

    /// Opens records into the buffers until those are full or all records are opened.
    fn open(&self, mut records: &[u8], start: &mut usize, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut connection = lock(&self.connection);
        let mut filled = 0;
        for buffer in buffers {
            let mut rest = &mut buffer[..];
            while !rest.is_empty() {
                match connection.reader().read(rest) {
                    Ok(0) => return Ok(filled),
                    Ok(read) => {
                        filled += read;
                        rest = rest.get_mut(read..).unwrap_or_default();
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && !records.is_empty() => {
                        let before = records.len();
                        connection.read_tls(&mut records)?;
                        *start += before - records.len();
                        connection
                            .process_new_packets()
                            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(filled),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(filled)
    }

    fn send(&self, mut buffers: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut sending = lock(&self.sending);
        IoSlice::advance_slices(&mut buffers, 0);
        while !buffers.is_empty() {
            let mut connection = lock(&self.connection);
            let taken = connection.writer().write_vectored(buffers)?;
            IoSlice::advance_slices(&mut buffers, taken);
            while connection.wants_write() {
                connection.write_tls(&mut *sending)?;
            }
            drop(connection);
            if sending.len() >= TLS_OUTPUT {
                self.emit(&mut sending)?;
            }
        }
        self.emit(&mut sending)
    }

    fn emit(&self, records: &mut Vec<u8>) -> io::Result<()> {
        let sent = self.socket.send(&mut [IoSlice::new(records)]);
        records.clear();
        sent
    }

    fn close(&self) {
        // Whoever is still sending to a client that takes nothing would make this wait: then there is no goodbye.
        if let Ok(mut sending) = self.sending.try_lock() {
            let mut connection = lock(&self.connection);
            connection.send_close_notify();
            if connection.write_tls(&mut *sending).is_ok() {
                let _ = self.socket.set_timeouts(Some(Duration::from_secs(1)));
                let _ = self.emit(&mut sending);
            }
        }
        self.socket.shutdown(Shutdown::Both);
    }
}

/// What panicked while it held a lock of ours has ended its connection, which others notice at the socket.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

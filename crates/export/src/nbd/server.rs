//! Accepting clients, and the end of all of them.

use std::{
    collections::HashMap,
    io,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, poll};

use super::{
    NbdError, NbdSettings,
    batch::End,
    handshake::{HandshakeError, Offer, is_name, negotiate},
    listen::Listener,
    session::{Session, Shared, Turns},
    transport::{Socket, SocketChannel, lock},
    wire::{Terms, transmission},
};
use crate::{FrontEnd, Served, sectors::Sectors};

/// How long nobody is accepted after the system had no descriptor or thread for one.
const PAUSE: Duration = Duration::from_millis(100);

/// An NBD server. It ends when it is stopped or dropped.
pub struct NbdServer {
    inner: Arc<Inner>,
    devices: Vec<String>,
    acceptor: Option<JoinHandle<io::Result<()>>>,
    /// Closing it wakes the acceptor.
    waker: Option<UnixStream>,
}

struct Inner {
    shared: Arc<Shared>,
    settings: NbdSettings,
    clients: Mutex<Clients>,
    /// A client has gone.
    gone: Condvar,
}

#[derive(Default)]
struct Clients {
    next: u64,
    sockets: HashMap<u64, Socket>,
}

impl NbdServer {
    /// Listens, and serves `store` from now on. Nobody else may write to it.
    ///
    /// # Errors
    /// [`NbdError`]
    pub fn start(store: Served, settings: NbdSettings) -> Result<Self, NbdError> {
        if settings.listen.is_empty() {
            return Err(NbdError::NoAddress);
        }
        if !is_name(&settings.name) {
            return Err(NbdError::Name(settings.name.len()));
        }
        let listeners = settings.listen.iter().map(Listener::bind).collect::<Result<Vec<_>, _>>()?;
        let tls = settings.tls.as_ref().is_some_and(|tls| tls.required);
        let devices = listeners.iter().map(|listener| listener.uri(&settings.name, tls)).collect();
        let (waker, woken) = UnixStream::pair().map_err(NbdError::Start)?;
        let shared = Arc::new(Shared {
            sectors: Sectors::new(store),
            fast_zeroes: settings.fast_zeroes,
            stopping: AtomicBool::new(false),
        });
        let inner = Arc::new(Inner { shared, settings, clients: Mutex::default(), gone: Condvar::new() });
        let acceptor = thread::Builder::new().name("nbd-accept".into());
        let accepting = inner.clone();
        let acceptor = acceptor.spawn(move || accept(&accepting, &listeners, &woken)).map_err(NbdError::Start)?;
        Ok(Self { inner, devices, acceptor: Some(acceptor), waker: Some(waker) })
    }

    /// What clients open, for each address.
    pub fn devices(&self) -> &[String] {
        &self.devices
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        lock(&self.inner.clients).sockets.len()
    }

    /// Ends everything but the store.
    fn end(&mut self) -> io::Result<()> {
        let ended = self.inner.shared.stopping.swap(true, Ordering::AcqRel);
        drop(self.waker.take());
        let accepted = self.acceptor.take().map_or(Ok(()), join);
        if ended {
            return accepted;
        }
        let mut clients = lock(&self.inner.clients);
        for socket in clients.sockets.values() {
            socket.shutdown(Shutdown::Read);
        }
        let deadline = Instant::now() + self.inner.settings.stop_time;
        while !clients.sockets.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            clients = self.inner.gone.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        // Who is left does not take its replies. Without its socket nothing waits for it any more.
        for socket in clients.sockets.values() {
            socket.shutdown(Shutdown::Both);
        }
        while !clients.sockets.is_empty() {
            clients = self.inner.gone.wait(clients).unwrap_or_else(PoisonError::into_inner);
        }
        accepted
    }
}

/// The result of a thread.
fn join(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that accepts NBD clients panicked")))
}

impl FrontEnd for NbdServer {
    fn device(&self) -> String {
        self.devices.first().cloned().unwrap_or_default()
    }

    fn stop(&mut self) -> io::Result<()> {
        let ended = self.end();
        self.inner.shared.sectors.flush().map_err(io::Error::other)?;
        ended
    }

    fn has_ended(&self) -> bool {
        self.acceptor.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn wait(&mut self) -> io::Result<()> {
        self.acceptor.take().map_or(Ok(()), join)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, "the NBD server did not end well");
        }
    }
}

/// Accepts until the other end of `woken` is closed.
fn accept(inner: &Arc<Inner>, listeners: &[Listener], woken: &UnixStream) -> io::Result<()> {
    loop {
        let mut ready: Vec<_> = listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)).collect();
        ready.push(PollFd::new(woken, PollFlags::IN));
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if ready.last().is_some_and(|woken| !woken.revents().is_empty()) {
            return Ok(());
        }
        let ready: Vec<bool> = ready.iter().map(|ready| !ready.revents().is_empty()).collect();
        for (listener, _) in listeners.iter().zip(ready).filter(|(_, ready)| *ready) {
            match listener.accept() {
                Ok((socket, client)) => {
                    if let Err(error) = welcome(inner, socket, client) {
                        tracing::warn!(%error, "a client could not be served");
                        thread::sleep(PAUSE);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // It has gone already, or we are out of descriptors: then waiting helps, spinning does not.
                    tracing::warn!(%error, "accept failed");
                    thread::sleep(PAUSE);
                }
            }
        }
    }
}

/// Gives a client a thread.
fn welcome(inner: &Arc<Inner>, socket: Socket, client: String) -> io::Result<()> {
    let place = {
        let mut clients = lock(&inner.clients);
        let most = inner.settings.max_connections;
        if clients.sockets.len() >= most {
            tracing::warn!(client, most, "sent away: there are as many clients as are allowed");
            return Ok(());
        }
        let id = clients.next;
        clients.next += 1;
        clients.sockets.insert(id, socket.try_clone()?);
        Place { inner: inner.clone(), id }
    };
    let serve = move || {
        match serve(&place.inner, socket) {
            Ok(()) => tracing::debug!(client, "has gone"),
            Err(error) => tracing::warn!(client, %error, "the connection ended"),
        }
        drop(place);
    };
    thread::Builder::new().name("nbd".into()).spawn(serve).map(drop)
}

/// A client's place among those that are allowed, until it is dropped.
struct Place {
    inner: Arc<Inner>,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.inner.clients).sockets.remove(&self.id);
        self.inner.gone.notify_all();
    }
}

/// Why a connection ended that nobody wanted to end.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    End(#[from] End),
}

/// A client from its greeting to its end.
fn serve(inner: &Inner, socket: Socket) -> Result<(), ConnectionError> {
    let settings = &inner.settings;
    socket.prepare()?;
    let offer = inner.offer();
    let tls = settings.tls.as_ref().map(|tls| tls.config.clone());
    let mut channel = SocketChannel::new(socket, tls, settings.handshake_time);
    let Some(agreed) = negotiate(&mut channel, &offer)? else { return Ok(()) };
    let session = Session {
        shared: inner.shared.clone(),
        transport: channel.into_transport()?,
        terms: Terms { size: offer.size, read_only: settings.read_only, structured: agreed.structured },
        // The size of the handshake holds until the client connects anew.
        hears_of_growth: false,
        inbox: Turns::new(),
    };
    Ok(session.run()?)
}

impl Inner {
    /// The export as it is now: a store may grow.
    fn offer(&self) -> Offer {
        use transmission::{
            CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM,
            SEND_WRITE_ZEROES,
        };
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_DF | CAN_MULTI_CONN;
        flags |= if self.settings.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
        Offer {
            name: self.settings.name.clone(),
            size: self.shared.sectors.store().size(),
            flags,
            tls_required: self.settings.tls.as_ref().is_some_and(|tls| tls.required),
        }
    }
}

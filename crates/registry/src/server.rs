//! Connections: a thread for each, requests in turn, answers with whatever fault was asked for.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::{
    fault::Fault,
    http::{Body, Content, Request, Response, read_head, reason},
    lock,
    routes::Service,
};

/// So many requests are kept in the log, the last ones.
const LOG_LIMIT: usize = 65_536;

pub(crate) type Hook = Arc<dyn Fn(&Request) -> Fault + Send + Sync>;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) base: String,
    pub(crate) service: Service,
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) hook: Mutex<Option<Hook>>,
    pub(crate) log: Mutex<Log>,
    stopping: AtomicBool,
    connections: Mutex<HashMap<u64, Connection>>,
}

/// What is needed to end a connection: its socket and its thread.
struct Connection {
    stream: TcpStream,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
pub(crate) struct Log {
    pub(crate) requests: VecDeque<Request>,
    total: usize,
    attempts: HashMap<(String, String), usize>,
    pub(crate) body_bytes: u64,
}

trait Stream: Read + Write {}
impl Stream for TcpStream {}
impl Stream for StreamOwned<ServerConnection, TcpStream> {}

/// Whether the connection serves another request.
#[derive(PartialEq)]
enum After {
    KeepOpen,
    Close,
}

impl Server {
    pub(crate) fn new(address: SocketAddr, service: Service, tls: Option<Arc<ServerConfig>>) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        Self {
            address,
            base: format!("{scheme}://{address}"),
            service,
            tls,
            hook: Mutex::default(),
            log: Mutex::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
        }
    }

    /// Accepts until [`Server::stop`].
    pub(crate) fn run(self: &Arc<Self>, listener: &TcpListener) {
        for (id, stream) in (0u64..).zip(listener.incoming()) {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let Ok(handle) = stream.try_clone() else { continue };
            let server = Arc::clone(self);
            lock(&self.connections).insert(id, Connection { stream: handle, thread: None });
            let thread = thread::Builder::new().name(format!("registry-{id}")).spawn(move || {
                // An error here is a client that left, or one that a fault has cut off: nobody to tell.
                let _ = server.connection(stream);
                lock(&server.connections).remove(&id);
            });
            if let (Ok(thread), Some(entry)) = (thread, lock(&self.connections).get_mut(&id)) {
                entry.thread = Some(thread);
            }
        }
    }

    /// Ends the accepting thread and all connections, and waits for them.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address); // wakes the accepting thread
        let connections: Vec<_> = lock(&self.connections).drain().map(|(_, connection)| connection).collect();
        for connection in &connections {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        for thread in connections.into_iter().filter_map(|connection| connection.thread) {
            let _ = thread.join();
        }
    }

    fn connection(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let raw = stream.try_clone()?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(config) => {
                let session = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(session, stream))
            }
        };
        let mut reader = BufReader::with_capacity(64 << 10, stream);
        while !self.stopping.load(Ordering::SeqCst) {
            let Some(request) = read_head(&mut reader)? else { break };
            if self.one(request, &mut reader, &raw)? == After::Close {
                break;
            }
        }
        reader.get_mut().flush()?;
        raw.shutdown(Shutdown::Both)
    }

    fn one(&self, mut request: Request, reader: &mut BufReader<Box<dyn Stream>>, raw: &TcpStream) -> io::Result<After> {
        {
            let mut log = lock(&self.log);
            log.total += 1;
            request.number = log.total;
            let attempts = log.attempts.entry((request.method.clone(), request.path.clone())).or_default();
            *attempts += 1;
            request.attempt = *attempts;
            log.requests.push_back(request.clone());
            if log.requests.len() > LOG_LIMIT {
                log.requests.pop_front();
            }
        }
        let hook = lock(&self.hook).clone();
        let fault = hook.map_or(Fault::Serve, |hook| hook(&request));
        if fault == Fault::Close {
            return Ok(After::Close);
        }
        if request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
            reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = Body::of(&request, reader)?;
        let response = self.respond(&mut request, &mut body, &fault)?;
        body.drain()?;
        let close = request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let after = self.send(reader.get_mut().as_mut(), raw, &request, response, &fault)?;
        Ok(if close { After::Close } else { after })
    }

    fn respond(&self, request: &mut Request, body: &mut Body<'_>, fault: &Fault) -> io::Result<Response> {
        match fault {
            Fault::Redirect { status, location } => {
                return Ok(Response::new(*status).with("Location", location.replace("{self}", &self.base)));
            }
            Fault::Answer { status, headers, body } => {
                let response = Response::bytes(*status, body.clone());
                return Ok(headers.iter().fold(response, |response, (name, value)| response.with(name, value)));
            }
            Fault::Delay(time) => self.wait(*time),
            Fault::IgnoreRange => drop(request.headers.remove("range")),
            _ => {}
        }
        let mut response = match self.service.answer(request, body, &self.base) {
            Ok(response) => response,
            Err(error) => Response::error(500, "UNKNOWN", &error.to_string()),
        };
        let mut replace = |name: &str, value: &str| {
            response.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
            response.headers.push((name.to_owned(), value.to_owned()));
        };
        match fault {
            Fault::ContentRange(range) => replace("Content-Range", range),
            Fault::Headers(headers) => headers.iter().for_each(|(name, value)| replace(name, value)),
            Fault::WrongRangeBody => response.body.start = 0,
            _ => {}
        }
        Ok(response)
    }

    fn send(
        &self,
        stream: &mut dyn Stream,
        raw: &TcpStream,
        request: &Request,
        response: Response,
        fault: &Fault,
    ) -> io::Result<After> {
        let Response { status, headers, mut body } = response;
        let mut length = body.left;
        if let Fault::ContentLength(claimed) = fault {
            length = *claimed;
        }
        let mut head = format!("HTTP/1.1 {status} {}\r\n", reason(status));
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if status != 204 {
            head.push_str(&format!("Content-Length: {length}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes())?;
        if request.method == "HEAD" {
            return Ok(After::KeepOpen);
        }
        match fault {
            Fault::CutAfter(count) => {
                body.left = body.left.min(*count);
                self.copy(stream, &mut body, fault)?;
                Ok(After::Close)
            }
            Fault::StallAfter(count) => {
                body.left = body.left.min(*count);
                self.copy(stream, &mut body, fault)?;
                self.stall(raw)?;
                Ok(After::Close)
            }
            _ => {
                self.copy(stream, &mut body, fault)?;
                Ok(if matches!(fault, Fault::ContentLength(_)) { After::Close } else { After::KeepOpen })
            }
        }
    }

    fn copy(&self, stream: &mut dyn Stream, body: &mut Content, fault: &Fault) -> io::Result<()> {
        let mut buffer = vec![0; if let Fault::Slow { bytes, .. } = fault { *bytes } else { 128 << 10 }];
        while !self.stopping.load(Ordering::SeqCst) {
            let offset = body.start;
            let count = body.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let (piece, _) = buffer.split_at_mut(count);
            if let Fault::FlipBit(at) = fault
                && let Some(byte) = at.checked_sub(offset).and_then(|index| piece.get_mut(usize::try_from(index).ok()?))
            {
                *byte ^= 1;
            }
            if let Fault::Slow { pause, .. } = fault {
                stream.flush()?;
                self.wait(*pause);
            }
            stream.write_all(piece)?;
            lock(&self.log).body_bytes += count as u64;
        }
        stream.flush()
    }

    /// Sleeps, but not longer than the registry lives.
    fn wait(&self, time: Duration) {
        let step = Duration::from_millis(10);
        let mut left = time;
        while !left.is_zero() && !self.stopping.load(Ordering::SeqCst) {
            thread::sleep(left.min(step));
            left = left.saturating_sub(step);
        }
    }

    /// Keeps silent until the client leaves or the registry ends.
    fn stall(&self, raw: &TcpStream) -> io::Result<()> {
        raw.set_read_timeout(Some(Duration::from_millis(20)))?;
        let mut byte = [0];
        while !self.stopping.load(Ordering::SeqCst) {
            match raw.peek(&mut byte) {
                Ok(0) => return Ok(()),
                Ok(_) => self.wait(Duration::from_millis(20)),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }
}

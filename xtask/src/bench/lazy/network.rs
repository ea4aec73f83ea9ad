//! A network of 100 Mbit/s and 20 ms there and back, between a client and a server on the loopback device: a relay, since netem is not in every
//! kernel and would slow down everything else that uses the device.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

/// Bytes a second: 100 Mbit/s.
const RATE: f64 = 12_500_000.0;
/// In one direction.
const DELAY: Duration = Duration::from_millis(10);
/// Bytes that travel together.
const PIECE: usize = 16 << 10;
/// Pieces on their way: what the line holds, and the server's buffer.
const ON_THE_WAY: usize = 64;

/// One direction of the line, which all connections share.
struct Line {
    /// When it has carried all that was given to it.
    free: Mutex<Instant>,
    carried: AtomicU64,
}

/// The relay, until the process ends.
pub(super) struct Network {
    /// Where clients connect.
    pub(super) host: String,
    down: Arc<Line>,
}

impl Network {
    /// Before the server at `upstream`.
    pub(super) fn before(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let host = listener.local_addr()?.to_string();
        let (up, down) = (Arc::new(Line::new()), Arc::new(Line::new()));
        let (upstream, to_client) = (upstream.to_owned(), Arc::clone(&down));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (upstream, up, down) = (upstream.clone(), Arc::clone(&up), Arc::clone(&to_client));
                thread::spawn(move || connect(client, &upstream, &up, &down));
            }
        });
        Ok(Self { host, down })
    }

    /// Bytes that came to clients so far.
    pub(super) fn carried(&self) -> u64 {
        self.down.carried.load(Ordering::Relaxed)
    }
}

impl Line {
    fn new() -> Self {
        Self { free: Mutex::new(Instant::now()), carried: AtomicU64::new(0) }
    }

    /// Waits until the bytes have passed.
    fn carry(&self, bytes: usize) {
        let now = Instant::now();
        let done = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            *free = (*free).max(now) + Duration::from_secs_f64(bytes as f64 / RATE);
            *free
        };
        self.carried.fetch_add(bytes as u64, Ordering::Relaxed);
        thread::sleep(done.saturating_duration_since(now));
    }
}

fn connect(client: TcpStream, upstream: &str, up: &Arc<Line>, down: &Arc<Line>) {
    let Ok(server) = TcpStream::connect(upstream) else { return };
    thread::sleep(2 * DELAY); // the handshake
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (Ok(from_client), Ok(to_client)) = (client.try_clone(), client.try_clone()) else { return };
    let Ok(to_server) = server.try_clone() else { return };
    relay(from_client, to_server, Arc::clone(up));
    relay(server, to_client, Arc::clone(down));
}

/// One direction of a connection.
fn relay(mut from: TcpStream, to: TcpStream, line: Arc<Line>) {
    let (sender, receiver): (SyncSender<(Instant, Vec<u8>)>, _) = sync_channel(ON_THE_WAY);
    thread::spawn(move || deliver(to, &receiver, &line));
    thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let piece = buffer.get(..length).unwrap_or_default().to_vec();
            if sender.send((Instant::now() + DELAY, piece)).is_err() {
                let _ = from.shutdown(Shutdown::Read);
                break;
            }
        }
    });
}

fn deliver(mut to: TcpStream, pieces: &Receiver<(Instant, Vec<u8>)>, line: &Line) {
    for (due, piece) in pieces {
        line.carry(piece.len());
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_and_arrive() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let network = Network::before(&server.local_addr().unwrap().to_string()).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut asked = [0; 4];
            stream.read_exact(&mut asked).unwrap();
            stream.write_all(&vec![7; 1_250_000]).unwrap();
        });
        let start = Instant::now();
        let mut client = TcpStream::connect(&network.host).unwrap();
        client.write_all(b"more").unwrap();
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 1_250_000);
        assert_eq!(network.carried(), 1_250_000);
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(139), "{took:?}");
    }
}

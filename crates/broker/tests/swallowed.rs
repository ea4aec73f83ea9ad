//! A lease whose renewal is never answered.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use common::{Rig, SECRET, path};
use nacre_attest::client::{Agent, BrokerClient, BrokerConfig};
use nacre_broker::PutOptions;

fn lent(seconds: u32) -> PutOptions {
    PutOptions { lease_seconds: Some(seconds), ..PutOptions::default() }
}

/// What a host can do to a network: it passes connections on until it swallows what guests say, and answers nothing, and then until it is dropped.
struct Swallower {
    address: SocketAddr,
    swallows: Arc<AtomicBool>,
    swallowed: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Swallower {
    fn before(broker: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let swallower = Self {
            address: listener.local_addr().unwrap(),
            swallows: Arc::default(),
            swallowed: Arc::default(),
            ends: Arc::default(),
            streams: Arc::default(),
        };
        let (swallows, swallowed) = (swallower.swallows.clone(), swallower.swallowed.clone());
        let (ends, streams) = (swallower.ends.clone(), swallower.streams.clone());
        thread::spawn(move || {
            for guest in listener.incoming().map_while(Result::ok) {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(broker) = TcpStream::connect(broker) else { return };
                let (from_guest, to_guest) = (guest.try_clone().unwrap(), guest.try_clone().unwrap());
                let (from_broker, to_broker) = (broker.try_clone().unwrap(), broker.try_clone().unwrap());
                streams.lock().unwrap().extend([guest, broker]);
                let (swallows, swallowed) = (swallows.clone(), swallowed.clone());
                thread::spawn(move || {
                    pass(from_guest, to_broker, || {
                        let swallows = swallows.load(Ordering::SeqCst);
                        swallowed.fetch_add(usize::from(swallows), Ordering::SeqCst);
                        !swallows
                    });
                });
                thread::spawn(move || pass(from_broker, to_guest, || true));
            }
        });
        swallower
    }
}

impl Drop for Swallower {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = TcpStream::connect(self.address);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, passes: impl Fn() -> bool) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if passes() && to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn a_lease_ends_in_time_while_the_answer_to_its_renewal_hangs() {
    let rig = Rig::new();
    rig.broker.put_resource_with(&path("a/key/1"), SECRET, lent(5)).unwrap();
    rig.broker.put_resource_with(&path("a/key/2"), SECRET, lent(6)).unwrap();
    let network = Swallower::before(rig.handle.address());
    let config = BrokerConfig { url: format!("https://{}", network.address), ..rig.config() };
    assert!(config.timeout > Duration::from_secs(20), "longer than the leases");
    let client = Arc::new(BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap());
    let agent = Agent::start(client.clone()).unwrap();
    let (told, tells) = mpsc::channel();
    let since = Instant::now();
    for name in ["a/key/1", "a/key/2"] {
        let lease = client.borrow(&path(name), None).unwrap().lease.unwrap();
        let told = told.clone();
        agent.keep(lease, Box::new(move |error| told.send((name, Instant::now(), error.to_string())).unwrap()));
    }
    network.swallows.store(true, Ordering::SeqCst);
    // The renewal of the first hangs from its half on, and that of the second waits behind it.
    for (expected, seconds) in [("a/key/1", 5), ("a/key/2", 6)] {
        let (name, at, why) = tells.recv_timeout(Duration::from_secs(10)).unwrap();
        let (earliest, latest) = (Duration::from_secs(seconds) / 2, Duration::from_secs(seconds));
        assert!(name == expected && why.contains("ran out before it could be renewed"), "{name}: {why}");
        assert!((earliest..latest).contains(&(at - since)), "{name}: {:?}", at - since);
        assert!(network.swallowed.load(Ordering::SeqCst) > 0, "nobody tried to renew");
    }
    // Once: what the renewal comes to at last says nothing more.
    drop(network);
    drop(agent);
    assert!(tells.try_recv().is_err());
}

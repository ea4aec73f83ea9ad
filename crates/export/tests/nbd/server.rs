//! Sockets, limits, and the end of a server.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    sync::{Arc, atomic::Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use nacre_export::{
    FrontEnd as _,
    nbd::{Listen, NbdError, NbdServer, NbdSettings, Transmission, wire},
};

use crate::{
    Fixture,
    client::{Client, request},
    memory::Memory,
};

/// Waits for something that is about to be.
fn eventually(what: &str, is: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_socket_file_is_private_replaces_only_a_dead_one_and_goes_with_the_server() {
    let mut fixture = Fixture::new(1 << 20);
    let socket = fixture.socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let start = || NbdServer::start(Arc::new(Memory::new(1 << 20)), NbdSettings::new(Listen::Unix(socket.clone())));
    assert!(matches!(start(), Err(NbdError::Listen { .. })), "somebody listens");
    fixture.stop().unwrap();
    assert!(!socket.exists());

    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let server = start().unwrap();
    Client::open(&socket, true);
    // A file that took its place is not removed.
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "mine").unwrap();
    drop(server);
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
    assert!(start().is_err());
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
}

#[test]
fn settings_that_cannot_be_served_are_refused() {
    let store = || Arc::new(Memory::new(1 << 20));
    let settings = NbdSettings::new(Listen::Tcp("127.0.0.1:0".parse().unwrap()));
    let nowhere = NbdSettings { listen: Vec::new(), ..settings.clone() };
    assert!(matches!(NbdServer::start(store(), nowhere), Err(NbdError::NoAddress)));
    let long = NbdSettings { name: "x".repeat(4097), ..settings.clone() };
    assert!(matches!(NbdServer::start(store(), long), Err(NbdError::Name(4097))));
    let named = NbdSettings { name: "a disk?".into(), ..settings };
    let server = NbdServer::start(store(), named).unwrap();
    assert!(server.device().ends_with("/a%20disk%3F"), "{}", server.device());
}

#[test]
fn the_end_finishes_what_was_begun_and_flushes() {
    let mut store = Memory::new(1 << 20);
    *store.hold.get_mut().unwrap() = true;
    let mut fixture = Fixture::with(store, |_| {});
    let mut client = Client::open(&fixture.socket(), true);
    client.request(0, 0, 7, 0, 4096, &[]);
    let mut idle = Client::open(&fixture.socket(), true);
    let store = fixture.store.clone();
    eventually("the read has begun", || store.most_at_once.load(SeqCst) == 1);
    let ending = thread::spawn(move || fixture.stop());
    assert!(idle.is_closed());
    assert!(!ending.is_finished());
    *store.hold.lock().unwrap() = false;
    store.released.notify_all();
    assert_eq!(client.reply().cookie, 7);
    assert!(client.is_closed());
    ending.join().unwrap().unwrap();
    assert_eq!(store.flushes.load(SeqCst), 1);
}

#[test]
fn a_flush_that_fails_at_the_end_is_said() {
    let mut fixture = Fixture::new(1 << 20);
    fixture.store.flush_fails.store(true, SeqCst);
    let mut server = fixture.server.take().unwrap();
    assert!(server.stop().unwrap_err().to_string().contains("the medium is gone"));
    assert!(server.has_ended());
    // What could not be done can be tried again.
    fixture.store.flush_fails.store(false, SeqCst);
    server.stop().unwrap();
    assert_eq!(fixture.store.flushes.load(SeqCst), 2);
}

#[test]
fn a_client_that_takes_no_replies_holds_up_nobody() {
    for slow in [false, true] {
        let mut store = Memory::new(64 << 20);
        store.slow = slow;
        let mut fixture = Fixture::with(store, |settings| settings.stop_time = Duration::from_millis(100));
        let mut deaf = Client::open(&fixture.socket(), true);
        for at in 0..64 {
            deaf.request(0, 0, at, 0, 32 << 20, &[]);
        }
        let mut other = Client::open(&fixture.socket(), true);
        for _ in 0..100 {
            assert_eq!(other.tries(0, 1, 0, 4096, &[1; 4096]), 0);
        }
        // One that stops in the middle of a request.
        let mut half = Client::open(&fixture.socket(), true);
        half.send(&request(0, 1, 1, 0, 1 << 20)[..20]);
        let begin = Instant::now();
        fixture.stop().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn a_read_that_waits_does_not_hold_up_what_comes_after_it_on_a_slow_store() {
    let mut store = Memory::new(1 << 20);
    store.slow = true;
    *store.hold.get_mut().unwrap() = true;
    let fixture = Fixture::with(store, |_| {});
    let mut client = Client::open(&fixture.socket(), true);
    client.request(0, 0, 1, 0, 4096, &[]);
    eventually("the read has begun", || fixture.store.most_at_once.load(SeqCst) == 1);
    client.request(0, 1, 2, 8192, 4096, &[1; 4096]);
    client.request(0, 3, 3, 0, 0, &[]);
    assert_eq!([client.reply().cookie, client.reply().cookie], [2, 3]);
    *fixture.store.hold.lock().unwrap() = false;
    fixture.store.released.notify_all();
    assert_eq!(client.reply().cookie, 1);
}

#[test]
fn there_are_only_so_many_clients_and_they_have_only_so_long() {
    let fixture = Fixture::with(Memory::new(1 << 20), |settings| {
        settings.max_connections = 3;
        settings.handshake_time = Duration::from_millis(300);
    });
    let mut client = Client::open(&fixture.socket(), true);
    let mut silent = Client::connect(&fixture.socket());
    silent.take::<18>();
    let mut dripping = Client::greeted(&fixture.socket());
    eventually("three clients", || fixture.server().clients() == 3);
    assert!(Client::connect(&fixture.socket()).is_closed(), "the fourth is sent away");
    let begin = Instant::now();
    let option = [wire::OPTION_MAGIC.to_be_bytes().as_slice(), &[0; 1000]].concat();
    for byte in option.chunks(1) {
        if dripping.0.write_all(byte).is_err() || begin.elapsed() > Duration::from_secs(20) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(begin.elapsed() < Duration::from_secs(15), "a byte now and then does not buy time");
    assert_eq!(silent.0.read(&mut [0]).unwrap(), 0);
    eventually("one client", || fixture.server().clients() == 1);
    thread::sleep(Duration::from_millis(400));
    assert_eq!(client.does(0, 0, 0, 1, &[]).data, [0], "after the handshake there is no hurry");
    Client::open(&fixture.socket(), true);
}

#[test]
fn a_flush_covers_what_another_connection_wrote() {
    let fixture = Fixture::new(1 << 20);
    let (mut one, mut other) = (Client::open(&fixture.socket(), true), Client::open(&fixture.socket(), false));
    assert_eq!(one.tries(0, 1, 4096, 4096, &[1; 4096]), 0);
    other.request(0, 3, 1, 0, 0, &[]);
    assert_eq!(other.simple(0).error, 0);
    assert_eq!((fixture.store.writes.load(SeqCst), fixture.store.flushes.load(SeqCst)), (1, 1));
    other.request(0, 0, 1, 4096, 1, &[]);
    assert_eq!(other.simple(1).data, [1]);
}

/// A store that is to grow from one MiB to two.
fn growing() -> Memory {
    let mut store = Memory::new(2 << 20);
    *store.size.get_mut() = 1 << 20;
    store
}

#[test]
fn a_client_has_the_size_of_its_handshake_until_it_connects_again() {
    let fixture = Fixture::with(growing(), |_| {});
    let mut client = Client::open(&fixture.socket(), true);
    fixture.store.size.store(2 << 20, SeqCst);
    assert_eq!(client.tries(0, 0, 1 << 20, 4096, &[]), wire::Errno::Invalid as u32);
    assert_eq!(client.tries(0, 1, 1 << 20, 4096, &[1; 4096]), wire::Errno::NoSpace as u32);
    let mut again = Client::open(&fixture.socket(), true);
    assert_eq!(again.tries(0, 1, 1 << 20, 4096, &[1; 4096]), 0);
    assert_eq!(again.tries(0, 1, 2 << 20, 4096, &[1; 4096]), wire::Errno::NoSpace as u32);
    // The first connection still is what it was.
    assert_eq!(client.tries(0, 0, 1 << 20, 4096, &[]), wire::Errno::Invalid as u32);
    assert_eq!(client.does(0, 0, 0, 4096, &[]).data, [0; 4096]);
}

#[test]
fn a_client_that_hears_of_growth_reaches_what_the_store_has_grown_by() {
    let store = Arc::new(growing());
    let transmission = Transmission::new(store.clone(), false);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serving = transmission.clone();
    let server = thread::spawn(move || serving.serve(theirs));
    let mut client = Client(ours);
    let mut write = |offset| {
        client.request(0, 1, 7, offset, 4096, &[9; 4096]);
        client.simple(0).error
    };
    assert_eq!(write((1 << 20) - 4096), 0);
    assert_eq!(write(1 << 20), wire::Errno::NoSpace as u32);
    store.size.store(2 << 20, SeqCst);
    assert_eq!(transmission.size(), 2 << 20);
    assert_eq!(write(1 << 20), 0);
    assert_eq!(write((2 << 20) - 4096), 0);
    assert_eq!(write(2 << 20), wire::Errno::NoSpace as u32);
    assert_eq!(store.writes.load(SeqCst), 3);
    drop(client);
    server.join().unwrap().unwrap();
}

//! Manifests and blobs from registries that are slow, cut, lie or fail.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nacre_oci::{
    manifest::MANIFEST_LIMIT,
    registry::{ClientConfig, CredentialStore},
    source::{ImageSource as _, TransportError},
};
use nacre_testkit::{
    Rng,
    registry::{Fault, Registry},
};

use crate::{
    script::{Script, ok},
    support::{client, client_with, descriptor, fetch, manifest, noise, quick, sha, source},
};

const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn registry_with(blob: &[u8]) -> (Registry, String) {
    let registry = Registry::memory().unwrap();
    registry.put_blob(blob).unwrap();
    registry.put_manifest("a/b", Some("v1"), TYPE, &manifest()).unwrap();
    let name = format!("{}/a/b:v1", registry.host());
    (registry, name)
}

#[test]
fn an_image_is_fetched() {
    let blob = noise(3_000_000);
    let (_registry, name) = registry_with(&blob);
    let source = source(&client(quick()), &name);
    let raw = source.manifest(None).unwrap();
    assert_eq!(raw.peek().bytes(), manifest());
    let digest = *raw.peek().digest();
    assert_eq!(source.manifest(Some(&digest)).unwrap().peek(), raw.peek());
    assert_eq!(*source.resolve_digest().unwrap().unwrap().peek(), digest);
    assert_eq!(fetch(&source, &descriptor(&blob)).unwrap(), blob);
    assert_eq!(
        fetch(&source, &descriptor(b"")).unwrap_err().to_string(),
        format!("blob {} not found at {}", sha(b""), name.trim_end_matches(":v1"))
    );
    let missing = crate::support::source(&client(quick()), &name.replace(":v1", ":v2"));
    assert!(missing.manifest(None).unwrap_err().is_not_found());
    assert!(missing.resolve_digest().unwrap_err().is_not_found());
}

#[test]
fn what_is_in_the_store_costs_one_request() {
    let (registry, name) = registry_with(b"");
    let client = client(quick());
    source(&client, &name).resolve_digest().unwrap();
    registry.clear_log();
    source(&client, &name).resolve_digest().unwrap();
    assert_eq!(registry.requests().len(), 1);
    assert_eq!(registry.requests()[0].method, "HEAD");
    registry.clear_log();
    let by_digest = format!("{}/a/b@{}", registry.host(), sha(b"x"));
    assert_eq!(*source(&client, &by_digest).resolve_digest().unwrap().unwrap().peek(), sha(b"x"));
    assert_eq!(registry.requests().len(), 0);
}

#[test]
fn a_cut_blob_is_resumed_from_the_byte_it_has() {
    let blob = noise(2_000_000);
    let (registry, name) = registry_with(&blob);
    let mut rng = Rng::new(7);
    let cuts: Vec<u64> = (0..3).map(|_| rng.next_u64() % 500_000).collect();
    registry.set_faults(move |request| match (request.is_blob_get(), cuts.get(request.attempt - 1)) {
        (true, Some(cut)) => Fault::CutAfter(*cut),
        _ => Fault::Serve,
    });
    assert_eq!(fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap(), blob);
    let ranges = registry.count(|request| request.header("range").is_some());
    assert!((1..=3).contains(&ranges), "{ranges}");
    assert!(registry.body_bytes_sent() < 2_200_000, "{}", registry.body_bytes_sent());
}

#[test]
fn a_blob_that_is_cut_often_but_goes_on_is_fetched() {
    let blob = noise(12 << 20);
    let (registry, name) = registry_with(&blob);
    // Twelve cuts are more than the retries, but each is a MiB and more after the one before.
    registry.set_faults(|request| if request.is_blob_get() { Fault::CutAfter(1_100_000) } else { Fault::Serve });
    assert_eq!(fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap(), blob);
}

#[test]
fn a_blob_that_is_always_cut_fails_after_the_retries() {
    let blob = noise(100_000);
    let (registry, name) = registry_with(&blob);
    registry.set_faults(|request| if request.is_blob_get() { Fault::CutAfter(10) } else { Fault::Serve });
    let error = fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap_err();
    assert!(matches!(error, TransportError::Network { attempts: 4, .. }), "{error}");
    assert_eq!(registry.count(|request| request.is_blob_get()), 4);
}

#[test]
fn a_registry_that_ignores_ranges_is_read_again() {
    let blob = noise(400_000);
    let (registry, name) = registry_with(&blob);
    registry.set_faults(|request| match (request.is_blob_get(), request.attempt) {
        (true, 1) => Fault::CutAfter(150_000),
        (true, _) => Fault::IgnoreRange,
        _ => Fault::Serve,
    });
    assert_eq!(fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap(), blob);
}

#[test]
fn a_wrong_content_range_is_refused() {
    let blob = noise(100_000);
    for wrong in [
        "bytes 0-99999/100000",
        "bytes 50001-99999/100000",
        "bytes 50000-99999/100001",
        "bytes 50000-100000/*",
        "garbage",
        "",
    ] {
        let (registry, name) = registry_with(&blob);
        registry.set_faults(move |request| match (request.is_blob_get(), request.attempt) {
            (true, 1) => Fault::CutAfter(50_000),
            (true, _) => Fault::ContentRange(wrong.into()),
            _ => Fault::Serve,
        });
        let error = fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap_err();
        assert!(
            matches!(error, TransportError::Protocol { .. }) && error.to_string().contains("Content-Range"),
            "{wrong}: {error}"
        );
    }
}

#[test]
fn a_stalled_body_fails_after_the_stall_limit() {
    let blob = noise(100_000);
    let (registry, name) = registry_with(&blob);
    registry.set_faults(|request| if request.is_blob_get() { Fault::StallAfter(1000) } else { Fault::Serve });
    let config = ClientConfig { retries: 1, stall_timeout: Duration::from_millis(200), ..quick() };
    let start = Instant::now();
    let error = fetch(&source(&client(config), &name), &descriptor(&blob)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(error.to_string().contains("stalled"), "{error}");
}

#[test]
fn a_stall_is_resumed() {
    let blob = noise(100_000);
    let (registry, name) = registry_with(&blob);
    registry.set_faults(|request| match (request.is_blob_get(), request.attempt) {
        (true, 1) => Fault::StallAfter(1000),
        _ => Fault::Serve,
    });
    let config = ClientConfig { stall_timeout: Duration::from_millis(200), ..quick() };
    assert_eq!(fetch(&source(&client(config), &name), &descriptor(&blob)).unwrap(), blob);
}

#[test]
fn a_body_that_trickles_counts_as_stalled() {
    let blob = noise(100_000);
    let (registry, name) = registry_with(&blob);
    registry.set_faults(|request| {
        if request.is_blob_get() { Fault::Slow { bytes: 1, pause: Duration::from_millis(50) } } else { Fault::Serve }
    });
    let config = ClientConfig { retries: 0, stall_timeout: Duration::from_millis(300), slowest_rate: 1000, ..quick() };
    let start = Instant::now();
    let error = fetch(&source(&client(config), &name), &descriptor(&blob)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(error.to_string().contains("too slow"), "{error}");
}

#[test]
fn a_consumer_that_waits_does_not_make_the_peer_slow() {
    let blob = noise(3_000_000);
    let (_registry, name) = registry_with(&blob);
    let config =
        ClientConfig { retries: 0, stall_timeout: Duration::from_millis(100), slowest_rate: 1 << 20, ..quick() };
    let mut stream = source(&client(config), &name).blob(&descriptor(&blob)).unwrap();
    let mut piece = vec![0; 1_000_000];
    for expected in blob.chunks(1_000_000) {
        thread::sleep(Duration::from_millis(150));
        stream.read_exact(&mut piece).unwrap();
        assert_eq!(piece, expected);
    }
}

#[test]
fn an_answer_that_never_comes_is_not_waited_for() {
    let (registry, name) = registry_with(b"");
    registry.set_faults(
        |request| {
            if request.is_manifest_get() { Fault::Delay(Duration::from_secs(20)) } else { Fault::Serve }
        },
    );
    let config = ClientConfig { retries: 0, stall_timeout: Duration::from_millis(200), ..quick() };
    let start = Instant::now();
    let error = source(&client(config), &name).manifest(None).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(matches!(error, TransportError::Network { attempts: 1, .. }), "{error}");
}

#[test]
fn a_handshake_that_never_ends_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("{}/a:b", listener.local_addr().unwrap());
    let config = ClientConfig {
        retries: 0,
        insecure: false,
        system_roots: true,
        connect_timeout: Duration::from_millis(300),
        ..quick()
    };
    let start = Instant::now();
    let error = source(&client(config), &name).manifest(None).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(matches!(error, TransportError::Network { attempts: 1, .. } | TransportError::Config { .. }), "{error}");
}

#[test]
fn lies_about_length_are_refused() {
    let blob = noise(100_000);
    for lie in [0, 99_999, 100_001, u64::MAX] {
        let (registry, name) = registry_with(&blob);
        registry
            .set_faults(move |request| if request.is_blob_get() { Fault::ContentLength(lie) } else { Fault::Serve });
        let error = fetch(&source(&client(quick()), &name), &descriptor(&blob)).unwrap_err();
        assert!(error.to_string().contains("the manifest says 100000 bytes"), "{lie}: {error}");
    }
    // Without a length: more and fewer bytes than the descriptor has.
    for (sent, words) in [(&blob[..], "is larger than 99999 bytes"), (&blob[..99_000], "ended at 99000 of 99999 bytes")]
    {
        let sent = sent.to_vec();
        let script = Script::new(move |head, stream| {
            if head.contains("/blobs/") && !head.to_ascii_lowercase().contains("range:") {
                let _ = write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(&sent);
            } else {
                ok(stream, "404 Not Found", "", b"");
            }
        });
        let mut short = descriptor(&blob);
        short.size = 99_999;
        let (client, notes) = client_with(quick(), "", CredentialStore::anonymous());
        let error = fetch(&source(&client, &format!("{}/a:b", script.host)), &short).unwrap_err();
        assert!(format!("{error}{}", notes.all()).contains(words), "{error} {}", notes.all());
    }
}

#[test]
fn web_pages_are_told_from_images() {
    let (registry, name) = registry_with(b"x");
    registry.set_faults(|_| Fault::html(200));
    let source = source(&client(quick()), &name);
    for error in [source.manifest(None).unwrap_err(), fetch(&source, &descriptor(b"x")).unwrap_err()] {
        assert!(error.to_string().contains("HTML page"), "{error}");
    }
}

#[test]
fn manifests_have_a_limit() {
    for with_length in [true, false] {
        let script = Script::new(move |_, stream| {
            let body = vec![b' '; MANIFEST_LIMIT + 1];
            if with_length {
                ok(stream, "200 OK", "Content-Type: application/json\r\n", &body);
            } else {
                let _ = write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(&body);
            }
        });
        let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err();
        assert!(matches!(error, TransportError::TooLarge { .. }), "{error}");
    }
}

#[test]
fn answers_that_are_no_http_and_endless_headers_are_refused() {
    for junk in
        [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"HTTP/1.1 \x00\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"]
    {
        let script = Script::new(move |_, stream| drop(stream.write_all(junk)));
        let error = source(&client(ClientConfig { retries: 0, ..quick() }), &format!("{}/a:b", script.host))
            .manifest(None)
            .unwrap_err();
        assert!(!error.is_not_found(), "{error}");
    }
    let script = Script::new(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream.write_all(b"X-Endless: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n").is_ok()
        {
        }
    });
    assert!(
        source(&client(ClientConfig { retries: 0, ..quick() }), &format!("{}/a:b", script.host))
            .manifest(None)
            .is_err()
    );
}

#[test]
fn a_busy_registry_is_asked_again_when_it_says() {
    let (registry, name) = registry_with(b"");
    registry.set_faults(|request| match (request.is_manifest_get(), request.attempt) {
        (true, 1) => Fault::too_many_requests(1),
        (true, 2) => Fault::html(503),
        _ => Fault::Serve,
    });
    let start = Instant::now();
    source(&client(quick()), &name).manifest(None).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
    registry.set_faults(|_| Fault::too_many_requests(100_000));
    let start = Instant::now();
    let error = source(&client(quick()), &name).manifest(None).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(2) && error.to_string().contains("429"), "{error}");
    assert!(error.to_string().contains("Retry-After: 100000 s"), "{error}");
}

#[test]
fn a_closed_port_is_an_error_that_names_it() {
    let config = ClientConfig { retries: 1, ..quick() };
    let error = source(&client(config), "127.0.0.1:1/a:b").manifest(None).unwrap_err();
    assert!(matches!(&error, TransportError::Network { attempts: 2, .. }), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[test]
fn messages_of_the_peer_carry_no_control_characters() {
    let script = Script::new(|_, stream| {
        ok(stream, "400 Bad", "", br#"{"errors":[{"code":"BAD","message":"\u001b[2J\u0007owned\nline"}]}"#);
    });
    let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err().to_string();
    assert!(error.contains("owned") && !error.chars().any(char::is_control), "{error:?}");
}

#[test]
fn requests_share_a_connection() {
    let blob = noise(100_000);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("{}/a/b:v1", listener.local_addr().unwrap());
    let (connections, served) = (Arc::new(AtomicUsize::new(0)), blob.clone());
    let counted = Arc::clone(&connections);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut fresh = true;
            while let Some(range) = asked(&mut stream) {
                counted.fetch_add(usize::from(std::mem::take(&mut fresh)), Ordering::SeqCst);
                let (head, part) = match range {
                    Some((first, last)) => {
                        let head =
                            format!("206 Partial Content\r\nContent-Range: bytes {first}-{last}/{}", served.len());
                        (head, &served[first..=last])
                    }
                    None => ("200 OK".to_owned(), &b"{}"[..]),
                };
                let head = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", part.len());
                stream.get_mut().write_all(&[head.as_bytes(), part].concat()).unwrap();
            }
        }
    });
    let source = source(&client(quick()), &name);
    for offset in (0..90_000).step_by(9000) {
        let mut part = [0; 5000];
        source.read_blob(&descriptor(&blob), offset as u64, &mut part, 0).unwrap();
        assert_eq!(part, blob[offset..offset + 5000]);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

/// Reads a request up to its end; gives the range that it asks for, `None` at the end of the connection.
fn asked(stream: &mut BufReader<TcpStream>) -> Option<Option<(usize, usize)>> {
    let mut range = None;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Some(range);
        }
        if let Some((first, last)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
            range = Some((first.parse().unwrap(), last.parse().unwrap()));
        }
    }
}

//! Images on their way to a registry.

use std::io::{self, Read};

use nacre_oci::{
    manifest::RawManifest,
    registry::ClientConfig,
    source::{ImageSink as _, ImageSource as _, TransportError},
};
use nacre_testkit::registry::{Fault, Registry};

use crate::support::{client, descriptor, fetch, manifest, noise, quick, sha, sink, source};

#[test]
fn blobs_and_manifests_arrive() {
    let registry = Registry::memory().unwrap();
    let name = format!("{}/a/b:v1", registry.host());
    for chunk in [0, 300_000] {
        let client = client(ClientConfig { upload_chunk: chunk, ..quick() });
        let sink = sink(&client, &name);
        for size in [0, 1, 1000, 4 << 20, (4 << 20) + 1, 9_000_000] {
            let mut blob = noise(size);
            blob.push(u8::from(chunk > 0));
            let expected = descriptor(&blob);
            assert!(!sink.has_blob(&expected).unwrap());
            assert_eq!(sink.put_blob(&mut &blob[..], Some(&expected)).unwrap(), (sha(&blob), blob.len() as u64));
            assert!(sink.has_blob(&expected).unwrap());
            blob.push(9);
            assert_eq!(sink.put_blob(&mut &blob[..], None).unwrap(), (sha(&blob), blob.len() as u64));
            assert_eq!(fetch(&source(&client, &name), &descriptor(&blob)).unwrap(), blob);
        }
    }
    let client = client(quick());
    let raw = RawManifest::new(manifest(), None).unwrap();
    let error = sink(&client, &name).commit(&raw).unwrap_err();
    assert!(error.to_string().contains("404") && !error.is_not_found(), "{error}");
    sink(&client, &name).put_blob(&mut &b"{}"[..], None).unwrap();
    sink(&client, &name).commit(&raw).unwrap();
    sink(&client, &name).put_tagged(&raw, "other").unwrap();
    assert!(sink(&client, &name).put_tagged(&raw, "../x").is_err());
    assert_eq!(registry.tag("a/b", "v1").unwrap(), Some(*raw.digest()));
    assert_eq!(registry.tag("a/b", "other").unwrap(), Some(*raw.digest()));
    let by_digest = format!("{}/a/b@{}", registry.host(), sha(b"x"));
    assert!(matches!(sink(&client, &by_digest).commit(&raw), Err(TransportError::DigestMismatch { .. })));
}

#[test]
fn content_that_is_not_as_announced_does_not_become_visible() {
    let registry = Registry::memory().unwrap();
    let name = format!("{}/a/b:v1", registry.host());
    for chunk in [0, 300_000] {
        let client = client(ClientConfig { upload_chunk: chunk, ..quick() });
        let sink = sink(&client, &name);
        for size in [1000, 6_000_000] {
            let blob = noise(size);
            let mut expected = descriptor(&blob);
            let mut other = blob.clone();
            other[size - 1] ^= 1;
            let error = sink.put_blob(&mut &other[..], Some(&expected)).unwrap_err();
            assert!(matches!(error, TransportError::DigestMismatch { .. }), "{error}");
            assert!(sink.put_blob(&mut &blob[..size - 1], Some(&expected)).is_err());
            other.push(1);
            assert!(sink.put_blob(&mut &other[..], Some(&expected)).is_err());
            expected.size += 1;
            assert!(sink.put_blob(&mut &blob[..], Some(&expected)).is_err());
            assert_eq!(registry.blob(&sha(&other)).unwrap(), None);
            assert_eq!(registry.blob(&sha(&blob)).unwrap(), None);
        }
    }
}

struct Failing(u64);

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            let mismatch =
                TransportError::Protocol { what: "x".into(), place: "the source".into(), reason: "gone".into() };
            return Err(io::Error::other(mismatch));
        }
        let count = buffer.len().min(usize::try_from(self.0).unwrap_or(usize::MAX));
        self.0 -= count as u64;
        Ok(count)
    }
}

#[test]
fn a_source_that_fails_is_named_not_the_registry() {
    let registry = Registry::memory().unwrap();
    let client = client(quick());
    let sink = sink(&client, &format!("{}/a/b:v1", registry.host()));
    for (after, size) in [(10, None), (5 << 20, None), (5 << 20, Some(6 << 20))] {
        let mut expected = descriptor(b"");
        expected.size = size.unwrap_or_default();
        let error = sink.put_blob(&mut Failing(after), size.map(|_| &expected)).unwrap_err();
        assert!(error.to_string().contains("the source") && error.to_string().contains("gone"), "{error}");
    }
}

#[test]
fn small_blobs_and_pieces_are_sent_again() {
    let registry = Registry::memory().unwrap();
    let writes = std::sync::atomic::AtomicUsize::new(0);
    registry.set_faults(move |request| {
        if !matches!(request.method.as_str(), "POST" | "PUT" | "PATCH") {
            return Fault::Serve;
        }
        match writes.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 5 {
            1 => Fault::Close,
            3 => Fault::Answer { status: 502, headers: vec![], body: vec![] },
            _ => Fault::Serve,
        }
    });
    let client = client(ClientConfig { upload_chunk: 1 << 20, retries: 6, ..quick() });
    let sink = sink(&client, &format!("{}/a/b:v1", registry.host()));
    for size in [1000, 7_000_000] {
        let blob = noise(size);
        sink.put_blob(&mut &blob[..], Some(&descriptor(&blob))).unwrap();
        assert_eq!(registry.blob(&sha(&blob)).unwrap().unwrap(), blob);
    }
    sink.put_blob(&mut &b"{}"[..], None).unwrap();
    sink.commit(&RawManifest::new(manifest(), None).unwrap()).unwrap();
}

#[test]
fn a_registry_that_stores_something_else_is_caught() {
    let registry = Registry::memory().unwrap();
    let other = sha(b"other").to_string();
    registry.set_faults(move |request| match request.method.as_str() {
        "PUT" => Fault::Headers(vec![("Docker-Content-Digest".into(), other.clone())]),
        _ => Fault::Serve,
    });
    let client = client(quick());
    let sink = sink(&client, &format!("{}/a/b:v1", registry.host()));
    assert!(sink.put_blob(&mut &b"x"[..], None).is_err());
    assert!(sink.commit(&RawManifest::new(manifest(), None).unwrap()).is_err());
}

#[test]
fn uploads_are_not_sent_to_where_they_must_not_go() {
    let elsewhere = Registry::memory().unwrap();
    for (method, status) in [("POST", 307), ("PUT", 308), ("PATCH", 307)] {
        let registry = Registry::memory().unwrap();
        let location = format!("{}/v2/a/b/blobs/uploads/x", elsewhere.url());
        registry.set_faults(move |request| {
            if request.method == method { Fault::Redirect { status, location: location.clone() } } else { Fault::Serve }
        });
        let client = client(ClientConfig { retries: 0, ..quick() });
        let sink = sink(&client, &format!("{}/a/b:v1", registry.host()));
        assert!(sink.put_blob(&mut &noise(5 << 20)[..], None).is_err());
        assert!(sink.put_blob(&mut &b"x"[..], None).is_err() || method == "PATCH");
    }
    assert_eq!(elsewhere.requests().len(), 0);
}

#[test]
fn blobs_are_mounted_where_the_registry_can() {
    let registry = Registry::memory().unwrap();
    let client = client(quick());
    let blob = noise(1000);
    sink(&client, &format!("{}/a:1", registry.host())).put_blob(&mut &blob[..], None).unwrap();
    let target = sink(&client, &format!("{}/b:1", registry.host()));
    target.mount_blob(&sha(&blob), &format!("{}/a", registry.host()).parse().unwrap()).unwrap();
    assert!(!target.mount_blob(&sha(b"none"), &format!("{}/a", registry.host()).parse().unwrap()).unwrap());
    assert!(!target.mount_blob(&sha(&blob), &"other.example/a".parse().unwrap()).unwrap());
    assert!(source(&client, &format!("{}/b:1", registry.host())).manifest(None).unwrap_err().is_not_found());
}

//! A cache of the node that blobs are asked of before the registry.

use nacre_oci::{
    registry::{ClientConfig, CredentialStore, RegistriesConf},
    source::{ImageSource as _, TransportError},
};
use nacre_testkit::registry::Registry;

use crate::{
    script::{Script, ok},
    support::{client, descriptor, fetch, manifest, noise, quick, source},
};

const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn with_cache(cache: &str) -> ClientConfig {
    ClientConfig { node_cache: Some(format!("http://{cache}")), ..quick() }
}

#[test]
fn blobs_come_from_it_and_manifests_do_not() {
    let blob = noise(100_000);
    let registry = Registry::memory().unwrap();
    registry.put_blob(&blob).unwrap();
    registry.put_manifest("a/b", Some("v1"), TYPE, &manifest()).unwrap();
    let name = format!("{}/a/b:v1", registry.host());
    let served = blob.clone();
    let cache = Script::new(move |head, stream| {
        if head.contains("range: bytes=10-19\r\n") || head.contains("Range: bytes=10-19\r\n") {
            ok(stream, "206 Partial Content", "Content-Range: bytes 10-19/100000\r\n", served.get(10..20).unwrap());
        } else if head.starts_with("GET /v2/a/b/blobs/") {
            ok(stream, "200 OK", "Content-Type: application/octet-stream\r\n", &served);
        } else {
            ok(stream, "200 OK", "", b"");
        }
    });
    let source = source(&client(with_cache(&cache.host)), &name);
    source.manifest(None).unwrap();
    assert_eq!(cache.requests().len(), 0, "a name is the registry's to answer");
    registry.clear_log();
    assert_eq!(fetch(&source, &descriptor(&blob)).unwrap(), blob);
    let mut part = [0; 10];
    source.read_blob(&descriptor(&blob), 10, &mut part, 0).unwrap();
    assert_eq!(part, blob.get(10..20).unwrap());
    assert!(registry.requests().is_empty());
    let asked: Vec<String> = cache.requests().into_iter().filter(|head| head.contains("/blobs/")).collect();
    assert_eq!(asked.len(), 2);
    for head in asked {
        assert!(head.contains(&format!("?ns={} ", registry.host())), "{head}");
        assert!(head.to_ascii_lowercase().contains(&format!("x-dragonfly-registry: http://{}\r\n", registry.host())));
        assert!(!head.to_ascii_lowercase().contains("authorization"));
    }
}

#[test]
fn what_it_has_not_the_registry_has() {
    let blob = noise(10_000);
    let registry = Registry::memory().unwrap();
    registry.put_blob(&blob).unwrap();
    let name = format!("{}/a/b:v1", registry.host());
    let cache = Script::new(|_, stream| ok(stream, "404 Not Found", "", b"{}"));
    let from = source(&client(with_cache(&cache.host)), &name);
    assert_eq!(fetch(&from, &descriptor(&blob)).unwrap(), blob);
    let mut part = [0; 10];
    from.read_blob(&descriptor(&blob), 10, &mut part, 0).unwrap();
    assert_eq!(part, blob.get(10..20).unwrap());
    // Nobody listens there.
    let from = source(&client(with_cache("127.0.0.1:1")), &name);
    assert_eq!(fetch(&from, &descriptor(&blob)).unwrap(), blob);
}

#[test]
fn what_is_no_origin_is_refused() {
    for text in ["127.0.0.1:65001", "ftp://a", "http://", "http://a/b", "http://a b", "https://user@a"] {
        let config = ClientConfig { node_cache: Some(text.into()), ..quick() };
        let conf = RegistriesConf::parse(b"").unwrap();
        let progress = std::sync::Arc::new(nacre_core::NoProgress);
        let made = nacre_oci::registry::Client::new(config, conf, CredentialStore::anonymous(), progress);
        assert!(matches!(made, Err(TransportError::Config { .. })), "{text}");
    }
}

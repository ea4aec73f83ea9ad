//! Where signatures are found.

use std::fs;

use nacre_oci::{
    manifest::{Descriptor, media},
    source::{ImageSink as _, ImageSource as _, TransportError},
};
use nacre_testkit::registry::{Fault, Registry};
use serde_json::json;

use crate::{
    script::{Script, ok},
    support::{client, descriptor, manifest, noise, quick, sha, sink, source},
};

const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn artifact(subject: &Descriptor, kind: &str) -> nacre_oci::manifest::RawManifest {
    let config = Descriptor::of(media::OCI_EMPTY, b"{}");
    let value = json!({
        "schemaVersion": 2, "mediaType": TYPE, "artifactType": kind, "config": config, "layers": [], "subject": subject,
    });
    nacre_oci::manifest::RawManifest::new(value.to_string().into_bytes(), None).unwrap()
}

#[test]
fn referrers_are_found_by_the_api_and_by_the_fallback_tag() {
    for with_api in [true, false] {
        let registry =
            if with_api { Registry::memory() } else { Registry::builder().without_referrers().start() }.unwrap();
        let image = Descriptor::of(TYPE, &manifest());
        registry.put_manifest("a", Some("1"), TYPE, &manifest()).unwrap();
        registry.put_blob(b"{}").unwrap();
        let client = client(quick());
        let name = format!("{}/a:1", registry.host());
        let source = source(&client, &name);
        let storage = source.signatures().unwrap();
        assert_eq!(storage.referrers(&image.digest, None).unwrap(), []);
        let sink = sink(&client, &name);
        let (one, two) = (artifact(&image, media::SIGSTORE_BUNDLE), artifact(&image, "application/other"));
        for artifact in [&one, &two, &one] {
            sink.put_manifest(artifact).unwrap();
        }
        let found = storage.referrers(&image.digest, Some(media::SIGSTORE_BUNDLE)).unwrap();
        assert_eq!(found.len(), 1, "api {with_api}");
        assert_eq!(found[0].digest, *one.digest());
        assert_eq!(storage.referrers(&image.digest, None).unwrap().len(), 2);
        assert_eq!(registry.tag("a", &format!("sha256-{}", image.digest.hex())).unwrap().is_none(), with_api);
        assert_eq!(storage.by_digest(two.digest()).unwrap().peek(), &two);
    }
}

#[test]
fn referrers_come_in_pages_and_have_a_limit() {
    let entry = Descriptor::of(TYPE, b"x");
    let script = Script::new(move |head, stream| {
        let list = vec![entry.clone(); 100];
        let body = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": list }).to_string();
        let page: usize = head.split("page=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0);
        let link = format!("Content-Type: {}\r\nLink: <?page={}>; rel=\"next\"\r\n", media::OCI_INDEX, page + 1);
        ok(stream, "200 OK", &link, body.as_bytes());
    });
    let client = client(quick());
    let source = source(&client, &format!("{}/a:1", script.host));
    assert_eq!(source.signatures().unwrap().referrers(&sha(b""), None).unwrap().len(), 1024);
    assert!(script.requests().len() <= 13);
}

#[test]
fn referrers_of_another_kind_of_server_are_none() {
    for (status, kind, body) in [("200 OK", "application/json", "{}"), ("404 Not Found", "text/plain", "")] {
        let script = Script::new(move |head, stream| match head {
            head if head.contains("/referrers/") => {
                ok(stream, status, &format!("Content-Type: {kind}\r\n"), body.as_bytes())
            }
            _ => ok(stream, "404 Not Found", "", b""),
        });
        let client = client(quick());
        let source = source(&client, &format!("{}/a:1", script.host));
        assert_eq!(source.signatures().unwrap().referrers(&sha(b""), None).unwrap(), []);
    }
    // What pretends to be an index, or leads elsewhere, is an error: signatures must not go missing silently.
    for (body, link) in [
        (r#"{"schemaVersion":2,"manifests":7}"#, ""),
        (r#"{"schemaVersion":1,"manifests":[]}"#, ""),
        (r#"{"schemaVersion":2,"manifests":[]}"#, "Link: <http://127.0.0.2:1/x>; rel=next\r\n"),
    ] {
        let script = Script::new(move |_, stream| {
            ok(stream, "200 OK", &format!("Content-Type: {}\r\n{link}", media::OCI_INDEX), body.as_bytes());
        });
        let client = client(quick());
        let source = source(&client, &format!("{}/a:1", script.host));
        source.signatures().unwrap().referrers(&sha(b""), None).unwrap_err();
    }
}

#[test]
fn tags_and_small_blobs_are_read_with_limits() {
    let registry = Registry::memory().unwrap();
    let payload = noise(1000);
    registry.put_blob(&payload).unwrap();
    registry.put_manifest("a", Some("sha256-00.sig"), TYPE, &manifest()).unwrap();
    let client = client(quick());
    let source = source(&client, &format!("{}/a:1", registry.host()));
    let storage = source.signatures().unwrap();
    assert_eq!(storage.tagged("sha256-00.sig").unwrap().unwrap().peek().bytes(), manifest());
    assert!(storage.tagged("sha256-01.sig").unwrap().is_none());
    assert!(storage.tagged("../../x").is_err());
    assert_eq!(storage.small_blob(&descriptor(&payload), 1000).unwrap().peek(), &payload);
    let error = storage.small_blob(&descriptor(&payload), 999).unwrap_err();
    assert!(matches!(error, TransportError::TooLarge { limit: 999, .. }), "{error}");
    // A registry that fails is not one without signatures.
    registry.set_faults(|request| if request.is_manifest_get() { Fault::html(500) } else { Fault::Serve });
    assert!(storage.tagged("sha256-01.sig").is_err());
}

#[test]
fn the_signature_extension_is_read_and_written() {
    let registry = Registry::builder().with_signature_extension().start().unwrap();
    let image = registry.put_manifest("a/b", Some("1"), TYPE, &manifest()).unwrap();
    let client = client(quick());
    let name = format!("{}/a/b:1", registry.host());
    let source = source(&client, &name);
    let storage = source.signatures().unwrap();
    assert_eq!(storage.native(&image).unwrap().len(), 0);
    for signature in [&b"one"[..], b"two"] {
        sink(&client, &name).put_native_signature(&image, signature).unwrap();
    }
    let found: Vec<Vec<u8>> = storage.native(&image).unwrap().into_iter().map(|one| one.peek().clone()).collect();
    assert_eq!(found, [b"one", b"two"]);
    let plain = Registry::memory().unwrap();
    let name = format!("{}/a/b:1", plain.host());
    assert_eq!(crate::support::source(&client, &name).signatures().unwrap().native(&image).unwrap().len(), 0);
    let error = sink(&client, &name).put_native_signature(&image, b"x").unwrap_err();
    assert!(matches!(error, TransportError::Unsupported { .. }), "{error}");
}

#[test]
fn lists_of_signatures_that_are_none_are_refused() {
    let many = format!(
        r#"{{"signatures":[{}]}}"#,
        vec![r#"{"schemaVersion":2,"name":"x","type":"atomic","content":""}"#; 129].join(",")
    );
    for (body, fine) in [
        ("", false),
        ("[1]", false),
        (r#"{"signatures":[{"schemaVersion":2,"name":"x","type":"atomic","content":"%"}]}"#, false),
        (many.as_str(), false),
        (r#"{"signatures":null}"#, true),
        (r#"{"signatures":[{"schemaVersion":3,"name":"x","type":"future","content":"%"}]}"#, true),
    ] {
        let body = body.to_owned();
        let script = Script::new(move |_, stream| {
            ok(stream, "200 OK", "X-Registry-Supports-Signatures: 1\r\n", body.as_bytes())
        });
        let client = client(quick());
        let source = source(&client, &format!("{}/a:1", script.host));
        assert_eq!(source.signatures().unwrap().native(&sha(b"")).is_ok(), fine);
    }
}

#[test]
fn lookaside_files_are_read_with_limits() {
    let registry = Registry::memory().unwrap();
    registry.put_file("/sigs/signature-1", vec![7; 1000]);
    let client = client(quick());
    let source = source(&client, "r.example/a:1");
    let get = |url: &str, limit| source.signatures().unwrap().get(url, limit);
    let url = format!("{}/sigs/signature-1", registry.url());
    assert_eq!(get(&url, 1000).unwrap().unwrap().peek(), &vec![7; 1000]);
    assert!(matches!(get(&url, 999), Err(TransportError::TooLarge { .. })));
    assert!(get(&url.replace("-1", "-2"), 1000).unwrap().is_none());
    registry.set_faults(|request| if request.attempt % 2 == 1 { Fault::Close } else { Fault::Serve });
    registry.clear_log();
    assert!(get(&url, 1000).unwrap().is_some());
    registry.set_faults(|_| Fault::html(200));
    assert!(get(&url, 1000).is_err());

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("signature-1");
    fs::write(&path, b"sig").unwrap();
    let url = format!("file://{}", path.display());
    assert_eq!(get(&url, 3).unwrap().unwrap().peek(), b"sig");
    assert!(get(&url, 2).is_err());
    assert!(get(&format!("{url}x"), 3).unwrap().is_none());
    for bad in ["file://etc/passwd", "file:///tmp/../etc/passwd", "ftp://x/", "file:///dev/zero", "x", "http://u:p@x/"]
    {
        assert!(get(bad, 100).is_err(), "{bad}");
    }
}

//! What a client of the registry sees, the faults included.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use nacre_core::Digest;
use nacre_registry::{Auth, Credentials, Fault, Registry, Request};
use nacre_testkit::{Image, require, run};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Answer {
    status: u16,
    headers: String,
    body: Result<Vec<u8>, std::io::Error>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

/// A request over a connection of its own, so that nothing hides what came over the wire.
fn send(registry: &Registry, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(registry.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !headers.iter().any(|(name, _)| *name == "Transfer-Encoding") {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    let Some(split) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Answer { status: 0, headers: String::new(), body: Err(std::io::ErrorKind::UnexpectedEof.into()) };
    };
    let headers = String::from_utf8(bytes[..split].to_vec()).unwrap();
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    let body = bytes.split_off(split + 4);
    let answer = Answer { status, headers, body: Ok(Vec::new()) };
    let length: Option<usize> = answer.header("content-length").and_then(|length| length.parse().ok());
    let complete = method == "HEAD" || length.is_none_or(|length| length == body.len());
    let body = match end {
        Ok(_) if complete => Ok(body),
        Ok(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
        Err(error) => Err(error),
    };
    Answer { body, ..answer }
}

fn get(registry: &Registry, path: &str) -> Answer {
    send(registry, "GET", path, &[], b"")
}

fn each_kind() -> Vec<(Registry, Option<tempfile::TempDir>)> {
    let dir = tempfile::tempdir().unwrap();
    let stored = Registry::builder().directory(&dir.path().join("store")).start().unwrap();
    vec![(Registry::memory().unwrap(), None), (stored, Some(dir))]
}

#[test]
fn blobs_are_pushed_in_every_way_and_pulled() {
    for (registry, _dir) in each_kind() {
        let content: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let digest = Digest::sha256(&content);
        let path = format!("/v2/a/b/blobs/{digest}");
        assert_eq!(get(&registry, &path).status, 404);

        let started = send(&registry, "POST", "/v2/a/b/blobs/uploads/", &[], b"");
        let location = started.header("location").unwrap();
        let patched = send(&registry, "PATCH", location, &[("Content-Range", "0-49999")], &content[..50_000]);
        assert_eq!((patched.status, patched.header("range")), (202, Some("0-49999")));
        let gap = send(&registry, "PATCH", location, &[("Content-Range", "60000-99999")], &content[60_000..]);
        assert_eq!(gap.status, 416);
        let chunked = format!("{:x}\r\n", 50_000).into_bytes();
        let chunked = [&chunked, &content[50_000..], b"\r\n0\r\n\r\n"].concat();
        assert_eq!(send(&registry, "PATCH", location, &[("Transfer-Encoding", "chunked")], &chunked).status, 202);
        assert_eq!(send(&registry, "PUT", &format!("{location}?digest={digest}"), &[], b"").status, 201);

        let pulled = get(&registry, &path);
        assert_eq!(pulled.header("docker-content-digest"), Some(digest.to_string().as_str()));
        assert_eq!(pulled.body.unwrap(), content);
        let head = send(&registry, "HEAD", &path, &[], b"");
        assert_eq!(
            (head.status, head.header("content-length"), head.body.as_ref().unwrap().len()),
            (200, Some("100000"), 0)
        );

        let other = Digest::sha256(b"other");
        let whole = send(&registry, "POST", &format!("/v2/a/b/blobs/uploads/?digest={other}"), &[], b"other");
        assert_eq!(whole.status, 201);
        assert_eq!(get(&registry, &format!("/v2/a/b/blobs/{other}")).body.unwrap(), b"other");
        let mounted = format!("/v2/c/blobs/uploads/?mount={other}&from=a%2Fb");
        assert_eq!(send(&registry, "POST", &mounted, &[], b"").status, 201);
    }
}

#[test]
fn content_of_another_digest_is_not_stored() {
    for (registry, _dir) in each_kind() {
        let digest = Digest::sha256(b"good");
        let path = format!("/v2/a/blobs/uploads/?digest={digest}");
        assert_eq!(send(&registry, "POST", &path, &[], b"evil").status, 400);
        let started = send(&registry, "POST", "/v2/a/blobs/uploads/", &[], b"");
        let location = format!("{}?digest={digest}", started.header("location").unwrap());
        assert_eq!(send(&registry, "PUT", &location, &[], b"evil").status, 400);
        assert_eq!(get(&registry, &format!("/v2/a/blobs/{digest}")).status, 404);
        let manifest = format!("/v2/a/manifests/{digest}");
        assert_eq!(send(&registry, "PUT", &manifest, &[("Content-Type", MANIFEST)], b"{}").status, 400);
        for bad in ["{", ""] {
            assert_eq!(send(&registry, "PUT", "/v2/a/manifests/t", &[], bad.as_bytes()).status, 400);
        }
        let lacking = format!(r#"{{"config":{{"digest":"{digest}"}}}}"#);
        assert_eq!(send(&registry, "PUT", "/v2/a/manifests/t", &[], lacking.as_bytes()).status, 404);
    }
}

#[test]
fn ranges_are_served_or_refused() {
    for (registry, _dir) in each_kind() {
        let digest = registry.put_blob(b"0123456789").unwrap();
        let path = format!("/v2/a/blobs/{digest}");
        let range = |range: &str| send(&registry, "GET", &path, &[("Range", range)], b"");
        let part = range("bytes=4-");
        assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 4-9/10")));
        assert_eq!(part.body.unwrap(), b"456789");
        assert_eq!(range("bytes=2-3").body.unwrap(), b"23");
        let beyond = range("bytes=10-");
        assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */10")));
    }
}

#[test]
fn manifests_tags_and_referrers_are_found() {
    for (registry, _dir) in each_kind() {
        let subject = registry.put_manifest("a/b", Some("v1"), MANIFEST, b"{}").unwrap();
        registry.put_manifest("a/b", Some("v2"), MANIFEST, b"{} ").unwrap();
        let by_tag = get(&registry, "/v2/a/b/manifests/v1");
        assert_eq!(by_tag.header("content-type"), Some(MANIFEST));
        assert_eq!(by_tag.header("docker-content-digest"), Some(subject.to_string().as_str()));
        assert_eq!(get(&registry, &format!("/v2/a/b/manifests/{subject}")).body.unwrap(), b"{}");
        assert_eq!(get(&registry, &format!("/v2/other/manifests/{subject}")).status, 404);

        let tags = get(&registry, "/v2/a/b/tags/list?n=1");
        assert_eq!(tags.body.as_ref().unwrap(), br#"{"name":"a/b","tags":["v1"]}"#);
        assert_eq!(tags.header("link"), Some("</v2/a/b/tags/list?n=1&last=v1>; rel=\"next\""));
        assert_eq!(get(&registry, "/v2/none/tags/list").status, 404);

        let artifact =
            format!(r#"{{"artifactType":"text/x","annotations":{{"k":"v"}},"subject":{{"digest":"{subject}"}}}}"#);
        let stored = send(&registry, "PUT", "/v2/a/b/manifests/s", &[("Content-Type", MANIFEST)], artifact.as_bytes());
        assert_eq!(stored.header("oci-subject"), Some(subject.to_string().as_str()));
        let text = |path: String| String::from_utf8(get(&registry, &path).body.unwrap()).unwrap();
        let all = text(format!("/v2/a/b/referrers/{subject}"));
        assert!(all.contains(r#""artifactType":"text/x""#) && all.contains(r#""annotations":{"k":"v"}"#), "{all}");
        assert!(text(format!("/v2/a/b/referrers/{subject}?artifactType=text%2Fx")).contains("text/x"));
        assert!(text(format!("/v2/a/b/referrers/{subject}?artifactType=text/y")).contains(r#""manifests":[]"#));
    }
    let old = Registry::builder().without_referrers().start().unwrap();
    assert_eq!(get(&old, &format!("/v2/a/referrers/{}", Digest::sha256(b""))).status, 404);
}

#[test]
fn a_directory_outlives_its_registry() {
    let dir = tempfile::tempdir().unwrap();
    let first = Registry::builder().directory(dir.path()).start().unwrap();
    let digest = first.put_manifest("a", Some("t"), MANIFEST, b"{}").unwrap();
    drop(first);
    let second = Registry::builder().directory(dir.path()).start().unwrap();
    assert_eq!(second.tag("a", "t").unwrap(), Some(digest));
    assert_eq!(get(&second, "/v2/a/manifests/t").body.unwrap(), b"{}");
    assert_eq!(std::fs::read_dir(dir.path().join("uploads")).unwrap().count(), 0);
}

#[test]
fn basic_authentication_wants_the_password() {
    let credentials = Credentials::new("alice", "s3cret");
    let registry = Registry::builder().auth(Auth::Basic(credentials)).start().unwrap();
    let refused = get(&registry, "/v2/");
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic realm=\"nacre\"")));
    for (sent, status) in
        [("Basic YWxpY2U6czNjcmV0", 200), ("Basic YWxpY2U6d3Jvbmc=", 401), ("Bearer x", 401), ("Basic !", 401)]
    {
        assert_eq!(send(&registry, "GET", "/v2/", &[("Authorization", sent)], b"").status, status, "{sent}");
    }
    let log = format!("{:?}", registry.requests());
    assert!(!log.contains("YWxpY2U6"), "{log}");
}

#[test]
fn bearer_tokens_are_good_for_their_scope_and_time() {
    let credentials = Credentials::new("alice", "s3cret");
    let identity = credentials.identity_token();
    let auth = Auth::Bearer { credentials, anonymous_pull: true, lifetime: Duration::from_millis(700) };
    let registry = Registry::builder().auth(auth).start().unwrap();
    registry.put_manifest("a", Some("t"), MANIFEST, b"{}").unwrap();
    let refused = get(&registry, "/v2/a/manifests/t");
    let challenge = refused.header("www-authenticate").unwrap();
    assert_eq!(refused.status, 401);
    assert!(challenge.ends_with("/token\",service=\"nacre\",scope=\"repository:a:pull\""), "{challenge}");

    let token = |answer: Answer| {
        let text = String::from_utf8(answer.body.unwrap()).unwrap();
        let token = text.split("\"token\":\"").nth(1).unwrap().split('"').next().unwrap();
        format!("Bearer {token}")
    };
    let with = |token: &str, method: &str, path: &str| {
        send(&registry, method, path, &[("Authorization", token)], b"{}").status
    };
    let anonymous = token(get(&registry, "/token?service=nacre&scope=repository:a:pull,push"));
    assert_eq!(with(&anonymous, "GET", "/v2/a/manifests/t"), 200);
    assert_eq!(with(&anonymous, "PUT", "/v2/a/manifests/u"), 401);
    assert_eq!(with(&anonymous, "GET", "/v2/b/manifests/t"), 401);
    let basic = [("Authorization", "Basic YWxpY2U6czNjcmV0")];
    let known = token(send(&registry, "GET", "/token?scope=repository:a:pull,push", &basic, b""));
    assert_eq!(with(&known, "PUT", "/v2/a/manifests/u"), 201);
    let wrong = [("Authorization", "Basic YWxpY2U6d3Jvbmc=")];
    assert_eq!(send(&registry, "GET", "/token?scope=repository:a:pull", &wrong, b"").status, 401);

    let form =
        format!("grant_type=refresh_token&scope=repository:a:push&refresh_token={}", identity.replace('=', "%3D"));
    let refreshed = token(send(&registry, "POST", "/token", &[], form.as_bytes()));
    assert_eq!(with(&refreshed, "PUT", "/v2/a/manifests/u"), 201);
    assert_eq!(send(&registry, "POST", "/token", &[], b"grant_type=refresh_token&refresh_token=x").status, 401);

    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(with(&known, "GET", "/v2/a/manifests/t"), 401);
}

#[test]
fn faults_happen_as_they_were_ordered() {
    let registry = Registry::memory().unwrap();
    let digest = registry.put_blob(&[7; 1000]).unwrap();
    let path = format!("/v2/a/blobs/{digest}");
    let with = |fault: Fault, headers: &[(&str, &str)]| {
        registry.set_faults(move |_| fault.clone());
        send(&registry, "GET", &path, headers, b"")
    };
    let range = [("Range", "bytes=900-")];

    assert!(with(Fault::CutAfter(10), &[]).body.is_err());
    assert!(
        with(Fault::StallAfter(10), &[]).body.is_err_and(|error| error.kind() != std::io::ErrorKind::UnexpectedEof)
    );
    assert_eq!(with(Fault::Close, &[]).status, 0);
    assert!(with(Fault::ContentLength(2000), &[]).body.is_err());
    let ignored = with(Fault::IgnoreRange, &range);
    assert_eq!((ignored.status, ignored.body.unwrap().len()), (200, 1000));
    let lying = with(Fault::ContentRange("bytes 0-99/1000".into()), &range);
    assert_eq!((lying.status, lying.header("content-range")), (206, Some("bytes 0-99/1000")));
    let redirect = Fault::Redirect { status: 307, location: format!("{{self}}{path}") };
    assert_eq!(with(redirect, &[]).header("location"), Some(format!("{}{path}", registry.url()).as_str()));
    assert_eq!(with(Fault::too_many_requests(3), &[]).header("retry-after"), Some("3"));
    assert_eq!(with(Fault::html(200), &[]).header("content-type"), Some("text/html"));
    let renamed = with(Fault::Headers(vec![("Docker-Content-Digest".into(), "sha256:0".into())]), &[]);
    assert_eq!(renamed.header("docker-content-digest"), Some("sha256:0"));
    let flipped = with(Fault::FlipBit(950), &[]).body.unwrap();
    assert_eq!(flipped.iter().position(|byte| *byte == 6), Some(950));
    assert_eq!(with(Fault::FlipBit(950), &range).body.unwrap().iter().position(|byte| *byte == 6), Some(50));
    let start = Instant::now();
    assert_eq!(with(Fault::Delay(Duration::from_millis(60)), &[]).status, 200);
    assert!(start.elapsed() >= Duration::from_millis(60));
    assert_eq!(with(Fault::Slow { bytes: 300, pause: Duration::from_millis(5) }, &[]).body.unwrap().len(), 1000);

    registry.clear_faults();
    registry.clear_log();
    registry.set_faults(|request| if request.attempt < 3 { Fault::Close } else { Fault::Serve });
    assert_eq!([(); 3].map(|()| get(&registry, &path).status), [0, 0, 200]);
    assert_eq!((registry.count(Request::is_blob_get), registry.body_bytes_sent()), (3, 1000));
}

#[test]
fn it_ends_at_once_while_clients_hang() {
    let registry = Registry::memory().unwrap();
    let address = registry.address();
    let digest = registry.put_blob(&[0; 100]).unwrap();
    registry.set_faults(|_| Fault::StallAfter(1));
    let mut stalled = TcpStream::connect(address).unwrap();
    write!(stalled, "GET /v2/a/blobs/{digest} HTTP/1.1\r\n\r\n").unwrap();
    let idle = TcpStream::connect(address).unwrap();
    let start = Instant::now();
    drop(registry);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(TcpStream::connect(address).is_err());
    drop(idle);
}

#[test]
fn skopeo_copies_to_it_and_from_it() {
    let Some(skopeo) = require("skopeo") else { return };
    let dir = tempfile::tempdir().unwrap();
    Image::hello().write_layout(&dir.path().join("oci"), "t");

    let source = format!("oci:{}:t", dir.path().join("oci").display());
    let copy = |arguments: &[&str]| {
        run(Command::new(&skopeo).args(["copy", "--quiet", "--insecure-policy", "--preserve-digests"]).args(arguments));
    };
    let credentials = || Credentials::new("alice", "s3cret");
    let bearer = Auth::Bearer { credentials: credentials(), anonymous_pull: false, lifetime: Duration::from_secs(60) };
    for (name, auth) in [("none", Auth::None), ("basic", Auth::Basic(credentials())), ("bearer", bearer)] {
        let registry = Registry::builder().auth(auth).directory(&dir.path().join(name)).start().unwrap();
        let remote = format!("docker://{}/team/app:t", registry.host());
        copy(&["--dest-tls-verify=false", "--dest-creds=alice:s3cret", &source, &remote]);
        let back = format!("oci:{}:t", dir.path().join(name).join("back").display());
        copy(&["--src-tls-verify=false", "--src-creds=alice:s3cret", &remote, &back]);
        let blobs = |place: &str| {
            let mut names: Vec<_> = std::fs::read_dir(dir.path().join(place).join("blobs/sha256"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        assert_eq!(blobs("oci"), blobs(&format!("{name}/back")));
    }
}

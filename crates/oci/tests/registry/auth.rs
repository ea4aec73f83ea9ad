//! Credentials: basic, tokens, helpers, and registries that want the wrong thing.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use base64::Engine as _;
use nacre_core::SecretBytes;
use nacre_oci::{
    registry::CredentialStore,
    source::{ImageSink as _, ImageSource as _, TransportError},
};
use nacre_testkit::registry::{Auth, Credentials, Registry};

use crate::{
    script::{Script, ok},
    support::{client, client_with, descriptor, fetch, manifest, noise, quick, sink, source},
};

const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn bearer(anonymous_pull: bool) -> Auth {
    Auth::Bearer { credentials: Credentials::new("alice", "secret"), anonymous_pull, lifetime: Duration::from_secs(60) }
}

fn registry(auth: Auth) -> Registry {
    let registry = Registry::builder().auth(auth).start().unwrap();
    registry.put_manifest("team/app", Some("v1"), TYPE, &manifest()).unwrap();
    registry
}

fn alice() -> CredentialStore {
    CredentialStore::basic("alice", SecretBytes::new(b"secret".to_vec()))
}

fn auth_file(text: &str) -> CredentialStore {
    CredentialStore::from_bytes("kbs:///default/credential/registry", &SecretBytes::new(text.into())).unwrap()
}

#[test]
fn basic_credentials_come_from_the_longest_path() {
    let registry = registry(Auth::Basic(Credentials::new("alice", "secret")));
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let host = registry.host();
    let file = format!(
        r#"{{"auths":{{"{host}":{{"auth":"{}"}},"{host}/team":{{"auth":"{}"}}}}}}"#,
        encode("eve:wrong"),
        encode("alice:secret")
    );
    let (client, _) = client_with(quick(), "", auth_file(&file));
    source(&client, &format!("{host}/team/app:v1")).manifest(None).unwrap();
    let error = source(&client, &format!("{host}/teamwork/app:v1")).manifest(None).unwrap_err();
    assert!(matches!(error, TransportError::Denied { .. }), "{error}");
}

#[test]
fn missing_and_wrong_credentials_are_refusals() {
    for auth in [Auth::Basic(Credentials::new("alice", "secret")), bearer(false)] {
        let registry = registry(auth);
        let name = format!("{}/team/app:v1", registry.host());
        for store in
            [CredentialStore::anonymous(), CredentialStore::basic("alice", SecretBytes::new(b"hunter2".to_vec()))]
        {
            let (client, _) = client_with(quick(), "", store);
            let error = source(&client, &name).manifest(None).unwrap_err();
            assert!(matches!(error, TransportError::Denied { .. }), "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        assert!(registry.requests().len() < 16, "{}", registry.requests().len());
    }
}

#[test]
fn tokens_are_fetched_once_per_scope() {
    let registry = registry(bearer(false));
    let name = format!("{}/team/app:v1", registry.host());
    let (client, _) = client_with(quick(), "", alice());
    std::thread::scope(|threads| {
        for _ in 0..8 {
            threads.spawn(|| source(&client, &name).manifest(None).unwrap());
        }
    });
    assert_eq!(registry.count(|request| request.path == "/token"), 1);
    let blob = noise(100);
    sink(&client, &name).put_blob(&mut &blob[..], None).unwrap();
    assert_eq!(registry.count(|request| request.path == "/token"), 2);
    assert_eq!(fetch(&source(&client, &name), &descriptor(&blob)).unwrap(), blob);
    assert_eq!(registry.count(|request| request.path == "/token"), 2);
}

#[test]
fn anonymous_tokens_and_identity_tokens_work() {
    let open = registry(bearer(true));
    source(&client(quick()), &format!("{}/team/app:v1", open.host())).manifest(None).unwrap();
    let closed = registry(bearer(false));
    let token = Credentials::new("alice", "secret").identity_token();
    let file = format!(r#"{{"auths":{{"{}":{{"identitytoken":"{token}"}}}}}}"#, closed.host());
    let (client, _) = client_with(quick(), "", auth_file(&file));
    source(&client, &format!("{}/team/app:v1", closed.host())).manifest(None).unwrap();
    assert!(closed.count(|request| request.method == "POST" && request.path == "/token") > 0);
}

#[test]
fn expired_tokens_are_replaced() {
    // A registry that takes each token once.
    let used = std::sync::Mutex::new(std::collections::HashSet::new());
    let counter = std::sync::atomic::AtomicUsize::new(0);
    let body = manifest();
    let script = Script::new(move |head, stream| {
        let host =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned)).unwrap();
        if head.starts_with("GET /token") {
            let number = counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            return ok(stream, "200 OK", "", format!(r#"{{"access_token":"t{number}","expires_in":3600}}"#).as_bytes());
        }
        let token = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("authorization: bearer ").map(str::to_owned));
        if token.is_some_and(|token| used.lock().unwrap().insert(token)) {
            ok(stream, "200 OK", "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n", &body);
        } else {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"x\"\r\n");
            ok(stream, "401 Unauthorized", &challenge, b"");
        }
    });
    let client = client(quick());
    let source = source(&client, &format!("{}/a:b", script.host));
    for _ in 0..3 {
        source.manifest(None).unwrap();
    }
    assert_eq!(script.requests().iter().filter(|head| head.starts_with("GET /token")).count(), 3);
}

#[test]
fn endless_refusals_end() {
    let script = Script::new(|head, stream| {
        let host =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned)).unwrap();
        if head.starts_with("GET /token") {
            return ok(stream, "200 OK", "", br#"{"token":"t"}"#);
        }
        let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n");
        ok(stream, "401 Unauthorized", &challenge, b"");
    });
    let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err();
    assert!(matches!(error, TransportError::Denied { .. }), "{error}");
    assert!(script.requests().len() <= 5, "{:?}", script.requests());
}

#[test]
fn token_servers_that_misbehave_are_named() {
    let huge = format!(r#"{{"token":"{}"}}"#, "x".repeat(2 << 20));
    let long = format!(r#"{{"token":"{}"}}"#, "x".repeat(100_000));
    for (kind, answer, words) in [
        ("application/json", huge.as_str(), "larger than 1048576 bytes"),
        ("application/json", long.as_str(), "longer than 64 KiB"),
        ("application/json", "{}", "no token"),
        ("application/json", "[]", "no token"),
        ("application/json", "token", "not the JSON"),
        ("application/json", r#"{"token":"a\r\nX: y"}"#, "no header can carry"),
        ("text/html", "<html>", "HTML page"),
    ] {
        let answer = answer.to_owned();
        let script = Script::new(move |head, stream| {
            let host = head
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned))
                .unwrap();
            if head.starts_with("GET /token") {
                return ok(stream, "200 OK", &format!("Content-Type: {kind}\r\n"), answer.as_bytes());
            }
            ok(stream, "401 Unauthorized", &format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n"), b"");
        });
        let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

#[test]
fn challenges_that_we_cannot_meet_are_refused() {
    for challenge in ["Negotiate", "Digest realm=x", "Bearer", "Bearer realm=\"ftp://x/\"", "", "Bearer service=x"] {
        let header = if challenge.is_empty() { String::new() } else { format!("WWW-Authenticate: {challenge}\r\n") };
        let script = Script::new(move |_, stream| ok(stream, "401 Unauthorized", &header, b""));
        let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err();
        assert!(
            matches!(error, TransportError::Denied { .. } | TransportError::Protocol { .. }),
            "{challenge}: {error}"
        );
    }
}

/// Puts a helper onto a path of its own, and runs this very test again with it: the environment is the process's.
fn with_helper(test: &str, script: &str, check: impl FnOnce()) {
    if std::env::var_os("NACRE_TEST_HELPER").is_some() {
        return check();
    }
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("docker-credential-test");
    fs::write(&helper, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env("PATH", path)
        .env("NACRE_TEST_HELPER", "1")
        .env("HOME", dir.path());
    nacre_testkit::run(&mut command);
}

fn helper_store(host: &str) -> CredentialStore {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("auth.json");
    fs::write(&path, format!(r#"{{"credHelpers":{{"{host}":"test"}}}}"#)).unwrap();
    CredentialStore::system(Some(&path)).unwrap().with_helper_time(Duration::from_millis(500))
}

#[test]
fn a_helper_is_asked() {
    let script = r#"read server || true; [ "$1" = get ] && printf '{"ServerURL":"%s","Username":"alice","Secret":"secret"}' "$server""#;
    with_helper("auth::a_helper_is_asked", script, || {
        let registry = registry(Auth::Basic(Credentials::new("alice", "secret")));
        let (client, _) = client_with(quick(), "", helper_store(&registry.host()));
        source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap();
    });
}

#[test]
fn a_helper_that_hangs_is_killed() {
    with_helper("auth::a_helper_that_hangs_is_killed", "sleep 300 & sleep 300", || {
        let registry = registry(Auth::Basic(Credentials::new("alice", "secret")));
        let (client, _) = client_with(quick(), "", helper_store(&registry.host()));
        let start = Instant::now();
        let error = source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert!(error.to_string().contains("gave no answer within 0.5 s"), "{error}");
    });
}

#[test]
fn a_helper_that_closes_its_output_and_stays_is_killed() {
    with_helper("auth::a_helper_that_closes_its_output_and_stays_is_killed", "exec >&-; sleep 300", || {
        let registry = registry(Auth::Basic(Credentials::new("alice", "secret")));
        let (client, _) = client_with(quick(), "", helper_store(&registry.host()));
        let error = source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap_err();
        assert!(error.to_string().contains("did not end within 0.5 s"), "{error}");
    });
}

#[test]
fn a_helper_that_prints_garbage_is_named() {
    for (script, words) in [
        ("echo hunter2", "printed something other"),
        ("yes hunter2", "printed more than"),
        ("echo nope; exit 1", "failed: nope"),
    ] {
        // The script is chosen by the outer run; the inner one sees which words to expect.
        if let Ok(expected) = std::env::var("NACRE_TEST_WORDS") {
            let registry = registry(Auth::Basic(Credentials::new("alice", "secret")));
            let store = helper_store(&registry.host()).with_helper_time(Duration::from_secs(10));
            let (client, _) = client_with(quick(), "", store);
            let error =
                source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap_err().to_string();
            assert!(error.contains(&expected) && !error.contains("hunter2"), "{error}");
            return;
        }
        let script = format!("{script}\n");
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("docker-credential-test");
        fs::write(&helper, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "auth::a_helper_that_prints_garbage_is_named", "--nocapture"]);
        nacre_testkit::run(command.env("PATH", path).env("NACRE_TEST_WORDS", words));
    }
}

#[test]
fn a_helper_without_credentials_or_program_is_told_apart() {
    let script = "echo 'credentials not found in native keychain'; exit 1";
    with_helper("auth::a_helper_without_credentials_or_program_is_told_apart", script, || {
        let registry = registry(bearer(true));
        let (client, _) = client_with(quick(), "", helper_store(&registry.host()));
        source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for name in ["missing-helper", "../../bin/sh", ""] {
            let path = dir.path().join("auth.json");
            fs::write(&path, format!(r#"{{"credsStore":"{name}","credHelpers":{{"{}":"{name}"}}}}"#, registry.host()))
                .unwrap();
            let (client, _) = client_with(quick(), "", CredentialStore::system(Some(&path)).unwrap());
            let result = source(&client, &format!("{}/team/app:v1", registry.host())).manifest(None);
            assert_eq!(result.is_ok(), name.is_empty(), "{name}");
        }
    });
}

#[test]
fn a_named_auth_file_must_be_there() {
    let error = CredentialStore::system(Some(std::path::Path::new("/nonexistent/auth.json"))).unwrap_err();
    assert!(matches!(error, TransportError::Io { .. }), "{error}");
}

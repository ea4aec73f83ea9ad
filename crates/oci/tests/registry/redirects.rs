//! Redirects: bounded, never back, never down, never with credentials elsewhere.

use std::sync::Arc;

use nacre_core::SecretBytes;
use nacre_oci::{
    registry::CredentialStore,
    source::{ImageSource as _, TransportError},
};
use nacre_testkit::registry::{Auth, Credentials, Fault, Registry};

use crate::{
    script::{Script, ok},
    support::{client, client_with, descriptor, fetch, noise, quick, source},
};

fn redirect(status: u16, location: String) -> Fault {
    Fault::Redirect { status, location }
}

#[test]
fn a_redirect_elsewhere_is_followed_without_credentials() {
    let blob = noise(300_000);
    let store = Registry::memory().unwrap();
    store.put_file("/cdn/blob", blob.clone());
    let registry = Registry::builder().auth(Auth::Basic(Credentials::new("alice", "secret"))).start().unwrap();
    for status in [301, 302, 303, 307, 308] {
        let location = format!("{}/cdn/blob?signature=1", store.url());
        registry.set_faults(move |request| {
            let authorized = request.header("authorization").is_some();
            if request.is_blob_get() && authorized { redirect(status, location.clone()) } else { Fault::Serve }
        });
        let credentials = CredentialStore::basic("alice", SecretBytes::new(b"secret".to_vec()));
        let (client, _) = client_with(quick(), "", credentials);
        let source = source(&client, &format!("{}/a:b", registry.host()));
        assert_eq!(fetch(&source, &descriptor(&blob)).unwrap(), blob);
    }
    assert_eq!(store.count(|request| request.path == "/cdn/blob"), 5);
    assert_eq!(store.count(|request| request.header("authorization").is_some()), 0);
}

#[test]
fn credentials_stay_away_after_a_detour_home() {
    // Home → elsewhere → home: what elsewhere makes us ask for at home, we ask for as nobody.
    let home = Arc::new(std::sync::OnceLock::<String>::new());
    let place = home.clone();
    let elsewhere = Script::new(move |_, stream| {
        ok(stream, "302 Found", &format!("Location: http://{}/secret\r\n", place.get().unwrap()), b"");
    });
    let there = elsewhere.host.clone();
    let registry = Script::new(move |head, stream| {
        if head.starts_with("GET /v2/ ") {
            ok(stream, "401 Unauthorized", "WWW-Authenticate: Basic realm=x\r\n", b"");
        } else if head.starts_with("GET /secret") {
            ok(stream, "200 OK", "", b"");
        } else if !head.to_ascii_lowercase().contains("authorization: basic") {
            ok(stream, "401 Unauthorized", "WWW-Authenticate: Basic realm=x\r\n", b"");
        } else {
            ok(stream, "302 Found", &format!("Location: http://{there}/x\r\n"), b"");
        }
    });
    home.set(registry.host.clone()).unwrap();
    let (client, _) = client_with(quick(), "", CredentialStore::basic("alice", SecretBytes::new(b"secret".to_vec())));
    let _ = source(&client, &format!("{}/a:b", registry.host)).manifest(None);
    let detour: Vec<String> = registry.requests().into_iter().filter(|head| head.starts_with("GET /secret")).collect();
    assert!(
        !detour.is_empty() && detour.iter().all(|head| !head.to_ascii_lowercase().contains("authorization")),
        "{detour:?}"
    );
    assert!(elsewhere.requests().iter().all(|head| !head.to_ascii_lowercase().contains("authorization")));
}

#[test]
fn loops_and_endless_chains_are_refused() {
    let registry = Registry::memory().unwrap();
    let name = format!("{}/a:b", registry.host());
    registry.set_faults(|request| {
        if request.is_manifest_get() { redirect(307, format!("{{self}}{}", request.path)) } else { Fault::Serve }
    });
    let error = source(&client(quick()), &name).manifest(None).unwrap_err();
    assert!(matches!(&error, TransportError::Protocol { .. }) && error.to_string().contains("loop"), "{error}");
    assert_eq!(registry.count(|request| request.is_manifest_get()), 1);

    registry.clear_log();
    registry.set_faults(|request| match request.path.as_str() {
        "/v2/" => Fault::Serve,
        _ => redirect(302, format!("{{self}}/hop/{}", request.number)),
    });
    let error = source(&client(quick()), &name).manifest(None).unwrap_err();
    assert!(error.to_string().contains("more than 8 redirects"), "{error}");
    assert!(registry.requests().len() <= 11, "{}", registry.requests().len());
}

#[test]
fn locations_that_are_no_urls_are_refused() {
    for location in ["file:///etc/passwd", "http://", "http://u:p@127.0.0.1/", "gopher://x/", "http://a b/"] {
        let registry = Registry::memory().unwrap();
        registry.set_faults(
            move |request| if request.is_manifest_get() { redirect(302, location.into()) } else { Fault::Serve },
        );
        let error = source(&client(quick()), &format!("{}/a:b", registry.host())).manifest(None).unwrap_err();
        assert!(matches!(&error, TransportError::Protocol { .. }), "{location}: {error}");
    }
    let script = Script::new(|_, stream| ok(stream, "302 Found", "", b""));
    let error = source(&client(quick()), &format!("{}/a:b", script.host)).manifest(None).unwrap_err();
    assert!(error.to_string().contains("without a Location"), "{error}");
}

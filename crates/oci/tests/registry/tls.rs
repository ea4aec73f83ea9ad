//! TLS: what is trusted, what is sent only over it, and who is shown a client certificate.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use nacre_core::SecretBytes;
use nacre_oci::{
    registry::{Client, ClientConfig, CredentialStore},
    source::{ImageSource as _, TransportError},
};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring::default_provider,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

use crate::{
    script::{Script, ok},
    support::{client_with, manifest, quick, source},
};

/// A key pair with a certificate that speaks for itself.
struct Identity {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Identity {
    fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        Self { certificate: params.self_signed(&key).unwrap(), key }
    }
}

/// Whom a server lets in.
enum Clients<'a> {
    /// Everybody; certificates are asked for, and remembered.
    All(&'a Identity),
    /// Those with this certificate.
    Only(&'a Identity),
}

/// A server that speaks TLS, answers what a test says, and remembers the requests; those of clients with a certificate begin with
/// `certificate`.
struct TlsScript {
    host: String,
    identity: Identity,
    requests: Arc<Mutex<Vec<String>>>,
}

impl TlsScript {
    fn new(clients: &Clients<'_>, answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let identity = Identity::new("127.0.0.1");
        let mut roots = RootCertStore::empty();
        let (Clients::All(client) | Clients::Only(client)) = clients;
        roots.add(client.certificate.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()));
        let verifier = match clients {
            Clients::All(_) => verifier.allow_unauthenticated(),
            Clients::Only(_) => verifier,
        };
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(
                vec![identity.certificate.der().clone()],
                PrivateKeyDer::from_pem_slice(identity.key.serialize_pem().as_bytes()).unwrap(),
            );
        let (config, listener) = (Arc::new(config.unwrap()), TcpListener::bind("127.0.0.1:0").unwrap());
        let host = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (requests.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let tls = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream);
                let (log, answer) = (log.clone(), answer.clone());
                thread::spawn(move || serve(tls, &log, &*answer));
            }
        });
        Self { host, identity, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// A configuration that trusts this server, and insists on TLS.
    fn trusted(&self) -> ClientConfig {
        ClientConfig { insecure: false, retries: 0, extra_roots_pem: vec![self.identity.certificate.pem()], ..quick() }
    }
}

fn serve(
    mut tls: StreamOwned<ServerConnection, std::net::TcpStream>,
    log: &Mutex<Vec<String>>,
    answer: &(dyn Fn(&str) -> String + Sync),
) {
    let mut head = String::new();
    let mut reader = BufReader::new(&mut tls);
    while !head.ends_with("\r\n\r\n") {
        match reader.read_line(&mut head) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    let shown = tls.conn.peer_certificates().is_some();
    log.lock().unwrap().push(if shown { format!("certificate {head}") } else { head.clone() });
    let _ = tls.write_all(answer(&head).as_bytes());
    tls.conn.send_close_notify();
    let _ = tls.flush();
}

fn answer(status: &str, headers: &str, body: &[u8]) -> String {
    let (length, body) = (body.len(), std::str::from_utf8(body).unwrap());
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}

fn a_manifest() -> String {
    answer("200 OK", "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n", &manifest())
}

fn authorized(request: &str) -> bool {
    request.to_ascii_lowercase().contains("\r\nauthorization:")
}

fn alice() -> CredentialStore {
    CredentialStore::basic("alice", SecretBytes::new(b"secret".to_vec()))
}

fn pull(client: &Client, host: &str) -> Result<(), TransportError> {
    source(client, &format!("{host}/a:b")).manifest(None).map(drop)
}

#[test]
fn a_server_of_somebody_else_gets_no_request() {
    let nobody = Identity::new("nobody");
    let (one, other) = (TlsScript::new(&Clients::All(&nobody), |_| a_manifest()), Identity::new("127.0.0.1"));
    pull(&client_with(one.trusted(), "", alice()).0, &one.host).unwrap();
    let count = one.requests().len();
    let config = ClientConfig { extra_roots_pem: vec![other.certificate.pem()], ..one.trusted() };
    let error = pull(&client_with(config, "", alice()).0, &one.host).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert_eq!(one.requests().len(), count);
}

#[test]
fn credentials_go_to_no_token_server_without_tls() {
    let plain = Script::new(|_, stream| ok(stream, "200 OK", "", br#"{"token":"anonymous"}"#));
    let nobody = Identity::new("nobody");
    let realm = format!("http://{}/token", plain.host);
    let registry = TlsScript::new(&Clients::All(&nobody), move |head| match authorized(head) {
        true => a_manifest(),
        false => answer("401 Unauthorized", &format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n"), b""),
    });
    let error = pull(&client_with(registry.trusted(), "", alice()).0, &registry.host).unwrap_err();
    assert!(matches!(error, TransportError::Denied { .. }) && error.to_string().contains("not https"), "{error}");
    assert!(plain.requests().is_empty(), "{:?}", plain.requests());
    // Without credentials there is nothing to lose.
    pull(&client_with(registry.trusted(), "", CredentialStore::anonymous()).0, &registry.host).unwrap();
    assert!(plain.requests().iter().all(|request| !authorized(request)));
}

#[test]
fn credentials_go_to_a_token_server_with_tls() {
    let nobody = Identity::new("nobody");
    let registry = TlsScript::new(&Clients::All(&nobody), |head| {
        let host = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned));
        if head.starts_with("GET /token") {
            return answer("200 OK", "", br#"{"token":"t"}"#);
        }
        let realm = format!("WWW-Authenticate: Bearer realm=\"https://{}/token\"\r\n", host.unwrap());
        if authorized(head) { a_manifest() } else { answer("401 Unauthorized", &realm, b"") }
    });
    pull(&client_with(registry.trusted(), "", alice()).0, &registry.host).unwrap();
    let token: Vec<String> = registry.requests().into_iter().filter(|head| head.starts_with("GET /token")).collect();
    assert!(token.len() == 1 && token.iter().all(|request| authorized(request)), "{token:?}");
}

#[test]
fn nothing_leads_from_https_to_plain_http() {
    let plain = Script::new(|_, stream| ok(stream, "200 OK", "", &manifest()));
    let nobody = Identity::new("nobody");
    for status in ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"] {
        let location = format!("Location: http://{}/x\r\n", plain.host);
        let registry = TlsScript::new(&Clients::All(&nobody), move |head| match head.starts_with("GET /v2/ ") {
            true => answer("200 OK", "", b""),
            false => answer(status, &location, b""),
        });
        // Not even where plain http would do, once https was there.
        for insecure in [vec![], vec![registry.host.clone(), plain.host.clone()]] {
            let config = ClientConfig { insecure_registries: insecure, ..registry.trusted() };
            let error = pull(&client_with(config, "", alice()).0, &registry.host).unwrap_err();
            assert!(error.to_string().contains("from https to plain http"), "{status}: {error}");
        }
    }
    assert!(plain.requests().is_empty(), "{:?}", plain.requests());
}

/// Makes the directory of certs.d for a registry.
fn certs_d(dir: &Path, host: &str, authority: &Identity, client: Option<&Identity>) -> ClientConfig {
    let place = dir.join(host);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("ca.crt"), authority.certificate.pem()).unwrap();
    if let Some(client) = client {
        fs::write(place.join("client.cert"), client.certificate.pem()).unwrap();
        fs::write(place.join("client.key"), client.key.serialize_pem()).unwrap();
    }
    ClientConfig { insecure: false, retries: 0, certs_dirs: vec![dir.to_owned()], ..quick() }
}

#[test]
fn a_registry_may_demand_a_client_certificate() {
    let (client, other) = (Identity::new("client"), Identity::new("other"));
    let registry = TlsScript::new(&Clients::Only(&client), |_| a_manifest());
    let try_with = |shown: Option<&Identity>| {
        let dir = tempfile::tempdir().unwrap();
        let config = certs_d(dir.path(), &registry.host, &registry.identity, shown);
        pull(&client_with(config, "", CredentialStore::anonymous()).0, &registry.host)
    };
    try_with(None).unwrap_err();
    try_with(Some(&other)).unwrap_err();
    assert!(registry.requests().is_empty());
    try_with(Some(&client)).unwrap();
}

#[test]
fn a_client_certificate_is_shown_to_its_registry_only() {
    let client = Identity::new("client");
    let elsewhere = TlsScript::new(&Clients::All(&client), |_| a_manifest());
    let location = format!("Location: https://{}/x\r\n", elsewhere.host);
    let registry = TlsScript::new(&Clients::Only(&client), move |head| match head.starts_with("GET /v2/ ") {
        true => answer("200 OK", "", b""),
        false => answer("307 Temporary", &location, b""),
    });
    let dir = tempfile::tempdir().unwrap();
    let config = ClientConfig {
        extra_roots_pem: vec![elsewhere.identity.certificate.pem()],
        ..certs_d(dir.path(), &registry.host, &registry.identity, Some(&client))
    };
    pull(&client_with(config, "", alice()).0, &registry.host).unwrap();
    assert!(registry.requests().iter().all(|request| request.starts_with("certificate")));
    let there = elsewhere.requests();
    assert!(!there.is_empty() && there.iter().all(|request| request.starts_with("GET")), "{there:?}");
}

#[test]
fn half_a_client_certificate_is_an_error() {
    let (client, other) = (Identity::new("client"), Identity::new("other"));
    let registry = TlsScript::new(&Clients::All(&client), |_| a_manifest());
    for (name, break_it) in [
        ("no .key", Box::new(|place: &Path| fs::remove_file(place.join("client.key"))) as Box<dyn Fn(&Path) -> _>),
        ("no .cert", Box::new(|place: &Path| fs::remove_file(place.join("client.cert")))),
        ("does not serve", Box::new(|place: &Path| fs::write(place.join("client.key"), other.key.serialize_pem()))),
        ("client.key", Box::new(|place: &Path| fs::write(place.join("client.key"), "no PEM"))),
        ("has no PEM certificate", Box::new(|place: &Path| fs::write(place.join("client.cert"), "no PEM"))),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = certs_d(dir.path(), &registry.host, &registry.identity, Some(&client));
        break_it(&dir.path().join(&registry.host)).unwrap();
        let error = pull(&client_with(config, "", CredentialStore::anonymous()).0, &registry.host).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(name) || text.contains(&name.replace("no ", "there is no ")), "{name}: {text}");
    }
    assert!(registry.requests().is_empty());
}

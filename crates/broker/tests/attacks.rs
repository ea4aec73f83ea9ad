//! What a host, a guest that is not what it says, or a stranger may try. Everything here ends in a refusal that names its reason.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use common::{Rig, SECRET, attestation, init_data, path, policy, pubkey, refusal, refused, trust};
use nacre_attest::{
    client::{BrokerClient, BrokerConfig, Call, ClientError, Credential},
    rcar::{Challenge, InitDataMessage, LONGEST_ATTESTATION, LONGEST_REQUEST, Request, TokenReply},
    sample::SampleAttester,
    sim::SimAttester,
};
use nacre_broker::{AdminClient, Settings, Transport, admin_token};
use nacre_core::jose::{PrivateKey, b64};
use serde_json::{Value, json};
use std::sync::Arc;

#[test]
fn a_nonce_works_once() {
    let rig = Rig::new();
    let wire = rig.wire();
    let (attester, key) = (rig.attester(None), PrivateKey::generate_p256());
    let (session, nonce) = wire.auth();
    let message = attestation(&attester, &nonce, &key);
    assert_eq!(wire.attest(&session, &message).status, 200);
    // The same again on the same session: no old token.
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(409, "NonceUsed"));
    // The recorded message on a session of its own.
    let (session, _) = wire.auth();
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "NonceMismatch"));
}

#[test]
fn a_nonce_is_spent_by_an_attempt_that_failed() {
    let rig = Rig::new();
    let wire = rig.wire();
    let (attester, key) = (rig.attester(None), PrivateKey::generate_p256());
    for garbage in [&b"{"[..], b"{}", b"\xff"] {
        let (session, nonce) = wire.auth();
        let reply = wire.post("/kbs/v0/attest", Credential::Session(&session), garbage);
        assert_eq!(refusal(&reply), refused(400, "InvalidRequest"));
        let reply = wire.attest(&session, &attestation(&attester, &nonce, &key));
        assert_eq!(refusal(&reply), refused(401, "SessionNotFound"));
    }
}

#[test]
fn evidence_of_another_guest_does_not_serve_my_key() {
    let rig = Rig::new();
    let wire = rig.wire();
    let (session, nonce) = wire.auth();
    // A true report, for the victim's key, with mine put in its place.
    let mut message = attestation(&rig.attester(None), &nonce, &PrivateKey::generate_p256());
    message.runtime_data.tee_pubkey = pubkey(&PrivateKey::generate_p256());
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "EvidenceVerification"));
    // Evidence of additional devices is bound too.
    let (session, nonce) = wire.auth();
    let mut message = attestation(&rig.attester(None), &nonce, &PrivateKey::generate_p256());
    message.tee_evidence.additional_evidence = "{}".into();
    assert_eq!(wire.attest(&session, &message).status, 401);
}

#[test]
fn a_resource_opens_with_the_attested_key_only() {
    let rig = Rig::new();
    let wire = rig.wire();
    let token = wire.token(&rig.attester(None));
    let reply = wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token));
    assert_eq!(reply.status, 200);
    let jwe = nacre_core::jose::Jwe::parse(&reply.body).unwrap();
    assert!(jwe.decrypt(&[PrivateKey::generate_p256()]).is_err());
}

#[test]
fn tee_keys_that_are_none_are_refused() {
    let rig = Rig::new();
    let wire = rig.wire();
    let x = b64::encode([1; 32]);
    for key in [
        json!(null),
        json!({}),
        json!({"kty": "EC", "crv": "P-256", "x": x, "y": x}),
        json!({"kty": "oct", "k": x}),
        json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"}),
    ] {
        let (session, nonce) = wire.auth();
        let mut message = attestation(&rig.attester(None), &nonce, &PrivateKey::generate_p256());
        message.runtime_data.tee_pubkey = key.clone();
        assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "TeeKey"), "{key}");
    }
}

#[test]
fn a_guest_with_a_wrong_measurement_gets_nothing() {
    let rig = Rig::new();
    let other = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(other.path(), "another program").unwrap();
    let attester = SimAttester::measuring(rig.platform(), None, other.path()).unwrap();
    let measurement = attester.measurement().hex();
    let error = rig.client_of(attester).get(&path("default/key/1")).unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status: 403, kind, .. } if kind == "PolicyDeny"), "{error}");
    let log = rig.broker.audit(0, 100).unwrap();
    let refusal = log.last().unwrap();
    assert_eq!((refusal.event.as_str(), refusal.measurement.as_str()), ("release refused", measurement.as_str()));
}

#[test]
fn a_debug_guest_and_an_unknown_platform_get_nothing() {
    let rig = Rig::new();
    let error = rig.client_of(rig.attester(None).debug(true)).get(&path("default/key/1")).unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 403, .. }), "{error}");
    let stranger = SimAttester::new(PrivateKey::generate_p256(), None).unwrap();
    let error = rig.client_of(stranger).get(&path("default/key/1")).unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused { status: 401, kind, .. } if kind == "EvidenceVerification"),
        "{error}"
    );
}

#[test]
fn init_data_other_than_the_measured_is_refused() {
    let rig = Rig::new();
    let wire = rig.wire();
    let attester = rig.attester(Some(init_data("policy = 'strict'")));
    for body in [init_data("policy = 'lax'").text().to_owned(), attester_text(&attester) + "\n", "x".into()] {
        let (session, nonce) = wire.auth();
        let mut message = attestation(&attester, &nonce, &PrivateKey::generate_p256());
        message.init_data = Some(InitDataMessage { format: "toml".into(), body });
        assert_eq!(wire.attest(&session, &message).status, 401);
    }
    let (session, nonce) = wire.auth();
    let mut message = attestation(&attester, &nonce, &PrivateKey::generate_p256());
    message.init_data.as_mut().unwrap().format = "json".into();
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "InitData"));
}

fn attester_text(attester: &SimAttester) -> String {
    use nacre_attest::evidence::Attester as _;
    attester.init_data().unwrap().text().to_owned()
}

#[test]
fn simulated_guests_get_nothing_unless_the_settings_say_so() {
    let rig = Rig::with(Settings::default(), Transport::Tls);
    let error = rig.client().attest().unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status: 403, kind, .. } if kind == "SimulatedTee"), "{error}");
    assert!(error.to_string().contains("allow_simulated"), "{error}");
}

#[test]
fn samples_of_a_tee_get_nothing_unless_settings_and_reference_values_say_so() {
    let sample = |rig: &Rig| BrokerClient::new(rig.config(), Arc::new(SampleAttester::new(None).unwrap())).unwrap();
    let strict = Rig::with(Settings::default(), Transport::Tls);
    strict.broker.add_reference_value("sample.svn", vec!["1".into()], None).unwrap();
    let error = sample(&strict).attest().unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status: 403, kind, .. } if kind == "SimulatedTee"), "{error}");

    // Simulation is allowed, and a simulated platform is known; that makes no sample known.
    let rig = Rig::new();
    let stranger = sample(&rig);
    assert!(stranger.attest().unwrap().claims().unwrap().simulated && stranger.simulated());
    let denied = stranger.get(&path("default/key/1")).unwrap_err();
    assert!(matches!(&denied, ClientError::Refused { status: 403, kind, .. } if kind == "PolicyDeny"), "{denied}");
    rig.broker.add_reference_value("sample.svn", vec!["2".into()], None).unwrap();
    assert!(sample(&rig).get(&path("default/key/1")).is_err());
    rig.broker.add_reference_value("sample.svn", vec!["1".into()], None).unwrap();
    assert_eq!(sample(&rig).get(&path("default/key/1")).unwrap().expose(), SECRET);
    let entries = rig.broker.audit(0, 1000).unwrap();
    let of_guests: Vec<_> = entries.iter().filter(|entry| entry.actor.starts_with("guest:")).collect();
    assert!(of_guests.len() > 3 && of_guests.iter().all(|entry| entry.simulated));

    // Of another session, or with init data beside it that nothing binds.
    let wire = rig.wire();
    let auth = || {
        let reply = wire.post("/kbs/v0/auth", Credential::None, &serde_json::to_vec(&Request::new("sample")).unwrap());
        (reply.session.unwrap(), Challenge::parse(&reply.body).unwrap().nonce)
    };
    let (attester, key) = (SampleAttester::new(None).unwrap(), PrivateKey::generate_p256());
    let (session, nonce) = auth();
    let mut message = attestation(&attester, &nonce, &key);
    message.runtime_data.tee_pubkey = pubkey(&PrivateKey::generate_p256());
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "EvidenceVerification"));
    let (session, nonce) = auth();
    let mut message = attestation(&attester, &nonce, &key);
    message.init_data = Some(InitDataMessage { format: "toml".into(), body: init_data("a").text().into() });
    let reply = wire.attest(&session, &message);
    assert!(String::from_utf8_lossy(&reply.body).contains("it has no place for any"));
    assert_eq!(refusal(&reply), refused(401, "EvidenceVerification"));
    // Its evidence where a report of a simulated platform is due.
    let (session, nonce) = wire.auth();
    let message = attestation(&attester, &nonce, &key);
    assert_eq!(refusal(&wire.attest(&session, &message)), refused(401, "EvidenceVerification"));
}

#[test]
fn tokens_that_are_old_foreign_or_forged_release_nothing() {
    let settings = Settings { allow_simulated: true, token_lifetime_seconds: 1, ..Settings::default() };
    let (rig, other) = (Rig::with(settings, Transport::Tls), Rig::new());
    let wire = rig.wire();
    let stale = wire.token(&rig.attester(None));
    let foreign = other.wire().token(&other.attester(None));
    let admin = admin_token(&rig.broker.admin_key().unwrap(), &rig.broker.token_key(), "me", 60).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    let unsigned = format!("{}.{}.", b64::encode(r#"{"alg":"none"}"#), stale.split('.').nth(1).unwrap());
    for token in [stale.as_str(), &foreign, &admin, &unsigned, "x", "a.b.c"] {
        let reply = wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(token));
        assert_eq!(refusal(&reply), refused(401, "TokenVerifierError"), "{token:.40}");
    }
    let anonymous = wire.get("/kbs/v0/resource/default/key/1", Credential::None);
    assert_eq!(refusal(&anonymous), refused(401, "TokenNotFound"));
}

#[test]
fn a_session_serves_only_after_it_attested() {
    let rig = Rig::new();
    let wire = rig.wire();
    let get = |session: &str| wire.get("/kbs/v0/resource/default/key/1", Credential::Session(session));
    let (session, nonce) = wire.auth();
    assert_eq!(refusal(&get(&session)), refused(401, "NotAttested"));
    let key = PrivateKey::generate_p256();
    assert_eq!(wire.attest(&session, &attestation(&rig.attester(None), &nonce, &key)).status, 200);
    assert_eq!(get(&session).status, 200);
    assert_eq!(refusal(&get("guessed")), refused(401, "SessionNotFound"));
    let reply = wire.post("/kbs/v0/attest", Credential::None, b"{}");
    assert_eq!(refusal(&reply), refused(401, "SessionNotFound"));
}

#[test]
fn a_flood_of_sessions_ends_the_oldest_and_nothing_else() {
    let settings = Settings { allow_simulated: true, most_sessions: 3, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    let wire = rig.wire();
    let (oldest, nonce) = wire.auth();
    let sessions: Vec<_> = (0..3).map(|_| wire.auth()).collect();
    let key = PrivateKey::generate_p256();
    let reply = wire.attest(&oldest, &attestation(&rig.attester(None), &nonce, &key));
    assert_eq!(refusal(&reply), refused(401, "SessionNotFound"));
    let (session, nonce) = &sessions[2];
    assert_eq!(wire.attest(session, &attestation(&rig.attester(None), nonce, &key)).status, 200);
}

#[test]
fn policies_that_err_lie_or_run_away_deny() {
    let rig = Rig::new();
    let wire = rig.wire();
    let token = wire.token(&rig.attester(None));
    let get = || refusal(&wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token)));
    for text in [
        policy("allow if input.nothing.here"),
        policy(r#"allow := "true""#),
        policy("allow := 1"),
        policy("allow := true if input.iat > 0\nallow := false if input.exp > 0"),
        policy(
            "default allow := false\nallow if { input.iat > 0; some x in numbers.range(1, 3000); some y in numbers.range(1, 3000); some z in numbers.range(1, 3000); x + y + z == 0 }",
        ),
    ] {
        rig.broker.set_resource_policy("", &text).unwrap();
        assert_eq!(get(), refused(403, "PolicyDeny"), "{text}");
    }
    // Appraisal policies that compute no vector, or one that does not exist.
    for text in [
        policy("trust_claims := {\"executables\": 300} if input.sim\ndefault trust_claims := {}"),
        policy("trust_claims := {\"executables\": \"3\"}"),
        policy("trust_claims := {\"hardwear\": 2}"),
        policy("trust_claims := [2]"),
        policy("trust_claims := {\"executables\": 3} if input.nothing"),
    ] {
        rig.broker.set_attestation_policy("default_cpu", &text).unwrap();
        let (session, nonce) = wire.auth();
        let reply = wire.attest(&session, &attestation(&rig.attester(None), &nonce, &PrivateKey::generate_p256()));
        assert_eq!(refusal(&reply), refused(401, "PolicyEngineError"), "{text}");
    }
}

#[test]
fn contraindicated_and_empty_tokens_get_nothing_by_default() {
    let rig = Rig::new();
    for text in [trust(99), trust(-100), trust(33), trust(0), policy("trust_claims := {}")] {
        rig.broker.set_attestation_policy("default_cpu", &text).unwrap();
        let error = rig.client().get(&path("default/key/1")).unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 403, .. }), "{text}: {error}");
    }
    rig.broker.set_attestation_policy("default_cpu", &trust(3)).unwrap();
    assert!(rig.client().get(&path("default/key/1")).is_ok());
}

#[test]
fn expired_reference_values_do_not_count() {
    let rig = Rig::new();
    let measurement = rig.attester(None).measurement().hex();
    rig.broker.add_reference_value("sim.measurement", vec![measurement.into()], Some(1)).unwrap();
    assert!(matches!(rig.client().get(&path("default/key/1")), Err(ClientError::Refused { status: 403, .. })));
}

#[test]
fn administration_needs_this_brokers_fresh_admin_token() {
    let (rig, other) = (Rig::new(), Rig::new());
    let wire = rig.wire();
    let guest = wire.token(&rig.attester(None));
    let foreign = admin_token(&other.broker.admin_key().unwrap(), &rig.broker.token_key(), "x", 60).unwrap();
    let elsewhere = admin_token(&rig.broker.admin_key().unwrap(), &other.broker.token_key(), "x", 60).unwrap();
    let expired = admin_token(&rig.broker.admin_key().unwrap(), &rig.broker.token_key(), "x", 0).unwrap();
    for credential in [
        Credential::None,
        Credential::Session("x"),
        Credential::Bearer(""),
        Credential::Bearer(&guest),
        Credential::Bearer(&foreign),
        Credential::Bearer(&elsewhere),
        Credential::Bearer(&expired),
    ] {
        for (path, call) in [
            ("/kbs/v0/resource/default/key/1", Call::Post("text/plain", b"false key")),
            ("/kbs/v0/resource/default/key/1", Call::Delete),
            ("/kbs/v0/resources", Call::Get),
            ("/kbs/v0/attestation-policy", Call::Post("application/json", b"{}")),
            ("/kbs/v0/resource-policy", Call::Post("application/json", b"{}")),
            ("/kbs/v0/resource-policy", Call::Get),
            ("/kbs/v0/reference-value", Call::Post("application/json", b"{}")),
            ("/kbs/v0/reference-value/x", Call::Get),
            ("/kbs/v0/sim-platform", Call::Post("text/plain", b"")),
            ("/kbs/v0/audit", Call::Get),
        ] {
            let reply = wire.0.call("test", path, credential, call, 1 << 20).unwrap();
            assert_eq!(refusal(&reply), refused(401, "AdminAuthAccess"), "{path}");
        }
    }
    assert_eq!(rig.client().get(&path("default/key/1")).unwrap().expose(), SECRET);
    let stranger = AdminClient::new(&rig.config(), PrivateKey::generate_p256(), "x").unwrap();
    assert!(matches!(stranger.resources(), Err(ClientError::Refused { status: 401, .. })));
}

#[test]
fn versions_sizes_and_paths_are_bounded() {
    let rig = Rig::new();
    let wire = rig.wire();
    let auth = |body: &Value| wire.post("/kbs/v0/auth", Credential::None, body.to_string().as_bytes());
    assert_eq!(auth(&json!({"version": "0.3.7", "tee": "sim", "extra-params": {}})).status, 200);
    for bad in [
        json!({"version": "1.0.0", "tee": "sim"}),
        json!({"version": "", "tee": "sim"}),
        json!({"version": "0.4.0", "tee": "none"}),
        json!({"version": "0.4.0", "tee": "../sim"}),
        json!({"tee": "sim"}),
        json!([]),
    ] {
        assert_eq!(refusal(&auth(&bad)), refused(400, "InvalidRequest"), "{bad}");
    }
    let long = wire.post("/kbs/v0/auth", Credential::None, &vec![b' '; LONGEST_REQUEST + 1]);
    assert_eq!(refusal(&long).0, 413);
    let (session, _) = wire.auth();
    let long = wire.0.call(
        "test",
        "/kbs/v0/attest",
        Credential::Session(&session),
        Call::Post("application/json", &vec![b' '; LONGEST_ATTESTATION + 1]),
        1 << 20,
    );
    // The server may hang up before it has read all of it.
    if let Ok(reply) = long {
        assert_eq!(refusal(&reply).0, 413);
    }
    let token = wire.token(&rig.attester(None));
    for path in [
        "/kbs/v0/resource/default/key/%2e%2e",
        "/kbs/v0/resource/default/key/1%2f..",
        "/kbs/v0/resource/%2e%2e/%2e%2e/etc",
        "/kbs/v0/resource/default/key/1%00",
        "/kbs/v0/resource/default/key/%ff",
        "/kbs/v0/resource/default/key/.1",
        "/kbs/v0/resource/default/key",
        "/kbs/v0/resource/default/key/1/2",
        "/kbs/v0/resource//key/1",
        "/kbs/v0/../v0/resource/default/key/1",
        "/kbs/v1/resource/default/key/1",
    ] {
        let reply = wire.get(path, Credential::Bearer(&token));
        assert!(matches!(reply.status, 400 | 404), "{path}: {}", reply.status);
    }
}

#[test]
fn cut_slow_and_senseless_connections_do_not_disturb_others() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings, Transport::PlainHttp);
    let mut held = Vec::new();
    for bytes in [
        &b"POST /kbs/v0/auth HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"[..],
        b"POST /kbs/v0/auth HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST",
    ] {
        let mut stream = TcpStream::connect(rig.handle.address()).unwrap();
        stream.write_all(bytes).unwrap();
        held.push(stream);
    }
    assert_eq!(rig.client().get(&path("default/key/1")).unwrap().expose(), SECRET);
    for mut stream in held {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 200"));
    }
}

#[test]
fn a_token_for_another_guest_is_not_believed() {
    // A machine in the middle that holds a token of the true broker for another guest.
    let rig = Rig::new();
    let stolen = rig.wire().token(&rig.attester(None));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answers = std::thread::spawn(move || {
        let nonce = r#"{"nonce":"bm9uY2U=","extra-params":""}"#.to_owned();
        let token = serde_json::to_string(&TokenReply { token: stolen }).unwrap();
        for body in [nonce, token] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = vec![0; 1 << 16];
            let mut request = Vec::new();
            // All of the request: its body is JSON and ends with the last brace.
            while !request.ends_with(b"}") {
                let length = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..length]);
            }
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\nset-cookie: kbs-session-id=x\r\n";
            write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
        }
    });
    let config = BrokerConfig { url: format!("http://{address}"), certificate: None, attempts: 1, ..rig.config() };
    let client = BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap();
    assert!(matches!(client.attest(), Err(ClientError::ForeignToken("TEE key"))));
    answers.join().unwrap();
}

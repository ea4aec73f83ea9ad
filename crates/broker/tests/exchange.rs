//! The whole exchange between a guest and a broker, over TLS on loopback, and all that an administrator does.

mod common;

use common::{Rig, SECRET, init_data, path, policy};
use nacre_attest::{
    client::{BrokerClient, BrokerConfig, ClientError, Credential},
    ear::Status,
    sim::SimAttester,
};
use nacre_broker::{Broker, BrokerError, InitOptions, ResourceScope, Settings, Transport, serve};
use nacre_core::{Clock as _, KeySource as _, KeySourceError, jose::PrivateKey};
use serde_json::json;
use std::sync::Arc;

#[test]
fn a_measured_guest_gets_its_key_and_the_log_says_so() {
    let rig = Rig::new();
    let init = init_data("broker = 'pinned'");
    // This very program.
    let attester = SimAttester::new(rig.platform(), Some(init)).unwrap();
    let measurement = attester.measurement().hex();
    rig.broker.add_reference_value("sim.measurement", vec![measurement.clone().into()], None).unwrap();
    let client = rig.client_of(attester);
    assert_eq!(client.now(), None, "no time before the broker has signed one");
    let secret = client.fetch(&"kbs:///default/key/1".parse().unwrap()).unwrap();
    assert_eq!(secret.expose(), SECRET);

    let attested = client.attest().unwrap();
    let ear = attested.claims().unwrap();
    assert_eq!(ear.status(), Status::Affirming);
    assert!(ear.simulated && client.simulated());
    let evidence = &ear.submods["cpu0"].evidence;
    assert_eq!(evidence["sim"]["measurement"], measurement.as_str());
    assert_eq!(evidence["init_data_claims"]["nacre.toml"], "broker = 'pinned'");
    let time = client.now().unwrap();
    assert!((time.now - time::OffsetDateTime::now_utc()).abs() < time::Duration::seconds(3));
    assert_eq!(time.source, "the broker's signed time");

    let log = rig.broker.audit(0, 100).unwrap();
    let events: Vec<&str> = log.iter().map(|entry| entry.event.as_str()).collect();
    assert!(events.ends_with(&["attested", "released"]), "{events:?}");
    let released = log.last().unwrap();
    assert_eq!((released.subject.as_str(), released.measurement.as_str()), ("default/key/1", measurement.as_str()));
    assert!(released.simulated && released.actor.starts_with("guest:") && released.policy.starts_with("default@"));
    assert!(!format!("{log:?}").contains("hunter2"));
}

#[test]
fn one_token_serves_many_fetches_and_threads() {
    let rig = Rig::new();
    let client = rig.client();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET));
        }
    });
    let attested = rig.broker.audit(0, 100).unwrap().iter().filter(|entry| entry.event == "attested").count();
    assert_eq!(attested, 1);
}

#[test]
fn what_is_missing_is_404_and_what_is_denied_403() {
    let rig = Rig::new();
    let client = rig.client();
    let fetch = |uri: &str| client.fetch(&uri.parse().unwrap()).map(|_| ());
    assert!(matches!(fetch("kbs:///default/key/none"), Err(KeySourceError::NotFound { .. })));
    assert!(matches!(fetch("kbs+vault:///default/key/1"), Err(KeySourceError::NotFound { .. })));
    assert!(matches!(fetch("kbs://other.example/default/key/1"), Err(KeySourceError::Failed { .. })));
    rig.broker.set_resource_policy("default", &policy("default allow := false")).unwrap();
    assert!(matches!(fetch("kbs:///default/key/1"), Err(KeySourceError::Denied { .. })));
    // Who may not have it does not learn whether it is there.
    assert!(matches!(fetch("kbs:///default/key/none"), Err(KeySourceError::Denied { .. })));
}

#[test]
fn the_most_specific_policy_decides() {
    let rig = Rig::new();
    let client = rig.client();
    for name in ["a/key/1", "a/key/2", "a/other/1"] {
        rig.broker.put_resource(&path(name), b"x").unwrap();
    }
    rig.broker.set_resource_policy("a", &policy("default allow := false")).unwrap();
    rig.broker
        .set_resource_policy(
            "a/key",
            &policy(
                r#"default allow := false
        allow if data["resource-path"][2] == "2"
        allow if data.query.version == "7""#,
            ),
        )
        .unwrap();
    let got = |name: &str| client.get(&path(name)).is_ok();
    assert!(!got("a/key/1") && got("a/key/2") && !got("a/other/1") && got("default/key/1"));
    rig.broker.set_resource_policy("a/key/1", &policy("allow := true")).unwrap();
    assert!(got("a/key/1"));
    assert!(rig.broker.set_resource_policy("../x", &policy("allow := true")).is_err());
}

#[test]
fn init_data_with_reference_values_must_be_a_known_one() {
    let rig = Rig::new();
    let (good, bad) = (init_data("policy = 'strict'"), init_data("policy = 'lax'"));
    let digest = nacre_attest::evidence::hex(&good.fit::<48>());
    rig.broker.add_reference_value("sim.init_data", vec![digest.into()], None).unwrap();
    assert!(rig.client_of(rig.attester(Some(good))).get(&path("default/key/1")).is_ok());
    for init in [Some(bad), None] {
        let error = rig.client_of(rig.attester(init)).get(&path("default/key/1")).unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 403, .. }), "{error}");
    }
}

#[test]
fn a_guest_attests_again_when_its_token_has_ended() {
    let settings = Settings { allow_simulated: true, token_lifetime_seconds: 1, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    let client = rig.client();
    let first = client.attest().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET);
    assert_ne!(client.attest().unwrap().token(), first.token());
}

#[test]
fn without_the_brokers_token_key_there_are_keys_but_no_time() {
    let rig = Rig::new();
    let config = BrokerConfig { token_key: None, ..rig.config() };
    let client = BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap();
    assert!(client.attest().unwrap().claims().is_none());
    assert_eq!(client.now(), None);
    assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET);
}

#[test]
fn a_guest_attests_again_when_its_token_is_not_accepted_any_more() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let (old, new) = (Rig::with(settings.clone(), Transport::PlainHttp), Rig::with(settings, Transport::PlainHttp));
    let config = BrokerConfig { token_key: None, ..old.config() };
    let client = BrokerClient::new(config, Arc::new(old.attester(None))).unwrap();
    let first = client.attest().unwrap();
    // Another broker takes over the address; it trusts the same platform and has never seen the token.
    new.broker.add_sim_platform_key(&old.platform().public()).unwrap();
    let address = old.handle.address();
    old.handle.shutdown();
    let _handle = serve(new.broker.clone(), address, Transport::PlainHttp).unwrap();
    assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET);
    assert_ne!(client.attest().unwrap().token(), first.token());
}

#[test]
fn a_broken_broker_is_tried_again_and_then_named() {
    use std::io::{Read as _, Write as _};
    let rig = Rig::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        // Busy, broken, gone.
        for answer in ["HTTP/1.1 429 Busy\r\n", "HTTP/1.1 503 Broken\r\n", ""] {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            if !answer.is_empty() {
                write!(stream, "{answer}connection: close\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
        }
    });
    let config = BrokerConfig { url: format!("http://{address}"), certificate: None, ..rig.config() };
    let client = BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap();
    let error = client.attest().unwrap_err();
    assert!(
        matches!(error, ClientError::Network { .. }) && error.to_string().contains(&address.to_string()),
        "{error}"
    );
    server.join().unwrap();
}

#[test]
fn an_administrator_does_everything_over_http() {
    let rig = Rig::new();
    let admin = rig.admin();
    admin.put_resource(&path("team/key/9"), b"nine").unwrap();
    assert_eq!(rig.client().get(&path("team/key/9")).unwrap().expose(), b"nine");
    let paths: Vec<String> = admin.resources().unwrap().into_iter().map(|resource| resource.path).collect();
    assert_eq!(paths, ["default/key/1", "team/key/9"]);
    admin.delete_resource(&path("team/key/9")).unwrap();
    assert!(matches!(admin.delete_resource(&path("team/key/9")), Err(ClientError::Refused { status: 404, .. })));
    admin.set_resource_policy(&ResourceScope::Repository("team"), &policy("allow := true")).unwrap();
    assert_eq!(admin.resource_policy(&ResourceScope::Repository("team")).unwrap(), policy("allow := true"));
    assert!(matches!(
        admin.resource_policy(&ResourceScope::Repository("none")),
        Err(ClientError::Refused { status: 404, .. })
    ));
    assert!(matches!(
        admin.set_resource_policy(&ResourceScope::All, "package nonsense"),
        Err(ClientError::Refused { status: 400, .. })
    ));
    admin.set_attestation_policy("default_cpu", &common::trust(3)).unwrap();
    admin.add_reference_value("x", &[json!(1), json!("a")], None).unwrap();
    assert_eq!(rig.broker.reference_value("x").unwrap().unwrap().values, [json!(1), json!("a")]);
    admin.add_sim_platform_key(&PrivateKey::generate_p256().public()).unwrap();
    let log = admin.audit(0).unwrap();
    assert!(log.iter().any(|entry| entry.event == "resource deleted" && entry.actor == "admin:tester"));
    assert_eq!(admin.audit(log.len() as u64).unwrap(), []);
}

#[test]
fn everything_is_there_after_a_restart_and_shutdown_is_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("b");
    let options = InitOptions { names: vec!["broker.example".into()], ..InitOptions::default() };
    let broker = Broker::init(&root, &options).unwrap();
    broker.put_resource(&path("a/b/c"), b"kept").unwrap();
    let pem = broker.certificate_pem().to_owned();
    let token_key = broker.token_key();
    let handle = serve(Arc::new(broker), "127.0.0.1:0".parse().unwrap(), Transport::Tls).unwrap();
    let start = std::time::Instant::now();
    handle.shutdown();
    assert!(start.elapsed() < std::time::Duration::from_secs(2));
    let broker = Broker::open(&root).unwrap();
    assert_eq!(broker.resource(&path("a/b/c")).unwrap().unwrap().expose(), b"kept");
    assert_eq!((broker.certificate_pem(), broker.token_key()), (pem.as_str(), token_key));
    assert!(matches!(Broker::open(&root), Err(BrokerError::Running(_))), "one process at a time");
    assert!(matches!(Broker::init(&root, &options), Err(BrokerError::Exists(_))));
    use std::os::unix::fs::MetadataExt as _;
    for secret in ["master.key", "tls.key", "admin.key"] {
        assert_eq!(std::fs::metadata(root.join(secret)).unwrap().mode() & 0o777, 0o600, "{secret}");
    }
}

#[test]
fn the_service_answers_outside_the_protocol() {
    let rig = Rig::new();
    let wire = rig.wire();
    assert_eq!(wire.get("/healthz", Credential::None).body, b"ok\n");
    assert_eq!(
        common::refusal(&wire.get("/kbs/v0/vault/a/b", Credential::None)),
        common::refused(404, "InvalidRequestPath")
    );
    assert_eq!(wire.get("/kbs/v0/auth", Credential::None).status, 405);
}

#[test]
fn a_false_broker_is_not_talked_to() {
    let (rig, other) = (Rig::new(), Rig::new());
    let try_with =
        |config: BrokerConfig| BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap().attest().unwrap_err();
    // Another certificate than the pinned one.
    let config = BrokerConfig { certificate: Some(other.broker.certificate_pem().into()), ..rig.config() };
    assert!(matches!(try_with(config), ClientError::Network { .. }));
    // Nothing pinned: the system's roots do not know it.
    let config = BrokerConfig { certificate: None, ..rig.config() };
    assert!(matches!(try_with(config), ClientError::Network { .. }));
    // The right channel, but tokens by another key.
    let config = BrokerConfig { token_key: Some(other.broker.token_key()), ..rig.config() };
    assert!(matches!(try_with(config), ClientError::Succession(_)));
}

#[test]
fn a_damaged_or_unfinished_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("b");
    drop(Broker::init(&root, &InitOptions::default()).unwrap());
    let refused = |file: &str, text: &[u8]| {
        let kept = std::fs::read(root.join(file)).unwrap();
        std::fs::write(root.join(file), text).unwrap();
        let error = Broker::open(&root).unwrap_err().to_string();
        assert!(error.contains(file), "{file}: {error}");
        std::fs::write(root.join(file), kept).unwrap();
    };
    refused("broker.toml", b"allow_simulatd = true");
    refused("broker.toml", b"token_lifetime_seconds = 0");
    refused("broker.toml", b"most_sessions = -1");
    refused("master.key", b"short");
    refused("token.pub", b"-----BEGIN PUBLIC KEY-----");
    refused("admin.pub", b"");
    drop(Broker::open(&root).unwrap());
    // As an init that was cut leaves it.
    std::fs::remove_file(root.join("broker.toml")).unwrap();
    assert!(matches!(Broker::open(&root), Err(BrokerError::Io { path, .. }) if path.ends_with("broker.toml")));
}

//! The service around the protocol: limits, counters, health, the audit log, changes of keys, formats of older versions, a full disk.

mod common;

use std::sync::Arc;

use common::{Rig, SECRET, path, refusal, refused};
use nacre_attest::client::{BrokerClient, BrokerConfig, ClientError, Credential};
use nacre_broker::{Broker, BrokerError, InitOptions, Settings, Transport, serve};
use nacre_testkit::SmallDisk;

fn settings() -> Settings {
    Settings { allow_simulated: true, ..Settings::default() }
}

#[test]
fn an_address_that_calls_too_often_is_told_to_wait() {
    let rig = Rig::with(Settings { calls_per_second: 5, ..settings() }, Transport::Tls);
    let wire = rig.wire();
    let answers: Vec<u16> = (0..30).map(|_| wire.get("/kbs/v0/jwks", Credential::None).status).collect();
    assert!(answers[..10].iter().all(|status| *status == 200), "{answers:?}");
    assert!(answers.contains(&429), "{answers:?}");
    // Whoever watches over it is not counted.
    assert_eq!(wire.get("/healthz", Credential::None).status, 200);
    let metrics = String::from_utf8(wire.get("/metrics", Credential::None).body).unwrap();
    assert!(!metrics.contains("nacre_broker_limited_total 0"), "{metrics}");
}

#[test]
fn counters_say_what_happened() {
    let rig = Rig::new();
    rig.client().get(&path("default/key/1")).unwrap();
    let _ = rig.client().get(&path("default/key/none"));
    let text = String::from_utf8(rig.wire().get("/metrics", Credential::None).body).unwrap();
    for line in [
        "nacre_broker_attested_total 2",
        "nacre_broker_released_total 1",
        "nacre_broker_sessions 2",
        "nacre_broker_up 1",
        "nacre_broker_calls_total{route=\"attest\",status=\"200\"} 2",
        "nacre_broker_calls_total{route=\"resource\",status=\"404\"} 1",
        "nacre_broker_call_seconds_count 6",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
    // What is asked for does not make names of its own.
    rig.wire().get("/kbs/v0/whatever-somebody-makes-up", Credential::None);
    assert!(!rig.broker.metrics().contains("whatever"));
}

#[test]
fn guests_follow_a_new_token_key_and_old_tokens_hold_until_they_end() {
    let rig = Rig::with(Settings { token_lifetime_seconds: 2, ..settings() }, Transport::Tls);
    let (pinned, wire) = (rig.config(), rig.wire());
    let old = wire.token(&rig.attester(None));
    let admin = rig.admin();
    for _ in 0..2 {
        admin.rotate_token_key().unwrap();
    }
    // A guest that pinned the first key, one that pins the new one, an administrator who knows the first.
    let client = BrokerClient::new(pinned, Arc::new(rig.attester(None))).unwrap();
    assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET);
    assert!(client.attest().unwrap().claims().is_some());
    let current = rig.broker.current_token_key().unwrap();
    let config = BrokerConfig { token_key: Some(current.clone()), ..rig.config() };
    assert!(BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap().attest().is_ok());
    assert!(admin.resources().is_ok());
    let get = |token: &str| wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(token));
    assert_eq!(get(&old).status, 200);
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert_eq!(refusal(&get(&old)), refused(401, "TokenVerifierError"));
    // Another broker's key leads nowhere.
    let other = Rig::new();
    let config = BrokerConfig { token_key: Some(other.broker.token_key()), ..rig.config() };
    let error = BrokerClient::new(config, Arc::new(rig.attester(None))).unwrap().attest().unwrap_err();
    assert!(matches!(error, ClientError::Succession(_)), "{error}");
    // The set has public halves only, and what is pinned from now on is in token.pub.
    let set = String::from_utf8(wire.get("/kbs/v0/jwks", Credential::None).body).unwrap();
    assert!(!set.contains("\"d\""), "{set}");
    let file = std::fs::read_to_string(rig.dir().join("token.pub")).unwrap();
    assert_eq!(file, current.to_pem().unwrap());
}

#[test]
fn a_broker_of_format_1_becomes_one_of_format_2() {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/format-1");
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&fixture).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let broker = Broker::open(dir.path()).unwrap();
    assert_eq!(broker.resource(&path("team/key/1")).unwrap().unwrap().expose(), SECRET);
    assert_eq!(broker.resource_policy("team").unwrap().unwrap(), "package policy\nallow := true\n");
    assert_eq!(broker.reference_value("sim.measurement").unwrap().unwrap().values, ["00ff"]);
    let log = broker.audit(0, 100).unwrap();
    assert_eq!(log.last().unwrap().event, "database migrated");
    assert!(log.iter().any(|entry| entry.event == "resource set"));
    // The token key moved into the database, and is the same.
    assert!(!dir.path().join("token.key").exists());
    assert_eq!(broker.current_token_key().unwrap(), broker.token_key());
    drop(broker);
    let broker = Broker::open(dir.path()).unwrap();
    assert_eq!(broker.resource(&path("team/key/1")).unwrap().unwrap().expose(), SECRET);
    drop(broker);
    std::fs::copy(fixture.join("broker.redb"), dir.path().join("broker.redb")).unwrap();
    std::fs::write(dir.path().join("master.key"), [7; 32]).unwrap();
    assert!(matches!(Broker::open(dir.path()), Err(BrokerError::Master(_))), "another master key");
    // Nothing was written with it.
    std::fs::copy(fixture.join("master.key"), dir.path().join("master.key")).unwrap();
    assert_eq!(Broker::open(dir.path()).unwrap().resource(&path("team/key/1")).unwrap().unwrap().expose(), SECRET);
}

#[test]
fn a_full_disk_refuses_and_goes_on_when_there_is_room() {
    let Some(disk) = SmallDisk::mount(6 << 20) else { return };
    let root = disk.path().join("b");
    let broker = Arc::new(Broker::init(&root, &InitOptions { names: Vec::new(), settings: settings() }).unwrap());
    let guests = common::Guests::trusted_by(&broker, disk.path());
    broker.put_resource(&path("default/key/1"), SECRET).unwrap();
    let handle = serve(broker.clone(), "127.0.0.1:0".parse().unwrap(), Transport::Tls).unwrap();
    let wire = common::Wire(nacre_attest::client::Transport::new(&common::config(&broker, &handle)).unwrap());
    let token = wire.token(&guests.attester(None));
    let get = || wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token));
    assert_eq!(get().status, 200);
    let before = broker.audit(0, 10_000).unwrap().len();
    let filler = disk.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    // What cannot be logged is not released; how much still fits into the file as it is does not matter.
    let answers: Vec<u16> = (0..200)
        .map(|number| {
            let _ = broker.put_resource(&path(&format!("fill/x/{number}")), &[1; 65_536]);
            get().status
        })
        .collect();
    assert!(answers.ends_with(&[507, 507]), "{answers:?}");
    let logged = broker.audit(0, 10_000).unwrap();
    let released = logged[before..].iter().filter(|entry| entry.event == "released").count();
    assert_eq!(released, answers.iter().filter(|status| **status == 200).count(), "as many as were answered");
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(get().status, 200);
    handle.shutdown();
    drop(broker);
    Broker::open(&root).unwrap().audit(0, 10_000).unwrap();
}

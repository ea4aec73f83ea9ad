//! Guests that are not simulated: a TPM (swtpm) attests to a broker, by policies that name it; and what TEEs a broker knows.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::sync::Arc;

use common::{Rig, SECRET, path};
use nacre_attest::{
    attesters::tpm::{Ak, TpmAttester, TpmOptions, address},
    client::{BrokerClient, Credential},
    eventlog::story::Happening,
    evidence::Attester,
    rcar::Request,
};
use nacre_core::Digest;
use nacre_testkit::Swtpm;
use serde_json::json;

fn vector(client: &BrokerClient) -> serde_json::Value {
    let attested = client.attest().unwrap();
    serde_json::to_value(&attested.claims().unwrap().submods["cpu0"].vector).unwrap()
}

#[test]
fn a_tpm_gets_keys_once_somebody_named_its_key_and_its_pcrs() {
    let Some(tpm) = Swtpm::start() else { return };
    let rig = Rig::new();
    let options = TpmOptions {
        address: address(&tpm.address()),
        ak: Ak::Primary,
        firmware_log: tpm.state().join("no-firmware-log"),
        log_dir: tpm.state().to_owned(),
    };
    let attester = Arc::new(TpmAttester::new(&options, None).unwrap());
    attester.runtime_log().unwrap().record(&Happening::Policy { digest: Digest::sha256(b"policy") }).unwrap();
    let client = || BrokerClient::new(rig.config(), attester.clone()).unwrap();
    // Genuine, and nobody knows it.
    let stranger = client();
    assert!(stranger.get(&path("default/key/1")).is_err());
    assert_eq!(vector(&stranger)["hardware"], 97);
    rig.broker.add_reference_value("trusted_aks", vec![attester.ak_public().unwrap().into()], None).unwrap();
    assert!(client().get(&path("default/key/1")).is_err());
    rig.broker.add_reference_value("tpm_pcr07", vec!["00".repeat(32).into()], None).unwrap();
    let known = client();
    assert_eq!(known.get(&path("default/key/1")).unwrap().expose(), SECRET);
    assert!(!known.simulated());
    // What the log says counts where somebody says what it should say.
    assert_eq!(vector(&client())["file-system"], 0);
    let policy = Digest::sha256(b"policy").to_string();
    rig.broker.add_reference_value("image_policy", vec![policy.into()], None).unwrap();
    let told = client();
    assert_eq!(vector(&told)["file-system"], 2);
    // Another policy, and this guest is not one that affirms.
    attester.runtime_log().unwrap().record(&Happening::Policy { digest: Digest::sha256(b"other") }).unwrap();
    assert_eq!(vector(&client())["file-system"], 32);
    assert!(client().get(&path("default/key/1")).is_err());
}

#[test]
fn a_simulated_guest_with_a_log_tells_the_broker_what_it_runs() {
    let rig = Rig::new();
    let directory = tempfile::tempdir().unwrap();
    let attester = rig.attester(None).events(directory.path()).unwrap();
    attester.runtime_log().unwrap().record(&Happening::Policy { digest: Digest::sha256(b"policy") }).unwrap();
    let client = rig.client_of(attester);
    assert_eq!(client.get(&path("default/key/1")).unwrap().expose(), SECRET);
    let attested = client.attest().unwrap();
    let evidence = serde_json::to_value(&attested.claims().unwrap().submods["cpu0"].evidence).unwrap();
    assert_eq!(evidence["sim"]["runtime"]["keys"], json!(["default/key/1"]));
    assert_eq!(evidence["sim"].get("uefi_event_logs"), None);
}

#[test]
fn a_broker_knows_each_tee_and_believes_none_without_evidence() {
    let rig = Rig::new();
    let wire = rig.wire();
    let auth =
        |tee: &str| wire.post("/kbs/v0/auth", Credential::None, &serde_json::to_vec(&Request::new(tee)).unwrap());
    for tee in ["snp", "tdx", "sgx", "tpm", "sim", "sample"] {
        assert_eq!(auth(tee).status, 200, "{tee}");
    }
    let unknown = auth("cca");
    assert_eq!(unknown.status, 400);
    assert!(String::from_utf8_lossy(&unknown.body).contains("sgx, snp, tdx, tpm, sim and sample are"));
}

#[test]
fn misspelt_rules_for_evidence_keep_a_broker_from_opening() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("broker");
    drop(nacre_broker::Broker::init(&dir, &nacre_broker::InitOptions::default()).unwrap());
    std::fs::write(dir.join("verify.toml"), "[snp]\ndebug = true\n").unwrap();
    drop(nacre_broker::Broker::open(&dir).unwrap());
    for wrong in ["[snp]\ndebg = true\n", "[sev]\n", "x", "[dcap]\nstatuses = \"UpToDate\"\n"] {
        std::fs::write(dir.join("verify.toml"), wrong).unwrap();
        assert!(nacre_broker::Broker::open(&dir).is_err(), "{wrong}");
    }
}

//! Signed reference documents, and policies of TEE classes.

mod common;

use std::collections::BTreeMap;

use common::{Rig, path, trust};
use nacre_attest::client::ClientError;
use nacre_broker::{ReferenceDocument, Settings, Signer, Transport};
use nacre_core::jose::PrivateKey;
use serde_json::Value;

fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

fn document(serial: u64, expires: i64, values: &[(&str, &str)], revoked: &[&str]) -> ReferenceDocument {
    let values: BTreeMap<String, Vec<Value>> =
        values.iter().map(|(id, value)| ((*id).to_owned(), vec![Value::from(*value)])).collect();
    let revoked = revoked.iter().map(|id| (*id).to_owned()).collect();
    ReferenceDocument::new("builder", serial, expires, values, revoked)
}

#[test]
fn signed_reference_values_are_taken_expire_and_are_revoked() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    let (admin, key) = (rig.admin(), PrivateKey::generate_p256());
    let pem = key.public().to_pem().unwrap();
    admin.set_signer(&Signer { name: "builder".into(), key: pem, prefix: "sim.".into(), serial: 0 }).unwrap();
    rig.broker.delete_reference("sim.measurement").unwrap();
    let get = || rig.client().get(&path("default/key/1"));
    assert!(get().is_err());
    let measurement = rig.attester(None).measurement().hex();
    let signed = |document: ReferenceDocument| document.sign(&key).unwrap();
    let good = signed(document(5, now() + 60, &[("sim.measurement", &measurement)], &[]));
    admin.import_references(&good).unwrap();
    assert!(get().is_ok());
    let listed = admin.references().unwrap();
    assert_eq!(listed["sim.measurement"].issuer, "builder");
    // Again, older, of the future or the past, by another name, beyond its prefix, by a stranger, changed.
    let stranger = PrivateKey::generate_p256();
    let other = ReferenceDocument::new("other", 9, now() + 60, BTreeMap::new(), Vec::new());
    let (head, rest) = good.split_once('.').unwrap();
    for bad in [
        good.clone(),
        signed(document(4, now() + 60, &[], &[])),
        signed(document(9, now() - 1, &[], &[])),
        signed(other),
        signed(document(9, now() + 60, &[("snp_launch_measurement", "00")], &[])),
        signed(document(9, now() + 60, &[], &["other.value"])),
        document(9, now() + 60, &[], &[]).sign(&stranger).unwrap(),
        format!("{head}.e30.{}", rest.split_once('.').unwrap().1),
        String::new(),
        "x".repeat(2 << 20),
    ] {
        let error = admin.import_references(&bad).unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 400, .. }), "{bad:.60}: {error}");
    }
    admin.import_references(&signed(document(10, now() + 60, &[], &["sim.measurement"]))).unwrap();
    assert!(get().is_err());
    // Nobody brings back what was revoked by the document before.
    assert!(admin.import_references(&good).is_err());
    admin.import_references(&signed(document(11, now() + 1, &[("sim.measurement", &measurement)], &[]))).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(get().is_err(), "expired");
    // A signer that is removed takes its values along.
    admin.import_references(&signed(document(12, now() + 60, &[("sim.measurement", &measurement)], &[]))).unwrap();
    assert!(get().is_ok());
    admin.delete_signer("builder", true).unwrap();
    assert!(get().is_err() && admin.signers().unwrap().is_empty());
    assert!(admin.import_references(&signed(document(13, now() + 60, &[], &[]))).is_err());
}

#[test]
fn unsigned_reference_values_can_be_refused() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    let dir = rig.dir();
    let text = std::fs::read_to_string(dir.join("broker.toml")).unwrap();
    rig.handle.shutdown();
    drop(rig.broker);
    let text = text.replace("signed_references_only = false", "signed_references_only = true");
    std::fs::write(dir.join("broker.toml"), text).unwrap();
    let broker = nacre_broker::Broker::open(&dir).unwrap();
    assert!(broker.add_reference_value("sim.svn", vec![1.into()], None).is_err());
}

#[test]
fn a_tee_with_a_policy_of_its_own_is_appraised_by_it() {
    let rig = Rig::new();
    let admin = rig.admin();
    admin.set_attestation_policy("sim_cpu", &trust(99)).unwrap();
    let get = || rig.client().get(&path("default/key/1"));
    assert!(get().is_err());
    admin.set_attestation_policy("snp_cpu", &trust(3)).unwrap();
    assert!(get().is_err());
    admin.set_attestation_policy("sim_cpu", &trust(3)).unwrap();
    assert!(get().is_ok());
    assert_eq!(admin.attestation_policy("snp_cpu").unwrap(), trust(3));
    for bad in ["", "sim", "_cpu", "../x_cpu", "SNP_cpu"] {
        assert!(admin.set_attestation_policy(bad, &trust(3)).is_err(), "{bad}");
    }
}

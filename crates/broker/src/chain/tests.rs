use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::ear::{Appraisal, Ear, PROFILE, TrustVector, VerifierId};
use serde_json::json;

use super::*;
use crate::{ReferenceValue, policy};

const REPLAYED: &str = r#"{
    "replayed": true, "unknown": 0, "policies": ["sha256:p"],
    "images": [{"digest": "sha256:i", "image": "docker://a/b", "signers": ["k"]}],
    "volumes": [{"id": "data", "protection": "external", "anchor": "none", "root": ""}],
    "keys": ["team/key/1", "other/key/1"],
    "workloads": [{"id": "web", "digest": "sha256:x"}],
    "counts": {"policies": 1, "images": 1, "volumes": 1, "keys": 2, "workloads": 1}
}"#;

/// What the shipped policy makes of claims, and the record of it, as the broker makes it.
fn record(tee: &str, claims: &Value, references: &[(&str, Value)]) -> GuestRecord {
    let references: Arc<policy::References> = Arc::new(
        references
            .iter()
            .map(|(name, values)| {
                let values = values.as_array().cloned().unwrap_or_default();
                ((*name).to_owned(), ReferenceValue { values, expires: i64::MAX / 2, issuer: "builder".into() })
            })
            .collect(),
    );
    let shipped = policy::Policy::new(policy::DEFAULT_CPU_TEXT.into());
    let (vector, asked) = shipped.appraise(json!({tee: claims}), references.clone()).unwrap();
    let vector: BTreeMap<String, i8> = serde_json::from_value(vector).unwrap();
    let vector = TrustVector::new(vector).unwrap();
    let expected = asked.into_iter().filter(|name| !is_of_another(tee, name)).map(|name| {
        let value = references.get(&name).map(|value| Expectation::of(value, counterpart(tee, claims, &name)));
        (name, value)
    });
    let expected = expected.collect();
    let module = Appraisal {
        status: vector.status(),
        vector,
        policy_id: "default".into(),
        evidence: json!({tee: claims, "report_data": "00", "runtime_data_claims": {"nonce": "n"}}),
    };
    let ear = Ear {
        eat_profile: PROFILE.into(),
        iat: 100,
        nbf: Some(100),
        exp: 400,
        iss: "b".into(),
        verifier: VerifierId { build: "b".into(), developer: "d".into() },
        submods: [("cpu0".to_owned(), module)].into(),
        simulated: false,
    };
    GuestRecord {
        time: 100,
        tee: tee.into(),
        guest: "guest:g".into(),
        measurement: "m".into(),
        simulated: false,
        outcome: Outcome::Attested(Attested { policy: "default_cpu@0".into(), ear: Arc::new(ear), expected }),
    }
}

fn stages(record: &GuestRecord, events: &[AuditEntry]) -> Vec<Stage> {
    chain("a1".into(), 7, record, events, true).chain
}

fn verdicts(stages: &[Stage]) -> Vec<&'static str> {
    stages.iter().map(|stage| stage.verdict.name()).collect()
}

fn check<'a>(stages: &'a [Stage], stage: StageId, what: &str) -> &'a Check {
    let stage = stages.iter().find(|found| found.id == stage).unwrap();
    stage.checks.iter().find(|check| check.what == what).unwrap_or_else(|| panic!("no {what} in {stage:?}"))
}

#[test]
fn each_tees_claims_are_shown_with_what_they_are_compared_with() {
    let snp = json!({
        "product": "Milan", "chip_id": "cc", "measurement": "aa", "reported_tcb_bootloader": 4,
        "reported_tcb_microcode": 5, "reported_tcb_snp": 6, "reported_tcb_tee": 0, "policy_debug_allowed": true,
        "policy_migrate_ma": false, "vmpl": 0, "init_data": "bb",
    });
    let references = [
        ("snp_launch_measurement", json!(["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "aa"])),
        ("snp_bootloader", json!([4])),
        ("snp_microcode", json!([5])),
        ("snp_snp_svn", json!([7])),
        ("snp_tee_svn", json!([0])),
    ];
    let shown = stages(&record("snp", &snp, &references), &[]);
    assert_eq!(
        verdicts(&shown),
        ["passed", "failed", "passed", "failed", "not checked", "not checked", "not checked", "not checked"]
    );
    let firmware = check(&shown, StageId::Hardware, "SNP firmware");
    assert_eq!((firmware.expected.as_slice(), firmware.found.as_deref()), (&["7".to_owned()][..], Some("6")));
    assert_eq!(firmware.verdict, Verdict::Failed);
    // Of many values, the one that was found is among those that are shown.
    let launch = check(&shown, StageId::Firmware, "Launch measurement");
    assert_eq!((launch.expected[0].as_str(), launch.expected.len(), launch.more), ("aa", 8, 3));
    assert!(launch.verdict == Verdict::Passed && launch.by.contains("signed by builder"), "{launch:?}");
    let debug = check(&shown, StageId::Configuration, "Debugging");
    assert_eq!((debug.found.as_deref(), debug.verdict), (Some("on"), Verdict::Failed));
    // What the shipped policy looks up for other TEEs is not part of this one's.
    assert!(shown.iter().flat_map(|stage| &stage.checks).all(|check| !check.by.contains("mr_td")));

    let tdx = json!({
        "quote": {
            "header": {"tee_type": "81000000", "vendor_id": "939a7233f79c4ca9940a0db3957f0607"},
            "body": {"mr_td": "aa", "rtmr_0": "b0", "rtmr_1": "b1", "rtmr_2": "b2", "xfam": "cc"},
        },
        "td_attributes": {"debug": false}, "tcb_status": "OutOfDate", "collateral_expiration_status": "0",
        "advisory_ids": ["INTEL-SA-1"], "init_data": "dd",
    });
    let references =
        [("mr_td", json!(["aa"])), ("rtmr_1", json!(["b1"])), ("rtmr_2", json!(["b2"])), ("xfam", json!(["cc"]))];
    let shown = stages(&record("tdx", &tdx, &references), &[]);
    assert_eq!(verdicts(&shown)[..4], ["passed", "failed", "passed", "passed"]);
    let status = check(&shown, StageId::Hardware, "TCB status");
    assert_eq!((status.expected[0].as_str(), status.found.as_deref()), ("UpToDate", Some("OutOfDate")));
    assert_eq!(check(&shown, StageId::Hardware, "Advisories").found.as_deref(), Some("[\"INTEL-SA-1\"]"));

    let tpm = json!({"ak_public": "key", "pcr07": "77", "pcr11": "bb", "init_data": "dd"});
    let references = [("trusted_aks", json!(["key"])), ("tpm_pcr11", json!(["bb"])), ("tpm_pcr07", json!(["78"]))];
    let shown = stages(&record("tpm", &tpm, &references), &[]);
    assert_eq!(verdicts(&shown)[..4], ["passed", "passed", "failed", "passed"]);
    assert_eq!(check(&shown, StageId::Firmware, "PCR 7").verdict, Verdict::Failed);
    assert_eq!(check(&shown, StageId::Firmware, "PCR 11").verdict, Verdict::Passed);

    // Enclaves, and a TEE that nobody has heard of: no claim is made up.
    let shown = stages(&record("sgx", &json!({"debug": false}), &[]), &[]);
    assert_eq!(check(&shown, StageId::Firmware, "Enclave (MRENCLAVE)").found, None);
    assert_eq!(verdicts(&stages(&record("other", &json!({}), &[]), &[]))[..3], ["passed", "failed", "failed"]);
}

#[test]
fn what_a_guest_did_is_shown_as_far_as_its_log_was_replayed() {
    let runtime: Value = serde_json::from_str(REPLAYED).unwrap();
    let claims = json!({"measurement": "aa", "runtime": runtime});
    let references = [("image_policy", json!(["sha256:q"])), ("image_digest", json!(["sha256:i"]))];
    let one = record("snp", &claims, &references);
    let released = AuditEntry {
        number: 9,
        event: "released".into(),
        subject: "team/key/1".into(),
        policy: "team@1".into(),
        ..AuditEntry::default()
    };
    let shown = stages(&one, std::slice::from_ref(&released));
    // Another policy than the expected one; the image is named, though, which is what the shipped policy takes.
    assert_eq!(check(&shown, StageId::Configuration, "Image policy").verdict, Verdict::Failed);
    let image = check(&shown, StageId::Images, "docker://a/b");
    assert!(image.verdict == Verdict::Passed && image.by.contains("vouched for by k"), "{image:?}");
    let volume = check(&shown, StageId::Volumes, "data");
    assert!(volume.verdict == Verdict::Failed && volume.found.as_deref() == Some("external, anchored by none"));
    // A container of an image that was not admitted.
    let web = check(&shown, StageId::Workload, "web");
    assert_eq!(
        (web.expected[0].as_str(), web.found.as_deref(), web.verdict),
        ("sha256:i", Some("sha256:x"), Verdict::Failed)
    );
    assert_eq!(verdicts(&shown)[4..], ["passed", "failed", "passed", "failed"]);
    assert_eq!(summary("a1".into(), &one).tenants, ["other", "team"]);
    let refused = AuditEntry { event: "release refused".into(), ..released };
    assert_eq!(verdicts(&stages(&one, &[refused]))[6], "failed");
    let looked_at_in_part = chain("a1".into(), 7, &one, &[], false).chain;
    assert!(looked_at_in_part[6].why.contains("There may be more"), "{}", looked_at_in_part[6].why);

    // A log that nobody replayed tells nothing.
    let mut claims = claims;
    claims["runtime"]["replayed"] = json!(false);
    let untold = stages(&record("snp", &claims, &references), &[]);
    assert_eq!(verdicts(&untold)[4..], ["not checked"; 4]);
    assert!(untold[4..6].iter().all(|stage| stage.checks.is_empty()));
}

#[test]
fn what_is_shown_is_short_whatever_a_guest_sends() {
    let long = "x".repeat(100_000);
    let claims = json!({"measurement": long, "product": long, "runtime": {"replayed": true, "images": [{"image": long, "digest": long, "signers": [long]}]}});
    let one = record("snp", &claims, &[("snp_launch_measurement", json!([long]))]);
    let length = serde_json::to_string(&chain("a1".into(), 7, &one, &[], true)).unwrap().len();
    assert!(length < 20_000, "{length}");
}

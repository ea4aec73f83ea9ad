//! The shipped appraisal policy, by the claims that verifiers give: nothing is recognised without reference values, and debug guests, old
//! TCBs and unknown keys are not.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use serde_json::{Value, json};

const POLICY: &str = include_str!("../src/policies/attestation_cpu.rego");

/// What the policy says of an input, with these reference values.
fn appraise(input: Value, references: Value) -> Value {
    let mut engine = regorus::Engine::new();
    engine.add_policy("policy.rego".into(), POLICY.into()).unwrap();
    let query = move |parameters: Vec<regorus::Value>| {
        let id = parameters[0].as_string().unwrap().to_string();
        Ok(regorus::Value::from(references.get(&id).cloned().unwrap_or(Value::Null)))
    };
    engine.add_extension("query_reference_value".into(), 1, Box::new(query)).unwrap();
    engine.set_input(regorus::Value::from(input));
    serde_json::to_value(engine.eval_rule("data.policy.trust_claims".into()).unwrap()).unwrap()
}

fn vector(claims: &Value) -> (i64, i64, i64) {
    let get = |name: &str| claims[name].as_i64().unwrap();
    (get("executables"), get("hardware"), get("configuration"))
}

const NOTHING: (i64, i64, i64) = (33, 97, 36);

fn changed(value: &Value, path: &str, to: Value) -> Value {
    let mut value = value.clone();
    *value.pointer_mut(path).unwrap() = to;
    value
}

#[test]
fn snp_guests_are_recognised_by_reference_values_only() {
    let input = json!({"snp": {
        "measurement": "aa", "reported_tcb_bootloader": 4, "reported_tcb_microcode": 5, "reported_tcb_snp": 6,
        "reported_tcb_tee": 0, "policy_debug_allowed": false, "policy_migrate_ma": false, "vmpl": 0, "init_data": "bb",
    }});
    let references = json!({
        "snp_launch_measurement": ["aa"], "snp_bootloader": [4], "snp_microcode": [5], "snp_snp_svn": [6],
        "snp_tee_svn": [0],
    });
    assert_eq!(vector(&appraise(input.clone(), json!({}))), (33, 97, 3));
    assert_eq!(vector(&appraise(input.clone(), references.clone())), (3, 2, 3));
    for (path, value, expected) in [
        ("/snp/measurement", json!("ab"), (33, 2, 3)),
        ("/snp/reported_tcb_snp", json!(5), (3, 97, 3)),
        ("/snp/policy_debug_allowed", json!(true), (3, 2, 36)),
        ("/snp/vmpl", json!(1), (3, 2, 36)),
    ] {
        assert_eq!(vector(&appraise(changed(&input, path, value), references.clone())), expected, "{path}");
    }
    let mut named = references;
    named["snp_init_data"] = json!(["bb"]);
    assert_eq!(vector(&appraise(input.clone(), named.clone())), (3, 2, 2));
    assert_eq!(vector(&appraise(changed(&input, "/snp/init_data", json!("bc")), named)), (3, 2, 36));
    // Claims of one TEE do not help another.
    assert_eq!(vector(&appraise(json!({"other": input["snp"]}), json!({}))), NOTHING);
}

#[test]
fn tdx_guests_are_recognised_by_reference_values_only() {
    let input = json!({"tdx": {
        "quote": {
            "header": {"tee_type": "81000000", "vendor_id": "939a7233f79c4ca9940a0db3957f0607"},
            "body": {"mr_td": "aa", "rtmr_1": "b1", "rtmr_2": "b2", "xfam": "cc"},
        },
        "td_attributes": {"debug": false}, "tcb_status": "UpToDate", "collateral_expiration_status": "0",
        "init_data": "dd",
    }});
    let references = json!({"mr_td": ["aa"], "rtmr_1": ["b1"], "rtmr_2": ["b2"], "xfam": ["cc"]});
    assert_eq!(vector(&appraise(input.clone(), json!({}))), NOTHING);
    assert_eq!(vector(&appraise(input.clone(), references.clone())), (3, 2, 2));
    for (path, value, expected) in [
        ("/tdx/quote/body/mr_td", json!("ab"), (33, 97, 2)),
        ("/tdx/quote/body/rtmr_2", json!("b3"), (33, 2, 2)),
        ("/tdx/tcb_status", json!("OutOfDate"), (3, 97, 2)),
        ("/tdx/collateral_expiration_status", json!("1"), (3, 97, 2)),
        ("/tdx/td_attributes/debug", json!(true), (3, 2, 36)),
        ("/tdx/quote/body/xfam", json!("cd"), (3, 2, 36)),
    ] {
        assert_eq!(vector(&appraise(changed(&input, path, value), references.clone())), expected, "{path}");
    }
}

#[test]
fn enclaves_and_tpms_are_recognised_by_reference_values_only() {
    let enclave = json!({"sgx": {
        "header": {"vendor_id": "939a7233f79c4ca9940a0db3957f0607"}, "tcb_status": "UpToDate",
        "collateral_expiration_status": "0", "debug": false, "init_data": "dd",
        "body": {"mr_enclave": "aa", "mr_signer": "bb", "isv_prod_id": "0100", "isv_svn": "0200"},
    }});
    assert_eq!(vector(&appraise(enclave.clone(), json!({}))), (33, 2, 3));
    assert_eq!(vector(&appraise(enclave.clone(), json!({"sgx_mr_enclave": ["aa"]}))), (3, 2, 3));
    let signer = json!({"sgx_mr_signer": ["bb"], "sgx_isv_prod_id": ["0100"], "sgx_isv_svn": ["0200", "0300"]});
    assert_eq!(vector(&appraise(enclave.clone(), signer.clone())), (3, 2, 3));
    assert_eq!(vector(&appraise(changed(&enclave, "/sgx/body/isv_svn", json!("0100")), signer)), (33, 2, 3));

    let tpm = json!({"tpm": {"ak_public": "key", "pcr07": "77", "pcr11": "bb", "init_data": "dd"}});
    assert_eq!(vector(&appraise(tpm.clone(), json!({"tpm_pcr11": ["bb"]}))), NOTHING);
    // A known key, and nothing said of what it runs.
    assert_eq!(vector(&appraise(tpm.clone(), json!({"trusted_aks": ["key"]}))), (33, 2, 3));
    let references = json!({"trusted_aks": ["key"], "tpm_pcr11": ["bb"], "tpm_pcr07": ["77"]});
    assert_eq!(vector(&appraise(tpm.clone(), references.clone())), (3, 2, 3));
    assert_eq!(vector(&appraise(changed(&tpm, "/tpm/pcr07", json!("78")), references)), (33, 2, 3));
    // A PCR that is named, and that the quote does not cover.
    assert_eq!(vector(&appraise(tpm, json!({"trusted_aks": ["key"], "tpm_pcr04": ["44"]}))), (33, 2, 3));
}

#[test]
fn files_and_storage_are_asserted_from_replayed_logs_only() {
    let volume = |protection: &str| json!({"id": "v", "protection": protection, "anchor": "tpm", "root": ""});
    let input = |replayed: bool, unknown: u32, volumes: Value| {
        json!({"tdx": {"runtime": {
            "replayed": replayed, "unknown": unknown, "policies": ["sha256:p"],
            "images": [{"digest": "sha256:i", "image": "docker://x", "signers": []}], "volumes": volumes,
        }}})
    };
    let claims = |input: Value, references: Value| {
        let claims = appraise(input, references);
        (claims["file-system"].as_i64().unwrap(), claims["storage-opaque"].as_i64().unwrap())
    };
    let policy = json!({"image_policy": ["sha256:p"]});
    assert_eq!(claims(json!({}), policy.clone()), (0, 0));
    assert_eq!(claims(input(false, 0, json!([volume("disk")])), policy.clone()), (0, 0));
    assert_eq!(claims(input(true, 0, json!([])), policy.clone()), (2, 0));
    assert_eq!(claims(input(true, 0, json!([volume("disk"), volume("luks2")])), policy.clone()), (2, 2));
    assert_eq!(claims(input(true, 0, json!([volume("disk"), volume("external")])), policy.clone()), (2, 32));
    assert_eq!(claims(input(true, 0, json!([])), json!({})), (0, 0));
    assert_eq!(claims(input(true, 0, json!([])), json!({"image_policy": ["sha256:q"]})), (32, 0));
    assert_eq!(claims(input(true, 0, json!([])), json!({"image_digest": ["sha256:i"]})), (2, 0));
    // Events that nobody understands make nothing good.
    assert_eq!(claims(input(true, 1, json!([volume("disk")])), policy), (32, 32));
}

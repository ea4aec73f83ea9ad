//! Quotes of a real TPM (swtpm): made by the guest's attester, judged by the broker's verifier, and attacked between the two.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::{
    attesters::tpm::{Ak, TpmAttester, TpmOptions, address},
    eventlog::story::{Happening, Image},
    evidence::{Attester as _, AttesterError, EvidenceError, Expected, Verifier as _},
    initdata::InitData,
};
use nacre_core::{Algorithm, Digest};
use nacre_testkit::{Swtpm, run};
use nacre_verify::{TpmRules, tpm::TpmVerifier};
use serde_json::{Value, json};

fn options(tpm: &Swtpm) -> TpmOptions {
    TpmOptions {
        address: address(&tpm.address()),
        ak: Ak::Primary,
        firmware_log: tpm.state().join("no-firmware-log"),
        log_dir: tpm.state().to_owned(),
    }
}

fn init_data(text: &str) -> InitData {
    InitData::new(Algorithm::Sha384, [("a".into(), text.into())].into()).unwrap()
}

fn expected<'a>(init_data: Option<&'a InitData>) -> Expected<'a> {
    Expected { report_data: &[7; 64], init_data, now: 0 }
}

#[test]
fn a_tpms_quote_binds_session_init_data_and_events() {
    let Some(tpm) = Swtpm::start() else { return };
    let init = init_data("b");
    let attester = TpmAttester::new(&options(&tpm), Some(init.clone())).unwrap();
    let image = Image { digest: "sha256:aa".into(), image: "docker://x".into(), signers: vec!["key".into()] };
    let log = attester.runtime_log().unwrap();
    log.record(&Happening::Policy { digest: Digest::sha256(b"policy") }).unwrap();
    log.record(&Happening::ImageAdmitted(image)).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    let strict = TpmVerifier::new(TpmRules { require_log: true, ..TpmRules::default() });
    let claims = strict.verify(&evidence, &expected(Some(&init))).unwrap().into_inner();
    assert_eq!(claims.claims["runtime"]["images"][0]["image"], "docker://x");
    assert_eq!(claims.claims["ak_public"], attester.ak_public().unwrap());
    assert_eq!(claims.logs["uefi_event_logs"].as_array().unwrap().len(), 4);

    let error = |evidence: &Value, expected: &Expected<'_>| strict.verify(evidence, expected).unwrap_err();
    let other = init_data("c");
    assert!(matches!(error(&evidence, &expected(Some(&other))), EvidenceError::InitData { .. }));
    let session = Expected { report_data: &[8; 64], ..expected(None) };
    assert!(matches!(error(&evidence, &session), EvidenceError::ReportData { .. }));
    // Events that are left out, or are all of them.
    let log = BASE64_STANDARD.decode(evidence["event_log"].as_str().unwrap()).unwrap();
    for shorter in [&log[..65 - 32], &log[..log.len() - 1], &[]] {
        let mut changed = evidence.clone();
        changed["event_log"] = BASE64_STANDARD.encode(shorter).into();
        assert!(matches!(error(&changed, &expected(None)), EvidenceError::EventLog { .. }), "{}", shorter.len());
    }
    let mut without = evidence.clone();
    without["event_log"] = Value::Null;
    assert!(matches!(error(&without, &expected(None)), EvidenceError::Refused { .. }));
    // PCRs of another machine; another key.
    let mut pcrs = evidence.clone();
    pcrs["tpm_quote"]["pcrs"][14] = "00".repeat(32).into();
    assert!(matches!(error(&pcrs, &expected(None)), EvidenceError::Refused { .. }));
    if let Some(second) = Swtpm::start() {
        let theirs = TpmAttester::new(&options(&second), None).unwrap();
        let mut forged = evidence;
        forged["ak_public"] = theirs.ak_public().unwrap().into();
        assert!(matches!(error(&forged, &expected(None)), EvidenceError::Certificate { .. }));
    }
}

#[test]
fn init_data_are_bound_once_and_the_log_is_taken_up_again() {
    let Some(mut tpm) = Swtpm::start() else { return };
    let happening = Happening::KeyReleased { resource: "a/b/c".into() };
    let attester = TpmAttester::new(&options(&tpm), Some(init_data("b"))).unwrap();
    attester.runtime_log().unwrap().record(&happening).unwrap();
    drop(attester);
    // Another process of the same boot.
    let attester = TpmAttester::new(&options(&tpm), Some(init_data("b"))).unwrap();
    // What is told already is not told again.
    attester.runtime_log().unwrap().record(&happening).unwrap();
    attester.runtime_log().unwrap().record(&Happening::KeyReleased { resource: "a/b/d".into() }).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    let claims = TpmVerifier::default().verify(&evidence, &expected(Some(&init_data("b")))).unwrap().into_inner();
    assert_eq!(claims.claims["runtime"]["keys"], json!(["a/b/c", "a/b/d"]));
    drop(attester);
    assert!(matches!(TpmAttester::new(&options(&tpm), Some(init_data("c"))), Err(AttesterError::InitData { .. })));
    // The PCRs end with the boot: the log of before is not theirs.
    tpm.power_cycle(|_| {});
    assert!(matches!(TpmAttester::new(&options(&tpm), None), Err(AttesterError::Log(_))));
}

#[test]
fn tpm2_tools_verify_our_quote_and_we_theirs() {
    let Some(tpm) = Swtpm::start() else { return };
    let path = |name: &str| tpm.state().join(name).display().to_string();
    let Some(mut create) = tpm.tool("tpm2_createek") else { return };
    run(create.args(["-c", &path("ek"), "-G", "rsa"]));
    let tool = |program: &str, arguments: &[&str]| run(tpm.tool(program).unwrap().args(arguments));
    let handle = "0x81010002";
    tool(
        "tpm2_createak",
        &["-C", &path("ek"), "-c", &path("ak"), "-G", "rsa", "-g", "sha256", "-s", "rsassa", "-u", &path("pub")],
    );
    tool("tpm2_flushcontext", &["-t"]);
    tool("tpm2_evictcontrol", &["-C", "o", "-c", &path("ak"), handle]);
    let persistent = TpmOptions { ak: Ak::Persistent(0x8101_0002), ..options(&tpm) };
    let attester = TpmAttester::new(&persistent, None).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    TpmVerifier::default().verify(&evidence, &expected(None)).unwrap();
    // Ours, checked by theirs.
    for (name, file) in [("message", "message"), ("signature", "signature")] {
        let bytes = BASE64_STANDARD.decode(evidence["tpm_quote"][name].as_str().unwrap()).unwrap();
        std::fs::write(path(file), bytes).unwrap();
    }
    tool("tpm2_readpublic", &["-c", handle, "-f", "pem", "-o", &path("pem")]);
    let qualification = "07".repeat(32);
    tool(
        "tpm2_checkquote",
        &["-u", &path("pem"), "-m", &path("message"), "-s", &path("signature"), "-g", "sha256", "-q", &qualification],
    );
    // Theirs, checked by ours.
    tool(
        "tpm2_quote",
        &["-c", handle, "-l", "sha256:0,1,2,3,4,5,6,7", "-q", &qualification, "-m", &path("m2"), "-s", &path("s2")],
    );
    let read = |name: &str| BASE64_STANDARD.encode(std::fs::read(path(name)).unwrap());
    let mut theirs = evidence;
    theirs["tpm_quote"]["message"] = read("m2").into();
    theirs["tpm_quote"]["signature"] = read("s2").into();
    theirs["event_log"] = Value::Null;
    TpmVerifier::default().verify(&theirs, &expected(None)).unwrap();
    let rules = TpmRules { pcrs: vec![0, 14], ..TpmRules::default() };
    let error = TpmVerifier::new(rules).verify(&theirs, &expected(None)).unwrap_err();
    assert!(error.to_string().contains("does not cover PCR 14"), "{error}");
}

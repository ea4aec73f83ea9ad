//! Quotes and logs that other implementations made, where the folder with them is there: each gets the verdict that its README states.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]
#![expect(clippy::print_stderr, reason = "a test that skips itself says so")]

use std::{fs, path::PathBuf, sync::Arc};

use nacre_attest::{eventlog::tcg, evidence::EvidenceError, snp_report::SnpReport};
use nacre_verify::{
    Cache, DcapRules, Genuine, SnpRules, TpmRules,
    dcap::{DcapVerifier, IntelRoot},
    entries, import,
    snp::{AmdRoots, SnpVerifier},
    tpm::TpmVerifier,
};
use serde_json::{Value, json};

/// 2026-11-28.
const NOW: i64 = 1_795_824_000;
/// 2025-06-25: within the collateral that came with the quotes.
const JUNE_2025: i64 = 1_750_809_600;
/// 2025-11-01.
const NOVEMBER_2025: i64 = 1_761_955_200;

fn fixture(name: &str) -> Option<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures");
    let folders = [folder, PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../../shared/fixtures")];
    let Some(folder) = folders.into_iter().find(|folder| folder.is_dir()) else {
        eprintln!("SKIPPED: there is no folder shared/fixtures beside the project");
        return None;
    };
    Some(fs::read(folder.join(name)).unwrap())
}

fn snp(rules: SnpRules) -> SnpVerifier {
    SnpVerifier::new(Arc::new(AmdRoots::amd().unwrap()), Arc::new(Cache::memory()), rules)
}

fn tdx(cache: &Arc<Cache>, rules: DcapRules) -> DcapVerifier {
    DcapVerifier::tdx(Arc::new(IntelRoot::intel().unwrap()), Arc::clone(cache), rules)
}

fn sgx(cache: &Arc<Cache>, rules: DcapRules) -> DcapVerifier {
    DcapVerifier::sgx(Arc::new(IntelRoot::intel().unwrap()), Arc::clone(cache), rules)
}

fn refused(result: Result<Genuine, EvidenceError>, why: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn a_milan_report_with_its_vcek_is_genuine() {
    let (Some(report), Some(vcek)) = (fixture("quotes/snp/test-report.bin"), fixture("quotes/snp/test-vcek.der"))
    else {
        return;
    };
    let report = SnpReport::from_bytes(&report).unwrap();
    let strict = snp(SnpRules::default());
    let certs = [vcek.clone()];
    let genuine = strict.report(&report, &certs, NOW).unwrap();
    assert_eq!(genuine.claims()["product"], "Milan");
    assert_eq!(genuine.claims()["version"], 2);
    assert_eq!(genuine.claims()["policy_debug_allowed"], false);
    // As JSON, as guests send it; and with the certificate from the cache.
    let evidence = |chain: Value| json!({"attestation_report": report.to_json(), "cert_chain": chain});
    strict.genuine(&evidence(json!([{"cert_type": "VCEK", "data": vcek}])), NOW).unwrap();
    refused(strict.genuine(&evidence(Value::Null), NOW), "no VCEK");
    let cache = Arc::new(Cache::memory());
    import(&cache, &vcek).unwrap();
    let cached = SnpVerifier::new(Arc::new(AmdRoots::amd().unwrap()), Arc::clone(&cache), SnpRules::default());
    cached.genuine(&evidence(Value::Null), NOW).unwrap();
    assert!(entries(&cache).unwrap()[0].name.starts_with("snp/Milan/vcek/"));
    // Before the certificate, and after it.
    refused(strict.report(&report, &certs, 1_600_000_000), "not valid before");
    refused(strict.report(&report, &certs, 1_900_000_000), "expired 2030");
    // Any bit of what is signed, and of the signature.
    for at in [0x08, 0x30, 0x50, 0x90, 0xc0, 0x1a0, 0x29f, 0x2a0, 0x2e8, 0x2d5] {
        let mut bytes = *report.as_bytes();
        bytes[at] ^= 1;
        assert!(strict.report(&SnpReport::from_bytes(&bytes).unwrap(), &certs, NOW).is_err(), "{at:#x}");
    }
}

#[test]
fn certificates_of_other_chips_and_forgeries_vouch_for_nothing() {
    let Some(report) = fixture("quotes/snp/test-report.bin") else { return };
    let report = SnpReport::from_bytes(&report).unwrap();
    for name in ["test-vcek-invalid-legacy.der", "test-vcek-invalid-new.der"] {
        let cert = fixture(&format!("quotes/snp/{name}")).unwrap();
        let error = snp(SnpRules::default()).report(&report, &[cert], NOW).unwrap_err();
        assert!(matches!(error, EvidenceError::Certificate { .. }), "{name}: {error}");
    }
}

#[test]
fn a_vlek_report_of_vmpl_1_is_refused_and_its_certificate_expired() {
    let (Some(report), Some(vlek)) = (fixture("quotes/snp/test-vlek-report.bin"), fixture("quotes/snp/test-vlek.der"))
    else {
        return;
    };
    let report = SnpReport::from_bytes(&report).unwrap();
    refused(snp(SnpRules::default()).report(&report, std::slice::from_ref(&vlek), NOW), "expired 2025-12");
    refused(snp(SnpRules::default()).report(&report, std::slice::from_ref(&vlek), JUNE_2025), "VMPL 1");
    let genuine = snp(SnpRules { most_vmpl: 1, ..SnpRules::default() }).report(&report, &[vlek], JUNE_2025).unwrap();
    assert_eq!((&genuine.claims()["signing_key"], &genuine.claims()["version"]), (&json!("VLEK"), &json!(3)));
}

#[test]
fn a_genoa_request_is_genuine() {
    let Some(evidence) = fixture("quotes/snp/genoa-evidence.json") else { return };
    let evidence: Value = serde_json::from_slice(&evidence).unwrap();
    let genuine = snp(SnpRules::default()).genuine(&evidence, NOW).unwrap();
    assert_eq!(genuine.claims()["product"], "Genoa");
    let mut swapped = evidence;
    swapped["attestation_report"]["report_data"][0] = 0.into();
    refused(snp(SnpRules::default()).genuine(&swapped, NOW), "signature");
}

#[test]
fn a_tdx_quote_is_genuine_in_the_time_of_its_collateral() {
    let (Some(quote), Some(collateral)) =
        (fixture("quotes/tdx/tdx_quote"), fixture("quotes/tdx/tdx_quote_collateral.json"))
    else {
        return;
    };
    let cache = Arc::new(Cache::memory());
    assert_eq!(import(&cache, &collateral).unwrap().len(), 4);
    let strict = tdx(&cache, DcapRules::default());
    let genuine = strict.quote(&quote, None, JUNE_2025).unwrap();
    let claims = genuine.claims();
    assert_eq!((&claims["tcb_status"], &claims["collateral_expiration_status"]), (&json!("UpToDate"), &json!("0")));
    assert_eq!(claims["quote"]["header"]["tee_type"], "81000000");
    assert_eq!(claims["quote"]["header"]["vendor_id"], "939a7233f79c4ca9940a0db3957f0607");
    assert_eq!(claims["td_attributes"]["debug"], false);
    assert_eq!(claims["fmspc"], "b0c06f000000");
    refused(strict.quote(&quote, None, NOW), "expired");
    refused(strict.quote(&quote, None, JUNE_2025 - 30 * 86_400), "not valid before");
    refused(sgx(&cache, DcapRules::default()).quote(&quote, None, JUNE_2025), "another TEE");
    let rules = DcapRules { least_evaluation: 18, ..DcapRules::default() };
    refused(tdx(&cache, rules).quote(&quote, None, JUNE_2025), "evaluation 17");
    // Every byte that is signed, and the signatures; what is left out is what follows in PEM.
    for at in (0..48 + 584 + 4 + 128 + 6 + 384 + 64).step_by(7) {
        let mut changed = quote.clone();
        changed[at] ^= 1;
        // The QE's and PCE's versions in the header are signed, too.
        assert!(strict.quote(&changed, None, JUNE_2025).is_err(), "{at}");
    }
}

#[test]
fn an_sgx_quote_is_judged_by_its_tcb_status() {
    let (Some(quote), Some(collateral)) =
        (fixture("quotes/sgx/sgx_quote"), fixture("quotes/sgx/sgx_quote_collateral.json"))
    else {
        return;
    };
    let cache = Arc::new(Cache::memory());
    import(&cache, &collateral).unwrap();
    refused(sgx(&cache, DcapRules::default()).quote(&quote, None, JUNE_2025), "ConfigurationAndSWHardeningNeeded");
    let rules = || DcapRules {
        statuses: vec!["UpToDate".into(), "ConfigurationAndSWHardeningNeeded".into()],
        ..DcapRules::default()
    };
    let genuine = sgx(&cache, rules()).quote(&quote, None, JUNE_2025).unwrap();
    assert_eq!(genuine.claims()["debug"], false);
    assert_eq!(genuine.claims()["advisory_ids"], json!(["INTEL-SA-00289", "INTEL-SA-00615"]));
    refused(sgx(&cache, rules()).quote(&quote, None, NOW), "expired");
    let advised = DcapRules { refused_advisories: vec!["INTEL-SA-00615".into()], ..rules() };
    refused(sgx(&cache, advised).quote(&quote, None, JUNE_2025), "INTEL-SA-00615");
}

#[test]
fn debug_guests_and_enclaves_are_refused_unless_the_rules_say_otherwise() {
    let (Some(guest), Some(enclave)) = (fixture("quotes/tdx/tdx_quote_4.dat"), fixture("quotes/sgx/occlum_quote.dat"))
    else {
        return;
    };
    let cache = Arc::new(Cache::memory());
    import(&cache, &fixture("quotes/tdx/tdx_quote_collateral.json").unwrap()).unwrap();
    refused(tdx(&cache, DcapRules::default()).quote(&guest, None, JUNE_2025), "debug guest");
    refused(sgx(&cache, DcapRules::default()).quote(&enclave, None, JUNE_2025), "debug enclave");
    // Where debugging is fine, it is the platform's collateral that is missing.
    let rules = DcapRules { debug: true, ..DcapRules::default() };
    refused(tdx(&cache, rules.clone()).quote(&guest, None, JUNE_2025), "no TCB info of FMSPC 50806f000000");
    refused(sgx(&cache, rules).quote(&enclave, None, JUNE_2025), "in the cache");
}

#[test]
fn a_quote_without_fresh_revocation_lists_is_refused() {
    let Some(quote) = fixture("quotes/tdx/tdx_quote_6.dat") else { return };
    let cache = Arc::new(Cache::memory());
    refused(tdx(&cache, DcapRules::default()).quote(&quote, None, NOVEMBER_2025), "no revocation list");
    import(&cache, &fixture("quotes/tdx/tdx_quote_collateral.json").unwrap()).unwrap();
    import(&cache, &fixture("quotes/tdx/tcbInfo.json").unwrap()).unwrap();
    import(&cache, &fixture("quotes/tdx/enclaveIdentity.json").unwrap()).unwrap();
    refused(tdx(&cache, DcapRules::default()).quote(&quote, None, NOVEMBER_2025), "expired 2025-07");
    // With old lists by name, it is the platform that is out of date.
    let stale = |statuses: &[&str]| DcapRules {
        stale_collateral_days: 150,
        statuses: statuses.iter().map(|status| (*status).to_owned()).collect(),
        ..DcapRules::default()
    };
    refused(tdx(&cache, stale(&["UpToDate"])).quote(&quote, None, NOVEMBER_2025), "status is OutOfDate");
    let genuine = tdx(&cache, stale(&["UpToDate", "OutOfDate"])).quote(&quote, None, NOVEMBER_2025).unwrap();
    let claims = genuine.claims();
    assert_eq!((&claims["fmspc"], &claims["collateral_expiration_status"]), (&json!("00a06d080000"), &json!("1")));
    assert_ne!(claims["init_data"], "00".repeat(48));
    // What is there is not replaced by what is older.
    let older = import(&cache, &fixture("quotes/tdx/tdx_quote_collateral.json").unwrap()).unwrap_err();
    assert!(older.to_string().contains("in the cache already"), "{older}");
}

#[test]
fn a_tpm_quote_is_genuine_with_its_own_pcrs_only() {
    let Some(evidence) = fixture("quotes/tpm/tpm_evidence.json") else { return };
    let evidence: Value = serde_json::from_slice(&evidence).unwrap();
    let strict = TpmVerifier::new(TpmRules::default());
    let genuine = strict.genuine(&evidence).unwrap();
    assert_eq!(genuine.claims()["pcr17"], "ff".repeat(32));
    assert_eq!(genuine.report_data().len(), 64);
    let mut other = evidence.clone();
    other["tpm_quote"]["pcrs"][0] = "11".repeat(32).into();
    refused(strict.genuine(&other), "not those that the TPM quoted");
    refused(TpmVerifier::new(TpmRules { require_log: true, ..TpmRules::default() }).genuine(&evidence), "no event log");
    let message = evidence["tpm_quote"]["message"].as_str().unwrap();
    let mut changed = evidence.clone();
    changed["tpm_quote"]["message"] = message.replacen('B', "C", 1).into();
    refused(strict.genuine(&changed), "signature");
}

#[test]
fn logs_are_read_as_others_read_them() {
    for name in ["CCEL_AAEL", "CCEL_ovmf"] {
        let Some(bytes) = fixture(&format!("eventlog/{name}")) else { return };
        let expected: Value =
            serde_json::from_slice(&fixture(&format!("eventlog/{name}.expected.json")).unwrap()).unwrap();
        let log = tcg::parse(&bytes).unwrap();
        let expected = expected["uefi_event_logs"].as_array().unwrap();
        assert_eq!(log.events.len(), expected.len(), "{name}");
        for (event, expected) in log.events.iter().zip(expected) {
            let ours = event.to_json();
            for member in ["index", "type_name", "digests", "event", "digest_matches_event"] {
                assert_eq!(ours[member], expected[member], "{name}");
            }
            for member in ["string", "unicode_name", "data"] {
                assert_eq!(ours["details"][member], expected["details"][member], "{name}: {expected}");
            }
            let file = |event: &Value| {
                let paths = event["details"]["device_paths"].as_array().cloned().unwrap_or_default();
                paths.into_iter().filter(|path| path.as_str().unwrap().starts_with("File(")).collect::<Vec<_>>()
            };
            assert_eq!(file(&ours), file(expected), "{name}");
        }
    }
}

/// How long a verdict takes, of the hardware's own hierarchies: `cargo test --release -p nacre-verify --test fixtures -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, for a release build on an idle machine"]
fn a_verdict_takes_two_milliseconds_at_most() {
    let (Some(report), Some(vcek)) = (fixture("quotes/snp/test-report.bin"), fixture("quotes/snp/test-vcek.der"))
    else {
        return;
    };
    let per_run = |name: &str, run: &dyn Fn()| {
        let (start, rounds) = (std::time::Instant::now(), 200);
        (0..rounds).for_each(|_| run());
        let millis = start.elapsed().as_secs_f64() * 1000.0 / f64::from(rounds);
        eprintln!("{name}: {millis:.3} ms");
        assert!(millis < 2.0, "{name}: {millis} ms");
    };
    let report = SnpReport::from_bytes(&report).unwrap();
    let (verifier, certs) = (snp(SnpRules::default()), [vcek]);
    per_run("SNP report", &|| drop(verifier.report(&report, &certs, NOW).unwrap()));
    let cache = Arc::new(Cache::memory());
    import(&cache, &fixture("quotes/tdx/tdx_quote_collateral.json").unwrap()).unwrap();
    let (verifier, quote) = (tdx(&cache, DcapRules::default()), fixture("quotes/tdx/tdx_quote").unwrap());
    per_run("TDX quote", &|| drop(verifier.quote(&quote, None, JUNE_2025).unwrap()));
}

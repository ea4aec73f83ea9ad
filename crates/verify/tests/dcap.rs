//! Verdicts on TDX and SGX quotes of a hierarchy that the test makes: each fault, and that it is the only one.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod hierarchy;

use std::sync::Arc;

use hierarchy::{
    DAY, END, NOW, START,
    intel::{Intel, PCK, PCK_CA, SIGNER, enclave, guest, qe_report},
};
use nacre_attest::{
    eventlog::{
        Bank,
        aael::{self, RuntimeEvent},
        replay::{Registers, replay},
        story::Happening,
        tcg,
    },
    evidence::{EvidenceError, Expected, Verifier as _},
    initdata::InitData,
};
use nacre_core::Algorithm;
use nacre_verify::{Cache, DcapRules, Genuine, dcap::DcapVerifier, import};
use serde_json::{Value, json};

fn tdx(intel: &Intel, cache: Cache, rules: DcapRules) -> DcapVerifier {
    DcapVerifier::tdx(Arc::new(intel.trusted()), Arc::new(cache), rules)
}

fn sgx(intel: &Intel, cache: Cache, rules: DcapRules) -> DcapVerifier {
    DcapVerifier::sgx(Arc::new(intel.trusted()), Arc::new(cache), rules)
}

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T, EvidenceError>, why: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

/// A guest of TDX 1.5: the same versions again, and no service TD.
fn guest_15() -> Vec<u8> {
    let mut body = guest();
    body.extend_from_within(..16);
    body.extend_from_slice(&[0; 48]);
    body
}

fn changed(mut body: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    body[at] = byte;
    body
}

#[test]
fn quotes_of_all_versions_are_genuine() {
    let intel = Intel::new();
    let strict = tdx(&intel, intel.cache(true), DcapRules::default());
    for quote in [intel.quote(4, &guest()), intel.quote(5, &guest()), intel.quote(5, &guest_15())] {
        let genuine = strict.quote(&quote, None, NOW).unwrap();
        assert_eq!(genuine.claims()["tcb_status"], "UpToDate");
        assert_eq!(genuine.claims()["quote"]["body"]["mr_td"], "09".repeat(48));
        assert_eq!(genuine.claims()["is_smt_enabled"], false);
        assert_eq!(genuine.claims()["platform_instance_id"], "06".repeat(16));
        // A buffer of a fixed size.
        strict.quote(&[&quote[..], &[0; 100]].concat(), None, NOW).unwrap();
    }
    let strict = sgx(&intel, intel.cache(false), DcapRules::default());
    let genuine = strict.quote(&intel.quote(3, &enclave()), None, NOW).unwrap();
    assert_eq!(genuine.claims()["body"]["mr_enclave"], "09".repeat(32));
}

#[test]
fn guests_and_enclaves_that_the_rules_do_not_admit_are_refused() {
    let intel = Intel::new();
    let verdict = |body: Vec<u8>, rules: DcapRules| {
        tdx(&intel, intel.cache(true), rules).quote(&intel.quote(5, &body), None, NOW)
    };
    let debug = || DcapRules { debug: true, ..DcapRules::default() };
    says(verdict(changed(guest(), 120, 1), DcapRules::default()), "debug guest");
    says(verdict(changed(guest(), 120, 0x10), DcapRules::default()), "debug guest");
    verdict(changed(guest(), 120, 1), debug()).unwrap();
    says(verdict(changed(guest(), 121, 1), debug()), "bits that are not known");
    says(verdict(changed(guest(), 123, 0), DcapRules::default()), "SEPT_VE_DISABLE");
    says(verdict(changed(guest(), 123, 0x30), DcapRules::default()), "migration TD");
    verdict(changed(guest(), 123, 0x30), DcapRules { migratable: true, ..DcapRules::default() }).unwrap();
    says(verdict(changed(guest_15(), 610, 1), DcapRules::default()), "service TD");
    verdict(changed(guest_15(), 610, 1), DcapRules { service_td: true, ..DcapRules::default() }).unwrap();
    // The module: its signer, its attributes, its version.
    says(verdict(changed(guest(), 64, 1), DcapRules::default()), "not signed by whom");
    says(verdict(changed(guest(), 112, 1), DcapRules::default()), "other attributes");
    says(verdict(changed(guest(), 1, 4), DcapRules::default()), "no identity of the TDX module");

    let verdict = |body: Vec<u8>, rules: DcapRules| {
        sgx(&intel, intel.cache(false), rules).quote(&intel.quote(3, &body), None, NOW)
    };
    says(verdict(changed(enclave(), 48, 7), DcapRules::default()), "debug enclave");
    verdict(changed(enclave(), 48, 7), debug()).unwrap();
    says(verdict(changed(enclave(), 48, 4), DcapRules::default()), "not initialised");
}

#[test]
fn the_tcb_status_is_that_of_the_worst_part() {
    let intel = Intel::new();
    let with = |tcb_info: &Value, identity: &Value, body: &[u8], rules: DcapRules| -> Result<Genuine, EvidenceError> {
        let cache = Cache::memory();
        import(&cache, intel.collateral(tcb_info, identity).to_string().as_bytes()).unwrap();
        tdx(&intel, cache, rules).quote(&intel.quote(5, body), None, NOW)
    };
    let (info, identity) = (intel.tcb_info(true), intel.identity(true));
    let strict = DcapRules::default;
    // The platform's components, the guest's components, the module's version, the current versions.
    let mut newer = info.clone();
    newer["tcbLevels"][1]["tcb"]["sgxtcbcomponents"][3]["svn"] = 6.into();
    says(with(&newer, &identity, &guest(), strict()), "OutOfDate");
    let mut pce = info.clone();
    pce["tcbLevels"][1]["tcb"]["pcesvn"] = 11.into();
    says(with(&pce, &identity, &guest(), strict()), "OutOfDate");
    says(with(&info, &identity, &changed(guest(), 9, 4), strict()), "OutOfDate");
    says(with(&info, &identity, &changed(guest(), 0, 6), strict()), "OutOfDate");
    says(with(&info, &identity, &changed(guest_15(), 584, 6), strict()), "OutOfDate");
    says(with(&info, &identity, &changed(guest(), 9, 0), strict()), "below every level");
    says(with(&info, &identity, &changed(guest(), 0, 1), strict()), "below every level");
    let admitted = DcapRules { statuses: vec!["OutOfDate".into()], ..strict() };
    let genuine = with(&info, &identity, &changed(guest(), 0, 6), admitted).unwrap();
    assert_eq!(
        (&genuine.claims()["tcb_status"], &genuine.claims()["tcb_date"]),
        (&json!("OutOfDate"), &json!("2025-01-01T00:00:00Z"))
    );
    // Nothing makes a revoked platform good.
    let mut revoked = info.clone();
    revoked["tcbLevels"][1]["tcbStatus"] = "Revoked".into();
    let all = DcapRules { statuses: vec!["Revoked".into(), "UpToDate".into()], ..strict() };
    says(with(&revoked, &identity, &guest(), all), "Revoked");
    // Advisories, evaluation numbers, other platforms.
    let mut advised = info.clone();
    advised["tcbLevels"][1]["advisoryIDs"] = json!(["INTEL-SA-1"]);
    with(&advised, &identity, &guest(), strict()).unwrap();
    let rules = DcapRules { refused_advisories: vec!["INTEL-SA-1".into()], ..strict() };
    says(with(&advised, &identity, &guest(), rules), "INTEL-SA-1");
    says(with(&info, &identity, &guest(), DcapRules { least_evaluation: 21, ..strict() }), "evaluation 20");
    let mut other = info.clone();
    other["pceId"] = "0001".into();
    says(with(&other, &identity, &guest(), strict()), "FMSPC");
    let mut foreign = identity.clone();
    foreign["mrsigner"] = "d2".repeat(32).into();
    says(with(&info, &foreign, &guest(), strict()), "quoting enclave");
}

#[test]
fn a_quoting_enclave_that_is_not_intels_or_is_old_is_refused() {
    let intel = Intel::new();
    let strict = tdx(&intel, intel.cache(true), DcapRules::default());
    let verdict = |change: &dyn Fn(&mut [u8; 384])| {
        let mut report = qe_report();
        change(&mut report);
        strict.quote(&intel.quote_with(4, &guest(), &report), None, NOW)
    };
    verdict(&|_| {}).unwrap();
    says(verdict(&|report| report[16] = 1), "miscselect");
    says(verdict(&|report| report[48] = 0x13), "attributes");
    says(verdict(&|report| report[128] = 0), "not signed by whom");
    says(verdict(&|report| report[256] = 3), "another product");
    says(verdict(&|report| report[258] = 3), "OutOfDate");
    says(verdict(&|report| report[258] = 0), "below every level");
    // A report that says more than the attestation key.
    says(verdict(&|report| report[360] = 1), "not about it");
}

#[test]
fn revoked_and_expired_certificates_of_intel_vouch_for_nothing() {
    let intel = Intel::new();
    let quote = intel.quote(4, &guest());
    let with = |root_crl: Vec<u8>, pck_crl: Vec<u8>| {
        let cache = Cache::memory();
        let mut collateral = intel.collateral(&intel.tcb_info(true), &intel.identity(true));
        collateral["root_ca_crl"] = hierarchy::intel::hex(&root_crl).into();
        collateral["pck_crl"] = hierarchy::intel::hex(&pck_crl).into();
        import(&cache, collateral.to_string().as_bytes()).unwrap();
        tdx(&intel, cache, DcapRules::default()).quote(&quote, None, NOW)
    };
    let good = || (intel.root.crl(&[99], START, END), intel.ca.crl(&[99], START, END));
    with(good().0, good().1).unwrap();
    says(with(intel.root.crl(&[PCK_CA], START, END), good().1), "revoked");
    says(with(intel.root.crl(&[SIGNER], START, END), good().1), "revoked");
    says(with(intel.root.crl(&[1], START, END), good().1), "revoked");
    says(with(good().0, intel.ca.crl(&[PCK], START, END)), "revoked");
    says(with(intel.root.crl(&[], START, NOW - DAY), good().1), "expired");
    says(with(good().0, intel.ca.crl(&[], START, NOW - DAY)), "expired");
    says(with(good().0, intel.ca.crl(&[], NOW + DAY, END)), "not valid before");
    let other = Intel::new();
    says(with(other.root.crl(&[], START, END), good().1), "signature is not the issuer's");
    says(with(good().0, other.ca.crl(&[], START, END)), "signature is not the issuer's");
    // By another root of the same name.
    let foreign = DcapVerifier::tdx(Arc::new(other.trusted()), Arc::new(other.cache(true)), DcapRules::default());
    says(foreign.quote(&quote, None, NOW), "its signature is not");
}

#[test]
fn collateral_counts_in_its_time_only() {
    let intel = Intel::new();
    let quote = intel.quote(4, &guest());
    let with = |change: &dyn Fn(&mut Value, &mut Value), now: i64, rules: DcapRules| {
        let (mut info, mut identity) = (intel.tcb_info(true), intel.identity(true));
        change(&mut info, &mut identity);
        let cache = Cache::memory();
        import(&cache, intel.collateral(&info, &identity).to_string().as_bytes()).unwrap();
        tdx(&intel, cache, rules).quote(&quote, None, now)
    };
    let strict = DcapRules::default;
    // A clock that is before everything, and one that is after everything.
    says(with(&|_, _| {}, START - DAY, strict()), "not valid before");
    says(with(&|_, _| {}, END + DAY, strict()), "expired");
    let until = |which: usize, seconds: i64| {
        move |info: &mut Value, identity: &mut Value| {
            let document = if which == 0 { info } else { identity };
            document["nextUpdate"] = hierarchy::rfc3339(seconds).into();
        }
    };
    says(with(&until(0, NOW - DAY), NOW, strict()), "TCB info: it expired");
    says(with(&until(1, NOW - DAY), NOW, strict()), "QE identity: it expired");
    let from = |info: &mut Value, _: &mut Value| info["issueDate"] = hierarchy::rfc3339(NOW + DAY).into();
    says(with(&from, NOW, strict()), "not valid before");
    // Old collateral counts where a rule names for how long, and says so.
    let stale = DcapRules { stale_collateral_days: 2, ..strict() };
    let genuine = with(&until(0, NOW - DAY), NOW, stale.clone()).unwrap();
    assert_eq!(genuine.claims()["collateral_expiration_status"], "1");
    says(with(&until(0, NOW - 3 * DAY), NOW, stale), "expired");
    says(tdx(&intel, Cache::memory(), strict()).quote(&quote, None, NOW), "no revocation list");
}

#[test]
fn collateral_that_intel_did_not_sign_is_refused() {
    let intel = Intel::new();
    let quote = intel.quote(4, &guest());
    let with = |change: &dyn Fn(&mut Value)| {
        let mut collateral = intel.collateral(&intel.tcb_info(true), &intel.identity(true));
        change(&mut collateral);
        let cache = Cache::memory();
        import(&cache, collateral.to_string().as_bytes()).unwrap();
        tdx(&intel, cache, DcapRules::default()).quote(&quote, None, NOW)
    };
    with(&|_| {}).unwrap();
    let edit = |name: &'static str, from: &'static str, to: &'static str| {
        move |collateral: &mut Value| {
            let text = collateral[name].as_str().unwrap();
            assert!(text.contains(from));
            collateral[name] = text.replacen(from, to, 1).into();
        }
    };
    says(with(&edit("tcb_info", "\"svn\":5", "\"svn\":4")), "signature does not hold");
    says(with(&edit("qe_identity", "\"isvsvn\":4", "\"isvsvn\":1")), "signature does not hold");
    // Signed by another key that Intel's root vouches for.
    let pck = |collateral: &mut Value| collateral["tcb_info_issuer_chain"] = intel.ca.pem.clone().into();
    says(with(&pck), "not signed by Intel's key for TCB info");
    let other = Intel::new();
    let foreign = |collateral: &mut Value| {
        let theirs = other.collateral(&other.tcb_info(true), &other.identity(true));
        for name in ["tcb_info", "tcb_info_signature", "tcb_info_issuer_chain"] {
            collateral[name] = theirs[name].clone();
        }
    };
    says(with(&foreign), "its signature is not Intel SGX Root CA's");
}

#[test]
fn changed_and_cut_quotes_are_refused() {
    let intel = Intel::new();
    let strict = tdx(&intel, intel.cache(true), DcapRules::default());
    let quote = intel.quote(5, &guest_15());
    strict.quote(&quote, None, NOW).unwrap();
    for length in (0..quote.len()).step_by(41) {
        assert!(strict.quote(&quote[..length], None, NOW).is_err(), "{length}");
    }
    // All that is signed: header, body, signature, key, QE report and its signature, authentication data.
    for at in (0..48 + 6 + 648 + 4 + 128 + 6 + 384 + 64 + 34).step_by(3) {
        let mut bytes = quote.clone();
        bytes[at] ^= 0x40;
        assert!(strict.quote(&bytes, None, NOW).is_err(), "{at}");
    }
    says(strict.quote(&[&quote[..], b"x"].concat(), None, NOW), "after the signature data");
    says(strict.quote(&vec![0; 70_000], None, NOW), "at most");
    for bad in
        [json!(null), json!({}), json!({"quote": 1}), json!({"quote": "*"}), json!({"quote": "A".repeat(200_000)})]
    {
        assert!(strict.genuine(&bad, NOW).is_err(), "{bad:.60}");
    }
}

#[test]
fn quotes_are_bound_to_session_key_and_init_data() {
    let intel = Intel::new();
    let init = InitData::new(Algorithm::Sha384, [("a".into(), "b".into())].into()).unwrap();
    let other = InitData::new(Algorithm::Sha384, [("a".into(), "c".into())].into()).unwrap();
    let evidence = |quote: Vec<u8>| json!({"quote": base64::Engine::encode(&base64::prelude::BASE64_STANDARD, quote), "cc_eventlog": null});
    let mut body = guest();
    body[184..232].copy_from_slice(&init.fit::<48>());
    let mut process = enclave();
    process[192..256].copy_from_slice(&init.fit::<64>());
    for (verifier, evidence) in [
        (tdx(&intel, intel.cache(true), DcapRules::default()), evidence(intel.quote(4, &body))),
        (sgx(&intel, intel.cache(false), DcapRules::default()), evidence(intel.quote(3, &process))),
    ] {
        let expected = Expected { report_data: &[5; 64], init_data: Some(&init), now: NOW };
        assert_eq!(verifier.verify(&evidence, &expected).unwrap().into_inner().tee, verifier.tee());
        let swapped = Expected { report_data: &[6; 64], ..expected };
        assert!(matches!(verifier.verify(&evidence, &swapped), Err(EvidenceError::ReportData { .. })));
        let wrong = Expected { init_data: Some(&other), ..expected };
        assert!(matches!(verifier.verify(&evidence, &wrong), Err(EvidenceError::InitData { .. })));
    }
}

#[test]
fn an_event_log_tells_its_story_only_where_the_registers_have_it() {
    let intel = Intel::new();
    let strict = tdx(&intel, intel.cache(true), DcapRules::default());
    let happenings = [
        Happening::Policy { digest: nacre_core::Digest::sha256(b"policy") },
        Happening::KeyReleased { resource: "a/b/c".into() },
        Happening::WorkloadStarted { id: "c1".into(), digest: "sha256:aa".into() },
    ];
    let entries: Vec<Vec<u8>> = happenings
        .iter()
        .flat_map(|happening| happening.events().unwrap())
        .map(|event| event.entry(4, Bank::Sha384).unwrap())
        .collect();
    let log = |entries: &[Vec<u8>]| [aael::header(&[Bank::Sha384]), entries.concat()].concat();
    let whole = log(&entries);
    let registers = replay(&tcg::parse(&whole).unwrap(), Bank::Sha384, Registers::Tee).unwrap();
    let mut body = guest();
    body[472..520].copy_from_slice(&registers[&4]);
    let quote = intel.quote(4, &body);
    let genuine = strict.quote(&quote, Some(&whole), NOW).unwrap();
    assert_eq!(genuine.claims()["runtime"]["keys"], json!(["a/b/c"]));
    assert_eq!(genuine.claims()["runtime"]["workloads"][0]["id"], "c1");
    assert_eq!(genuine.logs()["uefi_event_logs"].as_array().unwrap().len(), 3);
    // Without the log there is no story, and no assertion.
    assert_eq!(strict.quote(&quote, None, NOW).unwrap().claims().get("runtime"), None);
    let mut reordered = entries.clone();
    reordered.swap(0, 2);
    let more = RuntimeEvent::new("d", "o", "c").unwrap().entry(4, Bank::Sha384).unwrap();
    let longer = [entries.clone(), vec![more]].concat();
    for wrong in [log(&reordered), log(&entries[1..]), log(&entries[..2]), log(&longer), log(&[])] {
        assert!(matches!(strict.quote(&quote, Some(&wrong), NOW), Err(EvidenceError::EventLog { .. })));
    }
    // A log of a guest whose registers have nothing.
    says(strict.quote(&intel.quote(4, &guest()), Some(&whole), NOW), "register 4");
    for length in [0, 10, 31, whole.len() - 1] {
        assert!(strict.quote(&quote, Some(&whole[..length]), NOW).is_err());
    }
}

//! Verdicts on SNP evidence of a hierarchy that the test makes: each fault, and that it is the only one.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod hierarchy;

use std::sync::Arc;

use hierarchy::{
    DAY, END, NOW, START, Wish,
    amd::{ASK, Amd, CHIP, Draft, VERSIONS},
};
use nacre_attest::{
    evidence::{EvidenceError, Expected, Verifier as _},
    initdata::InitData,
    snp_report::{Product, SnpReport},
};
use nacre_core::Algorithm;
use nacre_verify::{Cache, LeastTcb, SnpRules, import, snp::SnpVerifier};
use rcgen::PKCS_ECDSA_P384_SHA384 as P384;
use serde_json::{Value, json};

fn verifier(amd: &Amd, rules: SnpRules) -> (SnpVerifier, Arc<Cache>) {
    let cache = Arc::new(Cache::memory());
    (SnpVerifier::new(Arc::new(amd.roots()), Arc::clone(&cache), rules), cache)
}

fn put(draft: &mut Draft, at: usize, bytes: &[u8]) {
    draft.put(at, bytes);
}

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T, EvidenceError>, why: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn every_product_and_version_with_either_key() {
    for (product, family, model, chip) in [
        (Product::Milan, 0x19, 0x01, &CHIP[..]),
        (Product::Genoa, 0x19, 0x11, &CHIP[..]),
        (Product::Genoa, 0x19, 0xa0, &CHIP[..]),
        (Product::Turin, 0x1a, 0x02, &CHIP[..8]),
    ] {
        let amd = Amd::new(product);
        let versions = if product == Product::Turin { (Some(1), 3, 0, 8, 200) } else { VERSIONS };
        let (vcek, vlek) = (amd.vcek(versions, chip), amd.vlek(versions));
        let (strict, _) = verifier(&amd, SnpRules::default());
        for version in 2..=5_u32 {
            let mut draft = Draft::new();
            draft.put(0, &version.to_le_bytes()).put(0x188, if version == 2 { &[0; 3] } else { &[0x19, 1, 1] });
            if version > 2 {
                draft.put(0x188, &[family, model]);
            }
            if product == Product::Turin {
                draft.put(0x180, &[1, 3, 0, 8, 0, 0, 0, 200]).put(0x1a8, &[0; 56]);
            }
            let genuine = strict.report(&draft.signed(&vcek), std::slice::from_ref(&vcek.der), NOW).unwrap();
            assert_eq!(genuine.claims()["product"], product.name());
            assert_eq!(genuine.claims()["reported_tcb_microcode"], 200);
            draft.put(0x48, &[4]);
            let genuine = strict.report(&draft.signed(&vlek), std::slice::from_ref(&vlek.der), NOW).unwrap();
            assert_eq!(genuine.claims()["signing_key"], "VLEK");
        }
    }
}

#[test]
fn snp_guests_that_the_rules_do_not_admit_are_refused() {
    let amd = Amd::new(Product::Milan);
    let vcek = amd.vcek(VERSIONS, &CHIP);
    let verdict = |change: &dyn Fn(&mut Draft), rules: SnpRules| {
        let mut draft = Draft::new();
        change(&mut draft);
        verifier(&amd, rules).0.report(&draft.signed(&vcek), std::slice::from_ref(&vcek.der), NOW)
    };
    verdict(&|_| {}, SnpRules::default()).unwrap();
    let policy = |bits: u64| move |draft: &mut Draft| put(draft, 8, &(0x3_0000 | bits).to_le_bytes());
    let debug = policy(1 << 19);
    says(verdict(&debug, SnpRules::default()), "debug");
    verdict(&debug, SnpRules { debug: true, ..SnpRules::default() }).unwrap();
    let vmpl = |draft: &mut Draft| put(draft, 0x30, &[2]);
    says(verdict(&vmpl, SnpRules::default()), "VMPL 2");
    says(verdict(&vmpl, SnpRules { most_vmpl: 1, ..SnpRules::default() }), "VMPL 2");
    verdict(&vmpl, SnpRules { most_vmpl: 2, ..SnpRules::default() }).unwrap();
    says(verdict(&policy(1 << 18), SnpRules::default()), "migration");
    let smt = |draft: &mut Draft| put(draft, 0x40, &[1]);
    verdict(&smt, SnpRules::default()).unwrap();
    says(verdict(&smt, SnpRules { smt: false, ..SnpRules::default() }), "hyperthreads");
    says(verdict(&|_| {}, SnpRules { single_socket: true, ..SnpRules::default() }), "single socket");
    let least = |snp| {
        let least = LeastTcb { snp, ..LeastTcb::default() };
        SnpRules { least: [("Milan".to_owned(), least)].into(), ..SnpRules::default() }
    };
    verdict(&|_| {}, least(8)).unwrap();
    says(verdict(&|_| {}, least(9)), "is the least for Milan");
    // Signed by nobody; by an algorithm that there is not.
    says(verdict(&|draft| put(draft, 0x48, &[7 << 2]), SnpRules::default()), "not signed");
    says(verdict(&|draft| put(draft, 0x34, &[2]), SnpRules::default()), "algorithm");
}

#[test]
fn snp_keys_vouch_for_their_chip_their_tcb_and_their_product_only() {
    let amd = Amd::new(Product::Milan);
    let report = |vcek: &hierarchy::Node| Draft::new().signed(vcek);
    let (strict, _) = verifier(&amd, SnpRules::default());
    let refused = |vcek: &hierarchy::Node, why: &str| {
        says(strict.report(&report(vcek), std::slice::from_ref(&vcek.der), NOW), why)
    };
    refused(&amd.vcek(VERSIONS, &[8; 64]), "is of chip");
    refused(&amd.vcek((None, 3, 0, 9, 200), &CHIP), "is for TCB");
    refused(&amd.vcek((None, 3, 0, 8, 201), &CHIP), "is for TCB");
    refused(&Wish::new("SEV-VCEK", 0, false).below(&amd.ask, &P384), "does not say which TCB");
    // Of another authority by the same names.
    refused(&Amd::new(Product::Milan).vcek(VERSIONS, &CHIP), "its signature is not SEV-Milan's");
    refused(&Amd::new(Product::Genoa).vcek(VERSIONS, &CHIP), "not trusted here");
    // The ASVK signs no VCEK, and no key signs another.
    refused(&Amd::wish("SEV-VCEK", VERSIONS, Some(&CHIP)).below(&amd.asvk, &P384), "not trusted here");
    let vcek = amd.vcek(VERSIONS, &CHIP);
    refused(&Amd::wish("SEV-VCEK", VERSIONS, Some(&CHIP)).below(&vcek, &P384), "not trusted here");
    // A VLEK where the report names a VCEK.
    refused(&amd.vlek(VERSIONS), "no VCEK");
    // A report of a processor that is not the certificate's.
    let mut draft = Draft::new();
    draft.put(0x188, &[0x19, 0x11, 0]);
    says(strict.report(&draft.signed(&vcek), std::slice::from_ref(&vcek.der), NOW), "its certificate is for Milan");
    // Signed by another key than the certificate's.
    let other = amd.vcek(VERSIONS, &CHIP);
    says(strict.report(&report(&other), &[vcek.der], NOW), "the report's signature");
}

#[test]
fn snp_certificates_count_in_their_time_only() {
    let amd = Amd::new(Product::Milan);
    let (strict, _) = verifier(&amd, SnpRules::default());
    let vcek = amd.vcek(VERSIONS, &CHIP);
    let at = |now| strict.report(&Draft::new().signed(&vcek), std::slice::from_ref(&vcek.der), now);
    at(START).unwrap();
    at(END).unwrap();
    says(at(START - 1), "not valid before");
    says(at(END + 1), "expired");
    // The key's certificate is in its time, and the authority's is not.
    let mut long = Amd::wish("SEV-VCEK", VERSIONS, Some(&CHIP));
    long.until = END + 300 * DAY;
    let vcek = long.below(&amd.ask, &P384);
    says(strict.report(&Draft::new().signed(&vcek), std::slice::from_ref(&vcek.der), END + DAY), "expired");
}

#[test]
fn a_revoked_authority_of_amd_vouches_for_nothing() {
    let amd = Amd::new(Product::Milan);
    let vcek = amd.vcek(VERSIONS, &CHIP);
    let verdict = |crl: Option<Vec<u8>>, rules: SnpRules| {
        let (verifier, cache) = verifier(&amd, rules);
        if let Some(crl) = crl {
            import(&cache, &crl).unwrap();
        }
        verifier.report(&Draft::new().signed(&vcek), std::slice::from_ref(&vcek.der), NOW)
    };
    let required = || SnpRules { require_crl: true, ..SnpRules::default() };
    verdict(None, SnpRules::default()).unwrap();
    says(verdict(None, required()), "no revocation list");
    verdict(Some(amd.ark.crl(&[77], START, END)), required()).unwrap();
    says(verdict(Some(amd.ark.crl(&[ASK], START, END)), SnpRules::default()), "revoked");
    says(verdict(Some(amd.ark.crl(&[], START, NOW - DAY)), SnpRules::default()), "expired");
    says(verdict(Some(amd.ark.crl(&[], NOW + DAY, END)), SnpRules::default()), "not valid before");
    let other = Amd::new(Product::Milan);
    says(verdict(Some(other.ark.crl(&[], START, END)), SnpRules::default()), "signature is not the issuer's");
}

#[test]
fn snp_evidence_is_bound_to_session_key_and_init_data() {
    let amd = Amd::new(Product::Milan);
    let (strict, cache) = verifier(&amd, SnpRules::default());
    let vcek = amd.vcek(VERSIONS, &CHIP);
    import(&cache, &vcek.der).unwrap();
    let init = InitData::new(Algorithm::Sha384, [("a".into(), "b".into())].into()).unwrap();
    let other = InitData::new(Algorithm::Sha384, [("a".into(), "c".into())].into()).unwrap();
    let mut draft = Draft::new();
    draft.put(0xc0, &init.fit::<32>());
    let evidence = json!({"attestation_report": draft.signed(&vcek).to_json(), "cert_chain": null});
    let expected = Expected { report_data: &[5; 64], init_data: Some(&init), now: NOW };
    let claims = strict.verify(&evidence, &expected).unwrap().into_inner();
    assert_eq!((claims.tee, claims.simulated), ("snp", false));
    assert_eq!(claims.measurement, "09".repeat(48));
    let swapped = Expected { report_data: &[6; 64], ..expected };
    assert!(matches!(strict.verify(&evidence, &swapped), Err(EvidenceError::ReportData { .. })));
    let wrong = Expected { init_data: Some(&other), ..expected };
    assert!(matches!(strict.verify(&evidence, &wrong), Err(EvidenceError::InitData { .. })));
    // Evidence of a guest that has no init data.
    let without = json!({"attestation_report": Draft::new().signed(&vcek).to_json()});
    assert!(matches!(strict.verify(&without, &expected), Err(EvidenceError::InitData { .. })));
}

#[test]
fn malformed_snp_evidence_is_refused() {
    let amd = Amd::new(Product::Milan);
    let (strict, _) = verifier(&amd, SnpRules::default());
    let vcek = amd.vcek(VERSIONS, &CHIP);
    let report = Draft::new().signed(&vcek);
    let good = json!({"attestation_report": report.to_json(), "cert_chain": [{"cert_type": "VCEK", "data": vcek.der}]});
    strict.genuine(&good, NOW).unwrap();
    let base64 = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, report.as_bytes());
    let mut as_text = good.clone();
    as_text["attestation_report"] = base64.into();
    strict.genuine(&as_text, NOW).unwrap();
    let certs = |chain: Value| json!({"attestation_report": report.to_json(), "cert_chain": chain});
    for bad in [
        json!(null),
        json!({}),
        json!({"attestation_report": "x"}),
        json!({"attestation_report": [], "cert_chain": null}),
        certs(json!("x")),
        certs(json!([{"cert_type": "VCEK"}])),
        certs(json!([{"cert_type": "VCEK", "data": [1, 2, 256]}])),
        certs(json!([{"cert_type": "VCEK", "data": vec![0; 100_000]}])),
        certs(json!([{"cert_type": "VCEK", "data": []}])),
        certs(json!(vec![json!({"cert_type": "ARK", "data": []}); 17])),
    ] {
        assert!(strict.genuine(&bad, NOW).is_err(), "{bad:.200}");
    }
    // Cut at any length, the certificate is none.
    for length in (0..vcek.der.len()).step_by(13) {
        assert!(strict.report(&report, &[vcek.der[..length].to_vec()], NOW).is_err());
    }
    for at in (0..vcek.der.len()).step_by(5) {
        let mut changed = vcek.der.clone();
        changed[at] ^= 0x10;
        assert!(strict.report(&report, &[changed], NOW).is_err(), "{at}");
    }
    assert!(SnpReport::from_bytes(&report.as_bytes()[1..]).is_err());
}

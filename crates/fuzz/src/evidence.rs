//! What guests send as evidence, and their event logs.

use std::sync::{Arc, LazyLock};

use nacre_attest::{
    enrolment::{Candidate, Challenge},
    eventlog::{
        Bank,
        aael::{self, RuntimeEvent},
        replay::{Registers, replay},
        story::{Happening, Story},
        tcg,
    },
    snp_report::{LENGTH, SnpReport},
};
use nacre_verify::{
    Cache, DcapRules, SnpRules, TpmRules,
    dcap::{DcapVerifier, IntelRoot},
    import,
    snp::{AmdRoots, SnpVerifier},
    tpm::TpmVerifier,
};
use serde_json::Value;

/// 2026-01-01.
const NOW: i64 = 1_767_225_600;

/// A log is taken apart, replayed and told; what is told is in it.
pub(crate) fn event_log(bytes: &[u8]) {
    let Ok(log) = tcg::parse(bytes) else { return };
    assert!(tcg::length(bytes).is_ok_and(|length| length <= bytes.len()));
    for (bank, registers) in [(Bank::Sha384, Registers::Tee), (Bank::Sha256, Registers::Pcrs)] {
        if let Ok(values) = replay(&log, bank, registers) {
            assert!(values.values().all(|value| value.len() == bank.length()));
        }
    }
    let story = Story::of(&aael::runtime_events(log.events.iter()));
    assert!(story.keys.len() + story.unknown <= log.events.len());
    let _ = (story.to_json(), log.events.iter().map(|event| event.to_json()).collect::<Vec<_>>());
    if let Ok(event) = RuntimeEvent::from_data(bytes) {
        assert_eq!(event.data(), bytes);
    }
}

pub(crate) fn event_logs() -> Vec<Vec<u8>> {
    let events = Happening::KeyReleased { resource: "a/b/c".into() }.events().unwrap_or_default();
    let entries = |bank| events.iter().filter_map(move |event| event.entry(4, bank).ok()).collect::<Vec<_>>().concat();
    let variable = [&[7; 16][..], &2_u64.to_le_bytes(), &0_u64.to_le_bytes(), b"P\0K\0"].concat();
    let both = [Bank::Sha256, Bank::Sha384];
    let header = |banks: &[Bank]| aael::header(banks);
    let typed = |kind: u32, data: &[u8]| {
        let mut entry = aael::entry(1, Bank::Sha384, &[9; 48], data);
        entry.splice(4..8, kind.to_le_bytes());
        entry
    };
    let image = [&[0; 24][..], &8_u64.to_le_bytes(), &[4, 4, 8, 0, b'a', 0, 0, 0, 0x7f, 0xff, 4, 0]].concat();
    vec![
        [header(&[Bank::Sha384]), entries(Bank::Sha384), vec![0xff; 9]].concat(),
        [header(&both), entries(Bank::Sha256), vec![0; 9]].concat(),
        [header(&[Bank::Sha384]), typed(0x8000_0001, &variable), typed(0x8000_0003, &image)].concat(),
        [header(&[Bank::Sha384]), typed(3, b"StartupLocality\0\x03"), typed(0x8000_000a, b"\x02abcd")].concat(),
        header(&[Bank::Sha1]),
        events.first().map(RuntimeEvent::data).unwrap_or_default(),
    ]
}

static SNP: LazyLock<Option<SnpVerifier>> = LazyLock::new(|| {
    let roots = Arc::new(AmdRoots::amd().ok()?);
    Some(SnpVerifier::new(roots, Arc::new(Cache::memory()), SnpRules { debug: true, ..SnpRules::default() }))
});
static DCAP: LazyLock<Option<[DcapVerifier; 2]>> = LazyLock::new(|| {
    let (root, cache) = (Arc::new(IntelRoot::intel().ok()?), Arc::new(Cache::memory()));
    let rules = DcapRules { debug: true, ..DcapRules::default() };
    let tdx = DcapVerifier::tdx(Arc::clone(&root), Arc::clone(&cache), rules.clone());
    Some([tdx, DcapVerifier::sgx(root, cache, rules)])
});

/// A report in bytes, with what follows as its certificate; or evidence in JSON.
pub(crate) fn snp_evidence(bytes: &[u8]) {
    let Some(verifier) = SNP.as_ref() else { return };
    if let Some((report, cert)) = bytes.split_at_checked(LENGTH)
        && let Ok(report) = SnpReport::from_bytes(report)
    {
        assert!(verifier.report(&report, &[cert.to_vec()], NOW).is_err(), "AMD signed none of these");
        let _ = SnpReport::from_json(&report.to_json());
    }
    if let Ok(evidence) = serde_json::from_slice::<Value>(bytes) {
        assert!(verifier.genuine(&evidence, NOW).is_err(), "AMD signed none of these");
    }
}

pub(crate) fn snp_evidences() -> Vec<Vec<u8>> {
    let mut report = vec![0; LENGTH];
    for (at, byte) in [(0, 3), (0x34, 1), (0x188, 0x19), (0x189, 1), (0x1a0, 7)] {
        if let Some(slot) = report.get_mut(at) {
            *slot = byte;
        }
    }
    let json = SnpReport::from_bytes(&report).map(|report| report.to_json()).unwrap_or_default();
    let evidence =
        serde_json::json!({"attestation_report": json, "cert_chain": [{"cert_type": "VCEK", "data": [48, 1, 0]}]});
    let cert = [&report[..], b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"].concat();
    vec![cert, report, evidence.to_string().into_bytes()]
}

/// A quote in bytes, or evidence in JSON.
pub(crate) fn quote(bytes: &[u8]) {
    let Some(verifiers) = DCAP.as_ref() else { return };
    let evidence = serde_json::from_slice::<Value>(bytes).ok();
    for verifier in verifiers {
        assert!(verifier.quote(bytes, None, NOW).is_err(), "Intel signed none of these");
        if let Some(evidence) = &evidence {
            assert!(verifier.genuine(evidence, NOW).is_err(), "Intel signed none of these");
        }
    }
}

pub(crate) fn quotes() -> Vec<Vec<u8>> {
    let vendor = [0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07];
    let sized = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap_or_default().to_le_bytes()[..], bytes].concat();
    let made = |version: u16, tee: u32, body: &[u8]| {
        let header = [&version.to_le_bytes()[..], &[2, 0], &tee.to_le_bytes(), &[0; 4], &vendor, &[0; 20]].concat();
        let certified = [&[0; 384][..], &[0; 64], &[2, 0, 1, 2, 5, 0], &sized(b"-----BEGIN CERTIFICATE-----")].concat();
        let certified = match version {
            3 => certified,
            _ => [&[6, 0][..], &sized(&certified)].concat(),
        };
        [header, body.to_vec(), sized(&[&[0; 128][..], &certified].concat())].concat()
    };
    let mut enclave = vec![0; 384];
    enclave.splice(48..49, [5]);
    let mut guest = vec![0; 584];
    guest.splice(123..124, [0x10]);
    let guest_5 = [&[2, 0][..], &584_u32.to_le_bytes(), &guest].concat();
    vec![
        made(3, 0, &enclave),
        made(4, 0x81, &guest),
        made(5, 0x81, &guest_5),
        br#"{"quote":"AwACAAAA","cc_eventlog":null}"#.to_vec(),
    ]
}

/// Evidence of a TPM, in JSON.
pub(crate) fn tpm_evidence(bytes: &[u8]) {
    if let Ok(evidence) = serde_json::from_slice::<Value>(bytes) {
        // Anybody can make a key and sign with it; here nobody has any.
        assert!(TpmVerifier::new(TpmRules::default()).genuine(&evidence).is_err());
    }
    nacre_verify::fuzzing::tpm(bytes);
}

pub(crate) fn tpm_evidences() -> Vec<Vec<u8>> {
    let quote = [
        &[0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 2, 1, 1, 0, 4, 7, 7, 7, 7][..],
        &[0; 25],
        &[0, 0, 0, 1, 0, 0x0b, 3, 0xff, 0, 0, 0, 4, 9, 9, 9, 9],
    ]
    .concat();
    vec![
        quote,
        vec![0, 0x18, 0, 0x0b, 0, 1, 5, 0, 1, 6],
        vec![0, 0x14, 0, 0x0b, 0, 2, 5, 6],
        br#"{"ak_public":"MAA=","tpm_quote":{"message":"/1RD","signature":"ABQ=","pcrs":["00"]},"event_log":null}"#
            .to_vec(),
    ]
}

/// Collateral, as an operator may import it; what was imported is listed.
pub(crate) fn collateral(bytes: &[u8]) {
    let cache = Cache::memory();
    if let Ok(imported) = import(&cache, bytes) {
        let listed = nacre_verify::entries(&cache).unwrap_or_default();
        assert!(imported.iter().all(|entry| listed.iter().any(|listed| listed.name == entry.name)));
    }
}

pub(crate) fn collaterals() -> Vec<Vec<u8>> {
    crate::texts(&[
        r#"{"tcbInfo":{"id":"TDX","version":3,"issueDate":"2026-01-01T00:00:00Z","nextUpdate":"2026-02-01T00:00:00Z","fmspc":"000102030405","pceId":"0000","tcbLevels":[]},"signature":"00"}"#,
        r#"{"enclaveIdentity":{"id":"QE","version":2,"issueDate":"2026-01-01T00:00:00Z","nextUpdate":"2026-02-01T00:00:00Z"},"signature":"00"}"#,
        r#"{"tcb_info_issuer_chain":"","tcb_info":"{}","tcb_info_signature":"","qe_identity_issuer_chain":"","qe_identity":"{}","qe_identity_signature":"","root_ca_crl":"3000","pck_crl":"3000"}"#,
        "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n",
        include_str!("../../verify/roots/intel-sgx-root.pem"),
    ])
}

/// A key that wants to be enrolled, as a message and as its parts; a challenge, as a guest gets it.
pub(crate) fn enrolment(bytes: &[u8]) {
    if let Ok(candidate) = Candidate::parse(bytes) {
        assert_eq!(Candidate::parse(&candidate.to_json()).ok().as_ref(), Some(&candidate));
    }
    if let Ok(challenge) = Challenge::parse(bytes) {
        assert_eq!(Challenge::parse(challenge.to_json().to_string().as_bytes()).ok().as_ref(), Some(&challenge));
    }
    nacre_verify::fuzzing::enrolment(bytes);
}

pub(crate) fn enrolments() -> Vec<Vec<u8>> {
    let ek =
        [&[0, 0x23, 0, 0x0b, 0, 3, 0, 0xb2, 0, 32][..], &[7; 32], &[0, 6, 0, 128, 0, 0x43, 0, 0x10, 0, 3, 0, 0x10]];
    let ek = [&ek.concat(), &[0, 32][..], &[1; 32], &[0, 32], &[2; 32]].concat();
    vec![
        br#"{"ek_certificate":"MAA=","ek_public":"ACM=","ak_public":"ACM=","answer":"AAAA"}"#.to_vec(),
        br#"{"enrolment":"a-b","credential":"ACA=","secret":"ACA="}"#.to_vec(),
        ek,
        b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n".to_vec(),
    ]
}

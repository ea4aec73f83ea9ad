//! Fulcio's certificates with a transparency log's promise, keys with a promise, and certificates of other CAs.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::Digest;
use p256::ecdsa::signature::Signer as _;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::{
    cosign::{sign_payload, signing_key},
    support::{Case, NEW_YEAR, payload, plain},
};

const ISSUER: &str = "https://accounts.example";
const EMAIL: &str = "signer@example.org";
const PROMISE: &str = "dev.sigstore.cosign/bundle";
const CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
const CHAIN: &str = "dev.sigstore.cosign/chain";

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap()
}

struct Authority {
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = at(NEW_YEAR) - Duration::days(1000);
    params.not_after = at(NEW_YEAR) + Duration::days(1000);
    let root = params.self_signed(&key).unwrap().pem();
    Authority { root, issuer: Issuer::new(params, key) }
}

fn utf8(text: &str) -> Vec<u8> {
    [&[0x0c, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

/// A leaf as Fulcio makes it: ten minutes from the new year of 2025 on.
fn leaf_params() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names = vec![SanType::Rfc822Name(EMAIL.try_into().unwrap())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    params.not_before = at(SIGNED_AT - 60);
    params.not_after = at(SIGNED_AT + 540);
    params.custom_extensions = vec![
        CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 57264, 1, 1], ISSUER.as_bytes().to_vec()),
        CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 57264, 1, 8], utf8(ISSUER)),
    ];
    params
}

/// 2025-01-01T00:00:00Z: long before the test's now.
const SIGNED_AT: i64 = 1_735_689_600;

struct Signed {
    key: p256::ecdsa::SigningKey,
    certificate: String,
}

fn issue(authority: &Authority, params: &CertificateParams) -> Signed {
    use pkcs8::EncodePrivateKey as _;
    let (key, _) = signing_key();
    let der = key.to_pkcs8_der().unwrap();
    let pair = KeyPair::try_from(der.as_bytes()).unwrap();
    Signed { certificate: params.signed_by(&pair, &authority.issuer).unwrap().pem(), key }
}

/// A promise of the log that it has this signature.
fn promise(log: &p256::ecdsa::SigningKey, key: &str, signature: &str, text: &str, time: i64) -> String {
    let body = serde_json::json!({
        "apiVersion": "0.0.1", "kind": "hashedrekord",
        "spec": {
            "data": {"hash": {"algorithm": "sha256", "value": Digest::sha256(text.as_bytes()).hex()}},
            "signature": {"content": signature, "publicKey": {"content": STANDARD.encode(key)}},
        },
    });
    let body = STANDARD.encode(body.to_string());
    let canonical = format!(r#"{{"body":"{body}","integratedTime":{time},"logID":"c0d2","logIndex":7}}"#);
    let timestamp: p256::ecdsa::DerSignature = log.sign(canonical.as_bytes());
    serde_json::json!({
        "SignedEntryTimestamp": STANDARD.encode(timestamp.as_bytes()),
        "Payload": {"body": body, "integratedTime": time, "logIndex": 7, "logID": "c0d2"},
    })
    .to_string()
}

fn text() -> String {
    payload("cosign container image signature", plain().digest(), "r.example/app:v1")
}

struct Fulcio {
    authority: Authority,
    log: p256::ecdsa::SigningKey,
    rule: serde_json::Value,
}

fn fulcio() -> Fulcio {
    let authority = authority();
    let (log, log_pem) = signing_key();
    let rule = serde_json::json!({
        "type": "sigstoreSigned",
        "fulcio": {"caData": STANDARD.encode(&authority.root), "oidcIssuer": ISSUER, "subjectEmail": EMAIL},
        "rekorPublicKeyData": STANDARD.encode(log_pem),
    });
    Fulcio { authority, log, rule }
}

impl Fulcio {
    fn case(&self, signed: &Signed, logged_at: i64) -> Case {
        let mut case = Case::new(&self.rule);
        let mut signature = sign_payload(&signed.key, &plain(), &text());
        let raw = signature.layer.annotations["dev.cosignproject.cosign/signature"].clone();
        let promise = promise(&self.log, &signed.certificate, &raw, &text(), logged_at);
        signature.layer.annotations.insert(PROMISE.into(), promise);
        signature.layer.annotations.insert(CERTIFICATE.into(), signed.certificate.clone());
        signature.layer.annotations.insert(CHAIN.into(), self.authority.root.clone());
        case.store.put_cosign(&[signature]);
        case
    }
}

#[test]
fn a_short_lived_certificate_is_judged_when_it_was_logged() {
    let fulcio = fulcio();
    let signed = issue(&fulcio.authority, &leaf_params());
    let case = fulcio.case(&signed, SIGNED_AT);
    assert_eq!(case.evaluate().unwrap().signers()[0].who, format!("{EMAIL}, identified by {ISSUER}"));
    // The log's time is signed, so no clock is asked.
    assert!(Case { now: None, ..case }.evaluate().is_ok());
    fulcio.case(&signed, SIGNED_AT + 3600).refused(&["no valid path", "2025-01-01T01:00:00Z"]);
    fulcio.case(&signed, SIGNED_AT - 3600).refused(&["no valid path"]);
    fulcio.case(&signed, -1).refused(&["before 1970"]);
}

#[test]
fn certificates_of_others_are_refused() {
    let fulcio = fulcio();
    let stranger = issue(&authority(), &leaf_params());
    fulcio.case(&stranger, SIGNED_AT).refused(&["no valid path"]);
    let edit = |change: &dyn Fn(&mut CertificateParams), reason: &str| {
        let mut params = leaf_params();
        change(&mut params);
        fulcio.case(&issue(&fulcio.authority, &params), SIGNED_AT).refused(&[reason]);
    };
    let extension = CustomExtension::from_oid_content;
    let (v1, v2): (&[u64], &[u64]) = (&[1, 3, 6, 1, 4, 1, 57264, 1, 1], &[1, 3, 6, 1, 4, 1, 57264, 1, 8]);
    edit(
        &|p| p.subject_alt_names = vec![SanType::Rfc822Name("other@example.org".try_into().unwrap())],
        "is for other@example.org",
    );
    edit(&|p| p.subject_alt_names = vec![SanType::DnsName(EMAIL.replace('@', ".").try_into().unwrap())], "no e-mail");
    edit(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth], "no valid path");
    edit(&|p| p.custom_extensions.clear(), "names no OIDC issuer");
    edit(&|p| p.custom_extensions = vec![extension(v1, b"https://evil.example".to_vec())], "https://evil.example");
    edit(
        &|p| p.custom_extensions = vec![extension(v1, ISSUER.into()), extension(v2, utf8("https://evil.example"))],
        "differ",
    );
    edit(&|p| p.custom_extensions = vec![extension(v2, b"\x0c\xff".to_vec())], "certificate");
    let mut params = leaf_params();
    params.custom_extensions = vec![extension(v2, utf8(ISSUER))];
    assert!(fulcio.case(&issue(&fulcio.authority, &params), SIGNED_AT).evaluate().is_ok());
}

#[test]
fn promises_about_something_else_are_refused() {
    let fulcio = fulcio();
    let signed = issue(&fulcio.authority, &leaf_params());
    let good = sign_payload(&signed.key, &plain(), &text());
    let raw = good.layer.annotations["dev.cosignproject.cosign/signature"].clone();
    let other = issue(&fulcio.authority, &leaf_params()).certificate;
    let (stranger, _) = signing_key();
    let promised = |log, key: &str, raw: &str, text: &str| promise(log, key, raw, text, SIGNED_AT);
    let fine = promised(&fulcio.log, &signed.certificate, &raw, &text());
    for (promise, reason) in [
        (promised(&stranger, &signed.certificate, &raw, &text()), "not signed by any rekorPublicKey"),
        (promised(&fulcio.log, &other, &raw, &text()), "another key"),
        (promised(&fulcio.log, &signed.certificate, "AAAA", &text()), "another signature"),
        (promised(&fulcio.log, &signed.certificate, &raw, "other"), "another payload"),
        (promised(&fulcio.log, "nonsense", &raw, &text()), "no PEM"),
        (fine.replace("\"logIndex\":7", "\"logIndex\":8"), "not signed by"),
        (fine.replace("\"integratedTime\":17356", "\"integratedTime\":17357"), "not signed by"),
        (fine.replace("\"logIndex\":7", "\"logIndex\":7,\"x\":1"), "not a known field"),
        (fine.replace("\"logIndex\":7", "\"logIndex\":7,\"logIndex\":7"), "is there twice"),
        (fine.replace("\"logIndex\":7", "\"logIndex\":7.5"), "not an integer"),
        ("{}".into(), "transparency log"),
        (String::new(), "transparency log"),
    ] {
        let mut case = fulcio.case(&signed, SIGNED_AT);
        let mut signature = sign_payload(&signed.key, &plain(), &text());
        signature.layer.annotations.insert("dev.cosignproject.cosign/signature".into(), raw.clone());
        signature.layer.annotations.insert(PROMISE.into(), promise);
        signature.layer.annotations.insert(CERTIFICATE.into(), signed.certificate.clone());
        case.store.put_cosign(&[signature]);
        case.refused(&[reason]);
    }
    for missing in [PROMISE, CERTIFICATE] {
        let mut case = fulcio.case(&signed, SIGNED_AT);
        let mut signature = sign_payload(&signed.key, &plain(), &text());
        signature.layer.annotations.insert(PROMISE.into(), fine.clone());
        signature.layer.annotations.insert(CERTIFICATE.into(), signed.certificate.clone());
        signature.layer.annotations.remove(missing);
        case.store.put_cosign(&[signature]);
        case.refused(&[missing]);
    }
}

#[test]
fn a_key_may_have_to_be_logged() {
    let (key, pem) = signing_key();
    let (_, other_pem) = signing_key();
    let (log, log_pem) = signing_key();
    let rule = serde_json::json!({
        "type": "sigstoreSigned", "keyDatas": [STANDARD.encode(&other_pem), STANDARD.encode(&pem)],
        "rekorPublicKeyData": STANDARD.encode(log_pem),
    });
    let mut signature = sign_payload(&key, &plain(), &text());
    let raw = signature.layer.annotations["dev.cosignproject.cosign/signature"].clone();
    let mut case = Case::new(&rule);
    case.store.put_cosign(&[sign_payload(&key, &plain(), &text())]);
    case.refused(&[PROMISE]);
    signature.layer.annotations.insert(PROMISE.into(), promise(&log, &pem, &raw, &text(), SIGNED_AT));
    case.store.put_cosign(&[signature]);
    assert!(case.evaluate().is_ok());
}

fn pki(authority: &Authority, subject: &serde_json::Value) -> serde_json::Value {
    let mut pki = subject.clone();
    pki["caRootsData"] = STANDARD.encode(&authority.root).into();
    serde_json::json!({"type": "sigstoreSigned", "pki": pki})
}

fn pki_params() -> CertificateParams {
    let mut params = leaf_params();
    params.subject_alt_names.push(SanType::DnsName("build.example.org".try_into().unwrap()));
    params.not_after = at(NEW_YEAR + 60);
    params.custom_extensions.clear();
    params
}

fn pki_case(rule: &serde_json::Value, signed: &Signed, chain: Option<&str>) -> Case {
    let mut case = Case::new(rule);
    let mut signature = sign_payload(&signed.key, &plain(), &text());
    signature.layer.annotations.insert(CERTIFICATE.into(), signed.certificate.clone());
    if let Some(chain) = chain {
        signature.layer.annotations.insert(CHAIN.into(), chain.into());
    }
    case.store.put_cosign(&[signature]);
    case
}

#[test]
fn certificates_of_another_ca_are_judged_now() {
    let authority = authority();
    let signed = issue(&authority, &pki_params());
    let both = serde_json::json!({"subjectEmail": EMAIL, "subjectHostname": "build.example.org"});
    let case = pki_case(&pki(&authority, &both), &signed, None);
    assert_eq!(case.evaluate().unwrap().signers()[0].who, format!("{EMAIL}, build.example.org"));
    let case = Case { now: Some(NEW_YEAR + 60), ..case };
    case.refused(&["the signer's certificate expired at 2026-01-01T00:01:00Z"]);
    Case { now: None, ..case }.refused(&["no trusted time"]);
    for (subject, reason) in [
        (serde_json::json!({"subjectEmail": "x@example.org"}), "not for x@example.org"),
        (serde_json::json!({"subjectHostname": "evil.example.org"}), "is not for host evil.example.org"),
    ] {
        pki_case(&pki(&authority, &subject), &signed, None).refused(&[reason]);
    }
    let subject = serde_json::json!({"subjectEmail": EMAIL});
    pki_case(&pki(&self::authority(), &subject), &signed, None).refused(&["no valid path"]);
    let twice = Signed { certificate: signed.certificate.repeat(2), key: signed.key.clone() };
    pki_case(&pki(&authority, &subject), &twice, None).refused(&["several"]);
    let none = Signed { certificate: String::new(), key: signed.key.clone() };
    pki_case(&pki(&authority, &subject), &none, None).refused(&["none in the signature"]);
    let foreign = Signed { certificate: signed.certificate.clone(), key: signing_key().0 };
    pki_case(&pki(&authority, &subject), &foreign, None).refused(&["does not verify"]);
}

#[test]
fn an_intermediate_comes_from_the_rule_or_the_signature() {
    let root = authority();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "intermediate");
    let pem = params.signed_by(&key, &root.issuer).unwrap().pem();
    let intermediate = Authority { root: pem.clone(), issuer: Issuer::new(params, key) };
    let signed = issue(&intermediate, &pki_params());
    let mut subject = serde_json::json!({"subjectEmail": EMAIL});
    pki_case(&pki(&root, &subject), &signed, None).refused(&["no valid path"]);
    let _ = pki_case(&pki(&root, &subject), &signed, Some(&format!("{pem}{}", root.root))).evaluate().unwrap();
    subject["caIntermediatesData"] = STANDARD.encode(&pem).into();
    let _ = pki_case(&pki(&root, &subject), &signed, None).evaluate().unwrap();
}

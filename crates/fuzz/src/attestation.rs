//! What guest and broker send each other.

use std::collections::BTreeMap;

use nacre_attest::{
    client::successor,
    ear::Ear,
    evidence::{Expected, Verifier as _, hex},
    initdata::InitData,
    jcs, offline,
    rcar::{
        AdvanceMessage, AnchorMessage, Attestation, Challenge, ErrorBody, LeaseReply, Request, TokenReply, report_data,
    },
    sample::SampleVerifier,
    sim::SimVerifier,
};
use nacre_core::jose::{Jwk, PublicKey};

use crate::texts;

pub(crate) fn broker(bytes: &[u8]) {
    let _ = (Request::parse(bytes).is_ok(), Challenge::parse(bytes).is_ok(), TokenReply::parse(bytes).is_ok());
    let _ =
        (AnchorMessage::parse(bytes).is_ok(), AdvanceMessage::parse(bytes).is_ok(), LeaseReply::parse(bytes).is_ok());
    if let Some(key) = key() {
        assert!(successor(bytes, &key, "x").is_err(), "nobody has that key");
    }
    let _ = ErrorBody::parse(bytes).map(|body| body.variant().len());
    let Ok(attestation) = Attestation::parse(bytes) else { return };
    let Ok(report_data) = report_data(&attestation.runtime_data, &attestation.tee_evidence.additional_evidence) else {
        return;
    };
    let init_data = attestation.init_data.and_then(|message| InitData::parse(&message.body).ok());
    let expected = Expected { report_data: &report_data, init_data: init_data.as_ref(), now: 0 };
    if let Ok(claims) = SampleVerifier.verify(&attestation.tee_evidence.primary_evidence, &expected) {
        let claims = claims.into_inner();
        assert!(claims.simulated && init_data.is_none() && claims.report_data == hex(&report_data));
    }
    let mut verifier = SimVerifier::new();
    if let Some(key) = key() {
        let _ = verifier.trust(key);
    }
    assert!(verifier.verify(&attestation.tee_evidence.primary_evidence, &expected).is_err(), "nobody has that key");
}

/// A public key of RFC 7515, whose private half signs nothing here.
fn key() -> Option<PublicKey> {
    let text = r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#;
    serde_json::from_str::<Jwk>(text).ok()?.to_public().ok()
}

pub(crate) fn brokers() -> Vec<Vec<u8>> {
    texts(&[
        // As Trustee's client sent it: its evidence holds.
        include_str!("../../attest/tests/trustee/attestation-p256.json"),
        include_str!("../../attest/tests/trustee/attestation-rsa.json"),
        r#"{"version":"0.4.0","tee":"sim","extra-params":{"supported-hash-algorithms":["sha384"]}}"#,
        r#"{"version":"0.4.0","tee":"sim","extra-params":""}"#,
        r#"{"nonce":"AAAA","extra-params":{"selected-hash-algorithm":"sha384"}}"#,
        r#"{"init-data":{"format":"toml","body":"algorithm = \"sha384\"\nversion = \"0.1.0\"\n[data]\n"},"runtime-data":{"nonce":"AAAA","tee-pubkey":{"kty":"EC","crv":"P-256","alg":"ECDH-ES+A256KW","x":"AA","y":"AA"}},"tee-evidence":{"primary_evidence":{"simulated":true,"report":"eyJhbGciOiJFUzI1NiIsImtpZCI6IngifQ.e30.AAAA"},"additional_evidence":"{}"}}"#,
        r#"{"runtime-data":{"nonce":"\ud83d\ude00","tee-pubkey":[1e21,-0,1.5,{"b":1,"a":2}]},"tee-evidence":{"primary_evidence":null}}"#,
        r#"{"token":"eyJhbGciOiJFUzI1NiJ9.e30.AAAA"}"#,
        r#"{"state":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=="}"#,
        r#"{"expected":null,"next":"AAAA"}"#,
        r#"{"seconds":60}"#,
        r#"{"keys":[{"kty":"EC","nacre.succession":"eyJhbGciOiJFUzI1NiIsImtpZCI6IngifQ.e30.AAAA"}]}"#,
        r#"{"type":"https://github.com/confidential-containers/kbs/errors/PolicyDeny","detail":"no"}"#,
    ])
}

pub(crate) fn init_data(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(init) = InitData::parse(text) {
        assert_eq!(init.text(), text);
        let _: [u8; 32] = init.fit();
    }
}

pub(crate) fn init_datas() -> Vec<Vec<u8>> {
    texts(&[
        "algorithm = \"sha384\"\nversion = \"0.1.0\"\n[data]\n\"nacre.toml\" = '''\na = 1\n'''\n",
        "algorithm = \"md5\"\nversion = \"0.1.0\"\n[data]\n",
        "version = \"9\"\n[data]\na = 1\n",
    ])
}

/// A token that nobody signed, secrets in a file, and JSON in its canonical form.
pub(crate) fn token(bytes: &[u8]) {
    if let (Ok(text), Some(key)) = (std::str::from_utf8(bytes), key()) {
        assert!(Ear::verify(text, &key).is_err(), "nobody has that key");
    }
    let _ = offline::parse(bytes, Some(32), &mut BTreeMap::new());
    if let Ok(value) = serde_json::from_slice::<serde_json::Value>(bytes)
        && let Ok(canonical) = jcs::canonical(&value)
    {
        let again =
            serde_json::from_slice::<serde_json::Value>(&canonical).ok().and_then(|value| jcs::canonical(&value).ok());
        assert_eq!(again.as_ref(), Some(&canonical), "canonical JSON is its own canonical form");
    }
}

pub(crate) fn tokens() -> Vec<Vec<u8>> {
    texts(&[
        "eyJhbGciOiJFUzI1NiJ9.eyJlYXRfcHJvZmlsZSI6IngifQ.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "eyJhbGciOiJub25lIn0.e30.",
        r#"{"default/key/1":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#,
        r#"{"a/../b":"AA==","b":[1e21,1e-7,-0.0,0.1,9007199254740993,{"é":"\u0001","Z":null}]}"#,
    ])
}

/// A document of reference values that nobody signed, and a policy's text with what it would say.
pub(crate) fn reference_document(bytes: &[u8]) {
    if let (Ok(text), Some(key)) = (std::str::from_utf8(bytes), key()) {
        assert!(nacre_broker::ReferenceDocument::verify(text, &key).is_err(), "nobody has that key");
    }
}

/// A CoRIM of anybody's: its envelope, and what it says.
pub(crate) fn corim(bytes: &[u8]) {
    nacre_broker::fuzzing::corim(bytes);
}

pub(crate) fn corims() -> Vec<Vec<u8>> {
    let text = |text: &str| [&[0x60 | u8::try_from(text.len()).unwrap_or_default()][..], text.as_bytes()].concat();
    let bytes = |bytes: &[u8]| [&[0x58, u8::try_from(bytes.len()).unwrap_or_default()][..], bytes].concat();
    // {1: {0: "t"}, 4: {0: [[{}, [{0: name, 1: values}]]]}}
    let comid = |values: &[u8]| {
        let head = [0xa2, 0x01, 0xa1, 0x00, 0x61, b't', 0x04, 0xa1, 0x00, 0x81, 0x82, 0xa0, 0x81, 0xa2, 0x00];
        [&head[..], &text("sim.svn"), &[0x01], values].concat()
    };
    let corim = |values: &[u8]| {
        let tag = [&[0xd9, 0x01, 0xfa][..], &bytes(&comid(values))].concat();
        let validity = [0xa2, 0x00, 0xc1, 0x01, 0x01, 0xc1, 0x1a, 0x7f, 0xff, 0xff, 0xff];
        [&[0xd9, 0x01, 0xf5, 0xa3, 0x00, 0x61, b'x', 0x01, 0x81][..], &tag, &[0x04], &validity].concat()
    };
    let signed = |values: &[u8]| {
        let kind = [&[0x74][..], b"application/rim+cbor"].concat();
        let meta = [0x08, 0x46, 0xa1, 0x00, 0xa1, 0x00, 0x61, b's'];
        let header = [&[0xa4, 0x01, 0x26, 0x03][..], &kind, &[0x04, 0x41, b'k'], &meta].concat();
        [&[0xd2, 0x84][..], &bytes(&header), &[0xa0], &bytes(&corim(values)), &[0x41, 0x00]].concat()
    };
    let digest = [&[0xa1, 0x02, 0x81, 0x82, 0x01][..], &bytes(&[7; 32])].concat();
    let register = [&[0xa1, 0x0e, 0xa1, 0x07, 0x81, 0x82, 0x01][..], &bytes(&[7; 32])].concat();
    vec![
        signed(&[0xa1, 0x01, 0xd9, 0x02, 0x28, 0x07]),
        signed(&digest),
        signed(&register),
        signed(&[0xa1, 0x04, 0xd9, 0x02, 0x30, 0x42, 1, 2]),
        vec![0xd2, 0x84, 0x40, 0xa0, 0xf6, 0x40],
    ]
}

pub(crate) fn reference_documents() -> Vec<Vec<u8>> {
    texts(&[
        "eyJhbGciOiJFUzI1NiIsImtpZCI6IngifQ.eyJwcm9maWxlIjoibmFjcmUtcmVmZXJlbmNlLTEifQ.AAAA",
        "eyJhbGciOiJub25lIn0.e30.",
        "a.b.c",
    ])
}

//! What Trustee's programs sent, recorded (August 2026, protocol 0.4.0, TEE `sample`): both of our ends read it, and refuse it changed.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use nacre_attest::{
    evidence::{EvidenceError, Expected, Verifier as _},
    rcar::{Attestation, Request, report_data},
    sample::{self, SampleVerifier},
};
use nacre_core::jose::{Jwk, PublicKey};
use serde_json::Value;

#[test]
fn what_trustees_client_sends_is_read_and_bound() {
    let request = Request::parse(include_bytes!("trustee/request.json")).unwrap();
    assert_eq!((request.version.as_str(), request.tee.as_str()), ("0.4.0", sample::TEE));
    for (bytes, kind) in [
        (include_str!("trustee/attestation-p256.json"), "EC P-256"),
        (include_str!("trustee/attestation-p521.json"), "EC P-521"),
        (include_str!("trustee/attestation-rsa.json"), "RSA"),
    ] {
        let message = Attestation::parse(bytes.as_bytes()).unwrap();
        let key: Jwk = serde_json::from_value(message.runtime_data.tee_pubkey.clone()).unwrap();
        let key: PublicKey = key.to_public().unwrap();
        assert_eq!(key.kind(), kind);
        let verify = |message: &Attestation| {
            let bound = report_data(&message.runtime_data, &message.tee_evidence.additional_evidence).unwrap();
            let expected = Expected { report_data: &bound, init_data: None, now: 0 };
            SampleVerifier.verify(&message.tee_evidence.primary_evidence, &expected).map(|_| ())
        };
        verify(&message).unwrap();
        let changes: [fn(&mut Attestation); 3] = [
            |message| message.runtime_data.nonce.push('='),
            |message| message.runtime_data.tee_pubkey["use"] = Value::from("enc"),
            |message| message.tee_evidence.additional_evidence.push_str("{}"),
        ];
        for change in changes {
            let mut changed = message.clone();
            change(&mut changed);
            assert!(matches!(verify(&changed), Err(EvidenceError::ReportData { .. })), "{kind}");
        }
    }
}

//! Keys, signatures and configurations that other implementations made, where the shared folder is there.

use std::{fs, process::Command};

use nacre_core::Digest;
use nacre_oci::trust::{Keyring, LookasideConfig, Payload, PayloadType, Policy, PublicKey, SignatureError};
use nacre_testkit::{run, shared};

use crate::support::{Fixed, NEW_YEAR};

#[test]
fn skopeos_signature_holds_and_the_corrupt_one_does_not() {
    let Some(dir) = shared("fixtures/signatures/skopeo") else { return };
    let keyring = Keyring::parse(&fs::read(dir.join("pubring.gpg")).unwrap()).unwrap();
    let clock = Fixed(None);
    let (payload, signer) = keyring.verify(&fs::read(dir.join("image.signature")).unwrap(), &clock).unwrap();
    assert_eq!(signer.fingerprint, "08CD26E446E2E95249B7A405E932F44B23E8DD43");
    let payload = Payload::parse(&payload, PayloadType::Gpg).unwrap();
    let manifest = fs::read(dir.join("image.manifest.json")).unwrap();
    assert_eq!(payload.digest, Digest::sha256(&manifest));
    assert!(keyring.verify(&fs::read(dir.join("corrupt.signature")).unwrap(), &clock).is_err());
}

#[test]
fn a_key_that_has_expired_and_one_that_is_unknown() {
    let Some(dir) = shared("fixtures/signatures/simple") else { return };
    let keyring = Keyring::parse(&fs::read(dir.join("pubkey.gpg")).unwrap()).unwrap();
    let unpacked = tempfile::tempdir().unwrap();
    run(Command::new("tar").arg("xf").arg(dir.join("signatures.tar")).arg("-C").arg(unpacked.path()));
    let base = unpacked.path().join("kata-containers");
    let read = |hex: &str| fs::read(base.join(format!("confidential-containers@sha256={hex}/signature-1"))).unwrap();
    let ours = read("febcf61cd6e1ac9628f6ac14fa40836d16f3c6ddef3b303ff0321606e55ddd0b");
    let error = keyring.verify(&ours, &Fixed(Some(NEW_YEAR))).unwrap_err();
    assert!(matches!(error, SignatureError::Expired { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("67B24AACC459679E0283D7EE58F6ED07EEA6B429") && text.contains("2022-09-23"), "{text}");
    assert!(matches!(keyring.verify(&ours, &Fixed(None)), Err(SignatureError::NoTrustedTime { .. })));
    // 2022-01-01, when the key was good.
    assert!(keyring.verify(&ours, &Fixed(Some(1_640_995_200))).is_ok());
    let unknown = read("7250923ba3543110040462388756ef099331822c6172a050b12c7a38361ea46f");
    let error = keyring.verify(&unknown, &Fixed(Some(1_640_995_200))).unwrap_err();
    assert!(matches!(error, SignatureError::UnknownKey { .. }), "{error}");
}

#[test]
fn old_signatures_with_sha1_are_refused() {
    let Some(dir) = shared("fixtures/signatures/image-rs") else { return };
    let keyring = Keyring::parse(&fs::read(dir.join("pubring.gpg")).unwrap()).unwrap();
    for name in ["signature-1", "signature-2"] {
        let error = keyring.verify(&fs::read(dir.join("signatures").join(name)).unwrap(), &Fixed(None)).unwrap_err();
        assert!(matches!(error, SignatureError::WeakHash(_)), "{error}");
    }
    for name in ["cosign1.pub", "cosign2.pub", "cosign3.pub"] {
        PublicKey::from_pem(&fs::read(dir.join("cosign").join(name)).unwrap()).unwrap();
    }
    Policy::parse(&fs::read(dir.join("policy.json")).unwrap(), "policy.json").unwrap();
}

#[test]
fn lookaside_configurations_merge_as_expected() {
    let Some(dir) = shared("fixtures/signatures/registries.d") else { return };
    for number in 1..=3 {
        let merged = LookasideConfig::load_dir(&dir.join(format!("test_case_{number}"))).unwrap();
        let mut expected = LookasideConfig::default();
        let file = dir.join(format!("merged_result/res{number}.yaml"));
        expected.add("expected", &fs::read(file).unwrap()).unwrap();
        for image in ["example.com/a:1", "example1.com/a:1", "example2.com/b/c:1", "other.example/x:1"] {
            let image = image.parse().unwrap();
            let digest = Digest::sha256(b"");
            let url = |config: &LookasideConfig| config.read_url(&image, &digest, 1);
            assert_eq!(url(&merged), url(&expected), "{number} {image}");
            assert!(url(&merged).is_some());
        }
    }
}

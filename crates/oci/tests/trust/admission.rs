//! The four kinds of image, and the mix.

use nacre_oci::{
    manifest::{RawManifest, media},
    trust::{AdmissionRules, Kind, TrustError, sign::CosignKey},
};

use crate::support::{Case, index_of, manifest_of, plain};

const ENCRYPTED: &str = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";

fn admit(rules: AdmissionRules, image: RawManifest, signed: bool) -> Result<Kind, TrustError> {
    let key = CosignKey::generate();
    let mut case = match signed {
        true => crate::cosign::keyed(&key),
        false => Case::new(&serde_json::json!({"type": "insecureAcceptAnything"})),
    };
    case.chain = vec![image];
    let signature = key.sign(case.image().digest(), &case.reference()).unwrap();
    case.store.put_cosign(&[signature]);
    rules.admit(case.evaluate()?).map(|admission| admission.kind())
}

#[test]
fn defaults_refuse_only_plain_unsigned_images() {
    let rules = AdmissionRules::default();
    let encrypted = || manifest_of(&[ENCRYPTED, ENCRYPTED]);
    let mixed = || manifest_of(&[ENCRYPTED, media::OCI_LAYER]);
    assert_eq!(admit(rules, encrypted(), true).unwrap(), Kind::EncryptedSigned);
    assert_eq!(admit(rules, encrypted(), false).unwrap(), Kind::EncryptedUnsigned);
    assert_eq!(admit(rules, plain(), true).unwrap(), Kind::PlainSigned);
    assert_eq!(admit(rules, mixed(), true).unwrap(), Kind::MixedSigned);
    let error = admit(rules, plain(), false).unwrap_err().to_string();
    assert!(error.contains("plain and unsigned") && error.contains("plain_unsigned"), "{error}");
    let error = admit(rules, mixed(), false).unwrap_err().to_string();
    assert!(error.contains("1 encrypted of 2 layers"), "{error}");
    // An image without layers hides nothing.
    assert!(admit(rules, manifest_of(&[]), false).is_err());
}

#[test]
fn each_kind_can_be_switched() {
    let none = AdmissionRules { encrypted_unsigned: false, plain_signed: false, plain_unsigned: false };
    let all = AdmissionRules { encrypted_unsigned: true, plain_signed: true, plain_unsigned: true };
    for (image, signed) in [
        (manifest_of(&[ENCRYPTED]), false),
        (plain(), true),
        (manifest_of(&[ENCRYPTED, media::OCI_LAYER]), true),
        (plain(), false),
    ] {
        assert!(matches!(admit(none, image.clone(), signed), Err(TrustError::Kind { .. })));
        assert!(admit(all, image, signed).is_ok());
    }
    assert_eq!(admit(none, manifest_of(&[ENCRYPTED]), true).unwrap(), Kind::EncryptedSigned);
    // No switch lets an unsigned mix run.
    assert!(matches!(
        admit(all, manifest_of(&[ENCRYPTED, media::OCI_LAYER]), false),
        Err(TrustError::UnsignedMix { .. })
    ));
}

#[test]
fn a_signature_that_no_rule_asked_for_does_not_count() {
    let image = plain();
    let mut case = Case::new(&serde_json::json!({"type": "insecureAcceptAnything"}));
    case.store.put_cosign(&[CosignKey::generate().sign(image.digest(), &case.reference()).unwrap()]);
    assert!(!case.evaluate().unwrap().is_signed());
}

#[test]
fn an_index_is_no_image() {
    let mut case = Case::new(&serde_json::json!({"type": "insecureAcceptAnything"}));
    case.chain = vec![index_of(&[&plain()])];
    let rules = AdmissionRules { plain_unsigned: true, ..AdmissionRules::default() };
    assert!(matches!(rules.admit(case.evaluate().unwrap()), Err(TrustError::Chain { .. })));
}

#[test]
fn rules_are_read_from_toml() {
    let rules: AdmissionRules = toml::from_str("plain_unsigned = true").unwrap();
    assert_eq!(rules, AdmissionRules { plain_unsigned: true, ..AdmissionRules::default() });
    assert!(toml::from_str::<AdmissionRules>("plain = true").is_err());
}

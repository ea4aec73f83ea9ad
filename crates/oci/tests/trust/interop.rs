//! Signatures that we make are good for gpg and skopeo, and theirs for us.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Digest, SecretBytes};
use nacre_oci::{
    manifest::RawManifest,
    reference::ImageRef,
    trust::{
        Keyring, Scheme,
        sign::{CosignKey, GpgKey, SignError},
    },
};
use nacre_testkit::{Image, require, run};

use crate::support::{Case, Fixed, Gpg, gpg_payload, payload, plain, signed_by};

const NAME: &str = "r.example/app:v1";

/// skopeo with a GPG home.
fn skopeo(gpg_home: &Path) -> Option<Command> {
    let mut command = Command::new(require("skopeo")?);
    command.env("GNUPGHOME", gpg_home);
    Some(command)
}

fn name() -> ImageRef {
    NAME.parse().unwrap()
}

#[test]
fn gpg_and_skopeo_verify_what_we_sign() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", None);
    let key = GpgKey::read(&gpg.run(&["--export-secret-keys"]), None, None).unwrap();
    assert_eq!(key.fingerprint(), fingerprint);
    let signature = key.sign(plain().digest(), &name()).unwrap();
    let text = gpg.pipe(&["--decrypt"], &signature);
    assert!(String::from_utf8(text).unwrap().contains("atomic container signature"));
    let admitted = Case::new(&signed_by(&gpg.export())).with_gpg(signature.clone()).evaluate().unwrap();
    assert_eq!(admitted.signers()[0].who, fingerprint);
    let Some(mut skopeo) = skopeo(gpg.home()) else { return };
    let at = |name: &str| gpg.home().join(name);
    fs::write(at("manifest.json"), plain().bytes()).unwrap();
    fs::write(at("signature-1"), signature).unwrap();
    run(skopeo.arg("standalone-verify").arg(at("manifest.json")).args([NAME, &fingerprint]).arg(at("signature-1")));
}

#[test]
fn keys_of_each_kind_sign() {
    let Some(gpg) = Gpg::new() else { return };
    let secret = SecretBytes::new(b"open sesame".to_vec());
    for (user, algorithm) in [("rsa@x", "rsa2048"), ("p256@x", "nistp256"), ("p384@x", "nistp384"), ("ed@x", "ed25519")]
    {
        // The last --passphrase counts.
        gpg.run(&["--passphrase", "open sesame", "--quick-gen-key", user, algorithm, "sign", "never"]);
        let fingerprint = gpg.fingerprint(user);
        let exported = gpg.run(&["--passphrase", "open sesame", "--armor", "--export-secret-keys"]);
        let key = GpgKey::read(&exported, Some(&fingerprint), Some(&secret)).unwrap();
        let signature = key.sign(plain().digest(), &name()).unwrap();
        gpg.pipe(&["--decrypt"], &signature);
        let admitted = Case::new(&signed_by(&gpg.export())).with_gpg(signature).evaluate().unwrap();
        assert_eq!(admitted.signers()[0].who, fingerprint, "{algorithm}");
        let wrong = SecretBytes::new(b"open barley".to_vec());
        let key = GpgKey::read(&exported, Some(&fingerprint), Some(&wrong)).unwrap();
        assert!(matches!(key.sign(plain().digest(), &name()), Err(SignError::Sign(_))));
    }
}

#[test]
fn a_subkey_signs_where_there_is_one() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", None);
    gpg.run(&["--quick-add-key", &fingerprint, "ed25519", "sign", "never"]);
    let key = GpgKey::read(&gpg.run(&["--export-secret-keys"]), Some(&fingerprint), None).unwrap();
    let signature = key.sign(plain().digest(), &name()).unwrap();
    let (_, signer) = Keyring::parse(&gpg.export()).unwrap().verify(&signature, &Fixed(None)).unwrap();
    assert_eq!(signer.fingerprint, fingerprint);
    assert_ne!(signer.signing_key, fingerprint);
}

#[test]
fn keys_that_must_not_sign_do_not() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "1d", Some("20200101T120000"));
    let exported = gpg.run(&["--export-secret-keys"]);
    assert!(matches!(GpgKey::read(&exported, None, None), Err(SignError::Unusable(_))));
    assert!(matches!(GpgKey::read(&exported, Some(&"0".repeat(40)), None), Err(SignError::NoSuchKey(_))));
    assert!(matches!(GpgKey::read(&exported, Some("a@x"), None), Err(SignError::NoSuchKey(_))));
    assert!(GpgKey::read(&gpg.export(), Some(&fingerprint), None).is_err());
    assert!(GpgKey::read(b"", None, None).is_err());
}

#[test]
fn we_verify_what_skopeo_signs() {
    let Some(gpg) = Gpg::new() else { return };
    let Some(mut skopeo) = skopeo(gpg.home()) else { return };
    let fingerprint = gpg.generate("a@x", "never", None);
    let at = |name: &str| gpg.home().join(name);
    fs::write(at("manifest.json"), plain().bytes()).unwrap();
    let command = skopeo.arg("standalone-sign").arg(at("manifest.json")).args([NAME, &fingerprint]);
    run(command.arg("-o").arg(at("signature")));
    let signature = fs::read(at("signature")).unwrap();
    let admitted = Case::new(&signed_by(&gpg.export())).with_gpg(signature).evaluate().unwrap();
    assert_eq!(admitted.signers()[0].who, fingerprint);
}

/// An image as `dir:`, made by skopeo.
fn dir_image(at: &Path) -> Option<RawManifest> {
    Image::hello().write_layout(&at.join("layout"), "v1");
    let mut command = skopeo(at)?;
    let source = format!("oci:{}:v1", at.join("layout").display());
    run(command.args(["--insecure-policy", "copy", &source]).arg(format!("dir:{}", at.join("image").display())));
    Some(RawManifest::new(fs::read(at.join("image/manifest.json")).unwrap(), None).unwrap())
}

/// Has skopeo copy the image of `dir_image` under a policy.
fn skopeo_copy(at: &Path, requirement: &serde_json::Value) -> Output {
    let mut requirement = requirement.clone();
    requirement["signedIdentity"] = serde_json::json!({"type": "exactReference", "dockerReference": NAME});
    fs::write(at.join("policy.json"), serde_json::json!({"default": [requirement]}).to_string()).unwrap();
    let mut command = skopeo(at).unwrap();
    command.arg("--policy").arg(at.join("policy.json")).arg("copy");
    command.arg(format!("dir:{}", at.join("image").display()));
    command.arg(format!("dir:{}", at.join("copied").display())).output().unwrap()
}

#[test]
fn skopeos_policy_accepts_our_gpg_signatures() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let Some(image) = dir_image(gpg.home()) else { return };
    let key = GpgKey::read(&gpg.run(&["--export-secret-keys"]), None, None).unwrap();
    let path = gpg.home().join("image/signature-1");
    fs::write(&path, key.sign(&Digest::sha256(b"other"), &name()).unwrap()).unwrap();
    assert!(!skopeo_copy(gpg.home(), &signed_by(&gpg.export())).status.success());
    fs::write(&path, key.sign(image.digest(), &name()).unwrap()).unwrap();
    assert!(skopeo_copy(gpg.home(), &signed_by(&gpg.export())).status.success());
}

/// Debian builds skopeo without sigstore; what it then refuses says nothing about our signatures.
fn has_sigstore(output: &Output) -> bool {
    let off = String::from_utf8_lossy(&output.stderr).contains("sigstore disabled");
    if off {
        eprintln!("NOTE: this skopeo is built without sigstore; openssl has verified the signature instead");
    }
    !off
}

#[test]
fn openssl_and_skopeo_verify_our_cosign_signatures() {
    let home = tempfile::tempdir().unwrap();
    let (Some(openssl), Some(image)) = (require("openssl"), dir_image(home.path())) else { return };
    let at = |name: &str| home.path().join(name);
    let key = CosignKey::generate();
    let signature = key.sign(image.digest(), &name()).unwrap();
    fs::write(at("key.pub"), key.public_pem().unwrap()).unwrap();
    fs::write(at("payload"), &signature.payload).unwrap();
    let raw = STANDARD.decode(&signature.layer.annotations["dev.cosignproject.cosign/signature"]).unwrap();
    fs::write(at("raw"), raw).unwrap();
    let mut command = Command::new(openssl);
    command.args(["dgst", "-sha256", "-verify"]).arg(at("key.pub")).arg("-signature").arg(at("raw"));
    run(command.arg(at("payload")));
    let rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(key.public_pem().unwrap())});
    let path = at("image/signature-1");
    fs::write(&path, key.sign(&Digest::sha256(b"other"), &name()).unwrap().native).unwrap();
    let refused = skopeo_copy(home.path(), &rule);
    assert!(!refused.status.success());
    fs::write(&path, signature.native).unwrap();
    let accepted = skopeo_copy(home.path(), &rule);
    if has_sigstore(&accepted) {
        assert!(accepted.status.success(), "{}", String::from_utf8_lossy(&accepted.stderr));
    }
}

#[test]
fn skopeo_signs_with_our_encrypted_key() {
    let home = tempfile::tempdir().unwrap();
    let Some(image) = dir_image(home.path()) else { return };
    let at = |name: &str| home.path().join(name);
    let key = CosignKey::generate();
    fs::write(at("key.pem"), key.to_encrypted_pem(&SecretBytes::new(b"sesame".to_vec())).unwrap()).unwrap();
    fs::write(at("passphrase"), "sesame").unwrap();
    let mut command = skopeo(home.path()).unwrap();
    command.args(["--insecure-policy", "copy", "--sign-identity", NAME, "--sign-by-sigstore-private-key"]);
    command.arg(at("key.pem")).arg("--sign-passphrase-file").arg(at("passphrase"));
    command.arg(format!("dir:{}", at("image").display())).arg(format!("dir:{}", at("signed").display()));
    let output = command.output().unwrap();
    // Where skopeo cannot, the form of its signature in a directory is still read, from our own.
    let blob = match has_sigstore(&output) {
        true => fs::read(at("signed/signature-1")).unwrap(),
        false => key.sign(image.digest(), &name()).unwrap().native,
    };
    let rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(key.public_pem().unwrap()),
        "signedIdentity": {"type": "exactReference", "dockerReference": NAME}});
    let mut case = Case::new(&rule);
    case.requested = format!("dir:{}", at("signed").display());
    case.chain = vec![image];
    let case = case.with_gpg(blob);
    assert_eq!(case.evaluate().unwrap().signers()[0].scheme, Scheme::Cosign);
}

#[test]
fn we_verify_what_openssl_signs_and_sign_with_its_keys() {
    let Some(openssl) = require("openssl") else { return };
    let home = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        run(Command::new(&openssl).args(arguments.split(' ')).current_dir(home.path()));
    };
    let text = payload("cosign container image signature", plain().digest(), NAME);
    fs::write(home.path().join("payload"), &text).unwrap();
    for (kind, ours) in [
        ("EC -pkeyopt ec_paramgen_curve:P-256", true),
        ("EC -pkeyopt ec_paramgen_curve:P-384", true),
        ("RSA -pkeyopt rsa_keygen_bits:2048", false),
        ("ED25519", true),
    ] {
        openssl(&format!("genpkey -algorithm {kind} -out key.pem"));
        openssl("pkey -in key.pem -pubout -out key.pub");
        match kind {
            "ED25519" => openssl("pkeyutl -sign -rawin -inkey key.pem -in payload -out raw"),
            _ => openssl("dgst -sha256 -sign key.pem -out raw payload"),
        }
        let read = |name: &str| fs::read(home.path().join(name)).unwrap();
        let rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(read("key.pub"))});
        let mut signature = crate::cosign::sign_payload(&crate::cosign::signing_key().0, &plain(), &text);
        signature.layer.annotations.insert("dev.cosignproject.cosign/signature".into(), STANDARD.encode(read("raw")));
        let mut case = Case::new(&rule);
        case.store.put_cosign(&[signature]);
        let _ = case.evaluate().unwrap_or_else(|error| panic!("{kind}: {error}"));
        match CosignKey::from_pem(&read("key.pem"), None) {
            Ok(key) => {
                assert!(ours, "{kind}");
                assert_eq!(key.public_pem().unwrap().as_bytes(), read("key.pub"));
                let mut case = Case::new(&rule);
                case.store.put_cosign(&[key.sign(plain().digest(), &name()).unwrap()]);
                case.store.put_bundle(&plain(), key.bundle(&plain(), &name()).unwrap());
                assert!(case.evaluate().is_ok(), "{kind}");
            }
            Err(error) => assert!(!ours && matches!(error, SignError::Unsupported(_)), "{kind}: {error}"),
        }
    }
    // The older form of an EC key.
    openssl("ecparam -name prime256v1 -genkey -noout -out sec1.pem");
    openssl("ec -in sec1.pem -pubout -out sec1.pub");
    let read = |name: &str| fs::read(home.path().join(name)).unwrap();
    let key = CosignKey::from_pem(&read("sec1.pem"), None).unwrap();
    assert_eq!(key.public_pem().unwrap().as_bytes(), read("sec1.pub"));
}

#[test]
fn a_payload_of_ours_is_what_others_write() {
    let key = CosignKey::generate().sign(plain().digest(), &name()).unwrap();
    let ours: serde_json::Value = serde_json::from_slice(&key.payload).unwrap();
    let theirs = payload("cosign container image signature", plain().digest(), NAME);
    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
    assert_eq!(ours["critical"], theirs["critical"]);
    assert_ne!(gpg_payload(plain().digest()), theirs.to_string());
}

//! GPG signatures, made by gpg: good ones, keys past their time, revoked ones, and everything malformed.

use nacre_core::Digest;
use nacre_oci::trust::{Keyring, LookasideConfig, SignatureError, SignedMessage};

use crate::support::{Case, Fixed, Gpg, NEW_YEAR, gpg_payload, index_of, payload, plain, signed_by};

const THEN: &str = "20200101T120000";
/// 2020-01-01T13:00:00Z.
const AN_HOUR_LATER: i64 = 1_577_883_600;

fn signed_case(gpg: &Gpg, key: &str, more: &[&str]) -> Case {
    let case = Case::new(&signed_by(&gpg.export()));
    let signature = gpg.sign(key, more, &gpg_payload(case.image().digest()));
    case.with_gpg(signature)
}

#[test]
fn a_good_signature_admits_and_says_who_signed() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", None);
    let case = signed_case(&gpg, "a@x", &[]);
    let admitted = case.evaluate().unwrap();
    assert!(admitted.is_signed());
    assert_eq!(admitted.signers()[0].who, fingerprint);
    assert_eq!(admitted.signers()[0].reference.as_ref().unwrap().to_string(), "r.example/app:v1");
    assert_eq!(admitted.manifest(), case.image().digest());
    assert_eq!((admitted.policy(), admitted.rule()), ("/etc/test-policy.json", "default"));
    // A key without an expiry needs no time.
    assert!(Case { now: None, ..case }.evaluate().is_ok());
}

#[test]
fn an_image_without_signature_is_refused() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    Case::new(&signed_by(&gpg.export())).refused(&["no GPG signature", "requirement 1 (signedBy) of default"]);
}

#[test]
fn a_signature_may_name_the_index_or_the_manifest() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let image = plain();
    let index = index_of(&[&image]);
    for (signed, stored) in [(&index, &index), (&image, &image), (&image, &index)] {
        let mut case = Case::new(&signed_by(&gpg.export()));
        case.chain = vec![index.clone(), image.clone()];
        let signature = gpg.sign("a@x", &[], &gpg_payload(signed.digest()));
        case.store.native.insert(*stored.digest(), vec![signature]);
        assert!(case.evaluate().is_ok());
    }
    // An image that is not in the index that was signed.
    let mut case = Case::new(&signed_by(&gpg.export()));
    let signature = gpg.sign("a@x", &[], &gpg_payload(index.digest()));
    case.store.native.insert(*index.digest(), vec![signature]);
    case.chain = vec![index, crate::support::manifest_of(&[])];
    assert!(case.evaluate().unwrap_err().to_string().contains("is not in index"));
}

#[test]
fn an_expired_key_refuses_and_says_when() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "1d", Some(THEN));
    // Signed while the key was good: that is only what the signature claims, so it does not help.
    let case = signed_case(&gpg, "a@x", &["--faked-system-time=20200101T121500"]);
    let now = "2026-01-01T00:00:00Z by the test's clock";
    case.refused(&["expired at 2020-01-02T12:00:00Z", &fingerprint, now]);
    assert!(Case { now: Some(AN_HOUR_LATER), ..case }.evaluate().is_ok());
}

#[test]
fn without_a_trusted_time_what_expires_is_refused() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "1000y", None);
    let case = Case { now: None, ..signed_case(&gpg, "a@x", &[]) };
    case.refused(&["no trusted time"]);
    assert!(Case { now: Some(NEW_YEAR), ..case }.evaluate().is_ok());
}

#[test]
fn an_expired_signature_refuses() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", Some(THEN));
    let more = ["--faked-system-time=20200101T121500", "--default-sig-expire", "2d"];
    let case = signed_case(&gpg, "a@x", &more);
    case.refused(&["the signature expired at 2020-01-03T12:15:00Z"]);
    let case = Case { now: Some(AN_HOUR_LATER), ..case };
    assert!(case.evaluate().is_ok());
    Case { now: None, ..case }.refused(&["no trusted time"]);
}

#[test]
fn an_extended_key_is_good_again() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "1d", Some(THEN));
    gpg.run(&["--faked-system-time=20200101T130000", "--quick-set-expire", &fingerprint, "never"]);
    let case = signed_case(&gpg, "a@x", &[]);
    assert!(case.evaluate().is_ok());
}

#[test]
fn a_revoked_key_refuses_whenever_it_signed() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", Some(THEN));
    let signature = gpg.sign("a@x", &["--faked-system-time=20200101T121500"], &gpg_payload(plain().digest()));
    let good = gpg.export();
    let path = gpg.home().join(format!("openpgp-revocs.d/{fingerprint}.rev"));
    let certificate = std::fs::read_to_string(path).unwrap().replace(":-----BEGIN", "-----BEGIN");
    gpg.pipe(&["--import"], certificate.as_bytes());
    Case::new(&signed_by(&gpg.export()))
        .with_gpg(signature.clone())
        .refused(&[&format!("key {fingerprint} was revoked")]);
    // The certificate appended to the keyring, as people do.
    let binary = gpg.pipe(&["--dearmor"], certificate.as_bytes());
    let appended = [good.clone(), binary].concat();
    Case::new(&signed_by(&appended)).with_gpg(signature.clone()).refused(&["was revoked"]);
    // The same armored, block after block.
    let armored = [gpg.pipe(&["--enarmor"], &good), certificate.clone().into_bytes()].concat();
    let armored = String::from_utf8(armored).unwrap().replace("PGP ARMORED FILE", "PGP PUBLIC KEY BLOCK");
    Case::new(&signed_by(armored.as_bytes())).with_gpg(signature.clone()).refused(&["was revoked"]);
    assert!(Case::new(&signed_by(&good)).with_gpg(signature).evaluate().is_ok());
}

#[test]
fn subkeys_sign_until_they_expire_or_are_revoked() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", Some(THEN));
    gpg.run(&["--faked-system-time=20200101T120100", "--quick-add-key", &fingerprint, "ed25519", "sign", "1d"]);
    let case = signed_case(&gpg, "a@x", &["--faked-system-time=20200101T121500"]);
    case.refused(&["subkey", "expired at 2020-01-02T12:01:00Z", &fingerprint]);
    let now = Some(AN_HOUR_LATER);
    let case = Case { now, ..case };
    assert_eq!(case.evaluate().unwrap().signers()[0].who, fingerprint);
    // Revoke the subkey.
    let answers = "key 1\nrevkey\ny\n0\n\ny\nsave\n";
    gpg.pipe(&["--command-fd", "0", "--edit-key", &fingerprint], answers.as_bytes());
    let revoked = Case { now, ..Case::new(&signed_by(&gpg.export())) };
    let signature = case.store.native.values().next().unwrap()[0].clone();
    revoked.with_gpg(signature).refused(&["subkey", "was revoked"]);
}

#[test]
fn one_revoked_user_id_of_two_leaves_the_key_good() {
    let Some(gpg) = Gpg::new() else { return };
    let fingerprint = gpg.generate("a@x", "never", Some(THEN));
    gpg.run(&["--quick-add-uid", &fingerprint, "b@x"]);
    gpg.run(&["--quick-revoke-uid", &fingerprint, "a@x"]);
    assert!(signed_case(&gpg, &fingerprint, &[]).evaluate().is_ok());
}

#[test]
fn a_foreign_key_is_unknown() {
    let (Some(gpg), Some(other)) = (Gpg::new(), Gpg::new()) else { return };
    gpg.generate("a@x", "never", None);
    let fingerprint = other.generate("a@x", "never", None);
    let case = Case::new(&signed_by(&gpg.export()));
    let signature = other.sign("a@x", &[], &gpg_payload(case.image().digest()));
    case.with_gpg(signature).refused(&[&fingerprint, "none of the keyrings"]);
}

#[test]
fn weak_hashes_are_refused() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.run(&["--quick-gen-key", "a@x", "rsa2048", "sign", "never"]);
    for (algorithm, name) in [("SHA1", "SHA1"), ("RIPEMD160", "RIPEMD160"), ("SHA224", "SHA224")] {
        let case = signed_case(&gpg, "a@x", &["--digest-algo", algorithm]);
        case.refused(&[name, "too weak"]);
    }
    for algorithm in ["SHA256", "SHA384", "SHA512"] {
        assert!(signed_case(&gpg, "a@x", &["--digest-algo", algorithm]).evaluate().is_ok(), "{algorithm}");
    }
}

#[test]
fn signed_nonsense_stays_nonsense() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let good = gpg_payload(plain().digest());
    let twice = good.replace("\"optional\":", "\"optional\":{},\"optional\":");
    for (text, reason) in [
        (payload("cosign container image signature", plain().digest(), "r.example/app:v1"), "critical.type"),
        (payload("atomic container signature", &Digest::sha256(b"other"), "r.example/app:v1"), "is for sha256:"),
        (payload("atomic container signature", plain().digest(), "r.example/app:v2"), "matchRepoDigestOrExact"),
        (payload("atomic container signature", plain().digest(), "evil.example/app:v1"), "does not accept"),
        (payload("atomic container signature", plain().digest(), "r.example/app"), "does not accept"),
        (twice, "is there twice"),
        (good.replace("\"critical\"", "\"new\":1,\"critical\""), "not a known field"),
        (String::new(), "not valid JSON"),
    ] {
        Case::new(&signed_by(&gpg.export())).with_gpg(gpg.sign("a@x", &[], &text)).refused(&[reason]);
    }
}

#[test]
fn a_digest_of_another_algorithm_is_computed() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let digest = Digest::of(nacre_core::Algorithm::Sha512, plain().bytes());
    let case = Case::new(&signed_by(&gpg.export()));
    assert!(case.with_gpg(gpg.sign("a@x", &[], &gpg_payload(&digest))).evaluate().is_ok());
}

#[test]
fn malformed_messages_are_refused() {
    let (Some(gpg), Some(other)) = (Gpg::new(), Gpg::new()) else { return };
    gpg.generate("a@x", "never", None);
    other.generate("b@x", "never", None);
    let text = gpg_payload(plain().digest());
    let good = gpg.sign("a@x", &[], &text);
    let plain_message = gpg.sign("a@x", &["--compress-algo", "none"], &text);
    let detached = gpg.pipe(&["-u", "a@x", "--detach-sign"], text.as_bytes());
    let stored = other.pipe(&["--store"], text.as_bytes());
    let huge = "x".repeat(5 << 20);
    gpg.pipe(&["--import"], &other.run(&["--export-secret-keys"]));
    for (message, reason) in [
        (Vec::new(), "empty"),
        (b"nonsense".to_vec(), "not a binary"),
        (gpg.sign("a@x", &["--armor"], &text), "armor"),
        (gpg.pipe(&["-u", "a@x", "--clearsign"], text.as_bytes()), "armor"),
        (detached.clone(), "not exactly"),
        (stored.clone(), "not exactly"),
        ([plain_message.clone(), detached].concat(), "not exactly"),
        ([plain_message.clone(), plain_message.clone()].concat(), "not exactly"),
        ([good.clone(), stored].concat(), "something follows"),
        (gpg.sign("a@x", &["-u", "b@x"], &text), "not exactly"),
        (gpg.sign("a@x", &["--textmode", "--compress-algo", "none"], &text), "not over binary"),
        (gpg.sign("a@x", &["--compress-algo", "zlib"], &huge), "when decompressed"),
        (vec![0xff; 5 << 20], "larger than"),
        (vec![0xa3; 1000], "OpenPGP"),
    ] {
        let case = Case::new(&signed_by(&gpg.export())).with_gpg(message);
        case.refused(&[reason]);
    }
    assert!(Case::new(&signed_by(&gpg.export())).with_gpg(plain_message).evaluate().is_ok());
}

#[test]
fn no_cut_and_no_flipped_bit_changes_what_is_believed() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let text = gpg_payload(plain().digest());
    let keyring = Keyring::parse(&gpg.export()).unwrap();
    let clock = Fixed(Some(NEW_YEAR));
    for options in [&["--compress-algo", "none"][..], &[]] {
        let good = gpg.sign("a@x", options, &text);
        assert_eq!(keyring.verify(&good, &clock).unwrap().0, text.as_bytes());
        for end in (0..good.len()).step_by(3) {
            if let Ok((payload, _)) = keyring.verify(&good[..end], &clock) {
                assert_eq!(payload, text.as_bytes(), "cut at {end}");
            }
        }
        for position in (0..good.len()).step_by(3) {
            let mut bad = good.clone();
            bad[position] ^= 1 << (position % 8);
            // Unhashed hints may change; what was signed may not.
            if let Ok((payload, _)) = keyring.verify(&bad, &clock) {
                assert_eq!(payload, text.as_bytes(), "bit {} of {position}", position % 8);
            }
        }
    }
}

#[test]
fn random_bytes_are_no_message() {
    let mut rng = nacre_testkit::Rng::new(7);
    for length in 0..2000 {
        let mut bytes = rng.bytes(length % 300);
        if let Some(first) = bytes.first_mut() {
            *first |= 0x80;
        }
        assert!(SignedMessage::parse(&bytes).is_err());
        let _ = Keyring::parse(&bytes);
    }
}

#[test]
fn signatures_beyond_the_limit_are_ignored() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let good = gpg.sign("a@x", &[], &gpg_payload(plain().digest()));
    for (before, accepted) in [(127, true), (128, false)] {
        let mut case = Case::new(&signed_by(&gpg.export()));
        let mut all = vec![b"junk".to_vec(); before];
        all.push(good.clone());
        case.store.native.insert(*case.image().digest(), all);
        assert_eq!(case.evaluate().is_ok(), accepted);
        if !accepted {
            case.refused(&["more than 128 signatures", "and 120 more"]);
        }
    }
}

#[test]
fn the_lookaside_is_read_until_it_ends() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let good = gpg.sign("a@x", &[], &gpg_payload(plain().digest()));
    let mut case = Case::new(&signed_by(&gpg.export()));
    case.lookaside.add("a.yaml", b"docker:\n  r.example:\n    lookaside: https://s.example/sigs\n").unwrap();
    let url = |n: usize| format!("https://s.example/sigs/app@sha256={}/signature-{n}", plain().digest().hex());
    case.refused(&["nothing at https://s.example/sigs/app@sha256="]);
    case.store.files.insert(url(1), b"junk".to_vec());
    case.store.files.insert(url(3), good.clone());
    case.refused(&["not a binary OpenPGP message"]);
    case.store.files.insert(url(2), good);
    assert!(case.evaluate().is_ok());
    // Where it does not answer, nothing is decided; and nothing is admitted.
    case.store.broken = true;
    let error = case.evaluate().unwrap_err();
    assert!(!error.is_refusal() && error.to_string().contains("could not be decided"), "{error}");
}

#[test]
fn keys_come_from_files_and_the_broker() {
    let Some(gpg) = Gpg::new() else { return };
    gpg.generate("a@x", "never", None);
    let file = gpg.home().join("ring.gpg");
    std::fs::write(&file, gpg.run(&["--armor", "--export"])).unwrap();
    let good = gpg.sign("a@x", &[], &gpg_payload(plain().digest()));
    let rule = |path: &str| serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": path});
    let case = Case::new(&rule(file.to_str().unwrap())).with_gpg(good.clone());
    assert!(case.evaluate().is_ok());
    let mut case = Case::new(&rule("kbs:///default/image-keys/ring")).with_gpg(good.clone());
    case.refused(&["kbs:///default/image-keys/ring", "no such resource"]);
    case.keys.0.insert("kbs:///default/image-keys/ring".into(), gpg.export());
    assert!(case.evaluate().is_ok());
    Case::new(&rule("/no/such/ring.gpg")).with_gpg(good.clone()).refused(&["/no/such/ring.gpg"]);
    Case::new(&signed_by(b"nonsense")).with_gpg(good).refused(&["key of the rule", "OpenPGP"]);
    assert_eq!(LookasideConfig::default(), LookasideConfig::load_dir("/no/such/dir".as_ref()).unwrap());
}

#[test]
fn each_requirement_needs_its_own_signature() {
    let (Some(gpg), Some(other)) = (Gpg::new(), Gpg::new()) else { return };
    gpg.generate("a@x", "never", None);
    other.generate("b@x", "never", None);
    let mut case = Case::new(&signed_by(&gpg.export()));
    case.policy = serde_json::json!({"default": [signed_by(&gpg.export()), signed_by(&other.export())]}).to_string();
    let case = case.with_gpg(gpg.sign("a@x", &[], &gpg_payload(plain().digest())));
    case.refused(&["requirement 2 (signedBy)"]);
    let case = case.with_gpg(other.sign("b@x", &[], &gpg_payload(plain().digest())));
    assert_eq!(case.evaluate().unwrap().signers().len(), 2);
}

#[test]
fn an_empty_keyring_is_refused() {
    for ring in [&b""[..], b"\x99", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n-----END PGP PUBLIC KEY BLOCK-----\n"] {
        assert!(Keyring::parse(ring).is_err());
    }
    assert!(matches!(SignedMessage::parse(b""), Err(SignatureError::Malformed { .. })));
}

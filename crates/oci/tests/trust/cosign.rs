//! cosign signatures with keys: by tag, as bundles among the referrers, and with a transparency log's promise.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::Digest;
use nacre_oci::{
    manifest::{Descriptor, RawManifest, media},
    trust::{
        Bundle, Promise, Scheme,
        sign::{CosignKey, CosignSignature, referrers_index, referrers_tag},
        signature_tag,
    },
};
use p256::ecdsa::signature::Signer as _;

use crate::support::{Case, index_of, payload, plain};

/// `sigstoreSigned` with one key.
pub(crate) fn keyed(key: &CosignKey) -> Case {
    Case::new(&rule(key))
}

fn rule(key: &CosignKey) -> serde_json::Value {
    serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(key.public_pem().unwrap())})
}

fn with_identity(key: &CosignKey, identity: &str) -> Case {
    let mut rule = rule(key);
    rule["signedIdentity"] = serde_json::json!({"type": identity});
    Case::new(&rule)
}

const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// A signature over any payload.
pub(crate) fn sign_payload(key: &p256::ecdsa::SigningKey, image: &RawManifest, text: &str) -> CosignSignature {
    let signature: p256::ecdsa::DerSignature = key.sign(text.as_bytes());
    let mut layer = Descriptor::of(media::COSIGN_PAYLOAD, text.as_bytes());
    layer.annotations.insert(SIGNATURE.into(), STANDARD.encode(signature.as_bytes()));
    let tag = signature_tag(image.digest());
    CosignSignature { payload: text.as_bytes().to_vec(), layer, tag, native: Vec::new() }
}

pub(crate) fn signing_key() -> (p256::ecdsa::SigningKey, String) {
    use pkcs8::EncodePublicKey as _;
    let key = p256::ecdsa::SigningKey::random(&mut rand_core::OsRng);
    let pem = key.verifying_key().to_public_key_pem(pkcs8::LineEnding::LF).unwrap();
    (key, pem)
}

#[test]
fn a_signature_under_the_tag_admits() {
    let key = CosignKey::generate();
    let mut case = keyed(&key);
    case.refused(&["no sigstore signature", &format!("no tag sha256-{}.sig", case.image().digest().hex())]);
    case.store.put_cosign(&[key.sign(case.image().digest(), &case.reference()).unwrap()]);
    let admitted = case.evaluate().unwrap();
    assert_eq!(admitted.signers()[0].scheme, Scheme::Cosign);
    assert!(admitted.signers()[0].who.starts_with("key sha256:"));
    case.lookaside.add("a.yaml", b"default-docker:\n  use-sigstore-attachments: false\n").unwrap();
    case.refused(&["use-sigstore-attachments: false"]);
}

#[test]
fn other_keys_names_and_digests_are_refused() {
    let (key, other) = (CosignKey::generate(), CosignKey::generate());
    let mut case = keyed(&key);
    let image = *case.image().digest();
    for (signature, reason) in [
        (other.sign(&image, &case.reference()).unwrap(), "does not verify"),
        (key.sign(&image, &"r.example/app:v2".parse().unwrap()).unwrap(), "r.example/app:v2"),
        (key.sign(&image, &"r.example/other:v1".parse().unwrap()).unwrap(), "r.example/other:v1"),
    ] {
        case.store.put_cosign(&[signature]);
        case.refused(&[reason]);
    }
    // A signature of another manifest under this one's tag.
    let mut signature = key.sign(&Digest::sha256(b"other"), &case.reference()).unwrap();
    signature.tag = signature_tag(&image);
    case.store.put_cosign(&[signature]);
    case.refused(&["is for sha256:"]);
    // The right one beside wrong ones is enough.
    let all = [other.sign(&image, &case.reference()).unwrap(), key.sign(&image, &case.reference()).unwrap()];
    case.store.put_cosign(&all);
    assert!(case.evaluate().is_ok());
}

#[test]
fn the_index_may_be_signed() {
    let key = CosignKey::generate();
    let mut case = keyed(&key);
    let index = index_of(&[&plain()]);
    case.chain = vec![index.clone(), plain()];
    case.store.put_cosign(&[key.sign(index.digest(), &case.reference()).unwrap()]);
    assert_eq!(case.evaluate().unwrap().signers()[0].digest, *index.digest());
    assert_eq!(case.evaluate().unwrap().manifest(), plain().digest());
}

#[test]
fn cosigns_own_signatures_need_match_repository() {
    let (key, pem) = signing_key();
    let mut rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(pem)});
    let mut case = Case::new(&rule);
    // cosign signs the repository without a tag, and "optional": null.
    let text = payload("cosign container image signature", plain().digest(), "r.example/app")
        .replace("{\"creator\":\"test\",\"timestamp\":1}", "null");
    case.store.put_cosign(&[sign_payload(&key, &plain(), &text)]);
    case.refused(&["matchRepoDigestOrExact"]);
    rule["signedIdentity"] = serde_json::json!({"type": "matchRepository"});
    let case = Case { policy: serde_json::json!({"default": [rule]}).to_string(), ..case };
    assert!(case.evaluate().is_ok());
}

#[test]
fn malformed_signatures_are_refused() {
    let (key, pem) = signing_key();
    let rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(pem)});
    let text = payload("cosign container image signature", plain().digest(), "r.example/app:v1");
    let edit = |change: &dyn Fn(&mut CosignSignature), reason: &str| {
        let mut case = Case::new(&rule);
        let mut signature = sign_payload(&key, &plain(), &text);
        change(&mut signature);
        case.store.put_cosign(&[signature]);
        case.refused(&[reason]);
    };
    edit(&|s| s.layer.annotations.clear(), "is missing");
    edit(&|s| drop(s.layer.annotations.insert(SIGNATURE.into(), "!".into())), "not base64");
    edit(&|s| drop(s.layer.annotations.insert(SIGNATURE.into(), String::new())), "does not verify");
    edit(&|s| drop(s.layer.annotations.insert(SIGNATURE.into(), STANDARD.encode([0x30; 70]))), "does not verify");
    edit(&|s| s.layer.media_type = media::OCI_LAYER.into(), "no sigstore signature");
    edit(&|s| s.payload.push(b' '), "digest mismatch");
    edit(&|s| s.layer.size = 5 << 20, "larger than");
    for (bad, reason) in [
        (text.replace("cosign container image", "atomic container"), "critical.type"),
        (text.replace("\"optional\":", "\"optional\":{},\"optional\":"), "is there twice"),
        (text.replace("\"critical\":", "\"x\":0,\"critical\":"), "not a known field"),
        (String::new(), "not valid JSON"),
    ] {
        let mut case = Case::new(&rule);
        case.store.put_cosign(&[sign_payload(&key, &plain(), &bad)]);
        case.refused(&[reason]);
    }
    let mut case = Case::new(&rule);
    case.store.tags.insert(signature_tag(plain().digest()), index_of(&[&plain()]));
    case.refused(&["media type"]);
}

#[test]
fn keys_that_are_none_refuse_the_rule() {
    let mut case = Case::new(&serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode("nonsense")}));
    case.refused(&["key of the rule", "no PEM public key"]);
    let key = CosignKey::generate();
    case.policy = serde_json::json!({"default": [{"type": "sigstoreSigned", "keyDatas": [
        STANDARD.encode(key.public_pem().unwrap()), STANDARD.encode("nonsense")]}]})
    .to_string();
    case.store.put_cosign(&[key.sign(case.image().digest(), &case.reference()).unwrap()]);
    // A second key that is broken is found now, not on the day that it is needed.
    case.refused(&["key of the rule"]);
}

#[test]
fn our_bundles_have_a_name() {
    let key = CosignKey::generate();
    let mut case = keyed(&key);
    let bundle = key.bundle(case.image(), &case.reference()).unwrap();
    case.store.put_bundle(&plain(), bundle);
    let admitted = case.evaluate().unwrap();
    assert_eq!(admitted.signers()[0].scheme, Scheme::Bundle);
    assert_eq!(admitted.signers()[0].reference.as_ref().unwrap().to_string(), "r.example/app:v1");
    case.requested = "docker://r.example/app:v2".into();
    case.refused(&["r.example/app:v1"]);
    keyed(&CosignKey::generate()).refused(&["no sigstore signature"]);
    let mut other = keyed(&CosignKey::generate());
    other.store.put_bundle(&plain(), key.bundle(&plain(), &other.reference()).unwrap());
    other.refused(&["does not verify"]);
}

/// A bundle as cosign 3 makes it, with any statement.
fn bundle(key: &p256::ecdsa::SigningKey, statement: &str) -> serde_json::Value {
    let kind = "application/vnd.in-toto+json";
    let message = format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len());
    let signature: p256::ecdsa::DerSignature = key.sign(message.as_bytes());
    serde_json::json!({
        "mediaType": media::SIGSTORE_BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": [{"logIndex": "1"}]},
        "dsseEnvelope": {
            "payload": STANDARD.encode(statement), "payloadType": kind,
            "signatures": [{"sig": STANDARD.encode(signature.as_bytes())}],
        },
    })
}

fn statement(digest: &Digest) -> String {
    serde_json::json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.hex()}, "annotations": {}}],
        "predicateType": "https://sigstore.dev/cosign/sign/v1",
        "predicate": {},
    })
    .to_string()
}

fn put(case: &mut Case, bundle: &serde_json::Value) {
    let image = plain();
    let mut artifact = CosignKey::generate().bundle(&image, &case.reference()).unwrap();
    let bytes = bundle.to_string().into_bytes();
    let layer = Descriptor::of(media::SIGSTORE_BUNDLE, &bytes);
    let manifest = String::from_utf8(artifact.manifest.bytes().to_vec()).unwrap();
    let old = &artifact.blobs[1].0;
    let manifest = manifest
        .replace(&old.digest.to_string(), &layer.digest.to_string())
        .replace(&format!("\"size\":{}", old.size), &format!("\"size\":{}", layer.size));
    artifact.manifest = RawManifest::new(manifest.into_bytes(), None).unwrap();
    artifact.descriptor.digest = *artifact.manifest.digest();
    artifact.blobs[1] = (layer, bytes);
    case.store.referrers.clear();
    case.store.put_bundle(&image, artifact);
}

#[test]
fn cosign_3_bundles_sign_a_digest_only() {
    let (key, pem) = signing_key();
    let rule = |identity: &str| serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(&pem), "signedIdentity": {"type": identity}});
    let mut case = Case::new(&rule("matchRepository"));
    put(&mut case, &bundle(&key, &statement(plain().digest())));
    case.refused(&["names no image", "matchDigest"]);
    let mut case = Case::new(&rule("matchDigest"));
    put(&mut case, &bundle(&key, &statement(plain().digest())));
    assert!(case.evaluate().is_ok());
    // Asked for by digest, there is nothing left for a name to decide.
    let mut case = Case::new(&rule("matchRepository"));
    case.requested = format!("docker://r.example/app@{}", plain().digest());
    let artifact = bundle(&key, &statement(plain().digest()));
    let requested = std::mem::replace(&mut case.requested, "docker://r.example/app:v1".into());
    put(&mut case, &artifact);
    case.requested = requested;
    assert!(case.evaluate().is_ok());
}

#[test]
fn message_signatures_are_over_the_manifest() {
    let (key, pem) = signing_key();
    let mut case = Case::new(
        &serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(&pem), "signedIdentity": {"type": "matchDigest"}}),
    );
    let message = |signed: &[u8], digest: &Digest| {
        let signature: p256::ecdsa::DerSignature = key.sign(signed);
        serde_json::json!({
            "mediaType": media::SIGSTORE_BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": "x"}},
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": STANDARD.encode(digest.as_bytes())},
                "signature": STANDARD.encode(signature.as_bytes()),
            },
        })
    };
    put(&mut case, &message(plain().bytes(), plain().digest()));
    assert!(case.evaluate().is_ok());
    put(&mut case, &message(plain().bytes(), &Digest::sha256(b"other")));
    case.refused(&["messageDigest"]);
    put(&mut case, &message(b"other", plain().digest()));
    case.refused(&["does not verify"]);
}

#[test]
fn malformed_bundles_are_refused() {
    let (key, pem) = signing_key();
    let rule = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(&pem), "signedIdentity": {"type": "matchDigest"}});
    let good = statement(plain().digest());
    let refused = |bundle: &serde_json::Value, reason: &str| {
        let mut case = Case::new(&rule);
        put(&mut case, bundle);
        case.refused(&[reason]);
    };
    for (bad, reason) in [
        (good.replace("Statement/v1", "Statement/v9"), "_type"),
        (good.replace("cosign/sign/v1", "attest/v1"), "predicateType"),
        (good.replace(&plain().digest().hex(), &"0".repeat(64)), "is for sha256:0000"),
        (good.replace("\"sha256\"", "\"md5\""), "no subject with a digest"),
        (good.replace("\"predicate\":", "\"predicate\":1,\"predicate\":"), "is there twice"),
        ("{}".into(), "_type"),
        (String::new(), "not valid JSON"),
    ] {
        refused(&bundle(&key, &bad), reason);
    }
    let edit = |pointer: &str, value: serde_json::Value, reason: &str| {
        let mut bundle = bundle(&key, &good);
        *bundle.pointer_mut(pointer).unwrap() = value;
        refused(&bundle, reason);
    };
    use serde_json::json;
    edit("/mediaType", json!("application/vnd.dev.sigstore.bundle+json;version=0.2"), "mediaType");
    edit("/verificationMaterial", json!({"certificate": {"rawBytes": ""}}), "publicKey");
    edit("/dsseEnvelope/payloadType", json!("text/plain"), "payloadType");
    edit("/dsseEnvelope/payload", json!("!"), "base64");
    edit("/dsseEnvelope/signatures", json!([]), "0 entries");
    edit("/dsseEnvelope/signatures/0/sig", json!(STANDARD.encode([0; 64])), "does not verify");
    edit("/dsseEnvelope", json!(1), "dsseEnvelope");
    let mut both = bundle(&key, &good);
    both["messageSignature"] = json!({"signature": ""});
    refused(&both, "exactly one");
    for bytes in [&b""[..], b"{}", b"[]", b"\xff"] {
        assert!(Bundle::parse(bytes).is_err());
        assert!(Promise::parse(bytes).is_err());
    }
}

#[test]
fn a_bundle_does_not_satisfy_a_rule_about_logs() {
    let key = CosignKey::generate();
    let mut rule = rule(&key);
    rule["rekorPublicKeyData"] = STANDARD.encode(CosignKey::generate().public_pem().unwrap()).into();
    let mut case = Case::new(&rule);
    case.store.put_bundle(&plain(), key.bundle(&plain(), &case.reference()).unwrap());
    case.refused(&["verified with keys only"]);
}

#[test]
fn referrers_are_listed_under_the_fallback_tag() {
    let key = CosignKey::generate();
    let name = "r.example/app:v1".parse().unwrap();
    let first = key.bundle(&plain(), &name).unwrap();
    let second = CosignKey::generate().bundle(&plain(), &name).unwrap();
    let index = referrers_index(None, &first.descriptor).unwrap();
    let index = referrers_index(Some(&index), &second.descriptor).unwrap();
    let index = referrers_index(Some(&index), &second.descriptor).unwrap();
    let parsed = nacre_oci::manifest::Index::parse(&index).unwrap();
    assert_eq!(parsed.manifests, [first.descriptor, second.descriptor]);
    assert_eq!(referrers_tag(plain().digest()), format!("sha256-{}", plain().digest().hex()));
    assert!(referrers_index(Some(&plain()), &parsed.manifests[0]).is_err());
}

#[test]
fn names_of_another_type_of_identity() {
    let key = CosignKey::generate();
    let mut case = with_identity(&key, "matchExact");
    case.store.put_cosign(&[key.sign(case.image().digest(), &case.reference()).unwrap()]);
    assert!(case.evaluate().is_ok());
    case.requested = format!("docker://r.example/app@{}", case.image().digest());
    case.refused(&["matchExact"]);
}

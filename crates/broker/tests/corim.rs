//! Reference values as signed CoRIM manifests, made by an encoder that shares nothing with the broker's reader.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Rig, path};
use nacre_attest::client::ClientError;
use nacre_broker::{ReferenceDocument, Settings, Signer, Transport};
use nacre_core::jose::{Jwk, PrivateKey, b64};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair};
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde_json::json;

fn head(major: u8, argument: u64) -> Vec<u8> {
    let bytes = argument.to_be_bytes();
    match argument {
        0..=23 => vec![major << 5 | bytes[7]],
        24..=0xff => vec![major << 5 | 24, bytes[7]],
        0x100..=0xffff => [&[major << 5 | 25][..], &bytes[6..]].concat(),
        0x1_0000..=0xffff_ffff => [&[major << 5 | 26][..], &bytes[4..]].concat(),
        _ => [&[major << 5 | 27][..], &bytes[..]].concat(),
    }
}

fn int(number: i64) -> Vec<u8> {
    match u64::try_from(number) {
        Ok(number) => head(0, number),
        Err(_) => head(1, number.unsigned_abs() - 1),
    }
}

fn bytes(bytes: &[u8]) -> Vec<u8> {
    [head(2, bytes.len() as u64), bytes.to_vec()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [head(3, text.len() as u64), text.as_bytes().to_vec()].concat()
}

fn list(items: &[Vec<u8>]) -> Vec<u8> {
    [head(4, items.len() as u64), items.concat()].concat()
}

fn map(members: &[(i64, Vec<u8>)]) -> Vec<u8> {
    let parts = members.iter().flat_map(|(key, value)| [int(*key), value.clone()]).collect::<Vec<_>>();
    [head(5, members.len() as u64), parts.concat()].concat()
}

fn tag(tag: u64, item: &[u8]) -> Vec<u8> {
    [head(6, tag), item.to_vec()].concat()
}

fn time(seconds: i64) -> Vec<u8> {
    tag(1, &int(seconds))
}

fn validity(from: i64, until: i64) -> Vec<u8> {
    map(&[(0, time(from)), (1, time(until))])
}

fn digests(of: &[(i64, &[u8])]) -> Vec<u8> {
    list(&of.iter().map(|(algorithm, value)| list(&[int(*algorithm), bytes(value)])).collect::<Vec<_>>())
}

fn measurement(name: &str, values: &[(i64, Vec<u8>)]) -> Vec<u8> {
    map(&[(0, text(name)), (1, map(values))])
}

/// A class of guests: what makes them.
fn class() -> Vec<u8> {
    map(&[(0, map(&[(1, text("ACME Inc.")), (2, text("RoadRunner"))]))])
}

fn comid(environment: &[u8], measurements: &[Vec<u8>]) -> Vec<u8> {
    let triples = map(&[(0, list(&[list(&[environment.to_vec(), list(measurements)])]))]);
    map(&[(1, map(&[(0, text("a tag"))])), (4, triples)])
}

fn corim(comid: &[u8], more: &[(i64, Vec<u8>)]) -> Vec<u8> {
    let tags = list(&[tag(506, &bytes(comid))]);
    let members: Vec<_> = [(0, text("a manifest")), (1, tags)].into_iter().chain(more.iter().cloned()).collect();
    tag(501, &map(&members))
}

/// How a manifest is signed.
struct Envelope<'a> {
    /// PKCS #8.
    key: Vec<u8>,
    algorithm: i64,
    content_type: &'a str,
    kid: Vec<u8>,
    more: Vec<(i64, Vec<u8>)>,
}

fn meta(validity: Option<Vec<u8>>) -> (i64, Vec<u8>) {
    let members: Vec<_> = [(0, map(&[(0, text("ACME Ltd signing key"))]))]
        .into_iter()
        .chain(validity.map(|validity| (1, validity)))
        .collect();
    (8, bytes(&map(&members)))
}

impl<'a> Envelope<'a> {
    fn by(key: &PrivateKey, from: i64, until: i64) -> Self {
        let pem = key.to_pkcs8_pem().unwrap();
        Self {
            key: PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap().secret_pkcs8_der().to_vec(),
            algorithm: -7,
            content_type: "application/rim+cbor",
            kid: thumbprint(key).into_bytes(),
            more: vec![meta(Some(validity(from, until)))],
        }
    }

    fn parts(&self, payload: &[u8]) -> [Vec<u8>; 4] {
        let header = [(1, int(self.algorithm)), (3, text(self.content_type)), (4, bytes(&self.kid))];
        let protected = map(&header.into_iter().chain(self.more.iter().cloned()).collect::<Vec<_>>());
        let signed = list(&[text("Signature1"), bytes(&protected), bytes(&[]), bytes(payload)]);
        let random = ring::rand::SystemRandom::new();
        let pair = [&ECDSA_P256_SHA256_FIXED_SIGNING, &ECDSA_P384_SHA384_FIXED_SIGNING]
            .into_iter()
            .find_map(|scheme| EcdsaKeyPair::from_pkcs8(scheme, &self.key, &random).ok())
            .unwrap();
        let signature = pair.sign(&random, &signed).unwrap();
        [bytes(&protected), map(&[]), bytes(payload), bytes(signature.as_ref())]
    }

    fn sign(&self, payload: &[u8]) -> Vec<u8> {
        tag(18, &list(&self.parts(payload)))
    }
}

fn thumbprint(key: &PrivateKey) -> String {
    Jwk::from_public(&key.public()).thumbprint().unwrap()
}

fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// A broker that knows a signer, whose values may begin with `prefix`.
fn rig(prefix: &str) -> (Rig, PrivateKey) {
    let rig = Rig::with(
        Settings { allow_simulated: true, signed_references_only: false, ..Settings::default() },
        Transport::Tls,
    );
    let key = PrivateKey::generate_p256();
    let pem = key.public().to_pem().unwrap();
    let signer = Signer { name: "acme".into(), key: pem, prefix: prefix.into(), serial: 0 };
    rig.admin().set_signer(&signer).unwrap();
    (rig, key)
}

#[test]
fn a_signed_corim_says_what_guests_have_to_measure() {
    let (rig, key) = rig("");
    let admin = rig.admin();
    rig.broker.delete_reference("sim.measurement").unwrap();
    let get = || rig.client().get(&path("default/key/1"));
    assert!(get().is_err());
    let measured = unhex(&rig.attester(None).measurement().hex());
    let program =
        measurement("sim.measurement", &[(2, digests(&[(7, &measured), (1, &[9; 32])])), (11, text("a program"))]);
    let manifest = corim(&comid(&class(), &[program]), &[]);
    let until = now() + 60;
    admin.import_corim(&Envelope::by(&key, now() - 60, until).sign(&manifest)).unwrap();
    assert!(get().is_ok());
    let listed = admin.references().unwrap();
    let value = &listed["sim.measurement"];
    assert_eq!((value.issuer.as_str(), value.expires, value.values.len()), ("acme", until, 2));

    // Numbers, raw values, registers by number and by name, as other makers wrap and sign them: CWT claims, the key's thumbprint as bytes, a
    // validity of the manifest's own, the tags of earlier drafts, our profile.
    let registers = [int(7), digests(&[(1, &[7; 32])]), text("rtmr_1"), digests(&[(7, &[1; 48])])].concat();
    let registers = [head(5, 2), registers].concat();
    let several = [
        measurement("sim.svn", &[(1, tag(552, &int(3)))]),
        measurement("snp_tee_svn", &[(1, int(0)), (0, map(&[(0, text("1.2"))]))]),
        measurement("xfam", &[(4, tag(560, &bytes(&[0xe7, 0x02])))]),
        measurement("tpm_pcr", &[(14, registers)]),
    ];
    let profile = (3, tag(32, &text("tag:github.com,2026:nacre-storage/nacre#corim-1")));
    let manifest = corim(&comid(&class(), &several), &[profile, (4, validity(now() - 50, until - 10))]);
    let claims = map(&[(1, text("ACME Ltd")), (4, int(until)), (5, int(now() - 55))]);
    let envelope = Envelope {
        kid: b64::decode(thumbprint(&key)).unwrap(),
        more: vec![(15, claims)],
        content_type: "application/corim-unsigned+cbor",
        ..Envelope::by(&key, 0, 0)
    };
    let wrapped = tag(500, &tag(502, &envelope.sign(&tag(500, &manifest))));
    admin.import_corim(&wrapped).unwrap();
    let listed = admin.references().unwrap();
    for (name, value) in [
        ("sim.svn", json!(3)),
        ("snp_tee_svn", json!(0)),
        ("xfam", json!("e702")),
        ("tpm_pcr07", json!("07".repeat(32))),
        ("rtmr_1", json!("01".repeat(48))),
    ] {
        assert_eq!((&listed[name].values[0], listed[name].expires), (&value, until - 10), "{name}");
    }
    // What is no reference value is left out, and the log says so.
    let triples = map(&[
        (0, list(&[list(&[class(), list(&[measurement("sim.svn", &[(1, int(1))])])])])),
        (3, list(&[list(&[class(), list(&[tag(554, &text("a key"))])])])),
    ]);
    let both = map(&[(1, map(&[(0, text("a tag"))])), (4, triples)]);
    admin.import_corim(&Envelope::by(&key, now() - 40, until).sign(&corim(&both, &[]))).unwrap();
    let log = rig.broker.audit(0, 1000).unwrap();
    let last = log.iter().rev().find(|entry| entry.event == "reference document taken").unwrap();
    assert!(last.detail.contains("'ACME Ltd signing key'") && last.detail.contains("1 triples"), "{}", last.detail);
    // P-384 signs ES384.
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &ring::rand::SystemRandom::new()).unwrap();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", BASE64_STANDARD.encode(&der));
    let larger = PrivateKey::from_pem(&pem).unwrap();
    let signer =
        Signer { name: "larger".into(), key: larger.public().to_pem().unwrap(), prefix: String::new(), serial: 0 };
    admin.set_signer(&signer).unwrap();
    let envelope = Envelope { key: der.as_ref().to_vec(), algorithm: -35, ..Envelope::by(&larger, now() - 60, until) };
    admin.import_corim(&envelope.sign(&manifest)).unwrap();
    assert_eq!(admin.references().unwrap()["xfam"].issuer, "larger");
    // A document of the same signer's, of the other kind, has to follow as well.
    let document = |serial: i64| {
        let serial = u64::try_from(serial).unwrap();
        ReferenceDocument::new("acme", serial, until, [("sim.svn".to_owned(), vec![json!(9)])].into(), vec![])
            .sign(&key)
            .unwrap()
    };
    assert!(admin.import_references(&document(now() - 45)).is_err());
    admin.import_references(&document(now() - 30)).unwrap();
}

#[test]
fn a_corim_that_is_forged_old_or_says_more_than_is_understood_is_refused() {
    let (rig, key) = rig("sim.");
    let (from, until) = (now() - 60, now() + 60);
    let good = |name: &str| corim(&comid(&class(), &[measurement(name, &[(1, int(1))])]), &[]);
    let values = |values: &[(i64, Vec<u8>)]| corim(&comid(&class(), &[measurement("sim.x", values)]), &[]);
    let envelope = || Envelope::by(&key, from, until);
    let stranger = PrivateKey::generate_p256();
    let posing = Envelope { kid: thumbprint(&key).into_bytes(), ..Envelope::by(&stranger, from, until) };
    let signed = envelope().sign(&good("sim.x"));
    let flipped = |at: usize| {
        let mut bytes = signed.clone();
        let at = if at == 0 { bytes.len() - 1 } else { at };
        bytes[at] ^= 1;
        bytes
    };
    let [protected, loose, payload, signature] = envelope().parts(&good("sim.x"));
    let placed = |parts: [Vec<u8>; 4]| tag(18, &list(&parts));
    let instance = map(&[(0, map(&[(1, text("ACME"))])), (1, tag(550, &bytes(&[1; 33])))]);
    let twice = [head(5, 2), int(1), int(1), int(1), int(2)].concat();
    let authorized = map(&[(0, text("sim.x")), (1, map(&[(1, int(1))])), (2, list(&[tag(554, &text("a key"))]))]);
    for (bad, why) in [
        (flipped(0), "signature"),
        (posing.sign(&good("sim.x")), "signature"),
        (Envelope::by(&stranger, from, until).sign(&good("sim.x")), "nobody whom this broker knows"),
        (Envelope { algorithm: -35, ..envelope() }.sign(&good("sim.x")), "algorithm"),
        (Envelope { content_type: "text/plain", ..envelope() }.sign(&good("sim.x")), "content type"),
        (Envelope { more: vec![], ..envelope() }.sign(&good("sim.x")), "neither corim-meta nor CWT claims"),
        (
            Envelope { more: vec![(2, list(&[int(99)])), meta(Some(validity(from, until)))], ..envelope() }
                .sign(&good("sim.x")),
            "crit",
        ),
        (placed([protected.clone(), loose.clone(), vec![0xf6], signature.clone()]), "elsewhere"),
        (list(&[protected.clone(), loose.clone(), payload.clone(), signature.clone()]), "not signed"),
        (good("sim.x"), "not signed"),
        (tag(18, &list(&[protected, loose, payload])), "not signed"),
        (signed[..signed.len() - 3].to_vec(), "ends within"),
        ([signed.clone(), vec![0]].concat(), "too many"),
        (vec![0xd2; 2 << 20], "at most"),
        (vec![0xd2; 1000], "levels"),
        // Its time, its order, its names.
        (Envelope::by(&key, from, now() - 1).sign(&good("sim.x")), "expired"),
        (Envelope::by(&key, now() + 600, until + 600).sign(&good("sim.x")), "not valid yet"),
        (Envelope { more: vec![meta(None)], ..envelope() }.sign(&good("sim.x")), "not-before"),
        (Envelope { more: vec![meta(Some(map(&[(0, time(from))])))], ..envelope() }.sign(&good("sim.x")), "not-after"),
        (envelope().sign(&good("snp_launch_measurement")), "may not set"),
        (envelope().sign(&good("not a name")), "no name of a reference value"),
        // What is not understood, or holds for others than all guests.
        (envelope().sign(&corim(&comid(&instance, &[measurement("sim.x", &[(1, int(1))])]), &[])), "environment"),
        (envelope().sign(&corim(&comid(&class(), &[authorized]), &[])), "member 2"),
        (envelope().sign(&corim(&comid(&class(), &[map(&[(0, int(1)), (1, map(&[(1, int(1))]))])]), &[])), "no text"),
        (envelope().sign(&corim(&comid(&class(), &[measurement("sim.x", &[])]), &[(3, text("urn:other"))])), "profile"),
        (envelope().sign(&corim(&comid(&class(), &[measurement("sim.x", &[])]), &[(9, int(1))])), "member 9"),
        (envelope().sign(&tag(501, &map(&[(0, text("x")), (1, list(&[tag(505, &bytes(&map(&[])))]))]))), "no CoMID"),
        (envelope().sign(&tag(501, &map(&[(0, text("x")), (1, list(&[]))]))), "tags"),
        (envelope().sign(&map(&[])), "tag 501"),
        (envelope().sign(&values(&[])), "neither digests"),
        (envelope().sign(&values(&[(1, tag(553, &int(1)))])), "not one exact number"),
        (envelope().sign(&values(&[(1, int(1)), (2, digests(&[(1, &[1; 32])]))])), "more than one"),
        (envelope().sign(&values(&[(3, map(&[(3, vec![0xf4])]))])), "member 3"),
        (envelope().sign(&values(&[(4, tag(563, &list(&[bytes(&[1]), bytes(&[1])])))])), "raw value"),
        (envelope().sign(&values(&[(4, bytes(&[1])), (5, bytes(&[1]))])), "member 5"),
        (envelope().sign(&values(&[(2, digests(&[(1, &[1; 48])]))])), "32 bytes"),
        (envelope().sign(&values(&[(2, digests(&[(6, &[1; 4])]))])), "none of SHA-256"),
        (envelope().sign(&corim(&comid(&class(), &[map(&[(0, text("sim.x")), (1, twice)])]), &[])), "key twice"),
    ] {
        let error = rig.admin().import_corim(&bad).unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 400, .. }), "{why}: {error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
    assert!(!rig.admin().references().unwrap().contains_key("sim.x"));
    // The good one, once, and nothing older than it.
    rig.admin().import_corim(&signed).unwrap();
    for old in [signed, Envelope::by(&key, from - 10, until).sign(&good("sim.x"))] {
        assert!(rig.admin().import_corim(&old).unwrap_err().to_string().contains("it is an older one"));
    }
    // A byte anywhere, changed.
    let (rig, _) = self::rig("sim.");
    let signer = Signer { name: "other".into(), key: key.public().to_pem().unwrap(), prefix: String::new(), serial: 0 };
    rig.broker.set_signer(&signer).unwrap();
    let fresh = envelope().sign(&good("sim.x"));
    for at in 0..fresh.len() {
        let mut changed = fresh.clone();
        changed[at] ^= 0x20;
        assert!(rig.broker.import_corim(&changed).is_err(), "byte {at}");
    }
    assert_eq!(rig.broker.import_corim(&fresh).unwrap(), ["sim.x"]);
}

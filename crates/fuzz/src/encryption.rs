//! Wrapped layer keys: the annotations of an encrypted layer, and the packets of each scheme in them.

use std::{collections::BTreeMap, sync::OnceLock};

use nacre_core::{
    SecretBytes,
    jose::{Jwk, PrivateKey},
};
use nacre_oci::{
    crypt::{Keyring, LayerSecret, PublicOptions, annotations, coco, pgp, pkcs7, pkcs11, provider, strip_encryption},
    manifest::{Descriptor, media},
};

use crate::texts;

/// The key of RFC 7517, appendix A.2, and a ring that has it.
fn keys() -> &'static (Vec<PrivateKey>, Keyring) {
    static KEYS: OnceLock<(Vec<PrivateKey>, Keyring)> = OnceLock::new();
    KEYS.get_or_init(|| {
        let jwk = r#"{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","d":"870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE"}"#;
        let key = serde_json::from_str::<Jwk>(jwk).ok().and_then(|jwk| jwk.to_private().ok());
        let mut ring = Keyring::new();
        if let Some(pem) = key.as_ref().and_then(|key| key.to_pkcs8_pem().ok()) {
            let _ = ring.add_key_file(pem.as_bytes(), None);
        }
        (key.into_iter().collect(), ring)
    })
}

/// A JSON object of annotations.
pub(crate) fn encryption(bytes: &[u8]) {
    let Ok(annotations) = serde_json::from_slice::<BTreeMap<String, String>>(bytes) else { return };
    let layer = format!("{}+gzip+encrypted", media::OCI_LAYER);
    let descriptor = Descriptor { annotations, ..Descriptor::of(&layer, b"") };
    let _ = PublicOptions::of(&descriptor).is_ok();
    let _ = annotations::wrappings(&descriptor).is_ok();
    assert!(keys().1.unwrap(&descriptor).is_err(), "nobody wrapped a key for us");
    if let Ok(plain) = strip_encryption(&descriptor) {
        assert!(plain.annotations.keys().all(|name| !name.starts_with("org.opencontainers.image.enc.")));
    }
}

pub(crate) fn encryptions() -> Vec<Vec<u8>> {
    let enc = "org.opencontainers.image.enc";
    let pubopts = "eyJjaXBoZXIiOiJBRVNfMjU2X0NUUl9ITUFDX1NIQTI1NiIsImhtYWMiOiJBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBPSIsImNpcGhlcm9wdGlvbnMiOnt9fQ==";
    let with =
        |scheme: &str, value: &str| format!(r#"{{"{enc}.pubopts":"{pubopts}","{enc}.keys.{scheme}":"{value}"}}"#);
    let jwe = "eyJwcm90ZWN0ZWQiOiJleUpsYm1NaU9pSkJNalUyUjBOTkluMCIsImhlYWRlciI6eyJhbGciOiJFQ0RILUVTK0EyNTZLVyJ9fQ==";
    let all = [
        with("jwe", jwe),
        with("jwe", &format!("{jwe},{jwe},")),
        with("pkcs7", "MIIBAAYJKoZIhvcNAQcDoIAwgAIBADE="),
        with("pgp", "hQEMAwAAAAAAAAAAAQf/"),
        with("pkcs11", "eyJ2ZXJzaW9uIjowLCJibG9icyI6W119"),
        with("provider.attestation-agent", "eyJraWQiOiJrYnM6Ly8vYS9iL2MifQ=="),
        with("provider.", "AA=="),
        with("unknown", "AA=="),
        format!(r#"{{"{enc}.pubopts":"!!"}}"#),
        "{}".to_owned(),
    ];
    all.map(String::into_bytes).to_vec()
}

/// What is in the annotations' base64, and what key providers answer.
pub(crate) fn packet(bytes: &[u8]) {
    let (keys, _) = keys();
    let _ = coco::Packet::parse(bytes).is_ok();
    if let Ok(packet) = pkcs7::Packet::parse(bytes) {
        let _ = packet.open(keys, &[]).is_ok();
    }
    let _ = pkcs7::Certificate::from_der(bytes).is_ok();
    let _ = pgp::Certificate::parse(bytes).is_ok();
    if let Ok(ring) = pgp::SecretRing::parse(bytes, None) {
        let _ = pgp::open(bytes, &[ring]).is_ok();
    }
    let _ = pgp::open(bytes, &[]).is_ok();
    if let Ok(packet) = pkcs11::Packet::parse(bytes) {
        let _ = packet.open(&[]).is_ok();
    }
    let _ = std::str::from_utf8(bytes).map(|text| text.parse::<pkcs11::Uri>().is_ok());
    let _ = PublicOptions::parse(bytes).is_ok();
    let _ = LayerSecret::parse(&SecretBytes::new(bytes.to_vec())).is_ok();
    let _ = provider::Providers::parse(bytes).is_ok();
    let _ = provider::parse_answer(bytes, true).is_ok();
    let _ = provider::parse_answer(bytes, false).is_ok();
    let _ = provider::decode_field_1(bytes).is_some();
}

pub(crate) fn packets() -> Vec<Vec<u8>> {
    let mut seeds = texts(&[
        r#"{"kid":"kbs:///default/key/1","wrapped_data":"AAAA","iv":"AAAAAAAAAAAAAAAA","wrap_type":"A256GCM","provider":"attestation-agent"}"#,
        r#"{"version":0,"blobs":[{"recipient":0,"hash":"sha256","blob":"AAAA"}]}"#,
        r#"{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","cipheroptions":{}}"#,
        r#"{"symkey":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","cipheroptions":{"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="}}"#,
        r#"{"key-providers":{"a":{"cmd":{"path":"/bin/x","args":["y"]}},"b":{"grpc":"tcp://127.0.0.1:50000"},"c":{"ttrpc":"unix:///run/a.sock"}}}"#,
        r#"{"keywrapresults":{"annotation":"AAAA"}}"#,
        r#"{"keyunwrapresults":{"optsdata":"AAAA"}}"#,
        "pkcs11:token=a;object=b;id=%01%ff?module-name=softhsm2&pin-value=1234",
        "\n\u{4}abcd",
        "-----BEGIN PGP MESSAGE-----\n\nhQEMAw==\n=AAAA\n-----END PGP MESSAGE-----\n",
    ]);
    // EnvelopedData with lengths that lie: too long, indefinite, nested.
    seeds.push(b"\x30\x82\xff\xff\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03\xa0\x80\x30\x80\x02\x01\x00".to_vec());
    seeds.push(b"\x30\x80".repeat(2000));
    seeds.push(b"\x30\x1d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03\xa0\x10\x30\x0e\x02\x01\x00\x31\x00\x30\x07\x06\x01\x2a\x30\x02\x05\x00".to_vec());
    // Public-key encrypted session keys, and a packet of encrypted data.
    seeds.push(
        b"\xc1\x4c\x03\x11\x22\x33\x44\x55\x66\x77\x88\x12\x02\x03\x04\xd2\x08\x01\xaa\xaa\xaa\xaa\xaa\xaa\xaa"
            .to_vec(),
    );
    seeds
}

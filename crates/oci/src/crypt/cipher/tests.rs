use super::*;
use crate::manifest::media;

fn encrypt(plain: &[u8]) -> (LayerSecret, PublicOptions, Vec<u8>) {
    let mut encryptor = LayerEncryptor::new().unwrap();
    let mut data = plain.to_vec();
    encryptor.update(&mut data).unwrap();
    let (secret, public) = encryptor.finish();
    (secret, public, data)
}

fn decrypt(secret: &LayerSecret, public: &PublicOptions, data: &[u8], chunk: usize) -> Result<Vec<u8>, CryptError> {
    let mut decryptor = secret.decryptor(public)?;
    let mut out = data.to_vec();
    for piece in out.chunks_mut(chunk.max(1)) {
        decryptor.update(piece)?;
    }
    decryptor.finish().map(|()| out)
}

fn sample(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

fn secret_of(json: &str) -> Result<LayerSecret, CryptError> {
    LayerSecret::parse(&SecretBytes::new(json.as_bytes().to_vec()))
}

#[test]
fn chunks_of_any_size_decrypt_alike() {
    for length in [0, 1, 15, 16, 17, 8191, 8192, 8193, 100_000] {
        let plain = sample(length);
        let (secret, public, data) = encrypt(&plain);
        assert_eq!(data.len(), plain.len());
        for chunk in [1, 3, 16, 4097, 8192, 65536, 1 << 20] {
            if chunk > 1 || length < 10_000 {
                assert_eq!(decrypt(&secret, &public, &data, chunk).unwrap(), plain, "{length} by {chunk}");
            }
        }
    }
}

#[test]
fn both_documents_survive_their_json() {
    let plain = sample(1000);
    let (secret, public, data) = encrypt(&plain);
    let secret = LayerSecret::parse(&secret.to_json()).unwrap();
    let mut layer = Descriptor::of(media::OCI_LAYER, &data);
    layer.annotations.insert(PUBOPTS_ANNOTATION.into(), public.to_annotation());
    let public = PublicOptions::of(&layer).unwrap();
    assert_eq!(decrypt(&secret, &public, &data, 100).unwrap(), plain);
    assert_eq!(secret.digest(), &Digest::sha256(&plain));
    assert!(!format!("{secret:?}").contains("sha256"));
    let json = String::from_utf8(public.to_json()).unwrap();
    assert!(json.ends_with(r#""cipheroptions":{}}"#), "{json}");
}

#[test]
fn the_counter_carries_through_all_128_bits() {
    let key = SecretArray::fill(|slot| slot.fill(7));
    let start = u128::MAX - 1;
    let mut whole = [0u8; 64];
    Stream::new(&key, start.to_be_bytes()).unwrap().apply(&mut whole).unwrap();
    for (number, block) in whole.chunks(16).enumerate() {
        let mut single = [0u8; 16];
        Stream::new(&key, start.wrapping_add(number as u128).to_be_bytes()).unwrap().apply(&mut single).unwrap();
        assert_eq!(block, single, "block {number}");
    }
}

/// NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt).
#[test]
fn the_cipher_is_aes_256_ctr() {
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let key =
        SecretBytes::new(hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")).to_array().unwrap();
    let nonce = hex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff").try_into().unwrap();
    let mut data = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
    Stream::new(&key, nonce).unwrap().apply(&mut data).unwrap();
    assert_eq!(data, hex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"));
}

#[test]
fn every_changed_byte_fails_the_mac() {
    let (secret, public, data) = encrypt(&sample(300));
    for at in 0..data.len() {
        let mut bad = data.clone();
        bad[at] ^= 1;
        assert!(matches!(decrypt(&secret, &public, &bad, 64), Err(CryptError::Mac)), "byte {at}");
    }
    assert!(matches!(decrypt(&secret, &public, &data[..299], 64), Err(CryptError::Mac)));
    assert!(matches!(decrypt(&secret, &public, &[data.as_slice(), b"x"].concat(), 64), Err(CryptError::Mac)));
    assert!(matches!(decrypt(&secret, &public, &[], 64), Err(CryptError::Mac)));
    for byte in 0..MAC_LEN {
        let mut bad = public.clone();
        bad.hmac[byte] ^= 0x80;
        assert!(matches!(decrypt(&secret, &bad, &data, 64), Err(CryptError::Mac)));
    }
    let (other, ..) = encrypt(b"");
    assert!(matches!(decrypt(&other, &public, &data, 64), Err(CryptError::Mac)));
}

#[test]
fn a_nonce_that_the_registry_swapped_is_seen_by_the_digest() {
    let (secret, mut public, data) = encrypt(&sample(300));
    public.nonce = Some([9; NONCE_LEN]);
    assert!(matches!(decrypt(&secret, &public, &data, 64), Err(CryptError::Digest { .. })));
    public.nonce = secret.nonce;
    decrypt(&secret, &public, &data, 64).unwrap();
}

#[test]
fn the_digest_may_be_the_diff_id_only_where_the_caller_checks_that() {
    let (mut secret, public, mut data) = encrypt(&sample(300));
    secret.digest = Digest::sha256(b"the uncompressed tar");
    assert!(matches!(decrypt(&secret, &public, &data, 64), Err(CryptError::Digest { .. })));
    for (diff_id, good) in [(Digest::sha256(b"the uncompressed tar"), true), (Digest::sha256(b"another"), false)] {
        let mut decryptor = secret.decryptor(&public).unwrap().with_diff_id(&diff_id);
        decryptor.update(&mut data).unwrap();
        assert_eq!(decryptor.finish().is_ok(), good);
        // In place: back to the ciphertext, for the next round.
        Stream::new(&secret.key, secret.nonce.unwrap()).unwrap().apply(&mut data).unwrap();
    }
}

#[test]
fn malformed_public_options_are_refused() {
    let hmac = STANDARD.encode([1; 32]);
    let good = format!(r#"{{"cipher":"{CIPHER}","hmac":"{hmac}","cipheroptions":{{}}}}"#);
    PublicOptions::parse(good.as_bytes()).unwrap();
    PublicOptions::parse(good.replace("{}", "null").as_bytes()).unwrap();
    PublicOptions::parse(good.replace(r#","cipheroptions":{}"#, "").as_bytes()).unwrap();
    let nonce = STANDARD.encode([2; 16]);
    PublicOptions::parse(good.replace("{}", &format!(r#"{{"nonce":"{nonce}","x":"AA=="}}"#)).as_bytes()).unwrap();
    for bad in [
        String::new(),
        "{}".into(),
        "null".into(),
        "[]".into(),
        good[..good.len() - 1].into(),
        format!("{good}{{}}"),
        good.replace("256_CTR", "128_CTR"),
        good.replace(CIPHER, ""),
        good.replace(&format!("\"{CIPHER}\""), "null"),
        good.replace(&hmac, ""),
        good.replace(&format!("\"{hmac}\""), "null"),
        good.replace(&format!("\"{hmac}\""), "[1,2]"),
        good.replace(&hmac, &STANDARD.encode([1; 31])),
        good.replace(&hmac, &STANDARD.encode([1; 33])),
        good.replace(&hmac, &STANDARD.encode([1; 64])),
        good.replace(&hmac, hmac.trim_end_matches('=')),
        good.replace(&hmac, &hmac.replace('A', "!")),
        good.replace(&hmac, &"é".repeat(22)),
        good.replace("{}", r#"{"nonce":""}"#),
        good.replace("{}", r#"{"nonce":"AAAA"}"#),
        good.replace("{}", &format!(r#"{{"nonce":"{}"}}"#, STANDARD.encode([2; 12]))),
        good.replace("{}", &format!(r#"{{"nonce":"{nonce}","nonce":"{nonce}"}}"#)),
        good.replace("{}", "7"),
        format!("{good}{}", " ".repeat(OPTIONS_LIMIT)),
        "[".repeat(OPTIONS_LIMIT),
    ] {
        let error = PublicOptions::parse(bad.as_bytes()).expect_err(&bad);
        assert!(error.to_string().starts_with("annotation org.opencontainers.image.enc.pubopts"), "{error}");
    }

    let mut layer = Descriptor::of(media::OCI_LAYER, b"");
    assert!(matches!(PublicOptions::of(&layer), Err(CryptError::Annotation { .. })));
    for bad in [String::new(), "!".into(), STANDARD.encode(&good).replace('=', "x"), "A".repeat(100 << 20)] {
        layer.annotations.insert(PUBOPTS_ANNOTATION.into(), bad);
        assert!(matches!(PublicOptions::of(&layer), Err(CryptError::Annotation { .. })));
    }
}

#[test]
fn malformed_private_options_are_refused_and_not_quoted() {
    let key = STANDARD.encode([3; 32]);
    let digest = Digest::sha256(b"");
    let nonce = STANDARD.encode([4; 16]);
    let good = format!(r#"{{"symkey":"{key}","digest":"{digest}","cipheroptions":{{"nonce":"{nonce}"}}}}"#);
    let secret = secret_of(&good).unwrap();
    assert_eq!(secret.to_json().expose(), good.as_bytes());
    secret_of(&good.replace('+', "\\u002b")).unwrap();
    for bad in [
        String::new(),
        "{}".into(),
        "null".into(),
        good[1..].into(),
        good[..good.len() - 2].into(),
        good.replace(&key, ""),
        good.replace(&key, &STANDARD.encode([3; 16])),
        good.replace(&key, &STANDARD.encode([3; 33])),
        good.replace(&key, key.trim_end_matches('=')),
        good.replace("symkey", "digest2"),
        good.replace("\"digest\"", "\"x\""),
        good.replace(&digest.to_string(), ""),
        good.replace("sha256:", "md5:"),
        // swapped fields
        good.replace(&key, "@").replace(&nonce, &key).replace('@', &nonce),
        good.replace(&nonce, ""),
        format!("{good}{}", " ".repeat(OPTIONS_LIMIT)),
    ] {
        let error = secret_of(&bad).expect_err(&bad);
        assert!(matches!(error, CryptError::PrivateOptions(_)), "{error}");
        assert!(!error.to_string().contains(&key) && !format!("{error:?}").contains(&key), "{error:?}");
    }
    // A key in the place of the digest is not shown either.
    let error = secret_of(&good.replace(&digest.to_string(), &key)).unwrap_err();
    assert!(!format!("{error:?} {error}").contains(&key), "{error}");

    let bare = secret_of(&good.replace(&format!(r#""nonce":"{nonce}""#), "")).unwrap();
    let (_, public, _) = encrypt(b"");
    assert!(matches!(bare.decryptor(&public), Err(CryptError::PrivateOptions(_))), "a nonce is needed somewhere");
}

#[test]
fn parts_of_a_layer_decrypt_as_the_whole_does() {
    let plain: Vec<u8> = (0..50_000u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    // The last one's counter begins again at zero within the layer.
    for nonce in [[7; NONCE_LEN], [0xFF; NONCE_LEN]] {
        let key = SecretArray::fill(|slot| slot.fill(9));
        let secret = LayerSecret { key, nonce: Some(nonce), digest: Digest::sha256(&plain) };
        let public = PublicOptions { hmac: [0; MAC_LEN], nonce: None };
        let mut sealed = plain.clone();
        secret.decryptor(&public).unwrap().update(&mut sealed).unwrap();
        let parts = secret.parts(&public).unwrap();
        for (from, to) in [(0, 50_000), (0, 1), (1, 17), (16, 32), (31, 9000), (8191, 20_000), (49_999, 50_000)] {
            let mut part = sealed[from..to].to_vec();
            parts.decrypt(from as u64, &mut part).unwrap();
            assert!(part == plain[from..to], "bytes {from} to {to}");
        }
        let other = SecretArray::fill(|slot| slot.fill(8));
        let other = LayerSecret { key: other, nonce: Some(nonce), digest: Digest::sha256(&plain) };
        assert_ne!(other.parts(&public).unwrap().name(), parts.name());
        assert_eq!(format!("{parts:?}"), "LayerParts(…)");
    }
}

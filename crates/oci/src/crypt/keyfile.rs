//! Files with keys, of any kind that `--decryption-key` takes: what is in one is found out by looking.
//!
//! - PEM: private keys (PKCS#8, PKCS#1, SEC1; encrypted ones with a passphrase), certificates, both in one file
//! - DER: a private key or a certificate; JSON: a private JWK
//! - an OpenPGP secret key or key ring, armoured or not
//! - YAML with a PKCS#11 URI

use std::num::NonZeroU32;

use aws_lc_rs::{
    cipher::{AES_128, AES_192, AES_256, Algorithm, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey},
    iv::FixedLength,
    pbkdf2,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use md5::{Digest as _, Md5};
use nacre_core::{SecretBytes, jose::PrivateKey};
use zeroize::Zeroizing;

use super::{
    der::{INTEGER, OCTET_STRING, OID, Reader, SEQUENCE},
    pgp, pkcs7, pkcs11,
};

/// What is in a key file.
pub(crate) enum Key {
    Private(Box<PrivateKey>),
    Certificate(Box<pkcs7::Certificate>),
    Pgp(pgp::SecretRing),
    Token(pkcs11::TokenKey),
}

const BEGIN: &str = "-----BEGIN ";
/// More than any sensible setting, and some seconds of work.
const ITERATION_LIMIT: u64 = 10_000_000;

/// Finds the keys in a file.
pub(crate) fn parse(bytes: &[u8], passphrase: Option<&SecretBytes>) -> Result<Vec<Key>, String> {
    let text = std::str::from_utf8(bytes).ok();
    match (text, bytes.trim_ascii_start().first()) {
        (_, None) => Err("the file is empty".into()),
        (Some(text), _) if text.contains("-----BEGIN PGP ") => pgp_ring(bytes, passphrase),
        (Some(text), _) if text.contains(BEGIN) => pem(text, passphrase),
        (Some(_), Some(b'{')) => private(bytes).map(|key| vec![key]),
        (Some(text), _) if text.contains("pkcs11:") => {
            pkcs11::TokenKey::parse(text).map(|key| vec![Key::Token(key)]).map_err(|error| error.to_string())
        }
        // Every OpenPGP packet opens with a set high bit.
        (_, Some(0x80..)) => pgp_ring(bytes, passphrase),
        _ => private(bytes).or_else(|error| certificate(bytes).map_err(|_| error)).map(|key| vec![key]),
    }
}

fn private(bytes: &[u8]) -> Result<Key, String> {
    PrivateKey::from_bytes(bytes).map(|key| Key::Private(Box::new(key))).map_err(|error| error.to_string())
}

fn certificate(der: &[u8]) -> Result<Key, String> {
    pkcs7::Certificate::from_der(der).map(|it| Key::Certificate(Box::new(it))).map_err(|error| error.to_string())
}

fn pgp_ring(bytes: &[u8], passphrase: Option<&SecretBytes>) -> Result<Vec<Key>, String> {
    pgp::SecretRing::parse(bytes, passphrase).map(|ring| vec![Key::Pgp(ring)]).map_err(|error| error.to_string())
}

fn pem(text: &str, passphrase: Option<&SecretBytes>) -> Result<Vec<Key>, String> {
    let mut keys = Vec::new();
    for block in blocks(text)? {
        keys.push(match (block.label, block.encryption) {
            ("PRIVATE KEY" | "RSA PRIVATE KEY" | "EC PRIVATE KEY", None) => private(&block.der)?,
            ("RSA PRIVATE KEY" | "EC PRIVATE KEY", Some(method)) => {
                private(&decrypt_traditional(method, &block.der, needed(passphrase)?)?)?
            }
            ("ENCRYPTED PRIVATE KEY", _) => private(&decrypt_pkcs8(&block.der, needed(passphrase)?)?)?,
            ("CERTIFICATE", _) => certificate(&block.der)?,
            ("EC PARAMETERS", _) => continue,
            ("PUBLIC KEY", _) => return Err("it is a public key; a private one is needed to decrypt".into()),
            (label, _) => return Err(format!("its PEM block '{label:.40}' is no key that can decrypt")),
        });
    }
    if keys.is_empty() { Err("there is no key in it".into()) } else { Ok(keys) }
}

fn needed(passphrase: Option<&SecretBytes>) -> Result<&SecretBytes, String> {
    passphrase.ok_or_else(|| "the key is encrypted: give its passphrase as <file>:pass=…, :file=… or :fd=…".into())
}

struct Block<'a> {
    label: &'a str,
    /// `DEK-Info` of an encrypted key in OpenSSL's traditional form.
    encryption: Option<&'a str>,
    der: Zeroizing<Vec<u8>>,
}

/// The blocks of a PEM file.
pub(crate) fn certificates_of_pem(text: &str) -> Result<Vec<Vec<u8>>, String> {
    let blocks = blocks(text)?.into_iter().filter(|block| block.label == "CERTIFICATE");
    Ok(blocks.map(|block| block.der.to_vec()).collect())
}

fn blocks(text: &str) -> Result<Vec<Block<'_>>, String> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(BEGIN) {
        let (label, after) = after.split_once("-----").ok_or("a PEM line does not end")?;
        let end = format!("-----END {label}-----");
        let (mut body, tail) =
            after.split_once(&end).ok_or_else(|| format!("the PEM block '{label:.40}' does not end"))?;
        let mut encryption = None;
        if body.contains(':') {
            // RFC 1421 headers: up to an empty line.
            let (headers, data) = ["\n\n", "\r\n\r\n"]
                .iter()
                .find_map(|gap| body.trim_start_matches(['\r', '\n']).split_once(gap))
                .ok_or("the headers of a PEM block do not end")?;
            encryption = headers.lines().find_map(|line| line.strip_prefix("DEK-Info:")).map(str::trim);
            if encryption.is_none() {
                return Err("a PEM block has headers that are not understood".into());
            }
            body = data;
        }
        let body: Zeroizing<Vec<u8>> =
            Zeroizing::new(body.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect());
        let der = STANDARD.decode(&*body).map_err(|_| format!("the PEM block '{label:.40}' is not base64"))?;
        blocks.push(Block { label, encryption, der: Zeroizing::new(der) });
        if blocks.len() > 64 {
            return Err("more than 64 PEM blocks".into());
        }
        rest = tail;
    }
    Ok(blocks)
}

/// OpenSSL's traditional form: `AES-256-CBC,<hex iv>`, the key by MD5 of the passphrase and the iv's first eight bytes. As weak as it is
/// old; it is the only encrypted form that skopeo reads.
fn decrypt_traditional(method: &str, data: &[u8], passphrase: &SecretBytes) -> Result<Zeroizing<Vec<u8>>, String> {
    let (cipher, iv) = method.split_once(',').ok_or("its DEK-Info is malformed")?;
    let algorithm = match cipher {
        "AES-128-CBC" => &AES_128,
        "AES-192-CBC" => &AES_192,
        "AES-256-CBC" => &AES_256,
        other => return Err(format!("it is encrypted with '{other:.40}'; AES-CBC is supported")),
    };
    let digits: Option<Vec<u8>> = (0..16).map(|at| u8::from_str_radix(iv.get(at * 2..at * 2 + 2)?, 16).ok()).collect();
    let iv: [u8; 16] = digits.and_then(|digits| digits.try_into().ok()).ok_or("its DEK-Info is malformed")?;
    let salt = iv.get(..8).unwrap_or_default();
    let mut key = Zeroizing::new(Vec::with_capacity(48));
    let mut last = Zeroizing::new(Vec::new());
    while key.len() < key_len(algorithm) {
        let mut hash = Md5::new();
        hash.update(&*last);
        hash.update(passphrase.expose());
        hash.update(salt);
        last = Zeroizing::new(hash.finalize().to_vec());
        key.extend_from_slice(&last);
    }
    key.truncate(key_len(algorithm));
    decrypt_cbc(algorithm, &key, iv, data)
}

/// PKCS#8 `EncryptedPrivateKeyInfo` with PBES2: PBKDF2 and AES-CBC.
fn decrypt_pkcs8(der: &[u8], passphrase: &SecretBytes) -> Result<Zeroizing<Vec<u8>>, String> {
    let parameters = pbes2(der).ok_or("its encryption is not PBES2 with PBKDF2 and AES-CBC")?;
    let iterations = u32::try_from(parameters.iterations)
        .ok()
        .and_then(NonZeroU32::new)
        .filter(|count| u64::from(count.get()) <= ITERATION_LIMIT)
        .ok_or_else(|| {
            format!("it asks for {} iterations; at most {ITERATION_LIMIT} are done", parameters.iterations)
        })?;
    let mut key = Zeroizing::new(vec![0; key_len(parameters.cipher)]);
    pbkdf2::derive(parameters.hash, iterations, parameters.salt, passphrase.expose(), &mut key);
    decrypt_cbc(parameters.cipher, &key, parameters.iv, parameters.data)
}

struct Pbes2<'a> {
    salt: &'a [u8],
    iterations: u64,
    hash: pbkdf2::Algorithm,
    cipher: &'static Algorithm,
    iv: [u8; 16],
    data: &'a [u8],
}

fn pbes2(der: &[u8]) -> Option<Pbes2<'_>> {
    const PBES2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0d];
    const PBKDF2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x05, 0x0c];
    const HMAC: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x02];
    const AES: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01];
    let mut info = Reader::new(der).within(SEQUENCE)?;
    let mut algorithm = info.within(SEQUENCE)?;
    let data = info.take(OCTET_STRING)?;
    if algorithm.take(OID)? != PBES2 {
        return None;
    }
    let mut parameters = algorithm.within(SEQUENCE)?;
    let mut derivation = parameters.within(SEQUENCE)?;
    if derivation.take(OID)? != PBKDF2 {
        return None;
    }
    let mut derivation = derivation.within(SEQUENCE)?;
    let salt = derivation.take(OCTET_STRING)?;
    let iterations = derivation.number()?;
    if derivation.peek() == Some(INTEGER) {
        derivation.number()?;
    }
    let hash = if derivation.is_empty() {
        pbkdf2::PBKDF2_HMAC_SHA1
    } else {
        match derivation.within(SEQUENCE)?.take(OID)?.strip_prefix(HMAC)? {
            [7] => pbkdf2::PBKDF2_HMAC_SHA1,
            [9] => pbkdf2::PBKDF2_HMAC_SHA256,
            [10] => pbkdf2::PBKDF2_HMAC_SHA384,
            [11] => pbkdf2::PBKDF2_HMAC_SHA512,
            _ => return None,
        }
    };
    let mut encryption = parameters.within(SEQUENCE)?;
    let cipher = match encryption.take(OID)?.strip_prefix(AES)? {
        [2] => &AES_128,
        [22] => &AES_192,
        [42] => &AES_256,
        _ => return None,
    };
    let iv = encryption.take(OCTET_STRING)?.try_into().ok()?;
    Some(Pbes2 { salt, iterations, hash, cipher, iv, data })
}

fn key_len(algorithm: &'static Algorithm) -> usize {
    if algorithm == &AES_128 {
        16
    } else if algorithm == &AES_192 {
        24
    } else {
        32
    }
}

fn decrypt_cbc(
    algorithm: &'static Algorithm,
    key: &[u8],
    iv: [u8; 16],
    data: &[u8],
) -> Result<Zeroizing<Vec<u8>>, String> {
    let wrong = |_| "its passphrase is wrong, or the file is damaged".to_owned();
    let key = UnboundCipherKey::new(algorithm, key).and_then(PaddedBlockDecryptingKey::cbc_pkcs7).map_err(wrong)?;
    let mut data = Zeroizing::new(data.to_vec());
    let length = key.decrypt(&mut data, DecryptionContext::Iv128(FixedLength::from(iv))).map_err(wrong)?.len();
    data.truncate(length);
    Ok(data)
}

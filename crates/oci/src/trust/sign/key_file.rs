//! Private keys as cosign keeps them: PEM of PKCS#8 or SEC1, or encrypted.
//!
//! The encrypted form, `ENCRYPTED SIGSTORE PRIVATE KEY` (before: `ENCRYPTED COSIGN PRIVATE KEY`), is JSON in PEM:
//!
//! ```text
//! {"kdf":{"name":"scrypt","params":{"N":65536,"r":8,"p":1},"salt":b64},
//!  "cipher":{"name":"nacl/secretbox","nonce":b64},"ciphertext":b64}
//! ```
//!
//! with PKCS#8 DER as its plaintext.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use crypto_secretbox::{
    Nonce, XSalsa20Poly1305,
    aead::{Aead as _, KeyInit as _},
};
use nacre_core::SecretBytes;
use rand_core::RngCore as _;
use spki::der::pem;
use zeroize::Zeroizing;

use super::SignError;
use crate::trust::json::{Fields, Json, JsonError};

const ENCRYPTED: &str = "ENCRYPTED SIGSTORE PRIVATE KEY";
const ENCRYPTED_OLD: &str = "ENCRYPTED COSIGN PRIVATE KEY";
/// The most bytes of a key file.
const FILE_LIMIT: usize = 1 << 20;
/// The most memory that scrypt may be asked for.
const MEMORY_LIMIT: u64 = 512 << 20;
/// What cosign takes: 64 MiB of memory.
const LOG_N: u8 = 16;

/// A private key in DER.
pub(super) enum PrivateKey {
    Pkcs8(Zeroizing<Vec<u8>>),
    Sec1(Zeroizing<Vec<u8>>),
}

pub(super) fn read(file: &[u8], passphrase: Option<&SecretBytes>) -> Result<PrivateKey, SignError> {
    if file.len() > FILE_LIMIT {
        return Err(SignError::Key(format!("file of more than {FILE_LIMIT} bytes")));
    }
    let (label, body) = pem::decode_vec(file).map_err(|error| SignError::Key(format!("not PEM: {error}")))?;
    let body = Zeroizing::new(body);
    match label {
        "PRIVATE KEY" => Ok(PrivateKey::Pkcs8(body)),
        "EC PRIVATE KEY" => Ok(PrivateKey::Sec1(body)),
        ENCRYPTED | ENCRYPTED_OLD => {
            let passphrase = passphrase.ok_or(SignError::Passphrase("it is encrypted"))?;
            decrypt(&body, passphrase).map(PrivateKey::Pkcs8)
        }
        other => Err(SignError::Unsupported(format!("a PEM '{other:.60}'"))),
    }
}

struct Sealed {
    log_n: u8,
    r: u32,
    p: u32,
    salt: Vec<u8>,
    nonce: Vec<u8>,
    ciphertext: Vec<u8>,
}

fn decrypt(body: &[u8], passphrase: &SecretBytes) -> Result<Zeroizing<Vec<u8>>, SignError> {
    let sealed = parse(body).map_err(|error| SignError::Key(format!("encrypted key: {error}")))?;
    let cipher = cipher(&sealed, passphrase)?;
    let nonce: [u8; 24] = sealed
        .nonce
        .as_slice()
        .try_into()
        .map_err(|_| SignError::Key("encrypted key: cipher.nonce is not 24 bytes".into()))?;
    cipher
        .decrypt(Nonce::from_slice(&nonce), sealed.ciphertext.as_slice())
        .map(Zeroizing::new)
        .map_err(|_| SignError::Passphrase("the passphrase is wrong, or the file is damaged"))
}

fn cipher(sealed: &Sealed, passphrase: &SecretBytes) -> Result<XSalsa20Poly1305, SignError> {
    let invalid = |error: &dyn std::fmt::Display| SignError::Key(format!("encrypted key: scrypt: {error}"));
    let params = scrypt::Params::new(sealed.log_n, sealed.r, sealed.p, 32).map_err(|error| invalid(&error))?;
    let mut key = Zeroizing::new([0u8; 32]);
    scrypt::scrypt(passphrase.expose(), &sealed.salt, &params, key.as_mut_slice()).map_err(|error| invalid(&error))?;
    XSalsa20Poly1305::new_from_slice(key.as_slice()).map_err(|error| invalid(&error))
}

fn parse(body: &[u8]) -> Result<Sealed, JsonError> {
    let mut top = Json::parse(body)?.into_fields("")?;
    let mut kdf = top.fields("kdf")?;
    expect(&mut kdf, "name", "scrypt")?;
    let mut params = kdf.fields("params")?;
    let mut number = |name: &str| -> Result<u64, JsonError> {
        let place = params.place(name);
        let value = params.required(name)?.into_integer(&place)?;
        u64::try_from(value).map_err(|_| JsonError::at(&place, "is negative"))
    };
    let (n, r, p) = (number("N")?, number("r")?, number("p")?);
    let memory = n.checked_mul(r).and_then(|product| product.checked_mul(128));
    if !n.is_power_of_two() || n < 2 || r == 0 || p == 0 || p > 16 || memory.is_none_or(|memory| memory > MEMORY_LIMIT)
    {
        return Err(JsonError::at("kdf.params", format!("N={n} r={r} p={p} is out of range")));
    }
    let salt = base64_field(&mut kdf, "salt")?;
    let mut cipher = top.fields("cipher")?;
    expect(&mut cipher, "name", "nacl/secretbox")?;
    Ok(Sealed {
        log_n: u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX),
        r: u32::try_from(r).unwrap_or(u32::MAX),
        p: u32::try_from(p).unwrap_or(u32::MAX),
        salt,
        nonce: base64_field(&mut cipher, "nonce")?,
        ciphertext: base64_field(&mut top, "ciphertext")?,
    })
}

fn expect(fields: &mut Fields, name: &str, value: &str) -> Result<(), JsonError> {
    let place = fields.place(name);
    let found = fields.string(name)?;
    if found == value { Ok(()) } else { Err(JsonError::at(&place, format!("is '{found:.40}', not '{value}'"))) }
}

fn base64_field(fields: &mut Fields, name: &str) -> Result<Vec<u8>, JsonError> {
    let place = fields.place(name);
    STANDARD.decode(fields.string(name)?).map_err(|error| JsonError::at(&place, format!("is not base64: {error}")))
}

/// Encrypts a PKCS#8 key as cosign does.
pub(super) fn encrypt(pkcs8: &[u8], passphrase: &SecretBytes) -> Result<String, SignError> {
    let mut salt = vec![0u8; 32];
    let mut nonce = [0u8; 24];
    rand_core::OsRng.fill_bytes(&mut salt);
    rand_core::OsRng.fill_bytes(&mut nonce);
    let sealed = Sealed { log_n: LOG_N, r: 8, p: 1, salt, nonce: nonce.to_vec(), ciphertext: Vec::new() };
    let ciphertext = cipher(&sealed, passphrase)?
        .encrypt(Nonce::from_slice(&nonce), pkcs8)
        .map_err(|error| SignError::Sign(error.to_string()))?;
    let json = serde_json::json!({
        "kdf": {
            "name": "scrypt",
            "params": {"N": 1u32 << LOG_N, "r": sealed.r, "p": sealed.p},
            "salt": STANDARD.encode(&sealed.salt),
        },
        "cipher": {"name": "nacl/secretbox", "nonce": STANDARD.encode(nonce)},
        "ciphertext": STANDARD.encode(ciphertext),
    });
    pem::encode_string(ENCRYPTED, pem::LineEnding::LF, json.to_string().as_bytes())
        .map_err(|error| SignError::Sign(error.to_string()))
}

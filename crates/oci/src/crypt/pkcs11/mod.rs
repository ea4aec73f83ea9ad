//! Keys wrapped by RSA-OAEP for keys in PKCS#11 tokens.
//!
//! ```text
//! {"version":0,"recipients":[{"version":0,"blob":"<b64 RSA-OAEP of PRIV>","hash":"sha1|sha256"}]}
//! ```
//!
//! An absent hash is sha1; the mask is of the same hash. A key in a token is named by a YAML file with a URI (RFC 7512):
//!
//! ```text
//! pkcs11:
//!   uri: pkcs11:token=T;object=O?module-path=/usr/lib/x.so&pin-value=1234
//! module:
//!   env:
//!     SOFTHSM2_CONF: /etc/softhsm2.conf
//! ```
//!
//! `env` is checked, not set: changing the environment of a program with threads is not sound.

#[cfg(feature = "pkcs11")]
mod token;
mod uri;

use std::collections::BTreeMap;

use aws_lc_rs::rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{SecretBytes, jose::PublicKey};
use serde::{Deserialize, Serialize};

pub use self::uri::Uri;
use super::SchemeError;

/// The most bytes of a packet.
pub const PACKET_LIMIT: usize = 1 << 20;
/// The most recipients of a packet: each may cost an operation of a token.
pub const RECIPIENT_LIMIT: usize = 64;
/// Chooses the hash for encryption, as it does for peers: `sha1` (SoftHSM knows no other) or `sha256`.
pub const HASH_VARIABLE: &str = "OCICRYPT_OAEP_HASHALG";

/// The hash of RSA-OAEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1, for tokens that know no other. Sound within OAEP.
    Sha1,
    /// SHA-256.
    Sha256,
}

impl Hash {
    /// Reads [`HASH_VARIABLE`]; SHA-256 where it is not set.
    ///
    /// # Errors
    /// [`SchemeError::Unsupported`]
    pub fn from_env() -> Result<Self, SchemeError> {
        match std::env::var(HASH_VARIABLE).unwrap_or_default().to_ascii_lowercase().as_str() {
            "" | "sha256" => Ok(Self::Sha256),
            "sha1" => Ok(Self::Sha1),
            other => Err(SchemeError::Unsupported(format!("the OAEP hash '{other:.40}' of {HASH_VARIABLE}"))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }
}

/// A key in a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenKey {
    uri: Uri,
    env: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct KeyFileDocument {
    pkcs11: UriDocument,
    #[serde(default)]
    module: Option<ModuleDocument>,
}

#[derive(Deserialize)]
struct UriDocument {
    uri: String,
}

#[derive(Deserialize)]
struct ModuleDocument {
    #[serde(default)]
    env: Option<BTreeMap<String, String>>,
}

impl TokenKey {
    /// Parses a YAML key file, or a bare URI.
    ///
    /// # Errors
    /// [`SchemeError::Malformed`]
    pub fn parse(text: &str) -> Result<Self, SchemeError> {
        const LIMIT: usize = 64 << 10;
        if text.len() > LIMIT {
            return Err(SchemeError::malformed(format!("a PKCS#11 key file of more than {LIMIT} bytes")));
        }
        let bare = text.trim();
        if bare.starts_with("pkcs11:") && !bare.contains(char::is_whitespace) {
            return Ok(Self { uri: bare.parse()?, env: BTreeMap::new() });
        }
        let document: KeyFileDocument = serde_saphyr::from_str(text)
            // Without the parser's words: they quote the text, and a PIN may be in it.
            .map_err(|_| {
                SchemeError::malformed("it is no PKCS#11 key file: expected YAML with pkcs11: uri: pkcs11:…")
            })?;
        let env = document.module.and_then(|module| module.env).unwrap_or_default();
        Ok(Self { uri: document.pkcs11.uri.parse()?, env })
    }

    fn check_env(&self) -> Result<(), SchemeError> {
        for (name, value) in &self.env {
            if std::env::var(name).ok().as_deref() != Some(value) {
                let problem =
                    format!("the key file needs {name:.60}={value:.200} in the environment: set it and start again");
                return Err(SchemeError::Token(problem));
            }
        }
        Ok(())
    }

    /// Has the token decrypt.
    fn decrypt(&self, wrapped: &[u8], hash: Hash) -> Result<SecretBytes, SchemeError> {
        self.check_env()?;
        token::decrypt(&self.uri, wrapped, hash)
    }

    /// Has the token encrypt to the public key that it holds.
    fn encrypt(&self, private: &SecretBytes, hash: Hash) -> Result<Vec<u8>, SchemeError> {
        self.check_env()?;
        token::encrypt(&self.uri, private, hash)
    }
}

/// Somebody whose private key is in a token.
pub enum Recipient {
    /// The public half, out of a file.
    Public(PublicKey),
    /// The public half in the token too.
    Token(TokenKey),
}

/// A packet, parsed.
#[derive(Debug, PartialEq, Eq)]
pub struct Packet(Vec<(Vec<u8>, Hash)>);

#[derive(Serialize, Deserialize)]
struct PacketDocument {
    #[serde(default)]
    version: u64,
    recipients: Vec<RecipientDocument>,
}

#[derive(Serialize, Deserialize)]
struct RecipientDocument {
    #[serde(default)]
    version: u64,
    blob: String,
    #[serde(default)]
    hash: String,
}

impl Packet {
    /// Parses the JSON.
    ///
    /// # Errors
    /// [`SchemeError`]: malformed, or another version or hash.
    pub fn parse(json: &[u8]) -> Result<Self, SchemeError> {
        if json.len() > PACKET_LIMIT {
            return Err(SchemeError::malformed(format!(
                "it has {} bytes; at most {PACKET_LIMIT} are allowed",
                json.len()
            )));
        }
        let document: PacketDocument = serde_json::from_slice(json)
            .map_err(|error| SchemeError::malformed(format!("it is not valid JSON: {error}")))?;
        if document.recipients.len() > RECIPIENT_LIMIT {
            return Err(SchemeError::malformed(format!("it has more than {RECIPIENT_LIMIT} recipients")));
        }
        let versions =
            [document.version].into_iter().chain(document.recipients.iter().map(|recipient| recipient.version));
        if let Some(version) = versions.into_iter().find(|version| *version != 0) {
            return Err(SchemeError::Unsupported(format!("packet version {version}")));
        }
        let recipients = document.recipients.iter().map(|recipient| {
            let hash = match recipient.hash.as_str() {
                "" | "sha1" => Hash::Sha1,
                "sha256" => Hash::Sha256,
                other => return Err(SchemeError::Unsupported(format!("the OAEP hash '{other:.40}'"))),
            };
            let blob = STANDARD
                .decode(&recipient.blob)
                .map_err(|error| SchemeError::malformed(format!("a blob is not base64: {error}")))?;
            Ok((blob, hash))
        });
        recipients.collect::<Result<_, _>>().map(Self)
    }

    /// Tries each key on each recipient's blob.
    ///
    /// # Errors
    /// [`SchemeError`]: the last thing that went wrong.
    pub fn open(&self, keys: &[TokenKey]) -> Result<SecretBytes, SchemeError> {
        let mut last = SchemeError::NotForUs(keys.len());
        for (blob, hash) in &self.0 {
            for key in keys {
                match key.decrypt(blob, *hash) {
                    Ok(plain) => return Ok(plain),
                    Err(error) => last = error,
                }
            }
        }
        Err(last)
    }
}

/// Wraps a PRIV document for all recipients in one packet.
///
/// # Errors
/// [`SchemeError`]: a key is no RSA key or too short for the document, or a token refused.
pub fn wrap(private: &SecretBytes, recipients: &[Recipient], hash: Hash) -> Result<Vec<u8>, SchemeError> {
    if recipients.len() > RECIPIENT_LIMIT {
        return Err(SchemeError::Unsupported(format!("more than {RECIPIENT_LIMIT} PKCS#11 recipients")));
    }
    let mut document = PacketDocument { version: 0, recipients: Vec::new() };
    for recipient in recipients {
        let blob = match recipient {
            Recipient::Public(key) => encrypt(private, key, hash)?,
            Recipient::Token(key) => key.encrypt(private, hash)?,
        };
        let recipient = RecipientDocument { version: 0, blob: STANDARD.encode(blob), hash: hash.name().into() };
        document.recipients.push(recipient);
    }
    serde_json::to_vec(&document).map_err(|_| SchemeError::Library("JSON"))
}

fn encrypt(private: &SecretBytes, key: &PublicKey, hash: Hash) -> Result<Vec<u8>, SchemeError> {
    let PublicKey::Rsa(key) = key else {
        return Err(SchemeError::Unsupported(format!("a key of the kind {} for PKCS#11: it takes RSA", key.kind())));
    };
    let failed = || SchemeError::Library("RSA-OAEP");
    let algorithm = match hash {
        Hash::Sha1 => &OAEP_SHA1_MGF1SHA1,
        Hash::Sha256 => &OAEP_SHA256_MGF1SHA256,
    };
    let key = OaepPublicEncryptingKey::new(key.encrypting_key().map_err(|_| failed())?).map_err(|_| failed())?;
    if private.len() > key.max_plaintext_size(algorithm) {
        let bits = key.key_size_bits();
        return Err(SchemeError::Unsupported(format!(
            "an RSA key of {bits} bits with {}: the layer's key document has {} bytes; take a longer key",
            hash.name(),
            private.len()
        )));
    }
    let mut wrapped = vec![0; key.ciphertext_size()];
    let length = key.encrypt(algorithm, private.expose(), &mut wrapped, None).map_err(|_| failed())?.len();
    wrapped.truncate(length);
    Ok(wrapped)
}

#[cfg(not(feature = "pkcs11"))]
mod token {
    //! Built without tokens: the guest does not load shared libraries.

    use nacre_core::SecretBytes;

    use super::{Hash, SchemeError, Uri};

    fn absent<T>() -> Result<T, SchemeError> {
        Err(SchemeError::Unsupported("PKCS#11 (this program is built without it)".into()))
    }

    pub(super) fn decrypt(_uri: &Uri, _wrapped: &[u8], _hash: Hash) -> Result<SecretBytes, SchemeError> {
        absent()
    }

    pub(super) fn encrypt(_uri: &Uri, _private: &SecretBytes, _hash: Hash) -> Result<Vec<u8>, SchemeError> {
        absent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_are_read() {
        let uri = "pkcs11:token=t;object=o?module-path=/m.so&pin-value=1234";
        let plain = TokenKey::parse(&format!("pkcs11:\n  uri: {uri}\n")).unwrap();
        assert_eq!(plain, TokenKey::parse(&format!("  {uri}\n")).unwrap());
        let full = TokenKey::parse(&format!("pkcs11:\n  uri: {uri}\nmodule:\n  env:\n    NACRE_NOT_SET: x\n")).unwrap();
        assert_eq!(full.env.len(), 1);
        assert!(
            matches!(full.decrypt(b"", Hash::Sha1), Err(SchemeError::Token(text)) if text.contains("NACRE_NOT_SET"))
        );
        for bad in [
            "",
            "pkcs11:",
            "pkcs11: {}",
            "pkcs11:\n  uri: http://x",
            "a: [",
            "pkcs11:\n  uri: 'pkcs11:pin-value=1;'\n  x: [",
        ] {
            assert!(TokenKey::parse(bad).is_err(), "{bad}");
        }
        let error = TokenKey::parse("pkcs11:\n  uri: {pin: s3cret}").unwrap_err();
        assert!(!error.to_string().contains("s3cret"));
    }

    #[test]
    fn packets_are_read() {
        let good = r#"{"version":0,"recipients":[{"version":0,"blob":"AQ==","hash":"sha256"},{"blob":"Ag=="}]}"#;
        let expected = Packet(vec![(vec![1], Hash::Sha256), (vec![2], Hash::Sha1)]);
        assert_eq!(Packet::parse(good.as_bytes()).unwrap(), expected);
        let many = format!(r#"{{"recipients":[{}]}}"#, vec![r#"{"blob":""}"#; RECIPIENT_LIMIT + 1].join(","));
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"recipients":null}"#,
            r#"{"recipients":[{}]}"#,
            r#"{"version":1,"recipients":[]}"#,
            r#"{"recipients":[{"version":1,"blob":""}]}"#,
            r#"{"recipients":[{"blob":"!"}]}"#,
            r#"{"recipients":[{"blob":"","hash":"md5"}]}"#,
            &many,
        ] {
            assert!(Packet::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(Packet::parse(&vec![b' '; PACKET_LIMIT + 1]).is_err());
    }
}

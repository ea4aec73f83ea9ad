//! JSON Web Encryption (RFC 7516): compact, flattened and general serialisation, content always A256GCM.
//!
//! ```text
//! flattened  {"protected","encrypted_key","iv","ciphertext","tag"}        one recipient; what the key broker answers
//! general    {"protected","recipients":[{"header","encrypted_key"}],"iv","ciphertext","tag"}
//! compact    protected.encrypted_key.iv.ciphertext.tag
//! ```
//!
//! With one recipient all header members are protected, as compact JSON in the order alg, enc, epk{crv,kty,x,y}: Trustee's client parses
//! and writes the header again before it uses it as associated data. With several, `enc` is protected and the rest is in each
//! recipient's header, as go-jose (so ocicrypt, skopeo, buildah) writes and expects it.
//!
//! Invariants: the three headers share no member (§4); `crit` and `zip` are refused; AAD is the protected header as it was received,
//! and `.aad` after it where there is one (§5.1).

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    JoseError, Jwk, KeyAlgorithm, PrivateKey, PublicKey, b64,
    wrap::{self, Wrapped},
};
use crate::{SecretArray, SecretBytes, aead::AeadKey};

/// Bytes of a serialised JWE that are read at most.
const LONGEST: usize = 16 * 1024 * 1024;
/// Recipients of a JWE at most.
const MOST_RECIPIENTS: usize = 64;
const LONGEST_HEADER: usize = 16 * 1024;
const ENC: &str = "A256GCM";

/// Somebody who shall be able to decrypt.
#[derive(Clone, Debug)]
pub struct Recipient<'a> {
    key: &'a PublicKey,
    algorithm: KeyAlgorithm,
    kid: Option<String>,
}

impl<'a> Recipient<'a> {
    /// A recipient with the usual algorithm of its key: ECDH-ES+A256KW, or RSA-OAEP, which every ocicrypt program reads.
    pub fn new(key: &'a PublicKey) -> Self {
        let algorithm = match key {
            PublicKey::Rsa(_) => KeyAlgorithm::RsaOaep,
            _ => KeyAlgorithm::EcdhEsA256Kw,
        };
        Self { key, algorithm, kid: None }
    }

    /// Chooses the algorithm.
    #[must_use]
    pub fn algorithm(mut self, algorithm: KeyAlgorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// Names the recipient's key in the header.
    #[must_use]
    pub fn kid(mut self, kid: impl Into<String>) -> Self {
        self.kid = Some(kid.into());
        self
    }
}

/// An encrypted object, as read or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwe {
    /// base64url of the protected header, as received.
    protected: String,
    unprotected: Header,
    recipients: Vec<Sealed>,
    aad: Option<String>,
    iv: Vec<u8>,
    ciphertext: Vec<u8>,
    tag: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sealed {
    header: Header,
    encrypted_key: Vec<u8>,
}

/// The header members that we know. The order is the order on the wire.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
struct Header {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alg: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    enc: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epk: Option<EphemeralKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apu: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zip: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crit: Option<serde_json::Value>,
}

/// `epk` with its members in the order of the alphabet.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct EphemeralKey {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

impl EphemeralKey {
    fn to_jwk(&self) -> Jwk {
        // An EC key in everything but a wrong `kty`, which `to_public` then refuses.
        let mut jwk = Jwk::ec(&self.crv, &self.x, &self.y);
        jwk.kty.clone_from(&self.kty);
        jwk
    }
}

impl Header {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The union of headers that must not share a member.
    fn union<'a>(headers: impl IntoIterator<Item = &'a Self>) -> Result<Self, JoseError> {
        fn merge<T: Clone>(into: &mut Option<T>, from: Option<&T>, name: &str) -> Result<(), JoseError> {
            match (&into, from) {
                (Some(_), Some(_)) => Err(bad(format!("header member '{name}' is there twice"))),
                (None, Some(value)) => {
                    *into = Some(value.clone());
                    Ok(())
                }
                _ => Ok(()),
            }
        }
        let mut all = Self::default();
        for header in headers {
            merge(&mut all.alg, header.alg.as_ref(), "alg")?;
            merge(&mut all.enc, header.enc.as_ref(), "enc")?;
            merge(&mut all.epk, header.epk.as_ref(), "epk")?;
            merge(&mut all.kid, header.kid.as_ref(), "kid")?;
            merge(&mut all.apu, header.apu.as_ref(), "apu")?;
            merge(&mut all.apv, header.apv.as_ref(), "apv")?;
            merge(&mut all.zip, header.zip.as_ref(), "zip")?;
            merge(&mut all.crit, header.crit.as_ref(), "crit")?;
        }
        if all.crit.is_some() || all.zip.is_some() {
            return Err(JoseError::unsupported("JWE header member", if all.zip.is_some() { "zip" } else { "crit" }));
        }
        match all.enc.as_deref() {
            Some(ENC) => Ok(all),
            other => Err(JoseError::unsupported("content encryption", other.unwrap_or("(none)"))),
        }
    }
}

/// The JSON forms on the wire; which one it is shows in the members that are there.
#[derive(Default, Deserialize, Serialize)]
struct Wire {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    protected: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unprotected: Option<Header>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<Header>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encrypted_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recipients: Option<Vec<WireRecipient>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    aad: Option<String>,
    iv: String,
    ciphertext: String,
    tag: String,
}

#[derive(Default, Deserialize, Serialize)]
struct WireRecipient {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<Header>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encrypted_key: Option<String>,
}

fn bad(why: impl Into<String>) -> JoseError {
    JoseError::malformed("JWE", why)
}

/// Encrypts to all of `recipients`.
///
/// # Errors
/// [`JoseError`]: there is no recipient, too many, or an algorithm does not go with its key.
pub fn encrypt(plaintext: &[u8], recipients: &[Recipient<'_>]) -> Result<Jwe, JoseError> {
    if recipients.is_empty() || recipients.len() > MOST_RECIPIENTS {
        return Err(bad(format!("{} recipients: 1 to {MOST_RECIPIENTS} are possible", recipients.len())));
    }
    let cek_secret = SecretArray::<32>::random();
    let cek = Zeroizing::new(*cek_secret.expose());
    let mut sealed = Vec::with_capacity(recipients.len());
    for recipient in recipients {
        let (encrypted_key, epk) = wrap::wrap(recipient.key, recipient.algorithm, &cek)?;
        let epk = epk.map(|jwk| EphemeralKey {
            crv: jwk.crv.clone().unwrap_or_default(),
            kty: jwk.kty.clone(),
            x: jwk.x.clone().unwrap_or_default(),
            y: jwk.y.clone().unwrap_or_default(),
        });
        let header = Header {
            alg: Some(recipient.algorithm.name().into()),
            epk,
            kid: recipient.kid.clone(),
            ..Header::default()
        };
        sealed.push(Sealed { header, encrypted_key });
    }
    let mut protected = Header { enc: Some(ENC.into()), ..Header::default() };
    if let [only] = sealed.as_mut_slice() {
        let header = std::mem::take(&mut only.header);
        protected = Header { enc: protected.enc, ..header };
    }
    let protected = serde_json::to_vec(&protected).map_err(|e| bad(e.to_string()))?;
    let mut jwe = Jwe {
        protected: b64::encode(protected),
        unprotected: Header::default(),
        recipients: sealed,
        aad: None,
        iv: Vec::new(),
        ciphertext: Vec::new(),
        tag: Vec::new(),
    };
    // One message under a fresh key: any nonce does.
    let mut sealed = AeadKey::new(&cek_secret).seal_random(jwe.protected.as_bytes(), plaintext);
    jwe.tag = sealed.split_off(sealed.len() - crate::aead::TAG_LEN);
    jwe.ciphertext = sealed.split_off(crate::aead::NONCE_LEN);
    jwe.iv = sealed;
    Ok(jwe)
}

impl Jwe {
    /// Reads any of the serialisations. Pure; nothing is decrypted.
    ///
    /// # Errors
    /// [`JoseError`]: not a JWE, too long, or one that asks for what we do not do.
    pub fn parse(bytes: &[u8]) -> Result<Self, JoseError> {
        if bytes.len() > LONGEST {
            return Err(bad(format!("{} bytes: at most {LONGEST} are read", bytes.len())));
        }
        let bytes = bytes.trim_ascii();
        let jwe = if bytes.starts_with(b"{") { Self::parse_json(bytes) } else { Self::parse_compact(bytes) }?;
        let protected = jwe.protected_header()?;
        for recipient in &jwe.recipients {
            Header::union([&protected, &jwe.unprotected, &recipient.header])?;
        }
        Ok(jwe)
    }

    fn parse_compact(bytes: &[u8]) -> Result<Self, JoseError> {
        let text = std::str::from_utf8(bytes).map_err(|_| bad("neither JSON nor the compact form"))?;
        let parts: Vec<&str> = text.splitn(6, '.').collect();
        let [protected, encrypted_key, iv, ciphertext, tag] = parts.as_slice() else {
            return Err(bad("neither JSON nor five parts with dots between"));
        };
        Ok(Self {
            protected: (*protected).to_owned(),
            unprotected: Header::default(),
            recipients: vec![Sealed { header: Header::default(), encrypted_key: b64::decode(encrypted_key)? }],
            aad: None,
            iv: b64::decode(iv)?,
            ciphertext: b64::decode(ciphertext)?,
            tag: b64::decode(tag)?,
        })
    }

    fn parse_json(bytes: &[u8]) -> Result<Self, JoseError> {
        let wire: Wire = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        let listed = match wire.recipients {
            // go-jose 2 (skopeo's until 2023) repeats the first recipient's key outside the list.
            Some(list)
                if wire.header.is_some()
                    || wire.encrypted_key.is_some()
                        && wire.encrypted_key != list.first().and_then(|first| first.encrypted_key.clone()) =>
            {
                return Err(bad("both the general and the flattened form"));
            }
            Some(list) => list,
            None => vec![WireRecipient { header: wire.header, encrypted_key: wire.encrypted_key }],
        };
        if listed.is_empty() || listed.len() > MOST_RECIPIENTS {
            return Err(bad(format!("{} recipients: 1 to {MOST_RECIPIENTS} are possible", listed.len())));
        }
        let recipients = listed
            .into_iter()
            .map(|recipient| {
                Ok(Sealed {
                    header: recipient.header.unwrap_or_default(),
                    encrypted_key: b64::decode(recipient.encrypted_key.unwrap_or_default())?,
                })
            })
            .collect::<Result<_, JoseError>>()?;
        Ok(Self {
            protected: wire.protected,
            unprotected: wire.unprotected.unwrap_or_default(),
            recipients,
            aad: wire.aad,
            iv: b64::decode(wire.iv)?,
            ciphertext: b64::decode(wire.ciphertext)?,
            tag: b64::decode(wire.tag)?,
        })
    }

    fn protected_header(&self) -> Result<Header, JoseError> {
        if self.protected.len() > LONGEST_HEADER {
            return Err(bad(format!("a protected header of {} bytes", self.protected.len())));
        }
        if self.protected.is_empty() {
            return Ok(Header::default());
        }
        serde_json::from_slice(&b64::decode(&self.protected)?).map_err(|e| bad(format!("protected header: {e}")))
    }

    /// The JSON form: flattened for one recipient, general for several.
    pub fn to_json(&self) -> String {
        let some = |header: &Header| (!header.is_empty()).then(|| header.clone());
        let mut wire = Wire {
            protected: self.protected.clone(),
            unprotected: some(&self.unprotected),
            aad: self.aad.clone(),
            iv: b64::encode(&self.iv),
            ciphertext: b64::encode(&self.ciphertext),
            tag: b64::encode(&self.tag),
            ..Wire::default()
        };
        if let [only] = self.recipients.as_slice() {
            wire.header = some(&only.header);
            wire.encrypted_key = Some(b64::encode(&only.encrypted_key));
        } else {
            let list = self.recipients.iter().map(|recipient| WireRecipient {
                header: some(&recipient.header),
                encrypted_key: Some(b64::encode(&recipient.encrypted_key)),
            });
            wire.recipients = Some(list.collect());
        }
        // Strings and options of strings always serialise.
        serde_json::to_string(&wire).unwrap_or_default()
    }

    /// The compact form.
    ///
    /// # Errors
    /// [`JoseError::Unsupported`] when there is more than one recipient or anything outside the protected header.
    pub fn to_compact(&self) -> Result<String, JoseError> {
        match self.recipients.as_slice() {
            [only] if only.header.is_empty() && self.unprotected.is_empty() && self.aad.is_none() => Ok(format!(
                "{}.{}.{}.{}.{}",
                self.protected,
                b64::encode(&only.encrypted_key),
                b64::encode(&self.iv),
                b64::encode(&self.ciphertext),
                b64::encode(&self.tag)
            )),
            _ => Err(JoseError::unsupported("compact form of a JWE", "several recipients or unprotected headers")),
        }
    }

    /// Decrypts with the first of `keys` that opens one of the wrapped keys.
    ///
    /// # Errors
    /// [`JoseError::NoKeyFits`] or [`JoseError::ContentTampered`]; [`JoseError::Unsupported`] when no recipient has an algorithm we know.
    pub fn decrypt(&self, keys: &[PrivateKey]) -> Result<SecretBytes, JoseError> {
        self.decrypt_with(keys.iter())
    }

    /// [`decrypt`](Self::decrypt) with keys that are kept elsewhere.
    ///
    /// # Errors
    /// As [`decrypt`](Self::decrypt).
    pub fn decrypt_with<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k PrivateKey> + Clone,
    ) -> Result<SecretBytes, JoseError> {
        let protected = self.protected_header()?;
        let mut unsupported = None;
        for recipient in &self.recipients {
            let header = Header::union([&protected, &self.unprotected, &recipient.header])?;
            let name = header.alg.as_deref().ok_or_else(|| bad("no 'alg'"))?;
            let algorithm = match KeyAlgorithm::from_name(name) {
                Ok(algorithm) => algorithm,
                Err(error) => {
                    unsupported = Some(error);
                    continue;
                }
            };
            let epk = header.epk.as_ref().map(EphemeralKey::to_jwk);
            let apu = b64::decode(header.apu.as_deref().unwrap_or_default())?;
            let apv = b64::decode(header.apv.as_deref().unwrap_or_default())?;
            let wrapped =
                Wrapped { algorithm, epk: epk.as_ref(), apu: &apu, apv: &apv, encrypted_key: &recipient.encrypted_key };
            for key in keys.clone() {
                if let Some(cek) = wrap::unwrap(key, &wrapped) {
                    return self.open(&cek);
                }
            }
        }
        let tried = keys.into_iter().count();
        match unsupported {
            Some(error) if self.recipients.len() == 1 => Err(error),
            _ => Err(JoseError::NoKeyFits { keys: tried, recipients: self.recipients.len() }),
        }
    }

    fn open(&self, cek: &[u8; 32]) -> Result<SecretBytes, JoseError> {
        let aad = match &self.aad {
            Some(aad) => format!("{}.{aad}", self.protected),
            None => self.protected.clone(),
        };
        let iv = self.iv.as_slice().try_into().map_err(|_| bad(format!("iv of {} bytes", self.iv.len())))?;
        if self.tag.len() != crate::aead::TAG_LEN {
            return Err(bad(format!("tag of {} bytes", self.tag.len())));
        }
        // One allocation of the right size, so that growing leaves no copy of the plaintext behind.
        let mut data = Vec::with_capacity(self.ciphertext.len() + self.tag.len());
        data.extend_from_slice(&self.ciphertext);
        data.extend_from_slice(&self.tag);
        match AeadKey::from_bytes(cek).open(iv, aad.as_bytes(), &mut data) {
            Ok(plain) => {
                let length = plain.len();
                data.truncate(length);
                Ok(SecretBytes::new(data))
            }
            Err(_) => {
                data.zeroize();
                Err(JoseError::ContentTampered)
            }
        }
    }
}

//! The layer cipher `AES_256_CTR_HMAC_SHA256` and the two documents that describe its use.
//!
//! ```text
//! PUB   {"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"<b64 32 bytes>","cipheroptions":{}}
//! PRIV  {"symkey":"<b64 32 bytes>","digest":"sha256:<plaintext blob>","cipheroptions":{"nonce":"<b64 16 bytes>"}}
//! ```
//!
//! PUB stands in the clear in the annotation `org.opencontainers.image.enc.pubopts`, PRIV wrapped in those of the keys. The nonce is
//! the whole initial counter block, 128 bits big-endian; it is looked up in PUB, then in PRIV. The HMAC has the same key and is
//! over the ciphertext alone, so it does *not* cover the nonce: whoever serves the image could put another nonce into PUB and
//! have a genuine ciphertext decrypt to noise. Therefore we check the digest in PRIV, which peers ignore.
//!
//! Nonce rule: each layer has a fresh random key, and a key encrypts one stream only ([`LayerEncryptor::new`] makes both).

use std::fmt;

use aws_lc_rs::{
    cipher::{AES_256, DecryptionContext, StreamingDecryptingKey, UnboundCipherKey},
    hmac,
    iv::FixedLength,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Algorithm, Digest, Hasher, SecretArray, SecretBytes};
use rand_core::{OsRng, RngCore as _};
use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use super::{CryptError, PUBOPTS_ANNOTATION};
use crate::manifest::Descriptor;

/// The one cipher of ocicrypt.
pub const CIPHER: &str = "AES_256_CTR_HMAC_SHA256";
/// The most bytes of either options document.
pub const OPTIONS_LIMIT: usize = 64 << 10;

const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 16;
const MAC_LEN: usize = 32;
/// What CTR writes to before it is copied back: small enough to stay in the L1 cache.
const SCRATCH: usize = 8 << 10;

/// What stands in the clear beside an encrypted layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicOptions {
    hmac: [u8; MAC_LEN],
    nonce: Option<[u8; NONCE_LEN]>,
}

#[derive(Deserialize)]
struct PublicDocument {
    #[serde(default, deserialize_with = "null_is_default")]
    cipher: String,
    #[serde(default, deserialize_with = "null_is_default")]
    hmac: String,
    #[serde(default, deserialize_with = "null_is_default")]
    cipheroptions: CipherOptions,
}

#[derive(Default, Deserialize)]
struct CipherOptions {
    #[serde(default)]
    nonce: Option<String>,
}

impl PublicOptions {
    /// Reads the annotation of an encrypted layer.
    ///
    /// # Errors
    /// [`CryptError::Annotation`]
    pub fn of(descriptor: &Descriptor) -> Result<Self, CryptError> {
        let text = descriptor.annotations.get(PUBOPTS_ANNOTATION).ok_or_else(|| pubopts("is missing"))?;
        if text.len() > OPTIONS_LIMIT {
            return Err(pubopts(&format!("has {} bytes; at most {OPTIONS_LIMIT} are allowed", text.len())));
        }
        let json = STANDARD.decode(text).map_err(|error| pubopts(&format!("is not base64: {error}")))?;
        Self::parse(&json)
    }

    /// Parses the JSON document.
    ///
    /// # Errors
    /// [`CryptError::Annotation`]: malformed, another cipher, no HMAC, or a field of the wrong length.
    pub fn parse(json: &[u8]) -> Result<Self, CryptError> {
        if json.len() > OPTIONS_LIMIT {
            return Err(pubopts(&format!("has {} bytes; at most {OPTIONS_LIMIT} are allowed", json.len())));
        }
        let document: PublicDocument =
            serde_json::from_slice(json).map_err(|error| pubopts(&format!("is not valid JSON: {error}")))?;
        if document.cipher != CIPHER {
            return Err(pubopts(&format!("names the cipher '{:.60}'; only {CIPHER} is supported", document.cipher)));
        }
        if document.hmac.is_empty() {
            return Err(pubopts("has no HMAC: the layer could not be authenticated"));
        }
        let hmac = decode_exact(&document.hmac).map_err(|problem| pubopts(&format!("hmac {problem}")))?;
        let nonce = (document.cipheroptions.nonce)
            .map(|nonce| decode_exact(&nonce).map_err(|problem| pubopts(&format!("nonce {problem}"))))
            .transpose()?;
        Ok(Self { hmac, nonce })
    }

    /// The JSON document, as peers write it.
    pub fn to_json(&self) -> Vec<u8> {
        let nonce =
            self.nonce.as_ref().map_or_else(String::new, |nonce| format!(r#""nonce":"{}""#, STANDARD.encode(nonce)));
        let hmac = STANDARD.encode(self.hmac);
        format!(r#"{{"cipher":"{CIPHER}","hmac":"{hmac}","cipheroptions":{{{nonce}}}}}"#).into_bytes()
    }

    /// The value of the annotation.
    pub fn to_annotation(&self) -> String {
        STANDARD.encode(self.to_json())
    }
}

/// The key of one layer, and what its encryptor recorded of the plaintext: the content of PRIV.
pub struct LayerSecret {
    key: SecretArray<KEY_LEN>,
    nonce: Option<[u8; NONCE_LEN]>,
    digest: Digest,
}

#[derive(Deserialize)]
struct PrivateDocument {
    symkey: KeyField,
    digest: Digest,
    #[serde(default, deserialize_with = "null_is_default")]
    cipheroptions: CipherOptions,
}

/// A key that is decoded in place, so that no string of it stays behind.
struct KeyField(SecretArray<KEY_LEN>);

impl<'de> Deserialize<'de> for KeyField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = KeyField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "base64 of {KEY_LEN} bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<KeyField, E> {
                // The message must not carry the text: it is a key.
                SecretArray::try_fill(|slot| decode_into(text, slot)).map(KeyField).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

impl LayerSecret {
    /// A key of something that is encrypted in another way, to be wrapped as those of layers are.
    pub fn of_key(key: SecretArray<KEY_LEN>, digest: Digest) -> Self {
        Self { key, nonce: None, digest }
    }

    /// The key, for something that is encrypted in another way.
    pub fn into_key(self) -> SecretArray<KEY_LEN> {
        self.key
    }

    /// Parses an unwrapped PRIV document.
    ///
    /// # Errors
    /// [`CryptError::PrivateOptions`]: malformed, a field of the wrong length, or no digest.
    pub fn parse(json: &SecretBytes) -> Result<Self, CryptError> {
        if json.len() > OPTIONS_LIMIT {
            let problem = format!("it has {} bytes; at most {OPTIONS_LIMIT} are allowed", json.len());
            return Err(CryptError::PrivateOptions(problem));
        }
        // serde_json quotes strings of the input in some messages ("invalid type: string …"), and these are secret.
        let document: PrivateDocument = serde_json::from_slice(json.expose()).map_err(|error| {
            let kind = match error.classify() {
                serde_json::error::Category::Data => "a field is missing, of the wrong type, or of the wrong length",
                _ => "it is not JSON",
            };
            CryptError::PrivateOptions(format!("{kind} (line {}, column {})", error.line(), error.column()))
        })?;
        let nonce = (document.cipheroptions.nonce)
            .map(|nonce| {
                decode_exact(&nonce).map_err(|problem| CryptError::PrivateOptions(format!("its nonce {problem}")))
            })
            .transpose()?;
        Ok(Self { key: document.symkey.0, nonce, digest: document.digest })
    }

    /// The PRIV document, to be wrapped for a recipient.
    pub fn to_json(&self) -> SecretBytes {
        let key = Zeroizing::new(STANDARD.encode(self.key.expose()));
        let nonce = self.nonce.map_or_else(String::new, |nonce| format!(r#""nonce":"{}""#, STANDARD.encode(nonce)));
        // One allocation: a vector that grows would leave copies of the key behind.
        let mut json = Vec::with_capacity(512);
        for part in [
            r#"{"symkey":""#,
            &key,
            r#"","digest":""#,
            &self.digest.to_string(),
            r#"","cipheroptions":{"#,
            &nonce,
            "}}",
        ] {
            json.extend_from_slice(part.as_bytes());
        }
        SecretBytes::new(json)
    }

    /// The digest that the encryptor recorded: that of the plaintext blob; of the uncompressed tar from encryptors that compressed
    /// at the same time.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// A name for the layer of this diff_id under this key: HMAC-SHA256 of the diff_id with the key, which tells nothing of it. Two
    /// layers have one name only where both the content and the key are the same.
    pub fn bind(&self, diff_id: &Digest) -> Digest {
        let tag = hmac::sign(&mac_key(&self.key), format!("nacre stored layer {diff_id}").as_bytes());
        // The name is a hash of the tag, since the key's MAC over a ciphertext is public.
        Digest::sha256(tag.as_ref())
    }

    /// What decrypts parts of the layer, for whoever knows their digests.
    ///
    /// # Errors
    /// [`CryptError::PrivateOptions`]: neither document has a nonce.
    pub fn parts(self, public: &PublicOptions) -> Result<LayerParts, CryptError> {
        let nonce = self.nonce(public)?;
        Ok(LayerParts { key: self.key, nonce })
    }

    fn nonce(&self, public: &PublicOptions) -> Result<[u8; NONCE_LEN], CryptError> {
        (public.nonce.or(self.nonce))
            .ok_or_else(|| CryptError::PrivateOptions("there is no nonce in it, nor in the public options".into()))
    }

    /// Starts to decrypt the layer.
    ///
    /// # Errors
    /// [`CryptError::PrivateOptions`]: neither document has a nonce.
    pub fn decryptor(&self, public: &PublicOptions) -> Result<LayerDecryptor, CryptError> {
        let nonce = self.nonce(public)?;
        Ok(LayerDecryptor {
            stream: Stream::new(&self.key, nonce)?,
            mac: hmac::Context::with_key(&mac_key(&self.key)),
            expected_mac: public.hmac,
            plaintext: Some(Hasher::new(self.digest.algorithm())),
            expected: self.digest,
        })
    }
}

impl fmt::Debug for LayerSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerSecret(…)")
    }
}

/// Decrypts parts of a layer. The layer's MAC says nothing of a part: the caller verifies the ciphertext by a digest of its own.
pub struct LayerParts {
    key: SecretArray<KEY_LEN>,
    nonce: [u8; NONCE_LEN],
}

impl LayerParts {
    /// Bytes of [`to_secret`](Self::to_secret).
    pub const SECRET_LEN: usize = KEY_LEN + NONCE_LEN;

    /// Key and nonce, for a process that is to decrypt in the place of this one.
    pub fn to_secret(&self) -> SecretArray<{ Self::SECRET_LEN }> {
        SecretArray::fill(|slot| {
            let (key, nonce) = slot.split_at_mut(KEY_LEN);
            key.copy_from_slice(self.key.expose());
            nonce.copy_from_slice(&self.nonce);
        })
    }

    /// From the same.
    pub fn from_secret(secret: &SecretArray<{ Self::SECRET_LEN }>) -> Self {
        let (key, rest) = secret.expose().split_at(KEY_LEN);
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(rest);
        Self { key: SecretArray::fill(|slot| slot.copy_from_slice(key)), nonce }
    }

    /// Decrypts, in place, the bytes of the layer that begin at `offset`.
    ///
    /// # Errors
    /// [`CryptError::Cipher`]
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) -> Result<(), CryptError> {
        let mut block = [0; 16];
        let counter = u128::from_be_bytes(self.nonce).wrapping_add((offset / 16).into());
        let mut stream = Stream::new(&self.key, counter.to_be_bytes())?;
        let before = usize::try_from(offset % 16).unwrap_or(0);
        stream.apply(block.get_mut(..before).unwrap_or_default())?;
        data.chunks_mut(SCRATCH).try_for_each(|piece| stream.apply(piece))
    }

    /// A name for the key and the nonce, which tells nothing of them: whoever has another one decrypts to noise.
    pub fn name(&self) -> [u8; 32] {
        let mut message = b"nacre layer parts ".to_vec();
        message.extend_from_slice(&self.nonce);
        let tag = hmac::sign(&mac_key(&self.key), &message);
        let mut name = [0; 32];
        name.copy_from_slice(Digest::sha256(tag.as_ref()).as_bytes());
        name
    }
}

impl fmt::Debug for LayerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerParts(…)")
    }
}

/// Decrypts one layer. Nothing that [`update`](Self::update) gave is to be believed before [`finish`](Self::finish) has said so.
pub struct LayerDecryptor {
    stream: Stream,
    mac: hmac::Context,
    expected_mac: [u8; MAC_LEN],
    plaintext: Option<Hasher>,
    expected: Digest,
}

impl LayerDecryptor {
    /// Says that the caller verifies the uncompressed tar to have the digest `diff_id`.
    ///
    /// Encryptors that compress in the same run (buildah, and skopeo from sources with plain tars) record that digest instead of
    /// the compressed blob's. Then, and only then, the plaintext is not hashed here a second time.
    #[must_use]
    pub fn with_diff_id(mut self, diff_id: &Digest) -> Self {
        if *diff_id == self.expected {
            self.plaintext = None;
        }
        self
    }

    /// Decrypts the next bytes of the stream in place; chunks may have any size.
    ///
    /// # Errors
    /// [`CryptError::Cipher`]
    pub fn update(&mut self, data: &mut [u8]) -> Result<(), CryptError> {
        // Piece by piece, so that the passes after the first find the data in the L1 cache.
        for piece in data.chunks_mut(SCRATCH) {
            self.mac.update(piece);
            self.stream.apply(piece)?;
            if let Some(hasher) = &mut self.plaintext {
                hasher.update(piece);
            }
        }
        Ok(())
    }

    /// Checks that the whole stream was what the encryptor encrypted.
    ///
    /// # Errors
    /// [`CryptError::Mac`] or [`CryptError::Digest`]: nothing of the plaintext is to be used.
    pub fn finish(self) -> Result<(), CryptError> {
        let found = self.mac.sign();
        aws_lc_rs::constant_time::verify_slices_are_equal(found.as_ref(), &self.expected_mac)
            .map_err(|_| CryptError::Mac)?;
        match self.plaintext.map(Hasher::finish) {
            Some(found) if found != self.expected => Err(CryptError::Digest { expected: self.expected, found }),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for LayerDecryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerDecryptor(…)")
    }
}

/// Encrypts one layer under a key of its own.
pub struct LayerEncryptor {
    key: SecretArray<KEY_LEN>,
    nonce: [u8; NONCE_LEN],
    stream: Stream,
    mac: hmac::Context,
    plaintext: Hasher,
}

impl LayerEncryptor {
    /// Makes a fresh key and nonce.
    ///
    /// # Errors
    /// [`CryptError::Cipher`]
    pub fn new() -> Result<Self, CryptError> {
        let key = SecretArray::random();
        let mut nonce = [0; NONCE_LEN];
        OsRng.fill_bytes(&mut nonce);
        Ok(Self {
            stream: Stream::new(&key, nonce)?,
            mac: hmac::Context::with_key(&mac_key(&key)),
            plaintext: Hasher::new(Algorithm::Sha256),
            key,
            nonce,
        })
    }

    /// Encrypts the next bytes of the stream in place; chunks may have any size.
    ///
    /// # Errors
    /// [`CryptError::Cipher`]
    pub fn update(&mut self, data: &mut [u8]) -> Result<(), CryptError> {
        for piece in data.chunks_mut(SCRATCH) {
            self.plaintext.update(piece);
            self.stream.apply(piece)?;
            self.mac.update(piece);
        }
        Ok(())
    }

    /// Ends the layer; gives what is to be wrapped and what stands in the clear.
    pub fn finish(self) -> (LayerSecret, PublicOptions) {
        let mut hmac = [0; MAC_LEN];
        for (slot, byte) in hmac.iter_mut().zip(self.mac.sign().as_ref()) {
            *slot = *byte;
        }
        let secret = LayerSecret { key: self.key, nonce: Some(self.nonce), digest: self.plaintext.finish() };
        (secret, PublicOptions { hmac, nonce: None })
    }
}

impl fmt::Debug for LayerEncryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerEncryptor(…)")
    }
}

/// AES-256-CTR, a stream with a 128-bit big-endian counter. aws-lc's is half as fast again as the `ctr` crate's, needs no optimisation
/// to be so, and clears its keys; it does not work in place, hence the scratch buffer.
struct Stream {
    key: StreamingDecryptingKey,
    scratch: Zeroizing<Vec<u8>>,
}

impl Stream {
    fn new(key: &SecretArray<KEY_LEN>, nonce: [u8; NONCE_LEN]) -> Result<Self, CryptError> {
        let key = UnboundCipherKey::new(&AES_256, key.expose()).map_err(|_| CryptError::Cipher)?;
        // Counter mode decrypts as it encrypts, and only the decrypting key takes a nonce that was chosen elsewhere.
        let key = StreamingDecryptingKey::ctr(key, DecryptionContext::Iv128(FixedLength::from(nonce)))
            .map_err(|_| CryptError::Cipher)?;
        // The library asks for the room of one block more.
        Ok(Self { key, scratch: Zeroizing::new(vec![0; SCRATCH + 16]) })
    }

    fn apply(&mut self, piece: &mut [u8]) -> Result<(), CryptError> {
        let done = self.key.update(piece, &mut self.scratch).map_err(|_| CryptError::Cipher)?;
        if done.written().len() != piece.len() {
            return Err(CryptError::Cipher);
        }
        piece.copy_from_slice(done.written());
        Ok(())
    }
}

/// Encrypts or decrypts a short text in counter mode.
pub(super) fn apply_ctr(key: &SecretArray<KEY_LEN>, nonce: [u8; NONCE_LEN], data: &mut [u8]) -> Result<(), CryptError> {
    let mut stream = Stream::new(key, nonce)?;
    data.chunks_mut(SCRATCH).try_for_each(|piece| stream.apply(piece))
}

fn mac_key(key: &SecretArray<KEY_LEN>) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, key.expose())
}

fn pubopts(problem: &str) -> CryptError {
    CryptError::Annotation { name: PUBOPTS_ANNOTATION.into(), problem: problem.into() }
}

fn decode_exact<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let mut out = [0; N];
    decode_into(text, &mut out).map(|()| out)
}

/// Decodes base64 of exactly `N` bytes; says what is wrong without quoting the text.
fn decode_into<const N: usize>(text: &str, slot: &mut [u8; N]) -> Result<(), String> {
    if text.len() != N.div_ceil(3) * 4 {
        return Err(format!("is not base64 of {N} bytes"));
    }
    // The decoder wants room for a whole last group.
    let mut buffer = Zeroizing::new([0u8; 64]);
    let length = STANDARD.decode_slice(text, &mut buffer[..]).map_err(|_| format!("is not base64 of {N} bytes"))?;
    match buffer.get(..length).and_then(|bytes| <&[u8; N]>::try_from(bytes).ok()) {
        Some(bytes) => {
            slot.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(format!("is not base64 of {N} bytes")),
    }
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests;

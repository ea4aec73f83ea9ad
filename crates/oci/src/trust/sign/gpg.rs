//! GPG simple signing with a secret key that `gpg --export-secret-keys` wrote, binary or armored.

use std::io::Cursor;

use nacre_core::{Digest, SecretBytes, SystemClock};
use pgp::{
    composed::{Deserializable as _, MessageBuilder, SignedPublicKey, SignedSecretKey},
    crypto::hash::HashAlgorithm,
    types::{KeyDetails as _, Password, SigningKey},
};
use time::OffsetDateTime;

use super::{CREATOR, SignError, payload};
use crate::{
    reference::ImageRef,
    trust::{
        gpg_key::{self, Component},
        payload::PayloadType,
    },
};

/// The most keys of a file.
const KEYS_LIMIT: usize = 1024;

/// A secret key that signs images.
pub struct GpgKey {
    key: SignedSecretKey,
    /// Which subkey signs; `None` for the primary key.
    subkey: Option<usize>,
    passphrase: Password,
}

impl std::fmt::Debug for GpgKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GpgKey({})", self.fingerprint())
    }
}

impl GpgKey {
    /// Reads a secret key. `wanted` chooses one of several by its fingerprint or key ID (at least 16 hex digits), of the primary key or of
    /// a subkey, which then signs; without it, the first key of the file that may sign, by its newest signing subkey if it has one.
    ///
    /// # Errors
    /// [`SignError`]: no such key, or one that is expired, revoked or must not sign.
    pub fn read(file: &[u8], wanted: Option<&str>, passphrase: Option<&SecretBytes>) -> Result<Self, SignError> {
        let wanted = wanted.map(|text| text.trim().trim_start_matches("0x").replace(' ', "").to_uppercase());
        if wanted.as_ref().is_some_and(|text| text.len() < 16 || !text.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Err(SignError::NoSuchKey(wanted.unwrap_or_default()));
        }
        let (keys, _) = SignedSecretKey::from_reader_many_buf(Cursor::new(file))
            .map_err(|error| SignError::Key(format!("no OpenPGP secret key: {error}")))?;
        let mut failure = SignError::NoSuchKey(wanted.clone().unwrap_or_else(|| "at all".into()));
        for key in keys.take(KEYS_LIMIT) {
            let key = key.map_err(|error| SignError::Key(error.to_string()))?;
            match choose(&key, wanted.as_deref()) {
                Ok(Some(subkey)) => {
                    let passphrase = passphrase.map_or_else(Password::empty, |secret| Password::from(secret.expose()));
                    return Ok(Self { key, subkey, passphrase });
                }
                Ok(None) => {}
                Err(error) => failure = error.into(),
            }
        }
        Err(failure)
    }

    /// The fingerprint of the primary key, which policies and people know it by; upper-case hex.
    pub fn fingerprint(&self) -> String {
        gpg_key::hex(&self.key.primary_key.fingerprint())
    }

    /// Signs that the manifest or index of `digest` has the name `reference`: a binary signed message.
    ///
    /// # Errors
    /// [`SignError`]: the passphrase is wrong, or the file has no secret part of the key (a smart card's key, say).
    pub fn sign(&self, digest: &Digest, reference: &ImageRef) -> Result<Vec<u8>, SignError> {
        let optional = serde_json::json!({"creator": CREATOR, "timestamp": OffsetDateTime::now_utc().unix_timestamp()});
        let payload = payload(digest, reference)?.encode(PayloadType::Gpg, &optional);
        let signer: &dyn SigningKey = match self.subkey.and_then(|number| self.key.secret_subkeys.get(number)) {
            Some(subkey) => &subkey.key,
            None => &self.key.primary_key,
        };
        let hash = match signer.hash_alg() {
            strong @ (HashAlgorithm::Sha384 | HashAlgorithm::Sha512) => strong,
            _ => HashAlgorithm::Sha256,
        };
        let passphrase = Password::from(self.passphrase.read().as_slice());
        let mut builder = MessageBuilder::from_bytes("", payload);
        builder.sign(signer, passphrase, hash);
        builder
            .to_vec(rand_core::OsRng)
            .map_err(|error| SignError::Sign(format!("key {}: {error}", self.fingerprint())))
    }
}

/// Which part of the key signs: `Some(None)` is the primary key, `Some(Some(n))` a subkey; `None` where the key is not the one wanted.
fn choose(key: &SignedSecretKey, wanted: Option<&str>) -> Result<Option<Option<usize>>, crate::trust::SignatureError> {
    let matches = |fingerprint: &str| wanted.is_none_or(|wanted| fingerprint.ends_with(wanted));
    let public: SignedPublicKey = key.to_public_key();
    let primary_wanted = matches(&gpg_key::hex(&key.primary_key.fingerprint()));
    let mut subkeys: Vec<(usize, u32)> = Vec::new();
    for (number, subkey) in key.secret_subkeys.iter().enumerate() {
        let fingerprint = subkey.key.fingerprint();
        if !primary_wanted && !matches(&gpg_key::hex(&fingerprint)) {
            continue;
        }
        let Some(found) = public.public_subkeys.iter().find(|public| public.key.fingerprint() == fingerprint) else {
            continue;
        };
        match gpg_key::check(&public, Component::Sub(found), &[], &SystemClock) {
            Ok(()) => subkeys.push((number, subkey.key.created_at().as_secs())),
            // A subkey asked for by name has to work; others are simply not taken.
            Err(error) if !primary_wanted => return Err(error),
            Err(_) => {}
        }
    }
    if let Some((number, _)) = subkeys.into_iter().max_by_key(|(_, created)| *created) {
        return Ok(Some(Some(number)));
    }
    if !primary_wanted {
        return Ok(None);
    }
    gpg_key::check(&public, Component::Primary(&public.primary_key), &[], &SystemClock)?;
    Ok(Some(None))
}

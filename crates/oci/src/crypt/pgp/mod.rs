//! Keys wrapped as a binary OpenPGP message: a session key for each recipient, and the PRIV document in an integrity-protected packet.
//!
//! Only SEIPD packets are opened, with their integrity checked before anything of them is used; the old unprotected ones are
//! refused. RSA keys are handed to aws-lc-rs (see `rsa`), other kinds are used by the `pgp` crate itself.

mod recipient;
mod rsa;

use std::io::Read as _;

use ::pgp::{
    composed::{Deserializable as _, Esk, Message, PlainSessionKey, SignedSecretKey},
    packet::PublicKeyEncryptedSessionKey,
    types::{DecryptionKey as _, EskType, KeyDetails as _, Password, PkeskBytes, PkeskVersion},
};
use nacre_core::{SecretBytes, jose::PrivateKey};
use zeroize::Zeroizing;

pub use self::recipient::{Certificate, certificates_of_gpg, wrap};
use super::{SchemeError, cipher::OPTIONS_LIMIT};

/// The most bytes of a message.
pub const MESSAGE_LIMIT: usize = 1 << 20;
/// The most session keys that are tried: a message may name one of our keys as often as it likes.
const ATTEMPT_LIMIT: usize = 64;
/// The most keys of a ring.
const KEY_LIMIT: usize = 1024;

/// Secret keys that can decrypt, unlocked.
pub struct SecretRing(Vec<DecryptionKey>);

struct DecryptionKey {
    key: AnyKey,
    /// RSA keys are used by another library.
    rsa: Option<PrivateKey>,
}

enum AnyKey {
    Primary(Box<::pgp::packet::SecretKey>),
    Subkey(Box<::pgp::packet::SecretSubkey>),
}

impl SecretRing {
    /// Reads a key or a ring of keys, armoured or not, and unlocks what can decrypt.
    ///
    /// # Errors
    /// [`SchemeError`]: malformed, locked by another passphrase, or no key that can decrypt.
    pub fn parse(bytes: &[u8], passphrase: Option<&SecretBytes>) -> Result<Self, SchemeError> {
        let keys: Vec<SignedSecretKey> = if bytes.starts_with(b"-----") {
            let armored = SignedSecretKey::from_armor_many(bytes).map_err(|error| bad_ring(&error))?;
            armored.0.take(KEY_LIMIT).collect::<Result<_, _>>()
        } else {
            let many = SignedSecretKey::from_bytes_many(bytes).map_err(|error| bad_ring(&error))?;
            many.take(KEY_LIMIT).collect::<Result<_, _>>()
        }
        .map_err(|error| bad_ring(&error))?;
        let password = passphrase.map_or_else(Password::empty, |text| text.expose().into());
        let mut found = Vec::new();
        let mut locked = 0;
        for key in keys {
            let subkeys = key.secret_subkeys.into_iter().map(|subkey| AnyKey::Subkey(Box::new(subkey.key)));
            for mut key in [AnyKey::Primary(Box::new(key.primary_key))].into_iter().chain(subkeys) {
                if !key.algorithm().can_encrypt() {
                    continue;
                }
                match key.unlock(&password) {
                    Ok(rsa) => found.push(DecryptionKey { key, rsa }),
                    Err(_) => locked += 1,
                }
            }
        }
        match (found.is_empty(), locked) {
            (false, _) => Ok(Self(found)),
            (true, 0) => Err(SchemeError::NoKey("it holds no OpenPGP secret key that can decrypt".into())),
            (true, _) if passphrase.is_some() => {
                Err(SchemeError::NoKey("its passphrase does not unlock the key".into()))
            }
            (true, _) => Err(SchemeError::NoKey(
                "the key is locked: give its passphrase as <file>:pass=…, :file=… or :fd=…".into(),
            )),
        }
    }
}

fn bad_ring(error: &::pgp::errors::Error) -> SchemeError {
    SchemeError::NoKey(format!("it is no OpenPGP secret key: {error}"))
}

impl AnyKey {
    fn algorithm(&self) -> ::pgp::crypto::public_key::PublicKeyAlgorithm {
        match self {
            Self::Primary(key) => key.algorithm(),
            Self::Subkey(key) => key.algorithm(),
        }
    }

    /// Takes the lock off, once, so that a message with many recipients does not cost a key derivation each.
    fn unlock(&mut self, password: &Password) -> Result<Option<PrivateKey>, ::pgp::errors::Error> {
        match self {
            Self::Primary(key) => {
                key.remove_password(password)?;
                rsa::private_key(key.public_params(), key.secret_params())
            }
            Self::Subkey(key) => {
                key.remove_password(password)?;
                rsa::private_key(key.public_params(), key.secret_params())
            }
        }
    }

    fn is_meant(&self, wrapped: &PublicKeyEncryptedSessionKey) -> bool {
        match self {
            Self::Primary(key) => wrapped.match_identity(&key.public_key()),
            Self::Subkey(key) => wrapped.match_identity(&key.public_key()),
        }
    }

    fn decrypt(&self, values: &PkeskBytes, kind: EskType) -> Option<PlainSessionKey> {
        let unlocked = Password::empty();
        match self {
            Self::Primary(key) => key.decrypt(&unlocked, values, kind),
            Self::Subkey(key) => key.decrypt(&unlocked, values, kind),
        }
        .ok()?
        .ok()
    }
}

impl DecryptionKey {
    fn session_key(&self, wrapped: &PublicKeyEncryptedSessionKey) -> Option<PlainSessionKey> {
        if !self.key.is_meant(wrapped) {
            return None;
        }
        let kind = match wrapped.version() {
            PkeskVersion::V3 => EskType::V3_4,
            PkeskVersion::V6 => EskType::V6,
            PkeskVersion::Other(_) => return None,
        };
        match (wrapped.values().ok()?, &self.rsa) {
            (PkeskBytes::Rsa { mpi }, Some(key)) => rsa::session_key(key, mpi.as_ref(), kind),
            // An RSA key that the other library does not take is not used at all.
            (PkeskBytes::Rsa { .. }, None) => None,
            (values, _) => self.key.decrypt(values, kind),
        }
    }
}

/// Opens a message with the keys at hand.
///
/// # Errors
/// [`SchemeError`]
pub fn open(message: &[u8], rings: &[SecretRing]) -> Result<SecretBytes, SchemeError> {
    if message.len() > MESSAGE_LIMIT {
        let problem = format!("it has {} bytes; at most {MESSAGE_LIMIT} are allowed", message.len());
        return Err(SchemeError::malformed(problem));
    }
    let keys: Vec<&DecryptionKey> = rings.iter().flat_map(|ring| &ring.0).collect();
    let Message::Encrypted { esk, .. } = parse(message)? else {
        return Err(SchemeError::malformed("it is not an encrypted OpenPGP message"));
    };
    let mut attempts = 0;
    for wrapped in &esk {
        let Esk::PublicKeyEncryptedSessionKey(wrapped) = wrapped else { continue };
        for key in &keys {
            let Some(session_key) = key.session_key(wrapped) else { continue };
            attempts += 1;
            if attempts > ATTEMPT_LIMIT {
                return Err(SchemeError::malformed(format!(
                    "it has more than {ATTEMPT_LIMIT} session keys for one of our keys"
                )));
            }
            if let Some(plain) = decrypt(message, session_key) {
                return Ok(plain);
            }
        }
    }
    Err(SchemeError::NotForUs(keys.len()))
}

fn parse(message: &[u8]) -> Result<Message<'_>, SchemeError> {
    Message::from_bytes(message)
        .map_err(|error| SchemeError::malformed(format!("it is not an OpenPGP message: {error}")))
}

fn decrypt(message: &[u8], session_key: PlainSessionKey) -> Option<SecretBytes> {
    let mut inner = parse(message).ok()?.decrypt_with_session_key(session_key).ok()?;
    if inner.is_compressed() {
        inner = inner.decompress().ok()?;
    }
    if !inner.is_literal() {
        return None;
    }
    // With room for all, so that no copy of the key stays where a smaller allocation was.
    let mut plain = Zeroizing::new(Vec::with_capacity(OPTIONS_LIMIT + 1));
    inner.take(OPTIONS_LIMIT as u64 + 1).read_to_end(&mut plain).ok()?;
    (plain.len() <= OPTIONS_LIMIT).then(|| SecretBytes::new(plain.to_vec()))
}

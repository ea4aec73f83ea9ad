//! AES-256-GCM with a key that says what it is for.
//!
//! Nonce rule: a caller with a counter that cannot repeat under its key passes it to [`AeadKey::seal`]; everyone else uses
//! [`AeadKey::seal_random`], whose random 96-bit nonces hold for 2^32 messages a key (NIST SP 800-38D §8.3).

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};

use crate::SecretArray;

/// Bytes of a nonce.
pub const NONCE_LEN: usize = 12;
/// Bytes of a tag.
pub const TAG_LEN: usize = 16;

/// A ciphertext, its key or its associated data is not what was sealed.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("AES-256-GCM authentication failed: wrong key, or the data was changed")]
pub struct AuthenticationFailed;

/// A key for AES-256-GCM, scheduled.
pub struct AeadKey(LessSafeKey);

impl AeadKey {
    /// Schedules a key.
    pub fn new(key: &SecretArray<32>) -> Self {
        Self::from_bytes(key.expose())
    }

    /// Schedules a key that the caller zeroizes.
    pub fn from_bytes(key: &[u8; 32]) -> Self {
        match UnboundKey::new(&AES_256_GCM, key) {
            Ok(key) => Self(LessSafeKey::new(key)),
            // Only a wrong length is refused, and the type fixes the length.
            Err(_) => unreachable!("AES-256-GCM takes 32 bytes"),
        }
    }

    /// Encrypts `data` in place and appends the tag. The nonce must never have been used with this key.
    pub fn seal(&self, nonce: [u8; NONCE_LEN], aad: &[u8], data: &mut Vec<u8>) {
        if self.0.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), data).is_err() {
            // Only more than 2^36 - 32 bytes are refused, which no vector of ours holds.
            unreachable!("AES-256-GCM message too long");
        }
    }

    /// Encrypts `data` in place and gives the tag apart. The nonce must never have been used with this key.
    pub fn seal_in_place(&self, nonce: [u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> [u8; TAG_LEN] {
        let sealed = self.0.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), data);
        let Ok(tag) = sealed else { unreachable!("AES-256-GCM message too long") };
        let mut bytes = [0; TAG_LEN];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    /// Decrypts in place what [`seal_in_place`](Self::seal_in_place) made.
    ///
    /// # Errors
    /// [`AuthenticationFailed`]: what `data` holds then is not to be used.
    pub fn open_in_place(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        tag: [u8; TAG_LEN],
        data: &mut [u8],
    ) -> Result<(), AuthenticationFailed> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.0
            .open_in_place_separate_tag(nonce, Aad::from(aad), Tag::from(tag), data, 0..)
            .map(|_| ())
            .map_err(|_| AuthenticationFailed)
    }

    /// Encrypts under a random nonce; gives nonce ‖ ciphertext ‖ tag.
    pub fn seal_random(&self, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
        use rand_core::RngCore as _;
        let mut nonce = [0; NONCE_LEN];
        rand_core::OsRng.fill_bytes(&mut nonce);
        let mut data = Vec::with_capacity(plaintext.len() + TAG_LEN);
        data.extend_from_slice(plaintext);
        self.seal(nonce, aad, &mut data);
        let mut out = nonce.to_vec();
        out.append(&mut data);
        out
    }

    /// Decrypts `data` (ciphertext ‖ tag) in place and gives the plaintext within it.
    ///
    /// # Errors
    /// [`AuthenticationFailed`]: what `data` holds then is not to be used.
    pub fn open<'a>(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], AuthenticationFailed> {
        self.0
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), data)
            .map_err(|_| AuthenticationFailed)
    }

    /// Decrypts what [`seal_random`](Self::seal_random) made.
    ///
    /// # Errors
    /// [`AuthenticationFailed`], also for what is shorter than a nonce and a tag.
    pub fn open_random(&self, aad: &[u8], sealed: &[u8]) -> Result<zeroize::Zeroizing<Vec<u8>>, AuthenticationFailed> {
        let (nonce, data) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(AuthenticationFailed)?;
        let mut data = zeroize::Zeroizing::new(data.to_vec());
        let length = self.open(*nonce, aad, &mut data)?.len();
        data.truncate(length);
        Ok(data)
    }
}

impl std::fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AeadKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_apart_are_the_same_tags() {
        let key = AeadKey::new(&SecretArray::random());
        let (mut apart, mut together) = (*b"sixteen bytes...", b"sixteen bytes...".to_vec());
        let tag = key.seal_in_place([1; 12], b"aad", &mut apart);
        key.seal([1; 12], b"aad", &mut together);
        assert_eq!([&apart[..], &tag[..]].concat(), together);
        let mut bad = apart;
        assert_eq!(key.open_in_place([1; 12], b"aae", tag, &mut bad), Err(AuthenticationFailed));
        key.open_in_place([1; 12], b"aad", tag, &mut apart).unwrap();
        assert_eq!(&apart, b"sixteen bytes...");
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let key = AeadKey::new(&SecretArray::random());
        let sealed = key.seal_random(b"aad", b"plaintext");
        assert_eq!(&*key.open_random(b"aad", &sealed).unwrap(), b"plaintext");
        assert_eq!(key.open_random(b"aae", &sealed), Err(AuthenticationFailed));
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.open_random(b"aad", &bad), Err(AuthenticationFailed), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert_eq!(key.open_random(b"aad", &sealed[..length]), Err(AuthenticationFailed));
        }
    }
}

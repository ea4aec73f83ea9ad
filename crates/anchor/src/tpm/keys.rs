//! The two secrets of an index: its authValue, which the TPM gets to know, and the key of the MAC over its content, which it does not.

use nacre_core::SecretArray;
use ring::hmac;

/// What is derived from the key that the caller gave. HMAC-SHA256 with that key, over a label for each.
#[derive(Debug)]
pub(super) struct Keys {
    /// The authorization of the index.
    pub(super) auth: SecretArray<32>,
    /// Authenticates the content, also against who learned the authorization.
    pub(super) mac: SecretArray<32>,
}

impl Keys {
    pub(super) fn derive(key: &SecretArray<32>) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.expose());
        let derive = |label: &[u8]| {
            SecretArray::fill(|slot: &mut [u8; 32]| slot.copy_from_slice(hmac::sign(&key, label).as_ref()))
        };
        Self { auth: derive(b"nacre tpm anchor 1: authValue"), mac: derive(b"nacre tpm anchor 1: content") }
    }
}

//! Keys wrapped as JSON Web Encryption: `enc` A256GCM; `alg` RSA-OAEP or ECDH-ES+A256KW as written, all that
//! [`nacre_core::jose`] knows as read.

use nacre_core::{
    SecretBytes,
    jose::{self, JoseError, Jwe, PrivateKey, PublicKey, Recipient},
};

use super::SchemeError;

/// Opens a packet with the keys at hand.
///
/// # Errors
/// [`SchemeError`]
pub(super) fn open(packet: &[u8], keys: &[PrivateKey]) -> Result<SecretBytes, SchemeError> {
    Jwe::parse(packet).and_then(|jwe| jwe.decrypt(keys)).map_err(|error| match error {
        JoseError::NoKeyFits { .. } | JoseError::ContentTampered => SchemeError::NotForUs(keys.len()),
        JoseError::Unsupported { .. } => SchemeError::Unsupported(error.to_string()),
        other => SchemeError::malformed(other.to_string()),
    })
}

/// Wraps a PRIV document for all recipients in one packet.
///
/// # Errors
/// [`SchemeError`]: too many recipients.
pub(super) fn wrap(private: &SecretBytes, recipients: &[PublicKey]) -> Result<Vec<u8>, SchemeError> {
    let recipients: Vec<Recipient<'_>> = recipients.iter().map(Recipient::new).collect();
    jose::encrypt(private.expose(), &recipients)
        .map(|jwe| jwe.to_json().into_bytes())
        .map_err(|error| SchemeError::Unsupported(error.to_string()))
}

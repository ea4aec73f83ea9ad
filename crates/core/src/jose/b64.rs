//! Base64url without padding (RFC 7515 §2), strict: no padding, no white space, no stray bits.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use super::JoseError;

/// Encodes.
pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// Decodes.
///
/// # Errors
/// [`JoseError::Malformed`] for what is not canonical base64url without padding.
pub fn decode(text: impl AsRef<[u8]>) -> Result<Vec<u8>, JoseError> {
    BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|e| JoseError::malformed("base64url", e.to_string()))
}

/// Decodes what is secret.
///
/// # Errors
/// As [`decode`].
pub fn decode_secret(text: impl AsRef<[u8]>) -> Result<Zeroizing<Vec<u8>>, JoseError> {
    decode(text).map(Zeroizing::new)
}

//! The blocks of a PEM file (RFC 7468, lax: any line width, text around the blocks).

use base64::{Engine as _, prelude::BASE64_STANDARD};
use zeroize::Zeroizing;

use super::JoseError;

/// One block: its label and its bytes.
pub(super) struct Block<'a> {
    pub(super) label: &'a str,
    pub(super) der: Zeroizing<Vec<u8>>,
}

const BEGIN: &str = "-----BEGIN ";
const MOST_BLOCKS: usize = 64;

/// All blocks of a text, in order.
pub(super) fn blocks(text: &str) -> Result<Vec<Block<'_>>, JoseError> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(BEGIN) {
        let (label, body) =
            after.split_once("-----").ok_or_else(|| JoseError::malformed("PEM", "a BEGIN line that does not end"))?;
        let (body, tail) = body
            .split_once(&format!("-----END {label}-----"))
            .ok_or_else(|| JoseError::malformed("PEM", format!("no END line for {:.40}", label)))?;
        // RFC 1421 headers: only the encrypted form of old OpenSSL has them.
        if body.contains(':') {
            return Err(JoseError::EncryptedKey);
        }
        let compact: Zeroizing<Vec<u8>> =
            Zeroizing::new(body.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect());
        let der = BASE64_STANDARD.decode(&*compact).map_err(|e| JoseError::malformed("PEM", e.to_string()))?;
        blocks.push(Block { label, der: Zeroizing::new(der) });
        if blocks.len() > MOST_BLOCKS {
            return Err(JoseError::malformed("PEM", format!("more than {MOST_BLOCKS} blocks")));
        }
        rest = tail;
    }
    Ok(blocks)
}

/// Whether this looks like PEM and not DER or JSON.
pub(super) fn is_pem(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| text.contains(BEGIN))
}

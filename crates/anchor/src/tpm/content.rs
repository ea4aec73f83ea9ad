//! What the index holds: magic (8) ‖ state (64) ‖ MAC (32).
//!
//! The MAC is HMAC-SHA256 over magic ‖ number of the index (4, big-endian) ‖ state, so that a state cannot be moved to another index.

use nacre_core::AnchorState;
use ring::hmac;

use super::{NvIndex, keys::Keys};

/// What the content begins with; the version is in it.
const MAGIC: &[u8; 8] = b"nacrenv1";
/// Bytes of the content.
pub(super) const LEN: u16 = 104;

const _: () = assert!(LEN as usize == MAGIC.len() + AnchorState::LEN + 32, "magic, state, MAC");

/// The bytes for a state.
pub(super) fn seal(state: &AnchorState, index: NvIndex, keys: &Keys) -> Vec<u8> {
    let state = state.to_bytes();
    let tag = hmac::sign(&key(keys), &message(&state, index));
    [&MAGIC[..], &state, tag.as_ref()].concat()
}

/// The inverse of [`seal`]; the error says what is wrong.
pub(super) fn open(bytes: &[u8], index: NvIndex, keys: &Keys) -> Result<AnchorState, &'static str> {
    let wrong = "it holds something else than a state: another program wrote it";
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(wrong)?;
    let (state, tag) = rest.split_first_chunk::<{ AnchorState::LEN }>().ok_or(wrong)?;
    if magic != MAGIC {
        return Err(wrong);
    }
    hmac::verify(&key(keys), &message(state, index), tag)
        .map_err(|_| "its content is not what this disk wrote: the MAC does not match")?;
    Ok(AnchorState::from_bytes(state))
}

fn key(keys: &Keys) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, keys.mac.expose())
}

fn message(state: &[u8; AnchorState::LEN], index: NvIndex) -> Vec<u8> {
    [&MAGIC[..], &index.number().to_be_bytes(), state].concat()
}

#[cfg(test)]
mod tests {
    use nacre_core::SecretArray;

    use super::*;

    #[test]
    fn content_is_bound_to_key_and_index() {
        let keys = Keys::derive(&SecretArray::random());
        let state = AnchorState { disk: [1; 16], fence: 2, sequence: 3, root: [4; 32] };
        let good = seal(&state, NvIndex::DEFAULT, &keys);
        assert_eq!(good.len(), usize::from(LEN));
        assert_eq!(open(&good, NvIndex::DEFAULT, &keys), Ok(state));
        assert!(open(&good, NvIndex::new(0x0180_0011).unwrap(), &keys).is_err());
        assert!(open(&good, NvIndex::DEFAULT, &Keys::derive(&SecretArray::random())).is_err());
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&bad, NvIndex::DEFAULT, &keys).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(open(&good[..length], NvIndex::DEFAULT, &keys).is_err(), "{length}");
        }
    }
}

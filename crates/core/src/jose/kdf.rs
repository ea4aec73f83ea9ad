//! The Concat KDF of NIST SP 800-56A §5.8.1 with SHA-256, as ECDH-ES uses it (RFC 7518 §4.6.2).
//!
//! Round i is SHA-256(be32(i) ‖ Z ‖ OtherInfo), OtherInfo = len‖AlgorithmID ‖ len‖apu ‖ len‖apv ‖ be32(key bits).

use ring::digest::{Context, SHA256};

/// Fills `out` (at most 64 bytes here) from the shared secret `z`.
pub(super) fn concat_kdf(z: &[u8], algorithm: &str, apu: &[u8], apv: &[u8], out: &mut [u8]) {
    let bits = u32::try_from(out.len() * 8).unwrap_or(u32::MAX);
    for (round, chunk) in (1u32..).zip(out.chunks_mut(32)) {
        let mut hash = Context::new(&SHA256);
        hash.update(&round.to_be_bytes());
        hash.update(z);
        for field in [algorithm.as_bytes(), apu, apv] {
            // Headers are limited to far less than 4 GiB.
            hash.update(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
            hash.update(field);
        }
        hash.update(&bits.to_be_bytes());
        for (slot, byte) in chunk.iter_mut().zip(hash.finish().as_ref()) {
            *slot = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jose::b64;

    /// RFC 7518 appendix C.
    #[test]
    fn rfc7518_appendix_c() {
        let z = [
            158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49, 110, 163, 218, 128,
            106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
        ];
        let mut key = [0; 16];
        concat_kdf(&z, "A128GCM", b"Alice", b"Bob", &mut key);
        assert_eq!(b64::encode(key), "VqqN6vgjbSBcIijNcacQGg");
    }
}

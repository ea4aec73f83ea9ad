//! OpenPGP's RSA decryption by aws-lc-rs, since the `rsa` crate below `pgp` leaks through its timing (RUSTSEC-2023-0071), and the host
//! can have a guest decrypt as often as it likes.

use ::pgp::{
    composed::{PlainSessionKey, RawSessionKey},
    crypto::sym::SymmetricKeyAlgorithm,
    errors::{Error, Result},
    ser::Serialize as _,
    types::{EskType, PlainSecretParams, PublicParams, SecretParams},
};
use aws_lc_rs::rsa::Pkcs1PrivateDecryptingKey;
use nacre_core::jose::PrivateKey;
use zeroize::Zeroizing;

use crate::crypt::der::{INTEGER, SEQUENCE, element};

/// The key in aws-lc-rs; `None` for other kinds of keys.
pub(super) fn private_key(public: &PublicParams, secret: &SecretParams) -> Result<Option<PrivateKey>> {
    let (PublicParams::RSA(public), SecretParams::Plain(PlainSecretParams::RSA(secret))) = (public, secret) else {
        return Ok(None);
    };
    let malformed = || Error::from("the RSA key is malformed".to_owned());
    let mpis = public.to_bytes()?;
    let (n, rest) = mpi(&mpis).ok_or_else(malformed)?;
    let (e, _) = mpi(rest).ok_or_else(malformed)?;
    let (d, p, q, u) = secret.to_bytes();
    let [d, p, q, u] = [d, p, q, u].map(Zeroizing::new);
    // OpenPGP's u is the inverse of p modulo q, PKCS #1's coefficient that of its second prime modulo its first: so q goes first.
    let d_q = remainder(&d, &minus_one(&q)).ok_or_else(malformed)?;
    let d_p = remainder(&d, &minus_one(&p)).ok_or_else(malformed)?;
    let numbers = [&[0u8][..], n, e, &d, &q, &p, &d_q, &d_p, &u].map(|number| Zeroizing::new(integer(number)));
    let parts: Vec<&[u8]> = numbers.iter().map(|number| number.as_slice()).collect();
    let der = Zeroizing::new(element(SEQUENCE, &parts));
    PrivateKey::from_bytes(&der).map(Some).map_err(|error| Error::from(error.to_string()))
}

/// Opens a session key: algorithm (version 3 only), key, 16-bit sum of the key's bytes.
pub(super) fn session_key(key: &PrivateKey, wrapped: &[u8], kind: EskType) -> Option<PlainSessionKey> {
    let PrivateKey::Rsa(key) = key else { return None };
    let key = key.decrypting_key().clone();
    let size = key.key_size_bytes();
    // An MPI has no leading zeros; RSA wants its whole length.
    let mut padded = vec![0; size.checked_sub(wrapped.len())?];
    padded.extend_from_slice(wrapped);
    let mut out = Zeroizing::new(vec![0; size]);
    let plain: &[u8] = Pkcs1PrivateDecryptingKey::new(key).ok()?.decrypt(&padded, &mut out).ok()?;
    let (algorithm, plain) = match kind {
        EskType::V3_4 => plain.split_first().map(|(algorithm, rest)| (Some(*algorithm), rest))?,
        EskType::V6 => (None, plain),
    };
    let (key, sum) = plain.split_last_chunk::<2>()?;
    let found = key.iter().fold(0u16, |sum, byte| sum.wrapping_add(u16::from(*byte)));
    if found != u16::from_be_bytes(*sum) {
        return None;
    }
    let key = RawSessionKey::from(key);
    match algorithm {
        Some(algorithm) => {
            let sym_alg = SymmetricKeyAlgorithm::from(algorithm);
            (sym_alg.key_size() == key.len()).then_some(PlainSessionKey::V3_4 { sym_alg, key })
        }
        None => Some(PlainSessionKey::V6 { key }),
    }
}

/// The first number of `length in bits u16 BE, bytes`.
fn mpi(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (bits, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*bits)).div_ceil(8))
}

/// A DER INTEGER of an unsigned big-endian number.
fn integer(number: &[u8]) -> Vec<u8> {
    let leading = number.iter().take_while(|byte| **byte == 0).count();
    let number = number.get(leading..).unwrap_or_default();
    match number.first() {
        Some(0x80..) | None => element(INTEGER, &[&[0], number]),
        Some(_) => element(INTEGER, &[number]),
    }
}

/// An odd number less one.
fn minus_one(odd: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut even = Zeroizing::new(odd.to_vec());
    if let Some(last) = even.last_mut() {
        *last &= !1;
    }
    even
}

/// `number` modulo `modulus`, bit by bit: once a key, when it is loaded.
fn remainder(number: &[u8], modulus: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    if modulus.iter().all(|byte| *byte == 0) {
        return None;
    }
    // One byte more than the modulus, for the shift.
    let width = modulus.len() + 1;
    let mut padded = Zeroizing::new(vec![0]);
    padded.extend_from_slice(modulus);
    let mut rest = Zeroizing::new(vec![0u8; width]);
    for bit in number.iter().flat_map(|byte| (0..8).rev().map(move |shift| byte >> shift & 1)) {
        let mut carry = bit;
        for byte in rest.iter_mut().rev() {
            (carry, *byte) = (*byte >> 7, *byte << 1 | carry);
        }
        if *rest >= *padded {
            let mut borrow = false;
            for (byte, other) in rest.iter_mut().zip(padded.iter()).rev() {
                let (once, first) = byte.overflowing_sub(*other);
                let (twice, second) = once.overflowing_sub(u8::from(borrow));
                (*byte, borrow) = (twice, first || second);
            }
        }
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remainders_are_right() {
        for (number, modulus) in
            [(0u64, 1u64), (1, 1), (1_000_007, 1_000_006), (u64::MAX, 255), (12_345, u64::MAX), (u64::MAX, 1 << 63)]
        {
            let found = remainder(&number.to_be_bytes(), &modulus.to_be_bytes()).unwrap();
            assert_eq!(found[1..], (number % modulus).to_be_bytes());
        }
        assert!(remainder(&[1], &[0, 0]).is_none());
        assert_eq!(integer(&[0, 0, 0x80]), [2, 2, 0, 0x80]);
        assert_eq!(integer(&[0]), [2, 1, 0]);
    }
}

//! One chunk: plaintext ⇄ payload (zstd, or as it is) ⇄ stored bytes (AEAD).
//!
//! The digest in the table is that of the stored bytes, so a cache or a mirror is checked without any key, and what two guests hold
//! keys for, neither can change for the other. After it, the AEAD's tag and the exact length are checked as well.

use nacre_core::aead::{AeadKey, NONCE_LEN};
use ring::digest::{SHA256, digest};

use crate::{
    format::{CHUNK_LIMIT, ChunkEntry, Cipher, DIGEST, FormatError, Method, TAG, hex},
    keys::Domain,
};

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; DIGEST] {
    let mut out = [0; DIGEST];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// The range of a chunk's lengths that a compressor must save to be worth a decompressor's time: a 32nd.
fn worth(payload: usize, plain: usize) -> bool {
    payload + plain / 32 < plain
}

/// Makes stored chunks; one a thread.
pub struct Sealer<'a> {
    domain: Option<&'a Domain>,
    compressor: zstd::bulk::Compressor<'static>,
}

/// A chunk as it is stored.
pub struct Sealed {
    /// The stored bytes.
    pub bytes: Vec<u8>,
    /// How they were made.
    pub method: Method,
    /// Their SHA-256.
    pub digest: [u8; DIGEST],
    /// Their key.
    pub key: [u8; 32],
}

impl<'a> Sealer<'a> {
    /// Seals for a domain, or, without one, only compresses.
    ///
    /// # Errors
    /// The compressor's, for a level that it does not have.
    pub fn new(domain: Option<&'a Domain>, level: i32) -> std::io::Result<Self> {
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        compressor.include_contentsize(false)?;
        compressor.include_checksum(false)?;
        Ok(Self { domain, compressor })
    }

    /// Makes a stored chunk.
    ///
    /// # Errors
    /// The compressor's, for want of memory.
    pub fn seal(&mut self, plain: &[u8]) -> std::io::Result<Sealed> {
        let mut bytes = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()) + TAG);
        self.compressor.compress_to_buffer(plain, &mut bytes)?;
        let method = if worth(bytes.len(), plain.len()) {
            Method::Zstd
        } else {
            bytes.clear();
            bytes.extend_from_slice(plain);
            Method::Raw
        };
        let mut key = [0; 32];
        if let Some(domain) = self.domain {
            key = domain.chunk_key(method, &sha256(&bytes));
            AeadKey::from_bytes(&key).seal([0; NONCE_LEN], &[method.code()], &mut bytes);
        }
        bytes.shrink_to_fit();
        Ok(Sealed { digest: sha256(&bytes), bytes, method, key })
    }
}

/// Stored bytes that are those which an entry names: there are no others of this type, so that nothing else is opened.
pub struct Verified<'a> {
    entry: &'a ChunkEntry,
    bytes: &'a mut [u8],
}

impl<'a> Verified<'a> {
    /// Compares length and digest.
    ///
    /// # Errors
    /// [`FormatError::Length`], [`FormatError::Digest`]
    pub fn new(entry: &'a ChunkEntry, bytes: &'a mut [u8]) -> Result<Self, FormatError> {
        verify(entry, bytes)?;
        Ok(Self { entry, bytes })
    }

    /// The stored bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes
    }
}

/// Opens stored chunks; one a thread.
pub struct Opener {
    cipher: Cipher,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Opener {
    /// Opens chunks of an image with this cipher.
    ///
    /// # Errors
    /// The decompressor's, for want of memory.
    pub fn new(cipher: Cipher) -> std::io::Result<Self> {
        Ok(Self { cipher, decompressor: zstd::bulk::Decompressor::new()? })
    }

    /// Decrypts `stored` in place, and writes the chunk's bytes to `plain`, which has its length.
    ///
    /// # Errors
    /// [`FormatError`]: `plain` then has nothing to be used.
    ///
    /// # Panics
    /// `plain` does not have the entry's length.
    pub fn open(&mut self, stored: Verified<'_>, plain: &mut [u8]) -> Result<(), FormatError> {
        let Verified { entry, bytes: stored } = stored;
        assert_eq!(plain.len() as u64, entry.length.get(), "the caller gives room for the chunk");
        let place = entry.place.get();
        let payload: &[u8] = match self.cipher {
            Cipher::None => stored,
            Cipher::Aes256Gcm => AeadKey::from_bytes(&entry.key)
                .open([0; NONCE_LEN], &[entry.method], stored)
                .map_err(|_| FormatError::Sealed { part: "chunk", index: place })?,
        };
        let wrong = || FormatError::Compressed { part: "chunk", index: place, expected: entry.length.get() };
        match Method::of(entry.method) {
            Some(Method::Raw) if payload.len() == plain.len() => plain.copy_from_slice(payload),
            Some(Method::Zstd) => match self.decompressor.decompress_to_buffer(payload, plain) {
                Ok(length) if length == plain.len() => {}
                _ => return Err(wrong()),
            },
            _ => return Err(wrong()),
        }
        Ok(())
    }
}

/// Whether stored bytes are those that an entry names.
///
/// # Errors
/// [`FormatError::Length`], [`FormatError::Digest`]
pub fn verify(entry: &ChunkEntry, stored: &[u8]) -> Result<(), FormatError> {
    if stored.len() as u64 != u64::from(entry.stored.get()) {
        let (found, expected) = (stored.len() as u64, entry.stored.get().into());
        return Err(FormatError::Length { part: "chunk", found, expected });
    }
    let found = sha256(stored);
    if found != entry.digest {
        let (found, expected) = (hex(&found), hex(&entry.digest));
        return Err(FormatError::Digest { part: "chunk", index: entry.place.get(), found, expected });
    }
    Ok(())
}

impl ChunkEntry {
    /// Checks all that can be known of an entry alone.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn check(&self, cipher: Cipher, blobs: u32) -> Result<(), FormatError> {
        let field = |name, found, allowed| Err(FormatError::field("chunk entry", name, found, allowed));
        let length = self.length.get();
        if length == 0 {
            return field("length", length, "at least 1");
        }
        if self.reserved != 0 {
            return field("reserved", self.reserved.into(), "0");
        }
        match Method::of(self.method) {
            None => return field("method", self.method.into(), "0, 1 or 2"),
            Some(Method::Zeroes) => {
                let nothing = self.stored.get() == 0 && self.place.get() == 0 && self.blob.get() == 0;
                if !nothing || self.digest != [0; DIGEST] || self.key != [0; 32] {
                    return field("method", self.method.into(), "of an entry that names nothing stored");
                }
                return Ok(());
            }
            Some(Method::Raw | Method::Zstd) => {}
        }
        if length > CHUNK_LIMIT.into() {
            return field("length", length, "at most 1 MiB");
        }
        if u32::from(self.blob.get()) >= blobs {
            return field("blob", self.blob.get().into(), "one of the image's");
        }
        let (stored, overhead) = (u64::from(self.stored.get()), cipher.overhead() as u64);
        let most = length + overhead;
        if stored <= overhead || stored > most || (self.method == Method::Raw.code() && stored != most) {
            return field("stored", stored, "the payload's length and its tag, at most the chunk's length and its tag");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::SecretArray;

    use super::*;

    fn entry(sealed: &Sealed, length: usize) -> ChunkEntry {
        ChunkEntry {
            offset: 0.into(),
            length: (length as u64).into(),
            place: 77.into(),
            stored: u32::try_from(sealed.bytes.len()).unwrap().into(),
            blob: 0.into(),
            method: sealed.method.code(),
            reserved: 0,
            digest: sealed.digest,
            key: sealed.key,
        }
    }

    fn open(opener: &mut Opener, entry: &ChunkEntry, stored: &mut [u8], out: &mut [u8]) -> Result<(), FormatError> {
        opener.open(Verified::new(entry, stored)?, out)
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn chunks_come_back_and_changed_ones_do_not() {
        let domain = Domain::new(&SecretArray::fill(|slot| slot.fill(3)));
        for (domain, cipher) in [(Some(&domain), Cipher::Aes256Gcm), (None, Cipher::None)] {
            let mut sealer = Sealer::new(domain, 3).unwrap();
            let mut opener = Opener::new(cipher).unwrap();
            for plain in [vec![7; 100_000], noise(5000), b"x".to_vec()] {
                let sealed = sealer.seal(&plain).unwrap();
                assert_eq!(sealed.bytes, sealer.seal(&plain).unwrap().bytes);
                let entry = entry(&sealed, plain.len());
                entry.check(cipher, 1).unwrap();
                let mut out = vec![0; plain.len()];
                open(&mut opener, &entry, &mut sealed.bytes.clone(), &mut out).unwrap();
                assert_eq!(out, plain);
                for at in [0, sealed.bytes.len() / 2, sealed.bytes.len() - 1] {
                    let mut bad = sealed.bytes.clone();
                    bad[at] ^= 1;
                    let error = open(&mut opener, &entry, &mut bad, &mut out).unwrap_err();
                    assert!(matches!(error, FormatError::Digest { index: 77, .. }), "{error}");
                }
                let mut short = sealed.bytes.clone();
                short.pop();
                assert!(matches!(open(&mut opener, &entry, &mut short, &mut out), Err(FormatError::Length { .. })));
                if cipher != Cipher::None {
                    let other = ChunkEntry { key: [9; 32], ..entry };
                    let error = open(&mut opener, &other, &mut sealed.bytes.clone(), &mut out).unwrap_err();
                    assert_eq!(error, FormatError::Sealed { part: "chunk", index: 77 });
                }
                let mut longer = vec![0; plain.len() + 1];
                let lying = ChunkEntry { length: (longer.len() as u64).into(), ..entry };
                assert!(open(&mut opener, &lying, &mut sealed.bytes.clone(), &mut longer).is_err());
            }
        }
    }

    #[test]
    fn equal_content_is_equal_in_one_domain_only() {
        let secret = |byte| SecretArray::<32>::fill(|slot| slot.fill(byte));
        let seal = |domain: &Domain| Sealer::new(Some(domain), 3).unwrap().seal(&noise(4096)).unwrap();
        assert_eq!(seal(&Domain::new(&secret(1))).bytes, seal(&Domain::new(&secret(1))).bytes);
        assert_ne!(seal(&Domain::new(&secret(1))).bytes, seal(&Domain::new(&secret(2))).bytes);
        assert_ne!(seal(&Domain::random()).bytes, seal(&Domain::random()).bytes);
    }

    #[test]
    fn entries_that_lie_are_refused() {
        let sealed = Sealer::new(None, 3).unwrap().seal(&noise(5000)).unwrap();
        let good = entry(&sealed, 5000);
        good.check(Cipher::None, 1).unwrap();
        let zeroes = ChunkEntry {
            method: 2,
            stored: 0.into(),
            place: 0.into(),
            digest: [0; 32],
            length: (1 << 40).into(),
            ..good
        };
        zeroes.check(Cipher::None, 0).unwrap();
        for bad in [
            ChunkEntry { length: 0.into(), ..good },
            ChunkEntry { length: (1 << 40).into(), ..good },
            ChunkEntry { method: 3, ..good },
            ChunkEntry { reserved: 1, ..good },
            ChunkEntry { blob: 1.into(), ..good },
            ChunkEntry { stored: 0.into(), ..good },
            ChunkEntry { stored: 4999.into(), ..good },
            ChunkEntry { stored: u32::MAX.into(), ..good },
            ChunkEntry { stored: 1.into(), ..zeroes },
            ChunkEntry { key: [1; 32], ..zeroes },
        ] {
            assert!(bad.check(Cipher::None, 1).is_err(), "{bad:?}");
        }
    }
}

//! Bytes that nobody can tell from ciphertext.
//!
//! A secure disk must not show which of its places were ever used, so a new store is filled with what used places look like. A host that
//! could tell the filling from ciphertext would know them, so a statistical generator is not enough: this is AES-256 in counter mode
//! (as GCM runs it) under a key that is thrown away.

use nacre_core::{Page, SecretArray, aead::AeadKey, aead::NONCE_LEN};

/// Bytes that one step makes.
pub(super) const STEP: usize = 1 << 20;

/// Makes noise, a step at a time.
pub(super) struct Noise {
    key: AeadKey,
    step: u64,
    pages: Vec<Page>,
}

impl Noise {
    pub(super) fn new() -> Self {
        let pages = STEP / size_of::<Page>();
        Self { key: AeadKey::new(&SecretArray::random()), step: 0, pages: vec![*Page::zeroed(); pages] }
    }

    /// The next [`STEP`] bytes.
    pub(super) fn next(&mut self) -> &[Page] {
        for page in &mut self.pages {
            self.step += 1;
            let mut nonce = [0; NONCE_LEN];
            nonce.split_at_mut(size_of::<u64>()).0.copy_from_slice(&self.step.to_le_bytes());
            page.0.fill(0);
            self.key.seal_in_place(nonce, &[], &mut page.0);
        }
        &self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_never_repeats_and_has_as_many_ones_as_zeroes() {
        let mut noise = Noise::new();
        let first = noise.next().to_vec();
        let second = noise.next().to_vec();
        let mut pages: Vec<&[u8]> = first.iter().chain(&second).map(|page| page.0.as_slice()).collect();
        let ones: u64 = pages.iter().flat_map(|page| page.iter()).map(|byte| u64::from(byte.count_ones())).sum();
        let half = STEP as u64 * 8;
        assert!(ones.abs_diff(half) < half / 1000, "{ones} of {}", 2 * half);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len() * size_of::<Page>(), 2 * STEP);
    }
}

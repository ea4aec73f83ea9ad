//! The chunk table: leaves of entries, each verified against its digest in the metadata before it is used.

use std::ops::Deref;

use nacre_core::aead::AeadKey;
use zerocopy::FromBytes as _;
#[cfg(feature = "build")]
use zerocopy::IntoBytes as _;
use zeroize::Zeroizing;

use crate::{
    chunk::sha256,
    format::{ChunkEntry, Cipher, FormatError, LeafEntry, Summary, hex},
    keys::{MetadataKey, Part, counter},
};

/// Seals the entries of a table as leaves: what is stored, and the digests that the metadata has of it.
#[cfg(feature = "build")]
pub(crate) fn seal(entries: &[ChunkEntry], key: Option<&MetadataKey>) -> (Vec<u8>, Vec<LeafEntry>) {
    let mut sealer = LeafSealer::new(key);
    let (mut stored, mut leaves) = (Vec::new(), Vec::new());
    for entries in entries.chunks(crate::format::LEAF_ENTRIES) {
        let (mut leaf, entry) = sealer.seal(entries);
        leaves.push(entry);
        stored.append(&mut leaf);
    }
    (stored, leaves)
}

/// Seals leaves, one after the other.
#[cfg(feature = "build")]
pub(crate) struct LeafSealer {
    key: Option<AeadKey>,
    number: u64,
}

#[cfg(feature = "build")]
impl LeafSealer {
    /// Begins a table. The key must never have been used for another one.
    pub(crate) fn new(key: Option<&MetadataKey>) -> Self {
        Self { key: key.map(|key| AeadKey::new(&key.derive(Part::Leaves))), number: 0 }
    }

    /// The next leaf, of all entries that belong to it: what is stored, and what the metadata has of it.
    pub(crate) fn seal(&mut self, entries: &[ChunkEntry]) -> (Vec<u8>, LeafEntry) {
        let mut leaf = entries.as_bytes().to_vec();
        if let Some(key) = &self.key {
            key.seal(counter(self.number), b"leaf", &mut leaf);
        }
        self.number += 1;
        let offset = entries.first().map_or(0, |entry| entry.offset.get());
        let entry = LeafEntry { offset: offset.into(), digest: sha256(&leaf) };
        (leaf, entry)
    }
}

/// The entries of a leaf, which was verified. Keys of chunks are in them, and so they are wiped.
pub struct Leaf(Zeroizing<Vec<u8>>);

impl Deref for Leaf {
    type Target = [ChunkEntry];

    fn deref(&self) -> &[ChunkEntry] {
        // Whole entries: the length was compared.
        <[ChunkEntry]>::ref_from_bytes(&self.0).unwrap_or_default()
    }
}

/// What opens leaves.
pub struct Leaves {
    summary: Summary,
    cipher: Cipher,
    key: Option<AeadKey>,
    index: Vec<LeafEntry>,
}

impl Leaves {
    /// Checks that the leaves' first bytes go up from 0.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn new(summary: Summary, index: Vec<LeafEntry>, key: Option<&MetadataKey>) -> Result<Self, FormatError> {
        let mut next = 0;
        for (number, leaf) in index.iter().enumerate() {
            let offset = leaf.offset.get();
            if (number == 0 && offset != 0) || offset < next || offset >= summary.device_bytes.get() {
                let allowed = "0 for the first, larger than the one before for others, within the device";
                return Err(FormatError::field("leaf index", "offset", offset, allowed));
            }
            next = offset + 1;
        }
        let cipher = if key.is_some() { Cipher::Aes256Gcm } else { Cipher::None };
        let key = key.map(|key| AeadKey::new(&key.derive(Part::Leaves)));
        Ok(Self { summary, cipher, key, index })
    }

    /// How the image is sealed.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.summary.leaves.get()
    }

    /// The leaf that speaks of a byte of the device; `None` past its end.
    pub fn find(&self, offset: u64) -> Option<u32> {
        if offset >= self.summary.device_bytes.get() {
            return None;
        }
        let after = self.index.partition_point(|leaf| leaf.offset.get() <= offset);
        u32::try_from(after.checked_sub(1)?).ok()
    }

    /// Where a leaf's stored bytes are in the table blob.
    pub fn range(&self, leaf: u32) -> std::ops::Range<u64> {
        self.summary.leaf_range(leaf, self.cipher)
    }

    /// Verifies a leaf's stored bytes, and everything in it.
    ///
    /// # Errors
    /// [`FormatError`]
    pub fn open(&self, leaf: u32, stored: Vec<u8>) -> Result<Leaf, FormatError> {
        let mut stored = Zeroizing::new(stored);
        let number = leaf as usize;
        let Some(expected) = self.index.get(number) else {
            return Err(FormatError::field("leaf index", "leaf", leaf.into(), "one of the table's"));
        };
        let found = sha256(&stored);
        if found != expected.digest {
            let (found, expected) = (hex(&found), hex(&expected.digest));
            return Err(FormatError::Digest { part: "leaf", index: leaf.into(), found, expected });
        }
        let plain = match &self.key {
            None => stored.len(),
            Some(key) => key
                .open(counter(leaf.into()), b"leaf", &mut stored)
                .map_err(|_| FormatError::Sealed { part: "leaf", index: leaf.into() })?
                .len(),
        };
        let range = self.range(leaf);
        let length = range.end - range.start - self.cipher.overhead() as u64;
        if plain as u64 != length || !plain.is_multiple_of(size_of::<ChunkEntry>()) {
            return Err(FormatError::Length { part: "leaf", found: plain as u64, expected: length });
        }
        stored.truncate(plain);
        let entries = Leaf(stored);
        let end = self.index.get(number + 1).map_or(self.summary.device_bytes.get(), |next| next.offset.get());
        self.check(&entries, expected.offset.get(), end)?;
        Ok(entries)
    }

    fn check(&self, entries: &[ChunkEntry], start: u64, end: u64) -> Result<(), FormatError> {
        let mut next = start;
        for entry in entries {
            entry.check(self.cipher, self.summary.blobs.get())?;
            if entry.offset.get() != next {
                let allowed = "where the range before it ends";
                return Err(FormatError::field("chunk entry", "offset", entry.offset.get(), allowed));
            }
            next = entry.end();
        }
        if next != end {
            return Err(FormatError::field("chunk entry", "length", next, "up to the next leaf, or the device's end"));
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "build"))]
mod tests {
    use nacre_core::SecretArray;

    use super::*;
    use crate::format::LEAF_ENTRIES;

    fn entries(count: u64) -> Vec<ChunkEntry> {
        (0..count)
            .map(|at| ChunkEntry {
                offset: (at * 100).into(),
                length: 100.into(),
                place: (at * 116).into(),
                stored: 116.into(),
                blob: 0.into(),
                method: 0,
                reserved: 0,
                digest: [7; 32],
                key: [8; 32],
            })
            .collect()
    }

    fn summary(count: u64) -> Summary {
        Summary {
            device_bytes: (count * 100).into(),
            chunks: count.into(),
            leaves: u32::try_from(count.div_ceil(LEAF_ENTRIES as u64)).unwrap_or_default().into(),
            blobs: 1.into(),
            ..Summary::default()
        }
    }

    fn slice(table: &[u8], range: std::ops::Range<u64>) -> Vec<u8> {
        let place = |at| usize::try_from(at).unwrap_or_default();
        table[place(range.start)..place(range.end)].to_vec()
    }

    #[test]
    fn every_byte_of_the_device_is_found_and_no_leaf_can_be_changed() {
        let key = MetadataKey::new(SecretArray::fill(|slot| slot.fill(1)));
        let all = entries(400);
        let (table, index) = seal(&all, Some(&key));
        let leaves = Leaves::new(summary(400), index, Some(&key)).unwrap();
        assert_eq!(leaves.range(2).end, table.len() as u64);
        for at in [0, 99, 100, 16_999, 17_000, 39_999] {
            let leaf = leaves.find(at).unwrap();
            let open = leaves.open(leaf, slice(&table, leaves.range(leaf))).unwrap();
            let entry = open.iter().find(|entry| entry.offset.get() <= at && at < entry.end()).unwrap();
            assert_eq!(*entry, all[usize::try_from(at / 100).unwrap()]);
        }
        assert_eq!(leaves.find(40_000), None);
        let (first, second) = (slice(&table, leaves.range(0)), slice(&table, leaves.range(1)));
        assert!(matches!(leaves.open(0, second), Err(FormatError::Digest { part: "leaf", index: 0, .. })));
        for at in [0, 100, first.len() - 1] {
            let mut bad = first.clone();
            bad[at] ^= 1;
            assert!(leaves.open(0, bad).is_err());
        }
        assert!(leaves.open(7, first).is_err());
    }

    #[test]
    fn tables_with_gaps_overlaps_or_wrong_ends_are_refused() {
        for break_it in [
            |all: &mut Vec<ChunkEntry>| all[3].offset = 301.into(),
            |all: &mut Vec<ChunkEntry>| all[3].length = 99.into(),
            |all: &mut Vec<ChunkEntry>| all[169].length = 101.into(),
            |all: &mut Vec<ChunkEntry>| all[0].offset = 1.into(),
            |all: &mut Vec<ChunkEntry>| all[5].blob = 1.into(),
        ] {
            let mut all = entries(171);
            break_it(&mut all);
            let (table, mut index) = seal(&all, None);
            index[0].offset = 0.into();
            let leaves = Leaves::new(summary(171), index, None).unwrap();
            assert!(leaves.open(0, slice(&table, leaves.range(0))).is_err());
        }
        let (_, mut index) = seal(&entries(171), None);
        index[1].offset = 0.into();
        assert!(Leaves::new(summary(171), index, None).is_err());
    }
}

//! Index nodes: 128 entries of 32 bytes, which say where a block is and what it has to be.
//!
//! An entry is the whole truth about one block of data, one bitmap page, or one node below: its place, the epoch and count that it was
//! sealed under, and its tag. A node has no header of its own; what would be there is in the entry that leads to it.
//!
//! ```text
//! entry   0  place   u48   block of the store; 0: a hole, and then all else is zero
//!         6  count   u48   nonce of the message
//!        12  epoch   u32   whose key
//!        16  tag     16 bytes
//! ```
//! Numbers are little-endian.

use nacre_core::{BLOCK_SIZE, Page};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

/// Entries of a node.
pub const FANOUT: usize = 128;
/// log2 of [`FANOUT`].
pub const FANOUT_BITS: u32 = 7;

const LOW_48: u64 = (1 << 48) - 1;

/// Where a block is, and what it has to be.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Entry {
    /// place, and the low 16 bits of the count above it.
    low: U64,
    /// the high 32 bits of the count.
    count_high: U32,
    epoch: U32,
    tag: [u8; 16],
}

const _: () = assert!(size_of::<Entry>() == 32 && size_of::<Node>() == BLOCK_SIZE);

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_hole() {
            return f.write_str("hole");
        }
        write!(f, "block {} (epoch {}, count {})", self.place(), self.epoch(), self.count())
    }
}

impl Entry {
    /// There is no block: zeroes.
    pub const HOLE: Self = Self { low: U64::ZERO, count_high: U32::ZERO, epoch: U32::ZERO, tag: [0; 16] };

    /// An entry of a block at `place`, sealed as message `count` of `epoch`. Both numbers have 48 bits.
    pub(crate) fn new(place: u64, epoch: u32, count: u64, tag: [u8; 16]) -> Self {
        debug_assert!(place <= LOW_48 && count <= LOW_48, "numbers of 48 bits");
        let high = u32::try_from((count >> 16) & 0xffff_ffff).unwrap_or(u32::MAX);
        Self {
            low: U64::new((place & LOW_48) | (count << 48)),
            count_high: U32::new(high),
            epoch: U32::new(epoch),
            tag,
        }
    }

    /// Whether there is no block.
    pub fn is_hole(&self) -> bool {
        self.place() == 0
    }

    /// The block of the store.
    pub fn place(&self) -> u64 {
        self.low.get() & LOW_48
    }

    /// The nonce.
    pub fn count(&self) -> u64 {
        (self.low.get() >> 48) | (u64::from(self.count_high.get()) << 16)
    }

    /// Whose key.
    pub fn epoch(&self) -> u32 {
        self.epoch.get()
    }

    /// The tag.
    pub fn tag(&self) -> [u8; 16] {
        self.tag
    }

    /// What no other version of any node has: its key in the cache.
    pub(crate) fn version(&self) -> (u32, u64) {
        (self.epoch(), self.count())
    }
}

/// A node of the index.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Node {
    /// What the node leads to.
    pub entries: [Entry; FANOUT],
}

impl Node {
    /// Views a block that was authenticated as a node.
    pub fn of(page: &Page) -> &Self {
        match Self::ref_from_bytes(&page.0) {
            Ok(node) => node,
            Err(_) => unreachable!("a node is a block, and has no alignment"),
        }
    }

    /// [`of`](Self::of), to change it.
    pub(crate) fn of_mut(page: &mut Page) -> &mut Self {
        match Self::mut_from_bytes(&mut page.0) {
            Ok(node) => node,
            Err(_) => unreachable!("a node is a block, and has no alignment"),
        }
    }

    /// The entry at the low bits of `slot`.
    pub(crate) fn entry(&self, slot: u64) -> Entry {
        self.entries[usize::try_from(slot).unwrap_or(0) % FANOUT]
    }

    pub(crate) fn set(&mut self, slot: u64, entry: Entry) {
        self.entries[usize::try_from(slot).unwrap_or(0) % FANOUT] = entry;
    }

    /// What is wrong with a node that was authentic: an entry that leads out of the store, or a hole that is not empty. `first` and
    /// `end` bound the places that an entry may have.
    ///
    /// # Errors
    /// What is wrong.
    pub fn validate(&self, first: u64, end: u64) -> Result<(), String> {
        for (slot, entry) in self.entries.iter().enumerate() {
            if entry.is_hole() {
                if *entry != Entry::HOLE {
                    return Err(format!("entry {slot} is a hole that is not empty"));
                }
            } else if !(first..end).contains(&entry.place()) {
                return Err(format!("entry {slot} leads to block {}, outside of {first} to {end}", entry.place()));
            }
        }
        Ok(())
    }
}

/// How many levels a tree over `keys` keys has; at least one.
pub(crate) fn height(keys: u64) -> u8 {
    let mut height = 1;
    while height < 9 && (keys.saturating_sub(1) >> (FANOUT_BITS * u32::from(height))) > 0 {
        height += 1;
    }
    height
}

/// The number of nodes of a full tree over `keys` keys.
pub(crate) fn nodes(keys: u64) -> u64 {
    let (mut level, mut sum) = (keys, 0);
    loop {
        level = level.div_ceil(FANOUT as u64);
        sum += level;
        if level <= 1 {
            return sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_numbers() {
        for (place, epoch, count) in
            [(1, 0, 0), (LOW_48, u32::MAX, LOW_48), (77, 3, 1 << 40), (5, 1, 65_536), (9, 2, 65_535)]
        {
            let entry = Entry::new(place, epoch, count, [7; 16]);
            assert_eq!((entry.place(), entry.epoch(), entry.count()), (place, epoch, count));
            assert_eq!(Entry::read_from_bytes(entry.as_bytes()).unwrap(), entry);
        }
        assert!(Entry::HOLE.is_hole());
        assert_eq!(Entry::HOLE.as_bytes(), [0; 32]);
    }

    #[test]
    fn trees_are_as_high_as_they_must_be() {
        for (keys, levels, count) in
            [(1, 1, 1), (128, 1, 1), (129, 2, 3), (16384, 2, 129), (16385, 3, 132), (1 << 28, 4, 2_113_665)]
        {
            assert_eq!((height(keys), nodes(keys)), (levels, count), "{keys}");
        }
    }

    #[test]
    fn senseless_nodes_are_refused() {
        let mut page = Page::zeroed();
        assert!(Node::of(&page).validate(10, 20).is_ok());
        Node::of_mut(&mut page).set(5, Entry::new(19, 1, 1, [0; 16]));
        assert!(Node::of(&page).validate(10, 20).is_ok());
        assert!(Node::of(&page).validate(10, 19).unwrap_err().contains("entry 5"));
        Node::of_mut(&mut page).set(5, Entry::new(0, 1, 1, [0; 16]));
        assert!(Node::of(&page).validate(10, 20).unwrap_err().contains("hole"));
    }
}

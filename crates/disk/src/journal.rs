//! The journal: a ring of records, which say what changed since the checkpoint.
//!
//! A record is one or more whole blocks:
//!
//! ```text
//!  0  magic    "NJR1"
//!  4  epoch    u32  whose journal key
//!  8  count    u64  nonce
//! 16  blocks   u32  of the record
//! 20  reserved u32  0
//! 24  tag      16 bytes
//! 40  sealed   the rest; associated data: the 24 bytes at the beginning
//! ```
//! Sealed are [`Body`], then entries of 40 bytes: LBA u64, then what the index says of it ([`Entry`]); a hole's entry has in its count
//! how many blocks from there are holes. Then zeroes. A commit is one or more records, the last of which says so. Each names the chain
//! before it: chain' = SHA-256(chain ‖ clear header ‖ tag). A record never wraps: where the ring's end has no room for it, it begins
//! at block 0.

use nacre_core::BLOCK_SIZE;
use ring::digest;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::{
    DiskError,
    keys::{Auditor, EpochKeys, Purpose},
    node::Entry,
};

const MAGIC: &[u8; 4] = b"NJR1";
const AAD: usize = 24;
const CLEAR: usize = 40;
/// Blocks of a record, at most.
pub(crate) const MOST_BLOCKS: usize = 16;

/// What a record says before its entries.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Body {
    sequence: U64,
    synced: U64,
    checkpoint: U64,
    chain: [u8; 32],
    flags: U32,
    entries: U32,
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Change {
    lba: U64,
    entry: Entry,
}

const _: () = assert!(size_of::<Body>() == 64 && size_of::<Change>() == 40);

const COMMIT: u32 = 1;

/// Entries of a record of so many blocks.
pub(crate) const fn capacity(blocks: usize) -> usize {
    (blocks * BLOCK_SIZE - CLEAR - size_of::<Body>()) / size_of::<Change>()
}

/// Blocks that a commit of so many changes takes, with what may be skipped at the ring's end.
pub(crate) fn blocks_for(changes: usize) -> u64 {
    let full = changes / capacity(MOST_BLOCKS);
    let rest = changes % capacity(MOST_BLOCKS);
    let mut blocks = 1;
    while capacity(blocks) < rest {
        blocks += 1;
    }
    (full * MOST_BLOCKS + blocks + MOST_BLOCKS) as u64
}

impl Change {
    /// A block was written.
    pub(crate) fn write(lba: u64, entry: Entry) -> Self {
        Self { lba: lba.into(), entry }
    }

    /// Blocks became holes.
    pub(crate) fn trim(lba: u64, count: u64) -> Self {
        Self { lba: lba.into(), entry: Entry::new(0, 0, count, [0; 16]) }
    }

    /// The first LBA that it is about.
    pub fn lba(&self) -> u64 {
        self.lba.get()
    }

    /// What is there now; `None` for holes.
    pub fn entry(&self) -> Option<Entry> {
        (!self.entry.is_hole()).then_some(self.entry)
    }

    /// How many LBAs it is about.
    pub fn length(&self) -> u64 {
        if self.entry.is_hole() { self.entry.count() } else { 1 }
    }
}

/// What a record says, apart from its changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The commit that it belongs to.
    pub sequence: u64,
    /// The last commit that was durable when this was written.
    pub synced: u64,
    /// The checkpoint of that time.
    pub checkpoint: u64,
    /// The chain before it.
    pub chain: [u8; 32],
    /// Whether the commit ends here.
    pub commit: bool,
    /// The changes.
    pub changes: Vec<Change>,
}

/// What is in the clear at the beginning of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clear {
    /// Whose key.
    pub epoch: u32,
    /// The nonce.
    pub count: u64,
    /// Blocks of the record, 1 to 16.
    pub blocks: usize,
}

impl Clear {
    /// Reads the beginning of a block; `None` where no record begins there.
    pub fn parse(block: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_le_bytes(*block.get(at..)?.first_chunk::<4>()?));
        let blocks = usize::try_from(number(16)?).ok()?;
        let sane = block.starts_with(MAGIC) && (1..=MOST_BLOCKS).contains(&blocks);
        let count = u64::from_le_bytes(*block.get(8..)?.first_chunk::<8>()?);
        sane.then_some(Self { epoch: number(4)?, count, blocks })
    }
}

impl Record {
    /// The record's blocks, and the chain after it.
    ///
    /// # Errors
    /// [`DiskError`] when the epoch is used up.
    pub(crate) fn encode(&self, keys: &EpochKeys, auditor: &Auditor) -> Result<(Vec<u8>, [u8; 32]), DiskError> {
        let mut blocks = 1;
        while capacity(blocks) < self.changes.len() {
            blocks += 1;
        }
        debug_assert!(blocks <= MOST_BLOCKS, "commits are cut into records");
        let count = keys.reserve(Purpose::Journal, 1)?;
        let body = Body {
            sequence: self.sequence.into(),
            synced: self.synced.into(),
            checkpoint: self.checkpoint.into(),
            chain: self.chain,
            flags: if self.commit { COMMIT } else { 0 }.into(),
            entries: u32::try_from(self.changes.len()).unwrap_or(u32::MAX).into(),
        };
        let mut bytes = Vec::with_capacity(blocks * BLOCK_SIZE);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&keys.id.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(blocks).unwrap_or(u32::MAX).to_le_bytes());
        bytes.resize(CLEAR, 0);
        bytes.extend_from_slice(body.as_bytes());
        bytes.extend_from_slice(self.changes.as_bytes());
        bytes.resize(blocks * BLOCK_SIZE, 0);
        let (clear, sealed) = bytes.split_at_mut(CLEAR);
        let tag = keys.sealer(Purpose::Journal).seal(count, &clear[..AAD], sealed, auditor);
        clear[AAD..].copy_from_slice(&tag);
        let chain = follow(&self.chain, clear);
        Ok((bytes, chain))
    }

    /// Opens a record of exactly [`Clear::blocks`] blocks, and gives the chain after it; `None` where it is not authentic. `bytes` is
    /// changed.
    pub(crate) fn decode(bytes: &mut [u8], keys: &EpochKeys) -> Option<(Self, [u8; 32])> {
        let found = Clear::parse(bytes)?;
        if found.epoch != keys.id || bytes.len() != found.blocks * BLOCK_SIZE {
            return None;
        }
        let (clear, sealed) = bytes.split_at_mut(CLEAR);
        let tag = *clear.get(AAD..)?.first_chunk::<16>()?;
        if !keys.sealer(Purpose::Journal).open(found.count, &clear[..AAD], tag, sealed) {
            return None;
        }
        let record = Self::read(sealed)?;
        let chain = follow(&record.chain, clear);
        Some((record, chain))
    }

    /// Reads what was sealed; `None` where it makes no sense.
    pub fn read(sealed: &[u8]) -> Option<Self> {
        let (body, rest) = Body::ref_from_prefix(sealed).ok()?;
        let count = usize::try_from(body.entries.get()).ok()?;
        let (changes, _) = <[Change]>::ref_from_prefix_with_elems(rest, count).ok()?;
        Some(Self {
            sequence: body.sequence.get(),
            synced: body.synced.get(),
            checkpoint: body.checkpoint.get(),
            chain: body.chain,
            commit: body.flags.get() & COMMIT != 0,
            changes: changes.to_vec(),
        })
    }
}

/// The chain after a record.
fn follow(chain: &[u8; 32], clear: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(chain);
    context.update(clear);
    let mut next = [0; 32];
    next.copy_from_slice(context.finish().as_ref());
    next
}

/// The chain before the first record of a disk.
pub(crate) fn origin(uuid: &[u8; 16]) -> [u8; 32] {
    let mut chain = [0; 32];
    chain.copy_from_slice(digest::digest(&digest::SHA256, &[b"nacre disk v1 chain ", &uuid[..]].concat()).as_ref());
    chain
}

/// Where in the ring records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ring {
    pub(crate) length: u64,
    /// Where the next record begins.
    pub(crate) head: u64,
    /// Where the first record after the checkpoint begins.
    pub(crate) tail: u64,
    /// Blocks from tail to head: a full ring and an empty one are told apart by it.
    pub(crate) used: u64,
}

impl Ring {
    pub(crate) fn new(length: u64, position: u64) -> Self {
        Self { length, head: position, tail: position, used: 0 }
    }

    pub(crate) fn free(&self) -> u64 {
        self.length - self.used
    }

    /// Takes room for a record; where it begins. `None` where there is none.
    pub(crate) fn take(&mut self, blocks: u64) -> Option<u64> {
        let wraps = self.head + blocks > self.length;
        let skip = if wraps { self.length - self.head } else { 0 };
        if self.used + skip + blocks > self.length {
            return None;
        }
        let start = if wraps { 0 } else { self.head };
        self.head = start + blocks;
        self.used += skip + blocks;
        Some(start)
    }

    /// Gives back what lies before `position`, where a commit ended and `used_then` blocks had been taken since `tail`.
    pub(crate) fn release(&mut self, position: u64, released: u64) {
        self.tail = position;
        self.used -= released.min(self.used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{EpochRecord, KeyRing, MasterKey};

    fn keys() -> std::sync::Arc<EpochKeys> {
        let master = MasterKey { generation: 1, key: nacre_core::SecretArray::random() };
        let epoch = EpochRecord { id: 3, master: 1, salt: [1; 32], live: 0 };
        KeyRing::new([0; 16], vec![master], &[epoch]).epoch(3).unwrap()
    }

    #[test]
    fn records_come_back_or_are_refused() {
        let keys = keys();
        for count in [0, 1, capacity(1), capacity(1) + 1, capacity(MOST_BLOCKS)] {
            let changes = (0..count as u64).map(|lba| Change::write(lba, Entry::new(lba + 1, 3, lba, [5; 16])));
            let record = Record {
                sequence: 8,
                synced: 7,
                checkpoint: 2,
                chain: [9; 32],
                commit: true,
                changes: changes.collect(),
            };
            let (bytes, chain) = record.encode(&keys, &None).unwrap();
            assert_eq!(Record::decode(&mut bytes.clone(), &keys), Some((record, chain)));
            for at in (0..bytes.len()).step_by(if count > 1 { 97 } else { 1 }) {
                let mut bad = bytes.clone();
                bad[at] ^= 4;
                assert_eq!(Record::decode(&mut bad, &keys), None, "{at}");
            }
        }
    }

    #[test]
    fn trims_say_how_long_they_are() {
        let trim = Change::trim(5, 1 << 34);
        assert_eq!((trim.lba(), trim.entry(), trim.length()), (5, None, 1 << 34));
    }

    #[test]
    fn the_ring_wraps_and_never_overtakes_itself() {
        let mut ring = Ring::new(10, 8);
        assert_eq!(ring.take(2), Some(8));
        assert_eq!(ring.take(3), Some(0));
        assert_eq!(ring.take(6), None);
        assert_eq!(ring.take(5), Some(3));
        assert_eq!((ring.free(), ring.take(1)), (0, None));
        ring.release(0, 2);
        assert_eq!(ring.take(2), Some(8));
        let mut ring = Ring::new(10, 10);
        assert_eq!(ring.take(4), Some(0));
        let mut ring = Ring::new(10, 7);
        assert_eq!(ring.take(4), Some(0));
        assert_eq!(ring.free(), 3);
    }
}

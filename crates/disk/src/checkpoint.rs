//! A checkpoint: the disk as of a commit, without any journal. There are two slots, written in turns.
//!
//! ```text
//!  0  magic    "NACRECKP"
//!  8  master   u32  generation of the master key
//! 12  length   u32  bytes that are sealed
//! 16  salt     32 bytes, random for each write
//! 48  tag      16 bytes
//! 64  sealed   under HKDF(master key, salt); associated data: the 48 bytes at the beginning
//! ```
//! Sealed are [`Header`], then the epochs (48 bytes each), the numbers of blocks in use of the segments (u32 each), and the deferred
//! places (u64 each), then zeroes up to a multiple of 4096 with the 64 bytes.

use nacre_core::BLOCK_SIZE;
use rand_core::RngCore as _;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::{
    keys::{Auditor, EpochRecord, MasterKey, SALT_LEN},
    layout::{BLOCK, MOST_EPOCHS, PAGE_SLOTS},
    node::{self, Entry},
};

const MAGIC: &[u8; 8] = b"NACRECKP";
const CLEAR: usize = 64;
const AAD: usize = 48;

/// A tree: the entry that leads to its root, and how many levels it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Root {
    /// Leads to the root node.
    pub entry: Entry,
    /// Levels of nodes, at least one.
    pub height: u8,
}

/// The fixed part of a checkpoint.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    generation: U64,
    sequence: U64,
    chain: [u8; 32],
    journal_position: U64,
    blocks: U64,
    fence: U64,
    flags: U32,
    written_user: U64,
    written_store: U64,
    index: Root,
    space: Root,
    cursor: U64,
    epochs: U32,
    segments: U32,
    deferred: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEpoch {
    id: U32,
    master: U32,
    salt: [u8; SALT_LEN],
    live: U64,
}

const _: () = assert!(size_of::<RawEpoch>() == 48 && size_of::<Header>() == 178);

const CLEAN: u32 = 1;

/// A checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Counts checkpoints; even ones are in slot A.
    pub generation: u64,
    /// The last commit that it holds.
    pub sequence: u64,
    /// The head of the chain of commits there.
    pub chain: [u8; 32],
    /// Where in the ring the record after that commit begins, in blocks.
    pub journal_position: u64,
    /// The size of the disk, in blocks.
    pub blocks: u64,
    /// Which writer wrote it, as the anchor counts them.
    pub fence: u64,
    /// Whether the disk was closed with it.
    pub clean: bool,
    /// Bytes that users wrote, ever.
    pub written_user: u64,
    /// Bytes that were written to the store for it, ever.
    pub written_store: u64,
    /// The index: LBA → block.
    pub index: Root,
    /// Bitmap pages: number → block.
    pub space: Root,
    /// Where the cleaner goes on, an LBA.
    pub cursor: u64,
    pub(crate) epochs: Vec<EpochRecord>,
    /// Blocks in use, by segment.
    pub live: Vec<u32>,
    /// Blocks that are marked as used and are not any more: the next checkpoint frees them.
    pub deferred: Vec<u64>,
}

/// Blocks of a slot that has room for so many segments and blocks in them.
pub(crate) fn blocks_for(segments: u64, slots: u64) -> u64 {
    let pages = slots.div_ceil(PAGE_SLOTS);
    let deferred = most_deferred(pages);
    let sealed = size_of::<Header>() + MOST_EPOCHS * size_of::<RawEpoch>();
    (CLEAR as u64 + sealed as u64 + segments * 4 + deferred * 8).div_ceil(BLOCK)
}

/// The most deferred places for so many bitmap pages: each page, its tree, and what was set aside for them and not used.
pub(crate) fn most_deferred(pages: u64) -> u64 {
    2 * (pages + node::nodes(pages)) + 64
}

impl Checkpoint {
    /// What is written to its slot: whole blocks. `None` where the slot's `room` blocks do not suffice.
    pub(crate) fn encode(&self, master: &MasterKey, uuid: &[u8; 16], room: u64, auditor: &Auditor) -> Option<Vec<u8>> {
        let header = Header {
            generation: self.generation.into(),
            sequence: self.sequence.into(),
            chain: self.chain,
            journal_position: self.journal_position.into(),
            blocks: self.blocks.into(),
            fence: self.fence.into(),
            flags: if self.clean { CLEAN } else { 0 }.into(),
            written_user: self.written_user.into(),
            written_store: self.written_store.into(),
            index: self.index,
            space: self.space,
            cursor: self.cursor.into(),
            epochs: u32::try_from(self.epochs.len()).ok()?.into(),
            segments: u32::try_from(self.live.len()).ok()?.into(),
            deferred: u32::try_from(self.deferred.len()).ok()?.into(),
        };
        let mut bytes = vec![0; CLEAR];
        bytes.extend_from_slice(header.as_bytes());
        for epoch in &self.epochs {
            let raw = RawEpoch {
                id: epoch.id.into(),
                master: epoch.master.into(),
                salt: epoch.salt,
                live: epoch.live.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
        }
        self.live.iter().for_each(|live| bytes.extend_from_slice(&live.to_le_bytes()));
        self.deferred.iter().for_each(|place| bytes.extend_from_slice(&place.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
        if bytes.len() as u64 > room * BLOCK || self.epochs.len() > MOST_EPOCHS {
            return None;
        }
        let mut salt = [0; SALT_LEN];
        rand_core::OsRng.fill_bytes(&mut salt);
        let length = u32::try_from(bytes.len() - CLEAR).ok()?;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&master.generation.to_le_bytes());
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        bytes[16..AAD].copy_from_slice(&salt);
        let (clear, sealed) = bytes.split_at_mut(CLEAR);
        let tag = master.checkpoint(uuid, &salt).seal(0, &clear[..AAD], sealed, auditor);
        clear[AAD..].copy_from_slice(&tag);
        Some(bytes)
    }

    /// Opens what a slot holds; `None` where it is not authentic. `bytes` is changed.
    pub(crate) fn decode(bytes: &mut [u8], master: &MasterKey, uuid: &[u8; 16]) -> Option<Self> {
        let found = Clear::parse(bytes)?;
        let (clear, sealed) = bytes.split_at_mut(CLEAR);
        let sealed = sealed.get_mut(..found.length)?;
        if found.master != master.generation
            || !master.checkpoint(uuid, &found.salt).open(0, &clear[..AAD], found.tag, sealed)
        {
            return None;
        }
        Self::read(sealed)
    }

    /// Reads what was sealed; `None` where it makes no sense.
    pub fn read(sealed: &[u8]) -> Option<Self> {
        let (header, rest) = Header::ref_from_prefix(sealed).ok()?;
        let count = |number: U32| usize::try_from(number.get()).ok();
        let (epochs, rest) = <[RawEpoch]>::ref_from_prefix_with_elems(rest, count(header.epochs)?).ok()?;
        let (live, rest) = <[U32]>::ref_from_prefix_with_elems(rest, count(header.segments)?).ok()?;
        let (deferred, _) = <[U64]>::ref_from_prefix_with_elems(rest, count(header.deferred)?).ok()?;
        let sane = |root: &Root| (1..=9).contains(&root.height);
        if epochs.len() > MOST_EPOCHS || !sane(&header.index) || !sane(&header.space) {
            return None;
        }
        let epoch = |raw: &RawEpoch| EpochRecord {
            id: raw.id.get(),
            master: raw.master.get(),
            salt: raw.salt,
            live: raw.live.get(),
        };
        Some(Self {
            generation: header.generation.get(),
            sequence: header.sequence.get(),
            chain: header.chain,
            journal_position: header.journal_position.get(),
            blocks: header.blocks.get(),
            fence: header.fence.get(),
            clean: header.flags.get() & CLEAN != 0,
            written_user: header.written_user.get(),
            written_store: header.written_store.get(),
            index: header.index,
            space: header.space,
            cursor: header.cursor.get(),
            epochs: epochs.iter().map(epoch).collect(),
            live: live.iter().map(|live| live.get()).collect(),
            deferred: deferred.iter().map(|place| place.get()).collect(),
        })
    }
}

/// What is in the clear at the beginning of a slot.
pub(crate) struct Clear {
    pub(crate) master: u32,
    /// Bytes that are sealed.
    pub(crate) length: usize,
    salt: [u8; SALT_LEN],
    tag: [u8; 16],
}

impl Clear {
    /// Reads the beginning of a slot; `None` where it is none.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let clear = bytes.get(..CLEAR)?;
        if !clear.starts_with(MAGIC) {
            return None;
        }
        let number = |at: usize| Some(u32::from_le_bytes(*clear.get(at..)?.first_chunk::<4>()?));
        let length = usize::try_from(number(12)?).ok()?;
        if !(length + CLEAR).is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        Some(Self {
            master: number(8)?,
            length,
            salt: *clear.get(16..)?.first_chunk()?,
            tag: *clear.get(AAD..)?.first_chunk()?,
        })
    }

    /// Bytes of the whole checkpoint.
    pub(crate) fn total(&self) -> usize {
        self.length + CLEAR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_back_or_are_refused() {
        let master = MasterKey { generation: 2, key: nacre_core::SecretArray::random() };
        let checkpoint = Checkpoint {
            generation: 9,
            sequence: 77,
            chain: [3; 32],
            journal_position: 5,
            blocks: 4096,
            fence: 2,
            clean: true,
            written_user: 1,
            written_store: 2,
            index: Root { entry: Entry::new(9, 1, 2, [4; 16]), height: 2 },
            space: Root { entry: Entry::HOLE, height: 1 },
            cursor: 12,
            epochs: vec![EpochRecord { id: 1, master: 2, salt: [8; 32], live: 6 }],
            live: vec![1, 2, 3],
            deferred: vec![99],
        };
        let bytes = checkpoint.encode(&master, &[1; 16], 2, &None).unwrap();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(Checkpoint::decode(&mut bytes.clone(), &master, &[1; 16]), Some(checkpoint.clone()));
        assert_eq!(Checkpoint::decode(&mut bytes.clone(), &master, &[2; 16]), None);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x80;
            assert_eq!(Checkpoint::decode(&mut bad, &master, &[1; 16]), None, "{at}");
        }
        for length in [0, 63, 64, 4095] {
            assert_eq!(Checkpoint::decode(&mut bytes[..length].to_vec(), &master, &[1; 16]), None);
        }
        let large = Checkpoint { live: vec![0; 3000], ..checkpoint };
        assert_eq!(large.encode(&master, &[1; 16], 2, &None), None);
    }
}

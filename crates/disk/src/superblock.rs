//! The superblock: one block, and a copy of it in the next.
//!
//! ```text
//!    0  magic     "NACREDSK"
//!    8  version   u32  1
//!   12  reserved  u32  0
//!   16  salt      32 bytes, random for each write
//!   48  sealed    4032 bytes, under HKDF(root key, salt); associated data: the 48 bytes before
//! 4080  tag       16 bytes
//! ```
//! Sealed are [`Body`], then zeroes. All that changes with use is in checkpoints: a superblock is written only by format, grow and
//! changes of keys, both copies, one after the other, first the one that is damaged or older; of two valid copies the one of the higher
//! generation counts. An open that writes brings a copy that is behind up to date.

use std::cmp::Ordering;

use nacre_core::{BLOCK_SIZE, Page, SecretArray};
use rand_core::RngCore as _;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};
use zeroize::Zeroize as _;

use crate::{
    DiskError, RootKey,
    keys::{Auditor, MasterKey, SALT_LEN},
    layout::Geometry,
};

const MAGIC: &[u8; 8] = b"NACREDSK";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const TAG: usize = BLOCK_SIZE - 16;
/// Master keys that a superblock has room for: rotations whose data is still there.
pub const MOST_MASTERS: usize = 16;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMaster {
    generation: U32,
    key: [u8; 32],
}

/// What is sealed in a superblock.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    generation: U64,
    uuid: [u8; 16],
    segment_blocks: U64,
    checkpoint_blocks: U64,
    journal_blocks: U64,
    segments: U64,
    reserve_percent: u8,
    anchored: u8,
    masters: U32,
    master: [RawMaster; MOST_MASTERS],
}

const _: () = assert!(size_of::<Body>() == 638 && size_of::<Body>() <= TAG - HEADER);

/// A superblock that was authenticated.
pub(crate) struct Superblock {
    /// Counts the writes of superblocks.
    pub(crate) generation: u64,
    pub(crate) uuid: [u8; 16],
    pub(crate) geometry: Geometry,
    /// Whether the disk must not be opened without its anchor.
    pub(crate) anchored: bool,
    pub(crate) masters: Vec<MasterKey>,
}

/// Why a block is no superblock for this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not begin as one.
    NoMagic,
    /// A version that is not known here.
    Version(u32),
    /// Another key's, or changed.
    NotAuthentic,
    /// Authentic, and senseless.
    Senseless,
}

impl Superblock {
    /// The block, sealed.
    pub(crate) fn encode(&self, key: &RootKey, auditor: &Auditor) -> Box<Page> {
        let mut page = Page::zeroed();
        let mut salt = [0; SALT_LEN];
        rand_core::OsRng.fill_bytes(&mut salt);
        page.0[..8].copy_from_slice(MAGIC);
        page.0[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page.0[16..HEADER].copy_from_slice(&salt);
        {
            let Ok((body, _)) = Body::mut_from_prefix(&mut page.0[HEADER..TAG]) else {
                unreachable!("the body fits, see above")
            };
            body.generation.set(self.generation);
            body.uuid = self.uuid;
            body.segment_blocks.set(self.geometry.segment_blocks);
            body.checkpoint_blocks.set(self.geometry.checkpoint_blocks);
            body.journal_blocks.set(self.geometry.journal_blocks);
            body.segments.set(self.geometry.segments);
            body.reserve_percent = self.geometry.reserve_percent;
            body.anchored = u8::from(self.anchored);
            let mut count = 0;
            for (slot, master) in body.master.iter_mut().zip(&self.masters) {
                slot.generation.set(master.generation);
                slot.key = *master.key.expose();
                count += 1;
            }
            body.masters.set(count);
        }
        let (header, rest) = page.0.split_at_mut(HEADER);
        let (sealed, tag) = rest.split_at_mut(TAG - HEADER);
        tag.copy_from_slice(&key.superblock(&salt).seal(0, header, sealed, auditor));
        page
    }

    /// Opens a block.
    ///
    /// # Errors
    /// [`Refusal`]
    pub(crate) fn decode(page: &Page, key: &RootKey) -> Result<Self, Refusal> {
        let salt = peek(page)?;
        let mut copy = Box::new(page.clone());
        let (header, rest) = copy.0.split_at_mut(HEADER);
        let (sealed, tag) = rest.split_at_mut(TAG - HEADER);
        let mut expected = [0; 16];
        expected.copy_from_slice(tag);
        if !key.superblock(&salt).open(0, header, expected, sealed) {
            return Err(Refusal::NotAuthentic);
        }
        let read = Self::read(sealed);
        copy.0.zeroize();
        read.ok_or(Refusal::Senseless)
    }

    fn read(sealed: &[u8]) -> Option<Self> {
        let (body, _) = Body::ref_from_prefix(sealed).ok()?;
        let geometry = Geometry {
            segment_blocks: body.segment_blocks.get(),
            checkpoint_blocks: body.checkpoint_blocks.get(),
            journal_blocks: body.journal_blocks.get(),
            segments: body.segments.get(),
            reserve_percent: body.reserve_percent,
        };
        let count = usize::try_from(body.masters.get()).ok()?;
        let masters = body.master.get(..count).filter(|masters| !masters.is_empty())?;
        let master = |raw: &RawMaster| MasterKey {
            generation: raw.generation.get(),
            key: SecretArray::fill(|slot| slot.copy_from_slice(&raw.key)),
        };
        Some(Self {
            generation: body.generation.get(),
            uuid: body.uuid,
            geometry,
            anchored: body.anchored != 0,
            masters: masters.iter().map(master).collect(),
        })
    }
}

/// The salt of what may be a superblock, by what can be seen without a key.
///
/// # Errors
/// [`Refusal::NoMagic`], [`Refusal::Version`]
pub fn peek(page: &Page) -> Result<[u8; 32], Refusal> {
    if !page.0.starts_with(MAGIC) {
        return Err(Refusal::NoMagic);
    }
    let mut version = [0; 4];
    version.copy_from_slice(&page.0[8..12]);
    let version = u32::from_le_bytes(version);
    if version != VERSION {
        return Err(Refusal::Version(version));
    }
    let mut salt = [0; SALT_LEN];
    salt.copy_from_slice(&page.0[16..HEADER]);
    Ok(salt)
}

/// What both copies say together: the newer valid one, and the copy that is not it, because it is damaged or because a crash kept it
/// from being written.
pub(crate) fn choose(copies: [&Page; 2], key: &RootKey, store: &str) -> Result<(Superblock, Option<u64>), DiskError> {
    let decoded = copies.map(|copy| Superblock::decode(copy, key));
    match decoded {
        [Ok(first), Ok(second)] => {
            let behind = match first.generation.cmp(&second.generation) {
                Ordering::Equal => None,
                Ordering::Less => Some(0),
                Ordering::Greater => Some(1),
            };
            Ok((if behind == Some(0) { second } else { first }, behind))
        }
        [Ok(only), Err(_)] => Ok((only, Some(1))),
        [Err(_), Ok(only)] => Ok((only, Some(0))),
        [Err(first), Err(second)] => Err(refused(first, second, store)),
    }
}

fn refused(first: Refusal, second: Refusal, store: &str) -> DiskError {
    let store = store.to_owned();
    let has = |refusal| first == refusal || second == refusal;
    if has(Refusal::Senseless) {
        return DiskError::Damaged { store, what: "the superblock is authentic and makes no sense".into() };
    }
    match (first, second) {
        _ if has(Refusal::NotAuthentic) => DiskError::WrongKey { store },
        (Refusal::Version(version), _) | (_, Refusal::Version(version)) => DiskError::Version { store, version },
        _ => DiskError::NoDisk { store },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(generation: u64) -> Superblock {
        Superblock {
            generation,
            uuid: [7; 16],
            geometry: Geometry::plan(4096, 10),
            anchored: true,
            masters: vec![MasterKey { generation: 1, key: SecretArray::random() }],
        }
    }

    #[test]
    fn every_flipped_byte_is_seen() {
        let key = RootKey::random();
        let page = sample(3).encode(&key, &None);
        let back = Superblock::decode(&page, &key).unwrap();
        assert_eq!((back.generation, back.uuid, back.anchored), (3, [7; 16], true));
        assert_eq!(back.geometry, Geometry::plan(4096, 10));
        assert!(matches!(Superblock::decode(&page, &RootKey::random()), Err(Refusal::NotAuthentic)));
        for at in 0..BLOCK_SIZE {
            let mut bad = page.clone();
            bad.0[at] ^= 1;
            assert!(Superblock::decode(&bad, &key).is_err(), "{at}");
        }
    }

    #[test]
    fn one_damaged_copy_is_answered_by_the_other() {
        let key = RootKey::random();
        let (old, new) = (sample(3).encode(&key, &None), sample(4).encode(&key, &None));
        let zero = Page::zeroed();
        assert_eq!(choose([&new, &old], &key, "x").unwrap().0.generation, 4);
        let (found, damaged) = choose([&zero, &old], &key, "x").unwrap();
        assert_eq!((found.generation, damaged), (3, Some(0)));
        assert!(matches!(choose([&zero, &zero], &key, "x"), Err(DiskError::NoDisk { .. })));
        assert!(matches!(choose([&new, &zero], &RootKey::random(), "x"), Err(DiskError::WrongKey { .. })));
    }
}

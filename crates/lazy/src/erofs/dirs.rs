//! Directories as EROFS has them: blocks of 4096 bytes, each with its entries and then their names, all in one order by bytes.
//!
//! A block begins with 12 bytes for each of its entries; the place of the first name says how many. Names follow without gaps, and
//! end where the next begins, or, for a block's last, with a NUL or the block. A block is filled as far as whole entries go; the last is
//! as long as it has to be.

use zerocopy::{FromBytes as _, IntoBytes as _};

use super::layout::{BLOCK, DIRENT, RawDirent};

/// What is written for a name.
pub(crate) struct DirEntry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) kind: u8,
}

/// How many bytes a directory has, from the lengths of its names in their order.
pub(crate) fn directory_size(names: impl Iterator<Item = usize>) -> u64 {
    let (mut blocks, mut used) = (0u64, 0);
    for name in names {
        let entry = DIRENT + name;
        if used + entry > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += entry;
    }
    blocks * BLOCK as u64 + used as u64
}

/// Splits a directory's entries into those of each block.
pub(crate) fn split<'e, 'a>(mut entries: &'e [DirEntry<'a>]) -> impl Iterator<Item = &'e [DirEntry<'a>]> {
    std::iter::from_fn(move || {
        let mut used = 0;
        let fits = |entry: &&DirEntry<'_>| {
            used += DIRENT + entry.name.len();
            used <= BLOCK
        };
        let count = entries.iter().take_while(fits).count();
        let (block, rest) = entries.split_at_checked(count)?;
        entries = rest;
        (!block.is_empty()).then_some(block)
    })
}

/// The bytes of a block, without what follows its last name.
pub(crate) fn fill(entries: &[DirEntry<'_>], block: &mut Vec<u8>) {
    block.clear();
    let mut name_at = entries.len() * DIRENT;
    for entry in entries {
        // Below 4096: `split` saw to it.
        let at = u16::try_from(name_at).unwrap_or(u16::MAX);
        let raw = RawDirent { nid: entry.nid.into(), name_at: at.into(), kind: entry.kind, reserved: 0 };
        block.extend_from_slice(raw.as_bytes());
        name_at += entry.name.len();
    }
    for entry in entries {
        block.extend_from_slice(entry.name);
    }
}

/// One block of a directory, as somebody else wrote it.
#[derive(Clone, Copy)]
pub(crate) struct DirBlock<'a> {
    bytes: &'a [u8],
    count: usize,
}

impl<'a> DirBlock<'a> {
    /// `None` where the entries do not end within the block.
    pub(crate) fn new(bytes: &'a [u8]) -> Option<Self> {
        let (first, _) = RawDirent::ref_from_prefix(bytes).ok()?;
        let names = usize::from(first.name_at.get());
        let whole = names >= DIRENT && names.is_multiple_of(DIRENT) && names < bytes.len();
        whole.then_some(Self { bytes, count: names / DIRENT })
    }

    /// How many entries it has: one at least.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn raw(&self, index: usize) -> Option<&'a RawDirent> {
        if index >= self.count {
            return None;
        }
        let (raw, _) = RawDirent::ref_from_prefix(self.bytes.get(index * DIRENT..)?).ok()?;
        Some(raw)
    }

    /// A name, and whether it may be one is not said. `None` where it is not within the block.
    pub(crate) fn name(&self, index: usize) -> Option<&'a [u8]> {
        let start = usize::from(self.raw(index)?.name_at.get());
        if start < self.count * DIRENT {
            return None;
        }
        if let Some(next) = self.raw(index + 1) {
            return self.bytes.get(start..usize::from(next.name_at.get()));
        }
        let rest = self.bytes.get(start..)?;
        rest.get(..rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_filled_as_far_as_entries_go() {
        let names: Vec<String> = (0..500).map(|n| format!("{n:0200}")).collect();
        let entries: Vec<_> = names.iter().map(|name| DirEntry { name: name.as_bytes(), nid: 7, kind: 1 }).collect();
        let blocks: Vec<_> = split(&entries).collect();
        assert_eq!(blocks.iter().map(|block| block.len()).sum::<usize>(), 500);
        assert!(blocks.iter().rev().skip(1).all(|block| block.len() == 4096 / 212));
        let last = blocks.last().unwrap().len() * 212;
        assert_eq!(directory_size(names.iter().map(String::len)), (blocks.len() as u64 - 1) * 4096 + last as u64);
        let mut bytes = Vec::new();
        fill(blocks[3], &mut bytes);
        bytes.resize(BLOCK, 0);
        let read = DirBlock::new(&bytes).unwrap();
        assert_eq!(read.count(), blocks[3].len());
        for (index, entry) in blocks[3].iter().enumerate() {
            assert_eq!(read.name(index), Some(entry.name));
            assert_eq!(read.raw(index).unwrap().nid.get(), 7);
        }
        assert!(read.raw(blocks[3].len()).is_none() && read.name(blocks[3].len()).is_none());
    }

    #[test]
    fn broken_blocks_give_nothing() {
        assert!(DirBlock::new(&[]).is_none());
        assert!(DirBlock::new(&[0; 4096]).is_none());
        let mut block = vec![0xFF; 4096];
        assert!(DirBlock::new(&block).is_none());
        block[8..10].copy_from_slice(&24u16.to_le_bytes());
        let read = DirBlock::new(&block).unwrap();
        assert_eq!(read.count(), 2);
        assert!(read.name(0).is_none() && read.name(1).is_none());
    }
}

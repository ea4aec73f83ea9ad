//! A store in memory, for tests and for what need not outlive its process.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, Page, check_range};

/// Blocks of one piece of the store: 1 MiB.
const PIECE_BLOCKS: u64 = 256;

/// Blocks that lie together, each there once it was written. Pieces are locked one by one, so that writers meet seldom.
type Piece = RwLock<Vec<Option<Box<Page>>>>;

/// Blocks in memory. A large one costs only what was written to it; what never was reads as zeroes.
pub struct MemoryStore {
    size: AtomicU64,
    pieces: RwLock<BTreeMap<u64, Piece>>,
}

impl MemoryStore {
    /// One of `size` bytes, of which whole blocks count.
    pub fn new(size: u64) -> Self {
        let size = size - size % BLOCK_SIZE as u64;
        Self { size: AtomicU64::new(size), pieces: RwLock::default() }
    }

    /// How many bytes of memory its content takes.
    pub fn allocated(&self) -> u64 {
        let used = |piece: &Piece| lock(piece).iter().flatten().count() as u64;
        self.pieces.read().unwrap_or_else(PoisonError::into_inner).values().map(used).sum::<u64>() * BLOCK_SIZE as u64
    }

    /// Gives each piece of a range to `visit`, with the range of its blocks; `None` is a piece that is not there.
    fn visit(&self, offset: u64, length: u64, mut visit: impl FnMut(Option<&Piece>, Range<usize>)) {
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        for (number, blocks) in split(offset, length) {
            visit(pieces.get(&number), blocks);
        }
    }

    fn make_pieces(&self, offset: u64, length: u64) {
        let missing =
            |pieces: &BTreeMap<u64, Piece>| split(offset, length).any(|(number, _)| !pieces.contains_key(&number));
        if missing(&self.pieces.read().unwrap_or_else(PoisonError::into_inner)) {
            let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
            for (number, _) in split(offset, length) {
                pieces.entry(number).or_insert_with(|| RwLock::new((0..PIECE_BLOCKS).map(|_| None).collect()));
            }
        }
    }
}

fn lock(piece: &Piece) -> RwLockReadGuard<'_, Vec<Option<Box<Page>>>> {
    piece.read().unwrap_or_else(PoisonError::into_inner)
}

fn lock_mut(piece: &Piece) -> RwLockWriteGuard<'_, Vec<Option<Box<Page>>>> {
    piece.write().unwrap_or_else(PoisonError::into_inner)
}

/// The pieces that a range of whole blocks touches, each with the range of blocks in it.
fn split(offset: u64, length: u64) -> impl Iterator<Item = (u64, Range<usize>)> {
    let (mut at, end) = (offset / BLOCK_SIZE as u64, (offset + length) / BLOCK_SIZE as u64);
    std::iter::from_fn(move || {
        let (number, first) = (at / PIECE_BLOCKS, at % PIECE_BLOCKS);
        let count = (PIECE_BLOCKS - first).min(end - at);
        at += count;
        let inside = |block: u64| usize::try_from(block).unwrap_or(usize::MAX);
        (count > 0).then(|| (number, inside(first)..inside(first + count)))
    })
}

impl BlockStore for MemoryStore {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        check_range("read", offset, buffer.len() as u64, self.size())?;
        let length = buffer.len() as u64;
        let mut target = buffer.chunks_mut(BLOCK_SIZE);
        self.visit(offset, length, |piece, blocks| match piece {
            Some(piece) => {
                let piece = lock(piece);
                for (page, block) in piece.get(blocks).unwrap_or_default().iter().zip(&mut target) {
                    match page {
                        Some(page) => block.copy_from_slice(&page.0),
                        None => block.fill(0),
                    }
                }
            }
            None => target.by_ref().take(blocks.len()).for_each(|block| block.fill(0)),
        });
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range("write", offset, data.len() as u64, self.size())?;
        let length = data.len() as u64;
        self.make_pieces(offset, length);
        let mut source = data.chunks(BLOCK_SIZE);
        self.visit(offset, length, |piece, blocks| {
            let Some(piece) = piece else { return };
            for (page, block) in lock_mut(piece).get_mut(blocks).unwrap_or_default().iter_mut().zip(&mut source) {
                page.get_or_insert_with(Page::zeroed).0.copy_from_slice(block);
            }
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range("write zeroes", offset, length, self.size())?;
        let (first, end) = (offset / BLOCK_SIZE as u64, (offset + length) / BLOCK_SIZE as u64);
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        // Only over pieces that are there: the range may be the whole of a huge store.
        for (number, piece) in pieces.range(first / PIECE_BLOCKS..end.div_ceil(PIECE_BLOCKS)) {
            let start = number * PIECE_BLOCKS;
            for (block, page) in (start..).zip(lock_mut(piece).iter_mut()) {
                if (first..end).contains(&block) {
                    *page = None;
                }
            }
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        let old = self.size();
        if size < old || !size.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(BlockError::OutOfRange { op: "grow", offset: 0, length: size, size: old });
        }
        self.size.fetch_max(size, Ordering::AcqRel);
        Ok(())
    }

    fn is_slow(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("size", &self.size()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_huge_store_costs_what_was_written() {
        let store = MemoryStore::new(1 << 50);
        store.write_at((1 << 50) - 4096, &[7; 4096]).unwrap();
        store.write_at(1 << 40, &[8; 8192]).unwrap();
        assert_eq!(store.allocated(), 3 * 4096);
        store.trim(0, (1 << 40) + 4096).unwrap();
        assert_eq!(store.allocated(), 2 * 4096);
        let mut block = [1; 8192];
        store.read_at(1 << 40, &mut block).unwrap();
        assert_eq!((block[4095], block[4096]), (0, 8));
    }
}

//! Images that share what they have in common.

use std::sync::Arc;

use nacre_core::BLOCK_SIZE;

/// The content of one block.
pub type Block = [u8; BLOCK_SIZE];

/// Blocks of a chunk: a change copies so many pointers, a copy of the image takes one for each chunk.
const CHUNK: usize = 64;

type Chunk = [Option<Arc<Block>>; CHUNK];

/// The content of a store at one moment. A copy costs little, whatever its size; blocks that were never written cost nothing.
#[derive(Clone, Debug)]
pub struct Snapshot {
    blocks: u64,
    chunks: Vec<Arc<Chunk>>,
}

impl Snapshot {
    /// Zeroes.
    ///
    /// # Panics
    /// `size` is not made of whole blocks.
    pub fn zeroed(size: u64) -> Self {
        assert!(size.is_multiple_of(BLOCK_SIZE as u64), "{size} bytes are not whole blocks");
        let mut snapshot = Self { blocks: 0, chunks: Vec::new() };
        snapshot.resize(size / BLOCK_SIZE as u64);
        snapshot
    }

    /// How many blocks it holds.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.blocks * BLOCK_SIZE as u64
    }

    /// Makes it larger, with zeroes, or smaller.
    pub fn resize(&mut self, blocks: u64) {
        let end = usize::try_from(blocks).unwrap();
        let empty: Arc<Chunk> = Arc::new([const { None }; CHUNK]);
        self.chunks.resize(end.div_ceil(CHUNK), empty);
        for block in blocks..self.blocks.min((self.chunks.len() * CHUNK) as u64) {
            self.set(block, None);
        }
        self.blocks = blocks;
    }

    fn place(block: u64) -> (usize, usize) {
        let block = usize::try_from(block).unwrap();
        (block / CHUNK, block % CHUNK)
    }

    /// What is in a block; `None` where it was never written, and reads as zeroes.
    pub fn get(&self, block: u64) -> Option<&Arc<Block>> {
        let (chunk, at) = Self::place(block);
        self.chunks.get(chunk)?.get(at)?.as_ref()
    }

    /// The bytes of a block.
    pub fn bytes(&self, block: u64) -> Block {
        self.get(block).map_or([0; BLOCK_SIZE], |content| **content)
    }

    /// Replaces a block.
    ///
    /// # Panics
    /// There is no such block.
    pub fn set(&mut self, block: u64, content: Option<Arc<Block>>) {
        let (chunk, at) = Self::place(block);
        Arc::make_mut(self.chunks.get_mut(chunk).unwrap())[at] = content;
    }

    /// Changes the bytes of a block.
    pub fn change(&mut self, block: u64, change: impl FnOnce(&mut Block)) {
        let mut content = self.bytes(block);
        change(&mut content);
        self.set(block, Some(Arc::new(content)));
    }

    /// The blocks that were ever written.
    pub fn written(&self) -> impl Iterator<Item = u64> {
        (0..self.blocks).filter(|block| self.get(*block).is_some())
    }

    /// The blocks that are not the same in both.
    pub fn differing(&self, other: &Self) -> Vec<u64> {
        (0..self.blocks.max(other.blocks))
            .filter(|block| match (self.get(*block), other.get(*block)) {
                (None, None) => false,
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => false,
                _ => self.bytes(*block) != other.bytes(*block),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_do_not_change_with_the_original() {
        let mut one = Snapshot::zeroed(1 << 20);
        one.change(200, |bytes| bytes[0] = 1);
        let copy = one.clone();
        one.change(200, |bytes| bytes[0] = 2);
        one.change(3, |bytes| bytes[5] = 2);
        assert_eq!((copy.bytes(200)[0], one.bytes(200)[0]), (1, 2));
        assert_eq!(copy.differing(&one), [3, 200]);
        assert_eq!(copy.written().collect::<Vec<_>>(), [200]);
    }

    #[test]
    fn what_was_cut_off_does_not_come_back() {
        let mut one = Snapshot::zeroed(100 * 4096);
        one.change(90, |bytes| bytes[0] = 1);
        one.resize(80);
        one.resize(100);
        assert_eq!(one.written().count(), 0);
        assert_eq!(one.size(), 100 * 4096);
    }
}

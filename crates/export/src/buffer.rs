//! Memory that begins at a page, so that direct I/O takes it as it is.

use nacre_core::BLOCK_SIZE;

/// Bytes that begin at a multiple of 4096 and are kept from use to use.
#[derive(Default)]
pub(crate) struct PageBuffer {
    /// Up to a page longer than what is used of it.
    memory: Vec<u8>,
    /// Where the first whole page begins.
    start: usize,
}

impl PageBuffer {
    /// `length` bytes to overwrite. What they hold is what was there before.
    pub(crate) fn get(&mut self, length: usize) -> &mut [u8] {
        if self.memory.len() < self.start + length {
            // The old memory goes first: nothing of it is needed.
            self.memory = Vec::new();
            self.memory = vec![0; length + BLOCK_SIZE];
            self.start = self.memory.as_ptr().align_offset(BLOCK_SIZE).min(BLOCK_SIZE);
        }
        self.memory.get_mut(self.start..self.start + length).unwrap_or_default()
    }

    /// The first bytes of what [`get`](Self::get) gave last.
    pub(crate) fn filled(&self, length: usize) -> &[u8] {
        self.memory.get(self.start..self.start + length).unwrap_or_default()
    }

    /// Gives the memory back where it is more than `most` bytes.
    pub(crate) fn shrink(&mut self, most: usize) {
        if self.memory.len() > most + BLOCK_SIZE {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_kept() {
        let mut buffer = PageBuffer::default();
        for length in [1, 4096, 100_000, 5] {
            let bytes = buffer.get(length);
            assert_eq!(bytes.len(), length);
            assert_eq!(bytes.as_ptr().addr() % BLOCK_SIZE, 0);
            bytes.fill(7);
            assert_eq!(buffer.filled(length), vec![7; length]);
        }
        buffer.shrink(1 << 20);
        assert_eq!(buffer.filled(5), [7; 5]);
        buffer.shrink(4096);
        assert!(buffer.filled(5).is_empty());
    }
}

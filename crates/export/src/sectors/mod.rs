//! Requests of any bytes over a store of whole blocks.
//!
//! What is whole blocks goes to the store as it is. Of what begins or ends inside of a block, that block is read, changed and written
//! again. Meanwhile nobody else may write it, or one of the two writes would be lost, although both were answered; so every write takes
//! a lock on the range of blocks that it touches ([`locks`]): shared among those of whole blocks, which may overlap as the
//! store likes, and exclusive for those that read first. Reads take none: a block is written as a whole, before or after.

mod locks;

use nacre_core::{BLOCK_SIZE, BlockError, ReadRequest, WriteRequest};

use self::locks::{Blocks, RangeLocks};
use crate::{Served, buffer::PageBuffer};

/// A block in bytes, as offsets count.
const BLOCK: u64 = BLOCK_SIZE as u64;

/// A block store that takes requests of any offset and length.
pub struct Sectors {
    store: Served,
    locks: RangeLocks,
}

/// Whether a request is made of whole blocks.
pub fn is_whole(offset: u64, length: u64) -> bool {
    (offset | length) & (BLOCK - 1) == 0
}

impl Sectors {
    /// Over this store. Whoever writes to the store has to do so through the same `Sectors`.
    pub fn new(store: Served) -> Self {
        Self { store, locks: RangeLocks::default() }
    }

    /// The store beneath.
    pub fn store(&self) -> &Served {
        &self.store
    }

    /// Reads any bytes.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        if is_whole(offset, buffer.len() as u64) {
            return self.store.read_at(offset, buffer);
        }
        let mut requests = [ReadRequest::new(offset, buffer)];
        self.read_many(&mut requests);
        let [request] = requests;
        request.outcome
    }

    /// Carries out several reads of any bytes, at the same time where the store can.
    pub fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        let partial = |request: &ReadRequest<'_>| !is_whole(request.offset, request.buffer.len() as u64);
        let count = requests.iter().filter(|request| partial(request)).count();
        if count == 0 {
            return self.store.read_many(requests);
        }
        // Of each partial one, the first and the last block go through pages of ours, and what lies between goes where it belongs.
        let mut memory = PageBuffer::default();
        let mut pages = memory.get(2 * count * BLOCK_SIZE).chunks_exact_mut(BLOCK_SIZE);
        let mut whole = Vec::with_capacity(requests.len() + 2 * count);
        let mut cuts = Vec::with_capacity(requests.len());
        for request in requests.iter_mut() {
            let cut = Cut::of(request.offset, request.buffer.len());
            let (head, rest) = request.buffer.split_at_mut(cut.head);
            let (middle, tail) = rest.split_at_mut(cut.middle);
            let before = whole.len();
            for (offset, part) in [(cut.first(), head), (cut.last(), tail)] {
                if !part.is_empty() {
                    whole.push(ReadRequest::new(offset, pages.next().unwrap_or_default()));
                }
            }
            if !middle.is_empty() {
                whole.push(ReadRequest::new(cut.offset + cut.head as u64, middle));
            }
            cuts.push((cut, whole.len() - before));
        }
        self.store.read_many(&mut whole);
        let mut outcomes = whole.into_iter().map(|part| part.outcome);
        let outcomes: Vec<_> =
            cuts.iter().map(|(_, parts)| outcomes.by_ref().take(*parts).fold(Ok(()), Result::and)).collect();
        let mut pages = memory.filled(2 * count * BLOCK_SIZE).chunks_exact(BLOCK_SIZE);
        for ((request, (cut, _)), outcome) in requests.iter_mut().zip(cuts).zip(outcomes) {
            request.outcome = outcome;
            let (head, rest) = request.buffer.split_at_mut(cut.head);
            let (_, tail) = rest.split_at_mut(cut.middle);
            if !head.is_empty() {
                copy(head, pages.next().and_then(|page| page.get(cut.skip..)));
            }
            if !tail.is_empty() {
                copy(tail, pages.next());
            }
        }
    }

    /// Writes any bytes.
    ///
    /// # Errors
    /// [`BlockError`]; some of it may have been written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        if is_whole(offset, data.len() as u64) {
            let blocks = Blocks::of(offset, data.len() as u64);
            let _lock = self.locks.shared([blocks]);
            return self.store.write_at(offset, data);
        }
        let cut = Cut::of(offset, data.len());
        self.inside(offset, data.len() as u64)?;
        let _lock = self.locks.exclusive(Blocks::of(offset, data.len() as u64));
        let (head, rest) = data.split_at(cut.head);
        let (middle, tail) = rest.split_at(cut.middle);
        let mut pages = self.edges(&cut)?;
        let mut pages = pages.get(2 * BLOCK_SIZE).chunks_exact_mut(BLOCK_SIZE);
        let mut buffers: Vec<&[u8]> = Vec::with_capacity(3);
        if let (false, Some(page)) = (head.is_empty(), pages.next()) {
            overwrite(page, cut.skip, head);
            buffers.push(page);
        }
        if !middle.is_empty() {
            buffers.push(middle);
        }
        if let (false, Some(page)) = (tail.is_empty(), pages.next()) {
            overwrite(page, 0, tail);
            buffers.push(page);
        }
        self.store.write_many(&[WriteRequest { offset: offset - cut.skip as u64, buffers }])
    }

    /// Carries out several writes of whole blocks, in any order, at the same time where the store can.
    ///
    /// # Errors
    /// [`BlockError`] of the first that failed; the others may have been carried out.
    pub fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        let blocks = requests.iter().map(|request| Blocks::of(request.offset, request.length()));
        let _lock = self.locks.shared(blocks);
        self.store.write_many(requests)
    }

    /// Makes any bytes read as zeroes.
    ///
    /// # Errors
    /// [`BlockError`]; some of it may have been written.
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.inside(offset, length)?;
        let (first, end) = (offset.next_multiple_of(BLOCK), (offset + length) / BLOCK * BLOCK);
        if first >= end {
            // Nothing whole in it: less than two blocks.
            let zeroes = vec![0; usize::try_from(length).unwrap_or(2 * BLOCK_SIZE)];
            return self.write(offset, &zeroes);
        }
        let zeroes = [0; BLOCK_SIZE];
        for (offset, length) in [(offset, first - offset), (end, offset + length - end)] {
            if length > 0 {
                let length = usize::try_from(length).unwrap_or(BLOCK_SIZE);
                self.write(offset, zeroes.get(..length).unwrap_or(&zeroes))?;
            }
        }
        let _lock = self.locks.shared([Blocks::of(first, end - first)]);
        self.store.write_zeroes(first, end - first)
    }

    /// Says that nobody needs these bytes any more. Blocks that are not wholly among them stay as they are.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.inside(offset, length)?;
        let (first, end) = (offset.next_multiple_of(BLOCK), (offset + length) / BLOCK * BLOCK);
        if first >= end {
            return Ok(());
        }
        let _lock = self.locks.shared([Blocks::of(first, end - first)]);
        self.store.trim(first, end - first)
    }

    /// Makes all writes that have returned durable.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn flush(&self) -> Result<(), BlockError> {
        self.store.flush()
    }

    /// Checks that no sum of offset and length overflows or leaves the store.
    fn inside(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        let size = self.store.size();
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(BlockError::OutOfRange { op: "write", offset, length, size })
    }

    /// Reads the blocks that are changed in part, the first before the last.
    fn edges(&self, cut: &Cut) -> Result<PageBuffer, BlockError> {
        let mut memory = PageBuffer::default();
        let mut pages = memory.get(2 * BLOCK_SIZE).chunks_exact_mut(BLOCK_SIZE);
        let mut reads = Vec::with_capacity(2);
        for (part, offset) in [(cut.head, cut.first()), (cut.tail, cut.last())] {
            if let (true, Some(page)) = (part > 0, pages.next()) {
                reads.push(ReadRequest::new(offset, page));
            }
        }
        self.store.read_many(&mut reads);
        for read in reads {
            read.outcome?;
        }
        Ok(memory)
    }
}

/// How a request divides into a part of its first block, whole blocks, and a part of its last. What lies inside of one block is `head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    offset: u64,
    /// Bytes of the first block before the request.
    skip: usize,
    head: usize,
    middle: usize,
    tail: usize,
}

impl Cut {
    fn of(offset: u64, length: usize) -> Self {
        let skip = usize::try_from(offset % BLOCK).unwrap_or_default();
        let head = if skip == 0 { 0 } else { length.min(BLOCK_SIZE - skip) };
        let middle = (length - head) / BLOCK_SIZE * BLOCK_SIZE;
        Self { offset, skip, head, middle, tail: length - head - middle }
    }

    /// Where the block of the head begins.
    fn first(&self) -> u64 {
        self.offset - self.skip as u64
    }

    /// Where the block of the tail begins.
    fn last(&self) -> u64 {
        self.offset + (self.head + self.middle) as u64
    }
}

/// Copies the front of `from`.
fn copy(to: &mut [u8], from: Option<&[u8]>) {
    if let Some(from) = from.and_then(|from| from.get(..to.len())) {
        to.copy_from_slice(from);
    }
}

/// Copies `data` into the page from byte `at` on.
fn overwrite(page: &mut [u8], at: usize, data: &[u8]) {
    if let Some(place) = page.get_mut(at..at + data.len()) {
        place.copy_from_slice(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_at_blocks() {
        let cut = |offset, length| {
            let Cut { skip, head, middle, tail, .. } = Cut::of(offset, length);
            (skip, head, middle, tail)
        };
        assert_eq!(cut(0, 8192), (0, 0, 8192, 0));
        assert_eq!(cut(0, 512), (0, 0, 0, 512));
        assert_eq!(cut(512, 512), (512, 512, 0, 0));
        assert_eq!(cut(4095, 2), (4095, 1, 0, 1));
        assert_eq!(cut(4095, 4098), (4095, 1, 4096, 1));
        assert_eq!(cut(8191, 4097), (4095, 1, 4096, 0));
    }
}

//! The port to anything that stores blocks: a file, a device, memory, a directory, an object store, and the secure disk itself, which
//! stands on one such store and is another.
//!
//! Calls are synchronous and take `&self`: whoever wants several requests in flight calls from several threads, or hands over several
//! at once ([`BlockStore::read_many`], [`BlockStore::write_many`]).

use std::{fmt, io, sync::Arc};

/// Bytes of a block. Offsets and lengths of every request are multiples of it.
pub const BLOCK_SIZE: usize = 4096;

/// One block in memory, aligned so that direct I/O takes it as it is.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; BLOCK_SIZE]);

impl Page {
    /// A page of zeroes, on the heap.
    pub fn zeroed() -> Box<Self> {
        Box::new(Self([0; BLOCK_SIZE]))
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Page(…)")
    }
}

/// Why a request to a [`BlockStore`] was not carried out. It can be cloned, since one cause may fail many requests.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BlockError {
    /// The medium or the system failed.
    #[error("{op} of {length} bytes at offset {offset} failed: {source}")]
    Io {
        /// What was tried: `read`, `write`, `flush`, `trim`, `grow`.
        op: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        length: u64,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The request reaches beyond the end, or is not made of whole blocks.
    #[error("{op} of {length} bytes at offset {offset} does not fit a device of {size} bytes in blocks of 4096")]
    OutOfRange {
        /// What was tried.
        op: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        length: u64,
        /// The size of the store, in bytes.
        size: u64,
    },
    /// What is stored there is not what was written: it was changed, moved, replaced by something older, or it decayed.
    #[error("LBA {first}{}: {what}", if *count > 1 { format!(" to {}", first + count - 1) } else { String::new() })]
    Integrity {
        /// The first logical block that cannot be read.
        first: u64,
        /// How many cannot.
        count: u64,
        /// What was expected and what was found, and where in the store.
        what: String,
    },
    /// There is no room left.
    #[error("no space: {0}")]
    NoSpace(String),
    /// It takes no writes: it was opened so, or a failure made it so.
    #[error("read-only: {0}")]
    ReadOnly(String),
    /// Somebody else has taken over; what was acknowledged before is theirs to keep.
    #[error("fenced: {0}")]
    Fenced(String),
    /// This store cannot do that.
    #[error("not supported: {0}")]
    Unsupported(String),
}

impl BlockError {
    /// An error of the system while doing `op`.
    pub fn io(op: &'static str, offset: u64, length: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull => Self::NoSpace(format!("{op} of {length} bytes at offset {offset}: {source}")),
            _ => Self::Io { op, offset, length, source: Arc::new(source) },
        }
    }
}

/// One of many reads.
#[derive(Debug)]
pub struct ReadRequest<'a> {
    /// Where, in bytes.
    pub offset: u64,
    /// Where to; what it holds after an error is not to be used.
    pub buffer: &'a mut [u8],
    /// How it went; `Ok` before.
    pub outcome: Result<(), BlockError>,
}

impl<'a> ReadRequest<'a> {
    /// A request that nobody has tried yet.
    pub fn new(offset: u64, buffer: &'a mut [u8]) -> Self {
        Self { offset, buffer, outcome: Ok(()) }
    }
}

/// One of many writes: consecutive buffers, each of whole blocks, to one place.
#[derive(Debug)]
pub struct WriteRequest<'a> {
    /// Where, in bytes.
    pub offset: u64,
    /// What, in this order.
    pub buffers: Vec<&'a [u8]>,
}

impl WriteRequest<'_> {
    /// How much, in bytes.
    pub fn length(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }
}

/// What stores blocks of 4096 bytes.
///
/// A write is visible to reads once it returned, and durable once a later [`flush`](Self::flush) returned; until then a crash may
/// lose it, tear it between blocks, or keep it without others that went before. A read that fails leaves nothing to use.
pub trait BlockStore: Send + Sync {
    /// Bytes that it holds; a multiple of [`BLOCK_SIZE`].
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// [`BlockError`]
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`BlockError`]; some of the blocks may have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError>;

    /// Makes all writes that have returned durable.
    ///
    /// # Errors
    /// [`BlockError`]; then nothing is known about any write since the last flush.
    fn flush(&self) -> Result<(), BlockError>;

    /// Says that nobody needs the content of this range any more. A secure disk reads as zeroes there; other stores may do anything.
    ///
    /// # Errors
    /// [`BlockError`]
    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError>;

    /// Whether what was trimmed reads as zeroes, so that a trim is the cheapest way to write them.
    fn trim_reads_zero(&self) -> bool {
        false
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// [`BlockError`]
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        let zeroes = vec![0; usize::try_from(length.min(1 << 20)).unwrap_or(1 << 20)];
        let mut done = 0;
        while done < length {
            let part = zeroes.get(..usize::try_from(length - done).unwrap_or(usize::MAX).min(zeroes.len()));
            self.write_at(offset + done, part.unwrap_or(&zeroes))?;
            done += part.unwrap_or(&zeroes).len() as u64;
        }
        Ok(())
    }

    /// Makes the store larger.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where its size is not ours to choose.
    fn grow(&self, size: u64) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("this store cannot grow to {size} bytes")))
    }

    /// Carries out several reads, at the same time where the store can. Each has its own outcome.
    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        for request in requests {
            request.outcome = self.read_at(request.offset, request.buffer);
        }
    }

    /// Carries out several writes, in any order, at the same time where the store can.
    ///
    /// # Errors
    /// [`BlockError`] of the first that failed; the others may have been carried out.
    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            let mut offset = request.offset;
            for buffer in &request.buffers {
                self.write_at(offset, buffer)?;
                offset += buffer.len() as u64;
            }
        }
        Ok(())
    }

    /// Whether reads wait for something slower than memory, so that it pays to have many in flight.
    fn is_slow(&self) -> bool {
        true
    }

    /// What it is, for people: `file /var/lib/x (io_uring, O_DIRECT)`.
    fn describe(&self) -> String;
}

/// Whether a request is made of whole blocks within a store of `size` bytes; for implementations of [`BlockStore`].
///
/// # Errors
/// [`BlockError::OutOfRange`]
pub fn check_range(op: &'static str, offset: u64, length: u64, size: u64) -> Result<(), BlockError> {
    let block = BLOCK_SIZE as u64;
    let inside = offset.checked_add(length).is_some_and(|end| end <= size);
    if inside && offset.is_multiple_of(block) && length.is_multiple_of(block) {
        Ok(())
    } else {
        Err(BlockError::OutOfRange { op, offset, length, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_blocks_inside_of_the_store() {
        assert!(check_range("read", 0, 8192, 8192).is_ok());
        assert!(check_range("read", 8192, 0, 8192).is_ok());
        for (offset, length) in [(1, 4096), (0, 4095), (4096, 8192), (u64::MAX - 4095, 4096), (8192, 4096)] {
            assert!(check_range("read", offset, length, 8192).is_err(), "{offset} {length}");
        }
    }

    #[test]
    fn damage_names_its_blocks() {
        let error = |count| BlockError::Integrity { first: 7, count, what: "tag mismatch".into() }.to_string();
        assert_eq!(error(1), "LBA 7: tag mismatch");
        assert_eq!(error(3), "LBA 7 to 9: tag mismatch");
    }
}

//! Stores of blocks: what lies beneath a secure disk.
//!
//! - [`FileStore`]: a regular file or a block device.
//! - [`DirectoryStore`]: a directory of segment files, for shares (virtio-fs, 9p, NFS) where one large file is a burden.
//! - [`MemoryStore`]: memory, for tests and for what need not outlive its process.
//!
//! # Invariants
//! - Nothing here trusts what it reads, and nothing interprets it: whoever stands above authenticates every block.
//! - A store that is open for writing is locked against everybody else who opens it; one that is open for reading only, against
//!   writers.
//! - A flush that failed is remembered: the kernel reports a lost write once and then forgets it, so every later flush fails too.
//! - A request is carried out whole or ends in an error: short reads and writes are continued, interrupted ones repeated.

mod directory;
mod file;
mod job;
mod medium;
mod memory;
mod noise;
mod ring;
mod way;

use std::{
    io,
    path::{Path, PathBuf},
};

use nacre_core::BLOCK_SIZE;

pub use directory::{DirectoryOptions, DirectoryStore};
pub use file::{FileOptions, FileStore};
pub use memory::MemoryStore;
pub use way::Access;

/// The largest store: what the kernel's signed file offsets reach, in whole blocks.
pub const MAX_SIZE: u64 = i64::MAX as u64 / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;

/// Why a store was not created or opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("cannot {action} the store {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it open; for a device also: it is mounted, or part of something larger.
    #[error("the store {} is in use", .0.display())]
    InUse(PathBuf),
    /// Something is there already, and nothing is ever overwritten.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// What is there cannot be a store.
    #[error("{} is no store: {what}", path.display())]
    NotAStore {
        /// What was opened.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// A store of this size cannot be.
    #[error("a store of {size} bytes cannot be made: it takes from 4096 to {MAX_SIZE} bytes, in whole blocks of 4096")]
    Size {
        /// The size that was asked for.
        size: u64,
    },
    /// A file could not be filled when it was created.
    #[error("the store {} cannot be filled", path.display())]
    Fill {
        /// What was to be filled.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: nacre_core::BlockError,
    },
}

impl StoreError {
    fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.to_owned(), source: source.into() }
    }

    fn not_a_store(path: &Path, what: impl Into<String>) -> Self {
        Self::NotAStore { path: path.to_owned(), what: what.into() }
    }
}

/// A size that a new store may have.
fn check_size(size: u64) -> Result<(), StoreError> {
    let whole = size.is_multiple_of(BLOCK_SIZE as u64);
    if whole && (1..=MAX_SIZE).contains(&size) { Ok(()) } else { Err(StoreError::Size { size }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_blocks_that_the_kernel_reaches() {
        assert!(check_size(4096).is_ok());
        assert!(check_size(MAX_SIZE).is_ok());
        for size in [0, 1, 4095, 4097, MAX_SIZE + 1, MAX_SIZE + 4096, u64::MAX] {
            assert!(check_size(size).is_err(), "{size}");
        }
    }
}

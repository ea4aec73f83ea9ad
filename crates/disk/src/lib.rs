//! The secure disk: a log-structured block device on a store that nobody trusts.
//!
//! Blocks are encrypted and written to fresh places; an index says where each is and what it has to be; a journal says what changed
//! since the index was last written out. [docs/formats/disk.md] has the six guarantees, each with its adversary, and every byte.
//!
//! - [`format()`], [`Disk::open`], [`Disk::close`]: the life of a disk. An open disk is a [`BlockStore`] itself.
//! - [`check()`]: reads all of a closed disk and names what is damaged.
//! - [`change_key`], [`rotate`]: another root key, another master key, without rewriting data.
//!
//! On the way in: `write` encrypts, takes a slot (`alloc`) and notes the change (`delta`); `commit` makes a transaction durable
//! (`journal`); `merge` folds what was committed into the tree (`tree`, `node`) and the bitmap (`space`), and ends with a `checkpoint`.
//! On the way out: `read` asks the delta, then the tree. `recover` is the way back after whatever happened.
//!
//! Invariants:
//! - Nothing that a checkpoint or the journal leads to is overwritten before a later checkpoint is durable.
//! - The index in memory is the truth: what the store answers is compared with the tag that the index has. There is no fallback.
//! - A failed write, flush, or anchor makes the disk read-only. What was acknowledged stays readable; nothing is acknowledged after it.
//!
//! Locks, in the order in which they may be taken: `checkpoint`, `commit`, `log`. No lock but `checkpoint` is held over I/O.
//!
//! [docs/formats/disk.md]: ../../../docs/formats/disk.md
//! [`BlockStore`]: nacre_core::BlockStore

mod alloc;
mod cache;
mod check;
pub mod checkpoint;
mod clean;
mod commit;
mod delta;
mod disk;
mod error;
mod format;
pub mod journal;
mod keys;
mod layout;
mod merge;
pub mod node;
mod pool;
mod read;
mod recover;
mod rekey;
mod shared;
mod space;
mod stats;
pub mod superblock;
mod tree;
mod write;

use std::sync::LockResult;

pub use check::{CheckOptions, Damage, Report, check};
pub use disk::{AnchorWindow, Disk, Info, OpenOptions, closed_info};
pub use error::DiskError;
pub use format::{FormatOptions, format, largest_size_on, store_size_for};
pub use keys::{Audit, EPOCH_MESSAGES, RootKey};
pub use layout::{Geometry, LARGEST, LEAST_RESERVE, MOST_EPOCHS, MOST_RESERVE, SMALLEST};
pub use rekey::{change_key, rotate};
pub use stats::{BUCKETS, Latency, Statistics};

/// What a lock protects. A thread that died while it held one has left something half-done: nobody goes on with that.
#[expect(clippy::panic, reason = "a dead worker poisons its device")]
pub(crate) fn poison<T>(lock: LockResult<T>) -> T {
    match lock {
        Ok(guard) => guard,
        Err(_) => panic!("a thread died while it changed the disk's state"),
    }
}

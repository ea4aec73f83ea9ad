//! A storage simulator: what a store beneath a disk did, and what it may have been at the moment of a crash.
//!
//! - [`SimStore`]: a store in memory that records each write and flush, and fails where it is told to.
//! - [`Recording`]: what it recorded. [`Recording::crash`] makes the image that a crash at one point may have left: everything up to
//!   the last flush, and of what came after any part in any order, torn at sectors of 512 bytes.
//! - [`Snapshot`]: an image; copies share what they have in common, so that thousands of them fit in memory.
//! - [`MemoryAnchor`]: an anchor in memory that knows at which point of the recording it was moved on.
//! - [`Model`]: what a disk has to hold, at each step of its history; [`Model::judge`] says which step a disk shows.
//! - [`Workload`]: random requests.
//!
//! Which faults a store survives is the business of who stands on it. What this one models: writes that were not flushed may be lost,
//! torn or reordered; a flush keeps what it promised; trimmed blocks turn into rubbish at once; a store that grew may be short again
//! until it was flushed.
//!
//! Everything is the same in each run of one seed, as long as one thread uses it.

mod anchor;
mod model;
mod recording;
mod snapshot;
mod store;
mod workload;

pub use anchor::MemoryAnchor;
pub use model::{Damage, Model, Verdict, content};
pub use recording::{Event, Fate, Plan, Recording, Unit};
pub use snapshot::{Block, Snapshot};
pub use store::{Fault, FaultKind, SimStore, Target};
pub use workload::{Op, Profile, Workload, long, seed, seeds};

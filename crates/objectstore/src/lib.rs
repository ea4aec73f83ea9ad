//! A block store on an object store: S3 and what speaks like it, a directory, memory. A volume may outgrow every machine.
//!
//! # Layout
//! The address space is cut into chunks (4 MiB, fixed at creation). Objects are immutable; their names say what they are, so that a LIST is
//! enough to open a store:
//!
//! - `nacre.json`: the descriptor: format version, size, chunk size.
//! - `chunk/CCCCCCCC/GGGGGGGGGGGGGGGG`: generation G of chunk C as a whole, a *base*.
//! - `chunk/CCCCCCCC/GGGGGGGGGGGGGGGG-OOOOOOOO-LLLLLLLL`: a *delta*: L bytes of chunk C from O on, newer than all generations below G.
//! - `writer/GGGGGGGGGGGGGGGG`: the last one to open the store for writing.
//!
//! Numbers are lowercase hexadecimal. The page is docs/formats/object-store.md.
//!
//! # How it works
//! Writes are kept in memory, up to a bound; a flush PUTs them, several at a time, as deltas, or folded into a new base where there
//! would be too many. What is superseded is deleted after what replaces it is there, so that a crash at any time leaves all that was
//! flushed. Whatever it leaves besides is deleted by the next writer, never by a reader.
//!
//! # Invariants
//! - An object is never overwritten: every PUT is create-only, except for the descriptor's. One that is refused is somebody else's
//!   writing, and ends this store's: [`BlockError::Fenced`](nacre_core::BlockError::Fenced).
//! - A chunk's newest base supersedes all generations below its own; deltas above it apply in the order of their generations.
//! - What no object covers reads as zeroes. The layer above authenticates everything, so it tells those from data that was taken away.
//! - Calls are synchronous and may come from any thread, also from one that runs tasks of another runtime: the requests run on threads
//!   of their own.

mod flush;
mod location;
mod map;
mod name;
mod objects;
mod store;
#[cfg(test)]
mod tests;

pub use location::Location;
pub use store::{ObjectBlockStore, ObjectOptions};

/// Why an object store was not created or opened.
#[derive(Debug, thiserror::Error)]
pub enum ObjectStoreError {
    /// The location cannot be understood, or its settings cannot.
    #[error("{location}: {what}")]
    Location {
        /// What was given.
        location: String,
        /// What is wrong with it.
        what: String,
    },
    /// A request failed, retries included.
    #[error("{location}: cannot {op} {name}")]
    Request {
        /// Which store.
        location: String,
        /// What was tried.
        op: &'static str,
        /// With which object.
        name: String,
        /// What went wrong.
        #[source]
        source: object_store::Error,
    },
    /// There is a store already, and nothing is ever overwritten.
    #[error("{0}: there is a store already")]
    Exists(String),
    /// Somebody else opens it for writing at this moment.
    #[error("{0} is in use: somebody else opens it for writing")]
    InUse(String),
    /// What is there cannot be a store.
    #[error("{location} is no store: {what}")]
    NotAStore {
        /// What was opened.
        location: String,
        /// What was expected and what was found.
        what: String,
    },
    /// The threads that carry out requests cannot be started.
    #[error("cannot start threads for requests")]
    Threads(#[source] std::io::Error),
}

//! What all of Nacre agrees on: digests, resource identifiers, secrets, the line between bytes that were checked and bytes
//! that were not, JOSE objects, and the ports (clock, key source, progress, block store, anchor) by which the parts reach what is
//! outside them.
//!
//! Invariants: no I/O, no async, no unsafe, nothing global. Everything here takes bytes and gives values or errors.

mod anchor;
mod block;
mod digest;
mod ports;
mod secret;
mod trust;
mod uri;

pub mod aead;
pub mod jose;

pub use anchor::{Anchor, AnchorError, AnchorState};
pub use block::{BLOCK_SIZE, BlockError, BlockStore, Page, ReadRequest, WriteRequest, check_range};
pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use ports::{Clock, KeySource, KeySourceError, NoProgress, Progress, SystemClock, Task, TrustedTime};
pub use secret::{SecretArray, SecretBytes};
pub use trust::{Untrusted, Verified};
pub use uri::{ResourcePath, ResourceUri, UriError};

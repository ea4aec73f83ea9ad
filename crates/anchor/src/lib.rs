//! Places that a host cannot turn back: implementations of [`nacre_core::Anchor`], which remembers how far a disk had come.
//!
//! - [`FileAnchor`]: a file in a directory that whoever attacks the disk cannot write.
//! - [`TpmAnchor`]: an NV index of a TPM 2.0, by a device or by swtpm's socket.
//! - [`AnchorSpec`]: how people spell which one; a third one, at a key broker, comes with the broker's client.
//!
//! What each of them holds, byte by byte, is in docs/formats/anchor.md.
//!
//! Invariants: what is damaged or not ours is an error, never "nothing was stored"; a state is replaced as a whole or not at all;
//! nobody advances an anchor without having compared what it holds, under a lock.
//!
//! **"Nothing" is not proof of nothing.** Whoever can remove a file or a TPM's index makes [`Anchor::read`](nacre_core::Anchor::read)
//! answer `None`, and so can whoever answers in a TPM's place. A disk that ever had an anchor must take `None` for a rollback.

mod file;
mod spec;
pub mod tpm;

pub use file::FileAnchor;
pub use spec::{AnchorSpec, OpenBroker, SpecError};
pub use tpm::TpmAnchor;

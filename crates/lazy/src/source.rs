//! Where stored bytes come from. Nothing of what comes is believed.

use std::{fmt, ops::Range};

use crate::format::{DIGEST, hex};

/// A blob of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlobId {
    /// Its SHA-256.
    pub digest: [u8; DIGEST],
    /// Its bytes.
    pub size: u64,
}

impl BlobId {
    /// The digest in hexadecimal digits.
    pub fn hex(&self) -> String {
        hex(&self.digest)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

/// Why bytes could not be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{blob}, bytes {}-{}: {reason}", .range.start, .range.end.saturating_sub(1))]
pub struct SourceError {
    /// Of which blob.
    pub blob: BlobId,
    /// Which bytes.
    pub range: Range<u64>,
    /// In words.
    pub reason: String,
    /// Whether it may work when it is tried again.
    pub temporary: bool,
}

/// Gives ranges of blobs: a registry, a layout in a directory.
pub trait Blobs: Send + Sync {
    /// Fills `out` with the bytes of the blob from `offset` on. `attempt` counts from 0: a source that has several places to ask may
    /// ask another one each time.
    ///
    /// # Errors
    /// [`SourceError`]
    fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8], attempt: u32) -> Result<(), SourceError>;
}

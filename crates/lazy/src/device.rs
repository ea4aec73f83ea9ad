//! What front ends know of a reader: a device of bytes. Lazy images have one, and indexes of ordinary images.

use std::sync::atomic::Ordering;

use crate::{
    reader::{Failure, ReadError, Reader},
    source::BlobId,
};

/// Gives the verified bytes of an image's data device.
pub trait DeviceReader: Send + Sync {
    /// Bytes of the device.
    fn size(&self) -> u64;

    /// Bytes of all regular files.
    fn content_bytes(&self) -> u64;

    /// Fills `out` with the device's bytes from `offset` on.
    ///
    /// # Errors
    /// [`ReadError`]: `out` has nothing to be used.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError>;

    /// Fetches all that is not in the cache, so that the source may go away. `step` is told how many bytes are done, and says whether to
    /// go on.
    ///
    /// # Errors
    /// [`ReadError`]
    fn complete(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), ReadError>;

    /// Why the last read that failed did.
    fn failure(&self) -> Option<Failure>;

    /// The blobs that the device's bytes are in.
    fn blobs(&self) -> Vec<BlobId>;

    /// Bytes that were read.
    fn read_bytes(&self) -> u64;
}

impl DeviceReader for Reader {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn content_bytes(&self) -> u64 {
        self.summary().content_bytes.get()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        Self::read_at(self, offset, out)
    }

    fn complete(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), ReadError> {
        Self::complete(self, step)
    }

    fn failure(&self) -> Option<Failure> {
        Self::failure(self)
    }

    fn blobs(&self) -> Vec<BlobId> {
        Self::blobs(self).to_vec()
    }

    fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

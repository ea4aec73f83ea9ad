//! The answer to a read.

use std::io::IoSlice;

use rustix::io::Errno;

use super::device::Device;

/// Answers one read, from the buffer that it brings or from memory of the filesystem's own.
#[derive(Debug)]
pub struct ReadReply<'a> {
    device: &'a Device,
    unique: u64,
    buffer: &'a mut [u8],
}

/// A read was answered.
#[derive(Debug)]
pub struct Answered(());

impl<'a> ReadReply<'a> {
    pub(super) fn new(device: &'a Device, unique: u64, buffer: &'a mut [u8]) -> Self {
        Self { device, unique, buffer }
    }

    /// How many bytes are wanted, 1 MiB at most.
    pub fn size(&self) -> usize {
        self.buffer.len()
    }

    /// Memory for as many bytes as are wanted, which begins a page. What is in it is of other reads, so [`ReadReply::filled`] must not
    /// tell of more than was written.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.buffer
    }

    /// Answers with the first bytes of the buffer.
    ///
    /// # Errors
    /// `EIO`: there are not so many, a mistake of the filesystem.
    pub fn filled(self, length: usize) -> Result<Answered, Errno> {
        let bytes = self.buffer.get(..length).ok_or_else(|| too_much(length, self.buffer.len()))?;
        self.device.answer(self.unique, &[IoSlice::new(bytes)]);
        Ok(Answered(()))
    }

    /// Answers with memory of the filesystem's own: the kernel copies from there, at once. Up to 15 pieces take no allocation, and
    /// there may be 1000. Memory of a mapped file may be on a disk still: where this process is killed while the kernel waits for it, the
    /// read fails instead of being the successor's.
    ///
    /// # Errors
    /// `EIO`: they are more than is wanted, a mistake of the filesystem.
    pub fn pieces(self, pieces: &[IoSlice<'_>]) -> Result<Answered, Errno> {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        if length > self.buffer.len() || pieces.len() > 1000 {
            return Err(too_much(length, self.buffer.len()));
        }
        self.device.answer(self.unique, pieces);
        Ok(Answered(()))
    }
}

fn too_much(length: usize, wanted: usize) -> Errno {
    tracing::error!(length, wanted, "a filesystem answers a read with more than is wanted");
    Errno::IO
}

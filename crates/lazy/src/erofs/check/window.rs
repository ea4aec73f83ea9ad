//! A piece of the image in memory, for a cursor that mostly goes forward.

use super::{CheckError, ReadError};
use crate::erofs::source::ReadAt;

/// How much is read at once.
pub(super) const PIECE: usize = 256 << 10;

pub(super) struct Window<'s, R: ?Sized> {
    source: &'s R,
    size: u64,
    piece: usize,
    start: u64,
    bytes: Vec<u8>,
}

impl<'s, R: ReadAt + ?Sized> Window<'s, R> {
    pub(super) fn new(source: &'s R, size: u64, piece: usize) -> Self {
        Self { source, size, piece, start: 0, bytes: Vec::new() }
    }

    /// So many bytes from an offset on.
    pub(super) fn get(&mut self, offset: u64, count: usize) -> Result<&[u8], CheckError> {
        let outside = CheckError::Bytes { offset, what: "something is outside of the image" };
        let left = self.size.checked_sub(offset).and_then(|left| usize::try_from(left).ok());
        let Some(left) = left.filter(|left| *left >= count) else { return Err(outside) };
        let at = offset.checked_sub(self.start).and_then(|at| usize::try_from(at).ok());
        if let Some(at) = at.filter(|at| at.checked_add(count).is_some_and(|end| end <= self.bytes.len())) {
            return self.bytes.get(at..at + count).ok_or(outside);
        }
        self.bytes.resize(self.piece.max(count).min(left), 0);
        // Whatever comes of it: what is in the buffer is no longer what was there.
        self.start = u64::MAX;
        let count_read = self.bytes.len();
        let read = self.source.read_at(offset, &mut self.bytes);
        read.map_err(|source| ReadError::Io { offset, count: count_read, source })?;
        self.start = offset;
        self.bytes.get(..count).ok_or(outside)
    }
}

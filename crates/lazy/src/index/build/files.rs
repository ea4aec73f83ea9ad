//! Where the files' contents are: the tar is read, and nothing of it is kept but the tree and the extents.

use std::{
    io::{self, Read},
    sync::mpsc::Receiver,
};

use nacre_core::{Digest, Hasher};
use nacre_oci::unpack::Limits;

use super::IndexBuildError;
use crate::{
    build::{BuildError, Closed, Contents, LayerContent, LayerReader},
    erofs::Tree,
    format::{BLOCK, DEVICE_LIMIT},
    index::format::Extent,
};

/// A piece of the tar.
pub(super) enum Piece {
    /// Its next bytes.
    Bytes(Vec<u8>),
    /// There are no more.
    End,
    /// There are no more, but it is not whole.
    Failed,
}

/// The data device, as far as it is laid out: files lie on it in the order of the tars, each from a block on.
pub(super) struct Files<'a> {
    pub(super) extents: &'a mut Vec<Extent>,
    /// The first byte that no file has.
    pub(super) next: &'a mut u64,
    /// The address of the layer's first byte.
    pub(super) base: u64,
}

/// A file: its first byte on the device.
pub(super) struct Open(u64);

impl Contents for Files<'_> {
    type Open = Open;

    fn begin(&mut self, size: u64) -> Open {
        let start = *self.next;
        *self.next = start.saturating_add(size).checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        Open(start)
    }

    fn data(&mut self, file: &mut Open, offset: u64, tar: u64, bytes: &[u8]) -> Result<(), Closed> {
        let (offset, address, length) = (file.0.saturating_add(offset), self.base + tar, bytes.len() as u64);
        if length == 0 {
            return Ok(());
        }
        if let Some(last) = self.extents.last_mut() {
            let known = last.length.get();
            if last.offset.get() + known == offset && last.address.get() + known == address && offset > file.0 {
                last.length = (known + length).into();
                return Ok(());
            }
        }
        self.extents.push(Extent { offset: offset.into(), length: length.into(), address: address.into() });
        Ok(())
    }

    fn end(&mut self, file: Open) -> Result<u32, Closed> {
        // Where it does not fit, the device is too large, which is said when the layer ends.
        Ok(u32::try_from(file.0 / BLOCK).unwrap_or(u32::MAX))
    }
}

/// Reads a layer's tar to its end, and checks its digest.
pub(super) fn read(
    tree: &mut Tree,
    files: Files<'_>,
    limits: &Limits,
    pieces: Receiver<Piece>,
    diff_id: Digest,
) -> Result<LayerContent, IndexBuildError> {
    let mut tar = Tar { pieces, current: Vec::new(), at: 0, hasher: Hasher::new(diff_id.algorithm()), ended: false };
    let device = &mut *files.next;
    let files = Files { extents: files.extents, next: device, base: files.base };
    let content = LayerReader::new(tree, files, limits).read::<io::Error>(&mut tar).map_err(|error| match error {
        BuildError::Read(_) => IndexBuildError::Stopped,
        other => IndexBuildError::Tar(other),
    })?;
    let found = tar.hasher.finish();
    if found != diff_id {
        return Err(IndexBuildError::DiffId { found, expected: diff_id });
    }
    Ok(content)
}

/// Whether the device has become too large.
pub(super) fn check_device(bytes: u64) -> Result<(), IndexBuildError> {
    if bytes > DEVICE_LIMIT { Err(IndexBuildError::Large("its files have more than 16 TiB")) } else { Ok(()) }
}

struct Tar {
    pieces: Receiver<Piece>,
    current: Vec<u8>,
    at: usize,
    hasher: Hasher,
    ended: bool,
}

impl Read for Tar {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.recv() {
                Ok(Piece::Bytes(bytes)) => {
                    self.hasher.update(&bytes);
                    (self.current, self.at) = (bytes, 0);
                }
                Ok(Piece::End) => self.ended = true,
                Ok(Piece::Failed) | Err(_) => return Err(io::Error::other("the layer could not be decompressed")),
            }
        }
        let rest = self.current.get(self.at..).unwrap_or_default();
        let length = rest.len().min(out.len());
        if let (Some(to), Some(from)) = (out.get_mut(..length), rest.get(..length)) {
            to.copy_from_slice(from);
        }
        self.at += length;
        Ok(length)
    }
}

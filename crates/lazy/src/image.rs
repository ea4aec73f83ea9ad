//! An image that was opened: its metadata read and verified, its table at hand.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
};

use nacre_core::{Digest, Hasher};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

use crate::{
    format::{BlobEntry, Cipher, FormatError, LeafEntry, Summary},
    frames::{FrameError, FrameReader},
    keys::MetadataKey,
    source::{BlobId, SourceError},
    table::{Leaf, Leaves},
    trace,
};

/// Leaves that are kept in memory: 2 MiB of them.
const LEAVES: usize = 128;
/// Leaves that are asked for at once, where one is missing.
const AHEAD: u32 = 8;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The metadata blob is not what it should be.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// Nor is what is in it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The blob is another one than the manifest names.
    #[error("the metadata blob has the digest {found}; the manifest names {expected}")]
    Digest {
        /// As it is.
        found: Digest,
        /// As the manifest says.
        expected: Digest,
    },
    /// The EROFS image could not be kept.
    #[error("writing the image's metadata to a local file failed: {0}")]
    Local(#[source] io::Error),
    /// The manifest and the metadata name different blobs.
    #[error("data blob {index} is {inside} in the metadata, and {outside} in the manifest")]
    Blob {
        /// Which.
        index: usize,
        /// As the metadata says.
        inside: String,
        /// As the manifest says.
        outside: String,
    },
}

/// What a metadata blob says.
pub struct Metadata {
    /// Sizes.
    pub summary: Summary,
    /// Data blobs, by number.
    pub blobs: Vec<BlobId>,
    /// The image config, as JSON.
    pub config: Vec<u8>,
    /// Bytes of the data device, in the order of their first use.
    pub trace: Vec<u64>,
    /// What opens leaves.
    leaves: Leaves,
}

impl Metadata {
    /// Reads a metadata blob, whose digest must be `expected`, and writes the EROFS image in it to `erofs`, an empty file. Nothing of
    /// it is to be used if this fails.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn read(
        blob: &mut dyn Read,
        expected: &Digest,
        key: Option<&MetadataKey>,
        erofs: &mut File,
    ) -> Result<Self, OpenError> {
        let hashing = Hashing { input: blob, hasher: Hasher::new(expected.algorithm()) };
        let mut frames = FrameReader::new(hashing, key)?;
        let mut summary = Summary::new_zeroed();
        frames.fill(summary.as_mut_bytes())?;
        summary.check()?;
        let blobs: Vec<BlobEntry> = section(&mut frames, summary.blobs.get())?;
        let index: Vec<LeafEntry> = section(&mut frames, summary.leaves.get())?;
        let config: Vec<u8> = section(&mut frames, summary.config_bytes.get())?;
        let places: Vec<zerocopy::little_endian::U64> = section(&mut frames, summary.trace.get())?;
        let mut left = summary.erofs_bytes.get();
        while left > 0 {
            let piece = frames.next(usize::try_from(left).unwrap_or(usize::MAX))?;
            if piece.is_empty() {
                let found = summary.erofs_bytes.get() - left;
                let expected = summary.erofs_bytes.get();
                return Err(FormatError::Length { part: "the EROFS image", found, expected }.into());
            }
            erofs.write_all(piece).map_err(OpenError::Local)?;
            left -= piece.len() as u64;
        }
        let found = frames.finish()?.hasher.finish();
        if found != *expected {
            return Err(OpenError::Digest { found, expected: *expected });
        }
        erofs.rewind().map_err(OpenError::Local)?;
        let leaves = Leaves::new(summary, index, key)?;
        let trace: Vec<u64> = places.iter().map(|place| place.get()).collect();
        trace::check(&trace, &summary)?;
        let blobs = blobs.iter().map(|blob| BlobId { digest: blob.digest, size: blob.size.get() }).collect();
        Ok(Self { summary, blobs, config, trace, leaves })
    }

    /// What opens leaves.
    #[cfg(feature = "build")]
    pub(crate) fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// Checks that the manifest names the same data blobs, in the same order: what it names, a registry keeps.
    ///
    /// # Errors
    /// [`OpenError::Blob`]
    pub fn check_blobs(&self, manifest: &[BlobId]) -> Result<(), OpenError> {
        for index in 0..self.blobs.len().max(manifest.len()) {
            let (inside, outside) = (self.blobs.get(index), manifest.get(index));
            if inside != outside {
                let shown = |blob: Option<&BlobId>| blob.map_or("missing".to_owned(), ToString::to_string);
                return Err(OpenError::Blob { index, inside: shown(inside), outside: shown(outside) });
            }
        }
        Ok(())
    }
}

pub(crate) fn section<T: FromBytes + IntoBytes + Immutable + KnownLayout + Clone, R: Read>(
    frames: &mut FrameReader<R>,
    count: u32,
) -> Result<Vec<T>, FrameError> {
    // Memory grows with what came, not with what was promised.
    let mut all = Vec::new();
    let (mut left, step) = (count as usize, (1 << 16) / size_of::<T>());
    while left > 0 {
        let now = left.min(step);
        let start = all.len();
        all.resize(start + now, T::new_zeroed());
        frames.fill(all.get_mut(start..).unwrap_or_default().as_mut_bytes())?;
        left -= now;
    }
    Ok(all)
}

pub(crate) struct Hashing<'a> {
    pub(crate) input: &'a mut dyn Read,
    pub(crate) hasher: Hasher,
}

impl Read for Hashing<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = self.input.read(out)?;
        self.hasher.update(out.get(..length).unwrap_or_default());
        Ok(length)
    }
}

/// Why the table has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TableError {
    /// The leaf could not be had.
    #[error("the chunk table: {0}")]
    Source(#[from] SourceError),
    /// The leaf is not what it should be.
    #[error("the chunk table: {0}")]
    Format(#[from] FormatError),
}

/// The table of an image: leaves are fetched when they are needed, and kept for a while.
pub struct Table {
    leaves: Leaves,
    blob: BlobId,
    kept: Mutex<VecDeque<(u32, Arc<Leaf>)>>,
    /// The image's trace, until it is followed.
    trace: Mutex<Vec<u64>>,
}

impl Table {
    /// The table of an image, and the rest of its metadata.
    pub fn new(metadata: Metadata, blob: BlobId) -> (Self, Summary, Vec<BlobId>) {
        let Metadata { summary, blobs, leaves, trace, .. } = metadata;
        (Self { leaves, blob, kept: Mutex::default(), trace: Mutex::new(trace) }, summary, blobs)
    }

    /// The image's trace; none once it is followed.
    #[cfg(feature = "build")]
    pub(crate) fn trace(&self) -> Vec<u64> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The image's trace, for whoever asks first.
    pub(crate) fn take_trace(&self) -> Vec<u64> {
        std::mem::take(&mut *self.trace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How chunks are sealed.
    pub fn cipher(&self) -> Cipher {
        self.leaves.cipher()
    }

    /// The table's blob.
    pub fn blob(&self) -> &BlobId {
        &self.blob
    }

    /// How many leaves there are.
    pub fn count(&self) -> u32 {
        self.leaves.count()
    }

    /// The leaf of a byte of the device; `None` past its end.
    pub fn find(&self, offset: u64) -> Option<u32> {
        self.leaves.find(offset)
    }

    /// A leaf's entries. `read` gives bytes of the table blob; it may be asked again where they were wrong.
    ///
    /// # Errors
    /// [`TableError`]
    pub fn leaf(
        &self,
        leaf: u32,
        read: impl Fn(u64, &mut [u8], u32) -> Result<(), SourceError>,
    ) -> Result<Arc<Leaf>, TableError> {
        if let Some(entries) = self.kept(leaf) {
            return Ok(entries);
        }
        let last = (leaf + AHEAD).min(self.count());
        let ranges: Vec<_> = (leaf..last).map(|leaf| self.leaves.range(leaf)).collect();
        let start = ranges.first().map_or(0, |range| range.start);
        let end = ranges.last().map_or(0, |range| range.end);
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        let mut attempt = 0;
        loop {
            read(start, &mut bytes, attempt)?;
            let mut wanted = Err(FormatError::Length { part: "leaf", found: 0, expected: end - start });
            for (number, range) in (leaf..last).zip(&ranges) {
                let place = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
                let stored = bytes.get(place(range.start)..place(range.end)).unwrap_or_default().to_vec();
                let opened = self.leaves.open(number, stored).map(Arc::new);
                if let Ok(entries) = &opened {
                    self.keep(number, Arc::clone(entries));
                }
                if number == leaf {
                    wanted = opened;
                }
            }
            match wanted {
                // The first answer is the cache's, which need not have it.
                Err(error) if attempt == 0 => tracing::debug!("{}: {error}; its source is asked", self.blob),
                Err(error) if attempt < 4 => tracing::warn!("{}: {error}; it is asked for again", self.blob),
                other => return Ok(other?),
            }
            attempt += 1;
        }
    }

    fn kept(&self, leaf: u32) -> Option<Arc<Leaf>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(number, _)| *number == leaf)?;
        // What was used last stands in front.
        let found = kept.remove(at)?;
        let entries = Arc::clone(&found.1);
        kept.push_front(found);
        Some(entries)
    }

    fn keep(&self, leaf: u32, entries: Arc<Leaf>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.iter().any(|(number, _)| *number == leaf) {
            return;
        }
        kept.truncate(LEAVES - 1);
        kept.push_front((leaf, entries));
    }
}

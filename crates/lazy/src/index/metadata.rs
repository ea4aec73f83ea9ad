//! The metadata blob of an index: the same frames as a lazy image's, another stream.

use std::{
    fs::File,
    io::{Read, Seek as _, Write as _},
};

use nacre_core::{Digest, Hasher};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::{
    format::{LayerEntry, PageEntry, Summary},
    pages::Pages,
};
use crate::{
    format::FormatError,
    frames::FrameReader,
    image::{Hashing, OpenError, section},
    keys::MetadataKey,
};

/// What the metadata of an index says.
pub struct IndexMetadata {
    /// Sizes.
    pub summary: Summary,
    /// The image's layers, the bottom one first.
    pub layers: Vec<LayerEntry>,
    /// What opens pages.
    pub(super) pages: Pages,
}

impl IndexMetadata {
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
        let layers: Vec<LayerEntry> = section(&mut frames, summary.layers.get())?;
        let extents: Vec<PageEntry> = section(&mut frames, summary.extent_pages.get())?;
        let spans: Vec<PageEntry> = section(&mut frames, summary.span_pages.get())?;
        let mut left = summary.erofs_bytes.get();
        while left > 0 {
            let piece = frames.next(usize::try_from(left).unwrap_or(usize::MAX))?;
            if piece.is_empty() {
                let expected = summary.erofs_bytes.get();
                return Err(FormatError::Length { part: "the EROFS image", found: expected - left, expected }.into());
            }
            erofs.write_all(piece).map_err(OpenError::Local)?;
            left -= piece.len() as u64;
        }
        let found = frames.finish()?.hasher.finish();
        if found != *expected {
            return Err(OpenError::Digest { found, expected: *expected });
        }
        erofs.rewind().map_err(OpenError::Local)?;
        let pages = Pages::new(&summary, &layers, extents, spans, key)?;
        Ok(Self { summary, layers, pages })
    }
}

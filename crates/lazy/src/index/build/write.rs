//! The last step: pages, the EROFS image, the metadata blob.

use std::{
    fs::File,
    io::{self, BufWriter, Read as _, Seek as _, Write},
};

use zerocopy::{Immutable, IntoBytes};

use super::{Built, IndexBuildError, IndexBuilder, files::check_device};
use crate::{
    chunk::sha256,
    erofs::{WriteOptions, write as write_erofs},
    format::BLOCK,
    frames::FrameWriter,
    index::format::{Extent, KIND, LAYERS_LIMIT, PAGE_EXTENTS, PAGE_SPANS, PageEntry, Summary, TAR_LIMIT},
    keys::{Part, counter},
};
use nacre_core::aead::AeadKey;

/// zstd's level for metadata and pages.
const LEVEL: i32 = 12;
/// The tag of the EROFS image's device.
const TAG: &str = "data";

/// Writes pages.
struct Pages<'a> {
    file: &'a mut BufWriter<File>,
    place: u64,
    key: Option<AeadKey>,
    index: Vec<PageEntry>,
}

impl Pages<'_> {
    fn put<T: IntoBytes + Immutable>(&mut self, first: u64, entries: &[T]) -> Result<(), IndexBuildError> {
        let mut stored = zstd::bulk::compress(entries.as_bytes(), LEVEL).map_err(IndexBuildError::Spool)?;
        if let Some(key) = &self.key {
            key.seal(counter(self.place), b"page", &mut stored);
        }
        self.file.write_all(&stored).map_err(IndexBuildError::Spool)?;
        let length = u32::try_from(stored.len()).unwrap_or(u32::MAX);
        self.index.push(PageEntry {
            first: first.into(),
            place: self.place.into(),
            stored: length.into(),
            reserved: 0.into(),
            digest: sha256(&stored),
        });
        self.place += u64::from(length);
        Ok(())
    }
}

/// Each extent as the difference to where the one before it ended.
fn relative(extents: &[Extent], first: u64) -> Vec<Extent> {
    let (mut offset, mut address) = (first, 0u64);
    let mut all = Vec::with_capacity(extents.len());
    for extent in extents {
        let length = extent.length.get();
        all.push(Extent {
            offset: extent.offset.get().wrapping_sub(offset).into(),
            length: extent.length,
            address: extent.address.get().wrapping_sub(address).into(),
        });
        offset = extent.offset.get().wrapping_add(length);
        address = extent.address.get().wrapping_add(length);
    }
    all
}

pub(super) fn write(builder: IndexBuilder<'_>) -> Result<Built, IndexBuildError> {
    let IndexBuilder { key, tree, extents, device_bytes, spans, windows, layers, tar_bytes, content_bytes, .. } =
        builder;
    check_device(device_bytes)?;
    if tar_bytes > TAR_LIMIT || layers.len() > LAYERS_LIMIT as usize {
        return Err(IndexBuildError::Large("its layers have more than 64 TiB, or are more than 4096"));
    }
    let (mut file, window_bytes) = (windows.file, windows.place);
    let mut pages = Pages {
        file: &mut file,
        place: window_bytes,
        key: key.map(|key| AeadKey::new(&key.derive(Part::Leaves))),
        index: Vec::new(),
    };
    for page in extents.chunks(PAGE_EXTENTS) {
        let first = page.first().map_or(0, |extent| extent.offset.get());
        pages.put(first, &relative(page, first))?;
    }
    let extent_pages = pages.index.len();
    for page in spans.chunks(PAGE_SPANS) {
        pages.put(page.first().map_or(0, |span| span.address.get()), page)?;
    }
    let (index, pages_bytes) = (pages.index, pages.place);
    let mut pages = file.into_inner().map_err(|error| IndexBuildError::Spool(error.into_error()))?;
    pages.rewind().map_err(IndexBuildError::Spool)?;

    let blocks =
        u32::try_from(device_bytes / BLOCK).map_err(|_| IndexBuildError::Large("its files have more than 16 TiB"))?;
    let mut spool = BufWriter::new(tempfile::tempfile().map_err(IndexBuildError::Spool)?);
    let write = WriteOptions { uuid: uuid(&sha256(layers.as_bytes())), device_tag: TAG, device_blocks: blocks };
    let erofs_bytes = write_erofs(&tree, &write, &mut spool)?.bytes;
    let mut erofs = spool.into_inner().map_err(|error| IndexBuildError::Spool(error.into_error()))?;
    drop(tree);

    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let summary = Summary {
        kind: KIND,
        device_bytes: device_bytes.into(),
        erofs_bytes: erofs_bytes.into(),
        content_bytes: content_bytes.into(),
        extents: (extents.len() as u64).into(),
        spans: (spans.len() as u64).into(),
        layers: count(layers.len()).into(),
        extent_pages: count(extent_pages).into(),
        span_pages: count(index.len() - extent_pages).into(),
        reserved: 0.into(),
    };
    summary.check().map_err(|_| IndexBuildError::Large("its pages or its metadata are beyond the format's limits"))?;
    let metadata: io::Result<File> = (|| {
        let mut frames = FrameWriter::new(BufWriter::new(tempfile::tempfile()?), key, LEVEL)?;
        for part in [summary.as_bytes(), layers.as_bytes(), index.as_bytes()] {
            frames.write_all(part)?;
        }
        erofs.rewind()?;
        io::copy(&mut (&erofs).take(erofs_bytes), &mut frames)?;
        let mut file = frames.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        Ok(file)
    })();
    let metadata = metadata.map_err(IndexBuildError::Spool)?;
    let metadata_bytes = metadata.metadata().map_err(IndexBuildError::Spool)?.len();
    Ok(Built { metadata, pages, metadata_bytes, pages_bytes, window_bytes, content_bytes })
}

/// A UUID of version 8 (RFC 9562): of the layers.
fn uuid(hash: &[u8; 32]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.iter_mut().zip(hash).for_each(|(to, from)| *to = *from);
    uuid[6] = uuid[6] & 0x0F | 0x80;
    uuid[8] = uuid[8] & 0x3F | 0x80;
    uuid
}

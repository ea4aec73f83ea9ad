//! Indexes of ordinary images.

use std::io::Write as _;

use nacre_core::Digest;
use nacre_lazy::{
    frames::FrameWriter,
    index::{
        IndexMetadata,
        format::{Extent, KIND, LayerEntry, PageEntry, Span, Summary},
        fuzzing,
    },
};
use zerocopy::{FromZeros as _, IntoBytes as _};

/// A metadata blob in the clear, of the right digest.
pub(crate) fn metadata(bytes: &[u8]) {
    let Ok(mut nowhere) = tempfile::tempfile() else { return };
    let mut blob = bytes;
    if let Ok(read) = IndexMetadata::read(&mut blob, &Digest::sha256(bytes), None, &mut nowhere) {
        assert_eq!(nowhere.metadata().map(|file| file.len()).ok(), Some(read.summary.erofs_bytes.get()));
        assert_eq!(read.layers.len(), read.summary.layers.get() as usize);
    }
}

pub(crate) fn metadata_blobs() -> Vec<Vec<u8>> {
    [0u32, 1, 7].into_iter().filter_map(blob).collect()
}

fn blob(pages: u32) -> Option<Vec<u8>> {
    let mut summary = Summary::new_zeroed();
    summary.kind = KIND;
    summary.device_bytes = (u64::from(pages) * 4096).into();
    summary.erofs_bytes = 4096.into();
    summary.extents = (u64::from(pages) * 1024).into();
    summary.spans = (u64::from(pages) * 64).into();
    summary.layers = 1.into();
    (summary.extent_pages, summary.span_pages) = (pages.into(), pages.into());
    let mut frames = FrameWriter::new(Vec::new(), None, 3).ok()?;
    frames.write_all(summary.as_bytes()).ok()?;
    let tar_bytes = (u64::from(pages) << 20).into();
    let layer = LayerEntry { digest: [1; 32], size: 5000.into(), tar_bytes, key: [0; 32] };
    frames.write_all(layer.as_bytes()).ok()?;
    for step in [4096, 1 << 20] {
        for page in 0..u64::from(pages) {
            let entry = PageEntry {
                first: (page * step).into(),
                place: (page * 100).into(),
                stored: 100.into(),
                reserved: 0.into(),
                digest: [2; 32],
            };
            frames.write_all(entry.as_bytes()).ok()?;
        }
    }
    frames.write_all(&[0x42; 4096]).ok()?;
    frames.finish().ok()
}

/// A page: of extents, or, by its first bit, of spans.
pub(crate) fn page(bytes: &[u8]) {
    if let Some((first, plain)) = bytes.split_first() {
        fuzzing::page(first & 1 == 1, plain);
    }
}

pub(crate) fn pages() -> Vec<Vec<u8>> {
    let extent = |at: u64| Extent { offset: (at % 3).into(), length: (at * 1000 + 1).into(), address: 512.into() };
    let extents =
        |count: u64| std::iter::once(0).chain((0..count).flat_map(|at| extent(at).as_bytes().to_vec())).collect();
    let span = |count: u64, at: u64| {
        let mut span = Span::new_zeroed();
        let length = fuzzing::SIZE / count;
        span.address = (at * length).into();
        span.length = length.into();
        span.place = (at * 10).into();
        span.stored = 10.into();
        span.kind = u8::try_from(at % 3 + 1).unwrap_or(1);
        if span.kind == 2 {
            (span.bits, span.byte, span.window_stored) = (1, 128, 30.into());
        }
        span
    };
    let spans = |count: u64| {
        let all = (0..count).flat_map(|at| span(count, at).as_bytes().to_vec());
        std::iter::once(1).chain(all).collect::<Vec<u8>>()
    };
    vec![extents(1), extents(30), spans(1), spans(64)]
}

/// Spans of each kind; see [`fuzzing::span`].
pub(crate) fn spans() -> Vec<Vec<u8>> {
    const GZIP: &[u8] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x4b\x04\x00\x43\xbe\xb7\xe8\x01\0\0\0";
    // "a" in one block of fixed codes, from the first bit on and from the fifth.
    const FIRST: &[u8] = b"\x4b\x04\x00";
    const FIFTH: &[u8] = b"\x44\x00";
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd\x20\x01\x09\x00\x00a";
    let seed = |kind: u8, bits: u8, byte: u8, window: &[u8], stored: &[u8]| {
        let length = u16::try_from(window.len()).unwrap_or(0).to_le_bytes();
        let mut seed = vec![kind, bits, byte, 0, 0];
        for part in [&length[..], window, stored] {
            seed.extend_from_slice(part);
        }
        seed
    };
    vec![
        seed(0, 0, 0, b"", b"a"),
        seed(1, 0, 0, b"", GZIP),
        seed(1, 0, 0, b"", &[GZIP, GZIP].concat()),
        seed(2, 0, 0, b"looked back at", FIRST),
        seed(2, 4, 0xb0, b"looked back at", FIFTH),
        seed(3, 0, 0, b"", ZSTD),
        seed(4, 0, 0, b"", b"a"),
    ]
}

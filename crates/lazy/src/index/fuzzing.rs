//! Entry points for fuzzing: what is behind digests that a fuzzer cannot meet.

use zerocopy::FromZeros as _;

use super::{
    decode::{Stream, decode},
    format::{Extent, Kind, LayerEntry, PAGE_EXTENTS, PAGE_SPANS, PageEntry, Span, Summary},
    pages::{Page, Pages, Which},
};
use crate::chunk::sha256;

/// Bytes of the device, and of the tar, that a page is of.
pub const SIZE: u64 = 1 << 20;

/// Opens a page of extents, or of spans, whose content this is: what is accepted covers what it must, and names nothing beyond.
pub fn page(spans: bool, plain: &[u8]) {
    let (which, size, most) = match spans {
        false => (Which::Extents, size_of::<Extent>(), PAGE_EXTENTS),
        true => (Which::Spans, size_of::<Span>(), PAGE_SPANS),
    };
    let entries = plain.len() / size;
    let Some(plain) = plain.get(..entries * size).filter(|_| (1..=most).contains(&entries)) else { return };
    let Ok(mut stored) = zstd::bulk::compress(plain, 1) else { return };
    let (Ok(length), entries) = (u32::try_from(stored.len()), entries as u64) else { return };
    let mut summary = Summary::new_zeroed();
    summary.device_bytes = SIZE.into();
    (summary.extents, summary.spans) = (entries.into(), entries.into());
    let layer = LayerEntry { digest: [1; 32], size: SIZE.into(), tar_bytes: SIZE.into(), key: [0; 32] };
    let entry = PageEntry {
        first: 0.into(),
        place: 0.into(),
        stored: length.into(),
        reserved: 0.into(),
        digest: sha256(&stored),
    };
    let Ok(pages) = Pages::new(&summary, &[layer], vec![entry], vec![entry], None) else { return };
    let mut next = 0;
    match pages.open(which, 0, &mut stored) {
        Ok(Page::Extents(extents)) => {
            for extent in &*extents {
                assert!(extent.offset.get() >= next, "extents that were accepted overlap");
                next = extent.offset.get() + extent.length.get();
                let end = extent.address.get() + extent.length.get();
                assert!(next <= SIZE && end <= SIZE, "an extent that was accepted leads out");
            }
        }
        Ok(Page::Spans(spans)) => {
            for span in &*spans {
                assert_eq!(span.address.get(), next, "spans that were accepted leave a gap");
                next = span.end();
            }
            assert_eq!(next, SIZE, "spans that were accepted end elsewhere");
        }
        Err(_) => {}
    }
}

/// Decodes a span: a kind, bits and their byte, how much it is to be (2 bytes, in units of 16), bytes of the window (2), the window, what is stored.
/// What comes is as long as it must be, and the same whether it comes in memory or in pieces.
pub fn span(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<7>() else { return };
    let [kind, bits, byte, a, b, c, d] = *head;
    let Some(kind) = Kind::of(kind % 5) else { return };
    let length = usize::from(u16::from_le_bytes([a, b])) * 16 + 1;
    let (window, stored) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes([c, d]))));
    let mut span = Span::new_zeroed();
    (span.kind, span.bits, span.byte) = (kind.code(), bits % 8, byte);
    span.length = (length as u64).into();
    let whole = decode(&span, kind, window, stored);
    if let Ok(whole) = &whole {
        assert_eq!(whole.len(), length, "a span has another length");
    }
    let Ok(mut stream) = Stream::new(&span, kind, window) else { return };
    let mut all = Vec::new();
    for piece in stored.chunks(stored.len().div_ceil(3).max(1)) {
        let fed = stream.feed(piece, |bytes| {
            all.extend_from_slice(bytes);
            // More than is wanted is refused where it is read.
            if all.len() > length { Err(super::decode::DecodeError::Length { found: 0, expected: 0 }) } else { Ok(()) }
        });
        if fed.is_err() {
            return;
        }
    }
    if let Ok(whole) = whole {
        assert_eq!(all, whole, "a span in pieces is another one");
    }
}

//! Pages of extents and of spans: verified against the metadata before anything in them is used.

use std::sync::Arc;

use nacre_core::aead::AeadKey;
use zerocopy::FromBytes as _;

use super::{
    decode::unzstd,
    format::{Extent, Kind, LayerEntry, PAGE_EXTENTS, PAGE_SPANS, PageEntry, Span, Summary, TAR_LIMIT},
};
use crate::{
    chunk::sha256,
    format::{Cipher, FormatError, hex},
    keys::{MetadataKey, Part, counter},
};

/// Which pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Which {
    Extents,
    Spans,
}

/// An opened page.
#[derive(Clone)]
pub(crate) enum Page {
    Extents(Arc<[Extent]>),
    Spans(Arc<[Span]>),
}

/// What opens pages, and windows.
pub struct Pages {
    summary: Summary,
    layers: Arc<[LayerEntry]>,
    pages_key: Option<AeadKey>,
    windows_key: Option<AeadKey>,
    extents: Vec<PageEntry>,
    spans: Vec<PageEntry>,
    tar_bytes: u64,
}

fn field(part: &'static str, name: &'static str, found: u64, allowed: &'static str) -> FormatError {
    FormatError::field(part, name, found, allowed)
}

impl Pages {
    /// Checks the sizes of layers, and that pages follow each other.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn new(
        summary: &Summary,
        layers: &[LayerEntry],
        extents: Vec<PageEntry>,
        spans: Vec<PageEntry>,
        key: Option<&MetadataKey>,
    ) -> Result<Self, FormatError> {
        let mut tar_bytes = 0u64;
        for layer in layers {
            tar_bytes = tar_bytes.saturating_add(layer.tar_bytes.get());
        }
        if tar_bytes > TAR_LIMIT {
            return Err(field("layer", "tar_bytes", tar_bytes, "at most 64 TiB together"));
        }
        if (tar_bytes == 0) != spans.is_empty() {
            return Err(field("index summary", "span_pages", spans.len() as u64, "some where layers have bytes"));
        }
        let cipher = if key.is_some() { Cipher::Aes256Gcm } else { Cipher::None };
        for (pages, end, each) in [
            (&extents, summary.device_bytes.get(), PAGE_EXTENTS * size_of::<Extent>()),
            (&spans, tar_bytes + 1, PAGE_SPANS * size_of::<Span>()),
        ] {
            let mut least = 0;
            for (number, page) in pages.iter().enumerate() {
                let first = page.first.get();
                if first < least || first >= end || (number == 0 && end == tar_bytes + 1 && first != 0) {
                    return Err(field(
                        "page index",
                        "first",
                        first,
                        "not less than the one before, and within what it is of",
                    ));
                }
                least = first;
                let (stored, most) = (page.stored.get() as usize, each + each / 8 + cipher.overhead());
                if stored <= cipher.overhead() || stored > most || page.reserved.get() != 0 {
                    return Err(field(
                        "page index",
                        "stored",
                        stored as u64,
                        "at most a page's size, an eighth and the tag",
                    ));
                }
            }
        }
        let derive = |part| key.map(|key| AeadKey::new(&key.derive(part)));
        let (pages_key, windows_key) = (derive(Part::Leaves), derive(Part::Windows));
        Ok(Self { summary: *summary, layers: layers.into(), pages_key, windows_key, extents, spans, tar_bytes })
    }

    /// Bytes of all tars.
    pub(crate) fn tar_bytes(&self) -> u64 {
        self.tar_bytes
    }

    fn index(&self, which: Which) -> &[PageEntry] {
        match which {
            Which::Extents => &self.extents,
            Which::Spans => &self.spans,
        }
    }

    /// How many there are.
    pub(crate) fn count(&self, which: Which) -> usize {
        self.index(which).len()
    }

    /// The page with the last entry that begins at a place or before; 0 where none does.
    pub(crate) fn find(&self, which: Which, place: u64) -> usize {
        self.index(which).partition_point(|page| page.first.get() <= place).saturating_sub(1)
    }

    /// Where a page is and what it must be.
    pub(crate) fn entry(&self, which: Which, page: usize) -> Option<&PageEntry> {
        self.index(which).get(page)
    }

    /// Verifies a page's stored bytes, and everything in it.
    ///
    /// # Errors
    /// [`FormatError`]
    pub(crate) fn open(&self, which: Which, page: usize, stored: &mut [u8]) -> Result<Page, FormatError> {
        let Some(entry) = self.entry(which, page) else {
            return Err(field("page index", "page", page as u64, "one of the index's"));
        };
        let number = page as u64;
        let found = sha256(stored);
        if found != entry.digest {
            let (found, expected) = (hex(&found), hex(&entry.digest));
            return Err(FormatError::Digest { part: "page", index: number, found, expected });
        }
        let packed = unseal(self.pages_key.as_ref(), entry.place.get(), "page", stored)?;
        let (total, each, size) = match which {
            Which::Extents => (self.summary.extents.get(), PAGE_EXTENTS, size_of::<Extent>()),
            Which::Spans => (self.summary.spans.get(), PAGE_SPANS, size_of::<Span>()),
        };
        let entries = total.saturating_sub(number * each as u64).min(each as u64);
        let expected = entries * size as u64;
        let mut plain = vec![0; usize::try_from(expected).unwrap_or(0)];
        let wrong = FormatError::Compressed { part: "page", index: number, expected };
        if unzstd(packed, &mut plain).ok() != Some(plain.len()) {
            return Err(wrong);
        }
        let next = self.entry(which, page + 1).map(|next| next.first.get());
        let first = entry.first.get();
        match which {
            Which::Extents => {
                let relative = <[Extent]>::ref_from_bytes(&plain).map_err(|_| wrong)?;
                let end = next.unwrap_or(self.summary.device_bytes.get());
                Ok(Page::Extents(absolute(relative, first, end, self.tar_bytes)?))
            }
            Which::Spans => {
                let spans = <[Span]>::ref_from_bytes(&plain).map_err(|_| wrong)?;
                self.check(spans, page, first, next.unwrap_or(self.tar_bytes))?;
                Ok(Page::Spans(spans.into()))
            }
        }
    }

    /// Checks spans, and that they leave nothing out.
    fn check(&self, spans: &[Span], page: usize, first: u64, end: u64) -> Result<(), FormatError> {
        let mut next = first;
        for (number, span) in spans.iter().enumerate() {
            let kind = span.check(&self.layers)?;
            if span.address.get() != next || (kind == Kind::More && page == 0 && number == 0) {
                return Err(field("span", "address", span.address.get(), "where the span before it ends"));
            }
            next = span.end();
        }
        if next != end {
            return Err(field("span", "length", next, "up to the next page, or the end of the layers"));
        }
        Ok(())
    }

    /// Verifies a span's window.
    ///
    /// # Errors
    /// [`FormatError`]
    pub(crate) fn open_window(&self, span: &Span, stored: &mut [u8]) -> Result<Vec<u8>, FormatError> {
        let place = span.window.get();
        let packed = unseal(self.windows_key.as_ref(), place, "window", stored)?;
        super::decode::window(packed).map_err(|_| FormatError::Compressed {
            part: "window",
            index: place,
            expected: super::format::WINDOW as u64,
        })
    }
}

fn unseal<'a>(
    key: Option<&AeadKey>,
    place: u64,
    part: &'static str,
    stored: &'a mut [u8],
) -> Result<&'a [u8], FormatError> {
    match key {
        None => Ok(stored),
        Some(key) => {
            let plain = key.open(counter(place), part.as_bytes(), stored);
            Ok(plain.map_err(|_| FormatError::Sealed { part, index: place })?)
        }
    }
}

/// Adds up a page's differences.
fn absolute(relative: &[Extent], first: u64, end: u64, tar_bytes: u64) -> Result<Arc<[Extent]>, FormatError> {
    let (mut offset, mut address) = (first, 0u64);
    let mut all = Vec::with_capacity(relative.len());
    for (number, extent) in relative.iter().enumerate() {
        let length = extent.length.get();
        let start = offset.checked_add(extent.offset.get());
        let stop = start.and_then(|start| start.checked_add(length));
        let (Some(start), Some(stop)) = (start, stop.filter(|stop| *stop <= end && length > 0)) else {
            return Err(field("extent", "length", length, "at least 1, and up to the next page or the device's end"));
        };
        if number == 0 && start != first {
            return Err(field("extent", "offset", start, "the page's first byte"));
        }
        let from = address.wrapping_add(extent.address.get());
        let Some(to) = from.checked_add(length).filter(|to| *to <= tar_bytes) else {
            return Err(field("extent", "address", from, "within the layers"));
        };
        all.push(Extent { offset: start.into(), length: length.into(), address: from.into() });
        (offset, address) = (stop, to);
    }
    Ok(all.into())
}

//! The bytes of an index, as docs/formats/lazy-index.md has them: little-endian, sizes in bytes.
//!
//! The tars of all layers, end to end, are one space of *addresses*. [`Extent`]s say which addresses a range of the data device has;
//! [`Span`]s say how the tar at an address is made of stored bytes of a layer. Both come in pages, of which the metadata has the digests.
//!
//! Invariants: extents go up on the device without overlap, and what none covers is zeroes; spans cover all addresses without gap or overlap.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::format::{BLOCK, DEVICE_LIMIT, DIGEST, EROFS_LIMIT, FormatError, TAG};

/// The manifest's `artifactType`.
pub const ARTIFACT_TYPE: &str = "application/vnd.nacre.image.index.v1";
/// Media type of the metadata blob. Where it is sealed, its descriptor has the wrapped key.
pub const METADATA_TYPE: &str = "application/vnd.nacre.image.index.metadata.v1";
/// Media type of the blob of windows and pages.
pub const PAGES_TYPE: &str = "application/vnd.nacre.image.index.pages.v1";
/// What the metadata's stream begins with.
pub const KIND: [u8; 8] = *b"NACRSPAN";

/// The most layers.
pub const LAYERS_LIMIT: u32 = 4096;
/// Entries of a page of extents, and of one of spans; the last of each has the rest.
pub const PAGE_EXTENTS: usize = 1024;
/// See [`PAGE_EXTENTS`].
pub const PAGE_SPANS: usize = 64;
/// The most pages of either kind.
pub const PAGES_LIMIT: u32 = 1 << 18;
/// The most bytes of all tars together.
pub const TAR_LIMIT: u64 = 1 << 46;
/// The most tar bytes of a span that is decoded in memory; a longer one is decoded into a file.
pub const SPAN_LIMIT: u64 = 8 << 20;
/// The most stored bytes of a span's entry: a request of the fetcher. What is longer has entries that continue it.
pub const STORED_LIMIT: u32 = 4 << 20;
/// What a restart of inflate may look back at.
pub const WINDOW: usize = 32 << 10;
/// The largest window of a zstd frame: 32 MiB, which is what the writers of zstd:chunked ask for at most, and memory while a long frame is decoded
/// into a file.
pub const ZSTD_WINDOW_LOG: u32 = 25;

/// What the metadata's stream begins with. The sections follow: layers, pages of extents, pages of spans, the EROFS image.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Summary {
    /// [`KIND`]
    pub kind: [u8; 8],
    /// Bytes of the data device: whole blocks.
    pub device_bytes: le::U64,
    /// Bytes of the EROFS image: whole blocks.
    pub erofs_bytes: le::U64,
    /// Bytes of all regular files, for people.
    pub content_bytes: le::U64,
    /// Extents of all pages.
    pub extents: le::U64,
    /// Spans of all pages, those that continue others included.
    pub spans: le::U64,
    /// Layers.
    pub layers: le::U32,
    /// Pages of extents.
    pub extent_pages: le::U32,
    /// Pages of spans.
    pub span_pages: le::U32,
    /// 0
    pub reserved: le::U32,
}
const _: () = assert!(size_of::<Summary>() == 64);

/// A layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LayerEntry {
    /// SHA-256 of its blob.
    pub digest: [u8; DIGEST],
    /// Bytes of its blob.
    pub size: le::U64,
    /// Bytes of its tar.
    pub tar_bytes: le::U64,
    /// Which key decrypts it, by [`LayerParts::name`](nacre_oci::crypt::LayerParts::name); zeroes for one that is in the clear.
    pub key: [u8; 32],
}
const _: () = assert!(size_of::<LayerEntry>() == 80);

/// Where a page is and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageEntry {
    /// The byte of the device, or the address, of its first entry.
    pub first: le::U64,
    /// Where in the blob it is stored.
    pub place: le::U64,
    /// Its stored bytes: zstd, then sealed.
    pub stored: le::U32,
    /// 0
    pub reserved: le::U32,
    /// SHA-256 of its stored bytes.
    pub digest: [u8; DIGEST],
}
const _: () = assert!(size_of::<PageEntry>() == 56);

/// A range of the device, and the addresses of its bytes. In a page each field is the difference to where the entry before it ended, so
/// that pages become small; the first one's is that to the page's first byte, and to address 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Its first byte.
    pub offset: le::U64,
    /// Its bytes.
    pub length: le::U64,
    /// The address of its first byte; as a difference, modulo 2^64.
    pub address: le::U64,
}
const _: () = assert!(size_of::<Extent>() == 24);

/// How the tar of a span comes from what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It is what is stored.
    Raw,
    /// Members of gzip; a span begins with one, and ends where another may begin, or within one.
    Gzip,
    /// Deflated data from the middle of a member on, which look back into a window; further members may follow.
    Inflate,
    /// Frames of zstd.
    Zstd,
    /// It continues the span before it: more stored bytes of it, and no tar of its own.
    More,
}

impl Kind {
    /// As it is written.
    pub fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Gzip => 1,
            Self::Inflate => 2,
            Self::Zstd => 3,
            Self::More => 4,
        }
    }

    /// As it is read.
    pub fn of(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Raw,
            1 => Self::Gzip,
            2 => Self::Inflate,
            3 => Self::Zstd,
            4 => Self::More,
            _ => return None,
        })
    }
}

/// A range of addresses and what it is decoded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Span {
    /// The first address; of one that continues another, where that one ends.
    pub address: le::U64,
    /// Bytes of tar.
    pub length: le::U64,
    /// Where in the layer's blob its stored bytes are.
    pub place: le::U64,
    /// Where in the blob of windows and pages its window is.
    pub window: le::U64,
    /// Stored bytes.
    pub stored: le::U32,
    /// Stored bytes of the window; 0 where there is none.
    pub window_stored: le::U32,
    /// Which layer.
    pub layer: le::U16,
    /// A [`Kind`].
    pub kind: u8,
    /// How many bits of the byte before `place` belong to the span: its highest ones.
    pub bits: u8,
    /// That byte, without its other bits.
    pub byte: u8,
    /// 0
    pub reserved: [u8; 3],
    /// SHA-256 of the stored bytes.
    pub digest: [u8; DIGEST],
    /// SHA-256 of the window's stored bytes.
    pub window_digest: [u8; DIGEST],
}
const _: () = assert!(size_of::<Span>() == 112);

impl Span {
    /// The address after the last.
    pub fn end(&self) -> u64 {
        self.address.get().saturating_add(self.length.get())
    }

    /// Checks all that can be known of a span alone, and of its layer.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn check(&self, layers: &[LayerEntry]) -> Result<Kind, FormatError> {
        let field = |name, found, allowed| Err(FormatError::field("span", name, found, allowed));
        let Some(kind) = Kind::of(self.kind) else { return field("kind", self.kind.into(), "from 0 to 4") };
        let Some(layer) = layers.get(usize::from(self.layer.get())) else {
            return field("layer", self.layer.get().into(), "one of the image's");
        };
        let (place, stored) = (self.place.get(), self.stored.get());
        if stored == 0 || stored > STORED_LIMIT {
            return field("stored", stored.into(), "from 1 to 4 MiB");
        }
        if place.checked_add(stored.into()).is_none_or(|end| end > layer.size.get()) {
            return field("place", place, "such that the span is within its layer's blob");
        }
        if self.length.get() > TAR_LIMIT || (self.length.get() == 0) != (kind == Kind::More) {
            return field("length", self.length.get(), "0 for one that continues another, and else from 1 to 64 TiB");
        }
        if kind == Kind::Raw && self.length.get() != u64::from(stored) {
            return field("length", self.length.get(), "as many as are stored");
        }
        let looks_back = self.window_stored.get() > 0;
        let most = (WINDOW + WINDOW / 8 + TAG) as u64;
        if u64::from(self.window_stored.get()) > most {
            return field("window_stored", self.window_stored.get().into(), "at most 36 KiB and the tag");
        }
        if !looks_back && (self.window.get() != 0 || self.window_digest != [0; DIGEST]) {
            return field("window", self.window.get(), "0 where there is none");
        }
        if kind != Kind::Inflate && (looks_back || self.bits != 0) {
            return field("bits", self.bits.into(), "0, and without a window, where nothing is looked back at");
        }
        if self.bits > 7 || u32::from(self.byte).trailing_zeros() < 8 - u32::from(self.bits) {
            return field("byte", self.byte.into(), "without other bits than the span's, at most 7");
        }
        if self.reserved != [0; 3] {
            return field("reserved", 1, "all zeroes");
        }
        Ok(kind)
    }
}

impl Summary {
    /// Checks every field against its limit.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn check(&self) -> Result<(), FormatError> {
        let field = |name, found, allowed| Err(FormatError::field("index summary", name, found, allowed));
        if self.kind != KIND {
            return field("kind", u64::from_le_bytes(self.kind), "what an index begins with: this is none");
        }
        let (device, erofs) = (self.device_bytes.get(), self.erofs_bytes.get());
        if device > DEVICE_LIMIT || !device.is_multiple_of(BLOCK) {
            return field("device_bytes", device, "whole blocks of 4 KiB, at most 16 TiB");
        }
        if erofs == 0 || erofs > EROFS_LIMIT || !erofs.is_multiple_of(BLOCK) {
            return field("erofs_bytes", erofs, "whole blocks of 4 KiB, at most 4 GiB");
        }
        if self.layers.get() > LAYERS_LIMIT {
            return field("layers", self.layers.get().into(), "at most 4096");
        }
        for (name, pages, entries, each) in [
            ("extent_pages", self.extent_pages.get(), self.extents.get(), PAGE_EXTENTS),
            ("span_pages", self.span_pages.get(), self.spans.get(), PAGE_SPANS),
        ] {
            if pages > PAGES_LIMIT || u64::from(pages) != entries.div_ceil(each as u64) {
                return field(name, pages.into(), "as many as the entries need, at most 262144");
            }
        }
        if self.reserved.get() != 0 {
            return field("reserved", self.reserved.get().into(), "0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> LayerEntry {
        LayerEntry { digest: [1; 32], size: 5000.into(), tar_bytes: 9000.into(), key: [0; 32] }
    }

    #[test]
    fn spans_that_lie_are_refused() {
        let good = Span {
            address: 100.into(),
            length: 4000.into(),
            place: 1000.into(),
            window: 0.into(),
            stored: 4000.into(),
            window_stored: 50.into(),
            layer: 0.into(),
            kind: 2,
            bits: 3,
            byte: 0b1010_0000,
            reserved: [0; 3],
            digest: [2; 32],
            window_digest: [3; 32],
        };
        let layers = [layer()];
        assert_eq!(good.check(&layers), Ok(Kind::Inflate));
        let none = Span { window_stored: 0.into(), window_digest: [0; 32], bits: 0, byte: 0, ..good };
        assert_eq!(Span { kind: 0, ..none }.check(&layers), Ok(Kind::Raw));
        assert_eq!(Span { kind: 4, length: 0.into(), ..none }.check(&layers), Ok(Kind::More));
        for bad in [
            Span { kind: 5, ..good },
            Span { layer: 1.into(), ..good },
            Span { stored: 0.into(), ..good },
            Span { stored: 4001.into(), ..good },
            Span { place: u64::MAX.into(), ..good },
            Span { length: 0.into(), ..good },
            Span { length: u64::MAX.into(), ..good },
            Span { window_stored: 40_000.into(), ..good },
            Span { bits: 8, ..good },
            Span { byte: 0b1010_0001, ..good },
            Span { bits: 0, ..good },
            Span { kind: 1, ..good },
            Span { reserved: [1; 3], ..good },
            Span { kind: 0, length: 3999.into(), ..none },
            Span { kind: 4, ..none },
            Span { kind: 3, window: 1.into(), ..none },
        ] {
            bad.check(&layers).unwrap_err();
        }
    }

    #[test]
    fn summaries_beyond_the_limits_are_refused() {
        let good = Summary {
            kind: KIND,
            device_bytes: 8192.into(),
            erofs_bytes: 4096.into(),
            extents: 1025.into(),
            extent_pages: 2.into(),
            spans: 64.into(),
            span_pages: 1.into(),
            layers: 1.into(),
            ..Summary::default()
        };
        good.check().unwrap();
        for bad in [
            Summary { kind: [0; 8], ..good },
            Summary { device_bytes: 1.into(), ..good },
            Summary { erofs_bytes: 0.into(), ..good },
            Summary { layers: 4097.into(), ..good },
            Summary { extent_pages: 1.into(), ..good },
            Summary { spans: u64::MAX.into(), span_pages: u32::MAX.into(), ..good },
            Summary { reserved: 1.into(), ..good },
        ] {
            bad.check().unwrap_err();
        }
    }
}

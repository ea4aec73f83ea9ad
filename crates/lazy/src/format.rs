//! The bytes of a lazy image, as docs/formats/lazy.md has them: little-endian, sizes in bytes.
//!
//! An image is an OCI manifest whose layers are one *metadata* blob, one *table* blob, and *data* blobs. The metadata blob is a
//! header and sealed frames, whose content is one stream: [`Summary`], the blobs, the leaves' digests, the image config, the trace,
//! and the EROFS image. The table blob is leaves of [`ChunkEntry`]s. A data blob is stored chunks, end to end.
//!
//! Invariant: the entries of all leaves cover the data device from its first byte to its last without a gap or an overlap.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// What the metadata blob begins with.
pub const MAGIC: [u8; 8] = *b"NACRLAZY";
/// The version of everything here.
pub const VERSION: u32 = 1;

/// The manifest's `artifactType`.
pub const ARTIFACT_TYPE: &str = "application/vnd.nacre.image.lazy.v1";
/// Media type of the metadata blob. Where it is sealed, its descriptor has the wrapped key.
pub const METADATA_TYPE: &str = "application/vnd.nacre.lazy.metadata.v1";
/// Media type of the table blob.
pub const TABLE_TYPE: &str = "application/vnd.nacre.lazy.table.v1";
/// Media type of a data blob.
pub const DATA_TYPE: &str = "application/vnd.nacre.lazy.data.v1";
/// What the media types of a sealed image end with, all of them.
pub const SEALED: &str = "+encrypted";

/// A block of the data device, and of the EROFS image.
pub const BLOCK: u64 = 4096;
/// The most bytes of the data device: EROFS counts its blocks in 32 bits.
pub const DEVICE_LIMIT: u64 = BLOCK * u32::MAX as u64;
/// The most plaintext of one chunk.
pub const CHUNK_LIMIT: u32 = 1 << 20;
/// Plaintext of a frame; the last of a blob may be shorter.
pub const FRAME: usize = 256 << 10;
/// Entries of a leaf; the last of a table may have fewer.
pub const LEAF_ENTRIES: usize = 170;
/// The most leaves of a table.
pub const LEAVES_LIMIT: u32 = 1 << 20;
/// The most data blobs of an image.
pub const BLOBS_LIMIT: u32 = 1024;
/// The most bytes of an image config.
pub const CONFIG_LIMIT: u32 = 4 << 20;
/// The most places of a trace.
pub const TRACE_LIMIT: u32 = 1 << 20;
/// The most bytes of an EROFS image.
pub const EROFS_LIMIT: u64 = 4 << 30;
/// Bytes of a digest: SHA-256.
pub const DIGEST: usize = 32;
/// Bytes of an AEAD's tag.
pub const TAG: usize = 16;

/// The clear beginning of the metadata blob. It is the associated data of every frame.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`]
    pub magic: [u8; 8],
    /// [`VERSION`]
    pub version: le::U32,
    /// A [`Cipher`].
    pub cipher: le::U32,
    /// 0
    pub reserved: [u8; 16],
}
const _: () = assert!(size_of::<Header>() == 32);

/// How frames, leaves and chunks are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// Not at all: digests only.
    None,
    /// AES-256-GCM.
    Aes256Gcm,
}

impl Cipher {
    /// As it is written.
    pub fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => 1,
        }
    }

    /// As it is read.
    pub fn of(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::Aes256Gcm),
            _ => None,
        }
    }

    /// Bytes that sealing adds.
    pub fn overhead(self) -> usize {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => TAG,
        }
    }
}

/// What the frames' content begins with. The sections follow in the order of its fields.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Summary {
    /// Bytes of the data device: whole blocks.
    pub device_bytes: le::U64,
    /// Bytes of the EROFS image: whole blocks.
    pub erofs_bytes: le::U64,
    /// Bytes of all regular files, for people.
    pub content_bytes: le::U64,
    /// Entries of all leaves.
    pub chunks: le::U64,
    /// Data blobs.
    pub blobs: le::U32,
    /// Leaves of the table.
    pub leaves: le::U32,
    /// Bytes of the image config.
    pub config_bytes: le::U32,
    /// Places of the trace, 8 bytes each: byte offsets in the data device, in the order of their first use.
    pub trace: le::U32,
    /// 0
    pub reserved: [u8; 16],
}
const _: () = assert!(size_of::<Summary>() == 64);

/// A data blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    /// SHA-256 of the whole blob.
    pub digest: [u8; DIGEST],
    /// Its bytes.
    pub size: le::U64,
}
const _: () = assert!(size_of::<BlobEntry>() == 40);

/// Where a leaf is and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LeafEntry {
    /// The first byte of the data device that it speaks of.
    pub offset: le::U64,
    /// SHA-256 of its stored bytes.
    pub digest: [u8; DIGEST],
}
const _: () = assert!(size_of::<LeafEntry>() == 40);

/// How a chunk's plaintext became what is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// It is the plaintext.
    Raw,
    /// One zstd frame.
    Zstd,
    /// There is nothing stored: the range is zeroes.
    Zeroes,
}

impl Method {
    /// As it is written.
    pub fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
            Self::Zeroes => 2,
        }
    }

    /// As it is read.
    pub fn of(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            2 => Some(Self::Zeroes),
            _ => None,
        }
    }
}

/// A range of the data device, and the stored chunk that holds its bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkEntry {
    /// Where the range begins.
    pub offset: le::U64,
    /// Its bytes: at most [`CHUNK_LIMIT`], unless it is zeroes.
    pub length: le::U64,
    /// Where in its blob the stored chunk is.
    pub place: le::U64,
    /// Bytes of the stored chunk, its tag included.
    pub stored: le::U32,
    /// Which data blob.
    pub blob: le::U16,
    /// A [`Method`].
    pub method: u8,
    /// 0
    pub reserved: u8,
    /// SHA-256 of the stored chunk.
    pub digest: [u8; DIGEST],
    /// The chunk's own key; zeroes in an image without a cipher.
    pub key: [u8; 32],
}
const _: () = assert!(size_of::<ChunkEntry>() == 96);

impl std::fmt::Debug for ChunkEntry {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkEntry")
            .field("offset", &self.offset.get())
            .field("length", &self.length.get())
            .field("place", &self.place.get())
            .field("stored", &self.stored.get())
            .field("blob", &self.blob.get())
            .field("method", &self.method)
            .field("digest", &hex(&self.digest))
            .finish_non_exhaustive()
    }
}

impl ChunkEntry {
    /// The byte after the range.
    pub fn end(&self) -> u64 {
        self.offset.get().saturating_add(self.length.get())
    }
}

/// What is wrong with the bytes of a lazy image.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// The metadata blob does not begin as one.
    #[error("the metadata blob does not begin with {}: it is none, or damaged", MAGIC.escape_ascii())]
    Magic,
    /// Of a later version.
    #[error("the lazy image has version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// A field has a value that it must not have.
    #[error("{part}: {field} is {found}; {allowed}")]
    Field {
        /// Which structure.
        part: &'static str,
        /// Its field.
        field: &'static str,
        /// As it is.
        found: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// Bytes are missing, or too many.
    #[error("{part} is cut off or too long: {found} bytes, {expected} expected")]
    Length {
        /// Which structure.
        part: &'static str,
        /// As it is.
        found: u64,
        /// As it must be.
        expected: u64,
    },
    /// What was sealed does not open.
    #[error("{part} {index} cannot be decrypted: another key, or it was changed")]
    Sealed {
        /// Frame, leaf or chunk.
        part: &'static str,
        /// Which.
        index: u64,
    },
    /// What was hashed is something else.
    #[error("{part} {index} is not what the image names: SHA-256 {found}, expected {expected}")]
    Digest {
        /// Leaf or chunk.
        part: &'static str,
        /// Which: a leaf's number, a chunk's place.
        index: u64,
        /// As it is.
        found: String,
        /// As it must be.
        expected: String,
    },
    /// What was compressed does not decompress to what it should.
    #[error("{part} {index} does not decompress to the {expected} bytes that it holds")]
    Compressed {
        /// Frame or chunk.
        part: &'static str,
        /// Which.
        index: u64,
        /// Bytes.
        expected: u64,
    },
}

impl FormatError {
    pub(crate) fn field(part: &'static str, field: &'static str, found: u64, allowed: &'static str) -> Self {
        Self::Field { part, field, found, allowed }
    }
}

impl Header {
    /// A new one.
    pub fn new(cipher: Cipher) -> Self {
        Self { magic: MAGIC, version: VERSION.into(), cipher: cipher.code().into(), reserved: [0; 16] }
    }

    /// Reads and checks it.
    ///
    /// # Errors
    /// [`FormatError`]
    pub fn parse(bytes: &[u8; size_of::<Self>()]) -> Result<(Self, Cipher), FormatError> {
        let header: Self = zerocopy::transmute!(*bytes);
        if header.magic != MAGIC {
            return Err(FormatError::Magic);
        }
        if header.version.get() != VERSION {
            return Err(FormatError::Version(header.version.get()));
        }
        let code = header.cipher.get();
        let cipher = Cipher::of(code).ok_or(FormatError::field("header", "cipher", code.into(), "0 or 1"))?;
        if header.reserved != [0; 16] {
            return Err(FormatError::field("header", "reserved", 1, "all zeroes"));
        }
        Ok((header, cipher))
    }
}

impl Summary {
    /// Checks every field against its limit.
    ///
    /// # Errors
    /// [`FormatError::Field`]
    pub fn check(&self) -> Result<(), FormatError> {
        let field = |name, found, allowed| Err(FormatError::field("summary", name, found, allowed));
        let (device, erofs) = (self.device_bytes.get(), self.erofs_bytes.get());
        if device > DEVICE_LIMIT || !device.is_multiple_of(BLOCK) {
            return field("device_bytes", device, "whole blocks of 4 KiB, at most 16 TiB");
        }
        if erofs == 0 || erofs > EROFS_LIMIT || !erofs.is_multiple_of(BLOCK) {
            return field("erofs_bytes", erofs, "whole blocks of 4 KiB, at most 4 GiB");
        }
        if self.blobs.get() > BLOBS_LIMIT {
            return field("blobs", self.blobs.get().into(), "at most 1024");
        }
        let leaves = u64::from(self.leaves.get());
        if leaves > LEAVES_LIMIT.into() || leaves != self.chunks.get().div_ceil(LEAF_ENTRIES as u64) {
            return field("leaves", leaves, "one for each 170 chunks, at most 1048576");
        }
        if (device == 0) != (leaves == 0) {
            return field("leaves", leaves, "some where the device has bytes, none where it has none");
        }
        if self.config_bytes.get() > CONFIG_LIMIT {
            return field("config_bytes", self.config_bytes.get().into(), "at most 4 MiB");
        }
        if self.trace.get() > TRACE_LIMIT {
            return field("trace", self.trace.get().into(), "at most 1048576");
        }
        if self.reserved != [0; 16] {
            return field("reserved", 1, "all zeroes");
        }
        Ok(())
    }

    /// Where a leaf's stored bytes are in the table blob.
    pub fn leaf_range(&self, leaf: u32, cipher: Cipher) -> std::ops::Range<u64> {
        let whole = (LEAF_ENTRIES * size_of::<ChunkEntry>() + cipher.overhead()) as u64;
        let start = u64::from(leaf) * whole;
        let entries = (self.chunks.get() - u64::from(leaf) * LEAF_ENTRIES as u64).min(LEAF_ENTRIES as u64);
        start..start + entries * size_of::<ChunkEntry>() as u64 + cipher.overhead() as u64
    }
}

/// A digest for messages and names.
pub(crate) fn hex(digest: &[u8]) -> String {
    use std::fmt::Write as _;
    digest.iter().fold(String::with_capacity(digest.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_others_are_refused() {
        let header = Header::new(Cipher::Aes256Gcm);
        let bytes: [u8; 32] = zerocopy::transmute!(header);
        assert_eq!(Header::parse(&bytes).unwrap().1, Cipher::Aes256Gcm);
        for (at, value, text) in
            [(0, b'n', "does not begin"), (8, 2, "version 2"), (12, 7, "cipher is 7"), (20, 1, "reserved")]
        {
            let mut bad = bytes;
            bad[at] = value;
            assert!(Header::parse(&bad).unwrap_err().to_string().contains(text));
        }
    }

    #[test]
    fn summaries_beyond_the_limits_are_refused() {
        let good = Summary {
            device_bytes: (1 << 20).into(),
            erofs_bytes: 4096.into(),
            chunks: 171.into(),
            leaves: 2.into(),
            blobs: 1.into(),
            ..Summary::default()
        };
        good.check().unwrap();
        assert_eq!(good.leaf_range(0, Cipher::Aes256Gcm), 0..16_336);
        assert_eq!(good.leaf_range(1, Cipher::Aes256Gcm), 16_336..16_448);
        for bad in [
            Summary { device_bytes: 1.into(), ..good },
            Summary { device_bytes: (DEVICE_LIMIT + BLOCK).into(), ..good },
            Summary { erofs_bytes: 0.into(), ..good },
            Summary { erofs_bytes: 4097.into(), ..good },
            Summary { chunks: 170.into(), ..good },
            Summary { chunks: u64::MAX.into(), leaves: u32::MAX.into(), ..good },
            Summary { device_bytes: 0.into(), ..good },
            Summary { blobs: 1025.into(), ..good },
            Summary { config_bytes: u32::MAX.into(), ..good },
            Summary { trace: u32::MAX.into(), ..good },
            Summary { reserved: [1; 16], ..good },
        ] {
            bad.check().unwrap_err();
        }
    }
}

//! How much a layer may be. Every limit is a setting, and the error that names it says which one to raise.

use serde::{Deserialize, Serialize};

/// What one layer may hold. A layer that is over any of these is refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Entries of the tar, whiteouts included.
    pub entries: u64,
    /// Bytes of the uncompressed tar.
    pub layer_bytes: u64,
    /// Uncompressed bytes for one compressed byte, above [`expansion_free_bytes`](Self::expansion_free_bytes).
    pub expansion: u64,
    /// Uncompressed bytes that are not counted against [`expansion`](Self::expansion): small layers of zeros are no bombs.
    pub expansion_free_bytes: u64,
    /// Logical bytes of one file, holes included.
    pub file_bytes: u64,
    /// Bytes of an entry's name.
    pub name_bytes: u64,
    /// Bytes of a link's target.
    pub link_bytes: u64,
    /// Components of a name.
    pub depth: u64,
    /// Bytes of one PAX extended header.
    pub pax_bytes: u64,
    /// Extended attributes of an entry.
    pub xattrs: u64,
    /// Bytes of one attribute's value; Linux takes 65,536.
    pub xattr_bytes: u64,
    /// Pieces of a sparse file.
    pub sparse_segments: u64,
    /// Bytes of what must be remembered of a layer: names of directories without an entry, links into other layers.
    pub record_bytes: u64,
    /// Bytes of a zstd frame's window (zstd -19 needs 8 MiB); it is memory for each layer in flight.
    pub zstd_window_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 10_000_000,
            layer_bytes: 1 << 40,
            expansion: 1000,
            expansion_free_bytes: 64 << 20,
            file_bytes: 1 << 40,
            name_bytes: 16 << 10,
            link_bytes: 16 << 10,
            depth: 256,
            pax_bytes: 1 << 20,
            xattrs: 256,
            xattr_bytes: 64 << 10,
            sparse_segments: 1 << 18,
            record_bytes: 4 << 20,
            zstd_window_bytes: 8 << 20,
        }
    }
}

/// A layer holds more than a limit allows.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "limit '{name}' exceeded: {found} found, {allowed} allowed; raise limits.{name} if the image is meant to be so"
)]
pub struct LimitExceeded {
    /// The field of [`Limits`].
    pub name: &'static str,
    /// What was found; at least that much.
    pub found: u64,
    /// The limit.
    pub allowed: u64,
}

/// Refuses what is over its limit.
pub(crate) fn check(name: &'static str, found: u64, allowed: u64) -> Result<(), LimitExceeded> {
    if found > allowed { Err(LimitExceeded { name, found, allowed }) } else { Ok(()) }
}

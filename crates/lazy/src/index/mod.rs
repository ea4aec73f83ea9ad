//! Indexes: what makes a filesystem of an ordinary image's layers where they are.
//!
//! An index is an artifact about an image (its manifest's `subject`): the tree of its layers as EROFS metadata, where the content of files
//! is in the layers' tars, and where decoding of a layer can start: anywhere in a plain tar, at members and at checkpoints of gzip, at frames
//! of zstd. Layers that ocicrypt encrypted stay so; their keys come from the image, not from the index.
//!
//! - [`format`](mod@format), [`metadata`], [`pages`]: the bytes, see docs/formats/lazy-index.md.
//! - [`gunzip`], [`decode`], [`spool`]: from stored bytes to tar.
//! - [`reader`]: bytes of the data device.
//!
//! Invariant: stored bytes are verified by a digest of the index before anything decodes them, and what they decode to has the length that
//! the index says, or is an error. Tables of contents within layers (eStargz, zstd:chunked) are never looked at.

mod access;
mod artifact;
#[cfg(feature = "build")]
pub mod build;
pub mod decode;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
pub mod gunzip;
pub mod metadata;
pub mod pages;
pub mod reader;
mod spool;

pub use artifact::{IndexArtifact, IndexError, LayerKey, unwrap_layers};
pub use metadata::IndexMetadata;
pub use reader::IndexReader;

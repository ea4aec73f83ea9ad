//! Lazy images: a filesystem that starts before it is downloaded, and whose every byte is verified when it is read.
//!
//! - [`erofs`]: names and attributes, as an EROFS image that the kernel mounts and whose files point into a virtual data device.
//! - [`format`](mod@format), [`frames`], [`table`], [`chunk`]: the bytes, see docs/formats/lazy.md.
//!
//! Invariant: no byte leaves a reader that was not verified by a digest that goes back to the image's manifest.

pub mod artifact;
#[cfg(feature = "build")]
pub mod build;
pub mod cache;
pub mod chunk;
pub mod device;
pub mod erofs;
pub mod fetch;
pub mod files;
pub mod format;
pub mod frames;
pub mod image;
pub mod index;
pub mod keys;
pub mod pace;
pub mod reader;
pub mod source;
pub mod table;
pub mod trace;

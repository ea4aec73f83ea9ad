//! Lazy images: a filesystem that starts before it is downloaded, and whose every byte is verified when it is read.
//!
//! - [`erofs`]: names and attributes, as an EROFS image that the kernel mounts and whose files point into a virtual data device.

pub mod erofs;

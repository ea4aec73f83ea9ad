//! EROFS metadata: made, checked and read.
//!
//! A lazy image has one of these: names and attributes, and no bytes of files. Regular files point into a data device, which is
//! somebody else's to serve. The format is EROFS as the kernel reads it, in one fixed profile (`docs/formats/lazy-metadata.md`):
//!
//! ```text
//!    0  zeros
//! 1024  superblock, then one device slot
//! 1280  records: inodes, breadth first, each with its attributes, and what is inline or its chunk indexes
//!       directory blocks, and targets of links that are not inline, in the order of their inodes
//!       shared attributes
//! ```
//!
//! - [`Tree`] is what the layers of an image come to, [`write`](write()) makes the image of it. One tree gives one image, byte for byte.
//! - [`check`](check()) takes an image that nobody vouches for, and accepts only what [`write`](write()) could have made.
//! - [`Image`] reads one, checked or not: whatever the bytes are, it gives an answer or an error.

pub use check::{CheckError, Limits, Summary, check};
pub use layout::{Device, FileType, Timestamp};
pub use read::{Dirent, Extent, Image, Inode, ReadError, Xattr};
pub use source::ReadAt;
pub use tree::{Attributes, Entry, Node, Tree, TreeError};
pub use write::{WriteError, WriteOptions, Written, write};

pub mod check;
mod dirs;
mod layout;
mod parse;
pub mod read;
mod source;
pub mod tree;
pub mod write;

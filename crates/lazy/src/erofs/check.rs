//! Checks an image that nobody vouches for, before the kernel, FUSE or a library takes it.
//!
//! What is accepted is what [`write`](super::write()) makes, byte for byte: everything that the profile fixes is compared, and what is
//! free (names, owners, times, values of attributes, which blocks of the data device) is held to its rules. So the check needs no maps of
//! what is used: in the one order that there is, each record and each block begins where the one before ended.
//!
//! The walk is the writer's. One cursor goes through the directories, another through the records: each entry that is neither a dot nor a
//! further link names the next record. That makes the image a tree without a proof of its own (each directory is found once, after its
//! parent), and everything is read front to back, in large pieces. Held in memory are the directories that were found and not yet
//! read (8 bytes each), the files of several names (12 bytes each), and the shared attributes (at most 16 MiB).
//!
//! The image must not change afterwards: give the reader or the kernel a file that nobody else can write to.

use std::collections::VecDeque;

use thiserror::Error;
use zerocopy::FromBytes as _;

use super::{
    layout::{BLOCK, FIRST_RECORD, FileType, INODE, ROOT, RawInode, SLOT},
    parse::{parse_inode, parse_super},
    read::{Inode, ReadError},
    source::ReadAt,
};
use shared::Shared;
use window::Window;

mod directory;
mod record;
mod shared;
mod window;

/// What an image may be. One that is over any of these is refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Inodes, and likewise names.
    pub entries: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Directories on a way from the root, without the root.
    pub depth: u32,
    /// Bytes of one file.
    pub file_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 10_000_000, image_bytes: 4 << 30, depth: 256, file_bytes: 1 << 40 }
    }
}

/// What an image is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Names, the dots aside; the root has none.
    pub names: u64,
    /// Directories, the root among them.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices, pipes and sockets.
    pub specials: u64,
    /// Bytes of all files; those that several share count for each, and files of several names once.
    pub file_bytes: u64,
    /// The most directories on a way from the root, without the root.
    pub depth: u32,
    /// Blocks of 4 KiB of the data device: all files are below.
    pub device_blocks: u32,
    /// What the data device is called.
    pub device_tag: String,
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
}

/// Why an image is refused. Wherever it comes from, it was not made by this program, or was changed since.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The superblock or an inode is none of the profile, or the source failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A limit is too low, or the image too large.
    #[error("the metadata image is refused: {found} {what}; the limit `{limit}` allows {allowed}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: u64,
        /// Which limit.
        limit: &'static str,
        /// What it is.
        allowed: u64,
    },
    /// Something of an inode is wrong.
    #[error("the metadata image is refused: inode {nid} {what}")]
    Inode {
        /// Which.
        nid: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Something of a directory's entry is wrong.
    #[error("the metadata image is refused: in directory {directory}, the entry {name:?} {what}")]
    Entry {
        /// The directory's number.
        directory: u64,
        /// The name, escaped.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Something between inodes is wrong.
    #[error("the metadata image is refused: at byte {offset}, {what}")]
    Bytes {
        /// Where.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// Checks all of an image.
///
/// # Errors
/// It is not one that [`write`](super::write()) makes, or is over a limit; the source's own.
pub fn check<R: ReadAt + ?Sized>(source: &R, limits: &Limits) -> Result<Summary, CheckError> {
    let mut walk = Walk::new(source, limits)?;
    walk.root()?;
    while let Some(directory) = walk.next_directory()? {
        walk.directory(&directory)?;
    }
    walk.end()
}

/// A directory that was found and not yet read.
struct Pending {
    nid: u32,
    parent: u32,
}

/// A directory that is read.
struct Directory {
    inode: Inode,
    parent: u64,
}

/// An inode of several names.
struct Linked {
    nid: u32,
    /// Names that are still to be found.
    left: u32,
    file_type: FileType,
}

struct Walk<'s, R: ?Sized> {
    limits: &'s Limits,
    /// For each cursor one: records as they are found, directories, blocks of directories, and blocks of links.
    records: Window<'s, R>,
    directories: Window<'s, R>,
    blocks: Window<'s, R>,
    targets: Window<'s, R>,
    shared: Shared,
    /// What the superblock says.
    inodes: u64,
    image_blocks: u32,
    xattr_block: u32,
    /// Where the last record ended.
    end: u64,
    /// The first block after the records, as the first inode with blocks has it, and the block that the next one has to begin with.
    block_range: Option<(u32, u32)>,
    pending: VecDeque<Pending>,
    /// How many of the first of them are as deep as the one that is read.
    level: usize,
    linked: Vec<Linked>,
    summary: Summary,
}

impl<'s, R: ReadAt + ?Sized> Walk<'s, R> {
    fn new(source: &'s R, limits: &'s Limits) -> Result<Self, CheckError> {
        let io = |count| move |source| ReadError::Io { offset: 0, count, source };
        let size = source.size().map_err(io(0))?;
        limit("bytes", size, "image_bytes", limits.image_bytes)?;
        let mut block = [0; BLOCK];
        if size < BLOCK as u64 {
            return Err(ReadError::Super("is cut off").into());
        }
        source.read_at(0, &mut block).map_err(io(BLOCK))?;
        let (superblock, device) = parse_super(&mut block, size)?;
        if block.iter().take(1024).any(|byte| *byte != 0) {
            return Err(CheckError::Bytes { offset: 0, what: "bytes before the superblock are not zero" });
        }
        let inodes = superblock.inodes.get();
        limit("inodes", inodes, "entries", limits.entries)?;
        let tag = device.tag.iter().take_while(|byte| **byte != 0);
        let summary = Summary {
            image_bytes: size,
            device_blocks: device.blocks.get(),
            device_tag: tag.map(|byte| char::from(*byte)).collect(),
            uuid: superblock.uuid,
            ..Summary::default()
        };
        let xattr_block = superblock.xattr_block.get();
        Ok(Self {
            limits,
            records: Window::new(source, size, window::PIECE),
            directories: Window::new(source, size, window::PIECE),
            blocks: Window::new(source, size, window::PIECE),
            targets: Window::new(source, size, BLOCK),
            shared: Shared::read(source, size, xattr_block)?,
            inodes,
            image_blocks: superblock.blocks.get(),
            xattr_block,
            end: FIRST_RECORD,
            block_range: None,
            pending: VecDeque::new(),
            level: 0,
            linked: Vec::new(),
            summary,
        })
    }

    fn root(&mut self) -> Result<(), CheckError> {
        if self.next_record(ROOT, ROOT)? != FileType::Directory {
            return Err(CheckError::Inode { nid: ROOT, what: "is the root, but no directory" });
        }
        self.level = 1;
        Ok(())
    }

    /// The directory that was found first of those that were not read.
    fn next_directory(&mut self) -> Result<Option<Directory>, CheckError> {
        if self.level == 0 {
            self.level = self.pending.len();
            if self.level > 0 {
                self.summary.depth += 1;
                limit("directories in each other", self.summary.depth.into(), "depth", self.limits.depth.into())?;
            }
        }
        let Some(Pending { nid, parent }) = self.pending.pop_front() else { return Ok(None) };
        self.level = self.level.saturating_sub(1);
        let bytes = self.directories.get(u64::from(nid) * SLOT, INODE)?;
        let raw = RawInode::ref_from_bytes(bytes).map_err(|_| CheckError::Bytes { offset: 0, what: CUT })?;
        Ok(Some(Directory { inode: parse_inode(nid.into(), raw)?, parent: parent.into() }))
    }

    /// What has to hold when all directories were read.
    fn end(mut self) -> Result<Summary, CheckError> {
        let bytes = |offset, what| Err(CheckError::Bytes { offset, what });
        if self.summary.inodes != self.inodes {
            return bytes(1040, "the superblock counts other inodes than there are");
        }
        if let Some(linked) = self.linked.iter().find(|linked| linked.left > 0) {
            return Err(CheckError::Inode { nid: linked.nid.into(), what: "counts more links than names lead to it" });
        }
        let after = self.end.next_multiple_of(BLOCK as u64);
        self.zeros(after)?;
        let records = u32::try_from(after / BLOCK as u64).unwrap_or(u32::MAX);
        let (first, end) = self.block_range.unwrap_or((records, records));
        if first != records {
            return bytes(after, "the blocks of directories and links do not begin where the inodes end");
        }
        let expected = if self.xattr_block == 0 { self.image_blocks } else { self.xattr_block };
        if end != expected {
            return bytes(
                u64::from(end) * BLOCK as u64,
                "there is something that belongs to no inode, or shared attributes begin elsewhere",
            );
        }
        Ok(self.summary)
    }

    /// What is between the last record and a place has to be zeros.
    fn zeros(&mut self, until: u64) -> Result<(), CheckError> {
        let count = usize::try_from(until.saturating_sub(self.end)).unwrap_or(usize::MAX);
        let offset = self.end;
        if self.records.get(offset, count)?.iter().any(|byte| *byte != 0) {
            return Err(CheckError::Bytes { offset, what: "bytes between inodes are not zero" });
        }
        Ok(())
    }
}

const CUT: &str = "an inode is cut off";

fn limit(what: &'static str, found: u64, limit: &'static str, allowed: u64) -> Result<(), CheckError> {
    if found > allowed { Err(CheckError::Limit { what, found, limit, allowed }) } else { Ok(()) }
}

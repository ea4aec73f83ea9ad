//! Reads an EROFS image of the profile: what a filesystem or a library needs to serve it.
//!
//! Nothing is kept in memory but the superblock; a caller that wants speed gives a source that is in memory or in the page cache.
//! Whatever the bytes are, each call gives an answer or an error, after work that is bounded by the size of what was asked for. That the
//! answers fit together (that there are no cycles, that links are counted right) is known only of an image that
//! [`check`](super::check()) accepted.

use std::io;

use thiserror::Error;
use zerocopy::FromBytes as _;

use super::{
    dirs::DirBlock,
    layout::{
        BLOCK, BLOCK_BITS, CHUNK, DEVICE_ID, Device, FileType, INODE, MOST_IMAGE, MOST_TARGET, ROOT, RawChunk,
        RawInode, SLOT, Timestamp,
    },
    parse::{parse_inode, parse_super},
    source::ReadAt,
};

mod xattr;

pub use xattr::Xattr;

/// Why something of an image cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The source failed.
    #[error("cannot read {count} bytes of the metadata image at {offset}: {source}")]
    Io {
        /// Where.
        offset: u64,
        /// How much.
        count: usize,
        /// Why.
        source: io::Error,
    },
    /// The image is no image of this profile.
    #[error("the metadata image is damaged or not made by this program: its superblock {0}")]
    Super(&'static str),
    /// An inode is damaged.
    #[error("the metadata image is damaged: inode {nid} {what}")]
    Inode {
        /// Which.
        nid: u64,
        /// What about it.
        what: &'static str,
    },
    /// An inode is asked for something that its type does not have.
    #[error("inode {nid} is {is}, not {wanted}")]
    Type {
        /// Which.
        nid: u64,
        /// What it is.
        is: &'static str,
        /// What it would have to be.
        wanted: &'static str,
    },
}

/// Where a file's bytes are: one piece of the data device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block of 4 KiB.
    pub block: u32,
    /// How many; the last is filled with whatever follows the file.
    pub blocks: u32,
}

/// An inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number in the image.
    pub nid: u64,
    /// How manieth inode it is, from 1: a dense number for tables.
    pub number: u32,
    /// What it is.
    pub file_type: FileType,
    /// Permissions, 12 bits.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When it was modified.
    pub mtime: Timestamp,
    /// How many names it has.
    pub links: u32,
    /// Bytes: of a file, of a link's target, of a directory's entries.
    pub size: u64,
    /// Where a file's bytes are; `None` where it has none.
    pub extent: Option<Extent>,
    /// A device's numbers; zeros for all else.
    pub device: Device,
    /// What does not fill a block is in the record.
    pub(crate) inline: bool,
    /// The first block of what is in blocks.
    pub(crate) block: u32,
    /// Bytes of attributes after the inode.
    pub(crate) xattrs: u32,
}

impl Inode {
    /// Whether it has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.xattrs > 0
    }

    pub(crate) fn at(&self) -> u64 {
        self.nid.saturating_mul(SLOT)
    }

    pub(crate) fn after_xattrs(&self) -> u64 {
        self.at().saturating_add(INODE as u64 + u64::from(self.xattrs))
    }
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// The inode's number.
    pub nid: u64,
    /// What it is.
    pub file_type: FileType,
    /// Its name; `.` and `..` are among them.
    pub name: &'a [u8],
    /// What to give to [`Image::read_dir`] to go on after it.
    pub next: u64,
}

/// An image.
pub struct Image<R> {
    pub(crate) source: R,
    size: u64,
    inodes: u64,
    uuid: [u8; 16],
    device_blocks: u32,
    device_tag: String,
    pub(crate) xattr_block: u32,
}

impl<R: ReadAt> Image<R> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// It is not one of the profile, or does not fit its checksum or the size of the source.
    pub fn open(source: R) -> Result<Self, ReadError> {
        let io = |count| move |source| ReadError::Io { offset: 0, count, source };
        let size = source.size().map_err(io(0))?;
        if size < BLOCK as u64 || !size.is_multiple_of(BLOCK as u64) || size > MOST_IMAGE {
            return Err(ReadError::Super("is one of an image that is not in whole blocks of 4 KiB, or too large"));
        }
        let mut block = [0; BLOCK];
        source.read_at(0, &mut block).map_err(io(BLOCK))?;
        let (superblock, device) = parse_super(&mut block, size)?;
        let tag = device.tag.iter().take_while(|byte| **byte != 0);
        Ok(Self {
            size,
            inodes: superblock.inodes.get(),
            uuid: superblock.uuid,
            device_blocks: device.blocks.get(),
            device_tag: tag.map(|byte| char::from(*byte)).collect(),
            xattr_block: superblock.xattr_block.get(),
            source,
        })
    }

    /// The root's number.
    pub fn root(&self) -> u64 {
        ROOT
    }

    /// Inodes, as the superblock has it.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The filesystem's UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Blocks of 4 KiB of the data device.
    pub fn device_blocks(&self) -> u32 {
        self.device_blocks
    }

    /// What the data device is called.
    pub fn device_tag(&self) -> &str {
        &self.device_tag
    }

    /// Reads an inode, with the place of its file's bytes.
    ///
    /// # Errors
    /// There is none of this number, or it is damaged.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError> {
        let bad = |what| ReadError::Inode { nid, what };
        let inside = ROOT * SLOT..=self.size.saturating_sub(INODE as u64);
        let at = nid.checked_mul(SLOT).filter(|at| inside.contains(at));
        let at = at.ok_or_else(|| bad("is outside of the image"))?;
        // Mostly the index is what comes next.
        let mut bytes = [0; INODE + CHUNK];
        let count = usize::try_from(self.size - at).unwrap_or(usize::MAX).min(bytes.len());
        let (read, _) = bytes.split_at_mut(count);
        self.read(at, read)?;
        let (raw, next) = RawInode::ref_from_prefix(&bytes).map_err(|_| bad("is cut off"))?;
        let mut inode = parse_inode(nid, raw)?;
        if inode.file_type != FileType::Regular || inode.size == 0 {
            return Ok(inode);
        }
        let mut index = [0; CHUNK];
        let index_at = inode.after_xattrs().next_multiple_of(8);
        if inode.xattrs == 0 {
            index.copy_from_slice(next);
        } else {
            self.read(index_at, &mut index)?;
        }
        let (chunk, _) = RawChunk::ref_from_prefix(&index).map_err(|_| bad("is cut off"))?;
        inode.extent = Some(self.extent(&inode, chunk).map_err(bad)?);
        Ok(inode)
    }

    /// Looks a name up in a directory.
    ///
    /// # Errors
    /// It is no directory, or is damaged.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<(u64, FileType)>, ReadError> {
        self.wants(directory, FileType::Directory)?;
        let bad = || ReadError::Inode { nid: directory.nid, what: "has an entry that is damaged" };
        let mut bytes = [0; BLOCK];
        let (mut low, mut high) = (0, directory.size.div_ceil(BLOCK as u64));
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(directory, middle, &mut bytes)?;
            let last = block.count() - 1;
            if name < block.name(0).ok_or_else(bad)? {
                high = middle;
            } else if name > block.name(last).ok_or_else(bad)? {
                low = middle + 1;
            } else {
                let (mut first, mut end) = (0, block.count());
                while first < end {
                    let index = first + (end - first) / 2;
                    match block.name(index).ok_or_else(bad)?.cmp(name) {
                        std::cmp::Ordering::Less => first = index + 1,
                        std::cmp::Ordering::Greater => end = index,
                        std::cmp::Ordering::Equal => {
                            let raw = block.raw(index).ok_or_else(bad)?;
                            let kind = FileType::from_dirent(raw.kind).ok_or_else(bad)?;
                            return Ok(Some((raw.nid.get(), kind)));
                        }
                    }
                }
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Reads a directory from a place on, 0 or a [`Dirent::next`], until `each` says `false` or it ends.
    ///
    /// # Errors
    /// It is no directory, or is damaged.
    pub fn read_dir(
        &self,
        directory: &Inode,
        from: u64,
        mut each: impl FnMut(Dirent<'_>) -> bool,
    ) -> Result<(), ReadError> {
        self.wants(directory, FileType::Directory)?;
        let bad = || ReadError::Inode { nid: directory.nid, what: "has an entry that is damaged" };
        let mut bytes = [0; BLOCK];
        let mut first = usize::try_from(from % BLOCK as u64).unwrap_or(0);
        for number in from / BLOCK as u64..directory.size.div_ceil(BLOCK as u64) {
            let block = self.directory_block(directory, number, &mut bytes)?;
            for index in first..block.count() {
                let raw = block.raw(index).ok_or_else(bad)?;
                let next = match index + 1 < block.count() {
                    true => number * BLOCK as u64 + index as u64 + 1,
                    false => (number + 1) * BLOCK as u64,
                };
                let name = block.name(index).ok_or_else(bad)?;
                let file_type = FileType::from_dirent(raw.kind).ok_or_else(bad)?;
                if !each(Dirent { nid: raw.nid.get(), file_type, name, next }) {
                    return Ok(());
                }
            }
            first = 0;
        }
        Ok(())
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// It is no link, or is damaged.
    pub fn read_link(&self, link: &Inode) -> Result<Vec<u8>, ReadError> {
        self.wants(link, FileType::Symlink)?;
        let bad = ReadError::Inode { nid: link.nid, what: "has a target that is empty or too long" };
        let size = usize::try_from(link.size).ok().filter(|size| (1..=MOST_TARGET).contains(size)).ok_or(bad)?;
        let mut target = vec![0; size];
        let at = if link.inline { link.after_xattrs() } else { u64::from(link.block) << BLOCK_BITS };
        self.read(at, &mut target)?;
        Ok(target)
    }

    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let count = buffer.len();
        self.source.read_at(offset, buffer).map_err(|source| ReadError::Io { offset, count, source })
    }

    fn wants(&self, inode: &Inode, wanted: FileType) -> Result<(), ReadError> {
        if inode.file_type == wanted {
            return Ok(());
        }
        Err(ReadError::Type { nid: inode.nid, is: inode.file_type.text(), wanted: wanted.text() })
    }

    fn directory_block<'b>(
        &self,
        directory: &Inode,
        number: u64,
        bytes: &'b mut [u8; BLOCK],
    ) -> Result<DirBlock<'b>, ReadError> {
        let bad = |what| ReadError::Inode { nid: directory.nid, what };
        let left = directory.size.saturating_sub(number << BLOCK_BITS);
        let count = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        let at = if directory.inline && count < BLOCK {
            directory.after_xattrs()
        } else {
            (u64::from(directory.block) + number) << BLOCK_BITS
        };
        let (block, _) = bytes.split_at_mut(count);
        self.read(at, block)?;
        DirBlock::new(block).ok_or_else(|| bad("is a directory with a block that is damaged"))
    }

    fn extent(&self, inode: &Inode, chunk: &RawChunk) -> Result<Extent, &'static str> {
        let block = chunk.block.get();
        let end = u64::from(block) + inode.size.div_ceil(BLOCK as u64);
        if chunk.device.get() != DEVICE_ID || end > u64::from(self.device_blocks) {
            return Err("is a file whose bytes are not on the data device");
        }
        let blocks = u32::try_from(end - u64::from(block)).map_err(|_| "is a file that is too large")?;
        Ok(Extent { block, blocks })
    }
}

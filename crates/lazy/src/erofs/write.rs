//! Writes a [`Tree`] as an EROFS image, front to back. The layout is computed before the first byte ([`plan`]).
//!
//! Nothing but the tree and [`WriteOptions`] has a part in it: the same tree gives the same bytes, however it came to be.

use std::io::{self, Write};

use thiserror::Error;
use zerocopy::IntoBytes as _;

use super::{
    dirs::{self, DirEntry},
    layout::{
        BLOCK, CHUNK_INDEXES, CHUNKED, DEVICE_ID, INLINE, INODE, PLAIN, RawChunk, RawDevice, RawInode, RawSuper,
        RawXattr, RawXattrHeader, SLOT, SUPER_AT, XATTR_HEADER, crc32c, is_tag,
    },
    tree::{Data, Tree, xattrs::Pair},
};
use plan::{Body, Plan};

mod plan;

/// What an image has that is not in its tree.
#[derive(Clone, Debug)]
pub struct WriteOptions<'a> {
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
    /// What the data device is called in the image: 1 to 64 printable ASCII characters without `/`.
    pub device_tag: &'a str,
    /// Blocks of 4 KiB that the data device has.
    pub device_blocks: u32,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the image, whole blocks.
    pub bytes: u64,
    /// Inodes in it.
    pub inodes: u64,
}

/// Why an image could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The writer failed.
    #[error("cannot write the image's metadata: {0}")]
    Io(#[from] io::Error),
    /// A file's bytes are not all on the data device.
    #[error("{path}: its {size} bytes from block {block} on do not fit a data device of {device_blocks} blocks")]
    Extent {
        /// The file.
        path: String,
        /// Its size.
        size: u64,
        /// Its first block.
        block: u32,
        /// The device's size.
        device_blocks: u32,
    },
    /// The device's name cannot be stored.
    #[error("{0:?} cannot name a data device: it takes 1 to 64 printable ASCII characters without '/'")]
    Tag(String),
    /// The root's attributes do not fit its block.
    #[error("the root directory's extended attributes have more than 2,750 bytes")]
    Root,
    /// The image would be too large.
    #[error("the image's metadata would be more than 128 GiB: leave out files, or put them into several images")]
    Size,
    /// The tree broke its own rules.
    #[error("the tree is inconsistent at inode {0}: this is a bug in its builder")]
    Tree(u32),
}

/// Writes the image of a tree. It is complete when this returns; flushing it to where it lasts is the caller's.
///
/// # Errors
/// The tree does not fit the format or the data device; the writer's own errors.
pub fn write(tree: &Tree, options: &WriteOptions<'_>, to: impl Write) -> Result<Written, WriteError> {
    if !is_tag(options.device_tag.as_bytes()) {
        return Err(WriteError::Tag(options.device_tag.to_owned()));
    }
    let plan = Plan::new(tree, options.device_blocks)?;
    let mut out = Out { to, buffer: Vec::with_capacity(2 * PIECE), at: 0, begun: false };
    head(&plan, options, &mut out)?;
    for index in 0..plan.order.len() {
        record(&plan, index, &mut out)?;
    }
    out.pad_to_block()?;
    for index in 0..plan.order.len() {
        blocks(&plan, index, &mut out)?;
    }
    for pair in plan.shared.iter().filter_map(|number| tree.xattrs.pair(*number)) {
        xattr(pair, &mut out)?;
    }
    out.pad_to_block()?;
    if out.at != u64::from(plan.blocks) * BLOCK as u64 {
        return Err(WriteError::Tree(0));
    }
    out.flush()?;
    Ok(Written { bytes: out.at, inodes: plan.order.len() as u64 })
}

/// How much is written at once.
const PIECE: usize = 256 << 10;

/// Counts what is written, and puts the checksum of the first block into it.
struct Out<W> {
    to: W,
    buffer: Vec<u8>,
    at: u64,
    begun: bool,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        if self.buffer.len() >= PIECE { self.flush() } else { Ok(()) }
    }

    /// Fills with zeros; there are never more than a block's.
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        let zeros = [0; BLOCK];
        let count = usize::try_from(at.saturating_sub(self.at)).unwrap_or(BLOCK);
        self.put(zeros.get(..count).unwrap_or(&zeros))
    }

    fn pad_to_block(&mut self) -> io::Result<()> {
        self.pad_to(self.at.next_multiple_of(BLOCK as u64))
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.begun {
            // All of the first block is here: pieces are larger, and the last flush is of whole blocks.
            let sum = crc32c(self.buffer.get(SUPER_AT..BLOCK).unwrap_or_default());
            if let Some(place) = self.buffer.get_mut(SUPER_AT + 4..SUPER_AT + 8) {
                place.copy_from_slice(&sum.to_le_bytes());
            }
            self.begun = true;
        }
        self.to.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn head<W: Write>(plan: &Plan<'_>, options: &WriteOptions<'_>, out: &mut Out<W>) -> io::Result<()> {
    let mut superblock = RawSuper::fixed();
    superblock.inodes = (plan.order.len() as u64).into();
    superblock.blocks = plan.blocks.into();
    superblock.xattr_block = plan.xattr_block.into();
    superblock.uuid = options.uuid;
    let mut tag = [0; 64];
    tag.iter_mut().zip(options.device_tag.bytes()).for_each(|(to, from)| *to = from);
    let device = RawDevice { tag, blocks: options.device_blocks.into(), mapped: 0.into(), reserved: [0; 56] };
    out.pad_to(SUPER_AT as u64)?;
    out.put(superblock.as_bytes())?;
    out.put(device.as_bytes())
}

/// Writes an inode with all that follows it.
fn record<W: Write>(plan: &Plan<'_>, index: usize, out: &mut Out<W>) -> Result<(), WriteError> {
    let (number, inode, nid) = plan.inode(index)?;
    let body = plan.body(index)?;
    let xattrs = plan.xattr_size(inode.xattrs);
    let attributes = inode.attributes();
    let (format, size, place) = match body {
        Body::Nothing { place } => (PLAIN, 0, place),
        Body::Chunks { size, bits, .. } => (CHUNKED, size, u32::from(CHUNK_INDEXES | bits)),
        Body::Flat { size, tail: 0, blocks, block } => (PLAIN, size, if blocks == 0 { 0 } else { block }),
        Body::Flat { size, blocks, block, .. } => (INLINE, size, if blocks == 0 { 0 } else { block }),
    };
    let count = xattrs.checked_sub(XATTR_HEADER).map_or(0, |entries| entries / 4 + 1);
    let raw = RawInode {
        format: format.into(),
        xattr_count: u16::try_from(count).map_err(|_| WriteError::Tree(number))?.into(),
        mode: (inode.file_type().ok_or(WriteError::Tree(number))?.mode() | attributes.mode).into(),
        reserved: 0.into(),
        size: size.into(),
        place: place.into(),
        number: u32::try_from(index + 1).map_err(|_| WriteError::Size)?.into(),
        uid: attributes.uid.into(),
        gid: attributes.gid.into(),
        mtime: attributes.mtime.seconds.cast_unsigned().into(),
        mtime_nanoseconds: attributes.mtime.nanoseconds.into(),
        links: inode.links.into(),
        reserved2: [0; 16],
    };
    out.pad_to(u64::from(nid) * SLOT)?;
    out.put(raw.as_bytes())?;
    if xattrs > 0 {
        ibody(plan, inode.xattrs, out)?;
    }
    match body {
        Body::Nothing { .. } | Body::Flat { tail: 0, .. } => {}
        Body::Chunks { bits, count, block, .. } => {
            out.pad_to(u64::from(nid) * SLOT + (INODE + xattrs).next_multiple_of(8) as u64)?;
            for chunk in 0..count {
                // The plan saw to it that the last block is on the device.
                let block = u32::try_from(u64::from(block) + (chunk << bits)).map_err(|_| WriteError::Tree(number))?;
                let raw = RawChunk { advise: 0.into(), device: DEVICE_ID.into(), block: block.into() };
                out.put(raw.as_bytes())?;
            }
        }
        Body::Flat { tail, .. } => match &inode.data {
            Data::Symlink(target) => out.put(target)?,
            _ => {
                let entries = plan.entries(number)?;
                let mut bytes = Vec::with_capacity(tail);
                dirs::fill(dirs::split(&entries).last().unwrap_or_default(), &mut bytes);
                out.put(&bytes)?;
            }
        },
    }
    Ok(())
}

/// Writes the attributes of an inode: which are shared, and then those that are not.
fn ibody<W: Write>(plan: &Plan<'_>, set: u32, out: &mut Out<W>) -> Result<(), WriteError> {
    let (shared, inline) = plan.split_xattrs(set);
    let count = u8::try_from(shared.len()).map_err(|_| WriteError::Tree(0))?;
    out.put(RawXattrHeader { filter: 0.into(), shared: count, reserved: [0; 7] }.as_bytes())?;
    for id in shared {
        out.put(&id.to_le_bytes())?;
    }
    for pair in inline {
        xattr(pair, out)?;
    }
    Ok(())
}

fn xattr<W: Write>(pair: &Pair, out: &mut Out<W>) -> io::Result<()> {
    // The tree takes no longer ones.
    let name = u8::try_from(pair.name.len()).unwrap_or(u8::MAX);
    let value = u16::try_from(pair.value.len()).unwrap_or(u16::MAX);
    out.put(RawXattr { name, prefix: pair.prefix, value: value.into() }.as_bytes())?;
    out.put(&pair.name)?;
    out.put(&pair.value)?;
    out.pad_to(out.at.next_multiple_of(4))
}

/// Writes the blocks of an inode that has some: all of a directory or a link, or all but what is inline.
fn blocks<W: Write>(plan: &Plan<'_>, index: usize, out: &mut Out<W>) -> Result<(), WriteError> {
    let Body::Flat { blocks, .. } = plan.body(index)? else { return Ok(()) };
    if blocks == 0 {
        return Ok(());
    }
    let (number, inode, _) = plan.inode(index)?;
    if let Data::Symlink(target) = &inode.data {
        out.put(target)?;
        return Ok(out.pad_to_block()?);
    }
    let entries: Vec<DirEntry<'_>> = plan.entries(number)?;
    let mut bytes = Vec::with_capacity(BLOCK);
    for block in dirs::split(&entries).take(usize::try_from(blocks).unwrap_or(usize::MAX)) {
        dirs::fill(block, &mut bytes);
        out.put(&bytes)?;
        out.pad_to_block()?;
    }
    Ok(())
}

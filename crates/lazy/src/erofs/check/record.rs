//! A record: an inode, its attributes, and what is inline or its chunk indexes.

use zerocopy::FromBytes as _;

use super::{CUT, CheckError, Linked, Pending, Walk, limit};
use crate::erofs::{
    layout::{
        BLOCK, BLOCK_BITS, CHUNK, DEVICE_ID, Device, FileType, INODE, MOST_TARGET, ROOT, RawChunk, RawInode, SLOT,
        chunk_bits, chunks, split_flat,
    },
    parse::parse_inode,
    read::Inode,
    source::ReadAt,
};

/// What an inode has apart from its attributes.
struct Body {
    /// Bytes of the record before it, filling included, and its own.
    start: usize,
    size: usize,
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    /// Checks the record that a new name leads to, which has to be the next one.
    pub(super) fn next_record(&mut self, nid: u64, parent: u64) -> Result<FileType, CheckError> {
        let bad = |what| CheckError::Inode { nid, what };
        let next = self.end.next_multiple_of(SLOT);
        let at = nid.checked_mul(SLOT).filter(|at| *at == next || *at == next.next_multiple_of(BLOCK as u64));
        let at = at.ok_or_else(|| bad("is named where the next inode would be, and is another one, or none"))?;
        let bytes = self.records.get(at, INODE)?;
        let raw = RawInode::ref_from_bytes(bytes).map_err(|_| bad(CUT))?;
        let inode = parse_inode(nid, raw)?;
        if raw.reserved.get() != 0 || raw.reserved2 != [0; 16] {
            return Err(bad("has unknown bits"));
        }
        self.count(&inode).map_err(bad)?;
        limit(
            "bytes of a file",
            if inode.file_type == FileType::Regular { inode.size } else { 0 },
            "file_bytes",
            self.limits.file_bytes,
        )?;
        limit("inodes", self.summary.inodes, "entries", self.limits.entries)?;
        let body = self.body(&inode).map_err(bad)?;
        let size = body.start + body.size;
        // A record goes where the last one ended if it fits the block, and begins the next one otherwise.
        let crosses = next % BLOCK as u64 + size as u64 > BLOCK as u64;
        if at != if crosses { next.next_multiple_of(BLOCK as u64) } else { next } {
            return Err(bad("is not where its size puts it"));
        }
        self.zeros(at)?;
        self.content(&inode, &body)?;
        self.end = at + size as u64;
        let nid = u32::try_from(nid).map_err(|_| bad("has too large a number"))?;
        if inode.file_type == FileType::Directory {
            // It is the number of a record that was accepted before.
            let parent = u32::try_from(parent).unwrap_or(u32::MAX);
            self.pending.push_back(Pending { nid, parent });
        } else if inode.links > 1 {
            self.linked.push(Linked { nid, left: inode.links - 1, file_type: inode.file_type });
        }
        Ok(inode.file_type)
    }

    /// Counts an inode, and checks what is its alone.
    fn count(&mut self, inode: &Inode) -> Result<(), &'static str> {
        let summary = &mut self.summary;
        summary.inodes += 1;
        if u64::from(inode.number) != summary.inodes {
            return Err("does not have the number of its place");
        }
        if inode.mtime.nanoseconds >= 1_000_000_000 {
            return Err("has a time with a second's worth of nanoseconds or more");
        }
        if inode.links == 0 {
            return Err("counts no links");
        }
        match inode.file_type {
            FileType::Directory => summary.directories += 1,
            FileType::Regular => {
                summary.files += 1;
                summary.file_bytes = summary.file_bytes.saturating_add(inode.size);
            }
            FileType::Symlink => {
                summary.symlinks += 1;
                if !(1..=MOST_TARGET as u64).contains(&inode.size) {
                    return Err("is a symbolic link whose target does not have 1 to 4095 bytes");
                }
            }
            FileType::CharDevice if inode.device == (Device { major: 0, minor: 0 }) => {
                return Err("is the character device 0:0, overlayfs' whiteout");
            }
            FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => summary.specials += 1,
        }
        Ok(())
    }

    /// Where the rest of a record is, and whether its blocks are the next ones.
    fn body(&mut self, inode: &Inode) -> Result<Body, &'static str> {
        let xattrs = usize::try_from(inode.xattrs).map_err(|_| CUT)?;
        let start = INODE + xattrs;
        match inode.file_type {
            FileType::Regular if inode.size > 0 => {
                let size = usize::try_from(chunks(inode.size)).ok().and_then(|count| count.checked_mul(CHUNK));
                // It is as large as the format can say, at least: then the device is too small for it.
                Ok(Body { start: start.next_multiple_of(8), size: size.filter(|size| *size <= BLOCK).ok_or(DEVICE)? })
            }
            FileType::Directory | FileType::Symlink => {
                let size = u32::try_from(inode.size).map_err(|_| CUT)?;
                let (tail, blocks) = split_flat(size, xattrs, inode.nid == ROOT);
                if inode.inline != (tail > 0) {
                    return Err("is inline where it would not be, or is not where it would be");
                }
                self.take_blocks(inode, blocks)?;
                Ok(Body { start, size: tail })
            }
            _ => Ok(Body { start, size: 0 }),
        }
    }

    fn take_blocks(&mut self, inode: &Inode, blocks: u32) -> Result<(), &'static str> {
        if blocks == 0 {
            return if inode.block == 0 { Ok(()) } else { Err("has a place, but no blocks") };
        }
        let (first, next) = self.block_range.unwrap_or((inode.block, inode.block));
        let end = inode.block.checked_add(blocks).filter(|end| *end <= self.image_blocks);
        if inode.block != next {
            return Err("has blocks that do not follow those of the inode before");
        }
        self.block_range = Some((first, end.ok_or("has blocks that are not in the image")?));
        Ok(())
    }

    /// Checks attributes, chunk indexes, and a link's target.
    fn content(&mut self, inode: &Inode, body: &Body) -> Result<(), CheckError> {
        let bad = |what| CheckError::Inode { nid: inode.nid, what };
        let all = self.records.get(inode.at(), body.start + body.size)?;
        let (fixed, rest) = all.split_at_checked(body.start).ok_or_else(|| bad(CUT))?;
        let (xattrs, filling) = usize::try_from(inode.xattrs)
            .ok()
            .and_then(|size| fixed.get(INODE..)?.split_at_checked(size))
            .ok_or_else(|| bad(CUT))?;
        if !xattrs.is_empty() {
            self.shared.check(xattrs).map_err(bad)?;
        }
        if filling.iter().any(|byte| *byte != 0) {
            return Err(bad("has unknown bits before its chunks"));
        }
        match inode.file_type {
            FileType::Regular => check_chunks(inode, rest, self.summary.device_blocks).map_err(bad),
            FileType::Symlink if inode.inline => check_target(rest, inode.size).map_err(bad),
            FileType::Symlink => {
                let block = self.targets.get(u64::from(inode.block) << BLOCK_BITS, BLOCK)?;
                check_target(block, inode.size).map_err(bad)
            }
            _ => Ok(()),
        }
    }
}

const DEVICE: &str = "is a file whose bytes are not on the data device";

/// Chunks follow each other, and all are on the device.
fn check_chunks(inode: &Inode, bytes: &[u8], device_blocks: u32) -> Result<(), &'static str> {
    let bits = chunk_bits(inode.size);
    let mut expected = None;
    for chunk in bytes.as_chunks::<CHUNK>().0 {
        let chunk = RawChunk::ref_from_bytes(chunk).map_err(|_| CUT)?;
        let block = u64::from(chunk.block.get());
        if chunk.advise.get() != 0 || chunk.device.get() != DEVICE_ID {
            return Err("is a file that is on another device, or has unknown bits");
        }
        if expected.is_some_and(|expected| expected != block) {
            return Err("is a file in several pieces");
        }
        if expected.is_none() && block + inode.size.div_ceil(BLOCK as u64) > u64::from(device_blocks) {
            return Err(DEVICE);
        }
        expected = Some(block + (1 << bits));
    }
    Ok(())
}

fn check_target(bytes: &[u8], size: u64) -> Result<(), &'static str> {
    let size = usize::try_from(size).map_err(|_| CUT)?;
    let (target, filling) = bytes.split_at_checked(size).ok_or(CUT)?;
    if target.contains(&0) {
        return Err("is a symbolic link whose target has a NUL");
    }
    if filling.iter().any(|byte| *byte != 0) {
        return Err("is a symbolic link with something after its target");
    }
    Ok(())
}

//! Directories, and what their entries lead to.

use std::cmp::Ordering;

use super::{CheckError, Directory, Walk, limit};
use crate::erofs::{
    dirs::DirBlock,
    layout::{BLOCK, BLOCK_BITS, DIRENT, FileType, MOST_NAME, RawDirent, SLOT, is_name},
    source::ReadAt,
};

const BLOCKS: &str = "is a directory with a block that is damaged";

/// What was found of a directory so far.
struct Found {
    dot: bool,
    dots: bool,
    /// Directories in it.
    below: u32,
    /// The last name of the block before, to compare with.
    last: [u8; MOST_NAME],
    last_size: usize,
    /// What the block before has used.
    used: usize,
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    /// Checks a directory, and the records that its names are the first to lead to.
    pub(super) fn directory(&mut self, directory: &Directory) -> Result<(), CheckError> {
        let inode = &directory.inode;
        let bad = |what| CheckError::Inode { nid: inode.nid, what };
        let mut found = Found { dot: false, dots: false, below: 0, last: [0; MOST_NAME], last_size: 0, used: BLOCK };
        let mut bytes = [0; BLOCK];
        for number in 0..inode.size.div_ceil(BLOCK as u64) {
            let left = usize::try_from(inode.size - (number << BLOCK_BITS)).unwrap_or(BLOCK).min(BLOCK);
            let (used, filling) = bytes.split_at_mut_checked(left).ok_or_else(|| bad(BLOCKS))?;
            if inode.inline && left < BLOCK {
                used.copy_from_slice(self.directories.get(inode.after_xattrs(), left)?);
            } else {
                let block = self.blocks.get((u64::from(inode.block) + number) << BLOCK_BITS, BLOCK)?;
                let (start, rest) = block.split_at_checked(left).ok_or_else(|| bad(BLOCKS))?;
                used.copy_from_slice(start);
                filling.copy_from_slice(rest);
                if filling.iter().any(|byte| *byte != 0) {
                    return Err(bad("is a directory with something after its last name"));
                }
            }
            let block = DirBlock::new(used).ok_or_else(|| bad(BLOCKS))?;
            self.block(directory, &block, &mut found)?;
            // The last block ends with its last name; others are filled with zeros.
            let is_last = (number + 1) << BLOCK_BITS >= inode.size;
            let rest = used.get(found.used..).unwrap_or_default();
            if (is_last && !rest.is_empty()) || rest.iter().any(|byte| *byte != 0) {
                return Err(bad("is a directory with something after a block's last name"));
            }
        }
        if !found.dot || !found.dots {
            return Err(bad("is a directory without '.' or '..'"));
        }
        if found.below.checked_add(2) != Some(inode.links) {
            return Err(bad("is a directory that counts other links than it has directories"));
        }
        Ok(())
    }

    fn block(&mut self, directory: &Directory, block: &DirBlock<'_>, found: &mut Found) -> Result<(), CheckError> {
        let broken = CheckError::Inode { nid: directory.inode.nid, what: BLOCKS };
        let last = found.last;
        let mut before = last.get(..found.last_size).unwrap_or_default();
        let mut used = block.count() * DIRENT;
        for index in 0..block.count() {
            let (Some(raw), Some(name)) = (block.raw(index), block.name(index)) else { return Err(broken) };
            if index == 0 && found.used + DIRENT + name.len() <= BLOCK {
                return Err(entry(directory, name, "would fit the block before"));
            }
            // An empty name is before the first one.
            if name.cmp(before) != Ordering::Greater {
                return Err(entry(directory, name, "is empty, out of order, or there twice"));
            }
            used += name.len();
            before = name;
            self.entry(directory, raw, name, found)?;
        }
        found.used = used;
        found.last_size = before.len();
        let place = found.last.get_mut(..before.len()).ok_or(broken)?;
        place.copy_from_slice(before);
        Ok(())
    }

    fn entry(
        &mut self,
        directory: &Directory,
        raw: &RawDirent,
        name: &[u8],
        found: &mut Found,
    ) -> Result<(), CheckError> {
        let bad = |what| entry(directory, name, what);
        let nid = raw.nid.get();
        let kind = FileType::from_dirent(raw.kind).filter(|_| raw.reserved == 0);
        let kind = kind.ok_or_else(|| bad("has an unknown type or unknown bits"))?;
        let is_dot = match name {
            b"." => Some((directory.inode.nid, &mut found.dot)),
            b".." => Some((directory.parent, &mut found.dots)),
            _ => None,
        };
        if let Some((expected, seen)) = is_dot {
            *seen = true;
            return match nid == expected && kind == FileType::Directory {
                true => Ok(()),
                false => Err(bad("does not lead to where it has to")),
            };
        }
        if !is_name(name) {
            return Err(bad("has a '/' or is longer than 255 bytes"));
        }
        self.summary.names += 1;
        limit("names", self.summary.names, "entries", self.limits.entries)?;
        let actual = match nid.checked_mul(SLOT).is_some_and(|at| at < self.end) {
            true => self.known(nid).map_err(bad)?,
            false => self.next_record(nid, directory.inode.nid)?,
        };
        if actual != kind {
            return Err(bad("has another type than its inode"));
        }
        if actual == FileType::Directory {
            found.below = found.below.saturating_add(1);
        }
        Ok(())
    }

    /// A further name of an inode.
    fn known(&mut self, nid: u64) -> Result<FileType, &'static str> {
        let at = self.linked.binary_search_by(|linked| u64::from(linked.nid).cmp(&nid));
        let linked = at.ok().and_then(|at| self.linked.get_mut(at));
        let linked =
            linked.ok_or("leads to no inode, to a directory that has a name, or to a file that counts one link")?;
        linked.left = linked.left.checked_sub(1).ok_or("leads to a file that counts fewer links")?;
        Ok(linked.file_type)
    }
}

fn entry(directory: &Directory, name: &[u8], what: &'static str) -> CheckError {
    CheckError::Entry { directory: directory.inode.nid, name: name.escape_ascii().to_string(), what }
}

//! Where everything of an image is.
//!
//! Inodes are in breadth-first order: the root, then what is in it by name, then what is in each of its directories, and so on; a file of
//! several names is where its first name has it. A record that does not fit what is left of a block begins the next one; one that is
//! larger than a block begins with one, too. What is inline therefore never crosses blocks, which the kernel would refuse.

use std::ops::Bound;

use super::{DirEntry, WriteError};
use crate::erofs::{
    dirs::directory_size,
    layout::{
        BLOCK, CHUNK, FIRST_RECORD, FileType, INODE, MOST_IMAGE, MOST_SHARED, ROOT_ROOM, SLOT, XATTR_HEADER,
        chunk_bits, chunks, split_flat,
    },
    tree::{Data, Inode, ROOT, Tree, shown, xattrs::Pair},
};

/// No inode, no shared attribute.
const NONE: u32 = u32::MAX;

/// What an inode has apart from its attributes.
#[derive(Clone, Copy)]
pub(super) enum Body {
    /// Nothing, or a device's number.
    Nothing { place: u32 },
    /// A file's bytes on the data device.
    Chunks { size: u64, bits: u16, count: u64, block: u32 },
    /// A directory or a link: whole blocks, and bytes in the record.
    Flat { size: u64, tail: usize, blocks: u32, block: u32 },
}

/// The bytes of a directory or link, and its first block, counted from the first of all.
#[derive(Clone, Copy, Default)]
struct Flat {
    size: u32,
    block: u32,
}

pub(super) struct Plan<'t> {
    tree: &'t Tree,
    /// The tree's inodes in the order of the image.
    pub(super) order: Vec<u32>,
    /// Their numbers in the image, by their numbers in the tree.
    nids: Vec<u32>,
    /// The directories of their first names, by their numbers in the tree.
    parents: Vec<u32>,
    /// In the order of the image.
    flats: Vec<Flat>,
    /// The first block after the records.
    first_block: u32,
    /// Where shared attributes begin; 0 where there are none.
    pub(super) xattr_block: u32,
    pub(super) blocks: u32,
    /// The shared pairs in their order.
    pub(super) shared: Vec<u32>,
    /// Numbers of shared pairs in the image, by their numbers in the tree.
    shared_ids: Vec<u32>,
    /// Bytes of each set of attributes, by its number.
    xattr_sizes: Vec<u32>,
}

impl<'t> Plan<'t> {
    pub(super) fn new(tree: &'t Tree, device_blocks: u32) -> Result<Self, WriteError> {
        let slots = tree.slots();
        let mut plan = Self {
            tree,
            order: Vec::with_capacity(tree.inodes()),
            nids: vec![NONE; slots],
            parents: vec![NONE; slots],
            flats: Vec::with_capacity(tree.inodes()),
            first_block: 0,
            xattr_block: 0,
            blocks: 0,
            shared: Vec::new(),
            shared_ids: vec![NONE; tree.xattrs.pairs.len()],
            xattr_sizes: vec![0; tree.xattrs.sets() + 1],
        };
        plan.walk()?;
        let shared_bytes = plan.share();
        for set in 0..plan.xattr_sizes.len() {
            let size = plan.compute_xattr_size(u32::try_from(set).unwrap_or(NONE));
            if let Some(place) = plan.xattr_sizes.get_mut(set) {
                *place = u32::try_from(size).unwrap_or(u32::MAX);
            }
        }
        plan.place(shared_bytes, device_blocks)?;
        Ok(plan)
    }

    /// The inode at a place of the order, with its numbers in the tree and in the image.
    pub(super) fn inode(&self, index: usize) -> Result<(u32, &'t Inode, u32), WriteError> {
        let number = self.order.get(index).copied().unwrap_or(NONE);
        let inode = self.tree.inode(number).ok_or(WriteError::Tree(number))?;
        Ok((number, inode, get(&self.nids, number)))
    }

    pub(super) fn xattr_size(&self, set: u32) -> usize {
        match get(&self.xattr_sizes, set) {
            NONE => 0,
            size => size as usize,
        }
    }

    /// A set's shared attributes as numbers, and those that are not shared.
    pub(super) fn split_xattrs(&self, set: u32) -> (Vec<u32>, Vec<&'t Pair>) {
        let (mut shared, mut inline) = (Vec::new(), Vec::new());
        for number in self.tree.xattrs.numbers(set) {
            match get(&self.shared_ids, *number) {
                // One byte counts them.
                id if id != NONE && shared.len() < 255 => shared.push(id),
                _ => inline.extend(self.tree.xattrs.pair(*number)),
            }
        }
        (shared, inline)
    }

    /// A directory's entries in their order, the dots among them.
    pub(super) fn entries(&self, directory: u32) -> Result<Vec<DirEntry<'t>>, WriteError> {
        let children = self.tree.children(directory).ok_or(WriteError::Tree(directory))?;
        let mut entries = Vec::with_capacity(children.len() + 2);
        let parent = if directory == ROOT { ROOT } else { get(&self.parents, directory) };
        let kind = FileType::Directory as u8;
        let mut dots = [(&b"."[..], directory), (b"..", parent)].into_iter().peekable();
        let dot = |(name, inode): (&'t [u8], u32)| DirEntry { name, nid: get(&self.nids, inode).into(), kind };
        for (name, child) in children {
            while let Some(next) = dots.next_if(|(dot, _)| *dot < &name[..]) {
                entries.push(dot(next));
            }
            let inode = self.tree.inode(child.inode).and_then(Inode::file_type);
            let kind = inode.ok_or(WriteError::Tree(child.inode))? as u8;
            entries.push(DirEntry { name, nid: get(&self.nids, child.inode).into(), kind });
        }
        entries.extend(dots.map(dot));
        Ok(entries)
    }

    pub(super) fn body(&self, index: usize) -> Result<Body, WriteError> {
        let (number, inode, _) = self.inode(index)?;
        Ok(match inode.data {
            Data::CharDevice(place) | Data::BlockDevice(place) => Body::Nothing { place },
            Data::File { size: 0, .. } | Data::Fifo | Data::Socket | Data::Free => Body::Nothing { place: 0 },
            Data::File { size, block } => Body::Chunks { size, bits: chunk_bits(size), count: chunks(size), block },
            Data::Directory(_) | Data::Symlink(_) => {
                let flat = self.flats.get(index).copied().unwrap_or_default();
                let (tail, blocks) = split_flat(flat.size, self.xattr_size(inode.xattrs), number == ROOT);
                // It is within the image, whose blocks were counted.
                let block = self.first_block.saturating_add(flat.block);
                Body::Flat { size: flat.size.into(), tail, blocks, block }
            }
        })
    }

    /// Puts the inodes into their order.
    fn walk(&mut self) -> Result<(), WriteError> {
        self.order.push(ROOT);
        set(&mut self.parents, ROOT, ROOT);
        let mut index = 0;
        while let Some(number) = self.order.get(index).copied() {
            let inode = self.tree.inode(number).ok_or(WriteError::Tree(number))?;
            let size = match &inode.data {
                Data::Directory(children) => {
                    for child in children.values() {
                        if get(&self.parents, child.inode) == NONE {
                            set(&mut self.parents, child.inode, number);
                            self.order.push(child.inode);
                        }
                    }
                    // Where the dots are among the names decides what fits a block.
                    let before = |dot| children.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(dot))).count();
                    let (dot, dots) = (before(&b"."[..]), before(b".."));
                    let names = children.keys().map(|name| name.len());
                    directory_size(
                        names
                            .clone()
                            .take(dot)
                            .chain([1])
                            .chain(names.clone().skip(dot).take(dots - dot))
                            .chain([2])
                            .chain(names.skip(dots)),
                    )
                }
                Data::Symlink(target) => target.len() as u64,
                _ => 0,
            };
            self.flats.push(Flat { size: u32::try_from(size).map_err(|_| WriteError::Size)?, block: 0 });
            index += 1;
        }
        Ok(())
    }

    /// Chooses the pairs that several inodes have, and says how many bytes they are.
    fn share(&mut self) -> u64 {
        let mut uses = vec![0u32; self.tree.xattrs.sets() + 1];
        for number in &self.order {
            let set = self.tree.inode(*number).map_or(0, |inode| inode.xattrs);
            if let Some(count) = uses.get_mut(set as usize) {
                *count = count.saturating_add(1);
            }
        }
        let mut pairs = vec![0u32; self.tree.xattrs.pairs.len()];
        for (set, count) in (0u32..).zip(uses) {
            for number in self.tree.xattrs.numbers(set) {
                if let Some(total) = pairs.get_mut(*number as usize) {
                    *total = total.saturating_add(count);
                }
            }
        }
        let several = (0u32..).zip(pairs).filter(|(_, count)| *count > 1);
        let mut shared: Vec<u32> = several.map(|(number, _)| number).collect();
        shared.sort_unstable_by(|a, b| self.tree.xattrs.pair(*a).cmp(&self.tree.xattrs.pair(*b)));
        let mut bytes = 0;
        for number in shared {
            let size = self.tree.xattrs.pair(number).map_or(0, Pair::size) as u64;
            if bytes + size <= MOST_SHARED {
                set(&mut self.shared_ids, number, u32::try_from(bytes / 4).unwrap_or(NONE));
                self.shared.push(number);
                bytes += size;
            }
        }
        bytes
    }

    fn compute_xattr_size(&self, set: u32) -> usize {
        let (shared, inline) = self.split_xattrs(set);
        if shared.is_empty() && inline.is_empty() {
            return 0;
        }
        XATTR_HEADER + shared.len() * 4 + inline.iter().map(|pair| pair.size()).sum::<usize>()
    }

    /// Gives every record and every block its place.
    fn place(&mut self, shared_bytes: u64, device_blocks: u32) -> Result<(), WriteError> {
        let (mut at, mut flat_blocks) = (FIRST_RECORD, 0u32);
        for index in 0..self.order.len() {
            let (number, inode, _) = self.inode(index)?;
            let fixed = INODE + self.xattr_size(inode.xattrs);
            let size = match self.body(index)? {
                Body::Nothing { .. } => fixed,
                Body::Chunks { size, count, block, .. } => {
                    if u64::from(block) + size.div_ceil(BLOCK as u64) > u64::from(device_blocks) {
                        return Err(WriteError::Extent { path: self.path(number), size, block, device_blocks });
                    }
                    fixed.next_multiple_of(8) + CHUNK * usize::try_from(count).map_err(|_| WriteError::Size)?
                }
                Body::Flat { tail, blocks, .. } => {
                    if let Some(flat) = self.flats.get_mut(index) {
                        flat.block = flat_blocks;
                    }
                    flat_blocks = flat_blocks.checked_add(blocks).ok_or(WriteError::Size)?;
                    fixed + tail
                }
            };
            if index == 0 && size > ROOT_ROOM {
                return Err(WriteError::Root);
            }
            if at % BLOCK as u64 + size as u64 > BLOCK as u64 {
                at = at.next_multiple_of(BLOCK as u64);
            }
            // The last number means none here.
            let nid = u32::try_from(at / SLOT).ok().filter(|nid| *nid != NONE).ok_or(WriteError::Size)?;
            set(&mut self.nids, number, nid);
            at = (at + size as u64).next_multiple_of(SLOT);
        }
        self.first_block = to_blocks(at)?;
        let end = self.first_block.checked_add(flat_blocks).ok_or(WriteError::Size)?;
        self.xattr_block = if shared_bytes == 0 { 0 } else { end };
        self.blocks = end.checked_add(to_blocks(shared_bytes)?).ok_or(WriteError::Size)?;
        if u64::from(self.blocks) * BLOCK as u64 > MOST_IMAGE {
            return Err(WriteError::Size);
        }
        Ok(())
    }

    /// The first path of an inode, for messages.
    fn path(&self, mut inode: u32) -> String {
        let mut names = Vec::new();
        while inode != ROOT {
            let parent = get(&self.parents, inode);
            let mut children = self.tree.children(parent).into_iter().flatten();
            let Some((name, _)) = children.find(|(_, child)| child.inode == inode) else { break };
            names.push(&name[..]);
            inode = parent;
        }
        names.reverse();
        shown(&names)
    }
}

fn to_blocks(bytes: u64) -> Result<u32, WriteError> {
    u32::try_from(bytes.div_ceil(BLOCK as u64)).map_err(|_| WriteError::Size)
}

fn get(of: &[u32], number: u32) -> u32 {
    of.get(number as usize).copied().unwrap_or(NONE)
}

fn set(of: &mut [u32], number: u32, value: u32) {
    if let Some(place) = of.get_mut(number as usize) {
        *place = value;
    }
}

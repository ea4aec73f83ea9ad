//! A tree as it is read.

use super::{Attributes, Data, Node, ROOT, Tree, TreeError, shown};
use crate::erofs::layout::Device;

/// An inode of a [`Tree`].
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    tree: &'a Tree,
    inode: u32,
    node: Node<'a>,
}

impl<'a> Entry<'a> {
    pub(super) fn new(tree: &'a Tree, inode: u32) -> Option<Self> {
        let node = match &tree.inode(inode)?.data {
            Data::Free => return None,
            Data::Directory(_) => Node::Directory,
            Data::File { size, block } => Node::File { size: *size, block: *block },
            Data::Symlink(target) => Node::Symlink(target),
            Data::CharDevice(numbers) => Node::CharDevice(Device::decode(*numbers)),
            Data::BlockDevice(numbers) => Node::BlockDevice(Device::decode(*numbers)),
            Data::Fifo => Node::Fifo,
            Data::Socket => Node::Socket,
        };
        Some(Self { tree, inode, node })
    }

    /// What it is.
    pub fn node(&self) -> Node<'a> {
        self.node
    }

    /// A number that all of its names have in common, and nothing else in the tree.
    pub fn inode(&self) -> u32 {
        self.inode
    }

    /// Its attributes.
    pub fn attributes(&self) -> Attributes {
        self.tree.inode(self.inode).map_or(Attributes::IMPLIED, super::Inode::attributes)
    }

    /// How many names lead to it; for a directory, two and one for each directory in it.
    pub fn links(&self) -> u32 {
        self.tree.inode(self.inode).map_or(0, |inode| inode.links)
    }

    /// Its extended attributes, by prefix and name.
    pub fn xattrs(&self) -> impl Iterator<Item = (Vec<u8>, &'a [u8])> {
        let set = self.tree.inode(self.inode).map_or(0, |inode| inode.xattrs);
        self.tree.xattrs.set(set).map(|pair| (pair.full_name(), &pair.value[..]))
    }

    /// What is in it, by name, where it is a directory.
    pub fn children(&self) -> impl Iterator<Item = (&'a [u8], Entry<'a>)> {
        let tree = self.tree;
        let children = tree.children(self.inode).into_iter().flatten();
        children.filter_map(move |(name, child)| Some((&name[..], Entry::new(tree, child.inode)?)))
    }
}

/// The most symbolic links on a way, as Linux has it.
const MOST_LINKS: u32 = 40;

pub(super) fn resolve(tree: &Tree, path: &[&[u8]]) -> Result<Vec<Vec<u8>>, TreeError> {
    let Some((last, parents)) = path.split_last() else { return Ok(Vec::new()) };
    // What is still to be walked, the next at the end.
    let mut rest: Vec<Vec<u8>> = parents.iter().rev().map(|name| name.to_vec()).collect();
    // The way so far, with the inode of each step while there is one.
    let mut way: Vec<(Vec<u8>, Option<u32>)> = Vec::new();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name.is_empty() || name == b"." {
            continue;
        }
        if name == b".." {
            way.pop();
            continue;
        }
        let here = way.last().map_or(Some(ROOT), |(_, inode)| *inode);
        let inode = here.and_then(|inode| tree.child(inode, &name)).map(|child| child.inode);
        let target = inode.and_then(|inode| match &tree.inode(inode)?.data {
            Data::Symlink(target) => Some(target),
            _ => None,
        });
        let Some(target) = target else {
            way.push((name, inode));
            continue;
        };
        links += 1;
        if links > MOST_LINKS {
            return Err(TreeError::Loop { path: shown(path) });
        }
        if target.starts_with(b"/") {
            way.clear();
        }
        rest.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
    }
    Ok(way.into_iter().map(|(name, _)| name).chain([last.to_vec()]).collect())
}

//! The tree that an image's layers come to, in memory: what [`write`](super::write()) writes.
//!
//! A builder goes through the layers from the lowest: [`Tree::begin_layer`], then one operation for each of the layer's entries, in
//! any order but that a hard link comes after its target. The tree knows no tar and no names of whiteouts; paths come as components,
//! already validated, and links on the way to an entry are not followed: [`Tree::resolve`] does that for who wants it.
//!
//! Inodes and names are apart, as on a disk: a name leads to an inode, and an inode that no name leads to is gone. Each name remembers
//! the layer that put it there, so that whiteouts remove what is of lower layers and nothing else, whatever the order of entries in
//! their own layer.
//!
//! Memory is some 150 bytes an entry: 56 an inode, and a name and its place in its directory. Attribute sets that are alike are held once.
//!
//! Invariants: every inode but the root and the free ones is reached by as many names as it counts links, directories by one; a directory
//! counts two links and one for each directory in it; no path is longer than [`MOST_DEPTH`] components.

use std::collections::BTreeMap;

use thiserror::Error;

use super::layout::{Device, FileType, MOST_TARGET, Timestamp, is_name};
use xattrs::Xattrs;

mod place;
mod remove;
mod view;
pub(crate) mod xattrs;

pub use view::Entry;

/// The most components of a path: what a path of 4096 bytes can have.
pub const MOST_DEPTH: usize = 2048;
/// The most bytes of a file: what a device of 2^32 blocks has.
pub const MOST_FILE: u64 = 1 << 44;

/// What cannot be put into a tree.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TreeError {
    /// A name that no directory can hold.
    #[error("{path}: a component of this path is empty, '.', '..', has a '/' or NUL, or is longer than 255 bytes")]
    Name {
        /// Where.
        path: String,
    },
    /// A path of too many components.
    #[error("{path}: the path has more than {MOST_DEPTH} components")]
    Depth {
        /// Where.
        path: String,
    },
    /// The path leads through something that has nothing below it.
    #[error("{path}: this is no directory, but something is to be put, emptied or linked below it")]
    NotADirectory {
        /// What is no directory.
        path: String,
    },
    /// The root can only be a directory, and cannot be removed or linked.
    #[error("the root of the tree has to stay a directory: it cannot be replaced, linked or removed")]
    Root,
    /// The target of a hard link is missing.
    #[error("{path}: a hard link to {target}, which is not there; it has to come before its links")]
    LinkTarget {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// The target of a hard link cannot have one.
    #[error("{path}: a hard link to {target}, which is a directory, or would be removed by it")]
    LinkTo {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// Symbolic links that lead nowhere.
    #[error("{path}: more than 40 symbolic links are on the way")]
    Loop {
        /// Where.
        path: String,
    },
    /// Something of an entry is outside of what EROFS can express.
    #[error("{path}: {what}")]
    Value {
        /// Where.
        path: String,
        /// What it is, and what it may be.
        what: &'static str,
    },
    /// An attribute that EROFS cannot express, or that is not an image's to have.
    #[error(
        "{path}: the extended attribute {name} cannot be stored: names begin with user., trusted. or security. (not followed by \
         overlay.) and have at most 255 bytes more, or are system.posix_acl_access or system.posix_acl_default; values have at \
         most 65,535 bytes; a name is there once"
    )]
    Xattr {
        /// Where.
        path: String,
        /// The attribute.
        name: String,
    },
    /// Too many attributes.
    #[error("{path}: its extended attributes are more than 256 KiB together")]
    Xattrs {
        /// Where.
        path: String,
    },
    /// Too many inodes.
    #[error("the tree has more than 4 billion entries")]
    Full,
}

/// What an entry is, apart from its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its bytes.
        size: u64,
        /// Where they begin on the data device, in blocks of 4 KiB; of no meaning where there are none.
        block: u32,
    },
    /// A symbolic link, with its target.
    Symlink(&'a [u8]),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Node<'_> {
    /// What it is.
    pub fn file_type(&self) -> FileType {
        match self {
            Self::Directory => FileType::Directory,
            Self::File { .. } => FileType::Regular,
            Self::Symlink(_) => FileType::Symlink,
            Self::CharDevice(_) => FileType::CharDevice,
            Self::BlockDevice(_) => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
            Self::Socket => FileType::Socket,
        }
    }
}

/// What every entry has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions, 12 bits.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When it was modified.
    pub mtime: Timestamp,
}

impl Attributes {
    /// What directories have that no entry describes: mode 0755, owned by root, modified at 0.
    pub const IMPLIED: Self = Self { mode: 0o755, uid: 0, gid: 0, mtime: Timestamp { seconds: 0, nanoseconds: 0 } };
}

/// What is in a directory.
pub(crate) type Children = BTreeMap<Box<[u8]>, Child>;

/// A name's other end.
#[derive(Clone, Copy)]
pub(crate) struct Child {
    pub(crate) inode: u32,
    /// The layer that put the name there.
    layer: u32,
}

pub(crate) enum Data {
    Free,
    // Boxed: the map is larger than all that other inodes have.
    Directory(Box<Children>),
    File { size: u64, block: u32 },
    Symlink(Box<[u8]>),
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    Socket,
}

pub(crate) struct Inode {
    pub(crate) data: Data,
    seconds: i64,
    nanoseconds: u32,
    uid: u32,
    gid: u32,
    pub(crate) links: u32,
    /// Which set of attributes; 0 is the empty one.
    pub(crate) xattrs: u32,
    mode: u16,
}
const _: () = assert!(size_of::<Inode>() <= 56);

impl Inode {
    fn set(&mut self, attributes: &Attributes, xattrs: u32) {
        self.seconds = attributes.mtime.seconds;
        self.nanoseconds = attributes.mtime.nanoseconds;
        self.uid = attributes.uid;
        self.gid = attributes.gid;
        self.mode = attributes.mode;
        self.xattrs = xattrs;
    }

    pub(crate) fn attributes(&self) -> Attributes {
        let mtime = Timestamp { seconds: self.seconds, nanoseconds: self.nanoseconds };
        Attributes { mode: self.mode, uid: self.uid, gid: self.gid, mtime }
    }

    fn is_directory(&self) -> bool {
        matches!(self.data, Data::Directory(_))
    }

    /// `None` for a free one.
    pub(crate) fn file_type(&self) -> Option<FileType> {
        Some(match self.data {
            Data::Free => return None,
            Data::Directory(_) => FileType::Directory,
            Data::File { .. } => FileType::Regular,
            Data::Symlink(_) => FileType::Symlink,
            Data::CharDevice(_) => FileType::CharDevice,
            Data::BlockDevice(_) => FileType::BlockDevice,
            Data::Fifo => FileType::Fifo,
            Data::Socket => FileType::Socket,
        })
    }
}

/// A tree of names and inodes.
pub struct Tree {
    inodes: Vec<Inode>,
    free: Vec<u32>,
    layer: u32,
    pub(crate) xattrs: Xattrs,
}

/// The root's inode.
pub(crate) const ROOT: u32 = 0;

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree of a root directory, which has mode 0755, and belongs to root.
    pub fn new() -> Self {
        let mut tree = Self { inodes: Vec::new(), free: Vec::new(), layer: 0, xattrs: Xattrs::default() };
        tree.inodes.push(Self::implied());
        tree
    }

    /// What is put from here on belongs to the next layer. Before the first call it belongs to a layer of its own.
    pub fn begin_layer(&mut self) {
        self.layer = self.layer.saturating_add(1);
    }

    /// Inodes: files with several links count once.
    pub fn inodes(&self) -> usize {
        self.inodes.len() - self.free.len()
    }

    /// Places for inodes: their numbers are below.
    pub(crate) fn slots(&self) -> usize {
        self.inodes.len()
    }

    /// Puts an entry at a path, and what is missing of its parents. A directory where there is one keeps its children and gets the new
    /// attributes; anything else replaces what is there. The empty path is the root.
    ///
    /// # Errors
    /// The path leads through something that is no directory, or the entry cannot be expressed. The tree is as it was, but for parents.
    pub fn put(
        &mut self,
        path: &[&[u8]],
        node: Node<'_>,
        attributes: &Attributes,
        xattrs: &[(&[u8], &[u8])],
    ) -> Result<(), TreeError> {
        let data = self.data(path, node, attributes)?;
        let Some((name, parents)) = path.split_last() else {
            let Data::Directory(_) = data else { return Err(TreeError::Root) };
            let set = self.xattrs.intern(path, xattrs)?;
            self.inode_mut(ROOT)?.set(attributes, set);
            return Ok(());
        };
        check_path(path)?;
        let set = self.xattrs.intern(path, xattrs)?;
        let parent = self.make(parents)?;
        let old = self.child(parent, name).map(|child| child.inode);
        if let Some(old) = old.filter(|_| matches!(data, Data::Directory(_)))
            && self.inode(old).is_some_and(Inode::is_directory)
        {
            self.inode_mut(old)?.set(attributes, set);
            return self.name(parent, name, old);
        }
        let links = if matches!(data, Data::Directory(_)) { 2 } else { 0 };
        let mut inode = Inode { data, links, ..Self::implied() };
        inode.set(attributes, set);
        let inode = self.add(inode)?;
        self.name(parent, name, inode)
    }

    /// Makes a hard link at a path to what is at another; it replaces what is there.
    ///
    /// # Errors
    /// The target is not there, is a directory, or is below what would be replaced; the path leads through something that is no
    /// directory.
    pub fn link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> Result<(), TreeError> {
        let Some((name, parents)) = path.split_last() else { return Err(TreeError::Root) };
        check_path(path)?;
        let bad = |kind: fn(String, String) -> TreeError| kind(shown(path), shown(target));
        let inode = self.find(target).ok_or_else(|| bad(|path, target| TreeError::LinkTarget { path, target }))?;
        let below = target.len() > path.len() && target.starts_with(path);
        if below || self.inode(inode).is_none_or(Inode::is_directory) {
            return Err(bad(|path, target| TreeError::LinkTo { path, target }));
        }
        let parent = self.make(parents)?;
        self.name(parent, name, inode)
    }

    /// What is at a path; links are not followed.
    pub fn get(&self, path: &[&[u8]]) -> Option<Entry<'_>> {
        Entry::new(self, self.find(path)?)
    }

    /// Where an entry of this path is put when links of the tree among its parents are followed, as within a root of chroot(2). What is
    /// missing stays as it is; the last component is not followed.
    ///
    /// # Errors
    /// More than 40 links are on the way.
    pub fn resolve(&self, path: &[&[u8]]) -> Result<Vec<Vec<u8>>, TreeError> {
        view::resolve(self, path)
    }

    fn implied() -> Inode {
        let Attributes { mode, uid, gid, .. } = Attributes::IMPLIED;
        let data = Data::Directory(Box::default());
        Inode { data, seconds: 0, nanoseconds: 0, uid, gid, links: 2, xattrs: 0, mode }
    }

    pub(crate) fn inode(&self, inode: u32) -> Option<&Inode> {
        self.inodes.get(usize::try_from(inode).ok()?)
    }

    /// The error is for form: the tree never asks for what it does not have.
    fn inode_mut(&mut self, inode: u32) -> Result<&mut Inode, TreeError> {
        usize::try_from(inode).ok().and_then(|at| self.inodes.get_mut(at)).ok_or(TreeError::Full)
    }

    pub(crate) fn children(&self, inode: u32) -> Option<&Children> {
        match &self.inode(inode)?.data {
            Data::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<Child> {
        self.children(directory)?.get(name).copied()
    }

    fn find(&self, path: &[&[u8]]) -> Option<u32> {
        path.iter().try_fold(ROOT, |inode, name| Some(self.child(inode, name)?.inode))
    }

    fn add(&mut self, inode: Inode) -> Result<u32, TreeError> {
        if let Some(free) = self.free.pop() {
            *self.inode_mut(free)? = inode;
            return Ok(free);
        }
        let number = u32::try_from(self.inodes.len()).map_err(|_| TreeError::Full)?;
        self.inodes.push(inode);
        Ok(number)
    }

    /// The directory at a path; what is missing of it is made.
    fn make(&mut self, path: &[&[u8]]) -> Result<u32, TreeError> {
        let mut inode = ROOT;
        for (depth, name) in path.iter().enumerate() {
            inode = match self.child(inode, name) {
                Some(child) => child.inode,
                None => {
                    let new = self.add(Self::implied())?;
                    self.name(inode, name, new)?;
                    new
                }
            };
            if !self.inode(inode).is_some_and(Inode::is_directory) {
                return Err(TreeError::NotADirectory { path: shown(path.get(..=depth).unwrap_or(path)) });
            }
        }
        Ok(inode)
    }

    /// Makes a name of this layer lead to an inode, which counts it; what it led to loses it.
    fn name(&mut self, directory: u32, name: &[u8], inode: u32) -> Result<(), TreeError> {
        let child = Child { inode, layer: self.layer };
        let is_directory = self.inode(inode).is_some_and(Inode::is_directory);
        let parent = self.inode_mut(directory)?;
        let Data::Directory(children) = &mut parent.data else { return Err(TreeError::Full) };
        let old = match children.get_mut(name) {
            Some(place) => Some(std::mem::replace(place, child)),
            None => children.insert(name.into(), child),
        };
        if old.is_some_and(|old| old.inode == inode) {
            return Ok(());
        }
        if is_directory {
            parent.links = parent.links.saturating_add(1);
        } else {
            let inode = self.inode_mut(inode)?;
            inode.links = inode.links.checked_add(1).ok_or(TreeError::Full)?;
        }
        if let Some(old) = old {
            self.lost(directory, old.inode)?;
        }
        Ok(())
    }

    /// Checks an entry, and gives its inode's data.
    fn data(&self, path: &[&[u8]], node: Node<'_>, attributes: &Attributes) -> Result<Data, TreeError> {
        let bad = |what| TreeError::Value { path: shown(path), what };
        if attributes.mode > 0o7777 {
            return Err(bad("its permissions have more than 12 bits"));
        }
        if attributes.mtime.nanoseconds >= 1_000_000_000 {
            return Err(bad("its time has a second's worth of nanoseconds or more"));
        }
        let device = |device: Device| {
            device
                .encode()
                .ok_or_else(|| bad("a device's major number has at most 12 bits, its minor number at most 20"))
        };
        Ok(match node {
            Node::Directory => Data::Directory(Box::default()),
            Node::File { size: 0, .. } => Data::File { size: 0, block: 0 },
            Node::File { size, .. } if size > MOST_FILE => return Err(bad("a file has at most 16 TiB")),
            Node::File { size, block } => Data::File { size, block },
            Node::Symlink(target) if target.is_empty() || target.len() > MOST_TARGET || target.contains(&0) => {
                return Err(bad("a symbolic link's target has 1 to 4095 bytes, none of them NUL"));
            }
            Node::Symlink(target) => Data::Symlink(target.into()),
            Node::CharDevice(Device { major: 0, minor: 0 }) => {
                return Err(bad("the character device 0:0 is a whiteout to overlayfs, so no image may have one"));
            }
            Node::CharDevice(numbers) => Data::CharDevice(device(numbers)?),
            Node::BlockDevice(numbers) => Data::BlockDevice(device(numbers)?),
            Node::Fifo => Data::Fifo,
            Node::Socket => Data::Socket,
        })
    }
}

fn check_path(path: &[&[u8]]) -> Result<(), TreeError> {
    if path.len() > MOST_DEPTH {
        return Err(TreeError::Depth { path: shown(path) });
    }
    match path.iter().all(|name| is_name(name)) {
        true => Ok(()),
        false => Err(TreeError::Name { path: shown(path) }),
    }
}

/// A path for messages: escaped, and not too long.
pub(crate) fn shown(path: &[&[u8]]) -> String {
    const LONGEST: usize = 200;
    let text = path.join(&b'/').escape_ascii().to_string();
    match text.get(..LONGEST) {
        _ if path.is_empty() => ".".to_owned(),
        Some(start) if text.len() > LONGEST => format!("{start}…"),
        _ => text,
    }
}

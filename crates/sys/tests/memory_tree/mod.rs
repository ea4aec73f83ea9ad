//! A filesystem in memory whose content is computed, with what tests want to watch and to break.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use nacre_sys::fuse::{
    Answered, Attributes, Entries, Errno, Inode, Kind, Notifier, Open, Options, ReadOnly, ReadReply, Session,
    Statistics, XattrNames,
};

/// What happens before a read is answered.
type Hook = Box<dyn Fn(&Read<'_>) -> Result<(), Errno> + Send + Sync>;

/// A read that arrived.
pub struct Read<'a> {
    pub notifier: Option<&'a Notifier>,
    pub inode: Inode,
    pub offset: u64,
    pub size: usize,
}

pub struct Node {
    pub attributes: Attributes,
    pub parent: Inode,
    pub children: BTreeMap<Vec<u8>, Inode>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// In place of computed content.
    pub content: Option<Vec<u8>>,
}

pub struct MemoryTree {
    pub nodes: Vec<Node>,
    pub open: Open,
    pub hook: Hook,
    pub notifier: OnceLock<Notifier>,
    pub reads: AtomicUsize,
    pub opens: AtomicUsize,
}

impl MemoryTree {
    pub fn new() -> Self {
        let mut tree = Self {
            nodes: Vec::new(),
            open: Open::Unneeded,
            hook: Box::new(|_| Ok(())),
            notifier: OnceLock::new(),
            reads: AtomicUsize::new(0),
            opens: AtomicUsize::new(0),
        };
        tree.push(Inode::ROOT, Kind::Directory, 0);
        tree
    }

    fn push(&mut self, parent: Inode, kind: Kind, size: u64) -> Inode {
        let inode = Inode(self.nodes.len() as u64 + 1);
        let permissions = if kind == Kind::Directory { 0o755 } else { 0o644 };
        let attributes = Attributes {
            inode,
            kind,
            permissions,
            size,
            links: 1,
            uid: 0,
            gid: 0,
            seconds: 1_234_567_890,
            nanoseconds: 123_456_789,
        };
        let (children, xattrs) = (BTreeMap::new(), BTreeMap::new());
        self.nodes.push(Node { attributes, parent, children, target: Vec::new(), xattrs, content: None });
        inode
    }

    pub fn add(&mut self, parent: Inode, name: &str, kind: Kind, size: u64) -> Inode {
        let inode = self.push(parent, kind, size);
        self.node_mut(parent).children.insert(name.into(), inode);
        inode
    }

    pub fn file(&mut self, name: &str, size: u64) -> Inode {
        self.add(Inode::ROOT, name, Kind::File, size)
    }

    pub fn directory(&mut self, parent: Inode, name: &str) -> Inode {
        self.add(parent, name, Kind::Directory, 0)
    }

    pub fn node_mut(&mut self, inode: Inode) -> &mut Node {
        self.nodes.get_mut(usize::try_from(inode.0).unwrap() - 1).unwrap()
    }

    pub fn node(&self, inode: Inode) -> Result<&Node, Errno> {
        usize::try_from(inode.0 - 1).ok().and_then(|index| self.nodes.get(index)).ok_or(Errno::NOENT)
    }

    pub fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

/// What a file has at an offset.
pub fn content(inode: Inode, offset: u64, buffer: &mut [u8]) {
    let word = |index: u64| {
        (index ^ (inode.0 << 40))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    let mut place = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let bytes = word(place / 8).to_le_bytes();
        let from = usize::try_from(place % 8).unwrap();
        let now = (8 - from).min(rest.len());
        rest[..now].copy_from_slice(&bytes[from..from + now]);
        place += now as u64;
        rest = &mut rest[now..];
    }
}

/// The same as a vector.
pub fn expected(inode: Inode, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    content(inode, offset, &mut bytes);
    bytes
}

impl ReadOnly for MemoryTree {
    fn started(&self, notifier: &Notifier) {
        let _ = self.notifier.set(notifier.clone());
    }

    fn lookup(&self, parent: Inode, name: &[u8]) -> Result<Attributes, Errno> {
        let inode = self.node(parent)?.children.get(name).ok_or(Errno::NOENT)?;
        self.attributes(*inode)
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        Ok(self.node(inode)?.attributes)
    }

    fn open(&self, _: Inode) -> Result<Open, Errno> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        Ok(self.open)
    }

    fn read(&self, inode: Inode, offset: u64, mut reply: ReadReply<'_>) -> Result<Answered, Errno> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        (self.hook)(&Read { notifier: self.notifier.get(), inode, offset, size: reply.size() })?;
        let node = self.node(inode)?;
        let left = usize::try_from(node.attributes.size.saturating_sub(offset)).unwrap();
        let length = reply.size().min(left);
        if let Some(bytes) = &node.content {
            let start = usize::try_from(offset).unwrap().min(bytes.len());
            let (one, two) = bytes[start..start + length].split_at(length / 2);
            return reply.pieces(&[std::io::IoSlice::new(one), std::io::IoSlice::new(two)]);
        }
        content(inode, offset, &mut reply.buffer()[..length]);
        reply.filled(length)
    }

    fn list(&self, directory: Inode, cookie: u64, entries: &mut Entries<'_>) -> Result<(), Errno> {
        let node = self.node(directory)?;
        let own = [(&b"."[..], directory), (&b".."[..], node.parent)];
        let children = node.children.iter().map(|(name, inode)| (name.as_slice(), *inode));
        let all = own.into_iter().chain(children).enumerate().skip(usize::try_from(cookie).unwrap());
        for (number, (name, inode)) in all {
            let next = number as u64 + 1;
            let attributes = self.attributes(inode)?;
            let room = if number > 1 && entries.wants_attributes() {
                entries.add_with(name, &attributes, next)
            } else {
                entries.add(name, inode, attributes.kind, next)
            };
            if !room {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, inode: Inode, target: &mut Vec<u8>) -> Result<(), Errno> {
        target.extend_from_slice(&self.node(inode)?.target);
        Ok(())
    }

    fn xattr(&self, inode: Inode, name: &[u8], value: &mut Vec<u8>) -> Result<(), Errno> {
        value.extend_from_slice(self.node(inode)?.xattrs.get(name).ok_or(Errno::NODATA)?);
        Ok(())
    }

    fn xattr_names(&self, inode: Inode, names: &mut XattrNames<'_>) -> Result<(), Errno> {
        self.node(inode)?.xattrs.keys().for_each(|name| names.add(name));
        Ok(())
    }

    fn statistics(&self) -> Statistics {
        let bytes = self.nodes.iter().map(|node| node.attributes.size).sum();
        Statistics { bytes, files: self.nodes.len() as u64 }
    }
}

/// A mount of a tree.
pub struct Place {
    pub session: Session,
    pub tree: Arc<MemoryTree>,
    // Removed after the session is gone.
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new(tree: MemoryTree) -> Self {
        Self::with(tree, Options::default())
    }

    pub fn with(tree: MemoryTree, options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = Arc::new(tree);
        let filesystem = Arc::clone(&tree) as Arc<dyn ReadOnly>;
        let session = Session::mount(dir.path(), &options, filesystem).unwrap();
        Self { session, tree, dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn open(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }
}

/// Whether FUSE can be had here; a loud skip where it cannot.
pub fn fuse() -> bool {
    if !nacre_testkit::root() {
        return false;
    }
    let there = Path::new("/dev/fuse").exists();
    if !there {
        nacre_testkit::skip("there is no /dev/fuse");
    }
    there
}

//! Trees and images as texts that tests compare, in the form of `nacre_testkit::tree`; and what else several tests need.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
};

use nacre_lazy::erofs::{
    Attributes, Device, Entry, FileType, Image, Inode, Node, ReadAt, ReadError, Timestamp, Tree, WriteOptions, write,
};

/// What stands for a file's content: from its size and first block.
pub(crate) type Content<'a> = &'a dyn Fn(u64, u32) -> String;

/// Names the block, since nothing has the bytes.
pub(crate) fn place(_size: u64, block: u32) -> String {
    format!("block={block}")
}

pub(crate) const OPTIONS: WriteOptions<'static> =
    WriteOptions { uuid: [7; 16], device_tag: "data", device_blocks: 1 << 20 };

pub(crate) fn image(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    let written = write(tree, &OPTIONS, &mut bytes).unwrap();
    assert_eq!((written.bytes, written.inodes), (bytes.len() as u64, tree.inodes() as u64));
    bytes
}

pub(crate) fn attributes(mode: u16) -> Attributes {
    Attributes { mode, uid: 1000, gid: 70_000, mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 123_456_789 } }
}

struct Line<'a> {
    file_type: FileType,
    attributes: Attributes,
    size: u64,
    block: u32,
    target: &'a [u8],
    device: Device,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    links: u32,
    id: u64,
}

struct Listing<'a> {
    lines: BTreeMap<String, String>,
    files: HashMap<u64, String>,
    content: Content<'a>,
}

impl Listing<'_> {
    fn add(&mut self, path: &[u8], line: &Line<'_>) {
        let name = if path.is_empty() { ".".to_owned() } else { path.escape_ascii().to_string() };
        let Attributes { mode, uid, gid, mtime } = line.attributes;
        let mode = line.file_type.mode() | mode;
        let mut text = format!("{mode:o} {uid}:{gid} mtime={}.{:09}", mtime.seconds, mtime.nanoseconds);
        match line.file_type {
            FileType::Symlink => write!(text, " -> \"{}\"", line.target.escape_ascii()).unwrap(),
            FileType::Regular => write!(text, " size={} {}", line.size, (self.content)(line.size, line.block)).unwrap(),
            FileType::CharDevice | FileType::BlockDevice => {
                write!(text, " device={}:{}", line.device.major, line.device.minor).unwrap();
            }
            _ => {}
        }
        for (name, value) in &line.xattrs {
            write!(text, " {}={}", name.escape_ascii(), value.escape_ascii()).unwrap();
        }
        if line.file_type != FileType::Directory && line.links > 1 {
            let first = self.files.entry(line.id).or_insert_with(|| name.clone());
            if *first != name {
                write!(text, " same file as {first}").unwrap();
            }
        }
        self.lines.insert(name, text);
    }
}

pub(crate) fn list_tree(tree: &Tree, content: Content<'_>) -> BTreeMap<String, String> {
    let mut listing = Listing { lines: BTreeMap::new(), files: HashMap::new(), content };
    add_entry(&mut listing, &[], tree.get(&[]).unwrap());
    listing.lines
}

fn add_entry(listing: &mut Listing<'_>, path: &[u8], entry: Entry<'_>) {
    let none = Device { major: 0, minor: 0 };
    let (size, block, target, device) = match entry.node() {
        Node::File { size, block } => (size, block, &[][..], none),
        Node::Symlink(target) => (0, 0, target, none),
        Node::CharDevice(device) | Node::BlockDevice(device) => (0, 0, &[][..], device),
        _ => (0, 0, &[][..], none),
    };
    let line = Line {
        file_type: entry.node().file_type(),
        attributes: entry.attributes(),
        size,
        block,
        target,
        device,
        xattrs: entry.xattrs().map(|(name, value)| (name, value.to_vec())).collect(),
        links: entry.links(),
        id: entry.inode().into(),
    };
    listing.add(path, &line);
    for (name, child) in entry.children() {
        add_entry(listing, &join(path, name), child);
    }
}

pub(crate) fn list_image<R: ReadAt>(image: &Image<R>, content: Content<'_>) -> BTreeMap<String, String> {
    let mut listing = Listing { lines: BTreeMap::new(), files: HashMap::new(), content };
    add_inode(&mut listing, image, &[], image.root());
    listing.lines
}

fn add_inode<R: ReadAt>(listing: &mut Listing<'_>, image: &Image<R>, path: &[u8], nid: u64) {
    let inode = image.inode(nid).unwrap();
    let target = match inode.file_type {
        FileType::Symlink => image.read_link(&inode).unwrap(),
        _ => Vec::new(),
    };
    let mut xattrs = BTreeMap::new();
    let each = |xattr: nacre_lazy::erofs::Xattr<'_>| {
        assert!(xattrs.insert(xattr.full_name(), xattr.value.to_vec()).is_none());
        true
    };
    image.xattrs(&inode, each).unwrap();
    for (name, value) in &xattrs {
        assert_eq!(image.xattr(&inode, name).unwrap().as_ref(), Some(value));
    }
    assert_eq!(inode.has_xattrs(), !xattrs.is_empty());
    assert_eq!(image.xattr(&inode, b"user.no such").unwrap(), None);
    let line = Line {
        file_type: inode.file_type,
        attributes: Attributes { mode: inode.mode, uid: inode.uid, gid: inode.gid, mtime: inode.mtime },
        size: inode.size,
        block: inode.extent.map_or(0, |extent| extent.block),
        target: &target,
        device: inode.device,
        xattrs,
        links: inode.links,
        id: nid,
    };
    listing.add(path, &line);
    if inode.file_type == FileType::Directory {
        for (name, nid, file_type) in children(image, &inode).unwrap() {
            assert_eq!(image.lookup(&inode, &name).unwrap(), Some((nid, file_type)));
            assert_eq!(image.inode(nid).unwrap().file_type, file_type);
            if name != b"." && name != b".." {
                add_inode(listing, image, &join(path, &name), nid);
            }
        }
        assert_eq!(image.lookup(&inode, b"no such name").unwrap(), None);
    }
}

/// All entries, each read by a call of its own that goes on where the last one ended; by chance, or the first 50 of them.
pub(crate) fn children<R: ReadAt>(
    image: &Image<R>,
    directory: &Inode,
) -> Result<Vec<(Vec<u8>, u64, FileType)>, ReadError> {
    let (mut entries, mut next) = (Vec::new(), 0);
    loop {
        let (before, step) = (entries.len(), if entries.len() < 50 { 1 } else { 1000 });
        image.read_dir(directory, next, |entry| {
            entries.push((entry.name.to_vec(), entry.nid, entry.file_type));
            next = entry.next;
            entries.len() < before + step
        })?;
        if entries.len() == before {
            return Ok(entries);
        }
    }
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

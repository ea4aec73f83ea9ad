//! The whole tree of a lazy image as a FUSE filesystem, for kernels whose EROFS mounts no files: the same metadata, the same reader.

use std::{fs::File, sync::Arc};

use nacre_lazy::{
    device::DeviceReader,
    erofs::{FileType, Image, Inode as Node, ReadError},
};
use nacre_sys::fuse::{Answered, Attributes, Entries, Errno, Inode, Kind, ReadOnly, ReadReply, Statistics, XattrNames};

/// A block of the data device.
const BLOCK: u64 = 4096;

/// The tree. The root is FUSE's inode 1; every other inode has the number that EROFS gives it, which is never 1.
pub(super) struct TreeFs {
    pub(super) reader: Arc<dyn DeviceReader>,
    pub(super) image: Image<File>,
}

fn failed(error: &ReadError) -> Errno {
    tracing::error!("the image's metadata: {error}");
    Errno::IO
}

impl TreeFs {
    fn node(&self, inode: Inode) -> Result<Node, Errno> {
        let nid = if inode == Inode::ROOT { self.image.root() } else { inode.0 };
        self.image.inode(nid).map_err(|error| failed(&error))
    }

    fn number(&self, nid: u64) -> Inode {
        if nid == self.image.root() { Inode::ROOT } else { Inode(nid) }
    }

    fn describe(&self, node: &Node) -> Attributes {
        Attributes {
            inode: self.number(node.nid),
            kind: kind(node),
            permissions: node.mode,
            size: node.size,
            links: node.links,
            uid: node.uid,
            gid: node.gid,
            seconds: node.mtime.seconds,
            nanoseconds: node.mtime.nanoseconds,
        }
    }
}

fn kind(node: &Node) -> Kind {
    match node.file_type {
        FileType::CharDevice => Kind::CharacterDevice(node.device.major, node.device.minor),
        FileType::BlockDevice => Kind::BlockDevice(node.device.major, node.device.minor),
        other => simple_kind(other),
    }
}

/// For a listing, which has no numbers of devices.
fn simple_kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::Regular => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharDevice => Kind::CharacterDevice(0, 0),
        FileType::BlockDevice => Kind::BlockDevice(0, 0),
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
    }
}

impl ReadOnly for TreeFs {
    fn lookup(&self, parent: Inode, name: &[u8]) -> Result<Attributes, Errno> {
        let directory = self.node(parent)?;
        if directory.file_type != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let found = self.image.lookup(&directory, name).map_err(|error| failed(&error))?;
        let (nid, _) = found.ok_or(Errno::NOENT)?;
        self.attributes(self.number(nid))
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        Ok(self.describe(&self.node(inode)?))
    }

    fn read(&self, inode: Inode, offset: u64, reply: ReadReply<'_>) -> Result<Answered, Errno> {
        let node = self.node(inode)?;
        if node.file_type != FileType::Regular {
            return Err(Errno::INVAL);
        }
        let start = node.extent.map_or(0, |extent| u64::from(extent.block) * BLOCK);
        let end = start.saturating_add(node.size);
        super::device::read(&*self.reader, start.saturating_add(offset).min(end), end, reply)
    }

    fn list(&self, directory: Inode, cookie: u64, entries: &mut Entries<'_>) -> Result<(), Errno> {
        let node = self.node(directory)?;
        if node.file_type != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let mut broken = None;
        let plus = entries.wants_attributes();
        let listed = self.image.read_dir(&node, cookie, |entry| {
            let number = self.number(entry.nid);
            if !plus || entry.name == b"." || entry.name == b".." {
                return entries.add(entry.name, number, simple_kind(entry.file_type), entry.next);
            }
            match self.attributes(number) {
                Ok(attributes) => entries.add_with(entry.name, &attributes, entry.next),
                Err(errno) => {
                    broken = Some(errno);
                    false
                }
            }
        });
        listed.map_err(|error| failed(&error))?;
        broken.map_or(Ok(()), Err)
    }

    fn read_link(&self, inode: Inode, target: &mut Vec<u8>) -> Result<(), Errno> {
        let node = self.node(inode)?;
        if node.file_type != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        *target = self.image.read_link(&node).map_err(|error| failed(&error))?;
        Ok(())
    }

    fn xattr(&self, inode: Inode, name: &[u8], value: &mut Vec<u8>) -> Result<(), Errno> {
        let node = self.node(inode)?;
        let found = self.image.xattr(&node, name).map_err(|error| failed(&error))?;
        *value = found.ok_or(Errno::NODATA)?;
        Ok(())
    }

    fn xattr_names(&self, inode: Inode, names: &mut XattrNames<'_>) -> Result<(), Errno> {
        let node = self.node(inode)?;
        let listed = self.image.xattrs(&node, |xattr| {
            names.add(&xattr.full_name());
            true
        });
        listed.map_err(|error| failed(&error))
    }

    fn statistics(&self) -> Statistics {
        Statistics { bytes: self.reader.content_bytes(), files: self.image.inodes() }
    }
}

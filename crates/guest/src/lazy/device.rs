//! The data device of a lazy image, as a file that the kernel's EROFS reads.

use std::sync::Arc;

use nacre_lazy::device::DeviceReader;
use nacre_sys::fuse::{Answered, Attributes, Entries, Errno, Inode, Kind, Open, ReadOnly, ReadReply, Statistics};

/// The file's name.
pub(super) const NAME: &str = "data";
const FILE: Inode = Inode(2);

/// A filesystem of one file: an image's data device.
pub(super) fn filesystem(reader: Arc<dyn DeviceReader>) -> Arc<dyn ReadOnly> {
    Arc::new(DeviceFs(reader))
}

struct DeviceFs(Arc<dyn DeviceReader>);

impl ReadOnly for DeviceFs {
    fn lookup(&self, parent: Inode, name: &[u8]) -> Result<Attributes, Errno> {
        match (parent, name) {
            (Inode::ROOT, name) if name == NAME.as_bytes() => self.attributes(FILE),
            _ => Err(Errno::NOENT),
        }
    }

    fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        let (kind, permissions, size, links) = match inode {
            Inode::ROOT => (Kind::Directory, 0o500, 0, 2),
            FILE => (Kind::File, 0o400, self.0.size(), 1),
            _ => return Err(Errno::NOENT),
        };
        Ok(Attributes { inode, kind, permissions, size, links, uid: 0, gid: 0, seconds: 0, nanoseconds: 0 })
    }

    fn open(&self, _inode: Inode) -> Result<Open, Errno> {
        Ok(Open::Cached)
    }

    fn read(&self, inode: Inode, offset: u64, reply: ReadReply<'_>) -> Result<Answered, Errno> {
        if inode != FILE {
            return Err(Errno::ISDIR);
        }
        read(&*self.0, offset, self.0.size(), reply)
    }

    fn list(&self, directory: Inode, cookie: u64, entries: &mut Entries<'_>) -> Result<(), Errno> {
        if directory != Inode::ROOT {
            return Err(Errno::NOTDIR);
        }
        let all: [(&[u8], Inode, Kind); 3] = [
            (b".", Inode::ROOT, Kind::Directory),
            (b"..", Inode::ROOT, Kind::Directory),
            (NAME.as_bytes(), FILE, Kind::File),
        ];
        for (next, (name, inode, kind)) in (1..).zip(all).skip(usize::try_from(cookie).unwrap_or(usize::MAX)) {
            if !entries.add(name, inode, kind, next) {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, _inode: Inode, _target: &mut Vec<u8>) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn statistics(&self) -> Statistics {
        Statistics { bytes: self.0.size(), files: 1 }
    }
}

/// Answers a read of a file that begins at a byte of the device and ends at another.
pub(super) fn read(
    reader: &dyn DeviceReader,
    offset: u64,
    end: u64,
    mut reply: ReadReply<'_>,
) -> Result<Answered, Errno> {
    let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX).min(reply.size());
    let out = reply.buffer().get_mut(..length).unwrap_or_default();
    // What is wrong is in the log and in the reader; whoever reads gets EIO.
    reader.read_at(offset, out).map_err(|_| Errno::IO)?;
    reply.filled(length)
}

//! What a filesystem is to a session: a [`ReadOnly`], and what it answers with.

use std::time::Duration;

use rustix::io::Errno;
use zerocopy::FromZeros as _;

use super::notify::Notifier;
use super::reply::{Answered, ReadReply};
use super::wire::{Attr, Dirent, DirentPlus, EntryOut, StatfsOut};

/// The number of a file or directory, the same for as long as the filesystem is mounted, across a handover too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Inode(pub u64);

impl Inode {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

/// A filesystem that nobody writes to and whose files never change, so that the kernel may keep all it has seen of it.
///
/// Every method is called from several threads at once. An error is what the caller in the kernel gets; a panic becomes `EIO`.
///
/// Inodes have to be stable: the session never says how often the kernel refers to one, unless [`ReadOnly::forget`] listens. After a
/// handover to another process its filesystem is asked for the same inodes, and cookies of listings, that this one gave out.
pub trait ReadOnly: Send + Sync + 'static {
    /// The session begins, or was taken over; no request was answered yet. The notifier ends with the session.
    fn started(&self, notifier: &Notifier) {
        let _ = notifier;
    }

    /// For how long the kernel may keep what it was told.
    fn timeouts(&self) -> Timeouts {
        Timeouts::IMMUTABLE
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// `ENOENT` where there is none, or why it cannot be said.
    fn lookup(&self, parent: Inode, name: &[u8]) -> Result<Attributes, Errno>;

    /// What an inode is like.
    ///
    /// # Errors
    /// Why it cannot be said.
    fn attributes(&self, inode: Inode) -> Result<Attributes, Errno>;

    /// A file is opened.
    ///
    /// # Errors
    /// Why it may not be.
    fn open(&self, inode: Inode) -> Result<Open, Errno> {
        let _ = inode;
        Ok(Open::Unneeded)
    }

    /// Content of a file from `offset` on, [`ReadReply::size`] bytes or up to the file's end: what is shorter is the end, to the kernel.
    ///
    /// # Errors
    /// What the reader gets, `EIO` most often. After the reply was sent an error comes too late.
    fn read(&self, inode: Inode, offset: u64, reply: ReadReply<'_>) -> Result<Answered, Errno>;

    /// Adds entries of a directory to `entries`, from the one after `cookie` on, until they are all told or there is no room. 0 is the
    /// beginning; every other cookie is one that came with an entry. `.` and `..` are entries, too.
    ///
    /// # Errors
    /// Why it cannot be listed.
    fn list(&self, directory: Inode, cookie: u64, entries: &mut Entries<'_>) -> Result<(), Errno>;

    /// Puts the target of a symbolic link into `target`, which is empty.
    ///
    /// # Errors
    /// `EINVAL` where the inode is none, or why it cannot be said.
    fn read_link(&self, inode: Inode, target: &mut Vec<u8>) -> Result<(), Errno>;

    /// Puts an extended attribute into `value`, which is empty. `ENOSYS` says for good that nothing here has attributes.
    ///
    /// # Errors
    /// `ENODATA` where there is none of that name.
    fn xattr(&self, inode: Inode, name: &[u8], value: &mut Vec<u8>) -> Result<(), Errno> {
        let _ = (inode, name, value);
        Err(Errno::NOSYS)
    }

    /// Names the extended attributes of an inode. `ENOSYS` says for good that nothing here has attributes.
    ///
    /// # Errors
    /// Why it cannot be said.
    fn xattr_names(&self, inode: Inode, names: &mut XattrNames<'_>) -> Result<(), Errno> {
        let _ = (inode, names);
        Err(Errno::NOSYS)
    }

    /// How large the filesystem is.
    fn statistics(&self) -> Statistics;

    /// The kernel dropped so many of the references to an inode that lookups and listings gave it.
    fn forget(&self, inode: Inode, lookups: u64) {
        let _ = (inode, lookups);
    }
}

/// For how long the kernel may keep what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// That a name is there.
    pub entries: Duration,
    /// That a name is not there; zero keeps nothing.
    pub absent: Duration,
    /// What an inode is like.
    pub attributes: Duration,
}

impl Timeouts {
    /// Years: nothing changes.
    pub const IMMUTABLE: Self = {
        let long = Duration::from_secs(10 * 365 * 24 * 3600);
        Self { entries: long, absent: long, attributes: long }
    };
}

/// What is to be done about a file's opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// Nothing, for this file **and every other**: the kernel asks no more and keeps what it cached of files. A kernel that cannot do
    /// without asking gets [`Open::Cached`].
    Unneeded,
    /// The kernel keeps what it cached of the file.
    Cached,
    /// The file is read past the kernel's cache.
    Direct,
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device, by major and minor number.
    CharacterDevice(u32, u32),
    /// A block device, by major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Kind {
    /// The bits of `S_IFMT`.
    fn format(self) -> u32 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharacterDevice(..) => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice(..) => 0o060_000,
            Self::File => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// `DT_REG` and so on, which are the same bits.
    fn entry_type(self) -> u32 {
        self.format() >> 12
    }

    /// As the kernel's `new_encode_dev` packs it.
    fn device(self) -> u32 {
        match self {
            Self::CharacterDevice(major, minor) | Self::BlockDevice(major, minor) => {
                (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
            }
            _ => 0,
        }
    }
}

/// What an inode is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Which one.
    pub inode: Inode,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, and set-user-ID, set-group-ID and sticky.
    pub permissions: u16,
    /// Its size in bytes; of a symbolic link, that of the target.
    pub size: u64,
    /// How many names it has.
    pub links: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was last written, in seconds since 1970; its other times are the same.
    pub seconds: i64,
    /// Nanoseconds of that.
    pub nanoseconds: u32,
}

impl Attributes {
    pub(super) fn to_wire(self) -> Attr {
        let seconds = self.seconds.cast_unsigned();
        Attr {
            inode: self.inode.0,
            size: self.size,
            blocks: self.size.div_ceil(512),
            atime: seconds,
            mtime: seconds,
            ctime: seconds,
            atime_nanos: self.nanoseconds,
            mtime_nanos: self.nanoseconds,
            ctime_nanos: self.nanoseconds,
            mode: self.kind.format() | u32::from(self.permissions & 0o7777),
            links: self.links,
            uid: self.uid,
            gid: self.gid,
            device: self.kind.device(),
            block_size: 4096,
            flags: 0,
        }
    }

    pub(super) fn to_entry(self, timeouts: Timeouts) -> EntryOut {
        EntryOut {
            node: self.inode.0,
            generation: 0,
            entry_valid: timeouts.entries.as_secs(),
            attributes_valid: timeouts.attributes.as_secs(),
            entry_valid_nanos: timeouts.entries.subsec_nanos(),
            attributes_valid_nanos: timeouts.attributes.subsec_nanos(),
            attributes: self.to_wire(),
        }
    }
}

/// How large a filesystem is; nothing of it is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Its size in bytes.
    pub bytes: u64,
    /// How many files it has.
    pub files: u64,
}

impl Statistics {
    pub(super) fn to_wire(self) -> StatfsOut {
        const BLOCK: u32 = 4096;
        StatfsOut {
            blocks: self.bytes.div_ceil(BLOCK.into()),
            free: 0,
            available: 0,
            files: self.files,
            free_files: 0,
            block_size: BLOCK,
            name_length: 255,
            fragment_size: BLOCK,
            padding: 0,
            spare: [0; 6],
        }
    }
}

/// Takes the entries of a directory.
#[derive(Debug)]
pub struct Entries<'a> {
    room: &'a mut [u8],
    used: usize,
    plus: bool,
    timeouts: Timeouts,
}

impl<'a> Entries<'a> {
    pub(super) fn new(room: &'a mut [u8], plus: bool, timeouts: Timeouts) -> Self {
        Self { room, used: 0, plus, timeouts }
    }

    /// Whether attributes are wanted: then [`Entries::add_with`] saves the kernel a lookup an entry.
    pub fn wants_attributes(&self) -> bool {
        self.plus
    }

    /// Adds an entry; `next` is the cookie with which the listing goes on after it, never 0. False: there was no room, and the listing
    /// is to stop.
    #[must_use]
    pub fn add(&mut self, name: &[u8], inode: Inode, kind: Kind, next: u64) -> bool {
        if self.plus {
            // An entry without an inode of its own is shown, and looked up when somebody wants more.
            self.put(DirentPlus { entry: EntryOut::new_zeroed(), dirent: dirent(name, inode, kind, next) }, name)
        } else {
            self.put(dirent(name, inode, kind, next), name)
        }
    }

    /// Adds an entry with its attributes, as [`Entries::add`] does. Not for `.` and `..`, which nobody looks up by a listing.
    #[must_use]
    pub fn add_with(&mut self, name: &[u8], attributes: &Attributes, next: u64) -> bool {
        let dirent = dirent(name, attributes.inode, attributes.kind, next);
        if self.plus {
            self.put(DirentPlus { entry: attributes.to_entry(self.timeouts), dirent }, name)
        } else {
            self.put(dirent, name)
        }
    }

    pub(super) fn finish(self) -> &'a [u8] {
        self.room.get(..self.used).unwrap_or_default()
    }

    fn put<T: zerocopy::IntoBytes + zerocopy::Immutable>(&mut self, header: T, name: &[u8]) -> bool {
        let header = header.as_bytes();
        let length = header.len() + name.len();
        let padded = length.next_multiple_of(8);
        let Some(place) = self.room.get_mut(self.used..).and_then(|room| room.get_mut(..padded)) else { return false };
        let (head, rest) = place.split_at_mut(header.len());
        let (text, padding) = rest.split_at_mut(name.len());
        head.copy_from_slice(header);
        text.copy_from_slice(name);
        padding.fill(0);
        self.used += padded;
        true
    }
}

fn dirent(name: &[u8], inode: Inode, kind: Kind, next: u64) -> Dirent {
    // Names that do not fit do not fit into the room, either.
    let name_length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    Dirent { inode: inode.0, next, name_length, kind: kind.entry_type() }
}

/// Takes the names of extended attributes.
#[derive(Debug)]
pub struct XattrNames<'a>(pub(super) &'a mut Vec<u8>);

impl XattrNames<'_> {
    /// Adds a name, `user.x` for one.
    pub fn add(&mut self, name: &[u8]) {
        self.0.extend_from_slice(name);
        self.0.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_kinds_are_packed_as_the_kernel_unpacks_them() {
        assert_eq!(Kind::CharacterDevice(1, 3).device(), 0x103);
        assert_eq!(Kind::BlockDevice(0xabc, 0x1_2345).device(), 0x123a_bc45);
        assert_eq!(Kind::File.entry_type(), u32::from(libc::DT_REG));
        assert_eq!(Kind::Symlink.entry_type(), u32::from(libc::DT_LNK));
        assert_eq!(Kind::Directory.format(), libc::S_IFDIR);
    }

    #[test]
    fn a_listing_stops_where_there_is_no_room_for_an_entry() {
        let mut room = [0xff; 100];
        let mut entries = Entries::new(&mut room, false, Timeouts::IMMUTABLE);
        assert!(entries.add(b"one", Inode(2), Kind::File, 1));
        assert!(entries.add(b"eight888", Inode(3), Kind::Directory, 2));
        assert!(entries.add(b"", Inode(3), Kind::Directory, 3));
        assert!(!entries.add(b"more", Inode(4), Kind::File, 4));
        let bytes = entries.finish();
        assert_eq!(bytes.len(), 32 + 32 + 24);
        assert_eq!(bytes.get(24..32).unwrap(), b"one\0\0\0\0\0");
    }
}

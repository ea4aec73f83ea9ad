//! What goes over `/dev/fuse`: the structures of linux/fuse.h that a read-only filesystem needs, in the machine's byte order.
//!
//! A request is an [`InHeader`], then what its operation brings. An answer is an [`OutHeader`], then what the operation asks for; an error
//! is a header alone, with a negative errno. A notification is an answer to nobody: `unique` is 0 and `error` says which.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version, unchanged since 2.6.12.
pub(super) const MAJOR: u32 = 7;
/// The newest minor version whose structures are those of here; a newer kernel speaks this one.
pub(super) const MINOR: u32 = 41;
/// The oldest one that has all that a session relies on ([`MAX_PAGES`], symbolic links that are cached): Linux 4.20.
pub(super) const OLDEST_MINOR: u32 = 28;

/// Several reads of one file at once.
pub(super) const ASYNC_READ: u64 = 1 << 0;
/// Directories are listed with attributes.
pub(super) const DO_READDIRPLUS: u64 = 1 << 13;
/// With attributes only where they are likely to be wanted.
pub(super) const READDIRPLUS_AUTO: u64 = 1 << 14;
/// Asynchronous direct reads stay asynchronous.
pub(super) const ASYNC_DIO: u64 = 1 << 15;
/// Files need no OPEN.
pub(super) const NO_OPEN_SUPPORT: u64 = 1 << 17;
/// Lookups and listings of one directory at once.
pub(super) const PARALLEL_DIROPS: u64 = 1 << 18;
/// A request's size is ours to say.
pub(super) const MAX_PAGES: u64 = 1 << 22;
/// Targets of symbolic links are kept.
pub(super) const CACHE_SYMLINKS: u64 = 1 << 23;
/// Directories need no OPENDIR.
pub(super) const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
/// There are flags beyond the 32nd.
pub(super) const INIT_EXT: u64 = 1 << 30;
/// Files that are read past the cache can be mapped all the same.
pub(super) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
/// Requests that were read and not answered can be asked for again: Linux 6.9.
pub(super) const HAS_RESEND: u64 = 1 << 39;

/// The answer to OPEN: the file is read past the cache.
pub(super) const OPEN_DIRECT_IO: u32 = 1 << 0;
/// What is in the cache stays there.
pub(super) const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// The listing of a directory is kept.
pub(super) const OPEN_CACHE_DIR: u32 = 1 << 3;

/// Notifications, in place of an error.
pub(super) const NOTIFY_INVAL_INODE: i32 = 2;
pub(super) const NOTIFY_STORE: i32 = 4;
pub(super) const NOTIFY_RESEND: i32 = 7;

/// Operations, by their numbers.
pub(super) mod opcode {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const GETXATTR: u32 = 22;
    pub(in super::super) const LISTXATTR: u32 = 23;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const READDIRPLUS: u32 = 44;
}

/// Begins every request.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InHeader {
    /// Of the whole request.
    pub(super) length: u32,
    pub(super) opcode: u32,
    /// Names the request in its answer.
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The thread that waits, as the mount's PID namespace numbers it; 0 where none does.
    pub(super) pid: u32,
    /// Of extensions at the request's end, in units of 8 bytes.
    pub(super) extensions: u16,
    pub(super) padding: u16,
}
const _: () = assert!(size_of::<InHeader>() == 40);

/// Begins every answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct OutHeader {
    pub(super) length: u32,
    pub(super) error: i32,
    pub(super) unique: u64,
}
const _: () = assert!(size_of::<OutHeader>() == 16);

/// INIT, as far as kernels before 7.36 send it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitIn {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    pub(super) flags: u32,
}
const _: () = assert!(size_of::<InitIn>() == 16);

/// The answer to INIT.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitOut {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) max_readahead: u32,
    pub(super) flags: u32,
    pub(super) max_background: u16,
    pub(super) congestion_threshold: u16,
    pub(super) max_write: u32,
    pub(super) time_granularity: u32,
    pub(super) max_pages: u16,
    pub(super) map_alignment: u16,
    pub(super) flags2: u32,
    pub(super) max_stack_depth: u32,
    pub(super) unused: [u32; 6],
}
const _: () = assert!(size_of::<InitOut>() == 64);

/// What a file is like.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Attr {
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) atime: u64,
    pub(super) mtime: u64,
    pub(super) ctime: u64,
    pub(super) atime_nanos: u32,
    pub(super) mtime_nanos: u32,
    pub(super) ctime_nanos: u32,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) device: u32,
    pub(super) block_size: u32,
    pub(super) flags: u32,
}
const _: () = assert!(size_of::<Attr>() == 88);

/// The answer to LOOKUP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct EntryOut {
    pub(super) node: u64,
    pub(super) generation: u64,
    pub(super) entry_valid: u64,
    pub(super) attributes_valid: u64,
    pub(super) entry_valid_nanos: u32,
    pub(super) attributes_valid_nanos: u32,
    pub(super) attributes: Attr,
}
const _: () = assert!(size_of::<EntryOut>() == 128);

/// The answer to GETATTR.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct AttrOut {
    pub(super) valid: u64,
    pub(super) valid_nanos: u32,
    pub(super) padding: u32,
    pub(super) attributes: Attr,
}
const _: () = assert!(size_of::<AttrOut>() == 104);

/// The answer to OPEN and OPENDIR.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct OpenOut {
    pub(super) handle: u64,
    pub(super) flags: u32,
    pub(super) backing: i32,
}
const _: () = assert!(size_of::<OpenOut>() == 16);

/// READ, READDIR and READDIRPLUS.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ReadIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
    pub(super) read_flags: u32,
    pub(super) lock_owner: u64,
    pub(super) flags: u32,
    pub(super) padding: u32,
}
const _: () = assert!(size_of::<ReadIn>() == 40);

/// GETXATTR, before the name, and LISTXATTR.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct XattrIn {
    /// 0: only the size is asked for.
    pub(super) size: u32,
    pub(super) padding: u32,
}
const _: () = assert!(size_of::<XattrIn>() == 8);

/// The answer to the two where only the size is asked for.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct XattrOut {
    pub(super) size: u32,
    pub(super) padding: u32,
}
const _: () = assert!(size_of::<XattrOut>() == 8);

/// The answer to STATFS.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct StatfsOut {
    pub(super) blocks: u64,
    pub(super) free: u64,
    pub(super) available: u64,
    pub(super) files: u64,
    pub(super) free_files: u64,
    pub(super) block_size: u32,
    pub(super) name_length: u32,
    pub(super) fragment_size: u32,
    pub(super) padding: u32,
    pub(super) spare: [u32; 6],
}
const _: () = assert!(size_of::<StatfsOut>() == 80);

/// Begins an entry of a directory; its name follows, and zeroes to the next multiple of 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Dirent {
    pub(super) inode: u64,
    /// Where to go on after this entry.
    pub(super) next: u64,
    pub(super) name_length: u32,
    pub(super) kind: u32,
}
const _: () = assert!(size_of::<Dirent>() == 24);

/// Begins an entry of a listing with attributes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DirentPlus {
    /// All zeroes where there are no attributes.
    pub(super) entry: EntryOut,
    pub(super) dirent: Dirent,
}
const _: () = assert!(size_of::<DirentPlus>() == 152);

/// FORGET.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ForgetIn {
    pub(super) lookups: u64,
}
const _: () = assert!(size_of::<ForgetIn>() == 8);

/// BATCH_FORGET, before its [`ForgetOne`]s.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct BatchForgetIn {
    pub(super) count: u32,
    pub(super) padding: u32,
}
const _: () = assert!(size_of::<BatchForgetIn>() == 8);

/// One of several inodes that are forgotten.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ForgetOne {
    pub(super) node: u64,
    pub(super) lookups: u64,
}
const _: () = assert!(size_of::<ForgetOne>() == 16);

/// INTERRUPT.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InterruptIn {
    /// Of the request that nobody waits for any more.
    pub(super) unique: u64,
}
const _: () = assert!(size_of::<InterruptIn>() == 8);

/// The notification that puts data into the kernel's cache; the data follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct StoreOut {
    pub(super) node: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
    pub(super) padding: u32,
}
const _: () = assert!(size_of::<StoreOut>() == 24);

/// The notification that takes data out of it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InvalInodeOut {
    pub(super) node: u64,
    pub(super) offset: i64,
    pub(super) length: i64,
}
const _: () = assert!(size_of::<InvalInodeOut>() == 24);

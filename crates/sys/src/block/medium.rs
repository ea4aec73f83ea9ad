//! What a store's path leads to: a regular file or a block device, how large, on what; and its lock.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    thread,
    time::Duration,
};

use nacre_core::BLOCK_SIZE;
use rustix::{
    fs::{FileType, FlockOperation, Mode, OFlags, SeekFrom},
    io::Errno,
};

use super::StoreError;
use crate::fs::FsKind;

/// The block devices of major number 1 are RAM disks (devices.txt of the kernel).
const RAM_DISK: u32 = 1;

/// How often and how long to wait for a lock: udev takes that of a device for a moment whenever it changes, and a process that is just
/// being started holds what it inherited until it executes its program.
const LOCK_TRIES: u32 = 25;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What there is to store on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// A regular file, and what kind of filesystem it lies on.
    File(FsKind),
    /// A block device.
    Device {
        /// Whether it is a RAM disk.
        memory: bool,
    },
}

impl Medium {
    /// Whether it is no slower than memory.
    pub(super) fn in_memory(self) -> bool {
        match self {
            Self::File(filesystem) => filesystem.in_memory(),
            Self::Device { memory } => memory,
        }
    }

    /// What people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Device { .. } => "block device",
        }
    }

    /// What decides whether direct I/O is possible, for people.
    pub(super) fn beneath(self) -> String {
        match self {
            Self::File(filesystem) => filesystem.to_string(),
            Self::Device { .. } => "the device".to_owned(),
        }
    }
}

/// Opens what is there, whatever it is by now, and locks it.
pub(super) fn open(path: &Path, read_only: bool) -> Result<(OwnedFd, Medium, u64), StoreError> {
    // Nothing that is not opened may wait (a FIFO) or act (a terminal), so look first. A device is opened exclusively: the kernel
    // then refuses it while it is mounted or part of an array, and refuses to mount it while we have it.
    let seen = rustix::fs::stat(path).map_err(|error| StoreError::io("find", path, error))?;
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = match FileType::from_raw_mode(seen.st_mode) {
        FileType::RegularFile => access,
        FileType::BlockDevice if read_only => access,
        FileType::BlockDevice => access | OFlags::EXCL,
        FileType::Directory => return Err(StoreError::not_a_store(path, "it is a directory")),
        other => return Err(StoreError::not_a_store(path, format!("it is neither file nor block device ({other:?})"))),
    };
    let fd = rustix::fs::open(path, flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| match error {
            Errno::BUSY => StoreError::InUse(path.to_owned()),
            error => StoreError::io("open", path, error),
        })?;
    // With the flag, io_uring would refuse whatever has to wait.
    rustix::fs::fcntl_setfl(&fd, access).map_err(|error| StoreError::io("open", path, error))?;
    let medium = medium(path, &fd)?;
    lock(path, &fd, read_only)?;
    let size = size(medium, &fd).map_err(|error| StoreError::io("find the size of", path, error))?;
    Ok((fd, medium, size))
}

/// Makes a regular file, and locks it.
pub(super) fn create(path: &Path) -> Result<(OwnedFd, Medium), StoreError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| match error {
        Errno::EXIST => StoreError::Exists(path.to_owned()),
        error => StoreError::io("create", path, error),
    })?;
    let medium = medium(path, &fd)?;
    lock(path, &fd, false)?;
    Ok((fd, medium))
}

fn medium(path: &Path, fd: &OwnedFd) -> Result<Medium, StoreError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| StoreError::io("look at", path, error))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let filesystem =
                rustix::fs::fstatfs(fd).map_err(|error| StoreError::io("find the filesystem of", path, error))?;
            Ok(Medium::File(crate::fs::kind_of(&filesystem)))
        }
        FileType::BlockDevice => Ok(Medium::Device { memory: rustix::fs::major(stat.st_rdev) == RAM_DISK }),
        other => Err(StoreError::not_a_store(path, format!("it became something else ({other:?})"))),
    }
}

/// Locks the open file: for as long as it is open, nobody else gets a lock that conflicts, this process included.
pub(super) fn lock(path: &Path, fd: impl AsFd, shared: bool) -> Result<(), StoreError> {
    let operation = match shared {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    for attempt in 1.. {
        match rustix::fs::flock(&fd, operation) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if attempt < LOCK_TRIES => thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse(path.to_owned())),
            Err(error) => return Err(StoreError::io("lock", path, error)),
        }
    }
    Ok(())
}

/// How large it is now, in bytes.
pub(super) fn size(medium: Medium, fd: &OwnedFd) -> io::Result<u64> {
    match medium {
        Medium::File(_) => Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0)),
        // The end of a device is its size (BLKGETSIZE64 reads the same number); nobody uses this file's position.
        Medium::Device { .. } => Ok(rustix::fs::seek(fd, SeekFrom::End(0))?),
    }
}

/// The whole blocks of so many bytes.
pub(super) fn whole_blocks(bytes: u64) -> u64 {
    bytes - bytes % BLOCK_SIZE as u64
}

/// Discards a range of a block device.
pub(super) fn discard(fd: &OwnedFd, offset: u64, length: u64) -> Result<(), Errno> {
    /// `_IO(0x12, 119)` of linux/fs.h.
    const BLKDISCARD: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 119);
    // SAFETY: BLKDISCARD reads two u64, start and length, from the address given, and keeps nothing of them.
    #[expect(unsafe_code, reason = "an ioctl is known to the kernel only by its number")]
    unsafe {
        rustix::ioctl::ioctl(fd, rustix::ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([offset, length]))
    }
}

/// Makes a new name in a directory durable.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

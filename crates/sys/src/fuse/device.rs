//! The device: requests are read from it, answers and notifications written to it.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes as _;

use super::wire::OutHeader;

/// Where the kernel's side is.
pub(super) const PATH: &str = "/dev/fuse";
/// More than the kernel takes of a page-sized write or of two names, and than the 8192 bytes that it insists on.
pub(super) const REQUEST_BUFFER: usize = 16 << 10;
/// Pieces of an answer that need no allocation.
const FEW: usize = 16;

/// One connection.
#[derive(Debug)]
pub(super) struct Device {
    fd: OwnedFd,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device {
    /// A connection that nothing is mounted with yet. Reads of it do not block: a thread that waits, waits for more than requests.
    pub(super) fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(Self { fd: rustix::fs::open(PATH, flags, Mode::empty())? })
    }

    /// One that came from elsewhere.
    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Reads one request; `EAGAIN` where there is none.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.fd, buffer)
    }

    /// Answers a request with what the pieces hold together.
    pub(super) fn answer(&self, unique: u64, pieces: &[IoSlice<'_>]) {
        self.log(unique, self.write(unique, 0, pieces));
    }

    /// Answers a request with an error.
    pub(super) fn refuse(&self, unique: u64, error: Errno) {
        self.log(unique, self.write(unique, -error.raw_os_error(), &[]));
    }

    /// Tells the kernel something that it did not ask for.
    pub(super) fn notify(&self, code: i32, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
        self.write(0, code, pieces)
    }

    fn write(&self, unique: u64, error: i32, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
        let length = pieces.iter().map(|piece| piece.len()).sum::<usize>() + size_of::<OutHeader>();
        let header = OutHeader { length: u32::try_from(length).map_err(|_| Errno::MSGSIZE)?, error, unique };
        let header = IoSlice::new(header.as_bytes());
        if pieces.len() < FEW {
            let mut all = [IoSlice::new(&[]); FEW];
            for (to, from) in all.iter_mut().zip(std::iter::once(&header).chain(pieces)) {
                *to = *from;
            }
            rustix::io::writev(&self.fd, all.get(..=pieces.len()).unwrap_or_default())?;
        } else {
            let all: Vec<_> = std::iter::once(header).chain(pieces.iter().copied()).collect();
            rustix::io::writev(&self.fd, &all)?;
        }
        Ok(())
    }

    fn log(&self, unique: u64, result: Result<(), Errno>) {
        match result {
            Ok(()) => {}
            // Nobody waits for it any more, or the filesystem is gone.
            Err(Errno::NOENT | Errno::NODEV | Errno::PERM) => tracing::trace!(unique, "an answer came too late"),
            Err(error) => tracing::error!(unique, %error, "the kernel refused an answer of a FUSE filesystem"),
        }
    }
}

/// Memory whose first byte is the first of a page, so that the kernel moves as few pages as there are.
#[derive(Debug)]
pub(super) struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl PageBuffer {
    const PAGE: usize = 4096;

    /// Of so many bytes; memory is taken where they are written.
    pub(super) fn new(length: usize) -> Self {
        let memory = vec![0; length + Self::PAGE];
        let start = memory.as_ptr().align_offset(Self::PAGE).min(Self::PAGE);
        Self { memory, start, length }
    }

    /// The first bytes of it, `None` where there are not so many.
    pub(super) fn first(&mut self, length: usize) -> Option<&mut [u8]> {
        if length > self.length {
            return None;
        }
        self.memory.get_mut(self.start..)?.get_mut(..length)
    }

    /// How many there are.
    pub(super) fn length(&self) -> usize {
        self.length
    }
}

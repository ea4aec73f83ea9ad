//! By which way a file is read and written: through the page cache or around it, by io_uring or by one system call after the other.
//!
//! What is best was measured (Linux 6.18, two cores; 64 scattered reads of 4 KiB, in reads a second):
//!
//! | medium | page cache, pread | page cache, io_uring | O_DIRECT, pread | O_DIRECT, io_uring |
//! |---|---|---|---|---|
//! | tmpfs | 380k–450k | 127k | 430k | 130k |
//! | ext4 on a virtual disk, content cached | 510k–530k | 430k–490k | | |
//! | the same, from the disk | | | 4k–19k | 60k–80k |
//!
//! tmpfs takes O_DIRECT and copies all the same; io_uring hands every request for it to another thread. On a disk it is the number in
//! flight that counts, and a copy in the page cache would only be a second one: the secure disk has its own cache, of what it
//! checked. A single request is as fast by a system call as by io_uring everywhere, so those go that way always.

use std::{io, os::fd::OwnedFd};

use nacre_core::{BLOCK_SIZE, Page};
use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::{medium::Medium, ring::Rings};

/// Which way a file is to be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The fastest that the system allows, around the page cache where it is not memory anyway.
    #[default]
    Auto,
    /// Through the page cache.
    Buffered,
    /// Around the page cache, or not at all.
    Direct,
}

/// The way that was found.
pub(super) struct Way {
    /// `Some` means `O_DIRECT`, with the alignment that it asks of addresses.
    pub(super) direct: Option<usize>,
    /// io_uring, where several requests at once are to go by it.
    pub(super) rings: Option<Rings>,
    /// Why it is not the other way, for people.
    why: String,
}

impl Way {
    /// Finds the way. The file holds one block at least.
    ///
    /// # Errors
    /// Only where [`Access::Direct`] is asked for and refused.
    pub(super) fn find(access: Access, fd: &OwnedFd, medium: Medium) -> io::Result<Self> {
        let rings = |unless: bool| if unless { None } else { Some(Rings::new()) };
        let (direct, rings, why) = match access {
            Access::Auto if medium.in_memory() => {
                (None, None, format!("{} is memory, where nothing is faster", medium.beneath()))
            }
            Access::Auto => match Rings::new() {
                Err(error) => (None, None, format!("io_uring is not available: {error}")),
                Ok(rings) => match direct(fd) {
                    Ok(alignment) => (Some(alignment), Some(rings), String::new()),
                    Err(error) => (None, Some(rings), format!("O_DIRECT is refused by {}: {error}", medium.beneath())),
                },
            },
            Access::Buffered => (None, rings(medium.in_memory()).and_then(Result::ok), "as asked for".to_owned()),
            Access::Direct => {
                let alignment = direct(fd)?;
                match rings(medium.in_memory()) {
                    Some(Ok(rings)) => (Some(alignment), Some(rings), String::new()),
                    Some(Err(error)) => (Some(alignment), None, format!("io_uring is not available: {error}")),
                    None => (Some(alignment), None, format!("{} is memory", medium.beneath())),
                }
            }
        };
        Ok(Self { direct, rings, why })
    }

    /// Whether direct I/O takes a buffer as it is.
    pub(super) fn takes(&self, buffer: &[u8]) -> bool {
        self.direct.is_none_or(|alignment| buffer.as_ptr().addr().is_multiple_of(alignment))
    }

    /// For people: `io_uring, O_DIRECT`.
    pub(super) fn describe(&self) -> String {
        let calls = match (self.direct, &self.rings) {
            (Some(_), Some(_)) => "io_uring, O_DIRECT",
            (Some(_), None) => "pread/pwrite, O_DIRECT",
            (None, Some(_)) => "io_uring for reads, pwrite, page cache",
            (None, None) => "pread/pwrite, page cache",
        };
        if self.why.is_empty() { calls.to_owned() } else { format!("{calls}: {}", self.why) }
    }
}

/// Turns `O_DIRECT` on and gives the alignment that it asks of addresses. What cannot be is an error, and leaves it off.
fn direct(fd: &OwnedFd) -> io::Result<usize> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT)?;
    let tried = try_direct(fd);
    if tried.is_err() {
        rustix::fs::fcntl_setfl(fd, flags)?;
    }
    tried
}

fn try_direct(fd: &OwnedFd) -> io::Result<usize> {
    // Since Linux 6.1 the kernel says what it asks for; a block of 4096 is enough for everything before that.
    let mut alignment = BLOCK_SIZE;
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        if memory == 0 || offset == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this file has none"));
        }
        if offset as usize > BLOCK_SIZE || memory as usize > BLOCK_SIZE {
            let what = format!("it takes units of {offset} bytes at multiples of {memory}, more than 4096");
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        alignment = memory as usize;
    }
    // Some filesystems take the flag and refuse to read.
    let mut page = Page::zeroed();
    rustix::io::pread(fd, &mut page.0, 0)?;
    Ok(alignment)
}

//! The threads that serve: each reads a request, has the filesystem answer it, and only then looks whether it is to stop.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::{fs, thread};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes as _;

use super::device::{Device, PageBuffer, REQUEST_BUFFER};
use super::filesystem::{Entries, Inode, Open, ReadOnly, XattrNames};
use super::reply::ReadReply;
use super::request::{Operation, Request, RequestError, forgotten};
use super::session::Ended;
use super::wire::{self, AttrOut, EntryOut, InHeader, OpenOut, XattrOut};

/// The longest value or list of names of extended attributes, by the kernel.
const LONGEST_XATTR: usize = 64 << 10;

/// What the threads of a session have in common.
pub(super) struct Shared {
    pub(super) device: Arc<Device>,
    pub(super) filesystem: Arc<dyn ReadOnly>,
    /// What was agreed with the kernel.
    pub(super) flags: u64,
    /// The longest read.
    pub(super) max_read: usize,
    pub(super) stop: AtomicBool,
    /// Becomes readable, for good, when the threads are to stop.
    pub(super) wake: OwnedFd,
    /// What each thread works on.
    pub(super) busy: Vec<Busy>,
}

/// The request that a thread works on, for who gets its INTERRUPT.
#[derive(Debug, Default)]
pub(super) struct Busy {
    /// 0: none.
    unique: AtomicU64,
    pid: AtomicU32,
}

/// One thread of a session.
pub(super) struct Worker {
    shared: Arc<Shared>,
    number: usize,
    epoll: OwnedFd,
    request: Vec<u8>,
    buffers: Buffers,
}

/// Memory that is used again for each request.
struct Buffers {
    pages: PageBuffer,
    text: Vec<u8>,
}

impl Worker {
    /// Prepares a thread's part.
    pub(super) fn new(shared: Arc<Shared>, number: usize) -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        // Exclusively: a request wakes one thread, not all.
        epoll::add(&epoll, &shared.device, EventData::new_u64(0), EventFlags::IN | EventFlags::EXCLUSIVE)?;
        epoll::add(&epoll, &shared.wake, EventData::new_u64(1), EventFlags::IN)?;
        let buffers = Buffers { pages: PageBuffer::new(shared.max_read.max(LONGEST_XATTR)), text: Vec::new() };
        // Not zeroes, which would be memory that is not there yet: where a process is killed while the kernel brings it in for a request,
        // the request would fail instead of waiting for the successor.
        let request = vec![u8::MAX; REQUEST_BUFFER];
        Ok(Self { shared, number, epoll, request, buffers })
    }

    /// Serves until told to stop, or until the kernel ends the connection.
    pub(super) fn run(mut self) -> Ended {
        while !self.shared.stop.load(Ordering::Acquire) {
            match self.shared.device.read(&mut self.request) {
                Ok(length) => self.handle(length),
                Err(Errno::AGAIN) => self.wait(),
                // The request was withdrawn while it was read.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(Errno::NODEV) => return Ended::Unmounted,
                Err(Errno::CONNABORTED) => return Ended::Aborted,
                Err(error) => {
                    tracing::error!(%error, "/dev/fuse cannot be read; a FUSE filesystem is served no more");
                    return Ended::Aborted;
                }
            }
        }
        Ended::Stopped
    }

    fn wait(&self) {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 2];
        if let Err(error) = epoll::wait(&self.epoll, &mut events, None)
            && error != Errno::INTR
        {
            tracing::error!(%error, "a thread of a FUSE filesystem cannot wait");
            thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn handle(&mut self, length: usize) {
        let shared = &*self.shared;
        let request = match Request::parse(self.request.get(..length).unwrap_or_default()) {
            Ok(request) => request,
            Err(error) => {
                tracing::error!(%error, "a FUSE request makes no sense");
                if let RequestError::Body { unique, .. } = error {
                    shared.device.refuse(unique, Errno::INVAL);
                }
                return;
            }
        };
        let (unique, opcode) = (request.header.unique, request.header.opcode);
        let busy = shared.busy.get(self.number);
        if let Some(busy) = busy {
            busy.pid.store(request.header.pid, Ordering::Relaxed);
            busy.unique.store(unique, Ordering::Release);
        }
        let buffers = &mut self.buffers;
        // What a panic leaves in the buffers is overwritten by the next request; the filesystem has to keep its own state whole.
        let result = catch_unwind(AssertUnwindSafe(|| shared.dispatch(&request, buffers)));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => shared.device.refuse(unique, error),
            Err(_) => {
                tracing::error!(opcode, "a FUSE filesystem panicked; the request gets an I/O error");
                shared.device.refuse(unique, Errno::IO);
            }
        }
        if let Some(busy) = busy {
            busy.unique.store(0, Ordering::Release);
        }
    }
}

impl Shared {
    /// Answers a request; an error is still to be answered.
    fn dispatch(&self, request: &Request<'_>, buffers: &mut Buffers) -> Result<(), Errno> {
        let header = &request.header;
        let inode = Inode(header.node);
        match request.operation {
            Operation::Lookup { name } => self.lookup(header, name),
            Operation::Attributes => self.attributes(header),
            Operation::ReadLink => {
                buffers.text.clear();
                self.filesystem.read_link(inode, &mut buffers.text)?;
                self.answer(header, &buffers.text)
            }
            Operation::Open => self.open(header),
            Operation::OpenDirectory if self.flags & wire::NO_OPENDIR_SUPPORT != 0 => Err(Errno::NOSYS),
            Operation::OpenDirectory => self.opened(header, wire::OPEN_KEEP_CACHE | wire::OPEN_CACHE_DIR),
            Operation::Read { offset, size } => {
                let buffer = buffers.pages.first(size).ok_or(Errno::INVAL)?;
                let reply = ReadReply::new(&self.device, header.unique, buffer);
                self.filesystem.read(inode, offset, reply).map(drop)
            }
            Operation::ReadDirectory { offset, size, plus } => {
                let room = size.min(buffers.pages.length());
                let room = buffers.pages.first(room).ok_or(Errno::INVAL)?;
                let mut entries = Entries::new(room, plus, self.filesystem.timeouts());
                self.filesystem.list(inode, offset, &mut entries)?;
                self.answer(header, entries.finish())
            }
            Operation::Statfs => self.answer(header, self.filesystem.statistics().to_wire().as_bytes()),
            Operation::GetXattr { name, size } => {
                buffers.text.clear();
                self.filesystem.xattr(inode, name, &mut buffers.text)?;
                self.xattr(header, size, &buffers.text)
            }
            Operation::ListXattr { size } => {
                buffers.text.clear();
                self.filesystem.xattr_names(inode, &mut XattrNames(&mut buffers.text))?;
                self.xattr(header, size, &buffers.text)
            }
            Operation::Release | Operation::Destroy => self.answer(header, &[]),
            // These three are not answered.
            Operation::Forget { lookups } => {
                self.filesystem.forget(inode, lookups);
                Ok(())
            }
            Operation::BatchForget(inodes) => {
                forgotten(inodes).for_each(|one| self.filesystem.forget(Inode(one.node), one.lookups));
                Ok(())
            }
            Operation::Interrupt { unique } => {
                self.interrupt(unique);
                Ok(())
            }
            Operation::Init { .. } => Err(Errno::PROTO),
            Operation::Unknown => Err(Errno::NOSYS),
        }
    }

    fn answer(&self, header: &InHeader, bytes: &[u8]) -> Result<(), Errno> {
        self.device.answer(header.unique, &[IoSlice::new(bytes)]);
        Ok(())
    }

    fn lookup(&self, header: &InHeader, name: &[u8]) -> Result<(), Errno> {
        let timeouts = self.filesystem.timeouts();
        let entry = match self.filesystem.lookup(Inode(header.node), name) {
            Ok(found) => found.to_entry(timeouts),
            // An entry of inode 0 is an absence that the kernel may remember.
            Err(Errno::NOENT) if !timeouts.absent.is_zero() => EntryOut {
                entry_valid: timeouts.absent.as_secs(),
                entry_valid_nanos: timeouts.absent.subsec_nanos(),
                ..zerocopy::FromZeros::new_zeroed()
            },
            Err(error) => return Err(error),
        };
        self.answer(header, entry.as_bytes())
    }

    fn attributes(&self, header: &InHeader) -> Result<(), Errno> {
        let timeout = self.filesystem.timeouts().attributes;
        let attributes = self.filesystem.attributes(Inode(header.node))?.to_wire();
        let out = AttrOut { valid: timeout.as_secs(), valid_nanos: timeout.subsec_nanos(), padding: 0, attributes };
        self.answer(header, out.as_bytes())
    }

    fn open(&self, header: &InHeader) -> Result<(), Errno> {
        match self.filesystem.open(Inode(header.node))? {
            Open::Unneeded if self.flags & wire::NO_OPEN_SUPPORT != 0 => Err(Errno::NOSYS),
            Open::Unneeded | Open::Cached => self.opened(header, wire::OPEN_KEEP_CACHE),
            Open::Direct => self.opened(header, wire::OPEN_DIRECT_IO),
        }
    }

    fn opened(&self, header: &InHeader, flags: u32) -> Result<(), Errno> {
        self.answer(header, OpenOut { handle: 0, flags, backing: 0 }.as_bytes())
    }

    fn xattr(&self, header: &InHeader, size: usize, bytes: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
        if size == 0 {
            return self.answer(header, XattrOut { size: length, padding: 0 }.as_bytes());
        }
        if bytes.len() > size {
            return Err(Errno::RANGE);
        }
        self.answer(header, bytes)
    }

    /// A signal came for who waits for a request. One that kills is answered in the request's place, so that the process need not wait
    /// for, say, a network: the answer that comes later is to nobody. Any other signal changes nothing: programs do not expect a file's
    /// read to fail by one.
    fn interrupt(&self, unique: u64) {
        // Its thread may have read it just now and not have said so yet.
        for _ in 0..100 {
            if let Some(busy) = self.busy.iter().find(|busy| busy.unique.load(Ordering::Acquire) == unique) {
                if is_dying(busy.pid.load(Ordering::Relaxed)) {
                    self.device.refuse(unique, Errno::INTR);
                }
                return;
            }
            thread::yield_now();
        }
    }
}

/// Whether SIGKILL is on its way to a thread; every deadly signal becomes one.
fn is_dying(pid: u32) -> bool {
    const KILL: u64 = 1 << (9 - 1);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & KILL != 0))
}

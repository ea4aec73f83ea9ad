//! A queue: requests come, data goes, answers go.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};
use zerocopy::IntoBytes as _;

use super::{Descriptor, DeviceId, MAX_DEPTH, QueueCommand, READ_WRITE, SECTOR, command, padded};

const FETCH: u32 = command(READ_WRITE, 0x20, size_of::<QueueCommand>());
const COMMIT_AND_FETCH: u32 = command(READ_WRITE, 0x21, size_of::<QueueCommand>());

/// What a command ends with when there will be no more requests of its tag.
const ABORTED: i32 = -libc::ENODEV;

/// Where the data of requests begins.
const DATA: u64 = 1 << 31;
const TAG_SHIFT: u32 = 25;
const QUEUE_SHIFT: u32 = 41;
const FUA: u32 = 1 << 13;
const NO_UNMAP: u32 = 1 << 15;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Blocks are to be read.
    Read,
    /// Blocks are to be written.
    Write,
    /// All that was written is to be made durable.
    Flush,
    /// A range is not needed any more.
    Discard,
    /// A range is to read as zeroes.
    WriteZeroes,
    /// Something that we did not offer.
    Other(u8),
}

/// A request. It is answered once, by [`Queue::complete`].
#[derive(Debug)]
pub struct Request {
    tag: u16,
    /// What is asked for.
    pub operation: Operation,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u64,
    /// Whether it is to be durable when it is answered.
    pub fua: bool,
    /// Whether the space of zeroes is to be kept.
    pub no_unmap: bool,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// There are requests.
    Requests,
    /// There will be none any more: the device was stopped.
    Ended,
}

/// The data of requests of a queue, for whichever thread.
#[derive(Debug)]
pub struct Data<'a> {
    file: &'a File,
    queue: u16,
}

/// The character device, which the kernel lets be opened once: its queues share it.
#[derive(Clone, Debug)]
pub struct Channel(Arc<File>);

impl Channel {
    /// Opens that of a device.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open(device: DeviceId) -> io::Result<Self> {
        let path = device.served();
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self(Arc::new(file)))
    }
}

/// A queue of a device, served by the thread that opened it.
pub struct Queue {
    ring: IoUring<squeue::Entry128>,
    file: Arc<File>,
    descriptors: Descriptors,
    number: u16,
    depth: u16,
    /// Tags of which there may be more requests.
    alive: u16,
    /// A queue stays on its thread: the kernel takes commands from no other.
    _on_its_thread: std::marker::PhantomData<*const ()>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ublk queue {}", self.number)
    }
}

impl Queue {
    /// Opens queue `number` of a device that was added with this `depth`, and asks for the first request of each tag.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open(channel: Channel, number: u16, depth: u16) -> io::Result<Self> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let Channel(file) = channel;
        let descriptors = Descriptors::map(&file, number, depth)?;
        let ring = IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(u32::from(depth))?;
        let mut queue =
            Self { ring, file, descriptors, number, depth, alive: depth, _on_its_thread: std::marker::PhantomData };
        for tag in 0..depth {
            queue.push(FETCH, tag, 0)?;
        }
        queue.submit()?;
        Ok(queue)
    }

    /// Waits for requests, after handing over the answers that were given, and adds all that there are to `requests`.
    ///
    /// # Errors
    /// The kernel's answer; then the queue cannot be served any more.
    pub fn wait(&mut self, requests: &mut Vec<Request>) -> io::Result<Waited> {
        while requests.is_empty() {
            if self.alive == 0 {
                return Ok(Waited::Ended);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            let completed = self.ring.completion();
            for entry in completed {
                let entry: cqueue::Entry = entry;
                let tag = u16::try_from(entry.user_data()).ok().filter(|tag| *tag < self.depth);
                let Some(tag) = tag else {
                    return Err(io::Error::other("the kernel answered a command that nobody gave"));
                };
                if entry.result() == 0 {
                    requests.push(self.descriptors.request(tag));
                    continue;
                }
                self.alive = self.alive.saturating_sub(1);
                if entry.result() != ABORTED {
                    let error = io::Error::from_raw_os_error(-entry.result());
                    tracing::error!(queue = self.number, tag, %error, "ublk took no command; the tag is lost");
                }
            }
        }
        Ok(Waited::Requests)
    }

    /// The data of requests.
    pub fn data(&self) -> Data<'_> {
        Data { file: &self.file, queue: self.number }
    }

    /// Answers a request: how many bytes were done, or an error number. The answer goes with the next [`wait`](Self::wait) or
    /// [`submit`](Self::submit).
    ///
    /// # Errors
    /// Never where every request is answered once.
    pub fn complete(&mut self, request: Request, result: Result<(), i32>) -> io::Result<()> {
        let done = match (request.operation, result) {
            (Operation::Read | Operation::Write, Ok(())) => i32::try_from(request.length).map_err(io::Error::other)?,
            (_, Ok(())) => 0,
            (_, Err(number)) => -number.abs(),
        };
        self.push(COMMIT_AND_FETCH, request.tag, done)
    }

    /// Hands over the answers that were given, without waiting for requests.
    ///
    /// # Errors
    /// The kernel's answer; then the queue cannot be served any more.
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    fn push(&mut self, operation: u32, tag: u16, result: i32) -> io::Result<()> {
        let header = QueueCommand { queue: self.number, tag, result, address: 0 };
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), operation)
            .cmd(padded(header.as_bytes()))
            .build()
            .user_data(u64::from(tag));
        // SAFETY: the command's bytes are copied into the ring, and it names no memory: data is copied by pread and pwrite. The
        // descriptor is that of `file`, which is as old as the ring.
        #[expect(unsafe_code, reason = "io_uring commands may carry addresses")]
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::other("a ublk request was answered more than once"))
    }
}

impl Data<'_> {
    fn at(&self, request: &Request) -> u64 {
        DATA + (u64::from(self.queue) << QUEUE_SHIFT) + (u64::from(request.tag) << TAG_SHIFT)
    }

    /// Fetches what a request wants to write; `buffer` is as long as the request.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn fetch(&self, request: &Request, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.at(request))
    }

    /// Gives a request what it wants to read; `data` is as long as the request.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn give(&self, request: &Request, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.at(request))
    }
}

/// The descriptions of a queue's requests, in memory that the kernel writes.
struct Descriptors {
    start: NonNull<Descriptor>,
    bytes: usize,
    depth: u16,
}

impl Descriptors {
    fn map(file: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let bytes = (usize::from(depth) * size_of::<Descriptor>()).next_multiple_of(page);
        // Queues lie as far apart as one of the greatest depth that the kernel has would need.
        let apart = (4096 * size_of::<Descriptor>()).next_multiple_of(page);
        let offset = libc::off_t::try_from(usize::from(queue) * apart).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice, checked below, touches nothing that exists.
        #[expect(unsafe_code, reason = "the descriptions of requests are shared memory")]
        let start = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, file.as_raw_fd(), offset)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, bytes, depth })
    }

    /// The request of a tag, whose command has just ended: the kernel changes it no more until it is answered.
    fn request(&self, tag: u16) -> Request {
        assert!(tag < self.depth, "tags are checked where they come in");
        // SAFETY: the mapping holds `depth` descriptors from its start, which is aligned to a page, and `tag` is less. It is read as
        // volatile, since the kernel writes it, and as a struct of integers, for which any bytes are valid.
        #[expect(unsafe_code, reason = "the descriptions of requests are shared memory")]
        let found = unsafe { self.start.add(usize::from(tag)).as_ptr().read_volatile() };
        let operation = match found.operation & 0xff {
            0 => Operation::Read,
            1 => Operation::Write,
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes,
            other => Operation::Other(u8::try_from(other).unwrap_or(u8::MAX)),
        };
        Request {
            tag,
            operation,
            offset: found.first_sector.saturating_mul(SECTOR),
            length: u64::from(found.sectors) * SECTOR,
            fua: found.operation & FUA != 0,
            no_unmap: found.operation & NO_UNMAP != 0,
        }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this start and length, and nothing borrows from it: requests are copies.
        #[expect(unsafe_code, reason = "the descriptions of requests are shared memory")]
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.bytes);
        }
    }
}

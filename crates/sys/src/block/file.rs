//! A store in a regular file or on a block device.

use std::{
    fmt,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, Page, Progress, ReadRequest, WriteRequest, check_range};
use rustix::{fs::FallocateFlags, io::Errno};

use super::{
    Access, StoreError, check_size,
    job::Job,
    medium::{self, Medium},
    noise::{Noise, STEP},
    way::Way,
};

/// Blocks of the buffer through which direct I/O goes where the caller's own is not aligned: 256 KiB.
const BOUNCE_BLOCKS: usize = 64;

/// How a [`FileStore`] is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    /// By which way it is reached.
    pub access: Access,
    /// It takes no writes, and others may read it at the same time.
    pub read_only: bool,
}

/// A store in a regular file or on a block device.
///
/// It holds a lock for as long as it is open. Requests from several threads run at the same time; several requests that are handed over
/// at once are in flight together where that is faster ([`describe`](BlockStore::describe) says how).
pub struct FileStore {
    path: PathBuf,
    file: OwnedFd,
    medium: Medium,
    way: Way,
    read_only: bool,
    size: AtomicU64,
    growing: Mutex<()>,
    /// What the first failed flush said.
    broken: OnceLock<BlockError>,
    /// The medium cannot give up blocks; it was tried.
    keeps_blocks: AtomicBool,
}

impl FileStore {
    /// Opens the file or device `path` and locks it.
    ///
    /// # Errors
    /// [`StoreError`]: not there, in use, neither file nor device, or no whole number of blocks.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let (file, medium, bytes) = medium::open(path, options.read_only)?;
        let size = medium::whole_blocks(bytes);
        if size == 0 {
            return Err(StoreError::not_a_store(path, format!("its {bytes} bytes are less than a block of 4096")));
        }
        // A device may have a few sectors more than its blocks; a file has no reason to: somebody cut it.
        if matches!(medium, Medium::File(_)) && size != bytes {
            return Err(StoreError::not_a_store(path, format!("its {bytes} bytes are not whole blocks of 4096")));
        }
        Self::with(path, file, medium, size, options)
    }

    /// Makes the file `path` of `size` bytes and opens it.
    ///
    /// With `preallocate`, all of it is written once, with [noise](Self::fill): later writes then allocate nothing, and what was
    /// never used looks like what was. Without, it is sparse, and shows which places were written.
    ///
    /// # Errors
    /// [`StoreError`]: there already, an impossible size, no space. Then nothing is left of it.
    pub fn create(
        path: impl AsRef<Path>,
        size: u64,
        preallocate: bool,
        options: FileOptions,
        progress: &dyn Progress,
    ) -> Result<Self, StoreError> {
        let path = path.as_ref();
        check_size(size)?;
        let (file, medium) = medium::create(path)?;
        let made = Self::make(path, file, medium, size, preallocate, options, progress);
        if made.is_err() {
            // It is ours: it was made, and locked, a moment ago. Whatever else fails now, the first error is the one to tell.
            let _ = rustix::fs::unlink(path);
        }
        made
    }

    fn make(
        path: &Path,
        file: OwnedFd,
        medium: Medium,
        size: u64,
        preallocate: bool,
        options: FileOptions,
        progress: &dyn Progress,
    ) -> Result<Self, StoreError> {
        if preallocate {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
                // Writing it will do as well, if not in one piece.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(StoreError::io("find space for", path, error)),
            }
        }
        rustix::fs::ftruncate(&file, size).map_err(|error| StoreError::io("set the size of", path, error))?;
        let store = Self::with(path, file, medium, size, FileOptions { read_only: false, ..options })?;
        if preallocate {
            store.fill(progress).map_err(|source| StoreError::Fill { path: path.to_owned(), source })?;
        }
        rustix::fs::fsync(&store.file).map_err(|error| StoreError::io("write back", path, error))?;
        medium::sync_parent(path).map_err(|error| StoreError::io("write back the directory of", path, error))?;
        Ok(store)
    }

    fn with(path: &Path, file: OwnedFd, medium: Medium, size: u64, options: FileOptions) -> Result<Self, StoreError> {
        let way = Way::find(options.access, &file, medium)
            .map_err(|error| StoreError::io("use O_DIRECT (direct access was asked for) on", path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            medium,
            way,
            read_only: options.read_only,
            size: AtomicU64::new(size),
            growing: Mutex::new(()),
            broken: OnceLock::new(),
            keeps_blocks: AtomicBool::new(false),
        })
    }

    /// Overwrites all of it with bytes that nobody can tell from ciphertext, for a device that is to become a secure disk.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn fill(&self, progress: &dyn Progress) -> Result<(), BlockError> {
        let size = self.size();
        let task = progress.begin(&format!("filling {}", self.path.display()), Some(size));
        let mut noise = Noise::new();
        let mut offset = 0;
        while offset < size {
            let pages = noise.next();
            let count = usize::try_from((size - offset).min(STEP as u64)).unwrap_or(STEP) / BLOCK_SIZE;
            let buffers = pages.iter().take(count).map(|page| page.0.as_slice()).collect();
            self.write_many(&[WriteRequest { offset, buffers }])?;
            offset += (count * BLOCK_SIZE) as u64;
            task.advance((count * BLOCK_SIZE) as u64);
        }
        self.flush()?;
        task.done("filled");
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<(), BlockError> {
        if self.read_only && op != "read" {
            return Err(BlockError::ReadOnly(format!("{} was opened so", self.path.display())));
        }
        check_range(op, offset, length, self.size())
    }

    fn error(&self, op: &'static str, offset: u64, length: u64, error: io::Error) -> BlockError {
        if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
            return BlockError::ReadOnly(format!("{}: {error}", self.path.display()));
        }
        let kind = error.kind();
        let named = io::Error::new(kind, format!("{}: {error}", self.path.display()));
        BlockError::io(op, offset, length, named)
    }

    /// Reads through aligned memory.
    fn read_bounced(&self, mut offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let blocks = (buffer.len() / BLOCK_SIZE).min(BOUNCE_BLOCKS);
        let mut pages = vec![*Page::zeroed(); blocks];
        for part in buffer.chunks_mut(BOUNCE_BLOCKS * BLOCK_SIZE) {
            let count = part.len() / BLOCK_SIZE;
            let slices = pages.iter_mut().take(count).map(|page| IoSliceMut::new(&mut page.0)).collect();
            Job::read(self.file.as_fd(), offset, slices).run()?;
            for (block, page) in part.chunks_mut(BLOCK_SIZE).zip(&pages) {
                block.copy_from_slice(&page.0);
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Writes through aligned memory.
    fn write_bounced(&self, mut offset: u64, buffers: &[&[u8]]) -> io::Result<()> {
        let all = buffers.iter().map(|buffer| buffer.len() / BLOCK_SIZE).sum::<usize>();
        let mut blocks = buffers.iter().flat_map(|buffer| buffer.chunks(BLOCK_SIZE)).peekable();
        let mut pages = vec![*Page::zeroed(); all.min(BOUNCE_BLOCKS)];
        while blocks.peek().is_some() {
            let mut count = 0;
            for (page, block) in pages.iter_mut().zip(blocks.by_ref().take(BOUNCE_BLOCKS)) {
                page.0.copy_from_slice(block);
                count += 1;
            }
            let slices = pages.iter().take(count).map(|page| IoSlice::new(&page.0)).collect();
            Job::write(self.file.as_fd(), offset, slices).run()?;
            offset += (count * BLOCK_SIZE) as u64;
        }
        Ok(())
    }

    fn write_one(&self, offset: u64, buffers: &[&[u8]]) -> io::Result<()> {
        if buffers.iter().all(|buffer| self.way.takes(buffer)) {
            let slices = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
            Job::write(self.file.as_fd(), offset, slices).run()
        } else {
            self.write_bounced(offset, buffers)
        }
    }

    /// Several checked writes at once, by direct I/O. The outcome is that of the first that failed.
    fn write_together(&self, rings: &super::ring::Rings, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        let (aligned, others): (Vec<_>, Vec<_>) =
            requests.iter().partition(|request| request.buffers.iter().all(|buffer| self.way.takes(buffer)));
        let mut jobs: Vec<Job<'_>> = aligned
            .iter()
            .map(|request| {
                Job::write(
                    self.file.as_fd(),
                    request.offset,
                    request.buffers.iter().map(|buffer| IoSlice::new(buffer)).collect(),
                )
            })
            .collect();
        let given_up = rings.run(&mut jobs).err();
        for (request, job) in aligned.iter().zip(jobs) {
            job.into_outcome(given_up.as_ref())
                .map_err(|error| self.error("write", request.offset, request.length(), error))?;
        }
        for request in others {
            self.write_one(request.offset, &request.buffers)
                .map_err(|error| self.error("write", request.offset, request.length(), error))?;
        }
        Ok(())
    }

    /// Asks the medium to zero a range without being sent the zeroes; says whether it did.
    fn zero_in_place(&self, offset: u64, length: u64) -> Result<bool, Errno> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        for way in [zero, punch] {
            match rustix::fs::fallocate(&self.file, way, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

impl BlockStore for FileStore {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let length = buffer.len() as u64;
        self.check("read", offset, length)?;
        let read = if self.way.takes(buffer) {
            Job::read(self.file.as_fd(), offset, vec![IoSliceMut::new(buffer)]).run()
        } else {
            self.read_bounced(offset, buffer)
        };
        read.map_err(|error| self.error("read", offset, length, error))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check("write", offset, data.len() as u64)?;
        self.write_one(offset, &[data]).map_err(|error| self.error("write", offset, data.len() as u64, error))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        if let Some(error) = self.broken.get() {
            return Err(error.clone());
        }
        loop {
            match rustix::fs::fdatasync(&self.file) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(error) => {
                    let error = self.error("flush", 0, self.size(), error.into());
                    return Err(self.broken.get_or_init(|| error).clone());
                }
            }
        }
        // Another flush may have failed meanwhile and taken the kernel's only report of what this one should have seen.
        self.broken.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("trim", offset, length)?;
        if length == 0 || self.keeps_blocks.load(Ordering::Relaxed) {
            return Ok(());
        }
        let trimmed = match self.medium {
            Medium::File(_) => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.file, punch, offset, length)
            }
            Medium::Device { .. } => medium::discard(&self.file, offset, length),
        };
        match trimmed {
            Ok(()) => Ok(()),
            // A trim is advice.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => {
                self.keeps_blocks.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(self.error("trim", offset, length, error.into())),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("write zeroes", offset, length)?;
        let in_place = length == 0
            || self
                .zero_in_place(offset, length)
                .map_err(|error| self.error("write zeroes", offset, length, error.into()))?;
        if in_place {
            return Ok(());
        }
        let page = Page::zeroed();
        let mut done = 0;
        while done < length {
            let count =
                usize::try_from((length - done) / BLOCK_SIZE as u64).unwrap_or(usize::MAX).min(STEP / BLOCK_SIZE);
            let buffers = vec![page.0.as_slice(); count];
            self.write_one(offset + done, &buffers)
                .map_err(|error| self.error("write zeroes", offset + done, (count * BLOCK_SIZE) as u64, error))?;
            done += (count * BLOCK_SIZE) as u64;
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        self.check("grow", 0, 0)?;
        let _alone = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.size();
        if size < old || check_size(size).is_err() {
            return Err(BlockError::OutOfRange { op: "grow", offset: 0, length: size, size: old });
        }
        let found = medium::size(self.medium, &self.file).map_err(|error| self.error("grow", 0, size, error))?;
        if found < old {
            let what = format!("it has {found} bytes, and had {old} when it was opened: it shrank");
            return Err(self.error("grow", 0, size, io::Error::new(io::ErrorKind::UnexpectedEof, what)));
        }
        match self.medium {
            Medium::File(_) if found < size => {
                let grown = rustix::fs::ftruncate(&self.file, size).and_then(|()| rustix::fs::fsync(&self.file));
                grown.map_err(|error| self.error("grow", 0, size, error.into()))?;
            }
            Medium::Device { .. } if found < size => {
                let path = self.path.display();
                let what = format!("the device {path} has {found} bytes: enlarge it to {size} first");
                return Err(BlockError::Unsupported(what));
            }
            Medium::File(_) | Medium::Device { .. } => {}
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        let mut jobs = Vec::new();
        let mut outcomes = Vec::new();
        let several = requests.len() > 1;
        for request in requests {
            let (offset, length) = (request.offset, request.buffer.len() as u64);
            if several && self.way.rings.is_some() && length > 0 && self.way.takes(request.buffer) {
                request.outcome = self.check("read", offset, length);
                if request.outcome.is_ok() {
                    jobs.push(Job::read(self.file.as_fd(), offset, vec![IoSliceMut::new(request.buffer)]));
                    outcomes.push((offset, length, &mut request.outcome));
                }
            } else {
                request.outcome = self.read_at(offset, request.buffer);
            }
        }
        if let Some(rings) = self.way.rings.as_ref().filter(|_| !jobs.is_empty()) {
            let given_up = rings.run(&mut jobs).err();
            for (job, (offset, length, outcome)) in jobs.into_iter().zip(outcomes) {
                let done = job.into_outcome(given_up.as_ref());
                *outcome = done.map_err(|error| self.error("read", offset, length, error));
            }
        }
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            self.check("write", request.offset, request.length())?;
            for buffer in &request.buffers {
                self.check("write", request.offset, buffer.len() as u64)?;
            }
        }
        match &self.way.rings {
            // Through the page cache a write is a copy, which nothing makes faster.
            Some(rings) if requests.len() > 1 && self.way.direct.is_some() => self.write_together(rings, requests),
            _ => requests.iter().try_for_each(|request| {
                self.write_one(request.offset, &request.buffers)
                    .map_err(|error| self.error("write", request.offset, request.length(), error))
            }),
        }
    }

    fn is_slow(&self) -> bool {
        !self.medium.in_memory()
    }

    fn describe(&self) -> String {
        let read_only = if self.read_only { ", read-only" } else { "" };
        format!("{} {} ({}{read_only})", self.medium.name(), self.path.display(), self.way.describe())
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileStore").field(&self.describe()).finish()
    }
}

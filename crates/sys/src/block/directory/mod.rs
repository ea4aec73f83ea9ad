//! A store in a directory of segment files, for shares of a host (virtio-fs, 9p, NFS): files of a moderate size can be copied, synced and
//! backed up one by one, and trimmed room is given back on filesystems that know no holes.
//!
//! # Layout
//! - `nacre-segments.json`: format, version, size of the store and of a segment. It is replaced by renaming, never written in place.
//! - `segment-00000000` and so on (eight hexadecimal digits): segment *n* holds the bytes from *n* × segment size on.
//! - `nacre.lock`: an empty file that is locked (flock) while the store is open.
//!
//! The page is docs/formats/segment-directory.md.
//!
//! # What is not there reads as zeroes
//! A segment whose file is missing, and what lies beyond the end of a file, reads as zeroes; so an empty store is an empty directory, and
//! trimming a segment removes its file. Whoever controls the directory can make zeroes of data by removing a file, but could as well
//! have written zeroes into it: the layer above authenticates every block that it reads, and zeroes are not what it wrote. A store
//! must never stand beneath something that takes its zeroes on trust.
//!
//! # Invariants
//! - Files are opened by names made here, relative to the open directory, never through a symbolic link, and only as regular files.
//! - A file is in the set of dirty ones before the write to it returns; a flush syncs all of those, then the directory if names changed.

mod descriptor;
mod files;

use std::{
    fmt,
    io::{self, IoSlice},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, ReadRequest, WriteRequest, check_range};
use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    io::Errno,
};

use self::{descriptor::Descriptor, files::Files};
use super::{StoreError, job::Job, medium, ring::Rings};
use crate::fs::FsKind;

/// The name of the file that is locked.
const LOCK: &str = "nacre.lock";

/// How a [`DirectoryStore`] is made or opened.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryOptions {
    /// Bytes of a segment of a new store: whole blocks, from 1 MiB to 1 GiB. A store that is there keeps its own.
    pub segment_size: u64,
    /// It takes no writes, and others may read it at the same time.
    pub read_only: bool,
}

impl Default for DirectoryOptions {
    fn default() -> Self {
        Self { segment_size: 64 << 20, read_only: false }
    }
}

/// A store in a directory of segment files.
pub struct DirectoryStore {
    path: PathBuf,
    files: Files,
    _lock: OwnedFd,
    filesystem: FsKind,
    rings: Option<Rings>,
    read_only: bool,
    segment_size: u64,
    size: AtomicU64,
    growing: Mutex<()>,
    /// What the first failed flush said.
    broken: OnceLock<BlockError>,
}

/// A part of a request: so many bytes of one segment, and where in it.
struct Part {
    number: u64,
    offset: u64,
    length: u64,
}

impl DirectoryStore {
    /// Makes a store of `size` bytes in the directory `path`, which is made where it is missing, and is empty otherwise.
    ///
    /// # Errors
    /// [`StoreError`]: something is there already, sizes that cannot be, or the system refuses.
    pub fn create(path: impl AsRef<Path>, size: u64, options: DirectoryOptions) -> Result<Self, StoreError> {
        let path = path.as_ref();
        super::check_size(size)?;
        let descriptor = Descriptor { size, segment_size: options.segment_size }
            .check()
            .map_err(|what| StoreError::not_a_store(path, what))?;
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) => medium::sync_parent(path).map_err(|e| StoreError::io("write back the directory of", path, e))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(StoreError::io("create", path, error)),
        }
        let directory = open_directory(path)?;
        let mut entries = std::fs::read_dir(path).map_err(|error| StoreError::io("list", path, error))?;
        if entries.next().is_some() {
            return Err(StoreError::Exists(path.to_owned()));
        }
        let lock = lock(path, &directory, false)?;
        descriptor.save(&directory).map_err(|error| StoreError::io("describe", path, error))?;
        Self::with(path, directory, lock, descriptor, false)
    }

    /// Opens the store in the directory `path` and locks it.
    ///
    /// # Errors
    /// [`StoreError`]: not there, in use, or its descriptor is not understood.
    pub fn open(path: impl AsRef<Path>, options: DirectoryOptions) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let directory = open_directory(path)?;
        let load = || match Descriptor::load(&directory) {
            Ok(Some(Ok(descriptor))) => Ok(descriptor),
            Ok(Some(Err(what))) => Err(StoreError::not_a_store(path, what)),
            Ok(None) => Err(StoreError::not_a_store(path, format!("there is no {} in it", descriptor::NAME))),
            Err(error) => Err(StoreError::io("read the descriptor of", path, error)),
        };
        load()?; // so that nothing is made in a directory that is none of ours
        let lock = lock(path, &directory, options.read_only)?;
        let descriptor = load()?;
        Self::with(path, directory, lock, descriptor, options.read_only)
    }

    fn with(
        path: &Path,
        directory: OwnedFd,
        lock: OwnedFd,
        descriptor: Descriptor,
        read_only: bool,
    ) -> Result<Self, StoreError> {
        let stat = rustix::fs::fstatfs(&directory).map_err(|e| StoreError::io("find the filesystem of", path, e))?;
        let filesystem = crate::fs::kind_of(&stat);
        // Without io_uring requests go one after the other.
        let rings = if filesystem.in_memory() { None } else { Rings::new().ok() };
        Ok(Self {
            path: path.to_owned(),
            files: Files::new(directory, read_only),
            _lock: lock,
            filesystem,
            rings,
            read_only,
            segment_size: descriptor.segment_size,
            size: AtomicU64::new(descriptor.size),
            growing: Mutex::new(()),
            broken: OnceLock::new(),
        })
    }

    /// Whether the directory `path` has the descriptor of such a store.
    pub fn is_there(path: impl AsRef<Path>) -> bool {
        path.as_ref().join(descriptor::NAME).symlink_metadata().is_ok_and(|found| found.is_file())
    }

    /// Bytes of a segment.
    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<(), BlockError> {
        if self.read_only && op != "read" {
            return Err(BlockError::ReadOnly(format!("{} was opened so", self.path.display())));
        }
        check_range(op, offset, length, self.size())
    }

    fn error(&self, op: &'static str, offset: u64, length: u64, error: io::Error) -> BlockError {
        let path = self.path.display();
        match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => BlockError::ReadOnly(format!("{path}: {error}")),
            kind => {
                let number = offset / self.segment_size;
                let named = io::Error::new(kind, format!("{path}/{}: {error}", files::name(number)));
                BlockError::io(op, offset, length, named)
            }
        }
    }

    /// The parts of a request, segment by segment.
    fn parts(&self, mut offset: u64, length: u64) -> impl Iterator<Item = Part> + use<> {
        let (size, end) = (self.segment_size, offset + length);
        std::iter::from_fn(move || {
            let inside = offset % size;
            let part = Part { number: offset / size, offset: inside, length: (size - inside).min(end - offset) };
            offset += part.length;
            (part.length > 0).then_some(part)
        })
    }

    /// Carries out reads; without an outcome for each it would be one.
    fn read_all(&self, requests: &mut [(u64, &mut [u8], &mut Result<(), BlockError>)]) {
        // The files stay open as long as the jobs that borrow them.
        let mut pieces = Vec::new();
        for (index, (offset, buffer, outcome)) in requests.iter_mut().enumerate() {
            let (offset, length) = (*offset, buffer.len() as u64);
            **outcome = self.check("read", offset, length);
            if outcome.is_err() {
                continue;
            }
            let mut rest: &mut [u8] = buffer;
            for part in self.parts(offset, length) {
                let (piece, after) =
                    rest.split_at_mut(usize::try_from(part.length).unwrap_or(usize::MAX).min(rest.len()));
                rest = after;
                match self.files.find(part.number) {
                    Ok(Some(file)) => pieces.push((index, part, file, piece)),
                    Ok(None) => piece.fill(0),
                    Err(error) => **outcome = Err(self.error("read", offset, length, error)),
                }
            }
        }
        let mut jobs = Vec::with_capacity(pieces.len());
        for (index, part, file, piece) in &mut pieces {
            jobs.push((*index, Job::read_endless((**file).as_fd(), part.offset, piece)));
        }
        let failed: Vec<(usize, io::Error)> = match &self.rings {
            Some(rings) if jobs.len() > 1 => {
                let (indices, mut jobs): (Vec<usize>, Vec<Job<'_>>) = jobs.into_iter().unzip();
                let given_up = rings.run(&mut jobs).err();
                let outcomes = jobs.into_iter().map(|job| job.into_outcome(given_up.as_ref()));
                indices.into_iter().zip(outcomes).filter_map(|(index, outcome)| Some((index, outcome.err()?))).collect()
            }
            _ => jobs.into_iter().filter_map(|(index, job)| Some((index, job.run().err()?))).collect(),
        };
        for (index, error) in failed {
            if let Some((offset, buffer, outcome)) = requests.get_mut(index) {
                **outcome = Err(self.error("read", *offset, buffer.len() as u64, error));
            }
        }
    }

    fn write_one(&self, request: &WriteRequest<'_>) -> Result<(), BlockError> {
        let (offset, length) = (request.offset, request.length());
        let fail = |error| self.error("write", offset, length, error);
        let mut blocks = request.buffers.iter().flat_map(|buffer| buffer.chunks(BLOCK_SIZE));
        let mut whole = Some(&request.buffers);
        for part in self.parts(offset, length) {
            // Mostly a request lies in one segment, and its buffers go as they are.
            let slices = match whole.take().filter(|_| part.length == length) {
                Some(buffers) => buffers.iter().map(|buffer| IoSlice::new(buffer)).collect(),
                None => {
                    let count = usize::try_from(part.length).unwrap_or(usize::MAX) / BLOCK_SIZE;
                    blocks.by_ref().take(count).map(IoSlice::new).collect()
                }
            };
            let file = self.files.make(part.number).map_err(fail)?;
            Job::write(file.as_fd(), part.offset, slices).run().map_err(fail)?;
            self.wrote(part.number, &file)?;
        }
        Ok(())
    }

    fn wrote(&self, number: u64, file: &Arc<OwnedFd>) -> Result<(), BlockError> {
        self.files.wrote(number, file).map_err(|error| self.flush_failed(error))
    }

    /// Remembers that something that was written is lost.
    fn flush_failed(&self, error: io::Error) -> BlockError {
        let error = BlockError::io(
            "flush",
            0,
            self.size(),
            io::Error::new(error.kind(), format!("{}: {error}", self.path.display())),
        );
        self.broken.get_or_init(|| error).clone()
    }

    /// Makes part of a segment zeroes, where its file is there.
    fn zero(&self, part: &Part, file: &Arc<OwnedFd>) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, punch, part.offset, part.length) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
        let zeroes = [0; 16 * BLOCK_SIZE];
        let end = part.offset + part.length;
        let mut offset = part.offset;
        while offset < end {
            let count = usize::try_from(end - offset).unwrap_or(usize::MAX).min(zeroes.len());
            let slice = zeroes.get(..count).unwrap_or(&zeroes);
            Job::write(file.as_fd(), offset, vec![IoSlice::new(slice)]).run()?;
            offset += slice.len() as u64;
        }
        Ok(())
    }
}

impl BlockStore for DirectoryStore {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut outcome = Ok(());
        self.read_all(&mut [(offset, buffer, &mut outcome)]);
        outcome
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.write_many(&[WriteRequest { offset, buffers: vec![data] }])
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        if let Some(error) = self.broken.get() {
            return Err(error.clone());
        }
        self.files.flush().map_err(|error| self.flush_failed(error))?;
        self.broken.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("write zeroes", offset, length)?;
        let fail = |error| self.error("write zeroes", offset, length, error);
        let size = self.size();
        for part in self.parts(offset, length) {
            let here = size.saturating_sub(part.number * self.segment_size).min(self.segment_size);
            if part.length == here {
                self.files.remove(part.number).map_err(fail)?;
            } else if let Some(file) = self.files.find(part.number).map_err(fail)? {
                self.zero(&part, &file).map_err(fail)?;
                self.wrote(part.number, &file)?;
            }
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        self.check("grow", 0, 0)?;
        let _alone = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.size();
        let new = Descriptor { size, segment_size: self.segment_size };
        let Some(new) = new.check().ok().filter(|_| size >= old) else {
            return Err(BlockError::OutOfRange { op: "grow", offset: 0, length: size, size: old });
        };
        if size > old {
            new.save(self.files.directory()).map_err(|error| {
                let path = self.path.display();
                BlockError::io("grow", 0, size, io::Error::new(error.kind(), format!("{path}: {error}")))
            })?;
            self.size.store(size, Ordering::Release);
        }
        Ok(())
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        let mut requests: Vec<_> =
            requests.iter_mut().map(|request| (request.offset, &mut *request.buffer, &mut request.outcome)).collect();
        self.read_all(&mut requests);
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            self.check("write", request.offset, request.length())?;
            for buffer in &request.buffers {
                self.check("write", request.offset, buffer.len() as u64)?;
            }
        }
        // Into the page cache, where a write is a copy.
        requests.iter().try_for_each(|request| self.write_one(request))
    }

    fn is_slow(&self) -> bool {
        !self.filesystem.in_memory()
    }

    fn describe(&self) -> String {
        let how = if self.rings.is_some() { "io_uring for reads, pwrite" } else { "pread/pwrite" };
        let read_only = if self.read_only { ", read-only" } else { "" };
        let mib = self.segment_size >> 20;
        format!(
            "directory {} of segments of {mib} MiB ({how}, page cache, on {}{read_only})",
            self.path.display(),
            self.filesystem
        )
    }
}

impl fmt::Debug for DirectoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DirectoryStore").field(&self.describe()).finish()
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, StoreError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR => StoreError::not_a_store(path, "it is no directory"),
        error => StoreError::io("open", path, error),
    })
}

/// Opens the lock file and locks it. Who only reads does not need to be allowed to write.
fn lock(path: &Path, directory: &OwnedFd, read_only: bool) -> Result<OwnedFd, StoreError> {
    let flags = if read_only { OFlags::RDONLY } else { OFlags::RDWR | OFlags::CREATE };
    let fd = match descriptor::open(directory, LOCK, flags) {
        Ok(Some(fd)) => fd,
        Ok(None) => return Err(StoreError::not_a_store(path, format!("there is no {LOCK} in it"))),
        Err(error) => return Err(StoreError::io("open the lock of", path, error)),
    };
    medium::lock(path, &fd, read_only)?;
    Ok(fd)
}

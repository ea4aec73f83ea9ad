//! A filesystem of one file, `disk`, which is the store.
//!
//! The file is opened with `FOPEN_DIRECT_IO`: nothing of it is in the page cache, where it would be a second time beside what the loop
//! device's user caches. With `FUSE_ASYNC_DIO` the loop device has many requests in flight, and with
//! `FOPEN_PARALLEL_DIRECT_WRITES` writes among them do not wait for each other.
//!
//! A hole punched into the file is what the kernel makes both of a discard and of zeroes that need no space. So it must read as zeroes
//! afterwards, and it is refused where the store's trim does not promise that: the kernel then discards nothing, and writes zeroes.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, WriteFlags,
};
use nacre_core::{BLOCK_SIZE, BlockError};

use super::outcome;
use crate::{
    buffer::PageBuffer,
    sectors::{Sectors, is_whole},
};

/// The name of the file.
pub(super) const NAME: &str = "disk";
const ROOT: INodeNo = INodeNo(1);
const FILE: INodeNo = INodeNo(2);

/// Requests that the kernel may have in flight: as many as a loop device has.
const IN_FLIGHT: u16 = 128;
/// Attributes are asked for each time: the size grows, and nobody asks often.
const NO_TIME: Duration = Duration::ZERO;
/// A read that is longer than this is answered in part, which the kernel knows how to handle; its requests are of 1 MiB.
const MAX_READ: u32 = 16 << 20;
/// What a thread keeps of its buffer from read to read.
const KEPT: usize = 1 << 20;

/// A block, as FUSE counts.
const BLOCK: u32 = 4096;
const _: () = assert!(BLOCK as usize == BLOCK_SIZE);

/// Of linux/falloc.h.
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;

thread_local! {
    static PAGES: RefCell<PageBuffer> = RefCell::default();
}

/// How often the file is open, and whether it was ever.
#[derive(Debug, Default)]
pub(super) struct Openings {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    open: u64,
    /// The filesystem is served no more.
    ended: bool,
}

impl State {
    fn is_over(&self) -> bool {
        self.open == 0 || self.ended
    }
}

impl Openings {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// There will be no more requests.
    pub(super) fn end(&self) {
        self.change(|state| state.ended = true);
    }

    /// Waits until nobody has the file open; it is open now.
    pub(super) fn wait_for_last_close(&self) {
        let mut state = self.state();
        while !state.is_over() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether nobody has the file open any more, which was open once.
    pub(super) fn are_over(&self) -> bool {
        self.state().is_over()
    }
}

/// The filesystem.
pub(super) struct DiskFile {
    sectors: Arc<Sectors>,
    openings: Arc<Openings>,
    read_only: bool,
    owner: (u32, u32),
    made: SystemTime,
    /// What it is called in the log.
    name: String,
}

impl DiskFile {
    pub(super) fn new(sectors: Arc<Sectors>, openings: Arc<Openings>, read_only: bool, name: String) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { sectors, openings, read_only, owner, made: SystemTime::now(), name }
    }

    fn size(&self) -> u64 {
        self.sectors.store().size()
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match inode {
            ROOT => (FileType::Directory, 0o500, 2, 0),
            FILE => (FileType::RegularFile, if self.read_only { 0o400 } else { 0o600 }, 1, self.size()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm,
            nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }

    fn outcome(&self, result: Result<(), BlockError>) -> Result<(), Errno> {
        outcome(&self.name, result).map_err(Errno::from_i32)
    }

    /// What a request reaches within the file.
    fn inside(&self, offset: u64, length: u64) -> u64 {
        length.min(self.size().saturating_sub(offset))
    }

    fn write_data(&self, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let length = self.inside(offset, data.len() as u64);
        if self.read_only {
            return Err(Errno::EROFS);
        }
        if length == 0 && !data.is_empty() {
            return Err(Errno::ENOSPC);
        }
        let length = u32::try_from(length).map_err(|_| Errno::EINVAL)?;
        let data = data.get(..length as usize).ok_or(Errno::EINVAL)?;
        self.outcome(self.sectors.write(offset, data))?;
        Ok(length)
    }

    fn allocate(&self, offset: u64, length: u64, mode: i32) -> Result<(), Errno> {
        if self.read_only {
            return Err(Errno::EROFS);
        }
        let length = self.inside(offset, length);
        match mode & !KEEP_SIZE {
            PUNCH_HOLE if self.sectors.store().trim_reads_zero() => {
                if is_whole(offset, length) {
                    self.outcome(self.sectors.trim(offset, length))
                } else {
                    self.outcome(self.sectors.write_zeroes(offset, length))
                }
            }
            ZERO_RANGE => self.outcome(self.sectors.write_zeroes(offset, length)),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(number) => reply.error(number),
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it requests come one by one: slower, not wrong. `max_write` is as large as the kernel takes already.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            tracing::warn!("the kernel's FUSE has no asynchronous direct I/O");
        }
        // Both only fail for 0.
        let _ = config.set_max_background(IN_FLIGHT);
        let _ = config.set_congestion_threshold(IN_FLIGHT);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE).filter(|_| parent == ROOT && name == NAME) {
            Some(attributes) => reply.entry(&NO_TIME, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&NO_TIME, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::ENOENT);
        }
        self.openings.change(|state| state.open += 1);
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.openings.change(|state| state.open = state.open.saturating_sub(1));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = usize::try_from(self.inside(offset, size.min(MAX_READ).into())).unwrap_or_default();
        PAGES.with_borrow_mut(|pages| {
            let buffer = pages.get(length);
            match self.outcome(self.sectors.read(offset, buffer)) {
                Ok(()) => reply.data(buffer),
                Err(number) => reply.error(number),
            }
            pages.shrink(KEPT);
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_data(offset, data) {
            Ok(written) => reply.written(written),
            Err(number) => reply.error(number),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // This is close(2), which promises nothing.
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.outcome(self.sectors.flush()));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.allocate(offset, length, mode));
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if inode != ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let entries =
            [(ROOT, FileType::Directory, "."), (ROOT, FileType::Directory, ".."), (FILE, FileType::RegularFile, NAME)];
        for (next, (inode, kind, name)) in (1..).zip(entries).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.size() / BLOCK_SIZE as u64;
        reply.statfs(blocks, 0, 0, 2, 0, BLOCK, 255, BLOCK);
    }
}

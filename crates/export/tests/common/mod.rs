//! A store that tests look into: a sparse file, with what was asked of it counted, and damage on demand.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "no test program uses all of it, and what fails here fails the test"
)]

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use nacre_core::{BlockError, BlockStore, check_range};
use rustix::fs::FallocateFlags;

pub struct FileStore {
    file: File,
    size: AtomicU64,
    pub flushes: AtomicU64,
    pub trimmed: AtomicU64,
    pub zeroed: AtomicU64,
    /// Blocks that cannot be read.
    pub damaged: Mutex<BTreeSet<u64>>,
}

impl FileStore {
    pub fn create(path: &Path, size: u64) -> Self {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        if file.metadata().unwrap().len() != size {
            file.set_len(size).unwrap();
        }
        let counter = || AtomicU64::new(0);
        Self {
            file,
            size: AtomicU64::new(size),
            flushes: counter(),
            trimmed: counter(),
            zeroed: counter(),
            damaged: Mutex::default(),
        }
    }

    pub fn grow(&self, size: u64) {
        self.file.set_len(size).unwrap();
        self.size.store(size, Ordering::SeqCst);
    }

    fn punch(&self, op: &'static str, counter: &AtomicU64, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(op, offset, length, self.size())?;
        counter.fetch_add(length, Ordering::SeqCst);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, length)
            .map_err(|error| BlockError::io(op, offset, length, error.into()))
    }
}

impl BlockStore for FileStore {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let length = buffer.len() as u64;
        check_range("read", offset, length, self.size())?;
        if let Some(first) = self.damaged.lock().unwrap().range(offset / 4096..(offset + length) / 4096).next() {
            return Err(BlockError::Integrity { first: *first, count: 1, what: "a test damaged it".into() });
        }
        self.file.read_exact_at(buffer, offset).map_err(|error| BlockError::io("read", offset, length, error))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range("write", offset, data.len() as u64, self.size())?;
        self.file.write_all_at(data, offset).map_err(|error| BlockError::io("write", offset, data.len() as u64, error))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.file.sync_data().map_err(|error| BlockError::io("flush", 0, 0, error))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.punch("trim", &self.trimmed, offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.punch("write zeroes", &self.zeroed, offset, length)
    }

    fn trim_reads_zero(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        "a test's file".into()
    }
}

/// Runs a program with these arguments, separated by spaces; its output.
#[track_caller]
pub fn sh(line: &str) -> String {
    match try_sh(line) {
        Ok(out) => out,
        Err(error) => panic!("{line}: {error}"),
    }
}

pub fn try_sh(line: &str) -> io::Result<String> {
    let output = Command::new("sh").args(["-c", line]).env("PATH", PATH).output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(io::Error::other(format!("{}: {text}", output.status))) }
}

pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes that do not compress, the same for each seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

//! A store that counts what goes through it, by its own account, and can forget data.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use nacre_core::{BlockError, BlockStore, ReadRequest, WriteRequest};

use crate::BLOCK;

/// The thread of a disk that writes index nodes and bitmap pages.
const CHECKPOINTS: &str = "disk-checkpoint";

pub(crate) struct Counting {
    store: Arc<dyn BlockStore>,
    pub(crate) written: AtomicU64,
    pub(crate) read_blocks: AtomicU64,
    pub(crate) flushes: AtomicU64,
    /// From here on, what no checkpoint writes is forgotten while this is set: it is data.
    pub(crate) forget: AtomicBool,
    pub(crate) data_start: AtomicU64,
}

impl Counting {
    pub(crate) fn new(store: Arc<dyn BlockStore>) -> Self {
        let zero = AtomicU64::default;
        let (written, read_blocks, flushes, data_start) = (zero(), zero(), zero(), zero());
        Self { store, written, read_blocks, flushes, forget: AtomicBool::new(false), data_start }
    }

    /// Whether a write is to be forgotten.
    fn forgets(&self, offset: u64) -> bool {
        self.forget.load(Relaxed)
            && offset >= self.data_start.load(Relaxed)
            && std::thread::current().name() != Some(CHECKPOINTS)
    }
}

impl BlockStore for Counting {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.read_blocks.fetch_add(buffer.len() as u64 / BLOCK, Relaxed);
        self.store.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.written.fetch_add(data.len() as u64, Relaxed);
        if self.forgets(offset) { Ok(()) } else { self.store.write_at(offset, data) }
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Relaxed);
        self.store.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.store.trim(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.written.fetch_add(length, Relaxed);
        self.store.write_zeroes(offset, length)
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        let blocks = requests.iter().map(|request| request.buffer.len() as u64 / BLOCK).sum();
        self.read_blocks.fetch_add(blocks, Relaxed);
        self.store.read_many(requests);
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        self.written.fetch_add(requests.iter().map(WriteRequest::length).sum(), Relaxed);
        if !requests.iter().any(|request| self.forgets(request.offset)) {
            return self.store.write_many(requests);
        }
        let remembered = requests.iter().filter(|request| !self.forgets(request.offset));
        let kept: Vec<_> = remembered
            .map(|request| WriteRequest { offset: request.offset, buffers: request.buffers.clone() })
            .collect();
        if kept.is_empty() { Ok(()) } else { self.store.write_many(&kept) }
    }

    fn is_slow(&self) -> bool {
        // While data are forgotten, writes are carried out by whoever made them, so that it is known which these are.
        !self.forget.load(Relaxed) && self.store.is_slow()
    }

    fn describe(&self) -> String {
        self.store.describe()
    }
}

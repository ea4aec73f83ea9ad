//! A store in memory that fails on demand, for the tests of front ends.

use std::{
    io,
    sync::{
        Condvar, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, ReadRequest, WriteRequest, check_range};

/// A store whose data are in memory. What is in one piece of `PIECE` bytes is under one lock.
pub(crate) struct Memory {
    pieces: Vec<RwLock<Vec<u8>>>,
    /// What there is of the pieces; a test may make it less, and then more again.
    pub(crate) size: AtomicU64,
    pub(crate) slow: bool,
    /// How long a read takes.
    pub(crate) delay: Duration,
    /// The error that every request to these blocks gets.
    pub(crate) broken: Mutex<Option<(std::ops::Range<u64>, BlockError)>>,
    pub(crate) flushes: AtomicUsize,
    pub(crate) writes: AtomicUsize,
    pub(crate) trimmed: AtomicU64,
    /// While set, reads wait.
    pub(crate) hold: Mutex<bool>,
    pub(crate) released: Condvar,
    pub(crate) flush_fails: AtomicBool,
    /// The most reads that came at once.
    pub(crate) most_at_once: AtomicUsize,
}

const PIECE: usize = 1 << 20;

impl Memory {
    pub(crate) fn new(size: u64) -> Self {
        assert_eq!(size % BLOCK_SIZE as u64, 0);
        let pieces = usize::try_from(size.div_ceil(PIECE as u64)).unwrap();
        Self {
            pieces: (0..pieces).map(|_| RwLock::new(Vec::new())).collect(),
            size: AtomicU64::new(size),
            slow: false,
            delay: Duration::ZERO,
            broken: Mutex::new(None),
            flushes: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            trimmed: AtomicU64::new(0),
            hold: Mutex::new(false),
            released: Condvar::new(),
            flush_fails: AtomicBool::new(false),
            most_at_once: AtomicUsize::new(0),
        }
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(op, offset, length, self.size())?;
        match &*self.broken.lock().unwrap() {
            Some((range, error)) if offset < range.end && offset + length > range.start => Err(error.clone()),
            _ => Ok(()),
        }
    }

    fn each(offset: u64, length: usize, mut each: impl FnMut(usize, usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < length {
            let at = usize::try_from(offset).unwrap() + done;
            let (piece, inside) = (at / PIECE, at % PIECE);
            let count = (PIECE - inside).min(length - done);
            each(piece, inside, done..done + count);
            done += count;
        }
    }
}

impl BlockStore for Memory {
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.check("read", offset, buffer.len() as u64)?;
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        let mut hold = self.hold.lock().unwrap();
        while *hold {
            hold = self.released.wait(hold).unwrap();
        }
        drop(hold);
        Self::each(offset, buffer.len(), |piece, inside, range| {
            let piece = self.pieces[piece].read().unwrap();
            let part = &mut buffer[range];
            match piece.is_empty() {
                true => part.fill(0),
                false => part.copy_from_slice(&piece[inside..inside + part.len()]),
            }
        });
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check("write", offset, data.len() as u64)?;
        self.writes.fetch_add(1, SeqCst);
        Self::each(offset, data.len(), |piece, inside, range| {
            let mut piece = self.pieces[piece].write().unwrap();
            if piece.is_empty() {
                *piece = vec![0; PIECE];
            }
            let part = &data[range];
            piece[inside..inside + part.len()].copy_from_slice(part);
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, SeqCst);
        if self.flush_fails.load(SeqCst) {
            return Err(BlockError::io("flush", 0, 0, io::Error::other("the medium is gone")));
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("trim", offset, length)?;
        self.trimmed.fetch_add(length, SeqCst);
        self.write_zeroes(offset, length)
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        self.most_at_once.fetch_max(requests.len(), SeqCst);
        for request in requests {
            request.outcome = self.read_at(request.offset, request.buffer);
        }
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            let mut offset = request.offset;
            for buffer in &request.buffers {
                self.write_at(offset, buffer)?;
                offset += buffer.len() as u64;
            }
        }
        Ok(())
    }

    fn is_slow(&self) -> bool {
        self.slow
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

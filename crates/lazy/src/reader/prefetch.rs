//! What a trace says will be read, fetched into the cache before it is.
//!
//! Windows of the trace, small ones first, each in as few requests as the places of its chunks in the blobs allow; two at once, so that
//! the wait for an answer is not added to each. Nothing is decoded. Reads that somebody waits for go first (see [`pace`](crate::pace)).
//!
//! A trace is the word of whoever built the image: whatever it says, each chunk of the image is fetched at most once, and no more than
//! half of what the cache may hold.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{ReadError, Reader};
use crate::{
    fetch::Wanted,
    format::{LEAF_ENTRIES, Method},
    pace::Urgency,
};

/// Stored bytes of the first window: what is read first is there soon.
const FIRST_WINDOW: u64 = 256 << 10;
/// Each window is twice as large as the one before, up to this.
const WINDOW: u64 = 2 << 20;
/// The most chunks of a window, so that tiny ones fill no memory.
const WINDOW_CHUNKS: usize = 1024;
/// Windows that are fetched at once, each with the requests of one read: while the last of one comes, the next begins.
const THREADS: usize = 2;

/// What was fetched ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// Chunks that came from the source.
    pub chunks: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Chunks that were in the cache already.
    pub cached: u64,
}

/// A trace that is followed by some threads. When the last of them is done, it is logged what came of it.
struct Follow {
    walk: Mutex<Walk>,
    failure: Mutex<Option<ReadError>>,
    chunks: AtomicU64,
    bytes: AtomicU64,
    cached: AtomicU64,
}

/// How far it was followed.
struct Walk {
    trace: std::vec::IntoIter<u64>,
    /// Chunks that were met, a bit each.
    met: Vec<u64>,
    /// Stored bytes that may still be fetched.
    left: u64,
    window: u64,
}

impl Walk {
    /// Whether a chunk is met for the first time.
    fn is_new(&mut self, number: u64) -> bool {
        let Some(word) = usize::try_from(number / 64).ok().and_then(|word| self.met.get_mut(word)) else {
            return false;
        };
        let bit = 1 << (number % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// The next chunks of the trace that are stored somewhere; none at its end.
    fn next(&mut self, reader: &Reader) -> Result<Vec<Wanted>, ReadError> {
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        while bytes < self.window
            && wanted.len() < WINDOW_CHUNKS
            && let Some(place) = self.trace.next()
        {
            let Some(leaf) = reader.table.find(place) else { continue };
            let entries = reader.leaf(leaf)?;
            let index = entries.partition_point(|entry| entry.end() <= place);
            let Some(entry) = entries.get(index).filter(|entry| entry.method != Method::Zeroes.code()) else {
                continue;
            };
            if !self.is_new(u64::from(leaf) * LEAF_ENTRIES as u64 + index as u64) {
                continue;
            }
            let stored = u64::from(entry.stored.get());
            if stored > self.left {
                tracing::info!("the rest of the trace is not fetched ahead: the cache is too small");
                self.trace = Vec::new().into_iter();
                break;
            }
            self.left -= stored;
            bytes += stored;
            wanted.push(reader.wanted(entry)?);
        }
        self.window = (self.window * 2).min(WINDOW);
        Ok(wanted)
    }
}

impl Follow {
    /// `None` where there is nothing to do: no trace, or no cache to fetch into.
    fn new(reader: &Reader, trace: Vec<u64>) -> Option<Self> {
        let left = reader.shared.fetcher.cache()?.limit() / 2;
        if trace.is_empty() {
            return None;
        }
        let met = vec![0; usize::try_from(reader.summary.chunks.get().div_ceil(64)).unwrap_or(0)];
        Some(Self {
            walk: Mutex::new(Walk { trace: trace.into_iter(), met, left, window: FIRST_WINDOW }),
            failure: Mutex::default(),
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            cached: AtomicU64::new(0),
        })
    }

    /// Fetches a window; whether there may be more. A failure ends it for all.
    fn step(&self, reader: &Reader) -> bool {
        let more = if lock(&self.failure).is_some() { Ok(false) } else { self.window(reader) };
        more.unwrap_or_else(|error| {
            *lock(&self.failure) = Some(error);
            false
        })
    }

    fn window(&self, reader: &Reader) -> Result<bool, ReadError> {
        let wanted = lock(&self.walk).next(reader)?;
        let here = reader.shared.fetcher.has(&wanted);
        let away = wanted.iter().zip(here).filter_map(|(chunk, here)| (!here).then_some(*chunk));
        let away: Vec<Wanted> = away.collect();
        reader.shared.fetcher.fetch(reader.source.as_ref(), &away, Urgency::Later)?;
        let bytes = away.iter().map(|chunk| u64::from(chunk.entry.stored.get())).sum();
        self.chunks.fetch_add(away.len() as u64, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.cached.fetch_add((wanted.len() - away.len()) as u64, Ordering::Relaxed);
        Ok(!wanted.is_empty())
    }

    fn done(&self) -> Prefetched {
        let [chunks, bytes, cached] =
            [&self.chunks, &self.bytes, &self.cached].map(|counter| counter.load(Ordering::Relaxed));
        Prefetched { chunks, bytes, cached }
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        let Prefetched { chunks, bytes, cached } = self.done();
        tracing::info!("{chunks} chunks of the trace were fetched ahead, {bytes} bytes; {cached} were there");
        if let Some(error) = lock(&self.failure).take() {
            tracing::warn!("the rest of the trace is not fetched ahead: {error}");
        }
    }
}

impl Reader {
    /// Begins to fetch into the cache, in the background, what the image's trace names, if it has one, and once only. It ends when the
    /// reader is dropped. What goes wrong is logged, and ends it: reads fetch for themselves.
    pub fn follow_trace(self: &Arc<Self>) {
        let Some(follow) = Follow::new(self, self.table.take_trace()) else { return };
        let follow = Arc::new(follow);
        for _ in 0..THREADS {
            let (reader, follow) = (Arc::downgrade(self), Arc::clone(&follow));
            let run = move || while reader.upgrade().is_some_and(|reader| follow.step(&reader)) {};
            if let Err(error) = thread::Builder::new().name("nacre-prefetch".into()).spawn(run) {
                tracing::warn!("a trace is followed by fewer threads: {error}");
            }
        }
    }

    /// Fetches what a trace names into the cache, where it is not there yet.
    ///
    /// # Errors
    /// [`ReadError`]: of a window that could not be had. What was fetched before is there.
    pub fn prefetch(&self, trace: Vec<u64>) -> Result<Prefetched, ReadError> {
        let Some(follow) = Follow::new(self, trace) else { return Ok(Prefetched::default()) };
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| while follow.step(self) {});
            }
        });
        let failure = lock(&follow.failure).take();
        failure.map_or_else(|| Ok(follow.done()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

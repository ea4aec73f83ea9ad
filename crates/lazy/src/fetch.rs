//! Stored chunks, verified: from the cache where it has them right, else from their source, whatever it takes within a time.
//!
//! Chunks that lie near each other in a blob come in one request. A chunk that somebody is fetching is waited for, not fetched twice.
//! What comes from a source is verified before it is put into the cache or given to anybody.

use std::{
    cell::RefCell,
    collections::HashMap,
    convert::Infallible,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    cache::Cache,
    chunk::{Verified, verify},
    format::{ChunkEntry, DIGEST},
    pace::{Pace, Urgency},
    source::{BlobId, Blobs, SourceError},
};

/// The most bytes of a request.
pub const REQUEST: u64 = 4 << 20;
/// The most bytes of a read of the cache, if it is more than one chunk: a thread keeps memory for so many.
const CACHE_READ: u64 = 1 << 20;
/// Requests of one read, or of one look ahead, that run at once.
const LANES: usize = 4;
/// The most bytes between two chunks of a request that are fetched for nothing: about what a request costs at 100 Mbit/s and 20 ms.
const GAP: u64 = 32 << 10;
/// The first wait before something is tried again; each next one is twice as long, up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

thread_local! {
    /// What the cache is read into.
    static MEMORY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why a chunk cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// No source gave it, for as long as a read may wait.
    #[error("gave up after {attempts} attempts: {last}")]
    Source {
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        #[source]
        last: SourceError,
    },
    /// Every source gives something else.
    #[error("{blob}: {found}; gave up after {attempts} attempts")]
    Wrong {
        /// Of which blob.
        blob: BlobId,
        /// What is wrong with it.
        found: String,
        /// How often it was tried.
        attempts: u32,
    },
}

/// What was done so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that sources gave.
    pub fetched_bytes: AtomicU64,
    /// Requests to sources.
    pub requests: AtomicU64,
    /// Requests that failed or gave wrong bytes, and were made again.
    pub retries: AtomicU64,
    /// Chunks that the cache had.
    pub cache_hits: AtomicU64,
    /// Chunks that the cache had, and had wrong.
    pub cache_healed: AtomicU64,
}

/// A chunk to be had: where it is, and what it must be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// In which blob.
    pub blob: BlobId,
    /// Its entry.
    pub entry: ChunkEntry,
}

impl Wanted {
    fn range(&self) -> Range<u64> {
        let place = self.entry.place.get();
        place..place + u64::from(self.entry.stored.get())
    }
}

type Outcome = Result<Arc<Vec<u8>>, FetchError>;

/// A chunk that somebody fetches.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

/// Fetches chunks for every image of a process.
pub struct Fetcher {
    cache: Option<Cache>,
    patience: Duration,
    pace: Pace,
    flights: Mutex<HashMap<[u8; DIGEST], Arc<Flight>>>,
    /// What happened.
    pub counters: Counters,
}

impl Fetcher {
    /// A fetcher with a cache, or without; a read waits `patience` for sources that fail.
    pub fn new(cache: Option<Cache>, patience: Duration) -> Self {
        Self { cache, patience, pace: Pace::default(), flights: Mutex::default(), counters: Counters::default() }
    }

    /// The same, which fetches at this pace.
    #[must_use]
    pub fn with_pace(self, pace: Pace) -> Self {
        Self { pace, ..self }
    }

    /// Reads a part of a blob that the caller verifies, again and again while that may help and there is time.
    ///
    /// # Errors
    /// [`SourceError`]
    pub(crate) fn read(
        &self,
        source: &dyn Blobs,
        blob: &BlobId,
        offset: u64,
        out: &mut [u8],
        mut attempt: u32,
    ) -> Result<(), SourceError> {
        let _turn = self.pace.turn(out.len() as u64, Urgency::Waited);
        let (deadline, mut wait) = (Instant::now() + self.patience, FIRST_WAIT);
        loop {
            let begin = Instant::now();
            let answer = source.read(blob, offset, out, attempt);
            tracing::debug!(%blob, offset, length = out.len(), took = ?begin.elapsed(), "asked for a part of a blob");
            match answer {
                Err(error) if error.temporary && Instant::now() + wait <= deadline => {
                    tracing::warn!("{error}; it is asked for again");
                    self.counters.retries.fetch_add(1, Ordering::Relaxed);
                }
                other => return other,
            }
            thread::sleep(wait);
            (attempt, wait) = (attempt + 1, (wait * 2).min(LONGEST_WAIT));
        }
    }

    /// The cache.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// Which chunks the cache has, right.
    pub fn has(&self, wanted: &[Wanted]) -> Vec<bool> {
        let mut has = vec![false; wanted.len()];
        let _: Result<(), Infallible> = self.cached(wanted, |at, _| {
            if let Some(has) = has.get_mut(at) {
                *has = true;
            }
            Ok(())
        });
        has
    }

    /// Gives `take` the stored bytes of each chunk that the cache has, with its place in `wanted`.
    ///
    /// # Errors
    /// What `take` says.
    pub fn cached<E>(
        &self,
        wanted: &[Wanted],
        mut take: impl FnMut(usize, Verified<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(cache) = &self.cache else { return Ok(()) };
        let mut memory = MEMORY.take();
        let mut groups = groups(wanted, 0, CACHE_READ);
        let taken = groups.try_for_each(|group| self.cached_group(cache, wanted, group, &mut memory, &mut take));
        MEMORY.set(memory);
        taken
    }

    /// Chunks that follow each other in a blob: one read of the cache.
    fn cached_group<E>(
        &self,
        cache: &Cache,
        wanted: &[Wanted],
        group: Range<usize>,
        memory: &mut Vec<u8>,
        take: &mut impl FnMut(usize, Verified<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let chunks = wanted.get(group.clone()).unwrap_or_default();
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(()) };
        let start = first.range().start;
        let length = usize::try_from(last.range().end - start).unwrap_or(0);
        if memory.len() < length {
            memory.resize(length, 0);
        }
        let bytes = memory.get_mut(..length).unwrap_or_default();
        let whole = cache.read(&first.blob, start, bytes);
        if !whole && chunks.len() == 1 {
            return Ok(());
        }
        for (at, chunk) in group.zip(chunks) {
            let Some(piece) = bytes.get_mut(within(&chunk.range(), start)) else { continue };
            // The end of a group may lie behind what the cache has of a file, and its beginning not.
            if (whole || cache.read(&chunk.blob, chunk.range().start, piece))
                && let Some(right) = self.right(chunk, piece)
            {
                take(at, right)?;
            }
        }
        Ok(())
    }

    fn right<'a>(&self, chunk: &'a Wanted, bytes: &'a mut [u8]) -> Option<Verified<'a>> {
        let ends = bytes.first_chunk::<16>().zip(bytes.last_chunk::<16>());
        let hole = ends.is_some_and(|(first, last)| *first == [0; 16] && *last == [0; 16]);
        let right = Verified::new(&chunk.entry, bytes).ok();
        if hole && right.is_none() {
            // Most likely it was never there.
            return None;
        }
        let counter = if right.is_some() { &self.counters.cache_hits } else { &self.counters.cache_healed };
        counter.fetch_add(1, Ordering::Relaxed);
        right
    }

    /// The stored bytes of chunks, verified, in their order.
    ///
    /// # Errors
    /// [`FetchError`], when the time is over
    pub fn fetch(
        &self,
        source: &dyn Blobs,
        wanted: &[Wanted],
        urgency: Urgency,
    ) -> Result<Vec<Arc<Vec<u8>>>, FetchError> {
        let (mut mine, mut others) = (Vec::new(), HashMap::new());
        {
            let mut flights = lock(&self.flights);
            for chunk in wanted {
                let digest = chunk.entry.digest;
                if others.contains_key(&digest) {
                    continue;
                }
                let flight = match flights.get(&digest) {
                    Some(flight) => Arc::clone(flight),
                    None => {
                        let flight = Arc::new(Flight::default());
                        flights.insert(digest, Arc::clone(&flight));
                        mine.push(*chunk);
                        flight
                    }
                };
                others.insert(digest, flight);
            }
        }
        // Whatever becomes of this thread, nobody waits for it for ever.
        let _landing = Landing {
            fetcher: self,
            flights: &others,
            mine: mine.iter().map(|chunk| (chunk.entry.digest, *chunk)).collect(),
        };
        self.fly(source, mine, urgency);
        wanted
            .iter()
            .map(|chunk| {
                others
                    .get(&chunk.entry.digest)
                    .map_or_else(|| unreachable!("every chunk has a flight"), |flight| flight.wait())
            })
            .collect()
    }

    /// Fetches chunks that nobody else does, and tells everybody of each.
    fn fly(&self, source: &dyn Blobs, mut mine: Vec<Wanted>, urgency: Urgency) {
        mine.sort_by_key(|chunk| (chunk.blob.digest, chunk.range().start));
        let groups: Vec<Range<usize>> = groups(&mine, GAP, self.pace.request(REQUEST)).collect();
        let (next, mine) = (AtomicUsize::new(0), mine.as_slice());
        let lane = || {
            while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.bring(source, mine.get(group.clone()).unwrap_or_default().to_vec(), urgency);
            }
        };
        thread::scope(|scope| {
            for _ in 1..groups.len().min(LANES) {
                // Where there are no threads to be had, this one does it all.
                let _ = thread::Builder::new().name("lazy-fetch".into()).spawn_scoped(scope, lane);
            }
            lane();
        });
    }

    /// Fetches chunks that come together, whatever it takes.
    fn bring(&self, source: &dyn Blobs, mut chunks: Vec<Wanted>, urgency: Urgency) {
        let deadline = Instant::now() + self.patience;
        let (mut attempt, mut wait) = (0, FIRST_WAIT);
        while !chunks.is_empty() {
            let failure = self.request(source, &mut chunks, attempt, urgency);
            attempt += 1;
            let Some((failure, again)) = failure else { continue };
            let now = Instant::now();
            if !again || now + wait > deadline {
                for chunk in chunks.drain(..) {
                    self.land(&chunk, Err(failure(attempt)));
                }
                break;
            }
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// One request: chunks that came right leave the list. Gives why others did not, and whether that may change.
    #[expect(clippy::type_complexity, reason = "a failure that does not know yet how often it was tried")]
    fn request(
        &self,
        source: &dyn Blobs,
        chunks: &mut Vec<Wanted>,
        attempt: u32,
        urgency: Urgency,
    ) -> Option<(Box<dyn Fn(u32) -> FetchError>, bool)> {
        let (first, last) = (chunks.first()?, chunks.last()?);
        let (blob, start) = (first.blob, first.range().start);
        let mut bytes = vec![0; usize::try_from(last.range().end - start).ok()?];
        let _turn = self.pace.turn(bytes.len() as u64, urgency);
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let begin = Instant::now();
        let answer = source.read(&blob, start, &mut bytes, attempt);
        tracing::debug!(%blob, start, length = bytes.len(), chunks = chunks.len(), took = ?begin.elapsed(), "asked for chunks");
        if let Err(last) = answer {
            let again = last.temporary;
            return Some((Box::new(move |attempts| FetchError::Source { attempts, last: last.clone() }), again));
        }
        self.counters.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut wrong = None;
        chunks.retain(|chunk| {
            let Some(piece) = bytes.get(within(&chunk.range(), start)) else { return true };
            if let Err(error) = verify(&chunk.entry, piece) {
                tracing::warn!("{blob}: {error}; it is asked for again");
                wrong = Some(error.to_string());
                return true;
            }
            if let Some(cache) = &self.cache {
                cache.write(&blob, chunk.range().start, piece);
            }
            self.land(chunk, Ok(Arc::new(piece.to_vec())));
            false
        });
        let found = wrong?;
        Some((Box::new(move |attempts| FetchError::Wrong { blob, found: found.clone(), attempts }), true))
    }

    fn land(&self, chunk: &Wanted, outcome: Outcome) {
        if let Some(flight) = lock(&self.flights).remove(&chunk.entry.digest) {
            *lock(&flight.outcome) = Some(outcome);
            flight.landed.notify_all();
        }
    }
}

/// Chunks that one thread took upon itself to fetch.
struct Landing<'a> {
    fetcher: &'a Fetcher,
    flights: &'a HashMap<[u8; DIGEST], Arc<Flight>>,
    mine: Vec<([u8; DIGEST], Wanted)>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        for (digest, chunk) in &self.mine {
            let Some(flight) = self.flights.get(digest) else { continue };
            let mut outcome = lock(&flight.outcome);
            if outcome.is_some() {
                continue;
            }
            let (range, reason) = (chunk.range(), "whoever fetched it gave up unexpectedly".to_owned());
            let last = SourceError { blob: chunk.blob, range, reason, temporary: false };
            *outcome = Some(Err(FetchError::Source { attempts: 1, last }));
            drop(outcome);
            flight.landed.notify_all();
            lock(&self.fetcher.flights).remove(digest);
        }
    }
}

impl Flight {
    fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone(),
                None => outcome = self.landed.wait(outcome).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Where chunks are near enough to each other to come together: same blob, ascending, at most `gap` bytes between them, `most` in all,
/// if there is more than one.
fn groups(wanted: &[Wanted], gap: u64, most: u64) -> impl Iterator<Item = Range<usize>> + use<'_> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = wanted.get(at)?;
        let (start, begin, mut end) = (at, first.range().start, first.range().end);
        at += 1;
        while let Some(next) = wanted.get(at) {
            let range = next.range();
            let near = next.blob == first.blob && range.start >= end && range.start - end <= gap;
            if !near || range.end - begin > most {
                break;
            }
            end = range.end;
            at += 1;
        }
        Some(start..at)
    })
}

/// A range of a blob within bytes that begin at `start`.
fn within(range: &Range<u64>, start: u64) -> Range<usize> {
    let place = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX);
    place(range.start)..place(range.end)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

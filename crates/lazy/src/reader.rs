//! The verified reader: bytes of an image's data device.
//!
//! One thread answers one read: entries of the table, then chunks, from memory, from the cache, from the source; each verified,
//! decrypted, decompressed, straight into the answer where all of it is wanted. A chunk of which only a part is wanted is kept for a
//! while, since the next read is likely to want the rest.

mod guess;
mod prefetch;
#[cfg(feature = "build")]
mod survey;

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use crate::{
    chunk::{Opener, Verified},
    fetch::{FetchError, Fetcher, Wanted},
    format::{ChunkEntry, Cipher, DIGEST, FormatError, Method, Summary},
    image::{Table, TableError},
    pace::Urgency,
    source::{BlobId, Blobs},
    table::Leaf,
    trace::Recorder,
};

pub(crate) use guess::Ahead;
use guess::Guesses;
pub use prefetch::Prefetched;
#[cfg(feature = "build")]
pub use survey::{Counts, Survey};

/// Bytes of decoded chunks that are kept, for all images of a process.
const KEPT: usize = 6 << 20;
/// The most chunks of one read: 64 for each that a builder of ours makes of 1 MiB, so that a table of tiny ones fills no memory.
const MOST_PARTS: usize = 16 << 10;

/// Why bytes of an image cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The chunk's stored bytes.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What is in them.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The range is not all within the device.
    #[error("bytes {offset} to {end} are beyond the data device's {size}")]
    Range {
        /// The first.
        offset: u64,
        /// The one after the last.
        end: u64,
        /// The device.
        size: u64,
    },
    /// A span of an indexed layer.
    #[error("layer {layer}, the tar's bytes from {address} on: {reason}")]
    Span {
        /// Which layer.
        layer: u16,
        /// Where in the tars of all layers, end to end.
        address: u64,
        /// What is wrong.
        reason: String,
    },
    /// The file that a long span is decoded into.
    #[error("the file that a layer is decoded into: {0}")]
    Spool(String),
    /// Its key was lent, and has to be given up.
    #[error("the image's key was lent and is given up: {0}")]
    GivenUp(String),
    /// There is no memory.
    #[error("no memory to decompress: {0}")]
    Memory(String),
}

/// A read that failed, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub reason: String,
    /// When.
    pub at: SystemTime,
}

/// A decoded chunk, and what it was decoded by: another image, or another entry, may name the same stored bytes, and get this only if it
/// would have decoded to it, with its own key.
struct Decoded {
    entry: ChunkEntry,
    bytes: Arc<Vec<u8>>,
    used: u64,
}

/// Decoded chunks, the least recently used go first.
#[derive(Default)]
struct Kept {
    chunks: HashMap<[u8; DIGEST], Decoded>,
    bytes: usize,
    clock: u64,
}

/// What all images of a process share.
pub struct Shared {
    /// Gets stored chunks.
    pub fetcher: Fetcher,
    kept: Mutex<Kept>,
    /// Bytes of decoded chunks that are kept.
    limit: AtomicUsize,
}

impl Shared {
    /// With this fetcher.
    pub fn new(fetcher: Fetcher) -> Arc<Self> {
        Arc::new(Self { fetcher, kept: Mutex::default(), limit: AtomicUsize::new(KEPT) })
    }

    /// Keeps more bytes of decoded chunks than [`KEPT`], for a reader whose chunks are large.
    pub(crate) fn keep_at_least(&self, bytes: usize) {
        self.limit.fetch_max(bytes, Ordering::Relaxed);
    }

    pub(crate) fn kept(&self, entry: &ChunkEntry) -> Option<Arc<Vec<u8>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        let found = kept.chunks.get_mut(&entry.digest)?;
        let same = |one: &ChunkEntry| (one.key, one.method, one.length, one.stored);
        if same(&found.entry) != same(entry) {
            return None;
        }
        found.used = clock;
        Some(Arc::clone(&found.bytes))
    }

    pub(crate) fn keep(&self, entry: &ChunkEntry, bytes: Arc<Vec<u8>>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        kept.bytes += bytes.len();
        if let Some(old) = kept.chunks.insert(entry.digest, Decoded { entry: *entry, bytes, used: clock }) {
            kept.bytes -= old.bytes.len();
        }
        if kept.bytes > self.limit.load(Ordering::Relaxed) {
            let mut used: Vec<u64> = kept.chunks.values().map(|chunk| chunk.used).collect();
            used.sort_unstable();
            let oldest = used.get(used.len() / 4).copied().unwrap_or(u64::MAX);
            kept.chunks.retain(|_, chunk| chunk.used > oldest);
            kept.bytes = kept.chunks.values().map(|chunk| chunk.bytes.len()).sum();
        }
    }
}

thread_local! {
    static OPENERS: RefCell<[Option<Opener>; 2]> = const { RefCell::new([None, None]) };
}

/// Opens a chunk with this thread's decompressor.
fn open(cipher: Cipher, stored: Verified<'_>, plain: &mut [u8]) -> Result<(), ReadError> {
    OPENERS.with_borrow_mut(|openers| {
        let [clear, sealed] = openers;
        let slot = if cipher == Cipher::None { clear } else { sealed };
        let opener = match slot {
            Some(opener) => opener,
            None => slot.insert(Opener::new(cipher).map_err(|error: io::Error| ReadError::Memory(error.to_string()))?),
        };
        Ok(opener.open(stored, plain)?)
    })
}

/// Reads one image.
pub struct Reader {
    shared: Arc<Shared>,
    source: Arc<dyn Blobs>,
    table: Table,
    summary: Summary,
    blobs: Vec<BlobId>,
    /// Where the last read ended, for readers that go on there.
    last: AtomicU64,
    guesses: Guesses,
    /// Bytes that were read.
    pub read_bytes: AtomicU64,
    /// The last failure, for people.
    failure: Mutex<Option<Failure>>,
    /// Takes down what is read first, where somebody wants to know.
    recorder: OnceLock<Arc<Recorder>>,
}

/// A chunk and the part of an answer that it gives.
struct Part {
    entry: ChunkEntry,
    /// Where in the answer.
    to: std::ops::Range<usize>,
    /// From where in the chunk.
    from: usize,
}

impl Part {
    fn is_whole(&self) -> bool {
        self.from == 0 && self.to.len() as u64 == self.entry.length.get()
    }
}

impl Reader {
    /// A reader of an opened image.
    pub fn new(
        shared: Arc<Shared>,
        source: Arc<dyn Blobs>,
        table: Table,
        summary: Summary,
        blobs: Vec<BlobId>,
    ) -> Self {
        Self {
            shared,
            source,
            table,
            summary,
            blobs,
            last: AtomicU64::new(u64::MAX),
            guesses: Guesses::default(),
            read_bytes: AtomicU64::new(0),
            failure: Mutex::default(),
            recorder: OnceLock::new(),
        }
    }

    /// Bytes of the data device.
    pub fn size(&self) -> u64 {
        self.summary.device_bytes.get()
    }

    /// Sizes of the image.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Its data blobs.
    pub fn blobs(&self) -> &[BlobId] {
        &self.blobs
    }

    /// The last read that failed.
    pub fn failure(&self) -> Option<Failure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has it recorded what is read from now on. Only the first recorder is told.
    pub fn record(&self, recorder: Arc<Recorder>) {
        let _ = self.recorder.set(recorder);
    }

    /// Fills `out` with the device's bytes from `offset` on.
    ///
    /// # Errors
    /// [`ReadError`]: `out` has nothing to be used.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let outcome = self.try_read(offset, out);
        match &outcome {
            Ok(()) => {
                self.read_bytes.fetch_add(out.len() as u64, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!("reading bytes {offset} to {} of an image failed: {error}", offset + out.len() as u64);
                let failure = Failure { reason: error.to_string(), at: SystemTime::now() };
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
            }
        }
        outcome
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let parts = self.parts(offset, out.len())?;
        if let Some(recorder) = self.recorder.get() {
            recorder.touch(parts.iter().map(|part| &part.entry));
        }
        let mut missing = Vec::new();
        for part in parts {
            if part.entry.method == Method::Zeroes.code() {
                slice(out, &part).fill(0);
            } else if let Some(kept) = self.shared.kept(&part.entry) {
                copy(&kept, out, &part)?;
            } else {
                missing.push(part);
            }
        }
        let sequential = self.last.swap(offset + out.len() as u64, Ordering::Relaxed) == offset;
        if missing.is_empty() {
            return Ok(());
        }
        let wanted: Vec<Wanted> = missing.iter().map(|part| self.wanted(&part.entry)).collect::<Result<_, _>>()?;
        let mut here = vec![false; wanted.len()];
        self.shared.fetcher.cached(&wanted, |at, stored| {
            if let (Some(here), Some(part)) = (here.get_mut(at), missing.get(at)) {
                *here = true;
                self.guesses.came_true(&part.entry);
                return self.decode(part, stored, out);
            }
            Ok(())
        })?;
        let away: Vec<(&Part, Wanted)> =
            missing.iter().zip(wanted).zip(here).filter_map(|(away, here)| (!here).then_some(away)).collect();
        if away.is_empty() {
            return Ok(());
        }
        let mut wanted: Vec<Wanted> = away.iter().map(|(_, wanted)| *wanted).collect();
        if self.shared.fetcher.cache().is_some() {
            self.guess(offset + out.len() as u64, sequential, &mut wanted);
        }
        let fetched = self.shared.fetcher.fetch(self.source.as_ref(), &wanted, Urgency::Waited)?;
        for ((part, _), stored) in away.into_iter().zip(fetched) {
            let mut stored = Arc::try_unwrap(stored).unwrap_or_else(|shared| shared.to_vec());
            self.decode(part, Verified::new(&part.entry, &mut stored)?, out)?;
        }
        Ok(())
    }

    /// Of these, what is not in the cache.
    fn away(&self, entries: &[ChunkEntry]) -> Vec<Wanted> {
        let stored = |entry: &&ChunkEntry| entry.method != Method::Zeroes.code();
        let mut wanted: Vec<Wanted> =
            entries.iter().filter(stored).filter_map(|entry| self.wanted(entry).ok()).collect();
        let mut here = self.shared.fetcher.has(&wanted).into_iter();
        wanted.retain(|_| !here.next().unwrap_or_default());
        wanted
    }

    fn decode(&self, part: &Part, stored: Verified<'_>, out: &mut [u8]) -> Result<(), ReadError> {
        let cipher = self.table.cipher();
        if part.is_whole() {
            return open(cipher, stored, slice(out, part));
        }
        let mut plain = vec![0; usize::try_from(part.entry.length.get()).unwrap_or(0)];
        open(cipher, stored, &mut plain)?;
        copy(&plain, out, part)?;
        self.shared.keep(&part.entry, Arc::new(plain));
        Ok(())
    }

    fn wanted(&self, entry: &ChunkEntry) -> Result<Wanted, FormatError> {
        let blob = entry.blob.get();
        let found = self.blobs.get(usize::from(blob));
        let none = || FormatError::field("chunk entry", "blob", blob.into(), "one of the image's");
        Ok(Wanted { blob: *found.ok_or_else(none)?, entry: *entry })
    }

    /// The chunks that a range is made of.
    fn parts(&self, offset: u64, length: usize) -> Result<Vec<Part>, ReadError> {
        let end = offset.saturating_add(length as u64);
        if end > self.size() {
            return Err(ReadError::Range { offset, end, size: self.size() });
        }
        let (mut parts, mut at) = (Vec::new(), offset);
        while at < end {
            let Some(leaf) = self.table.find(at) else { break };
            let entries = self.leaf(leaf)?;
            let first = entries.partition_point(|entry| entry.end() <= at);
            let before = at;
            for entry in entries.iter().skip(first) {
                if at >= end {
                    break;
                }
                if parts.len() == MOST_PARTS {
                    let allowed = "such that a read has at most 16384 chunks";
                    return Err(FormatError::field("chunk entry", "length", entry.length.get(), allowed).into());
                }
                let stop = entry.end().min(end);
                let place = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
                let from = usize::try_from(at - entry.offset.get()).unwrap_or(usize::MAX);
                parts.push(Part { entry: *entry, to: place(at)..place(stop), from });
                at = stop;
            }
            if at == before {
                // A verified leaf covers what the index says of it.
                return Err(ReadError::Range { offset: at, end, size: self.size() });
            }
        }
        if at < end {
            return Err(ReadError::Range { offset: at, end, size: self.size() });
        }
        Ok(parts)
    }

    fn leaf(&self, leaf: u32) -> Result<Arc<Leaf>, TableError> {
        self.table.leaf(leaf, |offset, out, attempt| {
            let (fetcher, blob) = (&self.shared.fetcher, self.table.blob());
            // The cache is believed no more than the registry: the leaf's digest tells.
            if attempt == 0
                && let Some(cache) = fetcher.cache()
                && cache.read(blob, offset, out)
            {
                return Ok(());
            }
            fetcher.read(self.source.as_ref(), blob, offset, out, attempt.saturating_sub(1))?;
            if let Some(cache) = fetcher.cache() {
                cache.write(blob, offset, out);
            }
            Ok(())
        })
    }

    /// Every entry of the table, for a builder that shares chunks with this image.
    ///
    /// # Errors
    /// [`ReadError`]
    pub fn entries(&self) -> Result<Vec<ChunkEntry>, ReadError> {
        let mut all = Vec::new();
        for leaf in 0..self.table.count() {
            all.extend_from_slice(&self.leaf(leaf)?);
        }
        Ok(all)
    }

    /// Fetches all that is not in the cache, so that the source may go away. `step` is told how many bytes of the device are done, and
    /// says whether to go on.
    ///
    /// # Errors
    /// [`ReadError`]
    pub fn complete(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), ReadError> {
        for leaf in 0..self.table.count() {
            let entries = self.leaf(leaf)?;
            for entries in entries.chunks(32) {
                self.shared.fetcher.fetch(self.source.as_ref(), &self.away(entries), Urgency::Later)?;
                if !step(entries.last().map_or(0, ChunkEntry::end)) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn slice<'a>(out: &'a mut [u8], part: &Part) -> &'a mut [u8] {
    out.get_mut(part.to.clone()).unwrap_or_default()
}

/// Never leaves in the answer what was there before.
fn copy(plain: &[u8], out: &mut [u8], part: &Part) -> Result<(), ReadError> {
    let to = slice(out, part);
    let (found, expected) = (plain.len() as u64, (part.from + part.to.len()) as u64);
    let from = plain.get(part.from..part.from + to.len()).filter(|from| from.len() == part.to.len());
    to.copy_from_slice(from.ok_or(FormatError::Length { part: "chunk", found, expected })?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn what_one_image_decoded_is_not_given_to_another_without_its_key() {
        let shared = Shared::new(Fetcher::new(None, Duration::ZERO));
        let mut entry = ChunkEntry::new_zeroed();
        entry.length = 100.into();
        entry.stored = 116.into();
        (entry.digest, entry.key) = ([1; 32], [0xAB; 32]);
        shared.keep(&entry, Arc::new(vec![7; 100]));
        assert!(shared.kept(&ChunkEntry { offset: 5.into(), place: 9.into(), ..entry }).is_some());
        for other in [
            ChunkEntry { key: [2; 32], ..entry },
            ChunkEntry { length: 50.into(), ..entry },
            ChunkEntry { method: 1, ..entry },
            ChunkEntry { stored: 115.into(), ..entry },
        ] {
            assert!(shared.kept(&other).is_none(), "{other:?}");
        }
        assert!(!format!("{entry:?}").contains("171"), "the key is not printed");
    }

    #[test]
    fn an_answer_never_keeps_what_was_in_it() {
        let part = |to, from| Part { entry: ChunkEntry::new_zeroed(), to, from };
        let mut out = [0xEE; 20];
        copy(&[1; 10], &mut out, &part(5..10, 5)).unwrap();
        copy(&[1; 10], &mut out, &part(5..15, 5)).unwrap_err();
        assert_eq!(out[..5], [0xEE; 5]);
    }
}

//! Chunks on their way to a data blob: several threads compress and seal, one puts them in order, leaves out those that are stored
//! already, and notes where each is; another hands the rest on to whoever uploads.
//!
//! The order of the table and of the blob is that of addresses, whatever thread was faster, so the same input gives the same bytes.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use super::{
    BuildError,
    device::{Piece, Sink},
};
use crate::{
    chunk::{Sealed, Sealer},
    format::{BLOBS_LIMIT, ChunkEntry, DIGEST, Method},
    keys::Domain,
};

/// Chunks that wait between two steps, for each thread that seals.
const WAITING: usize = 4;

/// Where a stored chunk is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Index in [`Stored::blobs`].
    pub(crate) blob: u32,
    pub(crate) offset: u64,
    pub(crate) stored: u32,
}

/// A data blob, of this image or of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataBlob {
    /// SHA-256; not known while it is written.
    pub digest: [u8; DIGEST],
    /// Bytes.
    pub size: u64,
}

/// What a build came to so far: the table's entries, and the blobs they name.
#[derive(Default)]
pub(crate) struct Stored {
    pub(crate) entries: Vec<ChunkEntry>,
    /// Blobs that the image may use; which it does use, and as what number, is found at the end.
    pub(crate) blobs: Vec<DataBlob>,
    /// Stored chunks by their digest.
    pub(crate) known: HashMap<[u8; DIGEST], Place>,
    /// Entries name blobs by an index in `blobs`, which does not fit where they have only 16 bits: it stands here, an entry each.
    pub(crate) blob_of: Vec<u32>,
    pub(crate) new_bytes: u64,
    pub(crate) shared_bytes: u64,
    pub(crate) new_chunks: u64,
}

/// A piece with its number.
struct Job {
    number: u64,
    piece: Piece,
}

/// What became of it.
enum Done {
    Chunk { offset: u64, length: u64, sealed: Sealed },
    Zeroes { offset: u64, length: u64 },
}

/// How chunks are made.
#[derive(Clone, Copy)]
pub(crate) struct Settings<'a> {
    pub(crate) domain: Option<&'a Domain>,
    pub(crate) level: i32,
    pub(crate) threads: usize,
}

/// Where the device's pieces go in.
pub(crate) struct Entrance(SyncSender<Job>, u64);

/// The other side is gone: its error says why.
pub(crate) struct Closed;

impl Sink for Entrance {
    type Error = Closed;

    fn piece(&mut self, piece: Piece) -> Result<(), Closed> {
        let number = self.1;
        self.1 += 1;
        self.0.send(Job { number, piece }).map_err(|_| Closed)
    }
}

/// Runs `produce`, which feeds the pipeline, and `upload`, which gets the bytes of the new blob if there are any.
pub(crate) fn run<T, E>(
    stored: &mut Stored,
    settings: Settings<'_>,
    produce: impl FnOnce(&mut Entrance) -> Result<T, BuildError<E>>,
    upload: impl FnOnce(&mut dyn Read) -> Result<DataBlob, E> + Send,
) -> Result<T, BuildError<E>>
where
    E: Send,
{
    let threads = settings.threads.max(1);
    let (to_seal, jobs) = sync_channel(WAITING * threads);
    let (sealed, to_order) = sync_channel(WAITING * threads);
    let (to_upload, blob) = sync_channel::<Vec<u8>>(16);
    // Owned by the threads alone: when the last of them is gone, whoever feeds them hears of it.
    let jobs = Arc::new(Mutex::new(jobs));
    let failed = &AtomicBool::new(false);
    thread::scope(|scope| {
        let uploader = scope.spawn(move || upload_if_any(blob, failed, upload));
        let sealers: Vec<_> = (0..threads)
            .map(|_| {
                let (jobs, sealed) = (Arc::clone(&jobs), sealed.clone());
                scope.spawn(move || {
                    let outcome = seal(&jobs, &sealed, settings);
                    failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
                    outcome
                })
            })
            .collect();
        drop((sealed, jobs));
        let orderer = scope.spawn(move || order(stored, to_order, &to_upload));
        let mut entrance = Entrance(to_seal, 0);
        let produced = produce(&mut entrance);
        failed.fetch_or(produced.is_err(), Ordering::SeqCst);
        drop(entrance);
        let mut failure = None;
        for sealer in sealers {
            if let Err(error) = join(sealer) {
                failure = Some(BuildError::Compress(error));
            }
        }
        let (stored, this) = join(orderer);
        let uploaded = join(uploader);
        // What made the upload fail comes first, if it was not the upload.
        if let Some(failure) = failure {
            return Err(failure);
        }
        if let Err(error) = &produced
            && !matches!(error, BuildError::Stopped)
        {
            return produced;
        }
        match uploaded {
            Ok(Some(blob)) => {
                if let Some(slot) = this.and_then(|index| stored.blobs.get_mut(index as usize)) {
                    *slot = blob;
                }
            }
            Ok(None) => {}
            Err(error) => return Err(BuildError::Upload(error)),
        }
        produced
    })
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn seal(jobs: &Mutex<Receiver<Job>>, done: &SyncSender<(u64, Done)>, settings: Settings<'_>) -> io::Result<()> {
    let mut sealer = Sealer::new(settings.domain, settings.level)?;
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { number, piece }) = job else { return Ok(()) };
        let result = match piece {
            Piece::Chunk { offset, bytes } => {
                Done::Chunk { offset, length: bytes.len() as u64, sealed: sealer.seal(&bytes)? }
            }
            Piece::Zeroes { offset, length } => Done::Zeroes { offset, length },
        };
        if done.send((number, result)).is_err() {
            return Ok(());
        }
    }
}

/// Takes chunks in order; gives back what it was given, and the index of the new blob.
fn order<'a>(
    stored: &'a mut Stored,
    sealed: Receiver<(u64, Done)>,
    upload: &SyncSender<Vec<u8>>,
) -> (&'a mut Stored, Option<u32>) {
    let (mut waiting, mut next) = (BTreeMap::new(), 0);
    let (mut this, mut at) = (None, 0);
    for (number, done) in sealed {
        waiting.insert(number, done);
        while let Some(done) = waiting.remove(&next) {
            next += 1;
            if let Some(bytes) = stored.take(done, &mut this, &mut at)
                && upload.send(bytes).is_err()
            {
                // The upload failed and says so; nobody needs more.
                return (stored, this);
            }
        }
    }
    (stored, this)
}

impl Stored {
    /// Notes a chunk; gives its bytes where they are new.
    fn take(&mut self, done: Done, this: &mut Option<u32>, at: &mut u64) -> Option<Vec<u8>> {
        let (offset, length, sealed) = match done {
            Done::Zeroes { offset, length } => {
                self.zeroes(offset, length);
                return None;
            }
            Done::Chunk { offset, length, sealed } => (offset, length, sealed),
        };
        let known = self.known.get(&sealed.digest).copied();
        let (place, new) = match known {
            Some(place) => {
                self.shared_bytes += u64::from(place.stored);
                (place, None)
            }
            None => {
                let blob = *this.get_or_insert_with(|| {
                    self.blobs.push(DataBlob { digest: [0; DIGEST], size: 0 });
                    u32::try_from(self.blobs.len() - 1).unwrap_or(u32::MAX)
                });
                let stored = u32::try_from(sealed.bytes.len()).unwrap_or(u32::MAX);
                let place = Place { blob, offset: *at, stored };
                *at += u64::from(stored);
                self.new_bytes += u64::from(stored);
                self.new_chunks += 1;
                self.known.insert(sealed.digest, place);
                (place, Some(sealed.bytes))
            }
        };
        self.entries.push(ChunkEntry {
            offset: offset.into(),
            length: length.into(),
            place: place.offset.into(),
            stored: place.stored.into(),
            blob: 0.into(),
            method: sealed.method.code(),
            reserved: 0,
            digest: sealed.digest,
            key: sealed.key,
        });
        self.blob_of.push(place.blob);
        new
    }

    /// Notes a range of zeroes, with the one before it where that is zeroes, too.
    fn zeroes(&mut self, offset: u64, length: u64) {
        if let Some(last) = self.entries.last_mut()
            && last.method == Method::Zeroes.code()
        {
            last.length = (last.length.get() + length).into();
            return;
        }
        self.entries.push(ChunkEntry {
            offset: offset.into(),
            length: length.into(),
            place: 0.into(),
            stored: 0.into(),
            blob: 0.into(),
            method: Method::Zeroes.code(),
            reserved: 0,
            digest: [0; DIGEST],
            key: [0; 32],
        });
        self.blob_of.push(u32::MAX);
    }

    /// Numbers the blobs in the order in which entries use them; blobs that none uses are left out.
    pub(crate) fn number(&mut self) -> Option<Vec<DataBlob>> {
        let (mut numbers, mut used) = (HashMap::new(), Vec::new());
        for (entry, blob) in self.entries.iter_mut().zip(&self.blob_of) {
            let Some(found) = self.blobs.get(*blob as usize) else { continue };
            let number = *numbers.entry(*blob).or_insert_with(|| {
                used.push(*found);
                used.len() - 1
            });
            entry.blob = u16::try_from(number).ok().filter(|number| u32::from(*number) < BLOBS_LIMIT)?.into();
        }
        Some(used)
    }
}

/// Calls `upload` when the first bytes come, and not at all for none.
fn upload_if_any<E>(
    chunks: Receiver<Vec<u8>>,
    failed: &AtomicBool,
    upload: impl FnOnce(&mut dyn Read) -> Result<DataBlob, E>,
) -> Result<Option<DataBlob>, E> {
    let Ok(first) = chunks.recv() else { return Ok(None) };
    upload(&mut Stream { chunks, failed, current: first, at: 0 }).map(Some)
}

struct Stream<'a> {
    chunks: Receiver<Vec<u8>>,
    /// A blob whose layer failed is not to be taken for a whole one.
    failed: &'a AtomicBool,
    current: Vec<u8>,
    at: usize,
}

impl Read for Stream<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            let Ok(next) = self.chunks.recv() else {
                let failed = self.failed.load(Ordering::SeqCst);
                return if failed { Err(io::Error::other("the layer's build failed")) } else { Ok(0) };
            };
            (self.current, self.at) = (next, 0);
        }
        let rest = self.current.get(self.at..).unwrap_or_default();
        let length = rest.len().min(out.len());
        if let (Some(to), Some(from)) = (out.get_mut(..length), rest.get(..length)) {
            to.copy_from_slice(from);
        }
        self.at += length;
        Ok(length)
    }
}

//! What all parts of an open disk share.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, RwLock, atomic::AtomicU64},
    time::Instant,
};

use nacre_core::{Anchor, AnchorState, BlockError, BlockStore, Page, WriteRequest};

use crate::{
    DiskError, OpenOptions,
    alloc::{Allocator, Kind},
    cache::Cache,
    checkpoint::{Checkpoint, Root},
    delta::Delta,
    journal::{Change, Ring},
    keys::{Auditor, EpochKeys, KeyRing},
    layout::{BLOCK, Geometry},
    poison,
    pool::Pool,
    stats::{Counters, add},
};

/// Blocks of a batch: what is written to the store at once.
pub(crate) const BATCH: usize = 64;
/// Batches on their way to the store before writers carry them there themselves.
const MOST_OUTGOING: usize = 16;

/// The trees of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trees {
    pub(crate) index: Root,
    pub(crate) space: Root,
}

/// Sealed blocks that are not on the store yet.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pages: Vec<(u64, Box<Page>)>,
    /// The lowest and the highest place.
    low: u64,
    high: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Writing,
    /// The store refused it; it is kept, since its content is nowhere else.
    Failed,
}

#[derive(Debug)]
struct Outgoing {
    /// Counts batches.
    number: u64,
    batch: Arc<Batch>,
    stage: Stage,
}

impl Batch {
    fn find(&self, place: u64) -> Option<&Page> {
        let inside = (self.low..=self.high).contains(&place);
        let mut pages = self.pages.iter().filter(|_| inside);
        pages.find(|(at, _)| *at == place).map(|(_, page)| &**page)
    }

    /// As requests: a run of neighbours each.
    pub(crate) fn requests(&self) -> Vec<WriteRequest<'_>> {
        runs(self.pages.iter().map(|(place, page)| (*place, &**page)))
    }
}

/// Requests for pages: neighbours go together.
pub(crate) fn runs<'a>(pages: impl Iterator<Item = (u64, &'a Page)>) -> Vec<WriteRequest<'a>> {
    let mut requests: Vec<WriteRequest<'a>> = Vec::new();
    let mut next = u64::MAX;
    for (place, page) in pages {
        match requests.last_mut() {
            Some(last) if place == next => last.buffers.push(&page.0),
            _ => requests.push(WriteRequest { offset: place * BLOCK, buffers: vec![&page.0] }),
        }
        next = place + 1;
    }
    requests
}

/// What was committed and is going into a checkpoint.
#[derive(Clone)]
pub(crate) struct Frozen {
    pub(crate) delta: Arc<Delta>,
    pub(crate) period: u64,
    /// The commit that it ends with.
    pub(crate) sequence: u64,
    pub(crate) chain: [u8; 32],
    /// Where the journal goes on after that commit, and how many blocks before are released with the checkpoint.
    pub(crate) position: u64,
    pub(crate) release: u64,
    /// Whether that commit is durable, so that the merge may begin.
    pub(crate) ready: bool,
}

/// The state that changes with every write.
pub(crate) struct Log {
    pub(crate) delta: Delta,
    pub(crate) frozen: Option<Frozen>,
    pub(crate) trees: Trees,
    pub(crate) allocator: Allocator,
    /// Slots that were free when the period began.
    pub(crate) period_began_with: u64,
    current: Batch,
    outgoing: VecDeque<Outgoing>,
    sent: u64,
    /// Changes of the transaction that is under way.
    pub(crate) changes: Vec<Change>,
    /// Where the journal goes on.
    pub(crate) ring: Ring,
    /// The last commit.
    pub(crate) sequence: u64,
    pub(crate) chain: [u8; 32],
    /// The size of the disk, in blocks.
    pub(crate) blocks: u64,
}

impl Log {
    pub(crate) fn new(checkpoint: &Checkpoint, geometry: Geometry, capacity: usize) -> Self {
        let allocator = Allocator::new(geometry, checkpoint.live.clone());
        Self {
            delta: Delta::with_capacity(capacity),
            frozen: None,
            trees: Trees { index: checkpoint.index, space: checkpoint.space },
            period_began_with: allocator.available(),
            allocator,
            current: Batch::default(),
            outgoing: VecDeque::new(),
            sent: 0,
            changes: Vec::new(),
            ring: Ring::new(geometry.journal_blocks, checkpoint.journal_position),
            sequence: checkpoint.sequence,
            chain: checkpoint.chain,
            blocks: checkpoint.blocks,
        }
    }

    /// A sealed block that is not on the store yet.
    pub(crate) fn pending(&self, place: u64) -> Option<&Page> {
        let found = self.current.find(place);
        found.or_else(|| self.outgoing.iter().rev().find_map(|outgoing| outgoing.batch.find(place)))
    }

    /// Takes in a sealed block; whether a batch is full now.
    pub(crate) fn put(&mut self, place: u64, page: Box<Page>) -> bool {
        let current = &mut self.current;
        if current.pages.is_empty() {
            (current.low, current.high) = (place, place);
        }
        (current.low, current.high) = (current.low.min(place), current.high.max(place));
        current.pages.push((place, page));
        self.current.pages.len() >= BATCH
    }

    /// Sends what there is on its way, full or not.
    pub(crate) fn send(&mut self) {
        if !self.current.pages.is_empty() {
            let fresh = Batch { pages: Vec::with_capacity(BATCH), ..Batch::default() };
            let batch = std::mem::replace(&mut self.current, fresh);
            self.sent += 1;
            self.outgoing.push_back(Outgoing { number: self.sent, batch: Arc::new(batch), stage: Stage::Queued });
        }
    }

    /// Everything that nobody writes yet; it is the caller's now.
    pub(crate) fn claim(&mut self, most: usize) -> Vec<Arc<Batch>> {
        let queued = self.outgoing.iter_mut().filter(|outgoing| outgoing.stage == Stage::Queued);
        let claimed = queued.take(most).map(|outgoing| {
            outgoing.stage = Stage::Writing;
            Arc::clone(&outgoing.batch)
        });
        claimed.collect()
    }

    /// The number of the last batch that was sent.
    pub(crate) fn last_sent(&self) -> u64 {
        self.sent
    }

    /// Whether a batch up to that number is not on the store yet.
    pub(crate) fn is_on_its_way(&self, last: u64) -> bool {
        self.outgoing.front().is_some_and(|outgoing| outgoing.number <= last)
    }

    pub(crate) fn is_crowded(&self) -> bool {
        self.outgoing.len() >= MOST_OUTGOING
    }

    /// Whether there is a batch that nobody writes yet.
    pub(crate) fn has_queued(&self) -> bool {
        self.outgoing.iter().any(|outgoing| outgoing.stage == Stage::Queued)
    }

    /// Whether everything that was written is committed.
    pub(crate) fn is_committed(&self) -> bool {
        self.changes.is_empty()
    }
}

/// Who commits.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    pub(crate) started: u64,
    pub(crate) done: u64,
    pub(crate) running: bool,
}

/// What is anchored.
pub(crate) struct Anchored {
    pub(crate) anchor: Arc<dyn Anchor>,
    pub(crate) state: Mutex<(AnchorState, Instant)>,
}

/// An open disk, as all its parts see it.
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn BlockStore>,
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) geometry: RwLock<Geometry>,
    pub(crate) keys: KeyRing,
    pub(crate) auditor: Auditor,
    pub(crate) options: OpenOptions,
    pub(crate) limits: Limits,
    pub(crate) log: Mutex<Log>,
    /// Something left `outgoing`, or a checkpoint became durable.
    pub(crate) changed: Condvar,
    /// There is something for a worker: a batch, a merge, the end.
    pub(crate) work: Condvar,
    pub(crate) commits: Mutex<Commits>,
    pub(crate) committed: Condvar,
    /// The last durable checkpoint. Held by whoever writes the next one.
    pub(crate) checkpoint: Mutex<Checkpoint>,
    /// Who writes now; `None` before the first write.
    pub(crate) writer: RwLock<Option<Arc<EpochKeys>>>,
    /// The first epoch of this open.
    pub(crate) first_epoch: OnceLock<u32>,
    pub(crate) anchored: Option<Anchored>,
    pub(crate) cache: Cache,
    pub(crate) pool: Pool,
    pub(crate) counters: Counters,
    pub(crate) failed: OnceLock<BlockError>,
    pub(crate) stop: std::sync::atomic::AtomicBool,
    pub(crate) fence: u64,
    pub(crate) generation: AtomicU64,
    /// Changes of what is frozen that are in their leaves.
    pub(crate) merged: AtomicU64,
    /// The size of the disk in bytes, as requests are checked against it; it only grows.
    pub(crate) size: AtomicU64,
    /// Bytes that users wrote, and that were written to the store, before this open.
    pub(crate) lifetime: (u64, u64),
}

/// What follows from the memory that the disk may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Entries of a delta.
    pub(crate) delta: usize,
    /// Blocks that trims of a period may cover.
    pub(crate) trimmed: u64,
    /// Slots that are kept for the next checkpoint's metadata.
    pub(crate) floor: u64,
}

impl Shared {
    pub(crate) fn geometry(&self) -> Geometry {
        *poison(self.geometry.read())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Log> {
        poison(self.log.lock())
    }

    /// # Errors
    /// Why the disk takes no writes any more.
    pub(crate) fn check_failed(&self) -> Result<(), BlockError> {
        match self.failed.get() {
            None => Ok(()),
            Some(fenced @ BlockError::Fenced(_)) => Err(fenced.clone()),
            Some(error) => Err(BlockError::ReadOnly(format!("an earlier failure: {error}"))),
        }
    }

    /// The disk takes no writes from now on.
    pub(crate) fn fail(&self, error: impl Into<DiskError>) -> BlockError {
        let error = error.into().into_block();
        if self.failed.set(error.clone()).is_ok() {
            tracing::error!(disk = %self.name, %error, "the disk is read-only from now on");
        }
        // Whoever waits has to look again; the locks see to it that nobody is between looking and waiting.
        drop(self.log.lock());
        self.changed.notify_all();
        self.work.notify_all();
        drop(self.commits.lock());
        self.committed.notify_all();
        error
    }

    /// Writes some batches that are on their way, here and now.
    pub(crate) fn carry(&self, most: usize) -> Result<(), BlockError> {
        let claimed = self.lock().claim(most);
        if claimed.is_empty() { Ok(()) } else { self.write_claimed(claimed, Vec::new()) }
    }

    /// Writes what was claimed, and more, all at the same time.
    pub(crate) fn write_claimed(
        &self,
        claimed: Vec<Arc<Batch>>,
        more: Vec<WriteRequest<'_>>,
    ) -> Result<(), BlockError> {
        let mut requests: Vec<WriteRequest<'_>> = claimed.iter().flat_map(|batch| batch.requests()).collect();
        add(&self.counters.data_bytes, requests.iter().map(WriteRequest::length).sum());
        requests.extend(more);
        let result = self.store.write_many(&requests);
        drop(requests);
        let mut done = Vec::new();
        {
            let mut log = self.lock();
            let ours = |outgoing: &Outgoing| claimed.iter().any(|batch| Arc::ptr_eq(batch, &outgoing.batch));
            if result.is_ok() {
                log.outgoing.retain(|outgoing| !ours(outgoing));
            } else {
                let failed = log.outgoing.iter_mut().filter(|outgoing| ours(outgoing));
                failed.for_each(|outgoing| outgoing.stage = Stage::Failed);
            }
            drop(log);
            done.extend(claimed.into_iter().filter_map(Arc::into_inner));
        }
        self.changed.notify_all();
        for batch in done {
            self.pool.give(batch.pages.into_iter().map(|(_, page)| page));
        }
        result.map_err(|error| self.fail(error))
    }

    /// A slot; segments are opened as needed.
    pub(crate) fn slot(&self, kind: Kind) -> Result<u64, DiskError> {
        loop {
            if let Some(place) = self.lock().allocator.take(kind) {
                return Ok(place);
            }
            self.refill(kind, 1)?;
        }
    }
}

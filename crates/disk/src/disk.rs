//! An open disk.

use std::{
    sync::{
        Arc, Condvar, Mutex, OnceLock, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nacre_core::{Anchor, AnchorState, BlockError, BlockStore, ReadRequest, WriteRequest};
use serde::Serialize;

use crate::{
    DiskError, Geometry, RootKey, Statistics,
    cache::Cache,
    format,
    keys::{Auditor, EPOCH_MESSAGES},
    layout::{self, BLOCK},
    node, poison,
    pool::Pool,
    recover::{self, Recovered},
    shared::{Anchored, Limits, Log, Shared},
    stats::Counters,
};

/// When the anchor is moved on. What was flushed since it was can be rolled back unseen, after a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnchorWindow {
    /// With every commit, before the flush returns.
    #[default]
    EveryFlush,
    /// With a commit, when it was not moved for so long, and by itself soon after.
    Every(Duration),
    /// When the disk is closed.
    OnClose,
}

/// How a disk is opened.
#[derive(Clone)]
pub struct OpenOptions {
    /// Memory for everything that the disk keeps there, in bytes: at least 8 MiB, and 1 MiB more for each TiB that is
    /// begun.
    pub memory: u64,
    /// Take no writes, and write nothing.
    pub read_only: bool,
    /// When the anchor is moved on.
    pub window: AnchorWindow,
    /// Have threads of its own; otherwise all work is done inside of the calls.
    pub background: bool,
    /// How much may be moved for cleaning, in percent of what is written; 0 turns it off.
    pub cleaning_percent: u8,
    /// Trim segments of the store that became empty. The host learns which they are.
    pub discard: bool,
    /// Open a disk that has an anchor without it. A rollback is not seen.
    pub accept_rollback: bool,
    /// After how many messages under one key a new epoch begins.
    pub epoch_messages: u64,
    /// Who hears of encryptions.
    pub audit: Auditor,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            read_only: false,
            window: AnchorWindow::default(),
            background: true,
            cleaning_percent: 5,
            discard: false,
            accept_rollback: false,
            epoch_messages: EPOCH_MESSAGES,
            audit: None,
        }
    }
}

impl std::fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenOptions")
            .field("memory", &self.memory)
            .field("read_only", &self.read_only)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

/// What is to be said of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// Its name, 32 hexadecimal digits.
    pub uuid: String,
    /// The store beneath.
    pub store: String,
    /// Its size in bytes.
    pub size: u64,
    /// The layout on the store.
    pub geometry: Geometry,
    /// The last commit.
    pub sequence: u64,
    /// The last checkpoint.
    pub checkpoint: u64,
    /// Whether it was closed in good order.
    pub clean: bool,
    /// Blocks of the store in use, as of the last checkpoint.
    pub used_blocks: u64,
    /// Epochs whose keys something is sealed with.
    pub epochs: usize,
    /// The generation of the newest master key.
    pub master: u32,
    /// Bytes that users wrote, ever, as of the last checkpoint.
    pub written_user: u64,
    /// Bytes written to the store for that.
    pub written_store: u64,
    /// The anchor; `None` without one.
    pub anchor: Option<String>,
    /// What is guaranteed, in words.
    pub guarantees: Vec<String>,
    /// What is damaged and was made good by a copy.
    pub warnings: Vec<String>,
}

/// An open disk. Dropped without [`close`](Self::close), it is as after a crash: what was flushed is there.
pub struct Disk {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    root: RootKey,
    /// What all of it was verified by when it was opened.
    opened_at: [u8; 32],
    warnings: Vec<String>,
    anchored: bool,
    /// A checkpoint slot holds none: closing writes it, whatever else there is to do.
    repairs: bool,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("store", &self.shared.name).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens a disk: verifies what is there against the key and the anchor, and brings back everything that was flushed.
    ///
    /// # Errors
    /// [`DiskError`]; nothing was changed then, but an anchor may have been moved on to a new fence.
    pub fn open(
        store: Arc<dyn BlockStore>,
        key: &RootKey,
        anchor: Option<Arc<dyn Anchor>>,
        options: &OpenOptions,
    ) -> Result<Self, DiskError> {
        let recovered = recover::recover(&*store, key)?;
        let limits = limits(options, &recovered)?;
        let state = judge(&*store, &recovered, anchor.as_deref(), options.accept_rollback)?;
        if recovered.replayed.unsynced && !options.read_only {
            store.flush()?;
        }
        let mut fence = recovered.checkpoint.fence;
        let anchored = match (anchor, state) {
            (Some(anchor), Some(state)) => {
                let mut next = state;
                if !options.read_only {
                    next.fence += 1;
                    (next.sequence, next.root) = (recovered.replayed.sequence, recovered.replayed.chain);
                    anchor.advance(Some(&state), &next)?;
                    fence = next.fence;
                }
                Some(Anchored { anchor, state: Mutex::new((next, Instant::now())) })
            }
            _ => None,
        };
        if let Some(copy) = recovered.behind.filter(|_| !options.read_only) {
            format::write_superblock_copy(&*store, &recovered.superblock, copy, key, &options.audit)?;
        }
        let warnings = warnings(&recovered);
        let repairs = recovered.damaged_checkpoints > 0;
        let was_anchored = recovered.superblock.anchored;
        let opened_at = recovered.replayed.chain;
        let shared = Arc::new(share(store, recovered, anchored, options, limits, fence));
        let workers = if options.background && !options.read_only { start_workers(&shared)? } else { Vec::new() };
        Ok(Self { shared, workers, root: key.keep(), opened_at, warnings, anchored: was_anchored, repairs })
    }

    /// Flushes, writes a last checkpoint, moves the anchor on, and ends. The next open finds nothing to replay.
    ///
    /// # Errors
    /// What went wrong; what was flushed before is there all the same.
    pub fn close(mut self) -> Result<(), DiskError> {
        if !self.shared.options.read_only {
            self.shut()?;
        }
        self.stop();
        Ok(())
    }

    /// [`close`](Self::close) for a disk that others still hold: it takes no writes from then on.
    ///
    /// # Errors
    /// As there.
    pub fn shut(&self) -> Result<(), DiskError> {
        let shared = &self.shared;
        shared.check_writable()?;
        if poison(shared.writer.read()).is_none() && shared.lock().delta.is_empty() && !self.repairs {
            return Ok(()); // nothing was written, nothing was replayed, nothing is to be mended
        }
        shared.writer()?;
        // A checkpoint may be under way, of what was committed before; then one more takes the rest.
        for _ in 0..3 {
            shared.commit(true)?;
            shared.merge().map_err(|error| shared.fail(error))?;
        }
        let mut checkpoint = poison(shared.checkpoint.lock());
        {
            let log = shared.lock();
            if !log.delta.is_empty() || log.frozen.is_some() || !log.changes.is_empty() {
                drop(log);
                return Err(BlockError::ReadOnly("the disk was written to while it was closed".into()).into());
            }
        }
        let (sequence, chain) = (checkpoint.sequence, checkpoint.chain);
        shared.anchor_commit(sequence, chain, true).map_err(|error| shared.fail(error))?;
        for _ in 0..2 {
            checkpoint.generation += 1;
            checkpoint.clean = true;
            checkpoint.fence = shared.fence;
            shared.write_checkpoint(&checkpoint).map_err(|error| shared.fail(error))?;
        }
        let _ = shared.failed.set(BlockError::ReadOnly("the disk is closed".into()));
        Ok(())
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        drop(self.shared.log.lock());
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }

    /// What was found when it was opened: the digest over its last commit, and by that over everything before. An anchor holds the same.
    pub fn opened_at(&self) -> [u8; 32] {
        self.opened_at
    }

    /// What is to be said of it.
    pub fn info(&self) -> Info {
        let shared = &self.shared;
        let checkpoint = poison(shared.checkpoint.lock()).clone();
        let log = shared.lock();
        let anchor = shared.anchored.as_ref().map(|anchored| &*anchored.anchor);
        Info {
            uuid: hex(&shared.uuid),
            store: shared.name.clone(),
            size: log.blocks * BLOCK,
            geometry: shared.geometry(),
            sequence: log.sequence,
            checkpoint: checkpoint.generation,
            clean: checkpoint.clean,
            used_blocks: checkpoint.live.iter().map(|live| u64::from(*live)).sum(),
            epochs: checkpoint.epochs.len(),
            master: shared.keys.newest().map_or(0, |master| master.generation),
            written_user: checkpoint.written_user,
            written_store: checkpoint.written_store,
            anchor: anchor.map(Anchor::describe),
            guarantees: guarantees(anchor, Some(shared.options.window), self.anchored),
            warnings: self.warnings.clone(),
        }
    }

    /// What it has counted since it was opened.
    pub fn statistics(&self) -> Statistics {
        self.shared.counters.read()
    }

    /// Makes the disk larger, while it is in use; the store grows with it where it can.
    ///
    /// # Errors
    /// [`DiskError::Setting`] for a size that cannot be; what the store says.
    pub fn resize(&self, size: u64) -> Result<(), DiskError> {
        let shared = &self.shared;
        shared.check_writable()?;
        let blocks = layout::check_size(size)?;
        shared.writer()?;
        let mut checkpoint = poison(shared.checkpoint.lock());
        let before = shared.lock().blocks;
        if blocks < before {
            return Err(DiskError::Setting(format!("the disk has {} bytes; it cannot become smaller", before * BLOCK)));
        }
        let mut geometry = shared.geometry();
        geometry.segments = geometry.segments.max(geometry.segments_for(blocks));
        if geometry.segments > geometry.most_segments() {
            return Err(DiskError::Setting(format!(
                "a disk that was made with {} bytes cannot grow to {size}: its checkpoints have room for {} segments, and \
                 {} would be needed; make a new disk",
                before * BLOCK,
                geometry.most_segments(),
                geometry.segments
            )));
        }
        if shared.store.size() < geometry.store_blocks() * BLOCK {
            shared.store.grow(geometry.store_blocks() * BLOCK)?;
            // Before a superblock says so: else a crash could leave one that is larger than its store.
            shared.store.flush()?;
        }
        let (mut superblock, behind) = recover::read_superblock(&*shared.store, &self.root)?;
        superblock.geometry = geometry;
        superblock.generation += 1;
        format::write_superblock(&*shared.store, &superblock, behind, &self.root, &shared.auditor)
            .map_err(|error| shared.fail(error))?;
        *poison(shared.geometry.write()) = geometry;
        let mut next = checkpoint.clone();
        next.generation += 1;
        next.blocks = blocks;
        next.live.resize(usize::try_from(geometry.segments).unwrap_or(usize::MAX), 0);
        shared.write_checkpoint(&next).map_err(|error| shared.fail(error))?;
        *checkpoint = next;
        let mut log = shared.lock();
        log.blocks = blocks;
        log.allocator.grow(geometry);
        log.period_began_with = log.allocator.available();
        drop(log);
        shared.size.store(blocks * BLOCK, Ordering::Release);
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stop();
    }
}

impl BlockStore for Disk {
    fn size(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut requests = [ReadRequest::new(offset, buffer)];
        self.shared.read_requests(&mut requests);
        let [request] = requests;
        request.outcome
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.shared.write(offset, data)
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.shared.options.read_only {
            return Ok(());
        }
        self.shared.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.shared.zero(offset, length)
    }

    fn trim_reads_zero(&self) -> bool {
        true
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.shared.zero(offset, length)
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        self.resize(size).map_err(DiskError::into_block)
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        self.shared.read_requests(requests);
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            let mut offset = request.offset;
            for buffer in &request.buffers {
                self.shared.write(offset, buffer)?;
                offset += buffer.len() as u64;
            }
        }
        Ok(())
    }

    fn is_slow(&self) -> bool {
        self.shared.store.is_slow()
    }

    fn describe(&self) -> String {
        format!("secure disk {} on {}", hex(&self.shared.uuid), self.shared.name)
    }
}

/// What a closed disk says of itself, and whether its anchor agrees. Nothing is written.
///
/// # Errors
/// As [`Disk::open`].
pub fn closed_info(
    store: &dyn BlockStore,
    key: &RootKey,
    anchor: Option<&dyn Anchor>,
    accept_rollback: bool,
) -> Result<Info, DiskError> {
    let recovered = recover::recover(store, key)?;
    judge(store, &recovered, anchor, accept_rollback)?;
    let checkpoint = &recovered.checkpoint;
    Ok(Info {
        uuid: hex(&recovered.superblock.uuid),
        store: store.describe(),
        size: checkpoint.blocks * BLOCK,
        geometry: recovered.superblock.geometry,
        sequence: recovered.replayed.sequence,
        checkpoint: checkpoint.generation,
        clean: checkpoint.clean && recovered.replayed.delta.is_empty(),
        used_blocks: checkpoint.live.iter().map(|live| u64::from(*live)).sum(),
        epochs: checkpoint.epochs.len(),
        master: recovered.keys.newest().map_or(0, |master| master.generation),
        written_user: checkpoint.written_user,
        written_store: checkpoint.written_store,
        anchor: anchor.map(Anchor::describe),
        guarantees: guarantees(anchor, None, recovered.superblock.anchored),
        warnings: warnings(&recovered),
    })
}

/// Compares what was found with what the anchor has seen; the anchor's state.
pub(crate) fn judge(
    store: &dyn BlockStore,
    recovered: &Recovered,
    anchor: Option<&dyn Anchor>,
    accept_rollback: bool,
) -> Result<Option<AnchorState>, DiskError> {
    let name = store.describe();
    let Some(anchor) = anchor else {
        if recovered.superblock.anchored && !accept_rollback {
            return Err(DiskError::AnchorMissing { store: name });
        }
        return Ok(None);
    };
    let mismatch =
        |what: &str| DiskError::AnchorMismatch { store: name.clone(), anchor: anchor.describe(), what: what.into() };
    if !recovered.superblock.anchored {
        return Err(mismatch("was given, and the disk was formatted without one"));
    }
    let state = anchor.read()?.ok_or_else(|| mismatch("holds nothing: it was erased, or is another one"))?;
    if state.disk != recovered.superblock.uuid {
        return Err(mismatch("belongs to another disk"));
    }
    let replayed = &recovered.replayed;
    let rollback = |found: String| DiskError::Rollback {
        store: name.clone(),
        anchor: anchor.describe(),
        anchored: state.sequence,
        found,
    };
    if replayed.sequence < state.sequence {
        return Err(rollback(format!("only commit {}", replayed.sequence)));
    }
    let passes = replayed.history.contains(&(state.sequence, state.root));
    // The journal from there on is gone; only the last writer that the anchor knows can have gone on so far.
    let beyond = recovered.checkpoint.sequence > state.sequence && recovered.checkpoint.fence == state.fence;
    if passes || beyond {
        return Ok(Some(state));
    }
    Err(rollback(format!("another commit {} (of another branch)", replayed.sequence)))
}

fn limits(options: &OpenOptions, recovered: &Recovered) -> Result<Limits, DiskError> {
    let geometry = recovered.superblock.geometry;
    let blocks = recovered.checkpoint.blocks;
    let least = (8 << 20) + (blocks * BLOCK).div_ceil(1 << 40) * (1 << 20);
    if options.memory < least {
        return Err(DiskError::Setting(format!(
            "{} bytes of memory are too little for this disk; {least} will do",
            options.memory
        )));
    }
    // A twelfth for each of: the delta, the frozen one, its sorted copy, the journal's part. 41 bytes an entry, seven of eight used.
    let buckets = 1_u64 << (options.memory / 12 / 41).ilog2();
    let journal = geometry.journal_blocks * 99 / 4;
    let delta = (buckets / 8 * 7).min(blocks).min(journal).max(256);
    let metadata = Geometry::metadata(blocks, geometry.slots());
    let nodes = delta * (u64::from(node::height(blocks)) + 1) + geometry.pages() + node::nodes(geometry.pages());
    let cleaning = delta * u64::from(options.cleaning_percent) / 100;
    Ok(Limits {
        delta: usize::try_from(delta).unwrap_or(usize::MAX),
        trimmed: 1 << 20,
        floor: metadata.min(nodes) + cleaning.min(geometry.slots() / 100) + 16,
    })
}

fn share(
    store: Arc<dyn BlockStore>,
    recovered: Recovered,
    anchored: Option<Anchored>,
    options: &OpenOptions,
    limits: Limits,
    fence: u64,
) -> Shared {
    let geometry = recovered.superblock.geometry;
    let mut checkpoint = recovered.checkpoint;
    // A crash between the two writes of a growth leaves a checkpoint that knows fewer segments.
    checkpoint.live.resize(usize::try_from(geometry.segments).unwrap_or(usize::MAX), 0);
    let mut log = Log::new(&checkpoint, geometry, limits.delta);
    let replayed = recovered.replayed;
    log.allocator.recovered(&replayed.places);
    if !replayed.delta.is_empty() {
        log.delta = replayed.delta;
    }
    log.period_began_with = log.allocator.available();
    (log.sequence, log.chain) = (replayed.sequence, replayed.chain);
    if let Some(ring) = replayed.ring {
        log.ring = ring;
    }
    Shared {
        name: store.describe(),
        store,
        uuid: recovered.superblock.uuid,
        geometry: RwLock::new(geometry),
        keys: recovered.keys,
        auditor: options.audit.clone(),
        options: options.clone(),
        limits,
        log: Mutex::new(log),
        changed: Condvar::new(),
        work: Condvar::new(),
        commits: Mutex::default(),
        committed: Condvar::new(),
        writer: RwLock::new(None),
        first_epoch: OnceLock::new(),
        anchored,
        cache: Cache::new(options.memory / 16 * 5),
        pool: Pool::new(512),
        counters: Counters::default(),
        failed: OnceLock::new(),
        stop: AtomicBool::new(false),
        fence,
        generation: AtomicU64::new(checkpoint.generation),
        merged: AtomicU64::new(0),
        size: AtomicU64::new(checkpoint.blocks * BLOCK),
        lifetime: (checkpoint.written_user, checkpoint.written_store),
        checkpoint: Mutex::new(checkpoint),
    }
}

fn start_workers(shared: &Arc<Shared>) -> Result<Vec<JoinHandle<()>>, DiskError> {
    let start = |name: &str, work: fn(&Shared)| {
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name(name.into());
        thread
            .spawn(move || work(&shared))
            .map_err(|error| DiskError::Setting(format!("cannot start a thread: {error}")))
    };
    let mut workers = vec![start("disk-checkpoint", Shared::work_on_checkpoints)?];
    if shared.store.is_slow() {
        workers.push(start("disk-write", Shared::work_on_batches)?);
    }
    Ok(workers)
}

impl Shared {
    /// Bytes written by users, and to the store for them, ever.
    pub(crate) fn lifetime(&self, statistics: &Statistics) -> (u64, u64) {
        let all = statistics.data_bytes
            + statistics.journal_bytes
            + statistics.index_bytes
            + statistics.cleaned_bytes
            + statistics.checkpoint_bytes;
        (self.lifetime.0 + statistics.user_written_bytes, self.lifetime.1 + all)
    }

    fn work_on_checkpoints(&self) {
        let tick = match self.options.window {
            AnchorWindow::Every(window) => window.clamp(Duration::from_millis(1), Duration::from_secs(60)),
            _ => Duration::from_secs(60),
        };
        while !self.stop.load(Ordering::Acquire) {
            let mut log = self.lock();
            let ready = log.frozen.as_ref().is_some_and(|frozen| frozen.ready);
            if !ready && !self.stop.load(Ordering::Acquire) {
                log = poison(self.work.wait_timeout(log, tick)).0;
            }
            let ready = log.frozen.as_ref().is_some_and(|frozen| frozen.ready);
            drop(log);
            if self.failed.get().is_some() {
                return;
            }
            let result = if ready { self.merge() } else { self.anchor_late() };
            if let Err(error) = result {
                self.fail(error);
                return;
            }
        }
    }

    /// With a window in time, moves the anchor on for commits that found it too early.
    fn anchor_late(&self) -> Result<(), DiskError> {
        if !matches!(self.options.window, AnchorWindow::Every(_)) || self.anchored.is_none() {
            return Ok(());
        }
        // Not while a commit is under way: what it says of itself counts only when it is durable.
        let commits = poison(self.commits.lock());
        if commits.running {
            return Ok(());
        }
        let (sequence, chain) = {
            let log = self.lock();
            (log.sequence, log.chain)
        };
        self.anchor_commit(sequence, chain, false)
    }

    fn work_on_batches(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let mut log = self.lock();
            if !log.has_queued() && !self.stop.load(Ordering::Acquire) {
                log = poison(self.work.wait(log));
            }
            let claimed = log.claim(4);
            drop(log);
            if !claimed.is_empty() && self.write_claimed(claimed, Vec::new()).is_err() {
                return;
            }
        }
    }
}

fn warnings(recovered: &Recovered) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(copy) = recovered.behind {
        warnings.push(format!("copy {copy} of the superblock is damaged or older than the other one, which was used"));
    }
    if recovered.damaged_checkpoints > 0 {
        warnings.push("one of the two checkpoint slots holds no authentic checkpoint; the other one was used".into());
    }
    warnings
}

/// What is guaranteed, in words.
fn guarantees(anchor: Option<&dyn Anchor>, window: Option<AnchorWindow>, anchored: bool) -> Vec<String> {
    let mut words = vec![
        "confidentiality: the store sees ciphertext, and no LBA".to_owned(),
        "integrity: a block that was changed, moved or swapped is an error that names it".to_owned(),
        "freshness while open: an older version of a block is an error".to_owned(),
        "atomicity: after a crash, all of a flush is there or nothing of it".to_owned(),
    ];
    let Some(anchor) = anchor else {
        words.push(if anchored {
            "freshness across opens: NONE, since the disk was opened without its anchor".to_owned()
        } else {
            "freshness across opens: NONE. Whoever controls the store can replace all of it by an older state; an anchor would \
             show that"
                .to_owned()
        });
        return words;
    };
    let window = match window {
        None => "up to the anchor's last state".to_owned(),
        Some(AnchorWindow::EveryFlush) => "with every flush".to_owned(),
        Some(AnchorWindow::Every(window)) => {
            format!("every {} ms; what was flushed since can be rolled back unseen after a crash", window.as_millis())
        }
        Some(AnchorWindow::OnClose) => {
            "when it is closed; after a crash, everything since it was opened can be rolled back unseen".to_owned()
        }
    };
    words.push(format!("freshness across opens: anchored in {} {window}", anchor.describe()));
    words.push(format!("the anchor: {}", anchor.promise()));
    words
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

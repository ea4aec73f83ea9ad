//! A disk on a simulated store, and the model of what it has to hold.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use nacre_core::{Anchor, AnchorState, BLOCK_SIZE, BlockStore, NoProgress};
use nacre_disk::{AnchorWindow, Audit, CheckOptions, Disk, DiskError, FormatOptions, OpenOptions, Report, RootKey};
use nacre_testkit::{
    Rng,
    sim::{Damage, MemoryAnchor, Model, Op, Recording, SimStore, Snapshot, Workload},
};

/// Bytes of a block.
pub(crate) const BLOCK: u64 = BLOCK_SIZE as u64;

/// What a disk is like.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) size: u64,
    pub(crate) reserve: u8,
    pub(crate) memory: u64,
    pub(crate) anchored: bool,
    pub(crate) window: AnchorWindow,
    pub(crate) background: bool,
    pub(crate) audit: Option<Arc<Ledger>>,
    pub(crate) key: [u8; 32],
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 16 << 20,
            reserve: 10,
            memory: 64 << 20,
            anchored: false,
            window: AnchorWindow::EveryFlush,
            background: false,
            audit: None,
            key: [7; 32],
        }
    }
}

impl Setup {
    /// One of many kinds of disks.
    pub(crate) fn random(rng: &mut Rng) -> Self {
        Self {
            size: (16 << 20) + (rng.next_u64() % 1024) * BLOCK,
            reserve: *rng.pick(&[5, 10, 20]),
            memory: *rng.pick(&[LITTLE_MEMORY, 64 << 20]),
            anchored: rng.below(2) == 0,
            window: *rng.pick(&[AnchorWindow::EveryFlush, AnchorWindow::OnClose]),
            ..Self::default()
        }
    }

    pub(crate) fn key(&self) -> RootKey {
        RootKey::from_bytes(&self.key).unwrap()
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.size / BLOCK
    }

    fn listener(&self) -> Option<Arc<dyn Audit>> {
        self.audit.clone().map(|ledger| ledger as Arc<dyn Audit>)
    }

    pub(crate) fn format_options(&self) -> FormatOptions {
        FormatOptions {
            size: Some(self.size),
            reserve_percent: self.reserve,
            audit: self.listener(),
            ..FormatOptions::default()
        }
    }

    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions {
            memory: self.memory,
            window: self.window,
            background: self.background,
            audit: self.listener(),
            ..OpenOptions::default()
        }
    }

    /// An empty store of the size that the disk needs.
    pub(crate) fn store(&self) -> Arc<SimStore> {
        SimStore::new(nacre_disk::store_size_for(&self.format_options()).unwrap())
    }

    /// A new disk: what a crash right after the formatting leaves of it.
    pub(crate) fn format(&self) -> Medium {
        let store = self.store();
        let anchor = self.anchored.then(MemoryAnchor::new);
        let port = anchor.as_deref().map(|anchor| anchor as &dyn Anchor);
        nacre_disk::format(&*store, &self.key(), port, &self.format_options()).unwrap();
        let recording = store.recording();
        let image = recording.crash(recording.len(), &Vec::new());
        Medium { image, anchor: anchor.and_then(|anchor| anchor.now()) }
    }

    /// Opens what is on a medium.
    pub(crate) fn open(&self, medium: &Medium) -> Result<Opened, DiskError> {
        let store = SimStore::of(medium.image.clone());
        self.open_store(store, medium.anchor)
    }

    /// Opens what is on a store.
    pub(crate) fn open_store(&self, store: Arc<SimStore>, anchored: Option<AnchorState>) -> Result<Opened, DiskError> {
        let anchor = self.anchored.then(|| MemoryAnchor::beside(&store, anchored));
        let port = anchor.clone().map(|anchor| anchor as Arc<dyn Anchor>);
        let shared: Arc<dyn BlockStore> = Arc::<SimStore>::clone(&store);
        let disk = Disk::open(shared, &self.key(), port, &self.open_options())?;
        Ok(Opened { store, anchor, disk })
    }

    /// Verifies a closed disk.
    pub(crate) fn check(&self, medium: &Medium) -> Result<Report, DiskError> {
        let store: Arc<dyn BlockStore> = SimStore::forgetful(medium.image.clone());
        let anchor = self.anchored.then(|| MemoryAnchor::beside(&SimStore::new(0), medium.anchor));
        let port = anchor.map(|anchor| anchor as Arc<dyn Anchor>);
        nacre_disk::check(store, &self.key(), port, &CheckOptions::default(), &NoProgress)
    }

    /// A closed disk has no damage at all.
    #[track_caller]
    pub(crate) fn check_clean(&self, medium: &Medium) {
        let report = self.check(medium).unwrap();
        assert!(report.is_clean(), "{:?}, {:?}, {:?}", report.damaged, report.inconsistent, report.warnings);
    }
}

/// The least that a disk takes: the index of one of some GiB does not fit.
pub(crate) const LITTLE_MEMORY: u64 = 9 << 20;

/// All that outlives a crash.
#[derive(Clone)]
pub(crate) struct Medium {
    pub(crate) image: Snapshot,
    pub(crate) anchor: Option<AnchorState>,
}

/// An open disk and what it stands on.
pub(crate) struct Opened {
    pub(crate) store: Arc<SimStore>,
    pub(crate) anchor: Option<Arc<MemoryAnchor>>,
    pub(crate) disk: Disk,
}

impl Opened {
    /// What is on the medium, were all that was written there.
    pub(crate) fn medium(&self) -> Medium {
        Medium { image: self.store.image(), anchor: self.anchor.as_ref().and_then(|anchor| anchor.now()) }
    }

    /// What a crash now leaves, by chance.
    pub(crate) fn crashed(&self, rng: &mut Rng) -> (usize, Medium) {
        let recording = self.store.recording();
        let point = recording.len();
        let plans = recording.plans(point, rng, 4);
        let plan = if plans.is_empty() { Vec::new() } else { rng.pick(&plans).clone() };
        let anchor = self.anchor.as_ref().and_then(|anchor| *rng.pick(&anchor.at(point)));
        (point, Medium { image: recording.crash(point, &plan), anchor })
    }
}

/// What happened to an open disk, for those who let it crash at each point.
pub(crate) struct Past {
    pub(crate) setup: Setup,
    pub(crate) recording: Recording,
    pub(crate) anchor: Option<Arc<MemoryAnchor>>,
    pub(crate) model: Model,
}

impl Past {
    /// What the anchor may hold after a crash at a point.
    pub(crate) fn anchors(&self, point: usize) -> Vec<Option<AnchorState>> {
        self.anchor.as_ref().map_or_else(|| vec![None], |anchor| anchor.at(point))
    }
}

/// A disk and its model.
pub(crate) struct Rig {
    pub(crate) setup: Setup,
    pub(crate) model: Model,
    /// Nothing for the moment between closing and opening.
    at: Option<Opened>,
    /// How many requests there were, for messages.
    ops: u64,
}

impl Rig {
    /// A new disk.
    pub(crate) fn new(setup: &Setup) -> Self {
        Self::on(setup, &setup.format(), Model::new(setup.blocks()))
    }

    /// A disk that is there.
    pub(crate) fn on(setup: &Setup, medium: &Medium, model: Model) -> Self {
        Self { setup: setup.clone(), model, at: Some(setup.open(medium).unwrap()), ops: 0 }
    }

    /// The open disk and what it stands on.
    pub(crate) fn at(&self) -> &Opened {
        self.at.as_ref().unwrap()
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.at().disk
    }

    pub(crate) fn point(&self) -> usize {
        self.at().store.position()
    }

    pub(crate) fn write(&mut self, lba: u64, count: u64) {
        let data = self.model.write(lba, count);
        self.watched(count, |disk| disk.write_at(lba * BLOCK, &data).unwrap());
    }

    fn zero(&mut self, trim: bool, lba: u64, count: u64) {
        self.model.zero(lba, count);
        let (offset, length) = (lba * BLOCK, count * BLOCK);
        self.watched(count, |disk| {
            let outcome = if trim { disk.trim(offset, length) } else { disk.write_zeroes(offset, length) };
            outcome.unwrap();
        });
    }

    /// Does something that the model did already, in so many steps, and notes whether the disk committed on its own meanwhile.
    fn watched(&mut self, steps: u64, act: impl FnOnce(&Disk)) {
        let (point, own) = (self.point(), self.disk().statistics().forced_commits);
        act(self.disk());
        if self.disk().statistics().forced_commits > own {
            self.model.committed_itself(point, self.model.step() - steps);
        }
    }

    pub(crate) fn flush(&mut self) {
        self.model.flush_begins(self.point());
        self.disk().flush().unwrap();
        self.model.flush_done(self.point());
    }

    pub(crate) fn read(&self, lba: u64, count: u64) {
        let mut data = vec![0; usize::try_from(count * BLOCK).unwrap()];
        self.disk().read_at(lba * BLOCK, &mut data).unwrap();
        self.model.compare(lba, &data).unwrap_or_else(|what| panic!("request {}: {what}", self.ops));
    }

    /// Does what a workload says.
    pub(crate) fn apply(&mut self, op: Op, rng: &mut Rng) {
        self.ops += 1;
        match op {
            Op::Write { lba, count } => self.write(lba, count),
            Op::Trim { lba, count } => self.zero(true, lba, count),
            Op::Zero { lba, count } => self.zero(false, lba, count),
            Op::Read { lba, count } => self.read(lba, count),
            Op::Flush => self.flush(),
            Op::Reopen => self.reopen(),
            Op::Crash => self.crash(rng),
            Op::Grow { more } => self.grow(self.model.blocks() + more),
        }
    }

    /// Makes it larger. That may be durable at once, or with the next flush.
    pub(crate) fn grow(&mut self, blocks: u64) {
        self.model.flush_begins(self.point());
        self.model.grow(blocks);
        self.model.flush_begins(self.point());
        self.disk().grow(blocks * BLOCK).unwrap();
        assert_eq!(self.disk().size(), blocks * BLOCK);
    }

    /// Does so many requests of a workload.
    pub(crate) fn work(&mut self, workload: &mut Workload, count: usize) {
        for _ in 0..count {
            let op = workload.next_op(self.model.blocks());
            self.apply(op, workload.rng());
        }
    }

    /// Closes it: what is on the medium then, were everything lost that was not flushed.
    pub(crate) fn close(mut self) -> (Medium, Past) {
        self.model.flush_begins(self.point());
        let Some(Opened { store, anchor, disk }) = self.at.take() else { unreachable!() };
        disk.close().unwrap();
        self.model.flush_done(store.position());
        let recording = store.recording();
        let image = recording.crash(recording.len(), &Vec::new());
        let medium = Medium { image, anchor: anchor.as_ref().and_then(|anchor| anchor.now()) };
        let Self { setup, model, .. } = self;
        (medium, Past { setup, recording, anchor, model })
    }

    /// The open disk alone.
    pub(crate) fn into_opened(self) -> Option<Opened> {
        self.at
    }

    /// Drops it: what happened until now.
    pub(crate) fn abandon(mut self) -> Past {
        let Some(Opened { store, anchor, disk }) = self.at.take() else { unreachable!() };
        let before = store.position();
        drop(disk);
        assert_eq!(store.position(), before, "a disk that is dropped writes nothing more");
        Past { setup: self.setup, recording: store.recording(), anchor, model: self.model }
    }

    /// The disk has to show one of these states, and goes on from there.
    pub(crate) fn settle(&mut self, candidates: &[u64]) {
        let verdict = self.model.judge(self.disk(), candidates, Damage::Unexpected);
        let verdict = verdict.unwrap_or_else(|what| panic!("after request {}: {what}", self.ops));
        self.model.crash_to(*verdict.steps.last().unwrap());
        let blocks = self.disk().size() / BLOCK;
        if blocks > self.model.blocks() {
            self.model.grow(blocks);
        }
    }

    /// Closes it, and opens it again.
    pub(crate) fn reopen(&mut self) {
        self.model.flush_begins(self.point());
        let Some(old) = self.at.take() else { unreachable!() };
        old.disk.close().unwrap();
        let recording = old.store.recording();
        let image = recording.crash(recording.len(), &Vec::new());
        let medium = Medium { image, anchor: old.anchor.and_then(|anchor| anchor.now()) };
        self.at = Some(self.setup.open(&medium).unwrap());
        self.settle(&[self.model.step()]);
    }

    /// It is gone, with any part of what was not flushed, and opened again.
    pub(crate) fn crash(&mut self, rng: &mut Rng) {
        let (point, medium) = self.at().crashed(rng);
        let candidates = self.model.candidates(point);
        self.at = None;
        self.at = Some(self.setup.open(&medium).unwrap());
        self.settle(&candidates);
    }

    /// All that was ever touched is as it has to be.
    #[track_caller]
    pub(crate) fn verify(&self) {
        if let Err(what) = self.model.judge(self.disk(), &[self.model.step()], Damage::Unexpected) {
            panic!("after request {}: {what}", self.ops);
        }
    }
}

/// Remembers each encryption, and panics when a nonce is used twice.
#[derive(Default)]
pub(crate) struct Ledger(Mutex<Book>);

/// What was encrypted under which key and nonce.
#[derive(Default)]
struct Book {
    seen: HashMap<([u8; 32], [u8; 12]), [u8; 32]>,
    repeated: Vec<String>,
}

impl Ledger {
    /// How many encryptions there were.
    ///
    /// # Panics
    /// Two of them had the same key and nonce.
    pub(crate) fn count(&self) -> usize {
        let book = self.0.lock().unwrap();
        assert!(book.repeated.is_empty(), "used twice: {:?}", book.repeated);
        book.seen.len()
    }

    /// How many keys there were.
    pub(crate) fn keys(&self) -> usize {
        let book = self.0.lock().unwrap();
        book.seen.keys().map(|(key, _)| key).collect::<std::collections::HashSet<_>>().len()
    }
}

impl Audit for Ledger {
    fn sealed(&self, key_id: [u8; 32], nonce: [u8; 12], plaintext_digest: [u8; 32]) {
        let mut book = self.0.lock().unwrap();
        if let Some(before) = book.seen.insert((key_id, nonce), plaintext_digest) {
            let same = if before == plaintext_digest { "for the same plaintext" } else { "for two plaintexts" };
            book.repeated.push(format!("key {:02x?}…, nonce {nonce:02x?}, {same}", &key_id[..4]));
        }
    }
}

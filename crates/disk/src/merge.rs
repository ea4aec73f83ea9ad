//! Checkpoints: what was committed is folded into the tree.
//!
//! A merge walks the tree once, in order of LBA, through the nodes that something changed in. Each of them is written to a fresh place;
//! what it replaces is freed. The new root, the new bitmap and the new counts are the next checkpoint. All the while users go on:
//! they read the frozen delta over the old tree, and write to the next delta. So writes never wait for a look at the tree.

use std::sync::{Arc, atomic::Ordering};

use nacre_core::{BlockError, Page, WriteRequest};
use rand_core::RngCore as _;

use crate::{
    DiskError,
    alloc::Kind,
    checkpoint::{Checkpoint, Root},
    clean::Cleaning,
    delta::{FastMap, Trimmed, Written},
    keys::{EpochKeys, EpochRecord, Purpose, SALT_LEN},
    layout::{BLOCK, MOST_EPOCHS},
    node::{self, Entry, FANOUT, FANOUT_BITS, Node},
    poison,
    shared::{BATCH, Frozen, Shared, Trees, runs},
    stats::add,
    tree::{Position, Tree},
};

/// Leaves that are read at once.
const AHEAD: usize = 512;
/// Nodes that are written at once: 1 MiB.
const OUT: usize = 256;

/// A merge under way.
pub(crate) struct Merge<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) keys: Arc<EpochKeys>,
    /// Places that the new checkpoint does not lead to any more.
    pub(crate) freed: Vec<u64>,
    /// Places that it leads to and the old one does not.
    pub(crate) used: Vec<u64>,
    /// How the numbers of blocks in use change, by epoch.
    pub(crate) epochs: FastMap<u32, i64>,
    pub(crate) cleaning: Cleaning,
    /// The old root and its height, of a disk that grew.
    raised: Option<(Entry, u8)>,
    out: Vec<(u64, Box<Page>)>,
}

impl Shared {
    /// Makes a checkpoint of what is frozen, if it is committed.
    pub(crate) fn merge(&self) -> Result<(), DiskError> {
        let mut checkpoint = poison(self.checkpoint.lock());
        let Some(frozen) = self.lock().frozen.clone().filter(|frozen| frozen.ready) else { return Ok(()) };
        let keys = self.sealing(&mut checkpoint)?;
        let blocks = self.lock().blocks;
        let cleaning = self.plan_cleaning(&checkpoint, &frozen);
        let mut merge = Merge {
            shared: self,
            keys,
            freed: Vec::new(),
            used: Vec::new(),
            epochs: FastMap::default(),
            cleaning,
            raised: None,
            out: Vec::new(),
        };
        let (changes, trims) = frozen.delta.sorted();
        let index = merge.index(checkpoint.index, blocks, &changes, &trims)?;
        drop((changes, trims));
        let mut next = Checkpoint {
            generation: checkpoint.generation + 1,
            sequence: frozen.sequence,
            chain: frozen.chain,
            journal_position: frozen.position,
            blocks,
            fence: self.fence,
            clean: false,
            index,
            cursor: merge.cleaning.cursor(blocks),
            ..checkpoint.clone()
        };
        (next.space, next.deferred) = merge.space(checkpoint.space, &checkpoint.deferred, &mut next.live)?;
        merge.write_out()?;
        self.account(&mut next, &merge);
        self.store.flush()?;
        self.write_checkpoint(&next)?;
        self.install(&frozen, &next);
        *checkpoint = next;
        Ok(())
    }

    /// The keys of the epoch to seal with; a new one where there is none, or where it is used up.
    fn sealing(&self, checkpoint: &mut Checkpoint) -> Result<Arc<EpochKeys>, DiskError> {
        let keys = poison(self.writer.read()).clone();
        match keys {
            Some(keys) if !keys.is_worn(self.options.epoch_messages) => Ok(keys),
            _ => self.begin_epoch(checkpoint),
        }
    }

    /// Begins an epoch: a new salt, made durable before anything is sealed with it.
    pub(crate) fn begin_epoch(&self, checkpoint: &mut Checkpoint) -> Result<Arc<EpochKeys>, DiskError> {
        let id = checkpoint.epochs.iter().map(|epoch| epoch.id).max().unwrap_or(0) + 1;
        let Some(master) = self.keys.newest() else { unreachable!("a disk has a master key") };
        let mut salt = [0; SALT_LEN];
        rand_core::OsRng.fill_bytes(&mut salt);
        let record = EpochRecord { id, master: master.generation, salt, live: 0 };
        let mut next = checkpoint.clone();
        next.generation += 1;
        next.clean = false;
        next.fence = self.fence;
        next.epochs.push(record.clone());
        self.write_checkpoint(&next)?;
        self.keys.add(record);
        self.first_epoch.get_or_init(|| id);
        *checkpoint = next;
        let Some(keys) = self.keys.epoch(id) else { unreachable!("the epoch was added above") };
        *poison(self.writer.write()) = Some(Arc::clone(&keys));
        Ok(keys)
    }

    /// Writes a checkpoint to its slot and makes it durable.
    pub(crate) fn write_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), DiskError> {
        let geometry = self.geometry();
        let Some(master) = self.keys.newest() else { unreachable!("a disk has a master key") };
        let room = geometry.checkpoint_blocks;
        let Some(bytes) = checkpoint.encode(&master, &self.uuid, room, &self.auditor) else {
            return Err(DiskError::Setting(format!(
                "a checkpoint with {} epochs (of {MOST_EPOCHS}), {} segments and {} deferred places does not fit its slot",
                checkpoint.epochs.len(),
                checkpoint.live.len(),
                checkpoint.deferred.len()
            )));
        };
        self.store.write_at(geometry.checkpoint_slot(checkpoint.generation) * BLOCK, &bytes)?;
        self.store.flush()?;
        add(&self.counters.checkpoint_bytes, bytes.len() as u64);
        self.generation.store(checkpoint.generation, Ordering::Release);
        Ok(())
    }

    /// Brings the numbers of blocks by epoch up to date, and forgets epochs that nothing needs any more.
    fn account(&self, next: &mut Checkpoint, merge: &Merge<'_>) {
        for epoch in &mut next.epochs {
            let change = merge.epochs.get(&epoch.id).copied().unwrap_or(0);
            epoch.live = epoch.live.saturating_add_signed(change);
        }
        // What was written since this was frozen is of this open's epochs; so are the journal's records since.
        let ours = self.first_epoch.get().copied().unwrap_or(0);
        let dead = |epoch: &EpochRecord| epoch.live == 0 && epoch.id < ours;
        next.epochs.iter().filter(|epoch| dead(epoch)).for_each(|epoch| self.keys.forget(epoch.id));
        next.epochs.retain(|epoch| !dead(epoch));
        let statistics = self.counters.read();
        let (user, store) = self.lifetime(&statistics);
        (next.written_user, next.written_store) = (user, store);
    }

    /// From now on the new checkpoint is what there is.
    fn install(&self, frozen: &Frozen, next: &Checkpoint) {
        let mut log = self.lock();
        log.trees = Trees { index: next.index, space: next.space };
        log.frozen = None;
        log.allocator.complete(frozen.period, next.live.clone());
        log.period_began_with = log.allocator.available();
        log.ring.release(frozen.position, frozen.release);
        drop(log);
        self.changed.notify_all();
        add(&self.counters.checkpoints, 1);
        if self.options.discard {
            self.discard_empty();
        }
    }
}

/// A child of a node that changes: its slot, and the writes and trims below it.
type Touched<'b> = (u64, &'b [Written<'b>], &'b [Trimmed]);

/// How many of some children of a level are folded together: not more than a batch, nor more than have so many leaves to be read.
fn at_once(children: &[Touched<'_>], level: u8, most: usize) -> usize {
    let mut leaves = 0;
    let fits = |(_, mine, _): &&Touched<'_>| {
        leaves += if level == 1 { mine.len().min(FANOUT) } else { 0 };
        leaves <= most
    };
    children.iter().take(BATCH).take_while(fits).count().max(1)
}

impl Merge<'_> {
    /// The new index.
    fn index(&mut self, old: Root, blocks: u64, changes: &[Written<'_>], trims: &[Trimmed]) -> Result<Root, DiskError> {
        let height = node::height(blocks).max(old.height);
        let mut entry = old.entry;
        if height > old.height && !entry.is_hole() {
            self.raised = Some((entry, old.height));
            entry = Entry::HOLE;
        }
        let root = Position { tree: Tree::Index, level: height - 1, number: 0 };
        let entry = self.fold(root, entry, changes, trims)?;
        Ok(Root { entry, height })
    }

    /// Of a disk that grew, the old root stands where the first node of its level is, and the nodes above it are new. Whether a node is
    /// one of those, and what its first entry is.
    fn raised(&self, at: Position) -> Option<Entry> {
        let (entry, height) = self.raised.filter(|(_, height)| at.number == 0 && at.level >= *height)?;
        Some(if at.level == height { entry } else { Entry::HOLE })
    }

    /// Folds changes and trims into a node; what leads to it from now on.
    fn fold(
        &mut self,
        at: Position,
        mut old: Entry,
        changes: &[Written<'_>],
        trims: &[Trimmed],
    ) -> Result<Entry, DiskError> {
        let (first, count) = at.span();
        let raised = self.raised(at);
        if raised.is_none() && trims.iter().any(|(from, to)| *from <= first && first + count <= *to) {
            self.free_all(at, old)?;
            old = Entry::HOLE;
        }
        let mut page = self.blank();
        if !old.is_hole() {
            *Node::of_mut(&mut page) = (*self.shared.load(&old, at)?).clone();
        }
        let node = Node::of_mut(&mut page);
        if let Some(entry) = raised {
            node.set(0, entry);
        }
        let before = self.used.len() + self.freed.len();
        if at.level == 0 {
            self.fold_leaf(first, node, changes, trims)?;
        } else {
            self.fold_children(at, node, changes, trims)?;
        }
        let aged = !old.is_hole() && self.cleaning.retires(old.epoch());
        if before == self.used.len() + self.freed.len() && !aged && raised.is_none() {
            self.shared.wipe(vec![page]);
            return Ok(old);
        }
        self.free(old);
        if node.entries.iter().all(Entry::is_hole) {
            self.shared.wipe(vec![page]);
            return Ok(Entry::HOLE);
        }
        self.write_node(at, page)
    }

    fn fold_leaf(
        &mut self,
        first: u64,
        node: &mut Node,
        changes: &[Written<'_>],
        trims: &[Trimmed],
    ) -> Result<(), DiskError> {
        for (from, to) in trims {
            for lba in (*from).max(first)..(*to).min(first + FANOUT as u64) {
                self.free(node.entry(lba - first));
                node.set(lba - first, Entry::HOLE);
            }
        }
        for (lba, entry) in changes {
            self.free(node.entry(lba - first));
            self.take_in(**entry);
            node.set(lba - first, **entry);
        }
        self.shared.merged.fetch_add(changes.len() as u64, Ordering::Relaxed);
        self.clean_leaf(first, node, changes)
    }

    fn fold_children(
        &mut self,
        at: Position,
        node: &mut Node,
        changes: &[Written<'_>],
        trims: &[Trimmed],
    ) -> Result<(), DiskError> {
        let below = |slot: u64| Position { level: at.level - 1, number: (at.number << FANOUT_BITS) | slot, ..at };
        let mut touched: Vec<Touched<'_>> = Vec::new();
        let (mut changes, mut trims) = (changes, trims);
        for slot in 0..FANOUT as u64 {
            let (first, count) = below(slot).span();
            let end = first + count;
            let (mine, rest) = changes.split_at(changes.partition_point(|(lba, _)| *lba < end));
            changes = rest;
            let past = trims.partition_point(|(_, to)| *to <= first);
            trims = trims.get(past..).unwrap_or_default();
            let over = trims.get(..trims.partition_point(|(from, _)| *from < end)).unwrap_or_default();
            let new = self.raised(below(slot)).is_some();
            if new || !mine.is_empty() || !over.is_empty() || self.cleaning.visits(first, end) {
                touched.push((slot, mine, over));
            }
        }
        // What is read ahead has to stay in memory until its turn comes.
        let ahead = AHEAD.min(self.shared.cache.nodes() / 2);
        let mut rest = touched.as_slice();
        while !rest.is_empty() {
            let (group, after) = rest.split_at(at_once(rest, at.level - 1, ahead));
            rest = after;
            self.fetch(group.iter().map(|(slot, _, _)| (node.entry(*slot), below(*slot))));
            if at.level == 2 {
                self.fetch_leaves(group.iter().map(|(slot, mine, _)| (node.entry(*slot), below(*slot), *mine)));
            }
            for (slot, mine, over) in group {
                let child = self.fold(below(*slot), node.entry(*slot), mine, over)?;
                node.set(*slot, child);
            }
        }
        Ok(())
    }

    /// Brings the leaves of changes into memory, below several nodes at once: where few blocks changed below each, a medium that likes
    /// many requests gets them.
    fn fetch_leaves<'b>(&self, parents: impl Iterator<Item = (Entry, Position, &'b [Written<'b>])>) {
        let mut wanted = Vec::new();
        for (entry, at, changes) in parents.filter(|(entry, ..)| !entry.is_hole()) {
            let Ok(parent) = self.shared.load(&entry, at) else { continue };
            for leaf in changes.chunk_by(|one, other| one.0 >> FANOUT_BITS == other.0 >> FANOUT_BITS) {
                let Some((lba, _)) = leaf.first() else { continue };
                let number = lba >> FANOUT_BITS;
                wanted.push((parent.entry(number & 127), Position { level: 0, number, ..at }));
            }
        }
        self.fetch(wanted.into_iter());
    }

    /// Brings nodes into memory, all at once. What fails here fails where it is needed.
    fn fetch(&self, children: impl Iterator<Item = (Entry, Position)>) {
        let wanted: Vec<_> = children.filter(|(entry, _)| !entry.is_hole()).collect();
        if wanted.len() > 1 {
            drop(self.shared.load_many(&wanted));
        }
    }

    /// Frees everything below, and the node itself.
    fn free_all(&mut self, at: Position, entry: Entry) -> Result<(), DiskError> {
        if entry.is_hole() {
            return Ok(());
        }
        let node = self.shared.load(&entry, at)?;
        if at.level == 0 {
            node.entries.iter().for_each(|entry| self.free(*entry));
        } else {
            let below = |slot: u64| Position { level: at.level - 1, number: (at.number << FANOUT_BITS) | slot, ..at };
            let children: Vec<_> = (0..).zip(&node.entries).map(|(slot, entry)| (*entry, below(slot))).collect();
            for group in children.chunks(BATCH) {
                self.fetch(group.iter().copied());
                group.iter().try_for_each(|(entry, at)| self.free_all(*at, *entry))?;
            }
        }
        self.free(entry);
        Ok(())
    }

    /// The checkpoint does not lead there any more.
    pub(crate) fn free(&mut self, entry: Entry) {
        if !entry.is_hole() {
            self.freed.push(entry.place());
            *self.epochs.entry(entry.epoch()).or_default() -= 1;
        }
    }

    /// The checkpoint leads there now.
    pub(crate) fn take_in(&mut self, entry: Entry) {
        self.used.push(entry.place());
        *self.epochs.entry(entry.epoch()).or_default() += 1;
    }

    pub(crate) fn blank(&self) -> Box<Page> {
        let mut page = self.shared.pool.take(1).pop().unwrap_or_else(Page::zeroed);
        page.0.fill(0);
        page
    }

    /// Writes a node to a fresh slot.
    fn write_node(&mut self, at: Position, page: Box<Page>) -> Result<Entry, DiskError> {
        let place = self.shared.slot(Kind::Index)?;
        let entry = self.seal(at, page, place)?;
        self.take_in(entry);
        Ok(entry)
    }

    /// Seals a node or a bitmap page, and sends it to its place.
    pub(crate) fn seal(&mut self, at: Position, mut page: Box<Page>, place: u64) -> Result<Entry, DiskError> {
        let count = self.keys.reserve(Purpose::Index, 1)?;
        let plain = Arc::new(Node::of(&page).clone());
        let sealer = self.keys.sealer(Purpose::Index);
        let tag = sealer.seal(count, &at.aad(), &mut page.0, &self.shared.auditor);
        let entry = Entry::new(place, self.keys.id, count, tag);
        self.shared.cache.put(entry.version(), plain);
        add(&self.shared.counters.index_bytes, BLOCK);
        self.send(place, page)?;
        Ok(entry)
    }

    /// Sends a sealed block to its place.
    pub(crate) fn send(&mut self, place: u64, page: Box<Page>) -> Result<(), BlockError> {
        self.out.push((place, page));
        if self.out.len() >= OUT { self.write_out() } else { Ok(()) }
    }

    pub(crate) fn write_out(&mut self) -> Result<(), BlockError> {
        self.out.sort_unstable_by_key(|(place, _)| *place);
        let requests: Vec<WriteRequest<'_>> = runs(self.out.iter().map(|(place, page)| (*place, &**page)));
        self.shared.store.write_many(&requests)?;
        drop(requests);
        self.shared.pool.give(self.out.drain(..).map(|(_, page)| page));
        Ok(())
    }
}

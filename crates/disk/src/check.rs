//! Checking all of a closed disk: every node, every bitmap page, every block of data, and whether index and bitmap agree.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use nacre_core::{Anchor, BLOCK_SIZE, BlockStore, Page, Progress, ReadRequest, Task};
use serde::Serialize;
use zerocopy::IntoBytes as _;

use crate::{
    DiskError, OpenOptions, RootKey,
    disk::Disk,
    layout::{BLOCK, PAGE_SLOTS},
    node::{Entry, FANOUT, FANOUT_BITS, Node},
    poison,
    shared::{BATCH, Shared},
    space::is_set,
    tree::{PAGE, Position, Tree},
};

/// Damaged ranges that a report lists one by one.
const MOST_RANGES: usize = 100_000;

/// How a disk is checked.
#[derive(Clone, Debug, Default)]
pub struct CheckOptions {
    /// Threads; 0 for as many as there are processors.
    pub threads: usize,
    /// Also tell where everything is on the store.
    pub dump_layout: bool,
    /// Check a disk that has an anchor without it.
    pub accept_rollback: bool,
}

/// Logical blocks that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The first LBA.
    pub first: u64,
    /// How many blocks.
    pub count: u64,
    /// What is wrong.
    pub what: String,
}

/// A part of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What is there.
    pub name: String,
    /// The first block of the store.
    pub first: u64,
    /// How many blocks.
    pub blocks: u64,
    /// How many of them are in use, where that is known.
    pub used: Option<u64>,
}

/// What a check found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Blocks of data that were read and verified.
    pub data_blocks: u64,
    /// Index nodes and bitmap pages that were read and verified.
    pub index_blocks: u64,
    /// The last commit.
    pub sequence: u64,
    /// What cannot be read, by LBA.
    pub damaged: Vec<Damage>,
    /// Damage of the bitmap and disagreements of it with the index: the disk can be read, and should be copied to another one.
    pub inconsistent: Vec<String>,
    /// What is damaged and was made good by a copy.
    pub warnings: Vec<String>,
    /// Where everything is, if that was asked for.
    pub layout: Vec<Region>,
}

impl Report {
    /// Whether all of the disk is as it has to be.
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.inconsistent.is_empty() && self.warnings.is_empty()
    }
}

/// Checks a disk that nobody has open. Nothing is written.
///
/// # Errors
/// As [`Disk::open`]: what cannot be opened cannot be checked. Damage inside of it is in the report.
pub fn check(
    store: std::sync::Arc<dyn BlockStore>,
    key: &RootKey,
    anchor: Option<std::sync::Arc<dyn Anchor>>,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<Report, DiskError> {
    let open = OpenOptions {
        read_only: true,
        background: false,
        accept_rollback: options.accept_rollback,
        ..OpenOptions::default()
    };
    let disk = Disk::open(store, key, anchor, &open)?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let shared = disk.shared();
    let info = disk.info();
    let slots = usize::try_from(shared.geometry().slots().div_ceil(64)).unwrap_or(usize::MAX);
    let task = progress.begin(&format!("checking {}", info.store), Some(info.used_blocks * BLOCK));
    let check = Check {
        shared,
        task: &*task,
        used: (0..slots).map(|_| AtomicU64::new(0)).collect(),
        data: AtomicU64::new(0),
        index: AtomicU64::new(0),
        damaged: Mutex::default(),
        inconsistent: Mutex::default(),
    };
    check.index_tree(threads);
    check.journal();
    check.space_tree();
    task.done("checked");
    let mut report = Report {
        data_blocks: check.data.into_inner(),
        index_blocks: check.index.into_inner(),
        sequence: info.sequence,
        damaged: join(check.damaged.into_inner().unwrap_or_default()),
        inconsistent: check.inconsistent.into_inner().unwrap_or_default(),
        warnings: info.warnings,
        layout: Vec::new(),
    };
    if options.dump_layout {
        report.layout = layout(shared);
    }
    Ok(report)
}

struct Check<'a> {
    shared: &'a Shared,
    task: &'a dyn Task,
    /// A bit for each slot that something leads to.
    used: Vec<AtomicU64>,
    data: AtomicU64,
    index: AtomicU64,
    damaged: Mutex<BTreeMap<u64, Damage>>,
    inconsistent: Mutex<Vec<String>>,
}

impl Check<'_> {
    fn damaged(&self, first: u64, count: u64, what: String) {
        let mut damaged = poison(self.damaged.lock());
        if damaged.len() < MOST_RANGES {
            damaged.insert(first, Damage { first, count, what });
        } else if let Some(mut last) = damaged.last_entry() {
            let end = (first + count).max(last.get().first + last.get().count);
            last.get_mut().count = end - last.get().first;
            "too many damaged ranges to list; somewhere in these".clone_into(&mut last.get_mut().what);
        }
    }

    fn inconsistent(&self, what: String) {
        let mut inconsistent = poison(self.inconsistent.lock());
        if inconsistent.len() < 1000 {
            inconsistent.push(what);
        }
    }

    /// Something leads to a block.
    fn mark(&self, entry: &Entry) {
        let slot = entry.place().saturating_sub(self.shared.geometry().data_start());
        let word = usize::try_from(slot / 64).ok().and_then(|at| self.used.get(at));
        if word.is_some_and(|word| word.fetch_or(1 << (slot % 64), Ordering::Relaxed) & (1 << (slot % 64)) != 0) {
            self.inconsistent(format!("two entries lead to block {} of the store", entry.place()));
        }
    }

    fn node(&self, entry: &Entry, at: Position) -> Option<std::sync::Arc<Node>> {
        self.mark(entry);
        self.index.fetch_add(1, Ordering::Relaxed);
        self.task.advance(BLOCK);
        match self.shared.load(entry, at) {
            Ok(node) => Some(node),
            Err(error) if at.tree == Tree::Index => {
                let blocks = self.shared.lock().blocks;
                let (first, count) = at.span();
                self.damaged(first, count.min(blocks.saturating_sub(first)), error.to_string());
                None
            }
            Err(error) => {
                self.inconsistent(error.to_string());
                None
            }
        }
    }

    /// All of the index and the data, several subtrees at a time.
    fn index_tree(&self, threads: usize) {
        let root = self.shared.lock().trees.index;
        let mut work = vec![(root.entry, Position { tree: Tree::Index, level: root.height - 1, number: 0 })];
        // Down to the nodes above the leaves; there are enough of them for all threads, and few enough to list.
        while work.iter().any(|(_, at)| at.level > 1) {
            work = work.into_iter().flat_map(|(entry, at)| self.children(&entry, at)).collect();
        }
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some((entry, at)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.subtree(entry, *at);
                    }
                });
            }
        });
    }

    fn children(&self, entry: &Entry, at: Position) -> Vec<(Entry, Position)> {
        let node = if entry.is_hole() { None } else { self.node(entry, at) };
        let below = |slot: u64| Position { level: at.level - 1, number: (at.number << FANOUT_BITS) | slot, ..at };
        let entries = node.iter().flat_map(|node| (0..FANOUT as u64).map(|slot| (node.entry(slot), below(slot))));
        entries.filter(|(entry, _)| !entry.is_hole()).collect()
    }

    fn subtree(&self, entry: &Entry, at: Position) {
        if entry.is_hole() {
            return;
        }
        if at.level > 0 {
            self.children(entry, at).iter().for_each(|(entry, at)| self.subtree(entry, *at));
            return;
        }
        let Some(node) = self.node(entry, at) else { return };
        let (first, _) = at.span();
        let entries = (first..).zip(&node.entries).filter(|(_, entry)| !entry.is_hole());
        let entries: Vec<(u64, Entry)> = entries.map(|(lba, entry)| (lba, *entry)).collect();
        entries.iter().for_each(|(_, entry)| self.mark(entry));
        let current: Vec<(u64, Entry)> = {
            let log = self.shared.lock();
            entries.into_iter().filter(|(lba, _)| log.delta.get(*lba).is_none()).collect()
        };
        self.blocks(&current);
    }

    /// Blocks of data.
    fn blocks(&self, blocks: &[(u64, Entry)]) {
        for group in blocks.chunks(BATCH) {
            let mut pages = vec![Page([0; BLOCK_SIZE]); group.len()];
            let mut requests: Vec<_> = group
                .iter()
                .zip(&mut pages)
                .map(|((_, entry), page)| ReadRequest::new(entry.place() * BLOCK, &mut page.0))
                .collect();
            self.shared.store.read_many(&mut requests);
            let outcomes: Vec<_> = requests.into_iter().map(|request| request.outcome).collect();
            for (((lba, entry), page), outcome) in group.iter().zip(&mut pages).zip(outcomes) {
                let place = entry.place();
                match outcome {
                    Ok(()) if self.shared.open_data(entry, *lba, &mut page.0) => {}
                    Ok(()) => {
                        self.damaged(*lba, 1, format!("block {place} of the store is not what was written there"))
                    }
                    Err(error) => self.damaged(*lba, 1, error.to_string()),
                }
            }
            self.data.fetch_add(group.len() as u64, Ordering::Relaxed);
            self.task.advance(group.len() as u64 * BLOCK);
        }
    }

    /// What the journal says over the checkpoint.
    fn journal(&self) {
        let log = self.shared.lock();
        let blocks: Vec<_> = log.delta.sorted().0.into_iter().map(|(lba, entry)| (lba, *entry)).collect();
        drop(log);
        self.blocks(&blocks);
    }

    /// The bitmap, and whether it agrees.
    fn space_tree(&self) {
        let root = self.shared.lock().trees.space;
        let deferred = poison(self.shared.checkpoint.lock()).deferred.clone();
        deferred.iter().for_each(|place| self.mark(&Entry::new(*place, 0, 0, [0; 16])));
        let mut work = vec![(root.entry, Position { tree: Tree::Space, level: root.height - 1, number: 0 })];
        while work.iter().any(|(_, at)| at.level > 0) {
            work = work.into_iter().flat_map(|(entry, at)| self.children(&entry, at)).collect();
        }
        let mut pages: BTreeMap<u64, Entry> = BTreeMap::new();
        for (entry, at) in work.iter().filter(|(entry, _)| !entry.is_hole()) {
            let Some(node) = self.node(entry, *at) else { return };
            let found = (at.number << FANOUT_BITS..).zip(&node.entries).filter(|(_, entry)| !entry.is_hole());
            pages.extend(found.map(|(number, entry)| (number, *entry)));
        }
        pages.values().for_each(|entry| self.mark(entry));
        let none = Node { entries: [Entry::HOLE; FANOUT] };
        for number in 0..self.shared.geometry().pages() {
            let page = match pages.get(&number) {
                None => none.clone(),
                Some(entry) => match self.shared.load(entry, Position { tree: Tree::Space, level: PAGE, number }) {
                    Ok(page) => (*page).clone(),
                    Err(error) => {
                        self.inconsistent(error.to_string());
                        continue;
                    }
                },
            };
            self.compare(number, page.as_bytes());
        }
    }

    fn compare(&self, number: u64, bits: &[u8]) {
        let geometry = self.shared.geometry();
        let begin = number * PAGE_SLOTS;
        let (mut lost, mut unmarked) = (0_u64, 0_u64);
        for slot in begin..(begin + PAGE_SLOTS).min(geometry.slots()) {
            let word = usize::try_from(slot / 64).ok().and_then(|at| self.used.get(at));
            let used = word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (slot % 64)) != 0);
            match (is_set(bits, slot - begin), used) {
                (true, false) => lost += 1,
                (false, true) => unmarked += 1,
                _ => {}
            }
        }
        if unmarked > 0 {
            self.inconsistent(format!("{unmarked} blocks in use are free in bitmap page {number}"));
        }
        // Where a part of the index cannot be read, nothing is known of what it leads to.
        if lost > 0 && poison(self.damaged.lock()).is_empty() {
            self.inconsistent(format!("{lost} blocks that nothing leads to are in use in bitmap page {number}"));
        }
    }
}

/// Ranges that touch and are damaged in the same way become one.
fn join(damaged: BTreeMap<u64, Damage>) -> Vec<Damage> {
    let mut joined: Vec<Damage> = Vec::new();
    for damage in damaged.into_values() {
        match joined.last_mut() {
            Some(last) if last.first + last.count >= damage.first => {
                let end = (damage.first + damage.count).max(last.first + last.count);
                last.count = end - last.first;
            }
            _ => joined.push(damage),
        }
    }
    joined
}

fn layout(shared: &Shared) -> Vec<Region> {
    let geometry = shared.geometry();
    let region = |name: &str, first, blocks| Region { name: name.to_owned(), first, blocks, used: None };
    let mut regions = vec![
        region("superblock", 0, 1),
        region("superblock, copy", 1, 1),
        region("checkpoint A", 2, geometry.checkpoint_blocks),
        region("checkpoint B", 2 + geometry.checkpoint_blocks, geometry.checkpoint_blocks),
        region("journal", geometry.journal_start(), geometry.journal_blocks),
    ];
    if let Some(journal) = regions.last_mut() {
        journal.used = Some(shared.lock().ring.used);
    }
    let live = poison(shared.checkpoint.lock()).live.clone();
    for (number, live) in (0_u64..).zip(live) {
        let first = geometry.data_start() + number * geometry.segment_blocks;
        let mut segment = region(&format!("segment {number}"), first, geometry.segment_blocks);
        segment.used = Some(u64::from(live));
        regions.push(segment);
    }
    regions
}

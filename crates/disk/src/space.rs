//! Which slots are in use: bitmap pages, one bit a slot, in a tree of their own.
//!
//! A page that changes is written to a fresh slot, like everything else; so its old slot and its new one change the bitmap in turn. The
//! circle is cut on both sides: new slots are taken before any page is written, a few too many rather than too few, and what pages
//! and their nodes leave behind is freed by the next checkpoint (the *deferred* places).

use std::collections::BTreeSet;

use nacre_core::BlockError;
use zerocopy::IntoBytes as _;

use crate::{
    DiskError,
    alloc::{Kind, Run},
    checkpoint::Root,
    layout::{Geometry, PAGE_SLOTS},
    merge::Merge,
    node::{self, Entry, FANOUT_BITS, Node},
    shared::{BATCH, Shared},
    tree::{PAGE, Position, Tree},
};

fn page_of(geometry: &Geometry, place: u64) -> u64 {
    place.saturating_sub(geometry.data_start()) / PAGE_SLOTS
}

fn page_position(number: u64) -> Position {
    Position { tree: Tree::Space, level: PAGE, number }
}

impl Shared {
    /// Opens segments until so many slots are at hand, or there are none to open.
    pub(crate) fn refill(&self, kind: Kind, wanted: u64) -> Result<(), DiskError> {
        loop {
            let (segment, root) = {
                let mut log = self.lock();
                if log.allocator.at_hand(kind) >= wanted {
                    return Ok(());
                }
                match log.allocator.choose(kind) {
                    Some(segment) => (segment, log.trees.space),
                    None if log.allocator.is_opening() => {
                        drop(log);
                        std::thread::yield_now();
                        continue;
                    }
                    None if log.allocator.at_hand(kind) > 0 => return Ok(()),
                    None => return Err(BlockError::NoSpace("all of the disk's reserve is in use".into()).into()),
                }
            };
            match self.free_slots(segment, &root) {
                Ok(runs) => self.lock().allocator.supply(kind, segment, runs),
                Err(error) => {
                    let mut log = self.lock();
                    log.allocator.give_back(kind, segment);
                    // A checkpoint may have overtaken the look at the bitmap.
                    if log.trees.space == root {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The free slots of a segment, by the bitmap of the last checkpoint.
    fn free_slots(&self, segment: usize, root: &Root) -> Result<Vec<Run>, DiskError> {
        let geometry = self.geometry();
        let first = segment as u64 * geometry.segment_blocks;
        let end = first + geometry.segment_blocks;
        let mut runs: Vec<Run> = Vec::new();
        for number in first / PAGE_SLOTS..end.div_ceil(PAGE_SLOTS) {
            let bits = self.bitmap(number, root)?;
            let begin = number * PAGE_SLOTS;
            for slot in first.max(begin)..end.min(begin + PAGE_SLOTS) {
                if is_set(bits.as_bytes(), slot - begin) {
                    continue;
                }
                let place = geometry.data_start() + slot;
                match runs.last_mut() {
                    Some(run) if run.start + run.length == place => run.length += 1,
                    _ => runs.push(Run { start: place, length: 1 }),
                }
            }
        }
        Ok(runs)
    }

    /// A bitmap page; one that was never written is empty.
    pub(crate) fn bitmap(&self, number: u64, root: &Root) -> Result<Node, BlockError> {
        match self.look_up(Tree::Space, root, &[number]).pop() {
            Some(Ok(entry)) if !entry.is_hole() => Ok((*self.load(&entry, page_position(number))?).clone()),
            Some(Err(error)) => Err(error),
            _ => Ok(Node { entries: [Entry::HOLE; node::FANOUT] }),
        }
    }
}

pub(crate) fn is_set(bits: &[u8], slot: u64) -> bool {
    let byte = usize::try_from(slot / 8).ok().and_then(|at| bits.get(at)).copied().unwrap_or(0);
    byte & (1 << (slot % 8)) != 0
}

/// Sets or clears a bit; whether it was the other way before.
fn change(bits: &mut [u8], slot: u64, to: bool) -> bool {
    let Some(byte) = usize::try_from(slot / 8).ok().and_then(|at| bits.get_mut(at)) else { return false };
    let (mask, before) = (1 << (slot % 8), *byte);
    *byte = if to { before | mask } else { before & !mask };
    before != *byte
}

impl Merge<'_> {
    /// The new bitmap, and the places that the next checkpoint is to free. `live` is brought up to date.
    pub(crate) fn space(
        &mut self,
        old: Root,
        deferred: &[u64],
        live: &mut Vec<u32>,
    ) -> Result<(Root, Vec<u64>), DiskError> {
        let geometry = self.shared.geometry();
        live.resize(usize::try_from(geometry.segments).unwrap_or(usize::MAX), 0);
        let mut freed = std::mem::take(&mut self.freed);
        freed.extend_from_slice(deferred);
        let mut used = std::mem::take(&mut self.used);
        let mut pages: BTreeSet<u64> = freed.iter().chain(&used).map(|place| page_of(&geometry, *place)).collect();
        if self.cleaning.is_complete() {
            pages.extend(0..geometry.pages()); // all of them leave their old epochs
        }
        if pages.is_empty() {
            return Ok((old, Vec::new()));
        }
        let height = node::height(geometry.pages()).max(old.height);
        let mut spare = Vec::new();
        while spare.len() < pages.len() + parents(&pages, height) {
            let place = self.shared.slot(Kind::Index)?;
            pages.insert(page_of(&geometry, place));
            spare.push(place);
        }
        used.extend_from_slice(&spare);
        freed.sort_unstable();
        used.sort_unstable();
        spare.reverse(); // taken from the end, in ascending order
        let mut later = Vec::new();
        let numbers: Vec<u64> = pages.into_iter().collect();
        let mut changes = Vec::with_capacity(numbers.len());
        let (mut freed, mut used) = (freed.as_slice(), used.as_slice());
        for group in numbers.chunks(BATCH) {
            for (number, entry) in group.iter().zip(self.shared.look_up(Tree::Space, &old, group)) {
                let entry = entry?;
                let end = geometry.data_start() + (number + 1) * PAGE_SLOTS;
                let (clear, rest) = freed.split_at(freed.partition_point(|place| *place < end));
                freed = rest;
                let (set, rest) = used.split_at(used.partition_point(|place| *place < end));
                used = rest;
                let replaced = self.page(*number, &entry, clear, set, live, &mut spare)?;
                if !entry.is_hole() {
                    self.leave(&entry, &mut later);
                }
                changes.push((*number, replaced));
            }
        }
        let mut root = old;
        while root.height < height {
            if !root.entry.is_hole() {
                let mut page = self.blank();
                Node::of_mut(&mut page).set(0, root.entry);
                let at = Position { tree: Tree::Space, level: root.height, number: 0 };
                let place = self.spare(&mut spare)?;
                root.entry = self.settle(at, page, place)?;
            }
            root.height += 1;
        }
        let at = Position { tree: Tree::Space, level: height - 1, number: 0 };
        root.entry = self.raise(at, root.entry, &changes, &mut spare, &mut later)?;
        later.extend(spare);
        Ok((root, later))
    }

    fn spare(&self, spare: &mut Vec<u64>) -> Result<u64, DiskError> {
        spare.pop().ok_or_else(|| self.disagree("too few slots were set aside for the bitmap".into()))
    }

    /// What the next checkpoint frees.
    fn leave(&mut self, entry: &Entry, later: &mut Vec<u64>) {
        later.push(entry.place());
        *self.epochs.entry(entry.epoch()).or_default() -= 1;
    }

    /// Seals at a slot that is marked as used already.
    fn settle(&mut self, at: Position, page: Box<nacre_core::Page>, place: u64) -> Result<Entry, DiskError> {
        let entry = self.seal(at, page, place)?;
        *self.epochs.entry(entry.epoch()).or_default() += 1;
        Ok(entry)
    }

    /// A bitmap page with what changed.
    fn page(
        &mut self,
        number: u64,
        old: &Entry,
        clear: &[u64],
        set: &[u64],
        live: &mut [u32],
        spare: &mut Vec<u64>,
    ) -> Result<Entry, DiskError> {
        let geometry = self.shared.geometry();
        let mut page = self.blank();
        if !old.is_hole() {
            *Node::of_mut(&mut page) = (*self.shared.load(old, page_position(number))?).clone();
        }
        let begin = geometry.data_start() + number * PAGE_SLOTS;
        for (places, to) in [(clear, false), (set, true)] {
            for place in places {
                if !change(&mut page.0, place - begin, to) {
                    let is = if to { "in use" } else { "free" };
                    return Err(self.disagree(format!("block {place} of the store is {is} already")));
                }
                if let Some(count) = live.get_mut(geometry.segment_of(*place)) {
                    *count = if to { *count + 1 } else { count.saturating_sub(1) };
                }
            }
        }
        let place = self.spare(spare)?;
        self.settle(page_position(number), page, place)
    }

    fn disagree(&self, what: String) -> DiskError {
        DiskError::Damaged { store: self.shared.name.clone(), what: format!("index and bitmap disagree: {what}") }
    }

    /// Folds new pages into the bitmap's tree.
    fn raise(
        &mut self,
        at: Position,
        old: Entry,
        changes: &[(u64, Entry)],
        spare: &mut Vec<u64>,
        later: &mut Vec<u64>,
    ) -> Result<Entry, DiskError> {
        let mut page = self.blank();
        if !old.is_hole() {
            *Node::of_mut(&mut page) = (*self.shared.load(&old, at)?).clone();
            self.leave(&old, later);
        }
        let node = Node::of_mut(&mut page);
        let shift = FANOUT_BITS * u32::from(at.level);
        for group in changes.chunk_by(|one, other| one.0 >> shift == other.0 >> shift) {
            let Some((key, entry)) = group.first() else { continue };
            let number = key >> shift;
            let child = if at.level == 0 {
                *entry
            } else {
                let below = Position { level: at.level - 1, number, ..at };
                self.raise(below, node.entry(number & 127), group, spare, later)?
            };
            node.set(number & 127, child);
        }
        let place = self.spare(spare)?;
        self.settle(at, page, place)
    }
}

/// Nodes above so many pages, in a tree of that height.
fn parents(pages: &BTreeSet<u64>, height: u8) -> usize {
    let mut sum = 1; // for a root that becomes a child
    for level in 1..=u32::from(height) {
        let mut last = u64::MAX;
        for page in pages {
            let number = page >> (FANOUT_BITS * level);
            sum += usize::from(number != last);
            last = number;
        }
    }
    sum + usize::from(height)
}

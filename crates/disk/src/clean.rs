//! Cleaning: blocks that lie alone in segments that are nearly empty are moved together, so that free slots come in long runs.
//!
//! Nothing depends on it but speed on media that like sequences: writes use holes as they are. So it is done along the way. Each
//! merge chooses victims, as many as its share of the bandwidth allows, and moves the blocks of theirs that it meets in the leaves it
//! writes anyway, and in some more leaves that it visits for that, round and round through the index. A moved block is verified and
//! sealed anew. The same walk retires epochs, when there are many.

use nacre_core::BLOCK_SIZE;

use crate::{
    DiskError,
    alloc::Kind,
    checkpoint::Checkpoint,
    delta::Written,
    keys::Purpose,
    layout::{BLOCK, MOST_EPOCHS},
    merge::Merge,
    node::{Entry, FANOUT, Node},
    shared::{Frozen, Shared},
    stats::add,
};

/// Epochs above which the oldest are retired along the way.
const MANY_EPOCHS: usize = MOST_EPOCHS / 2;
/// Epochs above which a merge walks through all of the index to retire the oldest at once.
const TOO_MANY_EPOCHS: usize = MOST_EPOCHS - 16;

/// What a merge cleans.
#[derive(Debug, Default)]
pub(crate) struct Cleaning {
    /// By segment: whether its blocks are to move.
    victims: Vec<bool>,
    /// Blocks that may still be moved.
    budget: u64,
    /// LBAs whose leaves are visited although nothing changed there: (first, end).
    visit: (u64, u64),
    /// Blocks of this epoch and earlier ones are sealed anew.
    retire: u32,
}

impl Cleaning {
    pub(crate) fn visits(&self, first: u64, end: u64) -> bool {
        self.visit.0 < end && first < self.visit.1
    }

    pub(crate) fn retires(&self, epoch: u32) -> bool {
        epoch <= self.retire
    }

    /// Where the next merge goes on.
    pub(crate) fn cursor(&self, blocks: u64) -> u64 {
        if self.visit.1 >= blocks { 0 } else { self.visit.1 }
    }

    /// Whether all of the index is walked through to retire epochs.
    pub(crate) fn is_complete(&self) -> bool {
        self.visit == (0, u64::MAX)
    }
}

impl Shared {
    pub(crate) fn plan_cleaning(&self, checkpoint: &Checkpoint, frozen: &Frozen) -> Cleaning {
        let share = u64::from(self.options.cleaning_percent);
        let budget = (frozen.delta.len() as u64 * share).div_ceil(100);
        let mut cleaning = Cleaning { visit: (checkpoint.cursor, checkpoint.cursor), ..Cleaning::default() };
        let mut ids: Vec<u32> = checkpoint.epochs.iter().map(|epoch| epoch.id).collect();
        ids.sort_unstable();
        if ids.len() > MANY_EPOCHS {
            cleaning.retire = ids.get(ids.len() / 4).copied().unwrap_or(0);
        }
        if ids.len() > TOO_MANY_EPOCHS {
            return Cleaning { budget: u64::MAX, visit: (0, u64::MAX), ..cleaning };
        }
        let log = self.lock();
        let scarce = log.allocator.empty_segments() < checkpoint.live.len().div_ceil(8);
        let victims = if scarce && budget > 0 { log.allocator.victims(budget) } else { Vec::new() };
        drop(log);
        if victims.is_empty() && cleaning.retire == 0 {
            return cleaning;
        }
        cleaning.victims = vec![false; checkpoint.live.len()];
        for segment in victims {
            if let Some(victim) = cleaning.victims.get_mut(segment) {
                *victim = true;
            }
        }
        cleaning.budget = budget;
        // Leaves that are visited and left as they are cost a read at most; as many as blocks may be moved.
        cleaning.visit.1 = checkpoint.cursor.saturating_add(budget * FANOUT as u64);
        cleaning
    }

    /// Tells the store that nobody needs segments that are empty as of a checkpoint.
    pub(crate) fn discard_empty(&self) {
        let geometry = self.geometry();
        let empty = self.lock().allocator.hold_emptied();
        for segment in &empty {
            let first = geometry.data_start() + *segment as u64 * geometry.segment_blocks;
            if let Err(error) = self.store.trim(first * BLOCK, geometry.segment_blocks * BLOCK) {
                tracing::debug!(disk = %self.name, %error, "a trim of the store failed");
                break;
            }
        }
        let mut log = self.lock();
        empty.into_iter().for_each(|segment| log.allocator.give_back(Kind::Data, segment));
    }
}

impl Merge<'_> {
    /// Moves the blocks of a leaf that are to move. `changes` were written just now, and stay.
    pub(crate) fn clean_leaf(&mut self, first: u64, node: &mut Node, changes: &[Written<'_>]) -> Result<(), DiskError> {
        if self.cleaning.budget == 0 || (self.cleaning.victims.is_empty() && self.cleaning.retire == 0) {
            return Ok(());
        }
        let geometry = self.shared.geometry();
        for slot in 0..FANOUT as u64 {
            let entry = node.entry(slot);
            if entry.is_hole() || self.cleaning.budget == 0 {
                continue;
            }
            let victim = self.cleaning.victims.get(geometry.segment_of(entry.place())).is_some_and(|victim| *victim);
            let fresh = changes.binary_search_by_key(&(first + slot), |(lba, _)| *lba).is_ok();
            if !fresh && (victim || self.cleaning.retires(entry.epoch())) {
                let moved = self.move_block(first + slot, &entry)?;
                node.set(slot, moved);
            }
        }
        Ok(())
    }

    /// Seals a block anew at another place. One that is damaged stays as it is: its readers are told.
    fn move_block(&mut self, lba: u64, entry: &Entry) -> Result<Entry, DiskError> {
        let mut page = self.blank();
        self.shared.store.read_at(entry.place() * BLOCK, &mut page.0)?;
        if !self.shared.open_data(entry, lba, &mut page.0) {
            tracing::warn!(disk = %self.shared.name, lba, place = entry.place(), "cleaning found a damaged block");
            return Ok(*entry);
        }
        let place = self.shared.slot(Kind::Data)?;
        let count = self.keys.reserve(Purpose::Data, 1)?;
        let sealer = self.keys.sealer(Purpose::Data);
        let tag = sealer.seal(count, &lba.to_le_bytes(), &mut page.0, &self.shared.auditor);
        let moved = Entry::new(place, self.keys.id, count, tag);
        self.free(*entry);
        self.take_in(moved);
        self.cleaning.budget -= 1;
        add(&self.shared.counters.cleaned_bytes, BLOCK_SIZE as u64);
        self.send(place, page)?;
        Ok(moved)
    }
}

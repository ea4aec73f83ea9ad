//! Where the next blocks go.
//!
//! Blocks are written into the free slots of one open segment after the other, in ascending order; the segment with the fewest blocks in
//! use is opened next, so a fresh disk is written in sequence, and a used one in runs as long as they are to be had. Holes are
//! used as they are: nothing has to be moved for a write to go on, and cleaning only makes runs longer.
//!
//! A slot is used once a period. A period ends with a freeze, when what was written in it goes into a checkpoint; until that
//! checkpoint is durable, segments written in the period are busy and not opened again. So no block that a crash might bring
//! back is ever overwritten, and what is free is what the bitmap of the last checkpoint says.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::layout::Geometry;

/// What a slot is for: data and index live in segments of their own, since they die at different times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Index,
}

/// Free slots in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) length: u64,
}

#[derive(Debug, Default)]
struct Open {
    /// Segments with what is left of their free slots.
    queue: VecDeque<(usize, VecDeque<Run>)>,
    /// Segments that were chosen, and whose free slots are being looked up.
    chosen: Vec<usize>,
    free: u64,
}

impl Open {
    fn holds(&self, segment: usize) -> bool {
        self.chosen.contains(&segment) || self.queue.iter().any(|(open, _)| *open == segment)
    }
}

#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    /// Blocks in use, by segment, as of the last checkpoint.
    live: Vec<u32>,
    /// The last period in which a segment was written to.
    written: Vec<u64>,
    data: Open,
    index: Open,
    period: u64,
    /// The last period whose checkpoint is durable.
    completed: u64,
    /// Free slots of segments that are neither open nor busy.
    closed_free: u64,
    /// Segments that the last checkpoint emptied.
    emptied: Vec<usize>,
    /// Slots that the journal wrote before a crash, by segment: in use until a checkpoint knows them.
    recovered: HashMap<usize, HashSet<u64>>,
}

impl Allocator {
    pub(crate) fn new(geometry: Geometry, live: Vec<u32>) -> Self {
        let written = vec![0; live.len()];
        let (data, index) = (Open::default(), Open::default());
        let (emptied, recovered) = (Vec::new(), HashMap::new());
        let (period, completed, closed_free) = (1, 0, 0);
        let mut new = Self { geometry, live, written, data, index, period, completed, closed_free, emptied, recovered };
        new.count();
        new
    }

    fn open(&mut self, kind: Kind) -> &mut Open {
        match kind {
            Kind::Data => &mut self.data,
            Kind::Index => &mut self.index,
        }
    }

    fn capacity(&self) -> u64 {
        self.geometry.segment_blocks
    }

    fn is_open(&self, segment: usize) -> bool {
        self.data.holds(segment) || self.index.holds(segment)
    }

    /// Whether a segment may be opened: its free slots are what the checkpoint's bitmap says.
    fn is_ready(&self, segment: usize) -> bool {
        self.written.get(segment).is_some_and(|written| *written <= self.completed) && !self.is_open(segment)
    }

    fn count(&mut self) {
        let ready = (0..self.live.len()).filter(|segment| self.is_ready(*segment));
        self.closed_free = ready.map(|segment| self.free_in(segment)).sum();
    }

    /// Free slots of a segment that nobody has opened.
    fn free_in(&self, segment: usize) -> u64 {
        let live = self.live.get(segment).map_or(0, |live| u64::from(*live));
        let recovered = self.recovered.get(&segment).map_or(0, |places| places.len() as u64);
        self.capacity().saturating_sub(live + recovered)
    }

    /// Slots that can be had before the next checkpoint.
    pub(crate) fn available(&self) -> u64 {
        self.closed_free + self.data.free + self.index.free
    }

    /// Slots that can be had without opening a segment. Where there is none to open, those of the other kind count too.
    pub(crate) fn at_hand(&self, kind: Kind) -> u64 {
        if self.closed_free == 0 {
            return self.data.free + self.index.free;
        }
        match kind {
            Kind::Data => self.data.free,
            Kind::Index => self.index.free,
        }
    }

    /// Whether somebody looks up the free slots of a segment.
    pub(crate) fn is_opening(&self) -> bool {
        !self.data.chosen.is_empty() || !self.index.chosen.is_empty()
    }

    /// The segment to open next; it counts as open from then on. `None` where there is none with a free slot.
    pub(crate) fn choose(&mut self, kind: Kind) -> Option<usize> {
        let mut best: Option<(u64, usize)> = None;
        for segment in 0..self.live.len() {
            if self.written.get(segment).is_none_or(|written| *written > self.completed) {
                continue;
            }
            let free = self.free_in(segment);
            if free == 0 || best.is_some_and(|(most, _)| free <= most) || self.is_open(segment) {
                continue;
            }
            best = Some((free, segment));
            if free == self.capacity() {
                break; // there is none better
            }
        }
        let (free, segment) = best?;
        self.closed_free -= free;
        self.open(kind).chosen.push(segment);
        Some(segment)
    }

    /// Takes in the free slots of a segment that was chosen, in ascending order.
    pub(crate) fn supply(&mut self, kind: Kind, segment: usize, runs: Vec<Run>) {
        let period = self.period;
        let runs = match self.recovered.get(&segment) {
            None => runs,
            Some(places) => runs.into_iter().flat_map(|run| without(run, places)).collect(),
        };
        let open = self.open(kind);
        open.chosen.retain(|chosen| *chosen != segment);
        open.free += runs.iter().map(|run| run.length).sum::<u64>();
        if runs.is_empty() {
            // Not to be chosen again at once.
            self.mark(segment, period);
        } else {
            open.queue.push_back((segment, runs.into()));
        }
    }

    /// A segment that was chosen could not be looked up.
    pub(crate) fn give_back(&mut self, kind: Kind, segment: usize) {
        self.open(kind).chosen.retain(|chosen| *chosen != segment);
        self.count();
    }

    fn mark(&mut self, segment: usize, period: u64) {
        if let Some(written) = self.written.get_mut(segment) {
            *written = period;
        }
    }

    /// One slot; `None` where a segment has to be opened first.
    pub(crate) fn take(&mut self, kind: Kind) -> Option<u64> {
        self.take_run(kind, 1).map(|run| run.start)
    }

    /// Slots in a row, at least one and at most `most`; `None` where a segment has to be opened first.
    pub(crate) fn take_run(&mut self, kind: Kind, most: u64) -> Option<Run> {
        let other = if kind == Kind::Data { Kind::Index } else { Kind::Data };
        let lend = self.open(kind).free == 0 && self.closed_free == 0;
        let period = self.period;
        let open = self.open(if lend { other } else { kind });
        let (segment, runs) = open.queue.front_mut()?;
        let segment = *segment;
        let run = runs.front_mut()?;
        let taken = Run { start: run.start, length: run.length.min(most) };
        run.start += taken.length;
        run.length -= taken.length;
        if run.length == 0 {
            runs.pop_front();
        }
        if runs.is_empty() {
            open.queue.pop_front();
        }
        open.free -= taken.length;
        self.mark(segment, period);
        Some(taken)
    }

    /// Slots that recovery found in use, though the checkpoint's bitmap does not know them. Their segments' other slots stay free: on
    /// a full disk a journal has written into the holes of every segment, and the next checkpoint has to go somewhere.
    pub(crate) fn recovered(&mut self, places: &[u64]) {
        for place in places {
            self.recovered.entry(self.geometry.segment_of(*place)).or_default().insert(*place);
        }
        self.count();
    }

    /// Ends a period; which one.
    pub(crate) fn freeze(&mut self) -> u64 {
        self.period += 1;
        self.period - 1
    }

    /// The checkpoint of a period is durable, and these are the blocks in use.
    pub(crate) fn complete(&mut self, period: u64, live: Vec<u32>) {
        self.completed = period;
        self.recovered.clear();
        let before = std::mem::replace(&mut self.live, live);
        let emptied = before.iter().zip(&self.live).enumerate().filter(|(_, (before, now))| **before > 0 && **now == 0);
        self.emptied = emptied.map(|(segment, _)| segment).collect();
        self.written.resize(self.live.len(), 0);
        self.count();
    }

    /// The segments that the last checkpoint emptied, as chosen ones, so that nobody opens them until they are given back as data's.
    pub(crate) fn hold_emptied(&mut self) -> Vec<usize> {
        let mut held = std::mem::take(&mut self.emptied);
        held.retain(|segment| self.is_ready(*segment));
        self.data.chosen.extend_from_slice(&held);
        self.count();
        held
    }

    /// The disk grew.
    pub(crate) fn grow(&mut self, geometry: Geometry) {
        self.geometry = geometry;
        let segments = usize::try_from(geometry.segments).unwrap_or(usize::MAX);
        self.live.resize(segments, 0);
        self.written.resize(segments, 0);
        self.count();
    }

    /// Segments without a block in use that can be opened.
    pub(crate) fn empty_segments(&self) -> usize {
        self.live.iter().enumerate().filter(|(segment, live)| **live == 0 && self.is_ready(*segment)).count()
    }

    /// Segments to clean: the emptiest that are not empty, with at most `blocks` blocks in use together.
    pub(crate) fn victims(&self, mut blocks: u64) -> Vec<usize> {
        let half = self.capacity() / 2;
        let worth = |segment: usize, live: u32| live > 0 && u64::from(live) <= half && self.is_ready(segment);
        let candidates = self.live.iter().enumerate().filter(|(segment, live)| worth(*segment, **live));
        let mut candidates: Vec<(u32, usize)> = candidates.map(|(segment, live)| (*live, segment)).collect();
        candidates.sort_unstable();
        let affordable = candidates.into_iter().take_while(|(live, _)| {
            let fits = u64::from(*live) <= blocks;
            blocks = blocks.saturating_sub(u64::from(*live));
            fits
        });
        affordable.map(|(_, segment)| segment).collect()
    }
}

/// What of a run is not in use.
fn without(run: Run, used: &HashSet<u64>) -> Vec<Run> {
    let mut parts: Vec<Run> = Vec::new();
    for place in (run.start..run.start + run.length).filter(|place| !used.contains(place)) {
        match parts.last_mut() {
            Some(last) if last.start + last.length == place => last.length += 1,
            _ => parts.push(Run { start: place, length: 1 }),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        let mut geometry = Geometry::plan(4096, 10);
        geometry.segments = 3;
        geometry
    }

    fn all(allocator: &mut Allocator, kind: Kind) -> Option<u64> {
        if allocator.at_hand(kind) == 0 {
            let segment = allocator.choose(kind)?;
            let start = geometry().data_start() + segment as u64 * 256;
            allocator.supply(kind, segment, vec![Run { start, length: 256 }]);
        }
        allocator.take(kind)
    }

    #[test]
    fn a_slot_is_used_once_until_its_checkpoint_is_durable() {
        let mut allocator = Allocator::new(geometry(), vec![0; 3]);
        let mut seen = HashSet::new();
        for step in 0..768 {
            assert_eq!(allocator.available(), 768 - step);
            let kind = if step % 5 == 0 { Kind::Index } else { Kind::Data };
            match all(&mut allocator, kind) {
                Some(place) => assert!(seen.insert(place)),
                None => break, // the rest belongs to the other kind
            }
        }
        let period = allocator.freeze();
        let before = allocator.available();
        allocator.complete(period, vec![256, 100, 256]);
        // Written in the period that is durable now: its free slots are those of the bitmap again.
        assert!(allocator.available() >= before);
        let mut fresh = Allocator::new(geometry(), vec![10, 0, 200]);
        assert_eq!(fresh.choose(Kind::Data), Some(1));
        assert_eq!(fresh.victims(50), [0]);
        let before = fresh.available();
        fresh.recovered(&[geometry().data_start() + 20]);
        assert_eq!(fresh.available(), before - 1);
        assert_eq!(fresh.choose(Kind::Data), Some(0));
        fresh.supply(Kind::Data, 0, vec![Run { start: geometry().data_start() + 10, length: 246 }]);
        let taken: Vec<u64> = (0..245).map(|_| fresh.take(Kind::Data).unwrap()).collect();
        assert!(!taken.contains(&(geometry().data_start() + 20)));
    }
}

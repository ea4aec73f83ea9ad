//! What a store did, and what a crash may have left of it.

use std::{collections::BTreeMap, sync::Arc};

use super::snapshot::{Block, Snapshot};
use crate::Rng;

/// Something that was done to a store, and went well, at least in part.
#[derive(Clone, Debug)]
pub enum Event {
    /// Blocks were written, or trimmed: then the content is rubbish.
    Write {
        /// The first.
        block: u64,
        /// What.
        content: Vec<Arc<Block>>,
    },
    /// All before is durable.
    Flush,
    /// The store has so many blocks now.
    Grow {
        /// How many.
        blocks: u64,
    },
}

/// The smallest part of what was done since the last flush that a crash keeps or loses.
#[derive(Clone, Debug)]
pub enum Unit {
    /// One block was written.
    Write {
        /// Which.
        block: u64,
        /// What.
        content: Arc<Block>,
    },
    /// The store grew.
    Grow {
        /// To so many blocks.
        blocks: u64,
    },
}

/// What became of a unit that was not lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It reached the medium.
    Kept,
    /// Only these of its eight sectors did, a bit each.
    Torn(u8),
}

/// What a crash keeps of the units of a window, in the order in which they reached the medium.
pub type Plan = Vec<(usize, Fate)>;

/// At most so many units are tried in all combinations.
const ALL_COMBINATIONS: usize = 6;

/// What was done to a store, from one image on.
#[derive(Clone, Debug)]
pub struct Recording {
    start: Snapshot,
    events: Vec<Event>,
    /// The images at each flush, by the number of events up to it.
    durable: BTreeMap<usize, Snapshot>,
}

impl Recording {
    pub(super) fn new(start: Snapshot) -> Self {
        Self { durable: BTreeMap::from([(0, start.clone())]), start, events: Vec::new() }
    }

    pub(super) fn push(&mut self, event: Event) {
        let flushed = matches!(event, Event::Flush);
        if flushed {
            let at = self.events.len();
            let image = self.crash(at, &self.everything(at));
            self.durable.insert(at + 1, image);
        }
        self.events.push(event);
    }

    /// How many events there are: a crash is possible at each point from 0 to this.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The events.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The image after all that was durable at a point, and where the window of what was not begins.
    pub fn durable(&self, at: usize) -> (usize, &Snapshot) {
        self.durable.range(..=at).next_back().map(|(at, image)| (*at, image)).unwrap_or((0, &self.start))
    }

    /// What a crash at a point may keep or lose.
    pub fn window(&self, at: usize) -> Vec<Unit> {
        let (from, _) = self.durable(at);
        let mut units = Vec::new();
        for event in self.events.get(from..at).unwrap_or_default() {
            match event {
                Event::Write { block, content } => units.extend(
                    (*block..).zip(content).map(|(block, content)| Unit::Write { block, content: Arc::clone(content) }),
                ),
                Event::Flush => {}
                Event::Grow { blocks } => units.push(Unit::Grow { blocks: *blocks }),
            }
        }
        units
    }

    /// The plan by which nothing of a window is lost.
    pub fn everything(&self, at: usize) -> Plan {
        (0..self.window(at).len()).map(|unit| (unit, Fate::Kept)).collect()
    }

    /// The image that a crash at a point leaves. Writes beyond the end of a store whose growth was lost are lost too.
    ///
    /// # Panics
    /// The plan names a unit that there is not.
    pub fn crash(&self, at: usize, plan: &Plan) -> Snapshot {
        let (_, image) = self.durable(at);
        let mut image = image.clone();
        let units = self.window(at);
        for (unit, _) in plan {
            if let Some(Unit::Grow { blocks }) = units.get(*unit) {
                image.resize((*blocks).max(image.blocks()));
            }
        }
        for (unit, fate) in plan {
            match (units.get(*unit).unwrap(), fate) {
                (Unit::Write { block, .. }, _) if *block >= image.blocks() => {}
                (Unit::Write { block, content }, Fate::Kept) => image.set(*block, Some(Arc::clone(content))),
                (Unit::Write { block, content }, Fate::Torn(sectors)) => image.change(*block, |bytes| {
                    for (sector, (old, new)) in bytes.chunks_mut(512).zip(content.chunks(512)).enumerate() {
                        if sectors & (1 << sector) != 0 {
                            old.copy_from_slice(new);
                        }
                    }
                }),
                (Unit::Grow { .. }, _) => {}
            }
        }
        image
    }

    /// What to try at a point. Windows of up to six units: all combinations, and each unit torn. Larger ones: everything, nothing but
    /// the last, all but one, and so many random parts in random order, torn here and there.
    ///
    /// Each plan keeps something of the last event, for without it the image is one of the point before.
    pub fn plans(&self, at: usize, rng: &mut Rng, samples: usize) -> Vec<Plan> {
        let units = self.window(at).len();
        let last = match at.checked_sub(1).and_then(|last| self.events.get(last)) {
            Some(Event::Write { content, .. }) => content.len(),
            Some(Event::Grow { .. }) => 1,
            Some(Event::Flush) | None => return vec![Plan::new()],
        };
        let fresh = |plan: &Plan| plan.iter().any(|(unit, _)| *unit >= units - last);
        let kept = |units: &mut dyn Iterator<Item = usize>| units.map(|unit| (unit, Fate::Kept)).collect::<Plan>();
        let mut plans = Vec::new();
        if units <= ALL_COMBINATIONS {
            for mask in 0..1usize << units {
                plans.push(kept(&mut (0..units).filter(|unit| mask & (1 << unit) != 0)));
            }
            for unit in 0..units {
                let mut plan = self.everything(at);
                plan[unit].1 = Fate::Torn(sectors(rng));
                plans.push(plan);
            }
            if units > 1 {
                plans.push(self.everything(at).into_iter().rev().collect());
            }
        } else {
            plans.push(self.everything(at));
            plans.push(kept(&mut (units - last..units)));
            let missing = rng.below(units);
            plans.push(kept(&mut (0..units).filter(|unit| *unit != missing)));
            for _ in 0..samples {
                plans.push(random_plan(units, rng));
            }
        }
        plans.retain(fresh);
        plans
    }

    /// All that a block ever held, the oldest first, without what it holds at the end.
    pub fn older_versions(&self, block: u64) -> Vec<Block> {
        let mut versions = vec![self.start.bytes(block)];
        for event in &self.events {
            if let Event::Write { block: first, content } = event
                && let Some(at) = block.checked_sub(*first)
                && let Some(content) = content.get(usize::try_from(at).unwrap())
            {
                versions.push(**content);
            }
        }
        versions.dedup();
        versions.pop();
        versions
    }
}

fn sectors(rng: &mut Rng) -> u8 {
    u8::try_from(1 + rng.below(254)).unwrap()
}

fn random_plan(units: usize, rng: &mut Rng) -> Plan {
    let eighths = *rng.pick(&[1, 4, 7]);
    let torn = rng.below(4) == 0;
    let mut plan = Plan::new();
    for unit in 0..units {
        if rng.below(8) < eighths {
            let fate = if torn && rng.below(4) == 0 { Fate::Torn(sectors(rng)) } else { Fate::Kept };
            plan.push((unit, fate));
        }
    }
    if rng.below(2) == 0 {
        for at in (1..plan.len()).rev() {
            plan.swap(at, rng.below(at + 1));
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use nacre_core::BlockStore as _;

    use super::*;
    use crate::sim::SimStore;

    fn recording() -> Recording {
        let store = SimStore::new(1 << 16);
        store.write_at(0, &[1; 4096]).unwrap();
        store.flush().unwrap();
        store.write_at(0, &[2; 8192]).unwrap();
        store.write_at(4096, &[3; 4096]).unwrap();
        store.recording()
    }

    #[test]
    fn a_crash_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let recording = recording();
        let content = |plan: &Plan| {
            let image = recording.crash(4, plan);
            (image.bytes(0)[0], image.bytes(1)[0])
        };
        assert_eq!(content(&vec![]), (1, 0));
        assert_eq!(content(&recording.everything(4)), (2, 3));
        assert_eq!(content(&vec![(2, Fate::Kept), (1, Fate::Kept)]), (1, 2));
        let torn = recording.crash(4, &vec![(0, Fate::Torn(0b10))]);
        assert_eq!((torn.bytes(0)[511], torn.bytes(0)[512], torn.bytes(0)[1024]), (1, 2, 1));
        let images = recording.crash(0, &vec![]);
        assert_eq!(images.written().count(), 0);
        assert_eq!(recording.older_versions(0).len(), 2);
        assert_eq!(recording.older_versions(1).len(), 2);
    }

    #[test]
    fn small_windows_are_tried_in_all_combinations() {
        let recording = recording();
        let plans = recording.plans(4, &mut Rng::new(1), 0);
        let whole = plans.iter().filter(|plan| plan.iter().all(|(_, fate)| *fate == Fate::Kept)).count();
        assert_eq!(whole, 4 + 1, "all with the last unit, and all in the other order");
        assert_eq!(recording.plans(2, &mut Rng::new(1), 9), [Plan::new()]);
    }

    #[test]
    fn growth_that_was_not_flushed_may_be_lost() {
        let store = SimStore::new(1 << 16);
        store.grow(1 << 17).unwrap();
        store.write_at(1 << 16, &[1; 4096]).unwrap();
        let recording = store.recording();
        assert_eq!(recording.crash(2, &vec![(1, Fate::Kept)]).blocks(), 16);
        let both = recording.crash(2, &vec![(1, Fate::Kept), (0, Fate::Kept)]);
        assert_eq!((both.blocks(), both.bytes(16)[0]), (32, 1));
    }
}

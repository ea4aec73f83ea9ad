//! A host that changes blocks of the store: the answer is the right data, or an error that names the block.
//!
//! Two disks are attacked: one that was closed, and one that crashed. What an attack may show besides the truth and errors is an older
//! state as a whole, without an anchor: whoever can put back an old image can also make the last commits vanish. With an anchor that
//! moves with each flush nothing but the truth is right; and of a disk that was closed no change of a single block shows anything else.
//!
//! All blocks in use are attacked, and all pairs of those of a tiny disk; of the blocks that were never written one in sixteen, or all of
//! them with `NACRE_LONG=1`.

use std::collections::BTreeSet;

use nacre_core::BlockStore as _;
use nacre_disk::AnchorWindow;
use nacre_testkit::{
    Rng,
    sim::{Damage, Model, Profile, Recording, Verdict, Workload, long, seed},
};

use crate::rig::{BLOCK, Medium, Rig, Setup};

/// A disk under attack.
struct Victim {
    setup: Setup,
    medium: Medium,
    recording: Recording,
    model: Model,
    /// Which states it may show.
    truth: Vec<u64>,
    closed: bool,
}

/// What the attacks led to.
#[derive(Debug, Default)]
struct Outcomes {
    /// The disk did not open.
    refused: usize,
    /// It opened, and some blocks were errors.
    damaged: usize,
    /// It opened, with everything on it.
    unharmed: usize,
    /// It showed an older state.
    older: usize,
}

impl Outcomes {
    fn count(&mut self, verdict: &Verdict, last: u64) {
        match (verdict.damaged.is_empty(), verdict.steps.contains(&last)) {
            (_, false) => self.older += 1,
            (true, true) => self.unharmed += 1,
            (false, true) => self.damaged += 1,
        }
    }
}

impl Victim {
    fn new(seed: u64, anchored: bool, closed: bool, ops: usize) -> Self {
        let setup = Setup { anchored, window: AnchorWindow::EveryFlush, ..Setup::default() };
        let mut rig = Rig::new(&setup);
        let profile = Profile { regions: 5, longest: 4, crash: 0, reopen: 0, flush: 20, ..Profile::default() };
        let mut workload = Workload::new(seed, setup.blocks(), &profile);
        rig.work(&mut workload, ops);
        rig.flush();
        let (medium, past) = if closed {
            rig.close()
        } else {
            let medium = rig.at().medium();
            (medium, rig.abandon())
        };
        let last = past.model.step();
        let mut truth = vec![last];
        if !anchored {
            truth.extend(past.model.commits().iter().filter(|step| **step != last));
        }
        Self { setup, medium, recording: past.recording, model: past.model, truth, closed }
    }

    /// What becomes of the changed medium.
    fn attack(&self, medium: &Medium, what: &dyn Fn() -> String, outcomes: &mut Outcomes) {
        let Ok(opened) = self.setup.open(medium) else {
            outcomes.refused += 1;
            return;
        };
        let verdict = self.model.judge(&opened.disk, &self.truth, Damage::Named);
        let verdict = verdict.unwrap_or_else(|wrong| panic!("{}: {wrong}", what()));
        outcomes.count(&verdict, self.model.step());
    }

    /// Attacks with a block that is not what it was.
    fn replace(&self, block: u64, what: &str, outcomes: &mut Outcomes, change: impl FnOnce(&mut [u8; 4096])) {
        let mut medium = self.medium.clone();
        medium.image.change(block, change);
        if medium.image.bytes(block) != self.medium.image.bytes(block) {
            let before = outcomes.older;
            self.attack(&medium, &|| format!("block {block} {what}"), outcomes);
            assert!(
                !self.closed || outcomes.older == before,
                "block {block} {what}: a closed disk shows an older state"
            );
        }
    }

    fn written(&self) -> Vec<u64> {
        self.medium.image.written().collect()
    }
}

fn victims(name: &str, ops: usize, attack: impl Fn(&Victim, &mut Rng, &mut Outcomes)) {
    let seed = seed(11);
    for (anchored, closed) in [(false, true), (false, false), (true, true), (true, false)] {
        let victim = Victim::new(seed, anchored, closed, ops);
        let mut outcomes = Outcomes::default();
        attack(&victim, &mut Rng::new(seed), &mut outcomes);
        let blocks = victim.written().len();
        println!("{name}, anchored {anchored}, closed {closed}, {blocks} blocks, seed {seed}: {outcomes:?}");
        assert!(outcomes.refused + outcomes.damaged > 0, "no attack was seen");
        assert!(!anchored || outcomes.older == 0);
    }
}

#[test]
fn every_flipped_block_is_right_or_an_error() {
    victims("flip", 60, |victim, rng, outcomes| {
        let step = if long() { 1 } else { 16 };
        let unused = (0..victim.medium.image.blocks()).step_by(step);
        for block in unused.chain(victim.written()) {
            let (at, bit) = (rng.below(4096), 1 << rng.below(8));
            victim.replace(block, &format!("with byte {at} flipped"), outcomes, |bytes| bytes[at] ^= bit);
        }
        for block in victim.written() {
            victim.replace(block, "with its first byte flipped", outcomes, |bytes| bytes[0] ^= 1);
            victim.replace(block, "with its last byte flipped", outcomes, |bytes| bytes[4095] ^= 0x80);
        }
    });
}

#[test]
fn a_block_of_zeroes_or_noise_is_right_or_an_error() {
    victims("overwrite", 60, |victim, rng, outcomes| {
        for block in victim.written() {
            victim.replace(block, "zeroed", outcomes, |bytes| bytes.fill(0));
            victim.replace(block, "overwritten", outcomes, |bytes| rng.fill(bytes));
            victim.replace(block, "half zeroed", outcomes, |bytes| bytes[2048..].fill(0));
        }
    });
}

#[test]
fn swapped_blocks_are_right_or_an_error() {
    // All pairs of a tiny disk.
    victims("swap", 12, |victim, _, outcomes| {
        let blocks = victim.written();
        for (at, a) in blocks.iter().enumerate() {
            for b in &blocks[at + 1..] {
                let (left, right) = (victim.medium.image.get(*a).cloned(), victim.medium.image.get(*b).cloned());
                let mut medium = victim.medium.clone();
                medium.image.set(*a, right);
                medium.image.set(*b, left);
                victim.attack(&medium, &|| format!("blocks {a} and {b} swapped"), outcomes);
            }
        }
    });
}

#[test]
fn swapped_and_copied_blocks_of_a_larger_disk_are_right_or_an_error() {
    victims("sampled swap", 200, |victim, rng, outcomes| {
        let blocks = victim.written();
        for _ in 0..2000 {
            let (a, b) = (*rng.pick(&blocks), *rng.pick(&blocks));
            let (left, right) = (victim.medium.image.get(a).cloned(), victim.medium.image.get(b).cloned());
            let mut medium = victim.medium.clone();
            medium.image.set(a, right);
            if rng.below(2) == 0 {
                medium.image.set(b, left);
            }
            if a != b {
                victim.attack(&medium, &|| format!("block {b} at {a}"), outcomes);
            }
        }
    });
}

#[test]
fn older_versions_of_a_block_are_right_or_an_error() {
    victims("replay", 120, |victim, rng, outcomes| {
        for block in victim.written() {
            let versions = victim.recording.older_versions(block);
            let count = versions.len();
            for (version, old) in versions.iter().enumerate() {
                // Blocks with a long history (superblock, journal): its ends, and some of the rest.
                if count < 40 || version + 20 >= count || version < 5 || rng.below(count) < 20 {
                    victim.replace(block, &format!("as of version {version}"), outcomes, |bytes| *bytes = *old);
                }
            }
        }
    });
}

/// Several blocks at once, each of its own moment: what a host would do that has kept a copy of everything.
#[test]
fn mixtures_of_old_and_new_blocks_are_right_or_an_error() {
    victims("mixture", 120, |victim, rng, outcomes| {
        let written = victim.written();
        for _ in 0..1500 {
            let (_, old) = victim.recording.durable(rng.below(victim.recording.len() + 1));
            let mut medium = victim.medium.clone();
            let changed: Vec<u64> = medium.image.differing(old).into_iter().filter(|_| rng.below(2) == 0).collect();
            for block in &changed {
                medium.image.set(*block, old.get(*block).cloned());
            }
            let extra = *rng.pick(&written);
            if rng.below(4) == 0 {
                medium.image.change(extra, |bytes| bytes[9] ^= 1);
            }
            victim.attack(&medium, &|| format!("blocks {changed:?} of an old copy"), outcomes);
        }
    });
}

/// Runs of blocks of another disk that has the same root key, at their own places and at others.
#[test]
fn segments_of_another_disk_with_the_same_key_are_right_or_an_error() {
    let seed = seed(12);
    for (anchored, closed) in [(false, true), (false, false), (true, true), (true, false)] {
        let ours = Victim::new(seed, anchored, closed, 150);
        let theirs = Victim::new(seed + 1, anchored, closed, 150);
        let rng = &mut Rng::new(seed);
        let mut outcomes = Outcomes::default();
        let mut became_theirs = 0;
        let blocks = ours.medium.image.blocks();
        let (our_blocks, their_blocks) = (ours.written(), theirs.written());
        for round in 0..1200 {
            let length = *rng.pick(&[1, 2, 16, 64, 256, 1024]);
            let near = |used: &[u64], rng: &mut Rng| {
                rng.pick(used).saturating_sub(rng.next_u64() % length).min(blocks - length)
            };
            let (from, to, length) = match round % 4 {
                // Everything before the segments, or the beginning of that.
                0 => (0, 0, 1 + rng.next_u64() % 1200),
                1 => (near(&their_blocks, rng), near(&our_blocks, rng), length),
                _ => {
                    let place = near(&their_blocks, rng);
                    (place, place, length)
                }
            };
            let mut medium = ours.medium.clone();
            for at in 0..length {
                medium.image.set(to + at, theirs.medium.image.get(from + at).cloned());
            }
            let Ok(opened) = ours.setup.open(&medium) else {
                outcomes.refused += 1;
                continue;
            };
            let where_to = format!("{length} blocks from {from} to {to}");
            // With its superblocks it is the other disk, as far as it got; an anchor sees that.
            let their_last = [theirs.model.step()];
            let verdict = theirs.model.judge(&opened.disk, &their_last, Damage::Named);
            if verdict.is_ok_and(|verdict| verdict.damaged.len() < theirs.model.touched().len()) {
                assert!(!anchored, "{where_to}: it is the other disk");
                became_theirs += 1;
                continue;
            }
            let verdict = ours.model.judge(&opened.disk, &ours.truth, Damage::Named);
            let verdict = verdict.unwrap_or_else(|wrong| panic!("{where_to}: {wrong}"));
            outcomes.count(&verdict, ours.model.step());
        }
        assert!(anchored || became_theirs > 0);
        println!("splice, anchored {anchored}, closed {closed}: {outcomes:?}, {became_theirs} were the other disk");
    }
}

/// The verifier finds what reads find, and nothing else.
#[test]
fn the_verifier_names_the_blocks_that_cannot_be_read() {
    let seed = seed(13);
    let rng = &mut Rng::new(seed);
    let victim = Victim::new(seed, false, true, 150);
    victim.setup.check_clean(&victim.medium);
    let written = victim.written();
    let mut seen = 0;
    for _ in 0..150 {
        let mut medium = victim.medium.clone();
        for _ in 0..=rng.below(3) {
            let block = *rng.pick(&written);
            medium.image.change(block, |bytes| bytes[rng.below(4096)] ^= 4);
        }
        let Ok(opened) = victim.setup.open(&medium) else { continue };
        let mut unreadable = BTreeSet::new();
        let mut data = vec![0; 4096];
        for lba in 0..victim.setup.blocks() {
            if opened.disk.read_at(lba * BLOCK, &mut data).is_err() {
                unreadable.insert(lba);
            }
        }
        let report = victim.setup.check(&medium).unwrap();
        let named: BTreeSet<u64> =
            report.damaged.iter().flat_map(|range| range.first..range.first + range.count).collect();
        assert_eq!(named, unreadable, "seed {seed}");
        seen += usize::from(!unreadable.is_empty());
    }
    assert!(seen > 5, "only {seen} attacks hit something");
}

//! Crashes at each point of a run.

use std::time::Duration;

use nacre_core::BlockStore as _;
use nacre_disk::AnchorWindow;
use nacre_testkit::{
    Rng,
    sim::{Model, Profile, Recording, SimStore, Workload, seeds},
};

use crate::rig::{BLOCK, LITTLE_MEMORY, Medium, Past, Rig, Setup};

const TIME: Duration = Duration::from_secs(15);

/// How much of a run is explored.
#[derive(Clone, Copy)]
struct Effort {
    /// One point of so many.
    points: usize,
    /// Random plans at each point.
    samples: usize,
    /// One recovered disk of so many is worked on, verified, and opened again.
    goes_on: usize,
    /// One of so many of these crashes again, at each of its points.
    again: Option<usize>,
}

/// Lets a run crash at its points; counts the crashes.
fn explore(past: &Past, rng: &mut Rng, effort: Effort) -> usize {
    let mut count = 0;
    for point in 0..=past.recording.len() {
        if point != past.recording.len() && rng.below(effort.points) != 0 {
            continue;
        }
        for plan in past.recording.plans(point, rng, effort.samples) {
            for anchor in past.anchors(point) {
                count += 1;
                let medium = Medium { image: past.recording.crash(point, &plan), anchor };
                recover(past, point, &medium, rng, effort, &format!("point {point}, {plan:?}"));
            }
        }
    }
    count
}

fn recover(past: &Past, point: usize, medium: &Medium, rng: &mut Rng, effort: Effort, what: &str) {
    let context = Context(what);
    let mut rig = Rig::on(&past.setup, medium, past.model.clone());
    rig.settle(&past.model.candidates(point));
    if rng.below(effort.goes_on) == 0 {
        go_on(rig, rng, effort);
    }
    drop(context);
}

/// The disk works: after some requests and a flush it is whole, and what crashes now is whole too.
fn go_on(mut rig: Rig, rng: &mut Rng, effort: Effort) {
    let setup = rig.setup.clone();
    let profile = Profile { regions: 4, longest: 8, crash: 0, reopen: 0, flush: 15, ..Profile::default() };
    let mut workload = Workload::new(rng.next_u64(), setup.blocks(), &profile);
    let ops = 1 + rng.below(12);
    rig.work(&mut workload, ops);
    rig.flush();
    rig.verify();
    let (medium, past) = rig.close();
    setup.check_clean(&medium);
    Rig::on(&setup, &medium, past.model.clone()).verify();
    if let Some(again) = effort.again
        && rng.below(again) == 0
    {
        let effort = Effort { points: 1, samples: 2, goes_on: 20, again: None };
        explore(&past, rng, effort);
    }
}

/// Says at which crash it was.
struct Context<'a>(&'a str);

impl Drop for Context<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text: String = self.0.chars().take(2000).collect();
            println!("the crash at {text}");
        }
    }
}

fn profile(rng: &mut Rng) -> Profile {
    let longest = *rng.pick(&[1, 4, 32]);
    Profile { crash: 0, reopen: 0, read: 0, flush: 15 + rng.below(20), longest, regions: 8, ..Profile::default() }
}

#[test]
fn every_cut_recovers() {
    seeds(5000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup { anchored: false, ..Setup::random(rng) };
        let mut rig = Rig::new(&setup);
        let profile = profile(rng);
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 60);
        let past = if rng.below(2) == 0 { rig.close().1 } else { rig.abandon() };
        let count = explore(&past, rng, Effort { points: 1, samples: 4, goes_on: 16, again: None });
        println!("seed {seed}: {} events, {count} crashes", past.recording.len());
    });
}

#[test]
fn a_crash_beside_an_anchor_is_no_rollback() {
    seeds(6000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup { anchored: true, ..Setup::random(rng) };
        let mut rig = Rig::new(&setup);
        let profile = profile(rng);
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 40);
        let past = if rng.below(2) == 0 { rig.close().1 } else { rig.abandon() };
        explore(&past, rng, Effort { points: 1, samples: 4, goes_on: 16, again: None });
    });
}

#[test]
fn crashes_during_recovery_recover() {
    seeds(7000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup::random(rng);
        let mut rig = Rig::new(&setup);
        let profile = profile(rng);
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 30);
        let past = rig.abandon();
        explore(&past, rng, Effort { points: 4, samples: 2, goes_on: 8, again: Some(4) });
    });
}

/// So little memory that index pages are written all the time, and so many flushes that the journal runs into its checkpoints.
#[test]
fn a_crash_during_a_checkpoint_is_no_special_case() {
    seeds(8000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup { size: 64 << 20, memory: LITTLE_MEMORY, ..Setup::random(rng) };
        let mut rig = Rig::new(&setup);
        let profile = Profile { regions: 100, longest: 2, flush: 60, ..profile(rng) };
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 1500);
        let past = rig.close().1;
        explore(&past, rng, Effort { points: 20, samples: 2, goes_on: 30, again: Some(8) });
    });
}

/// The cleaner moves blocks all the time while the disk crashes.
#[test]
fn a_crash_of_a_full_disk_loses_nothing() {
    seeds(9000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup { reserve: 5, window: AnchorWindow::EveryFlush, ..Setup::random(rng) };
        let mut rig = Rig::new(&setup);
        for lba in (0..setup.blocks()).step_by(64) {
            rig.write(lba, 64.min(setup.blocks() - lba));
        }
        rig.flush();
        let profile = Profile { read: 0, crash: 0, reopen: 0, flush: 4, ..Profile::default() };
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 400);
        let past = rig.close().1;
        let points = past.recording.len().div_ceil(20);
        explore(&past, rng, Effort { points, samples: 2, goes_on: 8, again: None });
    });
}

#[test]
fn a_crash_while_growing_leaves_the_old_size_or_the_new() {
    seeds(10_000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup::random(rng);
        let mut rig = Rig::new(&setup);
        let profile = Profile { grow: 20, ..profile(rng) };
        rig.work(&mut Workload::new(seed, setup.blocks(), &profile), 25);
        let past = rig.abandon();
        explore(&past, rng, Effort { points: 2, samples: 3, goes_on: 16, again: None });
    });
}

/// What was formatted in part is an empty disk or an error that says so; formatting it once more makes it whole.
#[test]
fn a_crash_while_formatting_leaves_no_disk_or_an_empty_one() {
    let setup = Setup::default();
    let rng = &mut Rng::new(1);
    let store = setup.store();
    nacre_disk::format(&*store, &setup.key(), None, &setup.format_options()).unwrap();
    let recording: Recording = store.recording();
    for point in 0..=recording.len() {
        for plan in recording.plans(point, rng, 8) {
            let medium = Medium { image: recording.crash(point, &plan), anchor: None };
            if let Ok(opened) = setup.open(&medium) {
                let empty = Model::new(setup.blocks());
                empty.judge(&opened.disk, &[0], nacre_testkit::sim::Damage::Unexpected).unwrap();
                let mut block = vec![1; 4096];
                opened.disk.read_at(setup.size - BLOCK, &mut block).unwrap();
                assert_eq!(block, [0; 4096]);
            } else {
                assert!(point < recording.len(), "a disk that was formatted can be opened");
                let store = SimStore::of(medium.image);
                let mut options = setup.format_options();
                options.force = true;
                nacre_disk::format(&*store, &setup.key(), None, &options).unwrap();
                setup.open_store(store, None).unwrap();
            }
        }
    }
}

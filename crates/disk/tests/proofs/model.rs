//! Random requests against a plain map.

use std::time::Duration;

use nacre_testkit::{
    Rng,
    sim::{Profile, Workload, seeds},
};

use crate::rig::{LITTLE_MEMORY, Rig, Setup};

const TIME: Duration = Duration::from_secs(15);

/// Works on a disk, closes it, verifies it, and looks at it again.
fn run(setup: &Setup, profile: &Profile, seed: u64, ops: usize) {
    let mut rig = Rig::new(setup);
    let mut workload = Workload::new(seed, setup.blocks(), profile);
    rig.work(&mut workload, ops);
    rig.verify();
    let (medium, past) = rig.close();
    setup.check_clean(&medium);
    Rig::on(setup, &medium, past.model).verify();
}

#[test]
fn random_requests_are_answered_like_by_a_plain_map() {
    let count = seeds(1000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup::random(rng);
        let longest = *rng.pick(&[1, 16, 64, 300]);
        let profile = Profile { longest, reopen: rng.below(3), crash: rng.below(3), ..Profile::default() };
        run(&setup, &profile, seed, 100 + rng.below(700));
    });
    println!("{count} runs");
}

#[test]
fn a_disk_whose_index_does_not_fit_into_memory_is_the_same_disk() {
    seeds(2000, TIME, |seed| {
        let setup = Setup { size: 4 << 30, memory: LITTLE_MEMORY, ..Setup::default() };
        // Far apart, so that each write is another node.
        let profile = Profile { longest: 4, flush: 4, regions: 3000, ..Profile::default() };
        run(&setup, &profile, seed, 1500);
    });
}

#[test]
fn a_disk_that_grows_keeps_what_it_has() {
    seeds(3000, TIME, |seed| {
        let setup = Setup::random(&mut Rng::new(seed));
        let profile = Profile { grow: 3, reopen: 2, crash: 2, longest: 16, ..Profile::default() };
        run(&setup, &profile, seed, 300);
    });
}

#[test]
fn a_full_disk_is_the_same_disk() {
    seeds(4000, TIME, |seed| {
        let rng = &mut Rng::new(seed);
        let setup = Setup { reserve: *rng.pick(&[5, 10]), ..Setup::random(rng) };
        let mut rig = Rig::new(&setup);
        for lba in (0..setup.blocks()).step_by(32) {
            rig.write(lba, 32.min(setup.blocks() - lba));
        }
        rig.flush();
        let profile = Profile { zero: 1, read: 5, flush: 1 + rng.below(10), crash: rng.below(2), ..Profile::default() };
        let mut workload = Workload::new(seed, setup.blocks(), &profile);
        rig.work(&mut workload, 600);
        rig.verify();
        let (medium, past) = rig.close();
        setup.check_clean(&medium);
        Rig::on(&setup, &medium, past.model).verify();
    });
}

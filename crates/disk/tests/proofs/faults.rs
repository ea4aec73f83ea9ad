//! A store that fails: errors, and nothing that was acknowledged is lost.

use std::time::Duration;

use nacre_core::{BlockError, BlockStore as _};
use nacre_testkit::{
    Rng,
    sim::{Damage, Fault, FaultKind, Model, Op, Profile, Target, Workload, seeds},
};

use crate::rig::{BLOCK, LITTLE_MEMORY, Medium, Opened, Rig, Setup};

/// Does a request, and says how it went.
fn attempt(opened: &Opened, model: &mut Model, op: Op) -> Result<(), BlockError> {
    let point = opened.store.position();
    match op {
        Op::Write { lba, count } => {
            let data = model.write(lba, count);
            opened.disk.write_at(lba * BLOCK, &data)
        }
        Op::Trim { lba, count } | Op::Zero { lba, count } => {
            model.zero(lba, count);
            opened.disk.trim(lba * BLOCK, count * BLOCK)
        }
        Op::Read { lba, count } => {
            let mut data = vec![0; usize::try_from(count * BLOCK).unwrap()];
            opened.disk.read_at(lba * BLOCK, &mut data)?;
            model.compare(lba, &data).unwrap();
            Ok(())
        }
        _ => {
            model.flush_begins(point);
            opened.disk.flush()?;
            model.flush_done(opened.store.position());
            Ok(())
        }
    }
}

/// Lets a fault happen in a run, and looks at what is left.
fn run(setup: &Setup, seed: u64, ops: usize, fault: Fault) -> bool {
    let rng = &mut Rng::new(seed);
    let mut rig = Rig::new(setup);
    let profile = Profile { regions: 6, longest: 4, crash: 0, reopen: 0, flush: 15, ..Profile::default() };
    let mut workload = Workload::new(seed, setup.blocks(), &profile);
    rig.work(&mut workload, 20);
    rig.flush();
    let base = rig.model.clone();
    let mut model = base.clone();
    let Some(opened) = rig.into_opened() else { unreachable!() };
    opened.store.fail(fault);
    for _ in 0..ops {
        let op = workload.next_op(setup.blocks());
        let before = model.step();
        let Err(error) = attempt(&opened, &mut model, op) else { continue };
        opened.store.heal();
        after_failure(
            setup,
            &opened,
            &mut model,
            (op, before),
            rng,
            &format!("seed {seed}, {fault:?}, {op:?}: {error}"),
        );
        return true;
    }
    false
}

/// What was flushed can be read; what the disk then says of flushes is true; and after a crash nothing that was acknowledged is lost.
fn after_failure(
    setup: &Setup,
    opened: &Opened,
    model: &mut Model,
    (op, before): (Op, u64),
    rng: &mut Rng,
    what: &str,
) {
    // Each block of the failed request is as before or as it should have become; all others are as they have to be, or unreadable
    // where they were not flushed.
    let failed = match op {
        Op::Write { lba, count } | Op::Trim { lba, count } | Op::Zero { lba, count } => lba..lba + count,
        _ => 0..0,
    };
    let acknowledged = model.acknowledged(usize::MAX);
    let mut block = [0; 4096];
    for lba in model.touched() {
        let (now, then) = (model.at(lba, model.step()), model.at(lba, before));
        let flushed = model.at(lba, acknowledged) == now;
        match opened.disk.read_at(lba * BLOCK, &mut block) {
            Ok(()) if failed.contains(&lba) => {
                let either = [now, then].iter().any(|token| block == nacre_testkit::sim::content(*token));
                assert!(either, "{what}: LBA {lba}");
            }
            Ok(()) => assert!(block == nacre_testkit::sim::content(now), "{what}: LBA {lba}"),
            Err(error) => assert!(!flushed, "{what}: LBA {lba}, which was flushed: {error}"),
        }
    }
    // The medium is well again, and the guest does not know: either all goes on, or nothing is acknowledged any more.
    let last = model.step();
    let begun = opened.store.position();
    let again = opened.disk.flush().is_ok();
    let mut candidates: Vec<u64> = (before..=last).collect();
    if !again {
        candidates.extend(model.candidates(begun + 1));
        candidates.push(acknowledged);
        let refused = opened.disk.write_at(0, &[0; 4096]).and_then(|()| opened.disk.flush());
        assert!(refused.is_err(), "{what}: a flush failed, and the next was acknowledged");
    }
    candidates.sort_unstable();
    candidates.dedup();
    let (_, medium) = opened.crashed(rng);
    let recovered = setup.open(&medium).unwrap_or_else(|error| panic!("{what}: {error}"));
    let verdict = model.judge(&recovered.disk, &candidates, Damage::Unexpected);
    let verdict = verdict.unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    let mut model = model.clone();
    model.crash_to(*verdict.steps.last().unwrap());
    drop(recovered);
    work_on(setup, &medium, model, rng);
}

fn work_on(setup: &Setup, medium: &Medium, model: Model, rng: &mut Rng) {
    let mut rig = Rig::on(setup, medium, model);
    let profile = Profile { regions: 6, longest: 4, crash: 0, reopen: 0, ..Profile::default() };
    rig.work(&mut Workload::new(rng.next_u64(), setup.blocks(), &profile), 20);
    rig.verify();
    let (medium, _) = rig.close();
    setup.check_clean(&medium);
}

/// Each request of the store fails once, in turn, in each way, or all from there on.
fn each(target: Target, kinds: &[FaultKind]) {
    let mut happened = 0;
    seeds(80, Duration::from_secs(8), |seed| {
        let rng = &mut Rng::new(seed);
        let memory = *rng.pick(&[LITTLE_MEMORY, 64 << 20]);
        let setup = Setup { memory, anchored: rng.below(3) == 0, ..Setup::default() };
        for after in 0..60 {
            let kind = *rng.pick(kinds);
            let times = *rng.pick(&[1, 1, u64::MAX]);
            happened += usize::from(run(&setup, seed, 120, Fault { target, after, kind, times }));
        }
    });
    println!("{happened} faults");
    assert!(happened > 0);
}

#[test]
fn a_write_that_fails_loses_nothing_that_was_flushed() {
    each(Target::Write, &[FaultKind::Io, FaultKind::NoSpace, FaultKind::Short]);
}

#[test]
fn a_flush_that_fails_is_not_acknowledged_later() {
    each(Target::Flush, &[FaultKind::Io, FaultKind::NoSpace]);
}

#[test]
fn a_read_that_fails_is_an_error_and_not_the_last_word() {
    each(Target::Read, &[FaultKind::Io, FaultKind::Short]);
}

/// Opening, formatting and closing on a store that fails at any moment.
#[test]
fn opening_and_closing_on_a_failing_store_are_errors_and_can_be_repeated() {
    let setup = Setup::default();
    let mut rig = Rig::new(&setup);
    rig.write(5, 40);
    rig.flush();
    rig.write(7, 3);
    rig.flush();
    let medium = rig.at().medium();
    let past = rig.abandon();
    let step = past.model.step();
    for target in [Target::Read, Target::Write, Target::Flush] {
        for after in 0..200 {
            let store = nacre_testkit::sim::SimStore::of(medium.image.clone());
            store.fail(Fault { target, after, kind: FaultKind::Io, times: u64::MAX });
            let opened = setup.open_store(store.clone(), None);
            let failed = match opened {
                Ok(opened) => opened.disk.close().is_err(),
                Err(_) => true,
            };
            store.heal();
            let recording = store.recording();
            let left = Medium { image: recording.crash(recording.len(), &Vec::new()), anchor: None };
            let opened = setup.open(&left).unwrap_or_else(|error| panic!("{target:?} {after}: {error}"));
            past.model.judge(&opened.disk, &[step], Damage::Unexpected).unwrap();
            if !failed {
                break;
            }
        }
    }
    for after in 0..100 {
        let store = setup.store();
        store.fail(Fault { target: Target::Write, after, kind: FaultKind::Short, times: u64::MAX });
        if nacre_disk::format(&*store, &setup.key(), None, &setup.format_options()).is_ok() {
            assert!(after > 1);
            break;
        }
    }
}

/// A store that is full from the beginning, for the whole life of the disk.
#[test]
fn a_full_store_is_an_error_and_reads_go_on() {
    let setup = Setup::default();
    let mut rig = Rig::new(&setup);
    rig.write(0, 32);
    rig.flush();
    rig.at().store.fail(Fault { target: Target::Write, after: 0, kind: FaultKind::NoSpace, times: u64::MAX });
    let data = vec![9; 64 * 4096];
    let failed = (0..40).any(|at| rig.disk().write_at((100 + at * 64) * BLOCK, &data).is_err());
    assert!(rig.disk().flush().is_err() || failed);
    let error = rig.disk().flush().unwrap_err();
    assert!(matches!(error, BlockError::NoSpace(_) | BlockError::ReadOnly(_) | BlockError::Io { .. }), "{error}");
    rig.read(0, 32);
}

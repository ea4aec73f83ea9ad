//! A host that puts back an older image as a whole: unseen without an anchor, always seen with one, up to its window.

use nacre_core::BlockStore as _;
use nacre_disk::{AnchorWindow, DiskError};
use nacre_testkit::{
    Rng,
    sim::{Damage, Profile, Workload, seed},
};

use crate::rig::{BLOCK, Medium, Rig, Setup};

fn profile() -> Profile {
    Profile { regions: 5, longest: 4, crash: 0, reopen: 0, flush: 20, ..Profile::default() }
}

/// The image at each flush of a run, with the step of the model then.
fn history(rig: &mut Rig, seed: u64) -> Vec<(Medium, u64)> {
    let mut workload = Workload::new(seed, rig.setup.blocks(), &profile());
    let mut images = Vec::new();
    for _ in 0..12 {
        rig.work(&mut workload, 6);
        // Never the same state twice.
        rig.write(3, 1);
        rig.flush();
        images.push((rig.at().medium(), rig.model.step()));
    }
    images
}

/// What the format's page says of disks without an anchor: an older state is a state.
#[test]
fn without_an_anchor_an_older_image_is_not_seen_and_is_consistent() {
    let mut rig = Rig::new(&Setup::default());
    let images = history(&mut rig, seed(21));
    let (setup, past) = (rig.setup.clone(), rig.abandon());
    for (medium, step) in images {
        let opened = setup.open(&medium).unwrap();
        past.model.judge(&opened.disk, &[step], Damage::Unexpected).unwrap();
    }
}

#[test]
fn a_rolled_back_image_is_an_error_with_an_anchor() {
    let setup = Setup { anchored: true, window: AnchorWindow::EveryFlush, ..Setup::default() };
    let mut rig = Rig::new(&setup);
    let images = history(&mut rig, seed(22));
    let (current, older) = images.split_last().unwrap();
    for (medium, _) in older {
        let rolled_back = Medium { image: medium.image.clone(), anchor: current.0.anchor };
        let error = setup.open(&rolled_back).err();
        assert!(matches!(error, Some(DiskError::Rollback { .. })), "{error:?}");
        assert!(setup.check(&rolled_back).is_err(), "the verifier sees it too");
    }
    // Closed, and then any image from before.
    let (closed, _) = rig.close();
    for (medium, _) in &images {
        let rolled_back = Medium { image: medium.image.clone(), anchor: closed.anchor };
        if medium.anchor != closed.anchor {
            assert!(setup.open(&rolled_back).is_err());
        }
    }
    setup.open(&closed).unwrap();
}

/// Between two moves of the anchor the host can choose; it cannot go back behind the last.
#[test]
fn an_anchor_that_moves_on_close_leaves_the_window_since_the_disk_was_opened() {
    let setup = Setup { anchored: true, window: AnchorWindow::OnClose, ..Setup::default() };
    let mut rig = Rig::new(&setup);
    let first = history(&mut rig, seed(23));
    rig.reopen();
    let second = history(&mut rig, seed(24));
    let now = rig.at().medium().anchor;
    let past = rig.abandon();
    for (medium, step) in &second {
        let opened = setup.open(&Medium { image: medium.image.clone(), anchor: now }).unwrap();
        past.model.judge(&opened.disk, &[*step], Damage::Unexpected).unwrap();
    }
    let (_, before_the_close) = first.split_last().unwrap(); // the last is what was closed
    for (medium, _) in before_the_close {
        assert!(setup.open(&Medium { image: medium.image.clone(), anchor: now }).is_err(), "from before the close");
    }
}

/// A run with crashes and closes, and the image of every moment kept: with the last anchor, only the last moment opens.
#[test]
fn no_image_of_a_long_history_opens_with_a_later_anchor() {
    let setup = Setup { anchored: true, window: AnchorWindow::EveryFlush, ..Setup::default() };
    let seed = seed(25);
    let rng = &mut Rng::new(seed);
    let mut rig = Rig::new(&setup);
    let mut images: Vec<Medium> = Vec::new();
    for round in 0..6 {
        images.extend(history(&mut rig, seed + round).into_iter().map(|(medium, _)| medium));
        if rng.below(2) == 0 {
            rig.reopen()
        } else {
            rig.crash(rng)
        }
        rig.verify();
    }
    rig.write(1, 1);
    rig.flush();
    let now = rig.at().medium();
    let past = rig.abandon();
    for medium in &images {
        let opened = setup.open(&Medium { image: medium.image.clone(), anchor: now.anchor });
        assert!(opened.is_err(), "seed {seed}");
    }
    let opened = setup.open(&now).unwrap();
    past.model.judge(&opened.disk, &[past.model.step()], Damage::Unexpected).unwrap();
}

/// Two guests that both believe to be the owner: the second to come takes over, the first notices before it acknowledges anything.
#[test]
fn a_second_writer_fences_the_first() {
    let setup = Setup { anchored: true, window: AnchorWindow::EveryFlush, ..Setup::default() };
    let store = setup.store();
    let anchor = nacre_testkit::sim::MemoryAnchor::new();
    nacre_disk::format(&*store, &setup.key(), Some(&*anchor), &setup.format_options()).unwrap();
    let open = || {
        let (store, anchor) = (store.clone(), anchor.clone());
        nacre_disk::Disk::open(store, &setup.key(), Some(anchor), &setup.open_options())
    };
    let first = open().unwrap();
    first.write_at(0, &[1; 4096]).unwrap();
    first.flush().unwrap();
    let second = open().unwrap();
    first.write_at(BLOCK, &[2; 4096]).unwrap();
    assert!(first.flush().is_err(), "somebody else has taken over");
    assert!(first.write_at(0, &[3; 4096]).is_err() || first.flush().is_err());
    let mut block = [0; 4096];
    second.read_at(0, &mut block).unwrap();
    assert_eq!(block, [1; 4096]);
}

#[test]
fn an_anchor_that_fails_fails_the_flush_and_loses_nothing() {
    let setup = Setup { anchored: true, window: AnchorWindow::EveryFlush, ..Setup::default() };
    let mut rig = Rig::new(&setup);
    rig.write(0, 8);
    rig.flush();
    rig.at().anchor.as_ref().unwrap().set_failing(true);
    rig.write(4, 8);
    rig.model.flush_begins(rig.point());
    assert!(rig.disk().flush().is_err());
    rig.at().anchor.as_ref().unwrap().set_failing(false);
    let medium = rig.at().medium();
    let point = rig.point();
    let past = rig.abandon();
    assert!(setup.open(&Medium { anchor: None, ..medium.clone() }).is_err(), "an empty anchor is no anchor");
    let opened = setup.open(&medium).unwrap();
    past.model.judge(&opened.disk, &past.model.candidates(point + 1), Damage::Unexpected).unwrap();
}

/// Whoever knows that there was an anchor is not fobbed off without one.
#[test]
fn a_disk_with_an_anchor_does_not_open_without_it_or_with_another() {
    let setup = Setup { anchored: true, ..Setup::default() };
    let medium = setup.format();
    let without = Setup { anchored: false, ..setup.clone() };
    assert!(matches!(without.open(&medium).err(), Some(DiskError::AnchorMissing { .. })));
    let other = Medium { image: medium.image.clone(), anchor: setup.format().anchor };
    assert!(setup.open(&other).is_err());
    setup.open(&medium).unwrap();
}

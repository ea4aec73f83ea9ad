//! Keys change, the data stays.

use std::sync::Arc;

use nacre_disk::{DiskError, RootKey, change_key, rotate};
use nacre_testkit::{
    Rng,
    sim::{Damage, Model, Profile, SimStore, Workload, seed},
};

use crate::rig::{Medium, Rig, Setup};

fn profile() -> Profile {
    Profile { regions: 8, longest: 8, flush: 15, ..Profile::default() }
}

fn worked(setup: &Setup, medium: &Medium, model: Model, seed: u64) -> (Medium, Model) {
    let mut rig = Rig::on(setup, medium, model);
    rig.work(&mut Workload::new(seed, setup.blocks(), &profile()), 60);
    let (medium, past) = rig.close();
    let step = past.model.step();
    let mut model = past.model;
    model.crash_to(step);
    (medium, model)
}

/// What a function leaves of a closed medium at each crash of it, and after it.
fn each_crash(medium: &Medium, rng: &mut Rng, act: impl FnOnce(&Arc<SimStore>)) -> Vec<Medium> {
    let store = SimStore::of(medium.image.clone());
    act(&store);
    let recording = store.recording();
    assert!(!recording.is_empty(), "it did nothing");
    let mut media = Vec::new();
    for point in 0..=recording.len() {
        for plan in recording.plans(point, rng, 4) {
            media.push(Medium { image: recording.crash(point, &plan), anchor: medium.anchor });
        }
    }
    media.push(Medium { image: recording.crash(recording.len(), &Vec::new()), anchor: medium.anchor });
    media
}

#[test]
fn another_root_key_opens_what_was_there_and_the_old_one_nothing() {
    for anchored in [false, true] {
        let old = Setup { anchored, ..Setup::default() };
        let new = Setup { key: [99; 32], ..old.clone() };
        let seed = seed(91);
        let (medium, model) = worked(&old, &old.format(), Model::new(old.blocks()), seed);
        let rng = &mut Rng::new(seed);
        let mut media = each_crash(&medium, rng, |store| change_key(&**store, &old.key(), &new.key()).unwrap());
        let changed = media.pop().unwrap();
        assert!(matches!(old.open(&changed).err(), Some(DiskError::WrongKey { .. })));
        new.check_clean(&changed);
        let opened = new.open(&changed).unwrap();
        model.judge(&opened.disk, &[model.step()], Damage::Unexpected).unwrap();
        drop(opened);
        // Whenever it crashes, one of the keys opens it, and it holds what it held.
        for crashed in media {
            let opened = old.open(&crashed).or_else(|_| new.open(&crashed)).unwrap();
            model.judge(&opened.disk, &[model.step()], Damage::Unexpected).unwrap();
        }
        worked(&new, &changed, model, seed + 1);
    }
}

#[test]
fn a_wrong_key_changes_no_keys() {
    let setup = Setup::default();
    let medium = setup.format();
    let store = SimStore::of(medium.image.clone());
    let other = RootKey::from_bytes(&[1; 32]).unwrap();
    assert!(change_key(&*store, &other, &other).is_err());
    assert!(rotate(&*store, &other).is_err());
    assert_eq!(store.position(), 0);
}

#[test]
fn rotations_keep_everything_readable() {
    for anchored in [false, true] {
        let setup = Setup { anchored, ..Setup::default() };
        let seed = seed(92);
        let rng = &mut Rng::new(seed);
        let mut medium = setup.format();
        let mut model = Model::new(setup.blocks());
        let mut rotations = 0;
        for round in 0..24 {
            (medium, model) = worked(&setup, &medium, model, seed + round);
            let mut refused = false;
            let before = medium.clone();
            let store = SimStore::of(medium.image.clone());
            match rotate(&*store, &setup.key()) {
                Ok(()) => rotations += 1,
                // Data of too many rotations is still there, and that is said.
                Err(DiskError::Setting(_)) => refused = true,
                Err(error) => panic!("round {round}: {error}"),
            }
            if refused {
                assert_eq!(store.position(), 0);
                assert!(rotations >= 10, "after {rotations}");
                break;
            }
            let media = if round < 3 {
                each_crash(&before, rng, |store| rotate(&**store, &setup.key()).unwrap())
            } else {
                Vec::new()
            };
            for crashed in media {
                let opened = setup.open(&crashed).unwrap();
                model.judge(&opened.disk, &[model.step()], Damage::Unexpected).unwrap();
            }
            let recording = store.recording();
            medium.image = recording.crash(recording.len(), &Vec::new());
            setup.check_clean(&medium);
        }
        assert!(rotations >= 10);
    }
}

/// A disk that crashed is rotated too: what is in its journal stays readable.
#[test]
fn a_crashed_disk_can_be_rotated() {
    let setup = Setup::default();
    let mut rig = Rig::new(&setup);
    rig.write(0, 100);
    rig.flush();
    rig.write(50, 100);
    rig.flush();
    let medium = rig.at().medium();
    let past = rig.abandon();
    let store = SimStore::of(medium.image);
    rotate(&*store, &setup.key()).unwrap();
    let opened = setup.open_store(store, None).unwrap();
    past.model.judge(&opened.disk, &[past.model.step()], Damage::Unexpected).unwrap();
}

#[test]
fn rotating_twice_without_a_write_between_loses_nothing() {
    let setup = Setup::default();
    let medium = setup.format();
    let store = SimStore::of(medium.image.clone());
    for _ in 0..3 {
        rotate(&*store, &setup.key()).unwrap();
    }
    let medium = Medium { image: store.image(), anchor: medium.anchor };
    setup.check_clean(&medium);
    let opened = setup.open(&medium).unwrap();
    Model::new(setup.blocks()).judge(&opened.disk, &[0], Damage::Unexpected).unwrap();
}

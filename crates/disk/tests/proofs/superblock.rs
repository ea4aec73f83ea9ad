//! A disk that cannot be opened is never answered by a new one.

use nacre_core::BlockStore as _;
use nacre_disk::{Disk, DiskError, FormatOptions, OpenOptions, RootKey, format, rotate, store_size_for};
use nacre_testkit::{
    Rng,
    sim::{Event, Fate, Model, SimStore, seed},
};

use crate::rig::{Medium, Rig, Setup};

fn medium() -> (Setup, Medium) {
    let setup = Setup::default();
    let mut rig = Rig::new(&setup);
    rig.write(0, 64);
    (setup, rig.close().0)
}

/// The blocks without which nothing opens, found by trying: those of the superblock.
fn superblocks(setup: &Setup, medium: &Medium) -> Vec<u64> {
    let mut medium = medium.clone();
    let mut blocks = Vec::new();
    for block in 0..8 {
        medium.image.change(block, |bytes| bytes.fill(0x5a));
        blocks.push(block);
        if setup.open(&medium).is_err() {
            return blocks;
        }
    }
    panic!("a disk without its first eight blocks opens");
}

#[test]
fn one_copy_of_the_superblock_is_enough_and_none_is_an_error() {
    let (setup, medium) = medium();
    let blocks = superblocks(&setup, &medium);
    assert!(blocks.len() >= 2, "there is only one copy");
    for damage in 0..200 {
        let rng = &mut Rng::new(damage);
        let mut damaged = medium.clone();
        for block in &blocks {
            damaged.image.change(*block, |bytes| match damage {
                0 => bytes.fill(0),
                1 => bytes.fill(0xff),
                2..5 => rng.fill(bytes),
                _ => bytes[rng.below(4096)] ^= 1 << rng.below(8),
            });
        }
        let store = SimStore::of(damaged.image.clone());
        assert!(setup.open_store(store.clone(), None).is_err(), "damage {damage}");
        assert_eq!(store.position(), 0, "whatever is wrong, nothing was written");
        if damage > 4 {
            let mut half = damaged;
            half.image.set(blocks[0], medium.image.get(blocks[0]).cloned());
            setup.open(&half).unwrap();
        }
    }
}

/// A crash leaves one copy newer than the other. The next change of the superblock, torn, does not fall back behind it; and an open
/// mends what is behind.
#[test]
fn a_copy_that_a_crash_left_behind_is_never_the_last_one() {
    let (setup, medium) = medium();
    let after = |medium: &Medium, writes: usize, torn: Fate| {
        let store = SimStore::of(medium.image.clone());
        rotate(&*store, &setup.key()).unwrap();
        let recording = store.recording();
        let writes_at = |(point, event): (usize, &Event)| matches!(event, Event::Write { .. }).then_some(point + 1);
        let point = recording.events().iter().enumerate().filter_map(writes_at).nth(writes).unwrap();
        Medium { image: recording.crash(point, &vec![(0, torn)]), anchor: None }
    };
    // One copy is newer, and something was written with its keys.
    let ahead = after(&medium, 0, Fate::Kept);
    let mut rig = Rig::on(&setup, &ahead, Model::new(setup.blocks()));
    rig.write(70, 9);
    let (worked, past) = rig.close();
    assert!(setup.check(&worked).unwrap().is_clean(), "the copy that was behind was mended");
    // Torn at the first copy, whichever that is, from either state.
    for medium in [&ahead, &worked] {
        for writes in [0, 1] {
            let torn = after(medium, writes, Fate::Torn(0b0110_0110));
            setup.open(&torn).unwrap();
        }
    }
    let torn = after(&worked, 0, Fate::Torn(0b1111));
    let opened = setup.open(&torn).unwrap();
    let mut block = vec![0; 4096];
    opened.disk.read_at(78 * 4096, &mut block).unwrap();
    past.model.compare(78, &block).unwrap();
}

#[test]
fn an_empty_store_is_no_disk() {
    let setup = Setup::default();
    let error = setup.open_store(setup.store(), None).err();
    assert!(matches!(error, Some(DiskError::NoDisk { .. })), "{error:?}");
    let error = setup.open_store(SimStore::new(0), None).err();
    assert!(error.is_some());
}

#[test]
fn formatting_refuses_what_is_not_empty_unless_it_is_forced() {
    let (setup, medium) = medium();
    let format = |store: &SimStore, force| {
        let mut options = setup.format_options();
        options.force = force;
        format(store, &setup.key(), None, &options)
    };
    let store = SimStore::of(medium.image.clone());
    let error = format(&store, false).err();
    assert!(matches!(error, Some(DiskError::NotEmpty { .. })), "{error:?}");
    assert_eq!(store.position(), 0);
    setup.open_store(store, None).unwrap();
    // Also where only rubbish is: it may be a disk whose superblock was destroyed, or somebody's filesystem.
    let mut damaged = medium;
    for block in superblocks(&setup, &damaged) {
        damaged.image.change(block, |bytes| bytes.fill(0x11));
    }
    let store = SimStore::of(damaged.image);
    assert!(format(&store, false).is_err());
    assert_eq!(store.position(), 0);
    format(&store, true).unwrap();
    setup.open_store(store, None).unwrap();
}

#[test]
fn a_store_that_was_cut_off_is_an_error() {
    let (setup, medium) = medium();
    for blocks in [0, 1, 2, 3, 10, 100, 1000, medium.image.blocks() - 1] {
        let mut short = medium.clone();
        short.image.resize(blocks);
        assert!(setup.open(&short).is_err(), "{blocks} blocks");
    }
}

#[test]
fn another_key_does_not_open_it() {
    let (setup, medium) = medium();
    let other = Setup { key: [8; 32], ..setup };
    let error = other.open(&medium).err();
    assert!(matches!(error, Some(DiskError::WrongKey { .. })), "{error:?}");
}

#[test]
fn a_store_that_was_filled_with_noise_for_a_disk_becomes_one() {
    let options = FormatOptions { size: Some(16 << 20), ..FormatOptions::default() };
    let bytes = store_size_for(&options).unwrap();
    let (key, rng) = (RootKey::random(), &mut Rng::new(seed(92)));
    let store = SimStore::new(bytes);
    let mut noise = vec![0; usize::try_from(bytes).unwrap()];
    rng.fill(&mut noise);
    store.write_at(0, &noise).unwrap();
    // It may be somebody's, unless one knows that it is not.
    assert!(matches!(format(&*store, &key, None, &options), Err(DiskError::NotEmpty { .. })));
    let fresh = FormatOptions { fresh_store: true, ..options.clone() };
    format(&*store, &key, None, &fresh).unwrap();
    let disk = Disk::open(store.clone(), &key, None, &OpenOptions::default()).unwrap();
    assert_eq!(disk.info().warnings, Vec::<String>::new());
    disk.write_at(8192, &noise[..8192]).unwrap();
    drop(disk); // a crash
    let disk = Disk::open(store, &key, None, &OpenOptions::default()).unwrap();
    let mut block = [1; 4096];
    disk.read_at(0, &mut block).unwrap();
    assert_eq!(block, [0; 4096]);

    // What reads as zeroes already is not written: a sparse store stays sparse.
    let sparse = SimStore::new(bytes);
    format(&*sparse, &key, None, &options).unwrap();
    assert!(sparse.counts().blocks_written < 64, "{} blocks were written", sparse.counts().blocks_written);
}

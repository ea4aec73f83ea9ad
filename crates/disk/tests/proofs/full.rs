//! A disk at 100 % goes on.

use std::time::{Duration, Instant};

use nacre_core::BlockStore as _;
use nacre_disk::Disk;
use nacre_testkit::{
    Rng,
    sim::{SimStore, content, seed, seeds},
};

use crate::rig::{BLOCK, Setup};

/// Overwrites a full disk again and again, with a flush now and then, and looks at all of it each time round.
fn overwrite(setup: &Setup, seed: u64, rounds: u64, time: Duration) {
    let medium = setup.format();
    let store = SimStore::forgetful(medium.image);
    let disk = Disk::open(store.clone(), &setup.key(), None, &setup.open_options()).unwrap();
    let rng = &mut Rng::new(seed);
    let blocks = setup.blocks();
    let mut held: Vec<u64> = Vec::new();
    for lba in 0..blocks {
        held.push(lba + 1);
        disk.write_at(lba * BLOCK, &content(lba + 1)).unwrap();
    }
    let mut next = blocks + 1;
    let start = Instant::now();
    for round in 0..rounds {
        if start.elapsed() > time {
            println!("{round} of {rounds} rounds in {time:?}");
            break;
        }
        let pattern = rng.below(4);
        let hot = rng.next_u64() % blocks;
        for step in 0..blocks {
            let lba = match pattern {
                0 => step,
                1 => blocks - 1 - step,
                2 => (hot + rng.next_u64() % (blocks / 8)) % blocks,
                _ => rng.next_u64() % blocks,
            };
            disk.write_at(lba * BLOCK, &content(next)).unwrap();
            held[usize::try_from(lba).unwrap()] = next;
            next += 1;
            if rng.below(200) == 0 {
                disk.flush().unwrap();
            }
        }
        let mut block = [0; 4096];
        for (lba, token) in (0..).zip(&held) {
            disk.read_at(lba * BLOCK, &mut block).unwrap();
            assert!(block == content(*token), "round {round} (pattern {pattern}): LBA {lba}");
        }
    }
    let before = store.counts().blocks_written;
    println!("{} blocks of the disk, {} of the store", next - 1, before);
    disk.close().unwrap();
    let disk = Disk::open(store, &setup.key(), None, &setup.open_options()).unwrap();
    let mut block = [0; 4096];
    for (lba, token) in (0..).zip(&held) {
        disk.read_at(lba * BLOCK, &mut block).unwrap();
        assert!(block == content(*token), "LBA {lba} after reopening");
    }
}

/// `NACRE_LONG=1` makes hours of it.
#[test]
fn a_full_disk_is_overwritten_for_as_long_as_one_likes() {
    seeds(30, Duration::from_secs(10), |seed| {
        let reserve = *Rng::new(seed).pick(&[3, 5, 10]);
        overwrite(&Setup { reserve, ..Setup::default() }, seed, 8, Duration::from_secs(40));
    });
}

#[test]
fn a_full_disk_with_its_cleaner_in_the_background_is_overwritten_too() {
    let setup = Setup { background: true, size: 24 << 20, ..Setup::default() };
    overwrite(&setup, seed(31), 6, Duration::from_secs(15));
}

/// Everything is written, trimmed, and written once more: what was trimmed is room again.
#[test]
fn trimmed_room_is_used_again() {
    let setup = Setup { reserve: 5, ..Setup::default() };
    let medium = setup.format();
    let store = SimStore::forgetful(medium.image);
    let disk = Disk::open(store, &setup.key(), None, &setup.open_options()).unwrap();
    let data = vec![0x42; 1 << 20];
    for _ in 0..6 {
        for at in (0..setup.size).step_by(1 << 20) {
            disk.write_at(at, &data).unwrap();
        }
        disk.flush().unwrap();
        disk.trim(0, setup.size).unwrap();
        let mut block = [1; 4096];
        disk.read_at(setup.size / 2, &mut block).unwrap();
        assert_eq!(block, [0; 4096]);
    }
    disk.close().unwrap();
}

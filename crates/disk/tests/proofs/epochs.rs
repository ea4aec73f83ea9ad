//! Epochs come and go: many opens, worn keys, trims of the store, anchors that move by time.

use std::{sync::Arc, time::Duration};

use nacre_core::{Anchor as _, BLOCK_SIZE, BlockStore, NoProgress};
use nacre_disk::{
    AnchorWindow, CheckOptions, Disk, FormatOptions, MOST_EPOCHS, OpenOptions, RootKey, check, format, store_size_for,
};
use nacre_testkit::{
    Rng,
    sim::{MemoryAnchor, SimStore, Snapshot},
};

use crate::rig::BLOCK;

const COUNT: usize = 4096;
const BLOCKS: u64 = COUNT as u64;

/// A disk of 16 MiB, and what each of its blocks begins with.
struct Stamped {
    store: Arc<SimStore>,
    key: RootKey,
    options: OpenOptions,
    stamps: Vec<u64>,
    rng: Rng,
}

impl Stamped {
    fn new(options: OpenOptions) -> Self {
        let made = FormatOptions { size: Some(BLOCKS * BLOCK), ..FormatOptions::default() };
        let store = SimStore::forgetful(Snapshot::zeroed(store_size_for(&made).unwrap()));
        let key = RootKey::random();
        format(&*store, &key, None, &made).unwrap();
        Self { store, key, options, stamps: vec![0; COUNT], rng: Rng::new(5) }
    }

    fn open(&self) -> Disk {
        let store: Arc<dyn BlockStore> = self.store.clone();
        Disk::open(store, &self.key, None, &self.options).unwrap()
    }

    fn write(&mut self, disk: &Disk, count: usize) {
        for _ in 0..count {
            let lba = self.rng.below(COUNT);
            let stamp = self.rng.next_u64();
            let mut block = [0; BLOCK_SIZE];
            block[..8].copy_from_slice(&stamp.to_le_bytes());
            disk.write_at(lba as u64 * BLOCK, &block).unwrap();
            self.stamps[lba] = stamp;
        }
    }

    fn judge(&self, disk: &Disk) {
        let mut block = [0; BLOCK_SIZE];
        for (lba, stamp) in (0..).zip(&self.stamps) {
            disk.read_at(lba * BLOCK, &mut block).unwrap();
            assert_eq!(block[..8], stamp.to_le_bytes(), "LBA {lba}");
        }
    }

    fn check(&self) {
        let store: Arc<dyn BlockStore> = self.store.clone();
        let report = check(store, &self.key, None, &CheckOptions::default(), &NoProgress).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn more_opens_than_there_is_room_for_epochs_keep_everything() {
    let mut stamped = Stamped::new(OpenOptions { background: false, ..OpenOptions::default() });
    let mut most = 0;
    for round in 0..3 * MOST_EPOCHS {
        let disk = stamped.open();
        stamped.write(&disk, 3);
        disk.flush().unwrap();
        if round % 3 == 0 {
            disk.close().unwrap()
        } else {
            drop(disk)
        }
        if round % 256 == 255 {
            let disk = stamped.open();
            most = most.max(disk.info().epochs);
            stamped.judge(&disk);
            drop(disk);
            stamped.check();
        }
    }
    assert!((MOST_EPOCHS / 4..MOST_EPOCHS).contains(&most), "{most}");
}

#[test]
fn worn_keys_are_replaced_while_the_disk_is_open() {
    for background in [false, true] {
        let options = OpenOptions { background, epoch_messages: 100, ..OpenOptions::default() };
        let mut stamped = Stamped::new(options);
        let disk = stamped.open();
        for _ in 0..60 {
            stamped.write(&disk, 150);
            disk.flush().unwrap();
        }
        stamped.judge(&disk);
        let epochs = disk.info().epochs;
        assert!(epochs > 3, "{epochs}");
        drop(disk);
        let disk = stamped.open();
        stamped.judge(&disk);
        disk.close().unwrap();
        stamped.check();
    }
}

#[test]
fn trimming_the_store_takes_nothing_that_is_needed() {
    for background in [false, true] {
        let mut stamped = Stamped::new(OpenOptions { background, discard: true, ..OpenOptions::default() });
        let disk = stamped.open();
        for round in 0..40 {
            stamped.write(&disk, 300);
            if round % 5 == 0 {
                disk.trim(0, BLOCKS / 2 * BLOCK).unwrap();
                stamped.stamps[..COUNT / 2].fill(0);
            }
            disk.flush().unwrap();
            stamped.judge(&disk);
        }
        disk.close().unwrap();
        stamped.judge(&stamped.open());
        stamped.check();
    }
}

#[test]
fn an_anchor_with_a_time_moves_on_by_itself() {
    let made = FormatOptions { size: Some(BLOCKS * BLOCK), ..FormatOptions::default() };
    let store: Arc<dyn BlockStore> = SimStore::forgetful(Snapshot::zeroed(store_size_for(&made).unwrap()));
    let (key, anchor) = (RootKey::random(), MemoryAnchor::new());
    format(&*store, &key, Some(&*anchor), &made).unwrap();
    let window = AnchorWindow::Every(Duration::from_millis(200));
    let options = OpenOptions { window, ..OpenOptions::default() };
    let disk = Disk::open(store, &key, Some(anchor.clone()), &options).unwrap();
    for _ in 0..3 {
        disk.write_at(0, &[1; BLOCK_SIZE]).unwrap();
        disk.flush().unwrap();
    }
    let sequence = disk.info().sequence;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while anchor.read().unwrap().unwrap().sequence < sequence {
        assert!(std::time::Instant::now() < deadline, "the anchor stayed behind");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(disk);
}

//! What a host sees of a disk says how much was written, and not where.

use std::collections::HashSet;

use nacre_core::{BLOCK_SIZE, BlockStore as _};
use nacre_disk::Disk;
use nacre_testkit::{
    Rng,
    sim::{Event, Recording, SimStore, Snapshot, seed},
};

use crate::rig::{BLOCK, Setup};

/// Orders in which the same blocks can be written.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    Sequential,
    Reversed,
    Random,
}

const PATTERNS: [Pattern; 3] = [Pattern::Sequential, Pattern::Reversed, Pattern::Random];

fn order(pattern: Pattern, count: u64, rng: &mut Rng) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    match pattern {
        Pattern::Sequential => {}
        Pattern::Reversed => order.reverse(),
        Pattern::Random => {
            for at in (1..order.len()).rev() {
                order.swap(at, rng.below(at + 1));
            }
        }
    }
    order
}

/// Writes the first `count` blocks of a new disk in that order, with a flush after every `flush` of them.
fn record(setup: &Setup, pattern: Pattern, count: u64, flush: u64, seed: u64) -> Recording {
    let store = SimStore::of(setup.format().image);
    let disk = Disk::open(store.clone(), &setup.key(), None, &setup.open_options()).unwrap();
    let rng = &mut Rng::new(seed);
    for (number, lba) in (1..).zip(order(pattern, count, rng)) {
        // The same content everywhere: nothing of it may be seen.
        disk.write_at(lba * BLOCK, &[0x77; BLOCK_SIZE]).unwrap();
        if number % flush == 0 {
            disk.flush().unwrap();
        }
    }
    disk.close().unwrap();
    store.recording()
}

/// The places that were written, in their order.
fn trace(recording: &Recording) -> Vec<(u64, usize)> {
    let written = |event: &Event| match event {
        Event::Write { block, content } => Some((*block, content.len())),
        Event::Flush => Some((u64::MAX, 0)),
        Event::Grow { .. } => None,
    };
    recording.events().iter().filter_map(written).collect()
}

/// The strongest that can be said: whichever order the blocks were written in, the store sees the same requests at the same places. (As
/// long as no checkpoint comes in between: it writes a node for each run of 128 blocks in which something changed since the last.)
#[test]
fn the_places_of_writes_do_not_depend_on_their_addresses() {
    let setup = Setup::default();
    let [sequential, reversed, random] = PATTERNS.map(|pattern| trace(&record(&setup, pattern, 896, 32, seed(41))));
    assert!(sequential.len() > 50, "only {} requests", sequential.len());
    assert_eq!(sequential, reversed);
    assert_eq!(sequential, random);
}

/// With checkpoints in between, whose number of index nodes depends on how many regions were touched, the traces are no longer the
/// same; a test of homogeneity over where on the store was written how often does not tell the patterns apart.
#[test]
fn images_cannot_be_told_apart_by_place() {
    const BINS: u64 = 32;
    let setup = Setup { size: 32 << 20, ..Setup::default() };
    let histogram = |pattern| {
        let recording = record(&setup, pattern, setup.blocks() / 2, 64, seed(42));
        let blocks = recording.crash(recording.len(), &Vec::new()).blocks();
        let mut bins = vec![0u64; usize::try_from(BINS).unwrap()];
        for (block, count) in trace(&recording).into_iter().filter(|(block, _)| *block != u64::MAX) {
            for at in block..block + count as u64 {
                bins[usize::try_from(at * BINS / blocks).unwrap()] += 1;
            }
        }
        bins
    };
    let [sequential, reversed, random] = PATTERNS.map(histogram);
    for other in [reversed, random] {
        let (statistic, freedom) = homogeneity(&sequential, &other);
        println!("chi-square {statistic:.1} at {freedom} degrees of freedom");
        assert!(statistic < bound(freedom), "{sequential:?} and {other:?} differ: {statistic}");
    }
}

/// Chi-square of two histograms being of one distribution, and its degrees of freedom.
fn homogeneity(a: &[u64], b: &[u64]) -> (f64, f64) {
    let float = |value: u64| f64::from(u32::try_from(value).unwrap());
    let (total_a, total_b) = (float(a.iter().sum()), float(b.iter().sum()));
    let mut statistic = 0.0;
    let mut bins = 0.0;
    for (a, b) in a.iter().zip(b).filter(|(a, b)| *a + *b > 0) {
        let both = float(*a + *b);
        let (expected_a, expected_b) = (both * total_a / (total_a + total_b), both * total_b / (total_a + total_b));
        statistic += (float(*a) - expected_a).powi(2) / expected_a + (float(*b) - expected_b).powi(2) / expected_b;
        bins += 1.0;
    }
    (statistic, bins - 1.0)
}

/// Five standard deviations above the mean of a chi-square distribution.
fn bound(freedom: f64) -> f64 {
    freedom + 5.0 * (2.0 * freedom).sqrt()
}

/// All that is in use of an image.
fn bytes(image: &Snapshot) -> impl Iterator<Item = [u8; BLOCK_SIZE]> {
    image.written().map(|block| image.bytes(block)).filter(|bytes| bytes.iter().any(|byte| *byte != 0))
}

/// What reaches the medium looks like noise: every value of a byte as often as every other. (Less than a hundredth of it are the clear
/// headers of superblocks, checkpoints and journal records.)
#[test]
fn what_is_on_the_medium_looks_like_noise() {
    let setup = Setup::default();
    for pattern in PATTERNS {
        let recording = record(&setup, pattern, 2048, 256, seed(43));
        let image = recording.crash(recording.len(), &Vec::new());
        let mut counts = [0u64; 256];
        let mut total = 0u64;
        let mut seen = HashSet::new();
        for block in bytes(&image) {
            assert!(seen.insert(block.to_vec()), "two blocks are the same");
            // Without the first 64 bytes, where clear headers are.
            for byte in &block[64..] {
                counts[usize::from(*byte)] += 1;
                total += 1;
            }
        }
        let expected = f64::from(u32::try_from(total).unwrap()) / 256.0;
        let statistic: f64 =
            counts.iter().map(|count| (f64::from(u32::try_from(*count).unwrap()) - expected).powi(2) / expected).sum();
        println!("{pattern:?}: {total} bytes, chi-square {statistic:.1} at 255 degrees of freedom");
        assert!(statistic < bound(255.0), "{pattern:?}: {statistic}");
    }
}

/// A disk of 16 GiB, so that its addresses are numbers that nothing else on the medium has a reason to hold.
#[test]
fn no_plaintext_and_no_lba_is_on_the_store() {
    let setup = Setup { size: 16 << 30, ..Setup::default() };
    let store = SimStore::of(setup.format().image);
    let disk = Disk::open(store.clone(), &setup.key(), None, &setup.open_options()).unwrap();
    let rng = &mut Rng::new(seed(44));
    let mut lbas = HashSet::new();
    while lbas.len() < 400 {
        lbas.insert((1 << 20) + rng.next_u64() % ((3 << 20) - 1));
    }
    for (number, lba) in (1..).zip(&lbas) {
        disk.write_at(lba * BLOCK, &[0x77; BLOCK_SIZE]).unwrap();
        if number % 20 == 0 {
            disk.flush().unwrap();
        }
    }
    disk.close().unwrap();
    let image = store.image();
    let (mut wide, mut narrow, mut places) = (0u64, 0u64, 0u64);
    for block in bytes(&image) {
        assert!(!block.windows(8).any(|window| window == [0x77; 8]), "plaintext");
        for window in block.windows(8) {
            let eight: [u8; 8] = window.try_into().unwrap();
            let [a, b, c, d, ..] = eight;
            let four = [a, b, c, d];
            places += 1;
            for number in [u64::from_le_bytes(eight), u64::from_be_bytes(eight)] {
                wide += u64::from(lbas.contains(&number));
                wide += u64::from(number.is_multiple_of(BLOCK) && lbas.contains(&(number / BLOCK)));
            }
            for number in [u32::from_le_bytes(four), u32::from_be_bytes(four)] {
                narrow += u64::from(lbas.contains(&u64::from(number)));
            }
        }
    }
    let chance = 2.0 * 400.0 * f64::from(u32::try_from(places).unwrap()) / 2f64.powi(32);
    println!("{places} places: {wide} numbers of 64 bits, {narrow} of 32 bits (by chance {chance:.2})");
    assert_eq!(wide, 0);
    assert!(f64::from(u32::try_from(narrow).unwrap()) < chance + 6.0 * chance.sqrt() + 3.0, "{narrow}");
}

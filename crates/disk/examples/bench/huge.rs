//! A huge disk, without the time and the room that its data would take.
//!
//! What costs time and memory in a full disk of 1 TiB is its index: 2 million leaves and 16,500 nodes above them. All of these are here,
//! made by the disk itself through its public interface and stored in a sparse file, 8 GiB of them: one block of each leaf is written,
//! the last of its 128. A leaf with one entry is as large as a full one, and is read, verified, kept and replaced in the same way, so
//! opening the disk, reading those blocks and overwriting them cost what they would on a disk that was written to the last LBA. What
//! differs: the data, of which one block in [`KEPT`] is kept by the store and the others are forgotten, so only these are read, from
//! all over the disk; and the bitmap, of which fewer pages are in use.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use nacre_core::{BLOCK_SIZE, BlockStore as _};
use nacre_disk::Disk;
use nacre_sys::block::{FileOptions, FileStore};

use crate::{
    BLOCK, Result,
    counting::Counting,
    key,
    machine::{Rng, noise, peak_mib},
    new_disk, new_store, options, say,
};

/// Blocks that a leaf of the index leads to.
const LEAF: u64 = 128;
/// Of so many blocks that are written, the store keeps one: 8 of them under each node above the leaves.
const KEPT: u64 = 16;

/// The LBA of the n-th block that is written.
fn lba(number: u64) -> u64 {
    number * LEAF + LEAF - 1
}

/// One of those that the store has kept, anywhere on the disk.
fn kept(rng: &mut Rng, size: u64) -> u64 {
    lba(rng.below(size / BLOCK / LEAF / KEPT) * KEPT)
}

pub(crate) fn fill(path: &Path, size: u64) -> Result<()> {
    let begin = Instant::now();
    let store = Arc::new(Counting::new(Arc::new(new_store(path, size, false)?)));
    store.forget.store(true, SeqCst);
    store.data_start.store(u64::MAX, SeqCst);
    let disk = new_disk(store.clone(), size)?;
    let data_start = disk.info().geometry.data_start() * BLOCK;
    let buffer = noise(BLOCK_SIZE);
    let leaves = size / BLOCK / LEAF;
    let (kept, forgotten): (Vec<u64>, Vec<u64>) = (0..leaves).partition(|number| number.is_multiple_of(KEPT));
    for (numbers, data) in [(kept, u64::MAX), (forgotten, data_start)] {
        store.data_start.store(data, SeqCst);
        for number in numbers {
            disk.write_at(lba(number) * BLOCK, &buffer)?;
        }
        disk.flush()?;
    }
    // Closing writes the last of the index by this very thread.
    store.data_start.store(u64::MAX, SeqCst);
    disk.close()?;
    eprintln!("filled in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Opens it in this process, which has done nothing else before. `clean` means: after it was closed in good order; then it is read and
/// written, and left as by a crash, with changes in the journal.
pub(crate) fn open(path: &Path, size: u64, clean: bool) -> Result<()> {
    let store = Arc::new(Counting::new(Arc::new(FileStore::open(path, FileOptions::default())?)));
    let begin = Instant::now();
    let disk = Disk::open(store.clone(), &key()?, None, &options())?;
    let name = if clean { "open" } else { "open after a crash" };
    say(name, begin.elapsed().as_secs_f64() * 1e3);
    eprintln!("{name}: {} blocks read, {:.1} MiB", store.read_blocks.load(Relaxed), peak_mib()?);
    reads(&disk, &store, size, if clean { "index reads" } else { "index reads after a crash" })?;
    if clean {
        writes(&disk, size)?;
        settle(&store);
        reads(&disk, &store, size, "index reads after writes")?;
    }
    say(if clean { "memory" } else { "memory after a crash" }, peak_mib()?);
    Ok(()) // dropped: a crash
}

/// Random reads; blocks read from the store for each, but for the data.
fn reads(disk: &Disk, store: &Counting, size: u64, name: &str) -> Result<()> {
    const COUNT: u64 = 30_000;
    let (mut rng, mut buffer) = (Rng(3), noise(BLOCK_SIZE));
    let mut before = 0;
    for number in 0..COUNT {
        if number == COUNT / 3 {
            before = store.read_blocks.load(Relaxed); // the upper levels are in memory now
        }
        disk.read_at(kept(&mut rng, size) * BLOCK, &mut buffer)?;
    }
    let count = (COUNT - COUNT / 3) as f64;
    let blocks = (store.read_blocks.load(Relaxed) - before) as f64;
    say(name, blocks / count - 1.0);
    Ok(())
}

/// Waits until no checkpoint is made any more, whose reads would be counted.
fn settle(store: &Counting) {
    let count = || store.read_blocks.load(Relaxed) + store.written.load(Relaxed);
    loop {
        let before = count();
        std::thread::sleep(Duration::from_millis(500));
        if count() == before {
            return;
        }
    }
}

/// Random writes, two checkpoints' worth of them, and some that no checkpoint has, flushed every now and then.
fn writes(disk: &Disk, size: u64) -> Result<()> {
    let (mut rng, buffer) = (Rng(4), noise(BLOCK_SIZE));
    let begin = Instant::now();
    let mut number = 0_u64;
    while disk.statistics().checkpoints < 2 || !number.is_multiple_of(50_000) {
        for _ in 0..1000 {
            disk.write_at(rng.below(size / BLOCK) * BLOCK, &buffer)?;
        }
        disk.flush()?;
        number += 1000;
    }
    let statistics = disk.statistics();
    eprintln!(
        "{} random writes in {:.1} s, {} checkpoints, {} stalls, the longest {} µs",
        number,
        begin.elapsed().as_secs_f64(),
        statistics.checkpoints,
        statistics.stalls,
        statistics.longest_stall_micros
    );
    Ok(())
}

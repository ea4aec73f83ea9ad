//! Synced writes: one block and a flush, by the disk and by a raw file, in turns; and flushes from several threads.
//!
//! Store and raw file have been written from end to end before, so that neither has to find room on its medium. The raw file is measured
//! through the page cache and around it, and the better of the two is the peer.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_core::{BlockStore as _, NoProgress, Page};
use nacre_disk::Disk;
use nacre_sys::block::{FileOptions, FileStore};

use crate::{BLOCK, Result, machine::Rng, new_disk, new_store, say, write_range};

const ROUNDS: u32 = 5;
const THREADS: [u64; 4] = [1, 2, 4, 8];

pub(crate) fn sync(store: &Path, raw: &Path, size: u64, time: Duration) -> Result<()> {
    let _ = std::fs::remove_file(raw);
    drop(FileStore::create(raw, size, true, FileOptions::default(), &NoProgress)?);
    let disk = new_disk(Arc::new(new_store(store, size, true)?), size)?;
    write_range(&disk, 0, size / 2)?;
    disk.flush()?;
    let buffered = File::options().write(true).open(raw)?;
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    let direct = File::options().write(true).custom_flags(flags).open(raw).ok();
    let time = time / ROUNDS;
    for round in 0..u64::from(ROUNDS) {
        let mut best = by_file(&buffered, size, time, round)?;
        eprintln!("raw file: {best:.0} a second");
        if let Some(direct) = &direct {
            let rate = by_file(direct, size, time, round)?;
            eprintln!("raw file, O_DIRECT: {rate:.0} a second");
            best = best.max(rate);
        }
        say("raw", best);
        for threads in THREADS {
            let commits = disk.statistics().commits;
            let (count, rate) = by_disk(&disk, size, time, round, threads)?;
            let commits = disk.statistics().commits - commits;
            eprintln!("disk, {threads} threads: {rate:.0} a second, {count} flushes in {commits} commits");
            say(&format!("threads {threads}"), rate);
            say(&format!("flushes a commit {threads}"), count as f64 / commits.max(1) as f64);
        }
    }
    Ok(())
}

fn by_file(file: &File, size: u64, time: Duration, seed: u64) -> Result<f64> {
    let (page, mut rng) = (Page::zeroed(), Rng(seed + 99));
    let (begin, mut count) = (Instant::now(), 0_u64);
    while begin.elapsed() < time {
        file.write_all_at(&page.0, rng.below(size / BLOCK) * BLOCK)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// Writes and flushes of some threads: how many, and how many a second.
fn by_disk(disk: &Disk, size: u64, time: Duration, seed: u64, threads: u64) -> Result<(u64, f64)> {
    let begin = Instant::now();
    let one = |thread: u64| {
        move || -> Result<u64> {
            let (page, mut rng, mut count) = (Page::zeroed(), Rng(seed * 16 + thread + 5), 0);
            while begin.elapsed() < time {
                disk.write_at(rng.below(size / BLOCK) * BLOCK, &page.0)?;
                disk.flush()?;
                count += 1;
            }
            Ok(count)
        }
    };
    let count = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(one(thread))).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).sum::<Result<u64>>()
    })?;
    Ok((count, count as f64 / begin.elapsed().as_secs_f64()))
}

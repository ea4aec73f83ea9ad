//! Bytes that are written to the store for each byte that is written to the disk, by a count of the store's own, cleaning, index, journal
//! and checkpoints included; and the space that all but data takes.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use nacre_core::{BLOCK_SIZE, BlockStore as _};
use nacre_disk::Disk;

use crate::{
    BLOCK, Result,
    counting::Counting,
    machine::{Rng, noise},
    new_disk, new_store, say, write_range,
};

pub(crate) fn amplification(path: &Path, size: u64) -> Result<()> {
    let store = Arc::new(new_store(path, size, false)?);
    let whole = |percent: u64| size / 100 * percent / BLOCK * BLOCK;

    let (counting, disk) = fresh(&store, size)?;
    measure("sequential", &counting, &disk, || {
        write_range(&disk, 0, size)?;
        write_range(&disk, 0, size)
    })?;
    space(disk, size)?;

    for (name, percent) in [("random, half full", 50), ("random, 85 % full", 85)] {
        let (counting, disk) = fresh(&store, size)?;
        write_range(&disk, 0, whole(percent))?;
        disk.flush()?;
        // Until nothing of the sequence is left: three times what is free.
        overwrite(&disk, whole(percent), 3 * (store.size() - whole(percent)), 1)?;
        measure(name, &counting, &disk, || overwrite(&disk, whole(percent), size / 2, 2))?;
        let statistics = disk.statistics();
        eprintln!(
            "{name}: cleaned {} MiB, {} stalls, the longest {} µs",
            statistics.cleaned_bytes >> 20,
            statistics.stalls,
            statistics.longest_stall_micros
        );
    }
    Ok(())
}

fn fresh(store: &Arc<nacre_sys::block::FileStore>, size: u64) -> Result<(Arc<Counting>, Disk)> {
    let counting = Arc::new(Counting::new(store.clone()));
    Ok((counting.clone(), new_disk(counting, size)?))
}

/// Random single blocks within a range, so many bytes.
fn overwrite(disk: &Disk, range: u64, bytes: u64, seed: u64) -> Result<()> {
    let (buffer, mut rng) = (noise(BLOCK_SIZE), Rng(seed));
    for _ in 0..bytes / BLOCK {
        disk.write_at(rng.below(range / BLOCK) * BLOCK, &buffer)?;
    }
    Ok(())
}

/// By the store's count, and by the disk's own for comparison.
fn measure(name: &str, counting: &Counting, disk: &Disk, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let (store, before) = (counting.written.load(Relaxed), disk.statistics());
    work()?;
    disk.flush()?;
    let (store, after) = (counting.written.load(Relaxed) - store, disk.statistics());
    let user = (after.user_written_bytes - before.user_written_bytes) as f64;
    say(name, store as f64 / user);
    let part = |after: u64, before: u64| (after - before) as f64 / user;
    eprintln!(
        "{name}: store {:.4}; by the disk's account data {:.4}, journal {:.4}, index {:.4}, cleaning {:.4}, checkpoints {:.4}",
        store as f64 / user,
        part(after.data_bytes, before.data_bytes),
        part(after.journal_bytes, before.journal_bytes),
        part(after.index_bytes, before.index_bytes),
        part(after.cleaned_bytes, before.cleaned_bytes),
        part(after.checkpoint_bytes, before.checkpoint_bytes),
    );
    Ok(())
}

/// A disk that is full: everything in use that is not data, in percent of the data; and the reserve that is kept free.
fn space(disk: Disk, size: u64) -> Result<()> {
    disk.shut()?;
    let info = disk.info();
    let all = info.geometry.store_blocks();
    let data = size / BLOCK;
    let metadata = info.used_blocks - data + info.geometry.data_start();
    say("metadata", metadata as f64 / data as f64 * 100.0);
    say("reserve", (all - data - metadata) as f64 / data as f64 * 100.0);
    Ok(())
}

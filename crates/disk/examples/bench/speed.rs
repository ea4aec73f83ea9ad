//! How fast a disk is without a front end, on one core and on two, and how fast the AEAD is on the same core at about the same time.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_core::{BLOCK_SIZE, BlockStore as _, SecretArray, aead::AeadKey};
use nacre_disk::Disk;

use crate::{
    BLOCK, Result,
    machine::{Rng, cpu_time, noise, pin},
    new_disk, new_store, say, write_range,
};

/// Bytes of a sequential request.
const LARGE: usize = 256 << 10;
/// How often each is measured, in turns.
const ROUNDS: u32 = 5;
const MIB: f64 = 1048576.0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Write,
    Read,
}

/// What is measured where.
struct Bench<'a> {
    disk: &'a Disk,
    /// Bytes of the disk that are written, from its beginning.
    range: u64,
    time: Duration,
    /// The one case that is wanted.
    only: Option<&'a str>,
}

/// `fill` percent of the disk are written before, and all that is measured happens there; `only` measures a single case, for profiles.
pub(crate) fn speed(path: &Path, size: u64, time: Duration, fill: u64, only: Option<&str>) -> Result<()> {
    let disk = new_disk(Arc::new(new_store(path, size, true)?), size)?;
    let range = size / 100 * fill / (2 * LARGE as u64) * (2 * LARGE as u64);
    write_range(&disk, 0, range)?;
    disk.flush()?;
    let bench = Bench { disk: &disk, range, time: time / ROUNDS, only };
    for round in 0..ROUNDS {
        pin(1)?;
        bench.rate("seal", MIB, || aead(bench.time / 4, Work::Write))?;
        bench.rate("open", MIB, || aead(bench.time / 4, Work::Read))?;
        bench.rate("random write", BLOCK as f64, || bench.random(Work::Write, u64::from(round)))?;
        bench.rate("random read", BLOCK as f64, || bench.random(Work::Read, u64::from(round)))?;
        for (name, work) in [("write", Work::Write), ("read", Work::Read)] {
            pin(1)?;
            bench.rate(&format!("sequential {name}"), MIB, || bench.sequential(work, 1))?;
            pin(2)?;
            bench.rate(&format!("sequential {name}, two cores"), MIB, || bench.sequential(work, 2))?;
        }
    }
    let statistics = disk.statistics();
    eprintln!(
        "{} checkpoints, {} stalls, the longest {} µs; write amplification {:.3}",
        statistics.checkpoints, statistics.stalls, statistics.longest_stall_micros, statistics.write_amplification
    );
    Ok(())
}

/// Encrypts or decrypts blocks in 256 KiB of memory, as the disk does; how many bytes.
fn aead(time: Duration, work: Work) -> Result<u64> {
    let key = AeadKey::new(&SecretArray::random());
    let mut blocks = noise(LARGE);
    let mut sealed: Vec<_> = (0..LARGE / BLOCK_SIZE).map(|_| (Vec::new(), [0; 16])).collect();
    for (block, sealed) in blocks.chunks_exact(BLOCK_SIZE).zip(&mut sealed) {
        let mut data = block.to_vec();
        sealed.1 = key.seal_in_place([0; 12], &[0; 8], &mut data);
        sealed.0 = data;
    }
    let (begin, mut done, mut number) = (Instant::now(), 0, 0_u64);
    while begin.elapsed() < time {
        for (block, (data, tag)) in blocks.chunks_exact_mut(BLOCK_SIZE).zip(&sealed) {
            match work {
                Work::Write => {
                    let mut nonce = [0; 12];
                    nonce[..8].copy_from_slice(&number.to_le_bytes());
                    number += 1;
                    std::hint::black_box(key.seal_in_place(nonce, &[0; 8], block));
                }
                Work::Read => {
                    block.copy_from_slice(data);
                    key.open_in_place([0; 12], &[0; 8], *tag, block)?;
                }
            }
        }
        done += LARGE as u64;
    }
    Ok(done)
}

impl Bench<'_> {
    /// Does `work`, which gives the bytes that it moved, and says how many `units` a second that was.
    fn rate(&self, name: &str, unit: f64, work: impl FnOnce() -> Result<u64>) -> Result<()> {
        if self.only.is_some_and(|only| only != name) {
            return Ok(());
        }
        let (begin, busy) = (Instant::now(), cpu_time()?);
        let units = work()? as f64 / unit;
        let (time, busy) = (begin.elapsed().as_secs_f64(), (cpu_time()? - busy).as_secs_f64());
        say(name, units / time);
        eprintln!("{name}: {:.0} a second, {:.0} a second of processor time", units / time, units / busy);
        Ok(())
    }

    /// Single blocks all over the range, and one flush in the end.
    fn random(&self, work: Work, seed: u64) -> Result<u64> {
        let mut rng = Rng(seed + 77);
        let mut buffer = noise(BLOCK_SIZE);
        let (begin, mut done) = (Instant::now(), 0);
        while begin.elapsed() < self.time {
            for _ in 0..64 {
                let offset = rng.below(self.range / BLOCK) * BLOCK;
                match work {
                    Work::Write => self.disk.write_at(offset, &buffer)?,
                    Work::Read => self.disk.read_at(offset, &mut buffer)?,
                }
            }
            done += 64 * BLOCK;
        }
        self.disk.flush()?;
        Ok(done)
    }

    /// Each of some threads goes round in its part of the range, and one flush in the end.
    fn sequential(&self, work: Work, threads: u64) -> Result<u64> {
        let part = self.range / threads;
        let done = std::thread::scope(|scope| {
            let go = |thread: u64| move || self.round(work, thread * part, part);
            let running: Vec<_> = (0..threads).map(|thread| scope.spawn(go(thread))).collect();
            running.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).sum::<Result<u64>>()
        })?;
        self.disk.flush()?;
        Ok(done)
    }

    fn round(&self, work: Work, from: u64, length: u64) -> Result<u64> {
        let mut buffer = noise(LARGE);
        let (begin, mut done) = (Instant::now(), 0);
        while begin.elapsed() < self.time {
            let offset = from + done % length;
            match work {
                Work::Write => self.disk.write_at(offset, &buffer)?,
                Work::Read => self.disk.read_at(offset, &mut buffer)?,
            }
            done += LARGE as u64;
        }
        Ok(done)
    }
}

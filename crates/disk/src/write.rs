//! Writes and trims.

use std::{
    sync::{Arc, MutexGuard, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use nacre_core::{BLOCK_SIZE, BlockError, check_range};

use crate::{
    DiskError,
    alloc::Kind,
    journal::Change,
    keys::{EpochKeys, Purpose},
    layout::BLOCK,
    node::Entry,
    poison,
    shared::{BATCH, Log, Shared},
    stats::add,
};

/// How long a write that is ahead of the merge waits before it looks again.
const PACE: Duration = Duration::from_millis(1);

/// Blocks that one trim covers at most; longer ones are cut.
const TRIM: u64 = 1 << 18;

impl Shared {
    /// The keys to seal with; the first call of an open begins an epoch.
    pub(crate) fn writer(&self) -> Result<Arc<EpochKeys>, BlockError> {
        if let Some(keys) = &*poison(self.writer.read()) {
            return Ok(Arc::clone(keys));
        }
        self.check_writable()?;
        let mut checkpoint = poison(self.checkpoint.lock());
        if let Some(keys) = &*poison(self.writer.read()) {
            return Ok(Arc::clone(keys));
        }
        self.begin_epoch(&mut checkpoint).map_err(|error| self.fail(error))
    }

    pub(crate) fn check_writable(&self) -> Result<(), BlockError> {
        if self.options.read_only {
            return Err(BlockError::ReadOnly("the disk was opened read-only".into()));
        }
        self.check_failed()
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let begin = Instant::now();
        self.check_writable()?;
        let size = self.size.load(Relaxed);
        check_range("write", offset, data.len() as u64, size)?;
        let mut lba = offset / BLOCK;
        for part in data.chunks(BATCH * BLOCK_SIZE) {
            self.write_part(lba, part)?;
            lba += (part.len() / BLOCK_SIZE) as u64;
        }
        add(&self.counters.writes, 1);
        add(&self.counters.user_written_bytes, data.len() as u64);
        self.counters.write_latency.add(begin.elapsed());
        Ok(())
    }

    /// A batch at most: sealed without a lock, then placed and noted in one go.
    fn write_part(&self, first: u64, data: &[u8]) -> Result<(), BlockError> {
        let keys = self.writer()?;
        let count = data.len() / BLOCK_SIZE;
        let nonce = keys.reserve(Purpose::Data, count as u64).map_err(DiskError::into_block)?;
        let mut tags = [[0; 16]; BATCH];
        let mut pages = self.pool.take(count);
        let blocks = data.chunks_exact(BLOCK_SIZE).zip(&mut pages).zip(&mut tags);
        for (at, ((block, page), tag)) in (0..).zip(blocks) {
            page.0.copy_from_slice(block);
            let aad = (first + at).to_le_bytes();
            *tag = keys.sealer(Purpose::Data).seal(nonce + at, &aad, &mut page.0, &self.auditor);
        }
        let mut log = self.room(count as u64, count)?;
        let mut full = false;
        let mut slots = 0..0;
        for ((at, page), tag) in (0..).zip(pages).zip(tags) {
            if slots.is_empty() {
                let Some(run) = log.allocator.take_run(Kind::Data, count as u64 - at) else {
                    drop(log);
                    return Err(self.fail(BlockError::NoSpace("a slot that was there is gone".into())));
                };
                slots = run.start..run.start + run.length;
            }
            let Some(place) = slots.next() else { break };
            let entry = Entry::new(place, keys.id, nonce + at, tag);
            log.delta.write(first + at, entry);
            log.changes.push(Change::write(first + at, entry));
            if log.put(place, page) {
                log.send();
                full = true;
            }
        }
        let crowded = log.is_crowded();
        drop(log);
        if full {
            self.dispatch(crowded)?;
        }
        Ok(())
    }

    /// A batch is full. A fast store takes it here and now; for a slow one there is a worker, unless it cannot keep up.
    fn dispatch(&self, crowded: bool) -> Result<(), BlockError> {
        if self.options.background && self.store.is_slow() && !crowded {
            self.work.notify_one();
            return Ok(());
        }
        self.carry(1)
    }

    /// The log, with room for so many blocks and changes: where there is none, a commit and a checkpoint make it.
    fn room(&self, blocks: u64, changes: usize) -> Result<MutexGuard<'_, Log>, BlockError> {
        let mut stalled: Option<Instant> = None;
        let mut futile = 0;
        loop {
            self.check_failed()?;
            let log = self.lock();
            let full = log.delta.len() + changes > self.limits.delta || log.delta.trimmed() > self.limits.trimmed;
            let short = log.allocator.available() < blocks + self.limits.floor;
            if !full && !short && self.is_ahead(&log) {
                stalled.get_or_insert_with(Instant::now);
                drop(poison(self.changed.wait_timeout(log, PACE)));
                continue;
            }
            if !full && !short {
                if log.allocator.at_hand(Kind::Data) < blocks {
                    drop(log);
                    self.refill(Kind::Data, blocks).map_err(|error| self.fail(error))?;
                    continue;
                }
                if let Some(begin) = stalled {
                    self.note_stall(begin.elapsed());
                }
                return Ok(log);
            }
            let begin = *stalled.get_or_insert_with(Instant::now);
            if log.frozen.is_some() {
                drop(poison(self.changed.wait_timeout(log, Duration::from_millis(50))));
                continue;
            }
            if log.delta.is_empty() {
                futile += 1;
                if futile > 3 {
                    self.note_stall(begin.elapsed());
                    return Err(BlockError::NoSpace("the disk's reserve is used up; grow it".into()));
                }
            }
            drop(log);
            add(&self.counters.forced_commits, 1);
            self.commit(true)?;
        }
    }

    /// Whether writes are ahead of the merge of those before them: the share of the delta that they have filled is larger than the share of the
    /// merge that is done, a quarter granted. So they slow down to what the merge can take, instead of coming to a halt at its end.
    fn is_ahead(&self, log: &Log) -> bool {
        let Some(frozen) = &log.frozen else { return false };
        let granted = granted(self.limits.delta as u64, self.merged.load(Relaxed), frozen.delta.len() as u64);
        self.options.background && log.delta.len() as u64 > granted
    }

    fn note_stall(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        add(&self.counters.stalls, 1);
        add(&self.counters.stalled_micros, micros);
        self.counters.longest_stall_micros.fetch_max(micros, Relaxed);
    }

    /// Makes a range read as zeroes: its blocks become holes.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check_writable()?;
        let size = self.size.load(Relaxed);
        check_range("trim", offset, length, size)?;
        let (mut lba, end) = (offset / BLOCK, (offset + length) / BLOCK);
        while lba < end {
            self.writer()?;
            let count = (end - lba).min(TRIM);
            let mut log = self.room(0, 1)?;
            log.delta.trim(lba, count);
            log.changes.push(Change::trim(lba, count));
            drop(log);
            lba += count;
        }
        add(&self.counters.trimmed_bytes, length);
        Ok(())
    }
}

/// How much of a delta of `limit` entries may be filled when `merged` of `all` changes are in their leaves. After the leaves come the bitmap
/// and the checkpoint, a fifth of the work.
fn granted(limit: u64, merged: u64, all: u64) -> u64 {
    let work = all + all / 4;
    limit / 4 + (limit - limit / 4) * merged.min(all) / work.max(1)
}

#[cfg(test)]
mod tests {
    use super::granted;

    #[test]
    fn writes_may_run_ahead_of_a_merge_by_a_quarter() {
        assert_eq!(granted(1000, 0, 800), 250);
        assert_eq!(granted(1000, 400, 800), 550);
        assert_eq!(granted(1000, 800, 800), 850);
        assert_eq!(granted(1000, 900, 800), 850);
        assert_eq!((granted(1000, 0, 0), granted(7, 3, 3)), (250, 7)); // trims only; next to nothing
        for merged in 0..100_000 {
            assert!((28_672..=114_688).contains(&granted(114_688, merged, 100_000)));
        }
    }
}

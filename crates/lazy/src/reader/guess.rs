//! What is fetched with what a read misses, since it is likely to be wanted next: a request costs a round trip, whatever it brings.
//!
//! A reader that goes on where it left off gets more and more of what follows. Any other one gets the chunks that follow in the blob,
//! where what was guessed so far was wanted, or little was guessed: files that are used together lie together, but what is fetched for
//! nothing is paid for, too.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::Reader;
use crate::{
    fetch::Wanted,
    format::{ChunkEntry, DIGEST, Method},
};

/// A reader that goes on where it left off has this much fetched ahead of it at first, and twice as much each time, up to the most.
const AHEAD: u64 = 128 << 10;
const MOST_AHEAD: u64 = 4 << 20;
/// Stored bytes that are fetched with a chunk on a guess: a quarter of what a round trip is worth at 100 Mbit/s and 20 ms.
const NEIGHBOURS: u64 = 64 << 10;
/// Stored bytes of guesses that have not come true (yet): this, and of what was asked for one in so many.
const AT_FIRST: u64 = 512 << 10;
const ONE_IN: u64 = 7;
/// The most guesses that are open.
const MOST_OPEN: usize = 4096;

/// How much is fetched ahead of a reader that goes on where it left off.
#[derive(Default)]
pub(crate) struct Ahead(AtomicU64);

impl Ahead {
    /// For a read that misses something.
    pub(crate) fn next(&self, sequential: bool) -> u64 {
        let ahead = match self.0.load(Ordering::Relaxed) {
            _ if !sequential => 0,
            before => (before * 2).clamp(AHEAD, MOST_AHEAD),
        };
        self.0.store(ahead, Ordering::Relaxed);
        ahead
    }
}

/// How well it was guessed so far.
#[derive(Default)]
pub(super) struct Guesses {
    ahead: Ahead,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    /// Stored bytes that were missed.
    missed: u64,
    /// Stored bytes that were guessed, and not wanted until now.
    open_bytes: u64,
    open: HashMap<[u8; DIGEST], u32>,
}

impl Record {
    fn room(&self) -> u64 {
        if self.open.len() >= MOST_OPEN {
            return 0;
        }
        (AT_FIRST + self.missed / ONE_IN).saturating_sub(self.open_bytes).min(NEIGHBOURS)
    }
}

impl Guesses {
    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk that was in the cache is wanted.
    pub(super) fn came_true(&self, entry: &ChunkEntry) {
        let mut record = self.lock();
        if let Some(stored) = record.open.remove(&entry.digest) {
            record.open_bytes -= u64::from(stored);
        }
    }
}

impl Reader {
    /// Adds to what a read misses what is likely to be wanted after it, if it is not in the cache. What was added is fetched into the
    /// cache, and not given back.
    pub(super) fn guess(&self, end: u64, sequential: bool, wanted: &mut Vec<Wanted>) {
        let ahead = self.guesses.ahead.next(sequential);
        if sequential {
            self.look_ahead(end, ahead, wanted);
        } else {
            self.neighbours(wanted);
        }
    }

    fn look_ahead(&self, from: u64, ahead: u64, wanted: &mut Vec<Wanted>) {
        let length = usize::try_from(ahead.min(self.size().saturating_sub(from))).unwrap_or(0);
        let Ok(parts) = self.parts(from, length) else { return };
        let entries: Vec<ChunkEntry> = parts.iter().map(|part| part.entry).collect();
        wanted.extend(self.away(&entries));
    }

    fn neighbours(&self, wanted: &mut Vec<Wanted>) {
        let Some(last) = wanted.last().copied() else { return };
        let missed: u64 = wanted.iter().map(|chunk| u64::from(chunk.entry.stored.get())).sum();
        let room = {
            let mut record = self.guesses.lock();
            record.missed += missed;
            record.room()
        };
        let neighbours = self.away(&self.after(&last.entry, room));
        let mut record = self.guesses.lock();
        for chunk in &neighbours {
            let stored = chunk.entry.stored.get();
            if record.open.insert(chunk.entry.digest, stored).is_none() {
                record.open_bytes += u64::from(stored);
            }
        }
        wanted.extend(neighbours);
    }

    /// The chunks that follow one in its blob, and are spoken of by the same leaf: another one might have to be fetched.
    fn after(&self, last: &ChunkEntry, room: u64) -> Vec<ChunkEntry> {
        let Some(Ok(leaf)) = self.table.find(last.offset.get()).map(|leaf| self.leaf(leaf)) else { return Vec::new() };
        let first = leaf.partition_point(|entry| entry.end() <= last.end());
        let (mut end, mut bytes) = (last.place.get() + u64::from(last.stored.get()), 0);
        let following = leaf.iter().skip(first).filter(|entry| entry.method != Method::Zeroes.code());
        let near = following.take_while(|entry| {
            let follows = entry.blob == last.blob && entry.place.get() == end;
            end += u64::from(entry.stored.get());
            // The one that fills the room is still fetched.
            let fits = bytes < room;
            bytes += u64::from(entry.stored.get());
            follows && fits
        });
        near.copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(missed: u64, open_bytes: u64) -> Record {
        Record { missed, open_bytes, open: HashMap::new() }
    }

    #[test]
    fn guesses_that_do_not_come_true_end_it() {
        assert_eq!(record(0, 0).room(), NEIGHBOURS);
        assert_eq!(record(0, AT_FIRST - 1000).room(), 1000);
        assert_eq!(record(0, AT_FIRST).room(), 0);
        assert_eq!(record(70_000, AT_FIRST).room(), 10_000);
        let open = (0..MOST_OPEN).map(|at| (crate::chunk::sha256(&at.to_le_bytes()), 1)).collect();
        assert_eq!(Record { open, ..record(0, 0) }.room(), 0);
    }
}

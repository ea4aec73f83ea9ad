//! Locks on ranges of blocks, shared or exclusive, in the order in which they were asked for.
//!
//! A table holds an entry for each lock that is held or waited for, oldest first. A lock is held once no older entry overlaps it that is
//! exclusive, or any where it is exclusive itself. So nobody starves, and since each thread takes all its ranges in one entry and none
//! while it holds one, nobody waits in a circle. While there is no exclusive entry, the table is only pushed to and removed from.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::BLOCK;

/// A range of blocks, both ends in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    first: u64,
    last: u64,
}

impl Blocks {
    /// The blocks that hold these bytes.
    pub(super) fn of(offset: u64, length: u64) -> Self {
        Self { first: offset / BLOCK, last: offset.saturating_add(length.saturating_sub(1)) / BLOCK }
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// All locks.
#[derive(Default)]
pub(super) struct RangeLocks {
    table: Mutex<Table>,
    released: Condvar,
}

#[derive(Default)]
struct Table {
    next: u64,
    exclusive: usize,
    waiting: usize,
    /// Oldest first.
    entries: Vec<Entry>,
}

struct Entry {
    ticket: u64,
    exclusive: bool,
    ranges: Vec<Blocks>,
}

/// A lock that is held until this is dropped.
pub(super) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    /// Waits until nobody holds these blocks exclusively.
    pub(super) fn shared(&self, ranges: impl IntoIterator<Item = Blocks>) -> RangeLock<'_> {
        self.lock(ranges.into_iter().collect(), false)
    }

    /// Waits until nobody holds these blocks at all.
    pub(super) fn exclusive(&self, range: Blocks) -> RangeLock<'_> {
        self.lock(vec![range], true)
    }

    fn lock(&self, ranges: Vec<Blocks>, exclusive: bool) -> RangeLock<'_> {
        let mut table = self.table();
        let ticket = table.next;
        table.next += 1;
        table.exclusive += usize::from(exclusive);
        table.entries.push(Entry { ticket, exclusive, ranges });
        while table.is_blocked(ticket) {
            table.waiting += 1;
            table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
            table.waiting -= 1;
        }
        RangeLock { locks: self, ticket }
    }

    /// Nothing panics while it is locked, so that it is never half changed.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether an older entry is in the way of this one.
    fn is_blocked(&self, ticket: u64) -> bool {
        let Some(at) = self.entries.iter().rposition(|entry| entry.ticket == ticket) else { return false };
        let (older, own) = self.entries.split_at(at);
        let Some(own) = own.first() else { return false };
        if self.exclusive == 0 {
            return false;
        }
        let overlap =
            |other: &Entry| own.ranges.iter().any(|own| other.ranges.iter().any(|other| own.overlaps(*other)));
        older.iter().any(|older| (own.exclusive || older.exclusive) && overlap(older))
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut table = self.locks.table();
        if let Some(at) = table.entries.iter().position(|entry| entry.ticket == self.ticket) {
            let entry = table.entries.remove(at);
            table.exclusive -= usize::from(entry.exclusive);
        }
        if table.waiting > 0 {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn blocks_are_those_that_hold_a_byte() {
        assert_eq!(Blocks::of(0, 4096), Blocks { first: 0, last: 0 });
        assert_eq!(Blocks::of(4095, 2), Blocks { first: 0, last: 1 });
        assert!(Blocks::of(0, 4097).overlaps(Blocks::of(4097, 1)));
        assert!(!Blocks::of(0, 4096).overlaps(Blocks::of(4096, 1)));
    }

    #[test]
    fn whoever_changes_a_part_is_alone_and_nobody_overtakes_who_waits() {
        let locks = RangeLocks::default();
        let first = locks.shared([Blocks::of(0, 4096), Blocks::of(1 << 20, 4096)]);
        let second = locks.shared([Blocks::of(0, 8192)]);
        let (send, receive) = mpsc::channel();
        thread::scope(|scope| {
            let (exclusive, locks) = (send.clone(), &locks);
            scope.spawn(move || {
                let _lock = locks.exclusive(Blocks::of(100, 100));
                exclusive.send("exclusive").unwrap();
                thread::sleep(Duration::from_millis(20));
                exclusive.send("released").unwrap();
            });
            while locks.table().waiting < 1 {
                thread::yield_now();
            }
            let shared = send.clone();
            scope.spawn(move || {
                let _lock = locks.shared([Blocks::of(0, 4096)]);
                shared.send("shared").unwrap();
            });
            while locks.table().waiting < 2 {
                thread::yield_now();
            }
            drop(locks.shared([Blocks::of(8192, 4096)]));
            drop(first);
            assert!(receive.recv_timeout(Duration::from_millis(20)).is_err(), "the second still holds it");
            drop(second);
            assert_eq!(receive.iter().take(3).collect::<Vec<_>>(), ["exclusive", "released", "shared"]);
        });
        assert!(locks.table().entries.is_empty());
    }
}

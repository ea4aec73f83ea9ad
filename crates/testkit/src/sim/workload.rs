//! Random requests, and the seeds that they come from.

use std::{
    env, thread,
    time::{Duration, Instant},
};

use crate::Rng;

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Blocks are written.
    Write {
        /// The first.
        lba: u64,
        /// How many.
        count: u64,
    },
    /// Blocks are trimmed.
    Trim {
        /// The first.
        lba: u64,
        /// How many.
        count: u64,
    },
    /// Blocks are zeroed.
    Zero {
        /// The first.
        lba: u64,
        /// How many.
        count: u64,
    },
    /// Blocks are read.
    Read {
        /// The first.
        lba: u64,
        /// How many.
        count: u64,
    },
    /// All is made durable.
    Flush,
    /// It is closed and opened again.
    Reopen,
    /// It is gone without having been closed, and opened again.
    Crash,
    /// It gets larger, by so many blocks.
    Grow {
        /// How many.
        more: u64,
    },
}

/// What a workload is like: how likely each kind of request is (all are shares of their sum), and where it writes.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Writes.
    pub write: usize,
    /// Trims and zeroes, together.
    pub zero: usize,
    /// Reads.
    pub read: usize,
    /// Flushes.
    pub flush: usize,
    /// Reopenings.
    pub reopen: usize,
    /// Crashes.
    pub crash: usize,
    /// Growth.
    pub grow: usize,
    /// The longest run of blocks that is written at once.
    pub longest: u64,
    /// Only so many regions of the disk are used, each of 32 blocks; 0: all of it.
    pub regions: usize,
}

impl Default for Profile {
    fn default() -> Self {
        let (write, zero, read, flush) = (60, 6, 20, 10);
        Self { write, zero, read, flush, reopen: 1, crash: 1, grow: 0, longest: 64, regions: 0 }
    }
}

/// Blocks of a region.
const REGION: u64 = 32;

/// An endless row of requests.
#[derive(Clone, Debug)]
pub struct Workload {
    rng: Rng,
    profile: Profile,
    regions: Vec<u64>,
    hot: u64,
    cursor: u64,
}

impl Workload {
    /// Requests of one seed, for a disk of `blocks` blocks.
    pub fn new(seed: u64, blocks: u64, profile: &Profile) -> Self {
        let mut rng = Rng::new(seed);
        let regions = (0..profile.regions).map(|_| rng.next_u64() % (blocks - REGION)).collect();
        let (hot, cursor) = (rng.next_u64() % blocks, rng.next_u64() % blocks);
        Self { rng, profile: profile.clone(), regions, hot, cursor }
    }

    /// The numbers that the requests come from, for what else a test chooses.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// The next request to a disk that has `blocks` blocks by now.
    ///
    /// # Panics
    /// The profile has no share at all.
    pub fn next_op(&mut self, blocks: u64) -> Op {
        let profile = &self.profile;
        let shares =
            [profile.write, profile.zero, profile.read, profile.flush, profile.reopen, profile.crash, profile.grow];
        let mut at = self.rng.below(shares.iter().sum());
        let kind = shares.iter().position(|share| at.checked_sub(*share).map(|rest| at = rest).is_none());
        match kind.unwrap() {
            0 => {
                let (lba, count) = self.range(blocks);
                Op::Write { lba, count }
            }
            1 => {
                let (lba, count) = self.range(blocks);
                if self.rng.below(2) == 0 { Op::Trim { lba, count } } else { Op::Zero { lba, count } }
            }
            2 => {
                let (lba, count) = self.range(blocks);
                Op::Read { lba, count }
            }
            3 => Op::Flush,
            4 => Op::Reopen,
            5 => Op::Crash,
            _ => Op::Grow { more: 1 + self.rng.next_u64() % 512 },
        }
    }

    /// Where: a third of the requests goes on where the last of them ended, a third to a hot spot, the rest anywhere. How much: mostly
    /// a few blocks.
    fn range(&mut self, blocks: u64) -> (u64, u64) {
        let longest = self.profile.longest.max(1);
        let count = match self.rng.below(4) {
            0 | 1 => 1,
            2 => 1 + self.rng.next_u64() % longest.min(8),
            _ => 1 + self.rng.next_u64() % longest,
        };
        if !self.regions.is_empty() {
            let base = *self.rng.pick(&self.regions);
            let count = count.min(REGION);
            return (base + self.rng.next_u64() % (REGION - count + 1), count);
        }
        let count = count.min(blocks);
        let lba = match self.rng.below(3) {
            0 => self.cursor,
            1 => self.hot + self.rng.next_u64() % 48,
            _ => self.rng.next_u64() % blocks,
        };
        let lba = if lba + count > blocks { self.rng.next_u64() % (blocks - count + 1) } else { lba };
        self.cursor = (lba + count) % blocks;
        (lba, count)
    }
}

/// The seed of a test: what `NACRE_SEED` says, or this one.
///
/// # Panics
/// It says something that is not a number.
pub fn seed(default: u64) -> u64 {
    env::var("NACRE_SEED").map_or(default, |text| text.parse().unwrap())
}

/// Whether tests are to be thorough rather than fast: `NACRE_LONG=1`.
pub fn long() -> bool {
    env::var_os("NACRE_LONG").is_some_and(|value| value != "0")
}

/// Runs a test with one seed after the other for some time, which `NACRE_LONG=1` makes sixty times as long, and at least once.
/// `NACRE_SEED` runs that seed only. A failure prints its seed.
pub fn seeds(first: u64, time: Duration, mut test: impl FnMut(u64)) -> u64 {
    if env::var_os("NACRE_SEED").is_some() {
        let seed = seed(first);
        let _named = Named(seed);
        test(seed);
        return 1;
    }
    let time = if long() { time * 60 } else { time };
    let start = Instant::now();
    let mut count = 0;
    while count == 0 || start.elapsed() < time {
        let _named = Named(first + count);
        test(first + count);
        count += 1;
    }
    count
}

/// Says which seed failed.
struct Named(u64);

impl Drop for Named {
    #[expect(clippy::print_stderr, reason = "whoever sees the failure has to be able to repeat it")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("\nto repeat this failure: NACRE_SEED={}\n", self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_the_same_requests_and_all_fit() {
        for regions in [0, 4] {
            let profile = Profile { grow: 1, regions, ..Profile::default() };
            let ops = |seed| {
                let mut workload = Workload::new(seed, 300, &profile);
                (0..2000).map(|_| workload.next_op(300)).collect::<Vec<_>>()
            };
            assert_eq!(ops(1), ops(1));
            assert_ne!(ops(1), ops(2));
            for op in ops(3) {
                if let Op::Write { lba, count } | Op::Trim { lba, count } | Op::Read { lba, count } = op {
                    assert!(count > 0 && lba + count <= 300, "{op:?}");
                }
            }
            for op in [Op::Flush, Op::Reopen, Op::Crash] {
                assert!(ops(1).contains(&op), "{op:?}");
            }
        }
    }

    #[test]
    fn a_time_that_is_over_runs_one_seed() {
        let mut ran = Vec::new();
        assert_eq!(seeds(7, Duration::ZERO, |seed| ran.push(seed)), 1);
        assert_eq!(ran.len(), 1);
    }
}

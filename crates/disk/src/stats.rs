//! What an open disk counts.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use serde::Serialize;

/// Buckets of a latency histogram: the n-th counts what took less than 2^n microseconds, the last one everything else.
pub const BUCKETS: usize = 24;

/// Latencies.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    pub(crate) fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = usize::try_from(u64::BITS - micros.leading_zeros()).unwrap_or(BUCKETS).min(BUCKETS - 1);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.count.fetch_add(1, Relaxed);
        self.micros.fetch_add(micros, Relaxed);
    }

    fn read(&self) -> Latency {
        Latency {
            buckets: self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect(),
            count: self.count.load(Relaxed),
            sum_micros: self.micros.load(Relaxed),
        }
    }
}

/// A latency histogram: `buckets[n]` counts what took less than 2^n microseconds (and not less than 2^(n-1)); the last one, all else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// The buckets, [`BUCKETS`] of them.
    pub buckets: Vec<u64>,
    /// How many there were.
    pub count: u64,
    /// How long they took together, in microseconds.
    pub sum_micros: u64,
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What is counted while the disk runs.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)+
            pub(crate) read_latency: Histogram,
            pub(crate) write_latency: Histogram,
            pub(crate) flush_latency: Histogram,
        }

        /// What an open disk has counted since it was opened.
        #[derive(Clone, Debug, Default, PartialEq, Serialize)]
        pub struct Statistics {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// Bytes written to the store for each byte that users wrote.
            pub write_amplification: f64,
            /// Of reads.
            pub read_latency: Latency,
            /// Of writes.
            pub write_latency: Latency,
            /// Of flushes.
            pub flush_latency: Latency,
        }

        impl Counters {
            pub(crate) fn read(&self) -> Statistics {
                let mut statistics = Statistics {
                    $($name: self.$name.load(Relaxed),)+
                    write_amplification: 0.0,
                    read_latency: self.read_latency.read(),
                    write_latency: self.write_latency.read(),
                    flush_latency: self.flush_latency.read(),
                };
                let all = statistics.data_bytes + statistics.journal_bytes + statistics.index_bytes
                    + statistics.cleaned_bytes + statistics.checkpoint_bytes;
                if statistics.user_written_bytes > 0 {
                    statistics.write_amplification = all as f64 / statistics.user_written_bytes as f64;
                }
                statistics
            }
        }
    };
}

counters! {
    /// Bytes that users read.
    user_read_bytes,
    /// Bytes that users wrote.
    user_written_bytes,
    /// Requests to read.
    reads,
    /// Requests to write.
    writes,
    /// Flushes that users asked for.
    flushes,
    /// Bytes that users trimmed, or wrote zeroes to.
    trimmed_bytes,
    /// Commits: flushes that had something to make durable, those that came together counted once.
    commits,
    /// Commits that the disk began by itself, since a transaction grew too large.
    forced_commits,
    /// Checkpoints.
    checkpoints,
    /// Data written to the store for users.
    data_bytes,
    /// Journal written to the store.
    journal_bytes,
    /// Index nodes and bitmap pages written to the store.
    index_bytes,
    /// Data moved by cleaning.
    cleaned_bytes,
    /// Checkpoints written to the store.
    checkpoint_bytes,
    /// Index nodes and bitmap pages found in memory.
    cache_hits,
    /// Index nodes and bitmap pages read from the store.
    cache_misses,
    /// Writes that waited for a checkpoint.
    stalls,
    /// How long they waited, in microseconds.
    stalled_micros,
    /// The longest of these waits, in microseconds.
    longest_stall_micros,
    /// Blocks that were not what they had to be.
    integrity_errors,
    /// How often the anchor was moved on.
    anchored,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Relaxed);
}

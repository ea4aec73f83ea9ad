//! Counters, as Prometheus reads them (text format 0.0.4). They are of this replica, but for sessions, which all share.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Upper bounds of the histogram of call times, in seconds.
const BUCKETS: [f64; 8] = [0.001, 0.0025, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0];

/// What a replica counts.
#[derive(Default)]
pub(crate) struct Metrics {
    /// By route and status: both from small fixed sets, so that nobody can fill the memory with them.
    calls: Mutex<BTreeMap<(&'static str, u16), u64>>,
    times: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
    /// Calls that were turned away: over the rate of their address, or too many at a time.
    pub(crate) limited: AtomicU64,
    /// Attestations by what came of them.
    pub(crate) attested: AtomicU64,
    /// Attestations that were refused.
    pub(crate) attestation_refused: AtomicU64,
    /// Resources that were released.
    pub(crate) released: AtomicU64,
    /// Resources that were refused.
    pub(crate) release_refused: AtomicU64,
    /// Leases that were renewed.
    pub(crate) renewed: AtomicU64,
    /// TLS handshakes that failed.
    pub(crate) handshakes_failed: AtomicU64,
}

/// Counts one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Metrics {
    pub(crate) fn call(&self, route: &'static str, status: u16, time: Duration) {
        *self.calls.lock().unwrap_or_else(PoisonError::into_inner).entry((route, status)).or_default() += 1;
        let seconds = time.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        if let Some(counter) = self.times.get(bucket) {
            count(counter);
        }
        self.micros.fetch_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The text; `sessions` where they could be counted.
    pub(crate) fn text(&self, sessions: Option<usize>, audit: Option<u64>) -> String {
        let mut out = String::new();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let _ = writeln!(
            out,
            "# HELP nacre_broker_calls_total Calls by route and HTTP status.\n# TYPE nacre_broker_calls_total counter"
        );
        for ((route, status), count) in self.calls.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = writeln!(out, "nacre_broker_calls_total{{route=\"{route}\",status=\"{status}\"}} {count}");
        }
        let name = "nacre_broker_call_seconds";
        let _ = writeln!(out, "# HELP {name} Time of calls.\n# TYPE {name} histogram");
        let mut sum = 0;
        for (number, counter) in self.times.iter().enumerate() {
            sum += read(counter);
            let bound = BUCKETS.get(number).map_or("+Inf".to_owned(), ToString::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let micros = read(&self.micros);
        let _ = writeln!(out, "{name}_sum {}.{:06}\n{name}_count {sum}", micros / 1_000_000, micros % 1_000_000);
        for (name, help, counter) in [
            ("limited_total", "Calls turned away by a limit.", &self.limited),
            ("attested_total", "Attestations that held.", &self.attested),
            ("attestation_refused_total", "Attestations that were refused.", &self.attestation_refused),
            ("released_total", "Resources released.", &self.released),
            ("release_refused_total", "Resources refused.", &self.release_refused),
            ("leases_renewed_total", "Leases renewed.", &self.renewed),
            ("handshakes_failed_total", "TLS handshakes that failed.", &self.handshakes_failed),
        ] {
            let name = format!("nacre_broker_{name}");
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}", read(counter));
        }
        for (name, help, value) in [
            ("sessions", "Open sessions of all replicas.", sessions.map(|count| count as u64)),
            ("audit_entries", "Number of the last audit entry.", audit),
            ("up", "Whether the database answers.", Some(u64::from(sessions.is_some()))),
        ] {
            if let Some(value) = value {
                let name = format!("nacre_broker_{name}");
                let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
            }
        }
        out
    }
}

//! Time that passes: CLOCK_BOOTTIME, which nobody sets and which runs on while the machine sleeps.
//!
//! A host can stop a guest or slow its counter, which makes time stand, never run back. A TEE whose counter the host cannot touch
//! (SNP's Secure TSC, TDX) closes that too.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use time::OffsetDateTime;

/// An instant since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BootTime(Duration);

impl BootTime {
    pub(super) fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(Duration::new(
            u64::try_from(now.tv_sec).unwrap_or_default(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        ))
    }

    pub(super) fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

/// Seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seconds(pub(super) i64);

impl Seconds {
    pub(super) fn plus(self, elapsed: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX)))
    }

    pub(super) fn to_time(self) -> Option<OffsetDateTime> {
        OffsetDateTime::from_unix_timestamp(self.0).ok()
    }
}

//! How fast sources are asked: a limit on bytes a second, in which reads that somebody waits for go first.

use std::{
    num::NonZeroU64,
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What was not used lately may be used at once, but no more than of this time.
const SAVED: Duration = Duration::from_millis(500);
/// What is not urgent waits no longer for what is: a reader may have come to wait for it meanwhile.
const GIVE_WAY: Duration = Duration::from_secs(1);
/// The fewest bytes of a request under a limit: below, requests cost more than what they bring.
const LEAST: u64 = 64 << 10;

/// The lowest limit that there may be: a read waits for no more than a second or so of it.
pub const LEAST_RATE: NonZeroU64 = NonZeroU64::MIN.saturating_add((64 << 10) - 1);

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody waits for the bytes.
    Waited,
    /// They may be wanted later: whoever waits goes first.
    Later,
}

/// A limit on bytes a second, for all that a process fetches.
#[derive(Debug, Default)]
pub struct Pace {
    rate: Option<NonZeroU64>,
    state: Mutex<State>,
    /// Nobody waits any more.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// When all that was let through is paid for.
    paid: Option<Instant>,
    /// How many urgent requests wait or run.
    urgent: usize,
}

/// A request that may run; urgent ones hold back all that is not.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    pace: &'a Pace,
    urgency: Urgency,
}

impl Pace {
    /// At most so many bytes a second; without a number, as fast as it goes.
    pub fn new(rate: Option<NonZeroU64>) -> Self {
        Self { rate, ..Self::default() }
    }

    /// The most bytes of a request, so that one that is not urgent keeps nobody waiting for more than a quarter of a second.
    pub(crate) fn request(&self, most: u64) -> u64 {
        self.rate.map_or(most, |rate| (rate.get() / 4).clamp(LEAST, most.max(LEAST)))
    }

    /// Waits until a request of so many bytes may run.
    pub(crate) fn turn(&self, bytes: u64, urgency: Urgency) -> Turn<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match urgency {
            Urgency::Waited => state.urgent += 1,
            Urgency::Later => {
                let waited = self.idle.wait_timeout_while(state, GIVE_WAY, |state| state.urgent > 0);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        let turn = Turn { pace: self, urgency };
        let Some(rate) = self.rate else { return turn };
        let now = Instant::now();
        let from = state.paid.map_or(now, |paid| paid.max(now.checked_sub(SAVED).unwrap_or(now)));
        let cost = Duration::try_from_secs_f64(bytes as f64 / rate.max(LEAST_RATE).get() as f64).unwrap_or(SAVED);
        state.paid = Some(from + cost);
        drop(state);
        std::thread::sleep(from.saturating_duration_since(now));
        turn
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.urgency == Urgency::Waited {
            let mut state = self.pace.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.urgent -= 1;
            if state.urgent == 0 {
                self.pace.idle.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;

    #[test]
    fn a_rate_is_kept() {
        let pace = Pace::new(NonZeroU64::new(1 << 20));
        assert_eq!(pace.request(4 << 20), 256 << 10);
        let start = Instant::now();
        for _ in 0..5 {
            drop(pace.turn(256 << 10, Urgency::Waited));
        }
        // The first is free, and each pays for the one before it.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(950), "{took:?}");
        let free = Pace::new(None);
        assert_eq!(free.request(4 << 20), 4 << 20);
        drop(free.turn(u64::MAX, Urgency::Later));
    }

    #[test]
    fn what_is_not_urgent_waits_for_what_is() {
        let pace = Arc::new(Pace::new(None));
        let urgent = pace.turn(1, Urgency::Waited);
        let ran = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (pace, ran) = (Arc::clone(&pace), Arc::clone(&ran));
            move || {
                let _turn = pace.turn(1, Urgency::Later);
                ran.store(true, Ordering::SeqCst);
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!ran.load(Ordering::SeqCst));
        drop(pace.turn(1, Urgency::Waited));
        drop(urgent);
        thread.join().unwrap();
        assert!(ran.load(Ordering::SeqCst));
    }
}

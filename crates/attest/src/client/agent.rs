//! The attestation agent: a thread that renews leases, each when half of its time is over, and says when one has ended.
//!
//! Whoever holds what was lent gives a function that gives it up: unmounts, closes, zeroizes. It is called once, when the broker refuses to
//! renew (the lease was revoked, the guest is not trusted any more), or when the lease runs out because no broker answers. That is at most the
//! length of the lease after a revocation.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use super::{BrokerClient, ClientError, Lease};

/// A renewal that failed by the network is tried again after this long at first.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A lease is given up so long before it ends, since giving up takes time too.
const MARGIN: Duration = Duration::from_secs(1);

/// What is called when a lease has ended, with the reason.
pub type LeaseEnd = Box<dyn FnOnce(&ClientError) + Send>;

struct Held {
    lease: Lease,
    ended: LeaseEnd,
    /// After a failure: the pause before the next try.
    pause: Option<Duration>,
    /// When to renew next: how much of the lease is to be left by then.
    at: Duration,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Renews leases until it is dropped, and gives up then what is left of them.
pub struct Agent {
    client: Arc<BrokerClient>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// Starts the agent of a broker's client.
    ///
    /// # Errors
    /// [`std::io::Error`] where no thread can be started.
    pub fn start(client: Arc<BrokerClient>) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (of_thread, with) = (shared.clone(), client.clone());
        let thread = std::thread::Builder::new().name("nacre-attest".into()).spawn(move || run(&with, &of_thread))?;
        Ok(Self { client, shared, thread: Some(thread) })
    }

    /// Renews a lease from now on; `ended` is called when that ends.
    pub fn keep(&self, lease: Lease, ended: LeaseEnd) {
        let at = half(&lease);
        self.shared.state().held.push(Held { lease, ended, pause: None, at });
        self.shared.changed.notify_one();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for held in self.shared.state().held.drain(..) {
            // It ends by itself.
            let _ = self.client.give_up(&held.lease);
        }
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("client", &self.client).finish_non_exhaustive()
    }
}

fn half(lease: &Lease) -> Duration {
    Duration::from_secs(lease.seconds().into()) / 2
}

/// How long until something is due.
fn wait(held: &Held) -> Duration {
    held.lease.left().saturating_sub(held.at.max(MARGIN))
}

fn run(client: &BrokerClient, shared: &Shared) {
    let mut state = shared.state();
    while !state.stop {
        let due = state.held.iter().position(|held| wait(held).is_zero());
        let Some(number) = due else {
            let next = state.held.iter().map(wait).min().unwrap_or(LONGEST_PAUSE);
            state = shared.changed.wait_timeout(state, next).unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        // Without the lock: whoever holds something else must not wait for the network.
        let mut held = state.held.swap_remove(number);
        drop(state);
        match client.renew(&mut held.lease) {
            Ok(()) => {
                tracing::debug!(path = %held.lease.path(), "lease renewed");
                (held.at, held.pause) = (half(&held.lease), None);
                state = shared.state();
                state.held.push(held);
            }
            Err(error) => {
                let pause = held.pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
                let left = held.lease.left();
                if matches!(error, ClientError::LeaseEnded { .. }) || left <= MARGIN {
                    tracing::warn!(path = %held.lease.path(), %error, "lease ended");
                    (held.ended)(&error);
                    state = shared.state();
                } else {
                    tracing::warn!(path = %held.lease.path(), %error, "lease not renewed yet, trying again");
                    (held.at, held.pause) = (left.saturating_sub(pause), Some(pause));
                    state = shared.state();
                    state.held.push(held);
                }
            }
        }
    }
}

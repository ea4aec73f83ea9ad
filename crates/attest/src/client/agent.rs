//! The attestation agent: a thread that renews leases, each when half of its time is over, and says when one has ended.
//!
//! Whoever holds what was lent gives a function that gives it up: unmounts, closes, zeroizes. It is called once, when the broker refuses to
//! renew (the lease was revoked, the guest is not trusted any more), or when the lease runs out because no broker answers. That is at most the
//! length of the lease after a revocation: a thread of its own watches the time, so that a network that answers nothing does not lengthen it.
//! What nobody needs any more is given back when its renewal would be due. Beside that, the agent attests anew on a schedule, where there is one.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use nacre_core::ResourcePath;

use super::{Attested, BrokerClient, ClientError, Lease, time::BootTime};

/// A renewal that failed by the network is tried again after this long at first.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A lease is given up so long before it ends, since giving up takes time too.
const MARGIN: Duration = Duration::from_secs(1);

/// What is called when a lease has ended, with the reason.
pub type LeaseEnd = Box<dyn FnOnce(&ClientError) + Send>;

/// Says whether what was lent is still needed.
pub type Needed = Box<dyn Fn() -> bool + Send>;

/// Who is told when a lease ends.
struct Watched {
    number: u64,
    path: ResourcePath,
    /// From then on it lasts so long, a guest that is stopped meanwhile included.
    from: BootTime,
    lasts: Duration,
    ended: LeaseEnd,
}

impl Watched {
    fn left(&self) -> Duration {
        self.lasts.saturating_sub(self.from.elapsed())
    }
}

struct Held {
    /// That of what is watched.
    number: u64,
    lease: Lease,
    needed: Needed,
    /// After a failure: the pause before the next try.
    pause: Option<Duration>,
    /// When to renew next: how much of the lease is to be left by then.
    at: Duration,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    watched: Vec<Watched>,
    schedule: Option<Schedule>,
    next: u64,
    stop: bool,
}

/// When to attest anew.
struct Schedule {
    every: Duration,
    from: BootTime,
    wait: Duration,
    /// After a failure.
    pause: Option<Duration>,
}

impl Schedule {
    fn left(&self) -> Duration {
        self.wait.saturating_sub(self.from.elapsed())
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl State {
    /// What is told of the end of a lease, unless it was told already.
    fn take(&mut self, number: u64) -> Option<Watched> {
        let at = self.watched.iter().position(|watched| watched.number == number)?;
        Some(self.watched.swap_remove(at))
    }
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
    /// Renews.
    thread: Option<JoinHandle<()>>,
    /// Watches the time.
    watch: Option<JoinHandle<()>>,
}

impl Agent {
    /// Starts the agent of a broker's client.
    ///
    /// # Errors
    /// [`std::io::Error`] where threads cannot be started.
    pub fn start(client: Arc<BrokerClient>) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (of_thread, with) = (shared.clone(), client.clone());
        let thread = std::thread::Builder::new().name("nacre-attest".into()).spawn(move || run(&with, &of_thread))?;
        let mut agent = Self { client, shared, thread: Some(thread), watch: None };
        let shared = agent.shared.clone();
        agent.watch = Some(std::thread::Builder::new().name("nacre-leases".into()).spawn(move || watch(&shared))?);
        Ok(agent)
    }

    /// Attests anew so often from now on, so that a broker sees what has become of this guest, and a token is always at hand. A failure is
    /// logged and tried again; tokens that are there hold until they end.
    pub fn attest_every(&self, every: Duration) {
        self.shared.state().schedule = Some(Schedule { every, from: BootTime::now(), wait: every, pause: None });
        self.shared.changed.notify_all();
    }

    /// Renews a lease from now on; `ended` is called when that ends.
    pub fn keep(&self, lease: Lease, ended: LeaseEnd) {
        self.keep_while(lease, Box::new(|| true), ended);
    }

    /// Gives a lease back at once, which takes none of the caller's time.
    pub fn release(&self, lease: Lease) {
        self.hold(lease, Duration::MAX, Box::new(|| false), Box::new(|_| ()));
    }

    /// Renews a lease for as long as it is `needed`, and gives it back then; `ended` is called when it ends by itself.
    pub fn keep_while(&self, lease: Lease, needed: Needed, ended: LeaseEnd) {
        let at = half(&lease);
        self.hold(lease, at, needed, ended);
    }

    fn hold(&self, lease: Lease, at: Duration, needed: Needed, ended: LeaseEnd) {
        let mut state = self.shared.state();
        let number = state.next;
        state.next += 1;
        let (path, from, lasts) = (lease.path().clone(), BootTime::now(), lasts(&lease));
        state.watched.push(Watched { number, path, from, lasts, ended });
        state.held.push(Held { number, lease, needed, pause: None, at });
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
        for thread in [self.thread.take(), self.watch.take()].into_iter().flatten() {
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

impl Schedule {
    fn attested(&mut self, result: Result<Arc<Attested>, ClientError>) {
        self.from = BootTime::now();
        match result {
            Ok(_) => {
                tracing::debug!("attested anew, as scheduled");
                (self.wait, self.pause) = (self.every, None);
            }
            Err(error) => {
                let pause = self.pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
                tracing::warn!(%error, "not attested anew, trying again");
                (self.wait, self.pause) = (pause.min(self.every), Some(pause));
            }
        }
    }
}

fn half(lease: &Lease) -> Duration {
    Duration::from_secs(lease.seconds().into()) / 2
}

/// How long until it is to be given up, unless it is renewed by then.
fn lasts(lease: &Lease) -> Duration {
    lease.left().saturating_sub(MARGIN)
}

/// Says of each lease that ran out that it has, whatever becomes of its renewal meanwhile.
fn watch(shared: &Shared) {
    let mut state = shared.state();
    while !state.stop {
        let over = state.watched.iter().find(|watched| watched.left().is_zero()).map(|watched| watched.number);
        let Some(over) = over.and_then(|number| state.take(number)) else {
            // A wait does not count the time that a guest is stopped, so it is looked again soon.
            let next = state.watched.iter().map(|watched| watched.left().min(MARGIN)).min().unwrap_or(LONGEST_PAUSE);
            state = shared.changed.wait_timeout(state, next).unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        drop(state);
        tracing::warn!(path = %over.path, "lease ran out before it was renewed");
        (over.ended)(&ClientError::LeaseEnded { path: over.path, why: "it ran out before it could be renewed".into() });
        state = shared.state();
    }
}

/// How long until something is due.
fn wait(held: &Held) -> Duration {
    held.lease.left().saturating_sub(held.at.max(MARGIN))
}

fn run(client: &BrokerClient, shared: &Shared) {
    let mut state = shared.state();
    while !state.stop {
        if state.schedule.as_ref().is_some_and(|schedule| schedule.left().is_zero()) {
            drop(state);
            let attested = client.attest_anew();
            state = shared.state();
            if let Some(schedule) = &mut state.schedule {
                schedule.attested(attested);
            }
            continue;
        }
        let due = state.held.iter().position(|held| wait(held).is_zero());
        let Some(number) = due else {
            let scheduled = state.schedule.iter().map(Schedule::left);
            // A wait does not count the time that a guest is stopped.
            let next = state.held.iter().map(wait).chain(scheduled).min().unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE);
            state = shared.changed.wait_timeout(state, next).unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        // Without the lock: whoever holds something else must not wait for the network.
        let mut held = state.held.swap_remove(number);
        drop(state);
        if !(held.needed)() {
            // Whoever is not told any more that it ended has it no more.
            drop(shared.state().take(held.number));
            tracing::debug!(path = %held.lease.path(), "lease given back");
            let _ = client.give_up(&held.lease);
            state = shared.state();
            continue;
        }
        match client.renew(&mut held.lease) {
            Ok(()) => {
                tracing::debug!(path = %held.lease.path(), "lease renewed");
                (held.at, held.pause) = (half(&held.lease), None);
                state = shared.state();
                let renewed = (BootTime::now(), lasts(&held.lease));
                match state.watched.iter_mut().find(|watched| watched.number == held.number) {
                    Some(watched) => {
                        (watched.from, watched.lasts) = renewed;
                        state.held.push(held);
                    }
                    // It was given up meanwhile; the broker's side of it ends by itself.
                    None => tracing::debug!(path = %held.lease.path(), "renewed too late"),
                }
            }
            Err(error) => {
                let pause = held.pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
                let left = held.lease.left();
                if matches!(error, ClientError::LeaseEnded { .. }) || left <= MARGIN {
                    let watched = shared.state().take(held.number);
                    if let Some(watched) = watched {
                        tracing::warn!(path = %watched.path, %error, "lease ended");
                        (watched.ended)(&error);
                    }
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

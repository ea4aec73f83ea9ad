//! What the broker lent to the parts of a guest: each part has a [`Tenure`] for as long as it needs what it was lent, and is told when that ends.
//!
//! A key that is used once and forgotten, as a pull does, is lent for the pull: its lease is given back afterwards. A key that is kept, as a
//! lazy mount does, is lent for as long as that lasts.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use nacre_core::{KeySource, KeySourceError, ResourceUri, SecretBytes};

use super::{Agent, BrokerClient, Lease};

/// A key source that remembers what was lent.
pub struct Tenancy {
    client: Arc<BrokerClient>,
    /// Started with the first lease.
    agent: OnceLock<Agent>,
    /// What came and is nobody's yet.
    acquired: Mutex<Vec<Lease>>,
    /// Held by who makes what comes meanwhile its own.
    lending: Mutex<()>,
    /// How many use keys and forget them.
    using: AtomicUsize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tenancy {
    /// That of a broker's client.
    pub fn new(client: Arc<BrokerClient>) -> Self {
        let (agent, acquired, lending) = (OnceLock::new(), Mutex::default(), Mutex::default());
        Self { client, agent, acquired, lending, using: AtomicUsize::new(0) }
    }

    /// The thread that renews; started where it does not run.
    ///
    /// # Errors
    /// [`std::io::Error`] where threads cannot be started.
    pub fn agent(&self) -> std::io::Result<&Agent> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let agent = Agent::start(self.client.clone())?;
        Ok(self.agent.get_or_init(|| agent))
    }

    /// Does something that fetches keys to keep them. What was lent meanwhile is renewed for as long as the tenure that comes back is there, or
    /// something that it was [given to](Tenure::give_to); none comes back where nothing was lent.
    pub fn lend<T>(&self, act: impl FnOnce() -> T) -> (T, Option<Arc<Tenure>>) {
        let _alone = lock(&self.lending);
        let value = act();
        let leases = std::mem::take(&mut *lock(&self.acquired));
        if leases.is_empty() {
            return (value, None);
        }
        let state = Arc::new(State::default());
        let agent = match self.agent() {
            Ok(agent) => agent,
            Err(error) => {
                state.end(&format!("nobody can renew its lease: {error}"));
                return (value, Some(Arc::new(Tenure(state))));
            }
        };
        for lease in leases {
            let (needed, ended) = (state.clone(), state.clone());
            agent.keep_while(
                lease,
                Box::new(move || needed.is_needed()),
                Box::new(move |why| ended.end(&why.to_string())),
            );
        }
        (value, Some(Arc::new(Tenure(state))))
    }

    /// Does something that forgets the keys that it fetches: their leases are given back when the last of such uses is over.
    pub fn spend<T>(&self, act: impl FnOnce() -> T) -> T {
        let _over = Spending::begin(self);
        act()
    }

    fn give_back(&self) {
        // Whoever lends just now takes them over.
        let Ok(_alone) = self.lending.try_lock() else { return };
        let leases = std::mem::take(&mut *lock(&self.acquired));
        if leases.is_empty() {
            return;
        }
        match self.agent() {
            Ok(agent) => leases.into_iter().for_each(|lease| agent.release(lease)),
            // They end by themselves.
            Err(error) => tracing::warn!(%error, "leases are not given back"),
        }
    }
}

impl fmt::Debug for Tenancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenancy").field("client", &self.client).finish_non_exhaustive()
    }
}

impl KeySource for Tenancy {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        let borrowed = self.client.borrow_by_name(uri)?;
        lock(&self.acquired).extend(borrowed.lease);
        Ok(borrowed.secret)
    }
}

struct Spending<'a>(&'a Tenancy);

impl<'a> Spending<'a> {
    fn begin(tenancy: &'a Tenancy) -> Self {
        tenancy.using.fetch_add(1, Ordering::SeqCst);
        Self(tenancy)
    }
}

impl Drop for Spending<'_> {
    fn drop(&mut self) {
        if self.0.using.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.give_back();
        }
    }
}

/// Something that uses what was lent.
struct Use {
    is_used: Box<dyn Fn() -> bool + Send>,
    end: Box<dyn FnOnce(&str) + Send>,
}

#[derive(Default)]
struct State {
    /// The tenure itself has gone.
    dropped: AtomicBool,
    uses: Mutex<Vec<Use>>,
    why: OnceLock<String>,
}

impl State {
    fn is_needed(&self) -> bool {
        let mut uses = lock(&self.uses);
        uses.retain(|one| (one.is_used)());
        !self.dropped.load(Ordering::SeqCst) || !uses.is_empty()
    }

    fn end(&self, why: &str) {
        let uses = {
            let mut uses = lock(&self.uses);
            // From here on, who comes is told at once.
            let _ = self.why.set(why.to_owned());
            std::mem::take(&mut *uses)
        };
        for one in uses {
            (one.end)(why);
        }
    }
}

/// What was lent at once: it ends when any of its leases does.
pub struct Tenure(Arc<State>);

impl Tenure {
    /// Why it has ended; `None` while it has not.
    pub fn ended(&self) -> Option<&str> {
        self.0.why.get().map(String::as_str)
    }

    /// Hands it to something that may outlive this: leases are renewed while it `is_used`, and `end` is called when they end, at once where they
    /// have.
    pub fn give_to(&self, is_used: impl Fn() -> bool + Send + 'static, end: impl FnOnce(&str) + Send + 'static) {
        let mut uses = lock(&self.0.uses);
        match self.0.why.get() {
            None => uses.push(Use { is_used: Box::new(is_used), end: Box::new(end) }),
            Some(why) => {
                drop(uses);
                end(why);
            }
        }
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        self.0.dropped.store(true, Ordering::SeqCst);
    }
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenure").field("ended", &self.ended()).finish_non_exhaustive()
    }
}

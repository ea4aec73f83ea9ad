//! The daemon's loop: requests, mounts that others took away, and the end.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nacre_guest::lazy;
use nacre_sys::end::EndSignals;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::Value;

use crate::{
    Program, ServeArgs, Station,
    link::{self, FILES, Held, Link, ToDaemon, ToKeeper},
    mounts::{self, Mounts},
    protocol::{self, Hello, PEER_TIME, Request, VERSION},
};

/// How often it is looked whether mounts are still there.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// Requests at once.
const REQUESTS: usize = 64;
/// How long requests that are under way may take before another process takes over.
const FINISH: Duration = Duration::from_secs(10);

/// Is the daemon, until nobody needs it; gives the exit code.
///
/// # Errors
/// It cannot begin, or not go on.
pub fn serve(program: &Program, args: &ServeArgs) -> anyhow::Result<i32> {
    nacre_sys::memory::share_one_heap();
    let end = EndSignals::hold()?;
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdin(File::open("/dev/null").context("/dev/null")?)?;
    let station = Station::here(&args.directory)?;
    let (listener, lock, held) = begin(&socket)?;
    // Before anything is changed: a program of another version leaves it to the one that made them.
    mounts::readable(&held)?;
    // What nobody can go on with, since it died before its keeper had it.
    if let Err(error) = lazy::clean(&args.directory) {
        tracing::warn!("{error}");
    }
    let link = Arc::new(Link::new(program.clone(), station, socket, listener, lock));
    let daemon = Arc::new(Daemon {
        mounts: Mounts::new(&args.directory, Arc::clone(&link)),
        link,
        exit: program.exit,
        active: AtomicUsize::new(0),
        restart: AtomicBool::new(false),
    });
    daemon.mounts.resume(held);
    daemon.link.watch().context("a thread")?;
    daemon.link.tell(&ToKeeper::Ready);
    daemon.run(&end, Duration::from_secs(args.idle))
}

/// What the keeper says at first: descriptors, and the mounts of the predecessor.
fn begin(socket: &UnixStream) -> anyhow::Result<(UnixListener, File, BTreeMap<u64, Held>)> {
    let (message, files) = link::receive::<ToDaemon>(socket).context("the keeper")?;
    let files: [OwnedFd; 2] = files.try_into().map_err(|_| anyhow::anyhow!("the keeper's descriptors did not come"))?;
    anyhow::ensure!(matches!(message, ToDaemon::Start), "the keeper says something else first");
    let [listener, lock] = files;
    let mut held = BTreeMap::new();
    loop {
        match link::receive(socket).context("the keeper")? {
            (ToDaemon::Mount { id, record }, files) if FILES.contains(&files.len()) => {
                held.insert(id, Held { record, files });
            }
            (ToDaemon::Go, _) => return Ok((listener.into(), lock.into(), held)),
            _ => anyhow::bail!("the keeper says what makes no sense"),
        }
    }
}

struct Daemon {
    mounts: Mounts,
    link: Arc<Link>,
    exit: fn(&anyhow::Error) -> u8,
    /// Requests that are under way.
    active: AtomicUsize,
    /// Another process is to take over.
    restart: AtomicBool,
}

impl Daemon {
    fn run(self: &Arc<Self>, end: &EndSignals, idle: Duration) -> anyhow::Result<i32> {
        self.link.listener().set_nonblocking(true).context("the socket")?;
        let (mut used, mut looked) = (Instant::now(), Instant::now());
        loop {
            if end.wait_for(Duration::ZERO)? {
                self.mounts.unmount_all();
                self.link.tell(&ToKeeper::End);
                return Ok(0);
            }
            if self.restart.load(Ordering::SeqCst) {
                self.hand_over();
            }
            let mut polled = [PollFd::new(self.link.listener(), PollFlags::IN)];
            match rustix::event::poll(&mut polled, Some(&LOOK_POLL)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => self.accept(),
                Err(error) => return Err(error).context("the socket"),
            }
            if looked.elapsed() >= LOOK {
                self.mounts.look();
                looked = Instant::now();
            }
            if !self.mounts.is_empty() || self.active.load(Ordering::SeqCst) > 0 {
                used = Instant::now();
            }
            if used.elapsed() >= idle {
                // Whoever calls now finds nobody and starts another one.
                self.link.tell(&ToKeeper::End);
                return Ok(0);
            }
        }
    }

    fn accept(self: &Arc<Self>) {
        let client = match self.link.listener().accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!("a request was not taken: {error}");
                // Where there are no descriptors, trying again at once would only burn time.
                thread::sleep(Duration::from_millis(20));
                return;
            }
        };
        let active = Active::new(self);
        if self.active.load(Ordering::SeqCst) > REQUESTS {
            tracing::warn!("more than {REQUESTS} requests at once; one is turned away");
            return;
        }
        let spawned = thread::Builder::new().name("request".into()).spawn(move || {
            if let Err(error) = active.0.answer(&client) {
                tracing::info!("a request was not answered: {error:#}");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!("a request was not answered: {error}");
        }
    }

    fn answer(&self, client: &UnixStream) -> anyhow::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(PEER_TIME))?;
        client.set_write_timeout(Some(PEER_TIME))?;
        let peer = rustix::net::sockopt::socket_peercred(client).context("who asks")?.uid.as_raw();
        if !may_ask(peer, rustix::process::geteuid().as_raw()) {
            tracing::warn!("user {peer} asked for lazy images, and was turned away");
            return Ok(());
        }
        protocol::write_frame(client, &Hello { version: VERSION, pid: std::process::id() })?;
        let (request, files) = match protocol::asked(client) {
            Ok(asked) => asked,
            Err(error) => {
                let error = error.context("this is no request");
                return Ok(protocol::answer(client, self.exit, Err(error))?);
            }
        };
        let result = match request {
            Request::Mount(request) => match self.mounts.mount(request, files) {
                Ok((id, mounted)) => {
                    let answered = protocol::answer(client, self.exit, Ok(mounted));
                    if answered.is_err() {
                        // Whoever wanted it has gone.
                        self.mounts.unmount_one(id);
                    }
                    return Ok(answered?);
                }
                Err(error) => Err(error),
            },
            Request::Unmount { target } => self.mounts.unmount(&target).map(|()| Value::Null),
            Request::Cut { target } => self.mounts.cut(&target).map(|()| Value::Null),
            Request::Complete { what } => self.mounts.complete(&what).map(|()| Value::Null),
            Request::List => self.mounts.list(),
            Request::Restart => {
                self.restart.store(true, Ordering::SeqCst);
                Ok(Value::Null)
            }
        };
        Ok(protocol::answer(client, self.exit, result)?)
    }

    /// Ends this process and leaves what is mounted to another one, where there is a keeper to start it.
    fn hand_over(&self) {
        let begin = Instant::now();
        while self.active.load(Ordering::SeqCst) > 0 && begin.elapsed() < FINISH {
            thread::sleep(Duration::from_millis(10));
        }
        if !self.link.tell(&ToKeeper::Restart { kill: self.mounts.can_be_killed() }) {
            tracing::error!("there is no keeper to start another process; this one goes on");
            self.restart.store(false, Ordering::SeqCst);
            return;
        }
        self.mounts.hand_over();
        // Nothing is dropped: what is mounted stays.
        std::process::exit(0);
    }
}

/// A request that is under way.
struct Active(Arc<Daemon>);

impl Active {
    fn new(daemon: &Arc<Daemon>) -> Self {
        daemon.active.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(daemon))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Who could mount as well as this process.
fn may_ask(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_owner_may_ask() {
        assert!(may_ask(0, 1000) && may_ask(1000, 1000) && may_ask(0, 0));
        assert!(!may_ask(1001, 1000) && !may_ask(65534, 0));
    }
}

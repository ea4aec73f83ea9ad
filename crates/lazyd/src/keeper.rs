//! The keeper: holds what keeps mounts alive, starts the daemon, and its successor when it died.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nacre_sys::end::EndSignals;
use rustix::{
    event::{PollFd, PollFlags},
    process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, pidfd_open, pidfd_send_signal, setrlimit},
};

use crate::{
    KeepArgs, Program, SELF, Station,
    link::{self, FILES, Held, ToDaemon, ToKeeper},
};

/// A daemon that lives shorter than this died of what it was to go on with, most likely.
const SHORT: Duration = Duration::from_secs(2);
/// How often in a row that may be.
const TRIES: u32 = 5;
/// How long a daemon may take to hand over.
const HAND_OVER: Duration = Duration::from_secs(10);
/// What is said to who waits for the daemon.
pub(crate) const READY: &str = "ready";
/// The exit code where another one runs.
pub(crate) const TAKEN: i32 = 6;

/// Is the keeper, until the daemon has ended for good; gives the exit code.
///
/// # Errors
/// No daemon can be started any more.
pub fn keep(program: &Program, args: &KeepArgs) -> anyhow::Result<i32> {
    // Out of the terminal's reach; a keeper that a daemon made is there already.
    let _ = rustix::process::setsid();
    many_files();
    env::set_current_dir("/").context("/")?;
    let station = Station::here(&args.directory)?;
    // By its name, for updates; as it is while the file is there.
    let path = std::fs::read_link(SELF).context(SELF)?;
    let base = Base { station, path, program: program.clone() };
    if args.adopt {
        return base.adopt()?.run();
    }
    let Some(lock) = base.station.lock()? else { return Ok(TAKEN) };
    let listener = base.station.listen().context("the socket of the daemon that serves lazy images")?;
    leave(&base.station)?;
    let keeper = Keeper { base, listener, lock, held: BTreeMap::new(), first: None, told: false };
    keeper.run()
}

/// Leaves the caller's terminal; the pipe to it stays until the daemon is ready.
fn leave(station: &Station) -> anyhow::Result<()> {
    let path = station.log();
    let log = File::options().append(true).create(true).open(&path);
    let log = log.with_context(|| path.display().to_string())?;
    rustix::stdio::dup2_stderr(&log)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null").context("/dev/null")?)?;
    Ok(())
}

/// What does not change.
struct Base {
    station: Station,
    path: PathBuf,
    program: Program,
}

impl Base {
    /// Takes over from a keeper that died.
    fn adopt(self) -> anyhow::Result<Keeper> {
        let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        rustix::stdio::dup2_stdin(File::open("/dev/null").context("/dev/null")?)?;
        let (message, files) = link::receive::<ToKeeper>(&socket)?;
        let files: [OwnedFd; 3] = files.try_into().map_err(|_| anyhow::anyhow!("the daemon's files did not come"))?;
        anyhow::ensure!(matches!(message, ToKeeper::Adopt), "the daemon says something else first");
        let [process, listener, lock] = files;
        let daemon = Daemon { socket, process, child: None, started: Instant::now() };
        let (listener, lock) = (UnixListener::from(listener), File::from(lock));
        Ok(Keeper { base: self, listener, lock, held: BTreeMap::new(), first: Some(daemon), told: true })
    }
}

struct Keeper {
    base: Base,
    listener: UnixListener,
    lock: File,
    held: BTreeMap<u64, Held>,
    /// A daemon that another keeper started.
    first: Option<Daemon>,
    /// Whether who waits for the daemon knows that it is there.
    told: bool,
}

struct Daemon {
    socket: UnixStream,
    process: OwnedFd,
    child: Option<Child>,
    started: Instant,
}

/// How a daemon ended.
struct Ended {
    /// It said that this is the end.
    for_good: bool,
    /// It said that another one is to go on.
    restart: bool,
    /// It had begun to serve.
    ready: bool,
    /// In words.
    how: String,
}

impl Keeper {
    fn run(mut self) -> anyhow::Result<i32> {
        let current = Current::default();
        current.pass_signals_on(EndSignals::hold()?)?;
        let (mut program, mut tries) = (PathBuf::from(SELF), 0);
        let mut daemon = match self.first.take() {
            Some(daemon) => daemon,
            None => self.start(&program)?,
        };
        loop {
            let ended = self.until_end(&mut daemon, &current);
            if ended.for_good {
                self.base.station.leave();
                return Ok(0);
            }
            if ended.restart {
                // An update has put another program in its place.
                program = if self.base.path.exists() { self.base.path.clone() } else { SELF.into() };
                tries = 0;
            } else {
                tracing::error!("the daemon {}; {} mounts go to its successor", ended.how, self.held.len());
                tries = if daemon.started.elapsed() < SHORT { tries + 1 } else { 0 };
                if !ended.ready && program != Path::new(SELF) {
                    tracing::error!("{} does not serve; the program that did goes on", program.display());
                    program = SELF.into();
                }
            }
            if tries >= TRIES {
                self.base.station.leave();
                // With the last descriptor the mounts end, and who waits for them gets an error.
                anyhow::bail!("the daemon died {tries} times in a row; its {} mounts are given up", self.held.len());
            }
            thread::sleep(Duration::from_millis(200) * tries);
            daemon = loop {
                match self.start(&program) {
                    Ok(daemon) => break daemon,
                    Err(error) => tracing::error!("{error:#}"),
                }
                // It may be that one's fault, or there is no memory just now.
                program = SELF.into();
                tries += 1;
                anyhow::ensure!(tries < TRIES, "no daemon can be started; {} mounts are given up", self.held.len());
                thread::sleep(Duration::from_millis(200) * tries);
            };
        }
    }

    fn start(&self, program: &Path) -> anyhow::Result<Daemon> {
        let (ours, theirs) = UnixStream::pair().context("a pair of sockets")?;
        let mut command = self.base.program.call(program, "serve", self.base.station.lazy());
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let started = || {
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            link::send(&ours, &ToDaemon::Start, &[self.listener.as_fd(), self.lock.as_fd()])?;
            for (id, held) in &self.held {
                link::send(&ours, &ToDaemon::Mount { id: *id, record: held.record.clone() }, &held.borrowed())?;
            }
            link::send(&ours, &ToDaemon::Go, &[])?;
            anyhow::Ok(process)
        };
        match started() {
            Ok(process) => Ok(Daemon { socket: ours, process, child: Some(child), started: Instant::now() }),
            Err(error) => {
                // It died while it was told; the next one is told again.
                tracing::error!("the daemon could not be told what to serve: {error:#}");
                let _ = child.kill();
                let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
                Ok(Daemon { socket: ours, process, child: Some(child), started: Instant::now() })
            }
        }
    }

    /// Holds what the daemon has, until it has ended.
    fn until_end(&mut self, daemon: &mut Daemon, current: &Current) -> Ended {
        let mut ended = Ended { for_good: false, restart: false, ready: false, how: String::new() };
        let mut kill = false;
        loop {
            let (message, files) = match link::receive(&daemon.socket) {
                Ok(received) => received,
                Err(error) if is_late(&error) && !kill => {
                    tracing::warn!("the daemon takes long to hand over: somebody waits for an answer");
                    continue;
                }
                Err(error) => {
                    tracing::debug!("the daemon says nothing more: {error:#}");
                    break;
                }
            };
            match message {
                ToKeeper::Hold { id, record } if FILES.contains(&files.len()) => {
                    self.held.insert(id, Held { record, files });
                }
                ToKeeper::Hold { .. } | ToKeeper::Adopt => tracing::error!("the daemon says what makes no sense"),
                ToKeeper::Drop { id } => drop(self.held.remove(&id)),
                ToKeeper::Ready => {
                    ended.ready = true;
                    match daemon.process.try_clone() {
                        Ok(process) => current.set(Some(process)),
                        Err(error) => tracing::warn!("the daemon is not told of signals: {error}"),
                    }
                    self.tell();
                }
                ToKeeper::Restart { kill: may } => {
                    (ended.restart, kill) = (true, may);
                    let _ = daemon.socket.set_read_timeout(Some(HAND_OVER));
                }
                ToKeeper::End => ended.for_good = true,
            }
        }
        current.set(None);
        // It is dead, or late, or cannot be understood: what it did not answer its successor will.
        let _ = pidfd_send_signal(&daemon.process, Signal::KILL);
        // It must not serve any more when the next one begins.
        ended.how = wait(daemon);
        ended
    }

    /// Tells who waits for the daemon that it is there, and leaves it alone.
    fn tell(&mut self) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let null =
            || rustix::stdio::dup2_stdout(File::options().write(true).open("/dev/null")?).map_err(io::Error::from);
        // Whoever started it may have gone, which does not end us.
        let told = writeln!(io::stdout(), "{READY}");
        if let Err(error) = told.and(null()) {
            tracing::warn!("whoever started the daemon does not hear of it: {error}");
        }
    }
}

/// The daemon that serves at the moment, for signals: one that asks this process to end asks the daemon, which says then that it ends for good.
#[derive(Clone, Default)]
struct Current(Arc<Mutex<(bool, Option<OwnedFd>)>>);

impl Current {
    fn set(&self, process: Option<OwnedFd>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = process;
        // What came before there was one reaches it, too.
        Self::end(&state);
    }

    fn end((told, process): &(bool, Option<OwnedFd>)) {
        if let (true, Some(process)) = (told, process)
            && let Err(error) = pidfd_send_signal(process, Signal::TERM)
        {
            tracing::debug!("the daemon has ended already: {error}");
        }
    }

    fn pass_signals_on(&self, end: EndSignals) -> anyhow::Result<()> {
        let current = self.clone();
        let passing = move || {
            while end.wait().is_ok() {
                let mut state = current.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.0 = true;
                Self::end(&state);
            }
        };
        thread::Builder::new().name("signals".into()).spawn(passing).map(drop).context("a thread")
    }
}

/// Whether nothing came for as long as was waited.
fn is_late(error: &anyhow::Error) -> bool {
    let late = |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    error.chain().filter_map(|cause| cause.downcast_ref()).any(late)
}

/// As many files as this process may have: each mount takes some, here and in the daemon.
fn many_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::debug!("the limit of open files stays: {error}");
    }
}

/// Waits until a process has ended; gives how, as far as it can be known.
fn wait(daemon: &mut Daemon) -> String {
    if let Some(child) = &mut daemon.child {
        return child.wait().map_or_else(|error| error.to_string(), |status| format!("ended ({status})"));
    }
    loop {
        let mut polled = [PollFd::new(&daemon.process, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return format!("cannot be waited for: {error}"),
            Ok(_) => return "ended".into(),
        }
    }
}

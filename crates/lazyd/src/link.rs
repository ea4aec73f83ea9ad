//! How the daemon and its keeper talk: messages with descriptors, over a pair of sockets of which each has one as its standard input or by
//! inheritance. Neither believes the other less than itself.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::RangeInclusive,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::Context as _;
use nacre_sys::descriptors;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Program, Station};

/// What a daemon tells its keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum ToKeeper {
    /// Be my keeper: my process, the listener, the lock.
    Adopt,
    /// Hold this mount, in place of what you hold by the number.
    Hold {
        /// The mount.
        id: u64,
        /// For the successor.
        record: Value,
    },
    /// Forget a mount.
    Drop {
        /// The mount.
        id: u64,
    },
    /// All that was handed to me is served.
    Ready,
    /// I end, and another one is to go on.
    Restart {
        /// Whether I may be killed where that takes long: the kernel sends again what I have not answered.
        kill: bool,
    },
    /// I end, and that is that.
    End,
}

/// What a keeper tells the daemon that it starts.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum ToDaemon {
    /// The listener and the lock.
    Start,
    /// Go on with this mount.
    Mount {
        /// By which number it is known.
        id: u64,
        /// What the predecessor left.
        record: Value,
    },
    /// These were all.
    Go,
}

pub(crate) fn send(socket: &UnixStream, message: &impl Serialize, files: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    Ok(descriptors::send(socket, &serde_json::to_vec(message)?, files)?)
}

pub(crate) fn receive<T: serde::de::DeserializeOwned>(socket: &UnixStream) -> anyhow::Result<(T, Vec<OwnedFd>)> {
    let (bytes, files) = descriptors::receive(socket)?;
    Ok((serde_json::from_slice(&bytes)?, files))
}

/// How many files a mount has.
pub(crate) const FILES: RangeInclusive<usize> = 3..=4;

/// A mount, as it is held for a successor.
pub(crate) struct Held {
    pub(crate) record: Value,
    /// The grant, the FUSE connection, the metadata, and the process that it ends with where there is one.
    pub(crate) files: Vec<OwnedFd>,
}

impl Held {
    pub(crate) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(|file| file.as_fd()).collect()
    }
}

/// The daemon's side.
pub(crate) struct Link {
    program: Program,
    station: Station,
    listener: UnixListener,
    lock: File,
    state: Mutex<State>,
}

struct State {
    /// `None` while there is no keeper.
    socket: Option<UnixStream>,
    /// What a keeper has to hold: the next one gets it from here.
    held: BTreeMap<u64, Held>,
    /// A keeper that this process started.
    keeper: Option<Child>,
}

impl Link {
    pub(crate) fn new(
        program: Program,
        station: Station,
        socket: UnixStream,
        listener: UnixListener,
        lock: File,
    ) -> Self {
        let state = State { socket: Some(socket), held: BTreeMap::new(), keeper: None };
        Self { program, station, listener, lock, state: Mutex::new(state) }
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// When this returns, a crash does not end the mount any more. (What was sent is read also when the sender is dead.)
    pub(crate) fn hold(&self, id: u64, held: Held) -> anyhow::Result<()> {
        let mut state = self.state();
        let message = ToKeeper::Hold { id, record: held.record.clone() };
        // What is too large for the link is an error now, and not when there is another keeper.
        let bytes = serde_json::to_vec(&message)?.len();
        anyhow::ensure!(
            bytes <= descriptors::MAX_BYTES,
            "what is to be kept of a mount has {bytes} bytes, which is too much"
        );
        if let Some(socket) = &state.socket
            && let Err(error) = send(socket, &message, &held.borrowed())
        {
            tracing::warn!("the keeper does not answer: {error:#}");
        }
        state.held.insert(id, held);
        Ok(())
    }

    /// Whoever held the mount forgets it, and its keys.
    pub(crate) fn forget(&self, id: u64) {
        let mut state = self.state();
        if let Some(grant) = state.held.remove(&id).and_then(|held| held.files.into_iter().next())
            && let Err(error) = nacre_guest::lazy::wipe(&File::from(grant))
        {
            tracing::warn!("the keys of an image that was unmounted stay in memory: {error}");
        }
        if let Some(socket) = &state.socket
            && let Err(error) = send(socket, &ToKeeper::Drop { id }, &[])
        {
            tracing::warn!("the keeper does not answer: {error:#}");
        }
    }

    /// Tells it something else; whether it could be told.
    pub(crate) fn tell(&self, message: &ToKeeper) -> bool {
        let state = self.state();
        let Some(socket) = &state.socket else { return false };
        let told = send(socket, message, &[]);
        if let Err(error) = &told {
            tracing::warn!("the keeper does not answer: {error:#}");
        }
        told.is_ok()
    }

    /// Makes another keeper when there is none any more.
    pub(crate) fn watch(self: &Arc<Self>) -> std::io::Result<()> {
        let link = Arc::clone(self);
        thread::Builder::new().name("keeper".into()).spawn(move || link.watching()).map(drop)
    }

    fn watching(&self) {
        loop {
            let socket = match self.state().socket.as_ref().map(UnixStream::try_clone) {
                Some(Ok(socket)) => socket,
                Some(Err(error)) => {
                    tracing::error!("the keeper is not watched: {error}");
                    return;
                }
                None => return,
            };
            // It says nothing after the beginning, so what comes is its end.
            if receive::<ToDaemon>(&socket).is_ok() {
                continue;
            }
            let mut state = self.state();
            if let Some(mut keeper) = state.keeper.take() {
                let _ = keeper.wait();
            }
            tracing::warn!("the keeper of {} mounts died; another one is made", state.held.len());
            state.socket = None;
            match self.adopted(&state) {
                Ok((socket, keeper)) => (state.socket, state.keeper) = (Some(socket), Some(keeper)),
                Err(error) => {
                    tracing::error!("there is no keeper: what is mounted ends with this process: {error:#}");
                    return;
                }
            }
        }
    }

    fn adopted(&self, state: &State) -> anyhow::Result<(UnixStream, Child)> {
        let (ours, theirs) = UnixStream::pair()?;
        let process = pidfd_open(getpid(), PidfdFlags::empty()).context("a descriptor of this process")?;
        let mut command = self.program.call(Path::new(crate::SELF), "keep", self.station.lazy());
        let keeper =
            command.arg("--adopt").stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn().context("start it")?;
        send(&ours, &ToKeeper::Adopt, &[process.as_fd(), self.listener.as_fd(), self.lock.as_fd()])?;
        for (id, held) in &state.held {
            let message = ToKeeper::Hold { id: *id, record: held.record.clone() };
            send(&ours, &message, &held.borrowed())?;
        }
        send(&ours, &ToKeeper::Ready, &[])?;
        Ok((ours, keeper))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! The daemon that serves lazy images: one for all mounts of a store in one mount namespace, with one cache and one pool of connections.
//!
//! ```text
//! image mount ──▶ admits, unwraps the key ──▶ request and grant ──▶ daemon: fetches the metadata, mounts, serves
//!                                                                     │ descriptors of each mount
//!                                                                     ▼
//!                                                                   keeper: starts the daemon, and its successor when it dies
//! LAZY/daemon/NAMESPACE.lock      locked for as long as the keeper or the daemon lives
//! LAZY/daemon/NAMESPACE.socket    the requests' socket, for its owner; NAMESPACE is the inode of the mount namespace
//! LAZY/log                        what the two have to say
//! ```
//!
//! A program that has this in it starts itself again as the keeper and the daemon: [`Program`] says with which arguments.
//!
//! - `client`: commands ask it, and start it where none runs. `protocol`: what they say.
//! - `keeper`: a small process that parses nothing that comes from elsewhere, and holds, for each mount, the FUSE connection, the locked
//!   metadata file, and the [grant](nacre_guest::lazy::Grant), all in memory. `link`: how the two talk.
//! - `serve`: the daemon's loop. `mounts`: what it does.
//!
//! Invariants: what is seen in the tree is at the keeper. A daemon that died serves nothing any more when its successor begins. When the keeper
//! dies, the daemon makes another one; when both die, mounts give errors, and the next command that mounts takes them away.

mod by_daemon;
mod client;
mod completion;
mod keeper;
mod link;
mod mounts;
mod protocol;
mod serve;

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use clap::Args;

pub use by_daemon::{ByDaemon, ask_to_mount};
pub use client::{Connected, all};
pub use keeper::keep;
pub use protocol::{MountRequest, Mounted, Request, Shown, ShownFailure};
pub use serve::serve;

/// This program, whatever has its name by now.
const SELF: &str = "/proc/self/exe";

/// How a program is called to be the keeper or the daemon.
#[derive(Clone, Debug)]
pub struct Program {
    /// What `ps` shows.
    pub name: &'static str,
    /// The arguments before `keep` and `serve`.
    pub command: &'static [&'static str],
    /// What it is to log, for its `--log`.
    pub log: Option<String>,
    /// The exit code of an error: a command that asked the daemon ends as if it had done itself what failed.
    pub exit: fn(&anyhow::Error) -> u8,
}

impl Program {
    /// A call of it, or of another version of it.
    fn call(&self, path: &Path, what: &str, lazy: &Path) -> Command {
        let mut command = Command::new(path);
        command.arg0(self.name);
        if let Some(log) = &self.log {
            command.args(["--log", log]);
        }
        command.args(self.command).arg(what).arg("--directory").arg(lazy);
        command
    }
}

/// Arguments of `keep`.
#[derive(Clone, Debug, Args)]
pub struct KeepArgs {
    /// The store's directory of lazy images
    #[arg(long)]
    pub directory: PathBuf,
    /// Take over from a keeper that died
    #[arg(long)]
    pub adopt: bool,
}

/// Arguments of `serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// The store's directory of lazy images
    #[arg(long)]
    pub directory: PathBuf,
    /// End when nothing was mounted for so many seconds
    #[arg(long, default_value_t = 30)]
    pub idle: u64,
}

/// What the daemon, or whoever asks it, finds wrong.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Somebody else has it.
    #[error("{0}")]
    InUse(String),
    /// Something that was named is not there.
    #[error("{0}")]
    Missing(String),
    /// It cannot be meant.
    #[error("{0}")]
    Usage(String),
    /// The daemon could not do what it was asked for.
    #[error("{message}")]
    Refused {
        /// Why.
        message: String,
        /// The exit code of a command that would have done it itself.
        exit: u8,
    },
}

/// Where a daemon is found: a store's directory of lazy images, and a mount namespace.
#[derive(Debug, Clone)]
pub struct Station {
    lazy: PathBuf,
    namespace: String,
}

impl Station {
    /// That of this process's mount namespace.
    ///
    /// # Errors
    /// /proc is not there.
    pub fn here(lazy: &Path) -> anyhow::Result<Self> {
        let namespace = fs::metadata("/proc/self/ns/mnt").context("/proc/self/ns/mnt")?.ino();
        Ok(Self { lazy: lazy.to_owned(), namespace: namespace.to_string() })
    }

    /// Those of all namespaces in which one runs, or ran.
    pub(crate) fn all(lazy: &Path) -> anyhow::Result<Vec<Self>> {
        let directory = lazy.join("daemon");
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| directory.display().to_string())?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.with_context(|| directory.display().to_string())?.file_name();
            let namespace = name.to_str().and_then(|name| name.strip_suffix(".socket"));
            all.extend(namespace.map(|namespace| Self { lazy: lazy.to_owned(), namespace: namespace.to_owned() }));
        }
        Ok(all)
    }

    /// The directory of lazy images.
    pub(crate) fn lazy(&self) -> &Path {
        &self.lazy
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.lazy.join("log")
    }

    fn directory(&self) -> PathBuf {
        self.lazy.join("daemon")
    }

    fn socket(&self) -> String {
        format!("{}.socket", self.namespace)
    }

    /// The lock, where nobody has it.
    fn lock(&self) -> anyhow::Result<Option<File>> {
        let directory = self.directory();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .with_context(|| directory.display().to_string())?;
        let path = directory.join(format!("{}.lock", self.namespace));
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Begins to listen. The caller has the lock.
    fn listen(&self) -> io::Result<UnixListener> {
        self.near(|path| {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        })
    }

    fn connect(&self) -> io::Result<UnixStream> {
        self.near(|path| UnixStream::connect(path))
    }

    /// Ends to listen.
    fn leave(&self) {
        let _ = fs::remove_file(self.directory().join(self.socket()));
    }

    /// The socket by a name that is short enough for one, wherever the store is.
    fn near<T>(&self, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let directory = File::open(self.directory())?;
        action(&Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(self.socket()))
    }
}

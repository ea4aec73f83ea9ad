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
//! - [`client`]: commands ask it, and start it where none runs. [`protocol`]: what they say.
//! - [`keeper`]: a small process that parses nothing that comes from elsewhere, and holds, for each mount, the FUSE connection, the locked
//!   metadata file, and the [grant](nacre_guest::lazy::Grant), all in memory. [`link`]: how the two talk.
//! - [`serve`]: the daemon's loop. [`mounts`]: what it does.
//!
//! Invariants: what is seen in the tree is at the keeper. A daemon that died serves nothing any more when its successor begins. When the keeper
//! dies, the daemon makes another one; when both die, mounts give errors, and the next command that mounts takes them away.

pub(crate) mod client;
mod completion;
pub(crate) mod keeper;
mod link;
mod mounts;
mod protocol;
pub(crate) mod serve;

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

pub(crate) use protocol::{MountRequest, Mounted, Request, Shown};

/// This program, whatever has its name by now.
const SELF: &str = "/proc/self/exe";

/// A program that `ps` shows by its name.
fn program(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.arg0("nacre");
    command
}

/// Where a daemon is found: a store's directory of lazy images, and a mount namespace.
#[derive(Debug, Clone)]
pub(crate) struct Station {
    lazy: PathBuf,
    namespace: String,
}

impl Station {
    /// That of this process's mount namespace.
    pub(crate) fn here(lazy: &Path) -> anyhow::Result<Self> {
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

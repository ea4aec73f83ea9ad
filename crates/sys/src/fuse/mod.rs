//! Filesystems that a process serves to the kernel: read-only, and handed from one process to its successor without anybody noticing.
//!
//! - [`ReadOnly`]: what a filesystem is. [`Session`]: its mount and the threads that serve it. [`Notifier`]: what it tells the kernel unasked.
//! - [`Handover`]: a session on its way to another process.
//!
//! # One device
//! All threads of a session read from one open file of `/dev/fuse`. The kernel offers one a thread (`FUSE_DEV_IOC_CLONE`), but fails
//! with `ECONNABORTED` what was read from such a file when it is closed, and a process that is killed closes all of its own: whoever
//! keeps the connection for a successor would have to hold every one of them. With one, a single descriptor keeps everything.
//!
//! # Who keeps a mount alive
//! The kernel ends a connection when the last descriptor of its device is closed, wherever it is: as long as any process holds a
//! duplicate ([`Session::keep`]), the mount lives, and who reads from it waits. A keeper (a supervisor, or systemd's descriptor store) holds one
//! with the [`Parameters`]; when the daemon dies, its successor makes a [`Handover`] of the two, and [`Session::resume`] has the kernel
//! send again what the dead one had read and not answered. That takes Linux 6.9: before, such requests stay unanswered until their
//! readers are killed.
//!
//! While nobody serves, everything that asks waits, and some of it not even SIGKILL ends: a file's close, for one. So whoever holds the
//! descriptor must not use the mount itself, or it may wait for a successor that it has yet to start; and a process that starts
//! one must not have files of the mount open, which the new process closes on exec. `umount --force` ends it all
//! ([`Session::abort`]).
//!
//! # Invariants
//! - Every request that was read is answered once, whatever the filesystem does, or is the successor's after a crash.
//! - A thread that was told to stop answers what it has read first.
//! - Requests come from the kernel and are parsed as if they did not: nothing in them leads to a panic.

mod device;
mod filesystem;
mod handover;
mod mount;
mod notify;
mod reply;
mod request;
mod serve;
mod session;
mod wire;

use std::io;
use std::path::PathBuf;

pub use filesystem::{Attributes, Entries, Inode, Kind, Open, ReadOnly, Statistics, Timeouts, XattrNames};
pub use handover::{Handover, Parameters, ParametersError};
pub use mount::Options;
pub use notify::{Notifier, NotifyError};
pub use reply::{Answered, ReadReply};
pub use rustix::io::Errno;
pub use session::{Ended, Session};

/// Why a filesystem is not served.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The device cannot be had.
    #[error("cannot open /dev/fuse: {hint}")]
    Open {
        /// What is likely missing.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("cannot mount a FUSE filesystem on {}: {hint}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// What is likely missing.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel speaks another protocol.
    #[error("this kernel speaks FUSE {major}.{minor}, and 7.28 is needed (Linux 4.20 or newer)")]
    Version {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The connection did not come about.
    #[error("the kernel does not begin the FUSE connection of {}: {what}", target.display())]
    Handshake {
        /// Where.
        target: PathBuf,
        /// What happened.
        what: String,
    },
    /// The machine has no more of something.
    #[error("cannot {action} to serve {}: a limit of the machine was reached", target.display())]
    Resources {
        /// What was tried.
        action: &'static str,
        /// Of which mount.
        target: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What was handed over cannot be served on.
    #[error("cannot serve the FUSE filesystem on {} on: {what}", target.display())]
    Resume {
        /// Of which mount.
        target: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// It stays mounted.
    #[error("cannot unmount {}: {hint}", target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// What is in the way.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

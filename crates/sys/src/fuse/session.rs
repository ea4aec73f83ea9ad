//! A mounted filesystem and the threads that serve it.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::{fmt, io};

use rustix::event::EventfdFlags;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::FuseError;
use super::device::Device;
use super::filesystem::ReadOnly;
use super::handover::{Handover, Parameters};
use super::mount::{self, Options};
use super::notify::{self, Notifier, NotifyError};
use super::serve::{Busy, Shared, Worker};

/// A filesystem that this process serves. Dropping it unmounts: nobody gets at it any more, and who still has a file of it open gets
/// errors.
pub struct Session {
    // Dropped in this order: no new users, then nobody who serves, then no connection.
    mount: Mount,
    crew: Crew,
    /// A descriptor of its own, so that nothing that fails stands between a session and its handover.
    device: OwnedFd,
    parameters: Parameters,
}

/// Why a session is served no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ended {
    /// This process stopped.
    Stopped,
    /// It was unmounted, and nobody uses it any more.
    Unmounted,
    /// The connection was aborted, by `/sys/fs/fuse/connections` for one.
    Aborted,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FUSE session on {}", self.target().display())
    }
}

impl Session {
    /// Mounts a filesystem on a directory, read-only, and serves it. The kernel keeps asking until it is unmounted.
    ///
    /// # Errors
    /// [`FuseError`]; nothing is mounted then.
    pub fn mount(target: &Path, options: &Options, filesystem: Arc<dyn ReadOnly>) -> Result<Self, FuseError> {
        let resources = |source: io::Error| FuseError::Resources {
            action: "find the directory",
            target: target.to_owned(),
            source,
        };
        // The working directory may change before it is unmounted.
        let target = std::path::absolute(target).map_err(resources)?;
        let (device, parameters) = mount::mount(&target, options)?;
        Self::begin(device, parameters, options.threads, filesystem).inspect_err(|_| {
            if let Err(error) = crate::fs::unmount(&target) {
                tracing::warn!(%error, "a FUSE filesystem that nobody serves stays mounted");
            }
        })
    }

    /// Serves what another session handed over or left behind, with so many threads. What that one had read and not answered, because
    /// it crashed, the kernel sends again: **it must not serve any more**. The handover's descriptor is only duplicated.
    ///
    /// # Errors
    /// [`FuseError`]; the handover can be tried again.
    pub fn resume(
        handover: &Handover,
        threads: NonZeroUsize,
        filesystem: Arc<dyn ReadOnly>,
    ) -> Result<Self, FuseError> {
        let target = handover.parameters.target();
        let device = handover.device.try_clone().map_err(|source| FuseError::Resources {
            action: "duplicate a descriptor",
            target: target.clone(),
            source,
        })?;
        let device = Device::from_fd(device);
        match notify::resend(&device) {
            Ok(()) => {}
            Err(error @ NotifyError::NoResend) => {
                tracing::warn!(%error, target = %target.display(), "reads that a crashed process left stay unanswered");
            }
            Err(error) => return Err(FuseError::Resume { target, what: error.to_string() }),
        }
        Self::begin(device, handover.parameters.clone(), threads, filesystem)
    }

    /// Where it is mounted.
    pub fn target(&self) -> PathBuf {
        self.parameters.target()
    }

    /// What was agreed with the kernel: with [`Session::keep`], what a successor needs.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// A descriptor that keeps the mount alive, for a process that outlives this one.
    ///
    /// # Errors
    /// This process has too many descriptors.
    pub fn keep(&self) -> io::Result<OwnedFd> {
        self.device.try_clone()
    }

    /// Tells the kernel about files.
    pub fn notifier(&self) -> Notifier {
        Notifier::new(Arc::downgrade(&self.crew.shared.device))
    }

    /// Whether no thread serves any more: it was unmounted and nobody uses it, or it was aborted.
    pub fn is_ended(&self) -> bool {
        self.crew.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits until it is unmounted, by whomever, and nobody uses it any more.
    pub fn wait(&mut self) -> Ended {
        let ended = self.crew.join();
        self.mount.armed &= ended != Ended::Unmounted;
        ended
    }

    /// Unmounts it and stops.
    ///
    /// # Errors
    /// [`FuseError::Unmount`]: it is in use, for one. It is served on then.
    pub fn unmount(&mut self) -> Result<(), FuseError> {
        self.mount.unmount(UnmountFlags::NOFOLLOW)?;
        self.crew.join();
        Ok(())
    }

    /// Takes it out of the tree, in use or not. Who has files of it open keeps them for as long as this session lives; [`Session::wait`]
    /// waits for the last of them.
    ///
    /// # Errors
    /// [`FuseError::Unmount`].
    pub fn detach(&mut self) -> Result<(), FuseError> {
        self.mount.unmount(UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
    }

    /// Takes it out of the tree and ends it at once, answered or not: everybody who waits gets an error.
    ///
    /// # Errors
    /// [`FuseError::Unmount`].
    pub fn abort(&mut self) -> Result<(), FuseError> {
        self.mount.unmount(UnmountFlags::NOFOLLOW | UnmountFlags::DETACH | UnmountFlags::FORCE)
    }

    /// Stops serving without unmounting: requests that were read are answered, all others wait for who resumes it. Takes as long as the
    /// slowest answer.
    pub fn hand_over(self) -> Handover {
        let Self { mut mount, crew, device, parameters } = self;
        mount.armed = false;
        drop(crew);
        Handover { device, parameters }
    }

    fn begin(
        device: Device,
        parameters: Parameters,
        threads: NonZeroUsize,
        filesystem: Arc<dyn ReadOnly>,
    ) -> Result<Self, FuseError> {
        let target = parameters.target();
        let resources = |action| {
            let target = target.clone();
            move |source| FuseError::Resources { action, target, source }
        };
        let own = device.as_fd().try_clone_to_owned().map_err(resources("duplicate a descriptor"))?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from);
        let shared = Arc::new(Shared {
            device: Arc::new(device),
            filesystem,
            flags: parameters.flags,
            max_read: usize::from(parameters.max_pages) * 4096,
            stop: AtomicBool::new(false),
            wake: wake.map_err(resources("make a descriptor"))?,
            busy: std::iter::repeat_with(Busy::default).take(threads.get()).collect(),
        });
        shared.filesystem.started(&Notifier::new(Arc::downgrade(&shared.device)));
        let mut crew = Crew { shared, threads: Vec::with_capacity(threads.get()), ended: None };
        for number in 0..threads.get() {
            let worker = Worker::new(Arc::clone(&crew.shared), number).map_err(io::Error::from);
            let worker = worker.map_err(resources("make a descriptor"))?;
            let thread = thread::Builder::new().name(format!("fuse-{number}")).spawn(move || worker.run());
            crew.threads.push(thread.map_err(resources("start a thread"))?);
        }
        Ok(Self { mount: Mount { target, device: parameters.device, armed: true }, crew, device: own, parameters })
    }
}

/// The threads of a session.
struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Ended>>,
    /// What those said that were joined.
    ended: Option<Ended>,
}

impl Crew {
    fn join(&mut self) -> Ended {
        for thread in self.threads.drain(..) {
            // A thread panics only by a defect of this module.
            let ended = thread.join().unwrap_or(Ended::Aborted);
            self.ended = self.ended.max(Some(ended));
        }
        self.ended.unwrap_or(Ended::Stopped)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the threads of a FUSE filesystem cannot be woken");
        }
        self.join();
    }
}

/// A mount, unmounted when it is dropped.
struct Mount {
    target: PathBuf,
    /// The filesystem's number, to tell it from another that was mounted in its place or over it.
    device: (u32, u32),
    armed: bool,
}

impl Mount {
    fn unmount(&mut self, flags: UnmountFlags) -> Result<(), FuseError> {
        if !self.armed {
            return Ok(());
        }
        let failed =
            |hint, source: Errno| FuseError::Unmount { target: self.target.clone(), hint, source: source.into() };
        let found = rustix::fs::statx(CWD, &self.target, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())
            .map_err(|source| failed("it cannot be reached", source))?;
        if (found.stx_dev_major, found.stx_dev_minor) != self.device {
            return Err(failed("something else is mounted there; it may be unmounted already", Errno::INVAL));
        }
        rustix::mount::unmount(&self.target, flags).map_err(|source| {
            let hint = match source {
                Errno::BUSY => "it is in use: something is mounted on it, or a process has a file of it open",
                Errno::PERM => "CAP_SYS_ADMIN is needed",
                _ => "the kernel refused it",
            };
            failed(hint, source)
        })?;
        self.armed = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount(UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            tracing::debug!(error = &error as &dyn std::error::Error, "a FUSE filesystem was not unmounted");
        }
    }
}

//! FUSE and loop: a filesystem of one file ([`super::fuse_files`]), and a loop device of that file. It needs no module that a kernel does
//! not have, and is the slowest of the three: each request passes the block layer, the loop device's thread and FUSE's queue.
//!
//! In the run directory there are
//!
//! ```text
//! lock      held (flock) as long as a server lives
//! mount/    where the filesystem is mounted; closed to everybody else (0700), and FUSE itself admits only the user that mounted
//! ```
//!
//! A server that is killed leaves the mount, which answers ENOTCONN, and the loop device, on which every request fails. The next start
//! with that directory, or [`cleanup`], removes both. What was mounted on the device has to be unmounted before.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use fuser::{Config, Session, SessionACL};
use nacre_sys::{
    blockdev,
    loopdev::{self, LoopDevice},
};
use rustix::mount::{MountFlags, UnmountFlags};

use super::{
    DeviceOptions, StartError, cpus,
    fuse_files::{DiskFile, NAME, Openings},
    mark_thread,
};
use crate::{FrontEnd, Served, sectors::Sectors};

/// Threads for a store whose reads wait: each has one request in flight.
const SLOW_THREADS: usize = 16;
/// How the mount shows in lists of mounts.
const SOURCE: &str = "nacre-disk";

/// A store as a loop device on a FUSE file.
///
/// Dropped, it does what [`FrontEnd::stop`] does, as far as that can be done.
pub struct FuseLoop {
    served: Mounted,
    device: LoopDevice,
    openings: Arc<Openings>,
    sectors: Arc<Sectors>,
    stopped: bool,
}

impl FuseLoop {
    /// Mounts the file and makes the device.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left.
    pub fn start(store: Served, options: &DeviceOptions) -> Result<Self, StartError> {
        options.check(store.size())?;
        loopdev::available().map_err(StartError::Unavailable)?;
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(no_fuse)?;
        let run = RunDirectory::take(&options.run)?;
        run.clean().map_err(StartError::failed("clean up after an earlier server"))?;

        let openings = Arc::new(Openings::default());
        let threads = if store.is_slow() { SLOW_THREADS } else { cpus().clamp(2, 8) };
        let sectors = Arc::new(Sectors::new(store));
        let name = run.mount().display().to_string();
        let files = DiskFile::new(sectors.clone(), openings.clone(), options.read_only, name);
        let served = Mounted::mount(run, fuse, files, threads, openings.clone())?;
        let device = served.attach(options)?;
        if !device.is_direct() {
            tracing::warn!(device = %device.path().display(), "no direct I/O: what is read is in memory twice");
        }
        Ok(Self { served, device, openings, sectors, stopped: false })
    }

    /// Every step may be the one that fails: what was done before is not done again.
    fn shut_down(&mut self) -> io::Result<()> {
        if !self.stopped {
            let file = self.served.run.file();
            // It may be gone already, and its number somebody else's.
            if loopdev::of_file(&file).iter().any(|device| device.path() == self.device.path()) {
                self.device.detach()?;
            }
            self.served.unmount()?;
            self.stopped = true;
        }
        self.sectors.flush().map_err(io::Error::other)
    }
}

fn no_fuse(error: io::Error) -> StartError {
    let hint =
        if error.kind() == io::ErrorKind::NotFound { "the kernel has no FUSE (modprobe fuse)" } else { "no access" };
    StartError::Unavailable(io::Error::new(error.kind(), format!("/dev/fuse: {hint}: {error}")))
}

impl FrontEnd for FuseLoop {
    fn device(&self) -> String {
        self.device.path().display().to_string()
    }

    fn users(&self) -> Vec<String> {
        blockdev::users(self.device.path())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.shut_down()
    }

    fn has_ended(&self) -> bool {
        self.openings.are_over()
    }

    fn resized(&self) -> io::Result<()> {
        // The kernel learns the file's size when it asks for it.
        fs::metadata(self.served.run.file())?;
        self.device.follow_size()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.openings.wait_for_last_close();
        Ok(())
    }
}

impl Drop for FuseLoop {
    fn drop(&mut self) {
        if !self.stopped
            && let Err(error) = self.shut_down()
        {
            // Whoever uses it goes on being served as long as the process lives.
            tracing::warn!(%error, "a loop device was not taken away");
        }
    }
}

/// The filesystem, mounted and served.
struct Mounted {
    run: RunDirectory,
    serving: Option<JoinHandle<()>>,
}

impl Mounted {
    fn mount(
        run: RunDirectory,
        fuse: File,
        files: DiskFile,
        threads: usize,
        openings: Arc<Openings>,
    ) -> Result<Self, StartError> {
        let user = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let data = format!("fd={},rootmode=40000,user_id={},group_id={}", fuse.as_raw_fd(), user.0, user.1);
        let data = std::ffi::CString::new(data).map_err(|error| StartError::failed("mount")(error.into()))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
        rustix::mount::mount(SOURCE, run.mount(), "fuse", flags, Some(data.as_c_str()))
            .map_err(|error| StartError::failed(format!("mount {}", run.mount().display()))(error.into()))?;
        let mut mounted = Self { run, serving: None };

        let mut config = Config::default();
        config.n_threads = Some(threads);
        config.clone_fd = true;
        let (tell, told) = mpsc::channel();
        let lock = mounted.run.lock.clone();
        let serve = move || {
            let _lock = lock;
            mark_thread();
            // Who may use it is the kernel's to say; the loop device's requests come from a thread of the kernel.
            let session = Session::from_fd(files, OwnedFd::from(fuse), SessionACL::All, config);
            let result = match session {
                Ok(session) => {
                    let _ = tell.send(Ok(()));
                    session.run()
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                    Ok(())
                }
            };
            openings.end();
            if let Err(error) = result {
                tracing::error!(%error, "a FUSE mount is served no more");
            }
        };
        let spawned = thread::Builder::new().name("fuse".into()).spawn(serve);
        mounted.serving = Some(spawned.map_err(StartError::failed("start a thread"))?);
        let ready = told.recv().unwrap_or_else(|_| Err(io::Error::other("the serving thread ended")));
        ready.map_err(StartError::failed("begin to serve FUSE"))?;
        Ok(mounted)
    }

    /// Makes a loop device of the file.
    fn attach(&self, options: &DeviceOptions) -> Result<LoopDevice, StartError> {
        let path = self.run.file();
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(&path);
        let file = file.map_err(StartError::failed(format!("open {}", path.display())))?;
        let label = path.display().to_string();
        let options = loopdev::Options { block_size: options.block_size, read_only: options.read_only, label: &label };
        loopdev::attach(&file, options).map_err(StartError::failed("make a loop device"))
    }

    fn unmount(&mut self) -> io::Result<()> {
        if self.run.is_mounted() {
            self.run.unmount(UnmountFlags::empty())?;
        }
        if let Some(serving) = self.serving.take() {
            serving.join().map_err(|_| io::Error::other("a thread that served FUSE died"))?;
        }
        fs::remove_dir(self.run.mount())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.serving.is_none() || !self.run.is_mounted() || !loopdev::of_file(&self.run.file()).is_empty() {
            return;
        }
        if self.run.unmount(UnmountFlags::empty()).is_ok() {
            let _ = fs::remove_dir(self.run.mount());
        }
    }
}

/// A run directory that is ours.
struct RunDirectory {
    path: PathBuf,
    /// Locked as long as it is open, here or by the thread that serves.
    lock: Arc<File>,
}

impl RunDirectory {
    fn take(path: &Path) -> Result<Self, StartError> {
        let making = format!("make the directory {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StartError::failed(making))?;
        // As the kernel writes it where it names the file of a loop device.
        let path = path.canonicalize().map_err(StartError::failed(format!("find {}", path.display())))?;
        let lock = path.join("lock");
        let taking = format!("take the lock {}", lock.display());
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&lock);
        let file = file.map_err(StartError::failed(taking.clone()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let text = format!("another server runs in {}", path.display());
                return Err(StartError::failed(taking)(io::Error::new(io::ErrorKind::ResourceBusy, text)));
            }
            Err(TryLockError::Error(error)) => return Err(StartError::failed(taking)(error)),
        }
        Ok(Self { path, lock: Arc::new(file) })
    }

    fn mount(&self) -> PathBuf {
        self.path.join("mount")
    }

    fn file(&self) -> PathBuf {
        self.mount().join(NAME)
    }

    /// It is looked up in the list: a filesystem whose server is dead answers no question.
    fn is_mounted(&self) -> bool {
        let target = self.mount();
        blockdev::mounts().iter().any(|mount| mount.target == target && mount.source == SOURCE)
    }

    fn unmount(&self, flags: UnmountFlags) -> io::Result<()> {
        let at = self.mount();
        rustix::mount::unmount(&at, flags | UnmountFlags::NOFOLLOW).map_err(|error| {
            io::Error::new(io::Error::from(error).kind(), format!("cannot unmount {}: {error}", at.display()))
        })
    }

    /// Removes what an earlier server left, and makes the directory to mount on.
    fn clean(&self) -> io::Result<()> {
        for device in loopdev::of_file(&self.file()) {
            match device.detach() {
                // Nothing that it held can be written any more.
                Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                    tracing::warn!(%error, "a device of a server that was killed lost what was not written out");
                }
                result => result?,
            }
        }
        while self.is_mounted() {
            // Detached, since a process may stand in it; its server is dead, and the next one mounts another.
            self.unmount(UnmountFlags::DETACH)?;
        }
        match DirBuilder::new().mode(0o700).create(self.mount()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }
}

/// Removes what a server that was killed left in this run directory: its loop device and its mount. Where there is nothing, nothing is
/// done.
///
/// # Errors
/// The server lives; or something is mounted on the device, which has to be unmounted first.
pub fn cleanup(run: &Path) -> Result<(), StartError> {
    if !run.exists() {
        return Ok(());
    }
    let run = RunDirectory::take(run)?;
    run.clean().map_err(StartError::failed(format!("clean up {}", run.path.display())))?;
    fs::remove_dir(run.mount()).map_err(StartError::failed(format!("remove {}", run.mount().display())))
}

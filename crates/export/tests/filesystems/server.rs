//! The process that is killed: a secure disk in a file, shown by FUSE and a loop device.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_anchor::FileAnchor;
use nacre_core::{Anchor, BlockStore, NoProgress};
use nacre_disk::{CheckOptions, Disk, FormatOptions, OpenOptions, RootKey};
use nacre_export::{
    FrontEnd as _,
    kernel::{DeviceOptions, FuseLoop, cleanup_fuse},
};
use nacre_sys::block::{FileOptions, FileStore};

use crate::common::try_sh;

/// How long the kernel may take until it lets go of what a killed server showed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where everything of one disk is. It outlives the servers.
pub(crate) struct Place {
    directory: PathBuf,
    anchored: bool,
}

impl Place {
    pub(crate) fn new(directory: &Path, anchored: bool) -> Self {
        Self { directory: directory.to_owned(), anchored }
    }

    /// Where the filesystem is mounted.
    pub(crate) fn at(&self) -> PathBuf {
        self.directory.join("at")
    }

    fn run(&self) -> PathBuf {
        self.directory.join("run")
    }

    fn store(&self) -> PathBuf {
        self.directory.join("store")
    }

    fn anchor(&self) -> Option<Arc<dyn Anchor>> {
        let path = self.directory.join("anchor");
        self.anchored.then(|| Arc::new(FileAnchor::new(&path).unwrap()) as Arc<dyn Anchor>)
    }

    /// Makes the disk.
    pub(crate) fn format(&self, size: u64) {
        let options = FormatOptions { size: Some(size), ..FormatOptions::default() };
        let bytes = nacre_disk::store_size_for(&options).unwrap();
        let store = FileStore::create(self.store(), bytes, false, FileOptions::default(), &NoProgress).unwrap();
        nacre_disk::format(&store, &key(), self.anchor().as_deref(), &options).unwrap();
    }

    /// Lets the disk's own checker judge what a killed server left.
    pub(crate) fn check(&self) {
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let store: Arc<dyn BlockStore> = Arc::new(FileStore::open(self.store(), options).unwrap());
        let report = nacre_disk::check(store, &key(), self.anchor(), &CheckOptions::default(), &NoProgress).unwrap();
        assert!(report.is_clean(), "{:?} {:?} {:?}", report.damaged, report.inconsistent, report.warnings);
    }

    /// Removes what a killed server left in the kernel.
    pub(crate) fn clean_up(&self) {
        let (at, end) = (self.at().display().to_string(), Instant::now() + PATIENCE);
        if try_sh(&format!("umount {at}")).is_err() {
            let _ = try_sh(&format!("umount -l {at}"));
        }
        // The last of a filesystem may end some time after it was unmounted.
        while let Err(error) = cleanup_fuse(&self.run()) {
            assert!(Instant::now() < end, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn key() -> RootKey {
    RootKey::from_bytes(&[0x5a; 32]).unwrap()
}

/// What the process is: it prints its device and waits.
pub(crate) fn serve(directory: &Path, anchored: bool) -> ExitCode {
    let place = Place::new(directory, anchored);
    let _ = nacre_sys::memory::become_io_flusher();
    let store = Arc::new(FileStore::open(place.store(), FileOptions::default()).unwrap());
    let disk = Disk::open(store, &key(), place.anchor(), &OpenOptions::default()).unwrap();
    let mut front_end = FuseLoop::start(Arc::new(disk), &DeviceOptions::new(place.run())).unwrap();
    println!("device {}", front_end.device());
    front_end.wait().unwrap();
    ExitCode::SUCCESS
}

/// A running server. Dropped, it is killed, and what it left is removed.
pub(crate) struct Server<'a> {
    child: Child,
    place: &'a Place,
    pub(crate) device: String,
}

impl<'a> Server<'a> {
    pub(crate) fn start(place: &'a Place) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("serve")
            .arg(&place.directory)
            .arg(if place.anchored { "anchored" } else { "plain" })
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some(device) = line.trim().strip_prefix("device ") else {
            let _ = child.kill();
            panic!("the disk was not opened: {:?}", child.wait());
        };
        Self { device: device.to_owned(), child, place }
    }

    /// SIGKILL, now.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            self.place.clean_up();
        } else if let Err(error) = std::panic::catch_unwind(|| self.place.clean_up()) {
            // The first failure is the one to tell.
            drop(error);
        }
    }
}

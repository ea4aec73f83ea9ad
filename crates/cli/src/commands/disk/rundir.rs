//! The directory of what runs: how `close`, `info` and `grow` find a disk.
//!
//! ```text
//! RUN/disks/ID/            0700   ID: 32 hex digits of SHA-256 over the store's absolute name
//!   lock                          locked for as long as the disk runs; a killed process leaves it unlocked
//!   record.json                   store, devices, process
//!   control                       the socket (`control`)
//!   log                           what a disk in the background has to say
//!   device/                       of the front end
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nacre_core::Digest;
use serde::{Deserialize, Serialize};

use super::store::StoreName;
use crate::{
    args::disk::RunDirArgs,
    exit::{InUse, Usage},
};

/// The most bytes of a record.
const RECORD_LIMIT: u64 = 64 << 10;

/// How long a lock may be somebody's who only looks.
const LOCK_TIME: Duration = Duration::from_millis(200);

/// The directory.
#[derive(Debug, Clone)]
pub(super) struct RunDir(PathBuf);

/// A disk that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// The store's name.
    pub(super) store: String,
    /// What people open.
    pub(super) devices: Vec<String>,
    /// The process.
    pub(super) pid: u32,
}

impl RunDir {
    pub(super) fn of(args: &RunDirArgs) -> anyhow::Result<Self> {
        let xdg = || std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("nacre"));
        let dir = match &args.run_dir {
            Some(dir) => std::path::absolute(dir)?,
            None if rustix::process::geteuid().is_root() => "/run/nacre".into(),
            None => xdg().ok_or_else(|| {
                Usage("neither --run-dir, NACRE_RUN nor XDG_RUNTIME_DIR says where running disks are found".into())
            })?,
        };
        Ok(Self(dir))
    }

    fn slot(&self, store: &StoreName) -> PathBuf {
        let digest = Digest::sha256(store.to_string().as_bytes()).to_string();
        let hex = digest.rsplit(':').next().unwrap_or_default();
        self.0.join("disks").join(hex.get(..32).unwrap_or(hex))
    }

    /// Takes the place of a disk that is about to run; nobody else can meanwhile.
    pub(super) fn take(&self, store: &StoreName) -> anyhow::Result<Slot> {
        let dir = self.slot(store);
        let begin = Instant::now();
        loop {
            make(&dir)?;
            let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(dir.join("lock"));
            let lock = match lock {
                // Who ended a moment ago took the directory away.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                lock => lock.with_context(|| format!("{}: the lock of a running disk", dir.display()))?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                // Who looks whether a disk runs has the lock for a moment.
                Err(TryLockError::WouldBlock) if begin.elapsed() < LOCK_TIME => {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(TryLockError::WouldBlock) => return Err(InUse(format!("{store}: the disk runs already")).into()),
                Err(error) => return Err(std::io::Error::from(error)).with_context(|| dir.display().to_string()),
            }
            // Only the lock that is still at its place counts.
            let here = fs::metadata(dir.join("lock")).ok().map(|here| here.ino());
            if here == Some(lock.metadata()?.ino()) {
                let slot = Slot { dir, _lock: lock };
                slot.clear();
                return Ok(slot);
            }
        }
    }

    /// The running disk of that device or store, and its socket.
    pub(super) fn find(&self, what: &str) -> anyhow::Result<Option<(Record, PathBuf)>> {
        let by_store = StoreName::parse(what).ok().map(|store| self.slot(&store));
        let all = match fs::read_dir(self.0.join("disks")) {
            Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("{}: running disks", self.0.display())),
        };
        // Also as a symbolic link of a device, as udev makes them.
        let device = fs::canonicalize(what).ok().map(|path| path.display().to_string());
        let named =
            |record: &Record| record.devices.iter().any(|known| known == what || Some(known) == device.as_ref());
        for dir in all {
            let Some(record) = read(&dir).filter(|_| is_alive(&dir)) else { continue };
            if Some(&dir) == by_store.as_ref() || named(&record) {
                return Ok(Some((record, dir.join("control"))));
            }
        }
        Ok(None)
    }
}

fn make(dir: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("{}: the directory of running disks", dir.display()))
}

fn read(dir: &Path) -> Option<Record> {
    use std::io::Read as _;
    let mut text = String::new();
    File::open(dir.join("record.json")).ok()?.take(RECORD_LIMIT).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Whether its process still holds the lock.
fn is_alive(dir: &Path) -> bool {
    let lock = File::open(dir.join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// The place of a running disk; it is left when this is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    dir: PathBuf,
    _lock: File,
}

impl Slot {
    /// Where the control socket is.
    pub(super) fn socket(&self) -> PathBuf {
        self.dir.join("control")
    }

    /// Where the front end keeps what it needs.
    pub(super) fn device(&self) -> PathBuf {
        self.dir.join("device")
    }

    /// Where a process in the background writes what it has to say.
    pub(super) fn log(&self) -> std::io::Result<File> {
        OpenOptions::new().append(true).create(true).mode(0o600).open(self.dir.join("log"))
    }

    /// Says that the disk runs. Whoever looks for it finds it from now on.
    pub(super) fn announce(&self, record: &Record) -> anyhow::Result<()> {
        let write = || -> std::io::Result<()> {
            let mut file = File::create(self.dir.join("record.new"))?;
            file.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(self.dir.join("record.new"), self.dir.join("record.json"))
        };
        write().with_context(|| format!("{}: the record of a running disk", self.dir.display()))
    }

    fn clear(&self) {
        for name in ["record.json", "record.new", "control", "log"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clear();
        let device = self.device();
        let _ = fs::remove_file(device.join("lock"));
        // Never what is in it: a device that stayed is still served from there.
        let _ = fs::remove_dir(device);
        // The lock is held until the end: who opens it now finds that it is no longer at its place.
        let _ = fs::remove_file(self.dir.join("lock"));
        let _ = fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_runs_is_found_by_store_and_device_and_only_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir(dir.path().join("run"));
        let text = dir.path().join("store").display().to_string();
        let store = StoreName::parse(&text).unwrap();
        assert!(run.find(&text).unwrap().is_none());
        let slot = run.take(&store).unwrap();
        assert!(run.take(&store).is_err(), "taken twice");
        assert!(run.find(&text).unwrap().is_none(), "not announced");
        let record = Record { store: store.to_string(), devices: vec!["/dev/ublkb7".into()], pid: 1 };
        slot.announce(&record).unwrap();
        for what in [text.as_str(), "/dev/ublkb7"] {
            assert_eq!(run.find(what).unwrap().unwrap(), (record.clone(), slot.socket()));
        }
        assert!(run.find("/dev/ublkb8").unwrap().is_none());
        drop(slot);
        assert!(run.find(&text).unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path().join("run/disks")).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn what_a_killed_process_left_is_not_taken_for_a_disk_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir(dir.path().join("run"));
        let store = StoreName::parse(&dir.path().join("store").display().to_string()).unwrap();
        let left = run.slot(&store);
        fs::create_dir_all(&left).unwrap();
        for (name, text) in [("lock", ""), ("control", ""), ("record.json", r#"{"store":"x","devices":["d"],"pid":1}"#)]
        {
            fs::write(left.join(name), text).unwrap();
        }
        assert!(run.find("d").unwrap().is_none());
        let slot = run.take(&store).unwrap();
        assert!(!slot.socket().exists());
    }
}

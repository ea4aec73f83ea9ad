//! Locks between processes and threads: flock(2) on files of the store, so that a killed holder lets go by itself.

use std::{
    fs::File,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{StoreError, io_error};

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits until it shares the lock.
    pub(super) fn shared(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, FlockOperation::LockShared)
            .map(|lock| lock.unwrap_or_else(|| unreachable!("a blocking lock waits")))
    }

    /// Waits until it holds the lock alone.
    pub(super) fn exclusive(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, FlockOperation::LockExclusive)
            .map(|lock| lock.unwrap_or_else(|| unreachable!("a blocking lock waits")))
    }

    /// Takes the lock alone, where nobody has it now.
    pub(super) fn try_exclusive(path: &Path) -> Result<Option<Self>, StoreError> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Whether nobody holds the lock now.
    pub(super) fn is_free(path: &Path) -> Result<bool, StoreError> {
        // One who made no lock, or whose lock went with what it protects, holds none.
        if !path.exists() {
            return Ok(true);
        }
        let file = File::open(path).map_err(io_error("open lock", path))?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(io_error("lock", path)(errno.into())),
        }
    }

    fn take(path: &Path, how: FlockOperation) -> Result<Option<Self>, StoreError> {
        let failed = |errno: Errno| io_error("lock", path)(errno.into());
        loop {
            let file = File::options().create(true).append(true).open(path).map_err(io_error("open lock", path))?;
            match flock(&file, how) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(failed(errno)),
            }
            // A remover of the file may have held the lock: then what we hold is a lock that nobody else will look at.
            let ours = file.metadata().map_err(io_error("look at lock", path))?;
            match std::fs::metadata(path) {
                Ok(there) if there.ino() == ours.ino() && there.dev() == ours.dev() => {
                    return Ok(Some(Self { file, path: path.into() }));
                }
                _ => {}
            }
        }
    }

    /// Turns an exclusive lock into a shared one. Between the two another may have held it, so what it protects is to be looked at
    /// again.
    pub(super) fn downgrade(self) -> Result<Self, StoreError> {
        flock(&self.file, FlockOperation::LockShared).map_err(|errno| io_error("lock", &self.path)(errno.into()))?;
        Ok(self)
    }

    /// Removes the lock's file; for a holder of the exclusive lock, when what it protects is gone.
    pub(super) fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_lock_file_does_not_split_its_users() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::exclusive(&path).unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Lock::exclusive(&path).unwrap()
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        first.remove();
        let second = waiter.join().unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none(), "the waiter holds the file that is there now");
        let shared = second.downgrade().unwrap();
        let _also = Lock::shared(&path).unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(shared);
    }
}

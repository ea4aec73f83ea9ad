//! The open files of a directory of segments: some that were used last, and those that a flush has to make durable.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;

use super::descriptor::open;

/// Files that are kept open because they may be used again.
const MAX_OPEN: usize = 256;

/// Files with writes that are not durable yet; beyond it they are written back before a flush asks for it.
const MAX_DIRTY: usize = 128;

/// The files of one directory.
pub(super) struct Files {
    directory: OwnedFd,
    read_only: bool,
    state: Mutex<State>,
    /// Held while files are written back: a flush must not return while another one still does its work.
    flushing: Mutex<()>,
}

#[derive(Default)]
struct State {
    open: BTreeMap<u64, Open>,
    clock: u64,
    dirty: BTreeMap<u64, Arc<OwnedFd>>,
    /// Names were made or removed.
    names: bool,
}

struct Open {
    file: Arc<OwnedFd>,
    used: u64,
}

impl Files {
    pub(super) fn new(directory: OwnedFd, read_only: bool) -> Self {
        Self { directory, read_only, state: Mutex::default(), flushing: Mutex::default() }
    }

    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a segment, where there is one.
    pub(super) fn find(&self, number: u64) -> io::Result<Option<Arc<OwnedFd>>> {
        self.get(number, OFlags::empty())
    }

    /// The file of a segment; it is made where there is none.
    pub(super) fn make(&self, number: u64) -> io::Result<Arc<OwnedFd>> {
        self.get(number, OFlags::CREATE)?.ok_or_else(|| Errno::NOENT.into())
    }

    fn get(&self, number: u64, flags: OFlags) -> io::Result<Option<Arc<OwnedFd>>> {
        // The lock is held while a file is opened, so that it is in the cache before anybody can remove it.
        let mut state = self.state();
        state.clock += 1;
        let used = state.clock;
        if let Some(open) = state.open.get_mut(&number) {
            open.used = used;
            return Ok(Some(Arc::clone(&open.file)));
        }
        let access = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let Some(fd) = open(&self.directory, &name(number), access | flags)? else { return Ok(None) };
        let file = Arc::new(fd);
        // Whether it is new is not known; to sync the names once too often does no harm.
        state.names |= flags.contains(OFlags::CREATE);
        if state.open.len() >= MAX_OPEN
            && let Some(oldest) = state.open.iter().min_by_key(|(_, open)| open.used).map(|(number, _)| *number)
        {
            state.open.remove(&oldest);
        }
        state.open.insert(number, Open { file: Arc::clone(&file), used });
        Ok(Some(file))
    }

    /// Notes that a write to the file has returned: the next flush makes it durable.
    pub(super) fn wrote(&self, number: u64, file: &Arc<OwnedFd>) -> io::Result<()> {
        let mut state = self.state();
        state.dirty.insert(number, Arc::clone(file));
        let many = state.dirty.len() > MAX_DIRTY;
        drop(state);
        if many { self.flush() } else { Ok(()) }
    }

    /// Removes the file of a segment, where there is one.
    pub(super) fn remove(&self, number: u64) -> io::Result<()> {
        let mut state = self.state();
        state.open.remove(&number);
        state.dirty.remove(&number);
        state.names = true;
        match rustix::fs::unlinkat(&self.directory, name(number), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes durable what was written, and the names of the files. After an error nothing is known of any of it.
    pub(super) fn flush(&self) -> io::Result<()> {
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        let dirty = std::mem::take(&mut state.dirty);
        let names = std::mem::take(&mut state.names);
        drop(state);
        for file in dirty.values() {
            retry(|| rustix::fs::fdatasync(file))?;
        }
        if names {
            retry(|| rustix::fs::fsync(&self.directory))?;
        }
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The name of a segment's file.
pub(super) fn name(number: u64) -> String {
    format!("segment-{number:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_files_stay_open() {
        let place = tempfile::tempdir().unwrap();
        let directory = OwnedFd::from(std::fs::File::open(place.path()).unwrap());
        let files = Files::new(directory, false);
        for number in 0..2 * MAX_OPEN as u64 {
            let file = files.make(number).unwrap();
            files.wrote(number, &file).unwrap();
        }
        let state = files.state();
        assert_eq!(state.open.len(), MAX_OPEN);
        assert!(state.dirty.len() <= MAX_DIRTY);
        assert!(state.open.contains_key(&(2 * MAX_OPEN as u64 - 1)) && !state.open.contains_key(&0));
        drop(state);
        files.flush().unwrap();
        assert!(files.state().dirty.is_empty());
        assert!(files.find(0).unwrap().is_some());
        files.remove(0).unwrap();
        assert!(files.find(0).unwrap().is_none());
    }
}

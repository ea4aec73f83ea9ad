//! An anchor in a file: for tests, and for a directory that the host of the disk cannot touch.
//!
//! # Layout
//! 112 bytes: magic (16) ‖ state (64) ‖ SHA-256 of the two (32).
//!
//! # Durability
//! A new state is written to `.NAME.new`, synced, renamed to `NAME`, and the directory synced: a crash leaves the old state or the
//! new one. Readers and writers hold `.NAME.lock` (flock), so compare-and-swap holds between processes of one machine; on a network
//! filesystem it holds as far as its locks do.
//!
//! # What it protects from
//! An older copy of the disk, in the hands of somebody who cannot write this file. The checksum finds decay, not malice: who can
//! write the file can write any state into it.

use std::{
    fs::{File, TryLockError},
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nacre_core::{Anchor, AnchorError, AnchorState};
use ring::digest;
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};

/// What the file begins with; the version is in it.
const MAGIC: &[u8; 16] = b"nacre anchor 1\n\0";
/// Bytes of the file.
const LEN: usize = MAGIC.len() + AnchorState::LEN + digest::SHA256_OUTPUT_LEN;
/// How long we wait for others who hold the lock: they write one small file.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// An anchor in a file.
#[derive(Debug)]
pub struct FileAnchor {
    directory: PathBuf,
    name: String,
}

impl FileAnchor {
    /// The anchor in the file `path`, which need not be there yet; its directory must be.
    ///
    /// # Errors
    /// [`AnchorError::Failed`]: the path does not name a file, or its name is not UTF-8.
    pub fn new(path: &Path) -> Result<Self, AnchorError> {
        let failed = |what: &str, source: io::Error| AnchorError::Failed {
            anchor: format!("anchor {}", path.display()),
            what: what.into(),
            source: Arc::new(source),
        };
        // Absolute, since a daemon changes its working directory.
        let absolute = std::path::absolute(path).map_err(|error| failed("it has no absolute name", error))?;
        let name = absolute.file_name().and_then(|name| name.to_str()).filter(|_| !path.ends_with("."));
        let (Some(name), Some(directory)) = (name, absolute.parent()) else {
            return Err(failed("it cannot be the name of a file", io::ErrorKind::InvalidInput.into()));
        };
        let directory = directory.to_owned();
        Ok(Self { directory, name: name.to_owned() })
    }

    /// Removes what it holds, for a disk that is made anew; nothing happens where there is nothing.
    ///
    /// # Errors
    /// [`AnchorError::Failed`]
    pub fn forget(&self) -> Result<(), AnchorError> {
        let directory = self.open()?;
        let _lock = self.lock(&directory)?;
        match rustix::fs::unlinkat(&directory, &*self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(self.failed("it cannot be removed", error.into())),
        }
        rustix::fs::fsync(&directory).map_err(|error| self.failed("its directory cannot be synced", error.into()))
    }

    fn failed(&self, what: &str, source: io::Error) -> AnchorError {
        AnchorError::Failed { anchor: self.describe(), what: what.into(), source: Arc::new(source) }
    }

    fn untrusted(&self, what: String) -> AnchorError {
        AnchorError::Untrusted { anchor: self.describe(), what }
    }

    /// The directory has to be there: where the medium of the anchor is not mounted, nothing is known.
    fn open(&self) -> Result<OwnedFd, AnchorError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.directory, flags, Mode::empty())
            .map_err(|error| self.failed("its directory cannot be opened", error.into()))
    }

    /// Waits until nobody else reads or writes; the lock ends with the file that is given.
    fn lock(&self, directory: &OwnedFd) -> Result<File, AnchorError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let lock = rustix::fs::openat(directory, format!(".{}.lock", self.name), flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed("its lock cannot be opened", error.into()))?;
        let lock = File::from(lock);
        let begin = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) if begin.elapsed() < LOCK_PATIENCE => thread::sleep(LOCK_PAUSE),
                Err(error) => return Err(self.failed("somebody holds its lock", error.into())),
            }
        }
    }

    fn read_locked(&self, directory: &OwnedFd) -> Result<Option<AnchorState>, AnchorError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(directory, &*self.name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("it cannot be opened", error.into())),
        };
        let is_file = file.metadata().map_err(|error| self.failed("it cannot be read", error))?.is_file();
        if !is_file {
            return Err(self.untrusted("it is no regular file".into()));
        }
        let mut bytes = Vec::with_capacity(LEN + 1);
        file.take(LEN as u64 + 1).read_to_end(&mut bytes).map_err(|error| self.failed("it cannot be read", error))?;
        decode(&bytes).map(Some).map_err(|what| self.untrusted(what.into()))
    }

    fn write_locked(&self, directory: &OwnedFd, state: &AnchorState) -> io::Result<()> {
        let new = format!(".{}.new", self.name);
        match rustix::fs::unlinkat(directory, &*new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(rustix::fs::openat(directory, &*new, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(&encode(state))?;
        // The content is there before the name says so.
        file.sync_all()?;
        rustix::fs::renameat(directory, &*new, directory, &*self.name)?;
        // The name stays: from here on no crash brings the old state back.
        Ok(rustix::fs::fsync(directory)?)
    }
}

impl Anchor for FileAnchor {
    fn read(&self) -> Result<Option<AnchorState>, AnchorError> {
        let directory = self.open()?;
        let _lock = self.lock(&directory)?;
        self.read_locked(&directory)
    }

    fn advance(&self, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), AnchorError> {
        let directory = self.open()?;
        let _lock = self.lock(&directory)?;
        compare(expected, self.read_locked(&directory)?.as_ref(), &self.describe())?;
        self.write_locked(&directory, next).map_err(|error| self.failed("it cannot be written", error))
    }

    fn describe(&self) -> String {
        format!("anchor file {}", self.directory.join(&self.name).display())
    }

    fn promise(&self) -> String {
        format!(
            "an older copy of the disk is refused, as long as whoever brings it cannot write the file {}; who can write it can bring \
             back any state that the disk ever had",
            self.directory.join(&self.name).display()
        )
    }
}

/// Whether an anchor holds what its writer believes.
pub(crate) fn compare(
    expected: Option<&AnchorState>,
    found: Option<&AnchorState>,
    anchor: &str,
) -> Result<(), AnchorError> {
    match found {
        _ if expected == found => Ok(()),
        Some(found) => Err(AnchorError::Fenced {
            anchor: anchor.to_owned(),
            found_fence: found.fence,
            found_sequence: found.sequence,
        }),
        None => Err(AnchorError::Untrusted {
            anchor: anchor.to_owned(),
            what: "the state that it held is gone: somebody removed it".into(),
        }),
    }
}

fn encode(state: &AnchorState) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&state.to_bytes());
    let checksum = digest::digest(&digest::SHA256, &bytes);
    bytes.extend_from_slice(checksum.as_ref());
    bytes
}

fn decode(bytes: &[u8]) -> Result<AnchorState, &'static str> {
    let (magic, rest) = bytes.split_first_chunk::<16>().ok_or("it is shorter than an anchor")?;
    if magic != MAGIC {
        return Err("it is no anchor, or one of another version");
    }
    let (state, checksum) = rest.split_first_chunk::<{ AnchorState::LEN }>().ok_or("it is shorter than an anchor")?;
    if bytes.len() != LEN {
        return Err("it has not the length of an anchor");
    }
    let hashed = digest::digest(&digest::SHA256, &[&magic[..], &state[..]].concat());
    if hashed.as_ref() != checksum {
        return Err("its checksum does not match: it was damaged");
    }
    Ok(AnchorState::from_bytes(state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(sequence: u64) -> AnchorState {
        AnchorState { disk: [7; 16], fence: 1, sequence, root: [3; 32] }
    }

    #[test]
    fn every_flipped_bit_and_every_length_is_refused() {
        let good = encode(&state(5));
        assert_eq!(good.len(), LEN);
        assert_eq!(decode(&good), Ok(state(5)));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(decode(&good[..length]).is_err(), "{length}");
        }
        assert!(decode(&[good, vec![0]].concat()).is_err());
    }

    #[test]
    fn names_that_are_no_files_are_refused() {
        for path in ["", "/", "a/..", ".."] {
            assert!(FileAnchor::new(Path::new(path)).is_err(), "{path:?}");
        }
        let here = std::env::current_dir().unwrap().join("a");
        assert_eq!(FileAnchor::new(Path::new("a")).unwrap().describe(), format!("anchor file {}", here.display()));
    }
}

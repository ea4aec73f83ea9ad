//! Where one mount has its files: a directory below `mounts`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use rustix::{fs::FlockOperation, mount::UnmountFlags};

use super::{LazyError, io_error};

/// Names below the directory.
pub(super) const MOUNTS: &str = "mounts";
const METADATA: &str = "metadata";
const BLOB: &str = "blob";
const DEVICE: &str = "device";
const ROOT: &str = "root";
/// How often it is tried to make one.
const TRIES: usize = 8;

/// A directory below `mounts` that goes when it is dropped. Whoever has it holds a lock of the metadata file, so that what killed
/// processes left is told from what is in use. The lock is the open file's: who has a duplicate holds it, too.
pub(super) struct Place {
    path: PathBuf,
    pub(super) erofs: File,
}

impl Place {
    pub(super) fn new(mounts: &Path) -> Result<Self, LazyError> {
        // Whoever cleans up just between two steps of this takes it for another's.
        (0..TRIES).find_map(|_| Self::try_new(mounts).transpose()).unwrap_or_else(|| {
            Err(io_error("make a directory in", mounts)(io::Error::from(io::ErrorKind::ResourceBusy)))
        })
    }

    /// `None` where somebody who cleans up has taken it away.
    fn try_new(mounts: &Path) -> Result<Option<Self>, LazyError> {
        let name = Digest::sha256(nacre_core::SecretArray::<16>::random().expose()).short();
        let path = mounts.join(name);
        fs::create_dir(&path).map_err(io_error("make the directory", &path))?;
        let metadata = path.join(METADATA);
        let file = File::options().read(true).write(true).create_new(true).open(&metadata);
        let place = Self { erofs: file.map_err(io_error("make the metadata file", &metadata))?, path };
        let locked = rustix::fs::flock(&place.erofs, FlockOperation::NonBlockingLockExclusive);
        let gone = place.erofs.metadata().map_err(io_error("look at", &metadata))?.nlink() == 0;
        Ok((locked.is_ok() && !gone).then_some(place))
    }

    /// That of another process, whose locked file this is.
    pub(super) fn adopt(mounts: &Path, name: &str, erofs: File) -> Result<Self, LazyError> {
        let path = mounts.join(name);
        let wrong = || io_error("find what another process had there", &path)(io::ErrorKind::NotFound.into());
        // One component: never another directory.
        let plain = Path::new(name).file_name().is_some_and(|file| file == name);
        let same = |here: fs::Metadata, open: fs::Metadata| (here.dev(), here.ino()) == (open.dev(), open.ino());
        let there = fs::metadata(path.join(METADATA)).and_then(|here| Ok(same(here, erofs.metadata()?)));
        if plain && there.unwrap_or(false) { Ok(Self { path, erofs }) } else { Err(wrong()) }
    }

    /// The name of its directory.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn metadata(&self) -> PathBuf {
        self.path.join(METADATA)
    }

    /// The metadata blob as it came, for who goes on with the mount.
    pub(super) fn blob(&self) -> PathBuf {
        self.path.join(BLOB)
    }

    pub(super) fn device(&self) -> PathBuf {
        self.path.join(DEVICE)
    }

    pub(super) fn root(&self) -> PathBuf {
        self.path.join(ROOT)
    }

    /// Leaves everything as it is for another process.
    pub(super) fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Never below a mount: what is mounted there is gone before, or stays.
        let _ = fs::remove_dir(self.root());
        let _ = fs::remove_dir(self.device());
        let _ = fs::remove_file(self.blob());
        let _ = fs::remove_file(self.metadata());
        let _ = fs::remove_dir(&self.path);
    }
}

/// Removes what killed processes left below a directory of lazy images: mounts that nobody answers for, and their metadata. What another mount
/// namespace has of them gives errors until somebody unmounts it there.
///
/// # Errors
/// [`LazyError::Io`]
pub fn clean(directory: &Path) -> Result<(), LazyError> {
    let mounts = directory.join(MOUNTS);
    let entries = match fs::read_dir(&mounts) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_error("clean", &mounts))?,
    };
    for entry in entries {
        let path = entry.map_err(io_error("clean", &mounts))?.path();
        let Ok(file) = File::open(path.join(METADATA)) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let mounted = nacre_sys::fs::mounts().map_err(io_error("clean", &mounts))?;
        // The last to be mounted first; those below its own directory have its path as their source, too.
        for mount in mounted.iter().rev().filter(|mount| mount.source.starts_with(&path)) {
            if let Err(error) = rustix::mount::unmount(&mount.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                tracing::warn!("{}: a mount that nobody serves stays: {error}", mount.target.display());
            }
        }
        tracing::info!("{}: what a killed process left is removed", path.display());
        drop(Place { path, erofs: file });
    }
    Ok(())
}

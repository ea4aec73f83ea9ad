//! Files and directories as the transports use them: opened relative to a directory that stays open, never through a symbolic link
//! inside it, never a FIFO or a device, and never more of them than was asked for.
//!
//! What is being written has a name that begins with [`TEMP_PREFIX`] and an exclusive lock that lives as long as its writer. What
//! has such a name and no lock was left by a writer that was killed, and the next one removes it.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nacre_core::{Digest, Hasher};
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::{manifest::Descriptor, source::TransportError};

/// How the names of unfinished files and directories begin.
pub(super) const TEMP_PREFIX: &str = ".nacre-tmp-";

/// The most names of a directory that are looked at.
const NAMES_LIMIT: usize = 1 << 20;
const BUFFER: usize = 128 << 10;

/// An open directory, and its path for messages.
#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens the directory that the user named; its own path may go through symbolic links.
    pub(super) fn open(path: &Path) -> Result<Self, TransportError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, path: path.into() }),
            Err(Errno::NOENT) => Err(not_found("the directory", path)),
            Err(error) => Err(io("opening the directory", path, error)),
        }
    }

    /// [`open`](Self::open), of a directory that is made where it is missing; whether it was.
    pub(super) fn open_or_create(path: &Path) -> Result<(Self, bool), TransportError> {
        let made = match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(io("making the directory", path, error)),
        };
        Ok((Self::open(path)?, made))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in this one; `None` where there is nothing of that name.
    pub(super) fn subdir(&self, name: &str) -> Result<Option<Self>, TransportError> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(io("opening the directory (symbolic links are not followed)", &path, error)),
        }
    }

    /// A directory in this one, made where it is missing.
    pub(super) fn make_subdir(&self, name: &str) -> Result<Self, TransportError> {
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(io("making the directory", &self.path.join(name), error)),
        }
        self.subdir(name)?.ok_or_else(|| not_found("the directory", &self.path.join(name)))
    }

    /// A regular file in this directory, open for reading, and its size; `None` where there is nothing of that name.
    pub(super) fn file(&self, name: &str) -> Result<Option<(File, u64)>, TransportError> {
        let path = self.path.join(name);
        // NONBLOCK: a FIFO would otherwise wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => regular(File::from(fd), &path).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(io("opening the file (symbolic links are not followed)", &path, error)),
        }
    }

    /// The whole of a small file; `None` where there is none.
    pub(super) fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        let Some((file, size)) = self.file(name)? else { return Ok(None) };
        let path = self.path.join(name);
        let too_large = || TransportError::TooLarge {
            what: name.into(),
            place: self.path.display().to_string(),
            limit: limit as u64,
        };
        if size > limit as u64 {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|error| io("reading", &path, error))?;
        if bytes.len() > limit { Err(too_large()) } else { Ok(Some(bytes)) }
    }

    /// Makes a new file.
    pub(super) fn create(&self, name: &str) -> Result<File, TransportError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o644))
            .map(File::from)
            .map_err(|error| io("making the file", &self.path.join(name), error))
    }

    /// Makes a new file of these bytes, durably but for its name.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), TransportError> {
        let file = self.create(name)?;
        file.write_all_at(bytes, 0)
            .and_then(|()| file.sync_data())
            .map_err(|error| io("writing", &self.path.join(name), error))
    }

    /// Gives a file or directory another name, here or in another directory, over what is there.
    pub(super) fn rename(&self, from: &str, into: &Self, to: &str) -> Result<(), TransportError> {
        rustix::fs::renameat(&self.fd, from, &into.fd, to)
            .map_err(|error| io("renaming the finished file", &into.path.join(to), error))
    }

    /// Lets two names of this directory change places.
    pub(super) fn exchange(&self, one: &str, other: &str) -> Result<(), TransportError> {
        rustix::fs::renameat_with(&self.fd, one, &self.fd, other, rustix::fs::RenameFlags::EXCHANGE)
            .map_err(|error| io("putting the new directory in the old one's place", &self.path.join(other), error))
    }

    /// Removes a file; it is no error when there is none.
    pub(super) fn remove_file(&self, name: &str) -> Result<(), TransportError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(io("removing", &self.path.join(name), error)),
        }
    }

    /// Removes a directory and the files in it; directories in it are left, and then so is it.
    pub(super) fn remove_flat(&self, name: &str) -> Result<(), TransportError> {
        let Some(dir) = self.subdir(name)? else { return Ok(()) };
        for entry in dir.names()? {
            dir.remove_file(&entry)?;
        }
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(io("removing", &self.path.join(name), error)),
        }
    }

    /// The names in this directory that are UTF-8, in order.
    pub(super) fn names(&self) -> Result<Vec<String>, TransportError> {
        let failed = |error| io("listing the directory", &self.path, error);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
            if names.len() > NAMES_LIMIT {
                return Err(TransportError::TooLarge {
                    what: "the list of files".into(),
                    place: self.path.display().to_string(),
                    limit: NAMES_LIMIT as u64,
                });
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Makes the names in this directory durable.
    pub(super) fn sync(&self) -> Result<(), TransportError> {
        rustix::fs::fsync(&self.fd).map_err(|error| io("making the directory durable", &self.path, error))
    }

    /// Waits until no other writer holds this directory; until the guard is dropped.
    pub(super) fn lock(&self) -> Result<impl Sized + use<>, TransportError> {
        let failed = |error| io("locking the directory", &self.path, error);
        // A lock belongs to an open file description, so that one of our own ends when the guard closes it.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::empty()).map_err(failed)?;
        rustix::fs::flock(&fd, FlockOperation::LockExclusive).map_err(failed)?;
        Ok(fd)
    }

    /// Makes a locked directory of a fresh temporary name here, after removing those that killed writers left.
    pub(super) fn make_temp_dir(&self, prefix: &str) -> Result<(String, Self), TransportError> {
        self.remove_stale(prefix)?;
        loop {
            let name = temp_name(prefix)?;
            let dir = match self.make_subdir(&name) {
                // Another writer has removed it before it was opened.
                Err(error) if error.is_not_found() => continue,
                made => made?,
            };
            if self.claim(&dir.fd, &name)? {
                return Ok((name, dir));
            }
        }
    }

    /// [`make_temp_dir`](Self::make_temp_dir), of a file.
    pub(super) fn make_temp_file(&self, prefix: &str) -> Result<(String, File), TransportError> {
        self.remove_stale(prefix)?;
        loop {
            let name = temp_name(prefix)?;
            let file = self.create(&name)?;
            if self.claim(&file, &name)? {
                return Ok((name, file));
            }
        }
    }

    /// Locks what was just made; whether it is still there (another writer may have taken it for stale before it was locked).
    fn claim(&self, fd: impl AsFd, name: &str) -> Result<bool, TransportError> {
        let failed = |error| io("locking", &self.path.join(name), error);
        rustix::fs::flock(&fd, FlockOperation::LockExclusive).map_err(failed)?;
        Ok(rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok())
    }

    fn remove_stale(&self, prefix: &str) -> Result<(), TransportError> {
        for name in self.names()?.iter().filter(|name| name.starts_with(prefix)) {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(fd) = rustix::fs::openat(&self.fd, name, flags, Mode::empty()) else { continue };
            if rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            match rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Ok(FileType::Directory) => self.remove_flat(name)?,
                _ => self.remove_file(name)?,
            }
        }
        Ok(())
    }
}

fn temp_name(prefix: &str) -> Result<String, TransportError> {
    let mut raw = [0u8; 8];
    rustix::rand::getrandom(&mut raw, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| io("reading the random source for the name of", Path::new(prefix), error))?;
    Ok(format!("{prefix}{:016x}", u64::from_ne_bytes(raw)))
}

/// Splits a path into the directory that holds it and its name there.
pub(super) fn parent_and_name(path: &Path) -> Result<(PathBuf, String), TransportError> {
    let bad = || TransportError::Malformed {
        what: "the path".into(),
        place: path.display().to_string(),
        reason: "it names no file or directory".into(),
    };
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(bad)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_owned()))
}

/// Opens the archive that the user named, and tells its size.
pub(super) fn open_archive(path: &Path) -> Result<(File, u64), TransportError> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => regular(File::from(fd), path),
        Err(Errno::NOENT) => Err(not_found("the archive", path)),
        Err(error) => Err(io("opening", path, error)),
    }
}

fn regular(file: File, path: &Path) -> Result<(File, u64), TransportError> {
    let metadata = file.metadata().map_err(|error| io("inspecting", path, error))?;
    if !metadata.is_file() {
        return Err(TransportError::Malformed {
            what: "the file".into(),
            place: path.display().to_string(),
            reason: "it is not a regular file".into(),
        });
    }
    Ok((file, metadata.len()))
}

pub(super) fn io(what: &'static str, path: &Path, source: impl Into<std::io::Error>) -> TransportError {
    TransportError::Io { what, path: path.into(), source: source.into() }
}

pub(super) fn not_found(what: &str, path: &Path) -> TransportError {
    TransportError::NotFound { what: what.into(), place: path.display().to_string() }
}

/// Where in which file some bytes are.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    /// The file.
    pub(super) file: Arc<File>,
    /// Where they begin.
    pub(super) offset: u64,
    /// How many there are.
    pub(super) size: u64,
}

impl Extent {
    /// The whole of a file.
    pub(super) fn whole(file: File, size: u64) -> Self {
        Self { file: Arc::new(file), offset: 0, size }
    }

    /// A stream of the bytes as the content of `descriptor`, whose size they must have.
    pub(super) fn stream(self, descriptor: &Descriptor, place: &str) -> Result<Box<dyn Read + Send>, TransportError> {
        let what = format!("blob {}", descriptor.digest);
        if self.size > descriptor.size {
            return Err(TransportError::TooLarge { what, place: place.into(), limit: descriptor.size });
        }
        if self.size < descriptor.size {
            let reason = format!("it has {} bytes, its descriptor says {}", self.size, descriptor.size);
            return Err(TransportError::Malformed { what, place: place.into(), reason });
        }
        Ok(Box::new(ExtentReader { extent: self, what, place: place.into() }))
    }

    /// Fills `out` with the bytes from `offset` on.
    pub(super) fn read_part(
        &self,
        descriptor: &Descriptor,
        place: &str,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), TransportError> {
        let what = || format!("blob {}", descriptor.digest);
        let end = offset.saturating_add(out.len() as u64);
        if end > self.size {
            let reason = format!("it has {} bytes, and those up to {end} are wanted", self.size);
            return Err(TransportError::Malformed { what: what(), place: place.into(), reason });
        }
        self.file
            .read_exact_at(out, self.offset + offset)
            .map_err(|source| TransportError::Content { what: format!("{} at {place}", what()), source })
    }

    /// The bytes, of which there are at most `limit`.
    pub(super) fn read(&self, what: &str, place: &str, limit: usize) -> Result<Vec<u8>, TransportError> {
        if self.size > limit as u64 {
            return Err(TransportError::TooLarge { what: what.into(), place: place.into(), limit: limit as u64 });
        }
        let mut bytes = Vec::new();
        ExtentReader { extent: self.clone(), what: what.into(), place: place.into() }
            .read_to_end(&mut bytes)
            .map_err(|source| TransportError::Content { what: format!("{what} at {place}"), source })?;
        Ok(bytes)
    }
}

/// Reads an [`Extent`]; that the file ends before it is an error.
struct ExtentReader {
    extent: Extent,
    what: String,
    place: String,
}

impl Read for ExtentReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let wanted = usize::try_from(self.extent.size).map_or(buffer.len(), |left| left.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let Some(buffer) = buffer.get_mut(..wanted) else { return Ok(0) };
        let count = self.extent.file.read_at(buffer, self.extent.offset)?;
        if count == 0 {
            return Err(std::io::Error::other(TransportError::Malformed {
                what: self.what.clone(),
                place: self.place.clone(),
                reason: format!("the file was cut while it was read: {} bytes are missing", self.extent.size),
            }));
        }
        self.extent.offset += count as u64;
        self.extent.size -= count as u64;
        Ok(count)
    }
}

/// Copies a blob into `write`, which is given each piece and its offset, and checks it against `expected` where that is known.
pub(super) fn store(
    content: &mut dyn Read,
    expected: Option<&Descriptor>,
    place: &str,
    mut write: impl FnMut(&[u8], u64) -> Result<(), TransportError>,
) -> Result<(Digest, u64), TransportError> {
    let what = || expected.map_or("the new blob".to_owned(), |blob| format!("blob {}", blob.digest));
    let limit = expected.map_or(crate::manifest::BLOB_LIMIT, |blob| blob.size);
    let mut hasher = Hasher::new(expected.map_or(nacre_core::Algorithm::Sha256, |blob| blob.digest.algorithm()));
    let mut size = 0u64;
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(stream_error(what(), error)),
        };
        let piece = buffer.get(..count).unwrap_or_default();
        if size + count as u64 > limit {
            return Err(TransportError::TooLarge { what: what(), place: place.into(), limit });
        }
        write(piece, size)?;
        hasher.update(piece);
        size += count as u64;
    }
    let found = hasher.finish();
    if let Some(expected) = expected {
        if size != expected.size {
            let reason = format!("it has {size} bytes, its descriptor says {}", expected.size);
            return Err(TransportError::Malformed { what: what(), place: place.into(), reason });
        }
        if found != expected.digest {
            return Err(TransportError::DigestMismatch { what: what(), expected: expected.digest, found });
        }
    }
    Ok((found, size))
}

/// The transport's error that a stream's error wraps, or else one that says that the stream failed.
fn stream_error(what: String, error: std::io::Error) -> TransportError {
    match error.downcast::<TransportError>() {
        Ok(inner) => inner,
        Err(source) => TransportError::Content { what, source },
    }
}

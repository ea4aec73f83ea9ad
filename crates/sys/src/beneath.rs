//! Files opened inside a root directory whose content nobody trusts, such as the root filesystem of a container.
//!
//! Every path is resolved by the kernel as if the root were `/` (`openat2` with `RESOLVE_IN_ROOT`): a symbolic link or a `..` leads
//! to another place in the root, never out of it, and links of `/proc` that lead to open files are refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// A directory that paths are resolved in.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Opens the directory `path`, which itself is trusted.
    ///
    /// # Errors
    /// It is not there or is no directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Opens `path` inside the root.
    ///
    /// # Errors
    /// The kernel's: not there, a loop of links, a magic link.
    pub fn open_at(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename elsewhere on the machine raced with the resolution of a `..`: openat2(2) says to try again.
                Err(Errno::AGAIN) if tries < 128 => tries += 1,
                result => return Ok(result?),
            }
        }
    }

    /// Reads the regular file `path` if it is there.
    ///
    /// # Errors
    /// It is no regular file (a FIFO or a device is never opened for good), larger than `limit` bytes, or cannot be read.
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let fd = match self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
            Ok(fd) => fd,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "is no regular file"));
        }
        let mut bytes = Vec::new();
        let read = File::from(fd).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if read as u64 > limit {
            let message = format!("has more than {limit} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Some(bytes))
    }

    /// Makes the directory `path` and those above it where they are missing, and opens it (as a path only).
    ///
    /// # Errors
    /// A component is there but is no directory (also: a link that leads nowhere), or cannot be made.
    pub fn make_directories(&self, path: &Path, mode: Mode) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut current = self.fd.as_fd().try_clone_to_owned()?;
        let mut prefix = std::path::PathBuf::new();
        for component in path.components() {
            let name = match component {
                Component::RootDir | Component::CurDir => continue,
                Component::Normal(name) => name,
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "'..' is not allowed in it"));
                }
            };
            prefix.push(name);
            current = match self.open_at(&prefix, flags) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rustix::fs::mkdirat(&current, name, mode)?;
                    self.open_at(&prefix, flags)?
                }
                result => result?,
            };
        }
        Ok(current)
    }

    /// Makes an empty regular file at `path` if nothing is there, with the directories above it, and opens it (as a path only).
    ///
    /// # Errors
    /// As [`Root::make_directories`].
    pub fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open_at(path, OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = self.make_directories(path.parent().unwrap_or(Path::new("/")), Mode::from_raw_mode(0o755))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
        self.open_at(path, OFlags::PATH)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        let inside = dir.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        symlink("../secret", inside.join("relative")).unwrap();
        symlink(dir.path().join("secret"), inside.join("absolute")).unwrap();
        symlink("/proc/self/root/etc/passwd", inside.join("magic")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        let root = Root::open(&inside).unwrap();
        for name in ["relative", "absolute", "magic", "../secret", "absent"] {
            assert_eq!(root.read(Path::new(name), 100).unwrap(), None, "{name}");
        }
        assert!(root.read(Path::new("loop"), 100).is_err());
        // The same name inside is what they mean.
        std::fs::write(inside.join("secret"), "inside").unwrap();
        assert_eq!(root.read(Path::new("relative"), 100).unwrap().unwrap(), b"inside");
    }

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("five"), "12345").unwrap();
        assert_eq!(root.read(Path::new("/five"), 5).unwrap().unwrap(), b"12345");
        assert!(root.read(Path::new("/five"), 4).unwrap_err().to_string().contains("more than 4"));
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("fifo"), Mode::from_raw_mode(0o600)).unwrap();
        assert!(root.read(Path::new("/fifo"), 5).unwrap_err().to_string().contains("no regular file"));
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        assert!(root.read(Path::new("/dir"), 5).is_err());
        assert!(root.read(Path::new("/five/below"), 5).unwrap().is_none());
    }

    #[test]
    fn directories_and_files_are_made_inside() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        symlink("/../../elsewhere", inside.join("out")).unwrap();
        symlink("/real", inside.join("link")).unwrap();
        std::fs::create_dir(inside.join("real")).unwrap();
        let root = Root::open(&inside).unwrap();
        root.make_directories(Path::new("/link/a/b"), Mode::from_raw_mode(0o755)).unwrap();
        assert!(inside.join("real/a/b").is_dir());
        root.make_file(Path::new("/link/c/file")).unwrap();
        assert!(inside.join("real/c/file").is_file());
        assert!(root.make_directories(Path::new("/out/a"), Mode::from_raw_mode(0o755)).is_err());
        assert!(root.make_directories(Path::new("/a/../b"), Mode::from_raw_mode(0o755)).is_err());
        assert!(!dir.path().join("elsewhere").exists());
    }
}

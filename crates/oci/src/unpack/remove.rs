//! Removes whole trees, such as the staging directory of a layer that failed.

use std::{
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::UnpackError;

/// Removes `name` below `parent` with everything in it; it is fine when there is none. Links are not followed.
///
/// # Errors
/// [`UnpackError::Remove`]
pub fn remove_tree(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), UnpackError> {
    let failed = |errno: Errno| UnpackError::Remove {
        path: PathBuf::from(String::from_utf8_lossy(name).into_owned()),
        source: errno.into(),
    };
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // POSIX says EPERM for a directory, Linux EISDIR.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(failed(errno)),
    }
    empty(parent, name).and_then(|()| unlink_dir(parent, name)).map_err(failed)
}

fn unlink_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// A directory that is being emptied: its subdirectories are still to do.
struct Level {
    fd: OwnedFd,
    subdirectories: Vec<CString>,
}

impl Level {
    /// Unlinks everything in a directory but its subdirectories.
    fn enter(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match fs::openat(parent, name, flags, Mode::empty()) {
            Err(Errno::ACCESS) => {
                // A directory without permissions, and we are not root: it is ours to change.
                fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
                fs::openat(parent, name, flags, Mode::empty())?
            }
            other => other?,
        };
        let mut subdirectories = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if entry.file_type() == FileType::Directory {
                subdirectories.push(name.to_owned());
                continue;
            }
            match fs::unlinkat(&fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => subdirectories.push(name.to_owned()),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Self { fd, subdirectories })
    }
}

fn empty(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let mut levels = vec![Level::enter(parent, name)?];
    let mut entered: Vec<CString> = Vec::new();
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.subdirectories.pop() {
            let next = Level::enter(level.fd.as_fd(), name.to_bytes())?;
            entered.push(name);
            levels.push(next);
            continue;
        }
        levels.pop();
        if let (Some(level), Some(name)) = (levels.last(), entered.pop()) {
            unlink_dir(level.fd.as_fd(), name.to_bytes())?;
        }
    }
    Ok(())
}

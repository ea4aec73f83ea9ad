//! Owners, modes, extended attributes and times of what was just made.

use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use rustix::{
    fs::{self, AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::{
    IdMap, IdRange, UnpackError,
    names::shown,
    tar::{Entry, Timestamp},
};

/// What the process creates files as, so that a chown or chmod that changes nothing can be left out.
pub(crate) struct Creator {
    uid: u32,
    gid: u32,
    umask: u32,
}

impl Creator {
    pub(crate) fn this_process() -> Self {
        // Reading the mask by setting it would race with other threads; where /proc does not tell, every mode is set.
        let umask = std::fs::read_to_string("/proc/self/status")
            .ok()
            .and_then(|status| {
                let line = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
                u32::from_str_radix(line.trim(), 8).ok()
            })
            .unwrap_or(0o777);
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw(), umask }
    }

    /// Whether what is made below a directory of group `parent_gid` has this owner from the start (with setgid directories and
    /// the `grpid` mount option the group is the directory's).
    pub(crate) fn owns(&self, uid: u32, gid: u32, parent_gid: u32) -> bool {
        self.uid == uid && self.gid == gid && parent_gid == gid
    }

    /// Whether open(2) gives a file this mode.
    pub(crate) fn gives(&self, mode: u32) -> bool {
        mode & !0o777 == 0 && mode & self.umask == 0
    }
}

impl IdMap {
    pub(crate) fn owner(&self, entry: &Entry) -> Result<(u32, u32), UnpackError> {
        let unmapped = |what, id| UnpackError::UnmappedId { path: shown(&entry.path), what, id };
        Ok((
            map(&self.uids, entry.uid).ok_or_else(|| unmapped("uid", entry.uid))?,
            map(&self.gids, entry.gid).ok_or_else(|| unmapped("gid", entry.gid))?,
        ))
    }
}

fn map(ranges: &[IdRange], id: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(id);
    }
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
        range.outside.checked_add(offset).filter(|&id| id != u32::MAX)
    })
}

pub(crate) fn owner(uid: u32, gid: u32) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

pub(crate) fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits & 0o7777)
}

pub(crate) fn timespec(time: Timestamp) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() }
}

/// Both times of an entry; an archive that knows no access time gets the modification time, so that unpacking is reproducible.
pub(crate) fn times(entry: &Entry) -> Timestamps {
    let modified = timespec(entry.mtime);
    Timestamps { last_access: entry.atime.map_or(modified, timespec), last_modification: modified }
}

/// Whether an attribute of the tar is set: not those that are the host's business, or overlayfs' own.
pub fn is_wanted(name: &[u8]) -> bool {
    !(name.starts_with(b"trusted.overlay.")
        || name.starts_with(b"user.overlay.")
        || matches!(name, b"security.selinux" | b"system.nfs4_acl" | b"user.rootlesscontainers"))
}

/// Sets the attributes of an open file or directory; returns how many were ignored.
pub(crate) fn set_xattrs(fd: impl AsFd, entry: &Entry) -> Result<u64, UnpackError> {
    let mut ignored = 0;
    for (name, value) in &entry.xattrs {
        if is_wanted(name) {
            fs::fsetxattr(&fd, name.as_slice(), value, XattrFlags::empty())
                .map_err(|errno| xattr_error(entry, name, errno))?;
        } else {
            ignored += 1;
        }
    }
    Ok(ignored)
}

/// The system has no calls for attributes relative to a directory, so the directory is named through /proc.
fn path_at(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<CString, UnpackError> {
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    CString::new(path).map_err(|_| UnpackError::refused(&entry.path, "its name contains NUL"))
}

/// [`set_xattrs`] for what cannot be opened; a symbolic link is not followed.
pub(crate) fn set_xattrs_at(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<u64, UnpackError> {
    let mut ignored = 0;
    if entry.xattrs.is_empty() {
        return Ok(0);
    }
    let path = path_at(parent, name, entry)?;
    for (name, value) in &entry.xattrs {
        if is_wanted(name) {
            fs::lsetxattr(&path, name.as_slice(), value, XattrFlags::empty())
                .map_err(|errno| xattr_error(entry, name, errno))?;
        } else {
            ignored += 1;
        }
    }
    Ok(ignored)
}

fn xattr_error(entry: &Entry, name: &[u8], errno: Errno) -> UnpackError {
    UnpackError::io("set extended attribute of", &[&entry.path, &b" ("[..], name, b")"].concat(), errno)
}

/// The names of all attributes of an open file.
pub(crate) fn list_xattrs(fd: impl AsFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = vec![0u8; 64 << 10];
    let length = match fs::flistxattr(&fd, &mut buffer) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    buffer.truncate(length);
    Ok(buffer.split(|&byte| byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Takes ACLs away that a new file or directory inherited from its parent's default ACL.
pub(crate) fn strip_acls(fd: impl AsFd) -> Result<(), Errno> {
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        match fs::fremovexattr(&fd, name) {
            Ok(()) | Err(Errno::NODATA | Errno::NOTSUP | Errno::INVAL | Errno::ACCESS) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Owner, attributes, mode and times, in this order: chown clears setuid bits and capabilities, writing attributes changes no times.
pub(crate) fn finish_path(
    parent: BorrowedFd<'_>,
    name: &[u8],
    entry: &Entry,
    (uid, gid): (u32, u32),
    strip_acl: bool,
) -> Result<u64, UnpackError> {
    let io = |operation| move |errno: Errno| UnpackError::io(operation, &entry.path, errno);
    let (user, group) = owner(uid, gid);
    fs::chownat(parent, name, user, group, AtFlags::SYMLINK_NOFOLLOW).map_err(io("change owner of"))?;
    if strip_acl {
        let path = path_at(parent, name, entry)?;
        match fs::lremovexattr(&path, "system.posix_acl_access") {
            Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(errno) => return Err(UnpackError::io("remove the ACL of", &entry.path, errno)),
        }
    }
    let ignored = set_xattrs_at(parent, name, entry)?;
    if entry.kind != super::tar::Kind::Symlink {
        fs::chmodat(parent, name, mode(entry.mode), AtFlags::empty()).map_err(io("change mode of"))?;
    }
    fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW).map_err(io("set times of"))?;
    Ok(ignored)
}

//! What a path lies on, whether it is a mount point, unmounting, syncing.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::UnmountFlags;

/// An operation on a path that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct FsError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl FsError {
    pub(crate) fn new(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self { action, path: path.to_owned(), source: source.into() }
    }
}

/// What kind of filesystem a path lies on, as far as it matters to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    /// Its content is in memory: tmpfs.
    Tmpfs,
    /// Its content is in memory: ramfs, which is also what an unpacked initramfs lies on.
    Ramfs,
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// overlayfs, which stacks only so deep: a store on it cannot hold images of more than 500 layers.
    Overlay,
    /// FUSE, of any kind.
    Fuse,
    /// NFS.
    Nfs,
    /// Anything else, by its magic number.
    Other(u64),
}

impl FsKind {
    /// Whether what is written there takes guest memory.
    pub fn in_memory(self) -> bool {
        matches!(self, Self::Tmpfs | Self::Ramfs)
    }
}

impl std::fmt::Display for FsKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::Tmpfs => "tmpfs",
            Self::Ramfs => "ramfs",
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Overlay => "overlay",
            Self::Fuse => "fuse",
            Self::Nfs => "nfs",
            Self::Other(magic) => return write!(f, "filesystem {magic:#x}"),
        };
        f.write_str(name)
    }
}

/// What kind of filesystem `path` lies on.
///
/// # Errors
/// [`FsError`]: the path is not there or cannot be reached.
pub fn kind(path: &Path) -> Result<FsKind, FsError> {
    Ok(kind_of(&rustix::fs::statfs(path).map_err(|e| FsError::new("find the filesystem of", path, e))?))
}

/// What kind of filesystem this is.
pub(crate) fn kind_of(stat: &rustix::fs::StatFs) -> FsKind {
    // The type of f_type differs between architectures; the magic numbers are 32 bits wide on all of them.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "magic numbers are 32 bits")]
    let magic = stat.f_type as u32;
    match magic {
        0x0102_1994 => FsKind::Tmpfs,
        0x8584_58f6 => FsKind::Ramfs,
        0xef53 => FsKind::Ext,
        0x5846_5342 => FsKind::Xfs,
        0x9123_683e => FsKind::Btrfs,
        0x794c_7630 => FsKind::Overlay,
        0x6573_5546 => FsKind::Fuse,
        0x6969 => FsKind::Nfs,
        other => FsKind::Other(other.into()),
    }
}

/// Whether `path` is on the cgroup v2 filesystem.
pub(crate) fn is_cgroup2(path: &Path) -> bool {
    matches!(kind(path), Ok(FsKind::Other(0x6367_7270)))
}

/// How many bytes this process may still write to the filesystem of `path`.
///
/// # Errors
/// [`FsError`]: the path is not there or cannot be reached.
pub fn available_bytes(path: &Path) -> Result<u64, FsError> {
    let stat = rustix::fs::statvfs(path).map_err(|e| FsError::new("find the free space of", path, e))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether something is mounted exactly on `path`; a path that is not there has nothing mounted on it.
///
/// # Errors
/// [`FsError`]: the path cannot be reached, or the kernel is older than 5.8 and does not say.
pub fn is_mount_point(path: &Path) -> Result<bool, FsError> {
    let action = "find out what is mounted on";
    let stat = match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Ok(false),
        Err(error) => return Err(FsError::new(action, path, error)),
    };
    if !stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(FsError::new(action, path, rustix::io::Errno::NOSYS));
    }
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// What is mounted somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// On which directory.
    pub target: PathBuf,
    /// The filesystem's type, as in `erofs` or `fuse.nacre`.
    pub kind: String,
    /// What it says it was made of.
    pub source: PathBuf,
}

/// What this process sees mounted, in the order in which it was (`/proc/self/mountinfo`, proc(5)).
///
/// # Errors
/// /proc is missing.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(mount_entry).collect())
}

fn mount_entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let target = fields.nth(4)?;
    fields.find(|field| *field == b"-")?;
    let (kind, source) = (fields.next()?, fields.next()?);
    let path = |field| PathBuf::from(OsString::from_vec(unescaped(field)));
    Some(MountEntry { target: path(target), kind: String::from_utf8_lossy(kind).into(), source: path(source) })
}

/// The kernel writes what would end a field as `\` and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((first, after)) = rest.split_first() {
        let digits = after.first_chunk::<3>().filter(|_| *first == b'\\');
        let value = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(value.unwrap_or(*first));
        rest = if value.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    bytes
}

/// Takes what is mounted on `path` out of the tree. Processes that have files of it open keep them; nobody gets new ones.
///
/// # Errors
/// [`FsError`]: nothing is mounted there, or this process may not unmount it.
pub fn unmount(path: &Path) -> Result<(), FsError> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|e| FsError::new("unmount", path, e))
}

/// Writes everything of the filesystem that `directory` lies on to its device: when this returns, all that was written before is
/// durable.
///
/// # Errors
/// [`FsError`]: the directory cannot be opened, or the device failed.
pub fn sync(directory: &Path) -> Result<(), FsError> {
    let fd = open_directory(directory)?;
    rustix::fs::syncfs(fd).map_err(|e| FsError::new("write back the filesystem of", directory, e))
}

pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd, FsError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| FsError::new("open directory", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_a_mount_point_and_its_files_are_not() {
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/version")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/no such thing")).unwrap());
    }

    #[test]
    fn mounts_are_told_whatever_their_names_are() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.target == Path::new("/proc") && mount.kind == "proc"), "{mounts:?}");
        let line = br"36 35 0:98 / /a\040b\134c rw,noatime shared:1 master:2 - fuse.nacre /store\012/x rw,user_id=0";
        let entry = mount_entry(line).unwrap();
        assert_eq!((entry.target.to_str(), entry.kind.as_str()), (Some(r"/a b\c"), "fuse.nacre"));
        assert_eq!(entry.source, Path::new("/store\n/x"));
        assert_eq!(unescaped(br"\9\04"), br"\9\04");
        for broken in ["", "36 35 0:98 / /x rw", "36 35 0:98 / /x rw - erofs"] {
            assert_eq!(mount_entry(broken.as_bytes()), None);
        }
    }

    #[test]
    fn kinds_and_space_are_told() {
        assert_eq!(kind(Path::new("/proc")).unwrap(), FsKind::Other(0x9fa0));
        assert!(available_bytes(Path::new("/")).unwrap() > 0);
        assert!(kind(Path::new("/no such thing")).unwrap_err().to_string().contains("/no such thing"));
    }

    #[test]
    fn sync_needs_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        sync(dir.path()).unwrap();
        assert!(sync(&dir.path().join("absent")).is_err());
    }
}

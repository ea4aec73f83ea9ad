//! EROFS mounts of files: a metadata file has the names, and data devices, which may be files as well, have the content.
//!
//! Files as they are, without loop devices, take Linux 6.12 with `CONFIG_EROFS_FS_BACKED_BY_FILE`, and a filesystem below whose files the
//! kernel reads by pages: not tmpfs. So [`support`] tries it in the directory where the files are to be. FUSE files will do.
//!
//! Mounted by the mount API of Linux 5.2 and not by `mount(2)`: a path is a value of its own there, so that a comma in it means nothing, and
//! the kernel says what it does not like.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros as _, Immutable, IntoBytes, KnownLayout};

use crate::fs::FsKind;
use crate::overlay::{kernel_log, kernel_release};

/// The longest value of a mount option, without its end.
const LONGEST_VALUE: usize = 255;

/// Why EROFS cannot be had, or was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The kernel has none.
    #[error("the kernel ({kernel}) has no EROFS: CONFIG_EROFS_FS, or the module 'erofs', is missing")]
    Absent {
        /// Its release.
        kernel: String,
    },
    /// The kernel mounts block devices only.
    #[error(
        "the kernel ({kernel}) mounts EROFS from block devices only: files take Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE"
    )]
    NoFiles {
        /// Its release.
        kernel: String,
    },
    /// The files lie where the kernel cannot use them.
    #[error("the kernel cannot mount EROFS from {}, since it lies on {kind}; a disk's filesystem will do", file.display())]
    Filesystem {
        /// The metadata.
        file: PathBuf,
        /// What it lies on.
        kind: FsKind,
    },
    /// A file cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which one.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("cannot mount EROFS {} on {} ({step}; kernel {kernel}{said}): {hint}", metadata.display(), target.display())]
    Mount {
        /// The metadata.
        metadata: PathBuf,
        /// Where.
        target: PathBuf,
        /// At which step.
        step: &'static str,
        /// The kernel's release.
        kernel: String,
        /// What the kernel's log of the mount says, after `: `, or nothing.
        said: String,
        /// What is likely missing.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// How EROFS is mounted; always read-only.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Set-user-ID bits do not count.
    pub nosuid: bool,
    /// Device files cannot be used.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// The files are read past the kernel's cache of them, so that what is cached is so once: Linux 6.15.
    pub direct_io: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { nosuid: false, nodev: true, noexec: false, direct_io: false }
    }
}

/// Mounts a metadata file on a directory. The data devices are in the order in which the metadata numbers them.
///
/// # Errors
/// [`ErofsError`]; nothing is mounted then.
pub fn mount(metadata: &Path, devices: &[&Path], target: &Path, options: &Options) -> Result<(), ErofsError> {
    let mount = detached(metadata, devices, options).map_err(|refusal| refusal.into_error(metadata, target))?;
    rustix::mount::move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|source| Refusal::new("move_mount", String::new(), source).into_error(metadata, target))
}

/// Whether EROFS can be mounted from files that lie in `directory`: tries it, with a small file that is removed again.
///
/// # Errors
/// [`ErofsError`] says what is missing.
pub fn support(directory: &Path) -> Result<(), ErofsError> {
    let path = directory.join(format!(".erofs-probe-{}-{:?}", std::process::id(), std::thread::current().id()));
    let failed = |source| ErofsError::File { action: "write", path: path.clone(), source };
    let written = fs::File::create_new(&path).and_then(|mut file| file.write_all(&empty_filesystem()));
    let result = written.map_err(failed).and_then(|()| {
        detached(&path, &[], &Options::default()).map(drop).map_err(|refusal| refusal.into_error(&path, directory))
    });
    let _ = fs::remove_file(&path);
    result
}

/// What the kernel did not want.
struct Refusal {
    step: &'static str,
    said: String,
    source: Errno,
}

impl Refusal {
    fn new(step: &'static str, said: String, source: Errno) -> Self {
        Self { step, said, source }
    }

    fn into_error(self, metadata: &Path, target: &Path) -> ErofsError {
        let Self { step, said, source } = self;
        let kernel = kernel_release();
        let hint = match source {
            Errno::NODEV if step == "fsopen" => return ErofsError::Absent { kernel },
            Errno::NOTBLK => {
                return match crate::fs::kind(metadata) {
                    // These have files whose pages the kernel cannot ask for.
                    Ok(kind @ (FsKind::Tmpfs | FsKind::Ramfs | FsKind::Overlay)) => {
                        ErofsError::Filesystem { file: metadata.to_owned(), kind }
                    }
                    _ => ErofsError::NoFiles { kernel },
                };
            }
            Errno::PERM | Errno::ACCESS => "CAP_SYS_ADMIN is needed",
            Errno::NOENT | Errno::NOTDIR => "a file of it, or the directory to mount on, is not there",
            Errno::INVAL if step == "directio" => "direct I/O takes Linux 6.15",
            Errno::INVAL => "the metadata is damaged, names other devices, or lies on a filesystem that will not do",
            _ => "the kernel refused it",
        };
        ErofsError::Mount {
            metadata: metadata.to_owned(),
            target: target.to_owned(),
            step,
            kernel,
            said,
            hint,
            source: source.into(),
        }
    }
}

/// A mount that is nowhere in the tree yet.
fn detached(metadata: &Path, devices: &[&Path], options: &Options) -> Result<OwnedFd, Refusal> {
    let fs = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|source| Refusal::new("fsopen", String::new(), source))?;
    let refused = |step| {
        let fs = &fs;
        move |source| Refusal::new(step, kernel_log(fs), source)
    };
    let mut long = Vec::new();
    let source = value(metadata, &mut long).map_err(refused("open the metadata"))?;
    rustix::mount::fsconfig_set_string(&fs, "source", source).map_err(refused("source"))?;
    for device in devices {
        let device = value(device, &mut long).map_err(refused("open a data device"))?;
        rustix::mount::fsconfig_set_string(&fs, "device", device).map_err(refused("device"))?;
    }
    if options.direct_io {
        rustix::mount::fsconfig_set_flag(&fs, "directio").map_err(refused("directio"))?;
    }
    rustix::mount::fsconfig_set_flag(&fs, "ro").map_err(refused("ro"))?;
    rustix::mount::fsconfig_create(&fs).map_err(refused("create"))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, options.nosuid);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, options.nodev);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, options.noexec);
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(refused("fsmount"))
}

/// A path as a mount option's value: itself, so that a list of mounts tells something, or that of a descriptor, where it is too long.
fn value(path: &Path, long: &mut Vec<OwnedFd>) -> Result<PathBuf, Errno> {
    let path = std::path::absolute(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL))?;
    if path.as_os_str().as_bytes().len() <= LONGEST_VALUE {
        return Ok(path);
    }
    let fd = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    long.push(fd);
    Ok(path)
}

/// The superblock, at byte 1024.
#[derive(IntoBytes, Immutable, KnownLayout, zerocopy::FromZeros)]
#[repr(C)]
struct Superblock {
    magic: U32,
    checksum: U32,
    compatible: U32,
    block_bits: u8,
    extra_slots: u8,
    root: U16,
    inodes: U64,
    epoch: U64,
    epoch_nanos: U32,
    blocks: U32,
    metadata_block: U32,
    xattr_block: U32,
    rest: [u8; 80],
}
const _: () = assert!(size_of::<Superblock>() == 128);

/// An inode in its short form.
#[derive(IntoBytes, Immutable, KnownLayout, zerocopy::FromZeros)]
#[repr(C)]
struct ShortInode {
    format: U16,
    xattrs: U16,
    mode: U16,
    links: U16,
    size: U32,
    reserved: U32,
    block: U32,
    number: U32,
    uid: U16,
    gid: U16,
    reserved2: U32,
}
const _: () = assert!(size_of::<ShortInode>() == 32);

/// An entry of a directory.
#[derive(IntoBytes, Immutable, KnownLayout, zerocopy::FromZeros)]
#[repr(C)]
struct Entry {
    inode: U64,
    name: U16,
    kind: u8,
    reserved: u8,
}
const _: () = assert!(size_of::<Entry>() == 12);

/// One block: a root directory with nothing in it.
fn empty_filesystem() -> Vec<u8> {
    const BLOCK: usize = 4096;
    const ROOT: u16 = 36; // in units of 32 bytes: behind the superblock
    const DIRECTORY: u8 = 2;
    let superblock = Superblock {
        magic: U32::new(0xe0f5_e1e2),
        block_bits: 12,
        root: U16::new(ROOT),
        inodes: U64::new(1),
        blocks: U32::new(1),
        ..Superblock::new_zeroed()
    };
    let names = b"...";
    let entries = [(24, 0), (25, 0)].map(|(name, reserved)| Entry {
        inode: U64::new(ROOT.into()),
        name: U16::new(name),
        kind: DIRECTORY,
        reserved,
    });
    let inode = ShortInode {
        format: U16::new(2 << 1), // the data follow the inode
        mode: U16::new(0o40_755),
        links: U16::new(2),
        size: U32::new(27),
        ..ShortInode::new_zeroed()
    };
    let mut image = vec![0; 1024];
    for part in [superblock.as_bytes(), inode.as_bytes(), entries.as_bytes(), names] {
        image.extend_from_slice(part);
    }
    image.resize(BLOCK, 0);
    image
}

//! Overlay mounts: layers, the bottom one first, become one tree, writable or not.
//!
//! Two ways to mount, chosen by trying:
//! - the mount API of Linux 5.2 with `lowerdir+` of Linux 6.8: a layer at a time, so no limit but the kernel's 500 of one mount;
//! - `mount(2)` on older kernels: the layers in one page of options.
//!
//! Where there are more layers than one mount takes, the bottom ones become a read-only overlay of their own, which is the lowest
//! layer of the other. Only the bottom ones can: a mount resolves its own whiteouts, so that a whiteout in a mount that lies above
//! something would no longer hide it. The kernel stacks overlays two deep, hence [`MAX_LAYERS`].
//!
//! Layers are named to the kernel as `/proc/self/fd/N` of a directory that was opened: names of any length and with any character
//! are meant exactly, where `:`, `,` and `\` would otherwise be syntax, and no link in the last component is followed.
//!
//! Layers come from images, so `redirect_dir` and `metacopy` are off: no attribute of a layer's file makes the kernel show another.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags};

/// The most layers of one mount, by the kernel (`OVL_MAX_STACK`).
const STACK_LIMIT: usize = 500;
/// The most layers of one `mount(2)`: its options have a page, each layer takes up to `/proc/self/fd/1234:` of it, and the rest
/// is for the other options.
const CLASSIC_LIMIT: usize = 200;
/// The most layers that can be mounted: [`STACK_LIMIT`] in the nested overlay, which is one of [`STACK_LIMIT`] in the other.
pub const MAX_LAYERS: usize = 2 * STACK_LIMIT - 1;

/// Why layers were not mounted.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// There is nothing to mount, or too little for a read-only mount.
    #[error(
        "an overlay needs at least {needed} lower layer(s), but {found} were given; add an empty directory at the bottom"
    )]
    TooFew {
        /// How many the kernel wants.
        needed: usize,
        /// How many there are.
        found: usize,
    },
    /// The kernel stacks no more.
    #[error(
        "{found} layers cannot be mounted: this kernel ({kernel}) stacks at most {limit}; rebuild the image with fewer layers"
    )]
    TooMany {
        /// How many there are.
        found: usize,
        /// How many would work.
        limit: usize,
        /// The kernel's release.
        kernel: String,
    },
    /// A directory of the mount cannot be opened.
    #[error("cannot open {role} {}", path.display())]
    Open {
        /// What it is to the mount.
        role: &'static str,
        /// Which directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("cannot mount an overlay of {layers} layers on {} ({step}; kernel {kernel}{said}): {hint}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// Of how many layers.
        layers: usize,
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

/// Which way to mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Try `lowerdir+`, and `mount(2)` where the kernel does not know it.
    #[default]
    Probe,
    /// `mount(2)` only: what kernels before 6.8 get.
    Classic,
}

/// The writable part of an overlay.
#[derive(Clone, Copy, Debug)]
pub struct Writable<'a> {
    /// Gets what is written. Its mode and owner are those of the mounted tree's root.
    pub upper: &'a Path,
    /// The kernel's scratch directory: empty, and on the filesystem of `upper`.
    pub work: &'a Path,
}

/// What to mount where.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// The layers, the bottom one first.
    pub lower: &'a [PathBuf],
    /// None: the mount is read-only.
    pub writable: Option<Writable<'a>>,
    /// The directory to mount on.
    pub target: &'a Path,
    /// An empty directory, where the nested overlay is mounted for a moment if one is needed.
    pub scratch: &'a Path,
    /// Whiteouts and opaque marks are in `user.overlay.*` attributes: for mounts in a user namespace, which sees no `trusted.*`.
    pub user_xattr: bool,
    /// How to mount.
    pub method: Method,
}

impl Overlay<'_> {
    /// Mounts the layers. Device files in them cannot be used (`nodev`): a container has its own `/dev`.
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left mounted then.
    pub fn mount(&self) -> Result<(), OverlayError> {
        let needed = if self.writable.is_some() { 1 } else { 2 };
        if self.lower.len() < needed {
            return Err(OverlayError::TooFew { needed, found: self.lower.len() });
        }
        if self.method == Method::Probe {
            match self.stacked(STACK_LIMIT, mount_new) {
                Err(Refusal::Unsupported) => tracing::debug!("this kernel has no lowerdir+; using mount(2)"),
                result => return result.map_err(Refusal::into_error),
            }
        }
        self.stacked(CLASSIC_LIMIT, mount_classic).map_err(Refusal::into_error)
    }

    fn stacked(&self, limit: usize, mount: MountFn) -> Result<(), Refusal> {
        if self.lower.len() <= limit {
            return mount(self, self.lower);
        }
        // The outer mount takes limit - 1 layers besides the nested one, which needs two itself, being read-only.
        let (bottom, top) = self.lower.split_at((self.lower.len() - (limit - 1)).max(2));
        if bottom.len() > limit {
            let error =
                OverlayError::TooMany { found: self.lower.len(), limit: 2 * limit - 1, kernel: kernel_release() };
            return Err(Refusal::Error(error));
        }
        self.nested(bottom, top, mount)
    }

    fn nested(&self, bottom: &[PathBuf], top: &[PathBuf], mount: MountFn) -> Result<(), Refusal> {
        let inner = Self { writable: None, target: self.scratch, ..*self };
        mount(&inner, bottom)?;
        let mut layers = Vec::with_capacity(top.len() + 1);
        layers.push(self.scratch.to_owned());
        layers.extend_from_slice(top);
        let result = mount(self, &layers);
        // The outer mount holds the inner one; nobody needs to see it.
        if let Err(error) = crate::fs::unmount(self.scratch) {
            tracing::warn!(%error, "a nested overlay stays mounted");
        }
        result
    }

    fn refused(&self, layers: usize, step: &'static str, said: String, source: Errno) -> Refusal {
        let hint = match source {
            Errno::PERM | Errno::ACCESS => "CAP_SYS_ADMIN is needed, or a user namespace on Linux 5.11 or later",
            Errno::NODEV => "the kernel has no overlay filesystem (CONFIG_OVERLAY_FS, module 'overlay')",
            Errno::INVAL => {
                "the filesystem of the directories may not do as a layer (another overlay two deep, or no xattrs \
                 and d_type in the writable one)"
            }
            Errno::LOOP => "a directory is used twice: as a layer, the writable directory or the work directory",
            Errno::BUSY => "the writable directory is in use by another mount",
            Errno::NOSPC | Errno::NOMEM | Errno::MFILE => "a limit of the machine was reached",
            _ => "the kernel refused it",
        };
        Refusal::Error(OverlayError::Mount {
            target: self.target.to_owned(),
            layers,
            step,
            kernel: kernel_release(),
            said,
            hint,
            source: source.into(),
        })
    }

    /// The options besides the directories, those without a value having none.
    fn options(&self) -> Vec<(&'static str, Option<&'static str>)> {
        let mut options = vec![("redirect_dir", Some("nofollow")), ("metacopy", Some("off"))];
        if self.writable.is_some() {
            options.push(("index", Some("off")));
        }
        // One inode number space for all layers, where their filesystems leave room in the number.
        options.push(("xino", Some("auto")));
        if self.user_xattr {
            options.push(("userxattr", None));
        }
        options
    }
}

type MountFn = fn(&Overlay<'_>, &[PathBuf]) -> Result<(), Refusal>;

enum Refusal {
    /// The kernel does not know this way of mounting.
    Unsupported,
    Error(OverlayError),
}

impl Refusal {
    fn into_error(self) -> OverlayError {
        match self {
            Self::Error(error) => error,
            // Only the new way reports it, and its caller falls back.
            Self::Unsupported => unreachable!("mount(2) is always there"),
        }
    }
}

impl From<OverlayError> for Refusal {
    fn from(error: OverlayError) -> Self {
        Self::Error(error)
    }
}

fn mount_new(overlay: &Overlay<'_>, lower: &[PathBuf]) -> Result<(), Refusal> {
    // Containers' seccomp filters answer EPERM to calls that they do not know.
    let fs = match rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(fs) => fs,
        Err(Errno::NOSYS | Errno::PERM) => return Err(Refusal::Unsupported),
        Err(error) => return Err(overlay.refused(lower.len(), "fsopen", String::new(), error)),
    };
    let refused = |step, error| overlay.refused(lower.len(), step, kernel_log(&fs), error);
    // The kernel takes the top layer first.
    for (number, path) in lower.iter().rev().enumerate() {
        let directory = open(path, "layer")?;
        match rustix::mount::fsconfig_set_string(&fs, "lowerdir+", proc_path(&directory)) {
            Err(Errno::INVAL) if number == 0 => return Err(Refusal::Unsupported),
            result => result.map_err(|e| refused("lowerdir+", e))?,
        }
    }
    if let Some(writable) = &overlay.writable {
        let upper = open(writable.upper, "writable directory")?;
        let work = open(writable.work, "work directory")?;
        let set = |key, fd| rustix::mount::fsconfig_set_string(&fs, key, proc_path(fd)).map_err(|e| refused(key, e));
        set("upperdir", &upper)?;
        set("workdir", &work)?;
    }
    for (key, value) in overlay.options() {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(&fs, key, value),
            None => rustix::mount::fsconfig_set_flag(&fs, key),
        }
        .map_err(|e| refused(key, e))?;
    }
    rustix::mount::fsconfig_create(&fs).map_err(|e| refused("create", e))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    if overlay.writable.is_none() {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount =
        rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|e| refused("fsmount", e))?;
    rustix::mount::move_mount(&mount, "", CWD, overlay.target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| refused("move_mount", e))
}

fn mount_classic(overlay: &Overlay<'_>, lower: &[PathBuf]) -> Result<(), Refusal> {
    let mut directories = Vec::with_capacity(lower.len());
    for path in lower.iter().rev() {
        directories.push(open(path, "layer")?);
    }
    let names: Vec<String> = directories.iter().map(proc_path).collect();
    let mut options = format!("lowerdir={}", names.join(":"));
    if let Some(writable) = &overlay.writable {
        let upper = open(writable.upper, "writable directory")?;
        let work = open(writable.work, "work directory")?;
        options.push_str(&format!(",upperdir={},workdir={}", proc_path(&upper), proc_path(&work)));
        directories.extend([upper, work]);
    }
    for (key, value) in overlay.options() {
        options.push(',');
        options.push_str(key);
        if let Some(value) = value {
            options.push('=');
            options.push_str(value);
        }
    }
    let refused = |error| overlay.refused(lower.len(), "mount", String::new(), error);
    let options = CString::new(options).map_err(|_| refused(Errno::INVAL))?;
    let mut flags = MountFlags::NODEV;
    if overlay.writable.is_none() {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount("overlay", overlay.target, "overlay", flags, options.as_c_str()).map_err(refused)
}

fn open(path: &Path, role: &'static str) -> Result<OwnedFd, OverlayError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| OverlayError::Open {
        role,
        path: path.to_owned(),
        source: e.into(),
    })
}

fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What the kernel wrote about a mount that it refused: a line a read, `e overlay: …`.
pub(crate) fn kernel_log(fs: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0; 512];
    for _ in 0..8 {
        match rustix::io::read(fs, &mut line) {
            Ok(length) if length > 0 => {
                let line = String::from_utf8_lossy(line.get(..length).unwrap_or_default());
                text.push_str(": ");
                text.push_str(line.trim_start_matches(['e', 'w', 'i', ' ']).trim_end());
            }
            _ => break,
        }
    }
    text
}

pub(crate) fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

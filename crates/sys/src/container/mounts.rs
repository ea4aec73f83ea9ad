//! The mounts of a container: below its root filesystem, before the root changes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::beneath::Root;
use crate::spec::{Mount, Spec};

/// The devices that every container has: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// The links in `/dev` that every container has.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A step that failed, and on what.
#[derive(Debug, thiserror::Error)]
#[error("{what} {target}: {source}")]
pub(crate) struct StepError {
    pub(crate) what: &'static str,
    pub(crate) target: String,
    pub(crate) source: io::Error,
}

pub(crate) fn step(what: &'static str, target: impl AsRef<Path>) -> impl FnOnce(io::Error) -> StepError {
    let target = target.as_ref().display().to_string();
    move |source| StepError { what, target, source }
}

/// Mounts everything below `rootfs`, which must be a mount point of its own, in a mount namespace of its own.
pub(crate) fn build(spec: &Spec, rootfs: &Path) -> Result<(), StepError> {
    let root = Root::open(rootfs).map_err(step("open", rootfs))?;
    for mount in &spec.mounts {
        mount_one(&root, mount).map_err(step("mount", &mount.destination))?;
        if mount.destination == "/dev" {
            make_devices(&root).map_err(step("make devices in", "/dev"))?;
        }
    }
    root.make_directories(Path::new(&spec.process.cwd), Mode::from_raw_mode(0o755))
        .map_err(step("make working directory", &spec.process.cwd))?;
    for path in &spec.linux.readonly_paths {
        make_readonly(&root, path).map_err(step("make read-only", path))?;
    }
    for path in &spec.linux.masked_paths {
        mask(&root, path).map_err(step("mask", path))?;
    }
    if spec.root.readonly {
        remount(
            &proc_path(&root.open_at(Path::new("/"), OFlags::PATH).map_err(step("open", rootfs))?),
            MountFlags::RDONLY,
        )
        .map_err(step("make read-only", rootfs))?;
    }
    Ok(())
}

fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// What `mount -o` options mean.
struct Options {
    flags: MountFlags,
    bind: bool,
    recursive: bool,
    data: String,
}

fn parse_options(options: &[String]) -> Options {
    let mut parsed = Options { flags: MountFlags::empty(), bind: false, recursive: false, data: String::new() };
    for option in options {
        let (flag, on) = match option.as_str() {
            "bind" => {
                parsed.bind = true;
                continue;
            }
            "rbind" => {
                (parsed.bind, parsed.recursive) = (true, true);
                continue;
            }
            // Everything is private here; and what is the default needs nothing.
            "private" | "rprivate" | "slave" | "rslave" | "defaults" => continue,
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "noatime" => (MountFlags::NOATIME, true),
            "relatime" => (MountFlags::RELATIME, true),
            "strictatime" => (MountFlags::STRICTATIME, true),
            data => {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(data);
                continue;
            }
        };
        parsed.flags.set(flag, on);
    }
    parsed
}

fn mount_one(root: &Root, mount: &Mount) -> io::Result<()> {
    let options = parse_options(&mount.options);
    let destination = Path::new(&mount.destination);
    let source = mount.source.as_deref().unwrap_or("none");
    let directory = |mode| root.make_directories(destination, Mode::from_raw_mode(mode));
    if !options.bind {
        let kind = mount.kind.as_deref().ok_or(Errno::INVAL)?;
        let data = CString::new(options.data)?;
        let target = directory(0o755)?;
        return Ok(rustix::mount::mount(source, proc_path(&target), kind, options.flags, data.as_c_str())?);
    }
    if !options.data.is_empty() {
        return Err(io::Error::other(format!("option '{}' has no meaning for a bind mount", options.data)));
    }
    let target = if Path::new(source).is_dir() { directory(0o755)? } else { root.make_file(destination)? };
    if options.recursive {
        rustix::mount::mount_bind_recursive(source, proc_path(&target))?;
    } else {
        rustix::mount::mount_bind(source, proc_path(&target))?;
    }
    let mounted = root.open_at(destination, OFlags::PATH)?;
    remount(&proc_path(&mounted), options.flags)
}

/// Adds flags to the mount on `path`. Those in force stay: a user namespace may not take them away.
fn remount(path: &str, flags: MountFlags) -> io::Result<()> {
    let flags = MountFlags::BIND | flags | flags_in_force(Path::new(path))?;
    Ok(rustix::mount::mount_remount(path, flags, "")?)
}

pub(super) fn flags_in_force(path: &Path) -> io::Result<MountFlags> {
    let found = rustix::fs::statvfs(path)?.f_flag;
    let known = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    Ok(known
        .into_iter()
        .filter(|(flag, _)| found.contains(*flag))
        .fold(MountFlags::empty(), |all, (_, flag)| all | flag))
}

fn make_devices(root: &Root) -> io::Result<()> {
    let dev = root.open_at(Path::new("/dev"), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let old = rustix::process::umask(Mode::empty());
    let made: io::Result<()> = DEVICES.iter().try_for_each(|(name, major, minor)| {
        let number = rustix::fs::makedev(*major, *minor);
        match rustix::fs::mknodat(&dev, *name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), number) {
            // A user namespace may not make devices, but bind the machine's.
            Err(Errno::PERM) => {
                let path = Path::new("/dev").join(name);
                let target = root.make_file(&path)?;
                Ok(rustix::mount::mount_bind(path.as_path(), proc_path(&target))?)
            }
            result => Ok(result?),
        }
    });
    rustix::process::umask(old);
    made?;
    LINKS.iter().try_for_each(|(name, to)| match rustix::fs::symlinkat(*to, &dev, *name) {
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    })
}

fn make_readonly(root: &Root, path: &str) -> io::Result<()> {
    let Some(target) = open_if_there(root, path)? else { return Ok(()) };
    rustix::mount::mount_bind_recursive(proc_path(&target), proc_path(&target))?;
    let mounted = root.open_at(Path::new(path), OFlags::PATH)?;
    remount(&proc_path(&mounted), MountFlags::RDONLY)
}

fn mask(root: &Root, path: &str) -> io::Result<()> {
    let Some(target) = open_if_there(root, path)? else { return Ok(()) };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode);
    if kind == FileType::Directory {
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        return Ok(rustix::mount::mount("tmpfs", proc_path(&target), "tmpfs", flags, None)?);
    }
    Ok(rustix::mount::mount_bind("/dev/null", proc_path(&target))?)
}

/// What a kernel does not have needs no mask.
fn open_if_there(root: &Root, path: &str) -> io::Result<Option<OwnedFd>> {
    match root.open_at(Path::new(path), OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes `rootfs` the root of this mount namespace and forgets the old one.
pub(crate) fn pivot(rootfs: &Path) -> io::Result<()> {
    let old = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::process::chdir(rootfs)?;
    // The old root ends up on top of the new one, at the same place.
    rustix::process::pivot_root(".", ".")?;
    rustix::process::fchdir(&old)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

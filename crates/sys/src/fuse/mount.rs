//! The mount and the handshake that begins the connection.

use std::ffi::CString;
use std::fs;
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use zerocopy::IntoBytes as _;

use super::FuseError;
use super::device::{Device, REQUEST_BUFFER};
use super::handover::Parameters;
use super::request::{Operation, Request};
use super::wire::{self, InitIn, InitOut};

/// Reads of so many pages, 1 MiB.
const MAX_PAGES: u16 = 256;
/// Read-ahead and other requests that nobody waits for, at once; beyond the second number the kernel calls it a jam.
const MAX_BACKGROUND: u16 = 64;
const CONGESTED: u16 = 48;
/// The least that the kernel takes; nothing is written.
const MAX_WRITE: u32 = 4096;
/// How long the kernel may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is asked for where the kernel has it.
const WANTED: u64 = wire::ASYNC_READ
    | wire::ASYNC_DIO
    | wire::DO_READDIRPLUS
    | wire::READDIRPLUS_AUTO
    | wire::NO_OPEN_SUPPORT
    | wire::NO_OPENDIR_SUPPORT
    | wire::PARALLEL_DIROPS
    | wire::MAX_PAGES
    | wire::CACHE_SYMLINKS
    | wire::INIT_EXT
    | wire::DIRECT_IO_ALLOW_MMAP
    | wire::HAS_RESEND;

/// How a filesystem is mounted and served.
#[derive(Clone, Debug)]
pub struct Options {
    /// What `mount` and `df` show as its source.
    pub name: String,
    /// What they show after `fuse.`: a word, without dots.
    pub subtype: String,
    /// Others than the mounting user may use it.
    pub allow_other: bool,
    /// The kernel checks permission bits.
    pub default_permissions: bool,
    /// Set-user-ID bits do not count.
    pub nosuid: bool,
    /// Device files cannot be used.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// How far the kernel reads ahead, in bytes; 1 MiB at most.
    pub readahead: u32,
    /// How many threads serve it; so many reads may wait for something at once.
    pub threads: NonZeroUsize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "nacre".to_owned(),
            subtype: "nacre".to_owned(),
            allow_other: true,
            default_permissions: true,
            nosuid: true,
            nodev: true,
            noexec: false,
            readahead: 1 << 20,
            threads: NonZeroUsize::MIN.saturating_add(3),
        }
    }
}

/// Mounts a filesystem and agrees with the kernel on how to speak.
pub(super) fn mount(target: &Path, options: &Options) -> Result<(Device, Parameters), FuseError> {
    let device = Device::open().map_err(|source| FuseError::Open {
        hint: match source {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                "the kernel has no FUSE (CONFIG_FUSE_FS, module 'fuse'), or this /dev has no such device"
            }
            Errno::ACCESS | Errno::PERM => "this process may not, by the device's mode or by its device cgroup",
            _ => "it cannot be had",
        },
        source: source.into(),
    })?;
    attach(&device, target, options).map_err(|source| FuseError::Mount {
        target: target.to_owned(),
        hint: match source {
            Errno::PERM | Errno::ACCESS => "CAP_SYS_ADMIN is needed",
            Errno::NOENT | Errno::NOTDIR => "the target has to be a directory",
            Errno::NODEV => "the kernel has no FUSE (CONFIG_FUSE_FS, module 'fuse')",
            _ => "the kernel refused it",
        },
        source: source.into(),
    })?;
    let agreed = handshake(&device, target, options);
    if agreed.is_err()
        && let Err(error) = crate::fs::unmount(target)
    {
        tracing::warn!(%error, "a FUSE filesystem that was not begun stays mounted");
    }
    Ok((device, agreed?))
}

fn attach(device: &Device, target: &Path, options: &Options) -> Result<(), Errno> {
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_fd().as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw()
    );
    let mut flags = MountFlags::RDONLY | MountFlags::NOATIME;
    for (wanted, option) in
        [(options.allow_other, ",allow_other"), (options.default_permissions, ",default_permissions")]
    {
        data.push_str(if wanted { option } else { "" });
    }
    flags.set(MountFlags::NOSUID, options.nosuid);
    flags.set(MountFlags::NODEV, options.nodev);
    flags.set(MountFlags::NOEXEC, options.noexec);
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(options.name.as_str(), target, format!("fuse.{}", options.subtype), flags, data.as_c_str())
}

/// Answers INIT. A kernel of another major version would ask again with ours; there is none.
fn handshake(device: &Device, target: &Path, options: &Options) -> Result<Parameters, FuseError> {
    let failed = |what: String| FuseError::Handshake { target: target.to_owned(), what };
    let mut buffer = vec![0; REQUEST_BUFFER];
    let length = first(device, &mut buffer).map_err(|error| failed(error.to_string()))?;
    let request =
        Request::parse(buffer.get(..length).unwrap_or_default()).map_err(|error| failed(error.to_string()))?;
    let unique = request.header.unique;
    let Operation::Init { init, flags2 } = request.operation else {
        device.refuse(unique, Errno::PROTO);
        return Err(failed(format!("its first request is {}, not INIT", request.header.opcode)));
    };
    if init.major != wire::MAJOR || init.minor < wire::OLDEST_MINOR {
        device.refuse(unique, Errno::PROTO);
        return Err(FuseError::Version { major: init.major, minor: init.minor });
    }
    let flags = (u64::from(init.flags) | (u64::from(flags2) << 32)) & WANTED;
    device.answer(unique, &[IoSlice::new(answer(init, flags, options).as_bytes())]);
    let found = rustix::fs::statx(CWD, target, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())
        .map_err(|error| failed(format!("the mount cannot be seen: {error}")))?;
    let number = (found.stx_dev_major, found.stx_dev_minor);
    read_ahead(number, options.readahead);
    Ok(Parameters::new(init.minor.min(wire::MINOR), flags, MAX_WRITE, MAX_PAGES, number, target))
}

#[expect(clippy::cast_possible_truncation, reason = "the flags are sent in two halves")]
fn answer(init: InitIn, flags: u64, options: &Options) -> InitOut {
    InitOut {
        major: wire::MAJOR,
        minor: init.minor.min(wire::MINOR),
        max_readahead: options.readahead.min(1 << 20),
        flags: flags as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTED,
        max_write: MAX_WRITE,
        time_granularity: 1,
        max_pages: MAX_PAGES,
        map_alignment: 0,
        flags2: (flags >> 32) as u32,
        max_stack_depth: 0,
        unused: [0; 6],
    }
}

fn first(device: &Device, buffer: &mut [u8]) -> Result<usize, Errno> {
    let end = Instant::now() + PATIENCE;
    loop {
        match device.read(buffer) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        let left = rustix::event::Timespec::try_from(left).ok();
        match rustix::event::poll(&mut [PollFd::new(device, PollFlags::IN)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The kernel takes no more from the handshake than the 128 KiB that it reads ahead of by itself; more is a setting of the mount.
fn read_ahead((major, minor): (u32, u32), bytes: u32) {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, (bytes.min(1 << 20) / 1024).to_string()) {
        tracing::debug!(%error, path, "the kernel reads ahead of a FUSE filesystem as far as it likes");
    }
}

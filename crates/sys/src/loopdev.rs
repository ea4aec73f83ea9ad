//! Loop devices: a file as a block device of the kernel.
//!
//! A device is configured by one call (`LOOP_CONFIGURE`, Linux 5.8), so that nobody sees it half set up. It is *not* marked to clear
//! itself on its last close: the descriptor that would have to keep it alive until then would be closed by the kernel when the
//! process that serves the file is killed, and the kernel would write what is dirty to a server that is gone but not yet known to
//! be: neither could end. So a killed server leaves its loop device, and [`of_file`] finds it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::ioctl::{self, IntegerSetter, Setter};

use crate::blockdev;

const CONTROL: &str = "/dev/loop-control";
const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_SET_CAPACITY: u32 = 0x4c07;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;

const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// How often another free device is asked for, when somebody else was faster each time.
const TRIES: u32 = 64;
/// How long a device may take to be gone: whoever has it open for a look (a device manager) closes it again.
const GONE: Duration = Duration::from_secs(5);

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

/// How a loop device is set up.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Its logical blocks, in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// It takes no writes.
    pub read_only: bool,
    /// What `losetup` shows as its file where it cannot know; cut at 63 bytes.
    pub label: &'a str,
}

/// A loop device in use.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

/// Whether this process may make loop devices.
///
/// # Errors
/// It may not, or the kernel has none; the text says which.
pub fn available() -> io::Result<()> {
    control().map(drop)
}

fn control() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "the kernel has no loop devices (modprobe loop)",
            io::ErrorKind::PermissionDenied => "making a block device needs root",
            _ => "loop devices cannot be had",
        };
        io::Error::new(error.kind(), format!("{CONTROL}: {hint}: {error}"))
    })
}

/// Makes `file` a loop device with direct I/O, so that nothing of it is in the page cache twice.
///
/// # Errors
/// The system's answer, with the device that it was about.
pub fn attach(file: &impl AsFd, options: Options<'_>) -> io::Result<LoopDevice> {
    let control = control()?;
    let mut last = io::Error::other("no loop device is free");
    for _ in 0..TRIES {
        let number = free(&control)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        blockdev::wait_for_node(&path, Duration::from_secs(2))?;
        let device = OpenOptions::new().read(true).write(!options.read_only).open(&path).map_err(|e| at(&path, e))?;
        match configure(&device, file, options) {
            Ok(()) => return Ok(LoopDevice { path }),
            // Somebody else took it between the two calls.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => last = at(&path, error),
            Err(error) => return Err(at(&path, error)),
        }
    }
    Err(last)
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn free(control: &File) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument, and its result is the number of a device.
    #[expect(unsafe_code, reason = "rustix knows no ioctl of loop devices")]
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE.into()) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

fn configure(device: &File, file: &impl AsFd, options: Options<'_>) -> io::Result<()> {
    let mut info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: DIRECT_IO | if options.read_only { READ_ONLY } else { 0 },
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    for (to, from) in info.file_name.iter_mut().take(63).zip(options.label.bytes()) {
        *to = from;
    }
    let fd = u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let config = Config { fd, block_size: options.block_size, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`, which `Config` is, field by field; the size was asserted.
    #[expect(unsafe_code, reason = "rustix knows no ioctl of loop devices")]
    unsafe {
        ioctl::ioctl(device, Setter::<{ LOOP_CONFIGURE as ioctl::Opcode }, Config>::new(config))?;
    }
    Ok(())
}

impl LoopDevice {
    /// Where it is: `/dev/loop3`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the kernel reads and writes the file directly, without a second copy in its page cache.
    pub fn is_direct(&self) -> bool {
        fs::read_to_string(self.system().join("dio")).is_ok_and(|text| text.trim() == "1")
    }

    /// Writes out what the kernel holds of the device and takes it from its file.
    ///
    /// # Errors
    /// [`blockdev::InUse`], then nothing was done; or it could not be written out, then it is detached nevertheless; or somebody has
    /// it open and it goes when they close it.
    pub fn detach(&self) -> io::Result<()> {
        let device = blockdev::claim(&self.path)?;
        let written = device.sync_all();
        // SAFETY: LOOP_CLR_FD takes no argument.
        #[expect(unsafe_code, reason = "rustix knows no ioctl of loop devices")]
        let cleared = unsafe { ioctl::ioctl(&device, IntegerSetter::<{ LOOP_CLR_FD as ioctl::Opcode }>::new_usize(0)) };
        drop(device);
        match cleared {
            // It is nobody's any more: somebody else has detached it.
            Ok(()) | Err(rustix::io::Errno::NXIO) => {}
            Err(error) => return Err(at(&self.path, error.into())),
        }
        let backing = self.system().join("backing_file");
        blockdev::wait_until(GONE, || !backing.exists()).map_err(|_| {
            let text = format!("{} is open in another process; it goes when that closes it", self.path.display());
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        })?;
        written.map_err(|error| at(&self.path, error))
    }

    /// Makes the device as large as its file is by now, as far as the kernel knows that.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn follow_size(&self) -> io::Result<()> {
        let device = File::open(&self.path).map_err(|error| at(&self.path, error))?;
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        #[expect(unsafe_code, reason = "rustix knows no ioctl of loop devices")]
        let followed =
            unsafe { ioctl::ioctl(&device, IntegerSetter::<{ LOOP_SET_CAPACITY as ioctl::Opcode }>::new_usize(0)) };
        followed.map_err(|error| at(&self.path, error.into()))
    }

    fn system(&self) -> PathBuf {
        Path::new("/sys/class/block").join(self.path.file_name().unwrap_or_default()).join("loop")
    }
}

/// The loop devices whose file has this path, as the kernel knows it. It is not asked for: it may be on a filesystem whose server is dead.
pub fn of_file(path: &Path) -> Vec<LoopDevice> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|text| Path::new(text.trim_end_matches('\n')) == path) {
            found.push(LoopDevice { path: Path::new("/dev").join(entry.file_name()) });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_becomes_a_device_and_a_file_again() {
        if !nacre_testkit::root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file").canonicalize().unwrap_or_else(|_| directory.path().join("file"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let device = attach(&file, Options { block_size: 4096, read_only: false, label: "a test" }).unwrap();
        let found = of_file(&path);
        assert_eq!(found.iter().map(LoopDevice::path).collect::<Vec<_>>(), [device.path()]);
        let claimed = blockdev::claim(device.path()).unwrap();
        let error = device.detach().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
        drop(claimed);
        device.detach().unwrap();
        assert!(of_file(&path).is_empty());
    }
}

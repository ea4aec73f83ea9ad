//! The kernel's NBD client as the way to a block device: `/dev/nbdN` on sockets whose other ends this process serves.
//!
//! The classic ioctls are used, not netlink: a device that was set up by them lives as long as the thread that is in `NBD_DO_IT`, so
//! that a server that was killed leaves nothing behind. Negotiation is not the kernel's business: on the sockets there are requests
//! (28 bytes, `NBD_REQUEST_MAGIC`) and simple replies (16 bytes, `NBD_REPLY_MAGIC`) only, all numbers big-endian.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::blockdev;

const SET_SOCKET: libc::Ioctl = 0xab00;
const SET_BLOCK_SIZE: libc::Ioctl = 0xab01;
const DO_IT: libc::Ioctl = 0xab03;
const CLEAR_SOCKET: libc::Ioctl = 0xab04;
const SET_BLOCKS: libc::Ioctl = 0xab07;
const DISCONNECT: libc::Ioctl = 0xab08;
const SET_FLAGS: libc::Ioctl = 0xab0a;

/// How long the kernel may take from the call to a device that can be opened.
const READY: Duration = Duration::from_secs(5);
/// More devices are not looked at; the module makes 16 unless it is told otherwise.
const MOST_DEVICES: u32 = 1024;

/// What a device is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Its size in bytes.
    pub size: u64,
    /// Its blocks in bytes, a power of two from 512 to 4096.
    pub block_size: u32,
    /// The transmission flags of the protocol, as the server would have told them.
    pub flags: u16,
}

/// A device in use.
#[derive(Debug)]
pub struct NbdDevice {
    path: PathBuf,
    block_size: u32,
    serving: Option<JoinHandle<io::Result<()>>>,
}

/// Whether the kernel has devices, and this process may use them.
///
/// # Errors
/// It has none, or this process may not; the text says which.
pub fn available() -> io::Result<()> {
    let first = Path::new("/dev/nbd0");
    open(first).map(drop).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "the kernel has no NBD client (modprobe nbd)",
            io::ErrorKind::PermissionDenied => "making a block device needs root",
            _ => "the kernel's NBD client cannot be had",
        };
        io::Error::new(error.kind(), format!("{}: {hint}: {error}", first.display()))
    })
}

/// Makes a block device of sockets, each of which is served, or is going to be, at its other end.
///
/// # Errors
/// No device is free, or the kernel's answer.
pub fn attach(sockets: Vec<OwnedFd>, options: Options) -> io::Result<NbdDevice> {
    available()?;
    let (tell, told) = mpsc::channel();
    // All calls that set a device up come from one thread: the kernel insists.
    let thread = thread::Builder::new().name("nbd-device".into());
    let serving = thread.spawn(move || match set_up(&sockets, options) {
        Ok((path, device)) => {
            let _ = tell.send(Ok(path));
            let result = call(&device, DO_IT, 0);
            let _ = call(&device, CLEAR_SOCKET, 0);
            drop(sockets);
            result
        }
        Err(error) => {
            let _ = tell.send(Err(error));
            Ok(())
        }
    })?;
    let path = told.recv().map_err(|_| io::Error::other("the thread of the NBD device died"))??;
    let mut device = NbdDevice { path, block_size: options.block_size, serving: Some(serving) };
    // Its size is the last that the kernel sets of it.
    let ready = blockdev::wait_until(READY, || device.shows(options.size) || device.has_ended());
    if ready.is_err() || device.has_ended() {
        let path = device.path.clone();
        let error = device.disconnect().err().unwrap_or_else(|| io::ErrorKind::TimedOut.into());
        return Err(at(&path, "the kernel did not connect", &error));
    }
    Ok(device)
}

/// Takes the first device that nobody has, and gives it what it needs.
fn set_up(sockets: &[OwnedFd], options: Options) -> io::Result<(PathBuf, File)> {
    let blocks = options.size / u64::from(options.block_size);
    let mut seen = 0;
    for number in 0..MOST_DEVICES {
        let path = PathBuf::from(format!("/dev/nbd{number}"));
        let device = match open(&path) {
            Ok(device) => device,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(at(&path, "cannot be opened", &error)),
        };
        seen += 1;
        if Path::new("/sys/class/block").join(format!("nbd{number}/pid")).exists() {
            continue;
        }
        let mut first = true;
        for socket in sockets {
            let socket = u64::try_from(socket.as_raw_fd()).map_err(io::Error::other)?;
            match call(&device, SET_SOCKET, socket) {
                Ok(()) => first = false,
                // Somebody else is setting it up.
                Err(error) if first && matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) => break,
                Err(error) => return Err(at(&path, "does not take a socket", &error)),
            }
        }
        if first {
            continue;
        }
        let set = call(&device, SET_BLOCK_SIZE, options.block_size.into())
            .and_then(|()| call(&device, SET_BLOCKS, blocks))
            .and_then(|()| call(&device, SET_FLAGS, options.flags.into()));
        return match set {
            Ok(()) => Ok((path, device)),
            Err(error) => {
                let _ = call(&device, CLEAR_SOCKET, 0);
                Err(at(&path, "cannot be set up", &error))
            }
        };
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!("all {seen} NBD devices are in use (modprobe nbd nbds_max=N)"),
    ))
}

impl NbdDevice {
    /// Where it is: `/dev/nbd0`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the connection has ended, for whatever reason.
    pub fn has_ended(&self) -> bool {
        self.serving.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Makes the device larger, whether it is in use or not. Its server has to take requests of the new size already.
    ///
    /// # Errors
    /// The kernel's answer, or that the device does not become so.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        if self.has_ended() {
            return Ok(()); // it may be somebody else's by now
        }
        let device = open(&self.path)?;
        // The call that set it, which this time may come from any thread: the kernel tells the block layer and those who watch the device.
        call(&device, SET_BLOCKS, size / u64::from(self.block_size))
            .map_err(|error| at(&self.path, "does not take its new size", &error))?;
        blockdev::wait_until(READY, || self.shows(size) || self.has_ended())
            .map_err(|error| at(&self.path, "keeps its size", &error))
    }

    /// Whether the kernel's device has so many bytes.
    fn shows(&self, size: u64) -> bool {
        let sectors = fs::read_to_string(self.system().join("size"));
        sectors.is_ok_and(|text| text.trim() == (size / 512).to_string())
    }

    /// Ends the connection, and waits until it has ended. What the kernel held was to be written out before.
    ///
    /// # Errors
    /// The kernel's answer; then [`has_ended`](Self::has_ended) says that it has not. Or what ended it before.
    pub fn disconnect(&mut self) -> io::Result<()> {
        if !self.has_ended() {
            let device = open(&self.path)?;
            call(&device, DISCONNECT, 0).map_err(|error| at(&self.path, "cannot be disconnected", &error))?;
        }
        self.wait()
    }

    /// Waits until the connection ends.
    ///
    /// # Errors
    /// What ended it, where that was no wish of anybody's.
    pub fn wait(&mut self) -> io::Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        let result = serving.join().map_err(|_| io::Error::other("the thread of the NBD device died"))?;
        match result {
            // How a connection ends whose other end was closed, or which was disconnected, depends on the kernel.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBADR | libc::EPIPE | libc::ECONNRESET)) => Ok(()),
            result => result,
        }
    }

    fn system(&self) -> PathBuf {
        Path::new("/sys/class/block").join(self.path.file_name().unwrap_or_default())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn at(path: &Path, what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{} {what}: {error}", path.display()))
}

fn call(device: &File, request: libc::Ioctl, argument: u64) -> io::Result<()> {
    // SAFETY: NBD's ioctls take a number, here of the width of a register as the kernel expects it, and touch no memory of ours. The
    // kernel takes its own reference to a socket whose number it is given.
    #[expect(unsafe_code, reason = "rustix knows no ioctl of NBD")]
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

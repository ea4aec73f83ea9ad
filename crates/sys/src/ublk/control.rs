//! The control device: devices are made, started, found and deleted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{ControlCommand, DeviceInfo, MAX_DEPTH, MAX_REQUEST, READ, READ_WRITE, RawParams, SECTOR, command, padded};
use crate::blockdev;

const PATH: &str = "/dev/ublk-control";

const GET_DEVICE: u32 = command(READ, 0x02, size_of::<ControlCommand>());
const ADD_DEVICE: u32 = command(READ_WRITE, 0x04, size_of::<ControlCommand>());
const DELETE_DEVICE: u32 = command(READ_WRITE, 0x05, size_of::<ControlCommand>());
const START_DEVICE: u32 = command(READ_WRITE, 0x06, size_of::<ControlCommand>());
const STOP_DEVICE: u32 = command(READ_WRITE, 0x07, size_of::<ControlCommand>());
const SET_PARAMS: u32 = command(READ_WRITE, 0x08, size_of::<ControlCommand>());
const GET_FEATURES: u32 = command(READ, 0x13, size_of::<ControlCommand>());

const COMMANDS_LIKE_IOCTLS: u64 = 1 << 6;
const USER_COPY: u64 = 1 << 7;
/// The state of a device that nobody serves.
const DEAD: u16 = 0;
/// Marks devices as ours in the field that the kernel leaves to servers, so that no other program's is ever cleaned up: `nacre001`.
const OURS: u64 = u64::from_le_bytes(*b"nacre001");

const READ_ONLY: u32 = 1 << 0;
const VOLATILE_CACHE: u32 = 1 << 2;
const FUA: u32 = 1 << 3;
const TYPE_BASIC: u32 = 1 << 0;
const TYPE_DISCARD: u32 = 1 << 1;

/// The longest discard or write of zeroes; a request has no data then, so that this is only a bound of the time that one takes.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// How long a character device's node may take.
const NODE: Duration = Duration::from_secs(5);

/// The number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(u32);

impl DeviceId {
    /// Where its requests come from: `/dev/ublkc0`.
    pub fn served(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkc{}", self.0))
    }

    /// The block device: `/dev/ublkb0`.
    pub fn block(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.0))
    }
}

/// What a device is like.
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// Its size in bytes.
    pub size: u64,
    /// Its logical and physical blocks in bytes, a power of two from 512 to 4096.
    pub block_size: u32,
    /// It takes no writes.
    pub read_only: bool,
}

/// A device that was there already.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Which.
    pub id: DeviceId,
    /// Whether nobody serves it any more.
    pub dead: bool,
    /// The process that serves or served it.
    pub server: i32,
}

/// The control device.
pub struct Control {
    /// Before `buffer`, so that it is gone first.
    ring: IoUring<squeue::Entry128>,
    file: File,
    /// What commands read or fill: the kernel may touch it while one runs, so that it lives as long as the ring.
    buffer: Box<[u64; 8]>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ublk control")
    }
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel has no ublk, or an older one; io_uring is forbidden; this process may not. The text says which.
    pub fn open() -> io::Result<Self> {
        let hint = |error: &io::Error| match error.kind() {
            io::ErrorKind::NotFound => "the kernel has no ublk (modprobe ublk_drv, Linux 6.5 or newer)",
            io::ErrorKind::PermissionDenied => "making a block device needs root",
            _ => "ublk cannot be had",
        };
        let file = OpenOptions::new().read(true).write(true).open(PATH);
        let file = file.map_err(|error| io::Error::new(error.kind(), format!("{PATH}: {}: {error}", hint(&error))))?;
        let ring = IoUring::builder().build(4).map_err(|error| {
            io::Error::new(error.kind(), format!("io_uring, which ublk needs, cannot be had here: {error}"))
        })?;
        let mut control = Self { ring, file, buffer: Box::new([0; 8]) };
        let unknown = |error: io::Error| {
            let text = format!("this kernel's ublk does not tell its features (Linux 6.5 or newer is needed): {error}");
            io::Error::new(io::ErrorKind::Unsupported, text)
        };
        control.run(GET_FEATURES, u32::MAX, Some(8), 0).map_err(unknown)?;
        let features = control.buffer.first().copied().unwrap_or_default();
        let needed = COMMANDS_LIKE_IOCTLS | USER_COPY;
        if features & needed != needed {
            let text =
                format!("this kernel's ublk lacks user copy (features {features:#x}): Linux 6.5 or newer is needed");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Ok(control)
    }

    /// Makes a device of so many queues, each of so many requests at once.
    ///
    /// # Errors
    /// The kernel's answer, or its node does not appear.
    pub fn add(&mut self, queues: u16, depth: u16) -> io::Result<DeviceId> {
        let info = DeviceInfo {
            queues: queues.max(1),
            depth: depth.clamp(1, MAX_DEPTH),
            max_request: MAX_REQUEST,
            device: u32::MAX, // any
            flags: COMMANDS_LIKE_IOCTLS | USER_COPY,
            server_flags: OURS,
            ..DeviceInfo::default()
        };
        self.put(info.as_bytes());
        self.run(ADD_DEVICE, u32::MAX, Some(size_of::<DeviceInfo>()), 0).map_err(|e| while_doing("add a device", e))?;
        let id = DeviceId(self.info()?.device);
        if let Err(error) = blockdev::wait_for_node(&id.served(), NODE) {
            let _ = self.delete(id);
            return Err(error);
        }
        Ok(id)
    }

    /// Makes the block device of it, once all queues are being waited on.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn start(&mut self, id: DeviceId, params: Params) -> io::Result<()> {
        let shift = u8::try_from(params.block_size.trailing_zeros()).map_err(io::Error::other)?;
        let raw = RawParams {
            length: u32::try_from(size_of::<RawParams>()).map_err(io::Error::other)?,
            types: TYPE_BASIC | TYPE_DISCARD,
            attributes: VOLATILE_CACHE | FUA | if params.read_only { READ_ONLY } else { 0 },
            logical_shift: shift,
            physical_shift: shift,
            optimal_shift: shift,
            minimal_shift: shift,
            max_sectors: MAX_REQUEST / 512,
            sectors: params.size / SECTOR,
            discard_granularity: params.block_size,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_zeroes_sectors: MAX_DISCARD_SECTORS,
            max_discard_segments: 1,
            ..RawParams::default()
        };
        self.put(raw.as_bytes());
        self.run(SET_PARAMS, id.0, Some(size_of::<RawParams>()), 0)
            .map_err(|e| while_doing("set the parameters", e))?;
        self.run(START_DEVICE, id.0, None, u64::from(std::process::id()))
            .map_err(|e| while_doing("start the device", e))?;
        blockdev::wait_for_node(&id.block(), NODE)
    }

    /// Takes the block device away. Its queues end by that; they have to be served until this returns, since the kernel writes out
    /// what it holds.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn stop(&mut self, id: DeviceId) -> io::Result<()> {
        self.run(STOP_DEVICE, id.0, None, 0).map_err(|error| while_doing("stop the device", error))
    }

    /// Deletes a device. It waits until all that was opened of it is closed: its queues have to be dropped before.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn delete(&mut self, id: DeviceId) -> io::Result<()> {
        self.run(DELETE_DEVICE, id.0, None, 0).map_err(|error| while_doing("delete the device", error))
    }

    /// The devices that Nacre made, of this process and of others.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn ours(&mut self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/class/ublk-char")? {
            let name = entry?.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("ublkc")?.parse().ok()) else {
                continue;
            };
            // It may be gone since the directory was read.
            if self.run(GET_DEVICE, number, Some(size_of::<DeviceInfo>()), 0).is_err() {
                continue;
            }
            let info = self.info()?;
            if info.server_flags == OURS {
                let gone = !Path::new("/proc").join(info.server.to_string()).exists();
                found.push(Found { id: DeviceId(number), dead: info.state == DEAD && gone, server: info.server });
            }
        }
        Ok(found)
    }

    fn put(&mut self, bytes: &[u8]) {
        for (to, from) in self.buffer.as_mut_bytes().iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    fn info(&self) -> io::Result<DeviceInfo> {
        let read = DeviceInfo::read_from_prefix(self.buffer.as_bytes());
        read.map(|(info, _)| info).map_err(|_| io::Error::other("a device's description has another size"))
    }

    /// Runs one command to its end. `length` bytes of the buffer are what it reads or fills.
    fn run(&mut self, operation: u32, device: u32, length: Option<usize>, data: u64) -> io::Result<()> {
        let length = length.unwrap_or(0).min(size_of_val(&*self.buffer));
        let header = ControlCommand {
            device,
            queue: u16::MAX, // none
            length: u16::try_from(length).map_err(io::Error::other)?,
            address: if length == 0 { 0 } else { self.buffer.as_mut_ptr().expose_provenance() as u64 },
            data,
            path_length: 0,
            pad: 0,
            reserved: 0,
        };
        let entry =
            opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), operation).cmd(padded(header.as_bytes())).build();
        // SAFETY: the command's bytes are copied into the ring. The memory that it names is `buffer`, of which it reads and writes at most
        // `length` bytes: it is on the heap, owned by this value and not touched before the command has ended, below; where that
        // cannot be waited for, it is never freed. The descriptor is that of `file`, which is as old as the ring.
        #[expect(unsafe_code, reason = "io_uring commands carry addresses")]
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::Error::other("the ring of the ublk control device is full"))?;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The kernel may yet use the old one.
                    Box::leak(std::mem::replace(&mut self.buffer, Box::new([0; 8])));
                    return Err(error);
                }
            }
            let completed: Option<cqueue::Entry> = self.ring.completion().next();
            if let Some(completed) = completed {
                let result = completed.result();
                return if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
            }
        }
    }
}

fn while_doing(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("ublk: cannot {what}: {error}"))
}

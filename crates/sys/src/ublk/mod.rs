//! ublk: block devices that a process serves, through io_uring passthrough commands. Linux 6.5 or newer with the module `ublk_drv`.
//!
//! A device is made in four steps, and unmade in the opposite order:
//!
//! 1. [`Control::add`] makes the character device `/dev/ublkcN`.
//! 2. That is opened ([`Channel::open`]), and each of its queues by the thread that serves it ([`Queue::open`]), which asks for the first request of each of the
//!    queue's tags. All further commands of a queue come from that thread: the kernel insists.
//! 3. [`Control::start`] sets what the device is like and makes `/dev/ublkbN`. It returns when all queues are waiting.
//! 4. [`Queue::wait`] hands out requests, [`Queue::complete`] answers one and asks for the tag's next.
//!
//! A request is described in memory that the kernel shares read-only (`struct ublksrv_io_desc`, 24 bytes a tag). Its data is fetched or
//! put by pread and pwrite on the character device (`UBLK_F_USER_COPY`), so that no buffer of ours is ever handed to the kernel
//! for longer than a call. The offset says which request is meant: `2^31 + queue · 2^41 + tag · 2^25`.
//!
//! This is the part of linux/ublk_cmd.h that one kind of server needs, and no more: the crate libublk, which has all of it, would add an
//! executor and some thirty crates to what a guest trusts.

mod control;
mod queue;

pub use control::{Control, DeviceId, Found, Params};
pub use queue::{Channel, Data, Operation, Queue, Request, Waited};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The data of one request is at most this long; what the kernel allows is 32 MiB.
pub const MAX_REQUEST: u32 = 1 << 20;
/// Requests that a queue has at once, at most; what the kernel allows is 4096.
pub const MAX_DEPTH: u16 = 1024;
/// Sectors are counted in these many bytes, whatever the size of the device's blocks.
pub const SECTOR: u64 = 512;

/// `_IOR('u', number, size)` and `_IOWR('u', number, size)`: commands are numbered like ioctls.
const fn command(direction: u32, number: u32, size: usize) -> u32 {
    // The sizes are 16 and 32.
    #[expect(clippy::cast_possible_truncation, reason = "sizes of two small structs")]
    let size = size as u32;
    (direction << 30) | (size << 16) | ((b'u' as u32) << 8) | number
}
const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// `struct ublksrv_ctrl_cmd`: what a command to the control device carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
struct ControlCommand {
    device: u32,
    queue: u16,
    length: u16,
    address: u64,
    data: u64,
    path_length: u16,
    pad: u16,
    reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`: what a device is made of.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable, KnownLayout)]
struct DeviceInfo {
    queues: u16,
    depth: u16,
    state: u16,
    pad0: u16,
    max_request: u32,
    device: u32,
    server: i32,
    pad1: u32,
    flags: u64,
    server_flags: u64,
    owner_user: u32,
    owner_group: u32,
    reserved: [u64; 2],
}

/// `struct ublk_params` as far as it concerns us: basic and discard.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable, KnownLayout)]
struct RawParams {
    length: u32,
    types: u32,
    attributes: u32,
    logical_shift: u8,
    physical_shift: u8,
    optimal_shift: u8,
    minimal_shift: u8,
    max_sectors: u32,
    chunk_sectors: u32,
    sectors: u64,
    virtual_boundary: u64,
    discard_alignment: u32,
    discard_granularity: u32,
    max_discard_sectors: u32,
    max_zeroes_sectors: u32,
    max_discard_segments: u16,
    reserved: u16,
    pad: u32,
}

/// `struct ublksrv_io_cmd`: what a command to a queue carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
struct QueueCommand {
    queue: u16,
    tag: u16,
    result: i32,
    address: u64,
}

/// `struct ublksrv_io_desc`: a request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    operation: u32,
    sectors: u32,
    first_sector: u64,
    address: u64,
}

const _: () = assert!(size_of::<ControlCommand>() == 32 && size_of::<DeviceInfo>() == 64);
const _: () = assert!(size_of::<RawParams>() == 64 && size_of::<QueueCommand>() == 16 && size_of::<Descriptor>() == 24);

/// A command as io_uring takes it.
fn padded(command: &[u8]) -> [u8; 80] {
    let mut padded = [0; 80];
    for (to, from) in padded.iter_mut().zip(command) {
        *to = *from;
    }
    padded
}

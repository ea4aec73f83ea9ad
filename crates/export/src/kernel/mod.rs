//! Block devices of the kernel, three ways: [`Ublk`], the kernel's NBD client ([`KernelNbd`]), and a FUSE file under a loop device
//! ([`FuseLoop`]). [`best()`] takes the first that the kernel has.
//!
//! All of them show blocks of 4096 bytes unless told otherwise, so that a filesystem that was made on one can be mounted on another; all
//! pass on flushes, discards and writes of zeroes; and none is taken away while something is mounted on it.
//!
//! The threads that serve are marked as those that the kernel must not make wait for writes ([`nacre_sys::memory`]). Those of the store
//! are not made here: a program calls [`nacre_sys::memory::become_io_flusher`] before it opens a store that it is going to serve.

mod best;
mod fuse;
mod fuse_files;
mod kernel_nbd;
mod ublk;

use std::{io, path::PathBuf, thread};

pub use best::{Chosen, Kind, NoDevice, PassedOver, best};
pub use fuse::{FuseLoop, cleanup as cleanup_fuse};
pub use kernel_nbd::KernelNbd;
use nacre_core::{BLOCK_SIZE, BlockError};
pub use ublk::{Ublk, cleanup as cleanup_ublk};

/// What a device is to be like.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The smallest request, in bytes: 4096, or 512 for what cannot live with that, at the price of a read for each write of less.
    pub block_size: u32,
    /// It takes no writes.
    pub read_only: bool,
    /// A directory for what a front end needs while it runs, one for each device: it is made where it is missing, and closed to others.
    pub run: PathBuf,
}

impl DeviceOptions {
    /// A writable device in blocks of 4096 bytes.
    pub fn new(run: impl Into<PathBuf>) -> Self {
        Self { block_size: 4096, read_only: false, run: run.into() }
    }

    /// Whether a store of `size` bytes can be such a device.
    fn check(&self, size: u64) -> Result<(), StartError> {
        let fits = matches!(self.block_size, 512 | 4096) && size > 0 && size.is_multiple_of(BLOCK_SIZE as u64);
        if fits { Ok(()) } else { Err(StartError::Shape { size, block_size: self.block_size }) }
    }
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel has not got it, or this process may not have it; another front end may do.
    #[error("not to be had here: {0}")]
    Unavailable(#[source] io::Error),
    /// It went wrong.
    #[error("cannot {action}: {source}")]
    Failed {
        /// What was tried.
        action: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No device can be like that.
    #[error(
        "{size} bytes in blocks of {block_size} cannot be a device: blocks are of 512 or 4096 bytes, and sizes whole blocks of 4096"
    )]
    Shape {
        /// The store's size.
        size: u64,
        /// The blocks that were asked for.
        block_size: u32,
    },
}

impl StartError {
    fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Failed { action, source }
    }
}

/// The error number that tells the kernel of it. Whatever it does not need to tell apart is an I/O error.
fn error_number(error: &BlockError) -> i32 {
    use rustix::io::Errno;
    let number = match error {
        BlockError::NoSpace(_) => Errno::NOSPC,
        BlockError::ReadOnly(_) => Errno::ROFS,
        BlockError::OutOfRange { .. } => Errno::INVAL,
        BlockError::Unsupported(_) => Errno::OPNOTSUPP,
        BlockError::Io { .. } | BlockError::Integrity { .. } | BlockError::Fenced(_) => Errno::IO,
    };
    number.raw_os_error()
}

/// Whether a store failed at something, for the log and as the kernel is told.
fn outcome(device: &str, result: Result<(), BlockError>) -> Result<(), i32> {
    result.map_err(|error| {
        let number = error_number(&error);
        match &error {
            // The kernel asks once and learns from the answer.
            BlockError::Unsupported(_) => tracing::debug!(device, %error, "a request was not carried out"),
            _ => tracing::error!(device, %error, "a request failed"),
        }
        number
    })
}

/// Marks the calling thread, and those that it starts, as serving a device.
fn mark_thread() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    if let Err(error) = nacre_sys::memory::become_io_flusher() {
        ONCE.call_once(|| {
            tracing::warn!(
                %error,
                "the kernel was not told that this process serves a device (CAP_SYS_RESOURCE, Linux 5.6): when memory is short, both may wait for each other"
            );
        });
    }
}

/// How many CPUs there are to serve with.
fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_make_a_device() {
        let options = |block_size| DeviceOptions { block_size, ..DeviceOptions::new("/run") };
        assert!(options(4096).check(4096).is_ok() && options(512).check(8192).is_ok());
        for (block_size, size) in [(4096, 0), (4096, 4097), (512, 512), (1024, 4096), (0, 4096)] {
            assert!(options(block_size).check(size).is_err(), "{size} in {block_size}");
        }
    }
}

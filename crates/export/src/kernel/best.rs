//! The best block device that the kernel has.

use std::fmt;

use super::{DeviceOptions, FuseLoop, KernelNbd, StartError, Ublk};
use crate::{FrontEnd, Served};

/// A way to a block device of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Ublk`]
    Ublk,
    /// [`KernelNbd`]
    Nbd,
    /// [`FuseLoop`]
    FuseLoop,
}

impl Kind {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::Ublk, Self::Nbd, Self::FuseLoop];

    /// Makes a device in this way.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn start(self, store: Served, options: &DeviceOptions) -> Result<Box<dyn FrontEnd>, StartError> {
        Ok(match self {
            Self::Ublk => Box::new(Ublk::start(store, options)?),
            Self::Nbd => Box::new(KernelNbd::start(store, options)?),
            Self::FuseLoop => Box::new(FuseLoop::start(store, options)?),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Nbd => "the kernel's NBD client",
            Self::FuseLoop => "FUSE and a loop device",
        })
    }
}

/// A way that was tried in vain.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {reason}")]
pub struct PassedOver {
    /// Which.
    pub kind: Kind,
    /// Why not.
    #[source]
    pub reason: StartError,
}

/// A device, and why it was made in this way.
pub struct Chosen {
    /// The device.
    pub front_end: Box<dyn FrontEnd>,
    /// How it was made.
    pub kind: Kind,
    /// The better ways, and why they were not taken.
    pub passed_over: Vec<PassedOver>,
}

/// No way led to a device.
#[derive(Debug, thiserror::Error)]
#[error("this kernel gives no block device to be served from here:{}", passed_over.iter().map(|one| format!("\n  {one}")).collect::<String>())]
pub struct NoDevice {
    /// Each, and why not.
    pub passed_over: Vec<PassedOver>,
}

/// Makes a device in the best way that works: ublk, then the kernel's NBD client, then FUSE and a loop device.
///
/// # Errors
/// [`NoDevice`], with the reason of each.
pub fn best(store: &Served, options: &DeviceOptions) -> Result<Chosen, NoDevice> {
    let mut passed_over = Vec::new();
    for kind in Kind::ALL {
        match kind.start(store.clone(), options) {
            Ok(front_end) => return Ok(Chosen { front_end, kind, passed_over }),
            Err(reason) => {
                tracing::debug!(%kind, %reason, "passed over");
                passed_over.push(PassedOver { kind, reason });
            }
        }
    }
    Err(NoDevice { passed_over })
}

//! `nacre disk open`: a disk as a block device of this machine, served in the background.
//!
//! The process in the background is this program again, with the same arguments and a variable that says so: no fork of a process that
//! may have threads. Its standard output is a pipe to us: it writes the device there and closes it when all works; where it ends before,
//! it has told why on standard error, and its exit code is ours.

use std::path::Path;

use anyhow::Context as _;
use nacre_export::{
    Served,
    kernel::{self, DeviceOptions, Kind, StartError},
};

use super::{
    run::{self, Started},
    rundir::Slot,
};
use crate::{
    args::{
        Global,
        disk::{DeviceKind, OpenArgs},
    },
    background, output,
};

/// Tells a process that it is the one in the background; see `OpenArgs::detached`.
const DETACHED: &str = "NACRE_DISK_DETACHED";

/// The exit code.
pub(super) fn open(global: &Global, args: &OpenArgs) -> anyhow::Result<i32> {
    if !args.foreground && !args.detached {
        return background::start(DETACHED, "the process that serves the disk");
    }
    if args.detached {
        background::own_session()?;
    }
    // Before the store has threads. Without the privilege the front ends say so, once.
    let _ = nacre_sys::memory::become_io_flusher();
    let start = |store: Served, slot: &Slot| start(store, slot, args);
    let ready = |devices: &[String], slot: &Slot| {
        devices.iter().try_for_each(output::line)?;
        if args.detached { background::leave(&slot.log().context("the log of a running disk")?) } else { Ok(()) }
    };
    run::run(global, &args.store, &args.disk, start, ready).map(|()| 0)
}

fn start(store: Served, slot: &Slot, args: &OpenArgs) -> anyhow::Result<Started> {
    let run = slot.device();
    clean_up(&run);
    let options =
        DeviceOptions { block_size: args.block_size, read_only: args.disk.read_only, ..DeviceOptions::new(run) };
    let only = |kind: Kind| kind.start(store.clone(), &options);
    let front_end = match args.device {
        DeviceKind::Auto => {
            let chosen = kernel::best(&store, &options)?;
            for one in &chosen.passed_over {
                tracing::info!("passed over {one}");
            }
            chosen.front_end
        }
        DeviceKind::Ublk => only(Kind::Ublk)?,
        DeviceKind::Nbd => only(Kind::Nbd)?,
        DeviceKind::Fuse => only(Kind::FuseLoop)?,
    };
    let devices = vec![front_end.device()];
    Ok(Started {
        front_end,
        devices,
        users: |devices| devices.iter().flat_map(|device| nacre_sys::blockdev::users(Path::new(device))).collect(),
    })
}

/// What servers that were killed left would take places of devices for ever.
fn clean_up(run: &Path) {
    if let Err(error) = kernel::cleanup_ublk() {
        tracing::debug!(%error, "devices of killed servers were not looked for");
    }
    if let Err(error) = kernel::cleanup_fuse(run) {
        tracing::warn!(%error, "what a killed server left stays");
    }
}

/// Whether no device can be like that, rather than that this kernel has none.
pub(crate) fn is_usage(error: &StartError) -> bool {
    matches!(error, StartError::Shape { .. })
}

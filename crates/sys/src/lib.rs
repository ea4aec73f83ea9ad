//! The operating system: mounts, namespaces, containers, and everything else that needs unsafe.
//!
//! - [`fs`]: what a path lies on, whether it is a mount point, unmounting, syncing.
//! - [`beneath`]: files opened inside a root directory whose content nobody trusts.
//! - [`block`]: stores of blocks: files, devices, directories of segment files, memory.
//! - [`blockdev`], [`loopdev`], [`nbd_client`], [`ublk`]: block devices of the kernel, and those that a process serves to it.
//! - [`erofs`]: mounts of metadata files and data files.
//! - [`fuse`]: filesystems that a process serves, and hands to its successor; [`descriptors`]: how they get there.
//! - [`memory`]: what a process that serves a block device tells the kernel.
//! - [`overlay`]: overlay mounts of any number of layers that the kernel can stack.
//! - [`privilege`], [`userns`]: what this process may do, and a user namespace for the one that may not.
//! - [`spec`]: the part of the OCI runtime specification that Nacre writes and its own runner reads.
//! - [`container`]: that runner, for machines without runc, crun and youki.
//! - [`end`]: the signals that end a daemon.
//! - [`signals`]: signals passed on to a child.
//! - [`stage`]: how the program starts itself again as a helper. **Every binary calls [`stage::enter`] first in `main`.**
//!
//! Nothing here forks: what must happen between fork and exec happens in a fresh, single-threaded execution of the same program
//! instead (a *stage*), so that it may allocate, fail and report like any other code.

pub mod beneath;
pub mod block;
pub mod blockdev;
pub mod container;
pub mod descriptors;
pub mod end;
pub mod erofs;
pub mod fs;
pub mod fuse;
pub mod loopdev;
pub mod memory;
pub mod nbd_client;
pub mod overlay;
pub mod privilege;
pub mod signals;
pub mod spec;
pub mod stage;
pub mod ublk;
pub mod userns;

//! Development only: what the tests of several crates need.
//!
//! - [`Layer`], [`Entry`] and [`Image`]: layers and images as tests want them, broken ones too.
//! - [`Browser`], [`DockerRegistry`], [`MotoServer`], [`Postgres`], [`Swtpm`], [`TpmMaker`], [`Tls`], [`TrusteeKbs`], [`TrusteeClient`]: programs that are not ours.
//! - [`shared`], [`require`], [`root`]: what may be missing on a machine. Each says loudly that its test is skipped, and counts it,
//!   so the caller only returns.
//! - [`tiny_rootfs`]: a root filesystem that programs run in; [`harness`]: for programs that start themselves again.
//! - [`sim`]: a store that crashes and fails as it is told, and the model of what a disk on it has to hold.
//! - [`SmallDisk`]: a disk that is soon full. [`check_store`]: what every block store has to do. [`Rng`]: numbers that are the same in each run.
//! - [`qemu`]: a virtual machine with another kernel.
//!
//! Everything here panics when it cannot do its work: a test that cannot be set up has failed.

#![expect(clippy::panic, clippy::unwrap_used, reason = "what fails here fails the test, at once and at its place")]

mod browser;
mod disk;
pub mod harness;
mod image;
mod postgres;
mod programs;
pub mod qemu;
mod rng;
mod rootfs;
mod s3;
pub mod sim;
mod skip;
mod store;
mod swtpm;
mod tar;
pub mod tree;
mod trustee;

pub use browser::{Browser, Element, Key};
pub use disk::SmallDisk;
pub use image::{BuiltLayer, Compression, Image, ImageBuilder};
pub use nacre_registry as registry;
pub use postgres::Postgres;
pub use programs::{DockerRegistry, DockerRegistryOptions, Tls, run};
pub use rng::Rng;
pub use rootfs::tiny_rootfs;
pub use s3::MotoServer;
pub use skip::{require, root, shared, skip};
pub use store::check_store;
pub use swtpm::{Swtpm, TpmMaker};
pub use tar::{Entry, Layer};
pub use trustee::{TrusteeClient, TrusteeKbs};

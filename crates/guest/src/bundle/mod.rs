//! Bundles: what an OCI runtime runs. Layers are composed into a root filesystem, and an image config becomes `config.json`.
//!
//! ```text
//! BUNDLE/
//!   config.json      by the runtime specification; written last, by one rename: where it is, the bundle is complete
//!   rootfs/          the overlay mount
//!   .nacre/          ours: upper, work (what the container writes, unless that is elsewhere), empty, nested, runtime
//! ```
//! A [`Plan`] is data first; [`Plan::carry_out`] does it, and undoes what it did in reverse if a step fails. What is under `.nacre`
//! is removed by [`teardown`], never while anything is mounted below the bundle. Nothing here knows the image store: layers are
//! directories that somebody keeps for as long as they are mounted.
//!
//! Containers have no cgroup mount and no cgroup path: nothing here limits resources, and a config without either runs where
//! cgroups are not delegated, too. By default they share the network of whoever starts them ([`Network::Host`]), which in a pod is the
//! pod's.

mod compose;
mod config;
mod runtime;
mod users;

pub use compose::{ComposeError, Composition, Plan, Step, UpperDir, teardown};
pub use config::{BindMount, ConfigError, Machine, Network, Overrides, spec, write_config};
pub use runtime::{Kind, Runtime, RuntimeError};
pub use users::{ResolvedUser, UserError, resolve_user, resolve_user_in};

//! `nacre` as a person, a script and a machine that fails use it: commands and exit codes; the demo; kills, and two at once; the broker, also with clocks that are wrong;
//! disks; what is measured while it runs; memory.

#![expect(clippy::panic, clippy::unwrap_used, reason = "what fails here fails the test")]

mod broker;
mod clocks;
mod commands;
mod demo;
mod disk;
mod events;
mod kills;
mod masters;
mod memory;
#[path = "../interop/support.rs"]
#[expect(dead_code, reason = "tests against other programs use all of it")]
mod support;

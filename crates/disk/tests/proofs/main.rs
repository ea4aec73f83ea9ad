//! What the secure disk promises, and what becomes of it when its store crashes, fails, or is changed by its host.
//!
//! Most tests take one seed after the other for some seconds. A failure prints its seed: `NACRE_SEED=n` repeats it; `NACRE_LONG=1`
//! makes the time sixty times as long.

#![expect(clippy::panic, clippy::print_stdout, clippy::unwrap_used, reason = "tests, and what they have in common")]

mod anonymity;
mod attack;
mod crash;
mod epochs;
mod faults;
mod full;
mod keys;
mod model;
mod nonces;
mod rig;
mod rollback;
mod superblock;
mod threads;

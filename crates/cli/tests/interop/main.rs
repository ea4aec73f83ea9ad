//! `nacre` against programs of others: registries, keys and signatures; unpacked trees; runtimes.

#![expect(clippy::panic, clippy::unwrap_used, reason = "what fails here fails the test")]

mod caches;
mod index;
mod lazy;
mod mounts;
mod random;
mod registry;
mod runtimes;
mod stored;
mod support;
mod traces;
mod trees;

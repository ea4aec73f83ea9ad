//! `nacre` against programs of others: registries, keys and signatures; unpacked trees; runtimes.

#![expect(clippy::panic, clippy::unwrap_used, reason = "what fails here fails the test")]

mod index;
mod lazy;
mod random;
mod registry;
mod runtimes;
mod support;
mod trees;

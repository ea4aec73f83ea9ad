//! The registry client against registries that behave, that do not, and that are not ours.
#![expect(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

mod auth;
mod config;
mod downloads;
mod environment;
mod memory;
mod node_cache;
mod peers;
mod proxies;
mod redirects;
mod script;
mod signatures;
mod support;
mod tls;
mod uploads;

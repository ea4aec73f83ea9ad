//! Whether images are trusted exactly when the policy says so: signatures made and verified by gpg and skopeo, broken ones of every
//! kind, keys past their time, and the four kinds of image.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "what fails here fails the test, at its place"
)]

mod admission;
mod certificates;
mod cosign;
mod fixtures;
mod gpg;
mod interop;
mod policy;
mod registry;
mod support;

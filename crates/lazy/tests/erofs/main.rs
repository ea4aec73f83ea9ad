//! EROFS images: made, checked, read, and read by others.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test, at once and at its place")]

mod big;
mod hostile;
mod layers;
mod listing;
mod mutations;
mod random;
mod tools;

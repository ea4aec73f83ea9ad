//! Images from layers to bytes: built, opened, read, attacked.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod attacks;
mod images;
mod index;
mod support;
mod traces;

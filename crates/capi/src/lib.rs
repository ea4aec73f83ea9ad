//! The files of lazy images for programs that are not in Rust, and where no kernel mounts anything: `include/nacre.h`.
//!
//! - [`ffi`]: the functions of the header, and all that is unsafe: pointers become slices, handles and back.
//! - [`handles`]: what they do, on the reader that mounts use as well ([`nacre_lazy::files`]).
//! - [`failure`]: what went wrong, as a number and in words.
//!
//! Invariant: nothing unwinds into C, and nothing is kept outside of handles but the words of each thread's last failure.

mod failure;
mod ffi;
mod handles;

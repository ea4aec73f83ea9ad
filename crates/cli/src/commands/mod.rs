//! What the commands do.

pub(crate) mod attest;
pub(crate) mod broker;
pub(crate) mod copy;
pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod run;

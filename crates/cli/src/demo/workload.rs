//! What runs in the demo's container.

use std::fs;

use anyhow::Context as _;

use super::rootfs::MESSAGE_FILE;
use crate::output;

/// Says where it is, and what the encrypted layer holds.
pub(crate) fn run() -> anyhow::Result<()> {
    let message = fs::read_to_string(MESSAGE_FILE).with_context(|| format!("{MESSAGE_FILE}: read"))?;
    let mut names: Vec<String> =
        fs::read_dir("/")?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    output::line(format_args!("process {} in a root filesystem of its own: {}", std::process::id(), names.join(" ")))?;
    output::line(message.trim_end())?;
    Ok(())
}

//! A command that goes on in the background: this program again, with the same arguments and a variable that says so. It writes to its
//! standard output, a pipe to us, when what is served is there; until then its errors are ours.

use std::{
    env,
    fs::File,
    io::Read as _,
    process::{Command, Stdio},
};

use anyhow::Context as _;

use crate::output;

/// The most bytes of what the process in the background says.
const SAID_LIMIT: u64 = 64 << 10;

/// Starts it, says what it says, and gives the exit code.
pub(crate) fn start(variable: &str, what: &'static str) -> anyhow::Result<i32> {
    let mut child = Command::new("/proc/self/exe")
        .args(env::args_os().skip(1))
        .env(variable, "true")
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what} cannot be started"))?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(SAID_LIMIT).read_to_string(&mut said).context(what)?;
    }
    if said.is_empty() {
        let status = child.wait().context(what)?;
        return Ok(status.code().unwrap_or(output::Exit::Other as i32));
    }
    output::line(said.trim_end())?;
    Ok(0)
}

/// Out of the terminal's reach. The process in the background is no leader of a group, having just been started.
pub(crate) fn own_session() -> anyhow::Result<()> {
    rustix::process::setsid().context("a session of its own").map(drop)
}

/// Leaves the terminal, the directory and the caller's pipe: who waits has what it waits for.
pub(crate) fn leave(log: &File) -> anyhow::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    env::set_current_dir("/").context("/")?;
    rustix::stdio::dup2_stderr(log)?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

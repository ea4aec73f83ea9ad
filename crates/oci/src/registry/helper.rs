//! Docker credential helpers: `docker-credential-NAME get`, the server on standard input, JSON on standard output.
//!
//! A helper is a program of the user's, but it may hang or misbehave: it gets [`TIME_LIMIT`], may print [`OUTPUT_LIMIT`] bytes, and
//! runs in a process group of its own that is killed as a whole.

use std::{
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nacre_core::SecretBytes;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process_group},
};
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

use super::auth_file::Credentials;

/// How long a helper may run.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(30);
/// How much it may print.
pub(crate) const OUTPUT_LIMIT: usize = 1 << 20;

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    user: String,
    #[serde(rename = "Secret")]
    secret: String,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

/// Asks a helper for the credentials of a registry; `None` where it has none. The error says what the helper did.
pub(crate) fn ask(name: &str, server: &str, time_limit: Duration) -> Result<Option<Credentials>, String> {
    if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!("'{name:.64}' is no name of a credential helper"));
    }
    let program = format!("docker-credential-{name}");
    let (output, success) = run(&program, server, time_limit).map_err(|why| format!("{program}: {why}"))?;
    if !success {
        let text = String::from_utf8_lossy(&output);
        if text.contains("credentials not found") || text.contains("no credentials server URL") {
            return Ok(None);
        }
        return Err(format!("{program} failed: {}", super::exchange::printable(text.trim(), 200)));
    }
    let answer: Answer = serde_json::from_slice(&output)
        .map_err(|_| format!("{program} printed something other than {{\"Username\":…,\"Secret\":…}}"))?;
    let secret = SecretBytes::new(answer.secret.clone().into_bytes());
    Ok(match answer.user.as_str() {
        _ if secret.is_empty() => None,
        "<token>" => Some(Credentials::IdentityToken(secret)),
        "" => return Err(format!("{program} printed a secret without a user name")),
        user => Some(Credentials::Basic { user: user.to_owned(), password: secret }),
    })
}

/// Kills the helper and what it started, whatever way the function is left.
struct Running {
    child: Child,
    reaped: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Once it is reaped its number may be another's.
        if self.reaped {
            return;
        }
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn run(program: &str, server: &str, time_limit: Duration) -> Result<(Zeroizing<Vec<u8>>, bool), String> {
    let deadline = Instant::now() + time_limit;
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let child = command.spawn().map_err(|error| format!("could not be started: {error}"))?;
    let mut running = Running { child, reaped: false };
    if let Some(mut stdin) = running.child.stdin.take() {
        // Shorter than a pipe's buffer, so it never blocks; a helper that does not read it has its own reasons.
        let _ = stdin.write_all(server.as_bytes());
    }
    let mut stdout = running.child.stdout.take().ok_or("has no standard output")?;
    let mut output = Zeroizing::new(Vec::with_capacity(4096));
    let mut piece = Zeroizing::new([0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = Timespec::try_from(left).map_err(|error| error.to_string())?;
        let ready = {
            let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
            match poll(&mut fds, Some(&wait)) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(|error| error.to_string())?,
            }
        };
        if ready == 0 {
            return Err(format!("gave no answer within {} s", time_limit.as_secs_f32()));
        }
        let count = stdout.read(piece.as_mut_slice()).map_err(|error| error.to_string())?;
        if count == 0 {
            break;
        }
        output.extend_from_slice(piece.get(..count).unwrap_or_default());
        if output.len() > OUTPUT_LIMIT {
            return Err(format!("printed more than {OUTPUT_LIMIT} bytes"));
        }
    }
    // It closed its output; it should end soon.
    loop {
        match running.child.try_wait().map_err(|error| error.to_string())? {
            Some(status) => {
                running.reaped = true;
                return Ok((output, status.success()));
            }
            None if Instant::now() >= deadline => {
                return Err(format!("did not end within {} s", time_limit.as_secs_f32()));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

//! Runs a program with a bound on its time and its output.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nacre_core::SecretBytes;
use rustix::process::{Pid, Signal, kill_process_group};
use zeroize::Zeroizing;

/// How much of a failed program's words goes into the message.
const STDERR_LIMIT: usize = 2048;

/// What to run.
pub(crate) struct Run<'a> {
    pub(crate) program: &'a Path,
    pub(crate) args: &'a [&'a OsStr],
    pub(crate) stdin: &'a [u8],
    pub(crate) limit: usize,
    pub(crate) timeout: Duration,
}

/// How it ended.
pub(crate) enum Exit {
    Success(SecretBytes),
    Failure { status: ExitStatus, stderr: String },
    TimedOut,
    TooLarge,
}

/// Runs a program to its end, or kills it and all that it started (its process group).
pub(crate) fn run(what: Run<'_>) -> io::Result<Exit> {
    let deadline = Instant::now() + what.timeout;
    let child = Command::new(what.program)
        .args(what.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let mut guard = Group(child);
    let child = &mut guard.0;
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::other("its pipes were not made"));
    };
    let question = Zeroizing::new(what.stdin.to_vec());
    // A program may well end without having read all of its input: not an error by itself.
    spawn("key-provider-stdin", move || drop(stdin.write_all(&question)))?;
    let (send, output) = mpsc::sync_channel(1);
    let limit = what.limit;
    spawn("key-provider-stdout", move || drop(send.send(read_limited(stdout, limit))))?;
    let (send, words) = mpsc::sync_channel(1);
    spawn("key-provider-stderr", move || {
        let mut head = Vec::new();
        let mut stderr = stderr;
        let _ = stderr.by_ref().take(STDERR_LIMIT as u64).read_to_end(&mut head);
        drop(send.send(head));
        // Read on, so that the program does not block on a full pipe.
        let _ = io::copy(&mut stderr, &mut io::sink());
    })?;

    // The threads end when the group is killed; should one survive in another group, it is left behind, not waited for.
    let answer = match output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(Some(answer))) => answer,
        Ok(Ok(None)) => return Ok(Exit::TooLarge),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Ok(Exit::TimedOut),
    };
    loop {
        if let Some(status) = guard.0.try_wait()? {
            if status.success() {
                return Ok(Exit::Success(answer));
            }
            let words = words.recv_timeout(Duration::from_millis(200)).unwrap_or_default();
            let stderr: String =
                String::from_utf8_lossy(&words).trim().chars().filter(|c| !c.is_control()).take(500).collect();
            return Ok(Exit::Failure { status, stderr });
        }
        if Instant::now() >= deadline {
            return Ok(Exit::TimedOut);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Kills the process group when the run is over, however it ended.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // Fails when all of it has ended.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

/// Reads to the end; `None` when there is more than `limit`.
fn read_limited(source: impl Read, limit: usize) -> io::Result<Option<SecretBytes>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
    source.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= limit).then(|| SecretBytes::new(std::mem::take(&mut *bytes))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Duration) -> io::Result<Exit> {
        let args = [OsStr::new("-c"), OsStr::new(script)];
        run(Run { program: Path::new("/bin/sh"), args: &args, stdin: &[b'x'; 100_000], limit: 200_000, timeout })
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn input_and_output_pass() {
        assert!(matches!(shell("cat", LONG).unwrap(), Exit::Success(out) if out.expose() == [b'x'; 100_000]));
        assert!(matches!(shell("echo ignored input", LONG).unwrap(), Exit::Success(out) if out.len() == 14));
    }

    #[test]
    fn failures_are_told() {
        let Exit::Failure { status, stderr } = shell("echo no key >&2; exit 3", LONG).unwrap() else { panic!() };
        assert_eq!((status.code(), stderr.as_str()), (Some(3), "no key"));
        let missing = Run { program: Path::new("/nonexistent"), args: &[], stdin: b"", limit: 1, timeout: LONG };
        assert!(run(missing).is_err());
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_all_it_started() {
        for script in ["sleep 1000", "sleep 1000 & wait", "exec >&-; sleep 1000", "(sleep 1000 &) ; cat >/dev/null"] {
            let start = Instant::now();
            let exit = shell(script, Duration::from_millis(300)).unwrap();
            assert!(matches!(exit, Exit::TimedOut), "{script}");
            assert!(start.elapsed() < Duration::from_secs(10), "{script}");
        }
    }

    #[test]
    fn a_program_that_talks_without_end_is_stopped() {
        assert!(matches!(shell("yes", LONG).unwrap(), Exit::TooLarge));
        assert!(matches!(shell("yes >&2", Duration::from_millis(300)).unwrap(), Exit::TimedOut));
        assert!(matches!(shell("head -c 200001 /dev/zero", LONG).unwrap(), Exit::TooLarge));
        assert!(matches!(shell("head -c 200000 /dev/zero", LONG).unwrap(), Exit::Success(_)));
    }
}

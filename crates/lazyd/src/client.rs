//! Asking the daemon, and starting it where none runs.

use std::{
    io::{self, Read as _},
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    Problem, Program, Station, keeper,
    protocol::{self, Hello, PEER_TIME, Request, Shown, VERSION},
};

/// How long it may take until a daemon runs: one that ends lets go of its lock, one that takes over reads metadata.
const START_TIME: Duration = Duration::from_secs(60);
/// How long a request may take: an image's metadata is fetched, perhaps from a registry that comes and goes.
const WORK_TIME: Duration = Duration::from_secs(600);
/// How long is waited before it is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// A daemon that waits for a request.
pub struct Connected {
    stream: UnixStream,
    pid: u32,
    log: String,
}

impl Connected {
    /// Asks it.
    ///
    /// # Errors
    /// What the daemon says, with the exit code of the command as if it had done it itself.
    pub fn ask(&self, request: &Request, files: &[BorrowedFd<'_>]) -> anyhow::Result<Value> {
        let lost = || format!("the daemon that serves lazy images did not answer; {} may say why", self.log);
        protocol::ask(&self.stream, request, files).with_context(lost)?;
        let time = if matches!(request, Request::Complete { .. }) { None } else { Some(WORK_TIME) };
        self.stream.set_read_timeout(time).with_context(lost)?;
        protocol::answered(&self.stream).with_context(lost)?
    }
}

impl Station {
    /// The daemon; `None` where none runs.
    ///
    /// # Errors
    /// One runs and does not answer, or is of another version.
    pub fn connected(&self) -> anyhow::Result<Option<Connected>> {
        let log = self.log().display().to_string();
        let lost = || format!("the daemon that serves lazy images does not answer; {log} may say why");
        let stream = match self.connect() {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            stream => stream.with_context(lost)?,
        };
        // One that takes over from another answers when it has all mounts.
        stream.set_read_timeout(Some(START_TIME)).with_context(lost)?;
        stream.set_write_timeout(Some(PEER_TIME)).with_context(lost)?;
        let hello: Hello = match protocol::read_frame(&stream) {
            // It ended just now, and did not take the call.
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            hello => hello.with_context(lost)?,
        };
        if hello.version != VERSION {
            let found = hello.version;
            return Err(Problem::InUse(format!(
                "the daemon that serves lazy images (process {}) speaks version {found} of its protocol, and this program {VERSION}: \
                 unmount its images, or send it SIGTERM",
                hello.pid
            ))
            .into());
        }
        Ok(Some(Connected { stream, pid: hello.pid, log }))
    }

    /// The daemon, which is started where none runs.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn started(&self, program: &Program) -> anyhow::Result<Connected> {
        let begin = Instant::now();
        loop {
            if let Some(connected) = self.connected()? {
                return Ok(connected);
            }
            if !self.start(program)? {
                // Somebody else starts one, or one is about to end.
                anyhow::ensure!(
                    begin.elapsed() < START_TIME,
                    "the daemon that serves lazy images neither answers nor ends; {} may say why",
                    self.log().display()
                );
                thread::sleep(PAUSE);
            }
        }
    }

    /// Starts a keeper, which starts the daemon; whether it did, rather than another.
    fn start(&self, program: &Program) -> anyhow::Result<bool> {
        let mut command = program.call(Path::new(crate::SELF), "keep", self.lazy());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.context("the daemon that serves lazy images cannot be started")?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            let length = keeper::READY.len() as u64;
            stdout.take(length).read_to_string(&mut said).context("the daemon that serves lazy images")?;
        }
        if said == keeper::READY {
            return Ok(true);
        }
        let status = child.wait().context("the daemon that serves lazy images")?;
        if status.code() == Some(keeper::TAKEN) {
            return Ok(false);
        }
        let log = self.log();
        Err(anyhow::anyhow!("the daemon that serves lazy images does not start; {} may say why", log.display()))
    }

    /// Has another process take over, which may be of a newer program; returns when it has.
    ///
    /// # Errors
    /// None runs, or the successor does not come.
    pub fn restart(&self) -> anyhow::Result<()> {
        let none = || Problem::Missing("no daemon serves lazy images of this store here".into());
        let old = self.connected()?.ok_or_else(none)?;
        old.ask(&Request::Restart, &[])?;
        let begin = Instant::now();
        loop {
            if self.connected()?.is_some_and(|new| new.pid != old.pid) {
                return Ok(());
            }
            let log = self.log();
            anyhow::ensure!(begin.elapsed() < START_TIME, "no other daemon came; {} may say why", log.display());
            thread::sleep(PAUSE);
        }
    }
}

/// What all daemons of a store have mounted.
///
/// # Errors
/// One does not answer.
pub fn all(lazy: &Path) -> anyhow::Result<Vec<Shown>> {
    let mut all = Vec::new();
    for station in Station::all(lazy)? {
        if let Some(connected) = station.connected()? {
            all.extend(serde_json::from_value::<Vec<Shown>>(connected.ask(&Request::List, &[])?)?);
        }
    }
    Ok(all)
}

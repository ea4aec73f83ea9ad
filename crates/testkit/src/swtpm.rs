//! A software TPM, as tests need one.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::require;

/// swtpm, started up, on a port of the loopback device, with its state in a temporary directory.
#[derive(Debug)]
pub struct Swtpm {
    program: PathBuf,
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Swtpm {
    /// Starts a new one; `None`, after a loud skip, where it is not installed.
    pub fn start() -> Option<Self> {
        let program = require("swtpm")?;
        let directory = tempfile::tempdir().unwrap();
        // Its control channel has to be on the next port, where tpm2-tools look for it. Somebody may take either meanwhile.
        for _ in 0..20 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let Some(control) = port.checked_add(1) else { continue };
            if TcpListener::bind(("127.0.0.1", control)).is_err() {
                continue;
            }
            if let Some(child) = launch(&program, directory.path(), port) {
                return Some(Self { program, child, port, directory });
            }
        }
        panic!("swtpm does not start");
    }

    /// `127.0.0.1:PORT`, where it takes commands.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The directory of its state.
    pub fn state(&self) -> &Path {
        self.directory.path()
    }

    /// Cuts its power, lets `meanwhile` see to its state, and starts it up again.
    pub fn power_cycle(&mut self, meanwhile: impl FnOnce(&Path)) {
        self.stop();
        meanwhile(self.directory.path());
        let begin = Instant::now();
        self.child = loop {
            match launch(&self.program, self.directory.path(), self.port) {
                Some(child) => break child,
                None => assert!(begin.elapsed() < Duration::from_secs(20), "swtpm does not start again"),
            }
        };
    }

    /// Kills it.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A program of tpm2-tools that talks to it; `None`, after a loud skip, where it is not installed.
    pub fn tool(&self, program: &str) -> Option<Command> {
        let mut command = Command::new(require(program)?);
        command.env("TPM2TOOLS_TCTI", format!("swtpm:host=127.0.0.1,port={}", self.port));
        Some(command)
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts it and waits until it takes connections; `None` where it ended instead, since its port was taken.
fn launch(program: &Path, directory: &Path, port: u16) -> Option<Child> {
    let mut command = Command::new(program);
    command.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"]);
    command.arg(format!("dir={}", directory.display()));
    command.args(["--server", &format!("type=tcp,port={port}"), "--ctrl", &format!("type=tcp,port={}", port + 1)]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some(child);
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

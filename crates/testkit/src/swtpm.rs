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
        Self::start_in(tempfile::tempdir().unwrap())
    }

    /// Starts a new one that a maker made: it has EK certificates by him.
    pub fn made_by(maker: &TpmMaker) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(require("swtpm_setup")?);
        command.args(["--tpm2", "--create-ek-cert", "--vmid", "test", "--tpmstate"]).arg(directory.path());
        command.arg("--config").arg(maker.directory.path().join("setup.conf"));
        crate::run(&mut command);
        Self::start_in(directory)
    }

    fn start_in(directory: tempfile::TempDir) -> Option<Self> {
        let program = require("swtpm")?;
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

/// Who makes TPMs: an authority of `swtpm_localca`'s, with a root, and an issuer below it.
pub struct TpmMaker {
    directory: tempfile::TempDir,
}

impl TpmMaker {
    /// A new one; `None`, after a loud skip, where swtpm's tools are not installed.
    pub fn new() -> Option<Self> {
        let (tool, _) = (require("swtpm_localca")?, require("swtpm_setup")?);
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let authority = [
            ("statedir", at("")),
            ("signingkey", at("signkey.pem")),
            ("issuercert", at("issuer.pem")),
            ("certserial", at("serial")),
        ];
        let setup = [
            ("create_certs_tool", tool.display().to_string()),
            ("create_certs_tool_config", at("authority.conf")),
            ("create_certs_tool_options", at("options")),
            ("active_pcr_banks", "sha256".to_owned()),
        ];
        let write = |name: &str, lines: &[(&str, String)]| {
            let text: String = lines.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
            std::fs::write(at(name), text).unwrap();
        };
        write("authority.conf", &authority);
        write("setup.conf", &setup);
        let options = "--platform-manufacturer Fabrikam\n--platform-version 2.1\n--platform-model QEMU\n";
        std::fs::write(at("options"), options).unwrap();
        let maker = Self { directory };
        // The authority makes itself with its first certificate: of a key of nobody's.
        maker.certify(&format!("{:0512x}", 0).replacen('0', "c", 1).replace('0', "1"));
        Some(maker)
    }

    /// The EK certificate, DER, of a key as `swtpm_localca` takes it: a modulus in hex, or `x=…,y=…,id=secp256r1`.
    pub fn certify(&self, ek: &str) -> Vec<u8> {
        let out = tempfile::tempdir().unwrap();
        let Some(tool) = require("swtpm_localca") else { panic!("swtpm_localca was there before") };
        let mut command = Command::new(tool);
        command.args(["--type", "ek", "--tpm2", "--vmid", "test", "--ek", ek, "--dir"]).arg(out.path());
        command.arg("--configfile").arg(self.directory.path().join("authority.conf"));
        command.arg("--optsfile").arg(self.directory.path().join("options"));
        command.args(["--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164"]);
        command.args(["--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:20191023"]);
        crate::run(&mut command);
        std::fs::read(out.path().join("ek.cert")).unwrap()
    }

    /// The certificates of the root and of the issuer, PEM.
    pub fn authorities(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.directory.path().join(name)).unwrap();
        read("swtpm-localca-rootca-cert.pem") + &read("issuer.pem")
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

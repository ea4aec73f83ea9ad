//! Trustee's programs, as tests need them: `kbs`, its key broker, and `kbs-client`, its guest and administrator.
//!
//! Nobody packages them: put a directory with a build of both on PATH. Of `kbs` the features `coco-as-builtin-no-verifier`, or any with a
//! built-in attestation service, are enough, since its `sample` verifier is always there; `kbs-client` attests as `sample` where there is no TEE.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nacre_core::jose::PrivateKey;

use crate::{Tls, require, run};

/// `kbs` on a port of the loopback device. Anybody administers it, and it believes any token that its own key signed.
#[derive(Debug)]
pub struct TrusteeKbs {
    child: Child,
    port: u16,
    tls: bool,
    token_key: PrivateKey,
    directory: tempfile::TempDir,
}

impl TrusteeKbs {
    /// Starts one; `None`, after a loud skip, where it is not on PATH.
    pub fn start(tls: Option<&Tls>) -> Option<Self> {
        let program = require("kbs")?;
        let directory = tempfile::tempdir().unwrap();
        let token_key = PrivateKey::generate_p256();
        fs::write(directory.path().join("token.key"), token_key.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
        // Somebody may take the port meanwhile.
        for _ in 0..20 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            fs::write(directory.path().join("kbs.toml"), config(directory.path(), port, tls)).unwrap();
            if let Some(child) = launch(&program, directory.path(), port) {
                return Some(Self { child, port, tls: tls.is_some(), token_key, directory });
            }
        }
        let log = fs::read_to_string(directory.path().join("log")).unwrap_or_default();
        panic!("kbs does not start: {log}");
    }

    /// Its address.
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// The key that it signs tokens with.
    pub fn token_key(&self) -> &PrivateKey {
        &self.token_key
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }
}

impl Drop for TrusteeKbs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(directory: &Path, port: u16, tls: Option<&Tls>) -> String {
    let channel = match tls {
        None => "insecure_http = true".to_owned(),
        Some(tls) => {
            format!("private_key = '{}'\ncertificate = '{}'", tls.key().display(), tls.certificate().display())
        }
    };
    format!(
        r#"
[http_server]
sockets = ["127.0.0.1:{port}"]
worker_count = 1
{channel}
[attestation_token]
insecure_header_jwk = true
[attestation_service]
type = "coco_as_builtin"
[attestation_service.attestation_token_broker]
duration_min = 5
signer = {{ key_path = '{key}' }}
[attestation_service.rvps_config]
type = "BuiltIn"
[admin]
authorization_mode = "InsecureAllowAll"
[storage_backend]
storage_type = "Memory"
[[plugins]]
name = "resource"
storage_backend_type = "kvstorage"
"#,
        key = directory.join("token.key").display()
    )
}

/// Starts it and waits until it takes connections; `None` where it ended instead.
fn launch(program: &Path, directory: &Path, port: u16) -> Option<Child> {
    let log = fs::File::create(directory.join("log")).unwrap();
    let mut command = Command::new(program);
    command.arg("--config-file").arg(directory.join("kbs.toml")).current_dir(directory).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    let mut child = command.spawn().unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(20) {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some(child);
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// `kbs-client`, for a broker at an address.
#[derive(Debug)]
pub struct TrusteeClient {
    program: PathBuf,
    url: String,
    certificate: Option<PathBuf>,
    /// Where it looks for an administrator's token, and finds none.
    home: tempfile::TempDir,
}

impl TrusteeClient {
    /// A client; `None`, after a loud skip, where it is not on PATH.
    pub fn new(url: impl Into<String>, certificate: Option<PathBuf>) -> Option<Self> {
        let program = require("kbs-client")?;
        Some(Self { program, url: url.into(), certificate, home: tempfile::tempdir().unwrap() })
    }

    /// A command of it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--url", &self.url]);
        if let Some(certificate) = &self.certificate {
            command.arg("--cert-file").arg(certificate);
        }
        command.args(arguments).env("HOME", self.home.path()).current_dir(self.home.path()).stdin(Stdio::null());
        command
    }

    /// Runs a command, which has to succeed; what it printed.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        String::from_utf8(run(&mut self.command(arguments)).stdout).unwrap().trim().to_owned()
    }

    /// Runs a command, which has to fail; what it says.
    #[track_caller]
    pub fn fail(&self, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert!(!status.success(), "{arguments:?}: {text}");
        text
    }
}

//! Programs that are not ours, as tests need them.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::Duration,
};

use crate::require;

/// Runs a command, which has to succeed.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    output
}

/// A certificate for 127.0.0.1 and localhost, and the authority that signed it, made by openssl.
#[derive(Debug)]
pub struct Tls {
    directory: tempfile::TempDir,
}

impl Tls {
    /// Makes them; `None`, after a loud skip, where openssl is not installed.
    pub fn new() -> Option<Self> {
        let openssl = require("openssl")?;
        let directory = tempfile::tempdir().unwrap();
        let command = |arguments: &str| {
            run(Command::new(&openssl).args(arguments.split(' ')).current_dir(directory.path()));
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        command(&format!("req -x509 {key} -keyout ca.key -out ca.crt -days 30 -subj /CN=nacre-test-ca"));
        command(&format!("req {key} -keyout server.key -out server.csr -subj /CN=localhost"));
        fs::write(
            directory.path().join("extensions"),
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n",
        )
        .unwrap();
        command(
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile extensions -out server.crt",
        );
        Some(Self { directory })
    }

    /// The authority's certificate. Its directory holds no other `.crt` but the server's.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// The server's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("server.crt")
    }

    /// The server's key.
    pub fn key(&self) -> PathBuf {
        self.directory.path().join("server.key")
    }

    /// Makes a directory with nothing but the authority's certificate: skopeo's `--cert-dir`.
    pub fn ca_directory(&self) -> PathBuf {
        let path = self.directory.path().join("ca.d");
        fs::create_dir_all(&path).unwrap();
        fs::copy(self.ca(), path.join("ca.crt")).unwrap();
        path
    }
}

/// How a [`DockerRegistry`] is started.
#[derive(Debug, Default)]
pub struct DockerRegistryOptions<'a> {
    /// It wants [`DockerRegistry::USER`] and [`DockerRegistry::PASSWORD`].
    pub basic_auth: bool,
    /// It speaks TLS.
    pub tls: Option<&'a Tls>,
}

/// Debian's docker-registry on a free port of the loopback device, with its data in a temporary directory.
#[derive(Debug)]
pub struct DockerRegistry {
    child: Child,
    host: String,
    directory: tempfile::TempDir,
}

impl DockerRegistry {
    /// The user that it knows.
    pub const USER: &str = "alice";
    /// That user's password.
    pub const PASSWORD: &str = "s3cret";

    /// Starts one; `None`, after a loud skip, where it is not installed.
    pub fn start(options: &DockerRegistryOptions<'_>) -> Option<Self> {
        let program = require("docker-registry")?;
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info, formatter: text}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n",
            at("data")
        );
        config.push_str("http:\n  addr: 127.0.0.1:0\n");
        if let Some(tls) = options.tls {
            let (certificate, key) = (tls.certificate(), tls.key());
            config.push_str(&format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display()));
        }
        if options.basic_auth {
            // The registry reads bcrypt only; this is PASSWORD with the smallest cost.
            fs::write(
                at("htpasswd"),
                format!("{}:$2y$04$abcdefghijklmnopqrstuuLZYjhNQAOdpbzt4WxWlUHjv1wsyH5DG\n", Self::USER),
            )
            .unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: nacre, path: {}}}}}\n", at("htpasswd")));
        }
        fs::write(at("config.yml"), config).unwrap();
        let mut command = Command::new(program);
        command.arg("serve").arg(at("config.yml")).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let host = listening(&mut child);
        Some(Self { child, host, directory })
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Where it keeps its data.
    pub fn data(&self) -> PathBuf {
        Path::new(self.directory.path()).join("data")
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until the registry's log says where it listens. The log is read on, so that its pipe never fills.
fn listening(child: &mut Child) -> String {
    let log = BufReader::new(child.stderr.take().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in log.lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                let host = rest.split(['"', ',', ' ']).next().unwrap_or_default().to_owned();
                let _ = sender.send(host);
            }
        }
    });
    let host = receiver.recv_timeout(Duration::from_secs(20));
    host.unwrap_or_else(|error| panic!("docker-registry did not say where it listens: {error}"))
}

//! NBD servers on socket files: ours and the peers'. Each is started for one measurement and ended after it, so that they never share the
//! processor, and their images stay.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::run::{find, run};

/// Whose server.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Server {
    /// `nacre disk serve`.
    Ours,
    /// nbdkit's luks filter on its file plugin.
    NbdkitLuks,
    /// qemu-nbd's luks driver, on the same image.
    QemuLuks,
    /// nbdkit's file plugin: no encryption.
    NbdkitFile,
}

impl Server {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "nacre disk serve",
            Self::NbdkitLuks => "nbdkit --filter=luks",
            Self::QemuLuks => "qemu-nbd with LUKS",
            Self::NbdkitFile => "nbdkit file",
        }
    }

    /// Why it cannot be measured.
    pub(super) fn missing(self) -> Option<&'static str> {
        let programs: &[&str] = match self {
            Self::Ours => &[],
            Self::NbdkitLuks => &["nbdkit", "qemu-img"],
            Self::QemuLuks => &["qemu-nbd", "qemu-img"],
            Self::NbdkitFile => &["nbdkit"],
        };
        programs.iter().find(|program| find(program).is_none()).copied()
    }
}

/// Where images are, and how ours is started.
pub(super) struct Images<'a> {
    pub(super) nacre: &'a Path,
    pub(super) place: &'a Path,
    pub(super) size: u64,
}

impl Images<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Makes the image of a server; that of both LUKS servers is the same one.
    pub(super) fn make(&self, server: Server) -> Result<()> {
        match server {
            Server::Ours => self.make_ours(),
            Server::NbdkitLuks | Server::QemuLuks => self.make_luks(),
            Server::NbdkitFile => {
                let image = self.path("plain");
                if image.exists() { Ok(()) } else { write_all(&image, self.size) }
            }
        }
    }

    fn make_ours(&self) -> Result<()> {
        let (store, key) = (self.path("store"), self.path("key"));
        if store.exists() {
            return Ok(());
        }
        fs::write(&key, [7; 32])?;
        let mut command = Command::new(self.nacre);
        command
            .args(["disk", "format", "--preallocate", "--size", &self.size.to_string(), "--key-file"])
            .arg(key)
            .arg(store);
        run(command.stdout(Stdio::null()))
    }

    /// LUKS1 with aes-256-xts-plain64, which both take; few iterations, since opening is not what is measured.
    fn make_luks(&self) -> Result<()> {
        let (image, secret) = (self.path("luks"), self.path("secret"));
        if image.exists() {
            return Ok(());
        }
        fs::write(&secret, "bench")?;
        let object = format!("secret,id=s,file={}", secret.display());
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "luks", "--object", &object])
            .args(["-o", "key-secret=s,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"])
            .arg(&image)
            .arg(self.size.to_string())
            .stdout(Stdio::null()))
    }

    fn command(&self, server: Server, socket: &Path) -> (&'static str, Vec<String>) {
        let path = |name: &str| self.path(name).display().to_string();
        let socket = socket.display().to_string();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
        match server {
            Server::Ours => {
                ("nacre", words(&["disk", "serve", "--key-file", &path("key"), "--socket", &socket, &path("store")]))
            }
            Server::NbdkitLuks => {
                let secret = format!("passphrase=+{}", path("secret"));
                ("nbdkit", words(&["-f", "-U", &socket, "--filter=luks", "file", &path("luks"), &secret]))
            }
            Server::QemuLuks => {
                let object = format!("secret,id=s,file={}", path("secret"));
                let image = format!("driver=luks,key-secret=s,file.driver=file,file.filename={}", path("luks"));
                let fixed = ["-t", "-e", "8", "-k", &socket, "--object", &object, "--image-opts", &image];
                ("qemu-nbd", words(&fixed))
            }
            Server::NbdkitFile => ("nbdkit", words(&["-f", "-U", &socket, "file", &path("plain")])),
        }
    }

    /// Starts a server and waits until it answers; `pinned` keeps it on the first core.
    pub(super) fn start(&self, server: Server, pinned: bool) -> Result<Running> {
        let socket = self.path("socket");
        let _ = fs::remove_file(&socket);
        let (program, arguments) = self.command(server, &socket);
        let program = if server == Server::Ours { self.nacre.to_owned() } else { find(program).context(program)? };
        let log = self.path("log");
        let mut command = pin(&program, pinned);
        command.args(&arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut running = Running { child: command.spawn().with_context(|| format!("{command:?}"))?, socket };
        let begin = Instant::now();
        while UnixStream::connect(&running.socket).is_err() {
            if running.child.try_wait()?.is_some() || begin.elapsed() > Duration::from_secs(30) {
                let log = fs::read_to_string(log).unwrap_or_default();
                bail!("{} does not serve: {log}", server.name());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }
}

/// A command that runs on the first core only, or anywhere.
pub(super) fn pin(program: &Path, pinned: bool) -> Command {
    if !pinned {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(program);
    command
}

/// A server; it ends when this is dropped.
pub(super) struct Running {
    child: Child,
    pub(super) socket: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status(); // a signal by which it closes its image
        let _ = self.child.wait();
    }
}

/// A file that is written from end to end.
fn write_all(path: &Path, size: u64) -> Result<()> {
    use std::io::Write as _;
    let mut file = File::create_new(path)?;
    let part = vec![0x5a; 1 << 20];
    for _ in 0..size >> 20 {
        file.write_all(&part)?;
    }
    Ok(file.sync_all()?)
}

//! The registry that everybody pulls from: Debian's docker-registry on the loopback device.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::run::find;

pub(crate) struct Registry {
    child: Child,
    data: PathBuf,
    pub(crate) host: String,
    manifest: Arc<Mutex<Option<Instant>>>,
}

impl Registry {
    /// Starts it on data that stays from run to run.
    pub(crate) fn start(directory: &Path) -> Result<Self> {
        let program =
            find("docker-registry").context("docker-registry is not installed (apt-get install docker-registry)")?;
        fs::create_dir_all(directory)?;
        let config = directory.join("config.yml");
        let data = directory.join("data");
        let text = format!(
            "version: 0.1\nlog: {{level: info, formatter: text}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:0}}\n",
            data.display()
        );
        fs::write(&config, text)?;
        let mut child =
            Command::new(program).arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut log = BufReader::new(child.stderr.take().context("no log")?).lines();
        let host = loop {
            let line = log.next().context("docker-registry ended at once")??;
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ',', ' ']).next().unwrap_or_default().to_owned();
            }
        };
        let manifest = Arc::<Mutex<Option<Instant>>>::default();
        let last = manifest.clone();
        // It is read to its end, so that the pipe never fills.
        std::thread::spawn(move || {
            for line in log.map_while(Result::ok) {
                if line.contains("response completed") && line.contains("/manifests/") {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                }
            }
        });
        Ok(Self { child, data, host, manifest })
    }

    /// When it said last that it had answered for a manifest.
    pub(crate) fn answered(&self) -> Option<Instant> {
        *self.manifest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all of its data, so that it stands for a machine of its own, whose disk is not ours.
    pub(crate) fn warm(&self) -> Result<()> {
        let mut pending = vec![self.data.clone()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else {
                    io::copy(&mut File::open(entry.path())?, &mut io::sink())?;
                }
            }
        }
        Ok(())
    }

    /// How long it takes to answer for a manifest.
    pub(crate) fn answer(&self, repository: &str, tag: &str) -> Result<Duration> {
        let start = Instant::now();
        let mut stream = TcpStream::connect(&self.host)?;
        let accept = "application/vnd.oci.image.manifest.v1+json";
        write!(
            stream,
            "GET /v2/{repository}/manifests/{tag} HTTP/1.1\r\nHost: {}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n",
            self.host
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "the registry has no {repository}:{tag}");
        Ok(start.elapsed())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Mounted trees: ours, nydusd's, and the kernel's EROFS on a plain file.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::run::{find, output, run};

/// What is known of our program.
pub(super) struct Ours {
    pub(super) nacre: PathBuf,
    pub(super) place: PathBuf,
    pub(super) private_key: PathBuf,
    pub(super) policy: PathBuf,
}

impl Ours {
    pub(super) fn command(&self, root: &Path) -> Command {
        let mut command = Command::new(&self.nacre);
        command.args(["--log", "error", "--root"]).arg(root).stdin(Stdio::null());
        command
    }

    /// What an image of the bench is used with: it is encrypted, and not signed, since this measures reading and not trust.
    pub(super) fn use_image<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.args(["--insecure-registry", "--policy"]).arg(&self.policy).arg("--allow-unsigned");
        command.arg("--decryption-key").arg(&self.private_key)
    }

    /// Mounts an image; gives the seconds until its names could be read.
    pub(super) fn mount(&self, root: &Path, reference: &str, target: &Path, more: &[&str]) -> Result<f64> {
        fs::create_dir_all(target)?;
        let start = Instant::now();
        let mut command = self.command(root);
        command.args(["image", "mount"]).args(more).arg(reference).arg(target).stdout(Stdio::null());
        run(self.use_image(&mut command))?;
        ensure!(fs::read_dir(target)?.next().is_some(), "the mounted image is empty");
        Ok(start.elapsed().as_secs_f64())
    }

    pub(super) fn umount(&self, root: &Path, target: &Path) -> Result<()> {
        run(self.command(root).args(["image", "umount"]).arg(target).stdout(Stdio::null()))
    }

    /// What `image ls` says of what is mounted.
    pub(super) fn mounts(&self, root: &Path) -> Result<Vec<Value>> {
        let text = output(self.command(root).args(["image", "ls", "--json"]))?;
        let images: Vec<Value> = serde_json::from_str(&text).context("image ls --json")?;
        let of = |image: &Value| image.get("mounts").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(images.iter().flat_map(of).collect())
    }

    /// Waits until all of what is mounted is local.
    pub(super) fn completed(&self, root: &Path) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(600);
        while Instant::now() < end {
            let local = |mount: &Value| mount.get("complete").and_then(Value::as_bool).unwrap_or_default();
            let mounts = self.mounts(root)?;
            ensure!(!mounts.is_empty(), "nothing is mounted");
            if mounts.iter().all(local) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(200));
        }
        bail!("the image was not completed in ten minutes")
    }
}

/// The most memory that a process had, MiB.
pub(super) fn peak(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// The process that serves a store's mounts.
pub(super) fn daemon(root: &Path) -> Result<u32> {
    let directory = root.join("lazy");
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let ours = words.contains(&directory.as_os_str().as_encoded_bytes());
        if ours && words.windows(2).any(|pair| pair == [&b"daemon"[..], b"serve"]) {
            return Ok(pid);
        }
    }
    bail!("no process serves what is mounted of {}", root.display())
}

/// The kernel's EROFS on a plain file: no loop device, which would halve it.
pub(super) struct Erofs {
    pub(super) target: PathBuf,
}

impl Erofs {
    pub(super) fn image(tree: &Path, image: &Path) -> Result<()> {
        if !image.exists() {
            let program = find("mkfs.erofs").context("mkfs.erofs is not installed (apt-get install erofs-utils)")?;
            run(Command::new(program).arg(image).arg(tree).stdout(Stdio::null()).stderr(Stdio::null()))?;
        }
        Ok(())
    }

    pub(super) fn mount(image: &Path, target: &Path) -> Result<Self> {
        fs::create_dir_all(target)?;
        mount(Some(image), target, Some("erofs"), MsFlags::MS_RDONLY, None::<&str>).context("mount of EROFS")?;
        Ok(Self { target: target.to_owned() })
    }
}

impl Drop for Erofs {
    fn drop(&mut self) {
        let _ = umount2(&self.target, MntFlags::empty());
    }
}

/// nydus-image and nydusd, where both are installed.
pub(super) struct Nydus {
    image: PathBuf,
    daemon: PathBuf,
    place: PathBuf,
}

impl Nydus {
    pub(super) fn find(place: &Path) -> Option<Self> {
        let (image, daemon) = (find("nydus-image")?, find("nydusd")?);
        Some(Self { image, daemon, place: place.join("nydus") })
    }

    fn bootstrap(&self, name: &str) -> PathBuf {
        self.place.join(format!("{name}.boot"))
    }

    fn blobs(&self, name: &str) -> PathBuf {
        self.place.join(format!("{name}-blobs"))
    }

    /// Builds an image of a tree; gives the seconds, and the bytes of its blob.
    pub(super) fn build(&self, name: &str, tree: &Path, dictionary: Option<&str>) -> Result<(f64, u64)> {
        let (boot, blobs) = (self.bootstrap(name), self.blobs(name));
        let _ = (fs::remove_file(&boot), fs::remove_dir_all(&blobs));
        fs::create_dir_all(&blobs)?;
        let mut command = Command::new(&self.image);
        command.args(["create", "--type", "dir-rafs", "--fs-version", "6", "--compressor", "zstd"]);
        command.args(["--log-level", "error", "--bootstrap"]).arg(&boot).arg("--blob-dir").arg(&blobs);
        if let Some(dictionary) = dictionary {
            command.arg("--chunk-dict").arg(format!("bootstrap={}", self.bootstrap(dictionary).display()));
        }
        let start = Instant::now();
        run(command.arg(tree).stdout(Stdio::null()))?;
        let seconds = start.elapsed().as_secs_f64();
        let mut bytes = 0;
        for blob in fs::read_dir(&blobs)? {
            bytes += blob?.metadata()?.len();
        }
        Ok((seconds, bytes))
    }

    /// Mounts an image that was built; what it caches is new.
    pub(super) fn mount(&self, name: &str, target: &Path) -> Result<Nydusd> {
        fs::create_dir_all(target)?;
        let cache = self.place.join("cache");
        let _ = fs::remove_dir_all(&cache);
        fs::create_dir_all(&cache)?;
        let config = self.place.join("nydusd.json");
        let device = json!({
            "backend": { "type": "localfs", "config": { "dir": self.blobs(name), "readahead": false } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        });
        let value = json!({ "device": device, "mode": "direct", "digest_validate": false, "enable_xattr": true });
        fs::write(&config, value.to_string())?;
        let log = File::create(self.place.join("nydusd.log"))?;
        let mut command = Command::new(&self.daemon);
        command.arg("fuse").arg("--mountpoint").arg(target).arg("--bootstrap").arg(self.bootstrap(name));
        // As many descriptors as it has: it may not raise the limit everywhere.
        command.arg("--config").arg(&config).args(["--rlimit-nofile", "0", "--log-level", "error"]);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut served = Nydusd { child, target: target.to_owned() };
        let end = Instant::now() + Duration::from_secs(20);
        while fs::read_dir(target)?.next().is_none() {
            if let Some(status) = served.child.try_wait()? {
                let log = fs::read_to_string(self.place.join("nydusd.log")).unwrap_or_default();
                bail!("nydusd ended: {status}\n{log}");
            }
            ensure!(Instant::now() < end, "nydusd did not mount within 20 s");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(served)
    }
}

/// A mount of nydusd's.
pub(super) struct Nydusd {
    child: Child,
    pub(super) target: PathBuf,
}

impl Drop for Nydusd {
    fn drop(&mut self) {
        let _ = umount2(&self.target, MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

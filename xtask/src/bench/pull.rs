//! `cargo xtask bench pull`: an image from a registry on the loopback device into a store, durably.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    Case,
    image::{self, ENCRYPTED, GZIP, Images, MANY, ZSTD},
    measure::{Sample, measure, warm_measure},
    median,
    registry::Registry,
};
use crate::run::{cargo, find, run, target};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// One JSON object a line: case, ours, peer, unit, ratio, goal, ok
    #[arg(long)]
    json: bool,
    /// The size of the image's files in MB
    #[arg(long, default_value_t = 800)]
    image_mb: u64,
    /// How often each candidate runs
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure the peers alone
    #[arg(long)]
    only_peers: bool,
    /// Measure ours alone
    #[arg(long, conflicts_with = "only_peers")]
    only_ours: bool,
    /// This binary of ours instead of one that is built now
    #[arg(long)]
    nacre: Option<PathBuf>,
    /// Where images and stores go: the disk that is measured [default: bench in cargo's target directory]
    #[arg(long)]
    directory: Option<PathBuf>,
}

/// The commands, each with its arguments, that pull into a fresh directory.
type Commands = Box<dyn Fn(&Path) -> Vec<Vec<String>>>;

struct Candidate {
    name: String,
    commands: Commands,
}

pub(crate) fn pull(options: &Options) -> Result<()> {
    let place = options.directory.clone().unwrap_or_else(|| target().join("bench"));
    fs::create_dir_all(&place)?;
    let place = fs::canonicalize(place)?;
    let nacre = match (&options.nacre, options.only_peers) {
        (_, true) => None,
        (Some(path), _) => Some(fs::canonicalize(path)?),
        (None, _) => Some(build()?),
    };
    let images = image::prepare(&place, options.image_mb)?;
    let registry = Registry::start(&place.join(format!("registry-{}", options.image_mb)))?;
    image::push(&images, &registry.host)?;
    let containerd = if options.only_ours { None } else { Containerd::start(&place)? };

    let policy = place.join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
    let mut candidates = Vec::new();
    if let Some(nacre) = &nacre {
        for tag in [GZIP, ZSTD, ENCRYPTED, MANY] {
            candidates.push(ours(nacre, &policy, &images, &registry, tag));
        }
    }
    if !options.only_ours {
        candidates.extend(peers(&registry, containerd.as_ref()));
    }
    let mut samples: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    for round in 1..=options.rounds {
        for candidate in &candidates {
            let directory = place.join("run");
            clear(&directory)?;
            fs::create_dir_all(&directory)?;
            let sample =
                measure(&directory, &(candidate.commands)(&directory)).with_context(|| candidate.name.clone())?;
            eprintln!("round {round}: {:<16} {:>7.2} s {:>8.1} MiB", candidate.name, sample.seconds, sample.peak_mib);
            samples.entry(candidate.name.clone()).or_default().push(sample);
            if candidate.name == ours_name(GZIP) {
                again(candidate, &directory, &registry, &mut samples)?;
            }
            if let Some(containerd) = &containerd {
                containerd.forget()?;
            }
            clear(&directory)?;
        }
    }
    report(options, &samples)
}

fn report(options: &Options, samples: &BTreeMap<String, Vec<Sample>>) -> Result<()> {
    let seconds = |name: &str| median(samples.get(name)?.iter().map(|sample| sample.seconds).collect());
    let peak = |name: &str| samples.get(name)?.iter().map(|sample| sample.peak_mib).max_by(f64::total_cmp);
    let plain = seconds(&ours_name(GZIP));
    let cases = [
        Case::against("pull vs skopeo copy + umoci unpack", plain, seconds(SKOPEO_UMOCI), 0.3),
        Case::against("pull vs buildah pull", plain, seconds(BUILDAH), 0.4),
        Case::against("pull vs ctr image pull", plain, seconds(CONTAINERD), 0.5),
        Case::against("encrypted vs plain, both ours", seconds(&ours_name(ENCRYPTED)), plain, 1.2),
        Case::against("zstd vs gzip, both ours", seconds(&ours_name(ZSTD)), plain, 0.8),
        Case::bounded("peak memory", peak(&ours_name(GZIP)), "MiB", 100.0),
        Case::bounded("peak memory, zstd", peak(&ours_name(ZSTD)), "MiB", 100.0),
        Case::bounded("peak memory, encrypted", peak(&ours_name(ENCRYPTED)), "MiB", 100.0),
        Case::bounded("peak memory, 64 layers", peak(&ours_name(MANY)), "MiB", 100.0),
        Case::bounded("pull of a stored image, without the answer", seconds(AGAIN).map(|s| s * 1000.0), "ms", 50.0),
    ];
    for name in [SKOPEO_UMOCI, BUILDAH, CONTAINERD] {
        if !options.only_ours && !samples.contains_key(name) {
            eprintln!("{name}: not installed, not measured");
        }
    }
    cases.iter().try_for_each(|case| case.print(options.json))
}

const SKOPEO_UMOCI: &str = "skopeo + umoci";
const BUILDAH: &str = "buildah";
const CONTAINERD: &str = "containerd";
const AGAIN: &str = "stored image";

fn ours_name(tag: &str) -> String {
    format!("nacre {tag}")
}

fn build() -> Result<PathBuf> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "nacre-cli"]))?;
    Ok(target().join("release/nacre"))
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn ours(nacre: &Path, policy: &Path, images: &Images, registry: &Registry, tag: &'static str) -> Candidate {
    let (nacre, policy) = (nacre.display().to_string(), policy.display().to_string());
    let reference = format!("docker://{}/bench:{tag}", registry.host);
    let key = (tag == ENCRYPTED).then(|| images.private_key.display().to_string());
    let commands = move |directory: &Path| {
        let root = directory.join("store").display().to_string();
        let mut command =
            [&nacre, "--root", &root, "image", "pull", "--quiet", "--policy", &policy].map(str::to_owned).to_vec();
        // The image is not signed, and this measures pulling, not trust.
        command.extend(["--insecure-registry".into(), "--allow-unsigned".into()]);
        if let Some(key) = &key {
            command.extend(["--decryption-key".into(), key.clone()]);
        }
        command.push(reference.clone());
        vec![command]
    };
    Candidate { name: ours_name(tag), commands: Box::new(commands) }
}

/// Pulls again what is in the store; what the registry needs for its answer is taken off.
fn again(
    candidate: &Candidate,
    directory: &Path,
    registry: &Registry,
    samples: &mut BTreeMap<String, Vec<Sample>>,
) -> Result<()> {
    for _ in 0..5 {
        // `sync` of a disk that others write to would be measured too, so this one goes by a file system without any.
        let sample = warm_measure(Path::new("/proc"), &(candidate.commands)(directory))?;
        let idle = warm_measure(Path::new("/proc"), &[vec!["true".to_owned()]])?;
        let answer = registry.answer("bench", GZIP)?.as_secs_f64();
        let seconds = (sample.seconds - idle.seconds - answer).max(0.0);
        samples.entry(AGAIN.to_owned()).or_default().push(Sample { seconds, ..sample });
    }
    Ok(())
}

fn peers(registry: &Registry, containerd: Option<&Containerd>) -> Vec<Candidate> {
    let reference = format!("{}/bench:{GZIP}", registry.host);
    let mut found = Vec::new();
    let source = reference.clone();
    if find("skopeo").is_some() && find("umoci").is_some() {
        let commands = move |directory: &Path| {
            let at = directory.display();
            vec![
                words(&format!(
                    "skopeo --insecure-policy copy -q --src-tls-verify=false docker://{source} oci:{at}/layout:t"
                )),
                words(&format!("umoci unpack --image {at}/layout:t {at}/bundle")),
            ]
        };
        found.push(Candidate { name: SKOPEO_UMOCI.into(), commands: Box::new(commands) });
    }
    let source = reference.clone();
    if find("buildah").is_some() {
        let commands = move |directory: &Path| {
            let at = directory.display();
            let stores = format!("--root {at}/root --runroot {at}/runroot --storage-driver overlay");
            vec![words(&format!(
                "buildah {stores} pull -q --tls-verify=false --signature-policy {at}/../policy.json docker://{source}"
            ))]
        };
        found.push(Candidate { name: BUILDAH.into(), commands: Box::new(commands) });
    }
    if let Some(containerd) = containerd {
        let socket = containerd.socket();
        let commands = move |_: &Path| {
            vec![words(&format!(
                "ctr -a {} image pull --plain-http --snapshotter overlayfs {reference}",
                socket.display()
            ))]
        };
        found.push(Candidate { name: CONTAINERD.into(), commands: Box::new(commands) });
    }
    found
}

/// A containerd of our own, with its state beside the stores of the others. Its memory is not measured: it is the daemon's.
struct Containerd {
    child: Child,
    directory: PathBuf,
}

impl Containerd {
    fn start(place: &Path) -> Result<Option<Self>> {
        let (Some(program), Some(_)) = (find("containerd"), find("ctr")) else { return Ok(None) };
        let directory = place.join("containerd");
        clear(&directory)?;
        fs::create_dir_all(&directory)?;
        let config = directory.join("config.toml");
        let at = directory.display();
        let text = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{at}/sock\"\n"
        );
        fs::write(&config, text)?;
        let log = fs::File::create(directory.join("log"))?;
        let child = Command::new(program).arg("-c").arg(config).stdout(Stdio::null()).stderr(log).spawn()?;
        let containerd = Self { child, directory };
        let start = Instant::now();
        while !containerd.ctr(&["version"])?.status.success() {
            if start.elapsed() > Duration::from_secs(20) {
                bail!("containerd does not answer; see {}/log", containerd.directory.display());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Some(containerd))
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("sock")
    }

    fn ctr(&self, arguments: &[&str]) -> Result<std::process::Output> {
        Ok(Command::new("ctr").arg("-a").arg(self.socket()).args(arguments).output()?)
    }

    /// Removes all images and what they were unpacked to.
    fn forget(&self) -> Result<()> {
        let names = self.ctr(&["image", "ls", "-q"])?;
        for name in String::from_utf8_lossy(&names.stdout).lines() {
            let removed = self.ctr(&["image", "rm", "--sync", name])?;
            if !removed.status.success() {
                bail!("ctr image rm: {}", String::from_utf8_lossy(&removed.stderr));
            }
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status(); // kill() would not let it end its shims
        let _ = self.child.wait();
        let _ = clear(&self.directory);
    }
}

fn clear(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

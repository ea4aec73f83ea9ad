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
    Case, build,
    image::{self, ENCRYPTED, GZIP, Images, MANY, ZSTD},
    measure::{Sample, measure},
    median,
    registry::Registry,
};
use crate::run::{find, target};

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

    let policy = place.join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
    let mut candidates = Vec::new();
    if let Some(nacre) = &nacre {
        for tag in [GZIP, ZSTD, ENCRYPTED, MANY] {
            candidates.push(ours(nacre, &policy, &images, &registry, tag));
        }
    }
    if !options.only_ours {
        candidates.extend(peers(&registry, &policy));
    }
    let runs = Runs::new(&place)?;
    let samples = rounds(options, &runs, &registry, &candidates)?;
    report(options, &samples) // before the runs are removed, which takes a minute
}

/// Where measurements write to. Each has a new directory, and none is removed before the last one is done: ext4 passes over inodes that
/// were freed in the last minutes one by one, so that removing the last store would slow down who makes files next.
struct Runs(PathBuf);

impl Runs {
    fn new(place: &Path) -> Result<Self> {
        let directory = place.join("run");
        clear(&directory)?;
        Ok(Self(directory))
    }

    fn directory(&self, round: usize, number: usize) -> Result<PathBuf> {
        let directory = self.0.join(format!("{round}-{number}"));
        fs::create_dir_all(&directory)?;
        Ok(directory)
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        let _ = clear(&self.0);
    }
}

fn rounds(
    options: &Options,
    runs: &Runs,
    registry: &Registry,
    candidates: &[Candidate],
) -> Result<BTreeMap<String, Vec<Sample>>> {
    let mut samples: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    for round in 1..=options.rounds {
        for (number, candidate) in candidates.iter().enumerate() {
            let directory = runs.directory(round, number)?;
            let daemon = if candidate.name == CONTAINERD { Some(Containerd::start(&directory)?) } else { None };
            registry.warm()?;
            let sample =
                measure(&directory, &(candidate.commands)(&directory)).with_context(|| candidate.name.clone())?;
            drop(daemon);
            let Sample { seconds, user, system, peak_mib } = sample;
            eprintln!(
                "round {round}: {:<16} {seconds:>6.2} s   user {user:>6.2}   system {system:>6.2} {peak_mib:>7.1} MiB",
                candidate.name
            );
            samples.entry(candidate.name.clone()).or_default().push(sample);
            if candidate.name == ours_name(GZIP) {
                again(candidate, &directory, registry, &mut samples)?;
            }
        }
    }
    Ok(samples)
}

fn report(options: &Options, samples: &BTreeMap<String, Vec<Sample>>) -> Result<()> {
    let seconds = |name: &str| -> Vec<f64> {
        samples.get(name).map(|samples| samples.iter().map(|sample| sample.seconds).collect()).unwrap_or_default()
    };
    let peak = |name: &str| samples.get(name)?.iter().map(|sample| sample.peak_mib).max_by(f64::total_cmp);
    let plain = seconds(&ours_name(GZIP));
    let again = median(seconds(AGAIN)).map(|seconds| seconds * 1000.0);
    let cases = [
        Case::against("pull vs skopeo copy + umoci unpack", &plain, &seconds(SKOPEO_UMOCI), 0.3),
        Case::against("pull vs buildah pull", &plain, &seconds(BUILDAH), 0.4),
        Case::against("pull vs ctr image pull", &plain, &seconds(CONTAINERD), 0.5),
        Case::against("encrypted vs plain, both ours", &seconds(&ours_name(ENCRYPTED)), &plain, 1.2),
        Case::against("zstd vs gzip, both ours", &seconds(&ours_name(ZSTD)), &plain, 0.8),
        Case::bounded("peak memory", peak(&ours_name(GZIP)), "MiB", 100.0),
        Case::bounded("peak memory, zstd", peak(&ours_name(ZSTD)), "MiB", 100.0),
        Case::bounded("peak memory, encrypted", peak(&ours_name(ENCRYPTED)), "MiB", 100.0),
        Case::bounded("peak memory, 64 layers", peak(&ours_name(MANY)), "MiB", 100.0),
        Case::bounded("pull of a stored image, without the answer", again, "ms", 50.0),
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
        let sample = measure(Path::new("/proc"), &(candidate.commands)(directory))?;
        let idle = measure(Path::new("/proc"), &[vec!["true".to_owned()]])?;
        let answer = registry.answer("bench", GZIP)?.as_secs_f64();
        let seconds = (sample.seconds - idle.seconds - answer).max(0.0);
        samples.entry(AGAIN.to_owned()).or_default().push(Sample { seconds, ..sample });
    }
    Ok(())
}

fn peers(registry: &Registry, policy: &Path) -> Vec<Candidate> {
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
        let policy = policy.display().to_string();
        let commands = move |directory: &Path| {
            let at = directory.display();
            let stores = format!("--root {at}/root --runroot {at}/runroot --storage-driver overlay");
            vec![words(&format!(
                "buildah {stores} pull -q --tls-verify=false --signature-policy {policy} docker://{source}"
            ))]
        };
        found.push(Candidate { name: BUILDAH.into(), commands: Box::new(commands) });
    }
    if find("containerd").is_some() && find("ctr").is_some() {
        let commands = move |directory: &Path| {
            let socket = Containerd::socket(directory);
            vec![words(&format!(
                "ctr -a {} image pull --plain-http --snapshotter overlayfs {reference}",
                socket.display()
            ))]
        };
        found.push(Candidate { name: CONTAINERD.into(), commands: Box::new(commands) });
    }
    found
}

/// A containerd of our own, with its state where the others have theirs. Its memory and time are not measured: they are the daemon's.
struct Containerd(Child);

impl Containerd {
    fn socket(directory: &Path) -> PathBuf {
        directory.join("sock")
    }

    fn start(directory: &Path) -> Result<Self> {
        let program = find("containerd").context("containerd is not installed")?;
        let config = directory.join("config.toml");
        let (at, socket) = (directory.display(), Self::socket(directory));
        let text = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{}\"\n",
            socket.display()
        );
        fs::write(&config, text)?;
        let log = directory.join("log");
        let errors = fs::File::create(&log)?;
        let this = Self(Command::new(program).arg("-c").arg(config).stdout(Stdio::null()).stderr(errors).spawn()?);
        let start = Instant::now();
        while !Command::new("ctr").arg("-a").arg(&socket).arg("version").output()?.status.success() {
            if start.elapsed() > Duration::from_secs(20) {
                bail!("containerd does not answer: {}", fs::read_to_string(log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(this)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status(); // kill() would not let it end its shims
        let _ = self.0.wait();
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

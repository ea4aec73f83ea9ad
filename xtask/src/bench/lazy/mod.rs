//! `cargo xtask bench lazy`: lazy images beside nydusd, where it is installed, and beside the kernel's EROFS on a plain file, which is the limit.

mod make;
mod network;
mod reads;
mod served;
mod start;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};

use self::{
    served::{Erofs, Nydus, Ours, daemon, peak},
    tree::{FIRST, Trees},
};
use super::{Case, build, registry::Registry};
use crate::run::{run, target};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// One JSON object a line: case, ours, peer, unit, ratio, goal, ok
    #[arg(long)]
    json: bool,
    /// The size of the tree in MB
    #[arg(long, default_value_t = 800)]
    tree_mb: u64,
    /// How often each candidate runs
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// This binary of ours instead of one that is built now
    #[arg(long)]
    nacre: Option<PathBuf>,
    /// Where trees, images and caches go: the disk that is measured [default: bench in cargo's target directory]
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Building, sizes, indexes
    Make,
    /// Reading what is mounted
    Read,
    /// Applications, over a network of 100 Mbit/s and 20 ms
    Start,
    /// An image of a million files
    Million,
}

impl Options {
    fn has(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// What all parts need.
struct Bench {
    options: Options,
    ours: Ours,
    nydus: Option<Nydus>,
    trees: Trees,
    registry: Registry,
}

pub(crate) fn lazy(options: Options) -> Result<()> {
    let place = options.directory.clone().unwrap_or_else(|| target().join("bench"));
    fs::create_dir_all(&place)?;
    let place = fs::canonicalize(place)?;
    let nacre = match &options.nacre {
        Some(path) => fs::canonicalize(path)?,
        None => build()?,
    };
    let trees = tree::prepare(&place, options.tree_mb)?;
    let work = trees.place.join("work");
    if work.exists() {
        fs::remove_dir_all(&work).context("what an earlier run left; is something still mounted there?")?;
    }
    fs::create_dir_all(&work)?;
    let ours = Ours { nacre, policy: work.join("policy.json"), private_key: work.join("key.pem"), place: work };
    fs::write(&ours.policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
    let mut openssl = Command::new("openssl");
    run(openssl.args(["genrsa", "-out"]).arg(&ours.private_key).arg("3072").stderr(Stdio::null()))?;
    let registry = Registry::start(&ours.place.join("registry"))?;
    let nydus = Nydus::find(&ours.place);
    if nydus.is_none() {
        eprintln!("nydusd and nydus-image are not on PATH: what is compared with them is not measured");
    }
    let bench = Bench { options, ours, nydus, trees, registry };
    let mut cases = make::cases(&bench)?;
    if bench.options.has(Part::Read) {
        cases.extend(read(&bench)?);
    }
    if bench.options.has(Part::Start) {
        cases.extend(start::cases(&bench)?);
    }
    if bench.options.has(Part::Million) {
        cases.extend(make::million(&bench)?);
    }
    cases.iter().try_for_each(|case| case.print(bench.options.json))
}

/// What the rounds gave, for one way of serving.
#[derive(Default)]
struct Figures {
    find_cold: Vec<f64>,
    tar_cold: Vec<f64>,
    random_cold: Vec<f64>,
    find_warm: Vec<f64>,
    tar_warm: Vec<f64>,
    random_warm: Vec<f64>,
}

impl Figures {
    /// One round: what is cold is so for each measurement, since `remount` mounts it anew, with nothing of it in the kernel's memory.
    fn round<M>(&mut self, places: &[(PathBuf, u64)], remount: impl Fn() -> Result<(M, PathBuf)>) -> Result<()> {
        {
            let (_mount, at) = remount()?;
            self.random_cold.push(reads::random(&at, places)?);
            self.random_warm.push(reads::random(&at, places)?);
        }
        let (_mount, at) = remount()?;
        self.find_cold.push(reads::find(&at)?);
        self.tar_cold.push(reads::tar(&at)?);
        self.find_warm.push(reads::find(&at)?);
        self.tar_warm.push(reads::tar(&at)?);
        Ok(())
    }
}

/// A mount of ours, until it is dropped.
struct OurMount<'a> {
    ours: &'a Ours,
    root: &'a Path,
    target: PathBuf,
}

impl Drop for OurMount<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.ours.umount(self.root, &self.target) {
            eprintln!("{error}");
        }
    }
}

fn read(bench: &Bench) -> Result<Vec<Case>> {
    let (ours, trees) = (&bench.ours, &bench.trees);
    let root = ours.place.join("read");
    let reference = make::reference(bench, FIRST);
    let target = |name: &str| ours.place.join(format!("mnt-{name}"));
    eprintln!("completing the image");
    let whole = OurMount { ours, root: &root, target: target("ours") };
    ours.mount(&root, &reference, &whole.target, &["--complete"])?;
    ours.completed(&root)?;
    drop(whole);
    let image = trees.place.join("tree.erofs");
    Erofs::image(&trees.tree(FIRST), &image)?;
    if let Some(nydus) = &bench.nydus {
        nydus.build(FIRST, &trees.tree(FIRST), None)?;
    }
    let places = reads::places(&trees.tree(FIRST))?;
    let (mut us, mut erofs, mut nydusd) = (Figures::default(), Figures::default(), Figures::default());
    let (mut ready, mut after) = (Vec::new(), Vec::new());
    for round in 1..=bench.options.rounds {
        eprintln!("reading, round {round}");
        erofs.round(&places, || {
            reads::cold()?;
            let mounted = Erofs::mount(&image, &target("erofs"))?;
            let at = mounted.target.clone();
            Ok((mounted, at))
        })?;
        us.round(&places, || {
            reads::cold()?;
            let mounted = OurMount { ours, root: &root, target: target("ours") };
            ours.mount(&root, &reference, &mounted.target, &[])?;
            Ok((mounted, target("ours")))
        })?;
        if let Some(nydus) = &bench.nydus {
            nydusd.round(&places, || {
                reads::cold()?;
                let mounted = nydus.mount(FIRST, &target("nydusd"))?;
                let at = mounted.target.clone();
                Ok((mounted, at))
            })?;
        }
        // The daemon runs, as it does where pods are started one after the other.
        let first = OurMount { ours, root: &root, target: target("ours") };
        ours.mount(&root, &reference, &first.target, &[])?;
        let again = OurMount { ours, root: &root, target: target("again") };
        ready.push(ours.mount(&root, &reference, &again.target, &[])? * 1000.0);
        let ended = Instant::now();
        let answered = bench.registry.answered().context("the registry's log says nothing of a manifest")?;
        after.push(ended.saturating_duration_since(answered).as_secs_f64() * 1000.0);
    }
    let memory = parallel(bench, &root, &reference)?;
    let mut cases = vec![
        Case::bounded("mount until names can be read, from the manifest on", super::median(after), "ms", 60.0),
        Case::bounded("the same, the whole command", super::median(ready), "ms", 100.0),
        Case::against("find, cold, vs nydusd", &us.find_cold, &nydusd.find_cold, 0.125),
        Case::against("find, cold, vs EROFS on a file", &us.find_cold, &erofs.find_cold, 1.0),
        Case::against("tar, cold, vs nydusd", &us.tar_cold, &nydusd.tar_cold, 0.5),
        Case::against("tar, cold, vs EROFS on a file", &us.tar_cold, &erofs.tar_cold, 1.0),
        Case::faster("random 4 KiB, cold, vs nydusd", "IOPS", &us.random_cold, &nydusd.random_cold, 1.0),
        Case::against("find, warm, vs EROFS on a file", &us.find_warm, &erofs.find_warm, 1.0 / 0.95),
        Case::against("tar, warm, vs EROFS on a file", &us.tar_warm, &erofs.tar_warm, 1.0 / 0.95),
        Case::faster("random 4 KiB, warm, vs EROFS on a file", "IOPS", &us.random_warm, &erofs.random_warm, 0.95),
    ];
    cases.push(Case::bounded("memory of the daemon, three tars at once", Some(memory), "MiB", 64.0));
    Ok(cases)
}

/// The most memory of the daemon while three mounts are read at once, MiB.
fn parallel(bench: &Bench, root: &Path, reference: &str) -> Result<f64> {
    let ours = &bench.ours;
    reads::cold()?;
    let mounts: Vec<OurMount<'_>> = (0..3)
        .map(|number| {
            let target = ours.place.join(format!("mnt-{number}"));
            let mounted = OurMount { ours, root, target };
            ours.mount(root, reference, &mounted.target, &[])?;
            Ok(mounted)
        })
        .collect::<Result<_>>()?;
    let targets: Vec<PathBuf> = mounts.iter().map(|mount| mount.target.clone()).collect();
    reads::tars(&targets)?;
    peak(daemon(root)?)
}

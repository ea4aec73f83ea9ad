//! What is read of a mounted tree, and how fast.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use crate::run::run;

/// Random reads of one measurement.
const READS: usize = 2000;

/// Nothing of any file is in the kernel's memory after it.
pub(super) fn cold() -> Result<()> {
    run(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("/proc/sys/vm/drop_caches: the bench has to run as root")
}

/// Seconds of a walk over all names and attributes.
pub(super) fn find(tree: &Path) -> Result<f64> {
    let start = Instant::now();
    run(Command::new("find").arg(tree).args(["-printf", "%s"]).stdout(Stdio::null()))?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of reading everything.
pub(super) fn tar(tree: &Path) -> Result<f64> {
    let start = Instant::now();
    let mut child = start_tar(tree)?;
    drain(&mut child)?;
    Ok(start.elapsed().as_secs_f64())
}

/// The same of several trees at once.
pub(super) fn tars(trees: &[PathBuf]) -> Result<()> {
    let children = trees.iter().map(|tree| start_tar(tree)).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let drains: Vec<_> = children.into_iter().map(|mut child| scope.spawn(move || drain(&mut child))).collect();
        drains.into_iter().try_for_each(|drain| drain.join().ok().context("a thread of the bench failed")?)
    })
}

fn start_tar(tree: &Path) -> Result<std::process::Child> {
    let mut command = Command::new("tar");
    command.arg("-C").arg(tree).args(["-cf", "-", "."]).stdout(Stdio::piped());
    command.spawn().context("tar")
}

fn drain(child: &mut std::process::Child) -> Result<()> {
    // tar does not read files when its output is /dev/null.
    let mut stdout = child.stdout.take().context("tar's output")?;
    let mut buffer = vec![0; 1 << 20];
    while stdout.read(&mut buffer)? > 0 {}
    ensure!(child.wait()?.success(), "tar failed");
    Ok(())
}

/// Files and places in them, the same ones each time.
pub(super) fn places(tree: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let (mut files, mut pending) = (Vec::new(), vec![tree.to_owned()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.is_file() && metadata.len() >= 4096 {
                files.push((entry.path(), metadata.len()));
            }
        }
    }
    files.sort();
    let total: u64 = files.iter().map(|(_, size)| size).sum();
    ensure!(total > 0, "the tree has no file of 4 KiB");
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 16
    };
    let mut ends = Vec::with_capacity(files.len());
    for (_, size) in &files {
        ends.push(ends.last().copied().unwrap_or(0) + size);
    }
    let mut places = Vec::with_capacity(READS);
    for _ in 0..READS {
        let byte = random() % total;
        let at = ends.partition_point(|end| *end <= byte);
        let (path, size) = files.get(at).context("a file")?;
        let path = path.strip_prefix(tree)?.to_owned();
        places.push((path, random() % (size / 4096) * 4096));
    }
    Ok(places)
}

/// Reads of 4 KiB a second.
pub(super) fn random(tree: &Path, places: &[(PathBuf, u64)]) -> Result<f64> {
    let start = Instant::now();
    let mut buffer = [0; 4096];
    for (path, offset) in places {
        let path = tree.join(path);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        file.read_exact_at(&mut buffer, *offset).with_context(|| path.display().to_string())?;
    }
    Ok(places.len() as f64 / start.elapsed().as_secs_f64())
}

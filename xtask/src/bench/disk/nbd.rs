//! The disk over NBD, and the peers: fio with its nbd engine drives all of them in the same way.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{
    MEMORY, Options,
    serve::{Images, Running, Server, pin},
};
use crate::{
    bench::{Case, build, median},
    run::{find, output},
};

/// How often each candidate runs a job.
const ROUNDS: u32 = 3;
/// Bytes that a job writes on the local disk: four times as many as go before a flush, and a few, since fio flushes before the next write.
const PORTION: u64 = (4 << 28) + (1 << 17);

/// A case: what fio does, and how much faster than the best of the peers ours is to be.
struct Job {
    name: &'static str,
    /// fio's `rw`.
    kind: &'static str,
    block: &'static str,
    depth: &'static str,
    more: &'static [&'static str],
    /// Server and fio on one core.
    pinned: bool,
    goal: f64,
}

const fn job(name: &'static str, kind: &'static str, block: &'static str, depth: &'static str, goal: f64) -> Job {
    Job { name, kind, block, depth, more: &[], pinned: false, goal }
}

const IN_MEMORY: &[Job] = &[
    job("NBD, tmpfs: random 4 KiB write, depth 32", "randwrite", "4k", "32", 1.6),
    Job { more: &["--fsync=32"], ..job("NBD, tmpfs: random 4 KiB write, flush each 32", "randwrite", "4k", "32", 1.4) },
    job("NBD, tmpfs: random 4 KiB read, depth 32", "randread", "4k", "32", 1.3),
    job("NBD, tmpfs: sequential 256 KiB write", "write", "256k", "8", 2.0),
    job("NBD, tmpfs: sequential 256 KiB read", "read", "256k", "8", 2.0),
    Job { pinned: true, ..job("NBD, tmpfs: random 4 KiB write, depth 1, one core", "randwrite", "4k", "1", 1.0) },
    Job { pinned: true, ..job("NBD, tmpfs: random 4 KiB read, depth 1, one core", "randread", "4k", "1", 1.0) },
];

/// With flushes, the last one in the end: a server that leaves everything in the page cache has not reached the medium.
const ON_DISK: &[Job] = &[Job {
    more: &[FLUSH_EACH_256_MIB],
    ..job("NBD, local disk: random 4 KiB write, depth 32", "randwrite", "4k", "32", 1.5)
}];
const FLUSH_EACH_256_MIB: &str = "--fsync=65536";

pub(super) fn nbd(options: &Options) -> Result<()> {
    let wanted = |jobs: &'static [Job]| jobs.iter().filter(|job| options.wants(job.name)).collect::<Vec<_>>();
    let (memory, disk) = (wanted(IN_MEMORY), wanted(ON_DISK));
    if memory.is_empty() && disk.is_empty() {
        return Ok(());
    }
    let nacre = match &options.nacre {
        Some(path) => std::fs::canonicalize(path)?,
        None => build()?,
    };
    let fio = find("fio");
    for (jobs, place, peers) in [
        (memory, Path::new(MEMORY), &[Server::NbdkitLuks, Server::QemuLuks][..]),
        (disk, &*options.dir, &[Server::NbdkitFile][..]),
    ] {
        if jobs.is_empty() {
            continue;
        }
        match &fio {
            Some(fio) => Medium::new(options, fio, &nacre, place, peers)?.measure(&jobs)?,
            None => {
                eprintln!("fio is not installed (apt-get install fio): nothing is measured over NBD");
                let cases: Vec<_> = jobs.iter().map(|job| judge(job, &BTreeMap::new(), peers)).collect();
                options.print(&cases)?;
            }
        }
    }
    Ok(())
}

/// A medium with the images of all candidates on it.
struct Medium<'a> {
    options: &'a Options,
    fio: &'a Path,
    nacre: &'a Path,
    place: tempfile::TempDir,
    peers: &'a [Server],
    candidates: Vec<Server>,
}

/// What a job gave each candidate, by round: requests a second.
type Rates = BTreeMap<Server, Vec<f64>>;

impl<'a> Medium<'a> {
    fn new(options: &'a Options, fio: &'a Path, nacre: &'a Path, place: &Path, peers: &'a [Server]) -> Result<Self> {
        let mut candidates = vec![Server::Ours];
        for peer in peers {
            match peer.missing() {
                Some(program) => eprintln!("{}: {program} is not installed, not measured", peer.name()),
                None => candidates.push(*peer),
            }
        }
        let place = tempfile::tempdir_in(place)?;
        Ok(Self { options, fio, nacre, place, peers, candidates })
    }

    fn images(&self) -> Images<'_> {
        Images { nacre: self.nacre, place: self.place.path(), size: self.options.size() }
    }

    fn measure(&self, jobs: &[&Job]) -> Result<()> {
        for server in &self.candidates {
            self.images().make(*server)?;
        }
        // Both LUKS servers have one image.
        let luks = [Server::NbdkitLuks, Server::QemuLuks].into_iter().find(|server| self.candidates.contains(server));
        for server in &self.candidates {
            if matches!(server, Server::Ours | Server::NbdkitFile) || luks == Some(*server) {
                self.fill(*server)?;
            }
        }
        for job in jobs {
            let mut rates = Rates::new();
            for round in 1..=ROUNDS {
                for server in &self.candidates {
                    let rate = self.run(*server, job)?;
                    eprintln!("round {round}: {:<55} {:<22} {rate:>9.0} a second", job.name, server.name());
                    rates.entry(*server).or_default().push(rate);
                }
            }
            self.options.print(&[judge(job, &rates, self.peers)])?;
        }
        Ok(())
    }

    /// Writes all of it, twice: once for the image to have its room, and once more for a disk that writes elsewhere each time.
    fn fill(&self, server: Server) -> Result<()> {
        let running = self.images().start(server, false)?;
        for _ in 0..2 {
            let mut fio = self.fio(&running, false);
            fio.args(["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"]);
            output(&mut fio)?;
        }
        Ok(())
    }

    fn fio(&self, running: &Running, pinned: bool) -> Command {
        let mut fio = pin(self.fio, pinned);
        fio.current_dir(self.place.path()).args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--thread"]);
        fio.arg(format!("--uri=nbd+unix:///?socket={}", running.socket.display()));
        fio.arg(format!("--size={}", self.options.size()));
        fio
    }

    fn run(&self, server: Server, job: &Job) -> Result<f64> {
        let running = self.images().start(server, job.pinned)?;
        let mut fio = self.fio(&running, job.pinned);
        fio.arg(format!("--rw={}", job.kind));
        fio.args([format!("--bs={}", job.block), format!("--iodepth={}", job.depth)]).args(job.more);
        fio.args(["--norandommap", "--randrepeat=0"]);
        if job.more.contains(&FLUSH_EACH_256_MIB) {
            fio.arg(format!("--io_size={}", PORTION));
        } else {
            fio.args(["--time_based".to_owned(), format!("--runtime={}", self.options.seconds.div_ceil(ROUNDS))]);
        }
        let text = output(&mut fio)?;
        let text = text.find('{').and_then(|begin| text.get(begin..)).context("fio printed no JSON")?;
        let report: Report = serde_json::from_str(text).context("what fio printed")?;
        report.rate()
    }
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<JobReport>,
}

#[derive(Deserialize)]
struct JobReport {
    error: i64,
    read: Direction,
    write: Direction,
    /// In milliseconds.
    job_runtime: u64,
}

#[derive(Deserialize)]
struct Direction {
    total_ios: u64,
}

impl Report {
    fn rate(&self) -> Result<f64> {
        let job = self.jobs.first().context("fio ran no job")?;
        anyhow::ensure!(job.error == 0, "fio met error {}", job.error);
        Ok((job.read.total_ios + job.write.total_ios) as f64 * 1e3 / job.job_runtime.max(1) as f64)
    }
}

/// Ours against the best of the peers.
fn judge(job: &Job, rates: &Rates, peers: &[Server]) -> Case {
    let all = |server: Server| rates.get(&server).map(Vec::as_slice).unwrap_or_default();
    let middle = |server: Server| median(all(server).to_vec()).unwrap_or(0.0);
    let best = peers.iter().copied().max_by(|one, other| middle(*one).total_cmp(&middle(*other)));
    Case::faster(job.name, "IOPS", all(Server::Ours), best.map(all).unwrap_or_default(), job.goal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_peer_is_the_one_to_beat() {
        let rates = Rates::from([
            (Server::Ours, vec![40.0, 50.0, 60.0]),
            (Server::NbdkitLuks, vec![20.0, 25.0, 30.0]),
            (Server::QemuLuks, vec![10.0, 11.0, 12.0]),
        ]);
        let peers = [Server::QemuLuks, Server::NbdkitLuks];
        let Some(job) = IN_MEMORY.first() else { unreachable!("there are jobs") };
        let case = judge(job, &rates, &peers);
        assert_eq!((case.ratio, case.ok), (Some(2.0), Some(true)));
        assert_eq!(judge(job, &Rates::new(), &peers).ok, None);
    }

    #[test]
    fn reports_of_fio_are_understood() {
        let text = r#"{"fio version": "fio-3.33", "jobs": [{"error": 0, "job_runtime": 500,
            "read": {"total_ios": 0}, "write": {"total_ios": 1000, "iops": 2.0}}]}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        assert_eq!(report.rate().unwrap(), 2000.0);
    }
}

//! `cargo xtask bench broker`: full attestations with simulated evidence and one key each, over TLS on loopback, guests on the same cores.
//! The parts are in `crates/broker/examples/bench.rs`; here they are started and judged.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Case, median};
use crate::run::{cargo, find, output, run, target};

/// Guests at a time.
const GUESTS: &str = "16";
const SESSIONS: usize = 10_000;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// One JSON object a line: case, ours, peer, unit, ratio, goal, ok
    #[arg(long)]
    json: bool,
    /// How long each candidate runs, in seconds
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// How often each candidate runs
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where databases go: the disk that is measured [default: bench in cargo's target directory]
    #[arg(long)]
    directory: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Figure {
    value: f64,
}

/// A broker in a process of its own.
struct Served {
    child: Child,
    input: Option<ChildStdin>,
    url: String,
}

impl Served {
    fn start(program: &Path, dir: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        let mut child = command.arg("serve").arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        let input = child.stdin.take();
        Ok(Self { child, input, url: line.trim().to_owned() })
    }

    /// MiB of memory that are its own.
    fn memory(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }
}

impl Served {
    /// Seconds of processor that it has used.
    fn processor(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the name in parentheses, the 12th and the 13th: ticks in itself and in the kernel, of which there are 100 a second (proc(5)).
        let rest = stat.rsplit_once(')').context("stat")?.1;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        Ok(ticks / 100.0)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

fn load(program: &Path, dir: &Path, seconds: u32, how: &str, urls: &[&str]) -> Result<f64> {
    let mut command = Command::new(program);
    command.arg("load").arg(dir).args([&seconds.to_string(), GUESTS, how]).args(urls).stderr(Stdio::inherit());
    let figure: Figure = serde_json::from_str(output(&mut command)?.trim())?;
    Ok(figure.value)
}

pub(crate) fn broker(options: &Options) -> Result<()> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "nacre-broker", "--example", "bench"]))?;
    let program = target().join("release/examples/bench");
    let place = options.directory.clone().unwrap_or_else(|| target().join("bench"));
    fs::create_dir_all(&place)?;
    let place = tempfile::tempdir_in(place)?;
    for case in embedded(options, &program, &place.path().join("embedded"))? {
        case.print(options.json)?;
    }
    for case in replicas(options, &program, place.path())? {
        case.print(options.json)?;
    }
    Ok(())
}

fn embedded(options: &Options, program: &Path, dir: &Path) -> Result<Vec<Case>> {
    run(Command::new(program).arg("init").arg(dir))?;
    let (mut kept, mut new, mut own) = (Vec::new(), Vec::new(), Vec::new());
    let served = Served::start(program, dir)?;
    for _ in 0..options.rounds {
        let before = served.processor()?;
        let rate = load(program, dir, options.seconds, "keep", &[&served.url])?;
        own.push(2.0 * rate * f64::from(options.seconds) / (served.processor()? - before));
        kept.push(rate);
        new.push(load(program, dir, options.seconds, "new", &[&served.url])?);
    }
    drop(served);
    let served = Served::start(program, dir)?;
    let before = served.memory()?;
    run(Command::new(program).arg("sessions").arg(dir).arg(SESSIONS.to_string()).arg(&served.url))?;
    let after = served.memory()?;
    Ok(vec![
        Case::reaching("attestation and key, embedded, connections kept", median(kept), "/s", 1000.0),
        Case::reaching("the same, of two processors that the broker has alone", median(own), "/s", 1000.0),
        Case::reaching("attestation and key, embedded, a handshake each", median(new), "/s", 1000.0),
        Case::bounded("memory with 10,000 attested sessions", Some(after), "MiB", 256.0),
        Case::bounded("memory of a session", Some((after - before) * 1024.0 / SESSIONS as f64), "KiB", 16.0),
    ])
}

/// One replica, and two, on a PostgreSQL that syncs.
fn replicas(options: &Options, program: &Path, place: &Path) -> Result<Vec<Case>> {
    let Some(cluster) = Cluster::start(place)? else {
        eprintln!("PostgreSQL is not installed: replicas are not measured");
        return Ok(Vec::new());
    };
    let dir = place.join("replica");
    run(Command::new(program).arg("init").arg(&dir).arg(cluster.url()))?;
    let (one, two) = (Served::start(program, &dir)?, Served::start(program, &dir)?);
    let (mut alone, mut both) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        alone.push(load(program, &dir, options.seconds, "keep", &[&one.url])?);
        both.push(load(program, &dir, options.seconds, "keep", &[&one.url, &two.url])?);
    }
    Ok(vec![Case::faster("PostgreSQL: two replicas by one, on the cores of both", "/s", &both, &alone, 1.5)])
}

struct Cluster {
    programs: PathBuf,
    data: PathBuf,
}

impl Cluster {
    fn start(place: &Path) -> Result<Option<Self>> {
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let Some(programs) = versions.map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").exists())
        else {
            return Ok(None);
        };
        let data = place.join("postgres");
        fs::create_dir(&data)?;
        let cluster = Self { programs, data };
        if is_root() {
            // The user that it runs as has to come to its directory.
            for parent in place.ancestors() {
                let _ = Command::new("chmod").arg("o+x").arg(parent).status();
            }
            run(Command::new("chown").arg("postgres").arg(&cluster.data))?;
        }
        run(cluster
            .tool("initdb")
            .args(["--auth=trust", "-U", "nacre", "-D"])
            .arg(&cluster.data)
            .stdout(Stdio::null()))?;
        let settings = format!("-c listen_addresses='' -c unix_socket_directories={}", cluster.data.display());
        let mut start = cluster.tool("pg_ctl");
        start.args(["-w", "-o", &settings, "-l"]).arg(cluster.data.join("log")).arg("-D").arg(&cluster.data);
        run(start.arg("start").stdout(Stdio::null()))?;
        Ok(Some(cluster))
    }

    fn url(&self) -> String {
        format!("postgresql://nacre@{}/postgres", self.data.display().to_string().replace('/', "%2F"))
    }

    fn tool(&self, name: &str) -> Command {
        let program = self.programs.join(name);
        let mut command = match is_root() && find("runuser").is_some() {
            true => {
                let mut command = Command::new("runuser");
                command.args(["-u", "postgres", "--"]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.current_dir("/");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut stop = self.tool("pg_ctl");
        let _ = stop.args(["-m", "immediate", "-D"]).arg(&self.data).arg("stop").stdout(Stdio::null()).status();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

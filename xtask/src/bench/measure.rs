//! One measurement: a few commands in a row, and `sync` of the file system they wrote to, in a process of its own, so that the
//! kernel's account of that process's children is the account of these commands alone.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};
use serde::{Deserialize, Serialize};

use crate::run::{output, run};

#[derive(Serialize, Deserialize)]
struct Spec {
    commands: Vec<Vec<String>>,
    sync: PathBuf,
    log: PathBuf,
}

/// What one measurement gave.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Until everything was durable.
    pub(crate) seconds: f64,
    /// CPU seconds of the commands in user mode, and in the kernel.
    pub(crate) user: f64,
    pub(crate) system: f64,
    /// The largest resident set of any process of the commands.
    pub(crate) peak_mib: f64,
}

/// Runs the commands; what they write below `directory` is durable in the end.
pub(crate) fn measure(directory: &Path, commands: &[Vec<String>]) -> Result<Sample> {
    run(&mut Command::new("sync"))?; // what others wrote before is not our account's
    let file = tempfile::NamedTempFile::new()?;
    let log = tempfile::NamedTempFile::new()?;
    let spec = Spec { commands: commands.to_vec(), sync: directory.to_owned(), log: log.path().to_owned() };
    fs::write(file.path(), serde_json::to_vec(&spec)?)?;
    let this = std::env::current_exe()?;
    let answer = output(Command::new(this).arg("measure").arg(file.path()))
        .with_context(|| fs::read_to_string(log.path()).unwrap_or_default())?;
    Ok(serde_json::from_str(&answer)?)
}

/// The process that measures.
pub(crate) fn child(path: &Path) -> Result<()> {
    let spec: Spec = serde_json::from_slice(&fs::read(path)?)?;
    let start = Instant::now();
    for command in &spec.commands {
        let (program, arguments) = command.split_first().context("an empty command")?;
        let log = fs::File::options().append(true).open(&spec.log)?;
        let mut command = Command::new(program);
        command.args(arguments).process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let status = command.status().with_context(|| format!("cannot start {program}"))?;
        if !status.success() {
            bail!("{command:?}: {status}");
        }
    }
    let account = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    run(Command::new("sync").arg("-f").arg(&spec.sync))?;
    let seconds = start.elapsed().as_secs_f64();
    let kib = i32::try_from(account.max_rss()).context("no sensible peak")?;
    let cpu = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    let (user, system) = (cpu(account.user_time()), cpu(account.system_time()));
    println!("{}", serde_json::to_string(&Sample { seconds, user, system, peak_mib: f64::from(kib) / 1024.0 })?);
    Ok(())
}

//! `cargo xtask bench disk`: the secure disk in process, by the benchmark program of its crate, and over NBD, by fio, which drives the
//! peers in the same way and in turns.
//!
//! Every store and image is written from end to end before it is measured, ours and the peers' alike: the first touch of a page of tmpfs
//! costs three times what the next one costs, and a file that finds its room while it is measured measures the filesystem.

mod inside;
mod nbd;
mod serve;

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::Case;

const MEMORY: &str = "/dev/shm";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// One JSON object a line: case, ours, peer, unit, ratio, goal, ok
    #[arg(long)]
    json: bool,
    /// How long each case is measured, all rounds together
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Only the cases with this in their names
    #[arg(long, value_name = "CASE")]
    only: Option<String>,
    /// A directory on the local disk
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// The size of the disks in MiB
    #[arg(long, default_value_t = 4096)]
    size_mib: u64,
    /// The size of the huge disk in GiB
    #[arg(long, default_value_t = 1024)]
    huge_gib: u64,
    /// This binary of ours instead of one that is built now
    #[arg(long)]
    nacre: Option<PathBuf>,
}

impl Options {
    fn size(&self) -> u64 {
        self.size_mib << 20
    }

    /// Whether a case is wanted.
    fn wants(&self, case: &str) -> bool {
        self.only.as_ref().is_none_or(|only| case.contains(only.as_str()))
    }

    /// Whether one of several cases is.
    fn wants_any(&self, cases: &[&str]) -> bool {
        cases.iter().any(|case| self.wants(case))
    }

    /// Prints the cases that are wanted.
    fn print(&self, cases: &[Case]) -> Result<()> {
        cases.iter().filter(|case| self.wants(&case.case)).try_for_each(|case| case.print(self.json))
    }
}

pub(crate) fn disk(options: &Options) -> Result<()> {
    ensure!(options.seconds > 0, "--seconds has to be at least 1");
    ensure!((64..=1 << 20).contains(&options.size_mib), "--size-mib has to be from 64 to 1048576");
    inside::inside(options)?;
    nbd::nbd(options)
}

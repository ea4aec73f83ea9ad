//! `cargo xtask bench`: ours and every peer that is installed, in one run on one disk, in turns, and the ratios of the medians.

mod broker;
mod disk;
mod image;
mod lazy;
pub(crate) mod measure;
mod pull;
mod registry;

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use crate::run::{cargo, run, target};

#[derive(clap::Subcommand)]
pub(crate) enum Bench {
    /// Pulling and unpacking an image
    Pull(pull::Options),
    /// The secure disk: in process and over NBD
    Disk(disk::Options),
    /// The key broker: attestations and keys a second, memory, replicas
    Broker(broker::Options),
    /// Lazy images: made, mounted and read, and started over a network
    Lazy(lazy::Options),
}

pub(crate) fn bench(bench: Bench) -> Result<()> {
    match bench {
        Bench::Pull(options) => pull::pull(&options),
        Bench::Disk(options) => disk::disk(&options),
        Bench::Broker(options) => broker::broker(&options),
        Bench::Lazy(options) => lazy::lazy(options),
    }
}

/// A line of the result.
#[derive(Serialize)]
struct Case {
    case: String,
    /// Medians, in `unit`.
    ours: Option<f64>,
    peer: Option<f64>,
    unit: &'static str,
    /// The median over the rounds of ours / peer, since what disturbs a round disturbs both.
    ratio: Option<f64>,
    /// What `ratio` has to keep to, or `ours` where there is no peer.
    goal: f64,
    ok: Option<bool>,
    #[serde(skip)]
    sense: Sense,
}

/// On which side of the goal is the good side.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sense {
    AtMost,
    AtLeast,
}

impl Sense {
    fn holds(self, value: f64, goal: f64) -> bool {
        match self {
            Self::AtMost => value <= goal,
            Self::AtLeast => value >= goal,
        }
    }
}

impl Case {
    /// Two candidates, each with its seconds in every round; ours is to take at most `goal` times as long.
    fn against(case: &str, ours: &[f64], peer: &[f64], goal: f64) -> Self {
        Self::compare(case, "s", ours, peer, Sense::AtMost, goal)
    }

    /// Two candidates, each with its rate in every round; ours is to be at least `goal` times as fast.
    fn faster(case: &str, unit: &'static str, ours: &[f64], peer: &[f64], goal: f64) -> Self {
        Self::compare(case, unit, ours, peer, Sense::AtLeast, goal)
    }

    /// Two candidates, each with its MiB; ours is to have at most `goal` times as many.
    fn compare_sizes(case: &str, ours: &[f64], peer: &[f64], goal: f64) -> Self {
        Self::compare(case, "MiB", ours, peer, Sense::AtMost, goal)
    }

    fn compare(case: &str, unit: &'static str, ours: &[f64], peer: &[f64], sense: Sense, goal: f64) -> Self {
        let ratio = median(ours.iter().zip(peer).map(|(ours, peer)| ours / peer).collect());
        let (ours, peer) = (median(ours.to_vec()), median(peer.to_vec()));
        let ok = ratio.map(|ratio| sense.holds(ratio, goal));
        Self { case: case.to_owned(), ours, peer, unit, ratio, goal, ok, sense }
    }

    /// Ours alone, which is to be at most `goal`.
    fn bounded(case: &str, ours: Option<f64>, unit: &'static str, goal: f64) -> Self {
        Self::alone(case, ours, unit, Sense::AtMost, goal)
    }

    /// Ours alone, which is to be at least `goal`.
    fn reaching(case: &str, ours: Option<f64>, unit: &'static str, goal: f64) -> Self {
        Self::alone(case, ours, unit, Sense::AtLeast, goal)
    }

    fn alone(case: &str, ours: Option<f64>, unit: &'static str, sense: Sense, goal: f64) -> Self {
        let ok = ours.map(|ours| sense.holds(ours, goal));
        Self { case: case.to_owned(), ours, peer: None, unit, ratio: None, goal, ok, sense }
    }

    fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let verdict = self.ok.map_or("not measured", |ok| if ok { "met" } else { "MISSED" });
        let sense = if self.sense == Sense::AtMost { '≤' } else { '≥' };
        println!(
            "{:<52} ours {:>9} {:<5} peer {:>9}   ratio {:>6}   goal {sense} {:>6}   {verdict}",
            self.case,
            number(self.ours),
            self.unit,
            number(self.peer),
            number(self.ratio),
            self.goal
        );
        Ok(())
    }
}

/// Our program, as it is released.
fn build() -> Result<PathBuf> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "nacre-cli"]))?;
    Ok(target().join("release/nacre"))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => values.get(middle).copied(),
        _ => Some((values.get(middle - 1)? + values.get(middle)?) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_goals() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(Case::against("x", &[1.0, 1.0, 9.0], &[4.0, 5.0, 4.0], 0.3).ok, Some(true));
        assert_eq!(Case::against("x", &[2.0], &[4.0], 0.3).ok, Some(false));
        assert_eq!(Case::against("x", &[2.0], &[], 0.3).ok, None);
        assert_eq!(Case::bounded("x", Some(101.0), "MiB", 100.0).ok, Some(false));
        assert_eq!(Case::faster("x", "IOPS", &[3.0, 2.0, 3.0], &[1.0, 1.0, 2.0], 2.0).ok, Some(true));
        assert_eq!(Case::faster("x", "IOPS", &[3.0], &[2.0], 2.0).ok, Some(false));
        assert_eq!(Case::reaching("x", Some(99.0), "IOPS", 100.0).ok, Some(false));
    }
}

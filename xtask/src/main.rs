//! The project's own tasks. `cargo xtask lint`, `cargo xtask test` and `cargo xtask bench pull` are what people and CI run.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod bench;
mod fuzz;
mod lint;
mod packages;
mod run;
mod test;
mod tree;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "The project's own tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, clippy, documentation, licences and advisories, and the rules that no tool knows
    Lint,
    /// All tests, those that need root and other programs included
    Test(test::Options),
    /// Ours and the peers side by side
    #[command(subcommand)]
    Bench(bench::Bench),
    /// A fuzz target under libFuzzer
    Fuzz(fuzz::Options),
    /// The crates of the guest's dependency tree, and the direction of dependencies
    Tree,
    /// Runs the commands of a file and prints their time and memory as JSON (used by bench)
    #[command(hide = true)]
    Measure {
        /// The file
        spec: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Lint => lint::lint(),
        Task::Test(options) => test::test(&options),
        Task::Bench(bench) => bench::bench(bench),
        Task::Fuzz(options) => fuzz::fuzz(&options),
        Task::Tree => tree::check().map(|report| println!("{report}")),
        Task::Measure { spec } => bench::measure::child(&spec),
    };
    if let Err(error) = &result {
        eprintln!("xtask: {error:#}");
    }
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

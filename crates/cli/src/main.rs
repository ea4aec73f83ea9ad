//! `nacre`: trusted storage for confidential containers, from the command line.

mod args;
mod background;
mod commands;
mod demo;
mod exit;
mod output;
mod progress;
mod setup;
mod size;

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

use args::{Cli, Command};

fn main() -> ExitCode {
    // First of all: this may be a helper of ours between fork and exec.
    nacre_sys::stage::enter();
    let mut cli = Cli::parse();
    if matches!(cli.command, Command::Demo(_)) && cli.global.log.is_none() {
        // The story tells of its attacks; the log would tell of them a second time.
        cli.global.quiet = true;
    }
    start_log(&cli.global);
    match run(&cli) {
        // A container's own code; those above 255 do not exist.
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            output::error(&error);
            ExitCode::from(exit::of(&error) as u8)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<i32> {
    let global = &cli.global;
    match &cli.command {
        Command::Demo(args) => demo::demo(global, args)?,
        Command::DemoGuest(args) => return demo::guest(args),
        Command::DemoWorkload => demo::workload()?,
        Command::Run(args) => return commands::run::run(global, args),
        Command::Image(command) => return commands::image::image(global, command),
        Command::Broker(command) => commands::broker::broker(command)?,
        Command::Disk(command) => return commands::disk::disk(global, command),
        Command::Attest(command) => commands::attest::attest(global, command)?,
        Command::Guest(command) => commands::guest::guest(command)?,
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "nacre", &mut std::io::stdout());
        }
        Command::Man { dir } => std::fs::create_dir_all(dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
            .with_context(|| format!("{}: write manual pages", dir.display()))?,
    }
    Ok(0)
}

fn start_log(global: &args::Global) {
    let usual = if global.quiet { "error" } else { "warn" };
    let filter = global.log.as_deref().unwrap_or(usual);
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|error| Cli::command().error(ErrorKind::ValueValidation, format!("--log: {error}")).exit());
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .without_time()
        .init();
}

//! `cargo xtask test`: everything that can be tested on this machine, and at the end what could not.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    packages,
    run::{cargo, has_cargo, run, target},
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install nothing; tests whose programs are missing skip themselves
    #[arg(long)]
    no_install: bool,
    /// Count a test that skipped itself as a failure
    #[arg(long)]
    no_skips: bool,
    /// Further arguments of the test runner
    #[arg(last = true)]
    rest: Vec<String>,
}

pub(crate) fn test(options: &Options) -> Result<()> {
    if !options.no_install {
        packages::install()?;
    }
    fs::create_dir_all(target())?;
    let skips = target().join("skips.txt");
    let _ = fs::remove_file(&skips); // of the last run

    let (what, mut command) = if has_cargo("nextest") {
        ("cargo nextest", cargo(&["nextest", "run", "--workspace", "--locked", "--no-fail-fast", "--color", "never"]))
    } else {
        eprintln!("cargo-nextest is not installed: running cargo test");
        ("cargo test", cargo(&["test", "--workspace", "--locked", "--no-fail-fast", "--lib", "--bins", "--tests"]))
    };
    command.args(&options.rest).env("NACRE_SKIPS", &skips);
    let (passed, closing) = watch(&mut command)?;
    let documented = run(&mut cargo(&["test", "--workspace", "--locked", "--doc", "--quiet"]));

    println!("\n{what}:");
    closing.iter().for_each(|line| println!("{line}"));
    println!("doc tests: {}", if documented.is_ok() { "passed" } else { "FAILED" });
    let skipped = fs::read_to_string(&skips).unwrap_or_default();
    let skipped: BTreeSet<&str> = skipped.lines().collect();
    match skipped.len() {
        0 => println!("no test skipped itself"),
        count => println!("{count} tests skipped themselves:"),
    }
    skipped.iter().for_each(|line| println!("    {line}"));
    if !passed || documented.is_err() {
        bail!("tests failed");
    }
    if options.no_skips && !skipped.is_empty() {
        bail!("tests skipped themselves");
    }
    Ok(())
}

/// Runs the test runner, passes its output on, and keeps the lines that sum it up.
fn watch(command: &mut Command) -> Result<(bool, Vec<String>)> {
    let script = "exec 2>&1; exec \"$0\" \"$@\""; // one pipe keeps the order of both streams
    let mut merged = Command::new("sh");
    merged.args(["-c", script]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            merged.env(key, value);
        }
    }
    if let Some(directory) = command.get_current_dir() {
        merged.current_dir(directory);
    }
    let mut child = merged.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {command:?}"))?;
    let mut closing = Vec::new();
    let mut ending = false;
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        println!("{line}");
        ending |= line.trim_start().starts_with("Summary [");
        if ending || line.starts_with("test result:") {
            closing.push(line);
        }
    }
    Ok((child.wait()?.success(), closing))
}

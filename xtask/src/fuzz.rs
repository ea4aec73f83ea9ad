//! `cargo xtask fuzz NAME`: a target under libFuzzer, with the compiler that is there. Coverage needs no nightly compiler, only
//! the sanitizers do; and without unsafe code of ours, those have little to find.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::run::{cargo, output, root, run, target};

/// What cargo-fuzz sets, without `-Zsanitizer`.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg",
    "fuzzing",
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The target's name; all of them, one after the other, where it is left out
    name: Option<String>,
    /// For how long, each
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// How many megabytes an input may make it use
    #[arg(long, default_value_t = 1024)]
    memory: u32,
}

pub(crate) fn fuzz(options: &Options) -> Result<()> {
    let corpus = root().join("fuzz/corpus");
    run(cargo(&["run", "--quiet", "--locked", "--package", "nacre-fuzz", "--"]).arg(&corpus))?;
    let host = output(Command::new("rustc").args(["-vV"]))?;
    let host =
        host.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or("x86_64-unknown-linux-gnu").to_owned();
    let place = target().join("fuzz");
    // With --target, build scripts and macros are built without the flags.
    let mut build = cargo(&["build", "--manifest-path", "fuzz/Cargo.toml", "--release", "--target", &host]);
    let names: Vec<String> = match &options.name {
        Some(name) => vec![name.clone()],
        None => targets()?,
    };
    for name in &names {
        build.args(["--bin", name]);
    }
    run(build.arg("--target-dir").arg(&place).env("RUSTFLAGS", FLAGS.join(" ")))?;
    for name in &names {
        let artifacts = root().join("fuzz/artifacts").join(name);
        std::fs::create_dir_all(&artifacts)?;
        let program = place.join(&host).join("release").join(name);
        ensure!(program.is_file(), "{} was not built", program.display());
        println!("== {name}");
        let mut command = Command::new(program);
        command.arg(corpus.join(name)).args(["-timeout=10", "-print_final_stats=1", "-max_len=65536"]);
        command.arg(format!("-rss_limit_mb={}", options.memory)).arg(format!("-max_total_time={}", options.seconds));
        run(command.arg(format!("-artifact_prefix={}/", artifacts.display())))?;
    }
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(root().join("fuzz/fuzz_targets"))?;
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

//! A test harness for programs that start themselves again: their `main` must come first, and the standard one has its own.
//!
//! It speaks as much of the standard harness's command line as `cargo test` and `cargo nextest` use: `--list`, names, `--exact`,
//! `--skip`, `--ignored`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// A test's name and function.
pub type Test = (&'static str, fn());

/// Runs the tests that the command line asks for, one after the other, or lists them.
#[expect(clippy::print_stdout, reason = "a test harness speaks on stdout")]
pub fn run(tests: &[Test]) -> ExitCode {
    let mut names = Vec::new();
    let mut skipped = Vec::new();
    let (mut list, mut exact, mut ignored) = (false, false, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => list = true,
            "--exact" => exact = true,
            "--ignored" => ignored = true,
            "--skip" => skipped.extend(arguments.next()),
            "--format" | "--color" | "--test-threads" | "-Z" => _ = arguments.next(),
            option if option.starts_with('-') => {}
            name => names.push(name.to_owned()),
        }
    }
    let matches = |pattern: &String, name: &str| if exact { pattern == name } else { name.contains(pattern.as_str()) };
    let chosen = tests.iter().filter(|(name, _)| {
        !ignored
            && (names.is_empty() || names.iter().any(|pattern| matches(pattern, name)))
            && !skipped.iter().any(|pattern| matches(pattern, name))
    });
    let mut failed = 0;
    for (name, test) in chosen {
        if list {
            println!("{name}: test");
            continue;
        }
        // A failed test says so on stderr; the others still run.
        let good = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
        failed += usize::from(!good);
    }
    ExitCode::from(u8::from(failed > 0))
}

//! Tests that cannot run here say so.

use std::{
    env,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    thread,
};

/// Says loudly that the running test is skipped, and why. Where the variable `NACRE_SKIPS` names a file, a line goes there too:
/// the test runner reports them all at its end.
#[expect(clippy::print_stderr, reason = "a skipped test has to be seen")]
pub fn skip(reason: &str) {
    let thread = thread::current();
    let line = format!("{}: {reason}", thread.name().unwrap_or("a test"));
    eprintln!("SKIPPED: {line}");
    if let Some(path) = env::var_os("NACRE_SKIPS") {
        let file = File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())).unwrap();
    }
}

/// A file or directory of the folder of other implementations' data: `NACRE_SHARED`, or `shared` beside the checkout. `None`, after a
/// loud [`skip`], where it is missing.
pub fn shared(path: &str) -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let root = env::var_os("NACRE_SHARED").map_or_else(|| workspace.join("../shared"), PathBuf::from);
    let found = root.join(path);
    if found.exists() {
        return Some(found);
    }
    skip(&format!("{} is missing (NACRE_SHARED names the folder)", found.display()));
    None
}

/// The path of a program; `None`, after a loud [`skip`], where it is not installed.
pub fn require(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file());
    if found.is_none() {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Whether the test runs as root; a loud [`skip`] where it does not.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("it needs root");
    }
    root
}

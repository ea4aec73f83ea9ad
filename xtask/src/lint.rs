//! `cargo xtask lint`: all checks run, then those that failed are named.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    run::{cargo, has_cargo, output, root, run},
    tree,
};

/// style.md asks for some 500 lines; this is where it gets too much.
const FILE_LINES: usize = 700;

pub(crate) fn lint() -> Result<()> {
    let mut failed = Vec::new();
    let mut step = |name: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("{name}: {error:#}");
            failed.push(name.to_owned());
        }
    };
    step("format", run(&mut cargo(&["fmt", "--all", "--check"])));
    if root().join("fuzz/Cargo.toml").is_file() {
        step("format of fuzz", run(&mut cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"])));
    }
    step("rules", rules());
    step("dependency directions", tree::check().map(|report| println!("{report}")));
    step(
        "clippy",
        run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"])),
    );
    // The guest leaves features out; what it is made of has to build like that too.
    step(
        "guest",
        run(&mut cargo(&["clippy", "--package", "nacre-guestd", "--locked", "--quiet", "--", "-D", "warnings"])),
    );
    // The documentation is for whoever works on the code, private items included. Not the programs: their comments are help texts, where brackets are no links.
    let mut doc =
        cargo(&["doc", "--workspace", "--lib", "--no-deps", "--locked", "--quiet", "--document-private-items"]);
    step("documentation", run(doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links")));
    if has_cargo("deny") {
        let deny = ["deny", "--all-features", "--log-level", "error", "check", "--hide-inclusion-graph"];
        step("licences", run(cargo(&deny).args(["-A", "duplicate", "licenses", "bans", "sources"])));
        step("advisories", advisories(cargo(&deny).arg("advisories")));
    } else {
        println!(
            "cargo-deny is not installed: licences and advisories were not checked (cargo install --locked cargo-deny)"
        );
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    println!("lint: all good");
    Ok(())
}

/// Without network there is no list of advisories: that is said, not a failure.
fn advisories(deny: &mut Command) -> Result<()> {
    let output = deny.output().context("cannot start cargo deny")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && text.contains("failed to fetch advisory database") {
        println!("the list of advisories cannot be fetched here: it was not checked");
        return Ok(());
    }
    if output.status.success() { Ok(()) } else { bail!("{text}") }
}

/// The files that git knows or would know.
fn files() -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root());
    Ok(output(&mut git)?.lines().map(PathBuf::from).filter(|path| root().join(path).is_file()).collect())
}

/// What no tool checks: sizes of files, unsafe outside of crates/sys and of the C interface, unfinished places, and links between documents.
fn rules() -> Result<()> {
    let mut problems = Vec::new();
    for path in files()? {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !matches!(extension, "rs" | "md") {
            continue;
        }
        let text = fs::read_to_string(root().join(&path)).with_context(|| path.display().to_string())?;
        match extension {
            "rs" => rust(&path, &text, &mut problems),
            _ => markdown(&path, &text, &mut problems),
        }
    }
    tests_of_threats(&mut problems)?;
    if problems.is_empty() { Ok(()) } else { bail!("\n  {}", problems.join("\n  ")) }
}

/// Every test that SECURITY.md names exists: as a function, or as an entry of a list of tests.
fn tests_of_threats(problems: &mut Vec<String>) -> Result<()> {
    let mut source = String::new();
    for path in files()?.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        source.push_str(&fs::read_to_string(root().join(path))?);
    }
    let text = fs::read_to_string(root().join("SECURITY.md")).context("SECURITY.md")?;
    for (number, row) in (1..).zip(text.lines()).filter(|(_, row)| row.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, _, tests] = cells.as_slice() else { continue };
        for name in tests.split('`').skip(1).step_by(2) {
            if !source.contains(&format!("fn {name}(")) && !source.contains(&format!("\"{name}\"")) {
                problems.push(format!("SECURITY.md:{number}: there is no test {name}"));
            }
        }
    }
    Ok(())
}

fn rust(path: &Path, text: &str, problems: &mut Vec<String>) {
    let mut problem = |line: usize, what: &str| problems.push(format!("{}:{line}: {what}", path.display()));
    let lines = text.lines().count();
    if lines > FILE_LINES {
        problem(lines, &format!("{lines} lines: more than {FILE_LINES}, two files want to come out of it"));
    }
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        // In two parts, so that this file does not find itself.
        for macro_name in [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("db", "g!(")] {
            if code.contains(macro_name) {
                problem(number, &format!("{macro_name}…)"));
            }
        }
        // What several test programs share, none of them uses whole: there an expectation cannot hold in each.
        let shared_by_tests = path.ends_with("mod.rs") && path.components().any(|part| part.as_os_str() == "tests");
        if code.contains(concat!("[al", "low(")) && !shared_by_tests {
            problem(number, "allow: write #[expect(…, reason = \"…\")]");
        }
        let keyword = concat!("un", "safe");
        let is_unsafe =
            [" {", " fn", " impl", " extern", "("].iter().any(|after| code.contains(&format!("{keyword}{after}")));
        if is_unsafe && !path.starts_with("crates/sys") && !path.starts_with("crates/capi/src/ffi") {
            problem(number, "unsafe outside of crates/sys");
        }
    }
}

/// Relative links have to lead to a file.
fn markdown(path: &Path, text: &str, problems: &mut Vec<String>) {
    for (number, line) in (1..).zip(text.lines()) {
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let from = root().join(path);
            if !from.parent().is_some_and(|directory| directory.join(target).exists()) {
                problems.push(format!("{}:{number}: the link {link} leads nowhere", path.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_find_what_they_are_for() {
        let found = |text: &str| {
            let mut problems = Vec::new();
            rust(Path::new("crates/core/src/a.rs"), text, &mut problems);
            problems.len()
        };
        assert_eq!(found("fn a() {}\n"), 0);
        assert_eq!(found(&"\n".repeat(FILE_LINES + 1)), 1);
        assert_eq!(found(concat!("un", "safe { x }")), 1);
        assert_eq!(found(concat!("to", "do!()")), 1);
        assert_eq!(found(concat!("#[al", "low(x)]")), 1);
        let mut problems = Vec::new();
        markdown(Path::new("README.md"), "[a](Cargo.toml) [b](none.md#x) [c](https://x/y) [d](#e)", &mut problems);
        assert_eq!(problems, ["README.md:1: the link none.md#x leads nowhere"]);
    }
}

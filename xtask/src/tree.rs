//! The direction of dependencies (core ← parts ← guest and broker ← programs), and the size of what the guest trusts.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use serde::Deserialize;

use crate::run::{cargo, output};

/// What each of our crates may depend on, tests aside. A crate that is not here may not be.
const ALLOWED: &[(&str, &[&str])] = &[
    ("nacre-core", &[]),
    ("nacre-oci", &["nacre-core"]),
    ("nacre-tpm", &["nacre-core"]),
    ("nacre-attest", &["nacre-core", "nacre-tpm"]),
    ("nacre-sys", &["nacre-core"]),
    ("nacre-registry", &["nacre-core"]),
    ("nacre-disk", &["nacre-core"]),
    ("nacre-anchor", &["nacre-core", "nacre-tpm"]),
    ("nacre-objectstore", &["nacre-core"]),
    ("nacre-lazy", &["nacre-core", "nacre-oci"]),
    ("nacre-export", &["nacre-core", "nacre-sys"]),
    ("nacre-guest", &["nacre-attest", "nacre-core", "nacre-lazy", "nacre-oci", "nacre-sys"]),
    ("nacre-lazyd", &["nacre-guest", "nacre-lazy", "nacre-sys"]),
    ("nacre-capi", &["nacre-core", "nacre-guest", "nacre-lazy", "nacre-oci"]),
    ("nacre-verify", &["nacre-attest", "nacre-core", "nacre-tpm"]),
    ("nacre-broker", &["nacre-attest", "nacre-core", "nacre-sys", "nacre-verify"]),
    (
        "nacre-cli",
        &[
            "nacre-anchor",
            "nacre-attest",
            "nacre-broker",
            "nacre-core",
            "nacre-disk",
            "nacre-export",
            "nacre-guest",
            "nacre-lazy",
            "nacre-lazyd",
            "nacre-objectstore",
            "nacre-oci",
            "nacre-registry",
            "nacre-sys",
            "nacre-tpm",
            "nacre-verify",
        ],
    ),
    ("nacre-guestd", &["nacre-attest", "nacre-core", "nacre-guest", "nacre-lazyd", "nacre-oci", "nacre-sys"]),
    ("nacre-testkit", &["nacre-core", "nacre-registry"]),
    (
        "nacre-fuzz",
        &[
            "nacre-anchor",
            "nacre-attest",
            "nacre-broker",
            "nacre-core",
            "nacre-disk",
            "nacre-export",
            "nacre-guest",
            "nacre-lazy",
            "nacre-oci",
            "nacre-tpm",
            "nacre-verify",
        ],
    ),
    ("xtask", &[]),
];

/// What must not be in the guest: the broker and its server, the policy engine, key tokens' shared libraries, and what is for tests.
const NOT_IN_THE_GUEST: &[&str] = &[
    "nacre-broker",
    "nacre-registry",
    "nacre-testkit",
    "nacre-verify",
    "axum",
    "hyper",
    "regorus",
    "cryptoki",
    "rcgen",
    "indicatif",
    "proptest",
];

/// The most crates of other people that the guest's daemon is made of. It is some ten more than the last count: a new
/// dependency of the guest is to be noticed, and this number raised by who can say why.
const GUEST_CRATES: usize = 275;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    path: Option<String>,
}

/// Checks all of it; the answer is a line to print.
pub(crate) fn check() -> Result<String> {
    let text = output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"]))?;
    let problems = directions(&serde_json::from_str(&text)?);
    if !problems.is_empty() {
        bail!("\n  {}", problems.join("\n  "));
    }
    guest()
}

fn directions(metadata: &Metadata) -> Vec<String> {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut problems = Vec::new();
    for package in &metadata.packages {
        let Some(may) = allowed.get(package.name.as_str()) else {
            problems.push(format!("{} has no place in the order of crates (xtask/src/tree.rs)", package.name));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let test_only = dependency.kind.as_deref() == Some("dev");
            if !test_only && !may.contains(&dependency.name.as_str()) {
                problems.push(format!("{} must not depend on {}", package.name, dependency.name));
            }
        }
    }
    problems
}

fn guest() -> Result<String> {
    let arguments =
        ["tree", "-p", "nacre-guestd", "-e", "normal", "--prefix", "none", "-f", "{p}", "--offline", "--locked"];
    let tree = output(&mut cargo(&arguments))?;
    // "name v1.2.3 (path or proc-macro) (*)"
    let crates: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, rest)| (name, rest.split(' ').next().unwrap_or(rest)))
        .collect();
    let macros = tree.lines().filter(|line| line.contains("(proc-macro)")).collect::<BTreeSet<_>>().len();
    let found: Vec<&str> =
        crates.iter().map(|(name, _)| *name).filter(|name| NOT_IN_THE_GUEST.contains(name)).collect();
    if !found.is_empty() {
        bail!("nacre-guestd has {} in its dependency tree", found.join(", "));
    }
    let ours = crates.iter().filter(|(name, _)| name.starts_with("nacre-")).count();
    let others = crates.len() - ours;
    if others > GUEST_CRATES {
        bail!("nacre-guestd is made of {others} crates of others; {GUEST_CRATES} are allowed (xtask/src/tree.rs)");
    }
    Ok(format!(
        "nacre-guestd: {ours} crates of ours, {others} of others (at most {GUEST_CRATES}; about {macros} are macros that only run in the compiler)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_point_to_the_core_and_the_guest_has_no_broker() {
        println!("{}", check().unwrap());
    }

    #[test]
    fn a_wrong_direction_is_found() {
        let dependency = |kind: Option<&str>| Dependency {
            name: "nacre-broker".into(),
            kind: kind.map(Into::into),
            path: Some("x".into()),
        };
        let package = |name: &str, kind| Package { name: name.into(), dependencies: vec![dependency(kind)] };
        let count = |name, kind| directions(&Metadata { packages: vec![package(name, kind)] }).len();
        assert_eq!(count("nacre-guest", None), 1);
        assert_eq!(count("nacre-guest", Some("build")), 1);
        assert_eq!(count("nacre-guest", Some("dev")), 0);
        assert_eq!(count("nacre-cli", None), 0);
        assert_eq!(count("nacre-new", None), 1);
    }
}

//! The demo tells its story to the end, shows three refusals, and leaves nothing.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use nacre_testkit::{require, root};

use crate::support::{Place, said};

/// What must be in the story, in this order.
const STORY: [&str; 15] = [
    "The TEE is simulated",
    "1. Somebody ships an image",
    "encrypted",
    "signed",
    "2. A key broker knows whom to trust",
    "3. A guest starts",
    "| Only an attested guest can read this line.",
    "4. The chain of trust",
    "attested",
    "released",
    "5. Three attacks",
    "refused: layer",
    "refused: ",
    "refused: ",
    "executables = 33",
];

#[track_caller]
fn assert_story(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", said(output));
    let mut rest: &str = &text;
    for part in STORY {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("'{part}' is missing or too early in: {text}")).1;
    }
    assert_eq!(text.matches("refused:").count(), 3, "{text}");
    let long: Vec<&str> = text.lines().filter(|line| line.chars().count() > 120).collect();
    assert!(long.is_empty(), "longer than 120 columns: {long:#?}");
}

/// No mount and no process has the directory's path.
#[track_caller]
fn assert_gone(dir: &Path) {
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0, "{dir:?} is not empty");
    let dir = dir.display().to_string();
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&dir));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&line).contains(&dir), "{entry:?}: {}", String::from_utf8_lossy(&line));
    }
}

fn demo(place: &Place, arguments: &[&str]) -> Command {
    fs::create_dir(place.at("tmp")).unwrap();
    let mut command = place.program(env!("CARGO_BIN_EXE_nacre"));
    command.env("TMPDIR", place.at("tmp")).arg("demo").args(arguments);
    command
}

#[test]
fn the_demo_tells_its_story_and_leaves_nothing() {
    if !root() {
        return;
    }
    let place = Place::new();
    assert_story(&demo(&place, &[]).output().unwrap());
    assert_gone(&place.at("tmp"));
}

#[test]
fn the_demo_keeps_what_it_is_asked_to_keep() {
    if !root() {
        return;
    }
    let place = Place::new();
    let dir = place.text("kept");
    let output = demo(&place, &["--keep", "--dir", &dir]).output().unwrap();
    assert_story(&output);
    assert!(said(&output).contains(&format!("Everything is in {dir}")));
    for part in ["broker/tls.crt", "guest/initdata.toml", "layout/index.json"] {
        assert!(place.at("kept").join(part).exists(), "{part}");
    }
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&dir));
}

#[test]
fn the_demo_works_without_root_in_a_user_namespace() {
    if !root() {
        return;
    }
    let Some(setpriv) = require("setpriv") else { return };
    // Not below the checkout, which another user may not be able to enter.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (program, work) = (dir.path().join("nacre"), dir.path().join("work"));
    fs::copy(env!("CARGO_BIN_EXE_nacre"), &program).unwrap();
    fs::create_dir(&work).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&program, 0o755), (&work, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let unprivileged = |prelude: &[&str]| {
        let mut command = Command::new(&setpriv);
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).args(prelude);
        command.arg(&program).arg("demo").env("HOME", &work).env("TMPDIR", &work).current_dir(&work);
        command.output().unwrap()
    };
    let output = unprivileged(&[]);
    if !output.status.success() && said(&output).contains("user namespace") {
        nacre_testkit::skip(&format!("no user namespaces for users here: {}", said(&output)));
        return;
    }
    assert_story(&output);
    assert!(said(&output).contains("in a user namespace"));
    assert_gone(&work);
}

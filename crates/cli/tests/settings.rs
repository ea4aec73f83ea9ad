//! Flags before variables before the file, and nothing that is asked for is silently left out.
#![expect(clippy::unwrap_used, reason = "a test's helpers may fail it")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use nacre_sys::privilege::Privilege;
use nacre_testkit::Image;

/// `nacre` in a directory that is its home, with nothing of the machine's variables.
fn nacre(dir: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.env_clear().env("PATH", path).env("HOME", dir).env("NACRE_ROOT", dir.join("store"));
    command.envs(variables.iter().copied()).args(arguments).current_dir(dir).output().unwrap()
}

/// What it says where it refuses, and its exit code.
fn refusal(output: &Output) -> (String, Option<i32>) {
    assert!(!output.status.success());
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
}

/// A directory with an image in it; `None`, after a loud skip, where nothing can be pulled.
fn place() -> Option<tempfile::TempDir> {
    if let Privilege::Missing(missing) = Privilege::detect() {
        nacre_testkit::skip(&missing.to_string());
        return None;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    Image::hello().write_layout(&dir.path().join("app"), "1");
    fs::write(dir.path().join("reject.json"), r#"{"default":[{"type":"reject"}]}"#).unwrap();
    fs::write(dir.path().join("accept.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();
    Some(dir)
}

#[test]
fn flags_go_before_variables_and_those_before_the_file() {
    let Some(dir) = place() else { return };
    let pull = |policy: &[&str], variables: &[(&str, &str)], file: &str| {
        fs::write(dir.path().join("nacre.toml"), file).unwrap();
        let mut arguments = vec!["--config", "nacre.toml", "image", "pull", "--allow-unsigned", "oci:app:1"];
        arguments.extend(policy);
        nacre(dir.path(), variables, &arguments)
    };
    let (accept, reject) = ([("NACRE_POLICY", "accept.json")], [("NACRE_POLICY", "reject.json")]);
    let file = |name: &str| format!("[trust]\npolicy = '{name}.json'\n");
    for (policy, variables, file, good) in [
        (&[][..], &[][..], file("accept"), true),
        (&[], &[], file("reject"), false),
        (&[], &accept, file("reject"), true),
        (&[], &reject, file("accept"), false),
        (&["--policy", "accept.json"], &reject, file("reject"), true),
        (&["--policy", "reject.json"], &accept, file("accept"), false),
        (&["--insecure-policy"], &reject, file("reject"), true),
        (&[], &reject, "[trust]\ninsecure_policy = true\n".into(), false),
    ] {
        let output = pull(policy, variables, &file);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), good, "{policy:?} {variables:?} {file}: {said}");
        assert!(good || output.status.code() == Some(3), "{said}");
    }
    let (said, code) = refusal(&pull(&["--insecure-policy", "--policy", "accept.json"], &[], ""));
    assert!(code == Some(2) && said.contains("cannot be used with"), "{said}");
}

#[test]
fn to_look_at_an_image_needs_no_policy_and_to_verify_it_does() {
    let Some(dir) = place() else { return };
    let output = nacre(dir.path(), &[("NACRE_POLICY", "missing.json")], &["image", "inspect", "--json", "oci:app:1"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let verify = |policy: &str| nacre(dir.path(), &[("NACRE_POLICY", policy)], &["image", "verify", "oci:app:1"]);
    assert_eq!(refusal(&verify("reject.json")).1, Some(3));
    // Plain and unsigned: the policy alone does not let it in.
    assert_eq!(refusal(&verify("accept.json")).1, Some(3));
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (said, code) = refusal(&nacre(dir.path(), &[], &["--log", "==", "completions", "bash"]));
    assert!(code == Some(2) && said.contains("--log"), "{said}");
    fs::write(dir.path().join("nacre.toml"), "[registry]\nretires = 1\n").unwrap();
    let (said, _) = refusal(&nacre(dir.path(), &[], &["--config", "nacre.toml", "attest", "token"]));
    assert!(said.contains("retires"), "{said}");
    let (said, _) = refusal(&nacre(dir.path(), &[], &["attest", "token", "--sim-platform-key", "platform.key"]));
    assert!(said.contains("--broker URL"), "{said}");
    let (said, code) = refusal(&nacre(dir.path(), &[], &["guest", "pull", "a", "--socket", "missing.sock"]));
    assert!(code == Some(5) && said.contains("missing.sock"), "{said}");
}

#[test]
fn manual_pages_and_completions_are_written() {
    let dir = tempfile::tempdir().unwrap();
    assert!(nacre(dir.path(), &[], &["man", "pages/man1"]).status.success());
    let page = fs::read_to_string(dir.path().join("pages/man1/nacre-image-pull.1")).unwrap();
    assert!(page.contains("decryption"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let output = nacre(dir.path(), &[], &["completions", shell]);
        assert!(output.status.success() && !output.stdout.is_empty(), "{shell}");
    }
}

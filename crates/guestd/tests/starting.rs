//! How the daemon starts, and when it does not. What it does is in docs/guide/guest.md, which crates/cli/tests/guides.rs runs.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{path::Path, process::Command};

/// Starts the daemon, which has to refuse; gives what it says.
fn refused(dir: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-guestd"));
    command.args(["--root", "store", "--socket", "cdh.sock"]).args(arguments).current_dir(dir);
    let output = command.env_remove("NACRE_CONFIG").env_remove("NACRE_LOG").output().unwrap();
    assert!(!output.status.success());
    assert!(!dir.join("cdh.sock").exists(), "it serves nobody");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn it_needs_a_configuration_and_a_policy() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    assert!(refused(dir.path(), &[]).contains("--config"));
    write("nacre.toml", "");
    let said = refused(dir.path(), &["--config", "nacre.toml"]);
    assert!(said.contains("no trust policy"), "{said}");
    write("nacre.toml", "[trust]\ninsecure_policy = true\npolicy = 'x'\n");
    let said = refused(dir.path(), &["--config", "nacre.toml"]);
    assert!(said.contains("choose one"), "{said}");
    write("nacre.toml", "[trust]\ninsecure_polcy = true\n");
    let said = refused(dir.path(), &["--config", "nacre.toml"]);
    assert!(said.contains("insecure_polcy"), "{said}");
    write("initdata.toml", "algorithm = 'sha384'\nversion = '0.1.0'\n[data]\nother = ''\n");
    let said = refused(dir.path(), &["--init-data", "initdata.toml"]);
    assert!(said.contains("nacre.toml"), "{said}");
    let said = refused(dir.path(), &["--config", "nacre.toml", "--log", "=="]);
    assert!(said.contains("--log"), "{said}");
}

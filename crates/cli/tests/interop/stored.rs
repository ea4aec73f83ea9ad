//! Lazy images in the store: pulled, run, bundled and removed as any other, and judged on each use.

use std::{fs, process::Command};

use nacre_testkit::{require, run};
use serde_json::Value;

use crate::{
    lazy::{PULL, Scene},
    mounts::{registry_process, signal},
    support::{Place, assert_refused, runnable, said},
};

#[test]
fn a_lazy_image_is_pulled_run_and_removed_like_any_other() {
    let place = Place::new();
    let image = runnable(&place, "cat /second /third; echo $GREETING; exit 42");
    let Some(scene) = Scene::new(&image) else { return };
    let output = scene.copy("v1", &[]);
    assert!(output.status.success(), "{}", said(&output));
    let (name, key) = (scene.name("v1"), scene.place.text("key.pem"));
    let nacre = |arguments: &[&str]| {
        let mut command = scene.place.nacre("store", arguments);
        command.args(["--decryption-key", &key]).args(PULL);
        command
    };
    let digest = String::from_utf8(run(&mut nacre(&["image", "pull", "--quiet", &name])).stdout).unwrap();
    let cached = || fs::read_dir(scene.place.at("store/lazy/chunks")).unwrap().count();
    assert_eq!(cached(), 0, "nothing of its content is fetched");
    let listed = run(&mut scene.place.nacre("store", &["image", "ls", "--json"])).stdout;
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!((&listed[0]["manifest"], listed[1].is_null()), (&Value::from(digest.trim()), true));
    assert!(listed[0]["lazy"]["content_bytes"].as_u64() > Some(1000) && listed[0]["layers"] == serde_json::json!([]));
    let shown = run(&mut scene.place.nacre("store", &["image", "inspect", "--json", &name])).stdout;
    let shown: Value = serde_json::from_slice(&shown).unwrap();
    assert_eq!(shown["config"]["config"]["Cmd"][0], "sh", "the config is in the store");
    for runtime in ["builtin", "runc", "crun"] {
        if runtime == "builtin" || require(runtime).is_some() {
            let output = nacre(&["run", "--quiet", "--runtime", runtime, &name]).output().unwrap();
            assert_eq!((output.status.code(), said(&output)), (Some(42), "zstd\ngzip\nhello\n".into()), "{runtime}");
        }
    }
    assert!(cached() > 0);
    // A bundle outlives the command, and the daemon.
    let bundle = scene.place.at("bundle");
    run(&mut nacre(&["image", "pull", "--quiet", "--bundle", bundle.to_str().unwrap(), &name]));
    for daemon in scene.processes("serve") {
        signal("-9", daemon);
    }
    assert_eq!(fs::read_to_string(bundle.join("rootfs/second")).unwrap(), "zstd\n");
    run(&mut scene.place.nacre("store", &["image", "complete", &name]));
    let refused = scene.place.nacre("store", &["image", "rm", &name]).output().unwrap();
    assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
    // Without the registry; the policy and the key are asked for all the same.
    signal("-9", registry_process(scene.registry.host()));
    let output = nacre(&["run", "--quiet", "--offline", "--runtime", "builtin", &name]).output().unwrap();
    assert_eq!((output.status.code(), said(&output)), (Some(42), "zstd\ngzip\nhello\n".into()));
    let policy = scene.place.write("reject.json", r#"{"default":[{"type":"reject"}]}"#);
    let offline = |options: &[&str]| {
        let mut command = scene.place.nacre("store", &["run", "--offline", "--runtime", "builtin"]);
        command.args(options).arg(&name).output().unwrap()
    };
    assert_refused(&offline(&["--decryption-key", &key, "--policy", &policy]), &["reject"]);
    assert_refused(&offline(&["--insecure-policy"]), &["the lazy image's key"]);
    // Nothing stays.
    run(scene.place.nacre("store", &["image", "umount"]).arg(&bundle));
    run(&mut scene.place.nacre("store", &["image", "rm", &name]));
    scene.place.assert_empty("store");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(scene.place.at("store").to_str().unwrap()), "{mounts}");
}

#[test]
fn a_bundle_of_a_killed_run_is_cleaned_up_with_its_lazy_image() {
    let place = Place::new();
    let image = runnable(&place, "echo begun; while true; do sleep 0.1; done");
    let Some(scene) = Scene::new(&image) else { return };
    let output = scene.copy("v1", &[]);
    assert!(output.status.success(), "{}", said(&output));
    let (name, key) = (scene.name("v1"), scene.place.text("key.pem"));
    let mut nacre = scene.place.nacre("store", &["run", "--runtime", "builtin", "--decryption-key", &key]);
    let mut child = nacre.args(PULL).arg(&name).stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0; 6]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    run(&mut scene.place.nacre("store", &["image", "gc"]));
    run(Command::new("sh").args(["-c", "! grep -q \"$0\" /proc/self/mounts"]).arg(scene.place.at("store/bundles")));
    assert_eq!(fs::read_dir(scene.place.at("store/bundles")).unwrap().count(), 0);
}

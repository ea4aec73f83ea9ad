//! What the guides and README.md tell people to type works, in the order in which they tell it.
//!
//! The blocks that a page marks as `sh` are one bash script, which is run in a new directory with what the page says that one needs: an
//! image in `app`, and a registry. Blocks marked `sh no-test` are left out, and those marked `sh root` for everybody else.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helpers may fail it")]

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nacre_sys::privilege::Privilege;
use nacre_testkit::{Compression, Image, Layer, registry::Registry};

/// Where the guides have their registry and their broker. Tests run side by side, so they get other ports.
const REGISTRY: &str = "127.0.0.1:5000";
const BROKER: &str = "127.0.0.1:8080";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// A page's script; `root` is whether it is run as root.
fn script(page: &str, root: bool) -> String {
    let mut script = String::new();
    let mut inside = None;
    for line in page.lines() {
        match (inside, line.strip_prefix("```")) {
            (None, Some(info)) => inside = Some(info == "sh" || (info == "sh root" && root)),
            (Some(_), Some(_)) => inside = None,
            (Some(true), None) => {
                script.push_str(line);
                script.push('\n');
            }
            _ => {}
        }
    }
    assert!(inside.is_none(), "a block is not closed");
    script
}

/// What the guides start from.
struct Scene {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Scene {
    fn set() -> Option<Self> {
        if let Privilege::Missing(missing) = Privilege::detect() {
            nacre_testkit::skip(&missing.to_string());
            return None;
        }
        for program in ["bash", "openssl"] {
            nacre_testkit::require(program)?;
        }
        // Not /tmp, which may be in memory; stores refuse that.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image(dir.path()).write_layout(&dir.path().join("app"), "1.0");
        Some(Self { dir, registry: Registry::memory().unwrap() })
    }

    /// Runs a page.
    fn run(&self, page: &str) {
        let text = fs::read_to_string(workspace().join(page)).unwrap();
        let root = matches!(Privilege::detect(), Privilege::Full);
        self.run_script(&script(&text, root));
    }

    fn run_script(&self, script: &str) {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let script = script.replace(REGISTRY, &self.registry.host()).replace(BROKER, &free);
        // What a page leaves running ends with it.
        let ended = "trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT";
        fs::write(self.dir.path().join("script"), format!("set -euxo pipefail\n{ended}\n{script}")).unwrap();
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let programs = Path::new(env!("CARGO_BIN_EXE_nacre")).parent().unwrap();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("timeout");
        command.args(["300", "bash", "script"]).current_dir(self.dir.path());
        // Nothing of the settings of whoever runs the tests.
        let of_users = |name: &str| ["NACRE_", "XDG_", "REGISTRY_", "CONTAINERS_"].iter().any(|p| name.starts_with(p));
        for (name, _) in std::env::vars().filter(|(name, _)| of_users(name)) {
            command.env_remove(name);
        }
        let status = command
            .env("PATH", path)
            .env("HOME", self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .status()
            .unwrap();
        if !status.success() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
            panic!("the page's commands ended with {status}:\n{log}");
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // A bundle that a failed page left mounted would keep its directory.
        let bundle = self.dir.path().join("bundle/rootfs");
        if bundle.exists() {
            let _ = Command::new("umount").arg("-l").arg(bundle).stderr(Stdio::null()).status();
        }
    }
}

/// A shell, a few programs, and one of its own.
fn image(dir: &Path) -> Image {
    let root = dir.join("root");
    fs::create_dir(&root).unwrap();
    nacre_testkit::tiny_rootfs(&root);
    for name in ["proc", "sys", "dev", "tmp"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all("", &root).unwrap();
    let mut header = tar::Header::new_gnu();
    let app = b"#!/bin/sh\necho \"app $*\"\n";
    header.set_mode(0o755);
    header.set_size(app.len() as u64);
    tar.append_data(&mut header, "bin/app", &app[..]).unwrap();
    fs::remove_dir_all(&root).unwrap();
    let layer = Layer::raw(tar.into_inner().unwrap());
    Image::builder().layer_of(layer, Compression::Gzip).run("Cmd", serde_json::json!(["/bin/app"])).build()
}

#[test]
fn images() {
    let Some(scene) = Scene::set() else { return };
    scene.run("docs/guide/images.md");
}

#[test]
fn broker() {
    let Some(scene) = Scene::set() else { return };
    scene.run("docs/guide/broker.md");
    let audit = fs::read_to_string(scene.dir.path().join("audit.json")).unwrap();
    let audit: serde_json::Value = serde_json::from_str(&audit).unwrap();
    let events: Vec<&str> = audit.as_array().unwrap().iter().filter_map(|entry| entry["event"].as_str()).collect();
    assert!(events.contains(&"released") && events.contains(&"attested"), "{events:?}");
}

#[test]
fn disk() {
    let Some(scene) = Scene::set() else { return };
    for program in ["nbdinfo", "nbdcopy"] {
        if nacre_testkit::require(program).is_none() {
            return;
        }
    }
    scene.run("docs/guide/disk.md");
    let info = fs::read_to_string(scene.dir.path().join("info.json")).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["state"], "running");
}

#[test]
fn guest() {
    let Some(scene) = Scene::set() else { return };
    if !nacre_testkit::root() {
        return;
    }
    if !Path::new(env!("CARGO_BIN_EXE_nacre")).with_file_name("nacre-guestd").exists() {
        return nacre_testkit::skip("nacre-guestd is not built: cargo build --package nacre-guestd");
    }
    scene.run("docs/guide/guest.md");
}

#[test]
fn readme() {
    let Some(scene) = Scene::set() else { return };
    // What its reader has: keys, a policy, a signed image in a registry, another one in a build directory.
    scene.run_script(&format!(
        r#"
        mv app build && nacre image copy oci:build:1.0 oci:build:app
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out cosign.key
        openssl pkey -in cosign.key -pubout -out cosign.pub
        openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out private.pem
        openssl pkey -in private.pem -pubout -out public.pem
        printf '{{"default": [{{"type": "sigstoreSigned", "keyPath": "%s/cosign.pub"}}]}}' "$PWD" > policy.json
        mkdir -p .config/containers
        printf '[[registry]]\nlocation = "{REGISTRY}"\ninsecure = true\n' > .config/containers/registries.conf
        nacre image copy --sign cosign.key oci:build:1.0 docker://{REGISTRY}/team/app:1.2
        "#
    ));
    let text = fs::read_to_string(workspace().join("README.md")).unwrap();
    let (_, use_it) = text.split_once("## Use it").unwrap();
    let script = script(use_it.split("\n## ").next().unwrap(), false).replace("registry.example", REGISTRY);
    assert!(script.contains("nacre run") && script.contains("nacre image copy --encrypt"), "{script}");
    scene.run_script(&format!("export NACRE_ROOT=$PWD/store\n{script}"));
}

#[test]
fn a_pages_blocks_are_one_script() {
    let page = "text\n```sh\na\n```\n```sh no-test\nb\n```\n```sh root\nc\n```\n```\nd\n```\n```sh\ne\n```\n";
    assert_eq!(script(page, false), "a\ne\n");
    assert_eq!(script(page, true), "a\nc\ne\n");
}

//! Commands, flags, what they print, and the codes that they end with.

use std::{
    fs,
    process::{Command, Output},
};

use nacre_registry::Registry;
use nacre_testkit::{Entry, Image, SmallDisk, root, run};
use serde_json::{Value, json};

use crate::support::{Place, runnable, said};

const TRUSTING: [&str; 2] = ["--insecure-policy", "--allow-unsigned"];

/// A command ends with this code, and says these words.
#[track_caller]
pub(crate) fn code(command: &mut Command, code: i32, words: &[&str]) -> Output {
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
    output
}

fn json_of(command: &mut Command) -> Value {
    serde_json::from_slice(&run(command).stdout).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn two_layers() -> Image {
    Image::builder().layer([Entry::file("a", "1")]).layer([Entry::file("b", "22")]).build()
}

#[test]
fn help_completions_and_manual_pages_cover_every_command() {
    let place = Place::new();
    let help = String::from_utf8(run(&mut place.nacre("store", &["help"])).stdout).unwrap();
    for command in ["demo", "run", "image", "disk", "broker", "attest", "completions", "man", "Exit codes"] {
        assert!(help.contains(command), "{command}: {help}");
    }
    assert!(!help.contains("demo-guest"), "what is not for people is not shown");
    let image = String::from_utf8(run(&mut place.nacre("store", &["image", "help"])).stdout).unwrap();
    for command in ["pull", "copy", "ls", "inspect", "verify", "rm", "gc", "umount"] {
        assert!(image.contains(command), "{command}: {image}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&mut place.nacre("store", &["completions", shell])).stdout.len() > 1000);
    }
    fs::create_dir(place.at("man")).unwrap();
    run(&mut place.nacre("store", &["man", &place.text("man")]));
    for page in ["nacre.1", "nacre-image-pull.1", "nacre-broker-policy-set-resource.1"] {
        assert!(place.at("man").join(page).exists(), "{page}");
    }
    assert!(!place.at("store").exists(), "none of these needs a store");
}

#[test]
fn exit_codes_tell_what_happened() {
    if !root() {
        return;
    }
    let (place, registry) = (Place::new(), Registry::memory().unwrap());
    two_layers().push(&registry, "t/app", "1");
    let image = format!("docker://{}/t/app:1", registry.host());
    let pull = |arguments: &[&str]| {
        let mut command = place.nacre("store", &["image", "pull", "--insecure-registry"]);
        command.args(arguments);
        command
    };
    // 2: usage
    code(&mut pull(&[]), 2, &["REF"]);
    code(&mut pull(&["--no-such-flag", &image]), 2, &["--no-such-flag"]);
    code(pull(&TRUSTING).arg("docker://host/UPPER"), 2, &["UPPER"]);
    code(pull(&TRUSTING).args(["--platform", "x", &image]), 2, &["x"]);
    code(pull(&TRUSTING).args(["--decryption-key", "/no/such/key", &image]), 2, &["/no/such/key"]);
    code(
        &mut place.nacre("store", &["image", "copy", "--all", "--platform", "linux/amd64", &image, "dir:x"]),
        2,
        &["--all"],
    );
    code(&mut place.nacre("store", &["image", "copy", "--compression", "lzma", &image, "dir:x"]), 2, &["lzma"]);
    let bad = place.write("bad.toml", "rot = 1");
    code(&mut place.nacre("store", &["--config", &bad, "image", "ls"]), 2, &["rot"]);
    // 3: not trusted
    let reject = place.write("reject.json", r#"{"default":[{"type":"reject"}]}"#);
    code(&mut pull(&["--policy", &reject, &image]), 3, &["reject"]);
    code(&mut pull(&["--insecure-policy", &image]), 3, &["plain"]);
    code(
        &mut place.nacre("store", &["image", "verify", "--insecure-registry", "--policy", &reject, &image]),
        3,
        &["reject"],
    );
    place.assert_empty("store");
    // 4: not found
    code(pull(&TRUSTING).arg(format!("docker://{}/t/app:none", registry.host())), 4, &["none"]);
    code(&mut place.nacre("store", &["image", "rm", "0123456789"]), 4, &["image ls"]);
    code(&mut place.nacre("store", &["image", "umount", "/no/bundle"]), 4, &["/no/bundle"]);
    code(place.nacre("store", &["run", "--offline", "0123456789"]).args(TRUSTING), 4, &["0123456789"]);
    // 5: disk or network
    drop(registry);
    let config = place.write("few.toml", "[registry]\nretries = 0\n");
    code(
        place.nacre("store", &["--config", &config, "image", "pull", "--insecure-registry", &image]).args(TRUSTING),
        5,
        &[],
    );
    code(&mut pull(&["--policy", "/no/such/policy", &image]), 5, &["/no/such/policy"]);
    // 6: in use
    let layout = format!("oci:{}:v1", place.text("layout"));
    two_layers().write_layout(&place.at("layout"), "v1");
    let bundle = place.text("bundle");
    code(pull(&TRUSTING).args(["--bundle", &bundle, &layout]), 0, &["sha256:"]);
    code(pull(&TRUSTING).args(["--bundle", &bundle, &layout]), 6, &[&bundle]);
    code(&mut place.nacre("store", &["image", "rm", &layout]), 6, &["in use", &bundle]);
    assert_eq!(fs::read_to_string(place.at("bundle/rootfs/b")).unwrap(), "22");
    code(&mut place.nacre("store", &["image", "umount", &bundle]), 0, &[]);
    code(&mut place.nacre("store", &["image", "rm", &layout]), 0, &[&layout]);
    place.assert_empty("store");
    assert!(!place.at("bundle").exists());
}

#[test]
fn json_has_the_same_fields_every_time() {
    if !root() {
        return;
    }
    let (place, registry) = (Place::new(), Registry::memory().unwrap());
    let built = two_layers();
    built.push(&registry, "t/app", "1");
    let image = format!("docker://{}/t/app:1", registry.host());
    let mut command = place.nacre("store", &["image", "pull", "--json", "--insecure-registry", &image]);
    let pulled = json_of(command.args(TRUSTING));
    assert_eq!(keys(&pulled), ["admission", "bundle", "fetched", "image", "layers", "lazy", "manifest"]);
    assert_eq!(keys(&pulled["admission"]), ["kind", "policy", "rule", "signers"]);
    assert_eq!(keys(&pulled["layers"][0]), ["diff_id", "digest", "id", "media_type", "size"]);
    assert_eq!((&pulled["fetched"], &pulled["manifest"]), (&json!(2), &json!(built.digest)));

    let listed = json_of(&mut place.nacre("store", &["image", "ls", "--json"]));
    let fields = ["admitted", "bytes", "chain", "layers", "lazy", "manifest", "mounts", "name", "pulled"];
    assert_eq!((keys(&listed[0]), listed.as_array().unwrap().len()), (fields.to_vec(), 1));
    assert_eq!((&listed[0]["name"], &listed[0]["bytes"]), (&json!(image), &json!(3)));

    // No policy is there, and none is needed to look.
    let digest = built.digest.short();
    for name in [&image, &digest] {
        let seen = json_of(&mut place.nacre("store", &["image", "inspect", "--insecure-registry", "--json", name]));
        assert_eq!(seen["manifest_document"]["layers"].as_array().unwrap().len(), 2);
        assert_eq!(seen["config"]["rootfs"]["type"], "layers");
    }
    let remote = ["image", "inspect", "--insecure-registry", "--json", "--remote", &image];
    assert_eq!(keys(&json_of(&mut place.nacre("other", &remote))), ["chain", "config", "manifest_document", "name"]);

    for remote in [&[][..], &["--remote"]] {
        let mut command = place.nacre("store", &["image", "verify", "--insecure-registry", "--json", &image]);
        let verified = json_of(command.args(TRUSTING).args(remote));
        assert_eq!(keys(&verified), ["image", "kind", "manifest", "policy", "rule", "signers"]);
    }
    let copy = ["image", "copy", "--json", "--insecure-registry", &image, "dir:copy"];
    let copied = json_of(&mut place.nacre("store", &copy));
    let fields = ["changed", "digest", "images", "media_type", "signatures_kept", "signatures_made"];
    assert_eq!(keys(&copied), fields);

    run(&mut place.nacre("store", &["image", "rm", &digest]));
    let collected = json_of(&mut place.nacre("store", &["image", "gc", "--json"]));
    assert_eq!(collected, json!({ "layers": [], "bytes": 0, "staging": 0, "busy": 0 }));
    place.assert_empty("store");
}

#[test]
fn short_names_mean_the_same_in_every_command() {
    if !root() {
        return;
    }
    let (place, registry) = (Place::new(), Registry::memory().unwrap());
    runnable(&place, "echo short").push(&registry, "t/app", "latest");
    let conf = format!(
        "unqualified-search-registries = [\"{host}\"]\n[[registry]]\nlocation = \"{host}\"\ninsecure = true\n\
         [aliases]\n\"mine\" = \"{host}/t/app\"\n",
        host = registry.host()
    );
    let conf = place.write("registries.conf", conf);
    let nacre = |arguments: &[&str]| {
        let mut command = place.nacre("store", arguments);
        command.env("CONTAINERS_REGISTRIES_CONF", &conf);
        command
    };
    for name in ["t/app", "mine"] {
        run(nacre(&["image", "pull", name]).args(TRUSTING));
        run(&mut nacre(&["image", "inspect", name]));
        run(nacre(&["image", "verify", name]).args(TRUSTING));
        let output = run(nacre(&["run", "--offline", name]).args(TRUSTING));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "short\n");
        code(&mut nacre(&["image", "rm", name]), 0, &["/t/app:latest"]);
    }
    place.assert_empty("store");
}

#[test]
fn progress_is_lines_where_there_is_no_terminal_and_nothing_when_quiet() {
    if !root() {
        return;
    }
    let (place, registry) = (Place::new(), Registry::memory().unwrap());
    let built = two_layers();
    built.push(&registry, "t/app", "1");
    let image = format!("docker://{}/t/app:1", registry.host());
    let pull = |store: &str, arguments: &[&str]| {
        let mut command = place.nacre(store, &["image", "pull", "--insecure-registry", &image]);
        let output = run(command.args(TRUSTING).args(arguments));
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (out, err) = pull("lines", &[]);
    assert_eq!(out, format!("{}\n", built.digest), "data on stdout, and nothing else");
    assert!(err.contains(": unpacked\n") && !err.contains('\x1b'), "{err}");
    let (_, err) = pull("lines", &[]);
    assert!(err.contains(": in the store\n"), "{err}");
    assert_eq!(pull("quiet", &["--quiet"]).1, "");
    assert_eq!(pull("json", &["--json"]).1, "");
}

#[test]
fn a_disk_that_is_full_or_read_only_spoils_nothing() {
    let Some(disk) = SmallDisk::mount(4 << 20) else { return };
    let place = Place::new();
    let store = disk.path().join("store");
    let layout = |name: &str, bytes: usize| {
        let noise = nacre_testkit::Rng::new(1).bytes(bytes);
        Image::builder().layer([Entry::file("f", noise)]).build().write_layout(&place.at("layout"), name);
        format!("oci:{}:{name}", place.text("layout"))
    };
    let (small, large) = (layout("small", 1000), layout("large", 8 << 20));
    let nacre = |arguments: &[&str]| {
        let mut command = place.nacre("unused", arguments);
        command.env("NACRE_ROOT", &store);
        command
    };
    code(nacre(&["image", "pull", &small]).args(TRUSTING), 1, &["tmpfs", "--allow-tmpfs"]);
    let pull = |image: &str| {
        let mut command = nacre(&["--allow-tmpfs", "image", "pull", image]);
        command.args(TRUSTING);
        command
    };
    code(&mut pull(&large), 5, &["No space left"]);
    assert_eq!(fs::read_dir(store.join("staging")).unwrap().count(), 0);
    code(&mut pull(&small), 0, &[]);
    disk.set_read_only(true);
    code(&mut nacre(&["--allow-tmpfs", "image", "ls"]), 0, &["small"]);
    code(&mut nacre(&["--allow-tmpfs", "image", "inspect", &small]), 0, &["small"]);
    code(&mut pull(&large), 5, &["Read-only file system"]);
    code(&mut nacre(&["--allow-tmpfs", "image", "rm", &small]), 5, &["Read-only file system"]);
    disk.set_read_only(false);
    code(&mut nacre(&["--allow-tmpfs", "image", "rm", &small]), 0, &[]);
}

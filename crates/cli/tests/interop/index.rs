//! Ordinary images that are mounted by an index: the layers stay as they are, and the tree is the one that umoci unpacks.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use nacre_testkit::{Compression, Entry, Image, Layer, require, run};
use serde_json::{Value, json};

use crate::{
    lazy::{Scene, listing, noise, rich, rich_layers},
    mounts::signal,
    support::{Place, assert_refused, said},
};

/// Images that are neither signed nor encrypted, and indexes as well.
const PLAIN: [&str; 1] = ["--allow-unsigned"];

impl Scene {
    fn layout(&self) -> String {
        format!("oci:{}:v1", self.place.text("layout"))
    }

    /// Copies the image of the layout to the registry.
    fn push(&self, image: &str, options: &[&str]) {
        let mut nacre = self.place.nacre("store", &["image", "copy", "--insecure-registry"]);
        run(nacre.args(options).args([&self.layout(), image]));
    }

    fn index(&self, image: &str, options: &[&str]) -> Output {
        let mut nacre = self.place.nacre("store", &["image", "index", "--json", "--insecure-registry"]);
        nacre.args(options).arg(image).output().unwrap()
    }

    /// Makes an index that succeeds; gives what was said of it.
    #[track_caller]
    fn indexed(&self, image: &str, options: &[&str]) -> Value {
        let output = self.index(image, options);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What umoci unpacks.
    fn unpacked(&self) -> Option<String> {
        let umoci = require("umoci")?;
        let layout = format!("{}:v1", self.place.text("layout"));
        run(self.place.program(umoci).args(["unpack", "--image", &layout]).arg(self.place.at("unpacked")));
        Some(listing(&self.place.at("unpacked/rootfs")))
    }

    #[track_caller]
    fn assert_mounts(&self, image: &str, options: &[&str], expected: &str) {
        let mounted = self.mount(image, options).map_err(|output| said(&output)).unwrap();
        assert_eq!(listing(&mounted.target), expected, "{image}");
    }

    /// The tag of an index of referrers, where a registry has no API for them.
    fn fallback(&self, digest: &str) -> String {
        let repository = self.name("v1");
        format!("{}:{}", repository.strip_suffix(":v1").unwrap(), digest.replace(':', "-"))
    }
}

#[test]
fn an_unmodified_image_is_mounted_by_its_index() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let Some(expected) = scene.unpacked() else { return };
    let image = scene.name("v1");
    scene.push(&image, &[]);
    let output = scene.mount(&image, &PLAIN).err().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    assert!(said(&output).contains("nacre image index"), "{}", said(&output));
    let made = scene.indexed(&image, &[]);
    let layers = made["layers"].as_array().unwrap();
    assert!(layers.len() == 2 && layers.iter().all(|layer| layer["codec"] == "gzip"), "{made}");
    for front in ["erofs", "fuse"] {
        scene.assert_mounts(&image, &["--allow-unsigned", "--front", front], &expected);
    }
    // Debian's registry has no referrers API: the index is found by the fallback tag. A second one changes nothing, since it is the same.
    let skopeo = require("skopeo").unwrap();
    let tag = scene.fallback(made["subject"].as_str().unwrap());
    let raw = || run(scene.place.program(&skopeo).args(["inspect", "--raw", "--tls-verify=false", &tag])).stdout;
    let listed: Value = serde_json::from_slice(&raw()).unwrap();
    assert_eq!(listed["manifests"][0]["digest"], made["digest"], "{listed}");
    assert_eq!(scene.indexed(&image, &[])["digest"], made["digest"]);
    assert_eq!(serde_json::from_slice::<Value>(&raw()).unwrap(), listed);
}

#[test]
fn indexes_lie_in_layouts_and_behind_the_referrers_api_as_well() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let Some(expected) = scene.unpacked() else { return };
    let ours = nacre_testkit::registry::Registry::memory().unwrap();
    let image = format!("docker://{}/some/image:v1", ours.host());
    scene.push(&image, &[]);
    let made = scene.indexed(&image, &["--span", "256K"]);
    scene.assert_mounts(&image, &PLAIN, &expected);
    // By digest, too.
    let pinned = image.replace(":v1", &format!("@{}", made["subject"].as_str().unwrap()));
    scene.assert_mounts(&pinned, &PLAIN, &expected);
    scene.indexed(&scene.layout(), &[]);
    scene.assert_mounts(&scene.layout(), &PLAIN, &expected);
    // The image of the layout is still the one without a name.
    scene.assert_mounts(scene.layout().strip_suffix(":v1").unwrap(), &PLAIN, &expected);
    // An index of a copy that is elsewhere.
    let elsewhere = image.replace("some/image", "else/where");
    scene.push(&elsewhere, &[]);
    scene.indexed(&scene.layout(), &["--to", &elsewhere]);
    scene.assert_mounts(&elsewhere, &PLAIN, &expected);
    for bad in ["100K", "8M"] {
        let output = scene.index(&image, &["--span", bad]);
        assert!(!output.status.success() && said(&output).contains("from 256 KiB to 4 MiB"), "{}", said(&output));
    }
    let lazy = scene.name("lazy");
    run(&mut scene.place.nacre("store", &["image", "copy", "--lazy", "--insecure-registry", &scene.layout(), &lazy]));
    let output = scene.index(&lazy, &[]);
    assert!(!output.status.success() && said(&output).contains("no image of layers"), "{}", said(&output));
}

#[test]
fn layers_of_every_kind_are_mounted_as_they_are() {
    let [lower, upper] = rich_layers();
    let layers =
        |compression| Image::builder().layer_of(lower.clone(), compression).layer_of(upper.clone(), compression);
    let Some(scene) = Scene::new(&rich()) else { return };
    let Some(expected) = scene.unpacked() else { return };
    // umoci does not read zstd, but the files are the same.
    for compression in [Compression::None, Compression::Zstd] {
        let Some(scene) = Scene::new(&layers(compression).build()) else { return };
        scene.indexed(&scene.layout(), &[]);
        scene.assert_mounts(&scene.layout(), &PLAIN, &expected);
    }
    // Without a sparse file, whose map skopeo 1.9 breaks when it makes zstd:chunked.
    let small = (0..40).map(|at| Entry::file(format!("dir/small-{at}"), format!("small {at}\n").repeat(at * 9 + 1)));
    let large = [Entry::file("noise", noise()), Entry::hard_link("same", "noise"), Entry::symlink("link", "noise")];
    let files = Image::builder().layer(small.chain(large)).layer([Entry::whiteout("dir/small-7")]).build();
    let Some(scene) = Scene::new(&files) else { return };
    let (Some(expected), Some(skopeo)) = (scene.unpacked(), require("skopeo")) else { return };
    // What skopeo calls zstd:chunked has a frame for each file's chunks, and a table of them, which is not looked at.
    for format in ["zstd:chunked", "zstd", "gzip"] {
        let image = scene.name(&format.replace(':', "-"));
        let mut command = scene.place.program(&skopeo);
        command.args(["copy", "--dest-tls-verify=false", "--dest-compress-format", format]);
        run(command.args([scene.layout(), image.clone()]));
        let made = scene.indexed(&image, &[]);
        eprintln!("{format}: {made}");
        scene.assert_mounts(&image, &PLAIN, &expected);
    }
}

#[test]
fn an_encrypted_image_has_an_encrypted_index() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let Some(expected) = scene.unpacked() else { return };
    let encrypt = format!("jwe:{}", scene.place.text("key.pub"));
    let key = scene.place.text("key.pem");
    let target = format!("oci:{}:x", scene.place.text("sealed"));
    let mut copy = scene.place.nacre("store", &["image", "copy", "--encrypt", &encrypt]);
    run(copy.args([&scene.layout(), &target]));
    let before = blobs(&scene.place.at("sealed"));
    // Without a key, or for nobody.
    let output = scene.index(&target, &["--encrypt", &encrypt]);
    assert!(!output.status.success() && said(&output).contains("--decryption-key"), "{}", said(&output));
    let output = scene.index(&target, &["--decryption-key", &key]);
    assert!(!output.status.success() && said(&output).contains("--encrypt"), "{}", said(&output));
    assert_eq!(blobs(&scene.place.at("sealed")), before, "nothing was left");
    let made = scene.indexed(&target, &["--encrypt", &encrypt, "--decryption-key", &key]);
    assert!(made["layers"].as_array().unwrap().iter().all(|layer| layer["encrypted"] == true), "{made}");
    scene.assert_mounts(&target, &[], &expected);
    // Nothing of it is in what was added, but for the config, which OCI images have in the clear.
    for (name, bytes) in blobs(&scene.place.at("sealed")) {
        if before.iter().any(|(known, _)| *known == name) {
            continue;
        }
        for secret in ["passwd", "sparse", "by-link", "opaque"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} is in {name}");
        }
    }
    // Another key opens neither.
    run(scene.place.program("openssl").args(["genpkey", "-algorithm", "RSA", "-out", "other.pem"]));
    let other = scene.place.text("other.pem");
    let mut nacre = scene.place.nacre("store", &["run", "--lazy", "--insecure-policy", "--decryption-key", &other]);
    assert_refused(&nacre.arg(&target).output().unwrap(), &["the index's key"]);
}

#[test]
fn a_mount_by_an_index_outlives_the_daemon() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let Some(expected) = scene.unpacked() else { return };
    let (encrypt, key) = (format!("jwe:{}", scene.place.text("key.pub")), scene.place.text("key.pem"));
    let image = scene.name("sealed");
    scene.push(&image, &["--encrypt", &encrypt]);
    let made = scene.indexed(&image, &["--encrypt", &encrypt, "--decryption-key", &key]);
    for front in ["erofs", "fuse"] {
        let options = ["--allow-unsigned", "--front", front];
        let mounted = scene.mount_at(front, &image, &options).map_err(|output| said(&output)).unwrap();
        let shown = scene.shown();
        assert_eq!(shown.len(), 1, "{shown:?}");
        assert_eq!(shown[0]["target"], mounted.target.to_str().unwrap());
        assert_eq!(shown[0]["manifest"], made["subject"]);
        let daemon = scene.daemon_but(0);
        signal("-9", daemon);
        assert_eq!(listing(&mounted.target), expected, "{front}");
        scene.daemon_but(daemon);
        let mut complete = scene.place.nacre("store", &["image", "complete"]);
        run(complete.arg(&mounted.target));
        let shown = scene.shown();
        assert!(shown[0]["complete"] == true && shown[0]["local_bytes"] == shown[0]["total_bytes"], "{shown:?}");
    }
    assert!(scene.shown().is_empty());
}

/// The blobs of a layout.
fn blobs(layout: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .flatten()
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect();
    all.sort();
    all
}

/// Mounts by a policy; `Err` with what was said.
fn mount_by(place: &Place, policy: &str, image: &str) -> Result<(), Output> {
    let target = place.at("by-policy");
    let _ = fs::create_dir(&target);
    let options = ["image", "mount", "--insecure-registry", "--policy", policy, image];
    let output = place.nacre("store", &options).arg(&target).output().unwrap();
    if !output.status.success() {
        return Err(output);
    }
    fs::read(target.join("noise")).unwrap();
    run(place.nacre("store", &["image", "umount"]).arg(&target));
    Ok(())
}

#[test]
fn an_index_is_believed_as_far_as_the_policy_goes() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let (key, image) = (scene.place.text("key.pem"), scene.name("v1"));
    let policy = |key: &str| {
        let signed = json!({"type": "sigstoreSigned", "keyPath": scene.place.text(key)});
        json!({"default": [{"type": "reject"}], "transports": {"docker": {scene.registry.host(): [signed]}}})
            .to_string()
    };
    let policy = scene.place.write("policy.json", policy("key.pub"));
    scene.push(&image, &["--sign", &key]);
    // Signed by nobody, or by somebody else.
    scene.indexed(&image, &[]);
    let refused = mount_by(&scene.place, &policy, &image).unwrap_err();
    assert_refused(&refused, &["no index that can be used", "signature"]);
    run(scene.place.program("openssl").args([
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        "other.pem",
    ]));
    let other = scene.place.text("other.pem");
    scene.indexed(&image, &["--span", "1M", "--sign", &other]);
    assert_refused(&mount_by(&scene.place, &policy, &image).unwrap_err(), &["no index that can be used"]);
    // Signed as the image is: what else lies beside it does not matter.
    let made = scene.indexed(&image, &["--span", "512K", "--sign", &key, "--sign-bundle"]);
    assert_eq!(made["signatures_made"], 1);
    mount_by(&scene.place, &policy, &image).map_err(|output| said(&output)).unwrap();
    scene.indexed(&image, &["--span", "3M", "--sign", &key]);
    mount_by(&scene.place, &policy, &image).map_err(|output| said(&output)).unwrap();
    // The policy decides for whoever makes an index, too.
    let reject = scene.place.write("reject.json", r#"{"default":[{"type":"reject"}]}"#);
    assert_refused(&scene.index(&image, &["--policy", &reject]), &["reject"]);
    scene.indexed(&image, &["--policy", &policy, "--sign", &key]);
}

#[test]
fn an_index_of_another_image_is_not_used() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let made = scene.indexed(&scene.layout(), &[]);
    let digest = made["digest"].as_str().unwrap().trim_start_matches("sha256:");
    // Another image of the layout, with the first one's index, whose subject is changed to it: the layers give it away.
    let other = Image::builder().layer_of(Layer::of([Entry::file("other", "other")]), Compression::Gzip).build();
    let layout = scene.place.at("layout");
    other.write_layout(&scene.place.at("second"), "v2");
    let second: Value = serde_json::from_slice(&fs::read(scene.place.at("second/index.json")).unwrap()).unwrap();
    for (name, bytes) in blobs(&scene.place.at("second")) {
        fs::write(layout.join("blobs/sha256").join(name), bytes).unwrap();
    }
    let mut manifest: Value =
        serde_json::from_slice(&fs::read(layout.join("blobs/sha256").join(digest)).unwrap()).unwrap();
    let mut entry = second["manifests"][0].clone();
    for key in ["digest", "size", "mediaType"] {
        manifest["subject"][key] = entry[key].clone();
    }
    let bytes = manifest.to_string().into_bytes();
    let forged = sha256(&scene.place, &bytes);
    fs::write(layout.join("blobs/sha256").join(&forged), &bytes).unwrap();
    let mut index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let listed = index["manifests"].as_array_mut().unwrap();
    let mut attached = listed.iter().find(|entry| entry["artifactType"].is_string()).unwrap().clone();
    attached["digest"] = json!(format!("sha256:{forged}"));
    attached["size"] = json!(bytes.len());
    listed.push(attached);
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "v2"});
    listed.push(entry);
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let image = format!("oci:{}:v2", layout.display());
    let output = scene.mount(&image, &PLAIN).err().unwrap();
    assert_refused(&output, &["layer 0 is sha256:", "in the index, and"]);
}

fn sha256(place: &Place, bytes: &[u8]) -> String {
    let path = place.write("hashed", bytes);
    let output = run(Command::new("sha256sum").arg(path));
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn what_the_host_changes_of_layers_and_indexes_is_an_error() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let made = scene.indexed(&scene.layout(), &[]);
    let no_cache = scene.place.text("other-cache");
    let options = ["--allow-unsigned", "--patience", "1", "--cache", &no_cache];
    let layout = scene.place.at("layout/blobs/sha256");
    let digest = |value: &Value| value.as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let manifest: Value = serde_json::from_slice(&fs::read(layout.join(digest(&made["digest"]))).unwrap()).unwrap();
    let spoil = |name: &str| {
        let good = fs::read(layout.join(name)).unwrap();
        let mut bad = good.clone();
        bad.iter_mut().step_by(97).for_each(|byte| *byte ^= 0x10);
        fs::write(layout.join(name), bad).unwrap();
        good
    };
    // The metadata: nothing is mounted.
    let metadata = digest(&manifest["layers"][0]["digest"]);
    let good = spoil(&metadata);
    assert_refused(&scene.mount(&scene.layout(), &options).err().unwrap(), &["no index that can be used"]);
    fs::write(layout.join(metadata), good).unwrap();
    // Pages, and the layer: reads fail until they are right again.
    for name in [digest(&manifest["layers"][1]["digest"]), digest(&made["layers"][0]["digest"])] {
        let good = spoil(&name);
        let mounted = scene.mount(&scene.layout(), &options).map_err(|output| said(&output)).unwrap();
        assert_eq!(fs::read(mounted.target.join("noise")).unwrap_err().raw_os_error(), Some(5), "EIO");
        assert!(fs::read_dir(&mounted.target).unwrap().count() > 8, "names are there");
        fs::write(layout.join(&name), good).unwrap();
        let start = std::time::Instant::now();
        while fs::read(mounted.target.join("noise")).is_err() {
            assert!(start.elapsed().as_secs() < 20, "what is right again is read again");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        drop(mounted);
        fs::remove_dir_all(&no_cache).unwrap();
    }
}

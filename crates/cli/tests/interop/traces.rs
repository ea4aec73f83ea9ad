//! `nacre image trace`: what a run reads is recorded, and fetched ahead of the next mounts, whoever encrypts and signs.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Output,
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{Compression, Entry, Image, Layer, require};
use serde_json::Value;

use crate::{
    lazy::{PULL, Scene, listing},
    support::{Place, assert_refused, said, system},
};

/// What does not compress, another for each file.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = u64::from(seed) << 1 | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[7]
    };
    (0..length).map(|_| next()).collect()
}

/// A system, files that its command reads, and many that it does not.
fn image(place: &Place, script: &str) -> Image {
    let mut files = vec![Entry::dir("data")];
    for number in 0..40 {
        files.push(Entry::file(format!("data/{number:02}"), noise(number, 300_000)));
    }
    Image::builder()
        .layer_of(system(place), Compression::Gzip)
        .layer_of(Layer::of(files), Compression::Zstd)
        .run("Env", serde_json::json!(["PATH=/bin"]))
        .run("Cmd", serde_json::json!(["sh", "-c", script]))
        .build()
}

impl Scene {
    fn trace(&self, from: &str, to: &str, options: &[&str]) -> Output {
        let key = self.place.text("key.pem");
        let mut nacre = self.place.nacre("store", &["image", "trace", "--json", "--decryption-key", &key]);
        nacre.args(PULL).args(options).args([from, to]).output().unwrap()
    }

    fn recipient(&self) -> String {
        format!("jwe:{}", self.place.text("key.pub"))
    }
}

fn traced(output: &Output) -> Value {
    serde_json::from_slice(&traced_text(output)).unwrap()
}

/// Bytes of blocks below a directory: of data blobs in a cache, whose names begin so.
fn held(cache: &Path, blobs: &[String]) -> u64 {
    let mut total = 0;
    for group in fs::read_dir(cache).into_iter().flatten().flatten() {
        for file in fs::read_dir(group.path()).into_iter().flatten().flatten() {
            let name = file.file_name().into_string().unwrap();
            if blobs.iter().any(|blob| name.starts_with(blob)) {
                total += file.metadata().unwrap().blocks() * 512;
            }
        }
    }
    total
}

/// The digests of an image's data blobs, without the algorithm, and their size.
fn data(made: &Value) -> (Vec<String>, u64) {
    let layers = made["images"][0]["layers"].as_array().unwrap();
    let data: Vec<_> =
        layers.iter().filter(|layer| layer["media_type"].as_str().unwrap().contains("lazy.data.")).collect();
    let digest = |layer: &&&Value| layer["to"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    (data.iter().map(|layer| digest(&layer)).collect(), data.iter().map(|layer| layer["size"].as_u64().unwrap()).sum())
}

#[test]
fn what_a_run_read_is_there_before_the_next_one_asks_for_it() {
    let place = Place::new();
    let image = image(&place, "cat /data/07 /data/33 /data/08 > /dev/null; echo said; exit 3");
    let Some(scene) = Scene::new(&image) else { return };
    let copied = scene.copy("v1", &[]);
    assert!(copied.status.success(), "{}", said(&copied));
    let copied: Value = serde_json::from_slice(&copied.stdout).unwrap();
    let recipient = scene.recipient();
    for (runtime, front) in [("builtin", "erofs"), ("runc", "fuse")] {
        if runtime != "builtin" && require(runtime).is_none() {
            continue;
        }
        let options = ["--encrypt", &recipient, "--runtime", runtime, "--front", front];
        let output = scene.trace(&scene.name("v1"), &scene.name(runtime), &options);
        let made = traced(&output);
        assert!(String::from_utf8_lossy(&output.stderr).contains("said"), "what the run says is on standard error");
        let places = made["trace"].as_u64().unwrap();
        assert!((10..500).contains(&places), "{places}");
        assert_eq!(data(&made), data(&copied), "the data are the same");
        assert!(made["images"][0]["layers"][2]["reused"].as_bool().unwrap(), "and are not copied again");
        assert_ne!(made["digest"], copied["digest"]);
        let key = scene.place.text("key.pem");
        let mut nacre = scene.place.nacre("store", &["image", "inspect", "--json", "--insecure-registry"]);
        let shown = traced(&nacre.args(["--decryption-key", &key, &scene.name(runtime)]).output().unwrap());
        assert_eq!(shown["lazy"]["trace"]["chunks"], made["trace"]);
        assert!(shown["lazy"]["trace"]["stored_bytes"].as_u64().unwrap() > 900_000, "{shown}");

        let (blobs, size) = data(&made);
        let cache = scene.place.text(&format!("cache-{runtime}"));
        let mounted = scene.mount(&scene.name(runtime), &["--front", front, "--cache", &cache]);
        let mounted = mounted.map_err(|output| said(&output)).unwrap();
        let start = Instant::now();
        let (mut last, mut ahead) = (0, 1);
        // Until nothing more comes.
        while ahead != last || ahead < 900_000 {
            assert!(start.elapsed() < Duration::from_secs(30), "{ahead} bytes were fetched ahead");
            thread::sleep(Duration::from_millis(300));
            (last, ahead) = (ahead, held(Path::new(&cache), &blobs));
        }
        assert!(ahead < size / 2, "{ahead} of {size} bytes were fetched ahead");
        let shown = listing(&mounted.target);
        drop(mounted);
        let untraced = scene.mount(&scene.name("v1"), &["--front", front]).map_err(|output| said(&output)).unwrap();
        assert!(listing(&untraced.target) == shown, "the tree is the same");
    }
}

#[test]
fn traced_images_are_signed_and_clear_ones_stay_clear() {
    let place = Place::new();
    let Some(scene) = Scene::new(&image(&place, "cat /data/07 > /dev/null; echo ran")) else { return };
    let clear = format!("oci:{}:clear", scene.place.text("made"));
    let source = format!("oci:{}:v1", scene.place.text("layout"));
    let made = scene.place.nacre("store", &["image", "copy", "--lazy", &source, &clear]).output().unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let copied = scene.copy("v1", &[]);
    assert!(copied.status.success(), "{}", said(&copied));

    let (recipient, key) = (scene.recipient(), scene.place.text("key.pem"));
    let policy = serde_json::json!({
        "default": [{"type": "sigstoreSigned", "keyPath": scene.place.text("key.pub")}],
    });
    let policy = scene.place.write("policy.json", policy.to_string());
    let run = |name: &str| {
        let arguments =
            ["run", "--lazy", "--quiet", "--insecure-registry", "--decryption-key", &key, "--policy", &policy];
        scene.place.nacre("store", &arguments).args(["--runtime", "builtin", name]).output().unwrap()
    };
    let signed =
        traced(&scene.trace(&scene.name("v1"), &scene.name("signed"), &["--encrypt", &recipient, "--sign", &key]));
    assert_eq!(signed["signatures_made"], 1);
    assert_eq!(said(&run(&scene.name("signed"))), "ran\n");
    traced(&scene.trace(&scene.name("v1"), &scene.name("unsigned"), &["--encrypt", &recipient]));
    assert_refused(&run(&scene.name("unsigned")), &["policy.json"]);

    // In the clear it stays, with nothing to be encrypted; and a traced image can be traced again.
    let again = format!("oci:{}:again", scene.place.text("made"));
    let open = ["--allow-unsigned"];
    let first = traced(&scene.trace(&clear, &scene.name("clear"), &open));
    let second = traced(&scene.trace(&scene.name("clear"), &again, &open));
    assert!(first["images"][0]["layers"][0]["media_type"] == "application/vnd.nacre.lazy.metadata.v1", "{first}");
    assert_eq!(data(&first), data(&second));
    for (from, options, problem) in [
        (scene.name("v1"), vec![], "say for whom with --encrypt"),
        (clear.clone(), vec!["--allow-unsigned", "--encrypt", &recipient], "the image is not encrypted"),
        (source.clone(), vec!["--allow-unsigned"], "this is no lazy image"),
    ] {
        let output = scene.trace(&from, &scene.name("none"), &options);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(problem), "{}", said(&output));
    }
    let nothing = scene.mount(&scene.name("none"), &[]).err().unwrap();
    assert_eq!(nothing.status.code(), Some(4), "{}", said(&nothing));
}

#[test]
fn inspect_shows_what_a_lazy_image_is_made_of_to_who_has_its_key() {
    let files = |seeds: &[u32]| {
        let files = seeds.iter().map(|seed| Entry::file(format!("{seed}"), noise(*seed, 300_000)));
        let text = Entry::file("text", b"the same line of text\n".repeat(5000));
        let sparse = Entry::sparse("sparse", 5_000_000, &[(2_000_000, b"middle")]);
        Image::builder().layer(files.chain([text, sparse, Entry::file("again", noise(seeds[0], 300_000))])).build()
    };
    let Some(scene) = Scene::new(&files(&[1, 2])) else { return };
    let key = scene.place.text("key.pem");
    assert!(scene.copy("v1", &[]).status.success());
    fs::remove_dir_all(scene.place.at("layout")).unwrap();
    files(&[2, 3]).write_layout(&scene.place.at("layout"), "v1");
    assert!(scene.copy("v2", &[]).status.success());
    let inspect = |options: &[&str], name: &str| {
        let mut nacre = scene.place.nacre("store", &["image", "inspect", "--insecure-registry"]);
        nacre.args(options).arg(scene.name(name)).output().unwrap()
    };
    let json = |output: &Output| -> Value { serde_json::from_slice(&traced_text(output)).unwrap() };

    let other = scene.name("v1");
    let shown = json(&inspect(&["--json", "--decryption-key", &key, "--shared-with", &other], "v2"));
    let lazily = &shown["lazy"];
    let number =
        |pointer: &str| lazily.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer}: {shown}"));
    assert!(shown["config"]["rootfs"]["diff_ids"][0].is_string() && lazily["encrypted"] == true, "{shown}");
    assert_eq!(number("/content_bytes"), 3 * 300_000 + 5_000_000 + 110_000);
    assert_eq!((number("/inodes"), number("/trace/chunks"), number("/data_blobs")), (6, 0, 1));
    // The text is compressed, noise is not; the rest of the sparse file is not stored.
    let zstd = (number("/chunks/zstd/plain_bytes"), number("/chunks/zstd/stored_bytes"));
    assert!(zstd.0 >= 110_000 && zstd.1 + 100_000 < zstd.0, "{lazily}");
    assert!((700_000..1_000_000).contains(&number("/chunks/raw/plain_bytes")), "{lazily}");
    assert!(number("/chunks/zeroes/plain_bytes") > 4_900_000, "{lazily}");
    assert!((4096..128 << 10).contains(&number("/chunks/average_plain")));
    let stored =
        number("/chunks/zstd/stored_bytes") + number("/chunks/raw/stored_bytes") - number("/repeated/stored_bytes");
    assert_eq!(
        (number("/blobs/0/used/stored_bytes"), number("/blobs/0/size"), number("/data_bytes")),
        (stored, stored, stored)
    );
    let shared = number("/shared_with/0/shared/stored_bytes");
    assert!((250_000..400_000).contains(&shared), "one file and the text: {shared}");

    // For people; without the key; and with another one.
    let text = said(&inspect(&["--decryption-key", &key], "v2"));
    for part in ["encrypted: ", "as it is", "trace      none", "data 0", "repeated "] {
        assert!(text.contains(part), "'{part}' is not in {text}");
    }
    let locked = json(&inspect(&["--json"], "v2"));
    assert!(locked["config"].is_null() && locked["lazy"]["locked"].as_str().unwrap().contains("key"), "{locked}");
    assert_eq!(locked["lazy"]["data_bytes"], stored);
    assert!(locked["lazy"]["chunks"].is_null() && said(&inspect(&[], "v2")).contains("locked "));
    nacre_testkit::run(scene.place.program("openssl").args(["genpkey", "-algorithm", "RSA", "-out", "other.pem"]));
    assert_eq!(inspect(&["--decryption-key", &scene.place.text("other.pem")], "v2").status.code(), Some(3));
    let source = format!("oci:{}:v1", scene.place.text("layout"));
    let mut nacre = scene.place.nacre("store", &["image", "inspect", "--shared-with", &other, &source]);
    let refused = nacre.output().unwrap();
    assert!(refused.status.code() == Some(2) && said(&refused).contains("this is none"), "{}", said(&refused));
}

/// Standard output of what went well.
fn traced_text(output: &Output) -> Vec<u8> {
    assert!(output.status.success(), "{}", said(output));
    output.stdout.clone()
}

#[test]
fn a_run_that_does_not_end_is_ended_and_traced() {
    let place = Place::new();
    let Some(scene) = Scene::new(&image(&place, "cat /data/01 > /dev/null; while :; do sleep 1; done")) else { return };
    let source = format!("oci:{}:v1", scene.place.text("layout"));
    let clear = format!("oci:{}:clear", scene.place.text("made"));
    let made = scene.place.nacre("store", &["image", "copy", "--lazy", &source, &clear]).output().unwrap();
    assert!(made.status.success(), "{}", said(&made));
    // It does not listen, and is killed ten seconds later; or it does.
    let deaf: &[&str] = &[];
    let listens = &["--", "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 1; done"];
    for (runtime, command, least, most) in
        [("builtin", deaf, 11, 60), ("runc", deaf, 11, 60), ("builtin", listens, 1, 10), ("crun", listens, 1, 10)]
    {
        if runtime != "builtin" && require(runtime).is_none() {
            continue;
        }
        let start = Instant::now();
        let mut nacre = scene.place.nacre("store", &["image", "trace", "--json", "--for", "1", "--allow-unsigned"]);
        nacre.args(PULL).args(["--runtime", runtime, &clear, &scene.name("ended")]).args(command);
        let made = traced(&nacre.output().unwrap());
        assert!(made["trace"].as_u64().unwrap() > 3, "{made}");
        let took = start.elapsed().as_secs();
        assert!((least..most).contains(&took), "{runtime} {command:?} took {took} s");
    }
    for left in ["store/lazy/mounts", "store/bundles"] {
        assert_eq!(fs::read_dir(scene.place.at(left)).unwrap().count(), 0, "{left}");
    }
}

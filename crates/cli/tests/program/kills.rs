//! Processes that are killed at any instant, and several at once: the next command works, and nothing half-made is ever seen.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nacre_registry::{Fault, Registry};
use nacre_testkit::{Compression, Entry, Image, Layer, Rng, root, run};
use serde_json::Value;

use crate::support::{Place, said, system};

const OPTIONS: [&str; 3] = ["--insecure-policy", "--allow-unsigned", "--insecure-registry"];
/// The layers that come slowly: the bytes of `layer-N`'s only file.
const SLOW_LAYERS: usize = 4;
const LAYER_BYTES: usize = 24_000;

/// A registry whose layers take some time, and an image there that runs for some time.
struct Scene {
    place: Place,
    registry: Registry,
}

impl Scene {
    fn new() -> Self {
        let (place, registry) = (Place::new(), Registry::memory().unwrap());
        let mut image = Image::builder().layer_of(system(&place), Compression::Zstd);
        for number in 0..SLOW_LAYERS {
            image = image.layer_of(Layer::of([file(number)]), Compression::None);
        }
        let image = image
            .run("Env", serde_json::json!(["PATH=/bin"]))
            .run("Cmd", serde_json::json!(["sh", "-c", "echo on; sleep 0.3"]))
            .build();
        image.push(&registry, "t/app", "1");
        let slow: Vec<String> =
            image.layers[1..].iter().map(|layer| nacre_core::Digest::sha256(&layer.bytes).to_string()).collect();
        registry.set_faults(move |request| {
            let slow = request.is_blob_get() && slow.iter().any(|digest| request.path.ends_with(digest));
            if slow { Fault::Slow { bytes: 2048, pause: Duration::from_millis(6) } } else { Fault::Serve }
        });
        Self { place, registry }
    }

    fn image(&self) -> String {
        format!("docker://{}/t/app:1", self.registry.host())
    }

    fn command(&self, what: &str) -> Command {
        let image = self.image();
        let mut command = match what {
            "pull" => self.place.nacre("store", &["image", "pull", "--quiet", &image]),
            "run" => self.place.nacre("store", &["run", "--quiet", &image]),
            "rm" => return self.place.nacre("store", &["image", "rm", &image]),
            "gc" => return self.place.nacre("store", &["image", "gc"]),
            other => panic!("{other}"),
        };
        command.args(OPTIONS);
        command
    }

    fn start(&self, what: &str) -> Child {
        self.command(what).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Every layer that can be seen is whole, and every image that is listed has all of its layers.
    #[track_caller]
    fn assert_whole(&self) {
        let store = self.place.at("store");
        for layer in fs::read_dir(store.join("layers")).into_iter().flatten().flatten() {
            assert!(layer.path().join("layer.json").exists(), "{layer:?}");
            let files: Vec<_> = fs::read_dir(layer.path().join("fs")).unwrap().flatten().collect();
            assert!(!files.is_empty(), "{layer:?} is empty");
            for entry in files.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("layer-")) {
                assert_eq!(entry.metadata().unwrap().len(), LAYER_BYTES as u64, "{entry:?}");
            }
        }
        let listed: Value =
            serde_json::from_slice(&run(&mut self.place.nacre("store", &["image", "ls", "--json"])).stdout).unwrap();
        for layer in listed.as_array().unwrap().iter().flat_map(|image| image["layers"].as_array().unwrap()) {
            let name = layer["diff_id"].as_str().unwrap().replace(':', "-");
            assert!(store.join("layers").join(&name).exists(), "a listed image lacks {name}");
        }
    }

    /// After `gc` there is no work of killed processes, no record of one, and no mount.
    #[track_caller]
    fn assert_clean(&self) {
        run(&mut self.command("gc"));
        let store = self.place.at("store");
        for part in ["staging", "bundles"] {
            let left: Vec<_> = fs::read_dir(store.join(part)).unwrap().flatten().collect();
            assert!(left.is_empty(), "{part}: {left:?}");
        }
        for part in ["refs", "images"] {
            unfinished(&store.join(part));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&store.display().to_string()), "{mounts}");
    }
}

fn file(number: usize) -> Entry {
    Entry::file(format!("layer-{number}"), Rng::new(number as u64 + 1).bytes(LAYER_BYTES))
}

fn unfinished(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        assert!(!entry.file_name().to_string_lossy().starts_with('.'), "{entry:?}");
        if entry.path().is_dir() {
            unfinished(&entry.path());
        }
    }
}

#[test]
fn a_kill_at_any_instant_needs_no_repair() {
    if !root() {
        return;
    }
    let seed = std::env::var("NACRE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
    eprintln!("NACRE_SEED={seed}");
    let (scene, mut rng) = (Scene::new(), Rng::new(seed));
    for round in 0..25 {
        let what = *rng.pick(&["pull", "pull", "pull", "run", "run", "rm", "gc"]);
        let after = Duration::from_millis(rng.below(if what == "rm" || what == "gc" { 60 } else { 350 }) as u64);
        let mut child = scene.start(what);
        thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
        eprintln!("round {round}: {what}, killed after {after:?}");
        scene.assert_whole();
        match round % 5 {
            1 => scene.assert_clean(),
            3 => drop(run(&mut scene.command("pull"))),
            _ => {}
        }
    }
    let output = run(&mut scene.command("run"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "on\n");
    run(&mut scene.command("rm"));
    scene.assert_clean();
    scene.place.assert_empty("store");
}

#[track_caller]
fn good(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

#[test]
fn several_pulls_of_one_image_fetch_it_once() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let children: Vec<Child> = (0..3).map(|_| scene.start("pull")).collect();
    children.into_iter().for_each(|child| drop(good(child)));
    // The config is a small blob that each may read.
    let mut layers: Vec<String> = scene
        .registry
        .requests()
        .into_iter()
        .filter(nacre_registry::Request::is_blob_get)
        .map(|request| request.path)
        .collect();
    layers.sort();
    let mut counts: Vec<usize> = layers.chunk_by(|a, b| a == b).map(<[String]>::len).collect();
    counts.sort_unstable();
    assert_eq!(counts[..SLOW_LAYERS + 1], [1; SLOW_LAYERS + 1], "{layers:?}");
    scene.assert_whole();
    scene.assert_clean();
}

#[test]
fn pulls_collections_and_removals_at_once_do_not_hurt_each_other() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    for round in 0..3 {
        let pull = scene.start("pull");
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end {
            good(scene.start("gc"));
            if round == 2 {
                // There may be nothing to remove yet: then it says so.
                let output = scene.start("rm").wait_with_output().unwrap();
                assert!([Some(0), Some(4)].contains(&output.status.code()), "{}", said(&output));
            }
        }
        good(pull);
        scene.assert_whole();
        scene.assert_clean();
    }
}

#[test]
fn an_image_that_runs_is_not_removed() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    run(&mut scene.command("pull"));
    let child = scene.start("run");
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::read_dir(scene.place.at("store/bundles"))
        .unwrap()
        .flatten()
        .all(|dir| !dir.path().join("bundle.json").exists())
    {
        assert!(Instant::now() < deadline, "the container does not start");
        thread::sleep(Duration::from_millis(2));
    }
    let output = scene.command("rm").output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    assert!(said(&output).contains("in use"), "{}", said(&output));
    assert!(good(child).contains("on\n"));
    run(&mut scene.command("rm"));
    scene.place.assert_empty("store");
}

//! Lazy images with programs that are not ours: docker-registry serves them, skopeo copies them unharmed, the kernel and runc show the
//! tree that umoci unpacks; and what a host changes is an error, and nothing else.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{Compression, DockerRegistry, DockerRegistryOptions, Entry, Image, Layer, require, root, run};
use serde_json::Value;

use crate::support::{Place, assert_refused, runnable, said};

pub(crate) const PULL: [&str; 2] = ["--insecure-registry", "--insecure-policy"];

pub(crate) struct Scene {
    pub(crate) place: Place,
    pub(crate) registry: DockerRegistry,
}

impl Scene {
    /// A registry, a key pair, a domain's key, and an image in a layout.
    pub(crate) fn new(image: &Image) -> Option<Self> {
        if !root() {
            return None;
        }
        let openssl = require("openssl")?;
        let registry = DockerRegistry::start(&DockerRegistryOptions { basic_auth: false, tls: None })?;
        let place = Place::new();
        for arguments in [
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem",
            "pkey -in key.pem -pubout -out key.pub",
        ] {
            run(place.program(&openssl).args(arguments.split(' ')));
        }
        fs::write(place.at("domain"), [7; 32]).unwrap();
        image.write_layout(&place.at("layout"), "v1");
        Some(Self { place, registry })
    }

    pub(crate) fn name(&self, tag: &str) -> String {
        format!("docker://{}/lazy:{tag}", self.registry.host())
    }

    pub(crate) fn copy(&self, tag: &str, options: &[&str]) -> Output {
        let source = format!("oci:{}:v1", self.place.text("layout"));
        let encrypt = format!("jwe:{}", self.place.text("key.pub"));
        let mut nacre = self.place.nacre("store", &["image", "copy", "--json", "--lazy", "--insecure-registry"]);
        nacre.args(["--encrypt", &encrypt, "--domain-key-file", &self.place.text("domain")]).args(options);
        nacre.args([source, self.name(tag)]).output().unwrap()
    }

    /// Mounts an image with the options; it is unmounted at the end.
    pub(crate) fn mount(&self, image: &str, options: &[&str]) -> Result<Mounted<'_>, Output> {
        self.mount_at("mounted", image, options)
    }

    /// The same, on a directory of that name.
    pub(crate) fn mount_at(&self, name: &str, image: &str, options: &[&str]) -> Result<Mounted<'_>, Output> {
        let target = self.place.at(name);
        let _ = fs::create_dir(&target);
        let key = self.place.text("key.pem");
        let mut nacre = self.place.nacre("store", &["image", "mount", "--decryption-key", &key]);
        let output = nacre.args(PULL).args(options).arg(image).arg(&target).output().unwrap();
        if output.status.success() { Ok(Mounted { place: &self.place, target }) } else { Err(output) }
    }
}

pub(crate) struct Mounted<'a> {
    place: &'a Place,
    pub(crate) target: PathBuf,
}

impl<'a> Mounted<'a> {
    /// What is mounted there already.
    pub(crate) fn new(place: &'a Place, target: PathBuf) -> Self {
        Self { place, target }
    }

    /// Leaves the unmounting to the test.
    pub(crate) fn forget(self) -> PathBuf {
        let target = self.target.clone();
        std::mem::forget(self);
        target
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let output = self.place.nacre("store", &["image", "umount"]).arg(&self.target).output().unwrap();
        assert!(output.status.success() || thread::panicking(), "{}", said(&output));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.target.to_str().unwrap()) || thread::panicking(), "it stays mounted");
    }
}

/// What find(1) and sha256sum(1) say of a tree.
pub(crate) fn listing(root: &Path) -> String {
    let script = "find . -printf '%P %y %m %U:%G %T@ %s %l\\n' | grep -v ' d ' | sort; find . -type d -printf '%P %m %U:%G\\n' | sort; \
                  find . -type f -print0 | sort -z | xargs -0 sha256sum";
    String::from_utf8(run(Command::new("sh").args(["-c", script]).current_dir(root)).stdout).unwrap()
}

/// What does not compress.
pub(crate) fn noise() -> Vec<u8> {
    let mixed = |at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[2];
    (0..700_000).map(mixed).collect()
}

pub(crate) fn rich() -> Image {
    let [lower, upper] = rich_layers();
    Image::builder().layer_of(lower, Compression::Gzip).layer_of(upper, Compression::Gzip).build()
}

pub(crate) fn rich_layers() -> [Layer; 2] {
    let noise = noise();
    let lower = Layer::of([
        Entry::dir("etc").mode(0o750).owner(3, 4).mtime(1_600_000_000, 500),
        Entry::file("etc/gone", "gone"),
        Entry::file("etc/passwd", "root:x:0:0").mtime(1_500_000_000, 7),
        Entry::file("noise", noise.clone()).mode(0o4755),
        Entry::hard_link("same", "noise"),
        Entry::symlink("link", "etc/passwd"),
        Entry::fifo("pipe"),
        Entry::char_device("device", 5, 300),
        Entry::dir("opaque"),
        Entry::file("opaque/lower", "lower"),
        Entry::sparse("sparse", 5_000_000, &[(2_000_000, b"middle")]),
    ]);
    let upper = Layer::of([
        Entry::whiteout("etc/gone"),
        Entry::opaque("opaque"),
        Entry::file("opaque/upper", "upper"),
        Entry::file("copy", noise),
        Entry::file("empty", ""),
        Entry::symlink("to", "etc"),
        Entry::file("to/by-link", "by a link"),
    ]);
    [lower, upper]
}

#[test]
fn the_mounted_tree_is_the_one_that_umoci_unpacks() {
    let (Some(scene), Some(umoci)) = (Scene::new(&rich()), require("umoci")) else { return };
    let layout = format!("{}:v1", scene.place.text("layout"));
    run(scene.place.program(umoci).args(["unpack", "--image", &layout]).arg(scene.place.at("unpacked")));
    let expected = listing(&scene.place.at("unpacked/rootfs"));
    let output = scene.copy("v1", &[]);
    assert!(output.status.success(), "{}", said(&output));
    for front in ["erofs", "fuse"] {
        let mounted = scene.mount(&scene.name("v1"), &["--front", front]).map_err(|output| said(&output)).unwrap();
        assert_eq!(listing(&mounted.target), expected, "{front}");
    }
    // Another time the registry is not needed for what was read: all of it.
    let cached = scene.place.at("store/lazy/chunks");
    assert!(fs::read_dir(cached).unwrap().next().is_some());
}

#[test]
fn skopeo_copies_it_unharmed_and_runtimes_run_it() {
    let place = Place::new();
    let image = runnable(&place, "cat /second /third; echo $GREETING; exit 42");
    let (Some(scene), Some(skopeo)) = (Scene::new(&image), require("skopeo")) else { return };
    let output = scene.copy("v1", &[]);
    assert!(output.status.success(), "{}", said(&output));
    let copied: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layout = format!("oci:{}:x", scene.place.text("copied"));
    run(scene.place.program(&skopeo).args(["copy", "--src-tls-verify=false", &scene.name("v1"), &layout]));
    let raw = run(scene.place.program(&skopeo).args(["inspect", "--raw", &layout])).stdout;
    assert_eq!(digest(&raw), copied["digest"].as_str().unwrap());
    let key = scene.place.text("key.pem");
    let arguments = ["run", "--lazy", "--quiet", "--decryption-key", &key];
    for runtime in ["builtin", "runc", "crun"] {
        if runtime != "builtin" && require(runtime).is_none() {
            continue;
        }
        for (image, front) in [(scene.name("v1"), "auto"), (layout.clone(), "fuse")] {
            let mut nacre = scene.place.nacre("store", &arguments);
            let output = nacre.args(PULL).args(["--runtime", runtime, "--front", front]).arg(image).output().unwrap();
            assert_eq!((output.status.code(), said(&output)), (Some(42), "zstd\ngzip\nhello\n".into()), "{runtime}");
        }
    }
    let left: Vec<_> = fs::read_dir(scene.place.at("store/bundles")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let asked = scene.place.nacre("store", &["image", "inspect", "--json", &layout]).output().unwrap();
    let shown: Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!(shown["config"], Value::Null, "the config is encrypted");
}

#[test]
fn a_second_version_shares_what_it_has_in_common() {
    let Some(scene) = Scene::new(&rich()) else { return };
    let first = scene.copy("v1", &[]);
    assert!(first.status.success(), "{}", said(&first));
    let again = scene.copy("again", &[]);
    let data = |output: &Output| {
        let made: Value = serde_json::from_slice(&output.stdout).unwrap();
        let layers = made["images"][0]["layers"].as_array().unwrap().clone();
        layers.iter().map(|layer| layer["to"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(data(&again), data(&first), "the same input gives the same blobs");
    // Other layers: only by being told of the first image can the builder know what is there.
    let second = Image::builder().layer([Entry::file("new", "new"), Entry::file("elsewhere", noise())]).build();
    fs::remove_dir_all(scene.place.at("layout")).unwrap();
    second.write_layout(&scene.place.at("layout"), "v1");
    let key = scene.place.text("key.pem");
    let output = scene.copy("v2", &["--dedup-from", &scene.name("v1"), "--decryption-key", &key]);
    assert!(output.status.success(), "{}", said(&output));
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(made["lazy"][0]["new_bytes"].as_u64().unwrap() < 20_000, "{made}");
    let mounted = scene.mount(&scene.name("v2"), &[]).map_err(|output| said(&output)).unwrap();
    assert_eq!(fs::read(mounted.target.join("new")).unwrap(), b"new");
    assert_eq!(fs::read(mounted.target.join("elsewhere")).unwrap().len(), 700_000);
}

#[test]
fn what_the_host_changes_is_an_error_and_never_read() {
    let Some(scene) = Scene::new(&rich()) else { return };
    // Into a layout, whose blobs can be changed.
    let key = format!("jwe:{}", scene.place.text("key.pub"));
    let (source, target) =
        (format!("oci:{}:v1", scene.place.text("layout")), format!("oci:{}:x", scene.place.text("lazy")));
    let arguments = ["image", "copy", "--lazy", "--json", "--encrypt", &key, &source, &target];
    let made: Value = serde_json::from_slice(&run(&mut scene.place.nacre("store", &arguments)).stdout).unwrap();
    let layers: Vec<String> = (made["images"][0]["layers"].as_array().unwrap().iter())
        .map(|layer| layer["to"].as_str().unwrap().trim_start_matches("sha256:").to_owned())
        .collect();
    let blob = |index: usize| scene.place.at("lazy/blobs/sha256").join(&layers[index]);
    let spoil = |index: usize| {
        let good = fs::read(blob(index)).unwrap();
        let mut bad = good.clone();
        bad.iter_mut().step_by(97).for_each(|byte| *byte ^= 0x10);
        fs::write(blob(index), bad).unwrap();
        good
    };
    let no_cache = scene.place.text("other-cache");
    let options = ["--patience", "1", "--cache", &no_cache];
    // The metadata: nothing is mounted.
    let good = spoil(0);
    let output = scene.mount(&target, &options).err().unwrap();
    assert_refused(&output, &["the metadata of the lazy image"]);
    fs::write(blob(0), good).unwrap();
    // The table and the data: reads fail, and say why in the log.
    for index in [1, 2] {
        let good = spoil(index);
        let mounted = scene.mount(&target, &options).map_err(|output| said(&output)).unwrap();
        let error = fs::read(mounted.target.join("noise")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "EIO");
        assert!(fs::read_dir(&mounted.target).unwrap().count() > 8, "names are there");
        fs::write(blob(index), good).unwrap();
        let start = Instant::now();
        while fs::read(mounted.target.join("noise")).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "what is right again is read again");
            thread::sleep(Duration::from_millis(100));
        }
        drop(mounted);
        fs::remove_dir_all(&no_cache).unwrap();
    }
    // A key that is not for us, no signature where one is demanded.
    run(scene.place.program("openssl").args(["genpkey", "-algorithm", "RSA", "-out", "other.pem"]));
    let other = scene.place.text("other.pem");
    let mut nacre = scene.place.nacre("store", &["run", "--lazy", "--decryption-key", &other]);
    assert_refused(&nacre.args(PULL).arg(&target).output().unwrap(), &["the lazy image's key"]);
    let policy = scene.place.write("reject.json", r#"{"default":[{"type":"reject"}]}"#);
    let mut nacre = scene.place.nacre("store", &["run", "--lazy", "--policy", &policy, &target]);
    assert_refused(&nacre.output().unwrap(), &["reject"]);
}

fn digest(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum");
    let path = std::env::temp_dir().join(format!("nacre-digest-{}", std::process::id()));
    fs::write(&path, bytes).unwrap();
    let output = run(child.arg(&path));
    fs::remove_file(path).unwrap();
    format!("sha256:{}", String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap())
}

//! The library as a C program uses it: the tree is the one that umoci unpacks, what is asked wrongly is refused, and what a host changes is
//! an error.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Mutex,
};

use nacre_lazy::build::{CHUNK, LazyRemake};
use nacre_oci::{
    copy::{CopyOptions, EncryptLayers, Source, copy},
    crypt::Recipients,
    registry::{Client, ClientConfig, CredentialStore, RegistriesConf},
    transport::{open_sink, open_source},
    unpack::Limits,
};
use nacre_testkit::{Compression, Entry, Image, Layer, registry::Registry, require, root, run};

/// What does not compress.
fn noise() -> Vec<u8> {
    let mixed = |at: u32| at.wrapping_mul(2_654_435_761).wrapping_add(at.wrapping_mul(at)).to_le_bytes()[2];
    (0..700_000).map(mixed).collect()
}

fn image() -> Image {
    let many = (0..700).map(|number| Entry::file(format!("many/{number:0100}"), format!("{number}")));
    let lower = Layer::of(
        [
            Entry::dir("etc").mode(0o750).owner(3, 4),
            Entry::file("etc/passwd", "root:x:0:0").mtime(1_500_000_000, 7).xattr("user.origin", "somewhere"),
            Entry::file("noise", noise()).mode(0o4755).owner(70_000, 5),
            Entry::hard_link("same", "noise"),
            Entry::symlink("to-etc", "etc"),
            Entry::symlink("absolute", "/to-etc/../out/passwd").mtime(1_600_000_000, 0),
            Entry::symlink("out", "../../../../etc"),
            Entry::symlink("loop", "loop"),
            Entry::fifo("pipe"),
            Entry::char_device("device", 5, 300),
            Entry::sparse("sparse", 5_000_000, &[(2_000_000, b"middle")]),
            Entry::dir("many"),
        ]
        .into_iter()
        .chain(many),
    );
    let upper = Layer::of([Entry::file("copy", noise()), Entry::file("empty", ""), Entry::whiteout("many/gone")]);
    Image::builder()
        .layer_of(lower, Compression::Gzip)
        .layer_of(upper, Compression::Gzip)
        .run("Env", serde_json::json!(["PATH=/of/the/config"]))
        .build()
}

/// An image in a layout and, lazy and encrypted, in another one and in a registry; the program, compiled.
struct Scene {
    dir: tempfile::TempDir,
    registry: Registry,
    program: PathBuf,
}

/// The library for programs, which cargo builds beside this test.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

fn source_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

impl Scene {
    fn set() -> Option<Self> {
        let (cc, openssl) = (require("cc")?, require("openssl")?);
        // Not in the system's temporary directory, which may be in memory: stores refuse that.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let scene = Self { program: dir.path().join("reader"), registry: Registry::memory().unwrap(), dir };
        let mut compile = Command::new(cc);
        compile.args("-std=c99 -pedantic -Wall -Wextra -Werror -D_GNU_SOURCE -g -pthread".split(' '));
        compile.arg("-I").arg(source_dir().join("include")).arg(source_dir().join("tests/reader.c"));
        run(compile.arg("-L").arg(library()).args(["-lnacre", "-o"]).arg(&scene.program));
        for arguments in [
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem",
            "pkey -in key.pem -pubout -out key.pub",
        ] {
            run(Command::new(&openssl).current_dir(scene.dir.path()).args(arguments.split(' ')));
        }
        image().write_layout(&scene.at("layout"), "v1");
        scene.make_lazy(&scene.layout());
        scene.make_lazy(&format!("docker://{}/lazy:v1", scene.registry.host()));
        Some(scene)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn layout(&self) -> String {
        format!("oci:{}:v1", self.at("lazy").display())
    }

    fn make_lazy(&self, destination: &str) {
        let config = ClientConfig { insecure: true, ..ClientConfig::default() };
        let credentials = CredentialStore::system(None).unwrap();
        let none = self.at("registries.conf");
        fs::write(&none, "").unwrap();
        let conf = RegistriesConf::system(Some(&none)).unwrap();
        let client = Client::new(config, conf, credentials, std::sync::Arc::new(nacre_core::NoProgress)).unwrap();
        let source = open_source(&format!("oci:{}:v1", self.at("layout").display()).parse().unwrap(), &client).unwrap();
        let sink = open_sink(&destination.parse().unwrap(), &client).unwrap();
        let recipients = Recipients::from_args(&[format!("jwe:{}", self.at("key.pub").display())]).unwrap();
        let remake = LazyRemake {
            domain: None,
            level: 3,
            chunk: CHUNK,
            threads: 2,
            limits: Limits::default(),
            shared: Vec::new(),
            reports: Mutex::default(),
        };
        let options = CopyOptions {
            encrypt: Some((&recipients, &EncryptLayers::All)),
            remake: Some(&remake),
            ..CopyOptions::default()
        };
        copy(&Source::without_policy(&*source).unwrap(), &*sink, &options).unwrap();
    }

    fn config(&self) -> String {
        format!(
            "decryption_keys = ['{}']\n[trust]\ninsecure_policy = true\n[registry]\ninsecure = true\n",
            self.at("key.pem").display()
        )
    }

    /// The program, perhaps run by another one.
    fn reader(&self, by: &[&str], config: &str, reference: &str, cache: &str, command: &[&str]) -> Output {
        let mut words = by.iter().map(Into::into).chain([self.program.clone()]);
        let mut reader = Command::new(words.next().unwrap());
        reader.args(words).arg(self.at("store")).arg(config).arg(self.at(cache)).arg(reference).args(command);
        for name in ["NACRE_CONFIG", "NACRE_POLICY", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"] {
            reader.env_remove(name);
        }
        let output = reader.env("HOME", self.dir.path()).env("LD_LIBRARY_PATH", library()).output().unwrap();
        let left = fs::read_dir(self.at("store/lazy/mounts")).into_iter().flatten().count();
        assert_eq!(left, 0, "no metadata are left");
        output
    }

    fn reads(&self, by: &[&str], reference: &str, command: &[&str]) -> String {
        let output = self.reader(by, &self.config(), reference, "cache", command);
        assert!(output.status.success(), "{command:?}: {}: {}", output.status, said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, config: &str, reference: &str, cache: &str, command: &[&str], code: i32, words: &[&str]) {
        let output = self.reader(&[], config, reference, cache, command);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        for word in words {
            assert!(said(&output).contains(word), "'{word}' is not in {}", said(&output));
        }
    }

    /// The blobs of the image in the layout, as its manifest has them.
    fn blobs(&self) -> Vec<PathBuf> {
        let blob = |digest: &str| self.at("lazy/blobs/sha256").join(digest.trim_start_matches("sha256:"));
        let parse = |path: &Path| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let index = parse(&self.at("lazy/index.json"));
        let manifest = parse(&blob(index["manifests"][0]["digest"].as_str().unwrap()));
        let layers = manifest["layers"].as_array().unwrap().clone();
        layers.iter().map(|layer| blob(layer["digest"].as_str().unwrap())).collect()
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A tree as the program lists it, a line an entry, sorted.
fn listing(root: &Path, path: &str, lines: &mut BTreeSet<String>) {
    let file = root.join(path.trim_start_matches('/'));
    let found = fs::symlink_metadata(&file).unwrap();
    let mut line = format!("{path} {:o} {}:{}", found.mode(), found.uid(), found.gid());
    if !found.is_dir() {
        write!(line, " {} {}.{:09}", found.nlink(), found.mtime(), found.mtime_nsec()).unwrap();
    }
    let device = if found.file_type().is_char_device() { found.rdev() } else { 0 };
    write!(line, " {}:{}", rustix::fs::major(device), rustix::fs::minor(device)).unwrap();
    if found.is_symlink() {
        write!(line, " -> {}", fs::read_link(&file).unwrap().display()).unwrap();
    } else if found.is_file() {
        let content = fs::read(&file).unwrap();
        let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(1_099_511_628_211);
        let sum = content.iter().fold(14_695_981_039_346_656_037, step);
        write!(line, " {} {sum:016x}", content.len()).unwrap();
    }
    let mut names = [0; 4096];
    let length = rustix::fs::llistxattr(&file, &mut names[..]).unwrap();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = [0; 4096];
        let length = rustix::fs::lgetxattr(&file, name, &mut value[..]).unwrap();
        write!(line, " {}=", String::from_utf8_lossy(name)).unwrap();
        value[..length].iter().for_each(|byte| write!(line, "{byte:02x}").unwrap());
    }
    lines.insert(line);
    if found.is_dir() {
        for entry in fs::read_dir(&file).unwrap() {
            let name = entry.unwrap().file_name();
            listing(root, &format!("{path}/{}", String::from_utf8_lossy(name.as_bytes())), lines);
        }
    }
}

#[test]
fn a_c_program_reads_the_tree_that_umoci_unpacks() {
    if !root() {
        return;
    }
    let (Some(scene), Some(umoci)) = (Scene::set(), require("umoci")) else { return };
    let layout = format!("{}:v1", scene.at("layout").display());
    run(Command::new(umoci).args(["unpack", "--image", &layout]).arg(scene.at("unpacked")));
    let mut expected = BTreeSet::new();
    listing(&scene.at("unpacked/rootfs"), "", &mut expected);
    assert!(expected.len() > 700 && expected.iter().any(|line| line.ends_with("user.origin=736f6d657768657265")));
    for reference in [scene.layout(), format!("docker://{}/lazy:v1", scene.registry.host())] {
        let shown = scene.reads(&[], &reference, &["tree"]);
        let shown: BTreeSet<String> = shown.lines().map(str::to_owned).collect();
        let different: Vec<_> = expected.symmetric_difference(&shown).take(10).collect();
        assert!(different.is_empty(), "{different:#?}");
    }
}

#[test]
fn what_a_c_program_asks_wrongly_is_refused_and_threads_share_handles() {
    let Some(scene) = Scene::set() else { return };
    let layout = scene.layout();
    let all: [(&[&str], &str); 3] =
        [(&["errors"], "all refused\n"), (&["threads", "noise"], "same\n"), (&["late"], "late\n")];
    for (command, says) in all {
        assert_eq!(scene.reads(&[], &layout, command), says);
    }
    // The same as a program that has the library within it, without the shared one.
    let linked = scene.at("linked");
    let mut compile = Command::new("cc");
    compile.args(["-D_GNU_SOURCE", "-I"]).arg(source_dir().join("include")).arg(source_dir().join("tests/reader.c"));
    run(compile.arg(library().join("libnacre.a")).args(["-pthread", "-ldl", "-lm", "-o"]).arg(&linked));
    let scene = Scene { program: linked, ..scene };
    assert_eq!(scene.reads(&[], &layout, &["errors"]), "all refused\n");
}

#[test]
fn valgrind_finds_nothing_in_a_c_program() {
    let (Some(scene), Some(valgrind)) = (Scene::set(), require("valgrind")) else { return };
    let by = [
        &*valgrind.display().to_string(),
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite",
    ];
    let layout = scene.layout();
    assert_eq!(scene.reads(&by, &layout, &["errors"]), "all refused\n");
    assert_eq!(scene.reads(&by, &layout, &["late"]), "late\n");
    assert!(scene.reads(&by, &layout, &["tree"]).lines().count() > 700);
}

#[test]
fn a_c_program_is_told_what_a_host_changed_and_what_is_not_trusted() {
    let Some(scene) = Scene::set() else { return };
    let (config, layout) = (scene.config(), scene.layout());
    let good = scene.reads(&[], &layout, &["tree"]);
    let blobs = scene.blobs();
    // Metadata, table, data: the image does not open, or reads fail.
    let words: [(&[&str], i32); 3] =
        [(&["metadata"], 74), (&["chunk table", "SHA-256"], 5), (&["chunk", "SHA-256"], 5)];
    for (number, (blob, (words, code))) in blobs.iter().zip(words).enumerate() {
        let bytes = fs::read(blob).unwrap();
        let mut bad = bytes.clone();
        bad.iter_mut().step_by(97).for_each(|byte| *byte ^= 0x10);
        fs::write(blob, bad).unwrap();
        scene.fails(&config, &layout, &format!("cache-{number}"), &["tree"], code, words);
        fs::write(blob, bytes).unwrap();
    }
    assert_eq!(scene.reads(&[], &layout, &["tree"]), good);
    // A blob that is gone, a key that is not ours, a policy that refuses, none at all, an image that is not lazy.
    let gone = scene.at("gone");
    fs::rename(&blobs[2], &gone).unwrap();
    scene.fails(&config, &layout, "cache-gone", &["tree"], 5, &["blob"]);
    fs::rename(&gone, &blobs[2]).unwrap();
    let trust = "[trust]\ninsecure_policy = true\n";
    scene.fails(trust, &layout, "cache", &["tree"], 13, &["the lazy image's key"]);
    let policy = scene.at("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"reject"}]}"#).unwrap();
    scene.fails(&format!("[trust]\npolicy = '{}'", policy.display()), &layout, "cache", &["tree"], 13, &["reject"]);
    scene.fails("", &layout, "cache", &["tree"], 22, &["there is no trust policy"]);
    let plain = format!("oci:{}:v1", scene.at("layout").display());
    let open = format!("{trust}[trust.admission]\nplain_unsigned = true\n");
    scene.fails(&open, &plain, "cache", &["tree"], 22, &["has no index beside it"]);
    scene.fails(&config, "docker://127.0.0.1:1/x:y", "cache", &["tree"], 5, &["127.0.0.1:1"]);
}

#[test]
fn the_example_of_the_guide_prints_a_file() {
    let Some(scene) = Scene::set() else { return };
    let page = fs::read_to_string(source_dir().join("../../docs/guide/library.md")).unwrap();
    let (_, code) = page.split_once("```c\n").unwrap();
    let (code, program) = (scene.at("example.c"), (scene.at("example"), code.split("```").next().unwrap()));
    fs::write(&code, program.1).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-I"]).arg(source_dir().join("include")).arg(&code);
    run(compile.arg("-L").arg(library()).args(["-lnacre", "-o"]).arg(&program.0));
    let mut example = Command::new(&program.0);
    example.arg(scene.at("store")).args([&scene.config(), &scene.layout(), "/to-etc/passwd"]);
    assert_eq!(run(example.env("LD_LIBRARY_PATH", library()).env("HOME", scene.dir.path())).stdout, b"root:x:0:0");
}

#[test]
fn the_header_names_what_the_library_exports() {
    let Some(nm) = require("nm") else { return };
    let header = fs::read_to_string(source_dir().join("include/nacre.h")).unwrap();
    // What stands before a parenthesis in what is no comment.
    let text: String = header.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect();
    let named: BTreeSet<&str> = (text.split('(').filter_map(|before| before.rsplit([' ', '*', '\n']).next()))
        .filter(|name| name.starts_with("nacre_"))
        .collect();
    let exported = run(Command::new(nm).args(["-D", "--defined-only"]).arg(library().join("libnacre.so")));
    let exported = String::from_utf8(exported.stdout).unwrap();
    let exported: BTreeSet<&str> = exported.lines().filter_map(|line| line.split(' ').next_back()).collect();
    assert_eq!(named, exported);
    assert!(named.len() > 20, "{named:?}");
}

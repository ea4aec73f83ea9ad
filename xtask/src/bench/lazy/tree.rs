//! What is mounted: a tree of this machine's /usr with a Python and a Node.js application in it, the same each time, and later versions of it. As
//! directories, as tars, and as an OCI layout with the tags [`FIRST`], [`UPDATE`] and [`SECOND`]. Made once, kept below target/bench.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    hash::{DefaultHasher, Hasher as _},
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::super::image::{add_blob, add_manifest, choose, sha256};
use crate::run::{find, output, run};

pub(super) const FIRST: &str = "first";
/// What a point update of the distribution makes of it.
pub(super) const UPDATE: &str = "update";
/// One in which files changed at random.
pub(super) const SECOND: &str = "second";
/// Their layers: most of the tree, and the applications.
const LAYERS: &[&str] = &["usr", "app"];

pub(super) struct Trees {
    pub(super) place: PathBuf,
    pub(super) layout: PathBuf,
}

/// An application that answers one request and ends.
pub(super) struct App {
    pub(super) name: &'static str,
    pub(super) command: &'static [&'static str],
}

pub(super) const PYTHON: App = App { name: "Python", command: &["/usr/bin/python3", "-B", "/app/answer.py"] };
pub(super) const NODE: App = App { name: "Node.js", command: &["/usr/bin/node", "/app/answer.js"] };

const PYTHON_APP: &str = r#"import asyncio, concurrent.futures, decimal, email.message, http.server, json, logging, socket, sqlite3, ssl
import subprocess, tempfile, threading, urllib.request, uuid, xml.etree.ElementTree

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with sqlite3.connect(":memory:") as db:
            version = db.execute("select sqlite_version()").fetchone()[0]
        body = json.dumps({"sqlite": version, "tls": ssl.OPENSSL_VERSION}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

ours, theirs = socket.socketpair()
ours.sendall(b"GET / HTTP/1.0\r\n\r\n")
Handler(theirs, ("", 0), None)
theirs.close()
answer = ours.makefile("rb").read()
assert b"sqlite" in answer, answer
print("answered")
"#;

const NODE_APP: &str = r#"const http = require("http");
require("crypto"); require("zlib"); require("url"); require("tls"); require("assert"); require("worker_threads");
const socket = "/tmp/answer.sock";
const server = http.createServer((request, response) => response.end(JSON.stringify(process.versions)));
server.listen(socket, () => http.get({ socketPath: socket, path: "/" }, (response) => {
    response.resume();
    response.on("end", () => { console.log("answered"); server.close(); process.exit(0); });
}));
"#;

impl Trees {
    /// The directory of a version.
    pub(super) fn tree(&self, version: &str) -> PathBuf {
        self.place.join(version)
    }

    /// The uncompressed tar of one of its layers.
    pub(super) fn tar(&self, version: &str, layer: &str) -> PathBuf {
        self.place.join(format!("{version}-{layer}.tar"))
    }

    pub(super) fn reference(&self, version: &str) -> String {
        format!("oci:{}:{version}", self.layout.display())
    }
}

/// Makes what is missing.
pub(super) fn prepare(cache: &Path, megabytes: u64) -> Result<Trees> {
    let place = cache.join(format!("lazy-{megabytes}"));
    let trees = Trees { layout: place.join("layout"), place };
    let mark = trees.place.join("complete-2");
    if mark.exists() {
        return Ok(trees);
    }
    if trees.place.exists() {
        fs::remove_dir_all(&trees.place)?;
    }
    fs::create_dir_all(trees.layout.join("blobs/sha256"))?;
    fs::write(trees.layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    fs::write(trees.layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#)?;
    eprintln!("making the tree");
    first(&trees.tree(FIRST), megabytes)?;
    update(&trees.tree(FIRST), &trees.tree(UPDATE))?;
    second(&trees.tree(FIRST), &trees.tree(SECOND))?;
    for version in [FIRST, UPDATE, SECOND] {
        eprintln!("making the image of the {version} version");
        make(&trees, version)?;
    }
    fs::write(mark, "")?;
    Ok(trees)
}

fn first(tree: &Path, megabytes: u64) -> Result<()> {
    fs::create_dir_all(tree)?;
    let mut paths: BTreeSet<PathBuf> = choose(megabytes)?.into_iter().map(|entry| entry.path).collect();
    let stdlib =
        output(Command::new("/usr/bin/python3").args(["-c", "import os; print(os.path.dirname(os.__file__))"]))?;
    let stdlib = PathBuf::from(stdlib.trim());
    let (mut pending, mut programs) = (vec![stdlib], vec![PathBuf::from("/usr/bin/python3"), "/usr/bin/node".into()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                pending.push(path);
            } else {
                if path.extension().is_some_and(|extension| extension == "so") {
                    programs.push(path.clone());
                }
                paths.insert(path);
            }
        }
    }
    for program in programs {
        ensure!(program.exists(), "{} is not there (apt-get install python3 nodejs)", program.display());
        let libraries = output(Command::new("ldd").arg(&program)).unwrap_or_default();
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        for path in libraries.chain([program]) {
            // Each name on the way to the file, in /usr.
            let mut path = path;
            loop {
                let parent = fs::canonicalize(path.parent().context("a file")?)?;
                path = parent.join(path.file_name().context("a file")?);
                paths.insert(path.clone());
                match fs::read_link(&path) {
                    Ok(target) => path = parent.join(target),
                    Err(_) => break,
                }
            }
        }
    }
    let mut tar = Command::new("tar");
    tar.args(["-C", "/", "-c", "--null", "--no-recursion", "-T", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut tar = tar.spawn()?;
    let mut names = tar.stdin.take().context("tar's input")?;
    let unpacked =
        Command::new("tar").arg("-C").arg(tree).arg("-x").stdin(tar.stdout.take().context("tar's output")?).spawn()?;
    for path in &paths {
        names.write_all(path.strip_prefix("/")?.as_os_str().as_encoded_bytes())?;
        names.write_all(b"\0")?;
    }
    drop(names);
    for mut child in [tar, unpacked] {
        ensure!(child.wait()?.success(), "tar failed");
    }
    for (name, target) in [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        symlink(target, tree.join(name))?;
    }
    // The loader's own name, where it is one.
    for loader in ["/usr/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"] {
        if Path::new(loader).exists() {
            let to = tree.join(loader.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a directory")?)?;
            if fs::symlink_metadata(&to).is_err() {
                fs::copy(fs::canonicalize(loader)?, to)?;
            }
        }
    }
    for directory in ["app", "tmp", "proc", "sys", "dev", "etc"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    fs::write(tree.join("app/answer.py"), PYTHON_APP)?;
    fs::write(tree.join("app/answer.js"), NODE_APP)?;
    Ok(())
}

/// As a point update does it: of one package in twenty each program and library is built anew, its changelogs are longer, and one in ten of its other
/// files is changed. What belongs to no package stays. Where there are no packages of dpkg's, one directory in twenty is taken for one.
fn update(from: &Path, to: &Path) -> Result<()> {
    copy(from, to)?;
    for (name, files) in packages(to)? {
        if pick(&name, 20) != 0 {
            continue;
        }
        for path in files {
            let program = fs::read(to.join(&path))?.starts_with(b"\x7fELF");
            let changelog = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("changelog"));
            if program || changelog || pick(&path, 10) == 0 {
                change(&to.join(&path), &to.join(&path))?;
            }
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").arg("-a").arg("--reflink=auto").arg(from).arg(to)).map(drop)
}

/// One of so many, always the same for the same name.
fn pick(name: &impl std::hash::Hash, many: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish() % many
}

/// Packages, and the files of a tree that they have, by their paths in it.
fn packages(tree: &Path) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>> {
    let mut packages = BTreeMap::<PathBuf, Vec<PathBuf>>::new();
    let is_file = |path: &Path| fs::symlink_metadata(tree.join(path)).is_ok_and(|file| file.is_file());
    for list in fs::read_dir("/var/lib/dpkg/info").into_iter().flatten().flatten() {
        if list.path().extension().is_none_or(|extension| extension != "list") {
            continue;
        }
        let text = fs::read_to_string(list.path())?;
        // Names may be those of before /lib and /bin were links into /usr.
        let paths = text.lines().map(|line| line.trim_start_matches('/'));
        let paths = paths.map(|path| if path.starts_with("usr/") { path.into() } else { Path::new("usr").join(path) });
        packages.insert(list.file_name().into(), paths.filter(|path| is_file(path)).collect());
    }
    if packages.is_empty() {
        let mut pending = vec![tree.join("usr")];
        while let Some(directory) = pending.pop() {
            let name = directory.strip_prefix(tree)?.to_owned();
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                match entry.file_type()? {
                    kind if kind.is_dir() => pending.push(entry.path()),
                    kind if kind.is_file() => {
                        packages.entry(name.clone()).or_default().push(name.join(entry.file_name()));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(packages)
}

/// Of a hundred files five are changed, one is gone, and one is new, wherever they are.
fn second(from: &Path, to: &Path) -> Result<()> {
    copy(from, to)?;
    let mut pending = vec![to.join("usr")];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (path, metadata) = (entry.path(), entry.metadata()?);
            if metadata.is_dir() {
                pending.push(path);
                continue;
            }
            if !metadata.is_file() || metadata.len() == 0 {
                continue;
            }
            match pick(&path.strip_prefix(to)?, 100) {
                0..5 => change(&path, &path)?,
                5 => fs::remove_file(path)?,
                6 => change(&path, &path.with_file_name(format!("{}.new", entry.file_name().display())))?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// A third of the way in, something is added, and a byte is another at two thirds.
fn change(from: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(from)?;
    if let Some(byte) = bytes.len().checked_mul(2).and_then(|twice| bytes.get_mut(twice / 3)) {
        *byte ^= 0x55;
    }
    let at = bytes.len() / 3;
    bytes.splice(at..at, *b"added by the second version");
    Ok(fs::write(to, bytes)?)
}

fn make(trees: &Trees, version: &str) -> Result<()> {
    let tree = trees.tree(version);
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in LAYERS {
        let tar = trees.tar(version, layer);
        let mut command = Command::new("tar");
        command.arg("-C").arg(&tree).args(["--sort=name", "--format=pax", "--numeric-owner"]);
        command.args(["--pax-option=delete=atime,delete=ctime", "-cf"]).arg(&tar);
        if *layer == "app" {
            command.args(["app", "bin", "dev", "etc", "lib", "lib64", "proc", "sys", "tmp"]);
        } else {
            command.arg("usr");
        }
        run(&mut command)?;
        diff_ids.push(format!("sha256:{}", sha256(&tar)?));
        let stored = tar.with_extension("tar.gz");
        let program = if find("pigz").is_some() { "pigz" } else { "gzip" };
        let mut compress = Command::new(program);
        run(compress.args(["-6", "-n", "-c"]).stdin(File::open(&tar)?).stdout(File::create(&stored)?))?;
        let blob = trees.place.join("blob");
        fs::copy(&stored, &blob)?;
        descriptors.push(add_blob(&trees.layout, &blob, "application/vnd.oci.image.layer.v1.tar+gzip")?);
    }
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Env": ["PATH=/usr/bin"], "Cmd": PYTHON.command },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    add_manifest(&trees.layout, version, &config, &descriptors, &trees.place)
}

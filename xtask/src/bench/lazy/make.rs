//! Making lazy images and indexes: how fast, and how large.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    Bench, Part,
    served::{daemon, peak},
    tree::{FIRST, SECOND, UPDATE},
};
use crate::{
    bench::{
        Case,
        image::{add_blob, add_manifest, sha256},
        median,
    },
    run::{output, run},
};

/// Where an image of ours is at the registry.
pub(super) fn reference(bench: &Bench, version: &str) -> String {
    format!("docker://{}/bench:{version}", bench.registry.host)
}

/// A name as [`reference`] gives it, at another host.
pub(super) fn at(host: &str, tag: &str) -> String {
    format!("docker://{host}/bench:{tag}")
}

fn number(value: &Value, name: &str) -> Result<f64> {
    value.get(name).and_then(Value::as_f64).with_context(|| format!("{name} is missing: {value}"))
}

/// Makes a lazy image, encrypted, in the bench's domain; gives the seconds, and what the program reports.
fn make(bench: &Bench, from: &str, to: &str, dedup: &[String]) -> Result<(f64, Value)> {
    let ours = &bench.ours;
    let domain = ours.place.join("domain");
    if !domain.exists() {
        fs::write(&domain, [7; 32])?;
    }
    let public = ours.place.join("public.pem");
    if !public.exists() {
        let mut openssl = Command::new("openssl");
        openssl.args(["rsa", "-pubout", "-in"]).arg(&ours.private_key).arg("-out").arg(&public);
        run(openssl.stderr(Stdio::null()))?;
    }
    let mut command = ours.command(&ours.place.join("copy"));
    command.args(["image", "copy", "--lazy", "--quiet", "--json", "--insecure-registry"]);
    command.arg("--encrypt").arg(format!("jwe:{}", public.display())).arg("--domain-key-file").arg(&domain);
    command.arg("--decryption-key").arg(&ours.private_key);
    for image in dedup {
        command.arg("--dedup-from").arg(image);
    }
    let start = Instant::now();
    let text = output(command.arg(from).arg(to))?;
    let seconds = start.elapsed().as_secs_f64();
    let value: Value = serde_json::from_str(&text).context("image copy --json")?;
    let report = value.pointer("/lazy/0").cloned().with_context(|| format!("no report of a lazy image: {text}"))?;
    Ok((seconds, report))
}

/// Bytes that an image adds to a registry.
fn added(report: &Value) -> Result<f64> {
    Ok(number(report, "new_bytes")? + number(report, "metadata_bytes")? + number(report, "table_bytes")?)
}

/// Makes what the other parts use, too.
pub(super) fn cases(bench: &Bench) -> Result<Vec<Case>> {
    let trees = &bench.trees;
    if !bench.options.has(Part::Make) {
        make(bench, &trees.reference(FIRST), &reference(bench, FIRST), &[])?;
        return Ok(Vec::new());
    }
    let (mut seconds, mut peer_seconds) = (Vec::new(), Vec::new());
    let (mut first, mut peer_first) = (Value::Null, None);
    for round in 1..=bench.options.rounds {
        eprintln!("making, round {round}");
        // From the layers as tars, as nydus-image has the tree as files: nobody inflates.
        let to = format!("oci:{}:{FIRST}", bench.ours.place.join(format!("made-{round}")).display());
        let (took, report) = make(bench, &uncompressed(bench)?, &to, &[])?;
        (first, _) = (report, seconds.push(took));
        if let Some(nydus) = &bench.nydus {
            let (took, bytes) = nydus.build(FIRST, &trees.tree(FIRST), None)?;
            (peer_first, _) = (Some(bytes as f64), peer_seconds.push(took));
        }
    }
    make(bench, &trees.reference(FIRST), &reference(bench, FIRST), &[])?;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let list = |value: Option<f64>| value.map(mib).into_iter().collect::<Vec<_>>();
    let size = Case::compare_sizes("size", &[mib(number(&first, "new_bytes")?)], &list(peer_first), 1.05);
    let mut more = Vec::new();
    for (version, name) in [(UPDATE, "what a point update adds"), (SECOND, "what changes at random add")] {
        let from = [reference(bench, FIRST)];
        let (_, report) = make(bench, &trees.reference(version), &reference(bench, version), &from)?;
        let nydus = bench.nydus.as_ref();
        let peer = nydus.map(|nydus| nydus.build(version, &trees.tree(version), Some(FIRST))).transpose()?;
        let peer = list(peer.map(|(_, bytes)| bytes as f64));
        more.push(Case::compare_sizes(name, &[mib(added(&report)?)], &peer, 0.5));
    }
    let mut cases = vec![Case::against("build, encrypted, vs nydus-image", &seconds, &peer_seconds, 1.0), size];
    cases.extend(more);
    cases.extend(index(bench)?);
    Ok(cases)
}

/// The first version with its layers as plain tars.
fn uncompressed(bench: &Bench) -> Result<String> {
    let layout = bench.ours.place.join("plain");
    if !layout.exists() {
        new_layout(&layout)?;
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in ["usr", "app"] {
            let tar = bench.trees.tar(FIRST, layer);
            diff_ids.push(format!("sha256:{}", sha256(&tar)?));
            let blob = layout.join("blob");
            fs::copy(&tar, &blob)?;
            layers.push(add_blob(&layout, &blob, "application/vnd.oci.image.layer.v1.tar")?);
        }
        add_manifest(&layout, FIRST, &config(&diff_ids), &layers, &layout)?;
    }
    Ok(format!("oci:{}:{FIRST}", layout.display()))
}

fn config(diff_ids: &[String]) -> Value {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

fn new_layout(layout: &Path) -> Result<()> {
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(fs::write(layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#)?)
}

/// The index of an unmodified image, against one gunzip of its layers.
fn index(bench: &Bench) -> Result<Vec<Case>> {
    let (ours, trees) = (&bench.ours, &bench.trees);
    let (mut seconds, mut gunzip, mut percentage) = (Vec::new(), Vec::new(), 0.0);
    let copy = ours.place.join("indexed");
    run(Command::new("cp").arg("-a").arg(&trees.layout).arg(&copy))?;
    for round in 1..=bench.options.rounds {
        eprintln!("indexing, round {round}");
        let mut command = ours.command(&ours.place.join("index"));
        let image = format!("oci:{}:{FIRST}", copy.display());
        let start = Instant::now();
        let text = output(command.args(["image", "index", "--quiet", "--json"]).arg(image))?;
        seconds.push(start.elapsed().as_secs_f64());
        let report: Value = serde_json::from_str(&text).context("image index --json")?;
        percentage = number(&report, "percentage")?;
        let start = Instant::now();
        for layer in ["usr", "app"] {
            let stored = File::open(trees.tar(FIRST, layer).with_extension("tar.gz"))?;
            run(Command::new("gzip").arg("-dc").stdin(stored).stdout(Stdio::null()))?;
        }
        gunzip.push(start.elapsed().as_secs_f64());
    }
    Ok(vec![
        Case::against("index of a gzip image vs one gunzip", &seconds, &gunzip, 1.0),
        Case::bounded("size of the index", Some(percentage), "%", 1.0),
    ])
}

/// An image of a million files: its metadata is all that is read of it.
pub(super) fn million(bench: &Bench) -> Result<Vec<Case>> {
    let ours = &bench.ours;
    let tar = bench.trees.place.join("million.tar");
    if !tar.exists() {
        eprintln!("making a tar of a million files");
        write_million(&tar.with_extension("new"))?;
        fs::rename(tar.with_extension("new"), &tar)?;
    }
    eprintln!("making an image of a million files");
    let layout = ours.place.join("million");
    new_layout(&layout)?;
    let diff_id = format!("sha256:{}", sha256(&tar)?);
    let blob = layout.join("blob");
    fs::copy(&tar, &blob)?;
    let layer = add_blob(&layout, &blob, "application/vnd.oci.image.layer.v1.tar")?;
    add_manifest(&layout, "million", &config(&[diff_id]), &[layer], &layout)?;
    make(bench, &format!("oci:{}:million", layout.display()), &reference(bench, "million"), &[])?;
    let root = ours.place.join("million-store");
    let target = ours.place.join("mnt-million");
    let mut seconds = Vec::new();
    let mut memory: f64 = 0.0;
    for _ in 0..bench.options.rounds {
        seconds.push(ours.mount(&root, &reference(bench, "million"), &target, &[])?);
        memory = memory.max(peak(daemon(&root)?)?);
        ours.umount(&root, &target)?;
    }
    Ok(vec![
        Case::bounded("mount of a million files", median(seconds), "s", 1.0),
        Case::bounded("memory of the daemon, a million files", Some(memory), "MiB", 64.0),
    ])
}

/// A thousand directories with a thousand files of a line each (POSIX ustar).
fn write_million(path: &PathBuf) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    for directory in 0..1000 {
        let name = format!("directory-{directory:03}/");
        out.write_all(&header(&name, 0, b'5'))?;
        for file in 0..1000 {
            let mut block = [0; 512];
            let line = format!("file {file} of directory {directory}\n");
            block[..line.len()].copy_from_slice(line.as_bytes());
            out.write_all(&header(&format!("{name}a-file-of-some-name-{file:03}.txt"), line.len(), b'0'))?;
            out.write_all(&block)?;
        }
    }
    out.write_all(&[0; 1024])?;
    Ok(out.into_inner().context("the tar")?.sync_all()?)
}

fn header(name: &str, size: usize, kind: u8) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "14000000000");
    put(148, "        ");
    put(257, "ustar\x0000");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
    header[154] = 0;
    header
}

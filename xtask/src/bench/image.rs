//! The image that is pulled: files of this machine's /usr, the same ones in each run, in several layers, as OCI layouts with gzip,
//! with zstd, in many layers, and encrypted. Made once, kept below target/bench.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::run::{find, output, run};

/// Files for each MB: 52,000 in 800 MB.
const FILES_PER_MB: u64 = 65;
/// How the bytes are shared out to the layers, in percent: as in most images, one is much larger than the others.
const SHARES: &[u64] = &[40, 20, 15, 10, 10, 5];

/// The forms of the image. Each is a tag of the layout, and of the repository `bench`.
pub(crate) const GZIP: &str = "gzip";
pub(crate) const ZSTD: &str = "zstd";
pub(crate) const ENCRYPTED: &str = "encrypted";
pub(crate) const MANY: &str = "layers64";

pub(crate) struct Images {
    pub(crate) layout: PathBuf,
    pub(crate) private_key: PathBuf,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// Makes what is missing.
pub(crate) fn prepare(cache: &Path, megabytes: u64) -> Result<Images> {
    let directory = cache.join(format!("image-{megabytes}"));
    let layout = directory.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let chosen = choose(megabytes)?;
    let images = Images {
        private_key: directory.join("key.pem"),
        files: chosen.len() as u64,
        bytes: chosen.iter().map(|entry| entry.size).sum(),
        layout,
    };
    eprintln!("image: {} files, {} MB of /usr", images.files, images.bytes / 1_000_000);
    let mark = directory.join("complete");
    let stamp = format!("{} {}", images.files, images.bytes);
    if fs::read_to_string(&mark).is_ok_and(|before| before == stamp) {
        return Ok(images);
    }
    fs::write(images.layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    fs::write(images.layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#)?;
    let few = split(&chosen, SHARES);
    let many = split(&chosen, &[1; 64]);
    let gzip: &[&str] = if find("pigz").is_some() { &["pigz", "-6", "-n"] } else { &["gzip", "-6", "-n"] };
    let zstd: &[&str] = &["zstd", "-3", "-T0", "-q", "-c"];
    for (tag, layers, kind, compressor) in
        [(GZIP, &few, "gzip", gzip), (ZSTD, &few, "zstd", zstd), (MANY, &many, "gzip", gzip)]
    {
        eprintln!("making {tag}");
        make(&images.layout, tag, layers, kind, compressor, &directory)?;
    }
    encrypt(&images, &directory)?;
    fs::write(mark, stamp)?;
    Ok(images)
}

pub(super) struct Entry {
    pub(super) path: PathBuf,
    size: u64,
}

/// Files in an order that only their names decide, as many as give the size and the mean size that are asked for; then by name.
pub(super) fn choose(megabytes: u64) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    let mut pending = vec![PathBuf::from("/usr")];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (path, metadata) = (entry.path(), entry.metadata()?);
            if metadata.is_dir() {
                if !matches!(path.to_str(), Some("/usr/local" | "/usr/src")) {
                    pending.push(path);
                }
            } else if metadata.is_file() || metadata.is_symlink() {
                let mut hasher = DefaultHasher::new();
                path.hash(&mut hasher);
                let size = if metadata.is_file() { metadata.size() } else { 0 };
                all.push((hasher.finish(), Entry { path, size }));
            }
        }
    }
    all.sort_by(|a, b| (a.0, &a.1.path).cmp(&(b.0, &b.1.path)));
    let (wanted, mean) = (megabytes * 1_000_000, 1_000_000 / FILES_PER_MB);
    let (mut bytes, mut chosen) = (0, Vec::new());
    for (_, entry) in all {
        let count = chosen.len() as u64 + 1;
        if bytes >= wanted && count > megabytes * FILES_PER_MB {
            break;
        }
        if bytes + entry.size <= wanted.min(mean * (count + 2000)) + mean {
            bytes += entry.size;
            chosen.push(entry);
        }
    }
    if bytes < wanted * 9 / 10 || (chosen.len() as u64) < megabytes * FILES_PER_MB * 9 / 10 {
        eprintln!("/usr gives only {} files with {} MB", chosen.len(), bytes / 1_000_000);
    }
    chosen.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(chosen)
}

/// Consecutive runs of entries with these shares of the bytes and files.
fn split<'a>(entries: &'a [Entry], shares: &[u64]) -> Vec<&'a [Entry]> {
    // A file costs about what 8 KiB cost.
    let weight = |entry: &Entry| entry.size + 8192;
    let total: u64 = entries.iter().map(weight).sum();
    let sum: u64 = shares.iter().sum();
    let (mut rest, mut layers, mut taken, mut due) = (entries, Vec::new(), 0, 0);
    for share in shares {
        due += share;
        let end = total * due / sum;
        let count = rest.iter().take_while(|entry| {
            let fits = taken < end;
            taken += if fits { weight(entry) } else { 0 };
            fits
        });
        let (layer, others) = rest.split_at(count.count());
        layers.push(layer);
        rest = others;
    }
    layers
}

/// Writes the layers and the manifest of one form into the layout.
fn make(layout: &Path, tag: &str, layers: &[&[Entry]], kind: &str, compressor: &[&str], work: &Path) -> Result<()> {
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in layers {
        let tar = work.join("layer.tar");
        archive(layer, &work.join("names"), &tar)?;
        diff_ids.push(format!("sha256:{}", sha256(&tar)?));
        let stored = work.join("layer.stored");
        let (program, arguments) = compressor.split_first().context("no compressor")?;
        run(Command::new(program).args(arguments).stdin(File::open(&tar)?).stdout(File::create(&stored)?))?;
        let media_type = format!("application/vnd.oci.image.layer.v1.tar+{kind}");
        descriptors.push(add_blob(layout, &stored, &media_type)?);
        fs::remove_file(tar)?;
    }
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    add_manifest(layout, tag, &config, &descriptors, work)
}

/// Adds a config and a manifest with a tag to a layout.
pub(super) fn add_manifest(layout: &Path, tag: &str, config: &Value, layers: &[Value], work: &Path) -> Result<()> {
    let store = |value: &Value, media_type: &str| {
        let path = work.join("json");
        fs::write(&path, value.to_string())?;
        add_blob(layout, &path, media_type)
    };
    let config = store(config, "application/vnd.oci.image.config.v1+json")?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let mut descriptor = store(&manifest, media_type)?;
    if let Some(object) = descriptor.as_object_mut() {
        object.insert("annotations".into(), json!({ "org.opencontainers.image.ref.name": tag }));
    }
    let index = layout.join("index.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&index)?)?;
    value
        .pointer_mut("/manifests")
        .and_then(Value::as_array_mut)
        .context("index.json has no manifests")?
        .push(descriptor);
    fs::write(index, value.to_string())?;
    Ok(())
}

fn archive(layer: &[Entry], names: &Path, tar: &Path) -> Result<()> {
    let mut paths = BTreeSet::new();
    for entry in layer {
        paths.extend(entry.path.ancestors().skip(1).filter(|path| path.parent().is_some()));
        paths.insert(&entry.path);
    }
    let list: Vec<u8> = paths
        .iter()
        .filter_map(|path| path.strip_prefix("/").ok())
        .flat_map(|path| [path.as_os_str().as_bytes(), b"\0"].concat())
        .collect();
    fs::write(names, list)?;
    let format =
        ["--format=pax", "--pax-option=delete=atime,delete=ctime", "--numeric-owner", "--no-recursion", "--null"];
    run(Command::new("tar")
        .args(["-C", "/", "-c"])
        .args(format)
        .arg("-T")
        .arg(names)
        .arg("-f")
        .arg(tar)
        .stderr(Stdio::inherit()))
}

pub(super) fn sha256(path: &Path) -> Result<String> {
    let text = output(Command::new("sha256sum").arg(path))?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

pub(super) fn add_blob(layout: &Path, path: &Path, media_type: &str) -> Result<Value> {
    let digest = sha256(path)?;
    let size = fs::metadata(path)?.len();
    fs::rename(path, layout.join("blobs/sha256").join(&digest))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size }))
}

/// The gzip form, encrypted by skopeo for an RSA key.
fn encrypt(images: &Images, directory: &Path) -> Result<()> {
    eprintln!("making {ENCRYPTED}");
    let public = directory.join("public.pem");
    let mut openssl = Command::new("openssl");
    run(openssl.args(["genrsa", "-out"]).arg(&images.private_key).arg("3072").stderr(Stdio::null()))?;
    run(Command::new("openssl")
        .args(["rsa", "-pubout", "-in"])
        .arg(&images.private_key)
        .arg("-out")
        .arg(&public)
        .stderr(Stdio::null()))?;
    let place = |tag: &str| format!("oci:{}:{tag}", images.layout.display());
    let key = format!("jwe:{}", public.display());
    run(skopeo()?.args(["copy", "-q", "--encryption-key", &key, &place(GZIP), &place(ENCRYPTED)]))
}

fn skopeo() -> Result<Command> {
    let Some(path) = find("skopeo") else { bail!("skopeo is not installed (apt-get install skopeo)") };
    let mut command = Command::new(path);
    command.arg("--insecure-policy");
    Ok(command)
}

/// Puts all forms into a registry. What is there already is not sent again.
pub(crate) fn push(images: &Images, host: &str) -> Result<()> {
    for tag in [GZIP, ZSTD, MANY, ENCRYPTED] {
        let source = format!("oci:{}:{tag}", images.layout.display());
        let target = format!("docker://{host}/bench:{tag}");
        run(skopeo()?.args(["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &target]))?;
    }
    ensure!(images.files > 0, "the image is empty");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_have_their_shares_and_lose_nothing() {
        let entries: Vec<Entry> = (0..1000).map(|n| Entry { path: format!("/{n:04}").into(), size: 10_000 }).collect();
        let layers = split(&entries, SHARES);
        assert_eq!(layers.iter().map(|layer| layer.len()).sum::<usize>(), 1000);
        assert_eq!(layers.len(), SHARES.len());
        assert!((395..=405).contains(&layers[0].len()), "{}", layers[0].len());
        let many = split(&entries, &[2; 64]);
        assert!(many.len() == 64 && many.iter().all(|layer| layer.len() >= 4));
    }
}

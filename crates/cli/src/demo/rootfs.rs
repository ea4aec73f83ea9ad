//! The demo's image: this very program and the shared libraries that it runs with, so that nothing has to be fetched.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nacre_core::Digest;
use nacre_oci::manifest::{Descriptor, ImageConfig, Manifest, Platform, ProcessConfig, RootFs, media};

/// What the image's top layer says; only the holder of the layer's key can read it.
pub(super) const MESSAGE: &str = "Only an attested guest can read this line.";
/// Where it says so.
pub(super) const MESSAGE_FILE: &str = "/data/message";

/// Writes the image as an OCI layout into `dir`, under the name `app`.
pub(super) fn write_layout(dir: &Path) -> anyhow::Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let (program, arguments) = program_layer()?;
    let (base, base_diff) = put_layer(&blobs, &program, Compressed::Zstd)?;
    let (top, top_diff) = put_layer(&blobs, &message_layer()?, Compressed::Gzip)?;
    let platform = Platform::host();
    let config = ImageConfig {
        architecture: platform.architecture,
        os: platform.os,
        config: ProcessConfig {
            entrypoint: arguments,
            env: vec!["PATH=/bin".into(), "NACRE_DEMO=image".into()],
            working_dir: "/data".into(),
            ..ProcessConfig::default()
        },
        rootfs: RootFs { kind: "layers".into(), diff_ids: vec![base_diff, top_diff] },
        created: None,
    };
    let config = put(&blobs, media::OCI_CONFIG, &serde_json::to_vec(&config)?)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: None,
        config,
        layers: vec![base, top],
        subject: None,
        annotations: BTreeMap::new(),
    };
    let mut manifest = put(&blobs, media::OCI_MANIFEST, &serde_json::to_vec(&manifest)?)?;
    manifest.annotations.insert("org.opencontainers.image.ref.name".into(), "app".into());
    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [manifest] });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

#[derive(Clone, Copy)]
enum Compressed {
    Gzip,
    Zstd,
}

fn put(blobs: &Path, media_type: &str, bytes: &[u8]) -> io::Result<Descriptor> {
    let descriptor = Descriptor::of(media_type, bytes);
    fs::write(blobs.join(descriptor.digest.hex()), bytes)?;
    Ok(descriptor)
}

fn put_layer(blobs: &Path, tar: &[u8], how: Compressed) -> anyhow::Result<(Descriptor, Digest)> {
    let (suffix, blob) = match how {
        Compressed::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(tar)?;
            ("+gzip", encoder.finish()?)
        }
        Compressed::Zstd => ("+zstd", zstd::encode_all(tar, 1)?),
    };
    Ok((put(blobs, &format!("{}{suffix}", media::OCI_LAYER), &blob)?, Digest::sha256(tar)))
}

fn message_layer() -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    directory(&mut tar, "data")?;
    file(&mut tar, MESSAGE_FILE.trim_start_matches('/'), 0o600, format!("{MESSAGE}\n").as_bytes())?;
    tar.into_inner()
}

/// The layer with the program, and the command that starts it there.
fn program_layer() -> anyhow::Result<(Vec<u8>, Vec<String>)> {
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["bin", "lib", "etc", "proc", "sys", "dev", "tmp"] {
        directory(&mut tar, name)?;
    }
    file(&mut tar, "etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/nacre\n")?;
    file(&mut tar, "etc/group", 0o644, b"root:x:0:\n")?;
    let program = fs::read("/proc/self/exe").context("/proc/self/exe: read this program")?;
    file(&mut tar, "bin/nacre", 0o755, &program)?;
    let mut loader = None;
    for library in mapped_libraries()? {
        let content = fs::read(&library).with_context(|| format!("{}: read a library", library.display()))?;
        for name in names_of(&library) {
            if name.starts_with("ld-") || name.starts_with("ld.") {
                loader = Some(format!("/lib/{name}"));
            }
            file(&mut tar, &format!("lib/{name}"), 0o755, &content)?;
        }
    }
    // The loader by its path, so that the image needs none of the host's directories.
    let mut arguments = match loader {
        Some(loader) => vec![loader, "--library-path".into(), "/lib".into()],
        None => Vec::new(),
    };
    arguments.extend(["/bin/nacre".into(), "demo-workload".into()]);
    Ok((tar.into_inner()?, arguments))
}

/// The shared libraries that this process has mapped; none in a static program.
fn mapped_libraries() -> anyhow::Result<Vec<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps").context("/proc/self/maps")?;
    let mut libraries: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.splitn(6, ' ').nth(5).map(str::trim))
        .filter(|path| path.starts_with('/') && Path::new(path).file_name().is_some_and(is_library))
        .map(PathBuf::from)
        .collect();
    libraries.sort();
    libraries.dedup();
    Ok(libraries)
}

fn is_library(name: &std::ffi::OsStr) -> bool {
    name.to_string_lossy().contains(".so")
}

/// The file's own name, and those of the links beside it: programs ask for libraries by the latter.
fn names_of(library: &Path) -> Vec<String> {
    let own = library.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = own.split(['-', '.']).next().unwrap_or_default().to_owned();
    let beside = library.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let links = beside
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()))
        .filter(|entry| entry.path().canonicalize().is_ok_and(|target| target == library))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&stem));
    let mut names: Vec<String> = links.collect();
    names.push(own);
    names
}

fn directory(tar: &mut tar::Builder<Vec<u8>>, path: &str) -> io::Result<()> {
    let mut header = header(0o755, 0);
    header.set_entry_type(tar::EntryType::Directory);
    tar.append_data(&mut header, format!("{path}/"), io::empty())
}

fn file(tar: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(mode, content.len() as u64), path, content)
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header.set_mtime(1_700_000_000);
    header
}

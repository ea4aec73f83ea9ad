//! skopeo and umoci read what we write, and we read what they write, to the byte.

use std::{path::Path, process::Command};

use nacre_oci::manifest::Manifest;
use nacre_testkit::{require, run};

use super::{copy_plain, image, manifest, tree};

fn skopeo(arguments: &[&str]) -> Option<Vec<u8>> {
    let skopeo = require("skopeo")?;
    Some(run(Command::new(skopeo).arg("--insecure-policy").args(arguments)).stdout)
}

fn path(scratch: &Path, name: &str) -> String {
    scratch.join(name).display().to_string()
}

#[test]
fn we_read_what_skopeo_writes() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| path(scratch.path(), name);
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let from = format!("oci:{}:v1", at("made"));
    for (number, to) in [
        format!("oci:{}:name", at("layout")),
        format!("oci-archive:{}:name", at("oci.tar")),
        format!("dir:{}", at("dir")),
        format!("docker-archive:{}:team/app:1", at("docker.tar")),
    ]
    .iter()
    .enumerate()
    {
        if skopeo(&["copy", &from, to]).is_none() {
            return;
        }
        // All of it comes out again: our copy of skopeo's is the image that skopeo was given.
        let back = format!("oci:{}:back", at(&format!("back{number}")));
        let copied = copy_plain(to, &back).unwrap();
        if to.starts_with("docker-archive") {
            let found = Manifest::parse(&manifest(to)).unwrap();
            assert_eq!(found.layers.len(), 3);
            assert!(found.layers.iter().zip(&image.layers).all(|(found, made)| found.digest == made.diff_id));
        } else {
            assert_eq!(copied.digest, image.digest, "{to}");
            let mine = tree(&scratch.path().join(format!("back{number}/blobs")));
            assert_eq!(mine, tree(&scratch.path().join("made/blobs")), "{to}");
        }
    }
    // Directories are the same to the byte, whoever writes them.
    copy_plain(&from, &format!("dir:{}", at("ours"))).unwrap();
    assert_eq!(tree(&scratch.path().join("ours")), tree(&scratch.path().join("dir")));
}

#[test]
fn skopeo_and_umoci_read_what_we_write() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| path(scratch.path(), name);
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let from = format!("oci:{}:v1", at("made"));
    for (number, to) in [
        format!("oci:{}:name", at("layout")),
        format!("oci-archive:{}:name", at("oci.tar")),
        format!("dir:{}", at("dir")),
        format!("docker-archive:{}:team/app:1", at("docker.tar")),
    ]
    .iter()
    .enumerate()
    {
        copy_plain(&from, to).unwrap();
        let Some(raw) = skopeo(&["inspect", "--raw", to]) else { return };
        if to.starts_with("docker-archive") {
            let Some(config) = skopeo(&["inspect", "--config", "--raw", to]) else { return };
            assert_eq!(config, image.config);
        } else {
            assert_eq!(raw, image.manifest, "{to}");
        }
        // A copy reads, and skopeo checks, every blob.
        skopeo(&["copy", to, &format!("dir:{}", at(&format!("theirs{number}")))]);
    }
    let theirs = tree(&scratch.path().join("theirs3"));
    for layer in &image.layers {
        assert!(theirs.contains_key(Path::new(&layer.diff_id.hex())), "skopeo has the archive's layers");
    }
    let Some(umoci) = require("umoci") else { return };
    let mut command = Command::new(umoci);
    command.args(["unpack", "--image", &format!("{}:name", at("layout")), &at("bundle")]);
    if !nacre_testkit::root() {
        return;
    }
    run(&mut command);
    assert_eq!(std::fs::read(scratch.path().join("bundle/rootfs/etc/hosts")).unwrap(), b"127.0.0.1 localhost\n");
}

#[test]
fn we_read_what_umoci_makes() {
    let Some(umoci) = require("umoci") else { return };
    if !nacre_testkit::root() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| path(scratch.path(), name);
    let umoci = |arguments: &[&str]| run(Command::new(&umoci).args(arguments));
    let tag = format!("{}:made", at("layout"));
    umoci(&["init", "--layout", &at("layout")]);
    umoci(&["new", "--image", &tag]);
    umoci(&["unpack", "--image", &tag, &at("bundle")]);
    std::fs::write(scratch.path().join("bundle/rootfs/file"), "content").unwrap();
    umoci(&["repack", "--image", &tag, &at("bundle")]);
    let copied = copy_plain(&format!("oci:{tag}"), &format!("oci-archive:{}:copied", at("copy.tar"))).unwrap();
    assert!(!copied.changed);
    assert_eq!(copied.images[0].layers.len(), 1);
}

#[test]
fn archives_that_tar_makes_of_a_layout_are_read() {
    let Some(tar) = require("tar") else { return };
    let scratch = tempfile::tempdir().unwrap();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    for format in ["gnu", "ustar", "pax", "v7", "oldgnu"] {
        let file = path(scratch.path(), &format!("{format}.tar"));
        let format = format!("--format={format}");
        run(Command::new(&tar).args([&format, "-cf", &file, "-C"]).arg(scratch.path().join("made")).arg("."));
        let copied = copy_plain(&format!("oci-archive:{file}:v1"), &format!("dir:{file}.dir")).unwrap();
        assert_eq!(copied.digest, image.digest);
    }
    let file = path(scratch.path(), "compressed.tar");
    run(Command::new(&tar).args(["-czf", &file, "-C"]).arg(scratch.path().join("made")).arg("."));
    let error = copy_plain(&format!("oci-archive:{file}:v1"), &format!("dir:{file}.dir")).unwrap_err().to_string();
    assert!(error.contains("compressed with gzip"), "{error}");
}

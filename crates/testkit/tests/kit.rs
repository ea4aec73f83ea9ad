//! The kit's images and programs, seen by programs that are not ours.

use std::{fs, io::Write as _, process::Command};

use nacre_testkit::{
    Compression, DockerRegistry, DockerRegistryOptions, Entry, Image, Layer, Rng, SmallDisk, Tls, registry::Registry,
    require, run,
};

#[test]
fn gnu_tar_reads_the_archives() {
    let Some(tar) = require("tar") else { return };
    let long = "directory/".repeat(20) + "file";
    let layer = Layer::of([
        Entry::dir("d").mode(0o1777).mtime(1_000_000_000, 0),
        Entry::file("d/f", "content").mode(0o4755).owner(1000, 5_000_000).mtime(1_600_000_000, 5),
        Entry::file(&long, "1"),
        Entry::file(long.replace("file", "gnu"), "22").gnu().owner(4_000_000_000, 7),
        Entry::symlink("s", "d/f"),
        Entry::hard_link("h", "d/f"),
        Entry::char_device("c", 1, 3),
        Entry::block_device("b", 7, 0),
        Entry::fifo("p"),
        Entry::sparse("sparse", 1 << 20, &[(4096, b"piece"), (1 << 19, b"other")]),
        Entry::file("d/x", "").xattr("user.k", b"v\0\n="),
        Entry::file("früh", "é"),
        Entry::whiteout("d/gone"),
        Entry::opaque("d"),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    fs::write(&path, layer.tar()).unwrap();
    let output = run(Command::new(tar)
        .args(["--numeric-owner", "--utc", "--full-time", "--quoting-style=literal", "-tvf"])
        .arg(path));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "drwxrwxrwt 0/0 0 2001-09-09 01:46:40 d",
        "-rwsr-xr-x 1000/5000000 7 2020-09-13 12:26:40.000000005 d/f",
        "lrwxrwxrwx 0/0 0 1970-01-01 00:00:00 s -> d/f",
        "hrw-r--r-- 0/0 0 1970-01-01 00:00:00 h link to d/f",
        "crw-rw-rw- 0/0 1,3 1970-01-01 00:00:00 c",
        "brw-rw---- 0/0 7,0 1970-01-01 00:00:00 b",
        "-rw-r--r-- 0/0 1048576 1970-01-01 00:00:00 sparse",
        "---------- 0/0 0 1970-01-01 00:00:00 d/.wh.gone",
        "---------- 0/0 0 1970-01-01 00:00:00 d/.wh..wh..opq",
        &format!("-rw-r--r-- 0/0 1 1970-01-01 00:00:00 {long}"),
        &format!("-rw-r--r-- 4000000000/7 2 1970-01-01 00:00:00 {}", long.replace("file", "gnu")),
        "-rw-r--r-- 0/0 2 1970-01-01 00:00:00 früh",
    ] {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert!(text.lines().any(|found| words(found) == words(line)), "{line}\nnot in\n{text}");
    }
}

#[test]
fn skopeo_reads_the_layouts_and_what_was_pushed() {
    let Some(skopeo) = require("skopeo") else { return };
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::memory().unwrap();
    let copy = |source: &str, name: &str| {
        let target = format!("dir:{}", dir.path().join(name).display());
        run(Command::new(&skopeo).args(["copy", "--insecure-policy", "--src-tls-verify=false", source, &target]));
    };
    let entries = || [Entry::dir("etc"), Entry::file("etc/motd", "hi\n")];
    let builder = Image::builder().layer(entries()).layer_of(Layer::of(entries()), Compression::Zstd);
    let oci = builder
        .layer_of(Layer::of(entries()), Compression::None)
        .run("Entrypoint", serde_json::json!(["/hello"]))
        .build();
    let docker = Image::builder().layer(entries()).docker().build();
    let layout = dir.path().join("layout");
    oci.write_layout(&layout, "one");
    Image::hello().write_layout(&layout, "two");
    copy(&format!("oci:{}:one", layout.display()), "a");
    copy(&format!("oci:{}:two", layout.display()), "b");
    for (name, image) in [("oci", oci), ("docker", docker)] {
        image.push(&registry, name, "t");
        copy(&format!("docker://{}/{name}:t", registry.host()), name);
        assert_eq!(fs::read(dir.path().join(name).join("manifest.json")).unwrap(), image.manifest);
    }
}

#[test]
fn docker_registry_serves_with_password_and_tls() {
    let (Some(skopeo), Some(tls)) = (require("skopeo"), Tls::new()) else { return };
    let options = DockerRegistryOptions { basic_auth: true, tls: Some(&tls) };
    let Some(registry) = DockerRegistry::start(&options) else { return };
    let dir = tempfile::tempdir().unwrap();
    Image::hello().write_layout(dir.path(), "t");
    let push = |password: &str| {
        let (source, target) =
            (format!("oci:{}:t", dir.path().display()), format!("docker://{}/a/b:t", registry.host()));
        let mut command = Command::new(&skopeo);
        command.args(["copy", "--insecure-policy", &source, &target, "--dest-cert-dir"]).arg(tls.ca_directory());
        command.arg(format!("--dest-creds={}:{password}", DockerRegistry::USER)).output().unwrap()
    };
    let good = push(DockerRegistry::PASSWORD);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    assert!(!push("wrong").status.success());
    assert!(registry.data().join("docker/registry/v2/repositories/a/b").is_dir());
}

#[test]
fn small_disks_are_soon_full() {
    let Some(disk) = SmallDisk::mount(64 << 10) else { return };
    let mut file = fs::File::create(disk.path().join("f")).unwrap();
    let error = file.write_all(&Rng::new(1).bytes(128 << 10)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    drop(file); // an open file keeps a disk writable
    disk.set_read_only(true);
    assert!(fs::File::create(disk.path().join("g")).is_err());
}

#[test]
fn one_seed_gives_one_sequence() {
    assert_eq!(Rng::new(0).next_u64(), 0xe220_a839_7b1d_cdaf);
    assert_eq!(Rng::new(7).bytes(20), Rng::new(7).bytes(20));
    assert!((0..100).all(|_| Rng::new(3).below(5) < 5));
}

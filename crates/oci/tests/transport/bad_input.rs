//! Layouts, archives and directories that are not what they should be are refused, in words that say what is wrong.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use nacre_oci::{
    source::TransportError,
    transport::{TarIndex, parse_saved},
};
use nacre_testkit::{Entry, Image, Layer, Rng};
use serde_json::json;

use super::{copy_plain, image, source};

/// Writes an archive of entries and gives what opening and copying it says.
fn refused(transport: &str, archive: &[u8]) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("bad.tar");
    fs::write(&file, archive).unwrap();
    let to = scratch.path().join("out");
    let error = copy_plain(&format!("{transport}:{}", file.display()), &format!("dir:{}", to.display())).unwrap_err();
    assert!(!to.exists());
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing is left: {error}");
    error.to_string()
}

fn saved(image: &Image, manifest: &serde_json::Value) -> Vec<Entry> {
    let mut entries =
        vec![Entry::file("manifest.json", manifest.to_string()), Entry::file("c.json", image.config.clone())];
    for (number, layer) in image.layers.iter().enumerate() {
        entries.push(Entry::file(format!("{number}.tar"), layer.bytes.clone()));
    }
    entries
}

fn docker(entries: impl IntoIterator<Item = Entry>) -> String {
    refused("docker-archive", Layer::of(entries).tar())
}

#[test]
fn archives_with_tricks_are_refused() {
    let image = Image::hello();
    let good = json!([{ "Config": "c.json", "RepoTags": ["a:1"], "Layers": ["0.tar"] }]);
    let entries = || saved(&image, &good);
    let with = |extra: Entry| entries().into_iter().chain([extra]);
    for (said, archive) in [
        ("leads out of the archive", docker(with(Entry::file("../x", "")))),
        ("leads out of the archive", docker(with(Entry::file("a/../../x", "")))),
        ("absolute name", docker(with(Entry::file("/etc/passwd", "")))),
        ("there twice", docker(with(Entry::file("manifest.json", good.to_string())))),
        ("there twice", docker(with(Entry::file("./manifest.json", good.to_string())))),
        ("there twice", docker(with(Entry::file("0.tar", "other")))),
        ("absolute name", docker(with(Entry::symlink("link", "/etc/passwd")))),
        ("leads out of the archive", docker(with(Entry::symlink("a/link", "../../etc/passwd")))),
        ("leads out of the archive", docker(with(Entry::hard_link("link", "../etc/passwd")))),
        ("which an image archive has not", docker(with(Entry::char_device("tty", 5, 0)))),
        ("which an image archive has not", docker(with(Entry::fifo("pipe")))),
        ("sparse", docker(with(Entry::sparse("holes", 1 << 20, &[(0, b"x")])))),
        ("which are not there", docker(with(Entry::file("big", "x").pax("size", "1099511627776")))),
        ("malformed record", docker(with(Entry::file("big", "x").pax("size", "-1")))),
        ("malformed record", docker(with(Entry::file("nul", "x").pax("path", "a\0b")))),
        ("checksum", {
            let mut archive = Layer::of(entries()).tar().to_vec();
            archive[0] ^= 1;
            refused("docker-archive", &archive)
        }),
        ("not UTF-8", docker(with(Entry::file(b"\xff\xfe".as_slice(), "")))),
    ] {
        assert!(archive.contains(said), "{said}: {archive}");
    }
}

#[test]
fn absurd_numbers_of_entries_and_bytes_of_names_are_refused() {
    let many = (0..100_001).map(|number| Entry::file(number.to_string(), ""));
    assert!(docker(many).contains("more than 100000 entries"));
    let long = (0..5000).map(|number| Entry::file(format!("{number}/{}", "n".repeat(4000)), ""));
    assert!(docker(long).contains("bytes together"));
    assert!(docker([Entry::file("n".repeat(5000), "")]).contains("a name of 5000 bytes"));
    assert!(docker([Entry::file("x", "").pax("comment", "c".repeat(70_000))]).contains("an extended header"));
}

#[test]
fn size_fields_out_of_range_are_refused() {
    fn sized(field: &'static [u8; 12]) -> Entry {
        Entry::file("x", "").header(move |header| {
            header[124..136].copy_from_slice(field);
        })
    }
    for field in [
        b"77777777777\0",
        b"99999999999\0",
        b"-0000000001\0",
        b"0000 0000 0\0",
        b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let said = docker([sized(field)]);
        assert!(said.contains("which are not there") || said.contains("no number"), "{said}");
    }
}

#[test]
fn a_docker_archive_that_contradicts_itself_is_refused() {
    let image = Image::hello();
    let layer = &image.layers[0];
    let good = json!([{ "Config": "c.json", "RepoTags": ["a:1"], "Layers": ["0.tar"] }]);
    let of = |manifest: serde_json::Value| docker(saved(&image, &manifest));
    for (said, error) in [
        ("manifest.json of a docker archive not found", docker([Entry::file("x", "")])),
        ("holds no image", of(json!([]))),
        ("expected", of(json!({ "Config": "c.json" }))),
        ("missing field", of(json!([{ "Layers": [] }]))),
        ("it has 0 layers, the config has 1", of(json!([{ "Config": "c.json", "Layers": null }]))),
        ("it has 2 layers", of(json!([{ "Config": "c.json", "Layers": ["0.tar", "0.tar"] }]))),
        ("'gone.tar' not found", of(json!([{ "Config": "c.json", "Layers": ["gone.tar"] }]))),
        ("leads out", of(json!([{ "Config": "c.json", "Layers": ["../0.tar"] }]))),
        ("leads out", of(json!([{ "Config": "../c.json", "Layers": ["0.tar"] }]))),
        ("absolute", of(json!([{ "Config": "/c.json", "Layers": ["0.tar"] }]))),
        ("config is not valid", of(json!([{ "Config": "0.tar", "Layers": ["0.tar"] }]))),
        ("name one of them", of(json!([good[0], good[0]]))),
        ("at most 4096", of(json!([{ "Config": "c.json", "Layers": vec!["0.tar"; 5000] }]))),
    ] {
        assert!(error.contains(said), "{said}: {error}");
    }
    // A layer whose name claims a digest that it has not.
    let name = format!("blobs/sha256/{}", Digest::sha256(b"other").hex());
    let manifest = json!([{ "Config": "c.json", "Layers": [name] }]);
    let error = docker([
        Entry::file("manifest.json", manifest.to_string()),
        Entry::file("c.json", image.config.clone()),
        Entry::file(&name, layer.bytes.clone()),
    ]);
    assert!(error.contains("digest mismatch"), "{error}");
    // An uncompressed layer that is not the one of the config's diff_id.
    let error = docker([
        Entry::file("manifest.json", good.to_string()),
        Entry::file("c.json", image.config.clone()),
        Entry::file("0.tar", vec![7; 2048]),
    ]);
    assert!(error.contains("digest mismatch"), "{error}");
    // A chain of links without an end.
    let error = docker([
        Entry::file("manifest.json", good.to_string()),
        Entry::file("c.json", image.config.clone()),
        Entry::symlink("0.tar", "1.tar"),
        Entry::symlink("1.tar", "0.tar"),
    ]);
    assert!(error.contains("link at the end of more than"), "{error}");
}

#[test]
fn an_archive_that_was_cut_is_refused_wherever_the_cut_is() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let file = scratch.path().join("whole.tar");
    copy_plain(
        &format!("oci:{}:v1", scratch.path().join("made").display()),
        &format!("oci-archive:{}", file.display()),
    )
    .unwrap();
    let whole = fs::read(&file).unwrap();
    for cut in [0, 1, 511, 512, 513, 1024, 1500, whole.len() / 2, whole.len() - 2000, whole.len() - 1024 - 512] {
        let error = refused("oci-archive", &whole[..cut]);
        assert!(error.contains("bad.tar"), "{cut}: {error}");
    }
}

fn layout(change: impl FnOnce(&Path, &Image)) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let (made, to) = (scratch.path().join("made"), scratch.path().join("out"));
    let image = Image::hello();
    image.write_layout(&made, "v1");
    change(&made, &image);
    let error =
        copy_plain(&format!("oci:{}:v1", made.display()), &format!("oci-archive:{}", to.display())).unwrap_err();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing is left: {error}");
    error.to_string()
}

fn blob(made: &Path, digest: &Digest) -> PathBuf {
    made.join("blobs/sha256").join(digest.hex())
}

#[test]
fn broken_layouts_are_refused() {
    let index = |change: &dyn Fn(&mut serde_json::Value)| {
        layout(|made, _| {
            let path = made.join("index.json");
            let mut index: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&mut index);
            fs::write(path, index.to_string()).unwrap();
        })
    };
    let other = Digest::sha256(b"other").to_string();
    for (said, error) in [
        ("oci-layout of an OCI layout not found", layout(|made, _| fs::remove_file(made.join("oci-layout")).unwrap())),
        (
            "layout version '2.0'",
            layout(|made, _| {
                fs::write(made.join("oci-layout"), r#"{"imageLayoutVersion":"2.0"}"#).unwrap();
            }),
        ),
        ("index.json of an OCI layout not found", layout(|made, _| fs::remove_file(made.join("index.json")).unwrap())),
        ("larger than 4194304", layout(|made, _| fs::write(made.join("index.json"), vec![b' '; 5 << 20]).unwrap())),
        ("not valid", layout(|made, _| fs::write(made.join("index.json"), "{").unwrap())),
        ("is missing; only 2 is read", layout(|made, _| fs::write(made.join("index.json"), "{}").unwrap())),
        ("image 'v1' (there are: none with a name)", index(&|index| index["manifests"] = json!([]))),
        (
            "different images are called 'v1'",
            index(&|index| {
                let mut twice = index["manifests"][0].clone();
                twice["digest"] = other.clone().into();
                index["manifests"].as_array_mut().unwrap().push(twice);
            }),
        ),
        (
            "is not a sha256 digest",
            index(&|index| index["manifests"][0]["digest"] = "sha256:../../../etc/passwd".into()),
        ),
        ("not found", index(&|index| index["manifests"][0]["digest"] = other.clone().into())),
        ("has 5242880 bytes", index(&|index| index["manifests"][0]["size"] = (5 << 20).into())),
        ("at most 4096", index(&|index| index["manifests"] = vec![index["manifests"][0].clone(); 5000].into())),
        ("ambiguous", index(&|index| index["layers"] = json!([]))),
        (
            "but was served as",
            index(&|index| {
                index["manifests"][0]["mediaType"] = "application/vnd.oci.image.index.v1+json".into();
            }),
        ),
        ("not found", layout(|made, image| fs::remove_file(blob(made, &image.layers[0].digest)).unwrap())),
        (
            "bytes, its descriptor says",
            layout(|made, image| fs::write(blob(made, &image.layers[0].digest), "short").unwrap()),
        ),
        (
            "is larger than",
            layout(|made, image| {
                fs::write(blob(made, &image.layers[0].digest), vec![0; 1 << 20]).unwrap();
            }),
        ),
        (
            "digest mismatch",
            layout(|made, image| {
                let path = blob(made, &image.layers[0].digest);
                let mut bytes = fs::read(&path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(path, bytes).unwrap();
            }),
        ),
        (
            "digest mismatch",
            layout(|made, image| {
                let text = String::from_utf8(image.manifest.clone())
                    .unwrap()
                    .replace("schemaVersion\":2", "schemaVersion\": 2");
                fs::write(blob(made, &image.digest), text).unwrap();
            }),
        ),
        (
            "digest mismatch",
            layout(|made, image| {
                let path = blob(made, &Digest::sha256(&image.config));
                let text = String::from_utf8(image.config.clone()).unwrap().replace("linux", "LINUX");
                fs::write(path, text).unwrap();
            }),
        ),
    ] {
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn links_fifos_and_devices_in_a_layout_are_not_followed() {
    use std::os::unix::fs::symlink;
    let replace_by_link = |name: &'static str| {
        layout(move |made, _| {
            let path = made.join(name);
            let away = made.parent().unwrap().join("made/away");
            fs::rename(&path, &away).unwrap();
            symlink(&away, path).unwrap();
        })
    };
    for name in ["index.json", "oci-layout", "blobs", "blobs/sha256"] {
        let error = replace_by_link(name);
        assert!(error.contains("symbolic links are not followed"), "{name}: {error}");
    }
    let error = layout(|made, image| {
        let path = blob(made, &image.layers[0].digest);
        fs::remove_file(&path).unwrap();
        symlink("/etc/hostname", path).unwrap();
    });
    assert!(error.contains("symbolic links are not followed"), "{error}");
    // A FIFO without a writer would wait for ever.
    let error = layout(|made, image| {
        let path = blob(made, &image.layers[0].digest);
        fs::remove_file(&path).unwrap();
        nacre_testkit::run(std::process::Command::new("mkfifo").arg(path));
    });
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn broken_directories_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let made = scratch.path().join("made");
    let image = Image::hello();
    image.write_layout(&scratch.path().join("layout"), "v1");
    copy_plain(&format!("oci:{}", scratch.path().join("layout").display()), &format!("dir:{}", made.display()))
        .unwrap();
    let dir = format!("dir:{}", made.display());
    let to = format!("dir:{}", scratch.path().join("out").display());
    let signatures = || source(&dir).unwrap().signatures().unwrap().native(&image.digest).map(|found| found.len());
    for number in 1..=128 {
        fs::write(made.join(format!("signature-{number}")), "x").unwrap();
    }
    assert_eq!(signatures().unwrap(), 128);
    fs::write(made.join("signature-129"), "x").unwrap();
    assert!(matches!(signatures(), Err(TransportError::TooLarge { .. })));
    fs::remove_file(made.join("signature-129")).unwrap();
    fs::write(made.join("signature-1"), vec![1; (4 << 20) + 1]).unwrap();
    assert!(matches!(signatures(), Err(TransportError::TooLarge { .. })));

    fs::write(made.join("version"), "Directory Transport Version: 2.0\n").unwrap();
    assert!(source(&dir).err().unwrap().to_string().contains("version"));
    fs::remove_file(made.join("version")).unwrap();
    fs::remove_file(made.join(image.layers[0].digest.hex())).unwrap();
    assert!(copy_plain(&dir, &to).unwrap_err().to_string().contains("not found"));
    fs::remove_file(made.join("manifest.json")).unwrap();
    assert!(copy_plain(&dir, &to).unwrap_err().to_string().contains("manifest.json not found"));
    assert!(!scratch.path().join("out").exists());
}

#[test]
fn noise_is_refused_and_never_panics() {
    let mut rng = Rng::new(7);
    let whole = Layer::of(saved(&image(), &json!([{ "Config": "c.json", "Layers": ["0.tar", "1.tar", "2.tar"] }])));
    for _ in 0..2000 {
        let mut bytes = whole.tar().to_vec();
        for _ in 0..=rng.below(6) {
            let at = rng.below(bytes.len());
            bytes[at] = rng.next_u64().to_le_bytes()[0];
        }
        bytes.truncate(rng.below(bytes.len() + 1));
        if let Ok(index) = TarIndex::of_bytes(&bytes) {
            let _ = index.find("manifest.json");
        }
        let _ = parse_saved(&rng.bytes(64));
    }
    assert!(TarIndex::of_bytes(whole.tar()).unwrap().find("manifest.json").unwrap().is_some());
}

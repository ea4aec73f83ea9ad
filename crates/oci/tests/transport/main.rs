//! Images in directories and archives, and copies between them.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test, at once and at its place")]

mod atomic;
mod bad_input;
mod changes;
mod encryption;
mod interop;
mod registry;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use nacre_oci::{
    copy::{Copied, CopyError, CopyOptions, Source, copy},
    manifest::RawManifest,
    reference::Location,
    source::{ImageSource, TransportError},
    transport::{open_local_sink, open_local_source},
};
use nacre_testkit::{Compression, Entry, Image, Layer};

fn location(text: &str) -> Location {
    text.parse().unwrap()
}

fn source(text: &str) -> Result<Box<dyn ImageSource>, TransportError> {
    open_local_source(&location(text))
}

/// Copies with options; what was written is there when it returns.
fn copy_with(from: &str, to: &str, options: &CopyOptions<'_>) -> Result<Copied, CopyError> {
    let source = source(from)?;
    let sink = open_local_sink(&location(to))?;
    copy(&Source::without_policy(source.as_ref())?, sink.as_ref(), options)
}

fn copy_plain(from: &str, to: &str) -> Result<Copied, CopyError> {
    copy_with(from, to, &CopyOptions::default())
}

fn manifest(text: &str) -> RawManifest {
    source(text).unwrap().manifest(None).unwrap().peek().clone()
}

/// An image of two gzip layers, one of them twice.
fn image() -> Image {
    let top = || Layer::of([Entry::file("etc/motd", "hello\n".repeat(5000))]);
    Image::builder()
        .layer_of(top(), Compression::Gzip)
        .layer_of(Layer::of([Entry::dir("etc/"), Entry::file("etc/hosts", "127.0.0.1 localhost\n")]), Compression::Gzip)
        .layer_of(top(), Compression::Gzip)
        .build()
}

/// All files below a directory, and their contents.
fn tree(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                found.insert(path.strip_prefix(directory).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn every_transport_gives_back_what_another_wrote() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).display().to_string();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let places = [
        format!("oci:{}:v1", at("made")),
        format!("oci-archive:{}:v1", at("one.tar")),
        format!("dir:{}", at("dir")),
        format!("oci:{}:again", at("layout")),
        format!("oci-archive:{}", at("unnamed.tar")),
        format!("oci:{}", at("unnamed")),
    ];
    for pair in places.windows(2) {
        let [from, to] = pair else { unreachable!() };
        let copied = copy_plain(from, to).unwrap();
        assert_eq!((copied.digest, copied.changed), (image.digest, false), "{from} {to}");
        assert_eq!(copied.images[0].layers.len(), 3);
        assert_eq!(manifest(to).bytes(), image.manifest, "{to}");
    }
    // A second image in the layout leaves the first; a second under the same name takes its place.
    let other = Image::hello();
    other.write_layout(&scratch.path().join("other"), "x");
    copy_plain(&format!("oci:{}:x", at("other")), &format!("oci:{}:second", at("layout"))).unwrap();
    assert_eq!(manifest(&format!("oci:{}:again", at("layout"))).digest(), &image.digest);
    copy_plain(&format!("oci:{}:x", at("other")), &format!("oci:{}:again", at("layout"))).unwrap();
    assert_eq!(manifest(&format!("oci:{}:again", at("layout"))).digest(), &other.digest);
    assert!(source(&format!("oci:{}", at("layout"))).unwrap().manifest(None).is_ok(), "both names are one image now");
    copy_plain(&format!("oci:{}:v1", at("made")), &format!("oci:{}:third", at("layout"))).unwrap();
    let error = source(&format!("oci:{}", at("layout"))).unwrap().manifest(None).unwrap_err().to_string();
    assert!(error.contains("name one of them"), "{error}");
}

#[test]
fn a_docker_archive_keeps_the_layers_and_the_config() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).display().to_string();
    let image = image();
    image.write_layout(&scratch.path().join("made"), "v1");
    let archive = format!("docker-archive:{}:team/app:1.2", at("saved.tar"));
    let copied = copy_plain(&format!("oci:{}:v1", at("made")), &archive).unwrap();
    assert!(copied.changed);
    let found = nacre_oci::manifest::Manifest::parse(&manifest(&archive)).unwrap();
    assert_eq!(manifest(&archive).digest(), &copied.digest, "the manifest that is made up is the one that was written");
    assert_eq!(found.config.digest, nacre_core::Digest::sha256(&image.config));
    let diff_ids: Vec<_> = image.layers.iter().map(|layer| layer.diff_id).collect();
    assert_eq!(found.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>(), diff_ids);
    // Back: compressed again, the same diff_ids.
    let back = copy_plain(&archive, &format!("oci:{}:v2", at("made"))).unwrap();
    assert!(back.images[0].layers.iter().all(|layer| layer.media_type.ends_with(".gzip")));
    // Named, unnamed, and by another name.
    assert!(source(&format!("docker-archive:{}", at("saved.tar"))).is_ok());
    let error = source(&format!("docker-archive:{}:team/app:1.3", at("saved.tar"))).err().unwrap().to_string();
    assert!(error.contains("docker.io/team/app:1.2"), "{error}");
    let error = copy_plain(&format!("oci:{}:v1", at("made")), &archive).unwrap_err().to_string();
    assert!(error.contains("there already"), "{error}");
}

/// What `docker save` wrote until version 24, with a link for a layer that is there twice, and what it writes since 25.
#[test]
fn the_forms_that_docker_save_has_had_are_read() {
    let image = image();
    let scratch = tempfile::tempdir().unwrap();
    let [first, second, third] = image.layers.as_slice() else { unreachable!() };
    assert_eq!(first.digest, third.digest);
    let plain = |number: usize| {
        let mut tar = Vec::new();
        let gzip = image.layers[number].bytes.as_slice();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(gzip), &mut tar).unwrap();
        tar
    };
    let config = format!("{}.json", nacre_core::Digest::sha256(&image.config).hex());
    let saved = serde_json::json!([{
        "Config": config, "RepoTags": ["team/app:1"], "Layers": ["1/layer.tar", "2/layer.tar", "3/layer.tar"],
    }]);
    for link in [Entry::symlink("3/layer.tar", "../1/layer.tar"), Entry::hard_link("3/layer.tar", "1/layer.tar")] {
        let archive = Layer::of([
            Entry::dir("1/"),
            Entry::file("1/VERSION", "1.0"),
            Entry::file("1/layer.tar", plain(0)),
            Entry::file("2/layer.tar", plain(1)),
            link,
            Entry::file(&config, image.config.clone()),
            Entry::file("manifest.json", saved.to_string()),
            Entry::file("repositories", "{}"),
        ]);
        check_saved(scratch.path(), &archive, &[first.diff_id, second.diff_id, third.diff_id]);
    }
    let blob = |digest: &nacre_core::Digest| format!("blobs/sha256/{}", digest.hex());
    let config = blob(&nacre_core::Digest::sha256(&image.config));
    let saved = serde_json::json!([{
        "Config": config, "RepoTags": ["team/app:1"],
        "Layers": [blob(&first.digest), blob(&second.digest), blob(&third.digest)],
        "LayerSources": { first.diff_id.to_string(): { "size": 1 } },
    }]);
    let archive = Layer::of([
        Entry::dir("blobs/"),
        Entry::file(blob(&first.digest), first.bytes.clone()),
        Entry::file(blob(&second.digest), second.bytes.clone()),
        Entry::file(&config, image.config.clone()),
        Entry::file("index.json", "{}"),
        Entry::file("manifest.json", saved.to_string()),
        Entry::file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#),
    ]);
    check_saved(scratch.path(), &archive, &[first.digest, second.digest, third.digest]);
}

fn check_saved(scratch: &Path, archive: &Layer, expected: &[nacre_core::Digest]) {
    let file = scratch.join("saved.tar");
    fs::write(&file, archive.tar()).unwrap();
    let from = format!("docker-archive:{}:team/app:1", file.display());
    copy_plain(&from, &format!("dir:{}", scratch.join("out").display())).unwrap();
    let layers = nacre_oci::manifest::Manifest::parse(&manifest(&from)).unwrap().layers;
    assert_eq!(layers.iter().map(|layer| layer.digest).collect::<Vec<_>>(), expected);
}

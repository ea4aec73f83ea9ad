//! What is built is what is read.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::{Read, Write as _},
    sync::{Arc, atomic::Ordering},
};

use nacre_lazy::{
    build::{BuildError, BuildOptions, Builder, DataBlob},
    keys::Domain,
    pace::Urgency,
};
use nacre_oci::unpack::Limits;
use nacre_testkit::Entry;

use crate::support::{CONFIG, Found, Registry, build, build_with, layer, noise, open, secret, shared, walk};

fn two_layers() -> [Vec<u8>; 2] {
    let text = b"the same line of text, again and again\n".repeat(9000);
    [
        layer([
            Entry::dir("etc").mode(0o750),
            Entry::file("etc/passwd", b"root:x:0:0".to_vec()),
            Entry::file("etc/gone", noise(1, 100)),
            Entry::file("empty", Vec::new()),
            Entry::file("large", noise(2, 900_001)).mode(0o755),
            Entry::file("text", text.clone()),
            Entry::symlink("link", "etc/passwd"),
            Entry::hard_link("hard", "large"),
            Entry::fifo("pipe"),
            Entry::dir("lib"),
            Entry::file("lib/a", noise(3, 5000)),
            Entry::file("lib/b", noise(3, 5000)),
            Entry::sparse("sparse", 3_000_000, &[(1_000_000, b"in the middle")]),
        ]),
        layer([
            Entry::whiteout("etc/gone"),
            Entry::file("etc/passwd", b"root:x:0:0:changed".to_vec()),
            Entry::opaque("lib"),
            Entry::file("lib/c", noise(4, 70_000)),
            Entry::file("copy", noise(2, 900_001)),
            Entry::symlink("usr", "lib"),
            Entry::file("usr/d", b"by a link".to_vec()),
        ]),
    ]
}

fn expected() -> BTreeMap<String, Found> {
    let mut sparse = vec![0; 3_000_000];
    sparse[1_000_000..1_000_013].copy_from_slice(b"in the middle");
    let file = |content: Vec<u8>| Found::File(0o644, Ok(content));
    let text = b"the same line of text, again and again\n".repeat(9000);
    [
        ("", Found::Directory(0o755)),
        ("/etc", Found::Directory(0o750)),
        ("/etc/passwd", file(b"root:x:0:0:changed".to_vec())),
        ("/empty", file(Vec::new())),
        ("/large", Found::File(0o755, Ok(noise(2, 900_001)))),
        ("/hard", Found::File(0o755, Ok(noise(2, 900_001)))),
        ("/copy", file(noise(2, 900_001))),
        ("/text", file(text)),
        ("/link", Found::Symlink(b"etc/passwd".to_vec())),
        ("/pipe", Found::Other(nacre_lazy::erofs::FileType::Fifo)),
        ("/lib", Found::Directory(0o755)),
        ("/lib/c", file(noise(4, 70_000))),
        ("/lib/d", file(b"by a link".to_vec())),
        ("/usr", Found::Symlink(b"lib".to_vec())),
        ("/sparse", file(sparse)),
    ]
    .into_iter()
    .map(|(path, found)| (path.to_owned(), found))
    .collect()
}

#[test]
fn layers_become_the_tree_that_they_come_to() {
    let domain = Domain::new(&secret(1));
    for domain in [Some(&domain), None] {
        let registry = Arc::new(Registry::default());
        let pushed = build(&registry, domain, &two_layers());
        let directory = tempfile::tempdir().unwrap();
        for cache in [None, Some(directory.path()), Some(directory.path())] {
            let image = open(&registry, &pushed, &shared(cache)).unwrap();
            assert_eq!(image.config, CONFIG);
            let found = walk(&image);
            assert_eq!(found.keys().collect::<Vec<_>>(), expected().keys().collect::<Vec<_>>());
            for (path, expected) in expected() {
                assert!(found[&path] == expected, "{path}");
            }
        }
        // The large file is stored once, the text nearly not at all.
        let stored: u64 = pushed.data.iter().map(|blob| blob.size).sum();
        assert!((900_000..1_100_000).contains(&stored), "{stored}");
        assert_eq!(pushed.data.len(), 2);
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let domain = Domain::new(&secret(1));
    let names = |domain| {
        let registry = Arc::new(Registry::default());
        let pushed = build(&registry, domain, &two_layers());
        (pushed.metadata, pushed.table, pushed.data)
    };
    let first = names(Some(&domain));
    for _ in 0..5 {
        assert_eq!(names(Some(&domain)), first);
    }
    let second = Domain::new(&secret(2));
    let other = names(Some(&second));
    assert!(other.0 != first.0 && other.1 != first.1 && other.2.iter().all(|blob| !first.2.contains(blob)));
    assert_eq!(names(None), names(None));
}

#[test]
fn images_of_one_domain_share_blobs_by_themselves_and_chunks_when_they_are_told() {
    let (domain, registry) = (Domain::new(&secret(1)), Arc::new(Registry::default()));
    let [base, _] = two_layers();
    let first = build(&registry, Some(&domain), std::slice::from_ref(&base));
    let second = build(&registry, Some(&domain), &two_layers());
    assert_eq!(first.data[0], second.data[0], "the base's blob does not depend on what is above it");

    let update = layer([Entry::file("elsewhere/large", noise(2, 900_001)), Entry::file("new", noise(9, 40_000))]);
    let alone = build(&registry, Some(&domain), std::slice::from_ref(&update));
    let image = open(&registry, &first, &shared(None)).unwrap();
    let blobs: Vec<DataBlob> =
        first.data.iter().map(|blob| DataBlob { digest: blob.digest, size: blob.size }).collect();
    let entries = image.reader.entries().unwrap();
    let shares = build_with(&registry, Some(&domain), &[update], |builder| builder.share(&blobs, entries));
    assert!(alone.report.new_bytes > 940_000 && shares.report.new_bytes < 60_000, "{:?}", shares.report);
    assert!(shares.data.contains(&first.data[0]));
    let found = walk(&open(&registry, &shares, &shared(None)).unwrap());
    assert!(found["/elsewhere/large"] == Found::File(0o644, Ok(noise(2, 900_001))));
    assert!(found["/new"] == Found::File(0o644, Ok(noise(9, 40_000))));
}

#[test]
fn a_second_reader_and_a_dead_registry_are_served_by_the_cache() {
    let (domain, registry) = (Domain::new(&secret(1)), Arc::new(Registry::default()));
    let pushed = build(&registry, Some(&domain), &two_layers());
    let directory = tempfile::tempdir().unwrap();
    let image = open(&registry, &pushed, &shared(Some(directory.path()))).unwrap();
    let mut steps = 0;
    image
        .reader
        .complete(&mut |_| {
            steps += 1;
            true
        })
        .unwrap();
    assert!(steps > 0);
    let before = registry.requests.load(Ordering::Relaxed);
    registry.failing.store(u32::MAX, Ordering::Relaxed);
    let found = walk(&open(&registry, &pushed, &shared(Some(directory.path()))).unwrap());
    assert!(found["/large"] == expected()["/large"] && found["/text"] == expected()["/text"]);
    assert_eq!(registry.requests.load(Ordering::Relaxed), before);
}

#[test]
fn neighbours_come_in_one_request_and_failures_are_tried_again() {
    let (domain, registry) = (Domain::new(&secret(1)), Arc::new(Registry::default()));
    let pushed = build(&registry, Some(&domain), &[layer([Entry::file("large", noise(1, 2_000_000))])]);
    let image = open(&registry, &pushed, &shared(None)).unwrap();
    registry.failing.store(u32::MAX, Ordering::Relaxed);
    let error = image.reader.read_at(0, &mut [0; 10]).unwrap_err().to_string();
    assert!(error.contains("the chunk table") && error.contains("the connection was reset"), "{error}");
    registry.failing.store(2, Ordering::Relaxed);
    let mut all = vec![0; 1 << 20];
    registry.requests.store(0, Ordering::Relaxed);
    image.reader.read_at(0, &mut all).unwrap();
    assert!(all == noise(1, 1 << 20));
    assert_eq!(
        registry.requests.load(Ordering::Relaxed),
        2 + 2,
        "two that failed, one for the table, one for the chunks"
    );
    registry.failing.store(2, Ordering::Relaxed);
    image.reader.read_at(1 << 20, &mut all[..500_000]).unwrap();
    assert!(all[..500_000] == noise(1, 2_000_000)[1 << 20..(1 << 20) + 500_000]);
    registry.failing.store(u32::MAX, Ordering::Relaxed);
    let error = image.reader.read_at((1 << 20) + 800_000, &mut all[..100]).unwrap_err().to_string();
    assert!(error.contains("gave up after") && error.contains("connection was reset"), "{error}");
    assert_eq!(image.reader.failure().unwrap().reason, error);
}

#[test]
fn what_is_no_layer_is_no_image() {
    let limits = Limits { entries: 3, ..Limits::default() };
    let options = |limits| BuildOptions { domain: None, level: 3, chunk: 64 << 10, threads: 2, limits };
    let tar = |entries: Vec<Entry>| layer(entries);
    let file = |name: &str| Entry::file(name, noise(1, 300_000));
    for (bytes, text) in [
        (tar(vec![file("a"), file("../b")]), "'..'"),
        (tar(vec![file("a"), Entry::hard_link("b", "none")]), "hard link"),
        (tar(vec![file("a"), file("a/b")]), "no directory"),
        (tar(vec![file("a"), file("b"), file("c"), file("d")]), "entries"),
        (tar(vec![file("a")])[..2000].to_vec(), "ends within"),
        (b"this is no tar".repeat(100), "checksum"),
    ] {
        let mut builder = Builder::new::<Infallible>(options(&limits)).unwrap();
        let mut whole = true;
        let error = builder
            .layer(&mut bytes.as_slice(), |blob: &mut dyn Read| {
                let copied = std::io::copy(blob, &mut std::io::sink());
                whole = copied.is_ok();
                Ok::<_, Infallible>(DataBlob { digest: [0; 32], size: 0 })
            })
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
        assert!(!whole || !error.contains("'..'"), "the blob of a layer that failed must not look whole");
    }
    let error = Builder::new::<Infallible>(BuildOptions { level: 99, ..options(&limits) }).err().unwrap().to_string();
    assert!(error.contains("compression level is 99"), "{error}");
    let error = Builder::new::<Infallible>(BuildOptions { chunk: 1 << 20, ..options(&limits) }).err().unwrap();
    assert!(error.to_string().contains("16, 32, 64 or 128 KiB"));
}

#[test]
fn an_upload_that_fails_fails_the_layer() {
    let limits = Limits::default();
    let options = BuildOptions { domain: None, level: 3, chunk: 16 << 10, threads: 2, limits: &limits };
    let tar = layer([Entry::file("large", noise(1, 20_000_000))]);
    let mut builder = Builder::new::<std::io::Error>(options).unwrap();
    let error = builder
        .layer(&mut tar.as_slice(), |blob: &mut dyn Read| {
            blob.read_exact(&mut [0; 1000])?;
            std::io::sink().flush()?;
            Err(std::io::Error::other("the registry is full"))
        })
        .unwrap_err();
    assert!(matches!(&error, BuildError::Upload(error) if error.to_string() == "the registry is full"), "{error}");
}

/// A source whose code fails.
struct Panics;

impl nacre_lazy::source::Blobs for Panics {
    fn read(
        &self,
        _blob: &nacre_lazy::source::BlobId,
        _offset: u64,
        _out: &mut [u8],
        _attempt: u32,
    ) -> Result<(), nacre_lazy::source::SourceError> {
        std::thread::sleep(std::time::Duration::from_millis(200));
        std::panic::resume_unwind(Box::new("a bug"));
    }
}

#[test]
fn nobody_waits_for_a_thread_that_died() {
    let (domain, registry) = (Domain::new(&secret(1)), Arc::new(Registry::default()));
    let pushed = build(&registry, Some(&domain), &[layer([Entry::file("large", noise(1, 100_000))])]);
    let image = open(&registry, &pushed, &shared(None)).unwrap();
    let entry = image.reader.entries().unwrap()[0];
    let wanted = [nacre_lazy::fetch::Wanted { blob: pushed.data[0], entry }];
    let fetcher = nacre_lazy::fetch::Fetcher::new(None, std::time::Duration::from_secs(1));
    let died = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| fetcher.fetch(&Panics, &wanted, Urgency::Waited).is_err())).collect();
        threads.into_iter().map(|thread| thread.join().is_err()).collect::<Vec<_>>()
    });
    assert!(died.contains(&true), "one of them had the bug");
    fetcher.fetch(registry.as_ref(), &wanted, Urgency::Waited).unwrap();
}

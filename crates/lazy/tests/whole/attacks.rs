//! Whatever a host does to blobs, caches and answers: the right bytes, or an error.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use nacre_lazy::{keys::Domain, source::BlobId};
use nacre_testkit::Entry;

use crate::support::{CONFIG, Found, Pushed, Registry, build, layer, noise, open, secret, shared, walk};

fn image(registry: &Arc<Registry>, sealed: bool) -> Pushed {
    let domain = Domain::new(&secret(1));
    let tar = layer([
        Entry::dir("private-directory"),
        Entry::file("private-directory/name-of-a-file", b"contents of a small file ".repeat(20)),
        Entry::file("large", noise(1, 200_000)),
        Entry::symlink("private-link", "target-of-the-link"),
    ]);
    build(registry, sealed.then_some(&domain), &[tar])
}

/// Reads everything; what comes without an error must be right.
fn read_all(
    registry: &Arc<Registry>,
    pushed: &Pushed,
    good: &Pushed,
    original: &Arc<Registry>,
    cache: Option<&Path>,
) -> bool {
    let Ok(opened) = open(registry, pushed, &shared(cache)) else { return false };
    let right = walk(&open(original, good, &shared(None)).unwrap());
    let found = walk(&opened);
    assert_eq!(found.len(), right.len());
    let mut whole = true;
    for (path, expected) in right {
        match (&found[&path], &expected) {
            (Found::File(_, Err(_)), _) => whole = false,
            (found, expected) => assert!(found == expected, "{path}: wrong bytes without an error"),
        }
    }
    whole
}

fn changed(registry: &Registry, blob: &BlobId, change: impl FnOnce(&mut Vec<u8>)) -> Arc<Registry> {
    let other = Registry::default();
    for (digest, bytes) in &*registry.blobs.lock().unwrap() {
        other.blobs.lock().unwrap().insert(*digest, bytes.clone());
    }
    change(other.blobs.lock().unwrap().get_mut(&blob.digest).unwrap());
    Arc::new(other)
}

#[test]
fn no_change_of_a_blob_is_ever_read() {
    for sealed in [true, false] {
        let registry = Arc::new(Registry::default());
        let pushed = image(&registry, sealed);
        assert!(read_all(&registry, &pushed, &pushed, &registry, None));
        for blob in [&pushed.metadata, &pushed.table, &pushed.data[0]] {
            let length = usize::try_from(blob.size).unwrap();
            for step in 0..8 {
                let at = (length - 1) * step / 7;
                let bad = changed(&registry, blob, |bytes| bytes[at] ^= 4);
                assert!(!read_all(&bad, &pushed, &pushed, &registry, None), "byte {at} of {blob}");
            }
            let bad = changed(&registry, blob, |bytes| bytes.truncate(length - 1));
            assert!(!read_all(&bad, &pushed, &pushed, &registry, None));
            let bad = changed(&registry, blob, |bytes| bytes.fill(0));
            assert!(!read_all(&bad, &pushed, &pushed, &registry, None));
            let bad = changed(&registry, blob, |bytes| bytes.rotate_left(100));
            assert!(!read_all(&bad, &pushed, &pushed, &registry, None));
        }
    }
}

#[test]
fn blobs_of_another_image_of_the_same_domain_are_not_taken() {
    let registry = Arc::new(Registry::default());
    let (pushed, domain) = (image(&registry, true), Domain::new(&secret(1)));
    let other = build(&registry, Some(&domain), &[layer([Entry::file("large", noise(7, 200_000))])]);
    for (blob, from) in
        [(&pushed.metadata, &other.metadata), (&pushed.table, &other.table), (&pushed.data[0], &other.data[0])]
    {
        let replacement = registry.get(from);
        let bad = changed(&registry, blob, |bytes| *bytes = replacement);
        assert!(!read_all(&bad, &pushed, &pushed, &registry, None));
    }
    // A manifest that names the data blobs of another image.
    let mixed = Pushed { data: other.data.clone(), key: None, ..image(&registry, false) };
    assert!(open(&registry, &mixed, &shared(None)).is_err());
}

#[test]
fn a_cache_that_lies_is_healed() {
    let registry = Arc::new(Registry::default());
    let pushed = image(&registry, true);
    let directory = tempfile::tempdir().unwrap();
    assert!(read_all(&registry, &pushed, &pushed, &registry, Some(directory.path())));
    let spoil: [fn(&Path); 4] = [
        |path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes.iter_mut().step_by(997).for_each(|byte| *byte ^= 1);
            std::fs::write(path, bytes).unwrap();
        },
        |path| std::fs::write(path, b"short").unwrap(),
        |path| std::fs::write(path, vec![0; 300_000]).unwrap(),
        |path| std::fs::remove_file(path).unwrap(),
    ];
    for spoil in spoil {
        files(directory.path()).iter().for_each(|file| spoil(file));
        let reader = shared(Some(directory.path()));
        let image = open(&registry, &pushed, &reader).unwrap();
        let found = walk(&image);
        assert!(found["/large"] == Found::File(0o644, Ok(noise(1, 200_000))));
        // What was wrong is right again: the registry is not needed any more.
        let empty = Arc::new(Registry::default());
        empty.put(registry.get(&pushed.metadata));
        let again = walk(&open(&empty, &pushed, &shared(Some(directory.path()))).unwrap());
        assert!(again == found);
    }
}

#[test]
fn the_host_sees_no_name_no_content_and_no_config() {
    let registry = Arc::new(Registry::default());
    let pushed = image(&registry, true);
    let directory = tempfile::tempdir().unwrap();
    assert!(read_all(&registry, &pushed, &pushed, &registry, Some(directory.path())));
    let mut seen: Vec<Vec<u8>> = registry.blobs.lock().unwrap().values().cloned().collect();
    for file in files(directory.path()) {
        seen.push(file.to_string_lossy().into_owned().into_bytes());
        seen.push(std::fs::read(file).unwrap());
    }
    let content = noise(1, 200_000);
    let secrets: [&[u8]; 6] = [
        b"private-directory",
        b"name-of-a-file",
        b"target-of-the-link",
        b"contents of a small file",
        b"value-of-config",
        &content[100_000..100_032],
    ];
    for secret in secrets {
        for bytes in &seen {
            assert!(!bytes.windows(secret.len()).any(|window| window == secret), "{}", secret.escape_ascii());
        }
    }
    assert!(CONFIG.windows(15).any(|window| window == b"value-of-config"));
    // Sealed bytes are noise: each value of a byte about as often as any other.
    for blob in [&pushed.data[0], &pushed.table] {
        let mut counts = [0u64; 256];
        let bytes = registry.get(blob);
        bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        let mean = bytes.len() as f64 / 256.0;
        let chi: f64 = counts.iter().map(|count| (*count as f64 - mean).powi(2) / mean).sum();
        assert!(chi < 380.0, "{chi}");
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

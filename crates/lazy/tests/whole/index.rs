//! Indexes of layers as they come: whatever compressed them, what is read is what was in the tar, and what was changed is not read.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write as _},
    process::{Command, Stdio},
    sync::{Arc, LazyLock},
    time::Duration,
};

use nacre_core::{Digest, NoProgress, Progress as _, SecretArray};
use nacre_lazy::{
    device::DeviceReader,
    erofs::{FileType, Image, Inode},
    fetch::Fetcher,
    index::{
        IndexMetadata, IndexReader, LayerKey,
        build::{IndexBuildError, IndexBuilder, IndexedLayer},
    },
    keys::MetadataKey,
    reader::Shared,
    source::{BlobId, Blobs},
};
use nacre_oci::{
    copy::StoredLayer,
    crypt::{LayerEncryptor, LayerSecret, PublicOptions},
    manifest::{Compression, Descriptor, media},
    unpack::Limits,
};
use nacre_testkit::{Entry, require};

use crate::support::{Registry, layer, noise, shared};

const SPAN: u64 = 256 << 10;

/// An encrypted layer's key, in the form that it is wrapped in.
struct Sealed {
    json: nacre_core::SecretBytes,
    public: PublicOptions,
}

impl Sealed {
    fn secret(&self) -> LayerSecret {
        LayerSecret::parse(&self.json).unwrap()
    }
}

/// A layer as it is stored.
struct Stored {
    bytes: Vec<u8>,
    compression: Compression,
    diff_id: Digest,
    sealed: Option<Sealed>,
}

impl Stored {
    fn new(tar: &[u8], compression: Compression, bytes: Vec<u8>) -> Self {
        Self { bytes, compression, diff_id: Digest::sha256(tar), sealed: None }
    }

    fn encrypted(mut self) -> Self {
        let mut encryptor = LayerEncryptor::new().unwrap();
        encryptor.update(&mut self.bytes).unwrap();
        let (secret, public) = encryptor.finish();
        self.sealed = Some(Sealed { json: secret.to_json(), public });
        self
    }
}

/// An index that was pushed.
struct Pushed {
    metadata: BlobId,
    pages: BlobId,
    layers: Vec<BlobId>,
    report: Vec<IndexedLayer>,
    key: Option<MetadataKey>,
}

fn index(registry: &Registry, layers: &[Stored], sealed: bool) -> Result<Pushed, IndexBuildError> {
    let limits = Limits::default();
    let key = sealed.then(|| MetadataKey::new(SecretArray::random()));
    let mut builder = IndexBuilder::new(key.as_ref(), SPAN, &limits)?;
    let (mut names, mut report) = (Vec::new(), Vec::new());
    for stored in layers {
        let descriptor = Descriptor::of(media::OCI_LAYER, &stored.bytes);
        let secret = stored.sealed.as_ref().map(|sealed| {
            (sealed.secret().decryptor(&sealed.public).unwrap(), sealed.secret().parts(&sealed.public).unwrap())
        });
        let layer =
            StoredLayer { descriptor: &descriptor, compression: stored.compression, diff_id: stored.diff_id, secret };
        report.push(builder.layer(&mut &*stored.bytes, layer, &*NoProgress.begin("layer", None))?);
        names.push(registry.put(stored.bytes.clone()));
    }
    let mut built = builder.finish()?;
    let put = |file: &mut File| {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        registry.put(bytes)
    };
    let (metadata, pages) = (put(&mut built.metadata), put(&mut built.pages));
    assert_eq!((metadata.size, pages.size), (built.metadata_bytes, built.pages_bytes));
    Ok(Pushed { metadata, pages, layers: names, report, key })
}

struct Opened {
    reader: IndexReader,
    tree: Image<File>,
}

fn open(registry: &Arc<Registry>, pushed: &Pushed, layers: &[Stored], shared: &Arc<Shared>) -> Opened {
    let mut erofs = tempfile::tempfile().unwrap();
    let blob = registry.get(&pushed.metadata);
    let digest = Digest::from_raw(nacre_core::Algorithm::Sha256, &pushed.metadata.digest).unwrap();
    let metadata = IndexMetadata::read(&mut blob.as_slice(), &digest, pushed.key.as_ref(), &mut erofs).unwrap();
    nacre_lazy::erofs::check(&erofs, &nacre_lazy::erofs::Limits::default()).unwrap();
    let key = |stored: &Stored| -> LayerKey {
        stored.sealed.as_ref().map(|sealed| sealed.secret().parts(&sealed.public).unwrap())
    };
    let source: Arc<dyn Blobs> = Arc::clone(registry) as _;
    let reader = IndexReader::new(
        Arc::clone(shared),
        source,
        metadata,
        layers.iter().map(key).collect(),
        pushed.pages,
        Box::new(tempfile::tempfile),
    );
    Opened { reader, tree: Image::open(erofs).unwrap() }
}

/// The content of every regular file.
fn walk(opened: &Opened) -> BTreeMap<String, Result<Vec<u8>, String>> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![(String::new(), opened.tree.root())]);
    while let Some((path, nid)) = todo.pop() {
        let inode = opened.tree.inode(nid).unwrap();
        if inode.file_type == FileType::Directory {
            let add = |entry: nacre_lazy::erofs::Dirent<'_>| {
                if entry.name != b"." && entry.name != b".." {
                    todo.push((format!("{path}/{}", String::from_utf8_lossy(entry.name)), entry.nid));
                }
                true
            };
            opened.tree.read_dir(&inode, 0, add).unwrap();
        } else if inode.file_type == FileType::Regular {
            found.insert(path, content(opened, &inode));
        }
    }
    found
}

fn content(opened: &Opened, inode: &Inode) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xEE; usize::try_from(inode.size).unwrap()];
    let Some(extent) = inode.extent else { return Ok(bytes) };
    let mut at = 0;
    for length in [1000, 4096, 70_000, 131_072].into_iter().cycle() {
        let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) else { break };
        let length = length.min(rest.len());
        let offset = u64::from(extent.block) * 4096 + at as u64;
        opened.reader.read_at(offset, &mut rest[..length]).map_err(|error| error.to_string())?;
        at += length;
    }
    Ok(bytes)
}

/// Text that compresses as text does, and noise.
fn entries() -> Vec<(String, Vec<u8>)> {
    let words = noise(7, 4000);
    let text = |seed: u64, length: usize| -> Vec<u8> {
        let picks = noise(seed, length / 4 + 4);
        let word = |pick: &u8| {
            words[usize::from(*pick) * 8..][..1 + usize::from(*pick % 7)].iter().map(|byte| byte % 26 + b'a')
        };
        picks.iter().flat_map(|pick| word(pick).chain([b' '])).take(length).collect()
    };
    let mut all = vec![
        ("empty".to_owned(), Vec::new()),
        ("noise".to_owned(), noise(1, 600_000)),
        ("text".to_owned(), text(2, 1_200_000)),
        ("zeroes".to_owned(), vec![0; 1_500_000]),
    ];
    all.extend((0..60).map(|at| (format!("small-{at}"), text(at + 10, 200 + 161 * usize::try_from(at).unwrap()))));
    all
}

fn tar() -> Vec<u8> {
    static MADE: LazyLock<Vec<u8>> = LazyLock::new(make_tar);
    MADE.clone()
}

fn make_tar() -> Vec<u8> {
    let files = entries().into_iter().map(|(name, content)| Entry::file(&name, content));
    let sparse = Entry::sparse("sparse", 3_000_000, &[(1_000_000, b"in the middle"), (2_900_000, b"near the end")]);
    layer(files.chain([sparse, Entry::hard_link("hard", "text")]))
}

fn expected() -> &'static BTreeMap<String, Result<Vec<u8>, String>> {
    static MADE: LazyLock<BTreeMap<String, Result<Vec<u8>, String>>> = LazyLock::new(make_expected);
    &MADE
}

fn make_expected() -> BTreeMap<String, Result<Vec<u8>, String>> {
    let mut all: BTreeMap<_, _> =
        entries().into_iter().map(|(name, content)| (format!("/{name}"), Ok(content))).collect();
    let mut sparse = vec![0; 3_000_000];
    sparse[1_000_000..1_000_013].copy_from_slice(b"in the middle");
    sparse[2_900_000..2_900_012].copy_from_slice(b"near the end");
    all.insert("/sparse".into(), Ok(sparse));
    let text = all["/text"].clone();
    all.insert("/hard".into(), text);
    all
}

#[track_caller]
fn assert_equal(found: &BTreeMap<String, Result<Vec<u8>, String>>, what: &str) {
    for (name, content) in expected() {
        assert!(
            found.get(name) == Some(content),
            "{what}: {name} is not what it was: {:?}",
            found.get(name).map(Result::is_ok)
        );
    }
    assert_eq!(found.len(), expected().len());
}

/// Runs a compressor; `None` where it is missing, which is said.
fn by_program(program: &str, options: &[&str], tar: &[u8]) -> Option<Vec<u8>> {
    let path = require(program)?;
    let mut child = Command::new(path).args(options).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, tar) = (child.stdin.take().unwrap(), tar.to_vec());
    let feeding = std::thread::spawn(move || input.write_all(&tar).unwrap());
    let output = child.wait_with_output().unwrap();
    feeding.join().unwrap();
    assert!(output.status.success());
    Some(output.stdout)
}

fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// The tar in pieces that each are compressed for themselves.
fn pieces(tar: &[u8], length: usize, compress: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    tar.chunks(length).flat_map(compress).collect()
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// Layers by the name of what made them.
fn layers(tar: &[u8]) -> Vec<(String, Compression, Vec<u8>)> {
    let mut all = vec![("tar".to_owned(), Compression::None, tar.to_vec())];
    let mut add = |name: &str, compression, bytes: Vec<u8>| all.push((name.to_owned(), compression, bytes));
    for level in [0, 1, 2, 5, 6, 9] {
        add(&format!("flate2 -{level}"), Compression::Gzip, gzip(tar, level));
    }
    for (program, options) in
        [("gzip", "-1"), ("gzip", "-6"), ("gzip", "-9"), ("pigz", "-6"), ("pigz", "-11"), ("pigz", "-i")]
    {
        if let Some(bytes) = by_program(program, &["-c", options], tar) {
            add(&format!("{program} {options}"), Compression::Gzip, bytes);
        }
    }
    // As eStargz and pgzip do: a member for each file, or each piece.
    add("members of 5000", Compression::Gzip, pieces(tar, 5000, |piece| gzip(piece, 6)));
    add("members of 700000", Compression::Gzip, pieces(tar, 700_000, |piece| gzip(piece, 6)));
    let mut footer = pieces(tar, 100_000, |piece| gzip(piece, 9));
    footer.extend(gzip(b"", 0));
    add("members and an empty one", Compression::Gzip, footer);
    add("one frame", Compression::Zstd, zstd::bulk::compress(tar, 3).unwrap());
    // As zstd:chunked does: frames, and one that is skipped behind them.
    let mut frames = pieces(tar, 60_000, frame);
    frames.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]);
    add("frames of 60000", Compression::Zstd, frames);
    add("frames of 3000000", Compression::Zstd, pieces(tar, 3_000_000, frame));
    all
}

#[test]
fn whatever_compressed_a_layer_its_files_are_read_back() {
    let tar = tar();
    for (name, compression, bytes) in layers(&tar) {
        let size = bytes.len() as u64;
        let stored = [Stored::new(&tar, compression, bytes)];
        let registry = Arc::new(Registry::default());
        let pushed = index(&registry, &stored, false).unwrap_or_else(|error| panic!("{name}: {error}"));
        let report = &pushed.report[0];
        let bytes = pushed.metadata.size + pushed.pages.size;
        eprintln!(
            "{name}: {} spans, the longest {}, {} in a file, {bytes} of index for {size}",
            report.spans, report.longest, report.spooled
        );
        assert_eq!(report.tar_bytes, tar.len() as u64);
        assert_equal(&walk(&open(&registry, &pushed, &stored, &shared(None))), &name);
    }
}

#[test]
fn a_completed_image_needs_no_registry() {
    let tar = tar();
    for (compression, bytes) in
        [(Compression::None, tar.clone()), (Compression::Gzip, gzip(&tar, 6)), (Compression::Zstd, frame(&tar))]
    {
        let stored = [Stored::new(&tar, compression, bytes)];
        let registry = Arc::new(Registry::default());
        let pushed = index(&registry, &stored, false).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let opened = open(&registry, &pushed, &stored, &shared(Some(directory.path())));
        opened.reader.complete(&mut |_| true).unwrap();
        let requests = registry.requests.load(std::sync::atomic::Ordering::Relaxed);
        registry.blobs.lock().unwrap().retain(|digest, _| *digest == pushed.metadata.digest);
        assert_equal(&walk(&open(&registry, &pushed, &stored, &shared(Some(directory.path())))), "from the cache");
        assert_eq!(registry.requests.load(std::sync::atomic::Ordering::Relaxed), requests);
    }
}

#[test]
fn encrypted_layers_are_read_and_their_index_tells_nothing() {
    let tar = tar();
    let upper = layer([Entry::whiteout("noise"), Entry::file("upper-name", "upper content")]);
    for (compression, bytes) in [
        (Compression::None, tar.clone()),
        (Compression::Gzip, gzip(&tar, 6)),
        (Compression::Zstd, pieces(&tar, 300_000, frame)),
    ] {
        let stored = [
            Stored::new(&tar, compression, bytes).encrypted(),
            Stored::new(&upper, Compression::Gzip, gzip(&upper, 6)).encrypted(),
        ];
        let registry = Arc::new(Registry::default());
        let pushed = index(&registry, &stored, true).unwrap();
        let mut found = walk(&open(&registry, &pushed, &stored, &shared(None)));
        assert_eq!(found.remove("/upper-name"), Some(Ok(b"upper content".to_vec())));
        found.insert("/noise".into(), Ok(noise(1, 600_000)));
        assert_equal(&found, "encrypted");
        for blob in [&pushed.metadata, &pushed.pages] {
            let bytes = registry.get(blob);
            for secret in [&b"upper-name"[..], b"small-1", b"upper content"] {
                assert!(!bytes.windows(secret.len()).any(|window| window == secret));
            }
        }
    }
}

#[test]
fn layers_that_are_not_what_the_image_says_are_not_indexed() {
    let tar = tar();
    let good = gzip(&tar, 6);
    let registry = Registry::default();
    let try_it = |bytes: Vec<u8>, compression, diff_id| {
        let stored = Stored { bytes, compression, diff_id, sealed: None };
        index(&registry, &[stored], false).map(|_| ()).unwrap_err()
    };
    let diff_id = Digest::sha256(&tar);
    let other = try_it(good.clone(), Compression::Gzip, Digest::sha256(b"other"));
    assert!(matches!(other, IndexBuildError::DiffId { .. }), "{other}");
    let short = try_it(good[..good.len() / 2].to_vec(), Compression::Gzip, diff_id);
    assert!(matches!(short, IndexBuildError::Truncated), "{short}");
    let short = try_it(good[..good.len() - 3].to_vec(), Compression::Gzip, diff_id);
    assert!(matches!(short, IndexBuildError::Truncated), "{short}");
    for trailing in [&b"x"[..], &[0; 600]] {
        let error = try_it([&good[..], trailing].concat(), Compression::Gzip, diff_id);
        assert!(matches!(error, IndexBuildError::Compressed { .. } | IndexBuildError::Truncated), "{error}");
    }
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 0x55;
    try_it(bad, Compression::Gzip, diff_id);
    let frames = frame(&tar);
    let short = try_it(frames[..frames.len() - 1].to_vec(), Compression::Zstd, diff_id);
    assert!(matches!(short, IndexBuildError::Truncated), "{short}");
    try_it(Vec::new(), Compression::Gzip, diff_id);
    try_it(b"no tar at all, but long enough for a block of one".repeat(40), Compression::None, diff_id);
    // What was encrypted from something else.
    let sealed = Stored::new(&tar, Compression::Gzip, good).encrypted();
    let mut changed = Stored { bytes: sealed.bytes.clone(), ..sealed };
    let at = changed.bytes.len() - 5;
    changed.bytes[at] ^= 1;
    let error = index(&registry, &[changed], true).map(|_| ()).unwrap_err();
    assert!(matches!(error, IndexBuildError::Crypt(_)), "{error}");
}

/// Changes bytes of a blob; what is read then is right, or an error, and there are errors.
fn attacked(
    registry: &Arc<Registry>,
    pushed: &Pushed,
    stored: &[Stored],
    blob: &BlobId,
    change: impl Fn(&mut Vec<u8>),
) {
    let good = registry.get(blob);
    let mut bad = good.clone();
    change(&mut bad);
    registry.blobs.lock().unwrap().insert(blob.digest, bad);
    let impatient = Shared::new(Fetcher::new(None, Duration::ZERO));
    let found = walk(&open(registry, pushed, stored, &impatient));
    let wrong = found.values().filter(|content| content.is_err()).count();
    assert!(wrong > 0, "nothing was noticed");
    for (name, content) in expected() {
        assert!(found[name].is_err() || found[name] == *content, "{name} has wrong bytes");
    }
    registry.blobs.lock().unwrap().insert(blob.digest, good);
    assert_equal(&walk(&open(registry, pushed, stored, &shared(None))), "afterwards");
}

#[test]
fn changed_layers_and_indexes_are_errors_and_never_wrong_bytes() {
    let tar = tar();
    for (compression, bytes, sealed) in [
        (Compression::None, tar.clone(), false),
        (Compression::Gzip, gzip(&tar, 6), false),
        (Compression::Gzip, gzip(&tar, 6), true),
        (Compression::Zstd, pieces(&tar, 300_000, frame), false),
        (Compression::Zstd, frame(&tar), true),
    ] {
        let stored = Stored::new(&tar, compression, bytes);
        let stored = [if sealed { stored.encrypted() } else { stored }];
        let registry = Arc::new(Registry::default());
        let pushed = index(&registry, &stored, sealed).unwrap();
        let size = stored[0].bytes.len();
        for at in [100, size / 3, size / 2] {
            attacked(&registry, &pushed, &stored, &pushed.layers[0], |bytes| bytes[at] ^= 4);
        }
        attacked(&registry, &pushed, &stored, &pushed.layers[0], |bytes| bytes.truncate(size / 2));
        // Windows come first, then extents and spans.
        let length = usize::try_from(pushed.pages.size).unwrap();
        for at in [length - 10, length / 2, length - 300] {
            attacked(&registry, &pushed, &stored, &pushed.pages, |bytes| bytes[at] ^= 1);
        }
        if compression == Compression::Gzip {
            attacked(&registry, &pushed, &stored, &pushed.pages, |bytes| bytes[40] ^= 1);
            // Windows in each other's place.
            attacked(&registry, &pushed, &stored, &pushed.pages, |bytes| bytes[..4000].rotate_left(1500));
        }
    }
}

#[test]
fn a_failing_registry_is_waited_for() {
    let tar = tar();
    let stored = [Stored::new(&tar, Compression::Gzip, gzip(&tar, 6))];
    let registry = Arc::new(Registry::default());
    let pushed = index(&registry, &stored, false).unwrap();
    let opened = open(&registry, &pushed, &stored, &shared(None));
    registry.failing.store(2, std::sync::atomic::Ordering::Relaxed);
    assert_equal(&walk(&opened), "after failures");
}

#[test]
fn the_same_layers_have_the_same_index() {
    let tar = tar();
    let made = |level| {
        let registry = Registry::default();
        let pushed = index(&registry, &[Stored::new(&tar, Compression::Gzip, gzip(&tar, level))], false).unwrap();
        (pushed.metadata, pushed.pages)
    };
    assert_eq!(made(6), made(6));
    assert_ne!(made(6), made(9));
}

#[test]
fn long_frames_are_decoded_into_files_once() {
    let tar = layer([Entry::file("first", noise(1, 3_000_000)), Entry::file("last", noise(2, 12_000_000))]);
    let stored = [Stored::new(&tar, Compression::Zstd, frame(&tar))];
    let registry = Arc::new(Registry::default());
    let pushed = index(&registry, &stored, false).unwrap();
    assert_eq!((pushed.report[0].spans, pushed.report[0].spooled), (1, tar.len() as u64));
    let opened = open(&registry, &pushed, &stored, &shared(None));
    let found = walk(&opened);
    assert!(found["/first"] == Ok(noise(1, 3_000_000)) && found["/last"] == Ok(noise(2, 12_000_000)));
    let requests = registry.requests.load(std::sync::atomic::Ordering::Relaxed);
    assert!(found == walk(&opened));
    assert_eq!(registry.requests.load(std::sync::atomic::Ordering::Relaxed), requests, "it is there now");
    // What comes before a changed byte is right, what comes after it is an error, also when it is asked for again.
    registry.blobs.lock().unwrap().get_mut(&pushed.layers[0].digest).unwrap()[9_000_000] ^= 1;
    let opened = open(&registry, &pushed, &stored, &Shared::new(Fetcher::new(None, Duration::ZERO)));
    for _ in 0..2 {
        let changed = walk(&opened);
        assert!(changed["/first"] == found["/first"] && changed["/last"].is_err());
    }
    registry.blobs.lock().unwrap().get_mut(&pushed.layers[0].digest).unwrap()[9_000_000] ^= 1;
    assert!(found == walk(&opened), "and when it is right again, it is read");
}

#[test]
fn a_sequential_reader_has_spans_fetched_ahead() {
    let text = |at| noise(at, 1_000_000).iter().map(|byte| b'a' + byte % 16).collect::<Vec<u8>>();
    let tar = layer((0..6).map(|at| Entry::file(format!("{at:02}"), text(at))).collect::<Vec<_>>());
    let stored = [Stored::new(&tar, Compression::Gzip, gzip(&tar, 6))];
    let registry = Arc::new(Registry::default());
    let pushed = index(&registry, &stored, false).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&registry, &pushed, &stored, &shared(Some(directory.path())));
    let size = opened.reader.size();
    let requests = || registry.requests.load(std::sync::atomic::Ordering::Relaxed);
    let (before, spans) = (requests(), pushed.report[0].spans);
    for offset in (0..size).step_by(128 << 10) {
        let length = usize::try_from((size - offset).min(128 << 10)).unwrap();
        opened.reader.read_at(offset, &mut vec![0; length]).unwrap();
    }
    let requests = requests() - before;
    assert!(requests * 2 < spans, "{requests} requests for {spans} spans");
}

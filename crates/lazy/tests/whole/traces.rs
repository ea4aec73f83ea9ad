//! Traces: what is read first is recorded, and fetched ahead of the next run, and no more than that.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nacre_lazy::{
    cache::Cache,
    erofs::FileType,
    fetch::{Fetcher, Wanted},
    format::{ChunkEntry, Method, TRACE_LIMIT},
    keys::Domain,
    reader::{Prefetched, Reader, Shared},
    trace::Recorder,
};
use nacre_testkit::Entry;

use crate::support::{Opened, Pushed, Registry, build, layer, noise, open, secret, shared};

/// Many files, of which some are read.
fn image() -> (Arc<Registry>, Pushed) {
    let registry = Arc::new(Registry::default());
    let files = (0..90u64).map(|number| Entry::file(format!("f{number:02}"), noise(number + 1, 30_000)));
    let sparse = Entry::sparse("sparse", 3_000_000, &[(1_000_000, b"in the middle")]);
    let pushed = build(&registry, Some(&Domain::new(&secret(1))), &[layer(files.chain([sparse]))]);
    (registry, pushed)
}

/// Reads files in pieces, as programs do.
fn read(image: &Opened) {
    let root = image.tree.inode(image.tree.root()).unwrap();
    for name in names() {
        let (nid, kind) = image.tree.lookup(&root, name.as_bytes()).unwrap().unwrap();
        assert_eq!(kind, FileType::Regular);
        let inode = image.tree.inode(nid).unwrap();
        let start = u64::from(inode.extent.unwrap().block) * 4096;
        let mut piece = vec![0; 20_000];
        for at in (0..inode.size).step_by(piece.len()) {
            let length = usize::try_from(inode.size - at).unwrap().min(piece.len());
            image.reader.read_at(start + at, &mut piece[..length]).unwrap();
        }
    }
}

/// The names of a third of the files, to and fro as programs read theirs.
fn names() -> Vec<String> {
    (0..30).map(|at| format!("f{:02}", 40 + at * 17 % 30)).chain(["sparse".to_owned(), "f00".to_owned()]).collect()
}

fn record(registry: &Arc<Registry>, pushed: &Pushed) -> Vec<u64> {
    let image = open(registry, pushed, &shared(None)).unwrap();
    let recorder = Arc::new(Recorder::default());
    image.reader.record(Arc::clone(&recorder));
    read(&image);
    read(&image);
    recorder.trace()
}

fn follow(reader: &Reader, trace: &[u64]) -> Prefetched {
    reader.prefetch(trace.to_vec()).unwrap()
}

fn stored(reader: &Reader) -> Vec<ChunkEntry> {
    let mut all = reader.entries().unwrap();
    all.retain(|entry| entry.method != Method::Zeroes.code());
    all
}

/// Where the chunks begin that the cache has.
fn cached(shared: &Shared, reader: &Reader) -> BTreeSet<u64> {
    let has = |entry: &ChunkEntry| {
        let blob = reader.blobs()[usize::from(entry.blob.get())];
        shared.fetcher.has(&[Wanted { blob, entry: *entry }])[0]
    };
    stored(reader).iter().filter(|entry| has(entry)).map(|entry| entry.offset.get()).collect()
}

fn small(directory: &Path, limit: u64) -> Arc<Shared> {
    Shared::new(Fetcher::new(Some(Cache::open(directory, limit).unwrap()), Duration::from_millis(300)))
}

#[test]
fn a_trace_has_the_chunks_that_were_read_in_the_order_of_their_first_use() {
    let (registry, pushed) = image();
    let trace = record(&registry, &pushed);
    let image = open(&registry, &pushed, &shared(None)).unwrap();
    let starts: BTreeSet<u64> = stored(&image.reader).iter().map(|entry| entry.offset.get()).collect();
    let once: BTreeSet<u64> = trace.iter().copied().collect();
    assert!(once.len() == trace.len() && once.is_subset(&starts) && once.len() < starts.len() / 2, "{trace:?}");
    // The first file that was read lies behind the last.
    assert!(trace.first() > trace.last(), "{trace:?}");
    assert_eq!(record(&registry, &pushed), trace);
}

#[test]
fn what_a_trace_names_is_fetched_ahead_and_nothing_else_is() {
    let (registry, pushed) = image();
    let trace = record(&registry, &pushed);
    let requests = || registry.requests.load(Ordering::Relaxed);
    let directory = tempfile::tempdir().unwrap();
    let shared = shared(Some(directory.path()));
    let image = open(&registry, &pushed, &shared).unwrap();
    let done = follow(&image.reader, &trace);
    let traced = stored(&image.reader).into_iter().filter(|entry| trace.contains(&entry.offset.get()));
    let bytes = traced.map(|entry| u64::from(entry.stored.get())).sum();
    assert_eq!(done, Prefetched { chunks: trace.len() as u64, bytes, cached: 0 });
    assert_eq!(cached(&shared, &image.reader), trace.iter().copied().collect());
    let fetched = requests();
    read(&image);
    assert_eq!(requests(), fetched, "what was fetched ahead is not fetched again");
    assert_eq!(follow(&image.reader, &trace), Prefetched { cached: trace.len() as u64, ..Prefetched::default() });
}

#[test]
fn hostile_traces_fetch_each_chunk_once_and_not_more_than_the_cache_holds() {
    let (registry, pushed) = image();
    let directory = tempfile::tempdir().unwrap();
    let shared = shared(Some(directory.path()));
    let image = open(&registry, &pushed, &shared).unwrap();
    let size = image.reader.size();
    let chunks = stored(&image.reader).len() as u64;
    let starts: Vec<u64> = stored(&image.reader).iter().map(|entry| entry.offset.get()).collect();
    // Every block, again and again, and places that are none.
    let hostile: Vec<u64> = (0..u64::from(TRACE_LIMIT))
        .map(|at| (at * 4096) % size + at % 2)
        .chain([size, u64::MAX])
        .chain(starts)
        .collect();
    let before = shared.fetcher.counters.fetched_bytes.load(Ordering::Relaxed);
    let done = follow(&image.reader, &hostile);
    assert_eq!(done.chunks + done.cached, chunks);
    let fetched = shared.fetcher.counters.fetched_bytes.load(Ordering::Relaxed) - before;
    assert!(fetched <= pushed.data[0].size, "{fetched} of {} bytes", pushed.data[0].size);

    let directory = tempfile::tempdir().unwrap();
    let limit = 1 << 20;
    let image = open(&registry, &pushed, &small(directory.path(), limit)).unwrap();
    let done = follow(&image.reader, &hostile);
    assert!(done.bytes > limit / 3 && done.bytes <= limit / 2, "{done:?}");
    // Without a cache there is nowhere to put it.
    let image = open(&registry, &pushed, &crate::support::shared(None)).unwrap();
    assert_eq!(follow(&image.reader, &hostile), Prefetched::default());
}

#[test]
fn fetching_ahead_ends_when_the_source_fails() {
    let (registry, pushed) = image();
    let trace = record(&registry, &pushed);
    let directory = tempfile::tempdir().unwrap();
    let image = open(&registry, &pushed, &small(directory.path(), 1 << 30)).unwrap();
    image.reader.entries().unwrap();
    registry.failing.store(u32::MAX, Ordering::Relaxed);
    let start = Instant::now();
    let error = image.reader.prefetch(trace.clone()).unwrap_err().to_string();
    assert!(error.contains("connection was reset") && start.elapsed() < Duration::from_secs(5), "{error}");
    registry.failing.store(0, Ordering::Relaxed);
    assert_eq!(follow(&image.reader, &trace).chunks, trace.len() as u64);
}

#[test]
fn a_request_brings_what_lies_beside_what_a_read_misses_and_little_in_vain() {
    let (registry, pushed) = image();
    let fetch = |which: &dyn Fn(usize, usize) -> Option<usize>| {
        let directory = tempfile::tempdir().unwrap();
        let shared = shared(Some(directory.path()));
        let image = open(&registry, &pushed, &shared).unwrap();
        let chunks = stored(&image.reader);
        let counters = &shared.fetcher.counters;
        let (mut read, mut touched) = (0, 0);
        for chunk in (0..chunks.len()).filter_map(|at| Some(&chunks[which(at, chunks.len())?])) {
            image.reader.read_at(chunk.offset.get(), &mut [0; 512]).unwrap();
            (read, touched) = (read + 1, touched + u64::from(chunk.stored.get()));
        }
        let [requests, bytes] = [&counters.requests, &counters.fetched_bytes].map(|one| one.load(Ordering::Relaxed));
        (read, touched, requests, bytes)
    };
    // All chunks, in an order that no sequential reader has.
    let (read, touched, requests, bytes) = fetch(&|at, chunks| Some(at * 7 % chunks));
    assert!(requests * 3 < read * 2 && bytes < touched + (64 << 10), "{requests} requests for {read} chunks");
    // Chunks that lie apart: few are guessed in vain.
    let (_, touched, _, bytes) = fetch(&|at, _| (at % 9 == 0).then_some(at));
    assert!(bytes < touched + touched / 7 + (640 << 10), "{bytes} bytes for {touched}");
}

//! What the parts of `cargo xtask bench lazy` are made of that need no program: builds an image of a tar into a directory, and reads it.
//!
//! `bench build TAR DIR [LEVEL] [CHUNK] [THREADS]`, `bench read DIR CACHE`: figures go to standard output.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that cannot go on may panic, and prints")]

use std::{
    convert::Infallible,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_core::{Algorithm, Digest, Hasher, SecretArray};
use nacre_lazy::{
    build::{BuildOptions, Builder, Built, CHUNK, DataBlob, LEVEL},
    fetch::Fetcher,
    image::{Metadata, Table},
    keys::{Domain, MetadataKey},
    reader::{Reader, Shared},
    source::{BlobId, Blobs, SourceError},
};
use nacre_oci::unpack::Limits;

struct Directory(PathBuf);

impl Directory {
    fn put(&self, from: &mut dyn Read) -> DataBlob {
        let (mut hasher, mut size) = (Hasher::new(Algorithm::Sha256), 0);
        let temporary = self.0.join("new");
        let mut out = File::create(&temporary).unwrap();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = from.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            hasher.update(&buffer[..length]);
            io::Write::write_all(&mut out, &buffer[..length]).unwrap();
            size += length as u64;
        }
        let digest = hasher.finish();
        std::fs::rename(temporary, self.0.join(digest.hex())).unwrap();
        DataBlob { digest: digest.as_bytes().try_into().unwrap(), size }
    }
}

impl Blobs for Directory {
    fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8], _attempt: u32) -> Result<(), SourceError> {
        File::open(self.0.join(blob.hex())).and_then(|file| file.read_exact_at(out, offset)).map_err(|error| {
            SourceError { blob: *blob, range: offset..offset, reason: error.to_string(), temporary: false }
        })
    }
}

fn build(tar: &str, directory: &Path, level: i32, chunk: u32, threads: usize) {
    std::fs::create_dir_all(directory).unwrap();
    let store = Directory(directory.to_owned());
    let domain = Domain::new(&SecretArray::fill(|slot| slot.fill(1)));
    let limits = Limits::default();
    let start = Instant::now();
    let mut builder =
        Builder::new::<Infallible>(BuildOptions { domain: Some(&domain), level, chunk, threads, limits: &limits })
            .unwrap();
    let mut tar = File::open(tar).unwrap();
    builder.layer(&mut tar, |blob: &mut dyn Read| Ok::<_, Infallible>(store.put(blob))).unwrap();
    let layers = start.elapsed();
    let Built { mut metadata, mut table, blobs, key, report } = builder.finish::<Infallible>(b"{}").unwrap();
    let (metadata, table) = (store.put(&mut metadata), store.put(&mut table));
    let key = key.unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let name = |blob: &DataBlob| format!("{} {}", hex(&blob.digest), blob.size);
    let lines: Vec<String> = [name(&metadata), name(&table)].into_iter().chain(blobs.iter().map(name)).collect();
    std::fs::write(directory.join("image"), format!("{}\n{}\n", hex(key.expose()), lines.join("\n"))).unwrap();
    println!("layers {layers:?}, all {:?}; {report:?}", start.elapsed());
}

fn bytes(hex: &str) -> [u8; 32] {
    std::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
}

fn read(directory: &Path) {
    let text = std::fs::read_to_string(directory.join("image")).unwrap();
    let mut lines = text.lines();
    let key = MetadataKey::new(SecretArray::fill(|slot| *slot = bytes(lines.next().unwrap())));
    let blobs: Vec<BlobId> = lines
        .map(|line| {
            let (digest, size) = line.split_once(' ').unwrap();
            BlobId { digest: bytes(digest), size: size.parse().unwrap() }
        })
        .collect();
    let store: Arc<dyn Blobs> = Arc::new(Directory(directory.to_owned()));
    let start = Instant::now();
    let mut erofs = File::create(directory.join("erofs")).unwrap();
    let mut blob = File::open(directory.join(blobs[0].hex())).unwrap();
    let digest = Digest::from_raw(Algorithm::Sha256, &blobs[0].digest).unwrap();
    let metadata = Metadata::read(&mut blob, &digest, Some(&key), &mut erofs).unwrap();
    println!("metadata of {} bytes in {:?}", metadata.summary.erofs_bytes, start.elapsed());
    let (table, summary, data) = Table::new(metadata, blobs[1]);
    let shared = Shared::new(Fetcher::new(None, Duration::from_secs(1)));
    let reader = Reader::new(shared, store, table, summary, data);
    let (start, mut at, mut buffer) = (Instant::now(), 0, vec![0; 1 << 20]);
    while at < reader.size() {
        let length = usize::try_from((reader.size() - at).min(1 << 20)).unwrap();
        reader.read_at(at, &mut buffer[..length]).unwrap();
        at += length as u64;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("sequential: {:.0} MB/s", reader.size() as f64 / 1e6 / seconds);
    let (start, mut state) = (Instant::now(), 1u64);
    for _ in 0..5000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = (state >> 20) % (reader.size() / 4096);
        reader.read_at(block * 4096, &mut buffer[..4096]).unwrap();
    }
    println!("random 4 KiB: {:.0} a second", 5000.0 / start.elapsed().as_secs_f64());
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u32| arguments.get(at).map_or(default, |text| text.parse().unwrap());
    match arguments.first().map(String::as_str) {
        Some("build") => {
            let level = arguments.get(3).map_or(LEVEL, |text| text.parse().unwrap());
            let threads = usize::try_from(number(5, 2)).unwrap();
            build(&arguments[1], Path::new(&arguments[2]), level, number(4, CHUNK), threads);
        }
        _ => read(Path::new(&arguments[1])),
    }
}

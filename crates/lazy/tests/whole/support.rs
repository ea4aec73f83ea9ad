//! Blobs in memory, and an image that is built of layers and opened again.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io::Read,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use nacre_core::{Digest, SecretArray};
use nacre_lazy::{
    build::{BuildOptions, Builder, Built, DataBlob, Report},
    cache::Cache,
    erofs::{FileType, Image, Inode},
    fetch::Fetcher,
    image::{Metadata, OpenError, Table},
    keys::{Domain, MetadataKey},
    reader::{Reader, Shared},
    source::{BlobId, Blobs, SourceError},
};
use nacre_oci::unpack::Limits;
use nacre_testkit::{Entry, Layer};

/// A registry in memory, whose answers can be changed.
#[derive(Default)]
pub(crate) struct Registry {
    pub(crate) blobs: Mutex<HashMap<[u8; 32], Vec<u8>>>,
    /// So many requests fail before one succeeds.
    pub(crate) failing: AtomicU32,
    pub(crate) requests: AtomicU64,
}

impl Registry {
    pub(crate) fn put(&self, bytes: Vec<u8>) -> BlobId {
        let id = BlobId { digest: Digest::sha256(&bytes).as_bytes().try_into().unwrap(), size: bytes.len() as u64 };
        self.blobs.lock().unwrap().insert(id.digest, bytes);
        id
    }

    pub(crate) fn get(&self, blob: &BlobId) -> Vec<u8> {
        self.blobs.lock().unwrap()[&blob.digest].clone()
    }
}

impl Blobs for Registry {
    fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8], _attempt: u32) -> Result<(), SourceError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let range = offset..offset + out.len() as u64;
        let failed = |reason: &str, temporary| SourceError {
            blob: *blob,
            range: range.clone(),
            reason: reason.into(),
            temporary,
        };
        if self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(failed("the connection was reset", true));
        }
        let blobs = self.blobs.lock().unwrap();
        let bytes = blobs.get(&blob.digest).ok_or_else(|| failed("not found", false))?;
        let from = usize::try_from(offset).unwrap();
        let from = bytes.get(from..from + out.len()).ok_or_else(|| failed("the blob is shorter", false))?;
        out.copy_from_slice(from);
        Ok(())
    }
}

/// The names of an image that was pushed.
pub(crate) struct Pushed {
    pub(crate) metadata: BlobId,
    pub(crate) table: BlobId,
    pub(crate) data: Vec<BlobId>,
    pub(crate) key: Option<MetadataKey>,
    pub(crate) report: Report,
}

pub(crate) fn secret(byte: u8) -> SecretArray<32> {
    SecretArray::fill(|slot| slot.fill(byte))
}

pub(crate) fn layer(entries: impl IntoIterator<Item = Entry>) -> Vec<u8> {
    Layer::of(entries).tar().to_vec()
}

pub(crate) const CONFIG: &[u8] = br#"{"config":{"Env":["SECRET=value-of-config"]}}"#;

pub(crate) fn build(registry: &Arc<Registry>, domain: Option<&Domain>, layers: &[Vec<u8>]) -> Pushed {
    build_with(registry, domain, layers, |_| {})
}

pub(crate) fn build_with(
    registry: &Arc<Registry>,
    domain: Option<&Domain>,
    layers: &[Vec<u8>],
    prepare: impl FnOnce(&mut Builder<'_>),
) -> Pushed {
    let limits = Limits::default();
    let options = BuildOptions { domain, level: 3, chunk: 16 << 10, threads: 3, limits: &limits };
    let mut builder = Builder::new::<Infallible>(options).unwrap();
    prepare(&mut builder);
    for tar in layers {
        builder
            .layer(&mut tar.as_slice(), |blob: &mut dyn Read| {
                let mut bytes = Vec::new();
                blob.read_to_end(&mut bytes).unwrap();
                let id = registry.put(bytes);
                Ok::<_, Infallible>(DataBlob { digest: id.digest, size: id.size })
            })
            .unwrap();
    }
    let Built { mut metadata, mut table, blobs, key, report } = builder.finish::<Infallible>(CONFIG).unwrap();
    let put = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        registry.put(bytes)
    };
    Pushed {
        metadata: put(&mut metadata),
        table: put(&mut table),
        data: blobs.iter().map(|blob| BlobId { digest: blob.digest, size: blob.size }).collect(),
        key,
        report,
    }
}

/// An image that was opened.
pub(crate) struct Opened {
    pub(crate) reader: Reader,
    pub(crate) tree: Image<std::fs::File>,
    pub(crate) config: Vec<u8>,
}

pub(crate) fn shared(cache: Option<&Path>) -> Arc<Shared> {
    let cache = cache.map(|directory| Cache::open(directory, 1 << 30).unwrap());
    Shared::new(Fetcher::new(cache, Duration::from_millis(700)))
}

pub(crate) fn open(registry: &Arc<Registry>, pushed: &Pushed, shared: &Arc<Shared>) -> Result<Opened, OpenError> {
    let mut erofs = tempfile::tempfile().unwrap();
    let blob = registry.get(&pushed.metadata);
    let digest = Digest::from_raw(nacre_core::Algorithm::Sha256, &pushed.metadata.digest).unwrap();
    let metadata = Metadata::read(&mut blob.as_slice(), &digest, pushed.key.as_ref(), &mut erofs)?;
    metadata.check_blobs(&pushed.data)?;
    let config = metadata.config.clone();
    let (table, summary, blobs) = Table::new(metadata, pushed.table);
    let source: Arc<dyn Blobs> = Arc::clone(registry) as _;
    let reader = Reader::new(Arc::clone(shared), source, table, summary, blobs);
    Ok(Opened { reader, tree: Image::open(erofs).unwrap(), config })
}

/// What a name of a tree leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Directory(u16),
    File(u16, Result<Vec<u8>, String>),
    Symlink(Vec<u8>),
    Other(FileType),
}

/// Everything in an image.
pub(crate) fn walk(image: &Opened) -> BTreeMap<String, Found> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![(String::new(), image.tree.root())]);
    while let Some((path, nid)) = todo.pop() {
        let inode = image.tree.inode(nid).unwrap();
        let what = match inode.file_type {
            FileType::Directory => {
                let mut children = Vec::new();
                image
                    .tree
                    .read_dir(&inode, 0, |entry| {
                        if entry.name != b"." && entry.name != b".." {
                            children.push((String::from_utf8_lossy(entry.name).into_owned(), entry.nid));
                        }
                        true
                    })
                    .unwrap();
                todo.extend(children.into_iter().map(|(name, nid)| (format!("{path}/{name}"), nid)));
                Found::Directory(inode.mode)
            }
            FileType::Regular => Found::File(inode.mode, content(image, &inode)),
            FileType::Symlink => Found::Symlink(image.tree.read_link(&inode).unwrap()),
            other => Found::Other(other),
        };
        found.insert(path, what);
    }
    found
}

fn content(image: &Opened, inode: &Inode) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xEE; usize::try_from(inode.size).unwrap()];
    if let Some(extent) = inode.extent {
        // In pieces of odd sizes, as readers do.
        let mut at = 0;
        for length in [1000, 4096, 70_000, 131_072].into_iter().cycle() {
            let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) else { break };
            let length = length.min(rest.len());
            let offset = u64::from(extent.block) * 4096 + at as u64;
            image.reader.read_at(offset, &mut rest[..length]).map_err(|error| error.to_string())?;
            at += length;
        }
    }
    Ok(bytes)
}

pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) | 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        })
        .collect()
}

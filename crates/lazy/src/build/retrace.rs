//! An image with a trace: the same blobs of data and the same tree, metadata that says what is read first, and another key.
//!
//! The key of an image seals one metadata stream. A stream with another trace needs another key, which is derived from the first one and
//! the trace; so the table, whose content stays, is sealed anew as well.

use std::{
    fs::File,
    io::{self, Seek as _, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use zerocopy::{IntoBytes as _, little_endian as le};

use super::{
    metadata::{Sections, write_sections},
    ship::{Pieces, manifest_of},
};
use crate::{
    artifact::{Artifact, ImageBlobs, blob_id, read_metadata},
    chunk::sha256,
    fetch::Fetcher,
    format::{BlobEntry, DATA_TYPE, FormatError, SEALED, Summary, TRACE_LIMIT},
    image::{Metadata, OpenError, TableError},
    keys::MetadataKey,
    table::Leaf,
    table::LeafSealer,
    trace,
};
use nacre_oci::{
    copy::{CopyError, Remade, Remake, Remaking},
    manifest::{Descriptor, Manifest},
    source::ImageSource,
};

/// Why an image got no trace.
#[derive(Debug, thiserror::Error)]
pub enum RetraceError {
    /// The metadata cannot be read.
    #[error("the metadata of the lazy image: {0}")]
    Open(#[from] OpenError),
    /// The table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The trace is not one of this image, or has too many places.
    #[error(transparent)]
    Trace(#[from] FormatError),
    /// A file could not be read or written.
    #[error("the metadata with the trace: {0}")]
    Io(#[from] io::Error),
    /// It was made for an image that it is not given.
    #[error("the image to be given a trace is not the one that was traced")]
    Other,
}

/// What is new of an image with a trace.
pub struct Retraced {
    /// The metadata blob: rewound.
    pub metadata: File,
    /// The table blob: rewound.
    pub table: File,
    /// What opens them; `None` for an image that is not sealed.
    pub key: Option<MetadataKey>,
}

/// Gives an image a trace, in the place of the one that it has. `old` is what its metadata blob says, `erofs` the file of the EROFS image
/// in it, `key` what opened it; `leaf` gives the entries of its table, leaf by leaf.
///
/// The same image and the same trace give the same bytes.
///
/// # Errors
/// [`RetraceError`]
pub fn retrace(
    old: &Metadata,
    erofs: &mut File,
    key: Option<&MetadataKey>,
    trace: &[u64],
    mut leaf: impl FnMut(u32) -> Result<Leaf, TableError>,
) -> Result<Retraced, RetraceError> {
    trace::check(trace, &old.summary)?;
    let places = u32::try_from(trace.len()).ok().filter(|places| *places <= TRACE_LIMIT);
    let places = places.ok_or(FormatError::field("trace", "places", trace.len() as u64, "at most 1048576"))?;
    let summary = Summary { trace: places.into(), ..old.summary };
    let trace: Vec<le::U64> = trace.iter().map(|place| le::U64::new(*place)).collect();
    let key = key.map(|key| key.traced(&sha256(trace.as_bytes())));

    let (mut table, mut leaves) = (tempfile::tempfile()?, Vec::new());
    let mut sealer = LeafSealer::new(key.as_ref());
    for number in 0..summary.leaves.get() {
        let (stored, entry) = sealer.seal(&leaf(number)?);
        table.write_all(&stored)?;
        leaves.push(entry);
    }
    table.rewind()?;
    let blobs: Vec<BlobEntry> =
        old.blobs.iter().map(|blob| BlobEntry { digest: blob.digest, size: blob.size.into() }).collect();
    let sections = Sections { summary: &summary, blobs: &blobs, leaves: &leaves, config: &old.config, trace: &trace };
    let metadata = write_sections(&sections, erofs, key.as_ref())?;
    Ok(Retraced { metadata, table, key })
}

/// How long the table is waited for where its source fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a leaf is asked for that comes wrong.
const ATTEMPTS: u32 = 4;

/// Gives one image a trace on its way to a destination.
pub struct LazyRetrace {
    /// Where the image is.
    pub source: Arc<dyn ImageSource>,
    /// What it consists of.
    pub artifact: Artifact,
    /// What opens it.
    pub key: Option<MetadataKey>,
    /// Where its names may be for a moment, in a file without a name: trusted.
    pub directory: PathBuf,
    /// What is to be read first.
    pub trace: Vec<u64>,
}

fn failed(error: impl Into<RetraceError>) -> CopyError {
    CopyError::Remake(Box::new(error.into()))
}

impl LazyRetrace {
    fn make(&self) -> Result<Retraced, RetraceError> {
        let mut erofs = tempfile::tempfile_in(&self.directory)?;
        let old = read_metadata(&*self.source, &self.artifact, self.key.as_ref(), &mut erofs, None)?;
        old.check_blobs(&self.artifact.blobs())?;
        let blob = self.artifact.table_blob();
        let blobs = ImageBlobs::new(Arc::clone(&self.source), &self.artifact);
        let fetcher = Fetcher::new(None, PATIENCE);
        let leaf = |leaf| {
            let range = old.leaves().range(leaf);
            let mut stored = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
            let mut attempt = 0;
            loop {
                fetcher.read(&blobs, &blob, range.start, &mut stored, attempt)?;
                attempt += 1;
                match old.leaves().open(leaf, stored.clone()) {
                    Err(error) if attempt < ATTEMPTS => tracing::warn!("{blob}: {error}; it is asked for again"),
                    opened => return Ok(opened?),
                }
            }
        };
        retrace(&old, &mut erofs, self.key.as_ref(), &self.trace, leaf)
    }
}

impl Remake for LazyRetrace {
    fn wants(&self, manifest: &Manifest, _artifact: bool) -> bool {
        crate::artifact::is_lazy(manifest)
    }

    fn remake(&self, image: &Remaking<'_>) -> Result<Remade, CopyError> {
        let unsupported = |problem: &str| Err(CopyError::Unsupported(problem.into()));
        match (&self.key, image.recipients()) {
            (Some(_), None) => {
                return unsupported("the image is encrypted, and gets another key: say for whom with --encrypt");
            }
            (None, Some(_)) => {
                return unsupported(
                    "the image is not encrypted: that is done where it is made, by `image copy --lazy`",
                );
            }
            _ => {}
        }
        if Artifact::parse(image.manifest()).ok().and_then(|artifact| blob_id(&artifact.metadata))
            != blob_id(&self.artifact.metadata)
        {
            return Err(failed(RetraceError::Other));
        }
        let Retraced { metadata, table, key } = self.make().map_err(failed)?;
        let data_type = format!("{DATA_TYPE}{}", if key.is_some() { SEALED } else { "" });
        let (mut data, mut reused) = (Vec::new(), Vec::new());
        for layer in &self.artifact.data {
            reused.push(image.copy(layer)?);
            data.push(Descriptor::new(&data_type, layer.digest, layer.size));
        }
        manifest_of(image, Pieces { metadata, table, key: key.as_ref(), data, reused })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        convert::Infallible,
        io::{Cursor, Read},
    };

    use nacre_core::{Algorithm, Digest, SecretArray, aead::AeadKey};
    use nacre_oci::unpack::Limits;

    use super::*;
    use crate::{
        build::{BuildOptions, Builder, DataBlob},
        format::{Cipher, Header, LEAF_ENTRIES},
        keys::{Domain, Part, counter},
    };

    /// An image's metadata, table and key.
    struct Image {
        metadata: Vec<u8>,
        table: Vec<u8>,
        key: Option<MetadataKey>,
    }

    fn bytes(mut file: File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// What does not compress, and is nowhere equal.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed << 1 | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        (0..length).map(|_| next()).collect()
    }

    /// An image with some leaves of chunks, and a config that fills some frames.
    fn built(domain: Option<&Domain>) -> Image {
        let files = (0..15).map(|file| nacre_testkit::Entry::file(format!("f{file}"), noise(file, 400_000)));
        let mut tar = nacre_testkit::Layer::of(files).tar().to_vec();
        let limits = Limits::default();
        let options = BuildOptions { domain, level: 1, chunk: 16 << 10, threads: 2, limits: &limits };
        let mut builder = Builder::new::<Infallible>(options).unwrap();
        let upload = |blob: &mut dyn Read| {
            let mut bytes = Vec::new();
            blob.read_to_end(&mut bytes).unwrap();
            Ok::<_, Infallible>(DataBlob { digest: sha256(&bytes), size: bytes.len() as u64 })
        };
        builder.layer(&mut Cursor::new(&mut tar), upload).unwrap();
        let built = builder.finish::<Infallible>(&noise(99, 600_000)).unwrap();
        Image { metadata: bytes(built.metadata), table: bytes(built.table), key: built.key }
    }

    fn opened(image: &Image) -> (Metadata, File) {
        let mut erofs = tempfile::tempfile().unwrap();
        let digest = Digest::from_raw(Algorithm::Sha256, &sha256(&image.metadata)).unwrap();
        let metadata = Metadata::read(&mut image.metadata.as_slice(), &digest, image.key.as_ref(), &mut erofs);
        (metadata.unwrap(), erofs)
    }

    fn entries(metadata: &Metadata, image: &Image, leaf: u32) -> Leaf {
        let range = metadata.leaves().range(leaf);
        let place = |at| usize::try_from(at).unwrap();
        let stored = image.table[place(range.start)..place(range.end)].to_vec();
        metadata.leaves().open(leaf, stored).unwrap()
    }

    fn traced(image: &Image, trace: &[u64]) -> Result<Image, RetraceError> {
        let (metadata, mut erofs) = opened(image);
        let leaf = |leaf| Ok(entries(&metadata, image, leaf));
        let Retraced { metadata, table, key } = retrace(&metadata, &mut erofs, image.key.as_ref(), trace, leaf)?;
        Ok(Image { metadata: bytes(metadata), table: bytes(table), key })
    }

    /// A key, and a nonce's number.
    type Used = ([u8; 32], u64);

    /// What is sealed in an image: key and nonce, and the ciphertext.
    fn sealed(image: &Image) -> Vec<(Used, Vec<u8>)> {
        let key = image.key.as_ref().unwrap();
        let mut found = Vec::new();
        let mut frames = &image.metadata[size_of::<Header>()..];
        for number in 0.. {
            let Some((head, rest)) = frames.split_at_checked(5) else { break };
            let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) & !(1 << 31);
            let (payload, rest) = rest.split_at(length as usize);
            found.push(((*key.derive(Part::Frames).expose(), number), payload.to_vec()));
            frames = rest;
        }
        let leaf = LEAF_ENTRIES * size_of::<crate::format::ChunkEntry>() + Cipher::Aes256Gcm.overhead();
        for (number, payload) in (0..).zip(image.table.chunks(leaf)) {
            found.push(((*key.derive(Part::Leaves).expose(), number), payload.to_vec()));
        }
        found
    }

    #[test]
    fn no_key_and_nonce_seal_two_messages_whatever_is_traced() {
        let domain = Domain::new(&SecretArray::fill(|slot| slot.fill(1)));
        let plain = built(Some(&domain));
        let one = traced(&plain, &[4096, 0]).unwrap();
        let other = traced(&plain, &[0, 4096]).unwrap();
        let images = [
            traced(&plain, &[]).unwrap(),
            traced(&one, &[0, 4096]).unwrap(),
            traced(&one, &[4096, 0]).unwrap(),
            traced(&one, &[]).unwrap(),
            plain,
            one,
            other,
        ];
        let mut seen: HashMap<Used, Vec<u8>> = HashMap::new();
        for image in &images {
            let all = sealed(image);
            assert!(all.len() > 4 && image.table.len() > 17_000, "there are several frames and leaves");
            for (nonce, message) in all {
                assert!(seen.insert(nonce, message).is_none(), "a key and a nonce are used again");
            }
        }
        // And what is there is what is meant: it opens with those keys, and nothing else does.
        let (nonce, mut message) = sealed(&images[5]).pop().unwrap();
        AeadKey::from_bytes(&nonce.0).open(counter(nonce.1), b"leaf", &mut message).unwrap();
    }

    #[test]
    fn the_same_image_and_trace_give_the_same_bytes_and_only_the_trace_is_new() {
        let domain = Domain::new(&SecretArray::fill(|slot| slot.fill(1)));
        for domain in [Some(&domain), None] {
            let image = built(domain);
            let trace: Vec<u64> = (0..1400).rev().map(|at| at * 4096).collect();
            let (first, second) = (traced(&image, &trace).unwrap(), traced(&image, &trace).unwrap());
            assert!(first.metadata == second.metadata && first.table == second.table);
            assert_ne!(first.metadata, image.metadata);
            assert_eq!(first.table == image.table, domain.is_none(), "a table in the clear stays as it is");
            let ((old, mut old_tree), (new, mut new_tree)) = (opened(&image), opened(&first));
            assert_eq!(new.trace, trace);
            assert!(old.blobs == new.blobs && old.config == new.config);
            for leaf in 0..old.summary.leaves.get() {
                assert!(entries(&old, &image, leaf)[..] == entries(&new, &first, leaf)[..]);
            }
            let read = |file: &mut File| {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).unwrap();
                bytes
            };
            assert!(read(&mut old_tree) == read(&mut new_tree));
        }
    }

    #[test]
    fn a_trace_of_another_image_or_too_long_a_one_is_refused() {
        let image = built(None);
        let device = opened(&image).0.summary.device_bytes.get();
        assert!(matches!(traced(&image, &[device]), Err(RetraceError::Trace(_))));
        assert!(matches!(traced(&image, &vec![0; TRACE_LIMIT as usize + 1]), Err(RetraceError::Trace(_))));
        traced(&image, &vec![0; TRACE_LIMIT as usize]).unwrap();
    }
}

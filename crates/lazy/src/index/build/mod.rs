//! Making an index of an image's layers, from the lowest up, in one pass over what is stored.
//!
//! Three threads share the work on a layer: [`scan`] decompresses and says where decoding may start again, [`files`] reads the tar,
//! checks its digest and notes where the files are, [`spans`] decodes every span once more by what a reader will know, and notes only
//! what gave the same bytes. So an index that was made can be read.

mod files;
mod scan;
mod ship;
mod spans;
mod write;

use std::{
    fs::File,
    io::{self, BufWriter, Read},
    sync::mpsc::sync_channel,
    thread,
};

use nacre_core::{Digest, Task};
use nacre_oci::{copy::StoredLayer, crypt::CryptError, manifest::Compression, unpack::Limits};

use super::{
    decode::DecodeError,
    format::{Extent, LayerEntry, Span},
};
use crate::{
    build::BuildError,
    erofs::{Tree, WriteError},
    keys::MetadataKey,
};
use files::Files;
use spans::Windows;

pub use ship::{IndexRemake, IndexReport};

/// The default of [`IndexBuilder::new`]'s `span`.
pub const SPAN: u64 = 2 << 20;

/// Why an index was not made.
#[derive(Debug, thiserror::Error)]
pub enum IndexBuildError {
    /// A setting is out of its range.
    #[error("the size of spans is {0}; it may be from 256 KiB to 4 MiB")]
    Setting(u64),
    /// The layer could not be read.
    #[error("reading the layer failed: {0}")]
    Read(#[source] io::Error),
    /// The layer is not what it was encrypted from.
    #[error("decrypting the layer failed: {0}")]
    Crypt(#[from] CryptError),
    /// What is compressed is damaged.
    #[error("the layer's compressed data, byte {place} on: {source}")]
    Compressed {
        /// Near which byte of the blob.
        place: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// It ends too early.
    #[error("the layer's compressed data end in the middle")]
    Truncated,
    /// The tar is refused.
    #[error(transparent)]
    Tar(BuildError<io::Error>),
    /// The tar is another one than the config says.
    #[error("the uncompressed layer has the digest {found}; the image's config says {expected}")]
    DiffId {
        /// As it is.
        found: Digest,
        /// As it must be.
        expected: Digest,
    },
    /// A span does not decode to what the whole layer did.
    #[error(
        "the layer's bytes from {place} on do not decode by themselves to what they are in the whole; this is a bug, or a layer that only one decoder reads"
    )]
    Verify {
        /// The first byte.
        place: u64,
    },
    /// The metadata could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A temporary file could not be used.
    #[error("a temporary file for the index: {0}")]
    Spool(#[source] io::Error),
    /// Too much of everything.
    #[error("the image is too large for an index: {0}")]
    Large(&'static str),
    /// A thread ended; its own error says why.
    #[error("indexing was stopped")]
    Stopped,
}

/// What a layer came to.
#[derive(Clone, Copy, Debug)]
pub struct IndexedLayer {
    /// The digest of its blob.
    pub digest: Digest,
    /// Bytes of its blob.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Bytes of its tar.
    pub tar_bytes: u64,
    /// Spans.
    pub spans: u64,
    /// Bytes of tar in the longest one.
    pub longest: u64,
    /// Bytes of tar in those that are too long for memory: a reader decodes them from their beginning on, into a file.
    pub spooled: u64,
}

/// An index in the making.
pub struct IndexBuilder<'a> {
    key: Option<&'a MetadataKey>,
    span: u64,
    limits: &'a Limits,
    tree: Tree,
    extents: Vec<Extent>,
    device_bytes: u64,
    spans: Vec<Span>,
    windows: Windows,
    layers: Vec<LayerEntry>,
    tar_bytes: u64,
    content_bytes: u64,
}

/// A finished index: what its manifest names.
pub struct Built {
    /// The metadata blob: rewound.
    pub metadata: File,
    /// Windows and pages: rewound.
    pub pages: File,
    /// Bytes of the metadata blob.
    pub metadata_bytes: u64,
    /// Bytes of windows and pages.
    pub pages_bytes: u64,
    /// Bytes of the windows among them.
    pub window_bytes: u64,
    /// Bytes of all files.
    pub content_bytes: u64,
}

impl<'a> IndexBuilder<'a> {
    /// Begins an index that is sealed with a key, which must be a new one, or is in the clear. A span has about `span` bytes of tar, where
    /// the layer's compression lets it.
    ///
    /// # Errors
    /// [`IndexBuildError::Setting`], [`IndexBuildError::Spool`]
    pub fn new(key: Option<&'a MetadataKey>, span: u64, limits: &'a Limits) -> Result<Self, IndexBuildError> {
        if !(256 << 10..=4 << 20).contains(&span) {
            return Err(IndexBuildError::Setting(span));
        }
        let file = tempfile::tempfile().map_err(IndexBuildError::Spool)?;
        Ok(Self {
            key,
            span,
            limits,
            tree: Tree::new(),
            extents: Vec::new(),
            device_bytes: 0,
            spans: Vec::new(),
            windows: Windows::new(BufWriter::new(file), key),
            layers: Vec::new(),
            tar_bytes: 0,
            content_bytes: 0,
        })
    }

    /// Adds a layer on top. `stored` gives its blob's bytes, whose digest the caller checks, and throws the index away where it is wrong.
    ///
    /// # Errors
    /// [`IndexBuildError`]
    pub fn layer(
        &mut self,
        stored: &mut dyn Read,
        layer: StoredLayer<'_>,
        task: &dyn Task,
    ) -> Result<IndexedLayer, IndexBuildError> {
        let number =
            u16::try_from(self.layers.len()).map_err(|_| IndexBuildError::Large("it has more than 4096 layers"))?;
        let (base, first) = (self.tar_bytes, self.spans.len());
        let StoredLayer { descriptor, compression, diff_id, secret } = layer;
        let (decryptor, parts) = secret.unzip();
        let scan = scan::Scan::new(compression, number, base, self.span)
            .map_err(|source| IndexBuildError::Compressed { place: 0, source })?;
        let (to_files, tar) = sync_channel(8);
        let (to_spans, jobs) = sync_channel(2);
        let (spans, windows) = (&mut self.spans, &mut self.windows);
        let files = Files { extents: &mut self.extents, next: &mut self.device_bytes, base };
        let (tree, limits) = (&mut self.tree, self.limits);
        let (scanned, read, noted) = thread::scope(|scope| {
            let reading = scope.spawn(move || files::read(tree, files, limits, tar, diff_id));
            let noting = scope.spawn(move || spans::note(spans, windows, jobs));
            let scanned = scan.run(stored, decryptor, &to_files, &to_spans);
            // Both end when nothing more can come; what was cut off is not taken for the end.
            let ended = scanned.is_ok();
            let _ = to_files.send(if ended { files::Piece::End } else { files::Piece::Failed });
            drop((to_files, to_spans));
            (scanned, join(reading), join(noting))
        });
        // Whoever stopped the others says why.
        match (scanned, read, noted) {
            (Err(error), ..) if !matches!(error, IndexBuildError::Stopped) => return Err(error),
            (_, Err(error), _) if !matches!(error, IndexBuildError::Stopped) => return Err(error),
            (_, _, Err(error)) | (Err(error), ..) | (_, Err(error), _) => return Err(error),
            (Ok(tar_bytes), Ok(content), Ok(())) => {
                self.tar_bytes = base + tar_bytes;
                self.content_bytes += content.bytes;
            }
        }
        task.done("indexed");
        let tar_bytes = self.tar_bytes - base;
        self.layers.push(LayerEntry {
            digest: descriptor
                .digest
                .as_bytes()
                .try_into()
                .map_err(|_| IndexBuildError::Large("a layer is named by another digest than SHA-256"))?,
            size: descriptor.size.into(),
            tar_bytes: tar_bytes.into(),
            key: parts.as_ref().map_or([0; 32], |parts| parts.name()),
        });
        let new = self.spans.get(first..).unwrap_or_default();
        let lengths = || spans::lengths(new);
        Ok(IndexedLayer {
            digest: descriptor.digest,
            size: descriptor.size,
            compression,
            encrypted: parts.is_some(),
            tar_bytes,
            spans: lengths().count() as u64,
            longest: lengths().map(|(length, _)| length).max().unwrap_or(0),
            spooled: lengths().filter(|(_, spooled)| *spooled).map(|(length, _)| length).sum(),
        })
    }

    /// Writes the metadata and the pages.
    ///
    /// # Errors
    /// [`IndexBuildError`]
    pub fn finish(self) -> Result<Built, IndexBuildError> {
        write::write(self)
    }
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

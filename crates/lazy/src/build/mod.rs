//! Making lazy images: layers in, from the lowest up; data blobs, a table and metadata out.
//!
//! [`device`] lays file contents out and cuts them; [`pipeline`] compresses, seals and stores the chunks on several threads, in an
//! order that depends on the input alone; [`layer`] reads tars; [`metadata`] writes what names it all; [`retrace`](mod@retrace) adds a trace.
//!
//! The same layers, config, settings and domain give the same bytes. Each layer's new chunks are a blob of their own, which does not
//! depend on the layers above it, so images on one base share its blobs even where nobody told their builders of each other.

mod device;
mod layer;
pub(crate) mod metadata;
mod pipeline;
mod retrace;
mod ship;

use std::io::{self, Read};

use nacre_oci::unpack::{Limits, UnpackError};

use crate::{
    erofs::{Tree, TreeError, WriteError},
    format::{ChunkEntry, Method},
    keys::{Domain, MetadataKey},
};
use device::{Cutter, Device};
use layer::OnDevice;
use pipeline::{Place, Settings, Stored};

pub use layer::LayerContent;
pub(crate) use layer::{Contents, LayerReader};
pub(crate) use pipeline::Closed;
pub use pipeline::DataBlob;
pub use retrace::{LazyRetrace, RetraceError, Retraced, retrace};
pub(crate) use ship::{EMPTY, EMPTY_TYPE, PUBLIC_OPTIONS};
pub use ship::{LazyRemake, OpenBlob, Shared};

/// How an image is built.
#[derive(Clone, Copy, Debug)]
pub struct BuildOptions<'a> {
    /// Seals the image, and shares chunks with others of the domain; `None` makes an image that anybody can read.
    pub domain: Option<&'a Domain>,
    /// zstd's level for data: -7 to 22.
    pub level: i32,
    /// Average bytes of a chunk: a power of two from 16 KiB to 128 KiB.
    pub chunk: u32,
    /// Threads that compress.
    pub threads: usize,
    /// What a layer may hold.
    pub limits: &'a Limits,
}

/// The default of [`BuildOptions::level`].
pub const LEVEL: i32 = 6;
/// The default of [`BuildOptions::chunk`].
pub const CHUNK: u32 = 64 << 10;

/// Why an image was not built. `E` is the error of whoever stores blobs.
#[derive(Debug, thiserror::Error)]
pub enum BuildError<E> {
    /// A setting is out of its range.
    #[error("{what} is {found}; it may be {allowed}")]
    Setting {
        /// Which.
        what: &'static str,
        /// As it is.
        found: i64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A layer could not be read.
    #[error("reading the layer failed: {0}")]
    Read(#[source] io::Error),
    /// A layer is none.
    #[error(transparent)]
    Layer(#[from] UnpackError),
    /// An entry does not fit into the tree.
    #[error("entry '{path}': {source}")]
    Tree {
        /// The entry.
        path: String,
        /// Why.
        source: TreeError,
    },
    /// A data blob could not be stored.
    #[error(transparent)]
    Upload(E),
    /// Compressing failed.
    #[error("compressing failed: {0}")]
    Compress(#[source] io::Error),
    /// The metadata could not be written.
    #[error(transparent)]
    Metadata(#[from] WriteError),
    /// A temporary file could not be used.
    #[error("a temporary file for the metadata: {0}")]
    Spool(#[source] io::Error),
    /// Chunks of too many blobs.
    #[error("the image has chunks of more than 1024 blobs; name fewer images to share chunks with")]
    Blobs,
    /// Too much of everything.
    #[error("the image is too large: {0}")]
    Large(&'static str),
    /// A thread ended; its own error says why.
    #[error("the build was stopped")]
    Stopped,
}

/// An image in the making.
pub struct Builder<'a> {
    options: BuildOptions<'a>,
    tree: Tree,
    device: Device,
    stored: Stored,
    content_bytes: u64,
    report: Report,
}

/// What a build came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Layers.
    pub layers: u64,
    /// Entries of their tars.
    pub entries: u64,
    /// Bytes of their files.
    pub content_bytes: u64,
    /// Chunks that were not known before.
    pub new_chunks: u64,
    /// Their stored bytes.
    pub new_bytes: u64,
    /// Stored bytes that were left out, since the image, or one that it shares chunks with, has them.
    pub shared_bytes: u64,
    /// Bytes of the metadata blob.
    pub metadata_bytes: u64,
    /// Bytes of the table blob.
    pub table_bytes: u64,
}

/// A finished image: what its manifest names.
pub struct Built {
    /// The metadata blob: rewound.
    pub metadata: std::fs::File,
    /// The table blob: rewound.
    pub table: std::fs::File,
    /// The data blobs that it uses, in the order in which its metadata has them.
    pub blobs: Vec<DataBlob>,
    /// What opens it; `None` for one that is not sealed.
    pub key: Option<MetadataKey>,
    /// What it came to.
    pub report: Report,
}

impl<'a> Builder<'a> {
    /// Begins an image.
    ///
    /// # Errors
    /// [`BuildError::Setting`]
    pub fn new<E>(options: BuildOptions<'a>) -> Result<Self, BuildError<E>> {
        let setting = |what, found, allowed| Err(BuildError::Setting { what, found, allowed });
        if !options.chunk.is_power_of_two() || !(16 << 10..=128 << 10).contains(&options.chunk) {
            return setting("the size of chunks", options.chunk.into(), "16, 32, 64 or 128 KiB");
        }
        if !(-7..=22).contains(&options.level) {
            return setting("the compression level", options.level.into(), "from -7 to 22");
        }
        let seed = options.domain.map_or(0, Domain::cut_seed);
        Ok(Self {
            options,
            tree: Tree::new(),
            device: Device::new(Cutter::new(options.chunk, seed)),
            stored: Stored::default(),
            content_bytes: 0,
            report: Report::default(),
        })
    }

    /// Shares chunks with another image of the same domain: its blobs, and the entries of its table. A chunk is shared where the
    /// stored bytes are equal, so an image that lies about what it has can make a read fail, and no more.
    pub fn share(&mut self, blobs: &[DataBlob], entries: impl IntoIterator<Item = ChunkEntry>) {
        let first = u32::try_from(self.stored.blobs.len()).unwrap_or(u32::MAX);
        self.stored.blobs.extend_from_slice(blobs);
        for entry in entries {
            if entry.method != Method::Zeroes.code() {
                let blob = first.saturating_add(entry.blob.get().into());
                let place = Place { blob, offset: entry.place.get(), stored: entry.stored.get() };
                self.stored.known.entry(entry.digest).or_insert(place);
            }
        }
    }

    /// Adds a layer on top: `tar` is its uncompressed tar. `upload` is called if it has chunks that are not known, with their bytes.
    ///
    /// The caller checks the digest of what was read, and throws the build away where it is wrong.
    ///
    /// # Errors
    /// [`BuildError`]
    pub fn layer<E: Send>(
        &mut self,
        tar: &mut dyn Read,
        upload: impl FnOnce(&mut dyn Read) -> Result<DataBlob, E> + Send,
    ) -> Result<LayerContent, BuildError<E>> {
        let BuildOptions { domain, level, threads, limits, .. } = self.options;
        let (tree, device) = (&mut self.tree, &mut self.device);
        let produce = |sink: &mut pipeline::Entrance| {
            let contents = OnDevice { device: &mut *device, sink: &mut *sink };
            let content = LayerReader::new(tree, contents, limits).read(tar)?;
            device.flush(sink).map_err(|Closed| BuildError::Stopped)?;
            Ok(content)
        };
        let content = pipeline::run(&mut self.stored, Settings { domain, level, threads }, produce, upload)?;
        self.content_bytes += content.bytes;
        self.report.layers += 1;
        self.report.entries += content.entries;
        Ok(content)
    }

    /// Writes the metadata and the table.
    ///
    /// # Errors
    /// [`BuildError`]
    pub fn finish<E>(mut self, config: &[u8]) -> Result<Built, BuildError<E>> {
        let device = &self.device;
        self.tree.place_files(|file| u32::try_from(device.start(device::FileId(file))).unwrap_or(u32::MAX));
        metadata::write(self, config)
    }
}

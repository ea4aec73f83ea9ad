//! Lazy images in a guest: admitted like any other, and mounted before they are there.
//!
//! ```text
//! DIR/chunks/           stored chunks, ciphertext: believed by nobody, and free to be shared or lost
//! DIR/mounts/<id>/      metadata   the image's EROFS image, verified and checked
//!                       blob       the metadata blob as it came, where another process may have to go on with the mount
//!                       device/    FUSE: the data device
//!                       root/      the image, where it is mounted for a container of our own
//! ```
//!
//! The metadata is plaintext, and what the kernel mounts: `mounts` belongs on the pod's encrypted volume.
//!
//! Invariant: nothing is mounted of an image that was not admitted, and nothing that [`erofs::check()`] refuses. Who mounts by a [`Grant`]
//! believes its maker that the image was admitted, and so takes it only from who may mount as well.
//!
//! A mount can go from one process to another, also from one that was killed: [`Grant`] says what the image is, [`Kept`] what is mounted.

mod alone;
mod device;
mod grant;
mod indexed;
mod lent;
mod mount;
mod origin;
mod place;
mod plan;
mod tree;

use std::{
    fs::{self, File},
    io,
    num::NonZeroU64,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_attest::client::Tenure;
use nacre_core::{Digest, SecretBytes};
use nacre_lazy::{
    artifact::{Artifact, ArtifactError, Copying, ImageBlobs, is_lazy},
    cache::Cache,
    device::DeviceReader,
    erofs::{self, CheckError},
    fetch::Fetcher,
    files::Files,
    format::BLOCK,
    image::OpenError,
    index::IndexError,
    pace::Pace,
    reader::{Reader, Shared},
    source::Blobs,
};
use nacre_oci::{
    manifest::{Descriptor, ImageConfig, Manifest, ManifestError},
    source::ImageSource,
    trust::Admission,
};
use nacre_sys::{erofs as mounts, fuse::FuseError};
use serde::{Deserialize, Serialize};

use crate::images::{AdmittedLazy, Images, PullError};
pub use alone::{Mounter, OwnMounts};
pub use grant::{Grant, GrantError, IndexGrant, wipe};
use indexed::Indexed;
pub use mount::{Kept, KeptRecord, LazyMount, SUBTYPE, Served};
pub use origin::{Clients, Connection, Origin};
pub use place::clean;
use place::{MOUNTS, Place};
use plan::{Opened, Parts, Plan};

/// The default of [`LazyOptions::cache_limit`].
pub const CACHE_LIMIT: u64 = 10 << 30;
/// The default of [`LazyOptions::patience`].
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where lazy images keep what they need, and how long they wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LazyOptions {
    /// For metadata and mounts: trusted, and not in memory.
    pub directory: PathBuf,
    /// For ciphertext; it may be shared with others and with the host.
    pub cache: PathBuf,
    /// The most bytes of ciphertext that are kept.
    pub cache_limit: u64,
    /// How long a read waits for a source that fails, before it fails itself.
    pub patience: Duration,
    /// The most bytes a second that are fetched, for all images that share the options.
    pub bandwidth: Option<NonZeroU64>,
}

/// How an image becomes a filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Front {
    /// EROFS where the kernel can, or else FUSE.
    #[default]
    #[serde(rename = "auto")]
    Best,
    /// EROFS over a data device, or an error.
    Erofs,
    /// FUSE.
    Fuse,
}

/// Why a lazy image was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The image is not admitted, or not to be had.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// It is no lazy image, or its key is not released to us.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// It is an ordinary image, and there is no index that may be used.
    #[error(
        "{image} is an ordinary image and has no index {}; make one with `nacre image index` (and sign it, where the policy \
         wants that), or a lazy image with `nacre image copy --lazy`",
        if tried.is_empty() { "beside it".to_owned() } else { format!("that can be used: {}", tried.join("; ")) }
    )]
    NoIndex {
        /// The image.
        image: String,
        /// Indexes that there are, and what is wrong with each.
        tried: Vec<String>,
    },
    /// Its index is none, or another image's.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Its metadata is not what the manifest names, or not what was encrypted.
    #[error("the metadata of the lazy image: {0}")]
    Open(#[from] OpenError),
    /// Its tree is none that we hand to the kernel.
    #[error("the tree of the lazy image is refused: {0}")]
    Check(#[from] CheckError),
    /// Its tree and its table do not fit together.
    #[error("the tree of the lazy image wants a data device of {tree} blocks, and its table has {table}")]
    Device {
        /// As the tree says.
        tree: u64,
        /// As the table says.
        table: u64,
    },
    /// Its config, or its manifest, is none.
    #[error("the config of the lazy image: {0}")]
    Config(#[from] ManifestError),
    /// What another process handed over is not what it should be.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// A file or directory could not be used.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which one.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No FUSE filesystem could be mounted.
    #[error(transparent)]
    Fuse(#[from] FuseError),
    /// The kernel does not mount EROFS.
    #[error(transparent)]
    Erofs(#[from] mounts::ErofsError),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LazyError {
    let path = path.to_owned();
    move |source| LazyError::Io { what, path, source }
}

/// What all lazy images of a process share: the cache, the connections, decoded chunks.
pub struct LazyStore {
    options: LazyOptions,
    shared: Arc<Shared>,
}

/// A lazy image that was opened: admitted, its metadata verified, nothing of its data read.
pub struct LazyImage {
    /// The manifest's digest.
    pub manifest: Digest,
    /// The proof that it was admitted; `None` where whoever made the [`Grant`] has it.
    pub admission: Option<Admission>,
    /// What to run, as whom.
    pub config: ImageConfig,
    /// The same as the image has it.
    pub config_bytes: Vec<u8>,
    /// Its data device.
    pub reader: Arc<dyn DeviceReader>,
    /// The same, of a lazy image: its chunks.
    pub chunks: Option<Arc<Reader>>,
    /// Where its keys were lent: it is read only while that holds.
    pub lent: Option<Arc<Tenure>>,
    /// Its directory below `mounts`, which goes with this.
    place: Place,
}

impl LazyImage {
    fn new(parts: Parts, manifest: Digest, place: Place) -> Self {
        let Parts { config, config_bytes, reader, chunks } = parts;
        Self { manifest, admission: None, config, config_bytes, reader, chunks, lent: None, place }
    }

    /// What it is read by was lent, where it was.
    fn lent(mut self, tenure: Option<Arc<Tenure>>) -> Self {
        if let Some(tenure) = tenure {
            self.reader = Arc::new(lent::LentReader::new(self.reader, Arc::clone(&tenure)));
            self.lent = Some(tenure);
        }
        self
    }

    /// Begins to fetch ahead what the image's trace says, where it has one.
    pub fn follow_trace(&self) {
        if let Some(chunks) = &self.chunks {
            chunks.follow_trace();
        }
    }

    /// Its files, for whoever serves them without mounting it.
    ///
    /// # Errors
    /// [`LazyError::Io`]
    pub fn files(&self) -> Result<Files, LazyError> {
        Ok(Files::new(self.tree()?, Arc::clone(&self.reader)))
    }

    /// Its tree, which was checked.
    fn tree(&self) -> Result<erofs::Image<File>, LazyError> {
        let path = self.place.metadata();
        let file = File::open(&path).map_err(io_error("open the metadata file", &path))?;
        erofs::Image::open(file).map_err(|error| io_error("read the metadata file", &path)(io::Error::other(error)))
    }

    /// A mount point that goes with the image.
    ///
    /// # Errors
    /// [`LazyError::Io`]
    pub fn own_target(&self) -> Result<PathBuf, LazyError> {
        let path = self.place.root();
        fs::create_dir(&path).map_err(io_error("make the directory", &path))?;
        Ok(path)
    }

    /// Its metadata blob, as it came, where it was opened by a [`Grant`]: it goes with this.
    pub fn metadata_blob(&self) -> PathBuf {
        self.place.blob()
    }

    /// Bytes of the image's data blobs, and how many of them the cache has: counted by the blocks of its files, without reading them.
    pub fn local(&self, shared: &Shared) -> Local {
        let blobs = self.reader.blobs();
        let held = |cache: &Cache| blobs.iter().map(|blob| cache.held(blob)).sum();
        let total = blobs.iter().map(|blob| blob.size).sum();
        Local { bytes: shared.fetcher.cache().map_or(0, held), total }
    }
}

/// How much of an image is in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// Stored bytes that are there.
    pub bytes: u64,
    /// Stored bytes that there are.
    pub total: u64,
}

impl LazyStore {
    /// Opens the directories, which are made if need be, and removes what killed processes left of mounts that are gone.
    ///
    /// # Errors
    /// [`LazyError::Io`]
    pub fn open(options: LazyOptions) -> Result<Self, LazyError> {
        let mounts = options.directory.join(MOUNTS);
        fs::create_dir_all(&mounts).map_err(io_error("make the directory", &mounts))?;
        let only_us = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&mounts, only_us).map_err(io_error("change the mode", &mounts))?;
        clean(&options.directory)?;
        let cache = Cache::open(&options.cache, options.cache_limit)
            .map_err(io_error("open the cache of lazy images", &options.cache))?;
        let shared = Shared::new(Fetcher::new(Some(cache), options.patience).with_pace(Pace::new(options.bandwidth)));
        Ok(Self { options, shared })
    }

    /// Where metadata and mounts are.
    pub fn directory(&self) -> &Path {
        &self.options.directory
    }

    /// What it was opened with.
    pub fn options(&self) -> &LazyOptions {
        &self.options
    }

    /// The cache and its counters.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Opens the image that a source has: a lazy one, or an ordinary one by its index.
    ///
    /// # Errors
    /// [`LazyError`]
    pub fn image(&self, images: &Images, source: Arc<dyn ImageSource>) -> Result<LazyImage, LazyError> {
        let (manifest, admission) = images.admit_lazy(&*source)?;
        if is_lazy(&manifest) {
            self.admitted(images, source, &manifest, admission)
        } else {
            Ok(self.indexed(images, &source, &manifest, admission)?.image)
        }
    }

    /// Opens the lazy image that a source has.
    ///
    /// # Errors
    /// [`LazyError`]: it is an ordinary one, for one.
    pub fn lazy_image(&self, images: &Images, source: Arc<dyn ImageSource>) -> Result<LazyImage, LazyError> {
        let (manifest, admission) = images.admit_lazy(&*source)?;
        self.admitted(images, source, &manifest, admission)
    }

    fn admitted(
        &self,
        images: &Images,
        source: Arc<dyn ImageSource>,
        manifest: &Manifest,
        admission: Admission,
    ) -> Result<LazyImage, LazyError> {
        let artifact = Artifact::parse(manifest)?;
        let (key, lent) = images.lend(|keyring| artifact.unwrap(keyring));
        let key = key?;
        let plan = Plan::Lazy(Arc::new(artifact));
        let mut place = Place::new(&self.mounts())?;
        let opened = plan.fetch(&*source, key.as_ref(), &mut place.erofs, None)?;
        opened.judge(&place)?;
        let blobs = Arc::new(ImageBlobs::of(source, &plan.descriptors()));
        let image = self.opened(opened, blobs, *admission.manifest(), place)?;
        Ok(LazyImage { admission: Some(admission), ..image.lent(lent) })
    }

    /// Opens an ordinary image that was admitted by its index, and gives what another process needs to do the same: the metadata of it are in the
    /// image that is given, so that it is to be kept until then.
    ///
    /// # Errors
    /// [`LazyError`]
    pub fn grant_by_index(
        &self,
        images: &Images,
        source: &Arc<dyn ImageSource>,
        admitted: AdmittedLazy,
        grant: Grant,
    ) -> Result<(Grant, LazyImage), LazyError> {
        let Indexed { image, grant: index, key } =
            self.indexed(images, source, &admitted.manifest, admitted.admission)?;
        Ok((Grant { key, index: Some(index), metadata: Some(image.metadata_blob()), ..grant }, image))
    }

    /// Opens the image of a grant. All that is needed to go on with it, in another process and without its source, stays in its place.
    ///
    /// # Errors
    /// [`LazyError`]
    pub fn granted(&self, grant: &Grant, clients: &Arc<Clients>) -> Result<LazyImage, LazyError> {
        let plan = Plan::of(grant)?;
        let blobs = late(grant, clients, plan.descriptors());
        let mut place = Place::new(&self.mounts())?;
        let path = place.blob();
        let mut copy = File::create_new(&path).map_err(io_error("make the file", &path))?;
        let (key, erofs) = (grant.key.as_ref(), &mut place.erofs);
        let opened = match grant.metadata.as_ref().map(File::open) {
            Some(Ok(mut stored)) => {
                plan.read(&mut Copying { stream: &mut stored, copy: Some(&mut copy) }, key, erofs)?
            }
            other => {
                if let Some(Err(error)) = other {
                    tracing::warn!("the metadata of {} is fetched again: {error}", grant.reference);
                }
                let source = blobs.source().map_err(PullError::Transport)?;
                plan.fetch(&*source, key, erofs, Some(&mut copy))?
            }
        };
        opened.judge(&place)?;
        self.opened(opened, Arc::new(blobs), *grant.manifest.digest(), place)
    }

    /// Goes on with a mount of another process that does not serve it any more. Neither the image's source nor a broker is asked.
    ///
    /// # Errors
    /// [`LazyError`]; who reads from the mount waits on, for as long as somebody has its descriptors.
    pub fn resume(&self, grant: &Grant, clients: &Arc<Clients>, mut kept: Kept) -> Result<LazyMount, LazyError> {
        let plan = Plan::of(grant)?;
        let metadata = kept.metadata.try_clone().map_err(io_error("duplicate", &kept.record.target))?;
        let place = Place::adopt(&self.mounts(), &kept.record.place, File::from(metadata))?;
        let path = place.blob();
        let resumed = (|| {
            let mut blob = File::open(&path).map_err(io_error("open", &path))?;
            // The tree is there, and the kernel has it mounted.
            let null = Path::new("/dev/null");
            let mut nowhere = File::options().write(true).open(null).map_err(io_error("open", null))?;
            let opened = plan.read(&mut blob, grant.key.as_ref(), &mut nowhere)?;
            opened.parts(&self.shared, Arc::new(late(grant, clients, plan.descriptors())), &place)
        })();
        let parts = match resumed {
            Ok(parts) => parts,
            Err(error) => {
                // It can be tried again.
                place.leave();
                return Err(error);
            }
        };
        let image = LazyImage::new(parts, *grant.manifest.digest(), place);
        kept.record.target = std::path::absolute(&kept.record.target).map_err(io_error("find", &path))?;
        LazyMount::resume(image, kept)
    }

    /// Mounts an image on a directory, read-only, and begins to follow its trace.
    ///
    /// # Errors
    /// [`LazyError`]; nothing is mounted then.
    pub fn mount(&self, image: LazyImage, target: &Path, front: Front) -> Result<LazyMount, LazyError> {
        LazyMount::new(image, target, front, &mut |_| Ok(()))
    }

    /// The same, with a keeper that is given what another process needs to go on, before anybody sees the mount.
    ///
    /// # Errors
    /// [`LazyError`]; nothing is mounted then.
    pub fn mount_kept(
        &self,
        image: LazyImage,
        target: &Path,
        front: Front,
        keep: &mut dyn FnMut(Kept) -> io::Result<()>,
    ) -> Result<LazyMount, LazyError> {
        LazyMount::new(image, target, front, keep)
    }

    fn mounts(&self) -> PathBuf {
        self.options.directory.join(MOUNTS)
    }

    /// An image whose metadata were verified.
    fn opened(
        &self,
        opened: Opened,
        blobs: Arc<dyn Blobs>,
        manifest: Digest,
        place: Place,
    ) -> Result<LazyImage, LazyError> {
        let parts = opened.parts(&self.shared, blobs, &place)?;
        Ok(LazyImage::new(parts, manifest, place))
    }
}

fn late(grant: &Grant, clients: &Arc<Clients>, descriptors: Vec<Descriptor>) -> origin::LateBlobs {
    let released = grant.released.as_ref().map(|released| SecretBytes::new(released.expose().to_vec()));
    origin::LateBlobs::new(grant.origin.clone(), released, Arc::clone(clients), descriptors)
}

/// Has the tree judged before the kernel sees it.
fn check(place: &Place, device_bytes: u64) -> Result<(), LazyError> {
    let checked = erofs::check(&place.erofs, &erofs::Limits::default())?;
    let blocks = device_bytes / BLOCK;
    if u64::from(checked.device_blocks) == blocks {
        return Ok(());
    }
    Err(LazyError::Device { tree: checked.device_blocks.into(), table: blocks })
}

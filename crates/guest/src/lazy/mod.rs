//! Lazy images in a guest: admitted like any other, and mounted before they are there.
//!
//! ```text
//! DIR/chunks/           stored chunks, ciphertext: believed by nobody, and free to be shared or lost
//! DIR/mounts/<id>/      metadata   the image's EROFS image, verified and checked
//!                       device/    FUSE: the data device
//!                       root/      the image, where it is mounted for a container of our own
//! ```
//!
//! The metadata is plaintext, and what the kernel mounts: `mounts` belongs on the pod's encrypted volume.
//!
//! Invariant: nothing is mounted of an image that was not admitted, and nothing that [`erofs::check()`] refuses.

mod device;
mod indexed;
mod tree;

use std::{
    fs::{self, File},
    io,
    num::NonZeroUsize,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_core::Digest;
use nacre_lazy::{
    artifact::{Artifact, ArtifactError, ImageBlobs, is_lazy, metadata_stream},
    cache::Cache,
    device::DeviceReader,
    erofs::{self, CheckError, Image},
    fetch::Fetcher,
    format::BLOCK,
    image::{Metadata, OpenError, Table},
    index::IndexError,
    reader::{Reader, Shared},
};
use nacre_oci::{
    manifest::{ImageConfig, ManifestError},
    source::ImageSource,
    trust::Admission,
};
use nacre_sys::{
    erofs as mounts,
    fuse::{FuseError, Options as FuseOptions, Session},
};

use rustix::{fs::FlockOperation, mount::UnmountFlags};

use crate::images::{Images, PullError};

/// The default of [`LazyOptions::cache_limit`].
pub const CACHE_LIMIT: u64 = 10 << 30;
/// The default of [`LazyOptions::patience`].
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Names below the directory.
const MOUNTS: &str = "mounts";
const METADATA: &str = "metadata";
const DEVICE: &str = "device";
const ROOT: &str = "root";
/// Reads that are answered at once; most wait for the network.
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);

/// Where lazy images keep what they need, and how long they wait.
#[derive(Clone, Debug)]
pub struct LazyOptions {
    /// For metadata and mounts: trusted, and not in memory.
    pub directory: PathBuf,
    /// For ciphertext; it may be shared with others and with the host.
    pub cache: PathBuf,
    /// The most bytes of ciphertext that are kept.
    pub cache_limit: u64,
    /// How long a read waits for a source that fails, before it fails itself.
    pub patience: Duration,
    /// How images are served.
    pub front: Front,
}

/// How an image becomes a filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Front {
    /// EROFS where the kernel can, or else FUSE.
    #[default]
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
    /// Its config is none.
    #[error("the config of the lazy image: {0}")]
    Config(#[from] ManifestError),
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
    /// The proof that it was admitted.
    pub admission: Admission,
    /// What to run, as whom.
    pub config: ImageConfig,
    /// Its data device.
    pub reader: Arc<dyn DeviceReader>,
    /// Its directory below `mounts`, which goes with this.
    place: Place,
}

/// A directory below `mounts` that goes when it is dropped. Whoever has it holds a lock of the metadata file, so that what killed
/// processes left is told from what is in use.
struct Place {
    path: PathBuf,
    erofs: File,
}

impl Place {
    fn new(mounts: &Path) -> Result<Self, LazyError> {
        let name = Digest::sha256(nacre_core::SecretArray::<16>::random().expose()).short();
        let path = mounts.join(name);
        fs::create_dir(&path).map_err(io_error("make the directory", &path))?;
        let metadata = path.join(METADATA);
        let file = File::options().read(true).write(true).create_new(true).open(&metadata);
        let place = Self { erofs: file.map_err(io_error("make the metadata file", &metadata))?, path };
        let locked = rustix::fs::flock(&place.erofs, FlockOperation::NonBlockingLockExclusive);
        // Another process that was cleaning up between the two steps has taken it away.
        let gone = place.erofs.metadata().map_err(io_error("look at", &metadata))?.nlink() == 0;
        match locked {
            Ok(()) if !gone => Ok(place),
            _ => Err(io_error("lock", &metadata)(io::Error::from(io::ErrorKind::ResourceBusy))),
        }
    }

    fn metadata(&self) -> PathBuf {
        self.path.join(METADATA)
    }

    fn device(&self) -> PathBuf {
        self.path.join(DEVICE)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Never below a mount: what is mounted there is gone before, or stays.
        let _ = fs::remove_dir(self.path.join(ROOT));
        let _ = fs::remove_dir(self.device());
        let _ = fs::remove_file(self.metadata());
        let _ = fs::remove_dir(&self.path);
    }
}

impl LazyImage {
    /// A mount point that goes with the image.
    ///
    /// # Errors
    /// [`LazyError::Io`]
    pub fn own_target(&self) -> Result<PathBuf, LazyError> {
        let path = self.place.path.join(ROOT);
        fs::create_dir(&path).map_err(io_error("make the directory", &path))?;
        Ok(path)
    }
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
        clean(&mounts).map_err(io_error("clean", &mounts))?;
        let cache = Cache::open(&options.cache, options.cache_limit)
            .map_err(io_error("open the cache of lazy images", &options.cache))?;
        let shared = Shared::new(Fetcher::new(Some(cache), options.patience));
        Ok(Self { options, shared })
    }

    /// Where metadata and mounts are.
    pub fn directory(&self) -> &Path {
        &self.options.directory
    }

    /// The cache and its counters.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Opens the image that a source has.
    ///
    /// # Errors
    /// [`LazyError`]
    pub fn image(&self, images: &Images, source: Arc<dyn ImageSource>) -> Result<LazyImage, LazyError> {
        let (manifest, admission) = images.admit_lazy(&*source)?;
        if !is_lazy(&manifest) {
            return self.indexed(images, &source, &manifest, admission);
        }
        let artifact = Artifact::parse(&manifest)?;
        let key = artifact.unwrap(images.keyring())?;
        let mut place = Place::new(&self.options.directory.join(MOUNTS))?;
        let path = place.metadata();
        let mut stream = metadata_stream(&*source, &artifact).map_err(io_error("fetch the metadata", &path))?;
        let metadata = Metadata::read(&mut stream, &artifact.metadata.digest, key.as_ref(), &mut place.erofs)?;
        metadata.check_blobs(&artifact.blobs())?;
        let config = ImageConfig::of_verified(&metadata.config)?;
        check_tree(&place, metadata.summary.device_bytes.get())?;
        let (table, summary, blobs) = Table::new(metadata, artifact.table_blob());
        let blobs_of = Arc::new(ImageBlobs::new(source, &artifact));
        let reader = Arc::new(Reader::new(Arc::clone(&self.shared), blobs_of, table, summary, blobs));
        let manifest = *admission.manifest();
        Ok(LazyImage { manifest, admission, config, reader, place })
    }

    /// Mounts an image on a directory, read-only.
    ///
    /// # Errors
    /// [`LazyError`]; nothing is mounted then.
    pub fn mount(&self, image: LazyImage, target: &Path) -> Result<LazyMount, LazyError> {
        let target = fs::canonicalize(target).map_err(io_error("find the mount point", target))?;
        let erofs = || self.mount_erofs(&image, &target);
        let session = match self.options.front {
            Front::Erofs => erofs()?,
            Front::Fuse => mount_tree(&image, &target)?,
            Front::Best => match mounts::support(&image.place.path) {
                Ok(()) => erofs()?,
                Err(error) => {
                    tracing::info!("{error}; the image is served by FUSE");
                    mount_tree(&image, &target)?
                }
            },
        };
        Ok(LazyMount { image, target, session })
    }

    fn mount_erofs(&self, image: &LazyImage, target: &Path) -> Result<Served, LazyError> {
        let device = image.place.device();
        fs::create_dir(&device).map_err(io_error("make the directory", &device))?;
        let options = FuseOptions {
            name: "nacre-lazy".into(),
            subtype: "nacre".into(),
            allow_other: false,
            threads: THREADS,
            ..FuseOptions::default()
        };
        let session = Session::mount(&device, &options, device::filesystem(Arc::clone(&image.reader)))?;
        let file = device.join(device::NAME);
        let devices: &[&Path] = &[&file];
        mounts::mount(&image.place.metadata(), devices, target, &mounts::Options::default())?;
        Ok(Served::Erofs(session))
    }
}

/// Checks the tree before a kernel or a front end of ours sees it, and that it is of the device that there is.
fn check_tree(place: &Place, device_bytes: u64) -> Result<(), LazyError> {
    let checked = erofs::check(&place.erofs, &erofs::Limits::default())?;
    let blocks = device_bytes / BLOCK;
    if u64::from(checked.device_blocks) == blocks {
        return Ok(());
    }
    Err(LazyError::Device { tree: checked.device_blocks.into(), table: blocks })
}

/// Removes what killed processes left: their data devices, which nobody answers for, and the metadata. Their mounts stay, and give errors,
/// until somebody unmounts them.
fn clean(mounts: &Path) -> io::Result<()> {
    for entry in fs::read_dir(mounts)? {
        let path = entry?.path();
        let Ok(file) = File::open(path.join(METADATA)) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        for mounted in [ROOT, DEVICE] {
            let _ = rustix::mount::unmount(path.join(mounted), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        tracing::info!("{}: what a killed process left is removed", path.display());
        drop(Place { path, erofs: file });
    }
    Ok(())
}

fn mount_tree(image: &LazyImage, target: &Path) -> Result<Served, LazyError> {
    let path = image.place.metadata();
    let file = File::open(&path).map_err(io_error("open the metadata file", &path))?;
    let tree = Image::open(file).map_err(|error| io_error("read the metadata file", &path)(io::Error::other(error)))?;
    let options = FuseOptions { name: "nacre-lazy".into(), nosuid: false, threads: THREADS, ..FuseOptions::default() };
    let filesystem = tree::TreeFs { reader: Arc::clone(&image.reader), image: tree };
    Ok(Served::Fuse(Session::mount(target, &options, Arc::new(filesystem))?))
}

enum Served {
    /// The session of the data device.
    Erofs(Session),
    /// The session of the tree itself.
    Fuse(Session),
}

/// A mounted lazy image, served by threads of this process.
pub struct LazyMount {
    /// The image.
    pub image: LazyImage,
    target: PathBuf,
    session: Served,
}

impl LazyMount {
    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// What serves it: `erofs` or `fuse`.
    pub fn kind(&self) -> &'static str {
        match self.session {
            Served::Erofs(_) => "erofs",
            Served::Fuse(_) => "fuse",
        }
    }

    /// Whether it is still mounted; somebody else may have unmounted it.
    pub fn is_mounted(&self) -> bool {
        match &self.session {
            Served::Erofs(session) => {
                !session.is_ended() && nacre_sys::fs::is_mount_point(&self.target).unwrap_or(false)
            }
            Served::Fuse(session) => !session.is_ended(),
        }
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// It is in use; it then stays mounted and served, and comes back.
    pub fn unmount(self) -> Result<(), (Box<Self>, LazyError)> {
        if let Served::Erofs(_) = self.session
            && self.is_mounted()
            && let Err(error) = nacre_sys::fs::unmount(&self.target)
        {
            let path = self.target.clone();
            let error = LazyError::Io { what: "unmount", path, source: io::Error::other(error) };
            return Err((Box::new(self), error));
        }
        let Self { image, target, session } = self;
        match session {
            Served::Erofs(mut session) => {
                // The kernel lets go of the data device a moment after the last reader.
                if let Err(error) = session.unmount() {
                    tracing::debug!("the data device is taken down when nobody reads it any more: {error}");
                    let _ = session.detach();
                }
            }
            Served::Fuse(mut session) => {
                // Whoever unmounted it ended it, too.
                if session.is_ended() {
                    session.wait();
                } else if let Err(error) = session.unmount() {
                    let back = Self { image, target, session: Served::Fuse(session) };
                    return Err((Box::new(back), error.into()));
                }
            }
        }
        drop(image);
        Ok(())
    }
}

//! The image store: verified layers and the images made of them, shared by every process of the guest.
//!
//! ```text
//! ROOT/
//!   format                         one line: the version, and how whiteouts are written
//!   layers/<name>/fs/              one layer, applied, in overlayfs' form (docs/formats/store-layers.md)
//!   layers/<name>/layer.json       what it holds
//!   images/<digest>/manifest.json  the manifest, byte for byte; config.json likewise; image.json the layers; metadata of a lazy image
//!   refs/<hash of name>.json       a name that was pulled: what it resolved to, and the signatures found then
//!   bundles/<id>/                  a mounted bundle: bundle.json, and its writable layer (upper, work); lower, where a lazy image is mounted
//!   staging/<name>/                a layer that is being made or removed
//!   locks/<name>                   flock(2) targets; empty
//! ```
//! Every field of every record is in docs/formats/store.md.
//!
//! Invariants:
//! - A layer's directory appears by one rename, after every check of it held and its data was synced; its name is its diff_id,
//!   or `derived-` and the names of all layers of the stack that it is for.
//! - Every record is written beside its place, synced, and renamed over it. So a kill at any instant leaves whole records and, at
//!   most, staging directories whose maker is gone: the next writer removes them.
//! - A layer is used under a shared lock of its name and made or removed under an exclusive one. Nobody waits for one layer's
//!   exclusive lock while it holds another's, so pulls that share layers cannot block each other for ever.
//! - The directory is taken as trusted: in a guest it lies on the pod's encrypted volume. Names are digests, never a peer's text.
//!
//! Files and locks instead of a database: several processes (the daemon, `nacre run`, `gc`) use one store at once, which an
//! embedded database with one owner does not allow, and a record each makes every change one atomic rename.

mod bundles;
mod gc;
mod images;
mod layers;
mod lock;
mod record;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{Mode, OFlags};

pub use bundles::{BundleRecord, OwnBundle};
pub use gc::{Collected, Removed};
pub use images::{ImageRecord, LazyRecord, RefRecord, StoredLayer};
pub use layers::{Acquired, LayerGuard, LayerId, LayerRecord, Staging};
pub use lock::Lock;

/// How overlayfs' own marks are written in this store: as root, or as a user in a namespace, who may not write `trusted.*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// `trusted.overlay.*`
    Trusted,
    /// `user.overlay.*`, mounted with `userxattr`
    User,
}

/// Why the store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file could not be read or written.
    #[error("{path}: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A record does not parse.
    #[error("{path}: not a valid record: {source}; remove the image and pull it again")]
    Record {
        /// The record's file.
        path: PathBuf,
        /// The parser's complaint.
        source: serde_json::Error,
    },
    /// The directory holds something else, or a store of another kind.
    #[error("{path}: {reason}")]
    Format {
        /// The store.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The store would lie in memory.
    #[error(
        "{path} is on {filesystem}, so images would fill the guest's memory; put the store on a disk, or allow it with --allow-tmpfs"
    )]
    InMemory {
        /// The store.
        path: PathBuf,
        /// tmpfs or ramfs.
        filesystem: &'static str,
    },
    /// No image has that name.
    #[error("{name}: no such image in {path}; `nacre image ls` shows what there is")]
    NoImage {
        /// The name that was asked for.
        name: String,
        /// The store.
        path: PathBuf,
    },
    /// No bundle is there.
    #[error("{}: no bundle of an image in {}", .bundle.display(), .path.display())]
    NoBundle {
        /// Where it should be.
        bundle: PathBuf,
        /// The store.
        path: PathBuf,
    },
    /// A name fits several images.
    #[error("{name}: fits {count} images; give more digits or the full name")]
    Ambiguous {
        /// The name that was asked for.
        name: String,
        /// How many images it fits.
        count: usize,
    },
    /// A layer that an image needs is not there.
    #[error("layer {id} of the image is not in the store {path}; pull the image again")]
    NoLayer {
        /// The layer.
        id: LayerId,
        /// The store.
        path: PathBuf,
    },
    /// The image is in use.
    #[error("{name} is in use by {user}")]
    InUse {
        /// The image.
        name: String,
        /// By what.
        user: String,
    },
}

/// Wraps a system error with what was tried on which file.
pub(crate) fn io_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.into();
    move |source| StoreError::Io { what, path, source }
}

const FORMAT_TRUSTED: &str = "nacre-store 1 trusted\n";
const FORMAT_USER: &str = "nacre-store 1 user\n";

/// An open store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    marks: Marks,
    /// The root, for syncfs.
    fd: OwnedFd,
}

impl Store {
    /// Opens the store at `root`, making it where there is none.
    ///
    /// # Errors
    /// [`StoreError`]: not writable, a directory of something else, a store of another kind, or in memory without `allow_tmpfs`.
    pub fn open(root: &Path, marks: Marks, allow_tmpfs: bool) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).map_err(io_error("make the store's directory", root))?;
        // Overlay mounts take the layers' paths, whatever directory the mounting process is in.
        let root = root.canonicalize().map_err(io_error("resolve the store's directory", root))?;
        let fd = rustix::fs::open(&root, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| io_error("open the store's directory", &root)(errno.into()))?;
        if !allow_tmpfs && let Some(filesystem) = in_memory(&fd, &root)? {
            return Err(StoreError::InMemory { path: root, filesystem });
        }
        settle_format(&root, marks)?;
        for (name, mode) in [
            ("layers", 0o700),
            ("images", 0o700),
            ("refs", 0o700),
            ("bundles", 0o711),
            ("staging", 0o700),
            ("locks", 0o700),
        ] {
            make_dir(&root.join(name), mode)?;
        }
        Ok(Self { inner: Arc::new(Inner { root, marks, fd }) })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// How overlayfs' marks are written.
    pub fn marks(&self) -> Marks {
        self.inner.marks
    }

    /// Brings everything that was written to the store's filesystem to stable storage.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        rustix::fs::syncfs(&self.inner.fd)
            .map_err(|errno| io_error("sync the store's filesystem", self.root())(errno.into()))
    }

    fn path(&self, parts: &[&str]) -> PathBuf {
        parts.iter().fold(self.inner.root.clone(), |path, part| path.join(part))
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StoreError> {
    use std::os::unix::fs::DirBuilderExt as _;
    match std::fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error("make directory", path)(error)),
        _ => Ok(()),
    }
}

/// Whether a directory lies in memory: the name of its filesystem.
///
/// # Errors
/// [`StoreError::Io`]: there is no such directory.
pub fn memory_filesystem(dir: &Path) -> Result<Option<&'static str>, StoreError> {
    let fd = rustix::fs::open(dir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| io_error("open the directory", dir)(errno.into()))?;
    in_memory(&fd, dir)
}

fn in_memory(fd: &OwnedFd, root: &Path) -> Result<Option<&'static str>, StoreError> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let stat = rustix::fs::fstatfs(fd).map_err(|errno| io_error("look at the filesystem", root)(errno.into()))?;
    Ok(match u64::try_from(stat.f_type).unwrap_or_default() {
        TMPFS => Some("tmpfs"),
        RAMFS => Some("ramfs"),
        _ => None,
    })
}

fn settle_format(root: &Path, marks: Marks) -> Result<(), StoreError> {
    let path = root.join("format");
    let wanted = match marks {
        Marks::Trusted => FORMAT_TRUSTED,
        Marks::User => FORMAT_USER,
    };
    match std::fs::read_to_string(&path) {
        Ok(found) if found == wanted => Ok(()),
        Ok(found) if found == FORMAT_USER || found == FORMAT_TRUSTED => Err(StoreError::Format {
            path: root.into(),
            reason:
                "the store was made by root and is used by a user, or the other way round; give each its own --root"
                    .into(),
        }),
        Ok(found) => Err(StoreError::Format {
            path,
            reason: format!("store format '{:.60}' is not one that this version reads", found.trim_end()),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut entries = std::fs::read_dir(root).map_err(io_error("list the store's directory", root))?;
            let foreign = entries.find_map(|entry| {
                let name = entry.ok()?.file_name();
                // What other processes that make the same store right now may have put there, and a new filesystem's own.
                let ours = ["layers", "images", "refs", "bundles", "staging", "locks", "lost+found", "format"];
                (!ours.iter().any(|our| name == *our) && !name.to_string_lossy().starts_with(record::UNFINISHED))
                    .then_some(name)
            });
            if let Some(name) = foreign {
                return Err(StoreError::Format {
                    path: root.into(),
                    reason: format!(
                        "the directory holds '{}', so it is not a new store; choose an empty one",
                        name.display()
                    ),
                });
            }
            record::write_atomically(&path, wanted.as_bytes())
        }
        Err(error) => Err(io_error("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "data").unwrap();
        let error = Store::open(dir.path(), Marks::Trusted, true).unwrap_err();
        assert!(error.to_string().contains("precious"), "{error}");
        assert!(!dir.path().join("layers").exists());
    }

    #[test]
    fn a_store_of_another_kind_or_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path(), Marks::Trusted, true).unwrap();
        Store::open(dir.path(), Marks::Trusted, true).unwrap();
        assert!(matches!(Store::open(dir.path(), Marks::User, true), Err(StoreError::Format { .. })));
        std::fs::write(dir.path().join("format"), "nacre-store 2 trusted\n").unwrap();
        let error = Store::open(dir.path(), Marks::Trusted, true).unwrap_err();
        assert!(error.to_string().contains("nacre-store 2"), "{error}");
    }
}

//! Bundles: mounted images. A bundle pins its layers until it is taken down, or until the machine's next boot, which no mount
//! survives.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use serde::{Deserialize, Serialize};

use super::{LayerGuard, LayerId, Lock, Store, StoreError, io_error, record};

/// Begins the names of directories for bundles of `nacre run`.
const RUN_PREFIX: &str = "run-";

/// A bundle that was made of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleRecord {
    /// The bundle's name in the store.
    pub id: String,
    /// The directory with `rootfs` and `config.json`.
    pub path: PathBuf,
    /// The image.
    pub manifest: Digest,
    /// Its layers.
    pub layers: Vec<LayerId>,
    /// The boot it was mounted in.
    pub boot: String,
}

impl Store {
    /// Records a bundle before it is mounted, and makes the place of its writable layer, whose root directory is like that of `root`.
    /// The caller holds guards of the layers.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn add_bundle(
        &self,
        path: &Path,
        manifest: Digest,
        layers: Vec<LayerId>,
        root: Option<&LayerGuard>,
    ) -> Result<BundleRecord, StoreError> {
        let bundle = BundleRecord { id: record::random_name(), path: path.into(), manifest, layers, boot: boot_id() };
        let dir = self.bundle_dir(&bundle.id);
        // Until its record is there, only the lock tells it from what a killed process left.
        let _lock = self.lock_bundles()?;
        // The container's own root directory lies below; it may not belong to us.
        super::make_dir(&dir, 0o711)?;
        let upper = dir.join("upper");
        super::make_dir(&upper, 0o755)?;
        if let Some(root) = root {
            root_like(root.path(), &upper)?;
        }
        super::make_dir(&dir.join("work"), 0o700)?;
        record::write(&dir.join("bundle.json"), &bundle)?;
        Ok(bundle)
    }

    /// Where a bundle's writable layer and overlayfs' work directory are.
    pub fn bundle_dir(&self, id: &str) -> PathBuf {
        self.path(&["bundles", id])
    }

    /// The bundle at a directory.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn bundle_at(&self, path: &Path) -> Result<Option<BundleRecord>, StoreError> {
        Ok(self.bundles()?.into_iter().find(|bundle| bundle.path == path))
    }

    /// The bundles of this boot.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn bundles(&self) -> Result<Vec<BundleRecord>, StoreError> {
        let boot = boot_id();
        Ok(self.all_bundles()?.into_iter().filter(|bundle| bundle.boot == boot).collect())
    }

    /// Forgets a bundle that is no longer mounted, with its writable layer.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn remove_bundle(&self, id: &str) -> Result<(), StoreError> {
        let dir = self.bundle_dir(id);
        record::remove_tree(&dir.join("upper"))?;
        record::remove_tree(&dir.join("work"))?;
        // Its record goes with the directory, last.
        record::remove_tree(&dir)
    }

    pub(super) fn all_bundles(&self) -> Result<Vec<BundleRecord>, StoreError> {
        let mut bundles = Vec::new();
        for id in record::list(&self.path(&["bundles"]))? {
            bundles.extend(record::read::<BundleRecord>(&self.bundle_dir(&id).join("bundle.json"))?);
        }
        Ok(bundles)
    }

    /// Makes an empty directory for a bundle that lasts no longer than the caller.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn run_dir(&self) -> Result<RunDir, StoreError> {
        let name = format!("{RUN_PREFIX}{}", record::random_name());
        let path = self.bundle_dir(&name);
        let _lock = self.lock_bundles()?;
        super::make_dir(&path, 0o700)?;
        let lock = Lock::exclusive(&self.path(&["locks", &name]))?;
        Ok(RunDir { store: self.clone(), path, lock: Some(lock) })
    }

    /// Removes what bundles of earlier boots, and half-made ones, left.
    pub(super) fn remove_stale_bundles(&self) -> Result<(), StoreError> {
        let _lock = self.lock_bundles()?;
        let boot = boot_id();
        for bundle in self.all_bundles()? {
            if bundle.boot != boot {
                self.remove_bundle(&bundle.id)?;
            }
        }
        for name in record::list(&self.path(&["bundles"]))? {
            let dir = self.bundle_dir(&name);
            if dir.join("bundle.json").exists() || self.holds_bundle(&dir)? {
                continue;
            }
            if !name.starts_with(RUN_PREFIX) {
                record::remove_tree(&dir)?;
            } else if let Some(lock) = Lock::try_exclusive(&self.path(&["locks", &name]))? {
                record::remove_tree(&dir)?;
                lock.remove();
            }
        }
        Ok(())
    }

    /// Whether a bundle of this boot, which may be mounted, is in a directory.
    fn holds_bundle(&self, dir: &Path) -> Result<bool, StoreError> {
        Ok(self.bundles()?.iter().any(|bundle| bundle.path.starts_with(dir)))
    }

    fn lock_bundles(&self) -> Result<Lock, StoreError> {
        Lock::exclusive(&self.path(&["locks", "bundles"]))
    }
}

/// A directory of [`Store::run_dir`]. It goes with this value, unless a bundle in it could not be unmounted.
#[derive(Debug)]
pub struct RunDir {
    store: Store,
    path: PathBuf,
    lock: Option<Lock>,
}

impl RunDir {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What stays is removed by `gc`, once it is not mounted.
        if matches!(self.store.holds_bundle(&self.path), Ok(false))
            && record::remove_tree(&self.path).is_ok()
            && let Some(lock) = self.lock.take()
        {
            lock.remove();
        }
    }
}

/// The root of an overlay mount has the owner, mode, attributes and times of its topmost directory.
fn root_like(layer: &Path, upper: &Path) -> Result<(), StoreError> {
    let copied = File::open(layer).and_then(|from| File::open(upper).map(|to| (from, to)));
    let (from, to) = copied.map_err(io_error("open", upper))?;
    nacre_oci::unpack::adjust::copy_attributes(from.as_fd(), to.as_fd())
        .map_err(|error| io_error("copy the root directory's attributes to", upper)(std::io::Error::other(error)))
}

/// Names the machine's present boot.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::Marks;
    use super::*;

    #[test]
    fn what_killed_processes_left_of_bundles_is_collected() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Marks::Trusted, true).unwrap();
        let names = || record::list(&store.path(&["bundles"])).unwrap();
        let manifest = Digest::sha256(b"m");
        let mounted = store.add_bundle(Path::new("/b"), manifest, Vec::new(), None).unwrap();
        // Half made, or half removed.
        std::fs::create_dir_all(store.bundle_dir("0123").join("upper")).unwrap();
        let mut old = store.add_bundle(Path::new("/c"), manifest, Vec::new(), None).unwrap();
        old.boot = "an earlier one".into();
        record::write(&store.bundle_dir(&old.id).join("bundle.json"), &old).unwrap();
        store.collect().unwrap();
        assert_eq!(names(), [mounted.id]);
    }

    #[test]
    fn the_directory_of_a_run_lives_as_long_as_the_run_or_its_bundle() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Marks::Trusted, true).unwrap();
        let run = store.run_dir().unwrap();
        let path = run.path().to_owned();
        store.collect().unwrap();
        assert!(path.exists(), "it is in use");
        let bundle = store.add_bundle(&path.join("bundle"), Digest::sha256(b"m"), Vec::new(), None).unwrap();
        drop(run);
        store.collect().unwrap();
        assert!(path.exists(), "its bundle may be mounted");
        store.remove_bundle(&bundle.id).unwrap();
        store.collect().unwrap();
        assert!(!path.exists());
        let run = store.run_dir().unwrap();
        let path = run.path().to_owned();
        drop(run);
        assert!(!path.exists());
        assert_eq!(record::list(&store.path(&["locks"])).unwrap(), ["bundles", "names"]);
    }
}

//! Bundles: mounted images. A bundle pins its layers until it is taken down, or until the machine's next boot, which no mount
//! survives; one in the store's own directory also no longer than the process that made it lives.
//!
//! Bundles come under an exclusive lock of `locks/bundles`, and what is left of them goes under it: a directory without a record, seen
//! under that lock, is of one who was killed. A process that runs a bundle of its own holds `locks/bundle-<id>` meanwhile.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use serde::{Deserialize, Serialize};

use super::{LayerGuard, LayerId, Lock, Store, StoreError, io_error, record};

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
    /// Whether it ends with the process that made it.
    #[serde(default)]
    pub own: bool,
}

/// A bundle in the store's own directory, as long as this lives.
#[derive(Debug)]
pub struct OwnBundle {
    record: BundleRecord,
    _lock: Lock,
}

impl OwnBundle {
    /// Its record.
    pub fn record(&self) -> &BundleRecord {
        &self.record
    }
}

impl Store {
    /// Records a bundle at `path` before it is mounted, and makes the place of its writable layer, whose root directory is like that of
    /// `root`. The caller holds guards of the layers.
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
        let id = record::random_name();
        let bundle = BundleRecord { id, path: path.into(), manifest, layers, boot: boot_id(), own: false };
        self.put_bundle(&bundle, root)?;
        Ok(bundle)
    }

    /// [`add_bundle`](Self::add_bundle), for a bundle in the store's own directory. When this process is killed, the next writer takes it
    /// down.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn add_own_bundle(
        &self,
        manifest: Digest,
        layers: Vec<LayerId>,
        root: Option<&LayerGuard>,
    ) -> Result<OwnBundle, StoreError> {
        let id = record::random_name();
        let lock = Lock::exclusive(&self.bundle_lock(&id))?;
        let path = self.bundle_dir(&id).join("bundle");
        let record = BundleRecord { id, path, manifest, layers, boot: boot_id(), own: true };
        self.put_bundle(&record, root)?;
        Ok(OwnBundle { record, _lock: lock })
    }

    fn put_bundle(&self, bundle: &BundleRecord, root: Option<&LayerGuard>) -> Result<(), StoreError> {
        let _lock = self.lock_bundles()?;
        let dir = self.bundle_dir(&bundle.id);
        // The container's own root directory lies below; it may not belong to us.
        super::make_dir(&dir, 0o711)?;
        let upper = dir.join("upper");
        super::make_dir(&upper, 0o755)?;
        if let Some(root) = root {
            root_like(root.path(), &upper)?;
        }
        super::make_dir(&dir.join("work"), 0o700)?;
        record::write(&dir.join("bundle.json"), bundle)
    }

    /// Where a bundle's writable layer and overlayfs' work directory are.
    pub fn bundle_dir(&self, id: &str) -> PathBuf {
        self.path(&["bundles", id])
    }

    /// Where a bundle's lazy image is mounted, if it has one.
    pub fn bundle_lower(&self, id: &str) -> PathBuf {
        self.bundle_dir(id).join("lower")
    }

    /// The bundle at a directory.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn bundle_at(&self, path: &Path) -> Result<Option<BundleRecord>, StoreError> {
        Ok(self.bundles()?.into_iter().find(|bundle| bundle.path == path))
    }

    /// The bundles that are in use: of this boot, and where they end with a process, of one that lives.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn bundles(&self) -> Result<Vec<BundleRecord>, StoreError> {
        let boot = boot_id();
        let mut bundles = Vec::new();
        for bundle in self.all_bundles()? {
            if bundle.boot == boot && !self.is_orphan(&bundle)? {
                bundles.push(bundle);
            }
        }
        Ok(bundles)
    }

    /// Whether the process that the bundle ends with has ended.
    fn is_orphan(&self, bundle: &BundleRecord) -> Result<bool, StoreError> {
        Ok(bundle.own && Lock::is_free(&self.bundle_lock(&bundle.id))?)
    }

    /// Forgets a bundle that is no longer mounted, with its writable layer.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn remove_bundle(&self, id: &str) -> Result<(), StoreError> {
        let dir = self.bundle_dir(id);
        let lower = self.bundle_lower(id);
        let unmounted = || -> Result<(), nacre_sys::fs::FsError> {
            if nacre_sys::fs::is_mount_point(&lower)? { nacre_sys::fs::unmount(&lower) } else { Ok(()) }
        };
        unmounted().map_err(|error| io_error("unmount the lazy image on", &lower)(std::io::Error::other(error)))?;
        record::remove_tree(&dir.join("upper"))?;
        record::remove_tree(&dir.join("work"))?;
        // Its record goes with the directory, last.
        record::remove_tree(&dir)?;
        record::remove(&self.bundle_lock(id)).map(drop)
    }

    pub(super) fn all_bundles(&self) -> Result<Vec<BundleRecord>, StoreError> {
        let mut bundles = Vec::new();
        for id in record::list(&self.path(&["bundles"]))? {
            bundles.extend(record::read::<BundleRecord>(&self.bundle_dir(&id).join("bundle.json"))?);
        }
        Ok(bundles)
    }

    /// Removes bundles of earlier boots and of killed processes, and half-made ones.
    pub(super) fn remove_stale_bundles(&self) -> Result<(), StoreError> {
        let _lock = self.lock_bundles()?;
        let boot = boot_id();
        for id in record::list(&self.path(&["bundles"]))? {
            match record::read::<BundleRecord>(&self.bundle_dir(&id).join("bundle.json"))? {
                None => self.remove_bundle(&id)?,
                Some(bundle) if bundle.boot != boot => self.remove_bundle(&id)?,
                Some(bundle) if self.is_orphan(&bundle)? => match crate::bundle::teardown(&bundle.path) {
                    Ok(()) => self.remove_bundle(&id)?,
                    Err(error) => {
                        tracing::warn!(bundle = id, "a killed container's bundle cannot be taken down yet: {error}");
                    }
                },
                Some(_) => record::remove_unfinished(&self.bundle_dir(&id))?,
            }
        }
        Ok(())
    }

    fn lock_bundles(&self) -> Result<Lock, StoreError> {
        Lock::exclusive(&self.path(&["locks", "bundles"]))
    }

    fn bundle_lock(&self, id: &str) -> PathBuf {
        self.path(&["locks", &format!("bundle-{id}")])
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
    fn a_bundle_of_a_run_lives_no_longer_than_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Marks::Trusted, true).unwrap();
        let own = store.add_own_bundle(Digest::sha256(b"m"), Vec::new(), None).unwrap();
        let place = store.bundle_dir(&own.record().id);
        store.collect().unwrap();
        assert!(place.exists(), "it is in use");
        assert_eq!(store.bundles().unwrap(), [own.record().clone()]);
        // As when the process is killed: only the lock goes.
        drop(own);
        assert_eq!(store.bundles().unwrap(), []);
        store.collect().unwrap();
        assert!(!place.exists());
        assert_eq!(record::list(&store.path(&["locks"])).unwrap(), ["bundles", "names"]);
    }
}

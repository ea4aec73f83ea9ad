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

    /// Removes what bundles of earlier boots, and half-made ones, left.
    pub(super) fn remove_stale_bundles(&self) -> Result<(), StoreError> {
        let _lock: Lock = Lock::exclusive(&self.path(&["locks", "bundles"]))?;
        let boot = boot_id();
        for bundle in self.all_bundles()? {
            if bundle.boot != boot {
                self.remove_bundle(&bundle.id)?;
            }
        }
        Ok(())
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

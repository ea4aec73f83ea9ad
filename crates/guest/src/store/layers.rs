//! Layers: who may look, who makes one, and how it becomes visible.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use nacre_oci::unpack::AppliedLayer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Lock, Store, StoreError, io_error, record};

/// The name of a directory of the store that is stacked in overlay mounts.
///
/// Three name spaces, so that no image can claim as a layer of its own what was derived, or what only a key opened: a plain image that
/// names the diff_id of somebody's encrypted layer has to bring that layer itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerId {
    /// A layer of an image, by the digest of its uncompressed tar (diff_id).
    Content(Digest),
    /// A layer that came encrypted, by its diff_id bound to its key ([`nacre_oci::crypt::LayerSecret::bind`]).
    Sealed(Digest),
    /// What one layer needs on top of it where it lies on certain others, by the digest of all their names
    /// (`nacre_oci::unpack::adjust`).
    Derived(Digest),
}

impl LayerId {
    /// The name of what goes on top of the last of `stack` (bottom first).
    pub fn derived(stack: &[Self]) -> Self {
        let names: Vec<String> = stack.iter().map(Self::to_string).collect();
        Self::Derived(Digest::sha256(names.join(" ").as_bytes()))
    }

    /// As a file's name: `sha256-<hex>`, `sealed-sha256-<hex>`, `derived-sha256-<hex>`.
    pub(super) fn file_name(&self) -> String {
        self.to_string().replace(':', "-")
    }

    /// What a file's name says; `None` for what is no such name.
    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        let digest = |rest: &str| rest.replacen('-', ":", 1).parse().ok();
        match name.split_once('-') {
            Some(("derived", rest)) => digest(rest).map(Self::Derived),
            Some(("sealed", rest)) => digest(rest).map(Self::Sealed),
            _ => digest(name).map(Self::Content),
        }
    }
}

impl std::fmt::Display for LayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Content(digest) => write!(f, "{digest}"),
            Self::Sealed(digest) => write!(f, "sealed:{digest}"),
            Self::Derived(digest) => write!(f, "derived:{digest}"),
        }
    }
}

impl Serialize for LayerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LayerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_file_name(&text.replace(':', "-"))
            .ok_or_else(|| serde::de::Error::custom(format!("'{text:.200}' names no layer")))
    }
}

/// What a layer holds, for composition and for accounting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The layer's name.
    pub id: LayerId,
    /// What was applied.
    pub applied: AppliedLayer,
    /// When it was applied, RFC 3339, by the guest's clock.
    pub created: String,
}

/// A layer that is there, kept from removal as long as this lives.
#[derive(Debug)]
pub struct LayerGuard {
    id: LayerId,
    fs: PathBuf,
    _lock: Lock,
}

impl LayerGuard {
    /// The layer's name.
    pub fn id(&self) -> &LayerId {
        &self.id
    }

    /// The applied tree, in overlayfs' form.
    pub fn path(&self) -> &Path {
        &self.fs
    }
}

/// The answer to [`Store::acquire`].
#[derive(Debug)]
pub enum Acquired {
    /// The layer is there.
    Present(LayerGuard),
    /// The layer is not there, and nobody else makes it now: the caller shall.
    Missing(Staging),
}

/// The place where one layer is made; it goes with all in it unless it is committed.
#[derive(Debug)]
pub struct Staging {
    id: LayerId,
    dir: PathBuf,
    lock: Option<Lock>,
}

impl Staging {
    /// The empty directory to apply the layer into.
    pub fn fs_dir(&self) -> PathBuf {
        self.dir.join("fs")
    }

    /// The layer to make.
    pub fn id(&self) -> &LayerId {
        &self.id
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next one who wants to make the layer.
        if self.lock.is_some() && record::remove_tree(&self.dir).is_err() {
            tracing::warn!(layer = %self.id, "a failed layer's staging directory could not be removed yet");
        }
    }
}

impl Store {
    /// Finds a layer, waits for another who makes it, or gives the caller the task to make it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn acquire(&self, id: &LayerId) -> Result<Acquired, StoreError> {
        let lock_path = self.layer_lock(id);
        loop {
            let shared = Lock::shared(&lock_path)?;
            if let Some(guard) = self.guard(id, shared) {
                return Ok(Acquired::Present(guard));
            }
            // The shared lock is gone; whoever is first now makes the layer, the others wait for a shared lock again.
            let Some(lock) = Lock::try_exclusive(&lock_path)? else { continue };
            if self.layer_dir(id).exists() {
                continue;
            }
            let dir = self.staging_dir(id);
            // With the exclusive lock in hand, what lies there is of one who was killed.
            record::remove_tree(&dir)?;
            super::make_dir(&dir, 0o700)?;
            super::make_dir(&dir.join("fs"), 0o755)?;
            return Ok(Acquired::Missing(Staging { id: *id, dir, lock: Some(lock) }));
        }
    }

    /// A layer that is there; `None` where it is not.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn layer(&self, id: &LayerId) -> Result<Option<LayerGuard>, StoreError> {
        Ok(self.guard(id, Lock::shared(&self.layer_lock(id))?))
    }

    /// What the store knows of a layer.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn layer_record(&self, id: &LayerId) -> Result<Option<LayerRecord>, StoreError> {
        record::read(&self.layer_dir(id).join("layer.json"))
    }

    /// Makes verified layers durable with one sync, then visible.
    ///
    /// # Errors
    /// [`StoreError`]; then none of the layers that come after the failing one is visible.
    pub fn commit_layers(&self, layers: Vec<(Staging, LayerRecord)>) -> Result<Vec<LayerGuard>, StoreError> {
        for (staging, layer) in &layers {
            debug_assert_eq!(staging.id, layer.id, "a layer is committed under its own name");
            let path = staging.dir.join("layer.json");
            let json = serde_json::to_vec(layer).map_err(|source| StoreError::Record { path: path.clone(), source })?;
            fs::write(&path, json).map_err(io_error("write", path))?;
        }
        self.sync()?;
        // From the rename until the shared lock is held, the layer is nobody's: no collector may look meanwhile.
        let _present = Lock::shared(&self.retiring_lock())?;
        let mut locks = Vec::with_capacity(layers.len());
        for (mut staging, layer) in layers {
            let place = self.layer_dir(&layer.id);
            fs::rename(&staging.dir, &place).map_err(io_error("make the layer visible as", place))?;
            locks.extend(staging.lock.take().map(|lock| (layer.id, lock)));
        }
        let all = self.path(&["layers"]);
        record::sync_dir(&all).map_err(io_error("sync", all))?;
        let mut guards = Vec::with_capacity(locks.len());
        for (id, lock) in locks {
            let guard = self.guard(&id, lock.downgrade()?);
            guards.push(guard.ok_or_else(|| StoreError::NoLayer { id, path: self.root().into() })?);
        }
        Ok(guards)
    }

    fn guard(&self, id: &LayerId, shared: Lock) -> Option<LayerGuard> {
        let fs = self.layer_dir(id).join("fs");
        fs.is_dir().then(|| LayerGuard { id: *id, fs, _lock: shared })
    }

    pub(super) fn layer_dir(&self, id: &LayerId) -> PathBuf {
        self.path(&["layers", &id.file_name()])
    }

    pub(super) fn staging_dir(&self, id: &LayerId) -> PathBuf {
        self.path(&["staging", &id.file_name()])
    }

    /// Shared by those who make layers visible, exclusive for those who take them out of sight, and each only for that moment.
    pub(super) fn retiring_lock(&self) -> PathBuf {
        self.path(&["locks", "retiring"])
    }

    pub(super) fn layer_lock(&self, id: &LayerId) -> PathBuf {
        self.path(&["locks", &id.file_name()])
    }
}

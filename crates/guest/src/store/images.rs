//! Images: which layers, under which names, and what spoke for them when they came.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nacre_core::Digest;
use nacre_oci::{
    manifest::{ImageConfig, RawManifest},
    reference::Location,
};
use serde::{Deserialize, Serialize};

use super::{LayerId, Lock, Store, StoreError, io_error, record};

/// The name of a lazy image's metadata blob.
const METADATA: &str = "metadata";

/// A layer of a stored image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLayer {
    /// Digest of the blob as the registry has it (ciphertext, where it is encrypted).
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// The layer's name in the store.
    pub id: LayerId,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The platform manifest's digest; the image's name in the store.
    pub manifest: Digest,
    /// The manifest's media type.
    pub media_type: String,
    /// The layers, the bottom one first, as often as the manifest has them.
    pub layers: Vec<StoredLayer>,
    /// What is stacked to mount it, the bottom first: each layer once, and what lies between them.
    pub stack: Vec<LayerId>,
    /// The layer whose root directory is the image's.
    pub root: Option<LayerId>,
    /// The image config.
    pub config: ImageConfig,
    /// Of a lazy image, which has no layers and is mounted in place of a stack; `metadata` beside the record is its metadata blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy: Option<LazyRecord>,
}

/// Sizes of a lazy image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyRecord {
    /// Bytes of file content.
    pub content_bytes: u64,
    /// Bytes of its data blobs.
    pub stored_bytes: u64,
}

/// A name that was pulled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefRecord {
    /// The location as it was asked for, with its transport.
    pub name: String,
    /// The image.
    pub manifest: Digest,
    /// What the name resolved through: the index, where there was one, then the manifest.
    pub chain: Vec<Digest>,
    /// The indexes of the chain, as they came.
    pub indexes: Vec<String>,
    /// When it was pulled, RFC 3339, by the guest's clock.
    pub pulled: String,
    /// Who vouched for it then, for people. What decides is the policy, on every use anew.
    pub admitted: String,
    /// The answers of the signature storage at the time, so that the policy can be evaluated again without a network.
    pub signatures: serde_json::Value,
}

impl Store {
    /// Records an image and the name it was pulled by. The caller holds guards of all its layers.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn put_image(
        &self,
        image: &ImageRecord,
        manifest: &RawManifest,
        config: &[u8],
        name: &RefRecord,
    ) -> Result<(), StoreError> {
        self.put(image, manifest, config, name, None)
    }

    /// The same of a lazy image, whose verified metadata blob lies at a path on the store's filesystem, and is moved from there.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn put_lazy_image(
        &self,
        image: &ImageRecord,
        manifest: &RawManifest,
        config: &[u8],
        name: &RefRecord,
        metadata: &Path,
    ) -> Result<(), StoreError> {
        self.put(image, manifest, config, name, Some(metadata))
    }

    fn put(
        &self,
        image: &ImageRecord,
        manifest: &RawManifest,
        config: &[u8],
        name: &RefRecord,
        metadata: Option<&Path>,
    ) -> Result<(), StoreError> {
        let _lock = self.lock_names()?;
        let dir = self.image_dir(&image.manifest);
        super::make_dir(&dir, 0o700)?;
        if let Some(metadata) = metadata {
            move_durably(metadata, &dir.join(METADATA)).map_err(io_error("move the metadata to", &dir))?;
        }
        if self.image(&image.manifest)?.as_ref() == Some(image) {
            // Whoever wrote it may have been killed before its name was synced.
            record::sync_dir(&dir).map_err(io_error("sync", dir))?;
        } else {
            record::write_atomically(&dir.join("manifest.json"), manifest.bytes())?;
            record::write_atomically(&dir.join("config.json"), config)?;
            // Last: an image is there when this is.
            record::write(&dir.join("image.json"), image)?;
        }
        record::write(&self.ref_path(&name.name), name)
    }

    /// The image of a manifest digest.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn image(&self, manifest: &Digest) -> Result<Option<ImageRecord>, StoreError> {
        record::read(&self.image_dir(manifest).join("image.json"))
    }

    /// The manifest of a stored image, as its registry had it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn image_manifest(&self, manifest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        record::read_bytes(&self.image_dir(manifest).join("manifest.json"))
    }

    /// The config of a stored image, as its registry had it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn image_config(&self, manifest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        record::read_bytes(&self.image_dir(manifest).join("config.json"))
    }

    /// The metadata blob of a stored lazy image; `None` where it is not there.
    pub fn image_metadata(&self, manifest: &Digest) -> Option<PathBuf> {
        Some(self.image_dir(manifest).join(METADATA)).filter(|path| path.exists())
    }

    /// Records another name of a stored image, or the same again; whether the image is still there.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn put_name(&self, name: &RefRecord) -> Result<bool, StoreError> {
        let _lock = self.lock_names()?;
        if self.image(&name.manifest)?.is_none() {
            return Ok(false);
        }
        record::write(&self.ref_path(&name.name), name)?;
        Ok(true)
    }

    /// What a location resolved to when it was last pulled.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn name(&self, location: &Location) -> Result<Option<RefRecord>, StoreError> {
        record::read(&self.ref_path(&location.to_string()))
    }

    /// All names, sorted.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn names(&self) -> Result<Vec<RefRecord>, StoreError> {
        let dir = self.path(&["refs"]);
        let mut names: Vec<RefRecord> = Vec::new();
        for file in record::list(&dir)? {
            names.extend(record::read::<RefRecord>(&dir.join(file))?);
        }
        names.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(names)
    }

    /// Finds an image by what a person would type: a location, a manifest digest, or at least six digits of one.
    ///
    /// # Errors
    /// [`StoreError::NoImage`], [`StoreError::Ambiguous`], and those of the files.
    pub fn find(&self, text: &str, location: Option<&Location>) -> Result<RefRecord, StoreError> {
        if let Some(location) = location
            && let Some(found) = self.name(location)?
        {
            return Ok(found);
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let is_prefix = digits.len() >= 6 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut found: Vec<RefRecord> =
            self.names()?.into_iter().filter(|name| is_prefix && name.manifest.hex().starts_with(digits)).collect();
        found.dedup_by_key(|name| name.manifest);
        match (found.pop(), found.len()) {
            (Some(only), 0) => Ok(only),
            (None, _) => Err(StoreError::NoImage { name: text.into(), path: self.root().into() }),
            (Some(_), more) => Err(StoreError::Ambiguous { name: text.into(), count: more + 1 }),
        }
    }

    pub(super) fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let dir = self.path(&["images"]);
        let mut images = Vec::new();
        for digest in record::list(&dir)?.iter().filter_map(|name| image_name(name)) {
            images.extend(self.image(&digest)?);
        }
        Ok(images)
    }

    /// Names and images change under this lock.
    pub(super) fn lock_names(&self) -> Result<Lock, StoreError> {
        Lock::exclusive(&self.path(&["locks", "names"]))
    }

    pub(super) fn image_dir(&self, manifest: &Digest) -> PathBuf {
        self.path(&["images", &file_name(manifest)])
    }

    pub(super) fn ref_path(&self, name: &str) -> PathBuf {
        self.path(&["refs", &format!("{}.json", Digest::sha256(name.as_bytes()).hex())])
    }
}

/// A file that is there as a whole or not at all.
fn move_durably(from: &Path, to: &Path) -> io::Result<()> {
    File::open(from)?.sync_all()?;
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
        moved => return moved,
    }
    let fresh = to.with_file_name(format!("{}{}", record::UNFINISHED, record::random_name()));
    let copied = fs::copy(from, &fresh).and_then(|_| File::open(&fresh)?.sync_all());
    copied.and_then(|()| fs::rename(&fresh, to)).inspect_err(|_| {
        let _ = fs::remove_file(&fresh);
    })
}

/// A digest as a file's name: `sha256-<hex>`.
fn file_name(digest: &Digest) -> String {
    digest.to_string().replace(':', "-")
}

/// The digest that a file's name says; `None` for what is no such name.
pub(super) fn image_name(name: &str) -> Option<Digest> {
    name.replacen('-', ":", 1).parse().ok()
}

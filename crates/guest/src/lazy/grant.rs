//! The right to mount a lazy image, on its way to another process: whoever makes one has admitted the image and unwrapped its key.
//!
//! It goes as a file in memory, since it holds keys, between processes of one user on one machine. Nothing in it is signed: **it is to be taken
//! only from who may mount images as well as the taker.**
//!
//! ```text
//! 0   NACRGRNT          8   version, 2                 12   bytes of the seven parts, 4 each, little-endian
//! 40  the image's key, or the index's, 32 or none; released credentials or none; the manifest; the rest, JSON; and of an ordinary image the index's
//!     manifest; the image's config; of each layer 48 bytes, key and nonce, zeroes where it is in the clear
//! ```

use std::{fs::File, io, os::unix::fs::FileExt as _, path::PathBuf};

use nacre_core::{SecretArray, SecretBytes};
use nacre_lazy::{index::LayerKey, keys::MetadataKey};
use nacre_oci::{
    crypt::LayerParts,
    manifest::{MANIFEST_LIMIT, ManifestError, RawManifest},
};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::origin::Origin;

const MAGIC: &[u8; 8] = b"NACRGRNT";
const VERSION: u32 = 2;
const PARTS: usize = 7;
const HEADER: usize = 12 + 4 * PARTS;
const KEY: usize = 32;
/// The most bytes of credentials, as of a file of them.
const RELEASED_LIMIT: usize = 4 << 20;
/// The most bytes of the rest: of a registries.conf with all its drop-ins, mostly.
const REST_LIMIT: usize = 16 << 20;
/// The key of a layer.
const LAYER: usize = LayerParts::SECRET_LEN;

/// What another process mounts an image by.
pub struct Grant {
    /// As a person named the image.
    pub reference: String,
    /// The image.
    pub manifest: RawManifest,
    /// Its key, where it is encrypted.
    pub key: Option<MetadataKey>,
    /// Where it is.
    pub origin: Origin,
    /// Credentials that a broker released.
    pub released: Option<SecretBytes>,
    /// The metadata blob, its own or its index's, where it is here already.
    pub metadata: Option<PathBuf>,
    /// What an ordinary image is read by.
    pub index: Option<IndexGrant>,
}

/// What it takes to read an ordinary image by an index that was admitted, too. The [grant's key](Grant::key) is the index's.
pub struct IndexGrant {
    /// The index.
    pub manifest: RawManifest,
    /// The image's config.
    pub config: Vec<u8>,
    /// What decrypts the image's layers.
    pub layer_keys: Vec<LayerKey>,
}

/// Why a file is no grant.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// It could not be read or written.
    #[error("the grant of a lazy image: {0}")]
    Io(#[from] io::Error),
    /// It is something else, or of another version.
    #[error("the grant of a lazy image: {0}")]
    Form(&'static str),
    /// So is its JSON.
    #[error("the grant of a lazy image: {0}")]
    Rest(#[from] serde_json::Error),
    /// So is its manifest.
    #[error("the grant of a lazy image: {0}")]
    Manifest(#[from] ManifestError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rest {
    reference: String,
    media_type: String,
    origin: Origin,
    metadata: Option<PathBuf>,
    /// The media type of the index's manifest.
    #[serde(default)]
    index: Option<String>,
}

impl Grant {
    /// With all that this process's environment and directory say written out, for a process of another.
    ///
    /// # Errors
    /// A file or directory that the configuration names cannot be read.
    pub fn settle(&mut self, variable: impl Fn(&str) -> Option<String>) -> io::Result<()> {
        let connection = &mut self.origin.connection;
        connection.client = std::mem::take(&mut connection.client).settled(variable)?;
        for path in connection.auth_files.iter_mut().chain(&mut self.metadata) {
            *path = std::path::absolute(&*path)?;
        }
        Ok(())
    }

    /// As a file in memory.
    ///
    /// # Errors
    /// [`GrantError::Io`]
    pub fn to_file(&self) -> Result<File, GrantError> {
        let rest = Rest {
            reference: self.reference.clone(),
            media_type: self.manifest.media_type().to_owned(),
            origin: self.origin.clone(),
            metadata: self.metadata.clone(),
            index: self.index.as_ref().map(|index| index.manifest.media_type().to_owned()),
        };
        let rest = Zeroizing::new(serde_json::to_vec(&rest)?);
        let key = self.key.as_ref().map_or(&[][..], |key| key.expose());
        let released = self.released.as_ref().map_or(&[][..], SecretBytes::expose);
        let (mut index, mut config, mut layers) = (&[][..], &[][..], Zeroizing::new(Vec::new()));
        if let Some(by) = &self.index {
            (index, config) = (by.manifest.bytes(), &by.config);
            layers.reserve_exact(LAYER * by.layer_keys.len());
            for key in &by.layer_keys {
                match key {
                    Some(key) => layers.extend_from_slice(key.to_secret().expose()),
                    None => layers.extend_from_slice(&[0; LAYER]),
                }
            }
        }
        let parts: [_; PARTS] = [key, released, self.manifest.bytes(), &rest, index, config, &layers];
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        for part in parts {
            let length = u32::try_from(part.len()).map_err(|_| GrantError::Form("it is too large"))?;
            header.extend_from_slice(&length.to_le_bytes());
        }
        let file = File::from(rustix::fs::memfd_create("nacre-grant", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        let mut at = 0;
        for part in std::iter::once(header.as_slice()).chain(parts) {
            file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        Ok(file)
    }

    /// From such a file.
    ///
    /// # Errors
    /// [`GrantError`]
    pub fn from_file(file: &File) -> Result<Self, GrantError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() < HEADER as u64 {
            return Err(GrantError::Form("it is none"));
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let word = |at: usize| {
            let bytes = header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            u32::from_le_bytes(bytes)
        };
        if !header.starts_with(MAGIC) {
            return Err(GrantError::Form("it is none"));
        }
        if word(8) != VERSION {
            return Err(GrantError::Form("it is of another version of this program"));
        }
        let mut at = HEADER as u64;
        let mut part = |number: usize, limit: usize| {
            let length = word(12 + 4 * number) as usize;
            if length > limit {
                return Err(GrantError::Form("one of its parts is too large"));
            }
            let mut bytes = Zeroizing::new(vec![0; length]);
            file.read_exact_at(&mut bytes, at)?;
            at += length as u64;
            Ok(bytes)
        };
        let (key, mut released) = (part(0, KEY)?, part(1, RELEASED_LIMIT)?);
        let (mut manifest, rest) = (part(2, MANIFEST_LIMIT)?, part(3, REST_LIMIT)?);
        let (mut by, mut config) = (part(4, MANIFEST_LIMIT)?, part(5, MANIFEST_LIMIT)?);
        let layers = part(6, MANIFEST_LIMIT)?;
        if at != metadata.len() {
            return Err(GrantError::Form("it goes on after its end"));
        }
        let key = match key.len() {
            0 => None,
            KEY => Some(MetadataKey::new(SecretArray::fill(|slot| slot.copy_from_slice(&key)))),
            _ => return Err(GrantError::Form("its key is none")),
        };
        let Rest { reference, media_type, origin, metadata, index } = serde_json::from_slice(&rest)?;
        let index = match index {
            Some(media_type) if layers.len().is_multiple_of(LAYER) => Some(IndexGrant {
                manifest: RawManifest::new(std::mem::take(&mut *by), Some(&media_type))?,
                config: std::mem::take(&mut *config),
                layer_keys: layers.chunks_exact(LAYER).map(layer_key).collect(),
            }),
            None if by.is_empty() && config.is_empty() && layers.is_empty() => None,
            _ => return Err(GrantError::Form("its index is none")),
        };
        let released = (!released.is_empty()).then(|| SecretBytes::new(std::mem::take(&mut *released)));
        let manifest = RawManifest::new(std::mem::take(&mut *manifest), Some(&media_type))?;
        Ok(Self { reference, manifest, key, origin, released, metadata, index })
    }
}

fn layer_key(bytes: &[u8]) -> LayerKey {
    let secret = SecretArray::fill(|slot: &mut [u8; LAYER]| slot.copy_from_slice(bytes));
    (*secret.expose() != [0; LAYER]).then(|| LayerParts::from_secret(&secret))
}

/// Overwrites a grant that nobody needs any more: others may still hold its file.
///
/// # Errors
/// The system's answer.
pub fn wipe(file: &File) -> io::Result<()> {
    let zeroes = [0; 4096];
    let mut left = file.metadata()?.len();
    let mut at = 0;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(zeroes.get(..length).unwrap_or_default(), at)?;
        (at, left) = (at + length as u64, left - length as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        let manifest = RawManifest::new(br#"{"schemaVersion":2,"layers":[]}"#.to_vec(), None).unwrap();
        let origin = Origin { location: "docker://r.example/a:b".into(), connection: Default::default() };
        Grant {
            reference: "a".into(),
            manifest,
            key: Some(MetadataKey::new(SecretArray::fill(|slot| slot.fill(7)))),
            origin,
            released: Some(SecretBytes::new(b"{}".to_vec())),
            metadata: Some("/m".into()),
            index: None,
        }
    }

    fn by_index() -> Grant {
        let manifest = RawManifest::new(br#"{"schemaVersion":2,"layers":[],"x":1}"#.to_vec(), None).unwrap();
        let key = LayerParts::from_secret(&SecretArray::fill(|slot| slot.fill(5)));
        let index = IndexGrant { manifest, config: b"{}".to_vec(), layer_keys: vec![None, Some(key), None] };
        Grant { index: Some(index), ..grant() }
    }

    #[test]
    fn a_grant_arrives_as_it_was() {
        let there = Grant::from_file(&grant().to_file().unwrap()).unwrap();
        assert_eq!((there.reference.as_str(), there.manifest.digest()), ("a", grant().manifest.digest()));
        assert_eq!(there.key.unwrap().expose(), &[7; 32]);
        assert_eq!((there.origin, there.released.unwrap().expose()), (grant().origin, &b"{}"[..]));
        let plain = Grant { key: None, released: None, ..grant() };
        let there = Grant::from_file(&plain.to_file().unwrap()).unwrap();
        assert!(there.key.is_none() && there.released.is_none() && there.metadata == plain.metadata);
        assert!(there.index.is_none());
        let there = Grant::from_file(&by_index().to_file().unwrap()).unwrap().index.unwrap();
        assert_eq!(there.manifest.digest(), by_index().index.unwrap().manifest.digest());
        assert_eq!(there.config, b"{}");
        let keys: Vec<_> =
            there.layer_keys.iter().map(|key| key.as_ref().map(|key| *key.to_secret().expose())).collect();
        assert_eq!(keys, [None, Some([5; LAYER]), None]);
    }

    #[test]
    fn what_is_no_grant_is_refused_at_each_byte() {
        refused_at_each_byte(&grant());
        refused_at_each_byte(&by_index());
    }

    fn refused_at_each_byte(grant: &Grant) {
        let file = grant.to_file().unwrap();
        let length = file.metadata().unwrap().len();
        let mut good = vec![0; usize::try_from(length).unwrap()];
        file.read_exact_at(&mut good, 0).unwrap();
        for at in 0..HEADER {
            for bit in [1, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                file.write_all_at(&bad, 0).unwrap();
                assert!(Grant::from_file(&file).is_err(), "byte {at}");
            }
        }
        file.write_all_at(&good, 0).unwrap();
        for length in [0, 8, HEADER as u64, length - 1, length + 1] {
            file.set_len(length).unwrap();
            assert!(Grant::from_file(&file).is_err(), "{length} bytes");
        }
        let (reader, _writer) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(Grant::from_file(&pipe).is_err(), "a pipe would be waited for");
    }

    #[test]
    fn a_wiped_grant_holds_nothing() {
        let file = grant().to_file().unwrap();
        let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
        wipe(&file).unwrap();
        let mut bytes = vec![1; length];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}

//! The manifest of a lazy image: which blob is what, and how they are read from an image source.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek as _, Write as _},
    sync::Arc,
};

use nacre_core::{Algorithm, Digest};
use nacre_oci::{
    crypt::{CryptError, Keyring},
    manifest::{Descriptor, Manifest},
    source::ImageSource,
};

use crate::{
    format::{ARTIFACT_TYPE, BLOBS_LIMIT, DATA_TYPE, METADATA_TYPE, SEALED, TABLE_TYPE},
    image::{Metadata, OpenError},
    keys::MetadataKey,
    source::{BlobId, Blobs, SourceError},
};

/// How often the metadata is asked for again where it is wrong.
const METADATA_ATTEMPTS: u32 = 2;
/// Bytes of a request of it then.
const PART: u64 = 4 << 20;

/// Why a manifest is no lazy image's.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// It is some other kind of image.
    #[error(
        "this is no lazy image: its artifactType is {found}, not {ARTIFACT_TYPE}; make one with `nacre image copy --lazy`"
    )]
    Kind {
        /// As it is.
        found: String,
    },
    /// Its layers are not those of a lazy image.
    #[error("layer {index} of a lazy image is of type {found}; {expected} is expected")]
    Layer {
        /// Which.
        index: usize,
        /// As it is.
        found: String,
        /// As it must be.
        expected: String,
    },
    /// A digest that is not SHA-256.
    #[error("layer {index} has the digest {digest}; lazy images have SHA-256")]
    Digest {
        /// Which.
        index: usize,
        /// As it is.
        digest: Digest,
    },
    /// Its key cannot be unwrapped.
    #[error("the lazy image's key: {0}")]
    Key(#[from] CryptError),
}

/// What a lazy image consists of.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// Metadata: names, attributes, the config, where everything is.
    pub metadata: Descriptor,
    /// The chunk table; an image without file content has none.
    pub table: Option<Descriptor>,
    /// Data blobs.
    pub data: Vec<Descriptor>,
    /// Whether it is encrypted.
    pub sealed: bool,
}

/// Whether a manifest says that it is a lazy image.
pub fn is_lazy(manifest: &Manifest) -> bool {
    manifest.artifact_type.as_deref() == Some(ARTIFACT_TYPE)
}

impl Artifact {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ArtifactError`]
    pub fn parse(manifest: &Manifest) -> Result<Self, ArtifactError> {
        let shown = |text: &str| text.chars().take(200).collect::<String>();
        if !is_lazy(manifest) {
            let found = manifest.artifact_type.as_deref().map_or("missing".to_owned(), shown);
            return Err(ArtifactError::Kind { found });
        }
        let sealed = manifest.layers.first().is_some_and(|layer| layer.media_type.ends_with(SEALED));
        let suffix = if sealed { SEALED } else { "" };
        let types = [METADATA_TYPE, TABLE_TYPE].into_iter().chain(std::iter::repeat(DATA_TYPE));
        let expect = |index, found: &str, expected: &str| {
            Err(ArtifactError::Layer { index, found: shown(found), expected: expected.to_owned() })
        };
        for (index, (layer, kind)) in manifest.layers.iter().zip(types).enumerate() {
            if layer.media_type.strip_suffix(suffix) != Some(kind) {
                return expect(index, &layer.media_type, &format!("{kind}{suffix}"));
            }
            if layer.digest.algorithm() != Algorithm::Sha256 {
                return Err(ArtifactError::Digest { index, digest: layer.digest });
            }
        }
        let mut layers = manifest.layers.iter().cloned();
        let Some(metadata) = layers.next() else { return expect(0, "missing", METADATA_TYPE) };
        let (table, data) = (layers.next(), layers.collect::<Vec<_>>());
        if data.len() > BLOBS_LIMIT as usize {
            return expect(BLOBS_LIMIT as usize + 2, DATA_TYPE, "no layer");
        }
        Ok(Self { metadata, table, data, sealed })
    }

    /// The image's key, where it is encrypted.
    ///
    /// # Errors
    /// [`ArtifactError::Key`]
    pub fn unwrap(&self, keyring: &Keyring) -> Result<Option<MetadataKey>, ArtifactError> {
        if !self.sealed {
            return Ok(None);
        }
        Ok(Some(MetadataKey::new(keyring.unwrap(&self.metadata)?.into_key())))
    }

    /// The data blobs.
    pub fn blobs(&self) -> Vec<BlobId> {
        self.data.iter().filter_map(blob_id).collect()
    }

    /// The table's blob; an empty one where there is none.
    pub fn table_blob(&self) -> BlobId {
        self.table.as_ref().and_then(blob_id).unwrap_or(BlobId { digest: [0; 32], size: 0 })
    }

    /// All its blobs.
    pub fn descriptors(&self) -> impl Iterator<Item = &Descriptor> {
        std::iter::once(&self.metadata).chain(&self.table).chain(&self.data)
    }
}

/// The name of a descriptor's blob; `None` where its digest is not SHA-256.
pub fn blob_id(descriptor: &Descriptor) -> Option<BlobId> {
    let digest = descriptor.digest.as_bytes().try_into().ok()?;
    Some(BlobId { digest, size: descriptor.size })
}

/// The blobs of one image, from where the image is.
pub struct ImageBlobs {
    source: Arc<dyn ImageSource>,
    known: Vec<(BlobId, Descriptor)>,
}

impl ImageBlobs {
    /// Blobs of an image.
    pub fn new(source: Arc<dyn ImageSource>, artifact: &Artifact) -> Self {
        Self::of(source, artifact.descriptors())
    }

    /// Blobs that descriptors name.
    pub fn of<'a>(source: Arc<dyn ImageSource>, descriptors: impl IntoIterator<Item = &'a Descriptor>) -> Self {
        let named = descriptors.into_iter().filter_map(|layer| Some((blob_id(layer)?, layer.clone())));
        Self { source, known: named.collect() }
    }
}

impl fmt::Debug for ImageBlobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageBlobs({})", self.source.location())
    }
}

impl Blobs for ImageBlobs {
    fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8], attempt: u32) -> Result<(), SourceError> {
        let range = offset..offset + out.len() as u64;
        let failed = |reason: String, temporary| SourceError { blob: *blob, range: range.clone(), reason, temporary };
        let Some((_, descriptor)) = self.known.iter().find(|(id, _)| id == blob) else {
            return Err(failed("the image has no such blob".into(), false));
        };
        self.source
            .read_blob(descriptor, offset, out, attempt)
            .map_err(|error| failed(error.to_string(), error.is_temporary()))
    }
}

/// Fetches an image's metadata and verifies all of it; its EROFS image goes to a file, and the blob as it came to another, both empty. Where
/// one place gives something else than what the manifest names, the next one is asked.
///
/// # Errors
/// [`OpenError`]: the last place's
pub fn read_metadata(
    source: &dyn ImageSource,
    artifact: &Artifact,
    key: Option<&MetadataKey>,
    erofs: &mut File,
    copy: Option<&mut File>,
) -> Result<Metadata, OpenError> {
    let descriptor = &artifact.metadata;
    fetch_metadata(source, descriptor, erofs, copy, |stream, erofs| {
        Metadata::read(stream, &descriptor.digest, key, erofs)
    })
}

/// The same, of a metadata blob that something else reads and verifies.
///
/// # Errors
/// [`OpenError`]: the last place's
pub fn fetch_metadata<T>(
    source: &dyn ImageSource,
    descriptor: &Descriptor,
    erofs: &mut File,
    mut copy: Option<&mut File>,
    mut read: impl FnMut(&mut dyn Read, &mut File) -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let mut attempt = 0;
    loop {
        // The first place is asked for a stream, which is repeated where it breaks off.
        let mut blob = (attempt == 0).then(|| source.blob(descriptor).ok()).flatten();
        let mut parts = Parts { source, descriptor, at: 0, attempt, piece: Vec::new(), taken: 0 };
        let stream: &mut dyn Read = match &mut blob {
            Some(blob) => blob,
            None => &mut parts,
        };
        match read(&mut Copying { stream, copy: copy.as_deref_mut() }, erofs) {
            Err(error) if attempt < METADATA_ATTEMPTS && !matches!(error, OpenError::Local(_)) => {
                tracing::warn!("the metadata of {}: {error}; it is asked for again", source.location());
                for file in [Some(&mut *erofs), copy.as_deref_mut()].into_iter().flatten() {
                    file.set_len(0).and_then(|()| file.rewind()).map_err(OpenError::Local)?;
                }
                attempt += 1;
            }
            read => return read,
        }
    }
}

/// A stream that leaves a copy of what is read.
pub struct Copying<'a> {
    /// What is read.
    pub stream: &'a mut dyn Read,
    /// Where the copy goes.
    pub copy: Option<&'a mut File>,
}

impl Read for Copying<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(out)?;
        if let Some(copy) = &mut self.copy {
            copy.write_all(out.get(..length).unwrap_or_default())?;
        }
        Ok(length)
    }
}

/// A blob as a stream of parts, from the place that this attempt begins with.
struct Parts<'a> {
    source: &'a dyn ImageSource,
    descriptor: &'a Descriptor,
    at: u64,
    attempt: u32,
    piece: Vec<u8>,
    /// Of the piece.
    taken: usize,
}

impl Read for Parts<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.piece.len() {
            let length = (self.descriptor.size - self.at).min(PART);
            self.piece.resize(usize::try_from(length).unwrap_or(0), 0);
            self.source.read_blob(self.descriptor, self.at, &mut self.piece, self.attempt).map_err(io::Error::other)?;
            (self.at, self.taken) = (self.at + length, 0);
        }
        let length = self.piece.get(self.taken..).unwrap_or_default().read(out)?;
        self.taken += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(types: &[&str]) -> Manifest {
        let layer = |kind: &&str| Descriptor::of(kind, kind.as_bytes());
        Manifest {
            schema_version: 2,
            media_type: None,
            artifact_type: Some(ARTIFACT_TYPE.into()),
            config: Descriptor::of("application/vnd.oci.empty.v1+json", b"{}"),
            layers: types.iter().map(layer).collect(),
            subject: None,
            annotations: Default::default(),
        }
    }

    #[test]
    fn manifests_that_mix_things_up_are_refused() {
        let (metadata, table, data) = (METADATA_TYPE, TABLE_TYPE, DATA_TYPE);
        let sealed = |kind: &str| format!("{kind}{SEALED}");
        let good = Artifact::parse(&manifest(&[metadata, table, data, data])).unwrap();
        assert!(!good.sealed && good.blobs().len() == 2 && good.unwrap(&Keyring::new()).unwrap().is_none());
        let all = [sealed(metadata), sealed(table), sealed(data)];
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let encrypted = Artifact::parse(&manifest(&all)).unwrap();
        assert!(encrypted.sealed && encrypted.unwrap(&Keyring::new()).is_err());
        assert!(Artifact::parse(&manifest(&[metadata])).unwrap().table.is_none());
        for bad in [
            vec![],
            vec![table, metadata],
            vec![metadata, data],
            vec![metadata, table, table],
            vec![all[0], table],
            vec![metadata, all[1]],
            vec!["application/vnd.oci.image.layer.v1.tar+gzip"],
        ] {
            assert!(Artifact::parse(&manifest(&bad)).is_err(), "{bad:?}");
        }
        let other = Manifest { artifact_type: None, ..manifest(&[metadata]) };
        assert!(Artifact::parse(&other).unwrap_err().to_string().contains("no lazy image"));
    }
}

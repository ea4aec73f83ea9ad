//! A lazy image as what a copy makes: layers in, blobs and a manifest out.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    sync::{Mutex, PoisonError},
};

use nacre_core::{Algorithm, Digest};
use nacre_oci::{
    copy::{CopiedLayer, CopyError, Remade, Remake, Remaking},
    crypt::{LayerSecret, PUBOPTS_ANNOTATION},
    manifest::{Descriptor, Manifest, media},
    unpack::Limits,
};

use super::{BuildError, BuildOptions, Builder, Built, DataBlob, Report};
use crate::{
    format::{ARTIFACT_TYPE, ChunkEntry, DATA_TYPE, METADATA_TYPE, SEALED, TABLE_TYPE},
    keys::{Domain, MetadataKey},
};

/// The config of an artifact that has none of its own (image-spec, "Guidelines for Artifact Usage"): ours is in the metadata.
pub(crate) const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(crate) const EMPTY: &[u8] = b"{}";
/// The annotation without which no key is looked for: base64 of `{"cipher":"AES_256_GCM","hmac":"","cipheroptions":{}}`.
pub(crate) const PUBLIC_OPTIONS: &str = "eyJjaXBoZXIiOiJBRVNfMjU2X0dDTSIsImhtYWMiOiIiLCJjaXBoZXJvcHRpb25zIjp7fX0=";

/// An image that chunks are shared with.
pub struct Shared {
    /// Its data blobs.
    pub blobs: Vec<DataBlob>,
    /// Its table.
    pub entries: Vec<ChunkEntry>,
    /// Gives a blob, where the destination has to get it.
    pub open: Box<OpenBlob>,
}

/// Opens a data blob of another image, to be copied.
pub type OpenBlob = dyn Fn(&DataBlob) -> Result<Box<dyn Read + Send>, CopyError> + Send + Sync;

/// Makes lazy images.
pub struct LazyRemake {
    /// What equal content is recognised by; `None`: of each image for itself.
    pub domain: Option<Domain>,
    /// zstd's level for data.
    pub level: i32,
    /// Average bytes of a chunk.
    pub chunk: u32,
    /// Threads that compress.
    pub threads: usize,
    /// Limits of layers.
    pub limits: Limits,
    /// Images to share chunks with.
    pub shared: Vec<Shared>,
    /// What was made, an entry an image.
    pub reports: Mutex<Vec<Report>>,
}

fn failed(error: BuildError<CopyError>) -> CopyError {
    match error {
        BuildError::Upload(error) => error,
        // A stream of the copy says itself what is wrong.
        BuildError::Read(error) => match error.downcast::<CopyError>() {
            Ok(error) => error,
            Err(error) => match error.downcast::<nacre_oci::source::TransportError>() {
                Ok(error) => error.into(),
                Err(error) => CopyError::Remake(Box::new(BuildError::<CopyError>::Read(error))),
            },
        },
        other => CopyError::Remake(Box::new(other)),
    }
}

fn descriptor(blob: &DataBlob, media_type: &str) -> Result<Descriptor, CopyError> {
    let digest = Digest::from_raw(Algorithm::Sha256, &blob.digest)
        .ok_or_else(|| CopyError::Unsupported("a data blob has no SHA-256".into()))?;
    Ok(Descriptor::new(media_type, digest, blob.size))
}

fn data_blob(descriptor: &Descriptor) -> Result<DataBlob, CopyError> {
    match descriptor.digest.as_bytes().try_into() {
        Ok(digest) => Ok(DataBlob { digest, size: descriptor.size }),
        Err(_) => Err(CopyError::Unsupported("the destination names blobs by another digest than SHA-256".into())),
    }
}

impl LazyRemake {
    fn build(&self, image: &Remaking<'_>, domain: Option<&Domain>, data_type: &str) -> Result<Built, CopyError> {
        let options =
            BuildOptions { domain, level: self.level, chunk: self.chunk, threads: self.threads, limits: &self.limits };
        let mut builder = Builder::new(options).map_err(failed)?;
        for shared in &self.shared {
            builder.share(&shared.blobs, shared.entries.iter().copied());
        }
        for index in 0..image.layers() {
            image.layer(index, |tar, task| {
                let upload = |blob: &mut dyn Read| data_blob(&image.put(blob, data_type)?);
                builder.layer(tar, upload).map_err(failed)?;
                task.done("chunked");
                Ok(())
            })?;
        }
        builder.finish(image.config()).map_err(failed)
    }

    /// Copies a blob of a shared image, if the destination does not have it.
    fn bring(&self, image: &Remaking<'_>, blob: &DataBlob, descriptor: &Descriptor) -> Result<bool, CopyError> {
        if image.has(descriptor)? {
            return Ok(true);
        }
        let shared = self.shared.iter().find(|shared| shared.blobs.contains(blob));
        // A blob of this build, which was stored a moment ago, and may not be visible before the commit.
        let Some(shared) = shared else { return Ok(false) };
        image.put_verbatim(&mut (shared.open)(blob)?, descriptor)?;
        Ok(false)
    }
}

impl Remake for LazyRemake {
    fn remake(&self, image: &Remaking<'_>) -> Result<Remade, CopyError> {
        let random;
        let domain = match (image.recipients(), &self.domain) {
            (None, None) => None,
            (None, Some(_)) => {
                let problem = "a deduplication domain is for encrypted images: say for whom with --encrypt";
                return Err(CopyError::Unsupported(problem.into()));
            }
            (Some(_), Some(domain)) => Some(domain),
            (Some(_), None) => {
                random = Domain::random();
                Some(&random)
            }
        };
        let data_type = format!("{DATA_TYPE}{}", if domain.is_some() { SEALED } else { "" });
        let built = self.build(image, domain, &data_type)?;
        let (mut data, mut reused) = (Vec::new(), Vec::new());
        for blob in &built.blobs {
            let descriptor = descriptor(blob, &data_type)?;
            reused.push(self.bring(image, blob, &descriptor)?);
            data.push(descriptor);
        }
        let Built { metadata, table, key, report, .. } = built;
        let remade = manifest_of(image, Pieces { metadata, table, key: key.as_ref(), data, reused })?;
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
        Ok(remade)
    }
}

/// What a lazy image is made of, its data blobs stored already.
pub(super) struct Pieces<'a> {
    pub(super) metadata: File,
    /// Empty where no file has content.
    pub(super) table: File,
    /// `None`: it is not sealed.
    pub(super) key: Option<&'a MetadataKey>,
    pub(super) data: Vec<Descriptor>,
    /// Of each data blob, whether the destination had it.
    pub(super) reused: Vec<bool>,
}

/// Stores the rest of an image, its key wrapped for whom the copy is for, and gives its manifest.
pub(super) fn manifest_of(image: &Remaking<'_>, pieces: Pieces<'_>) -> Result<Remade, CopyError> {
    let Pieces { metadata: mut metadata_file, mut table, key, data, reused: data_reused } = pieces;
    let suffix = if key.is_some() { SEALED } else { "" };
    let mut metadata = image.put(&mut metadata_file, &format!("{METADATA_TYPE}{suffix}"))?;
    if let (Some(recipients), Some(key)) = (image.recipients(), key) {
        let key = nacre_core::SecretArray::fill(|slot| slot.copy_from_slice(key.expose()));
        let crypt = |source| CopyError::Crypt { layer: "metadata".into(), source };
        let secret = LayerSecret::of_key(key, metadata.digest);
        recipients.add_to(&mut metadata.annotations, &secret).map_err(crypt)?;
        metadata.annotations.insert(PUBOPTS_ANNOTATION.into(), PUBLIC_OPTIONS.into());
    }
    let (mut layers, mut reused) = (vec![metadata], vec![false]);
    let length = table.metadata().map_err(|source| CopyError::Remake(Box::new(source)))?.len();
    if length > 0 {
        layers.push(image.put(&mut table, &format!("{TABLE_TYPE}{suffix}"))?);
        reused.push(false);
    }
    layers.extend(data);
    reused.extend(data_reused);
    let mut empty = EMPTY;
    let config = image.put(&mut empty, EMPTY_TYPE)?;
    let copied = layers.iter().zip(reused).map(|(layer, reused)| CopiedLayer {
        from: layer.digest,
        to: layer.digest,
        size: layer.size,
        media_type: layer.media_type.clone(),
        reused,
    });
    let copied = copied.collect();
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: Some(ARTIFACT_TYPE.into()),
        config,
        layers,
        subject: None,
        // What the image's own manifest says of it may name what is sealed now.
        annotations: BTreeMap::new(),
    };
    Ok(Remade { manifest, layers: copied })
}

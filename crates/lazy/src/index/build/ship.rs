//! An index as what a copy makes: an image's layers in, an artifact about its manifest out.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nacre_core::SecretArray;
use nacre_oci::{
    copy::{CopiedLayer, CopyError, Remade, Remake, Remaking},
    crypt::{self, LayerSecret, PUBOPTS_ANNOTATION},
    manifest::{Manifest, media},
    source::TransportError,
    unpack::Limits,
};

use super::{IndexBuildError, IndexBuilder, IndexedLayer};
use crate::{
    build::{EMPTY, EMPTY_TYPE, PUBLIC_OPTIONS},
    format::SEALED,
    index::format::{ARTIFACT_TYPE, METADATA_TYPE, PAGES_TYPE},
    keys::MetadataKey,
};

/// What an index came to.
#[derive(Clone, Debug)]
pub struct IndexReport {
    /// Its layers.
    pub layers: Vec<IndexedLayer>,
    /// Bytes of the metadata blob.
    pub metadata_bytes: u64,
    /// Bytes of the blob of windows and pages.
    pub pages_bytes: u64,
    /// Bytes of the windows among them.
    pub window_bytes: u64,
    /// Bytes of all files.
    pub content_bytes: u64,
    /// How long it took.
    pub time: Duration,
}

/// Makes indexes.
pub struct IndexRemake {
    /// About how many bytes of tar a span has.
    pub span: u64,
    /// Limits of layers.
    pub limits: Limits,
    /// What was made.
    pub reports: Mutex<Vec<IndexReport>>,
}

fn failed(layer: &str, error: IndexBuildError) -> CopyError {
    match error {
        // A stream of the copy says itself what is wrong.
        IndexBuildError::Read(error) => match error.downcast::<CopyError>() {
            Ok(error) => error,
            Err(error) => match error.downcast::<TransportError>() {
                Ok(error) => error.into(),
                Err(source) => CopyError::Stream { what: layer.into(), source },
            },
        },
        IndexBuildError::Crypt(source) => CopyError::Crypt { layer: layer.into(), source },
        other => CopyError::Remake(format!("layer {layer}: {other}").into()),
    }
}

impl Remake for IndexRemake {
    fn remake(&self, image: &Remaking<'_>) -> Result<Remade, CopyError> {
        let start = Instant::now();
        let key = image.recipients().map(|_| MetadataKey::new(SecretArray::random()));
        if key.is_none() && image.manifest().layers.iter().any(crypt::is_encrypted) {
            let problem =
                "the image is encrypted, and an index in the clear would show its names: say for whom with --encrypt";
            return Err(CopyError::Unsupported(problem.into()));
        }
        let made = |error| failed("of the image", error);
        let mut builder = IndexBuilder::new(key.as_ref(), self.span, &self.limits).map_err(made)?;
        let mut layers = Vec::new();
        for (index, layer) in image.manifest().layers.iter().enumerate() {
            let name = layer.digest.to_string();
            layers.push(image.stored_layer(index, |stored, layer, task| {
                builder.layer(stored, layer, task).map_err(|error| failed(&name, error))
            })?);
        }
        let mut built = builder.finish().map_err(made)?;

        let suffix = if key.is_some() { SEALED } else { "" };
        let mut metadata = image.put(&mut built.metadata, &format!("{METADATA_TYPE}{suffix}"))?;
        if let (Some(recipients), Some(key)) = (image.recipients(), &key) {
            let key = SecretArray::fill(|slot| slot.copy_from_slice(key.expose()));
            let crypt = |source| CopyError::Crypt { layer: "metadata".into(), source };
            let secret = LayerSecret::of_key(key, metadata.digest);
            recipients.add_to(&mut metadata.annotations, &secret).map_err(crypt)?;
            metadata.annotations.insert(PUBOPTS_ANNOTATION.into(), PUBLIC_OPTIONS.into());
        }
        let mut blobs = vec![metadata];
        if built.pages_bytes > 0 {
            blobs.push(image.put(&mut built.pages, &format!("{PAGES_TYPE}{suffix}"))?);
        }
        let config = image.put(&mut &*EMPTY, EMPTY_TYPE)?;
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).push(IndexReport {
            layers,
            metadata_bytes: built.metadata_bytes,
            pages_bytes: built.pages_bytes,
            window_bytes: built.window_bytes,
            content_bytes: built.content_bytes,
            time: start.elapsed(),
        });
        let copied = |layer: &nacre_oci::manifest::Descriptor| CopiedLayer {
            from: layer.digest,
            to: layer.digest,
            size: layer.size,
            media_type: layer.media_type.clone(),
            reused: false,
        };
        let copied = blobs.iter().map(copied).collect();
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: Some(ARTIFACT_TYPE.into()),
            config,
            layers: blobs,
            subject: Some(image.subject()),
            annotations: BTreeMap::new(),
        };
        Ok(Remade { manifest, layers: copied })
    }
}

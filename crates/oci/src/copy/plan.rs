//! What is to be done to each layer of an image, decided before anything is copied.

use std::collections::BTreeSet;

use super::{CopyError, CopyOptions, Format, Recompress};
use crate::{
    manifest::{Compression, Descriptor, LayerType, Manifest, RawManifest, media},
    reference::Location,
};

/// Which layers are encrypted: skopeo's `--encrypt-layer`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EncryptLayers {
    /// Every one.
    #[default]
    All,
    /// Those with these numbers: 0 is the bottom one, -1 the top one.
    Some(Vec<i64>),
}

impl EncryptLayers {
    /// The numbers, counted from the bottom.
    fn resolve(&self, layers: usize) -> Result<BTreeSet<usize>, CopyError> {
        let Self::Some(numbers) = self else { return Ok((0..layers).collect()) };
        let count = i64::try_from(layers).unwrap_or(i64::MAX);
        let resolve = |number: &i64| {
            let absolute = if *number < 0 { number.saturating_add(count) } else { *number };
            usize::try_from(absolute).ok().filter(|absolute| *absolute < layers).ok_or_else(|| {
                CopyError::Unsupported(format!("layer {number} is to be encrypted, but the image has {layers} layers"))
            })
        };
        numbers.iter().map(resolve).collect()
    }
}

/// What is done to a layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerPlan {
    /// The layer at the source.
    pub(super) source: Descriptor,
    /// How it is compressed, where it is a layer that we know.
    pub(super) compression: Option<Compression>,
    /// Decrypt it.
    pub(super) decrypt: bool,
    /// Give it another compression.
    pub(super) recompress: Option<Recompress>,
    /// Encrypt it.
    pub(super) encrypt: bool,
    /// Its media type at the destination.
    pub(super) media_type: String,
}

impl LayerPlan {
    /// Whether the blob stays as it is.
    pub(super) fn verbatim(&self) -> bool {
        !self.decrypt && !self.encrypt && self.recompress.is_none()
    }
}

/// What is done to an image.
#[derive(Debug, PartialEq)]
pub(super) struct ImagePlan {
    /// The manifest's format at the destination.
    pub(super) format: Format,
    /// The layers, the bottom one first.
    pub(super) layers: Vec<LayerPlan>,
    /// Whether the manifest stays as it is.
    pub(super) verbatim: bool,
    /// Whether it is no image, but a signature, an attestation or the like.
    pub(super) artifact: bool,
}

/// What of the options matters to a plan.
pub(super) struct Wishes<'a> {
    pub(super) format: Option<Format>,
    pub(super) compression: Option<Recompress>,
    pub(super) decrypt: bool,
    pub(super) encrypt: Option<&'a EncryptLayers>,
    pub(super) destination: &'a Location,
}

impl<'a> Wishes<'a> {
    pub(super) fn of(options: &CopyOptions<'a>, destination: &'a Location) -> Self {
        Self {
            format: options.format,
            compression: options.compression,
            decrypt: options.decrypt.is_some(),
            encrypt: options.encrypt.map(|(_, layers)| layers),
            destination,
        }
    }

    /// What it takes to read layers, whatever is made of them.
    pub(super) fn to_read(options: &CopyOptions<'a>, destination: &'a Location) -> Self {
        let recompress = Recompress { to: Compression::None, level: None };
        Self { compression: Some(recompress), encrypt: None, format: None, ..Self::of(options, destination) }
    }
}

/// Decides what is done to an image.
pub(super) fn plan(raw: &RawManifest, manifest: &Manifest, wishes: &Wishes<'_>) -> Result<ImagePlan, CopyError> {
    let is_image = matches!(manifest.config.media_type.as_str(), media::OCI_CONFIG | media::DOCKER_CONFIG);
    let kinds: Vec<Option<LayerType>> =
        manifest.layers.iter().map(|layer| LayerType::parse(&layer.media_type).ok()).collect();
    // An artifact (a signature, an attestation) has nothing that could be converted, compressed or encrypted.
    if !is_image || kinds.iter().any(Option::is_none) {
        return artifact(raw, manifest, wishes);
    }
    let chosen = wishes.encrypt.map(|which| which.resolve(kinds.len())).transpose()?.unwrap_or_default();
    let mut layers = Vec::with_capacity(kinds.len());
    for (number, (layer, kind)) in manifest.layers.iter().zip(kinds.into_iter().flatten()).enumerate() {
        let decrypt = kind.encrypted && wishes.decrypt;
        let readable = decrypt || !kind.encrypted;
        let recompress = recompress(kind.compression, wishes).filter(|_| readable);
        layers.push(LayerPlan {
            source: layer.clone(),
            compression: Some(kind.compression),
            decrypt,
            recompress,
            encrypt: readable && chosen.contains(&number),
            media_type: layer.media_type.clone(),
        });
    }
    let source_format = format_of(raw);
    let format = format(source_format, &layers, wishes)?;
    for layer in &mut layers {
        if format != source_format || !layer.verbatim() {
            layer.media_type = media_type(layer, format);
        }
    }
    let verbatim = format == source_format && layers.iter().all(LayerPlan::verbatim);
    Ok(ImagePlan { format, layers, verbatim, artifact: false })
}

fn artifact(raw: &RawManifest, manifest: &Manifest, wishes: &Wishes<'_>) -> Result<ImagePlan, CopyError> {
    if matches!(wishes.destination, Location::DockerArchive { .. }) {
        return Err(CopyError::Unsupported(
            "a docker archive holds images only; this is another kind of artifact".into(),
        ));
    }
    let keep = |layer: &Descriptor| LayerPlan {
        source: layer.clone(),
        compression: None,
        decrypt: false,
        recompress: None,
        encrypt: false,
        media_type: layer.media_type.clone(),
    };
    let layers = manifest.layers.iter().map(keep).collect();
    Ok(ImagePlan { format: format_of(raw), layers, verbatim: true, artifact: true })
}

pub(super) fn format_of(raw: &RawManifest) -> Format {
    match raw.media_type() {
        media::DOCKER_MANIFEST | media::DOCKER_LIST => Format::Docker,
        _ => Format::Oci,
    }
}

/// The compression that a layer gets, where it is another one than it has.
fn recompress(has: Compression, wishes: &Wishes<'_>) -> Option<Recompress> {
    let wanted = match (wishes.destination, wishes.compression) {
        // `docker load` takes gzip too, but everything else that reads these archives expects plain tars.
        (Location::DockerArchive { .. }, _) => Recompress { to: Compression::None, level: None },
        (_, Some(wanted)) => wanted,
        // Nobody stores plain tars in a registry or a layout; skopeo does not, either.
        (Location::Dir(_), None) => return None,
        (_, None) if has == Compression::None => Recompress { to: Compression::Gzip, level: None },
        (_, None) => return None,
    };
    (wanted.to != has).then_some(wanted)
}

/// The format that all wishes together leave.
fn format(source: Format, layers: &[LayerPlan], wishes: &Wishes<'_>) -> Result<Format, CopyError> {
    let encrypted = layers.iter().any(|layer| layer.encrypt || still_encrypted(layer));
    let zstd = layers.iter().any(|layer| compression_after(layer) == Some(Compression::Zstd));
    if matches!(wishes.destination, Location::DockerArchive { .. }) {
        if wishes.format == Some(Format::Oci) {
            return Err(CopyError::Unsupported("a docker archive cannot have an OCI manifest".into()));
        }
        return match encrypted {
            true => Err(CopyError::Unsupported(
                "a docker archive cannot hold encrypted layers: give a decryption key, or another destination".into(),
            )),
            false => Ok(Format::Docker),
        };
    }
    match wishes.format {
        Some(Format::Docker) if encrypted => {
            Err(CopyError::Unsupported("Docker's format has no encrypted layers: use the OCI format".into()))
        }
        Some(Format::Docker) if zstd => {
            Err(CopyError::Unsupported("Docker's format has no zstd layers: use the OCI format".into()))
        }
        Some(format) => Ok(format),
        // An image that came with Docker's unofficial zstd type keeps it, as long as nothing else changes.
        None if encrypted || (zstd && layers.iter().any(|layer| layer.recompress.is_some())) => Ok(Format::Oci),
        None => Ok(source),
    }
}

fn still_encrypted(layer: &LayerPlan) -> bool {
    LayerType::parse(&layer.source.media_type).is_ok_and(|kind| kind.encrypted) && !layer.decrypt
}

fn compression_after(layer: &LayerPlan) -> Option<Compression> {
    layer.recompress.map(|recompress| recompress.to).or(layer.compression)
}

/// A layer's media type at the destination.
fn media_type(layer: &LayerPlan, format: Format) -> String {
    let source = &layer.source.media_type;
    let compression = compression_after(layer).unwrap_or(Compression::None);
    let foreign = source.starts_with(media::OCI_LAYER_NONDISTRIBUTABLE) || source == media::DOCKER_FOREIGN_GZIP;
    if format == Format::Docker {
        return match compression {
            Compression::None => media::DOCKER_LAYER,
            Compression::Gzip if foreign => media::DOCKER_FOREIGN_GZIP,
            Compression::Gzip => media::DOCKER_LAYER_GZIP,
            Compression::Zstd => media::DOCKER_LAYER_ZSTD,
        }
        .into();
    }
    let base = if foreign { media::OCI_LAYER_NONDISTRIBUTABLE } else { media::OCI_LAYER };
    let suffix = match compression {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    let encrypted = if layer.encrypt || still_encrypted(layer) { crate::crypt::ENCRYPTED_SUFFIX } else { "" };
    format!("{base}{suffix}{encrypted}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn planned(layers: &[&str], docker: bool, wishes: &Wishes<'_>) -> Result<ImagePlan, CopyError> {
        let (own, config) = match docker {
            true => (media::DOCKER_MANIFEST, media::DOCKER_CONFIG),
            false => (media::OCI_MANIFEST, media::OCI_CONFIG),
        };
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(own.into()),
            artifact_type: None,
            config: Descriptor::of(config, b"{}"),
            layers: layers.iter().map(|kind| Descriptor::of(kind, kind.as_bytes())).collect(),
            subject: None,
            annotations: std::collections::BTreeMap::new(),
        };
        let raw = RawManifest::new(serde_json::to_vec(&manifest).unwrap(), None).unwrap();
        plan(&raw, &manifest, wishes)
    }

    fn wishes(destination: &Location) -> Wishes<'_> {
        Wishes { format: None, compression: None, decrypt: false, encrypt: None, destination }
    }

    fn types(plan: &ImagePlan) -> Vec<&str> {
        plan.layers.iter().map(|layer| layer.media_type.as_str()).collect()
    }

    #[test]
    fn nothing_is_changed_without_need() {
        let layout: Location = "oci:/x".parse().unwrap();
        for (layers, docker) in [
            (vec![GZIP], false),
            (vec![media::DOCKER_LAYER_GZIP, media::DOCKER_FOREIGN_GZIP, media::DOCKER_LAYER_ZSTD], true),
            (vec!["application/vnd.oci.image.layer.v1.tar+zstd+encrypted", GZIP], false),
            (vec!["application/vnd.in-toto+json"], false),
        ] {
            let found = planned(&layers, docker, &wishes(&layout)).unwrap();
            assert!(found.verbatim);
            assert_eq!(types(&found), layers);
        }
        // Plain tars are compressed, but not into a directory.
        assert_eq!(types(&planned(&[media::OCI_LAYER], false, &wishes(&layout)).unwrap()), [GZIP]);
        let dir: Location = "dir:/x".parse().unwrap();
        assert!(planned(&[media::OCI_LAYER], false, &wishes(&dir)).unwrap().verbatim);
    }

    #[test]
    fn encryption_makes_oci_images_and_leaves_what_is_encrypted() {
        let layout: Location = "oci:/x".parse().unwrap();
        let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
        let all = EncryptLayers::All;
        let encrypt = Wishes { encrypt: Some(&all), ..wishes(&layout) };
        let found = planned(&[media::DOCKER_LAYER_GZIP, media::DOCKER_LAYER], true, &encrypt).unwrap();
        assert_eq!((found.format, types(&found)), (Format::Oci, vec![encrypted; 2]));
        let found = planned(&[encrypted, GZIP], false, &encrypt).unwrap();
        assert!(found.layers[0].verbatim() && found.layers[1].encrypt);
        // With a key it is decrypted, and encrypted anew.
        let both = Wishes { decrypt: true, ..encrypt };
        let found = planned(&[encrypted], false, &both).unwrap();
        assert!(found.layers[0].decrypt && found.layers[0].encrypt);
        // Recompression passes by what cannot be read.
        let zstd = Some(Recompress { to: Compression::Zstd, level: None });
        let found = planned(&[encrypted, GZIP], false, &Wishes { compression: zstd, ..wishes(&layout) }).unwrap();
        assert_eq!(types(&found), [encrypted, "application/vnd.oci.image.layer.v1.tar+zstd"]);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let layout: Location = "oci:/x".parse().unwrap();
        let archive: Location = "docker-archive:/x".parse().unwrap();
        let all = EncryptLayers::All;
        let zstd = Some(Recompress { to: Compression::Zstd, level: None });
        let docker = Some(Format::Docker);
        for bad in [
            Wishes { encrypt: Some(&all), ..wishes(&archive) },
            Wishes { format: Some(Format::Oci), ..wishes(&archive) },
            Wishes { encrypt: Some(&all), format: docker, ..wishes(&layout) },
            Wishes { compression: zstd, format: docker, ..wishes(&layout) },
        ] {
            assert!(matches!(planned(&[GZIP], false, &bad), Err(CopyError::Unsupported(_))));
        }
        assert!(planned(&["application/vnd.in-toto+json"], false, &wishes(&archive)).is_err());
        let found = planned(&[GZIP], false, &wishes(&archive)).unwrap();
        assert_eq!((found.format, types(&found)), (Format::Docker, vec![media::DOCKER_LAYER]));
    }
}

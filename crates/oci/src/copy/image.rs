//! Copies one image, or those of an index.

use std::{collections::BTreeMap, io::Read, sync::atomic::AtomicBool};

use nacre_core::{Digest, Untrusted};

use super::{
    CopiedImage, CopiedLayer, CopyError, Format, Job, Platforms,
    layer::{self, Layer},
    parallel,
    plan::{self, ImagePlan, LayerPlan, Wishes},
    remake::Remaking,
};
use crate::{
    manifest::{Descriptor, ImageConfig, Index, MANIFEST_LIMIT, Manifest, ManifestError, RawManifest, media},
    source::TransportError,
};

/// What BuildKit's attestations name their image by.
const ATTESTATION_OF: &str = "vnd.docker.reference.digest";

/// Copies the blobs of an image; gives its manifest as it is to be at the destination.
///
/// `entry` is what its index says of it.
pub(super) fn copy(
    job: &Job<'_>,
    raw: &RawManifest,
    entry: Option<&Descriptor>,
) -> Result<(RawManifest, Vec<CopiedLayer>), CopyError> {
    let invalid = CopyError::manifest(job.source);
    let manifest = Manifest::parse(raw).map_err(&invalid)?;
    let plan = plan::plan(raw, &manifest, &Wishes::of(job.options, job.sink.location()))?;
    if let Some(remake) = job.options.remake.filter(|remake| remake.wants(&manifest, plan.artifact)) {
        let config = if plan.artifact { None } else { Some(config_of(job, &manifest)?) };
        let plan = plan::plan(raw, &manifest, &Wishes::to_read(job.options, job.sink.location()))?;
        let remade = remake.remake(&Remaking::new(job, raw, &manifest, &plan, config))?;
        return Ok((serialise(&remade.manifest, media::OCI_MANIFEST).map_err(invalid)?, remade.layers));
    }
    if job.options.attach {
        let problem = format!("{} is no image of layers that are known: there is nothing to make of it", raw.digest());
        return Err(CopyError::Unsupported(problem));
    }
    if plan.artifact && job.options.encrypt.is_some() {
        if !entry.is_some_and(|entry| entry.annotations.contains_key(ATTESTATION_OF)) {
            return Err(CopyError::Unsupported(format!(
                "{} is no image: it has no layers that could be encrypted",
                raw.digest()
            )));
        }
        job.options.progress.note(&format!("attestation {} is not encrypted", raw.digest()));
    }
    let diff_ids = diff_ids(job, &manifest, &plan)?;
    let copied = layers(job, &plan, &diff_ids)?;
    let task = job.options.progress.begin("config", Some(manifest.config.size));
    layer::verbatim(job, &config(&manifest, &plan), task.as_ref(), &AtomicBool::new(false))?;
    let report = plan
        .layers
        .iter()
        .zip(&copied)
        .map(|(plan, (layer, reused))| CopiedLayer {
            from: plan.source.digest,
            to: layer.digest,
            size: layer.size,
            media_type: layer.media_type.clone(),
            reused: *reused,
        })
        .collect();
    if plan.verbatim {
        return Ok((raw.clone(), report));
    }
    let layers = copied.into_iter().map(|(layer, _)| layer).collect();
    let raw = rewritten(manifest, &plan, layers).map_err(invalid)?;
    Ok((raw, report))
}

/// The config's descriptor at the destination: the same bytes, under the format's media type.
fn config(manifest: &Manifest, plan: &ImagePlan) -> Descriptor {
    let mut config = manifest.config.clone();
    if !plan.verbatim {
        config.media_type = match plan.format {
            Format::Oci => media::OCI_CONFIG.into(),
            Format::Docker => media::DOCKER_CONFIG.into(),
        };
    }
    config
}

/// The manifest with other layers: the same fields in the same order for the same image.
fn rewritten(manifest: Manifest, plan: &ImagePlan, layers: Vec<Descriptor>) -> Result<RawManifest, ManifestError> {
    let media_type = match plan.format {
        Format::Oci => media::OCI_MANIFEST,
        Format::Docker => media::DOCKER_MANIFEST,
    };
    let config = config(&manifest, plan);
    let mut manifest = Manifest { media_type: Some(media_type.into()), config, layers, ..manifest };
    if plan.format == Format::Docker {
        // Docker's format has no annotations, and its readers may refuse fields that they do not know.
        manifest.annotations.clear();
        manifest.artifact_type = None;
        manifest.subject = None;
        for descriptor in manifest.layers.iter_mut().chain([&mut manifest.config]) {
            descriptor.annotations.clear();
        }
    }
    serialise(&manifest, media_type)
}

fn serialise<T: serde::Serialize>(document: &T, media_type: &str) -> Result<RawManifest, ManifestError> {
    let bytes = serde_json::to_vec(document).map_err(|source| ManifestError::Json { what: "manifest", source })?;
    RawManifest::new(bytes, Some(media_type))
}

/// The layers' diff_ids from the verified config, where a layer is to be changed.
fn diff_ids(job: &Job<'_>, manifest: &Manifest, plan: &ImagePlan) -> Result<Vec<Option<Digest>>, CopyError> {
    if plan.layers.iter().all(LayerPlan::verbatim) {
        return Ok(vec![None; plan.layers.len()]);
    }
    Ok(config_of(job, manifest)?.0.rootfs.diff_ids.into_iter().map(Some).collect())
}

/// The config, verified, and its bytes.
fn config_of(job: &Job<'_>, manifest: &Manifest) -> Result<(ImageConfig, Vec<u8>), CopyError> {
    let invalid = CopyError::manifest(job.source);
    let mut bytes = Vec::new();
    job.source
        .blob(&manifest.config)?
        .take(MANIFEST_LIMIT as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| CopyError::from_stream("the config", error))?;
    let config = ImageConfig::verify(Untrusted::new(bytes.clone()), manifest).map_err(invalid)?;
    Ok((config.into_inner(), bytes))
}

/// Copies the layers, several at a time; the same layer only once.
fn layers(job: &Job<'_>, plan: &ImagePlan, diff_ids: &[Option<Digest>]) -> Result<Vec<(Descriptor, bool)>, CopyError> {
    let mut distinct: Vec<Layer<'_>> = Vec::new();
    let mut places = Vec::with_capacity(plan.layers.len());
    for (plan, diff_id) in plan.layers.iter().zip(diff_ids) {
        let known = distinct.iter().position(|layer| layer.plan == plan && layer.diff_id == *diff_id);
        places.push(known.unwrap_or(distinct.len()));
        if known.is_none() {
            distinct.push(Layer { plan, diff_id: *diff_id });
        }
    }
    let copied = parallel::each(&distinct, job.options.parallel, |layer, stop| layer::copy(job, layer, stop))?;
    Ok(places.into_iter().filter_map(|place| copied.get(place).cloned()).collect())
}

/// Copies all images of an index; gives the index as it is to be at the destination.
pub(super) fn copy_index(
    job: &Job<'_>,
    raw: &RawManifest,
    depth: usize,
    images: &mut Vec<CopiedImage>,
    manifests: &mut Vec<RawManifest>,
) -> Result<RawManifest, CopyError> {
    debug_assert!(matches!(job.options.platforms, Platforms::All), "an index is only copied as a whole");
    let invalid = CopyError::manifest(job.source);
    let mut index = Index::parse(raw).map_err(&invalid)?;
    let mut renamed = BTreeMap::new();
    let mut any_oci = false;
    for entry in &mut index.manifests {
        let member = job.fetch(&entry.digest)?;
        if member.bytes().len() as u64 != entry.size || member.media_type() != entry.media_type {
            return Err(CopyError::Transport(TransportError::Malformed {
                what: format!("manifest {}", entry.digest),
                place: job.source.location().to_string(),
                reason: "it has another size or media type than the index says".into(),
            }));
        }
        let copied = job.manifest(&member, Some(entry), depth + 1, images, manifests)?;
        job.sink.put_manifest(&copied)?;
        any_oci |= plan::format_of(&copied) == Format::Oci;
        if copied.digest() != member.digest() {
            renamed.insert(entry.digest.to_string(), copied.digest().to_string());
            entry.digest = *copied.digest();
            entry.size = copied.bytes().len() as u64;
            entry.media_type = copied.media_type().into();
        }
    }
    if renamed.is_empty() {
        return Ok(raw.clone());
    }
    for entry in &mut index.manifests {
        if let Some(about) = entry.annotations.get_mut(ATTESTATION_OF)
            && let Some(new) = renamed.get(about)
        {
            about.clone_from(new);
        }
    }
    let media_type = if any_oci { media::OCI_INDEX } else { media::DOCKER_LIST };
    index.media_type = Some(media_type.into());
    serialise(&index, media_type).map_err(invalid)
}

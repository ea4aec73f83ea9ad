//! Stores signatures at the destination, each kind where the destination keeps it.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write as _},
    path::{Component, Path, PathBuf},
};

use nacre_core::Digest;
use serde_json::json;

use super::{CopyError, Job};
use crate::{
    manifest::{Descriptor, Manifest, ManifestError, RawManifest, media},
    reference::Location,
    source::TransportError,
    trust::{encode_blob, signature_tag},
};

/// The most signatures of one image at a lookaside.
const LOOKASIDE_LIMIT: usize = 128;

/// A cosign signature: what was signed, and the annotations that hold the signature.
pub(super) struct Attachment {
    pub(super) payload: Vec<u8>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// Stores cosign's signatures of a manifest, beside those that the destination has: under the manifest's signature tag, or as files
/// of `dir:`.
pub(super) fn put_cosign(job: &Job<'_>, manifest: &Digest, signatures: &[Attachment]) -> Result<(), CopyError> {
    let mut layers = Vec::new();
    for signature in signatures {
        if matches!(job.sink.location(), Location::Dir(_)) {
            let blob = encode_blob(&signature.payload, &signature.annotations);
            job.sink.put_native_signature(manifest, &blob)?;
            continue;
        }
        let mut layer = Descriptor::of(media::COSIGN_PAYLOAD, &signature.payload);
        job.sink.put_blob(&mut signature.payload.as_slice(), Some(&layer)).map_err(CopyError::from)?;
        layer.annotations.clone_from(&signature.annotations);
        layers.push(layer);
    }
    if layers.is_empty() { Ok(()) } else { put_layers(job, manifest, layers) }
}

/// Adds layers to the artifact under a manifest's signature tag.
fn put_layers(job: &Job<'_>, about: &Digest, layers: Vec<Descriptor>) -> Result<(), CopyError> {
    let tag = signature_tag(about);
    let invalid = |source| CopyError::Manifest { place: job.sink.location().to_string(), source };
    let mut manifest = match job.sink.tagged(&tag)? {
        Some(raw) => Manifest::parse(raw.peek()).map_err(invalid)?,
        None => Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: None,
            config: Descriptor::of(media::OCI_CONFIG, b""),
            layers: Vec::new(),
            subject: None,
            annotations: BTreeMap::new(),
        },
    };
    for layer in layers {
        if !manifest.layers.contains(&layer) {
            manifest.layers.push(layer);
        }
    }
    // The artifact is an image by its form, and readers compare its config with its layers.
    let diff_ids: Vec<Digest> = manifest.layers.iter().map(|layer| layer.digest).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
    let config = json!({ "architecture": "", "config": {}, "os": "", "rootfs": rootfs }).to_string().into_bytes();
    manifest.config = Descriptor::of(media::OCI_CONFIG, &config);
    job.sink.put_blob(&mut config.as_slice(), Some(&manifest.config))?;
    let bytes = serde_json::to_vec(&manifest)
        .map_err(|source| invalid(ManifestError::Json { what: "signature manifest", source }))?;
    let raw = RawManifest::new(bytes, Some(media::OCI_MANIFEST)).map_err(invalid)?;
    Ok(job.sink.put_tagged(&raw, &tag)?)
}

/// Stores a GPG signature: with the image where the destination stores any, or else where registries.d says.
pub(super) fn put_gpg(job: &Job<'_>, manifest: &Digest, signature: &[u8]) -> Result<(), CopyError> {
    let refusal = match job.sink.put_native_signature(manifest, signature) {
        Err(error @ TransportError::Unsupported { .. }) => error,
        other => return Ok(other?),
    };
    let Location::Docker(image) = job.sink.location() else { return Err(refusal.into()) };
    let url = |number| job.options.lookaside.and_then(|lookaside| lookaside.write_url(image, manifest, number));
    for number in 1..=LOOKASIDE_LIMIT {
        let Some(url) = url(number) else { return Err(refusal.into()) };
        let path = local_path(&url)?;
        if write_new(&path, signature)? {
            return Ok(());
        }
    }
    let what = format!("the number of signatures of {manifest}");
    let place = job.sink.location().to_string();
    Err(TransportError::TooLarge { what, place, limit: LOOKASIDE_LIMIT as u64 }.into())
}

fn local_path(url: &str) -> Result<PathBuf, TransportError> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    path.filter(|path| path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)).ok_or_else(
        || TransportError::Unsupported {
            what: "writing signatures (give registries.d a lookaside-staging of file:///)".into(),
            place: url.into(),
        },
    )
}

/// Writes a signature where there is no other one, all of it or nothing; whether the place was free (or holds the same one).
fn write_new(path: &Path, signature: &[u8]) -> Result<bool, TransportError> {
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| TransportError::Io { what, path, source }
    };
    if let Ok(found) = fs::read(path) {
        return Ok(found == signature);
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(io("making the directory", parent))?;
    let mut raw = [0; 8];
    rand_core::RngCore::fill_bytes(&mut rand_core::OsRng, &mut raw);
    let temp = parent.join(format!(".nacre-tmp-{:016x}", u64::from_ne_bytes(raw)));
    let written = fs::File::options().write(true).create_new(true).open(&temp).and_then(|mut file| {
        file.write_all(signature)?;
        file.sync_all()
    });
    // A link, unlike a rename, does not take the place of another writer's signature.
    let linked = written.and_then(|()| fs::hard_link(&temp, path));
    let _ = fs::remove_file(&temp);
    match linked {
        Ok(()) => {
            fs::File::open(parent)
                .and_then(|dir| dir.sync_all())
                .map_err(io("making the directory durable", parent))?;
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(io("writing the signature", path)(error)),
    }
}

//! `docker-archive:FILE[:REF]`: what `docker save` writes, and `docker load` reads.
//!
//! ```text
//! manifest.json   [{"Config": NAME, "RepoTags": [REF…], "Layers": [NAME…]}…]
//! NAME            configs and layers: <hex>.json and <hex>/layer.tar, <hex>.tar, or blobs/sha256/<hex>
//! ```
//!
//! There is no manifest in it that anyone could have signed, so one is made up: Docker v2 schema 2, with the layers as they are
//! stored. An uncompressed layer has its diff_id's digest; for a compressed one the digest that its name claims, or else that of its
//! bytes, which are hashed when the archive is opened. All of that is as untrusted as the archive, and checked by whoever reads.

use std::{
    collections::BTreeMap,
    io::Read,
    path::Path,
    sync::{Mutex, PoisonError},
};

use nacre_core::{Digest, Untrusted};
use serde::{Deserialize, Serialize};

use super::{
    files::{self, Extent},
    tar::{self, TarFile},
    tar_writer::TarWriter,
};
use crate::{
    manifest::{Descriptor, ImageConfig, LAYER_LIMIT, MANIFEST_LIMIT, Manifest, ManifestError, RawManifest, media},
    reference::{ImageRef, Location},
    source::{ImageSink, ImageSource, SignatureStorage, TransportError},
};

const MANIFEST_FILE: &str = "manifest.json";
/// The most images of an archive.
const IMAGE_LIMIT: usize = 4096;
/// The most names of an image.
const NAME_LIMIT: usize = 4096;

/// An image of an archive, as `manifest.json` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SavedImage {
    /// The config's name in the archive.
    pub config: String,
    /// The image's names.
    #[serde(default)]
    pub repo_tags: Option<Vec<String>>,
    /// The layers' names in the archive, the bottom one first.
    #[serde(default)]
    pub layers: Option<Vec<String>>,
}

/// Parses an archive's `manifest.json`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_saved(bytes: &[u8]) -> Result<Vec<SavedImage>, String> {
    let images: Vec<SavedImage> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if images.len() > IMAGE_LIMIT {
        return Err(format!("it has {} images; at most {IMAGE_LIMIT} are allowed", images.len()));
    }
    for image in &images {
        let (layers, names) = (image.layers.as_ref().map_or(0, Vec::len), image.repo_tags.as_ref().map_or(0, Vec::len));
        if layers > LAYER_LIMIT || names > NAME_LIMIT {
            return Err(format!(
                "an image has {layers} layers and {names} names; at most {LAYER_LIMIT} and {NAME_LIMIT} are allowed"
            ));
        }
    }
    Ok(images)
}

/// Finds the image that a reference, or none, means.
fn choose<'a>(images: &'a [SavedImage], wanted: Option<&ImageRef>) -> Result<&'a SavedImage, String> {
    let names = |image: &'a SavedImage| image.repo_tags.iter().flatten();
    let Some(wanted) = wanted else {
        return match images {
            [only] => Ok(only),
            [] => Err("it holds no image".into()),
            several => {
                let names: Vec<&str> = several.iter().flat_map(names).map(String::as_str).take(32).collect();
                Err(format!("it holds {} images, name one of them: {:.2000}", several.len(), names.join(", ")))
            }
        };
    };
    let is = |name: &String| name.parse::<ImageRef>().is_ok_and(|found| found.with_default_tag() == *wanted);
    let mut found = images.iter().filter(|image| names(image).any(is));
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(format!("two images are called {wanted}")),
        (None, _) => {
            let names: Vec<&str> = images.iter().flat_map(names).map(String::as_str).take(32).collect();
            Err(format!("it holds no image {wanted} (there are: {:.2000})", names.join(", ")))
        }
    }
}

/// An image of an archive.
pub(super) struct DockerArchiveSource {
    location: Location,
    place: String,
    manifest: RawManifest,
    blobs: BTreeMap<Digest, Extent>,
}

impl DockerArchiveSource {
    pub(super) fn open(path: &Path, reference: Option<&ImageRef>) -> Result<Self, TransportError> {
        let archive = TarFile::open(path)?;
        let bytes = archive.read(MANIFEST_FILE, MANIFEST_LIMIT)?.ok_or_else(|| TransportError::NotFound {
            what: format!("{MANIFEST_FILE} of a docker archive"),
            place: archive.place().into(),
        })?;
        let malformed =
            |reason| TransportError::Malformed { what: MANIFEST_FILE.into(), place: archive.place().into(), reason };
        let images = parse_saved(&bytes).map_err(malformed)?;
        let image = choose(&images, reference).map_err(malformed)?;
        let (manifest, blobs) = synthesise(&archive, image)?;
        let location = Location::DockerArchive { path: path.into(), reference: reference.cloned() };
        Ok(Self { location, place: archive.place().into(), manifest, blobs })
    }
}

/// Makes up the image's manifest.
fn synthesise(
    archive: &TarFile,
    image: &SavedImage,
) -> Result<(RawManifest, BTreeMap<Digest, Extent>), TransportError> {
    let place = archive.place();
    let invalid = |source| TransportError::Manifest { place: place.into(), source };
    let mut blobs = BTreeMap::new();
    let extent = find(archive, &image.config)?;
    let bytes = extent.read("the image's config", place, MANIFEST_LIMIT)?;
    let config = Descriptor::of(media::DOCKER_CONFIG, &bytes);
    blobs.insert(config.digest, extent);
    let parsed: ImageConfig =
        serde_json::from_slice(&bytes).map_err(|source| invalid(ManifestError::Json { what: "config", source }))?;
    let names = image.layers.as_deref().unwrap_or_default();
    if parsed.rootfs.diff_ids.len() != names.len() {
        return Err(TransportError::Malformed {
            what: MANIFEST_FILE.into(),
            place: place.into(),
            reason: format!("it has {} layers, the config has {}", names.len(), parsed.rootfs.diff_ids.len()),
        });
    }
    let mut layers = Vec::new();
    // An archive may name one file for many layers; each is hashed once.
    let mut hashed: BTreeMap<&str, Descriptor> = BTreeMap::new();
    for (name, diff_id) in names.iter().zip(&parsed.rootfs.diff_ids) {
        let extent = find(archive, name)?;
        let media_type = sniff(&extent, place)?;
        let descriptor = if media_type == media::DOCKER_LAYER {
            Descriptor::new(media_type, *diff_id, extent.size)
        } else if let Some(known) = hashed.get(name.as_str()) {
            known.clone()
        } else {
            let digest = match claimed(name) {
                Some(digest) => digest,
                None => hash(&extent, place)?,
            };
            Descriptor::new(media_type, digest, extent.size)
        };
        hashed.insert(name, descriptor.clone());
        blobs.insert(descriptor.digest, extent);
        layers.push(descriptor);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::DOCKER_MANIFEST.into()),
        artifact_type: None,
        config,
        layers,
        subject: None,
        annotations: BTreeMap::new(),
    };
    let bytes =
        serde_json::to_vec(&manifest).map_err(|source| invalid(ManifestError::Json { what: "manifest", source }))?;
    Ok((RawManifest::new(bytes, Some(media::DOCKER_MANIFEST)).map_err(invalid)?, blobs))
}

fn find(archive: &TarFile, name: &str) -> Result<Extent, TransportError> {
    let place = archive.place();
    let normal = tar::normalise(name, "").map_err(|error| TransportError::Malformed {
        what: MANIFEST_FILE.into(),
        place: place.into(),
        reason: error.to_string(),
    })?;
    archive
        .find(&normal)?
        .ok_or_else(|| TransportError::NotFound { what: format!("'{name:.200}'"), place: place.into() })
}

/// A layer's media type, by its first bytes.
fn sniff(extent: &Extent, place: &str) -> Result<&'static str, TransportError> {
    let start = Extent { size: extent.size.min(4), ..extent.clone() }.read("a layer", place, 4)?;
    Ok(match start.as_slice() {
        [0x1f, 0x8b, ..] => media::DOCKER_LAYER_GZIP,
        [0x28, 0xb5, 0x2f, 0xfd] => media::DOCKER_LAYER_ZSTD,
        _ => media::DOCKER_LAYER,
    })
}

/// The digest in a name such as `blobs/sha256/<hex>`.
fn claimed(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

fn hash(extent: &Extent, place: &str) -> Result<Digest, TransportError> {
    // Of the descriptor only the size counts: it is the extent's own.
    let descriptor = Descriptor::new(media::DOCKER_LAYER, Digest::sha256(b""), extent.size);
    let mut content = extent.clone().stream(&descriptor, place)?;
    files::store(&mut content, None, place, |_, _| Ok(())).map(|(digest, _)| digest)
}

impl ImageSource for DockerArchiveSource {
    fn location(&self) -> &Location {
        &self.location
    }

    fn manifest(&self, digest: Option<&Digest>) -> Result<Untrusted<RawManifest>, TransportError> {
        match digest {
            Some(digest) if Digest::of(digest.algorithm(), self.manifest.bytes()) != *digest => {
                Err(TransportError::NotFound { what: format!("manifest {digest}"), place: self.place.clone() })
            }
            _ => Ok(Untrusted::new(self.manifest.clone())),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, TransportError> {
        let extent = self.blobs.get(&descriptor.digest).ok_or_else(|| TransportError::NotFound {
            what: format!("blob {}", descriptor.digest),
            place: self.place.clone(),
        })?;
        extent.clone().stream(descriptor, &self.place)
    }

    fn signatures(&self) -> Option<&dyn SignatureStorage> {
        None
    }
}

/// Writes an archive of one image: layers as they come (`docker load` wants them uncompressed), the config, `manifest.json`.
pub(super) struct DockerArchiveSink {
    location: Location,
    reference: Option<ImageRef>,
    writer: TarWriter,
    /// What the blobs are called.
    names: Mutex<BTreeMap<Digest, String>>,
}

impl DockerArchiveSink {
    pub(super) fn create(path: &Path, reference: Option<&ImageRef>) -> Result<Self, TransportError> {
        // The archive may hold other images, which would be lost.
        if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0) {
            return Err(TransportError::Unsupported {
                what: "adding an image to an archive that is there already: give another file".into(),
                place: path.display().to_string(),
            });
        }
        Ok(Self {
            location: Location::DockerArchive { path: path.into(), reference: reference.cloned() },
            reference: reference.cloned(),
            writer: TarWriter::create(path)?,
            names: Mutex::default(),
        })
    }

    fn unsupported<T>(&self, what: &str) -> Result<T, TransportError> {
        Err(TransportError::Unsupported { what: what.into(), place: self.location.to_string() })
    }
}

impl ImageSink for DockerArchiveSink {
    fn location(&self) -> &Location {
        &self.location
    }

    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError> {
        Ok(self.writer.blob(&descriptor.digest) == Some(descriptor.size))
    }

    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError> {
        let is_config =
            expected.is_some_and(|blob| matches!(blob.media_type.as_str(), media::DOCKER_CONFIG | media::OCI_CONFIG));
        let name = |digest: &Digest| format!("{}.{}", digest.hex(), if is_config { "json" } else { "tar" });
        let stored = self.writer.put_blob(content, expected, name)?;
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.entry(stored.0).or_insert_with(|| name(&stored.0));
        Ok(stored)
    }

    fn put_manifest(&self, _manifest: &RawManifest) -> Result<(), TransportError> {
        self.unsupported("more than one manifest: choose a platform")
    }

    fn put_tagged(&self, _manifest: &RawManifest, _tag: &str) -> Result<(), TransportError> {
        self.unsupported("signatures")
    }

    fn put_native_signature(&self, _manifest: &Digest, _signature: &[u8]) -> Result<(), TransportError> {
        self.unsupported("signatures")
    }

    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        let invalid = |source| TransportError::Manifest { place: self.writer.place(), source };
        let manifest = Manifest::parse(manifest).map_err(invalid)?;
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |blob: &Descriptor| {
            names.get(&blob.digest).cloned().ok_or_else(|| TransportError::NotFound {
                what: format!("blob {}", blob.digest),
                place: self.writer.place(),
            })
        };
        let saved = [SavedImage {
            config: name(&manifest.config)?,
            repo_tags: Some(self.reference.iter().map(ImageRef::to_string).collect()),
            layers: Some(manifest.layers.iter().map(name).collect::<Result<_, _>>()?),
        }];
        let bytes =
            serde_json::to_vec(&saved).map_err(|source| invalid(ManifestError::Json { what: "manifest", source }))?;
        self.writer.put_file(MANIFEST_FILE, &bytes)?;
        self.writer.commit()
    }
}

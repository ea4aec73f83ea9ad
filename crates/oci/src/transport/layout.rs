//! OCI image layouts (image spec 1.1), as directories and in tar files:
//!
//! ```text
//! oci-layout               {"imageLayoutVersion":"1.0.0"}
//! index.json               the images: descriptors, named by the annotation org.opencontainers.image.ref.name
//! blobs/<algorithm>/<hex>  manifests, configs, layers
//! ```
//!
//! Signatures are images of the layout like others: cosign's under the name `sha256-<hex>.sig`, and artifacts with a `subject` as
//! entries of `index.json` that have an `artifactType` and no name. A blob's file name comes from a parsed [`Digest`] only.

use std::{collections::BTreeMap, io::Read};

use nacre_core::{Digest, Untrusted};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::files::Extent;
use crate::{
    manifest::{Descriptor, Index, MANIFEST_LIMIT, ManifestError, RawManifest, media},
    reference::Location,
    source::{ImageSource, SignatureStorage, TransportError},
};

/// The annotation that names an image of a layout.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// containerd's annotation of the full name, beside a `ref.name` that is the tag only.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The file that says that a directory is a layout.
pub(super) const LAYOUT_FILE: &str = "oci-layout";
/// The file that lists the images.
pub(super) const INDEX_FILE: &str = "index.json";
/// What our layouts have in [`LAYOUT_FILE`].
pub(super) const LAYOUT_VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// How many artifacts of a layout are looked at in search of referrers.
const REFERRER_LIMIT: usize = 1024;

/// The files of a layout, wherever they are.
pub(super) trait LayoutFiles: Send + Sync {
    /// For messages.
    fn place(&self) -> String;
    /// A whole small file at the top of the layout.
    fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, TransportError>;
    /// Where a blob is.
    fn blob(&self, digest: &Digest) -> Result<Option<Extent>, TransportError>;
}

/// An image of a layout.
pub(super) struct LayoutSource<F> {
    location: Location,
    name: Option<String>,
    files: F,
    index: Index,
}

impl<F: LayoutFiles> LayoutSource<F> {
    pub(super) fn open(location: Location, name: Option<String>, files: F) -> Result<Self, TransportError> {
        let place = files.place();
        let missing =
            |what: &str| TransportError::NotFound { what: format!("{what} of an OCI layout"), place: place.clone() };
        let version = files.read(LAYOUT_FILE, 4096)?.ok_or_else(|| missing(LAYOUT_FILE))?;
        check_version(&version, &place)?;
        let bytes = files.read(INDEX_FILE, MANIFEST_LIMIT)?.ok_or_else(|| missing(INDEX_FILE))?;
        let index = parse_index(bytes)
            .map_err(|source| TransportError::Manifest { place: format!("{place}, {INDEX_FILE}"), source })?;
        Ok(Self { location, name, files, index })
    }

    fn read_manifest(&self, digest: &Digest, served_as: Option<&str>) -> Result<RawManifest, TransportError> {
        let place = self.files.place();
        let what = format!("manifest {digest}");
        let extent = self
            .files
            .blob(digest)?
            .ok_or_else(|| TransportError::NotFound { what: what.clone(), place: place.clone() })?;
        let bytes = extent.read(&what, &place, MANIFEST_LIMIT)?;
        RawManifest::new(bytes, served_as)
            .map_err(|source| TransportError::Manifest { place: format!("{place}, {what}"), source })
    }

    /// Follows an entry of `index.json`. Nobody but us knows its digest, so it is checked here.
    fn follow(&self, entry: &Descriptor) -> Result<Untrusted<RawManifest>, TransportError> {
        let raw = self.read_manifest(&entry.digest, Some(&entry.media_type))?;
        let found = Digest::of(entry.digest.algorithm(), raw.bytes());
        if found != entry.digest {
            let what = format!("manifest {} at {}", entry.digest, self.files.place());
            return Err(TransportError::DigestMismatch { what, expected: entry.digest, found });
        }
        Ok(Untrusted::new(raw))
    }
}

impl<F: LayoutFiles> ImageSource for LayoutSource<F> {
    fn location(&self) -> &Location {
        &self.location
    }

    fn manifest(&self, digest: Option<&Digest>) -> Result<Untrusted<RawManifest>, TransportError> {
        match digest {
            Some(digest) => self.read_manifest(digest, None).map(Untrusted::new),
            None => self.follow(choose(&self.index, self.name.as_deref(), &self.files.place())?),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, TransportError> {
        let place = self.files.place();
        let extent = self.files.blob(&descriptor.digest)?.ok_or_else(|| TransportError::NotFound {
            what: format!("blob {}", descriptor.digest),
            place: place.clone(),
        })?;
        extent.stream(descriptor, &place)
    }

    fn read_blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        out: &mut [u8],
        _attempt: u32,
    ) -> Result<(), TransportError> {
        let place = self.files.place();
        let extent = self.files.blob(&descriptor.digest)?.ok_or_else(|| TransportError::NotFound {
            what: format!("blob {}", descriptor.digest),
            place: place.clone(),
        })?;
        extent.read_part(descriptor, &place, offset, out)
    }

    fn signatures(&self) -> Option<&dyn SignatureStorage> {
        Some(self)
    }
}

impl<F: LayoutFiles> SignatureStorage for LayoutSource<F> {
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        let Some(entry) = self.index.manifests.iter().find(|entry| name_of(entry) == Some(tag)) else {
            return Ok(None);
        };
        self.follow(entry).map(Some)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        self.manifest(Some(digest))
    }

    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        let place = self.files.place();
        let what = format!("blob {}", descriptor.digest);
        let extent = self
            .files
            .blob(&descriptor.digest)?
            .ok_or_else(|| TransportError::NotFound { what: what.clone(), place: place.clone() })?;
        extent.read(&what, &place, limit).map(Untrusted::new)
    }

    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        let wanted = |entry: &&Descriptor| {
            entry.artifact_type.is_some()
                && artifact_type.is_none_or(|wanted| entry.artifact_type.as_deref() == Some(wanted))
        };
        let mut found = Vec::new();
        for entry in self.index.manifests.iter().filter(wanted).take(REFERRER_LIMIT) {
            let manifest = self.follow(entry)?;
            if subject_of(manifest.peek().bytes()).is_some_and(|about| about.digest == *subject) {
                found.push(entry.clone());
            }
        }
        Ok(found)
    }

    fn native(&self, _manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        Ok(Vec::new())
    }

    fn get(&self, url: &str, _limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        Err(TransportError::Unsupported { what: format!("a lookaside server ({url:.200})"), place: self.files.place() })
    }
}

/// Checks the content of the `oci-layout` file.
pub(super) fn check_version(bytes: &[u8], place: &str) -> Result<(), TransportError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        image_layout_version: String,
    }
    let bad = |reason: String| TransportError::Malformed { what: LAYOUT_FILE.into(), place: place.into(), reason };
    let version: Version = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
    if version.image_layout_version.starts_with("1.") {
        Ok(())
    } else {
        Err(bad(format!("layout version '{:.40}'; 1.0.0 is read", version.image_layout_version)))
    }
}

/// Parses `index.json`.
///
/// # Errors
/// [`ManifestError`]
pub fn parse_index(bytes: Vec<u8>) -> Result<Index, ManifestError> {
    Index::parse(&RawManifest::new(bytes, Some(media::OCI_INDEX))?)
}

/// The entry that a name, or no name, means.
pub(super) fn choose<'a>(index: &'a Index, name: Option<&str>, place: &str) -> Result<&'a Descriptor, TransportError> {
    let is = |key: &str, entry: &Descriptor| match name {
        Some(name) => entry.annotations.get(key).is_some_and(|found| found == name),
        None => key == REF_NAME && !is_attachment(entry),
    };
    let mut found: Vec<&Descriptor> = index.manifests.iter().filter(|entry| is(REF_NAME, entry)).collect();
    if found.is_empty() {
        found = index.manifests.iter().filter(|entry| is(CONTAINERD_NAME, entry)).collect();
    }
    let names = || {
        let names: Vec<&str> =
            index.manifests.iter().filter(|entry| !is_attachment(entry)).filter_map(name_of).take(32).collect();
        if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") }
    };
    match found.as_slice() {
        [] => Err(TransportError::NotFound {
            what: name.map_or("an image".into(), |name| format!("image '{name:.200}' (there are: {})", names())),
            place: place.into(),
        }),
        [first, rest @ ..] if rest.iter().all(|other| other.digest == first.digest) => Ok(first),
        several => Err(TransportError::Malformed {
            what: "the choice of the image".into(),
            place: place.into(),
            reason: match name {
                Some(name) => format!("{} different images are called '{name:.200}'", several.len()),
                None => format!("it holds {} images, name one of them: {}", several.len(), names()),
            },
        }),
    }
}

fn name_of(entry: &Descriptor) -> Option<&str> {
    entry.annotations.get(REF_NAME).map(String::as_str)
}

/// Whether an entry is a signature or another artifact, which nobody means who gives no name.
fn is_attachment(entry: &Descriptor) -> bool {
    entry.artifact_type.is_some()
        || name_of(entry).and_then(|name| name.strip_prefix("sha256-")).is_some_and(|rest| {
            rest.split('.').next().is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
        })
}

/// The manifest that another one is about, and what kind of artifact it is.
fn subject_of(manifest: &[u8]) -> Option<Descriptor> {
    #[derive(Deserialize)]
    struct About {
        subject: Option<Descriptor>,
    }
    serde_json::from_slice::<About>(manifest).ok()?.subject
}

/// What a copy adds to the index of a layout.
#[derive(Debug, Default)]
pub(super) struct Additions {
    entries: Vec<Descriptor>,
    /// The manifests that have a name, in case another signature is added to one.
    tagged: BTreeMap<String, RawManifest>,
}

impl Additions {
    /// An entry for a manifest that no name points to; only an artifact about another manifest needs one.
    pub(super) fn manifest(&mut self, manifest: &RawManifest) {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Artifact {
            subject: Option<serde::de::IgnoredAny>,
            artifact_type: Option<String>,
            config: Option<Descriptor>,
            #[serde(default)]
            annotations: Option<BTreeMap<String, String>>,
        }
        let Ok(artifact) = serde_json::from_slice::<Artifact>(manifest.bytes()) else { return };
        if artifact.subject.is_none() {
            return;
        }
        let mut entry = manifest.descriptor();
        entry.artifact_type = artifact.artifact_type.or(artifact.config.map(|config| config.media_type));
        entry.annotations = artifact.annotations.unwrap_or_default();
        entry.annotations.remove(REF_NAME);
        self.entries.push(entry);
    }

    /// An entry with a name, in place of an earlier one of that name.
    pub(super) fn named(&mut self, manifest: &RawManifest, name: Option<&str>) {
        let mut entry = manifest.descriptor();
        if let Some(name) = name {
            entry.annotations.insert(REF_NAME.into(), name.into());
            self.entries.retain(|other| name_of(other) != Some(name));
            self.tagged.insert(name.into(), manifest.clone());
        }
        self.entries.push(entry);
    }

    /// The manifest that a name was added for.
    pub(super) fn find(&self, name: &str) -> Option<Untrusted<RawManifest>> {
        self.tagged.get(name).cloned().map(Untrusted::new)
    }

    /// The bytes of `index.json` with these entries in it: `existing`'s are kept but for those that are replaced.
    pub(super) fn apply(&self, existing: Option<&[u8]>, place: &str) -> Result<Vec<u8>, TransportError> {
        let bad = |source| TransportError::Manifest { place: format!("{place}, {INDEX_FILE}"), source };
        let json = |source| bad(ManifestError::Json { what: "index", source });
        let mut top: Map<String, Value> = match existing {
            Some(bytes) => {
                parse_index(bytes.to_vec()).map_err(bad)?;
                serde_json::from_slice(bytes).map_err(json)?
            }
            None => Map::new(),
        };
        top.insert("schemaVersion".into(), json!(2));
        let mut entries = match top.remove("manifests") {
            Some(Value::Array(entries)) => entries,
            _ => Vec::new(),
        };
        for entry in &self.entries {
            entries.retain(|old| !replaces(entry, old));
            entries.push(serde_json::to_value(entry).map_err(json)?);
        }
        top.insert("manifests".into(), Value::Array(entries));
        serde_json::to_vec(&top).map_err(json)
    }
}

/// Whether a new entry takes the place of an old one: that of the same name; the image without a name, where it has none; the same
/// artifact.
fn replaces(new: &Descriptor, old: &Value) -> bool {
    let old_name = old.get("annotations").and_then(|annotations| annotations.get(REF_NAME)).and_then(Value::as_str);
    let same_digest = old.get("digest").and_then(Value::as_str) == Some(new.digest.to_string().as_str());
    match (name_of(new), old_name) {
        (Some(new), Some(old)) => new == old,
        (None, None) if new.artifact_type.is_none() => old.get("artifactType").is_none(),
        (None, None) => same_digest,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(content: &str, name: Option<&str>) -> Descriptor {
        let mut entry = Descriptor::of(media::OCI_MANIFEST, content.as_bytes());
        entry.annotations.extend(name.map(|name| (REF_NAME.to_owned(), name.to_owned())));
        entry
    }

    fn index(manifests: Vec<Descriptor>) -> Index {
        Index { schema_version: 2, media_type: None, manifests, annotations: BTreeMap::new() }
    }

    #[test]
    fn images_are_chosen_by_name_and_attachments_never_without() {
        let signature = format!("sha256-{}.sig", "a".repeat(64));
        let mut artifact = entry("artifact", None);
        artifact.artifact_type = Some(media::SIGSTORE_BUNDLE.into());
        let mut full = entry("full", Some("latest"));
        full.annotations.insert(CONTAINERD_NAME.into(), "docker.io/library/app:latest".into());
        let all = index(vec![artifact, entry("signature", Some(&signature)), full.clone()]);
        for name in [None, Some("latest"), Some("docker.io/library/app:latest")] {
            assert_eq!(choose(&all, name, "here").unwrap(), &full);
        }
        assert_eq!(choose(&all, Some(&signature), "here").unwrap().digest, Digest::sha256(b"signature"));
        assert!(choose(&all, Some("late"), "here").unwrap_err().is_not_found());
        let same = index(vec![entry("a", Some("x")), entry("a", Some("y"))]);
        assert!(choose(&same, None, "here").is_ok());
        let two = index(vec![entry("a", Some("x")), entry("b", Some("x"))]);
        assert!(choose(&two, None, "here").is_err() && choose(&two, Some("x"), "here").is_err());
    }

    #[test]
    fn an_index_keeps_what_it_does_not_know_and_what_is_not_replaced() {
        let old = json!({
            "schemaVersion": 2,
            "x-unknown": [1, 2],
            "manifests": [entry("a", Some("one")), entry("b", Some("two")), entry("c", None)],
        });
        let manifest = |name: &str| {
            let text = json!({ "schemaVersion": 2, "layers": [], "x": name }).to_string();
            RawManifest::new(text.into_bytes(), Some(media::OCI_MANIFEST)).unwrap()
        };
        let mut additions = Additions::default();
        additions.named(&manifest("wrong"), Some("one"));
        additions.named(&manifest("right"), Some("one"));
        additions.named(&manifest("unnamed"), None);
        assert_eq!(additions.find("one").unwrap().peek(), &manifest("right"));
        let new = additions.apply(Some(old.to_string().as_bytes()), "here").unwrap();
        let new_value: Value = serde_json::from_slice(&new).unwrap();
        assert_eq!(new_value["x-unknown"], json!([1, 2]));
        let parsed = parse_index(new).unwrap();
        let found: Vec<_> = parsed.manifests.iter().map(|entry| (name_of(entry), entry.digest)).collect();
        assert_eq!(
            found,
            [
                (Some("two"), Digest::sha256(b"b")),
                (Some("one"), *manifest("right").digest()),
                (None, *manifest("unnamed").digest()),
            ]
        );
        assert!(additions.apply(Some(b"[]"), "here").is_err());
    }
}

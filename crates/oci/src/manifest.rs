//! Manifests, indexes and image configs: OCI image spec 1.1 and Docker image manifest v2, schema 2.
//!
//! Raw bytes stay beside what was parsed of them, since digests and signatures are over the bytes. Parsing refuses what is out of
//! range; unknown fields are kept out of the way, not refused, since registries and builders add their own.

use std::collections::BTreeMap;

use nacre_core::{Digest, Untrusted, Verified};
use serde::{Deserialize, Serialize};

/// The most bytes of a manifest, an index or an image config.
pub const MANIFEST_LIMIT: usize = 4 << 20;
/// The most layers of an image.
pub const LAYER_LIMIT: usize = 4096;
/// The most manifests of an index.
pub const INDEX_LIMIT: usize = 4096;
/// The most bytes that any one blob may claim to have.
pub const BLOB_LIMIT: u64 = 1 << 42;

/// Media types that Nacre writes or looks for.
pub mod media {
    #![expect(missing_docs, reason = "the constants are named as the specifications name the types")]
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    pub const OCI_LAYER_NONDISTRIBUTABLE: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    pub const DOCKER_FOREIGN_GZIP: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    pub const COSIGN_PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
    pub const SIGSTORE_BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
}

/// Why bytes are no manifest, index or config that we can use.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is larger than [`MANIFEST_LIMIT`].
    #[error("{what} has {size} bytes; at most {MANIFEST_LIMIT} are allowed")]
    TooLarge {
        /// Manifest, index or config.
        what: &'static str,
        /// Its size.
        size: u64,
    },
    /// It is not the JSON that it should be.
    #[error("{what} is not valid: {source}")]
    Json {
        /// Manifest, index or config.
        what: &'static str,
        /// The parser's complaint.
        source: serde_json::Error,
    },
    /// Its media type is none that we read.
    #[error("media type '{0}' is neither an image manifest nor an index (OCI v1 and Docker v2 schema 2 are read)")]
    MediaType(String),
    /// The media type in its body is another than the one it was served as.
    #[error("manifest says it is '{inner}' but was served as '{outer}'")]
    MediaTypeMismatch {
        /// `mediaType` in the body.
        inner: String,
        /// `Content-Type`, or the descriptor's.
        outer: String,
    },
    /// A field has a value that it must not have.
    #[error("{what}: {field} {problem}")]
    Field {
        /// Manifest, index or config.
        what: &'static str,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The bytes have another digest than they should have.
    #[error("{what}: digest mismatch: expected {expected}, the content has {found}")]
    DigestMismatch {
        /// Manifest, index or config.
        what: &'static str,
        /// Whose digest was asked for.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// The index has no manifest for the platform.
    #[error("no manifest for {wanted} in the index; it has {available}")]
    NoPlatform {
        /// The platform asked for.
        wanted: String,
        /// Those there are.
        available: String,
    },
}

/// A reference to some content, with its size and type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Annotations; encryption keeps its wrapped keys here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
    /// In an index: what machine the image is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// In an index of referrers: what kind of artifact it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Where else the content may be had. Never followed.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub urls: Vec<String>,
}

impl Descriptor {
    /// A descriptor of `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::sha256(bytes), bytes.len() as u64)
    }

    /// A descriptor without annotations.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
            urls: Vec::new(),
        }
    }
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// What machine an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// GOARCH: `amd64`, `arm64`, …
    pub architecture: String,
    /// GOOS.
    pub os: String,
    /// Such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Windows builds.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
}

impl Platform {
    /// The machine that this program was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" => ("ppc64le", None),
            other => (other, None),
        };
        Self {
            architecture: architecture.into(),
            os: "linux".into(),
            variant: variant.map(str::to_owned),
            os_version: None,
        }
    }

    /// Whether an image for `offered` runs where `self` is wanted.
    pub fn accepts(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && match (&self.variant, &offered.variant) {
                (Some(wanted), Some(offered)) => wanted == offered,
                _ => true,
            }
    }
}

impl std::str::FromStr for Platform {
    type Err = ManifestError;

    /// `os/arch[/variant]`, as `--platform` takes it.
    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => Ok(Self {
                architecture: architecture.into(),
                os: os.into(),
                variant: variant.map(str::to_owned),
                os_version: None,
            }),
            _ => Err(field("platform", text, "is not os/architecture[/variant]")),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// A manifest or index as it came: bytes, their digest, the type it was served as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    bytes: Vec<u8>,
    digest: Digest,
    media_type: String,
}

impl RawManifest {
    /// Takes the bytes that came, computes their digest, and settles the media type: the body's own where it has one, which must
    /// then agree with `served_as` if that is a manifest type at all.
    ///
    /// # Errors
    /// [`ManifestError`]: too large, not JSON, no manifest type, or two types that contradict each other.
    pub fn new(bytes: Vec<u8>, served_as: Option<&str>) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            #[serde(default)]
            media_type: Option<String>,
            #[serde(default)]
            schema_version: Option<u64>,
            #[serde(default)]
            manifests: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            layers: Option<serde::de::IgnoredAny>,
        }
        check_size("manifest", bytes.len() as u64)?;
        let probe: Probe = parse("manifest", &bytes)?;
        if probe.schema_version != Some(2) {
            let problem = probe.schema_version.map_or("is missing".into(), |version| format!("is {version}"));
            return Err(field("manifest", "schemaVersion", &format!("{problem}; only 2 is read")));
        }
        let served_as =
            served_as.and_then(|text| text.split(';').next()).map(str::trim).filter(|t| is_manifest_type(t));
        let media_type = match (probe.media_type, served_as) {
            (Some(inner), Some(outer)) if inner != outer => {
                return Err(ManifestError::MediaTypeMismatch { inner, outer: outer.into() });
            }
            (Some(inner), _) => inner,
            (None, Some(outer)) => outer.to_owned(),
            (None, None) if probe.manifests.is_some() => media::OCI_INDEX.into(),
            (None, None) => media::OCI_MANIFEST.into(),
        };
        if !is_manifest_type(&media_type) {
            return Err(ManifestError::MediaType(media_type.chars().take(200).collect()));
        }
        // A document that is both would be one image to us and another to a peer (CVE-2021-41190).
        if probe.manifests.is_some() && probe.layers.is_some() {
            return Err(field("manifest", "layers", "and manifests are both there: it is ambiguous what it is"));
        }
        Ok(Self { digest: Digest::sha256(&bytes), bytes, media_type })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The SHA-256 digest of the bytes.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The media type.
    pub fn media_type(&self) -> &str {
        &self.media_type
    }

    /// Whether it is an index (or Docker manifest list).
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), media::OCI_INDEX | media::DOCKER_LIST)
    }

    /// A descriptor of it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.bytes.len() as u64)
    }
}

fn is_manifest_type(text: &str) -> bool {
    matches!(text, media::OCI_MANIFEST | media::OCI_INDEX | media::DOCKER_MANIFEST | media::DOCKER_LIST)
}

/// Checks that a manifest has the digest it was asked for by.
///
/// # Errors
/// [`ManifestError::DigestMismatch`]
pub fn verify_manifest(raw: Untrusted<RawManifest>, expected: &Digest) -> Result<Verified<RawManifest>, ManifestError> {
    raw.verify(|raw| {
        let found = Digest::of(expected.algorithm(), raw.bytes());
        if found == *expected {
            Ok(())
        } else {
            Err(ManifestError::DigestMismatch { what: "manifest", expected: *expected, found })
        }
    })
}

/// An image manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// The manifest's own type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// For artifacts: what kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, the bottom one first.
    pub layers: Vec<Descriptor>,
    /// The manifest that this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses an image manifest.
    ///
    /// # Errors
    /// [`ManifestError`]: it is an index, malformed, or a field is out of range.
    pub fn parse(raw: &RawManifest) -> Result<Self, ManifestError> {
        if raw.is_index() {
            return Err(ManifestError::MediaType(raw.media_type.clone()));
        }
        let manifest: Self = parse("manifest", &raw.bytes)?;
        if manifest.layers.len() > LAYER_LIMIT {
            let problem = format!("has {} entries; at most {LAYER_LIMIT} are allowed", manifest.layers.len());
            return Err(field("manifest", "layers", &problem));
        }
        check_size("config", manifest.config.size)?;
        for (number, layer) in manifest.layers.iter().enumerate() {
            if layer.size > BLOB_LIMIT {
                let problem = format!("is {}; at most {BLOB_LIMIT} is allowed", layer.size);
                return Err(field("manifest", &format!("layers[{number}].size"), &problem));
            }
        }
        Ok(manifest)
    }
}

/// An image index, or Docker manifest list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// The index's own type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// Parses an index.
    ///
    /// # Errors
    /// [`ManifestError`]: it is no index, malformed, or a field is out of range.
    pub fn parse(raw: &RawManifest) -> Result<Self, ManifestError> {
        if !raw.is_index() {
            return Err(ManifestError::MediaType(raw.media_type.clone()));
        }
        let index: Self = parse("index", &raw.bytes)?;
        if index.manifests.len() > INDEX_LIMIT {
            let problem = format!("has {} entries; at most {INDEX_LIMIT} are allowed", index.manifests.len());
            return Err(field("index", "manifests", &problem));
        }
        for manifest in &index.manifests {
            check_size("manifest", manifest.size)?;
        }
        Ok(index)
    }

    /// The manifest for a platform: an exact variant before one without, the first of equals.
    ///
    /// # Errors
    /// [`ManifestError::NoPlatform`], which lists those there are.
    pub fn choose(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        let fits = |descriptor: &&Descriptor| {
            is_manifest_type(&descriptor.media_type)
                && descriptor.platform.as_ref().is_some_and(|platform| wanted.accepts(platform))
        };
        let exact = |descriptor: &&Descriptor| {
            fits(descriptor) && descriptor.platform.as_ref().is_some_and(|p| p.variant == wanted.variant)
        };
        let found = self.manifests.iter().find(exact).or_else(|| self.manifests.iter().find(fits));
        // An index of one image without a platform has only one answer; builders write such ones.
        let only = match self.manifests.as_slice() {
            [one] if one.platform.is_none() => Some(one),
            _ => None,
        };
        found.or(only).ok_or_else(|| {
            let mut available: Vec<String> =
                self.manifests.iter().filter_map(|m| m.platform.as_ref()).map(Platform::to_string).take(32).collect();
            available.dedup();
            let available = if available.is_empty() { "none with a platform".into() } else { available.join(", ") };
            ManifestError::NoPlatform { wanted: wanted.to_string(), available }
        })
    }
}

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Plain tar.
    None,
    /// gzip, of one member or several.
    Gzip,
    /// zstd, of one frame or several.
    Zstd,
}

/// What a layer's media type says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerType {
    /// How the tar is compressed.
    pub compression: Compression,
    /// Whether the compressed tar is encrypted (ocicrypt).
    pub encrypted: bool,
}

impl LayerType {
    /// Reads a layer's media type.
    ///
    /// # Errors
    /// [`ManifestError::Field`]: it is no layer.
    pub fn parse(media_type: &str) -> Result<Self, ManifestError> {
        let (plain, encrypted) = match media_type.strip_suffix("+encrypted") {
            Some(plain) => (plain, true),
            None => (media_type, false),
        };
        let compression = match plain {
            media::OCI_LAYER | media::OCI_LAYER_NONDISTRIBUTABLE | media::DOCKER_LAYER => Compression::None,
            media::DOCKER_LAYER_GZIP | media::DOCKER_FOREIGN_GZIP => Compression::Gzip,
            media::DOCKER_LAYER_ZSTD => Compression::Zstd,
            _ => match plain.rsplit_once('+') {
                Some((media::OCI_LAYER | media::OCI_LAYER_NONDISTRIBUTABLE, "gzip")) => Compression::Gzip,
                Some((media::OCI_LAYER | media::OCI_LAYER_NONDISTRIBUTABLE, "zstd")) => Compression::Zstd,
                _ => return Err(field("manifest", "layer media type", &format!("'{media_type:.200}' is no layer"))),
            },
        };
        Ok(Self { compression, encrypted })
    }
}

/// An image config: what to run, as whom, and the digests of the uncompressed layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// GOARCH.
    #[serde(default)]
    pub architecture: String,
    /// GOOS.
    #[serde(default)]
    pub os: String,
    /// Defaults of the process.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ProcessConfig,
    /// The layers.
    pub rootfs: RootFs,
    /// When the image was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
}

/// Defaults of the process that runs in a container (`config` of the image config).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ProcessConfig {
    /// `user[:group]`, names or numbers.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// `NAME=value`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What is run.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Its default arguments, or what is run where there is no entry point.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// The working directory; empty is `/`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Such as `SIGTERM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Directories that should be volumes.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// `port/protocol`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
}

/// The layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The digests of the uncompressed tars, the bottom one first.
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Parses a config that something else vouches for than a manifest's descriptor.
    ///
    /// # Errors
    /// [`ManifestError`]
    pub fn of_verified(bytes: &[u8]) -> Result<Self, ManifestError> {
        check_size("config", bytes.len() as u64)?;
        parse("config", bytes)
    }

    /// Checks the config's digest, parses it, and checks that it has a diff_id for each layer of its manifest.
    ///
    /// # Errors
    /// [`ManifestError`]
    pub fn verify(bytes: Untrusted<Vec<u8>>, manifest: &Manifest) -> Result<Verified<Self>, ManifestError> {
        bytes.verify_into(|bytes| {
            check_size("config", bytes.len() as u64)?;
            let expected = manifest.config.digest;
            let found = Digest::of(expected.algorithm(), &bytes);
            if found != expected {
                return Err(ManifestError::DigestMismatch { what: "config", expected, found });
            }
            let config: Self = parse("config", &bytes)?;
            if config.rootfs.kind != "layers" {
                return Err(field("config", "rootfs.type", &format!("is '{:.60}', not 'layers'", config.rootfs.kind)));
            }
            if config.rootfs.diff_ids.len() != manifest.layers.len() {
                let problem = format!(
                    "has {} entries, but the manifest has {} layers",
                    config.rootfs.diff_ids.len(),
                    manifest.layers.len()
                );
                return Err(field("config", "rootfs.diff_ids", &problem));
            }
            Ok(config)
        })
    }
}

fn parse<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what, source })
}

fn check_size(what: &'static str, size: u64) -> Result<(), ManifestError> {
    if size > MANIFEST_LIMIT as u64 { Err(ManifestError::TooLarge { what, size }) } else { Ok(()) }
}

fn field(what: &'static str, field: &str, problem: &str) -> ManifestError {
    ManifestError::Field { what, field: field.into(), problem: problem.into() }
}

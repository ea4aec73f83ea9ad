//! Images of layers: OCI or Docker manifests, as an OCI layout, or in a registry.

use std::{fs, io::Write as _, path::Path};

use nacre_core::Digest;
use nacre_registry::Registry;
use serde_json::{Value, json};

use crate::tar::{Entry, Layer};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// How a layer's archive is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
}

impl Compression {
    /// Compresses bytes.
    pub fn apply(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::None => bytes.to_vec(),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Self::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        }
    }

    fn media_type(self, docker: bool) -> String {
        let (base, gzip) = if docker {
            ("application/vnd.docker.image.rootfs.diff.tar", ".gzip")
        } else {
            ("application/vnd.oci.image.layer.v1.tar", "+gzip")
        };
        match (self, docker) {
            (Self::None, _) => base.to_owned(),
            (Self::Gzip, _) => format!("{base}{gzip}"),
            (Self::Zstd, false) => format!("{base}+zstd"),
            (Self::Zstd, true) => format!("{base}.zstd"),
        }
    }
}

/// A layer as it is stored.
#[derive(Clone, Debug)]
pub struct BuiltLayer {
    /// Its media type.
    pub media_type: String,
    /// The stored, perhaps compressed bytes.
    pub bytes: Vec<u8>,
    /// The digest of the stored bytes.
    pub digest: Digest,
    /// The digest of the archive.
    pub diff_id: Digest,
}

/// Collects what an [`Image`] has.
#[derive(Clone, Default)]
pub struct ImageBuilder {
    layers: Vec<BuiltLayer>,
    pending: Vec<(Layer, Compression)>,
    docker: bool,
    config: Value,
    changes: Vec<(String, Value)>,
    config_changes: Vec<(String, Value)>,
}

impl ImageBuilder {
    /// An OCI image without layers.
    pub fn new() -> Self {
        Self { config: json!({}), ..Self::default() }
    }

    /// Adds a layer of entries, compressed with gzip.
    pub fn layer(self, entries: impl IntoIterator<Item = Entry>) -> Self {
        self.layer_of(Layer::of(entries), Compression::Gzip)
    }

    /// Adds a layer.
    pub fn layer_of(mut self, layer: Layer, compression: Compression) -> Self {
        self.pending.push((layer, compression));
        self
    }

    /// Adds a layer whose stored form is made already (encrypted, or broken). Call it after or before all others: these come first.
    pub fn stored_layer(mut self, layer: BuiltLayer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Makes it a Docker v2 schema 2 image.
    pub fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Sets a field of the config's `config` object, such as `Entrypoint`.
    pub fn run(mut self, key: &str, value: Value) -> Self {
        if let Some(config) = self.config.as_object_mut() {
            config.insert(key.to_owned(), value);
        }
        self
    }

    /// Sets a value anywhere in the config, by JSON pointer (or a new field of its top, `/name`), after all else.
    pub fn set_config(mut self, pointer: &str, value: Value) -> Self {
        self.config_changes.push((pointer.to_owned(), value));
        self
    }

    /// Sets a value anywhere in the manifest, by JSON pointer (or a new field of its top, `/name`), after all else.
    pub fn set_manifest(mut self, pointer: &str, value: Value) -> Self {
        self.changes.push((pointer.to_owned(), value));
        self
    }

    /// Makes the image.
    pub fn build(self) -> Image {
        let docker = self.docker;
        let mut layers = self.layers;
        layers.extend(self.pending.into_iter().map(|(layer, compression)| {
            let bytes = compression.apply(layer.tar());
            BuiltLayer {
                media_type: compression.media_type(docker),
                digest: Digest::sha256(&bytes),
                diff_id: Digest::sha256(layer.tar()),
                bytes,
            }
        }));
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
        let mut config = json!({
            "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": diff_ids.iter().map(|_| json!({ "created_by": "testkit" })).collect::<Vec<_>>(),
        });
        apply(&mut config, self.config_changes);
        let config = config.to_string().into_bytes();
        let (media_type, config_type) = if docker {
            (DOCKER_MANIFEST, "application/vnd.docker.container.image.v1+json")
        } else {
            (OCI_MANIFEST, "application/vnd.oci.image.config.v1+json")
        };
        let descriptor = |kind: &str, bytes: &[u8], digest: &Digest| json!({ "mediaType": kind, "digest": digest, "size": bytes.len() });
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": media_type,
            "config": descriptor(config_type, &config, &Digest::sha256(&config)),
            "layers": layers.iter().map(|layer| descriptor(&layer.media_type, &layer.bytes, &layer.digest)).collect::<Vec<_>>(),
        });
        apply(&mut manifest, self.changes);
        let manifest = manifest.to_string().into_bytes();
        Image { digest: Digest::sha256(&manifest), media_type, manifest, config, layers }
    }
}

fn apply(document: &mut Value, changes: Vec<(String, Value)>) {
    for (pointer, value) in changes {
        if let Some(place) = document.pointer_mut(&pointer) {
            *place = value;
            continue;
        }
        let (parent, name) = pointer.rsplit_once('/').unwrap_or_else(|| panic!("{pointer} is no JSON pointer"));
        let object = document.pointer_mut(parent).and_then(Value::as_object_mut);
        object.unwrap_or_else(|| panic!("{parent} is no object")).insert(name.to_owned(), value);
    }
}

/// An image: its manifest, config and layers.
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// The manifest's media type.
    pub media_type: &'static str,
    /// The manifest's digest.
    pub digest: Digest,
    /// The config's bytes.
    pub config: Vec<u8>,
    /// The layers, the bottom one first.
    pub layers: Vec<BuiltLayer>,
}

impl Image {
    /// Starts a builder.
    pub fn builder() -> ImageBuilder {
        ImageBuilder::new()
    }

    /// A tiny image of one layer with a file `hello`.
    pub fn hello() -> Self {
        Self::builder().layer([Entry::file("hello", "hello, world\n")]).build()
    }

    fn blobs(&self) -> impl Iterator<Item = &[u8]> {
        self.layers.iter().map(|layer| layer.bytes.as_slice()).chain([self.config.as_slice()])
    }

    /// Writes (or adds) it as an OCI image layout, under a tag.
    pub fn write_layout(&self, directory: &Path, tag: &str) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        for bytes in self.blobs().chain([self.manifest.as_slice()]) {
            fs::write(blobs.join(Digest::sha256(bytes).hex()), bytes).unwrap();
        }
        let path = directory.join("index.json");
        let mut manifests = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Value>(&bytes).unwrap()["manifests"].as_array().unwrap().clone(),
            Err(_) => Vec::new(),
        };
        manifests.push(json!({
            "mediaType": self.media_type, "digest": self.digest, "size": self.manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": tag },
        }));
        fs::write(path, json!({ "schemaVersion": 2, "manifests": manifests }).to_string()).unwrap();
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }

    /// Puts it into a registry. The manifest is not looked at: it may be broken.
    pub fn push(&self, registry: &Registry, repository: &str, tag: &str) {
        for bytes in self.blobs() {
            registry.put_blob(bytes).unwrap();
        }
        registry.put_manifest(repository, Some(tag), self.media_type, &self.manifest).unwrap();
    }
}

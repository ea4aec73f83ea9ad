//! Finds the signatures of an image wherever its transport keeps them. Nothing is judged here, and nothing is believed.
//!
//! - GPG: the lookaside of registries.d, and what the transport itself stores (`signature-N` of `dir:`, X-R-S-S).
//! - cosign: the tag `sha256-<hex>.sig`, bundles among the referrers, and what the transport itself stores.
//!
//! All of it for each manifest that the reference resolves through, since a signature may name the index or the platform's image.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Digest, Untrusted};

use super::{
    bundle,
    json::{Json, JsonError},
    lookaside::LookasideConfig,
    payload::{SIGNATURE_LIMIT, SIGNATURES_LIMIT},
};
use crate::{
    manifest::{Descriptor, Manifest, RawManifest, media, verify_manifest},
    reference::Location,
    source::{SignatureStorage, TransportError},
};

/// The most bytes of all signatures of a kind, so that many large ones cannot fill the memory.
const TOTAL_LIMIT: usize = 16 << 20;
/// What stands before a signature of another kind than GPG, where GPG's are stored (`dir:`).
const TAGGED_BLOB: &[u8] = b"\0sigstore-json\n";

/// cosign's signature, in the layer's annotations.
pub(super) const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// A cosign signature: the payload, and annotations with the signature and what comes with it.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) payload: Vec<u8>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// What was found of one kind.
#[derive(Debug, Default)]
pub(super) struct Found<T> {
    pub(super) items: Vec<T>,
    /// What was there but is no signature, and where none was looked for; for messages.
    pub(super) notes: Vec<String>,
    /// A place that did not answer: it may have held the signature that was missing.
    pub(super) failure: Option<TransportError>,
    bytes: usize,
}

impl<T> Found<T> {
    fn new() -> Self {
        Self { items: Vec::new(), notes: Vec::new(), failure: None, bytes: 0 }
    }

    /// Adds one, unless there are too many. Says whether there is room for more.
    fn push(&mut self, item: T, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.items.len() >= SIGNATURES_LIMIT || self.bytes > TOTAL_LIMIT {
            let note =
                format!("more than {SIGNATURES_LIMIT} signatures or {TOTAL_LIMIT} bytes of them; the rest is ignored");
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
            return false;
        }
        self.items.push(item);
        true
    }

    fn failed(&mut self, error: TransportError) {
        match error {
            TransportError::NotFound { .. } | TransportError::Unsupported { .. } => {}
            TransportError::Manifest { .. }
            | TransportError::TooLarge { .. }
            | TransportError::DigestMismatch { .. } => self.notes.push(error.to_string()),
            other => self.failure = Some(other),
        }
    }
}

/// Where to look.
pub(super) struct Places<'a> {
    pub(super) requested: &'a Location,
    pub(super) chain: &'a [&'a RawManifest],
    pub(super) storage: Option<&'a dyn SignatureStorage>,
    pub(super) lookaside: &'a LookasideConfig,
}

impl Places<'_> {
    /// GPG signatures.
    pub(super) fn gpg(&self) -> Found<Vec<u8>> {
        let mut found = Found::new();
        let Some(storage) = self.storage else { return found };
        for manifest in self.chain {
            match storage.native(manifest.digest()) {
                Ok(blobs) => {
                    for blob in blobs.iter().map(Untrusted::peek).filter(|blob| blob.first() != Some(&0)) {
                        found.push(blob.clone(), blob.len());
                    }
                }
                Err(error) => found.failed(error),
            }
            self.lookaside_of(storage, manifest.digest(), &mut found);
        }
        found
    }

    fn lookaside_of(&self, storage: &dyn SignatureStorage, manifest: &Digest, found: &mut Found<Vec<u8>>) {
        let Location::Docker(image) = self.requested else { return };
        for number in 1..=SIGNATURES_LIMIT + 1 {
            let Some(url) = self.lookaside.read_url(image, manifest, number) else {
                found.notes.push("no lookaside is configured for it".into());
                return;
            };
            match storage.get(&url, SIGNATURE_LIMIT) {
                Ok(Some(blob)) => {
                    let blob = blob.peek().clone();
                    let size = blob.len();
                    if !found.push(blob, size) {
                        return;
                    }
                }
                Ok(None) if number == 1 => return found.notes.push(format!("nothing at {url}")),
                Ok(None) => return,
                Err(error) => return found.failed(error),
            }
        }
    }

    fn looks_for_cosign(&self) -> bool {
        match self.requested {
            Location::Docker(image) => self.lookaside.use_sigstore_attachments(image) != Some(false),
            _ => true,
        }
    }

    /// cosign's signatures by tag, and those that the transport itself stores.
    pub(super) fn attachments(&self) -> Found<Attachment> {
        let mut found = Found::new();
        let Some(storage) = self.storage else { return found };
        if !self.looks_for_cosign() {
            found.notes.push("not looked for: registries.d says use-sigstore-attachments: false".into());
            return found;
        }
        for manifest in self.chain {
            let digest = manifest.digest();
            let tag = signature_tag(digest);
            match storage.tagged(&tag) {
                Ok(Some(raw)) => match Manifest::parse(raw.peek()) {
                    Ok(manifest) => payloads(storage, &manifest, &mut found),
                    Err(error) => found.notes.push(format!("tag {tag}: {error}")),
                },
                Ok(None) => found.notes.push(format!("no tag {tag}")),
                Err(error) => found.failed(error),
            }
            for blob in storage.native(digest).unwrap_or_default().iter().map(Untrusted::peek) {
                let Some(json) = blob.strip_prefix(TAGGED_BLOB) else { continue };
                match parse_blob(json) {
                    Ok(Some(attachment)) => drop(found.push(attachment, blob.len())),
                    Ok(None) => {}
                    Err(error) => found.notes.push(format!("a stored signature: {error}")),
                }
            }
        }
        found
    }

    /// Sigstore bundles among the referrers.
    pub(super) fn bundles(&self) -> Found<Vec<u8>> {
        let mut found = Found::new();
        let Some(storage) = self.storage.filter(|_| self.looks_for_cosign()) else { return found };
        for manifest in self.chain {
            match storage.referrers(manifest.digest(), Some(media::SIGSTORE_BUNDLE)) {
                Ok(referrers) => {
                    for referrer in referrers.iter().filter(|referrer| may_be_a_signature(referrer)) {
                        if let Err(error) = bundles_of(storage, &referrer.digest, &mut found) {
                            found.failed(error);
                        }
                        if found.items.len() >= SIGNATURES_LIMIT {
                            return found;
                        }
                    }
                }
                Err(error) => found.failed(error),
            }
        }
        found
    }
}

/// The tag under which cosign keeps signatures of a manifest.
pub fn signature_tag(manifest: &Digest) -> String {
    format!("{}-{}.sig", manifest.algorithm().name(), manifest.hex())
}

fn payloads(storage: &dyn SignatureStorage, manifest: &Manifest, found: &mut Found<Attachment>) {
    for layer in manifest.layers.iter().filter(|layer| layer.media_type == media::COSIGN_PAYLOAD) {
        match small_blob(storage, layer) {
            Ok(payload) => {
                let size = payload.len();
                if !found.push(Attachment { payload, annotations: layer.annotations.clone() }, size) {
                    return;
                }
            }
            Err(error) => found.failed(error),
        }
    }
}

/// Attestations are bundles too; a builder that says so spares us the download.
fn may_be_a_signature(referrer: &Descriptor) -> bool {
    let kind = referrer.artifact_type.as_deref();
    let predicate = referrer.annotations.get("dev.sigstore.bundle.predicateType");
    kind.is_none_or(|kind| kind == media::SIGSTORE_BUNDLE)
        && predicate.is_none_or(|predicate| predicate == bundle::PREDICATE_TYPE)
}

fn bundles_of(
    storage: &dyn SignatureStorage,
    digest: &Digest,
    found: &mut Found<Vec<u8>>,
) -> Result<(), TransportError> {
    let place = || digest.to_string();
    let raw = verify_manifest(storage.by_digest(digest)?, digest)
        .map_err(|source| TransportError::Manifest { place: place(), source })?;
    let manifest = Manifest::parse(raw.get()).map_err(|source| TransportError::Manifest { place: place(), source })?;
    for layer in manifest.layers.iter().filter(|layer| layer.media_type == media::SIGSTORE_BUNDLE) {
        let blob = small_blob(storage, layer)?;
        let size = blob.len();
        if !found.push(blob, size) {
            break;
        }
    }
    Ok(())
}

fn small_blob(storage: &dyn SignatureStorage, descriptor: &Descriptor) -> Result<Vec<u8>, TransportError> {
    if descriptor.size > SIGNATURE_LIMIT as u64 {
        return Err(TransportError::TooLarge {
            what: "signature".into(),
            place: descriptor.digest.to_string(),
            limit: SIGNATURE_LIMIT as u64,
        });
    }
    let blob = storage.small_blob(descriptor, SIGNATURE_LIMIT)?;
    let found = Digest::of(descriptor.digest.algorithm(), blob.peek());
    if found != descriptor.digest {
        return Err(TransportError::DigestMismatch { what: "signature".into(), expected: descriptor.digest, found });
    }
    Ok(blob.peek().clone())
}

/// `{"mimeType","payload","annotations"}`; `None` for what is no image signature.
fn parse_blob(json: &[u8]) -> Result<Option<Attachment>, JsonError> {
    let mut fields = Json::parse(json)?.into_fields("")?;
    if fields.string("mimeType")? != media::COSIGN_PAYLOAD {
        return Ok(None);
    }
    let payload = fields.string("payload")?;
    let payload =
        STANDARD.decode(payload).map_err(|error| JsonError::at("payload", format!("is not base64: {error}")))?;
    let mut annotations = BTreeMap::new();
    for (key, value) in fields.required("annotations")?.into_object("annotations")? {
        annotations.insert(key, value.into_string("annotations")?);
    }
    Ok(Some(Attachment { payload, annotations }))
}

/// The payload and the annotations of a cosign signature that `dir:` stores; `None` for one of another kind.
#[cfg(feature = "sign")]
pub(crate) fn decode_blob(blob: &[u8]) -> Option<(Vec<u8>, BTreeMap<String, String>)> {
    let attachment = parse_blob(blob.strip_prefix(TAGGED_BLOB)?).ok()??;
    Some((attachment.payload, attachment.annotations))
}

/// A cosign signature as `dir:` stores it, beside GPG's.
#[cfg(feature = "sign")]
pub(crate) fn encode_blob(payload: &[u8], annotations: &BTreeMap<String, String>) -> Vec<u8> {
    let json = serde_json::json!({
        "mimeType": media::COSIGN_PAYLOAD,
        "payload": STANDARD.encode(payload),
        "annotations": annotations,
    });
    [TAGGED_BLOB, json.to_string().as_bytes()].concat()
}

//! Signatures that are kept with an image, so that its policy can be evaluated on every use, without a network.
//!
//! While an image is pulled, [`Recorder`] stands between the policy and the source's signature storage and keeps what the storage
//! answered. [`Recording`] answers the same questions later. It vouches for nothing: what it gives is as untrusted as it was when it
//! came from the registry, and is checked again. A question that was not asked then (a stricter policy asks others) finds nothing,
//! which lets a policy refuse more, never less.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Digest, Untrusted};
use nacre_oci::{
    manifest::{Descriptor, RawManifest},
    source::{SignatureStorage, TransportError},
};
use serde::{Deserialize, Serialize};

/// What a signature storage answered, by question.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    #[serde(default)]
    manifests: BTreeMap<String, Blob>,
    #[serde(default)]
    blobs: BTreeMap<String, Blob>,
    #[serde(default)]
    referrers: BTreeMap<String, Vec<Descriptor>>,
    #[serde(default)]
    native: BTreeMap<String, Vec<Blob>>,
    #[serde(default)]
    files: BTreeMap<String, Blob>,
}

/// Bytes, as base64, and the media type where they have one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Blob {
    data: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
}

impl Blob {
    fn new(bytes: &[u8]) -> Self {
        Self { data: STANDARD.encode(bytes), media_type: None }
    }

    fn manifest(raw: &RawManifest) -> Self {
        Self { media_type: Some(raw.media_type().to_owned()), ..Self::new(raw.bytes()) }
    }

    fn bytes(&self) -> Result<Vec<u8>, TransportError> {
        STANDARD.decode(&self.data).map_err(|error| TransportError::Protocol {
            what: "stored signature".into(),
            place: PLACE.into(),
            reason: error.to_string(),
        })
    }

    fn raw(&self) -> Result<Untrusted<RawManifest>, TransportError> {
        RawManifest::new(self.bytes()?, self.media_type.as_deref())
            .map(Untrusted::new)
            .map_err(|source| TransportError::Manifest { place: PLACE.into(), source })
    }
}

const PLACE: &str = "the store";

fn not_found(what: String) -> TransportError {
    TransportError::NotFound { what, place: PLACE.into() }
}

fn referrers_key(subject: &Digest, artifact_type: Option<&str>) -> String {
    format!("{subject} {}", artifact_type.unwrap_or("*"))
}

impl SignatureStorage for Recording {
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        self.manifests.get(tag).map(Blob::raw).transpose()
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        self.manifests.get(&digest.to_string()).ok_or_else(|| not_found(format!("manifest {digest}")))?.raw()
    }

    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        let what = || format!("blob {}", descriptor.digest);
        let bytes = self.blobs.get(&descriptor.digest.to_string()).ok_or_else(|| not_found(what()))?.bytes()?;
        within(bytes, limit, what)
    }

    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        Ok(self.referrers.get(&referrers_key(subject, artifact_type)).cloned().unwrap_or_default())
    }

    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        let blobs = self.native.get(&manifest.to_string()).map(Vec::as_slice).unwrap_or_default();
        blobs.iter().map(|blob| blob.bytes().map(Untrusted::new)).collect()
    }

    fn get(&self, url: &str, limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        let Some(blob) = self.files.get(url) else { return Ok(None) };
        within(blob.bytes()?, limit, || url.to_owned()).map(Some)
    }
}

fn within(bytes: Vec<u8>, limit: usize, what: impl FnOnce() -> String) -> Result<Untrusted<Vec<u8>>, TransportError> {
    if bytes.len() > limit {
        return Err(TransportError::TooLarge { what: what(), place: PLACE.into(), limit: limit as u64 });
    }
    Ok(Untrusted::new(bytes))
}

/// Asks another storage, and keeps its answers.
pub(super) struct Recorder<'a> {
    inner: &'a dyn SignatureStorage,
    recording: Mutex<Recording>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(inner: &'a dyn SignatureStorage) -> Self {
        Self { inner, recording: Mutex::default() }
    }

    pub(super) fn finish(self) -> Recording {
        self.recording.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, add: impl FnOnce(&mut Recording)) {
        add(&mut self.recording.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl SignatureStorage for Recorder<'_> {
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        let answer = self.inner.tagged(tag)?;
        if let Some(raw) = &answer {
            self.keep(|recording| drop(recording.manifests.insert(tag.into(), Blob::manifest(raw.peek()))));
        }
        Ok(answer)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        let answer = self.inner.by_digest(digest)?;
        self.keep(|recording| drop(recording.manifests.insert(digest.to_string(), Blob::manifest(answer.peek()))));
        Ok(answer)
    }

    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        let answer = self.inner.small_blob(descriptor, limit)?;
        self.keep(|recording| drop(recording.blobs.insert(descriptor.digest.to_string(), Blob::new(answer.peek()))));
        Ok(answer)
    }

    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        let answer = self.inner.referrers(subject, artifact_type)?;
        let key = referrers_key(subject, artifact_type);
        self.keep(|recording| drop(recording.referrers.insert(key, answer.clone())));
        Ok(answer)
    }

    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        let answer = self.inner.native(manifest)?;
        let blobs = answer.iter().map(|bytes| Blob::new(bytes.peek())).collect();
        self.keep(|recording| drop(recording.native.insert(manifest.to_string(), blobs)));
        Ok(answer)
    }

    fn get(&self, url: &str, limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        let answer = self.inner.get(url, limit)?;
        if let Some(bytes) = &answer {
            self.keep(|recording| drop(recording.files.insert(url.into(), Blob::new(bytes.peek()))));
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_answered_once_is_answered_again() {
        let mut source = Recording::default();
        let subject = Digest::sha256(b"subject");
        let raw = RawManifest::new(br#"{"schemaVersion":2,"layers":[]}"#.to_vec(), None).unwrap();
        let blob = Descriptor::of("text/plain", b"blob");
        source.manifests.insert("sha256-00.sig".into(), Blob::manifest(&raw));
        source.manifests.insert(raw.digest().to_string(), Blob::manifest(&raw));
        source.blobs.insert(blob.digest.to_string(), Blob::new(b"blob"));
        source.referrers.insert(referrers_key(&subject, None), vec![blob.clone()]);
        source.native.insert(subject.to_string(), vec![Blob::new(b"one"), Blob::new(b"two")]);
        source.files.insert("http://lookaside/1".into(), Blob::new(b"file"));

        let recorder = Recorder::new(&source);
        assert!(recorder.tagged("sha256-00.sig").unwrap().is_some());
        assert!(recorder.tagged("absent").unwrap().is_none());
        recorder.by_digest(raw.digest()).unwrap();
        recorder.small_blob(&blob, 10).unwrap();
        recorder.referrers(&subject, None).unwrap();
        recorder.native(&subject).unwrap();
        recorder.get("http://lookaside/1", 10).unwrap();
        assert!(recorder.get("http://lookaside/2", 10).unwrap().is_none());
        let recording = recorder.finish();
        assert_eq!(recording, source);

        let json = serde_json::to_value(&recording).unwrap();
        let again: Recording = serde_json::from_value(json).unwrap();
        assert_eq!(again.by_digest(raw.digest()).unwrap().peek(), &raw);
        assert!(again.small_blob(&blob, 3).is_err(), "limits hold here too");
    }

    #[test]
    fn a_question_that_was_not_asked_finds_nothing() {
        let empty = Recording::default();
        let digest = Digest::sha256(b"");
        assert!(empty.tagged("x").unwrap().is_none());
        assert!(empty.by_digest(&digest).unwrap_err().is_not_found());
        assert!(empty.native(&digest).unwrap().is_empty());
        assert!(empty.referrers(&digest, None).unwrap().is_empty());
    }
}

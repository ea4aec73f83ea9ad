//! An image at a registry, to be written. Mirrors and other locations of `registries.conf` are for reading only.

use std::io::Read;

use base64::Engine as _;
use http::{Method, header};
use nacre_core::{Digest, Untrusted};
use serde_json::json;

use super::{
    Client,
    exchange::Payload,
    remote::{Remote, RequestParts},
    retry::Failure,
    signatures::fallback_tag,
    token::Scope,
    upload::{Upload, check_echo},
};
use crate::{
    manifest::{Descriptor, INDEX_LIMIT, Manifest, RawManifest, media},
    reference::{ImageRef, Location},
    source::{ImageSink, TransportError},
};

/// One image at a registry, to be written.
pub struct DockerSink {
    location: Location,
    reference: ImageRef,
    remote: Remote,
}

impl DockerSink {
    /// An image by name. Nothing is asked yet.
    ///
    /// # Errors
    /// [`TransportError::Blocked`]
    pub fn new(client: &Client, reference: &ImageRef) -> Result<Self, TransportError> {
        let reference = reference.clone().with_default_tag();
        let remote = Remote::new(client, client.resolve_push(&reference)?);
        Ok(Self { location: Location::Docker(reference.clone()), reference, remote })
    }

    /// Asks the registry to take a blob over from another of its repositories; `false` where it does not, and the blob has to be
    /// sent.
    ///
    /// # Errors
    /// [`TransportError`]
    pub fn mount_blob(&self, digest: &Digest, from: &ImageRef) -> Result<bool, TransportError> {
        if from.host() != self.reference.host() {
            return Ok(false);
        }
        let scope = Scope { mount_from: Some(from.path().to_owned()), ..self.push() };
        self.remote.retried(&format!("blob {digest}"), || {
            let url = self.remote.url("blobs/uploads/")?;
            let url = url.with_query("mount", &digest.to_string()).with_query("from", from.path());
            let make = &mut || RequestParts::new(Method::POST, &url);
            let response = self.remote.send_with(&scope, make, &mut Payload::Bytes(&[]))?;
            match response.status {
                201 => check_echo(&response, digest).map(|()| true),
                // A session was opened instead, or we may not read there.
                202 | 401 | 403 | 404 => Ok(false),
                _ => Err(response.into_failure()),
            }
        })
    }

    fn push(&self) -> Scope {
        Scope { repository: self.remote.repository().to_owned(), push: true, mount_from: None }
    }

    /// Stores a manifest under a tag or its digest; gives whether the registry maintains the subject's referrers.
    fn store(&self, manifest: &RawManifest, key: &str) -> Result<bool, Failure> {
        let url = self.remote.url(&format!("manifests/{key}"))?;
        let make = &mut || RequestParts::new(Method::PUT, &url).header(header::CONTENT_TYPE, manifest.media_type());
        let response = self.remote.send_with(&self.push(), make, &mut Payload::Bytes(manifest.bytes()))?;
        if !matches!(response.status, 200..=204) {
            return Err(response.into_refusal());
        }
        check_echo(&response, manifest.digest())?;
        Ok(response.header("oci-subject").is_some())
    }

    fn put(&self, manifest: &RawManifest, key: &str) -> Result<(), TransportError> {
        let maintained = self.remote.retried(&format!("manifest {key}"), || self.store(manifest, key))?;
        let parsed = if manifest.is_index() { None } else { Manifest::parse(manifest).ok() };
        match parsed {
            Some(Manifest { subject: Some(ref subject), .. }) if !maintained => {
                let parsed = parsed.as_ref().map(|parsed| describe(manifest, parsed));
                parsed.map_or(Ok(()), |descriptor| self.add_referrer(&subject.digest, &descriptor))
            }
            _ => Ok(()),
        }
    }

    /// Adds to the fallback index of a subject's referrers. Two writers at once may lose one of the entries: the specification
    /// has no way to tell.
    fn add_referrer(&self, subject: &Digest, descriptor: &Descriptor) -> Result<(), TransportError> {
        let tag = fallback_tag(subject);
        let what = format!("referrers tag {tag}");
        let place = self.remote.place();
        let old = match self.remote.retrying(&what, || self.remote.manifest(&tag)) {
            Ok(raw) if raw.is_index() => serde_json::from_slice(raw.bytes()).unwrap_or_default(),
            Ok(_) | Err((Failure::NotFound, _)) => serde_json::Value::Null,
            Err((failure, attempts)) => return Err(failure.into_error(&what, &place, attempts)),
        };
        let mut list = old.get("manifests").and_then(|list| list.as_array()).cloned().unwrap_or_default();
        let own = descriptor.digest.to_string();
        if list.iter().any(|entry| entry.get("digest").and_then(|digest| digest.as_str()) == Some(own.as_str())) {
            return Ok(());
        }
        if list.len() >= INDEX_LIMIT {
            let reason = format!("there are {} referrers already", list.len());
            return Err(TransportError::Protocol { what, place, reason });
        }
        let failed = |reason: String| TransportError::Protocol { what: what.clone(), place: place.clone(), reason };
        list.push(serde_json::to_value(descriptor).map_err(|error| failed(error.to_string()))?);
        let index = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": list });
        let raw = RawManifest::new(index.to_string().into_bytes(), Some(media::OCI_INDEX))
            .map_err(|source| TransportError::Manifest { place: place.clone(), source })?;
        self.remote.retried(&what, || self.store(&raw, &tag)).map(|_| ())
    }
}

/// The descriptor of an artifact in an index of referrers.
fn describe(raw: &RawManifest, parsed: &Manifest) -> Descriptor {
    let kind = parsed.artifact_type.clone().unwrap_or_else(|| parsed.config.media_type.clone());
    Descriptor { artifact_type: Some(kind), annotations: parsed.annotations.clone(), ..raw.descriptor() }
}

impl ImageSink for DockerSink {
    fn location(&self) -> &Location {
        &self.location
    }

    fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, TransportError> {
        self.remote.retried(&format!("blob {}", descriptor.digest), || {
            let url = self.remote.url(&format!("blobs/{}", descriptor.digest))?;
            let response = self.remote.send(&self.push(), &mut || RequestParts::new(Method::HEAD, &url))?;
            match response.status {
                200 => Ok(response.content_length().is_none_or(|length| length == descriptor.size)),
                404 => Ok(false),
                _ => Err(response.into_failure()),
            }
        })
    }

    fn put_blob(&self, content: &mut dyn Read, expected: Option<&Descriptor>) -> Result<(Digest, u64), TransportError> {
        Upload { remote: &self.remote, scope: self.push() }.put(content, expected)
    }

    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        let what = format!("manifest {tag}");
        match self.remote.retrying(&what, || self.remote.manifest(tag)) {
            Ok(raw) => Ok(Some(Untrusted::new(raw))),
            Err((Failure::NotFound, _)) => Ok(None),
            Err((failure, attempts)) => Err(failure.into_error(&what, &self.remote.place(), attempts)),
        }
    }

    fn put_manifest(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        self.put(manifest, &manifest.digest().to_string())
    }

    fn put_tagged(&self, manifest: &RawManifest, tag: &str) -> Result<(), TransportError> {
        self.reference.with_tag(tag).map_err(|error| TransportError::Protocol {
            what: "tag".into(),
            place: self.remote.place(),
            reason: error.to_string(),
        })?;
        self.put(manifest, tag)
    }

    fn put_native_signature(&self, manifest: &Digest, signature: &[u8]) -> Result<(), TransportError> {
        let what = format!("signature of {manifest}");
        let name = format!("{manifest}@{:032x}", u128::from_le_bytes(random()));
        let content = base64::engine::general_purpose::STANDARD.encode(signature);
        let body = json!({ "schemaVersion": 2, "name": name, "type": "atomic", "content": content }).to_string();
        self.remote.retried(&what, || {
            if !self.remote.stores_signatures()? {
                let (what, place) = ("simple-signing signatures (X-R-S-S)".into(), self.remote.place());
                return Err(TransportError::Unsupported { what, place }.into());
            }
            let url = self.remote.at(&format!("/extensions/v2/{}/signatures/{manifest}", self.remote.repository()))?;
            let make = &mut || RequestParts::new(Method::PUT, &url).header(header::CONTENT_TYPE, "application/json");
            let response = self.remote.send_with(&self.push(), make, &mut Payload::Bytes(body.as_bytes()))?;
            if matches!(response.status, 200..=204) { Ok(()) } else { Err(response.into_failure()) }
        })
    }

    fn attach(&self, artifact: &RawManifest) -> Result<(), TransportError> {
        self.put_manifest(artifact)
    }

    fn commit(&self, manifest: &RawManifest) -> Result<(), TransportError> {
        if let Some(expected) = self.reference.digest().filter(|digest| *digest != manifest.digest()) {
            let (expected, found) = (*expected, *manifest.digest());
            return Err(TransportError::DigestMismatch { what: "manifest".into(), expected, found });
        }
        let key = self.reference.tag().map_or_else(|| manifest.digest().to_string(), str::to_owned);
        self.put(manifest, &key)
    }
}

fn random() -> [u8; 16] {
    use rand_core::RngCore as _;
    let mut bytes = [0; 16];
    rand_core::OsRng.fill_bytes(&mut bytes);
    bytes
}

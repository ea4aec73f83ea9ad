//! Where a registry's signatures are found: cosign's tags, the referrers API or its fallback tag, the X-R-S-S extension of
//! OpenShift's registry, and lookaside servers. Nothing of it is verified here.

use std::io::Read as _;

use base64::Engine as _;
use http::Method;
use nacre_core::{Digest, Untrusted};
use serde::Deserialize;

use super::{
    blob::BlobStream,
    exchange::{Peer, Request, pause},
    files,
    remote::{Remote, is_index_type},
    retry::{Backoff, Failure},
    source::DockerSource,
    url::Url,
};
use crate::{
    manifest::{Descriptor, Index, MANIFEST_LIMIT, RawManifest, media},
    source::{SignatureStorage, TransportError},
};

/// The most descriptors of referrers.
const REFERRERS_LIMIT: usize = 1024;
/// The most pages that they come in.
const PAGES_LIMIT: usize = 64;
/// The most signatures of an image that a registry stores.
const NATIVE_LIMIT: usize = 128;
/// The most bytes of one of them.
const NATIVE_SIZE: usize = 4 << 20;
/// The most bytes of the document that they come in.
const NATIVE_DOCUMENT: u64 = 16 << 20;

#[derive(Deserialize)]
struct NativeList {
    #[serde(default)]
    signatures: Option<Vec<NativeSignature>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NativeSignature {
    schema_version: u32,
    #[serde(rename = "type")]
    kind: String,
    content: String,
}

impl SignatureStorage for DockerSource {
    fn tagged(&self, tag: &str) -> Result<Option<Untrusted<RawManifest>>, TransportError> {
        // The tag becomes a part of a URL; the grammar of tags has nothing that could leave its place there.
        self.reference().with_tag(tag).map_err(|error| TransportError::Protocol {
            what: "tag".into(),
            place: self.reference().repository(),
            reason: error.to_string(),
        })?;
        absent_is_none(self.manifest_by_key(tag))
    }

    fn by_digest(&self, digest: &Digest) -> Result<Untrusted<RawManifest>, TransportError> {
        self.manifest_by_key(&digest.to_string())
    }

    fn small_blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Untrusted<Vec<u8>>, TransportError> {
        let (what, place) = (format!("blob {}", descriptor.digest), self.reference().repository());
        if descriptor.size > limit as u64 {
            return Err(TransportError::TooLarge { what, place, limit: limit as u64 });
        }
        let mut bytes = Vec::new();
        BlobStream::open(&self.endpoints, descriptor)?.read_to_end(&mut bytes).map_err(|error| {
            error.downcast::<TransportError>().unwrap_or_else(|error| TransportError::Protocol {
                what,
                place,
                reason: error.to_string(),
            })
        })?;
        Ok(Untrusted::new(bytes))
    }

    fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, TransportError> {
        let found = self.endpoints.first(&format!("referrers of {subject}"), |remote| {
            let mut found = match by_api(remote, subject, artifact_type)? {
                Some(found) => found,
                None => by_tag(remote, subject)?,
            };
            found.retain(|one| match (artifact_type, &one.artifact_type) {
                (Some(wanted), Some(kind)) => wanted == kind,
                _ => true,
            });
            // A mirror that has none may only not have copied them.
            if found.is_empty() { Err(Failure::NotFound) } else { Ok(found) }
        });
        Ok(absent_is_none(found)?.unwrap_or_default())
    }

    fn native(&self, manifest: &Digest) -> Result<Vec<Untrusted<Vec<u8>>>, TransportError> {
        let found = self.endpoints.first(&format!("signatures of {manifest}"), |remote| {
            let found = if remote.stores_signatures()? { native(remote, manifest)? } else { Vec::new() };
            if found.is_empty() { Err(Failure::NotFound) } else { Ok(found) }
        });
        Ok(absent_is_none(found)?.unwrap_or_default().into_iter().map(Untrusted::new).collect())
    }

    fn get(&self, url: &str, limit: usize) -> Result<Option<Untrusted<Vec<u8>>>, TransportError> {
        if let Some(path) = url.strip_prefix("file://") {
            let path = std::path::Path::new(path);
            if !path.is_absolute() || path.components().any(|part| part == std::path::Component::ParentDir) {
                let reason = "is not the URL of an absolute path without '..'".into();
                return Err(TransportError::Config { path: url.into(), reason });
            }
            return Ok(files::read_if_there(path, "reading a signature", limit as u64)?.map(Untrusted::new));
        }
        let endpoints = &self.endpoints;
        let client = &endpoints.remote(0).client;
        let parsed = Url::parse(url).map_err(|why| TransportError::Config {
            path: "lookaside".into(),
            reason: format!("'{}' is {why}", super::exchange::printable(url, 200)),
        })?;
        // A lookaside server is as insecure as a registry of that name was declared to be.
        let named = format!("{}/x", parsed.authority()).parse().ok();
        let insecure = named.and_then(|name| client.resolve_push(&name).ok()).is_some_and(|endpoint| endpoint.insecure);
        let peer = Peer { authority: parsed.authority(), insecure };
        let mut backoff = Backoff::new(client.config(), client.config().retries);
        loop {
            let attempts = backoff.attempts();
            let failure = match get(endpoints.remote(0), &peer, &parsed, limit) {
                Ok(bytes) => return Ok(Some(Untrusted::new(bytes))),
                Err(Failure::NotFound) => return Ok(None),
                Err(failure) => failure,
            };
            let Some(delay) = backoff.after(&failure) else {
                return Err(failure.into_error("signature", &parsed.to_string(), attempts));
            };
            client.note(&format!("{parsed}: {}; again in {:.1} s", failure.reason(), delay.as_secs_f32()));
            pause("signature", &failure, delay);
        }
    }
}

fn get(remote: &Remote, peer: &Peer, url: &Url, limit: usize) -> Result<Vec<u8>, Failure> {
    let response = remote.client.inner.http.send(peer, Request::new(Method::GET, url.clone()))?;
    if response.status != 200 {
        return Err(response.into_failure());
    }
    if response.is_html() {
        return Err(Failure::Protocol("an HTML page instead of a signature".into()));
    }
    response.read_body(limit as u64)
}

fn absent_is_none<T>(result: Result<T, TransportError>) -> Result<Option<T>, TransportError> {
    match result {
        Err(error) if error.is_not_found() => Ok(None),
        other => other.map(Some),
    }
}

/// The referrers API; `None` where the registry has none.
fn by_api(remote: &Remote, subject: &Digest, artifact_type: Option<&str>) -> Result<Option<Vec<Descriptor>>, Failure> {
    let base = remote.url(&format!("referrers/{subject}"))?;
    let mut url = artifact_type.map_or_else(|| base.clone(), |kind| base.with_query("artifactType", kind));
    let mut found = Vec::new();
    for _ in 0..PAGES_LIMIT {
        let Some((bytes, about)) = remote.document(&url, media::OCI_INDEX, MANIFEST_LIMIT as u64)? else {
            return Ok(None);
        };
        // Web servers answer anything with 200; the specification tells the API by its content type.
        if !is_index_type(&about.content_type) {
            return Ok(None);
        }
        found.extend(parse_index(remote, bytes)?);
        found.truncate(REFERRERS_LIMIT);
        let next = about.link.as_deref().and_then(next_link);
        let Some(next) = next.filter(|_| found.len() < REFERRERS_LIMIT) else { return Ok(Some(found)) };
        let next = url.join(next).map_err(|why| Failure::Protocol(format!("the next page of referrers is {why}")))?;
        if !next.same_origin(&url) {
            return Err(Failure::Protocol(format!("the next page of referrers is at {next}, another host")));
        }
        url = next;
    }
    Ok(Some(found))
}

/// The target of `rel="next"` in a `Link` header (RFC 8288).
fn next_link(header: &str) -> Option<&str> {
    header.split(',').find_map(|link| {
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let next = |parameter: &str| {
            let parameter = parameter.trim();
            parameter.strip_prefix("rel=").is_some_and(|value| value.trim_matches('"').eq_ignore_ascii_case("next"))
        };
        parameters.split(';').any(next).then_some(target)
    })
}

/// The fallback tag of registries without the API.
fn by_tag(remote: &Remote, subject: &Digest) -> Result<Vec<Descriptor>, Failure> {
    match remote.manifest(&fallback_tag(subject)) {
        Ok(raw) if raw.is_index() => parse_index(remote, raw.bytes().to_vec()),
        // Another use of the tag is no list of referrers.
        Ok(_) | Err(Failure::NotFound) => Ok(Vec::new()),
        Err(failure) => Err(failure),
    }
}

/// `sha256-<hex>`, where registries without the referrers API keep the index of a manifest's referrers.
pub(crate) fn fallback_tag(subject: &Digest) -> String {
    let tag = format!("{}-{}", subject.algorithm().name(), subject.hex());
    // A tag has 128 characters at most (distribution specification, "Referrers Tag Schema").
    tag.chars().take(128).collect()
}

fn parse_index(remote: &Remote, bytes: Vec<u8>) -> Result<Vec<Descriptor>, Failure> {
    let parsed = RawManifest::new(bytes, Some(media::OCI_INDEX)).and_then(|raw| Index::parse(&raw));
    let mut index = parsed.map_err(|source| TransportError::Manifest { place: remote.place(), source })?;
    index.manifests.truncate(REFERRERS_LIMIT);
    Ok(index.manifests)
}

fn native(remote: &Remote, manifest: &Digest) -> Result<Vec<Vec<u8>>, Failure> {
    let url = remote.at(&format!("/extensions/v2/{}/signatures/{manifest}", remote.repository()))?;
    let Some((bytes, _)) = remote.document(&url, "application/json", NATIVE_DOCUMENT)? else { return Ok(Vec::new()) };
    let bad = |why: &str| Failure::Protocol(format!("{url}: {why}"));
    let list: NativeList =
        serde_json::from_slice(&bytes).map_err(|error| bad(&format!("no list of signatures: {error}")))?;
    let list = list.signatures.unwrap_or_default();
    if list.len() > NATIVE_LIMIT {
        return Err(bad(&format!("{} signatures; at most {NATIVE_LIMIT} are read", list.len())));
    }
    let mut found = Vec::new();
    for signature in list.iter().filter(|one| one.schema_version == 2 && one.kind == "atomic") {
        let content = base64::engine::general_purpose::STANDARD.decode(&signature.content);
        let content = content.map_err(|_| bad("a signature is not base64"))?;
        if content.len() > NATIVE_SIZE {
            return Err(bad(&format!("a signature of {} bytes; at most {NATIVE_SIZE} are read", content.len())));
        }
        found.push(content);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found() {
        assert_eq!(next_link(r#"</v2/a/referrers/x?n=2>; rel="next""#), Some("/v2/a/referrers/x?n=2"));
        assert_eq!(next_link(r#"<a>; rel="prev", <b>; title=x; rel=Next"#), Some("b"));
        for text in ["", "<", "<a", "<a>", "a; rel=next", "<a>; rel=\"previous\""] {
            assert_eq!(next_link(text), None, "{text}");
        }
    }

    #[test]
    fn the_fallback_tag_is_a_tag() {
        let digest = Digest::sha256(b"");
        assert_eq!(fallback_tag(&digest), format!("sha256-{}", digest.hex()));
        let long = Digest::of(nacre_core::Algorithm::Sha512, b"");
        assert_eq!(fallback_tag(&long).len(), 128);
    }
}

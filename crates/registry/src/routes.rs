//! The endpoints of the distribution specification 1.1, and docker's signature extension (X-R-S-S).

use std::{collections::HashMap, io, sync::Mutex};

use nacre_core::Digest;
use serde_json::{Value, json};

use crate::{
    auth::{Auth, Need, Tokens},
    http::{Body, Content, Request, Response},
    lock,
    store::{Store, Upload},
};

const MANIFEST_LIMIT: u64 = 4 << 20;
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What the registry knows besides its blobs and manifests.
pub(crate) struct Service {
    pub(crate) store: Store,
    pub(crate) auth: Auth,
    pub(crate) referrers: bool,
    pub(crate) signatures: bool,
    pub(crate) tokens: Mutex<Tokens>,
    pub(crate) uploads: Mutex<HashMap<String, Upload>>,
    pub(crate) next_upload: Mutex<u64>,
    pub(crate) files: Mutex<HashMap<String, Vec<u8>>>,
    /// X-R-S-S: repository and manifest digest to signatures.
    pub(crate) extension: Mutex<HashMap<(String, String), Vec<Value>>>,
}

/// An endpoint, as the path names it.
#[derive(Debug, PartialEq)]
enum Endpoint<'a> {
    Version,
    Token,
    File,
    Manifest(String, &'a str),
    Blob(String, &'a str),
    StartUpload(String),
    Upload(String, &'a str),
    Tags(String),
    Referrers(String, &'a str),
    Signatures(String, &'a str),
}

fn endpoint(path: &str) -> Option<Endpoint<'_>> {
    match path {
        "/v2/" | "/v2" => return Some(Endpoint::Version),
        "/token" => return Some(Endpoint::Token),
        _ => {}
    }
    if let Some(rest) = path.strip_prefix("/extensions/v2/") {
        let (name, digest) = rest.rsplit_once("/signatures/")?;
        return is_repository(name).then(|| Endpoint::Signatures(name.to_owned(), digest));
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return Some(Endpoint::File) };
    let parts: Vec<&str> = rest.split('/').collect();
    let repository = |parts: &[&str]| Some(parts.join("/")).filter(|name| is_repository(name));
    Some(match parts.as_slice() {
        [name @ .., "blobs", "uploads"] | [name @ .., "blobs", "uploads", ""] => {
            Endpoint::StartUpload(repository(name)?)
        }
        [name @ .., "blobs", "uploads", id] => Endpoint::Upload(repository(name)?, id),
        [name @ .., "blobs", digest] => Endpoint::Blob(repository(name)?, digest),
        [name @ .., "manifests", reference] => Endpoint::Manifest(repository(name)?, reference),
        [name @ .., "referrers", digest] => Endpoint::Referrers(repository(name)?, digest),
        [name @ .., "tags", "list"] => Endpoint::Tags(repository(name)?),
        _ => return None,
    })
}

/// Each component begins with a letter or digit, so that no name leads out of its directory.
fn is_repository(name: &str) -> bool {
    let is_component = |part: &str| {
        part.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
            && part.starts_with(|first: char| first.is_ascii_alphanumeric())
    };
    name.len() <= 255 && name.split('/').all(is_component)
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    tag.len() <= 128
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn unknown(code: &str, what: &str) -> Response {
    Response::error(404, code, &format!("{what} is not here"))
}

fn invalid_digest(text: &str) -> Response {
    Response::error(400, "DIGEST_INVALID", &format!("'{text:.100}' is no digest of the content"))
}

fn not_allowed() -> Response {
    Response::error(405, "UNSUPPORTED", "this registry does not do that")
}

impl Service {
    /// Answers one request. `base` is the registry's URL.
    pub(crate) fn answer(&self, request: &Request, body: &mut Body<'_>, base: &str) -> io::Result<Response> {
        let Some(endpoint) = endpoint(&request.path) else {
            return Ok(Response::error(404, "NAME_INVALID", "no such endpoint, or no repository name"));
        };
        let write = !matches!(request.method.as_str(), "GET" | "HEAD");
        let repository = match &endpoint {
            Endpoint::Manifest(name, _)
            | Endpoint::Blob(name, _)
            | Endpoint::StartUpload(name)
            | Endpoint::Upload(name, _)
            | Endpoint::Tags(name)
            | Endpoint::Referrers(name, _)
            | Endpoint::Signatures(name, _) => Some(name.as_str()),
            Endpoint::Version => None,
            Endpoint::Token => {
                let form = body.read_all(64 << 10)?.unwrap_or_default();
                return Ok(self.auth.token(&mut lock(&self.tokens), request, &String::from_utf8_lossy(&form)));
            }
            Endpoint::File => {
                let file = lock(&self.files).get(&request.path).cloned();
                return Ok(file.map_or_else(|| unknown("NOT_FOUND", "the file"), |bytes| Response::bytes(200, bytes)));
            }
        };
        if let Some(refusal) = self.auth.refuse(&lock(&self.tokens), request, &Need { repository, write }, base) {
            return Ok(refusal);
        }
        let response = match (&endpoint, request.method.as_str()) {
            (Endpoint::Manifest(name, reference), "GET" | "HEAD") => self.get_manifest(name, reference)?,
            (Endpoint::Manifest(name, reference), "PUT") => self.put_manifest(name, reference, request, body)?,
            (Endpoint::Blob(_, digest), "GET" | "HEAD") => self.get_blob(digest, request)?,
            (Endpoint::StartUpload(name), "POST") => self.start_upload(name, request, body)?,
            (Endpoint::Upload(name, id), _) => self.upload(name, id, request, body)?,
            (Endpoint::Tags(name), "GET") => self.tags(name, request)?,
            (Endpoint::Referrers(name, digest), "GET") if self.referrers => self.referrers(name, digest, request)?,
            (Endpoint::Referrers(..), "GET") => unknown("NOT_FOUND", "the referrers API"),
            (Endpoint::Signatures(name, digest), _) if self.signatures => {
                self.signatures(name, digest, request, body)?
            }
            (Endpoint::Version, "GET" | "HEAD") => Response::json(200, &json!({})),
            _ => not_allowed(),
        };
        let response = response.with("Docker-Distribution-Api-Version", "registry/2.0");
        Ok(if self.signatures { response.with("X-Registry-Supports-Signatures", "1") } else { response })
    }

    fn resolve(&self, name: &str, reference: &str) -> io::Result<Option<Digest>> {
        match reference.parse() {
            Ok(digest) => Ok(Some(digest)),
            Err(_) if is_tag(reference) => self.store.tag(name, reference),
            Err(_) => Ok(None),
        }
    }

    fn get_manifest(&self, name: &str, reference: &str) -> io::Result<Response> {
        let Some(digest) = self.resolve(name, reference)? else {
            return Ok(unknown("MANIFEST_UNKNOWN", reference));
        };
        let Some((kind, body)) = self.store.manifest(name, &digest)? else {
            return Ok(unknown("MANIFEST_UNKNOWN", reference));
        };
        let response = Response { status: 200, headers: Vec::new(), body };
        Ok(response.with("Content-Type", kind).with("Docker-Content-Digest", digest))
    }

    fn put_manifest(
        &self,
        name: &str,
        reference: &str,
        request: &Request,
        body: &mut Body<'_>,
    ) -> io::Result<Response> {
        let Some(bytes) = body.read_all(MANIFEST_LIMIT)? else {
            return Ok(Response::error(413, "SIZE_INVALID", "manifest larger than 4 MiB"));
        };
        let Ok(manifest) = serde_json::from_slice::<Value>(&bytes) else {
            return Ok(Response::error(400, "MANIFEST_INVALID", "the manifest is no JSON"));
        };
        let digest = match reference.parse::<Digest>() {
            Ok(digest) if Digest::of(digest.algorithm(), &bytes) == digest => digest,
            Ok(_) => return Ok(invalid_digest(reference)),
            Err(_) if is_tag(reference) => Digest::sha256(&bytes),
            Err(_) => return Ok(Response::error(400, "TAG_INVALID", "not a tag")),
        };
        for blob in blobs_of(&manifest) {
            let known = match blob.parse() {
                Ok(digest) => self.store.blob(&digest)?.is_some(),
                Err(_) => false,
            };
            if !known {
                return Ok(Response::error(404, "MANIFEST_BLOB_UNKNOWN", &format!("the blob {blob:.100} is not here")));
            }
        }
        let kind = request.header("content-type").or_else(|| manifest.get("mediaType")?.as_str()).unwrap_or_default();
        self.store.put_manifest(name, &digest, kind, &bytes)?;
        if is_tag(reference) {
            self.store.put_tag(name, reference, &digest)?;
        }
        let response = Response::new(201)
            .with("Location", format!("/v2/{name}/manifests/{digest}"))
            .with("Docker-Content-Digest", digest);
        let subject = manifest.pointer("/subject/digest").and_then(Value::as_str);
        Ok(match subject {
            Some(subject) if self.referrers => response.with("OCI-Subject", subject),
            _ => response,
        })
    }

    fn get_blob(&self, digest: &str, request: &Request) -> io::Result<Response> {
        let Ok(digest) = digest.parse::<Digest>() else { return Ok(invalid_digest(digest)) };
        let Some(body) = self.store.blob(&digest)? else {
            return Ok(unknown("BLOB_UNKNOWN", &digest.to_string()));
        };
        let total = body.left;
        let range = if request.method == "GET" { request.header("range") } else { None };
        let response = match range.map(|range| parse_range(range, total)) {
            None => Response { status: 200, headers: Vec::new(), body },
            Some(Some((start, last))) => {
                let body = body.window(start, last);
                Response { status: 206, headers: Vec::new(), body }
                    .with("Content-Range", format!("bytes {start}-{last}/{total}"))
            }
            Some(None) => return Ok(Response::new(416).with("Content-Range", format!("bytes */{total}"))),
        };
        Ok(response
            .with("Content-Type", "application/octet-stream")
            .with("Accept-Ranges", "bytes")
            .with("Docker-Content-Digest", digest))
    }

    fn start_upload(&self, name: &str, request: &Request, body: &mut Body<'_>) -> io::Result<Response> {
        if let Some(Ok(digest)) = request.parameter("mount").map(|text| text.parse::<Digest>())
            && self.store.blob(&digest)?.is_some()
        {
            return Ok(created(name, &digest));
        }
        let mut upload = self.store.start_upload()?;
        if let Some(text) = request.parameter("digest") {
            let Ok(digest) = text.parse::<Digest>() else { return Ok(invalid_digest(&text)) };
            upload.append(body)?;
            let good = self.store.finish_blob(upload, &digest)?;
            return Ok(if good { created(name, &digest) } else { invalid_digest(&text) });
        }
        let id = {
            let mut next = lock(&self.next_upload);
            *next += 1;
            format!("u{next}")
        };
        let response = accepted(name, &id, 0);
        lock(&self.uploads).insert(id, upload);
        Ok(response)
    }

    /// The requests of an upload that has begun. While one is at work, the session is out of the table: a second one at the same
    /// time finds none.
    fn upload(&self, name: &str, id: &str, request: &Request, body: &mut Body<'_>) -> io::Result<Response> {
        let Some(mut upload) = lock(&self.uploads).remove(id) else {
            return Ok(unknown("BLOB_UPLOAD_UNKNOWN", id));
        };
        match request.method.as_str() {
            "DELETE" => Ok(Response::new(204)),
            "PATCH" => {
                let start = request.header("content-range").and_then(|range| range.split('-').next()?.parse().ok());
                let response = if start.is_some_and(|start: u64| start != upload.len()) {
                    Response { status: 416, ..accepted(name, id, upload.len()) }
                } else {
                    upload.append(body)?;
                    accepted(name, id, upload.len())
                };
                lock(&self.uploads).insert(id.to_owned(), upload);
                Ok(response)
            }
            "PUT" => {
                upload.append(body)?;
                let text = request.parameter("digest").unwrap_or_default();
                match text.parse::<Digest>() {
                    Ok(digest) if self.store.finish_blob(upload, &digest)? => Ok(created(name, &digest)),
                    _ => Ok(invalid_digest(&text)),
                }
            }
            "GET" => {
                let response = Response { status: 204, ..accepted(name, id, upload.len()) };
                lock(&self.uploads).insert(id.to_owned(), upload);
                Ok(response)
            }
            _ => Ok(not_allowed()),
        }
    }

    fn tags(&self, name: &str, request: &Request) -> io::Result<Response> {
        let mut tags = self.store.tags(name)?;
        if tags.is_empty() && self.store.manifests(name)?.is_empty() {
            return Ok(unknown("NAME_UNKNOWN", name));
        }
        if let Some(last) = request.parameter("last") {
            tags.retain(|tag| *tag > last);
        }
        let page = request.parameter("n").and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
        let more = tags.len() > page;
        tags.truncate(page);
        let response = Response::json(200, &json!({ "name": name, "tags": tags }));
        Ok(match tags.last() {
            Some(last) if more => {
                response.with("Link", format!("</v2/{name}/tags/list?n={page}&last={last}>; rel=\"next\""))
            }
            _ => response,
        })
    }

    fn referrers(&self, name: &str, subject: &str, request: &Request) -> io::Result<Response> {
        if subject.parse::<Digest>().is_err() {
            return Ok(invalid_digest(subject));
        }
        let filter = request.parameter("artifactType");
        let mut manifests = Vec::new();
        for digest in self.store.manifests(name)? {
            let Some((kind, content)) = self.store.manifest(name, &digest)? else { continue };
            let bytes = content.into_vec()?;
            let Ok(manifest) = serde_json::from_slice::<Value>(&bytes) else { continue };
            if manifest.pointer("/subject/digest").and_then(Value::as_str) != Some(subject) {
                continue;
            }
            let artifact = manifest.get("artifactType").or_else(|| manifest.pointer("/config/mediaType"));
            if filter.as_deref().is_some_and(|wanted| artifact.and_then(Value::as_str) != Some(wanted)) {
                continue;
            }
            let mut descriptor =
                json!({ "mediaType": kind, "digest": digest, "size": bytes.len(), "artifactType": artifact });
            if let (Some(object), Some(notes)) = (descriptor.as_object_mut(), manifest.get("annotations")) {
                object.insert("annotations".to_owned(), notes.clone());
            }
            manifests.push(descriptor);
        }
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        let mut response = Response::bytes(200, index.to_string().into_bytes()).with("Content-Type", OCI_INDEX);
        if filter.is_some() {
            response = response.with("OCI-Filters-Applied", "artifactType");
        }
        Ok(response)
    }

    fn signatures(&self, name: &str, digest: &str, request: &Request, body: &mut Body<'_>) -> io::Result<Response> {
        let key = (name.to_owned(), digest.to_owned());
        match request.method.as_str() {
            "GET" => {
                let known = lock(&self.extension).get(&key).cloned().unwrap_or_default();
                Ok(Response::json(200, &json!({ "signatures": known })))
            }
            "PUT" => match body.read_all(MANIFEST_LIMIT)?.map(|bytes| serde_json::from_slice::<Value>(&bytes)) {
                Some(Ok(signature)) => {
                    lock(&self.extension).entry(key).or_default().push(signature);
                    Ok(Response::new(201))
                }
                _ => Ok(Response::error(400, "SIGNATURE_INVALID", "not a signature")),
            },
            _ => Ok(not_allowed()),
        }
    }

    /// Stores a blob as it is.
    pub(crate) fn content(&self, digest: &Digest) -> io::Result<Option<Vec<u8>>> {
        self.store.blob(digest)?.map(Content::into_vec).transpose()
    }
}

fn created(name: &str, digest: &Digest) -> Response {
    Response::new(201).with("Location", format!("/v2/{name}/blobs/{digest}")).with("Docker-Content-Digest", digest)
}

fn accepted(name: &str, id: &str, length: u64) -> Response {
    Response::new(202)
        .with("Location", format!("/v2/{name}/blobs/uploads/{id}"))
        .with("Docker-Upload-UUID", id)
        .with("Range", format!("0-{}", length.saturating_sub(1)))
}

/// The digests of the config and the layers of a manifest, which have to be there before it.
fn blobs_of(manifest: &Value) -> Vec<&str> {
    let layers = manifest.get("layers").and_then(Value::as_array).into_iter().flatten();
    // Layers with URLs (foreign ones) are stored elsewhere.
    let own = layers.filter(|layer| layer.get("urls").is_none());
    own.chain(manifest.get("config")).filter_map(|blob| blob.get("digest")?.as_str()).collect()
}

/// `bytes=a-b`, `bytes=a-` and `bytes=-n` on content of `total` bytes: the first and the last byte, or nothing that is there.
fn parse_range(text: &str, total: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let end = total.checked_sub(1)?;
    let (first, last) = match (first.trim(), last.trim()) {
        ("", count) => (total.saturating_sub(count.parse().ok().filter(|count| *count > 0)?), end),
        (first, "") => (first.parse().ok()?, end),
        (first, last) => (first.parse().ok()?, last.parse::<u64>().ok()?.min(end)),
    };
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_no_repositories() {
        for bad in ["", "..", "a/../b", "a//b", "/a", "a/", "A", "a/_tags", ".a", &"a".repeat(256)] {
            assert!(!is_repository(bad), "{bad}");
            assert_eq!(endpoint(&format!("/v2/{bad}/tags/list")), None, "{bad}");
        }
        assert!(is_repository("library/a_b.c-d"));
        for bad in ["", "..", ".a", "a/b", "-a", &"a".repeat(129)] {
            assert!(!is_tag(bad), "{bad}");
        }
        assert_eq!(endpoint("/v2/a/b/blobs/uploads/"), Some(Endpoint::StartUpload("a/b".into())));
        assert_eq!(endpoint("/v2/a/blobs/uploads/u1"), Some(Endpoint::Upload("a".into(), "u1")));
    }

    #[test]
    fn ranges_are_cut_to_the_content_or_refused() {
        assert_eq!(parse_range("bytes=0-", 10), Some((0, 9)));
        assert_eq!(parse_range("bytes=3-5", 10), Some((3, 5)));
        assert_eq!(parse_range("bytes=3-500", 10), Some((3, 9)));
        assert_eq!(parse_range("bytes=-4", 10), Some((6, 9)));
        assert_eq!(parse_range("bytes=-40", 10), Some((0, 9)));
        for bad in [
            "bytes=10-",
            "bytes=5-3",
            "bytes=-0",
            "bytes=-",
            "bytes=a-b",
            "0-5",
            "bytes=0-1,3-4",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(parse_range(bad, 10), None, "{bad}");
        }
        assert_eq!(parse_range("bytes=0-", 0), None);
    }
}

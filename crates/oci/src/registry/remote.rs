//! A repository at one endpoint: the specification's URLs, with authorization, without repetition.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use http::{HeaderName, Method, header};
use nacre_core::Digest;

use super::{
    Client, DOCKER_HUB_HOST, DOCKER_HUB_NAME, Endpoint,
    exchange::{Payload, Peer, Request, Response, pause, printable},
    retry::{Backoff, Failure},
    token::{Gate, Scope},
    url::Url,
};
use crate::{
    manifest::{MANIFEST_LIMIT, RawManifest, media},
    source::TransportError,
};

/// What we take as a manifest, the preferred types first.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json";

/// Tells a node's cache of Dragonfly's kind which registry it is to ask.
const UPSTREAM: &str = "x-dragonfly-registry";
/// The most bytes of a refusal that are read to keep its connection.
const REFUSAL_LIMIT: u64 = 16 << 10;

/// What is known about one registry.
pub(crate) struct Host {
    /// As it is named in references.
    name: String,
    peer: Peer,
    /// Whether it speaks TLS; learnt for insecure ones only.
    https: Mutex<Option<bool>>,
    gate: Gate,
    /// Whether it stores simple-signing signatures itself (X-Registry-Supports-Signatures).
    signatures: OnceLock<bool>,
}

impl Host {
    pub(crate) fn new(name: &str, insecure: bool) -> Self {
        let authority = if name == DOCKER_HUB_NAME { DOCKER_HUB_HOST } else { name };
        Self {
            name: name.to_owned(),
            peer: Peer { authority: authority.to_owned(), insecure },
            https: Mutex::new((!insecure).then_some(true)),
            gate: Gate::default(),
            signatures: OnceLock::new(),
        }
    }
}

/// A repository at an endpoint.
#[derive(Clone)]
pub(crate) struct Remote {
    pub(crate) client: Client,
    pub(crate) endpoint: Endpoint,
    host: Arc<Host>,
}

impl Remote {
    pub(crate) fn new(client: &Client, endpoint: Endpoint) -> Self {
        let host = client.host(endpoint.reference.host(), endpoint.insecure);
        Self { client: client.clone(), endpoint, host }
    }

    /// For messages.
    pub(crate) fn place(&self) -> String {
        self.endpoint.reference.repository()
    }

    pub(crate) fn repository(&self) -> &str {
        self.endpoint.reference.path()
    }

    /// Runs `attempt` until it succeeds, fails for good, or has failed often enough; gives the number of attempts with a failure.
    pub(crate) fn retrying<T>(
        &self,
        what: &str,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, (Failure, u32)> {
        let config = self.client.config();
        let retries = if self.endpoint.mirror { config.mirror_retries } else { config.retries };
        let mut backoff = Backoff::new(config, retries);
        loop {
            let attempts = backoff.attempts();
            let failure = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            let Some(delay) = backoff.after(&failure) else { return Err((failure, attempts)) };
            self.note_retry(what, &failure, delay);
            pause(what, &failure, delay);
        }
    }

    /// [`retrying`](Self::retrying), with the error for the caller.
    pub(crate) fn retried<T>(
        &self,
        what: &str,
        attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, TransportError> {
        self.retrying(what, attempt).map_err(|(failure, attempts)| failure.into_error(what, &self.place(), attempts))
    }

    pub(crate) fn note_retry(&self, what: &str, failure: &Failure, delay: Duration) {
        let message = format!("{}: {what}: {}; again in {:.1} s", self.place(), failure.reason(), delay.as_secs_f32());
        self.client.inner.progress.note(&message);
    }

    /// The URL of `rest` within the repository's part of the API, such as `manifests/latest`.
    pub(crate) fn url(&self, rest: &str) -> Result<Url, Failure> {
        // Mirrors of containerd's kind learn from `ns` whose image it is.
        let ns = self.endpoint.upstream.as_deref().and_then(|origin| origin.split_once("://"));
        let query = ns.map(|(_, ns)| format!("?ns={}", if ns == "index.docker.io" { DOCKER_HUB_NAME } else { ns }));
        self.at(&format!("/v2/{}/{rest}{}", self.repository(), query.unwrap_or_default()))
    }

    /// The URL of an absolute path at the registry.
    pub(crate) fn at(&self, path: &str) -> Result<Url, Failure> {
        let https = self.is_https()?;
        Url::at(https, &self.host.peer.authority, path).map_err(Failure::Protocol)
    }

    /// Whether to speak TLS. A secure registry always does; an insecure one is asked, TLS first, and the answer kept.
    fn is_https(&self) -> Result<bool, Failure> {
        let mut known = self.host.https.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(https) = *known {
            return Ok(https);
        }
        let mut reasons = Vec::new();
        for https in [true, false] {
            let url = Url::at(https, &self.host.peer.authority, "/v2/").map_err(Failure::Protocol)?;
            match self.client.inner.http.send(&self.host.peer, Request::new(Method::GET, url)) {
                Ok(_) => {
                    if !https {
                        tracing::warn!(
                            registry = self.host.peer.authority,
                            "an insecure registry is spoken to by plain HTTP"
                        );
                    }
                    *known = Some(https);
                    return Ok(https);
                }
                Err(failure @ Failure::Complete(_)) => return Err(failure),
                Err(failure) => reasons.push(failure.reason()),
            }
        }
        Err(Failure::Network(reasons.join("; ")))
    }

    pub(crate) fn pull_scope(&self) -> Scope {
        Scope::pull(self.repository())
    }

    /// Sends a request, authorized as the registry wants it. Any final status but 401 is an answer.
    pub(crate) fn send(&self, scope: &Scope, make: &mut dyn FnMut() -> RequestParts) -> Result<Response, Failure> {
        self.send_with(scope, make, &mut Payload::None)
    }

    /// [`send`](Self::send) with a payload; one that is a stream is sent once.
    pub(crate) fn send_with(
        &self,
        scope: &Scope,
        make: &mut dyn FnMut() -> RequestParts,
        payload: &mut Payload<'_>,
    ) -> Result<Response, Failure> {
        let inner = &self.client.inner;
        let mut rounds = 0;
        loop {
            rounds += 1;
            let authorization = self.host.gate.authorization(
                &inner.http,
                &self.host.peer,
                &inner.credentials,
                &self.host.name,
                scope,
            )?;
            let RequestParts { method, url, mut headers } = make();
            if let Some(upstream) = &self.endpoint.upstream {
                headers.push((HeaderName::from_static(UPSTREAM), upstream.clone()));
            }
            let mut request = Request::new(method, url.clone());
            request.headers = headers;
            // Uploads go to URLs that the registry names; another host gets no credentials of this one.
            let own = self.at("/")?.same_origin(&url);
            request.authorization =
                authorization.as_ref().filter(|_| own).map(|authorization| authorization.value.as_str());
            let once = matches!(payload, Payload::Stream(..));
            request.payload = match payload {
                Payload::None => Payload::None,
                Payload::Bytes(bytes) => Payload::Bytes(bytes),
                Payload::Stream(content, length) => Payload::Stream(&mut **content, *length),
            };
            let response = inner.http.send(&self.host.peer, request)?;
            let refused_for_good = authorization.as_ref().is_some_and(|authorization| authorization.fresh);
            // A 401 after a redirect is the other host's, whose challenges are none of ours.
            let ours = response.url.same_origin(&url);
            if response.status != 401 || once || rounds >= 3 || refused_for_good || !ours {
                return Ok(response);
            }
            self.host.gate.learn(&response.url, &response.headers, scope, authorization.as_ref())?;
            // A body that was read lets the connection be used again.
            let _ = response.read_body(REFUSAL_LIMIT);
        }
    }

    /// A manifest by tag or digest.
    pub(crate) fn manifest(&self, key: &str) -> Result<RawManifest, Failure> {
        let url = self.url(&format!("manifests/{key}"))?;
        let response =
            self.send(&self.pull_scope(), &mut || RequestParts::new(Method::GET, &url).header(header::ACCEPT, ACCEPT))?;
        if response.status != 200 {
            return Err(response.into_failure());
        }
        if response.is_html() {
            return Err(Failure::Protocol(format!(
                "{}: an HTML page instead of a manifest: is it a registry?",
                response.url
            )));
        }
        let served_as = response.header("content-type").map(str::to_owned);
        let place = self.place();
        let length = response.content_length();
        let bytes = response.read_body(MANIFEST_LIMIT as u64)?;
        if length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(Failure::Network("the manifest was cut".into()));
        }
        RawManifest::new(bytes, served_as.as_deref())
            .map_err(|source| Failure::Complete(TransportError::Manifest { place, source }))
    }

    /// What digest the registry says a tag has; `None` where it does not say.
    pub(crate) fn head_manifest(&self, key: &str) -> Result<Option<Digest>, Failure> {
        let url = self.url(&format!("manifests/{key}"))?;
        let response = self
            .send(&self.pull_scope(), &mut || RequestParts::new(Method::HEAD, &url).header(header::ACCEPT, ACCEPT))?;
        match response.status {
            200 => Ok(response.header("docker-content-digest").and_then(|text| text.parse().ok())),
            // Registries that do not know HEAD are not worth an error: the caller then asks by GET.
            405 | 501 => Ok(None),
            _ => Err(response.into_failure()),
        }
    }

    /// Whether the registry stores simple-signing signatures itself; asked once.
    pub(crate) fn stores_signatures(&self) -> Result<bool, Failure> {
        if let Some(known) = self.host.signatures.get() {
            return Ok(*known);
        }
        let url = self.at("/v2/")?;
        let scope = Scope::pull("");
        let response = self.send(&scope, &mut || RequestParts::new(Method::GET, &url))?;
        // A registry that refuses the base to those who may pull still sends the header.
        let supports = response.header("x-registry-supports-signatures").is_some_and(|value| value.trim() == "1");
        if !matches!(response.status, 200 | 401 | 403 | 404) {
            return Err(response.into_failure());
        }
        Ok(*self.host.signatures.get_or_init(|| supports))
    }

    /// A small document of the API by `GET`; `None` where there is none.
    pub(crate) fn document(
        &self,
        url: &Url,
        accept: &str,
        limit: u64,
    ) -> Result<Option<(Vec<u8>, DocumentHeaders)>, Failure> {
        let response =
            self.send(&self.pull_scope(), &mut || RequestParts::new(Method::GET, url).header(header::ACCEPT, accept))?;
        match response.status {
            200 if response.is_html() => {
                Err(Failure::Protocol(format!("{}: an HTML page instead of JSON", response.url)))
            }
            200 => {
                let about = DocumentHeaders {
                    content_type: printable(response.header("content-type").unwrap_or_default(), 200),
                    link: response.header("link").map(str::to_owned),
                };
                Ok(Some((response.read_body(limit)?, about)))
            }
            404 => Ok(None),
            _ => Err(response.into_failure()),
        }
    }
}

/// What of a document's headers matters.
pub(crate) struct DocumentHeaders {
    pub(crate) content_type: String,
    pub(crate) link: Option<String>,
}

/// A request before its authorization.
pub(crate) struct RequestParts {
    method: Method,
    url: Url,
    headers: Vec<(HeaderName, String)>,
}

impl RequestParts {
    pub(crate) fn new(method: Method, url: &Url) -> Self {
        Self { method, url: url.clone(), headers: Vec::new() }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// Whether a media type is one of an index.
pub(crate) fn is_index_type(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    kind == media::OCI_INDEX || kind == media::DOCKER_LIST
}

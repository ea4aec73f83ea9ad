//! The `docker://` transport: a blocking client of registries that speak the OCI distribution specification 1.1.
//!
//! - [`Client`] is the shared part: connections, TLS trust, proxies, credentials and tokens, `registries.conf`. It is cheap to clone.
//! - [`DockerSource`] and [`DockerSink`] are one image at a registry, to read and to write.
//!
//! A request goes through three layers: `source`/`sink` choose the endpoint (mirrors in order) and repeat what may pass (`retry`);
//! `remote` adds the authorization (`token`) and reads statuses; `exchange` makes it and follows redirects.
//!
//! Invariants: nothing that comes from here was verified (digests are the caller's to check); every body has a limit; no request
//! waits for ever; TLS is verified, and plain HTTP is not spoken, unless the configuration names the registry as insecure; then
//! TLS is tried first. Credentials go to the registry's own origin and its token server, see `token`.

mod auth_file;
mod blob;
mod challenge;
mod conf;
mod config;
mod credentials;
mod exchange;
mod files;
mod helper;
mod prefix;
mod proxy;
mod range;
mod remote;
mod retry;
mod signatures;
mod sink;
mod source;
mod tls;
mod token;
mod upload;
mod url;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use nacre_core::Progress;

use crate::{reference::ImageRef, source::TransportError};

pub use self::{
    auth_file::{AuthFile, Credentials},
    blob::{ContentRange, parse_content_range},
    challenge::{Challenge, parse_challenges},
    conf::{Endpoint, RegistriesConf, ShortNameMode},
    config::{ClientConfig, FromEnv, ProxyConfig},
    credentials::CredentialStore,
    retry::parse_retry_after,
    sink::DockerSink,
    source::DockerSource,
};

/// The name of Docker Hub in references.
pub(crate) const DOCKER_HUB_NAME: &str = "docker.io";
/// The host that serves it.
pub(crate) const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A registry client, to be shared by threads and by images.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: exchange::Http,
    conf: RegistriesConf,
    insecure: Vec<prefix::Prefix>,
    node_cache: Option<NodeCache>,
    credentials: CredentialStore,
    progress: Arc<dyn Progress>,
    hosts: Mutex<HashMap<(String, bool), Arc<remote::Host>>>,
}

/// See [`ClientConfig::node_cache`].
struct NodeCache {
    host: String,
    insecure: bool,
}

impl NodeCache {
    fn parse(text: &str) -> Result<Self, TransportError> {
        let wrong = |why: &str| TransportError::Config {
            path: "node_cache".into(),
            reason: format!("'{text}' {why}: http://host[:port] or https://host[:port] is expected"),
        };
        let (insecure, host) = match text.split_once("://") {
            Some(("http", host)) => (true, host),
            Some(("https", host)) => (false, host),
            _ => return Err(wrong("has no scheme of these")),
        };
        let host = host.strip_suffix('/').unwrap_or(host);
        // As a registry's host is written in the name of an image.
        format!("{host}/a")
            .parse::<ImageRef>()
            .ok()
            .filter(|name| name.host() == host)
            .ok_or_else(|| wrong("names no host"))?;
        Ok(Self { host: host.to_owned(), insecure })
    }

    /// Where blobs of an image are asked for first.
    fn endpoint(&self, registry: &Endpoint) -> Result<Endpoint, TransportError> {
        let name = format!("{}/{}", self.host, registry.reference.path());
        let there = registry
            .reference
            .with_repository(&name)
            .map_err(|why| TransportError::Config { path: "node_cache".into(), reason: format!("{name}: {why}") })?;
        Ok(Endpoint { reference: there, insecure: self.insecure, mirror: true, upstream: Some(registry.origin()) })
    }
}

impl Client {
    /// Makes a client. Nothing is read from the network; roots of TLS are read when they are first needed.
    ///
    /// # Errors
    /// [`TransportError::Config`]: a proxy, a node's cache or an insecure registry of the configuration is none.
    pub fn new(
        config: ClientConfig,
        conf: RegistriesConf,
        credentials: CredentialStore,
        progress: Arc<dyn Progress>,
    ) -> Result<Self, TransportError> {
        let insecure = config.insecure_registries.iter().map(|text| {
            prefix::Prefix::parse(text).map_err(|why| TransportError::Config {
                path: "insecure_registries".into(),
                reason: format!("'{text}' {why}"),
            })
        });
        let insecure = insecure.collect::<Result<_, _>>()?;
        let node_cache = config.node_cache.as_deref().map(NodeCache::parse).transpose()?;
        let http = exchange::Http::new(config)?;
        Ok(Self {
            inner: Arc::new(Inner { http, conf, insecure, node_cache, credentials, progress, hosts: Mutex::default() }),
        })
    }

    /// What `registries.conf` says.
    pub fn registries(&self) -> &RegistriesConf {
        &self.inner.conf
    }

    /// The endpoints to pull a name from, in order.
    ///
    /// # Errors
    /// [`TransportError::Blocked`]
    pub fn resolve(&self, reference: &ImageRef) -> Result<Vec<Endpoint>, TransportError> {
        let mut endpoints = self.inner.conf.resolve(reference)?;
        for endpoint in &mut endpoints {
            endpoint.insecure |= self.is_insecure(&endpoint.reference);
        }
        Ok(endpoints)
    }

    /// The same, with the node's cache, for blobs alone, before them.
    fn resolve_with_cache(&self, reference: &ImageRef) -> Result<Vec<Endpoint>, TransportError> {
        let mut endpoints = self.resolve(reference)?;
        // The last is the registry itself, which the cache is to ask.
        if let (Some(cache), Some(registry)) = (&self.inner.node_cache, endpoints.last()) {
            endpoints.insert(0, cache.endpoint(registry)?);
        }
        Ok(endpoints)
    }

    fn resolve_push(&self, reference: &ImageRef) -> Result<Endpoint, TransportError> {
        let mut endpoint = self.inner.conf.resolve_push(reference)?;
        endpoint.insecure |= self.is_insecure(&endpoint.reference);
        Ok(endpoint)
    }

    fn is_insecure(&self, reference: &ImageRef) -> bool {
        self.config().insecure || self.inner.insecure.iter().any(|prefix| prefix.strip(reference).is_some())
    }

    fn config(&self) -> &ClientConfig {
        self.inner.http.config()
    }

    fn note(&self, message: &str) {
        tracing::info!("{message}");
        self.inner.progress.note(message);
    }

    /// What is known about a host; one state for all images at it.
    fn host(&self, name: &str, insecure: bool) -> Arc<remote::Host> {
        let mut hosts = self.inner.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.entry((name.to_owned(), insecure)).or_insert_with(|| Arc::new(remote::Host::new(name, insecure))).clone()
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("config", self.config()).finish_non_exhaustive()
    }
}

/// Entry points for fuzzing: parsers of foreign bytes that the public interface does not reach by itself.
#[doc(hidden)]
pub mod fuzzing {
    /// Parses a URL, and what a `Location` joined to it means.
    pub fn url(base: &str, location: &str) {
        if let Ok(base) = super::url::Url::parse(base) {
            let _ = base.join(location).map(|url| url.to_string());
        }
    }

    /// Resolves a name by a configuration.
    pub fn resolve(conf: &[u8], name: &str) {
        if let (Ok(conf), Ok(name)) = (super::RegistriesConf::parse(conf), name.parse()) {
            let _ = conf.resolve(&name);
            let _ = conf.candidates("busybox:1");
        }
    }
}

//! A small OCI registry, for the demo and for tests: the distribution specification 1.1 over blocking HTTP/1.1 on loopback, with
//! storage in memory or in a directory, basic and bearer authentication, TLS, and faults that tests decide request by request.
//!
//! It is no registry for production: blobs are shared by all repositories, nothing can be deleted, uploads do not survive it.
//! Nothing in Nacre trusts a registry, this one included.
//!
//! ```
//! # fn main() -> std::io::Result<()> {
//! use nacre_registry::{Fault, Registry};
//!
//! let registry = Registry::memory()?;
//! registry.set_faults(|request| if request.attempt == 1 { Fault::CutAfter(100) } else { Fault::Serve });
//! let image = format!("{}/team/app:1.0", registry.host()); // 127.0.0.1:PORT/team/app:1.0
//! # drop(image);
//! # Ok(())
//! # }
//! ```

mod auth;
mod fault;
mod http;
mod routes;
mod server;
mod store;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use nacre_core::Digest;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

pub use auth::{Auth, Credentials};
pub use fault::Fault;
pub use http::Request;

use routes::Service;
use server::Server;
use store::Store;

/// A poisoned lock is one of a connection that panicked; what it protects is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Settings of a [`Registry`].
#[derive(Default)]
pub struct Builder {
    directory: Option<PathBuf>,
    auth: Auth,
    tls: Option<(String, String)>,
    no_referrers: bool,
    signatures: bool,
    port: u16,
}

impl Builder {
    /// Stores everything in a directory, which is made where it is missing, instead of in memory.
    pub fn directory(mut self, path: &Path) -> Self {
        self.directory = Some(path.to_owned());
        self
    }

    /// Wants credentials.
    pub fn auth(mut self, auth: Auth) -> Self {
        self.auth = auth;
        self
    }

    /// Speaks TLS with this certificate chain and this key, both PEM.
    pub fn tls(mut self, chain_pem: &str, key_pem: &str) -> Self {
        self.tls = Some((chain_pem.to_owned(), key_pem.to_owned()));
        self
    }

    /// Leaves the referrers API out, as registries older than OCI 1.1 do.
    pub fn without_referrers(mut self) -> Self {
        self.no_referrers = true;
        self
    }

    /// Adds docker's signature extension (X-R-S-S), which OpenShift's registry has.
    pub fn with_signature_extension(mut self) -> Self {
        self.signatures = true;
        self
    }

    /// Listens at this port instead of at any free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Starts the registry on 127.0.0.1.
    ///
    /// # Errors
    /// The port is taken, the directory cannot be written, or the certificate is none.
    pub fn start(self) -> io::Result<Registry> {
        let store = match &self.directory {
            Some(path) => Store::directory(path)?,
            None => Store::memory(),
        };
        let tls = self.tls.map(|(chain, key)| tls_config(&chain, &key)).transpose()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port))?;
        let service = Service {
            store,
            auth: self.auth,
            referrers: !self.no_referrers,
            signatures: self.signatures,
            tokens: Mutex::default(),
            uploads: Mutex::default(),
            next_upload: Mutex::default(),
            files: Mutex::default(),
            extension: Mutex::default(),
        };
        let server = Arc::new(Server::new(listener.local_addr()?, service, tls));
        let accepting = Arc::clone(&server);
        let thread = thread::Builder::new().name("registry".into()).spawn(move || accepting.run(&listener))?;
        Ok(Registry { server, thread: Some(thread) })
    }
}

fn tls_config(chain: &str, key: &str) -> io::Result<Arc<ServerConfig>> {
    let chain =
        CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    Ok(Arc::new(config))
}

/// A running registry. Dropping it ends it: its port is closed, and its threads are gone.
pub struct Registry {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    /// One that keeps everything in memory, wants no credentials and speaks plain HTTP.
    ///
    /// # Errors
    /// No port is free.
    pub fn memory() -> io::Result<Self> {
        Self::builder().start()
    }

    /// One with other settings.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// `127.0.0.1:PORT`, as it stands in front of an image's name.
    pub fn host(&self) -> String {
        self.server.address.to_string()
    }

    /// `http://127.0.0.1:PORT`, or `https://…`.
    pub fn url(&self) -> String {
        self.server.base.clone()
    }

    /// From now on `decide` says what happens to each request.
    pub fn set_faults(&self, decide: impl Fn(&Request) -> Fault + Send + Sync + 'static) {
        *lock(&self.server.hook) = Some(Arc::new(decide));
    }

    /// From now on everything is served again.
    pub fn clear_faults(&self) {
        *lock(&self.server.hook) = None;
    }

    /// The requests so far, the last 65,536 of them.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.server.log).requests.iter().cloned().collect()
    }

    /// How many requests of the log satisfy `which`.
    pub fn count(&self, which: impl Fn(&Request) -> bool) -> usize {
        lock(&self.server.log).requests.iter().filter(|request| which(request)).count()
    }

    /// How many bytes of bodies it has sent.
    pub fn body_bytes_sent(&self) -> u64 {
        lock(&self.server.log).body_bytes
    }

    /// Forgets the log, and counts requests and bytes from zero again.
    pub fn clear_log(&self) {
        *lock(&self.server.log) = server::Log::default();
    }

    /// Stores a blob.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn put_blob(&self, bytes: &[u8]) -> io::Result<Digest> {
        let digest = Digest::sha256(bytes);
        self.server.service.store.put_blob(&digest, bytes)?;
        Ok(digest)
    }

    /// Stores bytes as the blob of a digest that they need not have: a registry that was broken into.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn replace_blob(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        self.server.service.store.put_blob(digest, bytes)
    }

    /// The bytes of a blob or a manifest.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn blob(&self, digest: &Digest) -> io::Result<Option<Vec<u8>>> {
        self.server.service.content(digest)
    }

    /// Stores a manifest without a look at it, with a tag where one is given.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn put_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> io::Result<Digest> {
        let digest = Digest::sha256(bytes);
        let store = &self.server.service.store;
        store.put_manifest(repository, &digest, media_type, bytes)?;
        if let Some(tag) = tag {
            store.put_tag(repository, tag, &digest)?;
        }
        Ok(digest)
    }

    /// The digest that a tag points to.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn tag(&self, repository: &str, tag: &str) -> io::Result<Option<Digest>> {
        self.server.service.store.tag(repository, tag)
    }

    /// Serves a file at a path outside of `/v2/`: a lookaside server, or where a redirect leads to.
    pub fn put_file(&self, path: &str, bytes: Vec<u8>) {
        lock(&self.server.service.files).insert(path.to_owned(), bytes);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.server.stop(); // what was accepted meanwhile
    }
}

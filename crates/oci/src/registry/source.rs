//! An image at a registry, to be read: mirrors in order, each with its own credentials.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nacre_core::{Digest, Untrusted};

use super::{
    Client,
    blob::BlobStream,
    range,
    remote::Remote,
    retry::{Backoff, Failure},
};
use crate::{
    manifest::{Descriptor, RawManifest},
    reference::{ImageRef, Location},
    source::{ImageSource, SignatureStorage, TransportError},
};

/// The endpoints of one image, and which of them failed.
pub(crate) struct Endpoints {
    remotes: Vec<(Remote, AtomicBool)>,
}

impl Endpoints {
    fn new(client: &Client, reference: &ImageRef) -> Result<Self, TransportError> {
        let endpoints = client.resolve_with_cache(reference)?;
        let remotes = endpoints.into_iter().map(|endpoint| (Remote::new(client, endpoint), AtomicBool::new(false)));
        Ok(Self { remotes: remotes.collect() })
    }

    /// The indices in the order in which to try them for blobs: those that failed lately come last.
    pub(crate) fn order(&self) -> Vec<usize> {
        let broken = |index: &usize| self.remotes.get(*index).is_some_and(|(_, broken)| broken.load(Ordering::Relaxed));
        let mut order: Vec<usize> = (0..self.remotes.len()).collect();
        order.sort_by_key(broken);
        order
    }

    pub(crate) fn remote(&self, index: usize) -> &Remote {
        match self.remotes.get(index).or(self.remotes.first()) {
            Some((remote, _)) => remote,
            // `RegistriesConf::resolve` gives the primary location always.
            None => unreachable!("an image has an endpoint"),
        }
    }

    pub(crate) fn mark_broken(&self, index: usize) {
        if let Some((_, broken)) = self.remotes.get(index) {
            broken.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn backoff(&self, index: usize) -> Backoff {
        let remote = self.remote(index);
        let config = remote.client.config();
        Backoff::new(config, if remote.endpoint.mirror { config.mirror_retries } else { config.retries })
    }

    pub(crate) fn note_next(&self, what: &str, from: usize, to: usize, failure: &Failure) {
        let (from, to) = (self.remote(from), self.remote(to));
        from.client.note(&format!("{}: {what}: {}; going on at {}", from.place(), failure.reason(), to.place()));
    }

    /// Does something other than fetching a blob at the first endpoint where it succeeds.
    pub(crate) fn first<T>(
        &self,
        what: &str,
        mut operation: impl FnMut(&Remote) -> Result<T, Failure>,
    ) -> Result<T, TransportError> {
        let mut order = self.order();
        order.retain(|index| self.remote(*index).endpoint.upstream.is_none());
        let mut errors: Vec<(bool, TransportError)> = Vec::new();
        for (position, index) in order.iter().enumerate() {
            let remote = self.remote(*index);
            match remote.retrying(what, || operation(remote)) {
                Ok(value) => return Ok(value),
                Err((failure, attempts)) => {
                    if failure.is_transient() {
                        self.mark_broken(*index);
                    }
                    if let Some(next) = order.get(position + 1) {
                        self.note_next(what, *index, *next, &failure);
                    }
                    errors.push((remote.endpoint.mirror, failure.into_error(what, &remote.place(), attempts)));
                }
            }
        }
        // The primary location's word is the last one; a mirror need not have an image.
        let primary = errors.iter().position(|(mirror, _)| !mirror).unwrap_or_default();
        Err(errors.swap_remove(primary).1)
    }
}

/// One image at a registry, to be read.
pub struct DockerSource {
    location: Location,
    reference: ImageRef,
    pub(super) endpoints: Arc<Endpoints>,
}

impl DockerSource {
    /// An image by name. Nothing is asked yet.
    ///
    /// # Errors
    /// [`TransportError::Blocked`], and [`TransportError::Config`] where `registries.conf` makes no valid name of it.
    pub fn new(client: &Client, reference: &ImageRef) -> Result<Self, TransportError> {
        let reference = reference.clone().with_default_tag();
        let endpoints = Arc::new(Endpoints::new(client, &reference)?);
        Ok(Self { location: Location::Docker(reference.clone()), reference, endpoints })
    }

    /// The name that was asked for, with its default tag: what policy is judged by.
    pub fn reference(&self) -> &ImageRef {
        &self.reference
    }

    /// What digest the name has, by one `HEAD` request and without the manifest, or from the name itself without any; `None`
    /// where the registry does not say. A hint to look into a store with: an answer is as untrusted as a manifest, and has to be
    /// followed by all that a pull checks.
    ///
    /// # Errors
    /// [`TransportError`]
    pub fn resolve_digest(&self) -> Result<Option<Untrusted<Digest>>, TransportError> {
        if let Some(digest) = self.reference.digest() {
            return Ok(Some(Untrusted::new(*digest)));
        }
        let key = self.reference.manifest_key();
        let found = self.endpoints.first(&format!("manifest {key}"), |remote| remote.head_manifest(&key))?;
        Ok(found.map(Untrusted::new))
    }

    pub(super) fn manifest_by_key(&self, key: &str) -> Result<Untrusted<RawManifest>, TransportError> {
        self.endpoints.first(&format!("manifest {key}"), |remote| remote.manifest(key)).map(Untrusted::new)
    }
}

impl ImageSource for DockerSource {
    fn location(&self) -> &Location {
        &self.location
    }

    fn manifest(&self, digest: Option<&Digest>) -> Result<Untrusted<RawManifest>, TransportError> {
        let key = digest.map_or_else(|| self.reference.manifest_key(), Digest::to_string);
        self.manifest_by_key(&key)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, TransportError> {
        Ok(Box::new(BlobStream::open(&self.endpoints, descriptor)?))
    }

    fn read_blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        out: &mut [u8],
        attempt: u32,
    ) -> Result<(), TransportError> {
        range::read(&self.endpoints, descriptor, offset, out, attempt)
    }

    fn signatures(&self) -> Option<&dyn SignatureStorage> {
        Some(self)
    }
}

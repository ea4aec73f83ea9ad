//! Pulling: from a name to layers in the store, with every check on the way. ARCHITECTURE.md has the sequence.

mod committer;
mod error;
mod fetch;
mod lazy;
mod recorded;
mod stack;

use std::sync::Arc;

use nacre_attest::client::{Tenancy, Tenure};
use nacre_attest::eventlog::{
    runtime::RuntimeLog,
    story::{Happening, Image as AdmittedImage},
};
use nacre_core::{Clock, Digest, KeySource, Progress};
use nacre_lazy::artifact::is_lazy;
use nacre_oci::{
    crypt::{self, Keyring, PublicOptions},
    manifest::{ImageConfig, Index, Manifest, Platform, RawManifest, verify_manifest},
    reference::Location,
    source::{ImageSource, SignatureStorage},
    trust::{Admission, AdmissionRules, LookasideConfig, Policy, TrustContext},
    unpack::UnpackOptions,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::store::{ImageRecord, LayerGuard, RefRecord, Store, StoreError, StoredLayer};
pub use error::PullError;
pub use lazy::{AdmittedLazy, LazyAccess};
use recorded::Recorder;
pub use recorded::Recording;

/// The most indexes between a name and its image.
const INDEX_DEPTH: usize = 3;

/// What decides whether an image is trusted.
pub struct Trust {
    /// The policy.
    pub policy: Policy,
    /// Which of the four kinds of image may run.
    pub rules: AdmissionRules,
    /// Where registries keep GPG signatures.
    pub lookaside: LookasideConfig,
    /// Releases what the policy and encrypted layers name by `kbs://`.
    pub keys: Arc<dyn KeySource>,
    /// Judges validity periods.
    pub clock: Arc<dyn Clock>,
}

/// How images are pulled.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// The platform to choose from an index.
    pub platform: Platform,
    /// Limits of layers, and how they lie on disk.
    pub unpack: UnpackOptions,
    /// How many layers are in flight at once; each takes up to 16 MiB of memory.
    pub parallel: usize,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self { platform: Platform::host(), unpack: UnpackOptions::default(), parallel: 4 }
    }
}

/// Pulls images into a store.
pub struct Images {
    store: Store,
    trust: Trust,
    keyring: Keyring,
    /// What the keyring's broker lends.
    tenancy: Option<Arc<Tenancy>>,
    options: PullOptions,
    progress: Arc<dyn Progress>,
    /// The event log, and the digest of the policy's text.
    events: Option<(Arc<RuntimeLog>, Digest)>,
}

/// An image that may run: admitted, all of its layers there and kept from removal as long as this lives.
#[derive(Debug)]
pub struct PulledImage {
    /// The image.
    pub image: ImageRecord,
    /// The proof that it was admitted, by the policy of this call.
    pub admission: Admission,
    /// What is to be stacked, the bottom first ([`ImageRecord::stack`]).
    pub layers: Vec<LayerGuard>,
    /// How many of them were fetched by this call.
    pub fetched: usize,
    /// What it takes to mount it, where it is a lazy image.
    pub lazy: Option<LazyAccess>,
}

/// An image that was looked at.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// The location as it was asked for.
    pub name: String,
    /// The digests of the index, if there is one, and of the manifest.
    pub chain: Vec<Digest>,
    /// The manifest, as it came.
    pub manifest: Vec<u8>,
    /// The image config; a lazy image's is in its metadata, which may be encrypted.
    pub config: Option<ImageConfig>,
}

/// An image as its name resolved, nothing of it trusted beyond digests.
struct Resolved {
    /// Indexes, then the manifest.
    chain: Vec<RawManifest>,
    manifest: Manifest,
}

impl Resolved {
    fn raw(&self) -> &RawManifest {
        match self.chain.last() {
            Some(raw) => raw,
            None => unreachable!("a resolved image has a manifest"),
        }
    }

    fn digests(&self) -> Vec<Digest> {
        self.chain.iter().map(|raw| *raw.digest()).collect()
    }

    /// The indexes as text; what parsed as JSON is UTF-8.
    fn indexes(&self) -> Vec<String> {
        let indexes = self.chain.iter().filter(|raw| raw.is_index());
        indexes.map(|raw| String::from_utf8_lossy(raw.bytes()).into_owned()).collect()
    }
}

impl Images {
    /// Brings together what pulling needs.
    pub fn new(
        store: Store,
        trust: Trust,
        keyring: Keyring,
        options: PullOptions,
        progress: Arc<dyn Progress>,
    ) -> Self {
        Self { store, trust, keyring, tenancy: None, options, progress, events: None }
    }

    /// Says who lends what the keyring's broker releases.
    #[must_use]
    pub fn with_tenancy(mut self, tenancy: Option<Arc<Tenancy>>) -> Self {
        self.tenancy = tenancy;
        self
    }

    /// Unwraps keys that are kept; with the tenure that they are kept by, where they were lent.
    pub(crate) fn lend<T>(&self, unwrap: impl FnOnce(&Keyring) -> T) -> (T, Option<Arc<Tenure>>) {
        match &self.tenancy {
            Some(tenancy) => tenancy.lend(|| unwrap(&self.keyring)),
            None => (unwrap(&self.keyring), None),
        }
    }

    /// Does what forgets the keys that it uses.
    fn spend<T>(&self, act: impl FnOnce() -> T) -> T {
        match &self.tenancy {
            Some(tenancy) => tenancy.spend(act),
            None => act(),
        }
    }

    /// Has the policy, of this digest, measured before an image is judged by it, and each admission before anything is done for its sake.
    #[must_use]
    pub fn with_events(mut self, events: Option<Arc<RuntimeLog>>, policy: Digest) -> Self {
        self.events = events.map(|events| (events, policy));
        self
    }

    /// Records by which policy images are judged from now on.
    ///
    /// # Errors
    /// [`PullError::Event`].
    pub fn measure_policy(&self) -> Result<(), PullError> {
        let Some((events, policy)) = &self.events else { return Ok(()) };
        Ok(events.record(&Happening::Policy { digest: *policy })?)
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Pulls an image: resolves, admits, fetches what is not in the store. An image that is there costs the manifest's request, and is
    /// admitted again.
    ///
    /// # Errors
    /// [`PullError`]; nothing of a layer that failed a check is in the store then.
    pub fn pull(&self, source: &dyn ImageSource) -> Result<PulledImage, PullError> {
        self.spend(|| self.pull_whole(source))
    }

    fn pull_whole(&self, source: &dyn ImageSource) -> Result<PulledImage, PullError> {
        let requested = source.location();
        let resolved = self.resolve(source)?;
        if is_lazy(&resolved.manifest) {
            return Err(PullError::Lazy(requested.to_string()));
        }
        let (admission, recording) = self.admit_from(&resolved, requested, source.signatures())?;
        self.measure(&admission, requested)?;
        // Both at once: whoever removes the image meanwhile takes none of this pull's.
        let digest = resolved.raw().digest();
        let (config, config_bytes) = match (self.store.image(digest)?, self.store.image_config(digest)?) {
            (Some(image), Some(bytes)) => (image.config, bytes),
            _ => self.config(source, &resolved)?,
        };
        let plans = self.plan(&resolved.manifest, &config)?;
        check_count(&config)?;
        let (layers, fetched) = fetch::layers(self, source, &plans, &admission)?;
        let stored_layers: Vec<StoredLayer> = plans.iter().map(fetch::Plan::stored).collect();
        let stack = stack::build(&self.store, in_order(&stored_layers, layers))?;
        let image = ImageRecord {
            manifest: *resolved.raw().digest(),
            media_type: resolved.raw().media_type().to_owned(),
            layers: stored_layers,
            stack: stack.ids(),
            root: stack.root,
            config,
            lazy: None,
        };
        let name = RefRecord {
            name: requested.to_string(),
            manifest: image.manifest,
            chain: resolved.digests(),
            indexes: resolved.indexes(),
            pulled: now(),
            admitted: describe(&admission),
            signatures: serde_json::to_value(recording).unwrap_or_default(),
        };
        self.store.put_image(&image, resolved.raw(), &config_bytes, &name)?;
        Ok(PulledImage { image, admission, layers: stack.guards, fetched, lazy: None })
    }

    /// Opens an image of the store as it is: the policy is evaluated on the signatures that were kept, and keys of encrypted layers must be
    /// releasable to us now as they were then. No registry is asked.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn open(&self, name: &RefRecord) -> Result<PulledImage, PullError> {
        let location: Location = name.name.parse().map_err(PullError::Reference)?;
        let (resolved, image) = self.stored(name)?;
        let (admission, _) = self.admit(&resolved, &location, Some(&recording_of(name)))?;
        self.measure(&admission, &location)?;
        if image.lazy.is_some() {
            let lazy = Some(self.lazy_access(location, resolved.raw().clone(), &resolved.manifest)?);
            return Ok(PulledImage { image, admission, layers: Vec::new(), fetched: 0, lazy });
        }
        self.spend(|| self.plan(&resolved.manifest, &image.config))?;
        let mut layers: Vec<LayerGuard> = Vec::new();
        for id in &image.stack {
            let missing = || StoreError::NoLayer { id: *id, path: self.store.root().into() };
            layers.push(self.store.layer(id)?.ok_or_else(missing)?);
        }
        Ok(PulledImage { image, admission, layers, fetched: 0, lazy: None })
    }

    /// Looks at an image without pulling it, and without believing more of it than digests.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn inspect(&self, source: &dyn ImageSource) -> Result<Inspected, PullError> {
        let resolved = self.resolve(source)?;
        let config = match is_lazy(&resolved.manifest) {
            true => None,
            false => Some(self.config(source, &resolved)?.0),
        };
        let name = source.location().to_string();
        Ok(Inspected { name, chain: resolved.digests(), manifest: resolved.raw().bytes().to_vec(), config })
    }

    /// Evaluates the policy on an image without fetching its layers.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn verify(&self, source: &dyn ImageSource) -> Result<Admission, PullError> {
        let resolved = self.resolve(source)?;
        Ok(self.admit(&resolved, source.location(), source.signatures())?.0)
    }

    /// Evaluates the policy on an image of the store.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn verify_stored(&self, name: &RefRecord) -> Result<Admission, PullError> {
        let location: Location = name.name.parse().map_err(PullError::Reference)?;
        let (resolved, _) = self.stored(name)?;
        Ok(self.admit(&resolved, &location, Some(&recording_of(name)))?.0)
    }

    /// The keys of encrypted images.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// The manifest of an artifact about an image of a source, and the proof that the policy lets it in as it would an image of that name:
    /// of the same tag, or, where the image was asked for by its digest, of the artifact's digest.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn admit_artifact(
        &self,
        source: &dyn ImageSource,
        storage: &dyn SignatureStorage,
        digest: &Digest,
    ) -> Result<(RawManifest, Manifest, Admission), PullError> {
        let raw = verify_manifest(storage.by_digest(digest)?, digest)?.into_inner();
        let manifest = Manifest::parse(&raw)?;
        let resolved = Resolved { chain: vec![raw.clone()], manifest };
        let requested = match source.location() {
            Location::Docker(name) if name.digest().is_some() => Location::Docker(name.with_digest(*digest)),
            other => other.clone(),
        };
        let (admission, _) = self.admit(&resolved, &requested, Some(storage))?;
        Ok((raw, resolved.manifest, admission))
    }

    /// The config of an image that was admitted, and its bytes.
    ///
    /// # Errors
    /// [`PullError`]
    pub fn config_of(
        &self,
        source: &dyn ImageSource,
        manifest: &Manifest,
    ) -> Result<(ImageConfig, Vec<u8>), PullError> {
        let bytes = fetch::small_blob(source, &manifest.config)?;
        let config = ImageConfig::verify(nacre_core::Untrusted::new(bytes.clone()), manifest)?.into_inner();
        Ok((config, bytes))
    }

    /// Records an admission in the event log.
    fn measure(&self, admission: &Admission, requested: &Location) -> Result<(), PullError> {
        let Some((events, _)) = &self.events else { return Ok(()) };
        let signers = admission.admitted().signers().iter().map(|signer| signer.who.clone()).collect();
        let (digest, image) = (admission.manifest().to_string(), requested.to_string());
        Ok(events.record(&Happening::ImageAdmitted(AdmittedImage { digest, image, signers }))?)
    }

    fn resolve(&self, source: &dyn ImageSource) -> Result<Resolved, PullError> {
        let mut raw = source.manifest(None)?;
        if let Some(digest) = source.location().image_ref().and_then(|reference| reference.digest()) {
            raw = nacre_core::Untrusted::new(verify_manifest(raw, digest)?.into_inner());
        }
        let mut chain = Vec::new();
        while raw.peek().is_index() {
            if chain.len() >= INDEX_DEPTH {
                return Err(PullError::IndexDepth { image: source.location().to_string(), depth: INDEX_DEPTH });
            }
            let child = Index::parse(raw.peek())?.choose(&self.options.platform)?.clone();
            chain.push(raw.peek().clone());
            raw = match self.stored_manifest(&child.digest)? {
                Some(stored) => nacre_core::Untrusted::new(stored),
                None => source.manifest(Some(&child.digest))?,
            };
            raw = nacre_core::Untrusted::new(verify_manifest(raw, &child.digest)?.into_inner());
        }
        let manifest = Manifest::parse(raw.peek())?;
        chain.push(raw.peek().clone());
        Ok(Resolved { chain, manifest })
    }

    fn stored_manifest(&self, digest: &Digest) -> Result<Option<RawManifest>, PullError> {
        let Some(image) = self.store.image(digest)? else { return Ok(None) };
        let Some(bytes) = self.store.image_manifest(digest)? else { return Ok(None) };
        Ok(Some(RawManifest::new(bytes, Some(&image.media_type))?))
    }

    fn stored(&self, name: &RefRecord) -> Result<(Resolved, ImageRecord), PullError> {
        let missing = || StoreError::NoImage { name: name.name.clone(), path: self.store.root().into() };
        let image = self.store.image(&name.manifest)?.ok_or_else(missing)?;
        let mut chain = Vec::new();
        for index in &name.indexes {
            chain.push(RawManifest::new(index.clone().into_bytes(), None)?);
        }
        chain.push(self.stored_manifest(&name.manifest)?.ok_or_else(missing)?);
        let manifest = Manifest::parse(chain.last().ok_or_else(missing)?)?;
        Ok((Resolved { chain, manifest }, image))
    }

    /// The signatures that were kept may already do, which spares a pull of a stored image all requests but one; where they do not, the
    /// source may have got better ones.
    fn admit_from(
        &self,
        resolved: &Resolved,
        requested: &Location,
        storage: Option<&dyn SignatureStorage>,
    ) -> Result<(Admission, Recording), PullError> {
        if let Some(name) = self.store.name(requested)?.filter(|name| name.chain == resolved.digests())
            && let Ok((admission, recording)) = self.admit(resolved, requested, Some(&recording_of(&name)))
        {
            return Ok((admission, recording));
        }
        self.admit(resolved, requested, storage)
    }

    fn admit(
        &self,
        resolved: &Resolved,
        requested: &Location,
        storage: Option<&dyn SignatureStorage>,
    ) -> Result<(Admission, Recording), PullError> {
        self.measure_policy()?;
        let recorder = storage.map(Recorder::new);
        let chain: Vec<&RawManifest> = resolved.chain.iter().collect();
        let context = TrustContext {
            policy: &self.trust.policy,
            requested,
            chain: &chain,
            storage: recorder.as_ref().map(|recorder| -> &dyn SignatureStorage { recorder }),
            lookaside: &self.trust.lookaside,
            keys: &*self.trust.keys,
            clock: &*self.trust.clock,
        };
        let admission = self.trust.rules.admit(context.evaluate()?)?;
        Ok((admission, recorder.map(Recorder::finish).unwrap_or_default()))
    }

    fn config(&self, source: &dyn ImageSource, resolved: &Resolved) -> Result<(ImageConfig, Vec<u8>), PullError> {
        let descriptor = &resolved.manifest.config;
        let bytes = fetch::small_blob(source, descriptor)?;
        let config = ImageConfig::verify(nacre_core::Untrusted::new(bytes.clone()), &resolved.manifest)?;
        Ok((config.into_inner(), bytes))
    }

    /// What is to be done for each layer. Keys are unwrapped here, before anything is fetched, also for layers that are in the store: who
    /// may not have the key may not have the layer.
    fn plan(&self, manifest: &Manifest, config: &ImageConfig) -> Result<Vec<fetch::Plan>, PullError> {
        let diff_ids = &config.rootfs.diff_ids;
        let pairs = manifest.layers.iter().zip(diff_ids).enumerate();
        pairs
            .map(|(index, (descriptor, diff_id))| {
                let key = match crypt::is_encrypted(descriptor) {
                    true => {
                        let wrong = |source| PullError::Key { index, digest: descriptor.digest, source };
                        let public = PublicOptions::of(descriptor).map_err(wrong)?;
                        Some((self.keyring.unwrap(descriptor).map_err(wrong)?, public))
                    }
                    false => None,
                };
                Ok(fetch::Plan::new(index, descriptor, *diff_id, key))
            })
            .collect()
    }
}

/// Refuses, before anything is fetched, what could not be mounted.
fn check_count(config: &ImageConfig) -> Result<(), PullError> {
    let mut different = config.rootfs.diff_ids.clone();
    different.sort_unstable();
    different.dedup();
    let (layers, limit) = (different.len(), nacre_sys::overlay::MAX_LAYERS);
    if layers > limit { Err(PullError::TooManyLayers { layers, limit }) } else { Ok(()) }
}

fn recording_of(name: &RefRecord) -> Recording {
    serde_json::from_value(name.signatures.clone()).unwrap_or_default()
}

/// The guards in the order of an overlay, the bottom first. Of equal layers only the topmost is stacked, which alone has an effect:
/// whatever a lower copy adds or hides, the same layer above it adds or hides again. (overlayfs refuses a directory twice.)
fn in_order(layers: &[StoredLayer], guards: Vec<LayerGuard>) -> Vec<LayerGuard> {
    let mut guards: Vec<Option<LayerGuard>> = guards.into_iter().map(Some).collect();
    let mut ordered: Vec<LayerGuard> = Vec::new();
    for layer in layers.iter().rev() {
        let slot = guards.iter_mut().find(|slot| slot.as_ref().is_some_and(|guard| *guard.id() == layer.id));
        ordered.extend(slot.and_then(Option::take));
    }
    ordered.reverse();
    ordered
}

fn describe(admission: &Admission) -> String {
    let signers: Vec<&str> = admission.admitted().signers().iter().map(|signer| signer.who.as_str()).collect();
    let by = if signers.is_empty() { "nobody".to_owned() } else { signers.join(", ") };
    format!(
        "{}; signed by {by}; rule {} of {}",
        admission.kind(),
        admission.admitted().rule(),
        admission.admitted().policy()
    )
}

fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

//! A guest by its configuration: store, trust, keys and registries, brought together for the programs that serve it.

mod attester;
mod lazy;

pub use lazy::Granted;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_attest::{
    client::{BrokerClient, BrokerConfig as ClientBroker, ClientError, Tenancy},
    enrolment::Enrolled,
    eventlog::{
        runtime::{RuntimeLog, RuntimeLogError},
        story::Happening,
    },
    evidence::{Attester, AttesterError},
    initdata::{InitData, InitDataError},
    offline::{OfflineError, OfflineKeys},
};
use nacre_core::{
    Clock, Digest, KeySource, KeySourceError, Progress, ResourceUri, SecretBytes, SystemClock, TrustedTime, UriError,
};
use nacre_oci::{
    crypt::{CryptError, Keyring},
    manifest::{ImageConfig, ManifestError, Platform},
    reference::{Location, ReferenceError},
    registry::{Client, CredentialStore, DockerSource, RegistriesConf},
    source::{ImageSource, TransportError},
    transport::open_local_source,
    trust::{LookasideConfig, Policy, PolicyError},
    unpack::{UnpackOptions, WhiteoutMode},
};

use crate::{
    bundle::{self, ComposeError, Overrides, Plan, UpperDir},
    config::{BrokerConfig, Config},
    images::{Images, PullError, PullOptions, PulledImage, Trust},
    lazy::{Clients, Connection, LazyError, Mounter, OwnMounts},
    store::{BundleRecord, LayerGuard, LayerId, Marks, OwnBundle, Store, StoreError},
};

/// The most bytes of a policy, a certificate or init data.
const FILE_LIMIT: u64 = 4 << 20;

/// Why the guest cannot work as it is configured, or did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A file that the configuration names cannot be used.
    #[error("{path}: {what}: {source}")]
    File {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A setting contradicts another, or the guest.
    #[error("configuration: {0}")]
    Config(String),
    /// The policy is none.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A setting, or a registry's configuration.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A decryption key is none.
    #[error(transparent)]
    Crypt(#[from] CryptError),
    /// The broker cannot be used.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// There is no evidence to show to it.
    #[error(transparent)]
    Attester(#[from] AttesterError),
    /// What is about to be done could not be measured.
    #[error(transparent)]
    Event(#[from] RuntimeLogError),
    /// The init data is none.
    #[error(transparent)]
    InitData(#[from] InitDataError),
    /// The offline keys are none.
    #[error(transparent)]
    Offline(#[from] OfflineError),
    /// A resource that the configuration names was not released.
    #[error(transparent)]
    Key(#[from] KeySourceError),
    /// The name of a resource is none.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The platform is none.
    #[error(transparent)]
    Platform(#[from] ManifestError),
    /// The image's name is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The image was not pulled.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The lazy image was not opened or mounted.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// Whoever mounts lazy images did not.
    #[error("{0}")]
    Mount(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The bundle was not made.
    #[error(transparent)]
    Compose(#[from] ComposeError),
}

/// A configured guest.
pub struct ImageService {
    images: Images,
    client: Client,
    /// How `client` speaks to registries, for other processes.
    connection: Connection,
    /// Credentials that the broker released.
    released: Option<SecretBytes>,
    /// Where lazy images are opened.
    own: Arc<OwnMounts>,
    /// Who mounts them.
    mounter: Arc<dyn Mounter>,
    clients: Arc<Clients>,
    broker: Option<Arc<BrokerClient>>,
    /// What it lends.
    tenancy: Option<Arc<Tenancy>>,
    /// How often it is attested to anew, in seconds.
    reattest: u64,
    /// Where what is about to be done is measured.
    events: Option<Arc<RuntimeLog>>,
    keys: Arc<dyn KeySource>,
}

impl ImageService {
    /// Brings a guest together. With a broker, nothing is asked of it before something needs a key, but for a policy or credentials
    /// that the configuration keeps there.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn new(config: &Config, store: Store, progress: Arc<dyn Progress>) -> Result<Self, ServiceError> {
        let init_data = config.broker.as_ref().map(init_data_of).transpose()?.flatten();
        let connected = config.broker.as_ref().map(|broker| connect_with(broker, init_data.clone()));
        let broker = connected.transpose()?;
        let keys = key_source(config, broker.as_ref())?;
        let clock: Arc<dyn Clock> = match (&broker, config.trust.system_clock) {
            (_, true) => Arc::new(SystemClock),
            (Some(broker), false) => broker.clone(),
            (None, false) => Arc::new(NoClock),
        };
        let lookaside = match &config.trust.registries_d {
            Some(dir) => LookasideConfig::load_dir(dir)?,
            None => LookasideConfig::default(),
        };
        let events = broker.as_ref().and_then(|broker| broker.runtime_log().cloned());
        let (policy, text) = policy(config, init_data.as_ref(), &*keys)?;
        let trust = Trust { policy, rules: config.trust.admission, lookaside, keys: keys.clone(), clock };
        let tenancy = broker.clone().map(Tenancy::new).map(Arc::new);
        let lending: Arc<dyn KeySource> = match &tenancy {
            Some(tenancy) => tenancy.clone(),
            None => keys.clone(),
        };
        let keyring = Keyring::from_args(&config.decryption_keys)?.with_broker(lending);
        let (credentials, released) = match config.registries.credentials.as_deref() {
            Some(uri) if uri.starts_with("kbs") => {
                let released = keys.fetch(&uri.parse()?)?;
                (CredentialStore::from_bytes(uri, &released)?, Some(released))
            }
            path => (CredentialStore::system(path.map(Path::new))?, None),
        };
        let registries = RegistriesConf::system(config.registries.conf.as_deref())?;
        let auth_files = if released.is_none() { credentials.files() } else { Vec::new() };
        let connection = Connection { client: config.registry.clone(), registries, auth_files };
        let (client, registries) = (connection.client.clone(), connection.registries.clone());
        let client = Client::new(client, registries, credentials, progress.clone())?;
        let options = pull_options(config, store.marks())?;
        let clients = Arc::<Clients>::default();
        let own = OwnMounts::new(lazy::options(&store, &config.lazy)?, config.lazy.front, clients.clone());
        let own = Arc::new(own);
        let images =
            Images::new(store, trust, keyring, options, progress).with_events(events.clone(), Digest::sha256(&text));
        let (images, mounter) = (images.with_tenancy(tenancy.clone()), own.clone());
        let reattest = config.broker.as_ref().map_or(0, |broker| broker.reattest);
        Ok(Self {
            images,
            events,
            client,
            connection,
            released,
            mounter,
            own,
            clients,
            broker,
            tenancy,
            reattest,
            keys,
        })
    }

    /// Has somebody else mount lazy images; without one, this process does, and its mounts end with it.
    #[must_use]
    pub fn with_mounter(mut self, mounter: Arc<dyn Mounter>) -> Self {
        self.mounter = mounter;
        self
    }

    /// Records the policy before there is any image to be judged by it: for programs that release keys as well, by what the guest measured.
    /// Others do it with the first image, so that whoever only looks at images measures nothing.
    ///
    /// # Errors
    /// [`ServiceError::Pull`].
    pub fn measure_policy(&self) -> Result<(), ServiceError> {
        Ok(self.images.measure_policy()?)
    }

    /// Attests to the broker anew as often as the configuration says, for as long as this is there: for programs that run on.
    ///
    /// # Errors
    /// [`ServiceError::Config`], where threads cannot be started.
    pub fn attest_on_schedule(&self) -> Result<(), ServiceError> {
        let (Some(tenancy), 1..) = (&self.tenancy, self.reattest) else { return Ok(()) };
        let no_thread = |error| ServiceError::Config(format!("the thread that attests anew: {error}"));
        tenancy.agent().map_err(no_thread)?.attest_every(Duration::from_secs(self.reattest));
        Ok(())
    }

    /// Pulling, and the store.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// The registries.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The broker, where there is one.
    pub fn broker(&self) -> Option<&BrokerClient> {
        self.broker.as_deref()
    }

    /// The locations that a person's name for an image may mean, in order: itself where it names a transport, or else what
    /// registries.conf makes of it.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn locations(&self, text: &str) -> Result<Vec<Location>, ServiceError> {
        if Location::has_transport(text) {
            return Ok(vec![text.parse()?]);
        }
        let names = self.client.registries().candidates(text)?;
        Ok(names.into_iter().map(|name| Location::Docker(name.with_default_tag())).collect())
    }

    /// Opens a location for reading.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn source(&self, location: &Location) -> Result<Box<dyn ImageSource>, ServiceError> {
        Ok(match location {
            Location::Docker(reference) => Box::new(DockerSource::new(&self.client, reference)?),
            local => open_local_source(local)?,
        })
    }

    /// Does something with the first of a name's locations that has an image.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn with_source<T>(
        &self,
        text: &str,
        mut action: impl FnMut(&dyn ImageSource) -> Result<T, PullError>,
    ) -> Result<T, ServiceError> {
        let locations = self.locations(text)?;
        let last = locations.len().saturating_sub(1);
        for (position, location) in locations.iter().enumerate() {
            match action(&*self.source(location)?) {
                Err(PullError::Transport(error)) if error.is_not_found() && position < last => {}
                result => return Ok(result?),
            }
        }
        Err(ServiceError::Config(format!("'{text}' has no registry to search")))
    }

    /// Pulls an image. Of a lazy one, what is fetched is its metadata; the rest comes when it is read.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn pull(&self, text: &str) -> Result<PulledImage, ServiceError> {
        match self.with_source(text, |source| self.images.pull(source)) {
            Err(ServiceError::Pull(PullError::Lazy(_))) => {
                self.at_first(text, |location| self.pull_lazy(text, location))
            }
            pulled => pulled,
        }
    }

    /// Makes a bundle of a pulled image: rootfs, mounted, and config.json. It lasts until [`unmount_bundle`](Self::unmount_bundle).
    ///
    /// # Errors
    /// [`ServiceError`]; then nothing of it is left.
    pub fn mount_bundle(
        &self,
        pulled: &PulledImage,
        path: &Path,
        overrides: &Overrides,
    ) -> Result<BundleRecord, ServiceError> {
        let store = self.images.store();
        let path = absolute(path)?;
        let record = store.add_bundle(&path, pulled.image.manifest, stack_of(pulled), root_of(pulled))?;
        self.mount(pulled, &record, overrides)?;
        Ok(record)
    }

    /// Makes a bundle in the store's own directory. It lasts until [`unmount_bundle`](Self::unmount_bundle), and when this process is
    /// killed, until the store's next cleaning.
    ///
    /// # Errors
    /// [`ServiceError`]; then nothing of it is left.
    pub fn mount_own_bundle(&self, pulled: &PulledImage, overrides: &Overrides) -> Result<OwnBundle, ServiceError> {
        let own = self.images.store().add_own_bundle(pulled.image.manifest, stack_of(pulled), root_of(pulled))?;
        self.mount(pulled, own.record(), overrides)?;
        Ok(own)
    }

    fn mount(&self, pulled: &PulledImage, record: &BundleRecord, overrides: &Overrides) -> Result<(), ServiceError> {
        if let Err(error) = self.measure_workload(record, &pulled.image.manifest) {
            self.images.store().remove_bundle(&record.id)?;
            return Err(error);
        }
        let layers: Vec<PathBuf> = match &pulled.lazy {
            Some(access) => vec![self.mount_lower(access, record).inspect_err(|_| {
                if let Err(error) = self.images.store().remove_bundle(&record.id) {
                    tracing::warn!("{error}");
                }
            })?],
            None => pulled.layers.iter().map(|layer| layer.path().to_owned()).collect(),
        };
        self.compose(record, &layers, &pulled.image.config, overrides)
    }

    /// From here on, a runtime may start a container of this bundle.
    fn measure_workload(&self, record: &BundleRecord, manifest: &Digest) -> Result<(), ServiceError> {
        let Some(events) = &self.events else { return Ok(()) };
        let (id, digest) = (record.id.to_string(), manifest.to_string());
        Ok(events.record(&Happening::WorkloadStarted { id, digest })?)
    }

    fn compose(
        &self,
        record: &BundleRecord,
        layers: &[PathBuf],
        config: &ImageConfig,
        overrides: &Overrides,
    ) -> Result<(), ServiceError> {
        let store = self.images.store();
        let upper = UpperDir::At(store.bundle_dir(&record.id));
        let user_xattr = store.marks() == Marks::User;
        let made =
            Plan::new(&record.path, layers, &upper, config, overrides, user_xattr).and_then(|plan| plan.carry_out());
        if let Err(error) = made {
            store.remove_bundle(&record.id)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Unmounts a bundle and forgets what was written in it.
    ///
    /// # Errors
    /// [`ServiceError`]
    pub fn unmount_bundle(store: &Store, path: &Path) -> Result<(), ServiceError> {
        let path = absolute(path)?;
        let missing = || StoreError::NoBundle { bundle: path.clone(), path: store.root().into() };
        let record = store.bundle_at(&path)?.ok_or_else(missing)?;
        bundle::teardown(&path)?;
        Ok(store.remove_bundle(&record.id)?)
    }
}

impl crate::services::Guest for ImageService {
    fn pull_image(&self, image: &str, bundle: &Path) -> Result<String, String> {
        // Existing clients name images without a transport.
        let pulled = self.pull(image).map_err(|error| chain(&error))?;
        if !bundle.as_os_str().is_empty() {
            self.mount_bundle(&pulled, bundle, &Overrides::default()).map_err(|error| chain(&error))?;
        }
        Ok(pulled.image.manifest.to_string())
    }

    fn resource(&self, path: &str) -> Result<SecretBytes, String> {
        let uri: Result<ResourceUri, UriError> = match path.starts_with("kbs") {
            true => path.parse(),
            false => path.trim_start_matches('/').parse().map(ResourceUri::from_path),
        };
        self.keys.fetch(&uri.map_err(|error| error.to_string())?).map_err(|error| chain(&error))
    }

    fn unwrap_key(&self, annotation: &[u8]) -> Result<SecretBytes, String> {
        let packet = nacre_oci::crypt::coco::Packet::parse(annotation).map_err(|error| chain(&error))?;
        packet.unwrap(&*self.keys).map_err(|error| chain(&error))
    }
}

/// An error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn stack_of(pulled: &PulledImage) -> Vec<LayerId> {
    pulled.layers.iter().map(|layer| *layer.id()).collect()
}

/// The layer whose root directory is the image's.
fn root_of(pulled: &PulledImage) -> Option<&LayerGuard> {
    pulled.layers.iter().find(|layer| Some(*layer.id()) == pulled.image.root)
}

fn absolute(path: &Path) -> Result<PathBuf, ServiceError> {
    std::path::absolute(path).map_err(|source| ServiceError::File { what: "the bundle", path: path.into(), source })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ServiceError> {
    use std::io::Read as _;
    let wrong = |source| ServiceError::File { what, path: path.into(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(wrong)?.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(wrong)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(wrong(std::io::Error::other(format!("larger than {FILE_LIMIT} bytes"))));
    }
    Ok(bytes)
}

fn read_init_data(path: &Path) -> Result<InitData, ServiceError> {
    let bytes = read("init data", path)?;
    let text = String::from_utf8(bytes).map_err(|error| ServiceError::File {
        what: "init data",
        path: path.into(),
        source: std::io::Error::other(error),
    })?;
    Ok(InitData::parse(&text)?)
}

/// PEM text as it is; anything else is a file's name.
fn pem(what: &'static str, value: &str) -> Result<String, ServiceError> {
    if value.contains("-----BEGIN") {
        return Ok(value.to_owned());
    }
    String::from_utf8(read(what, Path::new(value))?)
        .map_err(|error| ServiceError::Config(format!("{what} '{value}' is not PEM: {error}")))
}

/// The guest's init data, read once.
pub(crate) fn init_data_of(config: &BrokerConfig) -> Result<Option<InitData>, ServiceError> {
    match &config.measured {
        Some(data) => Ok(Some(data.clone())),
        None => config.init_data.as_deref().map(read_init_data).transpose(),
    }
}

/// Makes the attester of a configured guest.
///
/// # Errors
/// [`ServiceError`]: there is no TEE, or it cannot be used.
pub fn attester_of(config: &BrokerConfig) -> Result<Arc<dyn Attester>, ServiceError> {
    attester::attester(config, init_data_of(config)?)
}

/// Makes the client of a configured broker; nothing is sent yet.
///
/// # Errors
/// [`ServiceError`]: a file that the configuration names, or there is no TEE.
pub fn connect(config: &BrokerConfig) -> Result<Arc<BrokerClient>, ServiceError> {
    connect_with(config, init_data_of(config)?)
}

/// Has the attestation key of this guest's TPM enrolled at its broker.
///
/// # Errors
/// [`ServiceError`]: there is no TPM, it has no EK certificate, or the broker refuses.
pub fn enrol(config: &BrokerConfig) -> Result<Enrolled, ServiceError> {
    let attester = attester_of(config)?;
    let none = || {
        ServiceError::Config(format!("what is enrolled is the key of a TPM, and the TEE here is {}", attester.tee()))
    };
    Ok(nacre_attest::client::enrol(&client_config(config)?, attester.enrols().ok_or_else(none)?)?)
}

fn client_config(config: &BrokerConfig) -> Result<ClientBroker, ServiceError> {
    let certificate = config.certificate.as_deref().map(|value| pem("the broker's certificate", value)).transpose()?;
    let token_key = config.token_key.as_deref().map(|value| pem("the broker's token key", value)).transpose()?;
    Ok(ClientBroker::new(&config.url).pin(certificate.as_deref(), token_key.as_deref())?)
}

fn connect_with(config: &BrokerConfig, init_data: Option<InitData>) -> Result<Arc<BrokerClient>, ServiceError> {
    let broker = client_config(config)?;
    Ok(Arc::new(BrokerClient::new(broker, attester::attester(config, init_data)?)?))
}

fn key_source(config: &Config, broker: Option<&Arc<BrokerClient>>) -> Result<Arc<dyn KeySource>, ServiceError> {
    match (broker, &config.offline_keys) {
        (Some(_), Some(_)) => Err(ServiceError::Config("broker and offline_keys are both set; choose one".into())),
        (Some(broker), None) => Ok(broker.clone()),
        (None, Some(dir)) => Ok(Arc::new(OfflineKeys::read(dir)?)),
        (None, None) => Ok(Arc::new(NoKeys)),
    }
}

/// The policy, and the bytes that it was read from; of one that was chosen to be none, none.
fn policy(
    config: &Config,
    init_data: Option<&InitData>,
    keys: &dyn KeySource,
) -> Result<(Policy, Vec<u8>), ServiceError> {
    let trust = &config.trust;
    match trust.policy.as_deref() {
        Some(_) if trust.insecure_policy => {
            Err(ServiceError::Config("trust.policy and trust.insecure_policy are both set; choose one".into()))
        }
        Some(uri) if uri.starts_with("kbs") => {
            let text = keys.fetch(&uri.parse()?)?;
            Ok((Policy::parse(text.expose(), uri)?, text.expose().to_vec()))
        }
        Some(text) => match text.strip_prefix("init-data:") {
            Some(name) => {
                let missing = || ServiceError::Config(format!("trust.policy: there is no '{name}' in the init data"));
                let policy = init_data.and_then(|data| data.get(name)).ok_or_else(missing)?;
                Ok((Policy::parse(policy.as_bytes(), text)?, policy.as_bytes().to_vec()))
            }
            None => {
                let bytes = read("the trust policy", Path::new(text))?;
                Ok((Policy::parse(&bytes, text)?, bytes))
            }
        },
        None if trust.insecure_policy => Ok((Policy::insecure_accept_anything(), Vec::new())),
        None => Err(ServiceError::Config(
            "there is no trust policy: name one (--policy FILE), or choose to have none (--insecure-policy)".into(),
        )),
    }
}

fn pull_options(config: &Config, marks: Marks) -> Result<PullOptions, ServiceError> {
    let image = &config.image;
    let platform = match &image.platform {
        Some(text) => text.parse()?,
        None => Platform::host(),
    };
    let whiteouts = match marks {
        Marks::Trusted => WhiteoutMode::Trusted,
        Marks::User => WhiteoutMode::User,
    };
    let unpack =
        UnpackOptions { limits: image.limits.clone(), whiteouts, devices: image.devices, ..UnpackOptions::default() };
    Ok(PullOptions { platform, unpack, parallel: image.parallel_layers })
}

/// No trusted time: a guest without a broker.
struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> Option<TrustedTime> {
        None
    }
}

/// No broker.
struct NoKeys;

impl KeySource for NoKeys {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        Err(KeySourceError::Failed {
            uri: uri.clone(),
            source_name: "a key broker".into(),
            source: "no broker is configured (--broker URL)".into(),
        })
    }
}

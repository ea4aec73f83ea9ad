//! From the command line, the environment and the configuration file to a working guest: flags before variables before the file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nacre_core::Progress;
use nacre_guest::{
    config::{BrokerConfig, Config, TrustConfig},
    lazy::Front,
    service::ImageService,
    store::{Marks, Store},
};
use nacre_oci::registry::RegistriesConf;
use nacre_sys::privilege::Privilege;

use crate::{
    args::{
        BrokerArgs, Global, KeyArgs, RegistryArgs, TrustArgs,
        lazy::{Front as FrontArg, LazyArgs},
    },
    progress::{self, Verbosity},
};

/// What all commands share.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) progress: Arc<dyn Progress>,
    root: Option<PathBuf>,
    allow_tmpfs: bool,
}

impl Setup {
    /// Reads the configuration file.
    pub(crate) fn new(global: &Global, json: bool) -> anyhow::Result<Self> {
        let config = match &global.config {
            Some(path) => Config::read(path)?,
            None => {
                let usual = Path::new("/etc/nacre/nacre.toml");
                if usual.exists() { Config::read(usual)? } else { Config::default() }
            }
        };
        let verbosity = if global.quiet || json { Verbosity::Quiet } else { Verbosity::Normal };
        Ok(Self {
            progress: progress::display(verbosity),
            root: global.root.clone().or_else(|| config.root.clone()),
            allow_tmpfs: global.allow_tmpfs || config.allow_tmpfs,
            config,
        })
    }

    /// Opens the store, as root or as a user in a namespace.
    pub(crate) fn store(&self) -> anyhow::Result<Store> {
        let marks = if nacre_sys::userns::is_inside() { Marks::User } else { Marks::Trusted };
        let root = match &self.root {
            Some(root) => root.clone(),
            None if marks == Marks::Trusted => "/var/lib/nacre".into(),
            None => {
                let home = std::env::var_os("XDG_DATA_HOME")
                    .map(PathBuf::from)
                    .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
                home.context("neither --root, NACRE_ROOT nor HOME says where the store is")?.join("nacre")
            }
        };
        Ok(Store::open(&root, marks, self.allow_tmpfs)?)
    }

    /// Adds what the flags say.
    pub(crate) fn with(
        mut self,
        trust: &TrustArgs,
        broker: &BrokerArgs,
        registry: &RegistryArgs,
    ) -> anyhow::Result<Self> {
        self.add_trust(trust);
        self.with_sources(broker, registry)
    }

    /// Adds what the flags say, for commands that let no image in and so need no policy.
    pub(crate) fn without_policy(mut self, broker: &BrokerArgs, registry: &RegistryArgs) -> anyhow::Result<Self> {
        self.config.trust = TrustConfig { insecure_policy: true, ..TrustConfig::default() };
        self.with_sources(broker, registry)
    }

    fn with_sources(mut self, broker: &BrokerArgs, registry: &RegistryArgs) -> anyhow::Result<Self> {
        self.add_broker(broker)?;
        self.add_registry(registry);
        // A machine with an attested broker is a guest, whose clock is its host's. Any other is somebody's own.
        self.config.trust.system_clock |= self.config.broker.is_none();
        Ok(self)
    }

    /// What registries.conf says, by the configuration, or else by the variable that all its users know.
    pub(crate) fn registries_conf(&self) -> anyhow::Result<RegistriesConf> {
        let variable = std::env::var_os("CONTAINERS_REGISTRIES_CONF").map(PathBuf::from);
        Ok(RegistriesConf::system(variable.as_deref().or(self.config.registries.conf.as_deref()))?)
    }

    /// The guest.
    pub(crate) fn service(&self) -> anyhow::Result<ImageService> {
        Ok(ImageService::new(&self.config, self.store()?, self.progress.clone())?)
    }

    fn add_trust(&mut self, args: &TrustArgs) {
        let trust = &mut self.config.trust;
        // Not a variable of clap's: it must not contradict the flag that asks for no policy.
        let variable = || std::env::var("NACRE_POLICY").ok().filter(|policy| !policy.is_empty());
        if let Some(policy) = args.policy.clone().or_else(variable) {
            trust.policy = Some(policy);
            trust.insecure_policy = false;
        }
        if args.insecure_policy {
            trust.insecure_policy = true;
            trust.policy = None;
        }
        if trust.policy.is_none() && !trust.insecure_policy {
            trust.policy = first_there("policy.json").map(|path| path.display().to_string());
        }
        trust.admission.plain_unsigned |= args.allow_unsigned;
        if args.registries_d.is_some() {
            trust.registries_d.clone_from(&args.registries_d);
        }
        if trust.registries_d.is_none() {
            trust.registries_d = registries_d();
        }
    }

    /// Adds what the flags say of keys.
    pub(crate) fn with_keys(mut self, args: &KeyArgs) -> Self {
        self.config.decryption_keys.extend(args.decryption_key.iter().cloned());
        self
    }

    /// Adds what the flags say of lazy images.
    pub(crate) fn with_lazy(mut self, args: &LazyArgs) -> Self {
        let lazy = &mut self.config.lazy;
        if args.cache.is_some() {
            lazy.cache.clone_from(&args.cache);
        }
        lazy.cache_limit = args.cache_limit.map_or(lazy.cache_limit, |limit| limit.0);
        lazy.patience = args.patience.unwrap_or(lazy.patience);
        lazy.bandwidth = args.bandwidth.map_or(lazy.bandwidth, |rate| rate.0);
        lazy.front = match args.front {
            Some(FrontArg::Auto) => Front::Best,
            Some(FrontArg::Erofs) => Front::Erofs,
            Some(FrontArg::Fuse) => Front::Fuse,
            None => lazy.front,
        };
        self
    }

    pub(crate) fn add_broker(&mut self, args: &BrokerArgs) -> anyhow::Result<()> {
        let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let (certificate, token_key) = (text(&args.broker_cert), text(&args.broker_token_key));
        let (platform_key, init_data) = (args.sim_platform_key.clone(), args.init_data.clone());
        let old = self.config.broker.take();
        let Some(url) = args.broker.clone().or_else(|| old.as_ref().map(|old| old.url.clone())) else {
            anyhow::ensure!(
                certificate.is_none() && token_key.is_none() && platform_key.is_none() && init_data.is_none(),
                "--broker-cert, --broker-token-key, --sim-platform-key and --init-data are about a broker: name it (--broker URL)"
            );
            return Ok(());
        };
        // The pins of one broker are not those of another.
        let same = old.as_ref().filter(|old| old.url == url);
        self.config.broker = Some(BrokerConfig {
            certificate: certificate.or_else(|| same?.certificate.clone()),
            token_key: token_key.or_else(|| same?.token_key.clone()),
            url,
            sim_platform_key: platform_key.or_else(|| old.as_ref()?.sim_platform_key.clone()),
            tee: old.as_ref().and_then(|old| old.tee.clone()),
            tpm: old.as_ref().and_then(|old| old.tpm.clone()),
            tpm_ak: old.as_ref().and_then(|old| old.tpm_ak.clone()),
            events: old.as_ref().and_then(|old| old.events.clone()),
            init_data: init_data.or_else(|| old.as_ref()?.init_data.clone()),
            reattest: old.as_ref().map_or(0, |old| old.reattest),
            measured: None,
        });
        Ok(())
    }

    pub(crate) fn add_registry(&mut self, args: &RegistryArgs) {
        let registry = &mut self.config.registry;
        registry.insecure |= args.insecure_registry;
        registry.extra_roots.extend(args.ca.iter().cloned());
        if let Some(dir) = &args.cert_dir {
            registry.certs_dirs = vec![dir.clone()];
        }
        if args.node_cache.is_some() {
            registry.node_cache.clone_from(&args.node_cache);
        }
        if let Some(path) = &args.authfile {
            self.config.registries.credentials = Some(path.display().to_string());
        }
        if args.registries_conf.is_some() {
            self.config.registries.conf.clone_from(&args.registries_conf);
        }
        if args.platform.is_some() {
            self.config.image.platform.clone_from(&args.platform);
        }
    }
}

/// The user's or the machine's file of containers(5).
fn first_there(name: &str) -> Option<PathBuf> {
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    let candidates = [home.map(|home| home.join("containers")), Some("/etc/containers".into())];
    candidates.into_iter().flatten().map(|dir| dir.join(name)).find(|path| path.exists())
}

/// The user's or the machine's directory of signature storage configurations.
pub(crate) fn registries_d() -> Option<PathBuf> {
    first_there("registries.d")
}

/// Makes sure that this process may own files of other users and mount: as it is, or by going on as root of a user namespace.
pub(crate) fn privileged() -> anyhow::Result<()> {
    match Privilege::detect() {
        Privilege::Full => Ok(()),
        Privilege::UserNamespace => match nacre_sys::userns::become_root()? {},
        Privilege::Missing(missing) => Err(missing.into()),
    }
}

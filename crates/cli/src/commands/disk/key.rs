//! Where the key of a disk comes from.

use std::{fs::File, io::Read as _, path::Path, sync::Arc};

use anyhow::Context as _;
use nacre_anchor::AnchorSpec;
use nacre_attest::{
    client::{Borrowed, BrokerAnchor, BrokerClient, Lease},
    offline::OfflineKeys,
};
use nacre_core::{Anchor, AnchorError, KeySource as _, ResourceUri, SecretBytes};
use nacre_disk::RootKey;

use crate::{
    args::{BrokerArgs, Global, disk::DiskKeyArgs},
    exit::Usage,
    setup::Setup,
};

/// What an anchor's secret is for, so that it is of no use for anything else.
const ANCHOR_LABEL: &str = "tpm nv";

/// One of three.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: Option<&'a Path>,
    pub(super) fd: Option<u32>,
    pub(super) resource: Option<&'a str>,
    pub(super) broker: &'a BrokerArgs,
}

impl<'a> From<&'a DiskKeyArgs> for Source<'a> {
    fn from(args: &'a DiskKeyArgs) -> Self {
        let DiskKeyArgs { key_file, key_fd, key_resource, broker } = args;
        Self { file: key_file.as_deref(), fd: *key_fd, resource: key_resource.as_deref(), broker }
    }
}

impl Source<'_> {
    /// Whether any was named.
    pub(super) fn is_some(&self) -> bool {
        self.file.is_some() || self.fd.is_some() || self.resource.is_some()
    }

    /// The key; the command line sees to it that at most one was named.
    pub(super) fn read(&self, global: &Global) -> anyhow::Result<RootKey> {
        let material = match (self.file, self.fd, self.resource) {
            (Some(path), ..) if path == Path::new("-") => limited(std::io::stdin().lock(), "standard input")?,
            (Some(path), ..) => open(path, &path.display().to_string())?,
            (_, Some(fd), _) => open(Path::new(&format!("/proc/self/fd/{fd}")), &format!("file descriptor {fd}"))?,
            (.., Some(uri)) => self.fetch(global, uri)?,
            _ => {
                let wanted = "the disk's key is needed: --key-file FILE, --key-fd FD or --key-resource URI";
                return Err(Usage(wanted.into()).into());
            }
        };
        Ok(RootKey::from_bytes(material.expose())?)
    }

    /// The key for a disk that runs: with its lease, where the broker lends it.
    pub(super) fn read_to_run(
        &self,
        global: &Global,
        client: Option<&Arc<BrokerClient>>,
    ) -> anyhow::Result<(RootKey, Option<Lent>)> {
        let Some(uri) = self.resource else { return Ok((self.read(global)?, None)) };
        let uri: ResourceUri = uri.parse()?;
        let Some(client) = client.cloned() else { return Ok((self.read(global)?, None)) };
        if uri.plugin().is_some_and(|plugin| plugin != "resource") || uri.host().is_some() {
            return Ok((self.read(global)?, None));
        }
        let Borrowed { secret, lease, .. } = client.borrow(uri.path(), None)?;
        Ok((RootKey::from_bytes(secret.expose())?, lease.map(|lease| Lent { client, lease })))
    }

    /// The client of the broker that is configured; with it, the guest's event log is open.
    pub(super) fn client(&self, global: &Global) -> anyhow::Result<Option<Arc<BrokerClient>>> {
        let mut setup = Setup::new(global, true)?;
        setup.add_broker(self.broker)?;
        Ok(setup.config.broker.as_ref().map(nacre_guest::service::connect).transpose()?)
    }

    /// The anchor of the disk that has this key.
    pub(super) fn anchor(
        &self,
        global: &Global,
        spec: &AnchorSpec,
        key: &RootKey,
    ) -> anyhow::Result<Option<Arc<dyn Anchor>>> {
        let client = match spec {
            AnchorSpec::Broker(_) => self.client(global)?,
            _ => None,
        };
        anchor(spec, key, client.as_ref())
    }

    fn fetch(&self, global: &Global, uri: &str) -> anyhow::Result<SecretBytes> {
        let uri: ResourceUri = uri.parse()?;
        let mut setup = Setup::new(global, true)?;
        setup.add_broker(self.broker)?;
        match (&setup.config.broker, &setup.config.offline_keys) {
            (Some(broker), _) => Ok(nacre_guest::service::connect(broker)?.fetch(&uri)?),
            (None, Some(dir)) => Ok(OfflineKeys::read(dir)?.fetch(&uri)?),
            (None, None) => Err(Usage(format!("{uri}: name the broker that has it (--broker URL)")).into()),
        }
    }
}

/// The anchor of the disk that has this key, of a broker's by the client.
pub(super) fn anchor(
    spec: &AnchorSpec,
    key: &RootKey,
    client: Option<&Arc<BrokerClient>>,
) -> anyhow::Result<Option<Arc<dyn Anchor>>> {
    let missing = || Usage(format!("{spec}: name the broker that has it (--broker URL)"));
    let open = |name: &str| {
        let failed = |source: Arc<dyn std::error::Error + Send + Sync>| AnchorError::Failed {
            anchor: spec.to_string(),
            what: "there is no way to it".into(),
            source,
        };
        let client = client.cloned().ok_or_else(|| failed(Arc::new(missing())))?;
        let anchor = BrokerAnchor::new(client, name).map_err(|error| failed(Arc::new(error)))?;
        Ok(Arc::new(anchor) as Arc<dyn Anchor>)
    };
    if matches!(spec, AnchorSpec::Broker(_)) && client.is_none() {
        return Err(missing().into());
    }
    Ok(spec.open(&key.anchor_secret(ANCHOR_LABEL), &open)?)
}

/// A key that a broker lends.
pub(super) struct Lent {
    pub(super) client: Arc<BrokerClient>,
    pub(super) lease: Lease,
}

fn open(path: &Path, name: &str) -> anyhow::Result<SecretBytes> {
    limited(File::open(path).with_context(|| format!("{name}: the disk's key"))?, name)
}

fn limited(from: impl std::io::Read, name: &str) -> anyhow::Result<SecretBytes> {
    // One byte more than is allowed, so that what is too long is refused and not cut.
    let limit = RootKey::MOST + 1;
    let mut bytes = Vec::with_capacity(limit);
    let read = from.take(limit as u64).read_to_end(&mut bytes);
    let secret = SecretBytes::new(bytes);
    read.with_context(|| format!("{name}: the disk's key"))?;
    Ok(secret)
}

/// Removes what the anchor holds for this key.
pub(super) fn forget_anchor(spec: &AnchorSpec, key: &RootKey) -> anyhow::Result<()> {
    Ok(spec.forget(&key.anchor_secret(ANCHOR_LABEL))?)
}

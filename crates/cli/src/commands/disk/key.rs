//! Where the key of a disk comes from.

use std::{fs::File, io::Read as _, path::Path};

use anyhow::Context as _;
use nacre_anchor::AnchorSpec;
use nacre_attest::offline::OfflineKeys;
use nacre_core::{Anchor, KeySource as _, ResourceUri, SecretBytes};
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

/// The anchor of the disk that has this key.
pub(super) fn anchor(spec: &AnchorSpec, key: &RootKey) -> anyhow::Result<Option<std::sync::Arc<dyn Anchor>>> {
    Ok(spec.open(&key.anchor_secret(ANCHOR_LABEL))?)
}

/// Removes what the anchor holds for this key.
pub(super) fn forget_anchor(spec: &AnchorSpec, key: &RootKey) -> anyhow::Result<()> {
    Ok(spec.forget(&key.anchor_secret(ANCHOR_LABEL))?)
}

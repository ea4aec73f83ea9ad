//! Resources: secrets of a kind, by path, in versions.
//!
//! ```text
//! resources  repository/type/tag              JSON [`Resource`]
//! values     repository/type/tag@0000000001   the value of that version
//! ```
//!
//! A path has no `@`, so that no value's key is another resource's. The current version is what guests get; so many older ones are kept for
//! guests that still need them (a volume's old key, to change it), and asked for by `?version=`.

use nacre_core::{ResourcePath, SecretBytes};
use serde::{Deserialize, Serialize};

use super::{AuditEntry, Page, Store};
use crate::{BrokerError, admin::now, storage::Table};

/// What a secret is for. Its kind decides which values are taken, and release policies see it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResourceKind {
    /// Any bytes.
    #[default]
    Opaque,
    /// The key of an image's layers: 32 bytes.
    LayerKey,
    /// The key of a volume: 32 to 64 bytes.
    VolumeKey,
    /// The secret of a deduplication domain: 32 bytes.
    DomainSecret,
    /// A text that says what is trusted.
    Policy,
    /// A text that lets somebody in: a registry's auth file, a token.
    Credential,
}

impl ResourceKind {
    /// All kinds.
    pub const ALL: [Self; 6] =
        [Self::Opaque, Self::LayerKey, Self::VolumeKey, Self::DomainSecret, Self::Policy, Self::Credential];

    /// Its name: `layer-key`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opaque => "opaque",
            Self::LayerKey => "layer-key",
            Self::VolumeKey => "volume-key",
            Self::DomainSecret => "domain-secret",
            Self::Policy => "policy",
            Self::Credential => "credential",
        }
    }

    /// The kind of a name.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] names those that there are.
    pub fn from_name(name: &str) -> Result<Self, BrokerError> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            BrokerError::Invalid(format!("'{name:.40}' is no kind of resource: {names}"))
        })
    }

    /// Whether a value can be of this kind.
    ///
    /// # Errors
    /// [`BrokerError::Invalid`] says what it has to be.
    pub fn check(self, value: &[u8]) -> Result<(), BrokerError> {
        let wanted = match self {
            Self::Opaque => return Ok(()),
            Self::LayerKey | Self::DomainSecret if value.len() == 32 => return Ok(()),
            Self::VolumeKey if (32..=64).contains(&value.len()) => return Ok(()),
            Self::Policy | Self::Credential if !value.is_empty() && std::str::from_utf8(value).is_ok() => return Ok(()),
            Self::LayerKey | Self::DomainSecret => "32 bytes",
            Self::VolumeKey => "32 to 64 bytes",
            Self::Policy | Self::Credential => "a text in UTF-8",
        };
        Err(BrokerError::Invalid(format!("a {} is {wanted}; this has {} bytes", self.name(), value.len())))
    }

    /// Whether a new version can be made of random bytes.
    pub fn is_key(self) -> bool {
        matches!(self, Self::LayerKey | Self::VolumeKey | Self::DomainSecret)
    }
}

/// What is known of a resource, but its value.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Resource {
    /// Where it is.
    #[serde(default)]
    pub path: String,
    /// What it is for.
    pub kind: ResourceKind,
    /// The version that guests get.
    pub version: u32,
    /// The versions that there are.
    pub versions: Vec<u32>,
    /// For how long it is lent: a guest that does not renew its lease has to give it up. `None`: for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_seconds: Option<u32>,
    /// When the current version came, in seconds since 1970.
    pub changed: i64,
}

/// How a value is kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutOptions {
    /// What it is for; that of the version before, where this is `None`.
    pub kind: Option<ResourceKind>,
    /// For how long it is lent; as the version before, where this is `None`; 0: for good.
    pub lease_seconds: Option<u32>,
}

pub(super) fn value_key(path: &str, version: u32) -> String {
    format!("{path}@{version:010}")
}

impl Store {
    /// Keeps a value as the current version of a resource, and `keep` versions in all; gives its number.
    pub(crate) fn put_resource(
        &self,
        path: &ResourcePath,
        value: SecretBytes,
        options: PutOptions,
        keep: usize,
        entry: AuditEntry,
    ) -> Result<u32, BrokerError> {
        let path = path.to_string();
        self.update(crate::storage::Lane::Log, move |records| {
            let before = records.get_json::<Resource>(Table::Resources, &path)?.unwrap_or_default();
            let kind = options.kind.unwrap_or(before.kind);
            kind.check(value.expose())?;
            let version = before.versions.iter().max().copied().unwrap_or_default() + 1;
            let lease_seconds = match options.lease_seconds {
                None => before.lease_seconds,
                Some(0) => None,
                some => some,
            };
            let mut resource = Resource {
                path: String::new(),
                kind,
                version,
                versions: before.versions,
                lease_seconds,
                changed: now(),
            };
            resource.versions.push(version);
            let gone = resource.versions.len().saturating_sub(keep.max(1));
            for old in resource.versions.drain(..gone) {
                records.tx.delete(Table::Values, value_key(&path, old));
            }
            records.put(Table::Values, value_key(&path, version), value.expose())?;
            records.put_json(Table::Resources, &path, &resource)?;
            let mut entry = entry.clone();
            entry.detail = format!("{} version {version}", kind.name());
            super::audit::append(records.tx, entry)?;
            Ok(version)
        })
    }

    pub(crate) fn delete_resource(&self, path: &ResourcePath, entry: AuditEntry) -> Result<bool, BrokerError> {
        let path = path.to_string();
        self.change(entry, move |records| {
            let Some(resource) = records.get_json::<Resource>(Table::Resources, &path)? else { return Ok(false) };
            for version in resource.versions {
                records.tx.delete(Table::Values, value_key(&path, version));
            }
            records.delete(Table::Resources, &path)
        })
    }

    /// A resource and the value of a version of it, the current one where none is named.
    pub(crate) fn resource(
        &self,
        path: &ResourcePath,
        version: Option<u32>,
    ) -> Result<Option<(Resource, SecretBytes)>, BrokerError> {
        let path = path.to_string();
        self.view(|records| {
            // A version that goes while it is read was not the current one when the second look finds another.
            for _ in 0..3 {
                let Some(mut resource) = records.get_json::<Resource>(Table::Resources, &path)? else {
                    return Ok(None);
                };
                let wanted = version.unwrap_or(resource.version);
                if !resource.versions.contains(&wanted) {
                    return Ok(None);
                }
                if let Some(value) = records.get(Table::Values, value_key(&path, wanted))? {
                    resource.path.clone_from(&path);
                    resource.version = wanted;
                    return Ok(Some((resource, value)));
                }
            }
            Err(BrokerError::Damaged { what: format!("resource {path}"), why: "its value is missing".into() })
        })
    }

    /// What is known of a resource.
    pub(crate) fn resource_info(&self, path: &ResourcePath) -> Result<Option<Resource>, BrokerError> {
        let path = path.to_string();
        self.view(|records| {
            let found = records.get_json::<Resource>(Table::Resources, &path)?;
            Ok(found.map(|resource| Resource { path: path.clone(), ..resource }))
        })
    }

    /// Resources whose paths begin so, without their values.
    pub(crate) fn resources(&self, prefix: &str, page: &Page) -> Result<Vec<Resource>, BrokerError> {
        self.view(|records| {
            let rows = records.list(Table::Resources, prefix, page.after.as_deref().map(str::as_bytes), page.most)?;
            rows.into_iter()
                .map(|(path, bytes)| {
                    let resource: Resource = super::from_json(Table::Resources, path.as_bytes(), bytes.expose())?;
                    Ok(Resource { path, ..resource })
                })
                .collect()
        })
    }
}

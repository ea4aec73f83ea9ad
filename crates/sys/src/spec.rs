//! The part of the OCI runtime specification (1.0) that Nacre writes, and that its own runner reads.
//!
//! Reading refuses fields that are not here: the runner would otherwise run a container without a protection that its config
//! asks for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The version of the specification that the configs keep to.
pub const VERSION: &str = "1.0.2";

/// `config.json` of a bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// The version of the specification.
    pub oci_version: String,
    /// What to run.
    pub process: Process,
    /// The root filesystem.
    pub root: Root,
    /// The name of the host, as the container sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// What is mounted, in order.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What is Linux's own.
    pub linux: Linux,
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Process {
    /// Whether it gets a pseudo-terminal.
    #[serde(default)]
    pub terminal: bool,
    /// As whom.
    pub user: User,
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Where.
    pub cwd: String,
    /// With which capabilities; none given is none.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// Resource limits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<Rlimit>,
    /// Whether programs cannot give it more than it has.
    #[serde(default)]
    pub no_new_privileges: bool,
}

/// A user by numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct User {
    /// The user id, in the container.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// The supplementary group ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub additional_gids: Vec<u32>,
}

/// Capability sets, by names such as `CAP_CHOWN`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capabilities {
    /// What may be gained at all.
    pub bounding: Vec<String>,
    /// What is in force.
    pub effective: Vec<String>,
    /// What survives the execution of a program that asks for it.
    pub inheritable: Vec<String>,
    /// What may be put in force.
    pub permitted: Vec<String>,
    /// What survives the execution of any program.
    pub ambient: Vec<String>,
}

/// A resource limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// Such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it can be raised to.
    pub hard: u64,
    /// What is in force.
    pub soft: u64,
}

/// The root filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// Where it is, from the bundle.
    pub path: PathBuf,
    /// Whether the container sees it read-only.
    #[serde(default)]
    pub readonly: bool,
}

/// A mount in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Where, in the container.
    pub destination: String,
    /// The filesystem's type; `none` or `bind` with a bind option.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The device, or what is bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// As `mount -o` has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// What is Linux's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Linux {
    /// New namespaces; what is not named is shared with the starter.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// Paths that show nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub masked_paths: Vec<String>,
    /// Paths that cannot be written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub readonly_paths: Vec<String>,
    /// What cgroups limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

/// What cgroups limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Which devices may be used.
    #[serde(default)]
    pub devices: Vec<DeviceRule>,
}

/// A rule about devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    /// Whether it allows.
    pub allow: bool,
    /// Some of `rwm`.
    pub access: String,
}

/// A new namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    /// Which kind.
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
}

/// Kinds of namespaces. A config of ours never asks for a user namespace: who needs one is in it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named as in the specification")]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    Cgroup,
}

//! Applies one layer's tar to a directory of its own, in the form that overlayfs reads (`docs/formats/store-layers.md`).
//!
//! [`Applier`] takes the uncompressed tar in pieces, parses it with [`tar`], and writes below a directory that the caller opened and
//! nobody else can reach. Nothing of the tar is trusted:
//! - names are split into components; `..` is refused, a leading `/` is the layer's root;
//! - directories are opened one component below another, without following links; where a parent is a symbolic link of the same layer,
//!   it is resolved in user space within the layer's root, as every engine does, and the result is walked without links again;
//! - what overlayfs would take for its own (its attributes, devices 0:0) never comes from the tar;
//! - every count and size has a limit in [`Limits`].
//!
//! A layer is applied alone, without the layers below it, so that it can be shared by images that put it on different ones. What depends
//! on those is recorded in [`AppliedLayer`], and [`adjust`] settles it for one image: directories that the layer uses and has no
//! entry for, and hard links to files of lower layers.

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use adjust::adjust_layer;
pub use apply::Applier;
pub use attributes::is_wanted;
pub use limits::{LimitExceeded, Limits};
pub use remove::remove_tree;

pub mod adjust;
mod apply;
mod attributes;
mod dirs;
mod limits;
pub mod names;
mod remove;
pub mod tar;

/// In which namespace overlayfs keeps its attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhiteoutMode {
    /// `trusted.overlay.*`: root's mounts.
    #[default]
    Trusted,
    /// `user.overlay.*`: mounts in a user namespace, with `userxattr`.
    User,
}

impl WhiteoutMode {
    pub(crate) fn opaque(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.opaque",
            Self::User => "user.overlay.opaque",
        }
    }

    /// Set, and empty, on directories that hold whiteouts: without it overlayfs lists the whiteouts of a directory that is in one layer only.
    pub(crate) fn origin(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.origin",
            Self::User => "user.overlay.origin",
        }
    }
}

/// What happens with device nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DevicePolicy {
    /// They are made.
    #[default]
    Create,
    /// They are left out, and counted.
    Skip,
    /// They make the layer invalid.
    Refuse,
}

/// A range of ids, as in `/proc/self/uid_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first id in the image.
    pub inside: u32,
    /// The id that it has on disk.
    pub outside: u32,
    /// How many follow each other.
    pub count: u32,
}

/// How the image's owners are written to disk. Empty: as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// For owners.
    pub uids: Vec<IdRange>,
    /// For groups.
    pub gids: Vec<IdRange>,
}

/// How a layer is applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UnpackOptions {
    /// How much it may be.
    pub limits: Limits,
    /// Overlay attributes.
    pub whiteouts: WhiteoutMode,
    /// Device nodes.
    pub devices: DevicePolicy,
    /// Owners.
    pub ids: IdMap,
}

/// What came out of a layer, for the store to keep beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedLayer {
    /// Entries of the tar.
    pub entries: u64,
    /// Bytes of file contents.
    pub content_bytes: u64,
    /// Bytes of the uncompressed tar.
    pub tar_bytes: u64,
    /// Whether the tar has an entry for the root directory, so that its attributes count.
    pub root: bool,
    /// The root directory is opaque: layers below this one are not to be stacked.
    pub hides_lower: bool,
    /// Directories that are used and have no entry; what they look like is up to the layers below.
    pub implied: Vec<ImpliedDirectory>,
    /// Hard links to files that are not in the layer.
    pub foreign_links: Vec<ForeignLink>,
    /// Attributes that were not taken over, since they belong to the host or to overlayfs.
    pub ignored_xattrs: u64,
    /// Device nodes that were left out.
    pub skipped_devices: u64,
}

impl AppliedLayer {
    /// Whether [`adjust_layer`] has anything to look at.
    pub fn needs_adjustment(&self) -> bool {
        !self.implied.is_empty() || !self.foreign_links.is_empty()
    }
}

/// A directory of a layer without an entry of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImpliedDirectory {
    /// Its path from the layer's root, without a slash in front.
    #[serde(with = "names::as_text")]
    pub path: Vec<u8>,
    /// Nothing but whiteouts is below it: where the lower layers do not have it, it is not there.
    pub whiteouts_only: bool,
    /// The layer removes what lower layers have there, so that they do not count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hidden: bool,
}

/// A hard link into a lower layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignLink {
    /// The new name.
    #[serde(with = "names::as_text")]
    pub path: Vec<u8>,
    /// The file that it names.
    #[serde(with = "names::as_text")]
    pub target: Vec<u8>,
}

/// Why a layer was not applied. Whatever is in its directory by then is to be removed.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no tar that we read.
    #[error("tar, near '{near}': {source}")]
    Tar {
        /// The last entry before.
        near: String,
        /// What is wrong.
        source: tar::TarError,
    },
    /// It is larger than it may be.
    #[error("'{path}': {source}")]
    Limit {
        /// The entry.
        path: String,
        /// Which limit.
        source: LimitExceeded,
    },
    /// An entry that no layer may have.
    #[error("entry '{path}' refused: {reason}")]
    Refused {
        /// The entry.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// The layer's own entries contradict each other, or those of the layers below.
    #[error("entry '{path}' cannot be unpacked: {reason}")]
    Conflict {
        /// The entry.
        path: String,
        /// Why.
        reason: String,
    },
    /// An owner has no id on this machine.
    #[error(
        "entry '{path}' belongs to {what} {id}, which the id map does not have; extend the map (see /etc/subuid, /etc/subgid)"
    )]
    UnmappedId {
        /// The entry.
        path: String,
        /// uid or gid.
        what: &'static str,
        /// Which.
        id: u32,
    },
    /// The operating system refused.
    #[error("{operation} '{path}': {source}{}", advice(.source))]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which entry.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A tree could not be removed.
    #[error("remove {path}: {source}")]
    Remove {
        /// What was to be removed.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl UnpackError {
    pub(crate) fn io(operation: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: names::shown(path), source: source.into() }
    }

    pub(crate) fn refused(path: &[u8], reason: &'static str) -> Self {
        Self::Refused { path: names::shown(path), reason }
    }

    /// Whether the layer itself is at fault, so that it would fail everywhere.
    pub fn is_invalid_layer(&self) -> bool {
        matches!(self, Self::Tar { .. } | Self::Limit { .. } | Self::Refused { .. } | Self::Conflict { .. })
    }
}

/// What a user can do about an answer of the system.
fn advice(error: &io::Error) -> &'static str {
    use rustix::io::Errno;
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => "; the store's file system is full",
        Some(Errno::ROFS) => "; the store is on a read-only file system",
        Some(Errno::PERM | Errno::ACCESS) => {
            "; unpacking keeps owners, attributes and devices, and needs root, or a user namespace that maps the image's ids"
        }
        Some(Errno::INVAL | Errno::OVERFLOW) => {
            "; in a user namespace, ids that are not mapped are refused: extend the map (see /etc/subuid, /etc/subgid)"
        }
        Some(Errno::NOTSUP) => {
            "; the store's file system has no extended attributes of this kind: use ext4, xfs or btrfs"
        }
        Some(Errno::MFILE | Errno::NFILE) => "; raise the limit of open files (ulimit -n)",
        _ => "",
    }
}

//! What can go wrong with a disk as a whole. Single requests fail with [`BlockError`].

use nacre_core::{AnchorError, BlockError};

/// Why a disk could not be formatted, opened, changed or closed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no secure disk on this store.
    #[error(
        "{store}: there is no Nacre disk here, or both copies of its superblock are destroyed; nothing was changed"
    )]
    NoDisk {
        /// The store.
        store: String,
    },
    /// Formatting would overwrite something.
    #[error("{store}: there is already something on it ({what}); format with force to overwrite it")]
    NotEmpty {
        /// The store.
        store: String,
        /// What was found.
        what: String,
    },
    /// Written by a program that knows more.
    #[error("{store}: format version {version} is not known to this program (it knows 1)")]
    Version {
        /// The store.
        store: String,
        /// What the superblock says.
        version: u32,
    },
    /// The key does not open it.
    #[error("{store}: the key does not open this disk, or both copies of its superblock were changed")]
    WrongKey {
        /// The store.
        store: String,
    },
    /// Key material that is none.
    #[error(
        "a root key needs {least} to {most} bytes of random key material, not {found}; `head -c 32 /dev/urandom` makes one"
    )]
    BadKey {
        /// At least.
        least: usize,
        /// At most.
        most: usize,
        /// What was given.
        found: usize,
    },
    /// A setting that cannot be.
    #[error("{0}")]
    Setting(String),
    /// What is on the store is not what was written there.
    #[error("{store}: {what}")]
    Damaged {
        /// The store.
        store: String,
        /// What is damaged, and where.
        what: String,
    },
    /// The store holds an older state than the anchor has seen.
    #[error(
        "{store}: this is not the latest state of the disk: {anchor} has seen commit {anchored}, the store holds {found}; \
         it was rolled back, or its last commits were destroyed"
    )]
    Rollback {
        /// The store.
        store: String,
        /// The anchor.
        anchor: String,
        /// What the anchor has seen.
        anchored: u64,
        /// What is there.
        found: String,
    },
    /// The disk wants an anchor.
    #[error("{store}: the disk was formatted with an anchor, and none was given; without it a rollback cannot be seen")]
    AnchorMissing {
        /// The store.
        store: String,
    },
    /// The anchor is another disk's, or holds nothing.
    #[error("{store}: {anchor} {what}")]
    AnchorMismatch {
        /// The store.
        store: String,
        /// The anchor.
        anchor: String,
        /// What is wrong.
        what: String,
    },
    /// The anchor failed.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The store failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl DiskError {
    /// Whether somebody tampered with the disk, or its anchor says so.
    pub fn is_integrity(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::Rollback { .. }
                | Self::WrongKey { .. }
                | Self::AnchorMissing { .. }
                | Self::AnchorMismatch { .. }
                | Self::Anchor(AnchorError::Untrusted { .. })
                | Self::Block(BlockError::Integrity { .. })
        )
    }

    /// As the error of a request.
    pub(crate) fn into_block(self) -> BlockError {
        match self {
            Self::Block(error) => error,
            Self::Anchor(error @ AnchorError::Fenced { .. }) => BlockError::Fenced(error.to_string()),
            other => BlockError::ReadOnly(other.to_string()),
        }
    }
}

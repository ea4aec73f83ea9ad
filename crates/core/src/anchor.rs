//! The port to a place that a host cannot turn back: it remembers how far a disk had come, so that an older copy of the disk is seen.

use std::sync::Arc;

/// How far a disk has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnchorState {
    /// Which disk this is about.
    pub disk: [u8; 16],
    /// Counts who opened the disk for writing: whoever moves it on fences all who came before.
    pub fence: u64,
    /// Counts what was committed. It grows from state to state.
    pub sequence: u64,
    /// The digest of everything that was committed up to there: the head of the chain of commits.
    pub root: [u8; 32],
}

impl AnchorState {
    /// Bytes of [`to_bytes`](Self::to_bytes).
    pub const LEN: usize = 64;

    /// disk ‖ fence ‖ sequence ‖ root, numbers little-endian.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.disk);
        bytes[16..24].copy_from_slice(&self.fence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[32..].copy_from_slice(&self.root);
        bytes
    }

    /// The inverse of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut state = Self { disk: [0; 16], fence: 0, sequence: 0, root: [0; 32] };
        let number = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        state.disk.copy_from_slice(&bytes[..16]);
        state.fence = number(16);
        state.sequence = number(24);
        state.root.copy_from_slice(&bytes[32..]);
        state
    }
}

/// Why an anchor could not be read or moved on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AnchorError {
    /// Somebody else moved it on: this writer has to stop.
    #[error(
        "{anchor}: somebody else has taken over the disk (it is at fence {found_fence}, sequence {found_sequence})"
    )]
    Fenced {
        /// Which anchor.
        anchor: String,
        /// What it holds now.
        found_fence: u64,
        /// What it holds now.
        found_sequence: u64,
    },
    /// What it holds is not ours, or was changed.
    #[error("{anchor}: {what}")]
    Untrusted {
        /// Which anchor.
        anchor: String,
        /// What is wrong with it.
        what: String,
    },
    /// It cannot be reached.
    #[error("{anchor}: {what}")]
    Failed {
        /// Which anchor.
        anchor: String,
        /// What was tried.
        what: String,
        /// What went wrong.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// A place that remembers an [`AnchorState`], and that whoever attacks the disk cannot turn back.
pub trait Anchor: Send + Sync {
    /// What it holds; `None` where nothing was ever stored.
    ///
    /// # Errors
    /// [`AnchorError`]
    fn read(&self) -> Result<Option<AnchorState>, AnchorError>;

    /// Replaces `expected` by `next`, durably, or not at all (compare and swap).
    ///
    /// # Errors
    /// [`AnchorError::Fenced`] where it holds something else than `expected`; after any other error either may be there.
    fn advance(&self, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), AnchorError>;

    /// What it is, for people: `TPM NV index 0x1800001`.
    fn describe(&self) -> String;

    /// What it protects from, and what not, in a sentence for people.
    fn promise(&self) -> String;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_their_encoding() {
        let state = AnchorState { disk: [1; 16], fence: 2, sequence: u64::MAX, root: [9; 32] };
        assert_eq!(AnchorState::from_bytes(&state.to_bytes()), state);
    }
}

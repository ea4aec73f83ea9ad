//! Anchors of volumes: how far each has come, by compare and swap.
//!
//! ```text
//! anchors  repository/name   the 64 bytes of an [`AnchorState`]
//! ```
//!
//! As fresh as the database is: whoever can turn it back turns back the anchors.

use nacre_core::AnchorState;

use super::{AuditEntry, Store, audit};
use crate::{
    BrokerError,
    storage::{Lane, Table},
};

/// What became of an attempt to move an anchor on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    /// It holds the new state.
    Done,
    /// It holds another state than was expected, which is this.
    Fenced(Option<AnchorState>),
    /// The new state does not follow from the old one.
    Backwards,
}

fn state(key: &str, bytes: &[u8]) -> Result<AnchorState, BrokerError> {
    let bytes = bytes.try_into().map_err(|_| BrokerError::Damaged {
        what: format!("anchor {key}"),
        why: format!("{} bytes instead of {}", bytes.len(), AnchorState::LEN),
    })?;
    Ok(AnchorState::from_bytes(bytes))
}

/// Whether a state can come after another: of the same disk, with a later fence, or the same one and a later sequence.
fn follows(before: Option<&AnchorState>, next: &AnchorState) -> bool {
    before.is_none_or(|before| {
        before.disk == next.disk
            && (next.fence, next.sequence) > (before.fence, before.sequence)
            && next.fence >= before.fence
            && next.sequence >= before.sequence
    })
}

impl Store {
    pub(crate) fn anchor(&self, key: &str) -> Result<Option<AnchorState>, BrokerError> {
        self.view(|records| {
            let found = records.get(Table::Anchors, key)?;
            found.map(|bytes| state(key, bytes.expose())).transpose()
        })
    }

    pub(crate) fn advance_anchor(
        &self,
        key: &str,
        expected: Option<AnchorState>,
        next: AnchorState,
        entry: AuditEntry,
    ) -> Result<Advance, BrokerError> {
        let key = key.to_owned();
        self.update(Lane::Log, move |records| {
            let found = records.get(Table::Anchors, &key)?;
            let found = found.map(|bytes| state(&key, bytes.expose())).transpose()?;
            if found != expected {
                return Ok(Advance::Fenced(found));
            }
            if !follows(found.as_ref(), &next) {
                return Ok(Advance::Backwards);
            }
            records.put(Table::Anchors, &key, &next.to_bytes())?;
            // Each commit of a disk may come here: the log says who took a volume over, not how far it came.
            if found.is_none_or(|found| found.fence != next.fence) {
                audit::append(records.tx, entry.clone())?;
            }
            Ok(Advance::Done)
        })
    }

    pub(crate) fn delete_anchor(&self, key: &str, entry: AuditEntry) -> Result<bool, BrokerError> {
        let key = key.to_owned();
        self.change(entry, move |records| records.delete(Table::Anchors, &key))
    }

    pub(crate) fn anchors(&self, prefix: &str) -> Result<Vec<(String, AnchorState)>, BrokerError> {
        self.view(|records| {
            let rows = records.list(Table::Anchors, prefix, None, super::MOST_ROWS)?;
            rows.into_iter()
                .map(|(key, bytes)| {
                    let state = state(&key, bytes.expose())?;
                    Ok((key, state))
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_follow_forwards_only() {
        let at = |fence, sequence| AnchorState { disk: [1; 16], fence, sequence, root: [0; 32] };
        assert!(follows(None, &at(5, 5)));
        assert!(follows(Some(&at(1, 1)), &at(1, 2)) && follows(Some(&at(1, 1)), &at(2, 1)));
        for backwards in [at(1, 1), at(1, 0), at(0, 9), at(2, 0)] {
            assert!(!follows(Some(&at(1, 1)), &backwards), "{backwards:?}");
        }
        assert!(!follows(Some(&at(1, 1)), &AnchorState { disk: [2; 16], ..at(1, 2) }));
    }
}

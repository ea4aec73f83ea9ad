//! An anchor in memory.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use nacre_core::{Anchor, AnchorError, AnchorState};

use super::store::SimStore;

#[derive(Default)]
struct State {
    /// What it held before anything was recorded.
    start: Option<AnchorState>,
    /// What it was moved on to, each with the point of the store's recording.
    moves: Vec<(usize, AnchorState)>,
    failing: bool,
}

/// An anchor that compares and swaps in memory, and remembers all that it ever held.
pub struct MemoryAnchor {
    beside: Option<Arc<SimStore>>,
    state: Mutex<State>,
}

impl MemoryAnchor {
    /// An empty one that knows of no store.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { beside: None, state: Mutex::default() })
    }

    /// One that holds `start`, and notes at which point of the store's recording it was moved on.
    pub fn beside(store: &Arc<SimStore>, start: Option<AnchorState>) -> Arc<Self> {
        let state = State { start, ..State::default() };
        Arc::new(Self { beside: Some(Arc::clone(store)), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What it holds now.
    pub fn now(&self) -> Option<AnchorState> {
        let state = self.state();
        state.moves.last().map(|(_, state)| *state).or(state.start)
    }

    /// How often it was moved on.
    pub fn moves(&self) -> usize {
        self.state().moves.len()
    }

    /// Lets everything fail, or nothing.
    pub fn set_failing(&self, failing: bool) {
        self.state().failing = failing;
    }

    /// What it may hold after a crash at a point of the recording: what it was moved on to after the last event before the crash may
    /// or may not be there.
    pub fn at(&self, point: usize) -> Vec<Option<AnchorState>> {
        let state = self.state();
        let before = state.moves.iter().rev().find(|(at, _)| *at < point).map(|(_, state)| *state).or(state.start);
        let during = state.moves.iter().filter(|(at, _)| *at == point).map(|(_, state)| Some(*state));
        std::iter::once(before).chain(during).collect()
    }

    fn fail(&self, what: &str) -> Result<(), AnchorError> {
        if !self.state().failing {
            return Ok(());
        }
        let source = Arc::new(io::Error::other("a fault that the test ordered"));
        Err(AnchorError::Failed { anchor: self.describe(), what: what.to_owned(), source })
    }
}

impl Anchor for MemoryAnchor {
    fn read(&self) -> Result<Option<AnchorState>, AnchorError> {
        self.fail("reading it")?;
        Ok(self.now())
    }

    fn advance(&self, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), AnchorError> {
        self.fail("moving it on")?;
        let point = self.beside.as_ref().map_or(0, |store| store.position());
        let mut state = self.state();
        let held = state.moves.last().map(|(_, state)| *state).or(state.start);
        if held.as_ref() != expected {
            let (found_fence, found_sequence) = held.map_or((0, 0), |held| (held.fence, held.sequence));
            return Err(AnchorError::Fenced { anchor: "the test's anchor".to_owned(), found_fence, found_sequence });
        }
        state.moves.push((point, *next));
        Ok(())
    }

    fn describe(&self) -> String {
        "the test's anchor".to_owned()
    }

    fn promise(&self) -> String {
        "it lasts as long as the test".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::BlockStore as _;

    use super::*;

    #[test]
    fn it_swaps_only_what_was_expected_and_knows_when() {
        let store = SimStore::new(1 << 16);
        let anchor = MemoryAnchor::beside(&store, None);
        let state = |sequence| AnchorState { disk: [1; 16], fence: 1, sequence, root: [2; 32] };
        anchor.advance(None, &state(1)).unwrap();
        assert!(matches!(anchor.advance(None, &state(2)), Err(AnchorError::Fenced { found_sequence: 1, .. })));
        store.flush().unwrap();
        anchor.advance(Some(&state(1)), &state(2)).unwrap();
        assert_eq!(anchor.at(0), [None, Some(state(1))]);
        assert_eq!(anchor.at(1), [Some(state(1)), Some(state(2))]);
        assert_eq!(anchor.at(2), [Some(state(2))]);
        anchor.set_failing(true);
        assert!(anchor.read().is_err());
        assert_eq!(anchor.moves(), 2);
    }
}

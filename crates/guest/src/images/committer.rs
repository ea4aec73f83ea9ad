//! Makes finished layers durable and visible, in groups: layers that end while a sync is under way share the next one.

use std::{sync::mpsc, thread};

use crate::store::{LayerGuard, LayerRecord, Staging, Store, StoreError};

type Item = (usize, Staging, LayerRecord);

/// Takes finished layers from several threads.
pub(super) struct Committer<'scope> {
    sender: mpsc::Sender<Item>,
    thread: thread::ScopedJoinHandle<'scope, Result<Vec<(usize, LayerGuard)>, StoreError>>,
}

impl<'scope> Committer<'scope> {
    pub(super) fn start<'env>(scope: &'scope thread::Scope<'scope, 'env>, store: &'env Store) -> Self {
        let (sender, receiver) = mpsc::channel::<Item>();
        let thread = scope.spawn(move || {
            let mut guards = Vec::new();
            while let Ok(first) = receiver.recv() {
                let group: Vec<Item> = std::iter::once(first).chain(receiver.try_iter()).collect();
                let numbers: Vec<usize> = group.iter().map(|(number, ..)| *number).collect();
                let layers = group.into_iter().map(|(_, staging, layer)| (staging, layer)).collect();
                guards.extend(numbers.into_iter().zip(store.commit_layers(layers)?));
            }
            Ok(guards)
        });
        Self { sender, thread }
    }

    /// A handle for one more thread.
    pub(super) fn sender(&self) -> mpsc::Sender<Item> {
        self.sender.clone()
    }

    /// Waits until all that was sent is durable and visible.
    pub(super) fn finish(self) -> Result<Vec<(usize, LayerGuard)>, StoreError> {
        drop(self.sender);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

//! Group commit: changes that come while a commit is under way share the next one.
//!
//! A commit costs a sync of the disk, or several trips to the database, whatever is in it. So one thread a lane takes all changes that wait, lets
//! them see each other's writes in turn, and commits once. A change that fails leaves nothing and does not disturb the others.

use std::{
    collections::HashMap,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::JoinHandle,
};

use super::{Change, Read, StorageError, Table, Tx, Writes, transaction::Rows};
use crate::BrokerError;

/// Changes in a commit at most.
const MOST: usize = 256;

/// A connection that makes one transaction at a time.
pub(super) trait Writer: Send + 'static {
    /// Runs `changes` in a transaction, applies what they wrote and commits, again and again where other changes come between. They fail
    /// only by a [`StorageError`] of this writer's, which ends the try.
    fn commit(
        &mut self,
        changes: &mut dyn FnMut(&mut dyn Read) -> Result<Writes, StorageError>,
    ) -> Result<(), StorageError>;
}

struct Waiting {
    change: Change,
    answer: SyncSender<Result<(), BrokerError>>,
}

/// The thread of a lane.
pub(super) struct Group {
    queue: Option<Sender<Waiting>>,
    thread: Option<JoinHandle<()>>,
}

impl Group {
    pub(super) fn start(name: &str, mut writer: impl Writer) -> Result<Self, BrokerError> {
        let (queue, waiting) = channel();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || serve(&waiting, &mut writer))
            .map_err(|source| BrokerError::Io { path: name.into(), source })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Waits until a change is committed.
    pub(super) fn update(&self, change: Change) -> Result<(), BrokerError> {
        let (answer, answered) = sync_channel(1);
        let ending = || BrokerError::Storage(StorageError::Ending);
        self.queue.as_ref().ok_or_else(ending)?.send(Waiting { change, answer }).map_err(|_| ending())?;
        answered.recv().map_err(|_| ending())?
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks for what all changes of a commit ask for only once; a transaction sees the same anyway.
struct Remembering<'a> {
    base: &'a mut dyn Read,
    meta: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Read for Remembering<'_> {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        if table != Table::Meta {
            return self.base.get(table, key);
        }
        if let Some(value) = self.meta.get(key) {
            return Ok(value.clone());
        }
        let value = self.base.get(table, key)?;
        self.meta.insert(key.to_vec(), value.clone());
        Ok(value)
    }

    fn list(&mut self, table: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
        self.base.list(table, prefix, after, most)
    }

    fn count(&mut self, table: Table) -> Result<usize, StorageError> {
        self.base.count(table)
    }
}

fn serve(queue: &Receiver<Waiting>, writer: &mut impl Writer) {
    while let Ok(first) = queue.recv() {
        let mut batch = vec![first];
        batch.extend(queue.try_iter().take(MOST - 1));
        let mut results = Vec::new();
        let committed = writer.commit(&mut |base| {
            results.clear();
            let mut writes = Writes::default();
            let mut base = Remembering { base, meta: HashMap::new() };
            for waiting in &mut batch {
                let mut tx = Tx::new(&mut base, Some(&writes));
                match (waiting.change)(&mut tx) {
                    Ok(()) => {
                        let own = tx.into_writes();
                        writes.merge(own);
                        results.push(Ok(()));
                    }
                    // What the database said ends the transaction for everybody.
                    Err(BrokerError::Storage(error)) => return Err(error),
                    Err(error) => results.push(Err(error)),
                }
            }
            Ok(writes)
        });
        let mut results = results.into_iter();
        for waiting in batch {
            let result = match &committed {
                Ok(()) => results.next().unwrap_or(Err(BrokerError::Storage(StorageError::Ending))),
                Err(error) => Err(BrokerError::Storage(error.clone())),
            };
            // Whoever asked may be gone.
            let _ = waiting.answer.send(result);
        }
    }
}

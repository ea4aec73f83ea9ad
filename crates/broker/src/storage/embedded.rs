//! redb: one file, one process.
//!
//! Sessions are kept in memory: a broker that ends ends them, and guests attest again. A nonce that a crash took is never good again, which
//! is the safe side. Everything else is synced before it is acknowledged.

use std::{
    collections::BTreeMap,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use redb::{Database, ReadTransaction, ReadableDatabase as _, ReadableTable, TableDefinition, WriteTransaction};

use super::{
    Change, Lane, Read, Storage, StorageError, Table, Tx, Writes,
    group::{Group, Writer},
    migrate,
    transaction::Rows,
};
use crate::BrokerError;

pub(super) fn definition(table: Table) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
    TableDefinition::new(match table {
        Table::Meta => "2.meta",
        Table::Keys => "2.keys",
        Table::Resources => "2.resources",
        Table::Values => "2.values",
        Table::Policies => "2.policies",
        Table::References => "2.references",
        Table::Platforms => "2.platforms",
        Table::Admins => "2.admins",
        Table::Sessions => "2.sessions",
        Table::Leases => "2.leases",
        Table::Guests => "2.guests",
        Table::Anchors => "2.anchors",
        Table::Audit => "2.audit",
    })
}

pub(crate) fn failed<E: Into<redb::Error>>(doing: &'static str) -> impl Fn(E) -> StorageError {
    move |error| match error.into() {
        redb::Error::Io(io)
            if matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) =>
        {
            StorageError::Full { why: io.to_string() }
        }
        other => StorageError::Failed { doing, source: Arc::new(other) },
    }
}

type Rowset = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
struct Memory(Mutex<Rowset>);

impl Memory {
    fn rows(&self) -> MutexGuard<'_, Rowset> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file. After an error of the disk redb does nothing any more until it is opened anew.
struct File {
    database: RwLock<Option<Database>>,
    path: PathBuf,
}

impl File {
    fn with<T>(&self, act: impl FnOnce(&Database) -> Result<T, StorageError>) -> Result<T, StorageError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        act(database.as_ref().ok_or(StorageError::Ending)?)
    }

    fn open_again(&self) -> Result<(), StorageError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        drop(database.take());
        *database = Some(Database::open(&self.path).map_err(failed("open again"))?);
        Ok(())
    }
}

/// The storage of a broker without replicas.
pub(crate) struct Embedded {
    file: Arc<File>,
    sessions: Arc<Memory>,
    log: Group,
}

impl Embedded {
    pub(crate) fn create(path: &Path) -> Result<Self, BrokerError> {
        let database = Database::create(path).map_err(|e| failed("create")(e))?;
        Self::start(database, path)
    }

    pub(crate) fn open(path: &Path) -> Result<Self, BrokerError> {
        let database = Database::open(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => BrokerError::Running(path.to_owned()),
            other => failed("open")(other).into(),
        })?;
        Self::start(database, path)
    }

    fn start(database: Database, path: &Path) -> Result<Self, BrokerError> {
        migrate::from_1(&database)?;
        let write = database.begin_write().map_err(failed("open"))?;
        for table in Table::ALL {
            write.open_table(definition(table)).map_err(failed("open"))?;
        }
        write.commit().map_err(failed("open"))?;
        let file = Arc::new(File { database: RwLock::new(Some(database)), path: path.to_owned() });
        let sessions = Arc::new(Memory::default());
        let log = Group::start("nacre-commit", Committer { file: file.clone(), sessions: sessions.clone() })?;
        Ok(Self { file, sessions, log })
    }
}

impl Storage for Embedded {
    fn view(&self, look: &mut dyn FnMut(&mut Tx<'_>) -> Result<(), BrokerError>) -> Result<(), BrokerError> {
        let read = self.file.with(|database| database.begin_read().map_err(failed("read")))?;
        look(&mut Tx::new(&mut Snapshot { read: &read, sessions: &self.sessions }, None))
    }

    fn update(&self, lane: Lane, mut change: Change) -> Result<(), BrokerError> {
        if lane == Lane::Log {
            return self.log.update(change);
        }
        // Nothing but memory: under its lock, without waiting for a disk.
        let mut rows = self.sessions.rows();
        let mut base = Locked(&mut rows);
        let mut tx = Tx::new(&mut base, None);
        change(&mut tx)?;
        let writes = tx.into_writes();
        apply_to_memory(&mut rows, &writes);
        Ok(())
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        format!("redb in {}", self.file.path.display())
    }
}

fn apply_to_memory(rows: &mut Rowset, writes: &Writes) {
    for (table, key, value) in writes.iter() {
        match value {
            _ if table != Table::Sessions => {}
            Some(value) => drop(rows.insert(key.to_vec(), value.to_vec())),
            None => drop(rows.remove(key)),
        }
    }
}

struct Committer {
    file: Arc<File>,
    sessions: Arc<Memory>,
}

impl Committer {
    fn attempt(
        &self,
        database: &Database,
        changes: &mut dyn FnMut(&mut dyn Read) -> Result<Writes, StorageError>,
    ) -> Result<(), StorageError> {
        let write = database.begin_write().map_err(failed("begin"))?;
        let writes = changes(&mut Pending { write: &write, sessions: &self.sessions })?;
        for (table, key, value) in writes.iter().filter(|(table, ..)| *table != Table::Sessions) {
            let mut table = write.open_table(definition(table)).map_err(failed("write"))?;
            match value {
                Some(value) => table.insert(key, value).map_err(failed("write"))?,
                None => table.remove(key).map_err(failed("write"))?,
            };
        }
        write.commit().map_err(failed("commit"))?;
        apply_to_memory(&mut self.sessions.rows(), &writes);
        Ok(())
    }
}

impl Writer for Committer {
    fn commit(
        &mut self,
        changes: &mut dyn FnMut(&mut dyn Read) -> Result<Writes, StorageError>,
    ) -> Result<(), StorageError> {
        let committed = self.file.with(|database| self.attempt(database, changes));
        let broken = |source: &Arc<dyn std::error::Error + Send + Sync>| {
            matches!(source.downcast_ref::<redb::Error>(), Some(redb::Error::PreviousIo | redb::Error::Io(_)))
        };
        match committed {
            Err(StorageError::Full { .. }) => {
                self.file.open_again()?;
                committed
            }
            Err(StorageError::Failed { ref source, .. }) if broken(source) => {
                tracing::warn!("the database's file failed: opening it again");
                self.file.open_again()?;
                self.file.with(|database| self.attempt(database, changes))
            }
            other => other,
        }
    }
}

/// Memory under its lock; the other tables are not for this lane.
struct Locked<'a>(&'a mut Rowset);

impl Read for Locked<'_> {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        debug_assert_eq!(table, Table::Sessions);
        Ok(self.0.get(key).cloned())
    }

    fn list(&mut self, _: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
        Ok(range(self.0, prefix, after, most))
    }

    fn count(&mut self, _: Table) -> Result<usize, StorageError> {
        Ok(self.0.len())
    }
}

fn range(rows: &Rowset, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Rows {
    rows.range::<[u8], _>((start(prefix, after), Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(prefix))
        .take(most)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn start<'a>(prefix: &'a [u8], after: Option<&'a [u8]>) -> Bound<&'a [u8]> {
    match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    }
}

/// Reads of a table, be it of a snapshot or of a transaction.
fn rows_of(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    prefix: &[u8],
    after: Option<&[u8]>,
    most: usize,
) -> Result<Rows, StorageError> {
    let mut rows = Vec::new();
    for row in table.range::<&[u8]>((start(prefix, after), Bound::Unbounded)).map_err(failed("read"))?.take(most) {
        let (key, value) = row.map_err(failed("read"))?;
        if !key.value().starts_with(prefix) {
            break;
        }
        rows.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(rows)
}

struct Snapshot<'a> {
    read: &'a ReadTransaction,
    sessions: &'a Memory,
}

impl Read for Snapshot<'_> {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        if table == Table::Sessions {
            return Ok(self.sessions.rows().get(key).cloned());
        }
        let table = self.read.open_table(definition(table)).map_err(failed("read"))?;
        Ok(table.get(key).map_err(failed("read"))?.map(|value| value.value().to_vec()))
    }

    fn list(&mut self, table: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
        if table == Table::Sessions {
            return Ok(range(&self.sessions.rows(), prefix, after, most));
        }
        rows_of(&self.read.open_table(definition(table)).map_err(failed("read"))?, prefix, after, most)
    }

    fn count(&mut self, table: Table) -> Result<usize, StorageError> {
        if table == Table::Sessions {
            return Ok(self.sessions.rows().len());
        }
        let table = self.read.open_table(definition(table)).map_err(failed("read"))?;
        let count = redb::ReadableTableMetadata::len(&table).map_err(failed("read"))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }
}

struct Pending<'a> {
    write: &'a WriteTransaction,
    sessions: &'a Memory,
}

impl Read for Pending<'_> {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        if table == Table::Sessions {
            return Ok(self.sessions.rows().get(key).cloned());
        }
        let table = self.write.open_table(definition(table)).map_err(failed("read"))?;
        Ok(table.get(key).map_err(failed("read"))?.map(|value| value.value().to_vec()))
    }

    fn list(&mut self, table: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
        if table == Table::Sessions {
            return Ok(range(&self.sessions.rows(), prefix, after, most));
        }
        rows_of(&self.write.open_table(definition(table)).map_err(failed("read"))?, prefix, after, most)
    }

    fn count(&mut self, table: Table) -> Result<usize, StorageError> {
        if table == Table::Sessions {
            return Ok(self.sessions.rows().len());
        }
        let table = self.write.open_table(definition(table)).map_err(failed("read"))?;
        let count = redb::ReadableTableMetadata::len(&table).map_err(failed("read"))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }
}

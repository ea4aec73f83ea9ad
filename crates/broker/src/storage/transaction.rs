//! What a change sees: what was committed, what changes of the same commit wrote before it, what it wrote itself.

use std::collections::BTreeMap;

use super::{StorageError, Table};

/// Rows: keys with their values, ascending.
pub(crate) type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// What was committed.
pub(crate) trait Read {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError>;

    /// Rows whose keys begin with `prefix` and come after `after`, ascending, `most` at most.
    fn list(&mut self, table: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError>;

    /// How many rows a table has.
    fn count(&mut self, table: Table) -> Result<usize, StorageError>;
}

/// What is to be written: a value, or nothing where the row goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writes(BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>);

impl Writes {
    pub(crate) fn merge(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    /// Of one table after the other: key and value.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Table, &[u8], Option<&[u8]>)> {
        self.0.iter().map(|((table, key), value)| (*table, key.as_slice(), value.as_deref()))
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<Option<&[u8]>> {
        self.0.get(&(table, key.to_vec())).map(Option::as_deref)
    }

    fn of(&self, table: Table, from: &[u8]) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.0
            .range((table, from.to_vec())..)
            .take_while(move |((of, _), _)| *of == table)
            .map(|((_, key), value)| (key.as_slice(), value.as_deref()))
    }
}

/// A transaction of one caller.
pub(crate) struct Tx<'a> {
    base: &'a mut dyn Read,
    before: Option<&'a Writes>,
    own: Writes,
}

impl<'a> Tx<'a> {
    pub(crate) fn new(base: &'a mut dyn Read, before: Option<&'a Writes>) -> Self {
        Self { base, before, own: Writes::default() }
    }

    pub(crate) fn into_writes(self) -> Writes {
        self.own
    }

    pub(crate) fn get(&mut self, table: Table, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, StorageError> {
        let key = key.as_ref();
        let written = self.own.get(table, key).or_else(|| self.before.and_then(|before| before.get(table, key)));
        match written {
            Some(value) => Ok(value.map(<[u8]>::to_vec)),
            None => self.base.get(table, key),
        }
    }

    pub(crate) fn put(&mut self, table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.own.0.insert((table, key.into()), Some(value.into()));
    }

    pub(crate) fn delete(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.own.0.insert((table, key.into()), None);
    }

    /// Rows whose keys begin with `prefix` and come after `after`, ascending, `most` at most.
    pub(crate) fn list(
        &mut self,
        table: Table,
        prefix: impl AsRef<[u8]>,
        after: Option<&[u8]>,
        most: usize,
    ) -> Result<Rows, StorageError> {
        let prefix = prefix.as_ref();
        let layers = self.before.into_iter().chain([&self.own]);
        let mut written: BTreeMap<Vec<u8>, Option<Vec<u8>>> = BTreeMap::new();
        for layer in layers {
            for (key, value) in layer.of(table, prefix).take_while(|(key, _)| key.starts_with(prefix)) {
                if after.is_none_or(|after| key > after) {
                    written.insert(key.to_vec(), value.map(<[u8]>::to_vec));
                }
            }
        }
        // As many more as were removed in the meantime.
        let removed = written.values().filter(|value| value.is_none()).count();
        let mut rows: BTreeMap<_, _> =
            self.base.list(table, prefix, after, most.saturating_add(removed))?.into_iter().collect();
        for (key, value) in written {
            match value {
                Some(value) => rows.insert(key, value),
                None => rows.remove(&key),
            };
        }
        Ok(rows.into_iter().take(most).collect())
    }

    /// How many rows a table has; rows that changes of the same commit wrote are counted as new ones.
    pub(crate) fn count(&mut self, table: Table) -> Result<usize, StorageError> {
        let mut count = self.base.count(table)?;
        for layer in self.before.into_iter().chain([&self.own]) {
            for (_, value) in layer.of(table, b"") {
                count = if value.is_some() { count.saturating_add(1) } else { count.saturating_sub(1) };
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(BTreeMap<Vec<u8>, Vec<u8>>);

    impl Read for Fixed {
        fn get(&mut self, _: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
            Ok(self.0.get(key).cloned())
        }

        fn list(&mut self, _: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
            let fits = |key: &&Vec<u8>| key.starts_with(prefix) && after.is_none_or(|after| key.as_slice() > after);
            Ok(self.0.iter().filter(|(key, _)| fits(key)).take(most).map(|(k, v)| (k.clone(), v.clone())).collect())
        }

        fn count(&mut self, _: Table) -> Result<usize, StorageError> {
            Ok(self.0.len())
        }
    }

    #[test]
    fn a_change_sees_what_was_written_before_it() {
        let mut base = Fixed(["a1", "a2", "a3", "b1"].map(|key| (key.into(), b"base".to_vec())).into());
        let mut before = Writes::default();
        before.0.insert((Table::Meta, b"a2".to_vec()), None);
        before.0.insert((Table::Meta, b"a4".to_vec()), Some(b"before".to_vec()));
        before.0.insert((Table::Audit, b"a5".to_vec()), Some(b"elsewhere".to_vec()));
        let mut tx = Tx::new(&mut base, Some(&before));
        tx.put(Table::Meta, "a3", "own");
        tx.delete(Table::Meta, "a4");
        let keys = |rows: Rows| rows.into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect::<Vec<_>>();
        assert_eq!(tx.get(Table::Meta, "a1").unwrap().unwrap(), b"base");
        assert_eq!(tx.get(Table::Meta, "a3").unwrap().unwrap(), b"own");
        assert_eq!((tx.get(Table::Meta, "a2").unwrap(), tx.get(Table::Meta, "a4").unwrap()), (None, None));
        assert_eq!(keys(tx.list(Table::Meta, "a", None, 10).unwrap()), ["a1", "a3"]);
        assert_eq!(keys(tx.list(Table::Meta, "a", Some(b"a1"), 10).unwrap()), ["a3"]);
        assert_eq!(keys(tx.list(Table::Meta, "", None, 2).unwrap()), ["a1", "a3"]);
        tx.put(Table::Meta, "a0", "new");
        assert_eq!(keys(tx.list(Table::Meta, "a", None, 1).unwrap()), ["a0"]);
    }
}

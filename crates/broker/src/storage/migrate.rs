//! The embedded format 1 becomes format 2: other tables, and values that are sealed one and all. The tables are moved here; values that are still
//! plain, or sealed as format 1 did, are named in `meta/migrate`, and sealed when the master key is there ([`crate::store`]).

use redb::{Database, ReadableTable as _, TableDefinition, TableHandle as _};

use super::{StorageError, Table, embedded::failed};
use crate::BrokerError;

/// The format that this version makes.
pub(crate) const FORMAT: &str = "nacre-broker-2";
const FORMAT_1: &str = "nacre-broker-1";

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const RESOURCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("resources");
const AUDIT: TableDefinition<'_, u64, &str> = TableDefinition::new("audit");
const TEXTS: [(TableDefinition<'_, &str, &str>, Table); 3] = [
    (TableDefinition::new("policies"), Table::Policies),
    (TableDefinition::new("references"), Table::References),
    (TableDefinition::new("platforms"), Table::Platforms),
];

/// Moves the tables of a database of format 1, in one transaction; does nothing to others.
pub(super) fn from_1(database: &Database) -> Result<(), BrokerError> {
    let write = database.begin_write().map_err(failed("migrate"))?;
    let old = write.list_tables().map_err(failed("migrate"))?.any(|table| table.name() == "meta");
    if !old {
        return Ok(write.abort().map_err(failed("migrate"))?);
    }
    let format = {
        let meta = write.open_table(META).map_err(failed("migrate"))?;
        meta.get("format").map_err(failed("migrate"))?.map(|text| text.value().to_owned())
    };
    if format.as_deref() != Some(FORMAT_1) {
        return Err(BrokerError::Damaged {
            what: "its format".into(),
            why: format!(
                "{format:?} is neither {FORMAT_1} nor {FORMAT}: a newer version made it, or it is no broker's"
            ),
        });
    }
    tracing::info!("the broker's database is of format 1 and becomes format 2");
    let put = |table: Table, key: &[u8], value: &[u8]| -> Result<(), StorageError> {
        let mut table = write.open_table(super::embedded::definition(table)).map_err(failed("migrate"))?;
        table.insert(key, value).map_err(failed("migrate"))?;
        Ok(())
    };
    for (old, new) in TEXTS {
        let table = write.open_table(old).map_err(failed("migrate"))?;
        for row in table.iter().map_err(failed("migrate"))? {
            let (key, value) = row.map_err(failed("migrate"))?;
            put(new, key.value().as_bytes(), value.value().as_bytes())?;
        }
    }
    {
        let table = write.open_table(RESOURCES).map_err(failed("migrate"))?;
        for row in table.iter().map_err(failed("migrate"))? {
            let (key, value) = row.map_err(failed("migrate"))?;
            put(Table::Values, key.value().as_bytes(), value.value())?;
        }
        let table = write.open_table(AUDIT).map_err(failed("migrate"))?;
        for row in table.iter().map_err(failed("migrate"))? {
            let (key, value) = row.map_err(failed("migrate"))?;
            put(Table::Audit, &key.value().to_be_bytes(), value.value().as_bytes())?;
        }
    }
    put(Table::Meta, b"migrate", FORMAT_1.as_bytes())?;
    write.delete_table(META).map_err(failed("migrate"))?;
    write.delete_table(RESOURCES).map_err(failed("migrate"))?;
    write.delete_table(AUDIT).map_err(failed("migrate"))?;
    for (old, _) in TEXTS {
        write.delete_table(old).map_err(failed("migrate"))?;
    }
    Ok(write.commit().map_err(failed("migrate"))?)
}

//! What format 1 kept plain, or sealed by the master key itself, is sealed as format 2 does: once, in one transaction.

use nacre_core::{Digest, SecretBytes};

use super::{
    AuditEntry, MOST_ROWS, Records, audit,
    config::touch,
    keyring::Keys,
    resources::{Resource, ResourceKind, value_key},
};
use crate::{
    BrokerError, MasterKey,
    admin::now,
    storage::{Database, Lane, Table},
};

/// Whether the master key is the one that sealed a database of format 1: before anything is written with it.
pub(super) fn check_master(database: &Database, master: &dyn MasterKey) -> Result<(), BrokerError> {
    database.view(|tx| {
        if tx.get(Table::Meta, "migrate")?.is_some()
            && let Some((key, sealed)) = tx.list(Table::Values, "", None, 1)?.first()
        {
            master.open_format_1(&aad_1(&String::from_utf8_lossy(key)), sealed)?;
        }
        Ok(())
    })
}

fn aad_1(path: &str) -> Vec<u8> {
    format!("nacre-broker resource {path}").into_bytes()
}

pub(super) fn seal_what_is_plain(database: &Database, keys: &std::sync::Arc<Keys>) -> Result<(), BrokerError> {
    if database.view(|tx| Ok(tx.get(Table::Meta, "migrate")?))?.is_none() {
        return Ok(());
    }
    let (keys, master) = (keys.clone(), keys.master());
    database.update(Lane::Log, move |tx| {
        let mut records = Records { tx, keys: &keys };
        for table in [Table::Policies, Table::References, Table::Platforms] {
            for (key, plain) in records.tx.list(table, "", None, MOST_ROWS)? {
                records.put(table, key, &plain)?;
            }
        }
        for (key, sealed) in records.tx.list(Table::Values, "", None, usize::MAX)? {
            let path = String::from_utf8_lossy(&key).into_owned();
            let value = SecretBytes::new(master.open_format_1(&aad_1(&path), &sealed)?);
            let resource = Resource {
                kind: ResourceKind::Opaque,
                version: 1,
                versions: vec![1],
                changed: now(),
                ..Resource::default()
            };
            records.put(Table::Values, value_key(&path, 1), value.expose())?;
            records.put_json(Table::Resources, &path, &resource)?;
            records.tx.delete(Table::Values, key);
        }
        let log = records.tx.list(Table::Audit, "", None, usize::MAX)?;
        if let Some((number, text)) = log.last() {
            let number = number.as_slice().try_into().map(u64::from_be_bytes).unwrap_or_default();
            audit::set_head(records.tx, &audit::AuditHead { number, hash: Digest::sha256(text).hex() })?;
        }
        touch(records.tx)?;
        records.tx.delete(Table::Meta, "migrate");
        let entry = AuditEntry { event: "database migrated".into(), actor: "local".into(), ..AuditEntry::default() };
        audit::append(records.tx, AuditEntry { detail: "format 1 to 2".into(), ..entry }).map(drop)
    })
}

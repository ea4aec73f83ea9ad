//! `nacre broker audit`.

use anyhow::Context as _;
use nacre_broker::{AuditEntry, AuditHead};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Admin;
use crate::{args::broker::BrokerAt, exit::Damaged, output};

/// Entries after a number, page by page: the broker checks the chain of each page, and that it goes on from the one before.
fn walk(admin: &Admin, after: u64, mut take: impl FnMut(Vec<AuditEntry>)) -> anyhow::Result<u64> {
    let mut last = after;
    loop {
        let more = match admin {
            Admin::Local(broker) => broker.audit(last, 1000)?,
            Admin::Remote(client) => client.audit(last)?,
        };
        match more.last() {
            None => return Ok(last),
            Some(entry) => last = entry.number,
        }
        take(more);
    }
}

/// Checks the whole chain here, and not only what the broker says of it.
pub(super) fn verify(head: Option<&str>, json: bool, at: &BrokerAt) -> anyhow::Result<()> {
    let admin = Admin::of(at)?;
    let known = head.map(parse).transpose()?;
    let (mut previous, mut broken, mut count) = (None::<AuditHead>, None, 0u64);
    let hash_of = |number| match &admin {
        Admin::Local(broker) => Ok(broker.audit_hash(number)?.map(|hash| AuditHead { number, hash })),
        Admin::Remote(client) => anyhow::Ok(Some(client.audit_head(Some(number))?)),
    };
    walk(&admin, 0, |entries| {
        for entry in entries {
            count += 1;
            if entry.number != count && broken.is_none() {
                broken = Some(count);
            }
            // As it is stored: members in the order of the type, without spaces.
            let text = serde_json::to_string(&entry).unwrap_or_default();
            if previous.as_ref().is_some_and(|before| before.hash != entry.previous) && broken.is_none() {
                broken = Some(entry.number);
            }
            previous =
                Some(AuditHead { number: entry.number, hash: nacre_core::Digest::sha256(text.as_bytes()).hex() });
        }
    })?;
    if let Some(number) = broken {
        return Err(Damaged(format!("audit entry {number} does not follow from the one before it")).into());
    }
    if let Some(known) = &known {
        let there = if known.number <= count { hash_of(known.number)? } else { None };
        if there.as_ref() != Some(known) {
            let why = "the log was cut or rewritten since then";
            return Err(Damaged(format!("audit entry {} is not what it was: {why}", known.number)).into());
        }
    }
    let last = previous.unwrap_or_default();
    if json {
        return output::json(&json!({"entries": count, "head": format!("{}:{}", last.number, last.hash)}));
    }
    output::line(format_args!("{count} entries, each follows from the one before"))?;
    Ok(output::line(format_args!("{}:{}", last.number, last.hash))?)
}

fn parse(text: &str) -> anyhow::Result<AuditHead> {
    let (number, hash) =
        text.split_once(':').with_context(|| format!("--head {text}: NUMBER:HASH, as verify prints it"))?;
    let number = number.parse().with_context(|| format!("--head {text}: the number"))?;
    Ok(AuditHead { number, hash: hash.to_owned() })
}

pub(super) fn show(json: bool, after: u64, at: &BrokerAt) -> anyhow::Result<()> {
    let admin = Admin::of(at)?;
    let mut entries: Vec<AuditEntry> = Vec::new();
    walk(&admin, after, |more| entries.extend(more))?;
    if json {
        return output::json(&entries);
    }
    let row = |entry: &AuditEntry| {
        let time = OffsetDateTime::from_unix_timestamp(entry.time).ok().and_then(|time| time.format(&Rfc3339).ok());
        let event = if entry.simulated { format!("{} (simulated)", entry.event) } else { entry.event.clone() };
        vec![
            entry.number.to_string(),
            time.unwrap_or_default(),
            event,
            entry.actor.clone(),
            entry.subject.clone(),
            entry.detail.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    Ok(output::table(&["NUMBER", "TIME", "EVENT", "ACTOR", "SUBJECT", "DETAIL"], &rows)?)
}

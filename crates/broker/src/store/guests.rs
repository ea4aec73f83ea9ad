//! What was found of guests: of those that attested, and of those that were refused to. For people; nothing is decided by it.
//!
//! ```text
//! guests  a<number, 20 digits>   of one that attested: number of its audit entry (u64 BE) ‖ JSON [`GuestRecord`]
//!         r<number, 20 digits>   of one that was refused
//! meta    guests                 {"attested": {"first","next"}, "refused": {"first","next"}}
//! ```
//!
//! Two rings, so that nobody can push attested guests out by being refused. A record is written in the transaction of its audit entry,
//! and the oldest leaves in it: numbers have no gaps, so that neither has to be read nor counted. A record is bounded: what of it is too long is cut.

use std::{collections::BTreeMap, sync::Arc};

use nacre_attest::ear::Ear;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Records, ReferenceValue, Store, from_json};
use crate::{BrokerError, chain::Refusal, storage::Table};

/// Bytes of a record at most: what is longer is kept without its evidence.
const LONGEST: usize = 64 * 1024;
/// Values of a reference value that a record has.
const MOST_VALUES: usize = 16;
/// Characters of a text in a record that is too long.
const LONGEST_TEXT: usize = 300;
/// Records that leave with one that comes, where there are too many.
const LEAVING: u64 = 16;
const META: &str = "guests";

/// Which guests.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestList {
    /// Those whose evidence held, whatever it is worth.
    #[default]
    Attested,
    /// Those that were refused to attest.
    Refused,
}

impl GuestList {
    fn letter(self) -> char {
        match self {
            Self::Attested => 'a',
            Self::Refused => 'r',
        }
    }

    /// Its name: `attested`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attested => "attested",
            Self::Refused => "refused",
        }
    }
}

/// A record's name: `a17`, `r2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestId {
    pub(crate) list: GuestList,
    pub(crate) number: u64,
}

impl std::fmt::Display for GuestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.list.letter(), self.number)
    }
}

impl GuestId {
    /// Reads a name; `None` for what is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let number = text.get(1..).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
        let list =
            [GuestList::Attested, GuestList::Refused].into_iter().find(|list| text.starts_with(list.letter()))?;
        Some(Self { list, number })
    }

    fn key(self) -> String {
        format!("{}{:020}", self.list.letter(), self.number)
    }
}

/// What was found of a guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct GuestRecord {
    /// When, in seconds since 1970.
    pub(crate) time: i64,
    pub(crate) tee: String,
    /// The thumbprint of its TEE key; of one that was refused, by its own word.
    pub(crate) guest: String,
    pub(crate) measurement: String,
    pub(crate) simulated: bool,
    pub(crate) outcome: Outcome,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Attested(Attested),
    Refused(Box<Refusal>),
}

/// The appraisal of a guest whose evidence held.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Attested {
    /// The policy that appraised it, with the start of its digest.
    pub(crate) policy: String,
    pub(crate) ear: Arc<Ear>,
    /// The reference values that the policy asked for, as they were then; `None` where there was none.
    pub(crate) expected: BTreeMap<String, Option<Expectation>>,
}

/// A reference value, as an appraisal found it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Expectation {
    /// Some of its values, the one that was found among them.
    pub(crate) values: Vec<Value>,
    /// How many there are.
    pub(crate) count: usize,
    pub(crate) expires: i64,
    /// Who signed it.
    pub(crate) issuer: String,
}

impl Expectation {
    /// A reference value that a policy asked for, in the face of what was found.
    pub(crate) fn of(value: &ReferenceValue, found: Option<&Value>) -> Self {
        let matching = value.values.iter().filter(|value| Some(*value) == found).take(1);
        let others = value.values.iter().filter(|value| Some(*value) != found);
        Self {
            values: matching.chain(others).take(MOST_VALUES).cloned().collect(),
            count: value.values.len(),
            expires: value.expires,
            issuer: value.issuer.clone(),
        }
    }
}

/// A record that is ready to be written.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    list: GuestList,
    most: u64,
    text: Arc<[u8]>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Ring {
    first: u64,
    next: u64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Rings {
    attested: Ring,
    refused: Ring,
}

impl Rings {
    fn of(&mut self, list: GuestList) -> &mut Ring {
        match list {
            GuestList::Attested => &mut self.attested,
            GuestList::Refused => &mut self.refused,
        }
    }
}

fn rings(records: &mut Records<'_, '_>) -> Result<Rings, BrokerError> {
    match records.tx.get(Table::Meta, META)? {
        None => Ok(Rings::default()),
        Some(bytes) => from_json(Table::Meta, META.as_bytes(), &bytes),
    }
}

impl GuestRecord {
    /// As it is kept, beside `most` of its kind; 0: none is.
    pub(crate) fn kept(self, most: usize) -> Result<Kept, BrokerError> {
        let text = |record: &Self| serde_json::to_vec(record).map_err(|e| BrokerError::Invalid(e.to_string()));
        let list = match self.outcome {
            Outcome::Attested(_) => GuestList::Attested,
            Outcome::Refused(_) => GuestList::Refused,
        };
        let mut bytes = text(&self)?;
        if bytes.len() > LONGEST {
            let mut record = self;
            record.shorten(false);
            bytes = text(&record)?;
            if bytes.len() > LONGEST {
                record.shorten(true);
                bytes = text(&record)?;
            }
        }
        Ok(Kept { list, most: most as u64, text: bytes.into() })
    }

    /// Cuts its texts, or leaves its evidence and what was expected of it out.
    fn shorten(&mut self, leave_out: bool) {
        let Outcome::Attested(Attested { ear, expected, .. }) = &mut self.outcome else { return };
        let mut short = Ear::clone(ear);
        for module in short.submods.values_mut() {
            match leave_out {
                true => module.evidence = serde_json::json!({"nacre.cut": true}),
                false => cut(&mut module.evidence),
            }
        }
        match leave_out {
            true => expected.clear(),
            false => expected.values_mut().flatten().flat_map(|known| &mut known.values).for_each(cut),
        }
        *ear = Arc::new(short);
    }
}

fn cut(value: &mut Value) {
    match value {
        Value::String(text) if text.len() > LONGEST_TEXT => {
            *text = text.chars().take(LONGEST_TEXT).chain(['…']).collect();
        }
        Value::Array(values) => values.iter_mut().for_each(cut),
        Value::Object(members) => members.values_mut().for_each(cut),
        _ => {}
    }
}

impl Kept {
    /// Writes it in the transaction of its audit entry.
    pub(super) fn put(&self, records: &mut Records<'_, '_>, audit: u64) -> Result<(), BrokerError> {
        let mut rings = rings(records)?;
        let ring = rings.of(self.list);
        let key = |number| GuestId { list: self.list, number }.key();
        if self.most > 0 {
            records.put(Table::Guests, key(ring.next), &[&audit.to_be_bytes(), &*self.text].concat())?;
            ring.next += 1;
        }
        // One a time, but for the first ones after the limit was lowered.
        for _ in 0..LEAVING {
            if ring.next.saturating_sub(ring.first) <= self.most {
                break;
            }
            records.tx.delete(Table::Guests, key(ring.first));
            ring.first += 1;
        }
        let text = serde_json::to_vec(&rings).map_err(|e| BrokerError::Invalid(e.to_string()))?;
        records.tx.put(Table::Meta, META, text);
        Ok(())
    }
}

impl Store {
    /// Records before number `before`, the newest first, with the numbers of their audit entries.
    pub(crate) fn guests(
        &self,
        list: GuestList,
        before: Option<u64>,
        most: usize,
    ) -> Result<Vec<(GuestId, u64, GuestRecord)>, BrokerError> {
        self.view(|records| {
            let ring = *rings(records)?.of(list);
            let end = before.unwrap_or(ring.next).min(ring.next);
            let from = end.saturating_sub(most as u64).max(ring.first);
            let mut found = Vec::new();
            let after = from.checked_sub(1).map(|number| GuestId { list, number }.key());
            let count = usize::try_from(end.saturating_sub(from)).unwrap_or_default();
            let rows =
                records.list(Table::Guests, &list.letter().to_string(), after.as_deref().map(str::as_bytes), count)?;
            for (key, bytes) in rows {
                let id = GuestId::parse(&key).ok_or_else(|| damaged(&key))?;
                // What came or left since the ring was read.
                if (from..end).contains(&id.number) {
                    let (audit, record) = read(&key, bytes.expose())?;
                    found.push((id, audit, record));
                }
            }
            found.reverse();
            Ok(found)
        })
    }

    /// A record, with the number of its audit entry.
    pub(crate) fn guest(&self, id: GuestId) -> Result<Option<(u64, GuestRecord)>, BrokerError> {
        let key = id.key();
        self.view(|records| {
            let found = records.get(Table::Guests, &key)?;
            found.map(|bytes| read(&key, bytes.expose())).transpose()
        })
    }
}

fn damaged(key: &str) -> BrokerError {
    BrokerError::Damaged { what: format!("guests {key}"), why: "it is no record of a guest".into() }
}

fn read(key: &str, bytes: &[u8]) -> Result<(u64, GuestRecord), BrokerError> {
    let (audit, text) = bytes.split_first_chunk::<8>().ok_or_else(|| damaged(key))?;
    Ok((u64::from_be_bytes(*audit), from_json(Table::Guests, key.as_bytes(), text)?))
}

//! Sessions: a nonce each, that works once, whatever becomes of the attempt, at whichever replica.
//!
//! ```text
//! auth ─▶ challenged{nonce} ──attest begins──▶ spent ──evidence held──▶ attested{result}
//! sessions  opened (µs since 1970, u56 BE) ‖ 32 random bytes   JSON [`Session`]; a guest knows the key in base64url
//! ```
//!
//! Keys in the order in which sessions came are, since all live equally long, in the order in which they end. Their number is bounded; the oldest goes
//! first. It is counted when there may be no room any more, and every second, since replicas do not know of each other's.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::ear::Ear;
use nacre_core::{SecretArray, jose::b64};
use serde::{Deserialize, Serialize};

use super::{AuditEntry, Records, Store, audit, guests::Kept};
use crate::{
    ApiError, BrokerError,
    storage::{Lane, Table},
};

/// Sessions that are removed at a time.
const SWEEP: usize = 256;
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Bytes of a session's key.
const KEY: usize = 39;

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Challenged { nonce: String },
    Spent,
    Attested(Arc<Ear>),
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Session {
    tee: String,
    state: State,
}

/// The sessions of all replicas.
pub(crate) struct Sessions {
    store: Arc<Store>,
    lifetime: Duration,
    most: usize,
    room: Mutex<Room>,
}

struct Room {
    left: usize,
    counted: Instant,
}

/// A new session's id and nonce.
pub(crate) struct Opened {
    pub(crate) id: String,
    pub(crate) nonce: String,
}

fn unknown() -> ApiError {
    ApiError::new(401, "SessionNotFound", "there is no such session, or it has ended: start with /kbs/v0/auth")
}

fn now_micros() -> u64 {
    u64::try_from(time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000).unwrap_or_default()
}

fn opened_at(key: &[u8]) -> u64 {
    key.first_chunk::<7>().map_or(0, |time| time.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

impl Sessions {
    pub(crate) fn new(store: Arc<Store>, lifetime: Duration, most: usize) -> Self {
        let room = Mutex::new(Room { left: 0, counted: Instant::now() });
        Self { store, lifetime, most, room }
    }

    pub(crate) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// The key of a session that has not ended.
    fn key(&self, id: &str) -> Result<Vec<u8>, ApiError> {
        let key = b64::decode(id).ok().filter(|key| key.len() == KEY).ok_or_else(unknown)?;
        if self.has_ended(&key) { Err(unknown()) } else { Ok(key) }
    }

    fn has_ended(&self, key: &[u8]) -> bool {
        let lifetime = u64::try_from(self.lifetime.as_micros()).unwrap_or(u64::MAX);
        now_micros() >= opened_at(key).saturating_add(lifetime)
    }

    pub(crate) fn open(&self, tee: &str) -> Result<Opened, ApiError> {
        let mut key = now_micros().to_be_bytes()[1..].to_vec();
        key.extend_from_slice(SecretArray::<32>::random().expose());
        let nonce = BASE64_STANDARD.encode(SecretArray::<32>::random().expose());
        let opened = Opened { id: b64::encode(&key), nonce: nonce.clone() };
        let session = Session { tee: tee.to_owned(), state: State::Challenged { nonce } };
        let count = {
            let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
            let count = room.left == 0 || (self.store.is_shared() && room.counted.elapsed() >= COUNT_EVERY);
            room.left = room.left.saturating_sub(1);
            if count {
                room.counted = Instant::now();
            }
            count
        };
        let most = self.most;
        let lifetime = u64::try_from(self.lifetime.as_micros()).unwrap_or(u64::MAX);
        let left = self.store.update(Lane::Sessions, move |records| {
            let left = if count { Some(sweep(records, most, lifetime)?) } else { None };
            records.put_json(Table::Sessions, &key, &session)?;
            Ok(left)
        })?;
        if let Some(left) = left {
            self.room.lock().unwrap_or_else(PoisonError::into_inner).left = left;
        }
        Ok(opened)
    }

    /// Takes the nonce of a session; there is no second time.
    pub(crate) fn spend(&self, id: &str) -> Result<(String, String), ApiError> {
        let key = self.key(id)?;
        let spent = self.store.update(Lane::Sessions, move |records| {
            let Some(mut session) = records.get_json::<Session>(Table::Sessions, &key)? else { return Ok(None) };
            Ok(Some(match std::mem::replace(&mut session.state, State::Spent) {
                State::Challenged { nonce } => {
                    records.put_json(Table::Sessions, &key, &session)?;
                    Some((session.tee, nonce))
                }
                _ => None,
            }))
        })?;
        spent.ok_or_else(unknown)?.ok_or_else(|| {
            ApiError::new(409, "NonceUsed", "this session's nonce was used already: start again with /kbs/v0/auth")
        })
    }

    /// Keeps the result of a session whose evidence held, logs it, and keeps what was found for people.
    pub(crate) fn attested(&self, id: &str, ear: Arc<Ear>, entry: AuditEntry, guest: Kept) -> Result<(), ApiError> {
        let key = self.key(id)?;
        Ok(self.store.update(Lane::Log, move |records| {
            if let Some(mut session) = records.get_json::<Session>(Table::Sessions, &key)? {
                session.state = State::Attested(ear.clone());
                records.put_json(Table::Sessions, &key, &session)?;
            }
            let number = audit::append(records.tx, entry.clone())?;
            guest.put(records, number)
        })?)
    }

    /// The result of a session.
    pub(crate) fn ear(&self, id: &str) -> Result<Arc<Ear>, ApiError> {
        let key = self.key(id)?;
        let session = self.store.view(|records| records.get_json::<Session>(Table::Sessions, &key))?;
        match session.ok_or_else(unknown)?.state {
            State::Attested(ear) => Ok(ear),
            _ => Err(ApiError::new(401, "NotAttested", "this session has not attested: POST /kbs/v0/attest first")),
        }
    }

    /// Ends a session.
    pub(crate) fn close(&self, id: &str) -> Result<(), ApiError> {
        let key = self.key(id)?;
        Ok(self.store.update(Lane::Sessions, move |records| {
            records.tx.delete(Table::Sessions, key.as_slice());
            Ok(())
        })?)
    }

    /// How many sessions there are.
    pub(crate) fn count(&self) -> Result<usize, BrokerError> {
        self.store.view(|records| Ok(records.tx.count(Table::Sessions)?))
    }
}

/// Removes sessions that have ended, and the oldest ones where there are too many; gives for how many more there is room.
fn sweep(records: &mut Records<'_, '_>, most: usize, lifetime: u64) -> Result<usize, BrokerError> {
    let mut count = records.tx.count(Table::Sessions)?;
    // Some more than one at a time, so that not every session of a flood counts them all.
    let wanted = most - (most / 64).clamp(1, SWEEP);
    let now = now_micros();
    for (key, _) in records.tx.list(Table::Sessions, "", None, SWEEP)? {
        if count <= wanted && now < opened_at(&key).saturating_add(lifetime) {
            break;
        }
        records.tx.delete(Table::Sessions, key);
        count -= 1;
    }
    Ok(most.saturating_sub(count + 1))
}

//! Sessions: a nonce each, that works once, whatever becomes of the attempt.
//!
//! ```text
//! auth ─▶ Challenged{nonce} ──attest begins──▶ Spent ──evidence held──▶ Attested{token}
//! ```
//!
//! They live in memory: a restart ends them, and guests attest again. Their number is bounded; the oldest goes first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::ear::Ear;
use nacre_core::{SecretArray, jose::b64};

use crate::ApiError;

enum State {
    Challenged { tee: String, nonce: String },
    Spent,
    Attested(Arc<Ear>),
}

struct Session {
    state: State,
    ends: Instant,
    number: u64,
}

#[derive(Default)]
struct Table {
    sessions: HashMap<String, Session>,
    /// Session ids by the order in which they came; since all live equally long, also by the order in which they end.
    order: BTreeMap<u64, String>,
    next: u64,
}

pub(crate) struct Sessions {
    table: Mutex<Table>,
    lifetime: Duration,
    most: usize,
}

/// A new session's id and nonce.
pub(crate) struct Opened {
    pub(crate) id: String,
    pub(crate) nonce: String,
}

fn unknown() -> ApiError {
    ApiError::new(401, "SessionNotFound", "there is no such session, or it has ended: start with /kbs/v0/auth")
}

impl Sessions {
    pub(crate) fn new(lifetime: Duration, most: usize) -> Self {
        Self { table: Mutex::default(), lifetime, most }
    }

    pub(crate) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// The table without what has ended.
    fn table(&self) -> MutexGuard<'_, Table> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while let Some((number, id)) = table.order.first_key_value().map(|(number, id)| (*number, id.clone())) {
            if table.sessions.get(&id).is_some_and(|session| session.ends > now) {
                break;
            }
            table.sessions.remove(&id);
            table.order.remove(&number);
        }
        table
    }

    pub(crate) fn open(&self, tee: &str) -> Opened {
        let id = b64::encode(SecretArray::<32>::random().expose());
        let nonce = BASE64_STANDARD.encode(SecretArray::<32>::random().expose());
        let mut table = self.table();
        while table.sessions.len() >= self.most {
            match table.order.pop_first() {
                Some((_, oldest)) => table.sessions.remove(&oldest),
                None => break,
            };
        }
        let number = table.next;
        table.next += 1;
        let state = State::Challenged { tee: tee.to_owned(), nonce: nonce.clone() };
        table.sessions.insert(id.clone(), Session { state, ends: Instant::now() + self.lifetime, number });
        table.order.insert(number, id.clone());
        Opened { id, nonce }
    }

    /// Takes the nonce of a session; there is no second time.
    pub(crate) fn spend(&self, id: &str) -> Result<(String, String), ApiError> {
        let mut table = self.table();
        let session = table.sessions.get_mut(id).ok_or_else(unknown)?;
        match std::mem::replace(&mut session.state, State::Spent) {
            State::Challenged { tee, nonce } => Ok((tee, nonce)),
            used => {
                session.state = used;
                Err(ApiError::new(
                    409,
                    "NonceUsed",
                    "this session's nonce was used already: start again with /kbs/v0/auth",
                ))
            }
        }
    }

    /// Keeps the token of a session whose evidence held.
    pub(crate) fn attested(&self, id: &str, ear: Arc<Ear>) {
        if let Some(session) = self.table().sessions.get_mut(id) {
            session.state = State::Attested(ear);
        }
    }

    /// The token of a session.
    pub(crate) fn ear(&self, id: &str) -> Result<Arc<Ear>, ApiError> {
        match self.table().sessions.get(id).map(|session| &session.state) {
            Some(State::Attested(ear)) => Ok(ear.clone()),
            Some(_) => {
                Err(ApiError::new(401, "NotAttested", "this session has not attested: POST /kbs/v0/attest first"))
            }
            None => Err(unknown()),
        }
    }

    /// Ends a session.
    pub(crate) fn close(&self, id: &str) {
        let mut table = self.table();
        if let Some(session) = table.sessions.remove(id) {
            table.order.remove(&session.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_works_once_and_the_oldest_session_goes() {
        let sessions = Sessions::new(Duration::from_secs(60), 2);
        let first = sessions.open("sim");
        let second = sessions.open("sim");
        assert_ne!(first.nonce, second.nonce);
        assert_eq!(sessions.spend(&first.id).unwrap(), ("sim".into(), first.nonce));
        assert_eq!(sessions.spend(&first.id).unwrap_err().status, 409);
        assert_eq!(sessions.ear(&second.id).unwrap_err().status, 401);
        let third = sessions.open("sim");
        assert_eq!(sessions.spend(&first.id).unwrap_err().status, 401);
        assert!(sessions.spend(&second.id).is_ok() && sessions.spend(&third.id).is_ok());
        sessions.close(&third.id);
        assert_eq!(sessions.spend(&third.id).unwrap_err().status, 401);
        let table = sessions.table();
        assert_eq!((table.sessions.len(), table.order.len()), (1, 1));
    }

    #[test]
    fn sessions_end() {
        let sessions = Sessions::new(Duration::ZERO, 10);
        let opened = sessions.open("sim");
        assert_eq!(sessions.spend(&opened.id).unwrap_err().status, 401);
        assert!(sessions.table().sessions.is_empty());
    }
}

//! The writer of run-time events in a guest.
//!
//! The log is a file of entries ([`aael`]) in a directory that only the guest can write, and that ends with the register: a tmpfs.
//! Write-ahead: the entry is in the file, and synced, before the register is extended; the register is extended before what the event
//! says is done. So after any crash, at start, with `n` whole entries in the file:
//!
//! | the register holds | because | |
//! |---|---|---|
//! | the replay of `n` | nothing is wrong, or an entry was torn before it was whole | what is torn is cut off |
//! | the replay of `n - 1` | a crash between file and register | the register is extended now |
//! | anything else | something was extended and not logged | the start is refused: no broker would believe the log |

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{Read, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::{
    Bank, LONGEST, LogError,
    aael::{self, RuntimeEvent},
    replay::extended,
    story::Happening,
    tcg,
};
use crate::evidence::hex;

/// Why an event was not recorded, or the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeLogError {
    /// The file cannot be used.
    #[error("event log '{path}': cannot {action}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The register cannot be used.
    #[error("register {register} of the {tee}: cannot {action}: {why}")]
    Register {
        /// The TEE.
        tee: &'static str,
        /// The register.
        register: u32,
        /// What was tried.
        action: &'static str,
        /// Why.
        why: String,
    },
    /// The event, or the log, is none.
    #[error("event log: {0}")]
    Log(#[from] LogError),
    /// The register has events that the log lacks.
    #[error(
        "event log '{path}': the register holds {found} and the log's replay gives {replayed}: something was measured that is not in the \
         log, and no broker would believe it; this guest has to be started anew"
    )]
    Unlogged {
        /// Which file.
        path: String,
        /// In the register, hex.
        found: String,
        /// By the log, hex.
        replayed: String,
    },
    /// A write failed before: what is in the file is not certain.
    #[error(
        "event log: an event could not be recorded before; nothing more is measured, and nothing more may be done that has to be"
    )]
    Broken,
}

/// A register that run-time events are extended into.
pub trait Register: Send + Sync {
    /// The TEE, for messages.
    fn tee(&self) -> &'static str;

    /// Its number in logs.
    fn number(&self) -> u32;

    /// Its hash function.
    fn bank(&self) -> Bank;

    /// What it holds.
    ///
    /// # Errors
    /// [`RuntimeLogError::Register`].
    fn read(&self) -> Result<Vec<u8>, RuntimeLogError>;

    /// Extends it: `H(value ‖ digest)`.
    ///
    /// # Errors
    /// [`RuntimeLogError::Register`].
    fn extend(&self, digest: &[u8]) -> Result<(), RuntimeLogError>;
}

struct State {
    file: File,
    broken: bool,
    /// The digests of all events: what happened already is not told again, so that what is asked for all the time fills no log.
    known: BTreeSet<Vec<u8>>,
}

/// The log of a running guest.
pub struct RuntimeLog {
    path: PathBuf,
    register: Box<dyn Register>,
    state: Mutex<State>,
}

impl std::fmt::Debug for RuntimeLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RuntimeLog").field("path", &self.path).field("register", &self.register.number()).finish()
    }
}

impl RuntimeLog {
    /// Opens the log, or begins it, and repairs what a crash left. `base` is what the register holds before the first run-time event: the
    /// replay of the firmware's log, zeros mostly.
    ///
    /// # Errors
    /// [`RuntimeLogError`]; [`RuntimeLogError::Unlogged`] where it is not the log of this register.
    pub fn open(path: &Path, register: Box<dyn Register>, base: &[u8]) -> Result<Self, RuntimeLogError> {
        let io = |action| move |source| RuntimeLogError::Io { path: path.display().to_string(), action, source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).map_err(io("open it"))?;
        file.try_lock().map_err(|error| io("lock it; is another program of this guest running?")(error.into()))?;
        let mut bytes = Vec::new();
        let limit = u64::try_from(LONGEST).unwrap_or(u64::MAX) + 1;
        Read::by_ref(&mut file).take(limit).read_to_end(&mut bytes).map_err(io("read it"))?;
        let whole = whole_entries(&bytes, register.as_ref())?;
        let (mut before, mut after) = (base.to_vec(), base.to_vec());
        for digest in &whole.digests {
            before = after;
            after = extended(register.bank(), &before, digest)
                .ok_or(LogError::NoDigest { event: 0, bank: register.bank() })?;
        }
        let found = register.read()?;
        if found != after {
            match whole.digests.last() {
                Some(last) if found == before => {
                    tracing::warn!(
                        "an event was logged and not measured, by a crash between the two: measuring it now"
                    );
                    register.extend(last)?;
                }
                _ => {
                    let path = path.display().to_string();
                    return Err(RuntimeLogError::Unlogged { path, found: hex(&found), replayed: hex(&after) });
                }
            }
        }
        let known = whole.digests.iter().cloned().collect();
        let end = u64::try_from(whole.length).unwrap_or(u64::MAX);
        if whole.length < bytes.len() {
            tracing::warn!("an event was torn by a crash before it was measured: cut off");
            file.set_len(end).map_err(io("cut off what is torn"))?;
        }
        file.seek(SeekFrom::Start(end)).map_err(io("go to its end"))?;
        Ok(Self { path: path.into(), register, state: Mutex::new(State { file, broken: false, known }) })
    }

    /// Records that something happens: in the log, then in the register. Only then may it be done. What is in the log already, word for
    /// word, is not recorded again.
    ///
    /// # Errors
    /// [`RuntimeLogError`]: it must not be done. After a failure nothing more can be recorded.
    pub fn record(&self, happening: &Happening) -> Result<(), RuntimeLogError> {
        happening.events()?.iter().try_for_each(|event| self.record_event(event))
    }

    /// Records an event of any domain, in the same way.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn record_event(&self, event: &RuntimeEvent) -> Result<(), RuntimeLogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.broken {
            return Err(RuntimeLogError::Broken);
        }
        let bank = self.register.bank();
        let (digest, entry) = (event.digest(bank)?, event.entry(self.register.number(), bank)?);
        if state.known.contains(&digest) {
            return Ok(());
        }
        let position = state.file.stream_position().map_err(self.io("find its end"))?;
        if position.saturating_add(entry.len() as u64) > LONGEST as u64 {
            let found = usize::try_from(position).unwrap_or(usize::MAX).saturating_add(entry.len());
            return Err(LogError::TooMuch { what: "bytes of a log", found, limit: LONGEST }.into());
        }
        // From here on, a failure leaves file and register apart; `open` can tell how.
        state.broken = true;
        state.file.write_all(&entry).map_err(self.io("write an event"))?;
        state.file.sync_data().map_err(self.io("sync it"))?;
        self.register.extend(&digest)?;
        state.broken = false;
        state.known.insert(digest);
        tracing::debug!(event = event.line(), "measured");
        Ok(())
    }

    /// The entries, to be sent after the firmware's log.
    ///
    /// # Errors
    /// [`RuntimeLogError::Io`].
    pub fn entries(&self) -> Result<Vec<u8>, RuntimeLogError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        state.file.seek(SeekFrom::Start(0)).map_err(self.io("go to its begin"))?;
        state.file.read_to_end(&mut bytes).map_err(self.io("read it"))?;
        Ok(bytes)
    }

    fn io(&self, action: &'static str) -> impl Fn(std::io::Error) -> RuntimeLogError + use<> {
        let path = self.path.display().to_string();
        move |source| RuntimeLogError::Io { path: path.clone(), action, source }
    }
}

/// The digests of the whole entries at the begin of a file, and how many bytes those are.
struct Whole {
    digests: Vec<Vec<u8>>,
    length: usize,
}

fn whole_entries(bytes: &[u8], register: &dyn Register) -> Result<Whole, RuntimeLogError> {
    let mut whole = Whole { digests: Vec::new(), length: 0 };
    while let Some((event, rest)) = tcg::parse_entry(bytes.get(whole.length..).unwrap_or_default(), register.bank())? {
        if event.register != register.number() || !event.data_is_measured() {
            let why = "it is not of the register that run-time events go to, or has another digest".into();
            return Err(LogError::Malformed { event: whole.digests.len() + 1, why }.into());
        }
        whole.digests.extend(event.digest(register.bank()).map(<[u8]>::to_vec));
        whole.length = bytes.len() - rest.len();
    }
    Ok(whole)
}

/// A whole log: the firmware's, or a header where there is none, with its filling cut off; then the run-time entries.
///
/// # Errors
/// [`LogError`]: the firmware's log is none.
pub fn joined(firmware: Option<&[u8]>, bank: Bank, entries: &[u8]) -> Result<Vec<u8>, LogError> {
    let mut log = match firmware {
        None => aael::header(&[bank]),
        Some(bytes) => bytes.get(..tcg::length(bytes)?).unwrap_or_default().to_vec(),
    };
    log.extend_from_slice(entries);
    Ok(log)
}

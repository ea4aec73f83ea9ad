//! The writer of run-time events in a guest.
//!
//! The log is a file of entries ([`aael`]) in a directory that only the guest can write, and that ends with the register: a tmpfs.
//! Write-ahead: the entry is in the file, and synced, before the register is extended; the register is extended before what the event
//! says is done. Whoever of the guest's programs uses the log has it alone meanwhile, by a lock on the file, and believes nothing that
//! it knew before: it reads the file and the register, which are, with `n` whole entries in the file:
//!
//! | the register holds | because | |
//! |---|---|---|
//! | the replay of `n` | nothing is wrong, or an entry was torn before it was whole | what is torn is cut off |
//! | the replay of `n - 1` | somebody was killed between file and register, or could not extend it | the register is extended now |
//! | anything else | something was extended and not logged | refused: no broker would believe the log |
//!
//! So there is no state but the file and the register, and any process may be killed at any instant. A lock is enough, and smaller than
//! an agent that owns the log: an agent would be one more program that has to be there, started first, and asked by a protocol, and who
//! may ask it may as well open the file.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{
    Bank, LONGEST, LogError,
    aael::{self, RuntimeEvent},
    replay::extended,
    story::Happening,
    tcg,
};
use crate::evidence::hex;

/// How long we wait for the log: others hold it for an event, or for a quote, which takes a slow TPM some seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);

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
    /// Somebody has the log and does not let go of it.
    #[error(
        "event log '{path}': another program of this guest has had it for {} s; is one of them stopped, or its TEE's device stuck?",
        waited.as_secs()
    )]
    Busy {
        /// Which file.
        path: String,
        /// How long we waited.
        waited: Duration,
    },
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

/// The log of a running guest.
pub struct RuntimeLog {
    path: PathBuf,
    register: Box<dyn Register>,
    /// What the register holds before the first run-time event.
    base: Vec<u8>,
    patience: Duration,
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
        let log = Self { path: path.into(), register, base: base.to_vec(), patience: PATIENCE };
        log.hold()?;
        Ok(log)
    }

    /// Waits for others for another time than a minute.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Records that something happens: in the log, then in the register. Only then may it be done. What is in the log already, word for
    /// word, is not recorded again.
    ///
    /// # Errors
    /// [`RuntimeLogError`]: it must not be done.
    pub fn record(&self, happening: &Happening) -> Result<(), RuntimeLogError> {
        let events = happening.events()?;
        let mut held = self.hold()?;
        events.iter().try_for_each(|event| held.append(event))
    }

    /// Records an event of any domain, in the same way.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn record_event(&self, event: &RuntimeEvent) -> Result<(), RuntimeLogError> {
        self.hold()?.append(event)
    }

    /// Does something with the entries, to be sent after the firmware's log, while nobody records another: a quote that is taken
    /// meanwhile is of the same moment, and its register holds what their replay gives.
    ///
    /// # Errors
    /// What the work gives, or [`RuntimeLogError`].
    pub fn with_entries<T, E: From<RuntimeLogError>>(&self, work: impl FnOnce(&[u8]) -> Result<T, E>) -> Result<T, E> {
        let held = self.hold()?;
        work(&held.bytes)
    }

    /// Takes the log, and brings it and the register together.
    fn hold(&self) -> Result<Held<'_>, RuntimeLogError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&self.path).map_err(self.io("open it"))?;
        self.lock(&file)?;
        let mut bytes = Vec::new();
        let limit = u64::try_from(LONGEST).unwrap_or(u64::MAX) + 1;
        Read::by_ref(&mut file).take(limit).read_to_end(&mut bytes).map_err(self.io("read it"))?;
        let Whole { digests, length } = whole_entries(&bytes, self.register.as_ref())?;
        let (mut before, mut after) = (self.base.clone(), self.base.clone());
        for digest in &digests {
            before = after;
            after = extended(self.register.bank(), &before, digest)
                .ok_or(LogError::NoDigest { event: 0, bank: self.register.bank() })?;
        }
        let found = self.register.read()?;
        if found != after {
            match digests.last() {
                Some(last) if found == before => {
                    tracing::warn!(
                        "an event was logged and not measured, by a crash between the two: measuring it now"
                    );
                    self.register.extend(last)?;
                }
                _ => {
                    let path = self.path.display().to_string();
                    return Err(RuntimeLogError::Unlogged { path, found: hex(&found), replayed: hex(&after) });
                }
            }
        }
        if length < bytes.len() {
            tracing::warn!("an event was torn by a crash before it was measured: cut off");
            bytes.truncate(length);
            file.set_len(bytes.len() as u64).map_err(self.io("cut off what is torn"))?;
        }
        file.seek(SeekFrom::Start(bytes.len() as u64)).map_err(self.io("go to its end"))?;
        Ok(Held { log: self, file, bytes, digests })
    }

    /// The lock ends with the file, and so with the process at the latest.
    fn lock(&self, file: &File) -> Result<(), RuntimeLogError> {
        let begin = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) if begin.elapsed() < self.patience => thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let path = self.path.display().to_string();
                    return Err(RuntimeLogError::Busy { path, waited: self.patience });
                }
                Err(TryLockError::Error(source)) => return Err(self.io("lock it")(source)),
            }
        }
    }

    fn io(&self, action: &'static str) -> impl Fn(std::io::Error) -> RuntimeLogError + use<> {
        let path = self.path.display().to_string();
        move |source| RuntimeLogError::Io { path: path.clone(), action, source }
    }
}

/// The log, held alone, and brought together with the register.
struct Held<'l> {
    log: &'l RuntimeLog,
    /// At its end.
    file: File,
    /// All that is in it: whole entries.
    bytes: Vec<u8>,
    /// Theirs: what happened already is not told again, so that what is asked for all the time fills no log.
    digests: Vec<Vec<u8>>,
}

impl Held<'_> {
    /// Where this fails, file and register are apart; the next one to take the log can tell how.
    fn append(&mut self, event: &RuntimeEvent) -> Result<(), RuntimeLogError> {
        let register = self.log.register.as_ref();
        let bank = register.bank();
        let (digest, entry) = (event.digest(bank)?, event.entry(register.number(), bank)?);
        if self.digests.contains(&digest) {
            return Ok(());
        }
        let found = self.bytes.len().saturating_add(entry.len());
        if found > LONGEST {
            return Err(LogError::TooMuch { what: "bytes of a log", found, limit: LONGEST }.into());
        }
        self.file.write_all(&entry).map_err(self.log.io("write an event"))?;
        self.file.sync_data().map_err(self.log.io("sync it"))?;
        register.extend(&digest)?;
        self.bytes.extend_from_slice(&entry);
        self.digests.push(digest);
        tracing::debug!(event = event.line(), "measured");
        Ok(())
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

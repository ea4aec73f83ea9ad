//! `configfs-tsm`, the kernel's one interface to reports of confidential guests (Documentation/ABI/testing/configfs-tsm).
//!
//! ```text
//! mkdir NAME                  provider  sev_guest, tdx_guest, …         inblob   64 bytes, written once
//!                             outblob   the report or quote             auxblob  certificates
//!                             generation  how often something was written: whoever else writes is noticed
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{read, read_if_there, write};
use crate::evidence::AttesterError;

/// Bytes of a report or quote at most, and of what comes beside it.
const LONGEST: u64 = 1 << 20;
/// How long a quote may take: a host asks a quoting service for it.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

/// A report, and what the host put beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The report or quote.
    pub report: Vec<u8>,
    /// Certificates; empty where the host has none.
    pub beside: Vec<u8>,
}

/// An entry of ours, removed when it is dropped.
struct Entry(PathBuf);

impl Entry {
    fn new(root: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("nacre-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Its files are the kernel's, and go with it.
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::debug!(%error, "an entry of configfs-tsm stays");
        }
    }
}

fn io_error(tee: &'static str, what: &'static str, path: &Path, source: io::Error) -> AttesterError {
    AttesterError::Io { tee, what, path: path.display().to_string(), source }
}

/// Who makes reports here: `sev_guest`, `tdx_guest`, …
///
/// # Errors
/// [`AttesterError::Io`]: this is no confidential guest, or its kernel has no `configfs-tsm`.
pub fn provider(root: &Path) -> Result<String, AttesterError> {
    let entry = Entry::new(root).map_err(|error| io_error("tsm", "the reports", root, error))?;
    provider_of("tsm", &entry)
}

fn provider_of(tee: &'static str, entry: &Entry) -> Result<String, AttesterError> {
    let name = waited(|| read(tee, "the provider of reports", &entry.0.join("provider"), 256))?;
    Ok(String::from_utf8_lossy(&name).trim_end().to_owned())
}

/// Tries again while there is no such file.
fn waited<T>(attempt: impl Fn() -> Result<T, AttesterError>) -> Result<T, AttesterError> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(AttesterError::Io { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::WouldBlock)
                    && begin.elapsed() < PATIENCE =>
            {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// A report with that report data, by that provider.
///
/// # Errors
/// [`AttesterError`]: another provider, another writer, or what the kernel says.
pub fn report(tee: &'static str, root: &Path, provider: &str, report_data: &[u8; 64]) -> Result<Report, AttesterError> {
    let refused = |why: String| AttesterError::Refused { tee, why };
    let entry = Entry::new(root).map_err(|error| io_error(tee, "the reports", root, error))?;
    let found = provider_of(tee, &entry)?;
    if found != provider {
        return Err(refused(format!("reports are made by '{found}' here, not by '{provider}'")));
    }
    waited(|| write(tee, "the report data", &entry.0.join("inblob"), report_data))?;
    let report = waited(|| read(tee, "the report", &entry.0.join("outblob"), LONGEST))?;
    let beside = read_if_there(tee, "the certificates", &entry.0.join("auxblob"), LONGEST)?.unwrap_or_default();
    let generation = read(tee, "the generation", &entry.0.join("generation"), 32)?;
    match String::from_utf8_lossy(&generation).trim_end() {
        "1" => Ok(Report { report, beside }),
        other => Err(refused(format!("somebody else wrote to our report (generation {other})"))),
    }
}

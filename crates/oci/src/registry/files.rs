//! Reading small local files with a limit.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::source::TransportError;

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, TransportError> {
    let failed = |source| TransportError::Io { what, path: path.into(), source };
    // A FIFO or a device would block or never end; the check is on what was opened.
    let file = fs::OpenOptions::new().read(true).open_nonblocking(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(TransportError::Config { path: path.into(), reason: "is not a regular file".into() });
    }
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(TransportError::TooLarge { what: "the file".into(), place: path.display().to_string(), limit });
    }
    Ok(bytes)
}

/// [`read_limited`], with `None` for a file that is not there.
pub(crate) fn read_if_there(path: &Path, what: &'static str, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
    match read_limited(path, what, limit) {
        Err(TransportError::Io { source, .. })
            if matches!(source.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// `$NAME` as a path, unless it is unset or empty.
pub(crate) fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `$XDG_CONFIG_HOME`, or `~/.config`.
pub(crate) fn config_home() -> Option<PathBuf> {
    env_path("XDG_CONFIG_HOME").or_else(|| env_path("HOME").map(|home| home.join(".config")))
}

trait OpenNonblocking {
    fn open_nonblocking(&mut self, path: &Path) -> std::io::Result<fs::File>;
}

impl OpenNonblocking for fs::OpenOptions {
    fn open_nonblocking(&mut self, path: &Path) -> std::io::Result<fs::File> {
        use std::os::unix::fs::OpenOptionsExt as _;
        self.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed()).open(path)
    }
}

//! Collateral: what vendors publish and verifiers need, by names, from a directory that an operator fills, or from memory.
//!
//! | name | content |
//! |---|---|
//! | `snp/<product>/crl` | AMD's revocation list, DER |
//! | `snp/<product>/vcek/<chip>/<tcb>` | a chip's certificate for a TCB, DER; `<tcb>` is `bl<n>-tee<n>-snp<n>-ucode<n>[-fmc<n>]` |
//! | `snp/<product>/vlek/<tcb>` | a provider's certificate for a TCB, DER |
//! | `dcap/crl/<root, platform, processor>` | Intel's revocation lists, DER |
//! | `dcap/tcb/<sgx, tdx>/<fmspc>` | TCB info: `{"chain": PEM, "text": JSON as signed, "signature": hex}` |
//! | `dcap/qe/<sgx, tdx>` | the quoting enclave's identity, in the same form |
//!
//! Nothing here is trusted: all of it is signed, and verified where it is used, with its time.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Bytes of an entry at most.
pub(crate) const LONGEST: usize = 2 << 20;
/// Directories below each other, and entries, that a listing follows.
const DEEPEST: usize = 6;
const MOST: usize = 100_000;

/// The cache cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("collateral '{name}': cannot {action}: {source}")]
pub struct CacheError {
    name: String,
    action: &'static str,
    source: io::Error,
}

enum Place {
    Directory(PathBuf),
    Memory(Mutex<BTreeMap<String, Vec<u8>>>),
}

/// A cache of collateral.
pub struct Cache(Place);

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Directory(path) => write!(f, "Cache({})", path.display()),
            Place::Memory(_) => f.write_str("Cache(memory)"),
        }
    }
}

impl Cache {
    /// A directory, which need not be there yet.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Self(Place::Directory(path.into()))
    }

    /// One that ends with the process.
    pub fn memory() -> Self {
        Self(Place::Memory(Mutex::default()))
    }

    /// An entry; `None` where there is none.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Vec<u8>>, CacheError> {
        if !is_name(name) {
            return Ok(None);
        }
        match &self.0 {
            Place::Memory(entries) => Ok(entries.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()),
            Place::Directory(path) => match read(&path.join(name)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(CacheError { name: name.into(), action: "read it", source }),
            },
        }
    }

    /// Puts an entry, in place of an older one.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), CacheError> {
        let fail = |source| CacheError { name: name.into(), action: "write it", source };
        if !is_name(name) || bytes.len() > LONGEST {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "a name or a size that no collateral has")));
        }
        match &self.0 {
            Place::Memory(entries) => {
                entries.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), bytes.into());
                Ok(())
            }
            Place::Directory(path) => write(&path.join(name), bytes).map_err(fail),
        }
    }

    /// The names of all entries, in their order.
    pub(crate) fn names(&self) -> Result<Vec<String>, CacheError> {
        match &self.0 {
            Place::Memory(entries) => {
                Ok(entries.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect())
            }
            Place::Directory(path) => {
                let mut names = Vec::new();
                list(path, "", 0, &mut names).map_err(|source| CacheError {
                    name: path.display().to_string(),
                    action: "list it",
                    source,
                })?;
                names.sort();
                Ok(names)
            }
        }
    }
}

/// Names are made by us; parts of them come from certificates and reports, in hex.
fn is_name(name: &str) -> bool {
    let part =
        |part: &str| (1..=160).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    name.split('/').all(part)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST as u64 + 1).read_to_end(&mut bytes)?;
    match bytes.len() > LONGEST {
        true => Err(io::Error::new(io::ErrorKind::InvalidData, "longer than any collateral")),
        false => Ok(bytes),
    }
}

/// Whole or not at all: a reader sees the old entry or the new one.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent)?;
    let new = parent.join(format!(".new.{}", std::process::id()));
    let _ = fs::remove_file(&new); // of a process that died
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(parent)?.sync_all()
}

fn list(path: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth == 0 => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(part) = entry.file_name().into_string() else { continue };
        let name = format!("{prefix}{part}");
        if !is_name(&name) || names.len() >= MOST {
            continue;
        }
        match entry.file_type()? {
            kind if kind.is_dir() && depth < DEEPEST => list(&entry.path(), &format!("{name}/"), depth + 1, names)?,
            kind if kind.is_file() => names.push(name),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_again_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        for cache in [Cache::memory(), Cache::directory(directory.path().join("c"))] {
            assert_eq!(cache.names().unwrap(), Vec::<String>::new());
            assert_eq!(cache.get("a/b").unwrap(), None);
            cache.put("a/b", b"1").unwrap();
            cache.put("a/b", b"2").unwrap();
            cache.put("a/c/d", b"3").unwrap();
            assert_eq!(cache.get("a/b").unwrap().unwrap(), b"2");
            assert_eq!(cache.names().unwrap(), ["a/b", "a/c/d"]);
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::directory(directory.path().join("c"));
        fs::write(directory.path().join("secret"), b"x").unwrap();
        for name in ["../secret", "/etc/passwd", "a//b", "", "a/../../secret", "a\0b", "."] {
            assert_eq!(cache.get(name).unwrap(), None, "{name:?}");
            assert!(cache.put(name, b"x").is_err(), "{name:?}");
        }
        assert!(cache.put("long", &vec![0; LONGEST + 1]).is_err());
        fs::create_dir_all(directory.path().join("c")).unwrap();
        fs::write(directory.path().join("c/long"), vec![0; LONGEST + 1]).unwrap();
        assert!(cache.get("long").is_err());
    }
}

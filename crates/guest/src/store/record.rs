//! Records: small JSON files that appear, change and go by one rename each.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{StoreError, io_error};

/// The most bytes of one record (signatures included).
const RECORD_LIMIT: u64 = 64 << 20;

/// Begins the names of records that are being written.
pub(super) const UNFINISHED: &str = ".new-";

/// Writes a file so that, whatever happens, its place holds the old content or the new, durably.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let fresh = parent.join(format!("{UNFINISHED}{}", random_name()));
    let written = (|| {
        let mut file = File::create_new(&fresh)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        sync_dir(parent)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&fresh);
        io_error("write", path)(error)
    })
}

/// [`write_atomically`], as JSON.
pub(super) fn write<T: Serialize>(path: &Path, record: &T) -> Result<(), StoreError> {
    let json = serde_json::to_vec_pretty(record).map_err(|source| StoreError::Record { path: path.into(), source })?;
    write_atomically(path, &json)
}

/// Reads a record; `None` where there is none.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let Some(bytes) = read_bytes(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|source| StoreError::Record { path: path.into(), source })
}

/// Reads a whole small file; `None` where there is none.
pub(super) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > RECORD_LIMIT => Err(StoreError::Format {
            path: path.into(),
            reason: format!("{} bytes; a record has at most {RECORD_LIMIT}", metadata.len()),
        }),
        Ok(_) => match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            // Removed between the two calls.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", path)(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Removes a file; that it is gone already is fine.
pub(super) fn remove(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

/// The names in a directory that are not work in progress.
pub(super) fn list(dir: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let name = entry.map_err(io_error("list", dir))?.file_name();
        if let Ok(name) = name.into_string()
            && !name.starts_with('.')
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes records that killed processes were writing. The caller holds the lock under which they are written in this directory.
pub(super) fn remove_unfinished(dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A name that nobody else has.
pub(super) fn random_name() -> String {
    let random = nacre_core::SecretArray::<12>::random();
    random.expose().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes a directory and all in it, whatever the modes of what it holds.
pub(super) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // Without root, directories of an image may be closed to their own owner.
            open_up(path);
            fs::remove_dir_all(path).map_err(io_error("remove", path))
        }
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

fn open_up(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let mut todo: Vec<PathBuf> = vec![path.into()];
    while let Some(dir) = todo.pop() {
        let _ = fs::set_permissions(&dir, fs::Permissions::from_mode(0o700));
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        todo.extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
}

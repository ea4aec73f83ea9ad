//! Stores as people spell them: a file, a block device, a directory, `s3://BUCKET/PREFIX`.

use std::{fs, path::PathBuf, sync::Arc};

use nacre_core::{BlockStore, Progress};
use nacre_objectstore::{Location, ObjectBlockStore, ObjectOptions, ObjectStoreError};
use nacre_sys::block::{DirectoryOptions, DirectoryStore, FileOptions, FileStore};

use crate::exit::{Missing, Usage};

/// A store that was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StoreName {
    /// A file or a block device.
    File(PathBuf),
    /// A directory of segment files.
    Directory(PathBuf),
    /// An object store, `s3://…`; the usual variables say where it is and who we are.
    Objects(String),
}

impl StoreName {
    /// What a text means; a path is what is there, or, where nothing is, a directory if it ends with a slash.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        if text.is_empty() {
            return Err(Usage("the store's name is empty".into()).into());
        }
        match text.split_once("://") {
            Some(("s3", _)) => return Ok(Self::Objects(text.trim_end_matches('/').to_owned())),
            // A path may have anything in it, but hardly this at its beginning.
            Some((scheme, _)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                return Err(Usage(format!("{text}: stores of the kind {scheme}:// are not known")).into());
            }
            _ => {}
        }
        // Absolute, since a disk in the background has another working directory.
        let path = fs::canonicalize(text).or_else(|_| std::path::absolute(text))?;
        let directory = if path.exists() { path.is_dir() } else { text.ends_with('/') };
        Ok(if directory { Self::Directory(path) } else { Self::File(path) })
    }

    /// Opens what is there, and locks it.
    pub(super) fn open(&self, read_only: bool) -> anyhow::Result<Arc<dyn BlockStore>> {
        self.must_be_there()?;
        Ok(match self {
            Self::File(path) => Arc::new(FileStore::open(path, FileOptions { read_only, ..FileOptions::default() })?),
            Self::Directory(path) => {
                Arc::new(DirectoryStore::open(path, DirectoryOptions { read_only, ..DirectoryOptions::default() })?)
            }
            Self::Objects(url) => {
                let options = ObjectOptions { read_only, ..ObjectOptions::default() };
                Arc::new(ObjectBlockStore::open(&location(url)?, options)?)
            }
        })
    }

    fn must_be_there(&self) -> anyhow::Result<()> {
        let (Self::File(path) | Self::Directory(path)) = self else { return Ok(()) };
        match path.try_exists() {
            Ok(false) => Err(Missing(format!("{}: there is no such store", path.display())).into()),
            // Whatever else is wrong is said when it is opened.
            _ => Ok(()),
        }
    }

    /// Whether there is nothing yet, so that a store has to be made.
    pub(super) fn is_new(&self) -> anyhow::Result<bool> {
        Ok(match self {
            Self::File(path) => !path.exists(),
            Self::Directory(path) => fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none()),
            Self::Objects(url) => {
                let options = ObjectOptions { read_only: true, ..ObjectOptions::default() };
                match ObjectBlockStore::open(&location(url)?, options) {
                    Err(ObjectStoreError::NotAStore { .. }) => true,
                    found => found.map(|_| false)?,
                }
            }
        })
    }

    /// Makes a store of `size` bytes.
    pub(super) fn create(
        &self,
        size: u64,
        preallocate: bool,
        progress: &dyn Progress,
    ) -> anyhow::Result<Arc<dyn BlockStore>> {
        Ok(match self {
            Self::File(path) => Arc::new(FileStore::create(path, size, preallocate, FileOptions::default(), progress)?),
            Self::Directory(_) | Self::Objects(_) if preallocate => {
                return Err(Usage("--preallocate is for stores that are one file".into()).into());
            }
            Self::Directory(path) => Arc::new(DirectoryStore::create(path, size, DirectoryOptions::default())?),
            Self::Objects(url) => Arc::new(ObjectBlockStore::create(&location(url)?, size, ObjectOptions::default())?),
        })
    }

    /// Takes away what [`create`](Self::create) made, since nothing came of it.
    pub(super) fn remove(&self) {
        if let Self::File(path) = self
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%error, "{} was not removed", path.display());
        }
    }
}

impl std::fmt::Display for StoreName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) | Self::Directory(path) => path.display().fmt(f),
            Self::Objects(url) => f.write_str(url),
        }
    }
}

fn location(url: &str) -> Result<Location, ObjectStoreError> {
    // Variables that are no text are none that an object store knows.
    let environment =
        std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    Location::s3(url, environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_told_apart_by_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let at = |name: &str| root.join(name).display().to_string();
        assert_eq!(StoreName::parse(&at("")).unwrap(), StoreName::Directory(root.clone()));
        assert_eq!(StoreName::parse(&at("new")).unwrap(), StoreName::File(root.join("new")));
        let slash = StoreName::parse(&at("new/")).unwrap();
        assert!(matches!(&slash, StoreName::Directory(path) if path.starts_with(&root)) && slash.is_new().unwrap());
        fs::write(root.join("new"), "x").unwrap();
        assert!(!StoreName::parse(&at("new")).unwrap().is_new().unwrap());
        std::os::unix::fs::symlink("new", root.join("link")).unwrap();
        assert_eq!(StoreName::parse(&at("link")).unwrap(), StoreName::File(root.join("new")), "one store, one name");
        assert!(StoreName::parse("").is_err());
        assert!(StoreName::parse("ftp://a/b").is_err());
        assert_eq!(StoreName::parse("s3://bucket/a/").unwrap(), StoreName::Objects("s3://bucket/a".into()));
    }
}

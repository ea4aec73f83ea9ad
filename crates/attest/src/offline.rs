//! Keys from files in the guest's own image: CoCo's `offline_fs_kbc`, for development and for images that carry their keys.
//!
//! `<dir>/aa-offline_fs_kbc-keys.json` and `<dir>/aa-offline_fs_kbc-resources.json` are each a flat object from `repository/type/tag` to
//! standard base64; keys are 32 bytes. The secrecy of what they hold is that of the image they lie in.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_core::{KeySource, KeySourceError, ResourcePath, ResourceUri, SecretBytes};
use zeroize::Zeroizing;

const KEYS: &str = "aa-offline_fs_kbc-keys.json";
const RESOURCES: &str = "aa-offline_fs_kbc-resources.json";
const LONGEST: u64 = 16 * 1024 * 1024;

/// The files are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A file cannot be read.
    #[error("offline keys: '{path}' could not be read: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file says something else than names and base64.
    #[error("offline keys: '{path}': {why}", path = path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Secrets that were read from the two files.
#[derive(Debug)]
pub struct OfflineKeys {
    directory: PathBuf,
    secrets: BTreeMap<ResourcePath, SecretBytes>,
}

impl OfflineKeys {
    /// Reads the files of a directory, `/etc` in a guest. One of the two may be missing.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn read(directory: &Path) -> Result<Self, OfflineError> {
        let mut secrets = BTreeMap::new();
        let mut found = 0;
        for (name, key_len) in [(KEYS, Some(32)), (RESOURCES, None)] {
            let path = directory.join(name);
            let fail = |source| OfflineError::Io { path: path.clone(), source };
            match std::fs::metadata(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && (found > 0 || name == KEYS) => continue,
                Err(error) => return Err(fail(error)),
                Ok(meta) if meta.len() > LONGEST => {
                    return Err(OfflineError::Malformed { path, why: format!("longer than {LONGEST} bytes") });
                }
                Ok(_) => found += 1,
            }
            let bytes = Zeroizing::new(std::fs::read(&path).map_err(fail)?);
            parse(&bytes, key_len, &mut secrets).map_err(|why| OfflineError::Malformed { path, why })?;
        }
        Ok(Self { directory: directory.to_owned(), secrets })
    }
}

/// Adds the secrets of one file. Public for fuzzing.
#[doc(hidden)]
pub fn parse(
    bytes: &[u8],
    key_len: Option<usize>,
    into: &mut BTreeMap<ResourcePath, SecretBytes>,
) -> Result<(), String> {
    let entries: BTreeMap<String, String> = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    for (name, value) in entries {
        let value = Zeroizing::new(value);
        let path: ResourcePath = name.parse().map_err(|e: nacre_core::UriError| e.to_string())?;
        let secret = SecretBytes::new(BASE64_STANDARD.decode(value.as_bytes()).map_err(|e| format!("{path}: {e}"))?);
        if key_len.is_some_and(|length| secret.len() != length) {
            return Err(format!("{path}: a key of {} bytes instead of 32", secret.len()));
        }
        if into.insert(path.clone(), secret).is_some() {
            return Err(format!("{path} is there twice"));
        }
    }
    Ok(())
}

impl KeySource for OfflineKeys {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        match self.secrets.get(uri.path()) {
            Some(secret) if uri.plugin().is_none_or(|plugin| plugin == "resource") => {
                Ok(SecretBytes::new(secret.expose().to_vec()))
            }
            _ => Err(KeySourceError::NotFound {
                uri: uri.clone(),
                source_name: format!("the offline keys of {}", self.directory.display()),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_resources_are_found_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OfflineKeys::read(dir.path()).is_err());
        std::fs::write(dir.path().join(KEYS), format!(r#"{{"default/key/1":"{}"}}"#, BASE64_STANDARD.encode([7; 32])))
            .unwrap();
        std::fs::write(dir.path().join(RESOURCES), r#"{"default/policy/x":"e30="}"#).unwrap();
        let keys = OfflineKeys::read(dir.path()).unwrap();
        let fetch = |uri: &str| keys.fetch(&uri.parse().unwrap());
        assert_eq!(fetch("kbs:///default/key/1").unwrap().expose(), [7; 32]);
        assert_eq!(fetch("kbs:///default/policy/x").unwrap().expose(), b"{}");
        assert!(matches!(fetch("kbs:///default/key/2"), Err(KeySourceError::NotFound { .. })));
        assert!(matches!(fetch("kbs+vault:///default/key/1"), Err(KeySourceError::NotFound { .. })));
        assert!(!format!("{keys:?}").contains("7, 7"));
    }

    #[test]
    fn malformed_files_are_refused() {
        for bad in [
            "",
            "[]",
            r#"{"a":"AA=="}"#,
            r#"{"a/b/c":"AA=="}"#,
            r#"{"a/b/c":"*"}"#,
            r#"{"../b/c":"AA=="}"#,
            r#"{"a/b/c":1}"#,
        ] {
            assert!(parse(bad.as_bytes(), Some(32), &mut BTreeMap::new()).is_err(), "{bad}");
        }
    }
}

//! Master keys: what wraps the keys that seal the broker's records.

use std::{path::PathBuf, sync::Arc};

use nacre_core::{Digest, SecretArray, aead::AeadKey};

use crate::BrokerError;

/// Why a master key did not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MasterKeyError {
    /// It opens something else.
    #[error("{key}: the data key was not wrapped by it, or was changed")]
    Wrong {
        /// Which master key.
        key: String,
    },
    /// The token that has it fails.
    #[error("{key}: {what}: {source}")]
    Device {
        /// Which master key.
        key: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// Wraps data keys: a file here, key tokens by whoever opens the broker.
pub trait MasterKey: Send + Sync {
    /// Its name in the database: which key it is, without a secret, without a `/`.
    fn id(&self) -> String;

    /// What it is, for people.
    fn describe(&self) -> String;

    /// Wraps a data key; `label` says which one, and has to be the same to unwrap it.
    ///
    /// # Errors
    /// [`MasterKeyError::Device`].
    fn wrap(&self, label: &str, key: &SecretArray<32>) -> Result<Vec<u8>, MasterKeyError>;

    /// Unwraps a data key.
    ///
    /// # Errors
    /// [`MasterKeyError`].
    fn unwrap(&self, label: &str, wrapped: &[u8]) -> Result<SecretArray<32>, MasterKeyError>;

    /// Opens what format 1 of the database sealed, which only a key in a file did.
    ///
    /// # Errors
    /// [`MasterKeyError::Wrong`].
    fn open_format_1(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, MasterKeyError> {
        let _ = (aad, sealed);
        Err(MasterKeyError::Wrong { key: self.describe() })
    }
}

/// A master key of 32 bytes in a file.
pub(crate) struct FileKey {
    key: AeadKey,
    id: String,
    path: PathBuf,
}

impl FileKey {
    pub(crate) fn new(path: PathBuf, key: &SecretArray<32>) -> Self {
        let id = Digest::sha256(&[b"nacre-broker master key id\0", &key.expose()[..]].concat()).short();
        Self { key: AeadKey::new(key), id: format!("file:{}", id.replace([':', '/'], "-")), path }
    }

    fn wrong(&self) -> MasterKeyError {
        MasterKeyError::Wrong { key: self.describe() }
    }
}

impl MasterKey for FileKey {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn describe(&self) -> String {
        format!("master key {} of {}", self.id, self.path.display())
    }

    fn wrap(&self, label: &str, key: &SecretArray<32>) -> Result<Vec<u8>, MasterKeyError> {
        Ok(self.key.seal_random(label.as_bytes(), key.expose()))
    }

    fn unwrap(&self, label: &str, wrapped: &[u8]) -> Result<SecretArray<32>, MasterKeyError> {
        let plain = self.key.open_random(label.as_bytes(), wrapped).map_err(|_| self.wrong())?;
        SecretArray::try_fill(|slot| match plain.len() == slot.len() {
            true => {
                slot.copy_from_slice(&plain);
                Ok(())
            }
            false => Err(self.wrong()),
        })
    }

    fn open_format_1(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, MasterKeyError> {
        let mut plain = self.key.open_random(aad, sealed).map_err(|_| self.wrong())?;
        Ok(std::mem::take(&mut *plain))
    }
}

impl From<MasterKeyError> for BrokerError {
    fn from(error: MasterKeyError) -> Self {
        Self::Master(error)
    }
}

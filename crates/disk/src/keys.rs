//! Keys. A root key opens the superblock, which holds the master keys; each epoch has keys of its own, derived from a master key
//! and a random salt.
//!
//! **Nonce rule.** An epoch is begun by an open that writes, with a salt of 256 random bits; a salt is never taken from anywhere else.
//! Within an epoch each of its three keys (data, index, journal) counts its messages, and the count is the nonce: it lives in memory
//! only, and dies with the epoch. So a crash, or a host that presents an older state, leads to another salt and other keys, never
//! to a second message under one (key, nonce). An epoch ends after [`EPOCH_MESSAGES`] messages; a counter that reached twice that
//! refuses to seal. Superblocks and checkpoints have a fresh random salt, and so a key, for each message.

use std::sync::{
    Arc, RwLock,
    atomic::{AtomicU64, Ordering},
};

use nacre_core::{SecretArray, aead::AeadKey};
use ring::{digest, hkdf};

use crate::{DiskError, delta::FastMap, poison};

/// Messages under one key after which a new epoch begins: 2^32 blocks are 16 TiB, far below the birthday bound of AES (2^64 blocks of
/// 16 bytes; here 2^40).
pub const EPOCH_MESSAGES: u64 = 1 << 32;

/// Bytes of a salt.
pub(crate) const SALT_LEN: usize = 32;

/// What opens a disk. It is used for nothing but to derive the key of the superblock.
#[derive(Debug)]
pub struct RootKey(SecretArray<32>);

impl RootKey {
    /// The least key material that is accepted, in bytes.
    pub const LEAST: usize = 32;
    /// The most.
    pub const MOST: usize = 8192;

    /// A root key from random key material, as from a key file. A passphrase is none: there is no slow key derivation here.
    ///
    /// # Errors
    /// [`DiskError::BadKey`] for less than 32 or more than 8192 bytes.
    pub fn from_bytes(material: &[u8]) -> Result<Self, DiskError> {
        if !(Self::LEAST..=Self::MOST).contains(&material.len()) {
            return Err(DiskError::BadKey { least: Self::LEAST, most: Self::MOST, found: material.len() });
        }
        Ok(Self(SecretArray::fill(|slot| derive(material, &[], &[b"nacre disk v1 root"], slot))))
    }

    /// A new one, for a disk that nobody opens again.
    pub fn random() -> Self {
        Self(SecretArray::random())
    }

    /// The same key again, for an open disk that may have to write its superblock.
    pub(crate) fn keep(&self) -> Self {
        Self(SecretArray::fill(|slot| slot.copy_from_slice(self.0.expose())))
    }

    /// The key that seals a superblock with this salt.
    pub(crate) fn superblock(&self, salt: &[u8; SALT_LEN]) -> Sealer {
        Sealer::derive(self.0.expose(), salt, &[b"nacre disk v1 superblock"])
    }

    /// The secret by which an anchor knows its disk: another one for each disk and purpose, and of no use for anything else.
    pub fn anchor_secret(&self, label: &str) -> SecretArray<32> {
        SecretArray::fill(|slot| derive(self.0.expose(), &[], &[b"nacre disk v1 anchor ", label.as_bytes()], slot))
    }
}

/// HKDF-SHA256.
fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]], out: &mut [u8; 32]) {
    let okm = hkdf::Salt::new(hkdf::HKDF_SHA256, salt);
    let prk = okm.extract(secret);
    let filled = prk.expand(info, hkdf::HKDF_SHA256).and_then(|okm| okm.fill(out));
    if filled.is_err() {
        unreachable!("HKDF-SHA256 gives 32 bytes");
    }
}

/// Hears of every encryption: a test's way to see that no nonce is used twice.
pub trait Audit: Send + Sync {
    /// A message was sealed. `key_id` is a digest of the key.
    fn sealed(&self, key_id: [u8; 32], nonce: [u8; 12], plaintext_digest: [u8; 32]);
}

/// A key, and who hears of its use.
pub(crate) struct Sealer {
    key: AeadKey,
    id: [u8; 32],
}

/// Somebody who may want to hear of encryptions.
pub(crate) type Auditor = Option<Arc<dyn Audit>>;

impl Sealer {
    pub(crate) fn derive(secret: &[u8; 32], salt: &[u8; SALT_LEN], info: &[&[u8]]) -> Self {
        let key = SecretArray::<32>::fill(|slot| derive(secret, salt, info, slot));
        let mut id = [0; 32];
        id.copy_from_slice(digest::digest(&digest::SHA256, key.expose()).as_ref());
        Self { key: AeadKey::new(&key), id }
    }

    /// Encrypts in place; gives the tag.
    pub(crate) fn seal(&self, counter: u64, aad: &[u8], data: &mut [u8], auditor: &Auditor) -> [u8; 16] {
        let nonce = nonce(counter);
        if let Some(auditor) = auditor {
            let mut plaintext = [0; 32];
            plaintext.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
            auditor.sealed(self.id, nonce, plaintext);
        }
        self.key.seal_in_place(nonce, aad, data)
    }

    /// Decrypts in place; whether it was authentic.
    #[must_use]
    pub(crate) fn open(&self, counter: u64, aad: &[u8], tag: [u8; 16], data: &mut [u8]) -> bool {
        self.key.open_in_place(nonce(counter), aad, tag, data).is_ok()
    }
}

/// count (u64, little-endian) ‖ zeroes.
fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    nonce
}

/// A master key: what the epochs' keys are derived from. The superblock keeps it.
pub(crate) struct MasterKey {
    /// Counts rotations.
    pub(crate) generation: u32,
    pub(crate) key: SecretArray<32>,
}

impl MasterKey {
    /// The key that seals a checkpoint with this salt.
    pub(crate) fn checkpoint(&self, uuid: &[u8; 16], salt: &[u8; SALT_LEN]) -> Sealer {
        Sealer::derive(self.key.expose(), salt, &[b"nacre disk v1 checkpoint", uuid])
    }
}

/// What is known of an epoch on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EpochRecord {
    pub(crate) id: u32,
    /// The generation of the master key.
    pub(crate) master: u32,
    pub(crate) salt: [u8; SALT_LEN],
    /// Blocks of data and index that are sealed with it and still in use, as of the checkpoint.
    pub(crate) live: u64,
}

/// The keys of an epoch.
pub(crate) struct EpochKeys {
    pub(crate) id: u32,
    data: Sealer,
    index: Sealer,
    journal: Sealer,
    data_count: AtomicU64,
    index_count: AtomicU64,
    journal_count: AtomicU64,
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Data,
    Index,
    Journal,
}

impl EpochKeys {
    fn derive(master: &MasterKey, record: &EpochRecord, uuid: &[u8; 16]) -> Self {
        let id = record.id.to_le_bytes();
        let sealer = |purpose: &[u8]| {
            Sealer::derive(master.key.expose(), &record.salt, &[b"nacre disk v1 epoch ", purpose, uuid, &id])
        };
        Self {
            id: record.id,
            data: sealer(b"data"),
            index: sealer(b"index"),
            journal: sealer(b"journal"),
            data_count: AtomicU64::new(0),
            index_count: AtomicU64::new(0),
            journal_count: AtomicU64::new(0),
        }
    }

    pub(crate) fn sealer(&self, purpose: Purpose) -> &Sealer {
        match purpose {
            Purpose::Data => &self.data,
            Purpose::Index => &self.index,
            Purpose::Journal => &self.journal,
        }
    }

    fn count(&self, purpose: Purpose) -> &AtomicU64 {
        match purpose {
            Purpose::Data => &self.data_count,
            Purpose::Index => &self.index_count,
            Purpose::Journal => &self.journal_count,
        }
    }

    /// `count` nonces that nobody else gets; the first of them.
    ///
    /// # Errors
    /// [`DiskError::Setting`] when the epoch is used up twice over, which a new epoch prevents long before.
    pub(crate) fn reserve(&self, purpose: Purpose, count: u64) -> Result<u64, DiskError> {
        let first = self.count(purpose).fetch_add(count, Ordering::Relaxed);
        if first.saturating_add(count) > 2 * EPOCH_MESSAGES {
            return Err(DiskError::Setting(format!("epoch {} has used up its nonces; open the disk again", self.id)));
        }
        Ok(first)
    }

    /// Whether it is time for a new epoch.
    pub(crate) fn is_worn(&self, limit: u64) -> bool {
        [Purpose::Data, Purpose::Index, Purpose::Journal]
            .iter()
            .any(|purpose| self.count(*purpose).load(Ordering::Relaxed) >= limit)
    }
}

/// All keys of an open disk.
pub(crate) struct KeyRing {
    uuid: [u8; 16],
    masters: RwLock<Vec<Arc<MasterKey>>>,
    epochs: RwLock<FastMap<u32, EpochSlot>>,
}

struct EpochSlot {
    record: EpochRecord,
    keys: Option<Arc<EpochKeys>>,
}

impl KeyRing {
    pub(crate) fn new(uuid: [u8; 16], masters: Vec<MasterKey>, epochs: &[EpochRecord]) -> Self {
        let slots = epochs.iter().map(|record| (record.id, EpochSlot { record: record.clone(), keys: None }));
        Self {
            uuid,
            masters: RwLock::new(masters.into_iter().map(Arc::new).collect()),
            epochs: RwLock::new(slots.collect()),
        }
    }

    /// The keys of an epoch; `None` where the disk knows no such epoch.
    pub(crate) fn epoch(&self, id: u32) -> Option<Arc<EpochKeys>> {
        if let Some(keys) = poison(self.epochs.read()).get(&id)?.keys.clone() {
            return Some(keys);
        }
        let mut epochs = poison(self.epochs.write());
        let slot = epochs.get_mut(&id)?;
        if slot.keys.is_none() {
            let master = self.master(slot.record.master)?;
            slot.keys = Some(Arc::new(EpochKeys::derive(&master, &slot.record, &self.uuid)));
        }
        slot.keys.clone()
    }

    pub(crate) fn master(&self, generation: u32) -> Option<Arc<MasterKey>> {
        poison(self.masters.read()).iter().find(|master| master.generation == generation).cloned()
    }

    /// The newest master key.
    pub(crate) fn newest(&self) -> Option<Arc<MasterKey>> {
        poison(self.masters.read()).iter().max_by_key(|master| master.generation).cloned()
    }

    /// Takes in a new epoch.
    pub(crate) fn add(&self, record: EpochRecord) {
        poison(self.epochs.write()).insert(record.id, EpochSlot { record, keys: None });
    }

    /// Forgets an epoch that nothing is sealed with any more.
    pub(crate) fn forget(&self, id: u32) {
        poison(self.epochs.write()).remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_of_different_salts_share_nothing() {
        let master = MasterKey { generation: 1, key: SecretArray::random() };
        let record = |salt| EpochRecord { id: 1, master: 1, salt: [salt; SALT_LEN], live: 0 };
        let keys = [1, 2].map(|salt| EpochKeys::derive(&master, &record(salt), &[0; 16]));
        let ids: std::collections::HashSet<_> =
            keys.iter().flat_map(|keys| [keys.data.id, keys.index.id, keys.journal.id]).collect();
        assert_eq!(ids.len(), 6);
    }

    #[test]
    fn a_counter_that_is_used_up_seals_no_more() {
        let master = MasterKey { generation: 1, key: SecretArray::random() };
        let keys = EpochKeys::derive(&master, &EpochRecord { id: 1, master: 1, salt: [0; 32], live: 0 }, &[0; 16]);
        assert_eq!(keys.reserve(Purpose::Data, 3).unwrap(), 0);
        assert_eq!(keys.reserve(Purpose::Data, EPOCH_MESSAGES).unwrap(), 3);
        assert!(keys.is_worn(EPOCH_MESSAGES));
        assert!(keys.reserve(Purpose::Data, EPOCH_MESSAGES).is_err());
    }

    #[test]
    fn passphrases_are_no_root_keys() {
        assert!(RootKey::from_bytes(b"correct horse battery staple").is_err());
        assert!(RootKey::from_bytes(&[1; 32]).is_ok());
        assert!(RootKey::from_bytes(&[1; 8193]).is_err());
    }
}

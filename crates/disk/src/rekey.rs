//! Other keys for a disk that is closed. Nothing but the superblock and a checkpoint is written.

use nacre_core::{BlockStore, SecretArray};

use crate::{DiskError, RootKey, format::write_superblock, keys::MasterKey, recover, superblock::MOST_MASTERS};

/// Gives a disk another root key. The old one opens nothing from then on, but a copy of the old superblock that somebody kept: where
/// the old key is known to others, make a new disk and copy.
///
/// # Errors
/// As for opening.
pub fn change_key(store: &dyn BlockStore, old: &RootKey, new: &RootKey) -> Result<(), DiskError> {
    let (mut superblock, behind) = recover::read_superblock(store, old)?;
    superblock.generation += 1;
    write_superblock(store, &superblock, behind, new, &None)
}

/// Gives a disk another master key: what is written from then on is sealed with keys derived from it. What was written before stays as
/// it is, and its master key is kept as long as something needs it.
///
/// # Errors
/// As for opening; [`DiskError::Setting`] when data of too many rotations is still there.
pub fn rotate(store: &dyn BlockStore, key: &RootKey) -> Result<(), DiskError> {
    let recovered = recover::recover(store, key)?;
    let mut superblock = recovered.superblock;
    // Both checkpoints, too: a disk that was rotated and not written to since is still opened by an older master key.
    let sealed = recover::checkpoint_masters(store, &superblock.geometry)?;
    let needed = |generation: u32| {
        sealed.contains(&generation) || recovered.checkpoint.epochs.iter().any(|epoch| epoch.master == generation)
    };
    let newest = superblock.masters.iter().map(|master| master.generation).max().unwrap_or(0);
    superblock.masters.retain(|master| master.generation == newest || needed(master.generation));
    if superblock.masters.len() >= MOST_MASTERS {
        return Err(DiskError::Setting(format!(
            "data sealed under {MOST_MASTERS} master keys is still there; it has to be written again before the next rotation"
        )));
    }
    superblock.masters.push(MasterKey { generation: newest + 1, key: SecretArray::random() });
    superblock.generation += 1;
    write_superblock(store, &superblock, recovered.behind, key, &None)
}

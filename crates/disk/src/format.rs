//! Making a disk.

use nacre_core::{Anchor, AnchorState, BLOCK_SIZE, BlockStore, Page, SecretArray};
use rand_core::RngCore as _;

use crate::{
    DiskError, RootKey,
    checkpoint::{Checkpoint, Root},
    journal,
    keys::{Auditor, MasterKey},
    layout::{self, BLOCK, Geometry, LEAST_RESERVE, MOST_RESERVE},
    node::{self, Entry},
    shared::runs,
    superblock::{self, Refusal, Superblock},
};

/// How a disk is made.
#[derive(Clone, Default)]
pub struct FormatOptions {
    /// The size of the disk, in bytes; as large as the store has room for where it is left out.
    pub size: Option<u64>,
    /// How much is kept free beyond that, in percent of the size: 3 to 100. 0 means the default, 10.
    pub reserve_percent: u8,
    /// Overwrite what is there, and take an anchor that another disk had.
    pub force: bool,
    /// The store was made for this disk a moment ago: what is on it, noise perhaps, is nobody's.
    pub fresh_store: bool,
    /// Who hears of encryptions.
    pub audit: Auditor,
}

impl std::fmt::Debug for FormatOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FormatOptions")
            .field("size", &self.size)
            .field("reserve_percent", &self.reserve_percent)
            .field("force", &self.force)
            .field("fresh_store", &self.fresh_store)
            .finish_non_exhaustive()
    }
}

impl FormatOptions {
    fn reserve(&self) -> Result<u8, DiskError> {
        match self.reserve_percent {
            0 => Ok(10),
            percent if (LEAST_RESERVE..=MOST_RESERVE).contains(&percent) => Ok(percent),
            percent => Err(DiskError::Setting(format!(
                "a reserve of {percent} % cannot be: it is {LEAST_RESERVE} to {MOST_RESERVE} %"
            ))),
        }
    }
}

/// How large a store has to be for a disk, in bytes.
///
/// # Errors
/// [`DiskError::Setting`] for sizes and reserves that cannot be.
pub fn store_size_for(options: &FormatOptions) -> Result<u64, DiskError> {
    let size = options.size.ok_or_else(|| DiskError::Setting("the size of the disk is missing".into()))?;
    Ok(Geometry::plan(layout::check_size(size)?, options.reserve()?).store_blocks() * BLOCK)
}

/// The largest disk that fits a store of so many bytes, in bytes.
///
/// # Errors
/// [`DiskError::Setting`] where none does.
pub fn largest_size_on(store_size: u64, options: &FormatOptions) -> Result<u64, DiskError> {
    Ok(layout::largest_on(store_size / BLOCK, options.reserve()?)? * BLOCK)
}

/// Makes a disk on a store. With an anchor, it can be opened only with that anchor from then on.
///
/// # Errors
/// [`DiskError::NotEmpty`] where there is something on the store already, unless the options force it; [`DiskError::Setting`] for
/// what cannot be; what store and anchor say.
pub fn format(
    store: &dyn BlockStore,
    key: &RootKey,
    anchor: Option<&dyn Anchor>,
    options: &FormatOptions,
) -> Result<(), DiskError> {
    let reserve = options.reserve()?;
    let blocks = match options.size {
        Some(size) => layout::check_size(size)?,
        None => layout::largest_on(store.size() / BLOCK, reserve)?,
    };
    let geometry = Geometry::plan(blocks, reserve);
    if store.size() < geometry.store_blocks() * BLOCK {
        return Err(DiskError::Setting(format!(
            "{}: the store has {} bytes; a disk of {} bytes with {reserve} % reserve needs {}",
            store.describe(),
            store.size(),
            blocks * BLOCK,
            geometry.store_blocks() * BLOCK
        )));
    }
    if !options.force && !options.fresh_store {
        refuse_what_is_there(store)?;
    }
    let mut uuid = [0; 16];
    rand_core::OsRng.fill_bytes(&mut uuid);
    let master = MasterKey { generation: 1, key: SecretArray::random() };
    let checkpoint = Checkpoint {
        generation: 1,
        sequence: 0,
        chain: journal::origin(&uuid),
        journal_position: 0,
        blocks,
        fence: 0,
        clean: true,
        written_user: 0,
        written_store: 0,
        index: Root { entry: Entry::HOLE, height: node::height(blocks) },
        space: Root { entry: Entry::HOLE, height: node::height(geometry.pages()) },
        cursor: 0,
        epochs: Vec::new(),
        live: vec![0; usize::try_from(geometry.segments).unwrap_or(usize::MAX)],
        deferred: Vec::new(),
    };
    // The superblocks go last, so that a disk that was not finished is none.
    erase_superblocks(store)?;
    for generation in [1, 2] {
        let checkpoint = Checkpoint { generation, ..checkpoint.clone() };
        let Some(bytes) = checkpoint.encode(&master, &uuid, geometry.checkpoint_blocks, &options.audit) else {
            unreachable!("a slot has room for the first checkpoint")
        };
        store.write_at(geometry.checkpoint_slot(generation) * BLOCK, &bytes)?;
    }
    erase_journal(store, &geometry)?;
    store.flush()?;
    if let Some(anchor) = anchor {
        let first = AnchorState { disk: uuid, fence: 0, sequence: 0, root: checkpoint.chain };
        let before = anchor.read()?;
        if let Some(state) = before.filter(|_| !options.force) {
            return Err(DiskError::AnchorMismatch {
                store: store.describe(),
                anchor: anchor.describe(),
                what: format!("is in use already, at commit {} of another disk; force takes it", state.sequence),
            });
        }
        anchor.advance(before.as_ref(), &first)?;
    }
    let superblock = Superblock { generation: 1, uuid, geometry, anchored: anchor.is_some(), masters: vec![master] };
    write_superblock(store, &superblock, None, key, &options.audit)
}

/// Writes both copies, one after the other, first the one that is behind: a crash never leaves none that is up to date.
pub(crate) fn write_superblock(
    store: &dyn BlockStore,
    superblock: &Superblock,
    behind: Option<u64>,
    key: &RootKey,
    auditor: &Auditor,
) -> Result<(), DiskError> {
    let first = behind.unwrap_or(0);
    for copy in [first, 1 - first] {
        write_superblock_copy(store, superblock, copy, key, auditor)?;
    }
    Ok(())
}

/// Writes one copy, 0 or 1, and makes it durable.
pub(crate) fn write_superblock_copy(
    store: &dyn BlockStore,
    superblock: &Superblock,
    copy: u64,
    key: &RootKey,
    auditor: &Auditor,
) -> Result<(), DiskError> {
    store.write_at(copy * BLOCK, &superblock.encode(key, auditor).0)?;
    Ok(store.flush()?)
}

fn erase_superblocks(store: &dyn BlockStore) -> Result<(), DiskError> {
    store.write_at(0, &[0; 2 * BLOCK_SIZE])?;
    Ok(store.flush()?)
}

/// What an earlier disk left in the ring would look like records of an epoch that is not known. Zeroes are written, not asked for, and only
/// where there is something else: a file that has room for its ring keeps it (a filesystem would make holes of zeroes, and each commit
/// would have to find room first), and one that is sparse stays so.
fn erase_journal(store: &dyn BlockStore, geometry: &Geometry) -> Result<(), DiskError> {
    const PIECE: u64 = 256;
    let zeroes = Page::zeroed();
    let (mut block, end) = (geometry.journal_start(), geometry.data_start());
    while block < end {
        let count = (end - block).min(PIECE);
        let mut piece = vec![0; usize::try_from(count * BLOCK).unwrap_or(0)];
        // What cannot be read has to be written first: a device with checksums of its own may be like that when it is new.
        let unread = store.read_at(block * BLOCK, &mut piece).is_err();
        let used = (block..).zip(piece.chunks(BLOCK_SIZE)).filter(|(_, bytes)| unread || *bytes != zeroes.0);
        store.write_many(&runs(used.map(|(block, _)| (block, &*zeroes))))?;
        block += count;
    }
    Ok(())
}

fn refuse_what_is_there(store: &dyn BlockStore) -> Result<(), DiskError> {
    let mut page = Page::zeroed();
    for block in 0..2 {
        store.read_at(block * BLOCK, &mut page.0)?;
        let what = match superblock::peek(&page) {
            Ok(_) | Err(Refusal::Version(_)) => "a Nacre disk",
            Err(_) if page.0.iter().any(|byte| *byte != 0) => "its first 8 KiB are not zeroes",
            Err(_) => continue,
        };
        return Err(DiskError::NotEmpty { store: store.describe(), what: what.into() });
    }
    Ok(())
}

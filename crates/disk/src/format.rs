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

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io,
        sync::{Arc, Mutex, PoisonError},
    };

    use nacre_core::{BlockError, NoProgress};
    use nacre_testkit::sim::SimStore;

    use super::*;
    use crate::{CheckOptions, Disk, OpenOptions};

    /// A store like dm-integrity's devices: a block whose checksum does not fit cannot be read until it is written.
    struct Checksummed {
        store: Arc<SimStore>,
        unreadable: Mutex<BTreeSet<u64>>,
    }

    impl Checksummed {
        fn new(store: Arc<SimStore>, unreadable: impl IntoIterator<Item = u64>) -> Arc<Self> {
            Arc::new(Self { store, unreadable: Mutex::new(unreadable.into_iter().collect()) })
        }

        fn unreadable(&self, offset: u64, length: u64) -> Vec<u64> {
            let unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
            unreadable.range(offset / BLOCK..(offset + length).div_ceil(BLOCK)).copied().collect()
        }
    }

    impl BlockStore for Checksummed {
        fn size(&self) -> u64 {
            self.store.size()
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
            let length = buffer.len() as u64;
            if !self.unreadable(offset, length).is_empty() {
                return Err(BlockError::io("read", offset, length, io::Error::other("its checksum does not fit")));
            }
            self.store.read_at(offset, buffer)
        }

        fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
            self.store.write_at(offset, data)?;
            let blocks = offset / BLOCK..offset / BLOCK + data.len() as u64 / BLOCK;
            self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).retain(|block| !blocks.contains(block));
            Ok(())
        }

        fn flush(&self) -> Result<(), BlockError> {
            self.store.flush()
        }

        fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
            self.store.trim(offset, length)
        }

        fn describe(&self) -> String {
            "a store with checksums".to_owned()
        }
    }

    const SIZE: u64 = 32 << 20;

    fn options(force: bool) -> FormatOptions {
        FormatOptions { size: Some(SIZE), force, ..FormatOptions::default() }
    }

    fn key() -> RootKey {
        RootKey::from_bytes(&[7; 32]).unwrap()
    }

    fn geometry() -> Geometry {
        Geometry::plan(SIZE / BLOCK, 10)
    }

    fn open(store: &Arc<Checksummed>) -> Disk {
        Disk::open(store.clone(), &key(), None, &OpenOptions::default()).unwrap()
    }

    /// It is as good as any: empty, takes writes, has them when it is opened again, and is whole.
    #[track_caller]
    fn assert_new_disk(store: &Arc<Checksummed>) {
        let disk = open(store);
        let mut read = vec![1; 1 << 20];
        for offset in (0..SIZE).step_by(1 << 20) {
            disk.read_at(offset, &mut read).unwrap();
            assert!(read.iter().all(|byte| *byte == 0), "something is at {offset} of a new disk");
        }
        for offset in (0..SIZE).step_by(1 << 20) {
            disk.write_at(offset, &[9; 8192]).unwrap();
            disk.flush().unwrap();
        }
        disk.close().unwrap();
        let disk = open(store);
        disk.read_at(SIZE - (1 << 20), &mut read).unwrap();
        assert!(read.iter().enumerate().all(|(at, byte)| *byte == if at < 8192 { 9 } else { 0 }));
        disk.close().unwrap();
        let report = crate::check(store.clone(), &key(), None, &CheckOptions::default(), &NoProgress).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }

    #[test]
    fn a_store_of_which_nothing_can_be_read_yet_becomes_a_disk() {
        let store = SimStore::new(store_size_for(&options(true)).unwrap());
        let blocks = store.size() / BLOCK;
        let store = Checksummed::new(store, 0..blocks);
        // What is there cannot be told; that is for the user to say.
        let error = format(&*store, &key(), None, &options(false)).unwrap_err();
        assert!(matches!(error, DiskError::Block(BlockError::Io { .. })), "{error}");
        assert_eq!(store.store.counts().writes, 0);
        format(&*store, &key(), None, &options(true)).unwrap();
        let ring = geometry().journal_start()..geometry().data_start();
        assert!(store.unreadable(0, ring.end * BLOCK).iter().all(|block| !ring.contains(block)));
        assert_new_disk(&store);
    }

    #[test]
    fn a_ring_with_blocks_that_cannot_be_read_is_written_and_what_was_in_it_is_gone() {
        let ring = geometry().journal_start()..geometry().data_start();
        for every in [1, 7, 300] {
            let store = SimStore::new(store_size_for(&options(true)).unwrap());
            let unbroken = Checksummed::new(store.clone(), []);
            format(&*unbroken, &key(), None, &options(false)).unwrap();
            let disk = open(&unbroken);
            for block in 0..ring.end - ring.start {
                disk.write_at(block * BLOCK, &[5; BLOCK_SIZE]).unwrap();
                disk.flush().unwrap();
            }
            // A crash: the ring is what the next one would begin with.
            drop(disk);
            let store = Checksummed::new(store, ring.clone().step_by(every));
            format(&*store, &key(), None, &options(true)).unwrap();
            let mut left = vec![1; usize::try_from((ring.end - ring.start) * BLOCK).unwrap()];
            store.read_at(ring.start * BLOCK, &mut left).unwrap();
            assert!(left.iter().all(|byte| *byte == 0), "every {every}");
            assert_new_disk(&store);
        }
    }

    #[test]
    fn a_ring_that_cannot_be_written_is_an_error() {
        use nacre_testkit::sim::{Fault, FaultKind, Target};
        let store = SimStore::new(store_size_for(&options(true)).unwrap());
        // The superblocks and both checkpoints come first.
        store.fail(Fault { target: Target::Write, after: 3, kind: FaultKind::Io, times: 1 });
        let blocks = store.size() / BLOCK;
        let store = Checksummed::new(store, 2..blocks);
        let error = format(&*store, &key(), None, &options(false)).unwrap_err();
        assert!(matches!(error, DiskError::Block(BlockError::Io { op: "write", .. })), "{error}");
        store.store.heal();
        let none = Disk::open(store.clone(), &key(), None, &OpenOptions::default()).map(drop).unwrap_err();
        assert!(matches!(none, DiskError::NoDisk { .. }), "{none}");
    }
}

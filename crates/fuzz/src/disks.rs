//! What a secure disk reads from a store that nobody trusts: the decoders alone, as if the bytes were authentic, and a whole disk whose
//! image somebody changed.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, NoProgress, Page, check_range};
use nacre_disk::{
    CheckOptions, Disk, FormatOptions, OpenOptions, RootKey,
    checkpoint::Checkpoint,
    journal::{Clear, Record},
    node::Node,
    superblock,
};

fn page(bytes: &[u8]) -> Box<Page> {
    let mut page = Page::zeroed();
    page.0.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    page
}

/// What can be seen of a superblock without a key.
pub(crate) fn superblock(bytes: &[u8]) {
    let _ = superblock::peek(&page(bytes));
}

/// What is sealed in a checkpoint.
pub(crate) fn checkpoint(bytes: &[u8]) {
    if let Some(checkpoint) = Checkpoint::read(bytes) {
        assert!(checkpoint.live.len() * 4 + checkpoint.deferred.len() * 8 <= bytes.len(), "made of nothing");
    }
}

/// A block of the journal's ring, and what is sealed in a record.
pub(crate) fn journal(bytes: &[u8]) {
    let _ = Clear::parse(bytes);
    if let Some(record) = Record::read(bytes) {
        let blocks = record.changes.iter().map(|change| change.length().min(1 << 34)).sum::<u64>();
        let written = record.changes.iter().filter(|change| change.entry().is_some()).count() as u64;
        assert!(written <= blocks, "more was written than changed");
    }
}

/// A node of the index.
pub(crate) fn index_node(bytes: &[u8]) {
    let page = page(bytes);
    let node = Node::of(&page);
    if node.validate(100, 5000).is_ok() {
        let fits = |place| place == 0 || (100..5000).contains(&place);
        assert!(node.entries.iter().all(|entry| fits(entry.place())), "a node leads out of the store");
    }
}

/// Small numbers where numbers are: they are read as counts and lengths.
pub(crate) fn numbers() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = [64, 256, 257, BLOCK_SIZE - 64, BLOCK_SIZE]
        .map(|length| (0..length).map(|at| u8::from(at % 8 == 0)).collect())
        .to_vec();
    let magic = |magic: &[u8]| [magic, &[1, 0, 0, 0], &[0; 28]].concat();
    seeds.extend([magic(b"NACREDSK"), magic(b"NACRECKP"), magic(b"NJR1"), vec![0; 1 << 13]]);
    seeds
}

type Blocks = HashMap<u64, Arc<[u8; BLOCK_SIZE]>>;

/// A store in memory; blocks that nobody wrote are zeroes.
struct Memory {
    size: u64,
    blocks: Mutex<Blocks>,
}

impl Memory {
    fn with<T>(&self, take: impl FnOnce(&mut Blocks) -> T) -> T {
        take(&mut self.blocks.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BlockStore for Memory {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        check_range("read", offset, buffer.len() as u64, self.size)?;
        self.with(|blocks| {
            for (block, part) in (offset / BLOCK_SIZE as u64..).zip(buffer.chunks_mut(BLOCK_SIZE)) {
                match blocks.get(&block) {
                    Some(content) => part.copy_from_slice(&content[..]),
                    None => part.fill(0),
                }
            }
        });
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range("write", offset, data.len() as u64, self.size)?;
        self.with(|blocks| {
            for (block, part) in (offset / BLOCK_SIZE as u64..).zip(data.chunks(BLOCK_SIZE)) {
                let mut content = [0; BLOCK_SIZE];
                content.copy_from_slice(part);
                blocks.insert(block, Arc::new(content));
            }
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn trim(&self, _offset: u64, _length: u64) -> Result<(), BlockError> {
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

const DISK: u64 = 16 << 20;
/// Blocks of the disk that are written, so many apart.
const WRITTEN: u64 = 96;
const APART: u64 = 40;

/// A disk that crashed with a journal, and its key's material.
struct Victim {
    size: u64,
    blocks: Blocks,
    /// The blocks in use, in their order on the store.
    used: Vec<u64>,
}

const KEY: [u8; 32] = [9; 32];

fn content(lba: u64) -> [u8; BLOCK_SIZE] {
    let byte = u8::try_from(lba / APART % 251).unwrap_or_default();
    [byte.wrapping_add(1); BLOCK_SIZE]
}

/// `None` where the disk itself is broken; then [`image`] fails.
static VICTIM: LazyLock<Option<Victim>> = LazyLock::new(|| {
    let key = RootKey::from_bytes(&KEY).ok()?;
    let format = FormatOptions { size: Some(DISK), ..FormatOptions::default() };
    let size = nacre_disk::store_size_for(&format).ok()?;
    let store = Arc::new(Memory { size, blocks: Mutex::default() });
    nacre_disk::format(&*store, &key, None, &format).ok()?;
    let shared: Arc<dyn BlockStore> = Arc::<Memory>::clone(&store);
    let disk = Disk::open(shared, &key, None, &options()).ok()?;
    for number in 0..WRITTEN {
        disk.write_at(number * APART * BLOCK_SIZE as u64, &content(number * APART)).ok()?;
        if number % 10 == 9 {
            disk.flush().ok()?;
        }
    }
    disk.flush().ok()?;
    drop(disk);
    let blocks = store.with(|blocks| blocks.clone());
    let mut used: Vec<u64> =
        blocks.iter().filter(|(_, bytes)| bytes[..] != [0; BLOCK_SIZE]).map(|(at, _)| *at).collect();
    used.sort_unstable();
    Some(Victim { size, blocks, used })
});

fn options() -> OpenOptions {
    OpenOptions { background: false, ..OpenOptions::default() }
}

/// Five bytes a change: what is done (0 flips, 1 copies another block, 2 swaps, 3 zeroes from there on), to which block in use, and
/// two numbers. Whatever is opened then gives what was written, zeroes of before, or an error; and the verifier comes to an end.
pub(crate) fn image(bytes: &[u8]) {
    let Some(victim) = VICTIM.as_ref() else { panic_of_ours() };
    let mut blocks = victim.blocks.clone();
    for change in bytes.chunks_exact(5).take(32) {
        let [what, block, high, low, bit] = change else { continue };
        let at = victim.used.get(usize::from(*block) % victim.used.len().max(1)).copied().unwrap_or_default();
        let other = victim.used.get(usize::from(*bit) % victim.used.len().max(1)).copied().unwrap_or_default();
        let mut content = blocks.get(&at).map_or([0; BLOCK_SIZE], |content| **content);
        let byte = usize::from(u16::from_be_bytes([*high, *low])) % BLOCK_SIZE;
        match what % 4 {
            0 => content[byte] ^= 1 << (bit % 8),
            1 => content = blocks.get(&other).map_or(content, |other| **other),
            2 => {
                let theirs = blocks.insert(other, Arc::new(content));
                content = theirs.map_or(content, |theirs| *theirs);
            }
            _ => content[byte..].fill(0),
        }
        blocks.insert(at, Arc::new(content));
    }
    let store: Arc<dyn BlockStore> = Arc::new(Memory { size: victim.size, blocks: Mutex::new(blocks) });
    let Ok(key) = RootKey::from_bytes(&KEY) else { panic_of_ours() };
    let _ = nacre_disk::check(Arc::clone(&store), &key, None, &CheckOptions::default(), &NoProgress);
    let Ok(disk) = Disk::open(store, &key, None, &options()) else { return };
    let mut block = [0; BLOCK_SIZE];
    for number in 0..WRITTEN {
        let lba = number * APART;
        if disk.read_at(lba * BLOCK_SIZE as u64, &mut block).is_ok() {
            assert!(block == content(lba) || block == [0; BLOCK_SIZE], "LBA {lba} holds something else");
        }
    }
    let _ = disk.write_at(0, &block);
    let _ = disk.close();
}

#[expect(clippy::panic, reason = "without a disk there is nothing to fuzz, and nobody would notice")]
fn panic_of_ours() -> ! {
    panic!("a disk in memory can be formatted, written and dropped")
}

pub(crate) fn images() -> Vec<Vec<u8>> {
    vec![vec![], vec![0, 0, 0, 9, 1], vec![1, 3, 0, 0, 4], vec![2, 5, 0, 0, 60], vec![3, 2, 0, 0, 0], vec![0; 60]]
}

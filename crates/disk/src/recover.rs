//! Opening: the newest checkpoint, and what the journal says since.
//!
//! The journal is followed from where the checkpoint ends, record by record, as long as the chain holds. A commit counts when its last
//! record is there. The last one of all may have been under way when the crash came: whether the flush that it belongs to ever
//! returned, nobody knows. It counts when all of its blocks are there and authentic, and is made durable before anything is built on
//! it. Every record says which commit was durable when it was written; so a journal that ends before such a commit was
//! damaged, and that is an error, never an older state.

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, Page, ReadRequest};

use crate::{
    DiskError, RootKey,
    checkpoint::{self, Checkpoint},
    delta::Delta,
    journal::{Change, Clear, MOST_BLOCKS, Record, Ring},
    keys::{KeyRing, Purpose},
    layout::{BLOCK, Geometry},
    shared::BATCH,
    superblock::{self, Superblock},
};

/// Blocks of the journal that are read at once.
const WINDOW: u64 = 256;

/// What a store holds.
pub(crate) struct Recovered {
    pub(crate) superblock: Superblock,
    /// A copy of the superblock that is damaged or older than the other, 0 or 1.
    pub(crate) behind: Option<u64>,
    pub(crate) keys: KeyRing,
    pub(crate) checkpoint: Checkpoint,
    /// Slots whose checkpoint is not authentic.
    pub(crate) damaged_checkpoints: usize,
    pub(crate) replayed: Replayed,
}

/// What the journal says.
#[derive(Default)]
pub(crate) struct Replayed {
    pub(crate) delta: Delta,
    /// Every block that the journal wrote, also those that were written again later.
    pub(crate) places: Vec<u64>,
    pub(crate) sequence: u64,
    pub(crate) chain: [u8; 32],
    /// After which commits the chain was what: to compare with an anchor.
    pub(crate) history: Vec<(u64, [u8; 32])>,
    pub(crate) ring: Option<Ring>,
    /// Whether the last commit has to be made durable before it is built on.
    pub(crate) unsynced: bool,
}

/// A commit whose durability is not known yet.
struct Held {
    changes: Vec<Change>,
    ring: Ring,
    sequence: u64,
    chain: [u8; 32],
}

/// Reads what is on a store, and verifies it; nothing is written.
pub(crate) fn recover(store: &dyn BlockStore, key: &RootKey) -> Result<Recovered, DiskError> {
    let name = store.describe();
    let damaged = |what: String| DiskError::Damaged { store: name.clone(), what };
    let (superblock, behind) = read_superblock(store, key)?;
    superblock.geometry.validate(store.size() / BLOCK).map_err(&damaged)?;
    let geometry = superblock.geometry;
    let (found, damaged_checkpoints) = read_checkpoints(store, &superblock)?;
    let checkpoint = found
        .ok_or_else(|| damaged("both checkpoints are destroyed: their blocks are not what was written there".into()))?;
    sensible(&checkpoint, &geometry).map_err(&damaged)?;
    let masters = superblock.masters.iter().map(|master| crate::keys::MasterKey {
        generation: master.generation,
        key: nacre_core::SecretArray::fill(|slot| slot.copy_from_slice(master.key.expose())),
    });
    let keys = KeyRing::new(superblock.uuid, masters.collect(), &checkpoint.epochs);
    let journal = Journal { store, geometry, keys: &keys, window: Vec::new(), start: 0 };
    let replayed = journal.replay(&checkpoint, damaged_checkpoints > 0, &name)?;
    Ok(Recovered { superblock, behind, keys, checkpoint, damaged_checkpoints, replayed })
}

/// The superblock, and which copy of it is damaged or older.
pub(crate) fn read_superblock(store: &dyn BlockStore, key: &RootKey) -> Result<(Superblock, Option<u64>), DiskError> {
    let name = store.describe();
    if store.size() < 2 * BLOCK {
        return Err(DiskError::NoDisk { store: name });
    }
    let mut copies = [Page::zeroed(), Page::zeroed()];
    for (at, copy) in (0..).zip(&mut copies) {
        store.read_at(at * BLOCK, &mut copy.0)?;
    }
    let [first, second] = &copies;
    superblock::choose([first, second], key, &name)
}

/// The generations of the master keys that the two slots say they are sealed under.
pub(crate) fn checkpoint_masters(store: &dyn BlockStore, geometry: &Geometry) -> Result<Vec<u32>, BlockError> {
    let mut found = Vec::new();
    for slot in 0..2 {
        let mut page = Page::zeroed();
        store.read_at(geometry.checkpoint_slot(slot) * BLOCK, &mut page.0)?;
        found.extend(checkpoint::Clear::parse(&page.0).map(|clear| clear.master));
    }
    Ok(found)
}

/// The newer of the two checkpoints that is authentic, and how many are not.
fn read_checkpoints(store: &dyn BlockStore, superblock: &Superblock) -> Result<(Option<Checkpoint>, usize), DiskError> {
    let geometry = superblock.geometry;
    let mut found: Option<Checkpoint> = None;
    let mut damaged = 0;
    for slot in 0..2 {
        let offset = geometry.checkpoint_slot(slot) * BLOCK;
        let mut bytes = vec![0; BLOCK_SIZE];
        store.read_at(offset, &mut bytes)?;
        let decoded = checkpoint::Clear::parse(&bytes).and_then(|clear| {
            let master = superblock.masters.iter().find(|master| master.generation == clear.master)?;
            (clear.total() as u64 <= geometry.checkpoint_blocks * BLOCK).then_some((master, clear.total()))
        });
        let checkpoint = match decoded {
            None => None,
            Some((master, total)) => {
                bytes.resize(total, 0);
                let (_, rest) = bytes.split_at_mut(BLOCK_SIZE);
                store.read_at(offset + BLOCK, rest)?;
                Checkpoint::decode(&mut bytes, master, &superblock.uuid)
            }
        };
        match checkpoint.filter(|checkpoint| checkpoint.generation % 2 == slot) {
            None => damaged += 1,
            Some(new) if found.as_ref().is_none_or(|old| new.generation > old.generation) => found = Some(new),
            Some(_) => {}
        }
    }
    Ok((found, damaged))
}

/// What is wrong with a checkpoint that is authentic.
fn sensible(checkpoint: &Checkpoint, geometry: &Geometry) -> Result<(), String> {
    let inside = |place: u64| (geometry.data_start()..geometry.store_blocks()).contains(&place);
    let roots = [checkpoint.index.entry, checkpoint.space.entry];
    let sane = checkpoint.live.len() as u64 <= geometry.segments
        && checkpoint.journal_position <= geometry.journal_blocks
        && checkpoint.blocks <= geometry.slots()
        && roots.iter().all(|root| root.is_hole() || inside(root.place()))
        && checkpoint.deferred.iter().all(|place| inside(*place));
    if sane { Ok(()) } else { Err("the checkpoint is authentic and does not fit the superblock".into()) }
}

/// The journal on a store.
struct Journal<'a> {
    store: &'a dyn BlockStore,
    geometry: Geometry,
    keys: &'a KeyRing,
    window: Vec<u8>,
    /// Where the window begins, in blocks of the ring.
    start: u64,
}

impl Journal<'_> {
    /// Some blocks of the ring.
    fn blocks(&mut self, position: u64, count: u64) -> Result<Option<&[u8]>, BlockError> {
        if position + count > self.geometry.journal_blocks {
            return Ok(None);
        }
        let held = self.window.len() as u64 / BLOCK;
        if position < self.start || position + count > self.start + held {
            let length = WINDOW.max(count).min(self.geometry.journal_blocks - position);
            self.window.resize(usize::try_from(length * BLOCK).unwrap_or(usize::MAX), 0);
            self.store.read_at((self.geometry.journal_start() + position) * BLOCK, &mut self.window)?;
            self.start = position;
        }
        let from = usize::try_from((position - self.start) * BLOCK).unwrap_or(usize::MAX);
        let to = from + usize::try_from(count * BLOCK).unwrap_or(usize::MAX);
        Ok(self.window.get(from..to))
    }

    /// The authentic record that begins at a position, its length, and the chain after it.
    fn record(&mut self, position: u64) -> Result<Option<(Record, u64, [u8; 32])>, BlockError> {
        let Some(clear) = self.blocks(position, 1)?.and_then(Clear::parse) else { return Ok(None) };
        let Some(keys) = self.keys.epoch(clear.epoch) else { return Ok(None) };
        let Some(bytes) = self.blocks(position, clear.blocks as u64)? else { return Ok(None) };
        let decoded = Record::decode(&mut bytes.to_vec(), &keys);
        Ok(decoded.map(|(record, chain)| (record, clear.blocks as u64, chain)))
    }

    /// The record that follows, and where it begins.
    fn next(&mut self, ring: &Ring, chain: &[u8; 32]) -> Result<Option<(Record, u64, [u8; 32])>, BlockError> {
        let mut starts = vec![ring.head];
        if ring.head + MOST_BLOCKS as u64 > ring.length && ring.head > 0 {
            starts.push(0);
        }
        for start in starts {
            if let Some(found) = self.record(start)?
                && found.0.chain == *chain
                && (start == ring.head || ring.head + found.1 > ring.length)
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn replay(mut self, checkpoint: &Checkpoint, suspicious: bool, name: &str) -> Result<Replayed, DiskError> {
        let mut replayed = Replayed {
            sequence: checkpoint.sequence,
            chain: checkpoint.chain,
            history: vec![(checkpoint.sequence, checkpoint.chain)],
            ..Replayed::default()
        };
        let mut ring = Ring::new(self.geometry.journal_blocks, checkpoint.journal_position);
        let mut durable_ring = ring;
        let (mut chain, mut sequence) = (checkpoint.chain, checkpoint.sequence);
        let mut open: Vec<Change> = Vec::new();
        let mut held: Option<Held> = None;
        let mut records = 0_u64;
        while let Some((record, blocks, next)) = self.next(&ring, &chain)? {
            if record.sequence != sequence + 1 || ring.take(blocks).is_none() {
                break;
            }
            if record.checkpoint > checkpoint.generation {
                return Err(lost_checkpoint(name, record.checkpoint, checkpoint.generation));
            }
            if let Some(commit) = held.take_if(|held| held.sequence <= record.synced) {
                durable_ring = commit.ring;
                replayed.apply(commit);
            }
            records += 1;
            chain = next;
            open.extend_from_slice(&record.changes);
            if record.commit {
                sequence = record.sequence;
                held = Some(Held { changes: std::mem::take(&mut open), ring, sequence, chain });
            }
        }
        if let Some(commit) = held
            && self.is_complete(&commit.changes)?
        {
            durable_ring = commit.ring;
            replayed.apply(commit);
            replayed.unsynced = true;
        }
        replayed.ring = Some(durable_ring);
        if suspicious || records > 0 || !checkpoint.clean {
            self.look_for_later(&replayed, checkpoint, name)?;
        }
        Ok(replayed)
    }

    /// Whether all blocks of a commit are there and authentic.
    fn is_complete(&self, changes: &[Change]) -> Result<bool, BlockError> {
        let mut last: std::collections::HashMap<u64, &Change> = std::collections::HashMap::new();
        changes.iter().filter(|change| change.entry().is_some()).for_each(|change| {
            last.insert(change.lba(), change);
        });
        let mut wanted: Vec<&Change> = last.into_values().collect();
        wanted.sort_unstable_by_key(|change| change.entry().map(|entry| entry.place()));
        for group in wanted.chunks(BATCH) {
            let mut pages: Vec<Page> = vec![Page([0; BLOCK_SIZE]); group.len()];
            let places = group.iter().filter_map(|change| change.entry());
            let mut requests: Vec<_> = places
                .zip(&mut pages)
                .map(|(entry, page)| ReadRequest::new(entry.place() * BLOCK, &mut page.0))
                .collect();
            if requests.iter().any(|request| request.offset >= self.geometry.store_blocks() * BLOCK) {
                return Ok(false);
            }
            self.store.read_many(&mut requests);
            requests.into_iter().try_for_each(|request| request.outcome)?;
            for (change, page) in group.iter().zip(&mut pages) {
                let Some(entry) = change.entry() else { continue };
                let keys = self.keys.epoch(entry.epoch());
                let aad = change.lba().to_le_bytes();
                let open = |keys: std::sync::Arc<crate::keys::EpochKeys>| {
                    keys.sealer(Purpose::Data).open(entry.count(), &aad, entry.tag(), &mut page.0)
                };
                if !keys.is_some_and(open) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Looks for records that say that more was durable than was found: then something in between is damaged.
    fn look_for_later(&mut self, found: &Replayed, checkpoint: &Checkpoint, name: &str) -> Result<(), DiskError> {
        let known = checkpoint.epochs.iter().map(|epoch| epoch.id).max().unwrap_or(0);
        let mut position = 0;
        while position < self.geometry.journal_blocks {
            let clear = self.blocks(position, 1)?.and_then(Clear::parse);
            if let Some(clear) = clear {
                if clear.epoch > known {
                    return Err(DiskError::Damaged {
                        store: name.to_owned(),
                        what: format!(
                            "the journal has records of epoch {}, and the newest checkpoint that is authentic knows none \
                             after {known}: a later checkpoint was destroyed",
                            clear.epoch
                        ),
                    });
                }
                if let Some((record, _, _)) = self.record(position)? {
                    if record.checkpoint > checkpoint.generation {
                        return Err(lost_checkpoint(name, record.checkpoint, checkpoint.generation));
                    }
                    if record.synced > found.sequence {
                        return Err(DiskError::Damaged {
                            store: name.to_owned(),
                            what: format!(
                                "the journal ends at commit {}, and commit {} was durable: block {} of the store or one \
                                 near it is not what was written there",
                                found.sequence,
                                record.synced,
                                self.geometry.journal_start() + found.ring.map_or(0, |ring| ring.head)
                            ),
                        });
                    }
                }
            }
            position += 1;
        }
        Ok(())
    }
}

fn lost_checkpoint(name: &str, known: u64, found: u64) -> DiskError {
    DiskError::Damaged {
        store: name.to_owned(),
        what: format!("checkpoint {known} was durable, and only {found} is authentic: its slot was changed"),
    }
}

impl Replayed {
    fn apply(&mut self, commit: Held) {
        for change in &commit.changes {
            match change.entry() {
                Some(entry) => {
                    self.delta.write(change.lba(), entry);
                    self.places.push(entry.place());
                }
                None => self.delta.trim(change.lba(), change.length()),
            }
        }
        self.sequence = commit.sequence;
        self.chain = commit.chain;
        self.history.push((commit.sequence, commit.chain));
    }
}

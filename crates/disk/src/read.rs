//! Reads.

use std::{sync::atomic::Ordering::Relaxed, time::Instant};

use nacre_core::{BLOCK_SIZE, BlockError, Page, ReadRequest, check_range};

use crate::{
    keys::Purpose,
    layout::BLOCK,
    node::Entry,
    shared::{Log, Shared, Trees},
    stats::add,
    tree::Tree,
};

/// How often a read looks again, when what it found was overtaken by a checkpoint. One checkpoint can overtake it once; this many in
/// the time of one read do not happen.
const TRIES: usize = 16;

/// What is known of a block to be read.
#[derive(Clone, Debug)]
enum Block {
    /// The delta does not know it: the tree does.
    Tree,
    /// There is nothing: zeroes.
    Hole,
    /// It is on the store.
    Stored(Entry),
    /// Its ciphertext is in the buffer already.
    Fetched(Entry),
    /// It could not be found out; tried once more, alone.
    Failed,
}

impl Shared {
    /// Carries out reads, all together.
    pub(crate) fn read_requests(&self, requests: &mut [ReadRequest<'_>]) {
        let begin = Instant::now();
        let size = self.size.load(Relaxed);
        for request in requests.iter_mut() {
            request.outcome = check_range("read", request.offset, request.buffer.len() as u64, size);
            add(&self.counters.reads, 1);
            add(&self.counters.user_read_bytes, request.buffer.len() as u64);
        }
        let mut good: Vec<&mut ReadRequest<'_>> =
            requests.iter_mut().filter(|request| request.outcome.is_ok() && !request.buffer.is_empty()).collect();
        let (mut blocks, trees) = self.survey(&mut good);
        self.consult(&mut blocks, &trees, &good);
        self.fetch(&mut blocks, &mut good);
        let mut rest = blocks.into_iter();
        for request in good {
            for (lba, buffer) in (request.offset / BLOCK..).zip(request.buffer.chunks_exact_mut(BLOCK_SIZE)) {
                let Some(block) = rest.next() else { break };
                if let Err(error) = self.finish(lba, block, buffer) {
                    buffer.fill(0);
                    request.outcome = request.outcome.clone().and(Err(error));
                }
            }
        }
        self.counters.read_latency.add(begin.elapsed());
    }

    /// What the delta knows of each block, and the trees of the same moment.
    fn survey(&self, requests: &mut [&mut ReadRequest<'_>]) -> (Vec<Block>, Trees) {
        let count = requests.iter().map(|request| request.buffer.len() / BLOCK_SIZE).sum();
        let mut blocks = Vec::with_capacity(count);
        let log = self.lock();
        for request in requests {
            for (lba, buffer) in (request.offset / BLOCK..).zip(request.buffer.chunks_exact_mut(BLOCK_SIZE)) {
                blocks.push(Self::peek(&log, lba, buffer));
            }
        }
        (blocks, log.trees)
    }

    fn peek(log: &Log, lba: u64, buffer: &mut [u8]) -> Block {
        let known = log.delta.get(lba).or_else(|| log.frozen.as_ref()?.delta.get(lba));
        match known {
            None => Block::Tree,
            Some(entry) if entry.is_hole() => Block::Hole,
            Some(entry) => match log.pending(entry.place()) {
                Some(Page(ciphertext)) => {
                    buffer.copy_from_slice(ciphertext);
                    Block::Fetched(entry)
                }
                None => Block::Stored(entry),
            },
        }
    }

    /// Asks the tree for what the delta does not know.
    fn consult(&self, blocks: &mut [Block], trees: &Trees, requests: &[&mut ReadRequest<'_>]) {
        let lbas = requests.iter().flat_map(|request| {
            let first = request.offset / BLOCK;
            first..first + (request.buffer.len() / BLOCK_SIZE) as u64
        });
        let unknown: (Vec<u64>, Vec<&mut Block>) =
            lbas.zip(blocks.iter_mut()).filter(|(_, block)| matches!(block, Block::Tree)).unzip();
        if unknown.0.is_empty() {
            return;
        }
        let entries = self.look_up(Tree::Index, &trees.index, &unknown.0);
        for (block, entry) in unknown.1.into_iter().zip(entries) {
            *block = match entry {
                Ok(entry) if entry.is_hole() => Block::Hole,
                Ok(entry) => Block::Stored(entry),
                Err(_) => Block::Failed,
            };
        }
    }

    /// Reads ciphertext, neighbours together.
    fn fetch(&self, blocks: &mut [Block], requests: &mut [&mut ReadRequest<'_>]) {
        let mut reads: Vec<ReadRequest<'_>> = Vec::new();
        let mut lengths: Vec<usize> = Vec::new();
        let mut at = 0;
        for request in requests.iter_mut() {
            let mut rest = &mut *request.buffer;
            while !rest.is_empty() {
                let length = run(blocks.get(at..).unwrap_or_default(), rest.len() / BLOCK_SIZE);
                let (part, after) = rest.split_at_mut(length.max(1) * BLOCK_SIZE);
                if let (1.., Some(Block::Stored(entry))) = (length, blocks.get(at)) {
                    reads.push(ReadRequest::new(entry.place() * BLOCK, part));
                    lengths.push(at);
                }
                at += length.max(1);
                rest = after;
            }
        }
        match reads.as_mut_slice() {
            [] => return,
            [only] => only.outcome = self.store.read_at(only.offset, only.buffer),
            many => self.store.read_many(many),
        }
        for (read, at) in reads.into_iter().zip(lengths) {
            for block in blocks.iter_mut().skip(at).take(read.buffer.len() / BLOCK_SIZE) {
                if let Block::Stored(entry) = block {
                    *block = match &read.outcome {
                        Ok(()) => Block::Fetched(*entry),
                        Err(_) => Block::Stored(*entry), // tried once more, alone
                    };
                }
            }
        }
    }

    /// Decrypts a block, or reads it again where it is not what it has to be.
    fn finish(&self, lba: u64, block: Block, buffer: &mut [u8]) -> Result<(), BlockError> {
        match block {
            Block::Hole => {
                buffer.fill(0);
                Ok(())
            }
            Block::Fetched(entry) if self.open_data(&entry, lba, buffer) => Ok(()),
            Block::Fetched(entry) => self.read_again(lba, Some(entry), buffer),
            Block::Stored(_) | Block::Tree | Block::Failed => self.read_again(lba, None, buffer),
        }
    }

    /// Decrypts a block of data in place; whether it was authentic.
    pub(crate) fn open_data(&self, entry: &Entry, lba: u64, buffer: &mut [u8]) -> bool {
        let Some(keys) = self.keys.epoch(entry.epoch()) else { return false };
        keys.sealer(Purpose::Data).open(entry.count(), &lba.to_le_bytes(), entry.tag(), buffer)
    }

    /// Reads one block by itself. A checkpoint may have freed what was found before, and something else may be there by now: then the
    /// index says something new. Where it says the same as before, the store is to blame.
    pub(crate) fn read_again(&self, lba: u64, mut failed: Option<Entry>, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut error = None;
        for _ in 0..TRIES {
            let (block, trees) = {
                let log = self.lock();
                (Self::peek(&log, lba, buffer), log.trees)
            };
            let entry = match block {
                Block::Hole => Entry::HOLE,
                Block::Fetched(entry) if self.open_data(&entry, lba, buffer) => return Ok(()),
                Block::Fetched(entry) | Block::Stored(entry) => entry,
                Block::Tree | Block::Failed => match self.look_up(Tree::Index, &trees.index, &[lba]).pop() {
                    Some(Ok(entry)) => entry,
                    answer => {
                        // A node was overtaken, or is damaged: the same root twice tells.
                        let unchanged = self.lock().trees.index == trees.index;
                        error = answer.and_then(Result::err);
                        if unchanged {
                            break;
                        }
                        continue;
                    }
                },
            };
            if entry.is_hole() {
                buffer.fill(0);
                return Ok(());
            }
            if failed == Some(entry) {
                break;
            }
            match self.store.read_at(entry.place() * BLOCK, buffer) {
                Ok(()) if self.open_data(&entry, lba, buffer) => return Ok(()),
                Ok(()) => {}
                Err(failure) => error = Some(failure),
            }
            failed = Some(entry);
        }
        add(&self.counters.integrity_errors, u64::from(error.is_none()));
        Err(error.unwrap_or_else(|| BlockError::Integrity {
            first: lba,
            count: 1,
            what: format!("{} is not what was written there", describe(failed)),
        }))
    }
}

fn describe(entry: Option<Entry>) -> String {
    entry.map_or_else(|| "it".to_owned(), |entry| format!("block {} of the store", entry.place()))
}

/// How many of the first blocks, `most` at most, are on the store in a row.
fn run(blocks: &[Block], most: usize) -> usize {
    let Some(Block::Stored(first)) = blocks.first() else { return 0 };
    let follows = |(at, block): &(usize, &Block)| match block {
        Block::Stored(entry) => entry.place() == first.place() + *at as u64,
        _ => false,
    };
    blocks.iter().take(most).enumerate().take_while(follows).count()
}

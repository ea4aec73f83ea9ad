//! What every [`BlockStore`] has to do, as a test: random operations against a plain model, refusals, threads.

use std::{collections::BTreeSet, thread};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, ReadRequest, WriteRequest};

use crate::Rng;

/// Blocks of one request at the most.
const MOST_BLOCKS: usize = 20;

/// Checks a store. `open` gets the store that was open before and gives it opened again (of a store that does not outlive its process: the
/// same); with `None` it makes it new. What a new one reads as is not looked at.
pub fn check_store<S: BlockStore>(seed: u64, operations: usize, mut open: impl FnMut(Option<S>) -> S) {
    let store = open(None);
    assert!(store.size() >= 64 * BLOCK_SIZE as u64, "the test wants 64 blocks");
    assert!(!store.describe().is_empty());
    refusals(&store);
    threads(&store);
    let size = usize::try_from(store.size()).unwrap();
    let mut run = Run {
        rng: Rng::new(seed),
        model: vec![0; size],
        unknown: (0..size / BLOCK_SIZE).collect(),
        step: format!("seed {seed}: start"),
    };
    let mut store = Some(store);
    for number in 0..operations {
        let now = store.take().unwrap();
        store = Some(if run.rng.below(operations.div_ceil(6)) == 0 {
            run.step = format!("seed {seed}, operation {number}: reopen");
            now.flush().unwrap();
            let again = open(Some(now));
            assert_eq!(again.size(), run.model.len() as u64, "{}", run.step);
            run.read(&again, 0, run.model.len() / BLOCK_SIZE);
            again
        } else {
            run.step = format!("seed {seed}, operation {number}");
            run.operate(&now);
            now
        });
    }
    run.read(&store.unwrap(), 0, run.model.len() / BLOCK_SIZE);
}

struct Run {
    rng: Rng,
    model: Vec<u8>,
    /// Blocks whose content is anybody's guess: never written, or trimmed.
    unknown: BTreeSet<usize>,
    step: String,
}

impl Run {
    fn operate(&mut self, store: &impl BlockStore) {
        let total = self.model.len() / BLOCK_SIZE;
        let count = 1 + self.rng.below(MOST_BLOCKS);
        let first = self.rng.below(total - count);
        let (offset, length) = ((first * BLOCK_SIZE) as u64, (count * BLOCK_SIZE) as u64);
        match self.rng.below(20) {
            0..5 => {
                let data = self.data(first, count);
                // Callers' memory is aligned to nothing.
                let mut moved = vec![0; data.len() + 1];
                moved[1..].copy_from_slice(&data);
                store.write_at(offset, &moved[1..]).unwrap();
            }
            5..8 => self.write_many(store, total),
            8..11 => self.read(store, first, count),
            11..14 => self.read_many(store, total),
            14..16 => store.flush().unwrap(),
            16 => {
                store.trim(offset, length).unwrap();
                self.unknown.extend(first..first + count);
            }
            17 | 18 => {
                store.write_zeroes(offset, length).unwrap();
                self.model[first * BLOCK_SIZE..(first + count) * BLOCK_SIZE].fill(0);
                self.unknown.retain(|block| !(first..first + count).contains(block));
            }
            _ => {
                let size = (total + 1 + self.rng.below(8)) * BLOCK_SIZE;
                match store.grow(size as u64) {
                    Ok(()) => {
                        assert_eq!(store.size(), size as u64);
                        self.model.resize(size, 0);
                        self.unknown.extend(total..size / BLOCK_SIZE);
                    }
                    Err(BlockError::Unsupported(_)) => assert_eq!(store.size(), self.model.len() as u64),
                    Err(error) => panic!("{}: {error}", self.step),
                }
            }
        }
    }

    /// New content for some blocks, which the model has from now on.
    fn data(&mut self, first: usize, count: usize) -> Vec<u8> {
        let data = self.rng.bytes(count * BLOCK_SIZE);
        self.model[first * BLOCK_SIZE..(first + count) * BLOCK_SIZE].copy_from_slice(&data);
        self.unknown.retain(|block| !(first..first + count).contains(block));
        data
    }

    /// Writes to several places, of several buffers each; no two overlap.
    fn write_many(&mut self, store: &impl BlockStore, total: usize) {
        let mut places = Vec::new();
        let mut at = self.rng.below(4);
        while at + 4 < total && places.len() < 40 {
            let count = 1 + self.rng.below(4);
            places.push((at, self.data(at, count)));
            at += count + self.rng.below(8);
        }
        let requests: Vec<WriteRequest<'_>> = places
            .iter()
            .map(|(at, data)| WriteRequest {
                offset: (at * BLOCK_SIZE) as u64,
                buffers: data.chunks(BLOCK_SIZE).collect(),
            })
            .collect();
        store.write_many(&requests).unwrap();
    }

    fn read_many(&mut self, store: &impl BlockStore, total: usize) {
        let places: Vec<usize> = (0..self.rng.below(150)).map(|_| self.rng.below(total)).collect();
        let mut buffers = vec![[0xa5; BLOCK_SIZE]; places.len()];
        let mut requests: Vec<ReadRequest<'_>> = places
            .iter()
            .zip(&mut buffers)
            .map(|(at, buffer)| ReadRequest::new((at * BLOCK_SIZE) as u64, buffer))
            .collect();
        // One of them is beyond the end, and only that one fails.
        let mut beyond = [0; BLOCK_SIZE];
        requests.push(ReadRequest::new(store.size(), &mut beyond));
        store.read_many(&mut requests);
        let outcomes: Vec<_> = requests.into_iter().map(|request| request.outcome).collect();
        let (last, others) = outcomes.split_last().unwrap();
        assert!(matches!(last, Err(BlockError::OutOfRange { .. })), "{}: {last:?}", self.step);
        for ((outcome, at), buffer) in others.iter().zip(places).zip(&buffers) {
            outcome.as_ref().unwrap();
            self.compare(at, buffer);
        }
    }

    fn read(&self, store: &impl BlockStore, first: usize, count: usize) {
        let mut buffer = vec![0xa5; count * BLOCK_SIZE + 1];
        store.read_at((first * BLOCK_SIZE) as u64, &mut buffer[1..]).unwrap();
        for (at, block) in (first..).zip(buffer[1..].chunks(BLOCK_SIZE)) {
            self.compare(at, block);
        }
    }

    fn compare(&self, at: usize, block: &[u8]) {
        let same = block == &self.model[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE];
        assert!(same || self.unknown.contains(&at), "{}: block {at} is not what was written", self.step);
    }
}

/// What is not made of whole blocks inside is refused, by every operation.
fn refusals(store: &impl BlockStore) {
    let (block, size) = (BLOCK_SIZE as u64, store.size());
    let mut buffer = vec![0; 2 * BLOCK_SIZE];
    for (offset, length) in [(1, 4096), (0, 4095), (0, 1), (size, 4096), (size - block, 8192), (u64::MAX - 4095, 4096)]
    {
        let part = &mut buffer[..length];
        let refused = |outcome: Result<(), BlockError>| {
            assert!(matches!(outcome, Err(BlockError::OutOfRange { .. })), "{offset} {length}: {outcome:?}");
        };
        refused(store.read_at(offset, part));
        refused(store.write_at(offset, part));
        refused(store.trim(offset, length as u64));
        refused(store.write_zeroes(offset, length as u64));
        refused(store.write_many(&[WriteRequest { offset, buffers: vec![part] }]));
        let mut requests = [ReadRequest::new(offset, part)];
        store.read_many(&mut requests);
        let [request] = requests;
        refused(request.outcome);
    }
    assert!(store.grow(size - block).is_err());
    store
        .grow(size)
        .or_else(|error| if matches!(error, BlockError::Unsupported(_)) { Ok(()) } else { Err(error) })
        .unwrap();
    // Nothing is a whole number of blocks, even at the very end.
    store.read_at(size, &mut []).unwrap();
    store.write_at(size, &[]).unwrap();
    store.trim(size, 0).unwrap();
    store.write_zeroes(size, 0).unwrap();
    store.write_many(&[]).unwrap();
    store.read_many(&mut []);
}

/// Threads with places of their own do not disturb each other.
fn threads(store: &impl BlockStore) {
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            scope.spawn(move || {
                let mut rng = Rng::new(thread);
                let start = thread * 16 * BLOCK_SIZE as u64;
                for _ in 0..20 {
                    let data = rng.bytes(16 * BLOCK_SIZE);
                    let blocks = || (0..).map(|at| start + at * BLOCK_SIZE as u64).zip(data.chunks(BLOCK_SIZE));
                    let requests: Vec<_> =
                        blocks().map(|(offset, block)| WriteRequest { offset, buffers: vec![block] }).collect();
                    store.write_many(&requests).unwrap();
                    if rng.below(4) == 0 {
                        store.flush().unwrap();
                    }
                    let mut back = vec![0; data.len()];
                    let mut requests: Vec<_> = blocks()
                        .zip(back.chunks_mut(BLOCK_SIZE))
                        .map(|((at, _), to)| ReadRequest::new(at, to))
                        .collect();
                    store.read_many(&mut requests);
                    assert!(requests.iter().all(|request| request.outcome.is_ok()));
                    assert!(back == data, "thread {thread}");
                }
            });
        }
    });
}

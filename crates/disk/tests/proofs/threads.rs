//! Many threads and one disk, whose background work runs.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nacre_core::{BlockStore as _, ReadRequest, WriteRequest};
use nacre_testkit::{
    Rng,
    sim::{Op, Profile, Workload, content, seeds},
};

use crate::rig::{BLOCK, Opened, Setup};

const WRITERS: u64 = 4;

/// What one thread knows of its own blocks: what it last wrote, and all that it wrote since its last flush.
#[derive(Default)]
struct Owned {
    now: HashMap<u64, u64>,
    flushed: HashMap<u64, u64>,
    since: HashMap<u64, Vec<u64>>,
}

/// One thread works on its own part, and sees what it wrote.
fn write_own(opened: &Opened, part: u64, blocks: u64, tokens: &AtomicU64, owned: &Mutex<Owned>, seed: u64) {
    let base = part * blocks;
    let profile = Profile { longest: 16, flush: 10, reopen: 0, crash: 0, ..Profile::default() };
    let mut workload = Workload::new(seed, blocks, &profile);
    for _ in 0..400 {
        let mut owned = owned.lock().unwrap();
        match workload.next_op(blocks) {
            Op::Write { lba, count } => {
                let fresh: Vec<u64> = (0..count).map(|_| tokens.fetch_add(1, Ordering::Relaxed)).collect();
                let data: Vec<[u8; 4096]> = fresh.iter().map(|token| content(*token)).collect();
                for (lba, token) in (lba..).zip(&fresh) {
                    owned.since.entry(lba).or_default().push(*token);
                    owned.now.insert(lba, *token);
                }
                let offset = (base + lba) * BLOCK;
                let buffers = data.iter().map(|block| &block[..]).collect();
                opened.disk.write_many(&[WriteRequest { offset, buffers }]).unwrap();
            }
            Op::Trim { lba, count } | Op::Zero { lba, count } => {
                for lba in lba..lba + count {
                    owned.since.entry(lba).or_default().push(0);
                    owned.now.insert(lba, 0);
                }
                opened.disk.trim((base + lba) * BLOCK, count * BLOCK).unwrap();
            }
            Op::Read { lba, count } => {
                let mut data = vec![[0u8; 4096]; usize::try_from(count).unwrap()];
                let mut requests: Vec<ReadRequest<'_>> = (base + lba..)
                    .zip(&mut data)
                    .map(|(lba, buffer)| ReadRequest::new(lba * BLOCK, &mut buffer[..]))
                    .collect();
                opened.disk.read_many(&mut requests);
                requests.into_iter().for_each(|request| request.outcome.unwrap());
                for (lba, block) in (lba..).zip(&data) {
                    let token = owned.now.get(&lba).copied().unwrap_or(0);
                    assert!(*block == content(token), "part {part}, LBA {lba}");
                }
            }
            _ => {
                opened.disk.flush().unwrap();
                owned.flushed = owned.now.clone();
                owned.since.clear();
            }
        }
    }
}

/// After a crash each block holds what was flushed, or something that was written since.
fn judge_crash(setup: &Setup, opened: &Opened, parts: &[Mutex<Owned>], blocks: u64, rng: &mut Rng) {
    let (_, medium) = opened.crashed(rng);
    let recovered = setup.open(&medium).unwrap();
    let mut block = [0; 4096];
    for (part, owned) in (0..).zip(parts) {
        let owned = owned.lock().unwrap();
        for lba in 0..blocks {
            recovered.disk.read_at((part * blocks + lba) * BLOCK, &mut block).unwrap();
            let flushed = owned.flushed.get(&lba).copied().unwrap_or(0);
            let since = owned.since.get(&lba).map(Vec::as_slice).unwrap_or_default();
            let right = [flushed].iter().chain(since).any(|token| block == content(*token));
            assert!(right, "part {part}, LBA {lba} after a crash");
        }
    }
}

#[test]
fn threads_see_their_own_writes_and_crashes_keep_what_they_flushed() {
    seeds(60, Duration::from_secs(10), |seed| {
        let rng = &mut Rng::new(seed);
        let memory = *rng.pick(&[crate::rig::LITTLE_MEMORY, 64 << 20]);
        let setup = Setup { background: true, memory, size: 24 << 20, ..Setup::default() };
        let opened = setup.open(&setup.format()).unwrap();
        let blocks = setup.blocks() / WRITERS;
        let tokens = AtomicU64::new(1);
        let parts: Vec<Mutex<Owned>> = (0..WRITERS).map(|_| Mutex::default()).collect();
        for round in 0..2 {
            thread::scope(|scope| {
                for (part, owned) in (0..).zip(&parts) {
                    let (opened, tokens, seed) = (&opened, &tokens, rng.next_u64());
                    scope.spawn(move || write_own(opened, part, blocks, tokens, owned, seed));
                }
            });
            if round == 0 {
                judge_crash(&setup, &opened, &parts, blocks, rng);
            }
        }
        judge_crash(&setup, &opened, &parts, blocks, rng);
        let (store, disk) = (opened.store, opened.disk);
        disk.close().unwrap();
        let opened = setup.open_store(store, None).unwrap();
        let mut block = [0; 4096];
        for (part, owned) in (0..).zip(&parts) {
            let owned = owned.lock().unwrap();
            for lba in 0..blocks {
                opened.disk.read_at((part * blocks + lba) * BLOCK, &mut block).unwrap();
                assert!(block == content(owned.now.get(&lba).copied().unwrap_or(0)), "part {part}, LBA {lba}");
            }
        }
    });
}

/// Threads write the same blocks: each block that is read is one that somebody wrote there, whole, and what a thread flushed before it
/// told the others is seen by all.
#[test]
fn overlapping_writes_are_never_torn() {
    const BLOCKS: u64 = 64;
    seeds(70, Duration::from_secs(5), |seed| {
        let setup = Setup { background: true, ..Setup::default() };
        let opened = Arc::new(setup.open(&setup.format()).unwrap());
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let writers: Vec<_> = (0..3u64)
                .map(|writer| {
                    let opened = Arc::clone(&opened);
                    scope.spawn(move || {
                        let rng = &mut Rng::new(seed * 10 + writer);
                        for number in 0..600 {
                            let lba = rng.next_u64() % BLOCKS;
                            // The number says which block it belongs to.
                            let token = 1 + lba + BLOCKS * (number * 3 + writer);
                            opened.disk.write_at(lba * BLOCK, &content(token)).unwrap();
                            if rng.below(20) == 0 {
                                opened.disk.flush().unwrap();
                            }
                        }
                    })
                })
                .collect();
            let (reader, done) = (Arc::clone(&opened), &done);
            scope.spawn(move || {
                let rng = &mut Rng::new(seed);
                let mut block = [0; 4096];
                while !done.load(Ordering::Relaxed) {
                    let lba = rng.next_u64() % BLOCKS;
                    reader.disk.read_at(lba * BLOCK, &mut block).unwrap();
                    let (first, _) = block.split_first_chunk().unwrap();
                    let token = u64::from_le_bytes(*first);
                    assert!(block == content(token), "LBA {lba} is torn");
                    assert!(token == 0 || (token - 1) % BLOCKS == lba, "LBA {lba} holds another block");
                }
            });
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            done.store(true, Ordering::Relaxed);
        });
    });
}

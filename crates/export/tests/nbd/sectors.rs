//! Requests of any bytes over whole blocks, one after the other and all at once.

use std::{sync::Arc, thread};

use nacre_core::{BlockError, BlockStore as _, ReadRequest, WriteRequest};
use nacre_export::sectors::Sectors;
use nacre_testkit::Rng;

use crate::memory::Memory;

#[test]
fn any_bytes_are_what_a_plain_array_would_hold() {
    let store = Arc::new(Memory::new(256 << 10));
    let sectors = Sectors::new(store.clone());
    let mut model = vec![0; 256 << 10];
    let mut rng = Rng::new(3);
    for _ in 0..2000 {
        let length = 1 + rng.below(20_000);
        let offset = rng.below(model.len() - length);
        let (at, place) = (offset as u64, offset..offset + length);
        match rng.below(5) {
            0 | 1 => {
                rng.fill(&mut model[place.clone()]);
                sectors.write(at, &model[place]).unwrap();
            }
            2 => {
                model[place].fill(0);
                sectors.write_zeroes(at, length as u64).unwrap();
            }
            _ => {
                let mut buffers = [vec![0; length], vec![0; 4096], vec![0; 1]];
                let [first, second, third] = &mut buffers;
                let mut reads =
                    [ReadRequest::new(at, first), ReadRequest::new(8192, second), ReadRequest::new(at, third)];
                sectors.read_many(&mut reads);
                assert!(reads.iter().all(|read| read.outcome.is_ok()));
                assert_eq!(buffers, [model[place].to_vec(), model[8192..12288].to_vec(), vec![model[offset]]]);
            }
        }
    }
    let mut all = vec![0; model.len()];
    store.read_at(0, &mut all).unwrap();
    assert!(all == model);
}

#[test]
fn writes_of_parts_of_a_block_at_once_do_not_lose_each_other() {
    // Each thread has its own bytes in each of a few blocks, and a block in between that it writes as a whole.
    const THREADS: usize = 4;
    let sectors = Sectors::new(Arc::new(Memory::new(64 << 10)));
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let sectors = &sectors;
                scope.spawn(move || {
                    let mut rng = Rng::new(thread as u64);
                    let mut model = vec![0; 8 * 1024];
                    for _ in 0..3000 {
                        let block = rng.below(8);
                        let length = 1 + rng.below(1024);
                        let begin = rng.below(1025 - length);
                        let data = rng.bytes(length);
                        model[block * 1024 + begin..][..length].copy_from_slice(&data);
                        sectors.write((block * 4096 + thread * 1024 + begin) as u64, &data).unwrap();
                    }
                    model
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (thread, model) in models.iter().enumerate() {
        for block in 0..8 {
            let mut found = vec![0; 1024];
            sectors.read((block * 4096 + thread * 1024) as u64, &mut found).unwrap();
            assert!(found == model[block * 1024..][..1024], "thread {thread}, block {block}");
        }
    }
}

#[test]
fn a_whole_block_that_was_answered_is_not_overwritten_by_what_was_read_before() {
    // One thread writes whole blocks, others their first byte with what stands there already: the rest is always the last whole one.
    let sectors = Sectors::new(Arc::new(Memory::new(64 << 10)));
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    sectors.write(4096, &[0xff]).unwrap();
                }
            });
        }
        for round in 0..3000_u32 {
            let value = round.to_le_bytes()[0] & 0x7f;
            let data = [value; 12288];
            let buffers = vec![&data[..4096], &data[4096..]];
            sectors.write_many(&[WriteRequest { offset: 0, buffers }]).unwrap();
            let mut found = [0; 12288];
            sectors.read(0, &mut found).unwrap();
            assert_eq!(found[..4096], data[..4096]);
            assert_eq!(found[4097..], data[4097..], "round {round}");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn nothing_is_written_over_a_block_that_cannot_be_read() {
    let store = Arc::new(Memory::new(64 << 10));
    let sectors = Sectors::new(store.clone());
    sectors.write(0, &[5; 65536]).unwrap();
    let damage = BlockError::Integrity { first: 2, count: 1, what: "the tag does not match".into() };
    *store.broken.lock().unwrap() = Some((8192..12288, damage));
    assert!(matches!(sectors.write(8000, &[6; 400]), Err(BlockError::Integrity { first: 2, .. })));
    assert!(matches!(sectors.read(8000, &mut [0; 400]), Err(BlockError::Integrity { .. })));
    assert!(sectors.write(65000, &[1; 1000]).is_err());
    assert!(sectors.write_zeroes(u64::MAX, 2).is_err());
    *store.broken.lock().unwrap() = None;
    let mut found = vec![0; 65536];
    sectors.read(0, &mut found).unwrap();
    assert_eq!(found, [5; 65536]);
}

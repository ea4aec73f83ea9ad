//! The store on objects that fail, are lost, or are somebody else's.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use nacre_core::{BlockError, BlockStore};
use nacre_testkit::{Rng, check_store};
use object_store::Error;

use crate::{
    Location, ObjectBlockStore, ObjectOptions, ObjectStoreError,
    objects::{Objects, Remote},
};

/// The smallest chunks, so that there are many.
const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 16 * CHUNK + 8192;
const OPTIONS: ObjectOptions = ObjectOptions { chunk_size: CHUNK, buffer_bytes: 1 << 20, read_only: false };
const READ_ONLY: ObjectOptions = ObjectOptions { read_only: true, ..OPTIONS };

/// What is to go wrong.
#[derive(Default)]
struct Faults {
    /// So many changes are still carried out; then the process is as good as dead.
    alive: Option<u64>,
    /// PUTs whose name has this in it fail.
    refuse: Option<&'static str>,
    /// PUTs are carried out, and an error is answered.
    lose_answers: bool,
    /// Changes so far.
    changes: u64,
}

/// Objects that fail as they are told.
struct Faulty {
    inner: Remote,
    faults: Arc<Mutex<Faults>>,
}

fn failure() -> Error {
    Error::Generic { store: "test", source: "out of order".into() }
}

impl Faulty {
    fn on(location: &Location) -> (Box<Self>, Arc<Mutex<Faults>>) {
        let faults = Arc::new(Mutex::new(Faults::default()));
        (Box::new(Self { inner: Remote::new(location).unwrap(), faults: Arc::clone(&faults) }), faults)
    }

    /// Whether one more change may be made.
    fn change(&self, name: &str) -> Result<(), Error> {
        let mut faults = self.faults.lock().unwrap();
        faults.changes += 1;
        if faults.alive == Some(0) || faults.refuse.is_some_and(|part| name.contains(part)) {
            return Err(failure());
        }
        faults.alive = faults.alive.map(|alive| alive - 1);
        Ok(())
    }
}

impl Objects for Faulty {
    fn list(&self, limit: u64) -> Result<Vec<(String, u64)>, Error> {
        self.inner.list(limit)
    }

    fn get(&self, ranges: Vec<(String, Range<u64>)>) -> Vec<Result<Bytes, Error>> {
        self.inner.get(ranges)
    }

    fn create(&self, objects: Vec<(String, Bytes)>) -> Vec<Result<(), Error>> {
        let one = |(name, content): (String, Bytes)| {
            self.change(&name)?;
            self.inner.create(vec![(name, content)]).pop().unwrap()?;
            if self.faults.lock().unwrap().lose_answers { Err(failure()) } else { Ok(()) }
        };
        objects.into_iter().map(one).collect()
    }

    fn replace(&self, name: &str, content: Bytes) -> Result<(), Error> {
        self.change(name)?;
        self.inner.replace(name, content)
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        self.inner.exists(name)
    }

    fn delete(&self, names: Vec<String>) -> Vec<Result<(), Error>> {
        let one = |name: String| {
            self.change(&name)?;
            self.inner.delete(vec![name]).pop().unwrap()
        };
        names.into_iter().map(one).collect()
    }
}

fn open(location: &Location) -> ObjectBlockStore {
    ObjectBlockStore::open(location, OPTIONS).unwrap()
}

fn names(location: &Location) -> Vec<String> {
    let mut names: Vec<String> =
        Remote::new(location).unwrap().list(1000).unwrap().into_iter().map(|(name, _)| name).collect();
    names.sort();
    names
}

/// The names of objects of chunks.
fn chunks(location: &Location) -> Vec<String> {
    names(location).into_iter().filter(|name| name.starts_with("chunk/")).collect()
}

fn block(store: &impl BlockStore, number: u64) -> [u8; 4096] {
    let mut block = [0xa5; 4096];
    store.read_at(number * 4096, &mut block).unwrap();
    block
}

#[test]
fn objects_in_memory_are_a_store() {
    for (seed, buffer_bytes) in [(1, 1 << 20), (2, 4096), (3, 1 << 30)] {
        let location = Location::memory();
        let options = ObjectOptions { buffer_bytes, ..OPTIONS };
        check_store(seed, 400, |before: Option<ObjectBlockStore>| match before {
            None => ObjectBlockStore::create(&location, SIZE, options).unwrap(),
            Some(_) => ObjectBlockStore::open(&location, options).unwrap(),
        });
    }
}

#[test]
fn objects_in_a_directory_are_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let location = Location::directory(directory.path()).unwrap();
    check_store(4, 150, |before: Option<ObjectBlockStore>| match before {
        None => ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap(),
        Some(_) => open(&location),
    });
    assert!(Location::directory(directory.path().join("absent")).is_err());
}

#[test]
fn writes_are_kept_until_a_flush_or_the_bound() {
    let location = Location::memory();
    let store = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    store.write_at(4096, &[7; 8192]).unwrap();
    assert!(chunks(&location).is_empty());
    assert_eq!(block(&store, 1), [7; 4096]);
    store.flush().unwrap();
    assert_eq!(chunks(&location), ["chunk/00000000/0000000000000001-00001000-00002000"]);
    // A whole chunk is a base, and what it supersedes goes.
    store.write_at(0, &vec![8; 65536]).unwrap();
    store.flush().unwrap();
    assert_eq!(chunks(&location), ["chunk/00000000/0000000000000002"]);
    // Beyond the bound nobody has to ask.
    let small = ObjectOptions { buffer_bytes: 8192, ..OPTIONS };
    let store = ObjectBlockStore::open(&location, small).unwrap();
    store.write_at(0, &[9; 4096]).unwrap();
    assert_eq!(chunks(&location).len(), 1);
    store.write_at(2 * 4096, &[9; 4096]).unwrap();
    assert_eq!(chunks(&location).len(), 3);
}

#[test]
fn many_deltas_are_folded_into_a_base() {
    let location = Location::memory();
    let store = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    for round in 1..=100_u8 {
        store.write_at(u64::from(round % 3) * 4096, &[round; 4096]).unwrap();
        store.flush().unwrap();
        let count = chunks(&location).len();
        assert!(count <= 9, "{count} objects");
    }
    drop(store);
    let store = open(&location);
    assert_eq!([block(&store, 0), block(&store, 1), block(&store, 2)], [[99; 4096], [100; 4096], [98; 4096]]);
}

#[test]
fn trimmed_chunks_have_no_objects() {
    let location = Location::memory();
    let store = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    store.write_at(0, &vec![7; usize::try_from(SIZE).unwrap()]).unwrap();
    store.flush().unwrap();
    assert_eq!(chunks(&location).len(), 17);
    store.trim(CHUNK, SIZE - CHUNK).unwrap();
    assert_eq!(block(&store, CHUNK / 4096), [0; 4096]);
    assert_eq!(chunks(&location).len(), 17, "before the flush nothing is gone");
    store.flush().unwrap();
    assert_eq!(chunks(&location), ["chunk/00000000/0000000000000001"]);
    store.write_at(CHUNK, &[8; 4096]).unwrap();
    store.flush().unwrap();
    drop(store);
    let store = open(&location);
    assert_eq!([block(&store, 16), block(&store, 17), block(&store, 1)], [[8; 4096], [0; 4096], [7; 4096]]);
}

#[test]
fn a_put_that_fails_fails_the_flush_and_the_next_one_makes_it_good() {
    let location = Location::memory();
    let (objects, faults) = Faulty::on(&location);
    let store = ObjectBlockStore::create_on(objects, "here".into(), SIZE, OPTIONS).unwrap();
    store.write_at(0, &[1; 4096]).unwrap();
    store.write_at(CHUNK, &[1; 4096]).unwrap();
    faults.lock().unwrap().refuse = Some("chunk/00000001");
    let error = store.flush().unwrap_err().to_string();
    assert!(error.contains("here: chunk/00000001/0000000000000001-00000000-00001000"), "{error}");
    assert_eq!(block(&store, 16), [1; 4096], "it is still there to read");
    store.write_at(CHUNK + 4096, &[2; 4096]).unwrap();
    store.write_at(CHUNK, &[3; 4096]).unwrap();
    store.flush().unwrap_err();
    faults.lock().unwrap().refuse = None;
    store.flush().unwrap();
    drop(store);
    let store = open(&location);
    assert_eq!([block(&store, 0), block(&store, 16), block(&store, 17)], [[1; 4096], [3; 4096], [2; 4096]]);
}

#[test]
fn answers_that_are_lost_leave_nothing_older_behind() {
    let location = Location::memory();
    let (objects, faults) = Faulty::on(&location);
    let store = ObjectBlockStore::create_on(objects, "here".into(), SIZE, OPTIONS).unwrap();
    faults.lock().unwrap().lose_answers = true;
    store.write_at(0, &[1; 4096]).unwrap();
    store.flush().unwrap_err(); // there, but not known to be
    faults.lock().unwrap().lose_answers = false;
    store.write_zeroes(0, CHUNK).unwrap();
    store.flush().unwrap();
    assert_eq!(block(&store, 0), [0; 4096]);
    drop(store);
    assert_eq!(block(&open(&location), 0), [0; 4096]);
}

/// Runs the same work, cut after every single change to the objects, and looks at what another process finds.
#[test]
fn after_a_crash_at_any_time_everything_flushed_is_there() {
    let mut cut = 0;
    loop {
        let location = Location::memory();
        drop(ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap());
        let (objects, faults) = Faulty::on(&location);
        let Ok(store) = ObjectBlockStore::open_on(objects, "here".into(), OPTIONS) else { unreachable!() };
        faults.lock().unwrap().alive = Some(cut);
        // Of each block: what may be there. The first is what was flushed; the others were written after.
        let mut model: Vec<Vec<u8>> = vec![vec![0]; 48];
        let mut rng = Rng::new(9);
        let mut dead = false;
        for step in 1..=120_u8 {
            match rng.below(8) {
                0 => {
                    let chunk = rng.below(3);
                    store.write_zeroes(chunk as u64 * CHUNK, CHUNK).unwrap();
                    model[chunk * 16..chunk * 16 + 16].iter_mut().for_each(|values| values.push(0));
                }
                1 | 2 => match store.flush() {
                    Ok(()) => model.iter_mut().for_each(|values| drop(values.drain(..values.len() - 1))),
                    Err(_) => dead = true,
                },
                _ => {
                    let at = rng.below(48);
                    store.write_at(at as u64 * 4096, &[step; 4096]).unwrap();
                    model[at].push(step);
                }
            }
            if dead {
                break;
            }
        }
        let changes = faults.lock().unwrap().changes;
        drop(store);
        let reader = ObjectBlockStore::open(&location, READ_ONLY).unwrap();
        let before = names(&location);
        let found: Vec<_> = (0..48).map(|at| block(&reader, at)).collect();
        assert_eq!(names(&location), before, "a reader removes nothing");
        let writer = open(&location);
        for (at, values) in model.iter().enumerate() {
            let value = found[at][0];
            assert_eq!(found[at], [value; 4096], "cut {cut}: block {at} is torn");
            assert!(values.contains(&value), "cut {cut}: block {at} is {value} and not one of {values:?}");
            assert_eq!(block(&writer, at as u64), found[at], "cut {cut}: block {at} after cleaning");
        }
        // The store works on.
        writer.write_at(0, &[200; 4096]).unwrap();
        writer.flush().unwrap();
        assert_eq!(block(&open(&location), 0), [200; 4096]);
        if !dead {
            println!("{changes} changes, each of them the last one once");
            assert!(cut > 50);
            return;
        }
        cut += 1;
    }
}

#[test]
fn a_writer_that_was_replaced_notices() {
    let location = Location::memory();
    let first = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    first.write_at(0, &[1; 4096]).unwrap();
    first.flush().unwrap();
    let second = open(&location);
    first.write_at(CHUNK, &[2; 4096]).unwrap();
    let error = first.flush().unwrap_err();
    assert!(matches!(&error, BlockError::Fenced(why) if why.contains("writer/0000000000000002")), "{error}");
    assert!(matches!(first.write_at(0, &[3; 4096]), Err(BlockError::Fenced(_))));
    // It also notices by the names of objects.
    second.write_at(CHUNK, &[4; 4096]).unwrap();
    let error = second.flush().unwrap_err();
    assert!(matches!(&error, BlockError::Fenced(why) if why.contains("chunk/00000001")), "{error}");
}

#[test]
fn what_is_no_store_is_refused_and_what_is_one_is_not_made_again() {
    let location = Location::memory();
    assert!(matches!(ObjectBlockStore::open(&location, OPTIONS), Err(ObjectStoreError::NotAStore { .. })));
    for (size, chunk_size) in [(0, CHUNK), (100, CHUNK), (SIZE, 4096), (SIZE, CHUNK + 1)] {
        let made = ObjectBlockStore::create(&location, size, ObjectOptions { chunk_size, ..OPTIONS });
        assert!(made.is_err(), "{size} {chunk_size}");
    }
    assert!(names(&location).is_empty());
    drop(ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap());
    assert!(matches!(ObjectBlockStore::create(&location, SIZE, OPTIONS), Err(ObjectStoreError::Exists(_))));
    let store = ObjectBlockStore::open(&location, READ_ONLY).unwrap();
    for refused in [store.write_at(0, &[0; 4096]), store.trim(0, 4096), store.grow(2 * SIZE)] {
        assert!(matches!(refused, Err(BlockError::ReadOnly(_))), "{refused:?}");
    }
    let remote = Remote::new(&location).unwrap();
    let mut put = remote.create(vec![("chunk/00000000/0000000000000001".into(), Bytes::from_static(b"short"))]);
    put.remove(0).unwrap();
    let error = ObjectBlockStore::open(&location, OPTIONS).unwrap_err().to_string();
    assert!(error.contains("chunk/00000000/0000000000000001 has 5 bytes"), "{error}");
    assert!(remote.list(2).is_err(), "more objects than there can be");
}

#[test]
fn an_object_that_is_taken_away_is_an_error_that_names_it() {
    let location = Location::memory();
    let store = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    store.write_at(0, &[1; 4096]).unwrap();
    store.flush().unwrap();
    let name = chunks(&location).remove(0);
    Remote::new(&location).unwrap().delete(vec![name.clone()]).remove(0).unwrap();
    let error = store.read_at(0, &mut [0; 4096]).unwrap_err().to_string();
    assert!(error.contains(&name), "{error}");
}

#[test]
fn readers_meet_folding_and_deletion_and_see_only_what_was_written() {
    let location = Location::memory();
    let store = ObjectBlockStore::create(&location, SIZE, OPTIONS).unwrap();
    store.write_at(0, &vec![0; usize::try_from(CHUNK).unwrap()]).unwrap();
    let newest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while newest.load(Ordering::Acquire) < 150 {
                let before = newest.load(Ordering::Acquire);
                let value = u64::from(block(&store, 3)[0]);
                assert!(value >= before, "{value} after {before}");
            }
        });
        for value in 1..=150_u8 {
            store.write_at(3 * 4096, &[value; 4096]).unwrap();
            newest.store(value.into(), Ordering::Release);
            store.flush().unwrap();
        }
        reader.join().unwrap();
    });
}

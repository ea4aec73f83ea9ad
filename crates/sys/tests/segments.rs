//! A directory of segment files does what every store has to do, and what is missing in it reads as zeroes.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test, at once and at its place")]

use std::{fs, os::unix::fs::symlink, path::Path};

use nacre_core::{BlockError, BlockStore, ReadRequest, WriteRequest};
use nacre_sys::block::{DirectoryOptions, DirectoryStore, StoreError};
use nacre_testkit::{SmallDisk, check_store};

/// The smallest segments, so that requests cross their borders.
const OPTIONS: DirectoryOptions = DirectoryOptions { segment_size: 1 << 20, read_only: false };
const READ_ONLY: DirectoryOptions = DirectoryOptions { read_only: true, ..OPTIONS };
const SIZE: u64 = (3 << 20) + 8192;

fn create(path: &Path) -> DirectoryStore {
    DirectoryStore::create(path, SIZE, OPTIONS).unwrap()
}

fn open(path: &Path) -> DirectoryStore {
    DirectoryStore::open(path, OPTIONS).unwrap()
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_directory_of_segments_is_a_store() {
    for (seed, base) in (0..).zip(["/var/tmp", "/dev/shm"]) {
        let directory = tempfile::tempdir_in(base).unwrap();
        let path = directory.path().join("store");
        check_store(seed, 200, |before: Option<DirectoryStore>| {
            let again = before.is_some();
            drop(before);
            if again { open(&path) } else { create(&path) }
        });
        println!("{}", open(&path).describe());
    }
}

#[test]
fn segments_are_made_by_writes_and_removed_by_trims() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    assert!(!DirectoryStore::is_there(&path));
    let store = create(&path);
    assert!(DirectoryStore::is_there(&path));
    let always = ["nacre-segments.json", "nacre.lock"];
    assert_eq!(names(&path), always);
    let data = vec![7; (1 << 20) + 8192];
    store.write_at((2 << 20) - 4096, &data).unwrap();
    assert_eq!(names(&path), [always[0], always[1], "segment-00000001", "segment-00000002", "segment-00000003"]);
    assert_eq!(fs::metadata(path.join("segment-00000003")).unwrap().len(), 4096);
    store.trim(2 << 20, (1 << 20) + 8192).unwrap();
    assert_eq!(names(&path), [always[0], always[1], "segment-00000001"]);
    store.write_zeroes((2 << 20) - 4096, 4096).unwrap();
    let mut back = vec![1; data.len()];
    store.read_at((2 << 20) - 4096, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    // What was removed is made again.
    store.write_at(2 << 20, &[8; 4096]).unwrap();
    store.flush().unwrap();
    drop(store);
    let mut block = [0; 4096];
    open(&path).read_at(2 << 20, &mut block).unwrap();
    assert_eq!(block, [8; 4096]);
}

#[test]
fn what_is_not_there_reads_as_zeroes_also_in_part() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = create(&path);
    store.write_at(0, &vec![7; 2 << 20]).unwrap();
    drop(store);
    fs::remove_file(path.join("segment-00000001")).unwrap();
    fs::File::options().write(true).open(path.join("segment-00000000")).unwrap().set_len(5000).unwrap();
    let store = open(&path);
    let mut back = vec![1; 2 << 20];
    store.read_at(0, &mut back).unwrap();
    assert!(back[..5000].iter().all(|byte| *byte == 7) && back[5000..].iter().all(|byte| *byte == 0));
    let (mut one, mut two) = ([1; 8192], [1; 8192]);
    let mut requests = [ReadRequest::new(4096, &mut one), ReadRequest::new((1 << 20) - 4096, &mut two)];
    store.read_many(&mut requests);
    assert!(requests.iter().all(|request| request.outcome.is_ok()));
    assert!(one[..904].iter().all(|byte| *byte == 7) && one[904..].iter().all(|byte| *byte == 0));
    assert_eq!(two, [0; 8192]);
}

#[test]
fn one_writer_or_several_readers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let writer = create(&path);
    writer.write_at(0, &[7; 4096]).unwrap();
    for options in [OPTIONS, READ_ONLY] {
        assert!(matches!(DirectoryStore::open(&path, options), Err(StoreError::InUse(_))));
    }
    drop(writer);
    let one = DirectoryStore::open(&path, READ_ONLY).unwrap();
    let other = DirectoryStore::open(&path, READ_ONLY).unwrap();
    assert!(matches!(DirectoryStore::open(&path, OPTIONS), Err(StoreError::InUse(_))));
    for store in [one, other] {
        let mut block = [0; 4096];
        store.read_at(0, &mut block).unwrap();
        assert_eq!(block, [7; 4096]);
        for refused in [store.write_at(0, &block), store.trim(0, 4096), store.grow(2 * SIZE)] {
            assert!(matches!(refused, Err(BlockError::ReadOnly(_))), "{refused:?}");
        }
    }
    drop(open(&path));
}

#[test]
fn what_is_no_store_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let opened = || DirectoryStore::open(&path, OPTIONS);
    assert!(matches!(opened(), Err(StoreError::Io { .. })));
    fs::create_dir(&path).unwrap();
    assert!(opened().unwrap_err().to_string().contains("there is no nacre-segments.json"));
    assert!(names(&path).is_empty());
    fs::write(path.join("mine"), "x").unwrap();
    assert!(matches!(DirectoryStore::create(&path, SIZE, OPTIONS), Err(StoreError::Exists(_))));
    assert_eq!(names(&path), ["mine"]);
    fs::remove_file(path.join("mine")).unwrap();
    for segment_size in [0, 4096, (1 << 20) + 1, 2 << 30] {
        let options = DirectoryOptions { segment_size, ..OPTIONS };
        assert!(DirectoryStore::create(&path, SIZE, options).is_err(), "{segment_size}");
    }
    drop(create(&path)); // an empty directory will do: a share's root
    fs::write(path.join("nacre-segments.json"), "{\"format\":\"nacre-segments\",\"version\":9}").unwrap();
    assert!(matches!(opened(), Err(StoreError::NotAStore { .. })));
    fs::write(path.join("nacre-segments.json"), vec![b' '; 1 << 20]).unwrap();
    assert!(opened().unwrap_err().to_string().contains("more than 4096 bytes"));
    fs::remove_dir_all(&path).unwrap();
    fs::write(&path, "file").unwrap();
    assert!(opened().unwrap_err().to_string().contains("no directory"));
}

#[test]
fn links_and_fifos_in_the_place_of_segments_are_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let (path, secret) = (directory.path().join("store"), directory.path().join("secret"));
    fs::write(&secret, vec![7; 4096]).unwrap();
    let store = create(&path);
    symlink(&secret, path.join("segment-00000000")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, path.join("segment-00000001"), rustix::fs::Mode::from_raw_mode(0o600))
        .unwrap();
    for offset in [0, 1 << 20] {
        store.read_at(offset, &mut [0; 4096]).unwrap_err();
        store.write_at(offset, &[0; 4096]).unwrap_err();
    }
    assert_eq!(fs::read(&secret).unwrap(), vec![7; 4096]);
    drop(store);
    fs::rename(path.join("nacre-segments.json"), directory.path().join("elsewhere")).unwrap();
    symlink(directory.path().join("elsewhere"), path.join("nacre-segments.json")).unwrap();
    assert!(!DirectoryStore::is_there(&path));
    DirectoryStore::open(&path, OPTIONS).unwrap_err();
}

#[test]
fn a_full_disk_is_no_space_and_room_comes_back_by_trimming() {
    let Some(disk) = SmallDisk::mount(2 << 20) else { return };
    let path = disk.path().join("store");
    let store = create(&path);
    let block = [1; 64 << 10];
    let (written, error) = (0..SIZE / block.len() as u64)
        .find_map(|at| Some((at, store.write_at(at * block.len() as u64, &block).err()?)))
        .unwrap();
    assert!(matches!(error, BlockError::NoSpace(_)), "{error}");
    let offset = written * block.len() as u64;
    let error = store.write_many(&[WriteRequest { offset, buffers: vec![&block, &block] }]);
    assert!(matches!(error, Err(BlockError::NoSpace(_))), "{error:?}");
    store.trim(0, 1 << 20).unwrap();
    store.write_at(offset, &block).unwrap();
    store.flush().unwrap();
    disk.set_read_only(false);
}

#[test]
fn a_read_only_filesystem_takes_no_writer() {
    let Some(disk) = SmallDisk::mount(4 << 20) else { return };
    let path = disk.path().join("store");
    drop(create(&path));
    disk.set_read_only(true);
    assert!(matches!(DirectoryStore::open(&path, OPTIONS), Err(StoreError::Io { .. })));
    DirectoryStore::open(&path, READ_ONLY).unwrap().read_at(0, &mut [0; 4096]).unwrap();
    disk.set_read_only(false);
}

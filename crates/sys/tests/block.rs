//! Stores of blocks do what every store has to do, on what media there are, and say what they cannot.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test, at once and at its place")]

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use nacre_core::{BlockError, BlockStore, NoProgress, Page, ReadRequest, WriteRequest};
use nacre_sys::block::{Access, FileOptions, FileStore, MemoryStore, StoreError};
use nacre_testkit::{SmallDisk, check_store, require, root, run, skip};

const SIZE: u64 = 2 << 20;

/// A directory on a disk, where O_DIRECT is not refused on most machines: /var/tmp survives reboots, so it is not in memory.
fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// A directory in memory.
fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn create(path: &Path, options: FileOptions) -> FileStore {
    FileStore::create(path, SIZE, false, options, &NoProgress).unwrap()
}

#[test]
fn memory_is_a_store() {
    for seed in 0..3 {
        check_store(seed, 300, |before| before.unwrap_or_else(|| MemoryStore::new(SIZE + 100)));
    }
}

#[test]
fn files_are_stores_by_every_way() {
    for (seed, access) in (0..).zip([Access::Auto, Access::Buffered, Access::Direct]) {
        for directory in [on_disk(), in_memory()] {
            let path = directory.path().join("store");
            let options = FileOptions { access, read_only: false };
            let mut described = String::new();
            check_store(seed, 150, |before: Option<FileStore>| {
                let again = before.is_some();
                drop(before);
                let store = if again { FileStore::open(&path, options).unwrap() } else { create(&path, options) };
                described = store.describe();
                store
            });
            println!("{described}");
            assert!(described.contains(path.to_str().unwrap()));
            assert!(access != Access::Direct || described.contains("O_DIRECT"));
            assert!(access != Access::Buffered || described.contains("page cache"));
        }
    }
}

#[test]
fn a_file_in_memory_is_not_slow_and_says_by_which_way_it_goes() {
    let directory = in_memory();
    let store = create(&directory.path().join("store"), FileOptions::default());
    assert!(!store.is_slow());
    let told = store.describe();
    assert!(told.contains("(pread/pwrite, page cache: tmpfs is memory"), "{told}");
    let directory = on_disk();
    let store = create(&directory.path().join("store"), FileOptions::default());
    assert!(store.is_slow());
    let told = store.describe();
    assert!(told.contains("(io_uring, O_DIRECT)") || told.contains("page cache: "), "{told}");
}

#[test]
fn one_writer_or_several_readers() {
    let directory = on_disk();
    let path = directory.path().join("store");
    let read_only = FileOptions { read_only: true, ..FileOptions::default() };
    let writer = create(&path, FileOptions::default());
    assert!(matches!(FileStore::open(&path, FileOptions::default()), Err(StoreError::InUse(_))));
    assert!(matches!(FileStore::open(&path, read_only), Err(StoreError::InUse(_))));
    writer.write_at(4096, &[7; 4096]).unwrap();
    drop(writer);
    let (one, other) = (FileStore::open(&path, read_only).unwrap(), FileStore::open(&path, read_only).unwrap());
    assert!(matches!(FileStore::open(&path, FileOptions::default()), Err(StoreError::InUse(_))));
    for store in [one, other] {
        let mut block = [0; 4096];
        store.read_at(4096, &mut block).unwrap();
        assert_eq!(block, [7; 4096]);
        for refused in [
            store.write_at(0, &block),
            store.write_many(&[WriteRequest { offset: 0, buffers: vec![&block] }]),
            store.trim(0, 4096),
            store.write_zeroes(0, 4096),
            store.grow(2 * SIZE),
        ] {
            assert!(matches!(refused, Err(BlockError::ReadOnly(_))), "{refused:?}");
        }
        store.flush().unwrap();
    }
    drop(FileStore::open(&path, FileOptions::default()).unwrap());
}

#[test]
fn what_is_no_store_is_refused() {
    let directory = on_disk();
    let path = directory.path().join("store");
    let open = || FileStore::open(&path, FileOptions::default());
    assert!(matches!(open(), Err(StoreError::Io { .. })));
    for length in [0, 4095, 4097] {
        fs::write(&path, vec![0; length]).unwrap();
        assert!(matches!(open(), Err(StoreError::NotAStore { .. })), "{length}");
    }
    let again = FileStore::create(&path, SIZE, false, FileOptions::default(), &NoProgress);
    assert!(matches!(again, Err(StoreError::Exists(_))));
    assert_eq!(fs::read(&path).unwrap().len(), 4097, "what was there is as it was");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(open().unwrap_err().to_string().contains("is a directory"));
    fs::remove_dir(&path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    assert!(open().unwrap_err().to_string().contains("Fifo"));
    fs::remove_file(&path).unwrap();
    for size in [0, 100, u64::MAX - 4095] {
        let made = FileStore::create(&path, size, false, FileOptions::default(), &NoProgress);
        assert!(matches!(made, Err(StoreError::Size { .. })), "{size}");
        assert!(!path.exists());
    }
}

#[test]
fn a_preallocated_file_has_all_its_blocks_and_looks_used() {
    let directory = on_disk();
    let (full, sparse) = (directory.path().join("full"), directory.path().join("sparse"));
    let store = FileStore::create(&full, 3 * SIZE + 4096, true, FileOptions::default(), &NoProgress).unwrap();
    create(&sparse, FileOptions::default());
    assert!(fs::metadata(&full).unwrap().blocks() * 512 > 3 * SIZE);
    assert_eq!(fs::metadata(&sparse).unwrap().blocks(), 0);
    let mut all = vec![0; usize::try_from(3 * SIZE).unwrap() + 4096];
    store.read_at(0, &mut all).unwrap();
    let mut blocks: Vec<&[u8]> = all.chunks(4096).collect();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), all.len() / 4096, "no block is like another");
    // A trimmed range is given back to the filesystem.
    store.trim(0, SIZE).unwrap();
    assert!(fs::metadata(&full).unwrap().blocks() * 512 <= 2 * SIZE + 8192);
}

#[test]
fn a_full_disk_is_no_space_and_leaves_nothing_half_made() {
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let path = disk.path().join("store");
    let made = FileStore::create(&path, 4 * SIZE, true, FileOptions::default(), &NoProgress);
    assert!(made.unwrap_err().to_string().contains("find space for"));
    assert!(!path.exists());
    let store = create(&path, FileOptions::default());
    let error = (0..SIZE / 4096).find_map(|at| store.write_at(at * 4096, &[1; 4096]).err()).unwrap();
    assert!(matches!(error, BlockError::NoSpace(_)), "{error}");
    let error = store.write_many(&[WriteRequest { offset: SIZE - 8192, buffers: vec![&[1; 4096], &[2; 4096]] }]);
    assert!(matches!(error, Err(BlockError::NoSpace(_))), "{error:?}");
    // What was written is still read, and room that is given back is used again.
    let mut block = [0; 4096];
    store.read_at(0, &mut block).unwrap();
    assert_eq!(block, [1; 4096]);
    store.trim(0, 64 << 10).unwrap();
    store.write_at(SIZE - 4096, &block).unwrap();
    store.flush().unwrap();
}

#[test]
fn a_read_only_filesystem_takes_no_writer() {
    let Some(disk) = SmallDisk::mount(4 << 20) else { return };
    let path = disk.path().join("store");
    drop(create(&path, FileOptions::default()));
    disk.set_read_only(true);
    let error = FileStore::open(&path, FileOptions::default()).unwrap_err();
    assert!(matches!(error, StoreError::Io { action: "open", .. }), "{error}");
    let store = FileStore::open(&path, FileOptions { read_only: true, ..FileOptions::default() }).unwrap();
    store.read_at(0, &mut [0; 4096]).unwrap();
    disk.set_read_only(false);
}

#[test]
fn a_file_that_was_cut_while_open_fails_to_read_and_does_not_grow() {
    for access in [Access::Auto, Access::Buffered] {
        let directory = on_disk();
        let path = directory.path().join("store");
        let store = create(&path, FileOptions { access, read_only: false });
        fs::File::options().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
        let mut page = Page::zeroed();
        let error = store.read_at(SIZE - 4096, &mut page.0).unwrap_err().to_string();
        assert!(error.contains("short read"), "{error}");
        let mut pages = [*Page::zeroed(), *Page::zeroed()];
        let [inside, outside] = &mut pages;
        let mut requests = [ReadRequest::new(0, &mut inside.0), ReadRequest::new(SIZE - 4096, &mut outside.0)];
        store.read_many(&mut requests);
        assert!(requests[0].outcome.is_ok());
        assert!(requests[1].outcome.as_ref().unwrap_err().to_string().contains("short read"));
        let error = store.grow(2 * SIZE).unwrap_err().to_string();
        assert!(error.contains("it shrank"), "{error}");
        assert_eq!(store.size(), SIZE);
    }
}

/// A loop device on a file, detached when it is dropped.
struct Loop {
    device: PathBuf,
    losetup: PathBuf,
}

impl Loop {
    fn attach(file: &Path) -> Option<Self> {
        let losetup = require("losetup").filter(|_| root())?;
        let output = Command::new(&losetup).args(["--find", "--show"]).arg(file).output().unwrap();
        if !output.status.success() {
            skip(&format!("no loop device can be had: {}", String::from_utf8_lossy(&output.stderr)));
            return None;
        }
        Some(Self { device: String::from_utf8(output.stdout).unwrap().trim().into(), losetup })
    }

    /// Lets it have the size that its file has now.
    fn resize(&self) {
        run(Command::new(&self.losetup).arg("--set-capacity").arg(&self.device));
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new(&self.losetup).arg("--detach").arg(&self.device).status();
    }
}

#[test]
fn a_block_device_is_a_store_whose_size_is_not_ours() {
    let directory = on_disk();
    let path = directory.path().join("disk");
    let file = fs::File::create(&path).unwrap();
    file.set_len(SIZE + 512).unwrap(); // not whole blocks: what is over is not used
    let Some(device) = Loop::attach(&path) else { return };
    for (seed, access) in (7..).zip([Access::Auto, Access::Buffered]) {
        let options = FileOptions { access, read_only: false };
        check_store(seed, 150, |before: Option<FileStore>| {
            drop(before);
            FileStore::open(&device.device, options).unwrap()
        });
    }

    let store = FileStore::open(&device.device, FileOptions::default()).unwrap();
    println!("{}", store.describe());
    assert_eq!(store.size(), SIZE);
    assert!(matches!(FileStore::open(&device.device, FileOptions::default()), Err(StoreError::InUse(_))));
    let error = store.grow(2 * SIZE).unwrap_err();
    assert!(matches!(&error, BlockError::Unsupported(what) if what.contains("enlarge it")), "{error}");
    file.set_len(2 * SIZE).unwrap();
    device.resize();
    store.grow(2 * SIZE).unwrap();
    store.write_at(2 * SIZE - 4096, &[9; 4096]).unwrap();
    store.flush().unwrap();
    file.set_len(SIZE).unwrap();
    device.resize();
    assert!(store.grow(2 * SIZE).unwrap_err().to_string().contains("it shrank"));
    store.read_at(2 * SIZE - 4096, &mut [0; 4096]).unwrap_err();
    store.write_at(2 * SIZE - 4096, &[0; 4096]).unwrap_err();
}

#[test]
fn a_device_that_is_mounted_is_in_use() {
    let (Some(mkfs), Some(mount), Some(umount)) = (require("mkfs.ext4"), require("mount"), require("umount")) else {
        return;
    };
    let directory = on_disk();
    let path = directory.path().join("disk");
    fs::File::create(&path).unwrap().set_len(8 * SIZE).unwrap();
    let Some(device) = Loop::attach(&path) else { return };
    run(Command::new(mkfs).arg("-q").arg(&device.device));
    let place = directory.path().join("mounted");
    fs::create_dir(&place).unwrap();
    run(Command::new(mount).arg(&device.device).arg(&place));
    let opened = FileStore::open(&device.device, FileOptions::default());
    run(Command::new(umount).arg(&place));
    assert!(matches!(opened, Err(StoreError::InUse(_))), "{opened:?}");
}

#[test]
fn a_failed_flush_is_remembered_and_a_failing_medium_is_an_error() {
    // Behind the loop device is a sparse file on a disk without room for it.
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let path = disk.path().join("disk");
    fs::File::create(&path).unwrap().set_len(2 * SIZE).unwrap();
    let Some(device) = Loop::attach(&path) else { return };
    let data = vec![7; usize::try_from(SIZE).unwrap()];

    let options = FileOptions { access: Access::Buffered, read_only: false };
    let store = FileStore::open(&device.device, options).unwrap();
    store.write_at(0, &data).unwrap(); // into the page cache
    let first = store.flush().unwrap_err();
    assert!(matches!(first, BlockError::Io { op: "flush", .. } | BlockError::NoSpace(_)), "{first}");
    // The kernel has told it once; asked again, it would say that all is well.
    assert_eq!(store.flush().unwrap_err().to_string(), first.to_string());
    drop(store);

    let store = FileStore::open(&device.device, FileOptions { access: Access::Direct, read_only: false }).unwrap();
    let error = store.write_at(SIZE, &data).unwrap_err();
    assert!(matches!(error, BlockError::Io { op: "write", .. } | BlockError::NoSpace(_)), "{error}");
    let requests: Vec<_> = data
        .chunks(64 << 10)
        .scan(SIZE, |at, part| {
            *at += part.len() as u64;
            Some(WriteRequest { offset: *at - part.len() as u64, buffers: vec![part] })
        })
        .collect();
    let error = store.write_many(&requests).unwrap_err();
    assert!(matches!(error, BlockError::Io { op: "write", .. } | BlockError::NoSpace(_)), "{error}");
}

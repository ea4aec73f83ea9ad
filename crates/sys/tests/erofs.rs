//! EROFS is mounted from files, its data on a FUSE session's file, and shows the tree that was made into it.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod memory_tree;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use memory_tree::{MemoryTree, Place, fuse};
use nacre_sys::erofs::{self, ErofsError, Options};
use nacre_sys::fuse::Open;
use nacre_testkit::{Rng, require, run, skip, tree};

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        nacre_sys::fs::unmount(self.0).unwrap();
    }
}

/// A directory on a disk's filesystem, where EROFS files may lie.
fn place() -> Option<tempfile::TempDir> {
    if !nacre_testkit::root() {
        return None;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if let Err(error) = erofs::support(dir.path()) {
        skip(&error.to_string());
        return None;
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the probe leaves nothing");
    Some(dir)
}

fn make_source(source: &Path) {
    let mut rng = Rng::new(5);
    fs::create_dir_all(source.join("one/two/three")).unwrap();
    for (number, length) in [0, 1, 4095, 4096, 4097, 100_000, 3 << 20].into_iter().enumerate() {
        let path = source.join(format!("one/two/file-{number}"));
        fs::write(&path, rng.bytes(length)).unwrap();
        let mode = 0o600 + u32::try_from(number).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("two/file-3", source.join("one/link")).unwrap();
    fs::hard_link(source.join("one/two/file-5"), source.join("hard")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(source.join("hard"), "user.mark", b"value", flags).unwrap();
}

/// Metadata and data of the source.
fn make_image(mkfs: &Path, dir: &Path, source: &Path) -> (PathBuf, PathBuf) {
    let (metadata, data) = (dir.join("meta,with=comma.img"), dir.join("data.img"));
    fs::write(&data, "").unwrap();
    let blob = format!("--blobdev={}", data.display());
    run(Command::new(mkfs).args(["--chunksize=4096", &blob]).arg(&metadata).arg(source));
    (metadata, data)
}

#[test]
fn a_tree_whose_data_a_session_serves_is_the_source() {
    let (true, Some(dir), Some(mkfs)) = (fuse(), place(), require("mkfs.erofs")) else { return };
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&target).unwrap();
    make_source(&source);
    let (metadata, data) = make_image(&mkfs, dir.path(), &source);
    let bytes = fs::read(data).unwrap();
    let expected = tree::list(&source);
    for (open, direct_io) in
        [(Open::Unneeded, false), (Open::Unneeded, true), (Open::Direct, false), (Open::Direct, true)]
    {
        let mut memory = MemoryTree::new();
        let inode = memory.file("data", bytes.len() as u64);
        memory.node_mut(inode).content = Some(bytes.clone());
        memory.open = open;
        let place = Place::new(memory);
        let options = Options { direct_io, ..Options::default() };
        erofs::mount(&metadata, &[&place.path("data")], &target, &options).unwrap();
        let mounted = Mounted(&target);
        tree::assert_same(&tree::list(&target), &expected, &format!("{open:?}, direct I/O: {direct_io}"));
        assert!(place.tree.reads() > 0);
        drop(mounted);
    }
}

#[test]
fn an_error_of_the_session_reaches_who_reads_the_tree_and_is_not_kept() {
    let (true, Some(dir), Some(mkfs)) = (fuse(), place(), require("mkfs.erofs")) else { return };
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&target).unwrap();
    make_source(&source);
    let (metadata, data) = make_image(&mkfs, dir.path(), &source);
    let bytes = fs::read(data).unwrap();
    for direct_io in [false, true] {
        let broken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let mut memory = MemoryTree::new();
        let inode = memory.file("data", bytes.len() as u64);
        memory.node_mut(inode).content = Some(bytes.clone());
        let now = broken.clone();
        memory.hook = Box::new(move |_| {
            if now.load(std::sync::atomic::Ordering::SeqCst) { Err(nacre_sys::fuse::Errno::IO) } else { Ok(()) }
        });
        let place = Place::new(memory);
        let options = Options { direct_io, ..Options::default() };
        erofs::mount(&metadata, &[&place.path("data")], &target, &options).unwrap();
        let mounted = Mounted(&target);
        let path = target.join("one/two/file-6");
        assert_eq!(fs::read(&path).unwrap_err().raw_os_error(), Some(5), "EIO");
        broken.store(false, std::sync::atomic::Ordering::SeqCst);
        assert!(fs::read(&path).unwrap() == fs::read(source.join("one/two/file-6")).unwrap());
        drop(mounted);
    }
}

#[test]
fn what_cannot_be_mounted_is_said() {
    let Some(dir) = place() else { return };
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    let junk = dir.path().join("junk");
    fs::write(&junk, [7; 8192]).unwrap();
    let error = erofs::mount(&junk, &[], &target, &Options::default()).unwrap_err();
    assert!(matches!(error, ErofsError::Mount { step: "create", .. }), "{error}");
    assert!(error.to_string().contains("junk"), "{error}");
    let absent = dir.path().join("x".repeat(200)).join("y".repeat(200));
    let error = erofs::mount(&absent, &[], &target, &Options::default()).unwrap_err();
    assert!(matches!(error, ErofsError::Mount { step: "open the metadata", .. }), "{error}");
    // Files in memory have no pages that EROFS could read.
    if nacre_sys::fs::kind(Path::new("/dev/shm")).is_ok_and(nacre_sys::fs::FsKind::in_memory) {
        let error = erofs::support(Path::new("/dev/shm")).unwrap_err();
        assert!(matches!(error, ErofsError::Filesystem { .. }), "{error}");
    }
}

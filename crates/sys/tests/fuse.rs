//! A filesystem that a session serves is as its maker says, to many readers at once, and what goes wrong in it reaches who asked.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod memory_tree;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use memory_tree::{MemoryTree, Place, expected, fuse};
use nacre_sys::fuse::{Errno, Inode, Kind, Open};

fn read_at(file: &File, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

#[test]
fn directories_names_and_attributes_are_as_told() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let many = tree.directory(Inode::ROOT, "many");
    for number in 0..10_000 {
        tree.add(many, &format!("entry-{number:05}"), Kind::File, number);
    }
    let mut deep = Inode::ROOT;
    for level in 0..100 {
        deep = tree.directory(deep, &format!("level-{level}"));
    }
    tree.add(deep, "leaf", Kind::File, 5);
    let link = tree.add(Inode::ROOT, "link", Kind::Symlink, 10);
    tree.node_mut(link).target = b"many/entry".to_vec();
    tree.add(Inode::ROOT, "null", Kind::CharacterDevice(1, 3), 0);
    tree.add(Inode::ROOT, "pipe", Kind::Fifo, 0);
    let place = Place::new(tree);

    for round in 0..2 {
        let mut names: Vec<_> =
            fs::read_dir(place.path("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 10_000, "round {round}");
        names.sort();
        assert!(names.iter().enumerate().all(|(number, name)| *name == *format!("entry-{number:05}")));
    }
    for number in [0, 1, 4711, 9999] {
        let found = fs::metadata(place.path(&format!("many/entry-{number:05}"))).unwrap();
        assert_eq!((found.len(), found.mtime(), found.mtime_nsec()), (number, 1_234_567_890, 123_456_789));
        assert_eq!((found.mode(), found.ino()), (0o100_644, number + 3));
    }
    let path: PathBuf = (0..100).map(|level| format!("level-{level}")).collect();
    assert_eq!(fs::read(place.dir.path().join(path).join("leaf")).unwrap().len(), 5);
    assert_eq!(fs::read_link(place.path("link")).unwrap(), Path::new("many/entry"));
    let device = fs::symlink_metadata(place.path("null")).unwrap();
    assert_eq!((device.mode() & 0o170_000, device.rdev()), (0o020_000, rustix::fs::makedev(1, 3)));
    assert_eq!(fs::symlink_metadata(place.path("pipe")).unwrap().mode() & 0o170_000, 0o010_000);
    let missing = fs::metadata(place.path("many/none")).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    let refused = fs::write(place.path("many/none"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let stat = rustix::fs::statvfs(place.dir.path()).unwrap();
    assert_eq!((stat.f_files, stat.f_bfree, stat.f_namemax), (place.tree.nodes.len() as u64, 0, 255));
}

#[test]
fn odd_ranges_are_read_by_read_and_by_map() {
    if !fuse() {
        return;
    }
    for open in [Open::Unneeded, Open::Cached, Open::Direct] {
        let mut tree = MemoryTree::new();
        let size = (3 << 20) + 12_345;
        let inode = tree.file("file", size);
        let short = tree.file("short", 3000);
        tree.node_mut(short).content = Some(expected(short, 0, 3000));
        tree.open = open;
        let place = Place::new(tree);
        let file = place.open("file");
        let mut rng = nacre_testkit::Rng::new(3);
        for _ in 0..300 {
            let offset = rng.below(usize::try_from(size).unwrap() + 5000) as u64;
            let length = rng.below(300_000);
            let there = usize::try_from(size.saturating_sub(offset)).unwrap().min(length);
            assert!(read_at(&file, offset, length).unwrap() == expected(inode, offset, there), "{open:?} {offset}");
        }
        assert!(fs::read(place.path("file")).unwrap() == expected(inode, 0, usize::try_from(size).unwrap()));
        assert!(fs::read(place.path("short")).unwrap() == expected(short, 0, 3000));
        let opens = place.tree.opens.load(Ordering::SeqCst);
        assert_eq!(opens == 1, open == Open::Unneeded, "{opens} opens by {open:?}");
    }
}

#[test]
fn a_program_is_mapped_and_runs() {
    if !fuse() {
        return;
    }
    let program = fs::read(fs::canonicalize("/bin/sh").unwrap()).unwrap();
    for open in [Open::Unneeded, Open::Direct] {
        let mut tree = MemoryTree::new();
        let inode = tree.file("program", program.len() as u64);
        let node = tree.node_mut(inode);
        node.attributes.permissions = 0o755;
        node.content = Some(program.clone());
        tree.open = open;
        let place = Place::new(tree);
        let output = Command::new(place.path("program")).args(["-c", "echo mapped"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "mapped\n", "{open:?}: {output:?}");
        assert!(place.tree.reads() > 0);
    }
}

#[test]
fn attributes_beside_the_ordinary_ones_are_listed_and_read() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let file = tree.file("file", 1);
    tree.file("plain", 1);
    let long = vec![b'v'; 60_000];
    let xattrs = &mut tree.node_mut(file).xattrs;
    xattrs.insert(b"user.one".to_vec(), b"1\0x".to_vec());
    xattrs.insert(b"user.long".to_vec(), long.clone());
    let place = Place::new(tree);
    let get = |path: &Path, name: &str, room: usize| {
        let mut value = vec![0; room];
        let length = rustix::fs::getxattr(path, name, &mut value)?;
        value.truncate(length);
        Ok::<_, Errno>(value)
    };
    let path = place.path("file");
    assert_eq!(get(&path, "user.one", 100).unwrap(), b"1\0x");
    assert_eq!(get(&path, "user.long", 64 << 10).unwrap(), long);
    assert_eq!(get(&path, "user.long", 100).unwrap_err(), Errno::RANGE);
    assert_eq!(get(&path, "user.none", 100).unwrap_err(), Errno::NODATA);
    let mut names = vec![0; 1000];
    let length = rustix::fs::listxattr(&path, &mut names).unwrap();
    assert_eq!(&names[..length], b"user.long\0user.one\0");
    assert_eq!(rustix::fs::listxattr(place.path("plain"), &mut names).unwrap(), 0);
}

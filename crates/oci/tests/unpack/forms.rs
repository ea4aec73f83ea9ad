//! Forms of archives that are rare, or that only other programs write.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::Path,
    process::Command,
};

use nacre_oci::unpack::{UnpackOptions, remove_tree};
use nacre_testkit::{Entry, Layer, require, root, run};
use rustix::fs::{Mode, OFlags};

use super::{apply, open};

#[test]
fn every_sparse_format_of_gnu_tar_is_read() {
    let Some(tar) = require("tar") else { return };
    if !root() {
        return;
    }
    let holder = tempfile::tempdir().unwrap();
    let file = File::create(holder.path().join("s")).unwrap();
    // More pieces than the old format's header has room for (4), and its first extension block, too (21).
    for piece in 0..60u8 {
        file.write_all_at(&[piece + 1; 4096], u64::from(piece) * 65_536 + 32_768).unwrap();
    }
    file.set_len(60 * 65_536 + 12_345).unwrap();
    let expected = fs::read(holder.path().join("s")).unwrap();
    for form in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let archive = holder.path().join("tar");
        run(Command::new(&tar).arg("-C").arg(holder.path()).args(form).args(["-S", "-c", "s", "-f"]).arg(&archive));
        let bytes = fs::read(archive).unwrap();
        assert!(bytes.len() < 400_000, "{form:?} made no sparse archive");
        let (target, record) = apply(&bytes, &UnpackOptions::default()).unwrap();
        let unpacked = target.path().join("s");
        assert!(fs::read(&unpacked).unwrap() == expected, "{form:?}");
        assert_eq!(record.content_bytes, 60 * 4096, "{form:?}");
        assert!(fs::metadata(unpacked).unwrap().blocks() < 700, "{form:?}: holes are holes");
    }
}

/// A hard link whose header has a size: pax(1) and cpio put the content behind it again, others write the size alone.
fn sized_link(path: &str, target: &'static str, content: &[u8], size: usize) -> Entry {
    Entry::of_type(path, b'1', content).header(move |header| {
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    })
}

#[test]
fn hard_links_may_bring_their_content_or_only_its_size() {
    if !root() {
        return;
    }
    let content = vec![b'c'; 700];
    let layer = Layer::of([
        Entry::file("file", content.clone()),
        sized_link("with", "file", &content, 700),
        Entry::file("between", "b"),
        sized_link("without", "file", b"", 700),
        Entry::file("after", "a"),
        sized_link("last", "file", &content, 700),
    ]);
    let (target, _) = apply(layer.tar(), &UnpackOptions::default()).unwrap();
    let inode = fs::metadata(target.path().join("file")).unwrap().ino();
    for name in ["with", "without", "last"] {
        assert_eq!(fs::metadata(target.path().join(name)).unwrap().ino(), inode, "{name}");
    }
    assert_eq!(fs::read(target.path().join("file")).unwrap(), content);
    assert_eq!(fs::read(target.path().join("between")).unwrap(), b"b");
    assert_eq!(fs::read(target.path().join("after")).unwrap(), b"a");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 6);
    let cut = Layer::raw(&layer.tar()[..layer.tar().len() - 1024 - 512]);
    assert!(apply(cut.tar(), &UnpackOptions::default()).is_err(), "the last content is cut");
}

fn walk(root: &Path, parts: &[String]) -> OwnedFd {
    parts.iter().fold(open(root), |at, part| {
        rustix::fs::openat(&at, part.as_str(), OFlags::RDONLY | OFlags::NOFOLLOW, Mode::empty()).unwrap()
    })
}

#[test]
fn names_may_be_longer_than_what_the_kernel_takes_at_once() {
    if !root() {
        return;
    }
    let parts: Vec<String> = (0..80).map(|number| format!("{number:0100}")).collect();
    let directory = parts.join("/");
    assert!(directory.len() > 4096);
    let file = format!("{directory}/file");
    let layer = Layer::of([
        Entry::file(&file, "deep").mode(0o4750).xattr("user.x", "1").mtime(5, 6),
        Entry::hard_link(format!("{directory}/link"), &file),
        Entry::symlink(format!("{directory}/symlink"), "file"),
        Entry::fifo(format!("{directory}/pipe")).owner(7, 8),
        Entry::whiteout(&format!("{directory}/gone")),
        Entry::hard_link("near", &file),
    ]);
    let (target, _) = apply(layer.tar(), &UnpackOptions::default()).unwrap();
    let at = walk(target.path(), &parts);
    let stat = |name: &str| rustix::fs::statat(&at, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let found = stat("file");
    assert_eq!((found.st_mode & 0o7777, found.st_mtime, found.st_nlink), (0o4750, 5, 3));
    assert_eq!((stat("link").st_ino, stat("pipe").st_uid), (found.st_ino, 7));
    assert_eq!(fs::read(target.path().join("near")).unwrap(), b"deep");
    assert_eq!(rustix::fs::FileType::from_raw_mode(stat("gone").st_mode), rustix::fs::FileType::CharacterDevice);
    let top = &parts[0];
    remove_tree(open(target.path()).as_fd(), top.as_bytes()).unwrap();
    assert!(!target.path().join(top).exists());
}

//! Large trees, and what they cost.

use std::time::{Duration, Instant};

use nacre_lazy::erofs::{Attributes, CheckError, FileType, Image, Limits, Node, Tree, check};

use crate::listing::{attributes, children, image};

/// As large root filesystems are: directories of 12 entries each, files of all sizes, some links, attributes on a few.
fn tree(entries: usize) -> Tree {
    let mut tree = Tree::new();
    let (file, link) = (attributes(0o644), attributes(0o777));
    let xattr: [(&[u8], &[u8]); 1] = [(b"security.capability", b"some capability")];
    for number in 0..entries {
        let path =
            [format!("usr{}", number / 20_000), format!("directory-{}", number / 12), format!("library-{number}.so.1")];
        let path: Vec<&[u8]> = path.iter().map(String::as_bytes).collect();
        let block = u32::try_from(number % 100_000).unwrap();
        match number % 12 {
            0 => tree.put(&path, Node::Symlink(b"../lib/library.so"), &link, &[]),
            1 => tree.put(&path, Node::File { size: number as u64, block }, &file, &xattr),
            _ => tree.put(&path, Node::File { size: number as u64 % 100_000, block }, &file, &[]),
        }
        .unwrap();
    }
    tree
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() >> 10
}

/// The best of some checks, and the image's size.
fn timed_check(bytes: &[u8]) -> Duration {
    let times = (0..5).map(|_| {
        let start = Instant::now();
        check(bytes, &Limits::default()).unwrap();
        start.elapsed()
    });
    times.min().unwrap()
}

#[test]
fn thirty_thousand_files() {
    let tree = tree(30_000);
    let bytes = image(&tree);
    let time = timed_check(&bytes);
    println!("{} inodes, {} bytes: checked in {time:?}", tree.inodes(), bytes.len());
    let image = Image::open(&bytes).unwrap();
    let usr = image.lookup(&image.inode(image.root()).unwrap(), b"usr1").unwrap().unwrap().0;
    let directory = image.lookup(&image.inode(usr).unwrap(), b"directory-2000").unwrap().unwrap().0;
    let (file, _) = image.lookup(&image.inode(directory).unwrap(), b"library-24001.so.1").unwrap().unwrap();
    assert_eq!(image.inode(file).unwrap().size, 24_001);
    assert!(cfg!(debug_assertions) || time < Duration::from_millis(100), "{time:?} for a check");
}

/// A million where it is optimised, a tenth of it otherwise. Its memory is the process's, which nextest makes for it alone.
#[test]
fn a_million_files() {
    let count = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
    let before = peak_mib();
    let start = Instant::now();
    let tree = tree(count);
    let built = start.elapsed();
    let after = peak_mib();
    println!("tree: {} inodes in {built:?}, {} MiB", tree.inodes(), after - before);
    let start = Instant::now();
    let path = tempfile::NamedTempFile::new().unwrap();
    nacre_lazy::erofs::write(&tree, &crate::listing::OPTIONS, path.as_file()).unwrap();
    println!("written in {:?}, {} bytes", start.elapsed(), path.as_file().metadata().unwrap().len());
    drop(tree);
    let start = Instant::now();
    let summary = check(path.as_file(), &Limits::default()).unwrap();
    println!("checked from a file in {:?}: {summary:?}", start.elapsed());
    let bytes = std::fs::read(path.path()).unwrap();
    let time = timed_check(&bytes);
    println!("checked from memory in {time:?}");
    assert!((after - before) << 20 < 250 * summary.inodes);
    assert!(cfg!(debug_assertions) || time < Duration::from_millis(1500), "{time:?} for a check");
}

#[test]
fn a_directory_of_a_hundred_thousand_entries() {
    let count = 100_000;
    let mut tree = Tree::new();
    // Not in their order.
    for number in (0..count).map(|number| number * 7919 % count) {
        tree.put(&[b"d", format!("{number:x}").as_bytes()], Node::Fifo, &Attributes::IMPLIED, &[]).unwrap();
    }
    let bytes = image(&tree);
    let summary = check(&bytes, &Limits::default()).unwrap();
    assert_eq!((summary.names, summary.specials), (100_001, 100_000));
    let image = Image::open(&bytes).unwrap();
    let (nid, _) = image.lookup(&image.inode(image.root()).unwrap(), b"d").unwrap().unwrap();
    let directory = image.inode(nid).unwrap();
    let entries = children(&image, &directory).unwrap();
    assert_eq!(entries.len(), 100_002);
    assert!(entries.is_sorted());
    for (name, nid, _) in entries.iter().step_by(97) {
        assert_eq!(image.lookup(&directory, name).unwrap().unwrap().0, *nid);
        let other = [&name[..], b"~"].concat();
        assert_eq!(image.lookup(&directory, &other).unwrap(), None);
    }
}

#[test]
fn depth_is_limited() {
    let mut tree = Tree::new();
    let path = vec![&b"d"[..]; 2048];
    tree.put(&path, Node::Directory, &Attributes::IMPLIED, &[]).unwrap();
    assert!(tree.put(&[&path[..], &[b"x"]].concat(), Node::Fifo, &Attributes::IMPLIED, &[]).is_err());
    let bytes = image(&tree);
    assert!(matches!(check(&bytes, &Limits::default()), Err(CheckError::Limit { limit: "depth", .. })));
    let limits = Limits { depth: 2048, ..Limits::default() };
    assert_eq!(check(&bytes, &limits).unwrap().depth, 2048);
    let too_few = Limits { depth: 2047, ..limits };
    assert!(check(&bytes, &too_few).is_err());
    let image = Image::open(&bytes).unwrap();
    let (mut nid, mut depth) = (image.root(), 0);
    while let Some((next, FileType::Directory)) = image.lookup(&image.inode(nid).unwrap(), b"d").unwrap() {
        (nid, depth) = (next, depth + 1);
    }
    assert_eq!(depth, 2048);
}

#[test]
fn every_limit_is_kept() {
    let mut tree = Tree::new();
    tree.put(&[b"a"], Node::File { size: 1000, block: 0 }, &attributes(0o600), &[]).unwrap();
    for name in [b"b", b"c", b"d"] {
        tree.link(&[name], &[b"a"]).unwrap();
    }
    let bytes = image(&tree);
    let fits = Limits { entries: 4, image_bytes: 4096, depth: 0, file_bytes: 1000 };
    check(&bytes, &fits).unwrap();
    let refused = |limits: Limits| match check(&bytes, &limits) {
        Err(CheckError::Limit { limit, .. }) => limit,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(Limits { entries: 3, ..fits.clone() }), "entries");
    assert_eq!(refused(Limits { entries: 1, ..fits.clone() }), "entries");
    assert_eq!(refused(Limits { image_bytes: 4095, ..fits.clone() }), "image_bytes");
    assert_eq!(refused(Limits { file_bytes: 999, ..fits.clone() }), "file_bytes");
}

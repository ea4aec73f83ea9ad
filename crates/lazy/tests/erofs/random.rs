//! Random trees: what is written is accepted, and reads back.

use nacre_lazy::erofs::{Attributes, Device, FileType, Image, Limits, Node, Summary, Timestamp, Tree, check};
use nacre_testkit::{Rng, tree::assert_same};
use proptest::prelude::*;

use crate::listing::{attributes, image, list_image, list_tree, place};

/// What a random tree may have.
#[derive(Clone, Copy)]
pub(crate) struct Wild {
    /// Any bytes in names and targets; otherwise what tools print.
    pub(crate) bytes: bool,
    /// Blocks of files, from block 0 on.
    pub(crate) blocks: u32,
}

fn name(rng: &mut Rng, wild: Wild) -> Vec<u8> {
    let length = if rng.below(10) == 0 { 1 + rng.below(255) } else { 1 + rng.below(12) };
    let mut name = rng.bytes(length);
    for byte in &mut name {
        match wild.bytes {
            true if matches!(*byte, 0 | b'/') => *byte = b'-',
            true => {}
            // Some are before the dot.
            false => *byte = b"!+-.aAbcdefg09_~"[usize::from(*byte) % 16],
        }
    }
    if name == b"." || name == b".." { b"dots".to_vec() } else { name }
}

fn xattrs(rng: &mut Rng, user: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut xattrs = std::collections::BTreeMap::new();
    for _ in 0..[0, 0, 0, 0, 1, 1, 2, 20][rng.below(8)] {
        let prefix = if user { ["user.", "trusted.", "security."][rng.below(3)] } else { "trusted." };
        let name = format!("{prefix}{}", "n".repeat(1 + rng.below(3)));
        let size = [0, 1, 7, 7, 40, 300][rng.below(6)];
        // Many are alike.
        let value = if rng.below(2) == 0 { vec![b'v'; size] } else { rng.bytes(size) };
        xattrs.insert(name.into_bytes(), value);
    }
    if user && rng.below(10) == 0 {
        let acl = |tag: u8, mode: u8, id: u32| [&[tag, 0, mode, 0][..], &id.to_le_bytes()].concat();
        let entries =
            [acl(1, 6, u32::MAX), acl(2, 7, 4711), acl(4, 4, u32::MAX), acl(16, 7, u32::MAX), acl(32, 0, u32::MAX)];
        xattrs.insert(b"system.posix_acl_access".to_vec(), [&[2, 0, 0, 0][..], &entries.concat()].concat());
    }
    if rng.below(40) == 0 {
        let size = 3000 + rng.below(4000);
        xattrs.insert(b"trusted.large".to_vec(), rng.bytes(size));
    }
    xattrs.into_iter().collect()
}

/// A tree of about so many entries.
pub(crate) fn tree(rng: &mut Rng, entries: usize, wild: Wild) -> Tree {
    let mut tree = Tree::new();
    let mut directories: Vec<Vec<Vec<u8>>> = vec![vec![]];
    let mut files: Vec<Vec<Vec<u8>>> = Vec::new();
    for _ in 0..entries {
        // Late ones get the most, so that some are large and some are empty.
        let from = directories.len().saturating_sub(8);
        let parent = directories[from + rng.below(directories.len() - from)].clone();
        let mut path = parent.clone();
        path.push(name(rng, wild));
        let parts: Vec<&[u8]> = path.iter().map(|part| &part[..]).collect();
        if tree.get(&parts).is_some() {
            continue;
        }
        if !files.is_empty() && rng.below(12) == 0 {
            let target = &files[rng.below(files.len())];
            let target: Vec<&[u8]> = target.iter().map(|part| &part[..]).collect();
            tree.link(&parts, &target).unwrap();
            continue;
        }
        let kind = rng.below(20);
        let target_size = [1 + rng.below(30), 1 + rng.below(4095), 4032 - rng.below(3)][rng.below(3)];
        let mut target = rng.bytes(target_size);
        for byte in &mut target {
            *byte = if wild.bytes { (*byte).max(1) } else { b"ab./-"[usize::from(*byte) % 5] };
        }
        let device = Device {
            major: 1 + u32::try_from(rng.below(4095)).unwrap(),
            minor: u32::try_from(rng.below(1 << 20)).unwrap(),
        };
        let node = match kind {
            0..3 => Node::Directory,
            3..5 => Node::Symlink(&target),
            5 => Node::CharDevice(device),
            6 => Node::BlockDevice(device),
            7 => Node::Fifo,
            8 => Node::Socket,
            9 => Node::File { size: 0, block: 99 },
            _ => {
                let block = rng.below(wild.blocks as usize);
                let size = rng.below((wild.blocks as usize - block) * 4096 + 1);
                Node::File { size: size as u64, block: u32::try_from(block).unwrap() }
            }
        };
        let mut attributes = attributes(u16::try_from(rng.below(0o10000)).unwrap());
        attributes.uid = u32::try_from(rng.below(u32::MAX as usize)).unwrap();
        attributes.mtime = Timestamp {
            seconds: i64::try_from(rng.below(1 << 34)).unwrap() - (1 << 32),
            nanoseconds: u32::try_from(rng.below(1_000_000_000)).unwrap(),
        };
        let xattrs = xattrs(rng, matches!(node, Node::Directory | Node::File { .. }));
        let xattrs: Vec<(&[u8], &[u8])> = xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        tree.put(&parts, node, &attributes, &xattrs).unwrap();
        match node {
            Node::Directory => directories.push(path),
            _ => files.push(path),
        }
    }
    tree
}

/// What a summary has to be, from a listing of the tree.
pub(crate) fn assert_summary(tree: &Tree, summary: &Summary) {
    let listing = list_tree(tree, &place);
    let count = |file_type: FileType| {
        let is = |line: &&String| {
            u16::from_str_radix(line.split(' ').next().unwrap(), 8).unwrap() >> 12 == file_type.mode() >> 12
        };
        listing.values().filter(is).filter(|line| !line.contains(" same file as ")).count() as u64
    };
    assert_eq!(summary.inodes, tree.inodes() as u64);
    assert_eq!(summary.names, listing.len() as u64 - 1);
    assert_eq!(summary.directories, count(FileType::Directory));
    assert_eq!(summary.files, count(FileType::Regular));
    assert_eq!(summary.symlinks, count(FileType::Symlink));
    assert_eq!(summary.inodes, summary.directories + summary.files + summary.symlinks + summary.specials);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_accepted_and_reads_back(seed: u64, entries in prop_oneof![0usize..40, 0usize..800]) {
        let tree = tree(&mut Rng::new(seed), entries, Wild { bytes: true, blocks: 1000 });
        let bytes = image(&tree);
        prop_assert_eq!(&bytes, &image(&tree));
        let limits = Limits { depth: 1000, ..Limits::default() };
        let summary = check(&bytes, &limits).unwrap();
        assert_summary(&tree, &summary);
        let image = Image::open(&bytes).unwrap();
        assert_same(&list_image(&image, &place), &list_tree(&tree, &place), "reader against tree");
    }
}

#[test]
fn the_empty_tree() {
    let tree = Tree::new();
    let bytes = image(&tree);
    assert_eq!(bytes.len(), 4096);
    let summary = check(&bytes, &Limits::default()).unwrap();
    assert_eq!((summary.inodes, summary.names, summary.depth), (1, 0, 0));
    assert_eq!((summary.device_tag.as_str(), summary.device_blocks, summary.uuid), ("data", 1 << 20, [7; 16]));
}

#[test]
fn how_a_tree_came_to_be_does_not_matter() {
    let a = Attributes::IMPLIED;
    let (mut one, mut other) = (Tree::new(), Tree::new());
    let xattrs: [(&[u8], &[u8]); 2] = [(b"user.a", b"1"), (b"trusted.b", b"2")];
    let backwards = [xattrs[1], xattrs[0]];
    one.put(&[b"a"], Node::Directory, &a, &xattrs).unwrap();
    one.put(&[b"b"], Node::Fifo, &a, &xattrs[..1]).unwrap();
    one.link(&[b"c"], &[b"b"]).unwrap();
    other.put(&[b"c"], Node::Socket, &a, &[]).unwrap();
    other.put(&[b"c"], Node::Fifo, &a, &xattrs[..1]).unwrap();
    other.begin_layer();
    other.put(&[b"x", b"y"], Node::Fifo, &a, &[(b"user.zzz", b"1")]).unwrap();
    other.put(&[b"a"], Node::Directory, &a, &backwards).unwrap();
    other.link(&[b"b"], &[b"c"]).unwrap();
    other.begin_layer();
    assert!(other.whiteout(&[b"x"]).unwrap());
    assert_eq!(image(&one), image(&other));
}

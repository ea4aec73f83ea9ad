//! Images in which bytes were changed: the check refuses them, or what it accepts is an image like any other.

use std::collections::BTreeSet;

use nacre_lazy::erofs::{Device, FileType, Image, Limits, Node, Summary, Tree, check};
use nacre_testkit::Rng;

use crate::listing::{attributes, image};

/// CRC32C as EROFS has it, of the superblock's block: bit by bit, so that it is not the code under test.
pub(crate) fn seal(image: &mut [u8]) {
    image[1028..1032].fill(0);
    let sum = image[1024..4096].iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 })
    });
    image[1028..1032].copy_from_slice(&sum.to_le_bytes());
}

/// Some of everything, in a few blocks.
pub(crate) fn samples() -> Tree {
    let mut tree = Tree::new();
    let of = attributes(0o644);
    let mut put =
        |path: &[&[u8]], node: Node<'static>, xattrs: &[(&[u8], &[u8])]| tree.put(path, node, &of, xattrs).unwrap();
    put(&[b"a", b"file"], Node::File { size: 5, block: 1 }, &[(b"user.shared", b"1"), (b"user.own", b"abc")]);
    put(&[b"a", b"file2"], Node::File { size: 9000, block: 3 }, &[(b"user.shared", b"1"), (b"trusted.shared", b"2")]);
    put(&[b"a", b"b", b"file3"], Node::File { size: (8 << 40) + 1, block: 7 }, &[(b"trusted.shared", b"2")]);
    put(&[b"a", b"empty"], Node::File { size: 0, block: 0 }, &[]);
    put(&[b"b", b"link"], Node::Symlink(b"../a/file"), &[]);
    put(&[b"b", b"long link"], Node::Symlink(&[b'x'; 4090]), &[]);
    put(&[b"dev", b"char"], Node::CharDevice(Device { major: 1, minor: 3 }), &[]);
    put(&[b"dev", b"block"], Node::BlockDevice(Device { major: 8, minor: 300 }), &[(b"security.a", b"")]);
    put(&[b"dev", b"fifo"], Node::Fifo, &[]);
    put(&[b"dev", b"socket"], Node::Socket, &[]);
    for number in 0..22 {
        let name = format!("{number:0200}");
        put(&[b"full", name.as_bytes()], Node::Fifo, &[]);
    }
    tree.link(&[b"hard"], &[b"a", b"file"]).unwrap();
    tree.link(&[b"dev", b"hard"], &[b"dev", b"fifo"]).unwrap();
    tree
}

/// The image of [`samples`], with a device that its largest file fits.
pub(crate) fn sample_image() -> Vec<u8> {
    let mut bytes = Vec::new();
    let options = nacre_lazy::erofs::WriteOptions { device_blocks: (2 << 30) + 100, ..crate::listing::OPTIONS };
    nacre_lazy::erofs::write(&samples(), &options, &mut bytes).unwrap();
    bytes
}

pub(crate) const LIMITS: Limits = Limits { entries: 10_000, image_bytes: 1 << 30, depth: 100, file_bytes: 1 << 44 };

/// Reads everything that there is, and counts it; `None` where something cannot be read. It ends on images with cycles, too.
pub(crate) fn walk(bytes: &[u8]) -> Option<Summary> {
    let image = Image::open(bytes).ok()?;
    let (mut seen, mut todo) = (BTreeSet::new(), vec![(image.root(), 0)]);
    let mut summary = Summary {
        image_bytes: image.size(),
        device_blocks: image.device_blocks(),
        device_tag: image.device_tag().to_owned(),
        uuid: image.uuid(),
        ..Summary::default()
    };
    while let Some((nid, depth)) = todo.pop() {
        if !seen.insert(nid) {
            continue;
        }
        let inode = image.inode(nid).ok()?;
        image.xattrs(&inode, |_| true).ok()?;
        image.xattr(&inode, b"user.own").ok()?;
        summary.inodes += 1;
        match inode.file_type {
            FileType::Directory => {
                summary.directories += 1;
                summary.depth = summary.depth.max(depth);
                let mut names = Vec::new();
                image
                    .read_dir(&inode, 0, |entry| {
                        names.push((entry.name.to_vec(), entry.nid));
                        names.len() < 1000
                    })
                    .ok()?;
                for (name, nid) in names {
                    image.lookup(&inode, &name).ok()?;
                    if name != b"." && name != b".." {
                        summary.names += 1;
                        todo.push((nid, depth + 1));
                    }
                }
            }
            FileType::Regular => {
                summary.files += 1;
                summary.file_bytes += inode.size;
                assert!(inode.extent.is_none_or(|extent| extent.block + extent.blocks <= image.device_blocks()));
            }
            FileType::Symlink => {
                summary.symlinks += 1;
                image.read_link(&inode).ok()?;
            }
            _ => summary.specials += 1,
        }
    }
    Some(summary)
}

fn verdict(bytes: &[u8]) -> bool {
    let walked = walk(bytes);
    let Ok(mut checked) = check(bytes, &LIMITS) else { return false };
    let mut walked = walked.unwrap();
    // A directory below an unused depth counts there and here alike; depth is where the deepest directory is.
    checked.depth = checked.depth.max(walked.depth);
    walked.depth = walked.depth.max(checked.depth);
    assert_eq!(checked, walked);
    true
}

#[test]
fn every_byte_changed() {
    let good = sample_image();
    assert!(verdict(&good));
    let (mut accepted, mut refused) = (0, 0);
    for at in 0..good.len() {
        // Long runs are alike.
        let around = &good[at.saturating_sub(16)..good.len().min(at + 16)];
        if !at.is_multiple_of(64) && around.iter().all(|byte| *byte == good[at]) {
            continue;
        }
        for change in [|byte: u8| byte ^ 1, |byte: u8| byte ^ 0x80, |byte: u8| byte.wrapping_add(32)] {
            let mut bytes = good.clone();
            bytes[at] = change(bytes[at]);
            if (1024..4096).contains(&at) {
                if at.is_multiple_of(8) {
                    assert!(!verdict(&bytes), "byte {at}: a wrong checksum is accepted");
                }
                seal(&mut bytes);
            }
            match verdict(&bytes) {
                true => accepted += 1,
                false => refused += 1,
            }
        }
    }
    println!("{accepted} accepted, {refused} refused");
    // Only what is free: names, owners, times, permissions, values, targets, blocks, and the superblock's UUID and tag.
    assert!(accepted > 500 && refused > accepted);
}

#[test]
fn fields_changed_at_random() {
    let good = sample_image();
    let mut rng = Rng::new(3);
    let mut accepted = 0;
    for _ in 0..5000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(3) {
            let width = 1 << rng.below(4);
            let at = 1024 + rng.below((bytes.len() - 1024) / width) * width;
            let at = at.min(bytes.len() - width);
            match rng.below(4) {
                0 => {
                    let value = (rng.below(300) as u64).to_le_bytes();
                    bytes[at..at + width].copy_from_slice(&value[..width]);
                }
                1 => rng.fill(&mut bytes[at..at + width]),
                2 => {
                    let from = rng.below(good.len() - width);
                    bytes[at..at + width].copy_from_slice(&good[from..from + width]);
                }
                _ => {
                    let (from, count) = (rng.below(good.len() / 32) * 32, 32 << rng.below(3));
                    let to = rng.below(good.len() / 32) * 32;
                    let count = count.min(good.len() - from).min(good.len() - to);
                    bytes[to..to + count].copy_from_slice(&good[from..from + count]);
                }
            }
        }
        seal(&mut bytes);
        accepted += u32::from(verdict(&bytes));
    }
    println!("{accepted} accepted");
}

#[test]
fn every_length() {
    let good = image(&samples_small());
    for length in (0..good.len()).step_by(97).chain([1024, 4095]) {
        assert!(!verdict(&good[..length]), "{length}");
    }
    let longer = [&good[..], &[0; 4096]].concat();
    assert!(!verdict(&longer));
}

fn samples_small() -> Tree {
    let mut tree = Tree::new();
    tree.put(&[b"a"], Node::Fifo, &attributes(0o644), &[]).unwrap();
    tree
}

//! Images that somebody made to break a reader or the kernel: one for each rule of the check.

use nacre_lazy::erofs::{FileType, Image, check};

use crate::mutations::{LIMITS, sample_image, seal, walk};

/// An image that is changed in places that are found by name.
struct Victim {
    bytes: Vec<u8>,
    good: Vec<u8>,
}

impl Victim {
    fn new() -> Self {
        let good = sample_image();
        Self { bytes: good.clone(), good }
    }

    fn nid(&self, path: &str) -> u64 {
        let image = Image::open(&self.good).unwrap();
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.fold(image.root(), |nid, name| {
            image.lookup(&image.inode(nid).unwrap(), name.as_bytes()).unwrap().unwrap().0
        })
    }

    /// Where an inode is.
    fn at(&self, path: &str) -> usize {
        usize::try_from(self.nid(path)).unwrap() * 32
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        self.good[at..at + N].try_into().unwrap()
    }

    /// Where a directory's entry is: its 12 bytes, and its name. The directory has no attributes, and is all inline.
    fn entry(&self, directory: &str, name: &str) -> (usize, usize) {
        let start = self.at(directory) + 64;
        let count = usize::from(u16::from_le_bytes(self.read(start + 8))) / 12;
        let size = u64::from_le_bytes(self.read(start - 64 + 8));
        for index in 0..count {
            let entry = start + index * 12;
            let from = start + usize::from(u16::from_le_bytes(self.read(entry + 8)));
            let to = if index + 1 < count {
                start + usize::from(u16::from_le_bytes(self.read(entry + 20)))
            } else {
                start + usize::try_from(size).unwrap()
            };
            if &self.good[from..to] == name.as_bytes() {
                return (entry, from);
            }
        }
        panic!("{directory} has no {name}")
    }

    /// The check refuses it with this text, and the reader does not fall over it.
    #[track_caller]
    fn refused(&mut self, text: &str) {
        assert!(self.bytes != self.good, "nothing was changed");
        seal(&mut self.bytes);
        let error = check(&self.bytes, &LIMITS).unwrap_err().to_string();
        assert!(error.contains(text), "refused for another reason: {error}");
        walk(&self.bytes);
        self.bytes.clone_from(&self.good);
    }
}

#[test]
fn superblocks() {
    let mut it = Victim::new();
    it.put(0, b"x").refused("before the superblock");
    it.put(1023, b"x").refused("before the superblock");
    it.put(1024, &[0]).refused("no magic");
    // Features, sizes, the root, times, places, a name, compression, devices, prefixes, the packed inode, what is reserved.
    for at in [
        1032, 1033, 1036, 1037, 1038, 1048, 1056, 1064, 1088, 1104, 1108, 1110, 1112, 1114, 1115, 1116, 1120, 1128,
        1151,
    ] {
        let flipped = it.read::<1>(at)[0] ^ 0x40;
        it.put(at, &[flipped]).refused("not of this profile");
    }
    for bit in [0u8, 1, 4, 5, 6, 7] {
        it.put(1104, &[0x0C | 1 << bit]).refused("not of this profile");
    }
    it.put(1040, &[1]).refused("inodes");
    it.put(1040, &200u64.to_le_bytes()).refused("counts other inodes");
    it.put(1040, &u64::MAX.to_le_bytes()).refused("entries");
    it.put(1060, &[1]).refused("counts other blocks");
    it.put(1068, &[0xFF; 4]).refused("shared attributes outside");
    it.put(1068, &[0; 4]).refused("a shared attribute that is not there");
    it.put(1068, &[1]).refused("shared attribute");
    it.put(1152, b"../../data").refused("whose name");
    it.put(1152, &[0; 64]).refused("whose name");
    it.put(1152 + 10, b"x").refused("whose name");
    it.put(1152 + 68, &[1]).refused("a device with values");
    it.put(1152 + 127, &[1]).refused("a device with values");
    it.put(1152 + 64, &[0; 4]).refused("not on the data device");
}

#[test]
fn cycles_and_wrong_links() {
    let mut it = Victim::new();
    let root = it.nid("");
    // A directory in itself, in its child, in two places.
    for (directory, name, to) in [("a", "b", "a"), ("a", "b", ""), ("", "b", "a"), ("", "dev", "a"), ("a", "b", "dev")]
    {
        let (entry, _) = it.entry(directory, name);
        let to = it.nid(to).to_le_bytes();
        it.put(entry, &to).refused("");
    }
    let (entry, _) = it.entry("a", "b");
    it.put(entry, &root.to_le_bytes()).refused("leads to no inode");
    // To the middle of inodes, into other areas, to the end of the image and out of it.
    let (entry, _) = it.entry("b", "link");
    let next = it.nid("b/link");
    for nid in [0, 1, 32, 39, root + 1, next - 1, it.nid("a/b") + 1] {
        it.put(entry, &nid.to_le_bytes()).refused("leads to no inode");
    }
    let end = it.good.len() as u64 / 32;
    for nid in [next + 1, next + 2, end - 1, end, u64::from(u32::MAX), u64::MAX / 32, u64::MAX, 1 << 63] {
        it.put(entry, &nid.to_le_bytes()).refused("is another one, or none");
    }
    // A further name of a file that counts one.
    let nid = it.nid("a/empty").to_le_bytes();
    it.put(it.entry("b", "link").0, &nid).refused("");
    let (dot, _) = it.entry("a", ".");
    it.put(dot, &root.to_le_bytes()).refused("does not lead to where it has to");
    let (dots, _) = it.entry("a/b", "..");
    it.put(dots, &root.to_le_bytes()).refused("does not lead to where it has to");
    it.put(dots + 10, &[FileType::Regular as u8]).refused("does not lead to where it has to");
}

#[test]
fn entries() {
    let mut it = Victim::new();
    let (fifo, name) = it.entry("dev", "fifo");
    for kind in [0, 1, 2, 3, 4, 6, 7, 8, 255] {
        it.put(fifo + 10, &[kind]).refused(if (1..8).contains(&kind) { "another type" } else { "unknown type" });
    }
    it.put(fifo + 11, &[1]).refused("unknown bits");
    it.put(name, b"f/fo").refused("has a '/'");
    it.put(name, b"f\0fo").refused("has a '/'");
    it.put(name, b"zzzz").refused("out of order");
    it.put(name, b"char").refused("out of order");
    it.put(name, b"char").refused("twice");
    let (dots, name) = it.entry("dev", "..");
    it.put(name, b"++").refused("out of order");
    it.put(name, b".-").refused("leads to no inode");
    it.put(name, b".a").refused("leads to no inode");
    let (dot, name) = it.entry("dev", ".");
    it.put(name, b"!").refused("leads to no inode");
    // Names that are not where the one before ends, are in the entries, or outside.
    for place in [0u16, 11, 12, 4095, 4096, u16::MAX] {
        it.put(dots + 8, &place.to_le_bytes()).refused("block that is damaged");
        it.put(dot + 8, &place.to_le_bytes()).refused("");
    }
    let second = u16::from_le_bytes(it.read(dots + 8));
    it.put(dots + 8, &(second - 1).to_le_bytes()).refused("is empty");
    it.put(dots + 8, &(second + 1).to_le_bytes()).refused("");
    // Sizes of directories.
    let dev = it.at("dev");
    let size = u64::from_le_bytes(it.read(dev + 8));
    for size in [0, 1, 11, 12, size - 1, size + 1, 4096, 1 << 31, 1 << 32, u64::MAX] {
        it.put(dev + 8, &size.to_le_bytes()).refused("");
    }
    let full = it.at("full");
    let block = usize::try_from(u32::from_le_bytes(it.read(full + 16))).unwrap() * 4096;
    it.put(block + 4095, b"x").refused("");
}

#[test]
fn inodes() {
    let mut it = Victim::new();
    for path in ["", "a", "a/file", "a/empty", "b/link", "dev/char", "dev/fifo"] {
        let at = it.at(path);
        // Compact, compressed, without indexes, with dots left out, unknown.
        let format = it.read::<1>(at)[0];
        for other in (0..32).filter(|other| *other != format) {
            it.put(at, &[other]).refused("");
        }
        it.put(at + 1, &[1]).refused("");
        it.put(at + 6, &[1]).refused("unknown bits");
        it.put(at + 63, &[1]).refused("unknown bits");
        it.put(at + 48, &[1]).refused("unknown bits");
        it.put(at + 20, &[99]).refused("number of its place");
        it.put(at + 40, &1_000_000_000u32.to_le_bytes()).refused("nanoseconds");
        it.put(at + 44, &[0; 4]).refused("links");
        it.put(at + 44, &7u32.to_le_bytes()).refused("links");
        it.put(at + 44, &u32::MAX.to_le_bytes()).refused("links");
        // Types that there are, and others.
        let mode = u16::from_le_bytes(it.read(at + 4));
        for other in (0..16).filter(|other| *other != mode >> 12) {
            it.put(at + 4, &(other << 12 | 0o644).to_le_bytes()).refused("");
        }
        it.put(at + 2, &[1, 1]).refused("");
        it.put(at + 2, &[0xFF, 0xFF]).refused("");
    }
    it.put(it.at("dev/char") + 16, &[0; 4]).refused("0:0");
    for path in ["dev/fifo", "dev/socket", "a/empty"] {
        it.put(it.at(path) + 16, &[1]).refused("has a place");
        it.put(it.at(path) + 8, &[1]).refused("");
    }
    it.put(it.at("") + 5, &[0x81]).refused("");
    // What is between inodes.
    let after = it.at("dev/fifo") - 1;
    it.put(after, &[1]).refused("");
}

#[test]
fn files() {
    let mut it = Victim::new();
    let file = it.at("a/file2");
    let chunks = file + (64 + usize::from(u16::from_le_bytes(it.read(file + 2))) * 4 + 8).next_multiple_of(8);
    assert_eq!(it.read::<8>(chunks), [0, 0, 1, 0, 3, 0, 0, 0]);
    for device in [0u16, 2, 257, u16::MAX] {
        it.put(chunks + 2, &device.to_le_bytes()).refused("on another device");
    }
    it.put(chunks, &[1]).refused("unknown bits");
    let last = (2u32 << 30) + 100 - 2;
    for block in [last, last + 1, u32::MAX - 3, u32::MAX] {
        it.put(chunks + 4, &block.to_le_bytes()).refused("not on the data device");
    }
    for format in [0u32, 1, 2, 0x21, 0x23, 0x3F, 0x62, 0x1_0022] {
        it.put(file + 16, &format.to_le_bytes()).refused("one chunk");
    }
    for size in [8192u64, 16385, 1 << 43, 1 << 44, (1 << 44) + 1, 1 << 62, u64::MAX] {
        it.put(file + 8, &size.to_le_bytes()).refused("");
    }
    it.put(file + 8, &0u64.to_le_bytes()).refused("");
    let two = it.at("a/b/file3");
    let chunks = two + (64 + usize::from(u16::from_le_bytes(it.read(two + 2))) * 4 + 8).next_multiple_of(8);
    assert_eq!(it.read::<8>(chunks + 8), [0, 0, 1, 0, 7, 0, 0, 0x80]);
    it.put(chunks + 12, &[8]).refused("several pieces");
    it.put(chunks + 10, &[2]).refused("another device");
}

#[test]
fn symbolic_links() {
    let mut it = Victim::new();
    let (short, long) = (it.at("b/link"), it.at("b/long link"));
    it.put(short + 64, &[0]).refused("NUL");
    it.put(short + 16, &[1]).refused("has a place");
    for size in [0u64, 4096, 1 << 32, u64::MAX] {
        it.put(short + 8, &size.to_le_bytes()).refused(if size > 4096 { "4 GiB" } else { "1 to 4095 bytes" });
    }
    it.put(short + 8, &[8]).refused("");
    it.put(short + 8, &[10]).refused("");
    let block = u32::from_le_bytes(it.read(long + 16));
    let target = usize::try_from(block).unwrap() * 4096;
    it.put(target + 100, &[0]).refused("NUL");
    it.put(target + 4090, b"x").refused("after its target");
    for block in [0, 1, block - 1, block + 1, u32::MAX] {
        it.put(long + 16, &block.to_le_bytes()).refused("");
    }
}

#[test]
fn attributes() {
    let mut it = Victim::new();
    let at = it.at("a/file") + 64;
    // One shared, one of its own.
    assert_eq!(it.read::<8>(at + 4), [1, 0, 0, 0, 0, 0, 0, 0]);
    let own = at + 16;
    assert_eq!(it.read::<10>(own), *b"\x03\x01\x03\0ownabc");
    it.put(at, &[1]).refused("a filter");
    it.put(at + 5, &[1]).refused("unknown bits");
    it.put(at + 4, &[0]).refused("");
    it.put(at + 4, &[2]).refused("");
    it.put(at + 4, &[255]).refused("cut off");
    for id in [1u32, 2, 1000, u32::MAX] {
        it.put(at + 12, &id.to_le_bytes()).refused("a shared attribute that is not there");
    }
    for prefix in [0u8, 2, 3, 5, 7, 0x81, 255] {
        it.put(own + 1, &[prefix]).refused("name that no image may have");
    }
    it.put(own, &[0]).refused("");
    it.put(own + 4, &[0]).refused("name that no image may have");
    it.put(own, &[255]).refused("cut off");
    it.put(own + 2, &[0xFF, 0xFF]).refused("cut off");
    it.put(own + 10, &[1]).refused("filling");
    // Two shared ones, in the other order and twice.
    let two = it.at("a/file2") + 64;
    let (first, second) = (it.read::<4>(two + 12), it.read::<4>(two + 16));
    it.put(two + 12, &second).put(two + 16, &first).refused("out of order");
    it.put(two + 16, &first).refused("one of them twice");
    // The shared ones themselves: `user.shared`, then `trusted.shared`.
    let area = usize::try_from(u32::from_le_bytes(it.read(1068))).unwrap() * 4096;
    assert_eq!(it.read::<12>(area), *b"\x06\x01\x01\0shared1\0");
    it.put(area + 1, &[4]).refused("out of order");
    it.put(area + 1, &[9]).refused("no good name");
    it.put(area + 11, &[1]).refused("no good name");
    it.put(area + 2, &[0xFF, 0xFF]).refused("cut off");
    it.put(area + 4095, &[1]).refused("goes on after its last");
    it.put(area, &[0; 4]).refused("goes on after its last");
    // The attribute of one's own is the shared one again.
    let mut tree = nacre_lazy::erofs::Tree::new();
    let of = crate::listing::attributes(0o644);
    for (name, xattr) in [(&b"f1"[..], &b"user.aaa"[..]), (b"f2", b"user.aaa"), (b"f3", b"user.aab")] {
        let mut xattrs: Vec<(&[u8], &[u8])> = vec![(xattr, b"x")];
        if name == b"f1" {
            xattrs.push((b"user.aac", b"y"));
        }
        tree.put(&[name], nacre_lazy::erofs::Node::Fifo, &of, &xattrs).unwrap();
    }
    let mut twice = Victim { bytes: crate::listing::image(&tree), good: crate::listing::image(&tree) };
    let own = twice.at("f1") + 64 + 16;
    assert_eq!(twice.read::<7>(own), *b"\x03\x01\x01\0aac");
    twice.put(own + 4, b"aaa").refused("one of them twice");
    for name in [&b"trusted.overlay.opaque"[..], b"user.overlay.redirect"] {
        let mut tree = nacre_lazy::erofs::Tree::new();
        let near = [&name[..name.len() - 1], b"!"].concat();
        let near = String::from_utf8(near).unwrap().replace("overlay.", "overlay,");
        tree.put(&[b"f"], nacre_lazy::erofs::Node::Fifo, &of, &[(near.as_bytes(), b"y")]).unwrap();
        let mut it = Victim { bytes: crate::listing::image(&tree), good: crate::listing::image(&tree) };
        let name = it.good.windows(8).position(|bytes| bytes == b"overlay,").unwrap();
        it.put(name, b"overlay.").refused("name that no image may have");
    }
}

#[test]
fn places() {
    let mut it = Victim::new();
    // Directories that share blocks, or have the inodes' or others'.
    let full = it.at("full");
    let block = u32::from_le_bytes(it.read(full + 16));
    for block in [0, 1, block - 1, block + 1, block + 2, u32::MAX] {
        it.put(full + 16, &block.to_le_bytes()).refused("");
    }
    it.put(it.at("a") + 16, &[1]).refused("has a place");
    // The last block twice, one less.
    let last = it.good.len() - 4096;
    it.bytes.extend_from_within(last..);
    it.refused("counts other blocks");
    it.bytes.truncate(last);
    it.refused("counts other blocks");
    let blocks = u32::try_from(it.good.len() / 4096).unwrap();
    it.bytes.extend_from_slice(&[0; 4096]);
    it.put(1060, &(blocks + 1).to_le_bytes()).refused("goes on after its last");
}

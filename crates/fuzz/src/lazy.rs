//! Metadata of lazy images: what the check accepts has to be a tree, and the reader has to live with what it refuses.

use std::collections::BTreeSet;

use nacre_core::Digest;
use nacre_lazy::{
    erofs::{
        Attributes, Device, FileType, Image, Limits, Node, ReadError, Summary, Timestamp, Tree, WriteOptions, check,
        write,
    },
    format::{self, ChunkEntry, Cipher, Header, LeafEntry},
    frames::FrameWriter,
    image::Metadata,
    table::Leaves,
};
use zerocopy::{FromZeros as _, IntoBytes as _};

/// The image's superblock and what is in its block, and the checksum of them.
const SUMMED: std::ops::Range<usize> = 1024..4096;
const CHECKSUM: std::ops::Range<usize> = 1028..1032;

/// An image, whose checksum is put right first: else no mutation would get anywhere.
pub(crate) fn erofs(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal(&mut bytes);
    let limits = Limits { entries: 100_000, file_bytes: 1 << 44, ..Limits::default() };
    let checked = check(&bytes, &limits);
    let Ok(image) = Image::open(&bytes) else {
        assert!(checked.is_err(), "the reader refuses what the check accepts");
        return;
    };
    let walked = walk(&image, checked.is_ok());
    if let Ok(checked) = checked {
        assert_eq!(walked.ok(), Some(counts(&checked)), "the reader finds something else than the check");
    }
}

fn seal(bytes: &mut [u8]) {
    if let Some(place) = bytes.get_mut(CHECKSUM) {
        place.fill(0);
    }
    let sum = bytes.get(SUMMED).unwrap_or_default().iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 })
    });
    if let Some(place) = bytes.get_mut(CHECKSUM) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
}

/// Inodes, names, directories, files, symbolic links, and bytes of files.
type Counts = [u64; 6];

fn counts(summary: &Summary) -> Counts {
    [summary.inodes, summary.names, summary.directories, summary.files, summary.symlinks, summary.file_bytes]
}

/// Reads everything, each inode once: there may be cycles in what the check refuses, and names that nobody can ask for.
fn walk(image: &Image<&Vec<u8>>, accepted: bool) -> Result<Counts, ReadError> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![image.root()];
    let [mut inodes, mut names, mut directories, mut files, mut symlinks, mut bytes] = Counts::default();
    while let Some(nid) = todo.pop() {
        // More than any image of this size has.
        if !seen.insert(nid) || inodes > image.size() / 64 {
            continue;
        }
        let inode = image.inode(nid)?;
        inodes += 1;
        let mut some = Vec::new();
        image.xattrs(&inode, |xattr| {
            some = xattr.full_name();
            true
        })?;
        let found = image.xattr(&inode, &some)?;
        assert!(!accepted || some.is_empty() || found.is_some(), "an attribute that is listed is not found");
        match inode.file_type {
            FileType::Directory => {
                directories += 1;
                let (mut entries, mut next) = (Vec::new(), 0);
                image.read_dir(&inode, next, |entry| {
                    entries.push((entry.nid, entry.name.to_vec()));
                    next = entry.next;
                    entries.len() as u64 <= image.size()
                })?;
                image.read_dir(&inode, next, |_| true)?;
                for (nid, name) in entries.iter().filter(|(_, name)| name != b"." && name != b"..") {
                    let found = image.lookup(&inode, name)?;
                    assert!(
                        !accepted || found.is_some_and(|(found, _)| found == *nid),
                        "a name that is listed is not found"
                    );
                    names += 1;
                    todo.push(*nid);
                }
            }
            FileType::Regular => {
                files += 1;
                bytes += inode.size;
                let end = inode.extent.map_or(0, |extent| u64::from(extent.block) + u64::from(extent.blocks));
                assert!(end <= image.device_blocks().into(), "a file leads out of the data device");
            }
            FileType::Symlink => {
                symlinks += 1;
                image.read_link(&inode)?;
            }
            _ => {}
        }
    }
    Ok([inodes, names, directories, files, symlinks, bytes])
}

/// Small images with some of everything.
pub(crate) fn erofs_images() -> Vec<Vec<u8>> {
    [0, 1, 12, 60].into_iter().filter_map(sample).collect()
}

fn sample(count: u32) -> Option<Vec<u8>> {
    let mut tree = Tree::new();
    let attributes = Attributes { mode: 0o644, uid: 1, gid: 2, mtime: Timestamp { seconds: 3, nanoseconds: 4 } };
    for number in 0..count {
        let node = match number % 12 {
            0 => Node::Symlink(b"../target"),
            1 => Node::CharDevice(Device { major: 1, minor: number }),
            2 => Node::Fifo,
            3 => Node::Symlink(&[b'l'; 4040]),
            4 => Node::File { size: 0, block: 0 },
            5 => Node::Socket,
            6 => Node::File { size: (8 << 40) + 1, block: number },
            _ => Node::File { size: 5000, block: number },
        };
        let xattrs: &[(&[u8], &[u8])] = match number % 5 {
            0 => &[(b"user.a", b"1"), (b"trusted.b", b"2")],
            1 => &[(b"user.a", b"1"), (b"security.capability", b"345")],
            _ => &[],
        };
        let (directory, name) = (format!("d{}", number % 3), format!("{number:0150}"));
        tree.put(&[directory.as_bytes(), name.as_bytes()], node, &attributes, xattrs).ok()?;
        tree.link(&[b"links", name.as_bytes()], &[directory.as_bytes(), name.as_bytes()]).ok()?;
    }
    let options = WriteOptions { uuid: [1; 16], device_tag: "data", device_blocks: (2 << 30) + 100 };
    let mut bytes = Vec::new();
    write(&tree, &options, &mut bytes).ok()?;
    Some(bytes)
}

/// A metadata blob in the clear, of the right digest: what a builder that means harm can have signed.
pub(crate) fn metadata(bytes: &[u8]) {
    let Ok(mut nowhere) = tempfile::tempfile() else { return };
    let mut blob = bytes;
    if let Ok(read) = Metadata::read(&mut blob, &Digest::sha256(bytes), None, &mut nowhere) {
        assert_eq!(nowhere.metadata().map(|file| file.len()).ok(), Some(read.summary.erofs_bytes.get()));
        assert_eq!(read.blobs.len(), read.summary.blobs.get() as usize);
        assert_eq!(read.trace.len(), read.summary.trace.get() as usize);
        assert!(
            read.trace.iter().all(|place| *place < read.summary.device_bytes.get()),
            "a trace leads out of the device"
        );
    }
}

/// Metadata blobs: whole ones, of few and many sections.
pub(crate) fn metadata_blobs() -> Vec<Vec<u8>> {
    [0u32, 3, 400].into_iter().filter_map(blob).collect()
}

fn blob(chunks: u32) -> Option<Vec<u8>> {
    use std::io::Write as _;
    let leaves = u64::from(chunks).div_ceil(format::LEAF_ENTRIES as u64);
    let mut summary = format::Summary::new_zeroed();
    summary.device_bytes = (u64::from(chunks) * 4096).into();
    summary.erofs_bytes = 8192.into();
    summary.chunks = u64::from(chunks).into();
    summary.leaves = u32::try_from(leaves).ok()?.into();
    summary.config_bytes = 2.into();
    let trace = u32::from(chunks > 0);
    summary.trace = trace.into();
    let mut frames = FrameWriter::new(Vec::new(), None, 3).ok()?;
    frames.write_all(summary.as_bytes()).ok()?;
    for leaf in 0..leaves {
        let entry = LeafEntry { offset: (leaf * 170 * 4096).into(), digest: [7; 32] };
        frames.write_all(entry.as_bytes()).ok()?;
    }
    frames.write_all(b"{}").ok()?;
    frames.write_all(&[0; 8][..8 * trace as usize]).ok()?;
    frames.write_all(&[0x42; 8192]).ok()?;
    let bytes = frames.finish().ok()?;
    debug_assert!(bytes.starts_with(Header::new(Cipher::None).as_bytes()));
    Some(bytes)
}

/// A leaf of the chunk table, of the right digest. What is accepted covers its range.
pub(crate) fn leaf(bytes: &[u8]) {
    let chunks = bytes.len() / size_of::<ChunkEntry>();
    let Some(bytes) = bytes.get(..chunks * size_of::<ChunkEntry>()).filter(|_| chunks <= format::LEAF_ENTRIES) else {
        return;
    };
    let mut summary = format::Summary::new_zeroed();
    summary.device_bytes = (1 << 20).into();
    summary.chunks = (chunks as u64).into();
    summary.leaves = 1.into();
    summary.blobs = 2.into();
    let digest = Digest::sha256(bytes);
    let Ok(digest) = digest.as_bytes().try_into() else { return };
    let Ok(leaves) = Leaves::new(summary, vec![LeafEntry { offset: 0.into(), digest }], None) else { return };
    if let Ok(entries) = leaves.open(0, bytes.to_vec()) {
        let mut next = 0;
        for entry in &*entries {
            assert_eq!(entry.offset.get(), next, "a leaf that was accepted has a gap");
            next = entry.end();
        }
        assert_eq!(next, 1 << 20, "a leaf that was accepted ends elsewhere");
    }
}

/// Leaves of one to many entries that cover a device of 1 MiB.
pub(crate) fn leaves() -> Vec<Vec<u8>> {
    let entry = |count: u64, at: u64| {
        let length = (1 << 20) / count;
        let mut entry = ChunkEntry::new_zeroed();
        entry.offset = (at * length).into();
        entry.length = length.into();
        entry.method = u8::from(at % 2 == 1);
        if at % 3 == 2 {
            entry.method = 2;
        } else {
            entry.stored = u32::try_from(length - at % 2).unwrap_or_default().into();
            entry.digest = [9; 32];
        }
        entry
    };
    let leaf = |count: u64| (0..count).flat_map(|at| entry(count, at).as_bytes().to_vec()).collect();
    [1, 2, 16, 128].into_iter().map(leaf).collect()
}

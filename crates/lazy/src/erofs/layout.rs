//! The structures of EROFS, as far as the profile has them, and its checksum. All numbers are little-endian.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Bytes of a block, of the image and of the data device.
pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCK_BITS: u32 = 12;
/// An inode begins at a multiple of this; its number is the multiple.
pub(crate) const SLOT: u64 = 32;
pub(crate) const SUPER_AT: usize = 1024;
/// Where the device slot is: the ninth piece of 128 bytes.
pub(crate) const DEVICE_AT: usize = 1152;
/// Where inodes begin.
pub(crate) const FIRST_RECORD: u64 = 1280;
/// Bytes that are left for it in its block. It has one place, so it cannot begin with the next.
pub(crate) const ROOT_ROOM: usize = BLOCK - 1280;
/// The root's number.
pub(crate) const ROOT: u64 = FIRST_RECORD / SLOT;
/// The most bytes of an image: numbers of inodes have 32 bits.
pub(crate) const MOST_IMAGE: u64 = SLOT << 32;
/// The most bytes of the area of shared attributes: a reader may keep it in memory.
pub(crate) const MOST_SHARED: u64 = 16 << 20;
/// The longest name.
pub(crate) const MOST_NAME: usize = 255;
/// The longest target of a symbolic link.
pub(crate) const MOST_TARGET: usize = 4095;

pub(crate) const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock has a checksum, and inodes have times.
pub(crate) const COMPAT: u32 = 0x3;
/// Chunked files, and a device table.
pub(crate) const INCOMPAT: u32 = 0xC;

/// Layouts of an inode's data, with the bit that says that it has 64 bytes.
pub(crate) const PLAIN: u16 = 1;
pub(crate) const INLINE: u16 = 1 | 2 << 1;
pub(crate) const CHUNKED: u16 = 1 | 4 << 1;

/// The number of a chunk's size has these bits: a chunk is a block times two to this.
pub(crate) const CHUNK_BITS: u16 = 0x1F;
/// What a file points with are indexes, not bare addresses.
pub(crate) const CHUNK_INDEXES: u16 = 0x20;
/// The only device: slot 1.
pub(crate) const DEVICE_ID: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawSuper {
    pub(crate) magic: U32,
    pub(crate) checksum: U32,
    pub(crate) compat: U32,
    pub(crate) block_bits: u8,
    pub(crate) extension_slots: u8,
    pub(crate) root: U16,
    pub(crate) inodes: U64,
    pub(crate) epoch: U64,
    pub(crate) epoch_nanoseconds: U32,
    pub(crate) blocks: U32,
    pub(crate) meta_block: U32,
    pub(crate) xattr_block: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) volume_name: [u8; 16],
    pub(crate) incompat: U32,
    pub(crate) compression: U16,
    pub(crate) devices: U16,
    pub(crate) device_slot: U16,
    pub(crate) directory_bits: u8,
    pub(crate) prefixes: u8,
    pub(crate) prefixes_at: U32,
    pub(crate) packed: U64,
    pub(crate) reserved: [u8; 24],
}
const _: () = assert!(size_of::<RawSuper>() == 128);

impl RawSuper {
    /// What does not differ between images.
    pub(crate) fn fixed() -> Self {
        Self {
            magic: MAGIC.into(),
            checksum: 0.into(),
            compat: COMPAT.into(),
            block_bits: 12,
            extension_slots: 0,
            root: U16::new(40),
            inodes: 0.into(),
            epoch: 0.into(),
            epoch_nanoseconds: 0.into(),
            blocks: 0.into(),
            meta_block: 0.into(),
            xattr_block: 0.into(),
            uuid: [0; 16],
            volume_name: [0; 16],
            incompat: INCOMPAT.into(),
            compression: 0.into(),
            devices: 1.into(),
            device_slot: U16::new(9),
            directory_bits: 0,
            prefixes: 0,
            prefixes_at: 0.into(),
            packed: 0.into(),
            reserved: [0; 24],
        }
    }
}
const _: () = assert!(ROOT == 40 && DEVICE_AT == 9 * 128);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawDevice {
    pub(crate) tag: [u8; 64],
    pub(crate) blocks: U32,
    pub(crate) mapped: U32,
    pub(crate) reserved: [u8; 56],
}
const _: () = assert!(size_of::<RawDevice>() == 128);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawInode {
    pub(crate) format: U16,
    /// 0, or a header of 12 bytes and so many times 4 bytes less one.
    pub(crate) xattr_count: U16,
    pub(crate) mode: U16,
    pub(crate) reserved: U16,
    pub(crate) size: U64,
    /// A block of the image, a device's number, or how chunks are indexed.
    pub(crate) place: U32,
    /// How manieth inode this is, from 1.
    pub(crate) number: U32,
    pub(crate) uid: U32,
    pub(crate) gid: U32,
    pub(crate) mtime: U64,
    pub(crate) mtime_nanoseconds: U32,
    pub(crate) links: U32,
    pub(crate) reserved2: [u8; 16],
}
pub(crate) const INODE: usize = 64;
const _: () = assert!(size_of::<RawInode>() == INODE);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawXattrHeader {
    pub(crate) filter: U32,
    pub(crate) shared: u8,
    pub(crate) reserved: [u8; 7],
}
pub(crate) const XATTR_HEADER: usize = 12;
const _: () = assert!(size_of::<RawXattrHeader>() == XATTR_HEADER);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawXattr {
    pub(crate) name: u8,
    pub(crate) prefix: u8,
    pub(crate) value: U16,
}
pub(crate) const XATTR: usize = 4;
const _: () = assert!(size_of::<RawXattr>() == XATTR);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawChunk {
    pub(crate) advise: U16,
    pub(crate) device: U16,
    pub(crate) block: U32,
}
pub(crate) const CHUNK: usize = 8;
const _: () = assert!(size_of::<RawChunk>() == CHUNK);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawDirent {
    pub(crate) nid: U64,
    pub(crate) name_at: U16,
    pub(crate) kind: u8,
    pub(crate) reserved: u8,
}
pub(crate) const DIRENT: usize = 12;
const _: () = assert!(size_of::<RawDirent>() == DIRENT);

/// What an inode is, with the numbers that directories use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FileType {
    /// A regular file.
    Regular = 1,
    /// A directory.
    Directory = 2,
    /// A character device.
    CharDevice = 3,
    /// A block device.
    BlockDevice = 4,
    /// A named pipe.
    Fifo = 5,
    /// A socket.
    Socket = 6,
    /// A symbolic link.
    Symlink = 7,
}

impl FileType {
    /// From the number in a directory.
    pub(crate) fn from_dirent(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => return None,
        })
    }

    /// From `st_mode`.
    pub(crate) fn from_mode(mode: u16) -> Option<Self> {
        Some(match mode & 0o17_0000 {
            0o10_0000 => Self::Regular,
            0o04_0000 => Self::Directory,
            0o02_0000 => Self::CharDevice,
            0o06_0000 => Self::BlockDevice,
            0o01_0000 => Self::Fifo,
            0o14_0000 => Self::Socket,
            0o12_0000 => Self::Symlink,
            _ => return None,
        })
    }

    /// For messages.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Regular => "a file",
            Self::Directory => "a directory",
            Self::CharDevice => "a character device",
            Self::BlockDevice => "a block device",
            Self::Fifo => "a named pipe",
            Self::Socket => "a socket",
            Self::Symlink => "a symbolic link",
        }
    }

    /// Its bits of `st_mode`.
    pub fn mode(self) -> u16 {
        match self {
            Self::Regular => 0o10_0000,
            Self::Directory => 0o04_0000,
            Self::CharDevice => 0o02_0000,
            Self::BlockDevice => 0o06_0000,
            Self::Fifo => 0o01_0000,
            Self::Socket => 0o14_0000,
            Self::Symlink => 0o12_0000,
        }
    }
}

/// A device's numbers: 12 bits and 20 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl Device {
    /// As the kernel's `new_encode_dev` has it; `None` where a number is too large.
    pub(crate) fn encode(self) -> Option<u32> {
        let fits = self.major < 1 << 12 && self.minor < 1 << 20;
        fits.then_some((self.minor & 0xFF) | self.major << 8 | (self.minor & 0xF_FF00) << 12)
    }

    pub(crate) fn decode(number: u32) -> Self {
        Self { major: number >> 8 & 0xFFF, minor: number & 0xFF | number >> 12 & 0xF_FF00 }
    }
}

/// A time since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds, negative before.
    pub seconds: i64,
    /// And so many nanoseconds after, less than a second.
    pub nanoseconds: u32,
}

/// What attribute names begin with, by their numbers. The two ACLs are whole names.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// What overlayfs takes for its own, and so never comes from an image.
const OVERLAY: &[u8] = b"overlay.";

/// Whether only a whole name has this number.
fn is_whole(prefix: u8) -> bool {
    matches!(prefix, 2 | 3)
}

/// The text of a prefix.
pub(crate) fn prefix_text(prefix: u8) -> Option<&'static [u8]> {
    PREFIXES.iter().find(|(number, _)| *number == prefix).map(|(_, text)| *text)
}

/// Whether a name may be one of these two parts.
pub(crate) fn is_xattr_name(prefix: u8, rest: &[u8]) -> bool {
    prefix_text(prefix).is_some()
        && rest.len() <= 255
        && rest.is_empty() == is_whole(prefix)
        && !rest.contains(&0)
        && !(matches!(prefix, 1 | 4) && rest.starts_with(OVERLAY))
}

/// Splits a name into the number of its prefix and the rest; `None` where it has none that EROFS knows.
pub(crate) fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(number, text)| {
        let rest = name.strip_prefix(*text)?;
        (rest.is_empty() == is_whole(*number)).then_some((*number, rest))
    })
}

/// Whether this can name a device: the kernel opens a path of this name where it is given no device.
pub(crate) fn is_tag(tag: &[u8]) -> bool {
    (1..=64).contains(&tag.len()) && tag.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'/')
}

/// Bytes of an attribute's entry.
pub(crate) fn xattr_entry_size(name: usize, value: usize) -> usize {
    (XATTR + name + value).next_multiple_of(4)
}

/// Whether a name may be in a directory, the two dots aside.
pub(crate) fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MOST_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| matches!(b, 0 | b'/'))
}

/// The exponent of the smallest chunk that holds a file of this size, if there is one; else of the largest.
pub(crate) fn chunk_bits(size: u64) -> u16 {
    let blocks = size.div_ceil(BLOCK as u64).max(1);
    let bits = u64::BITS - (blocks - 1).leading_zeros();
    u16::try_from(bits).unwrap_or(CHUNK_BITS).min(CHUNK_BITS)
}

/// How many chunks a file of this size has.
pub(crate) fn chunks(size: u64) -> u64 {
    size.div_ceil(1 << (BLOCK_BITS + u32::from(chunk_bits(size))))
}

/// How many bytes of a directory or link are inline, and how many blocks it has besides. What is inline is in one block with its inode, that
/// of the root in the first one, whose beginning has other uses.
pub(crate) fn split_flat(size: u32, xattrs: usize, is_root: bool) -> (usize, u32) {
    let block = 1 << BLOCK_BITS;
    let tail = size as usize % BLOCK;
    if INODE + xattrs + tail > if is_root { ROOT_ROOM } else { BLOCK } {
        return (0, size.div_ceil(block));
    }
    (tail, size / block)
}

const fn crc_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0u32;
    while byte < 256 {
        let mut sum = byte;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 { sum >> 1 ^ 0x82F6_3B78 } else { sum >> 1 };
            bit += 1;
        }
        table[byte as usize] = sum;
        byte += 1;
    }
    table
}

static CRC: [u32; 256] = crc_table();

/// CRC32C without the last inversion, as EROFS uses it.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        let [low, ..] = sum.to_le_bytes();
        sum >> 8 ^ CRC.get(usize::from(low ^ byte)).copied().unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_is_the_castagnoli_one() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn devices_are_encoded_as_the_kernel_does() {
        let device = Device { major: 0xABC, minor: 0x1_2345 };
        assert_eq!(device.encode(), Some(0x123A_BC45));
        assert_eq!(Device::decode(0x123A_BC45), device);
        assert_eq!(Device { major: 1 << 12, minor: 0 }.encode(), None);
        assert_eq!(Device { major: 0, minor: 1 << 20 }.encode(), None);
        let last = Device { major: 0xFFF, minor: 0xF_FFFF };
        assert_eq!(last.encode().map(Device::decode), Some(last));
    }

    #[test]
    fn chunks_cover_files() {
        assert_eq!((chunk_bits(1), chunks(1)), (0, 1));
        assert_eq!((chunk_bits(4096), chunks(4096)), (0, 1));
        assert_eq!((chunk_bits(4097), chunks(4097)), (1, 1));
        assert_eq!((chunk_bits(1 << 43), chunks(1 << 43)), (31, 1));
        assert_eq!((chunk_bits((1 << 43) + 1), chunks((1 << 43) + 1)), (31, 2));
        assert_eq!((chunk_bits((1 << 44) - 1), chunks((1 << 44) - 1)), (31, 2));
        assert_eq!(chunk_bits(u64::MAX), 31);
    }

    #[test]
    fn names_of_attributes_have_known_prefixes() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr_name(b"security.capability"), Some((6, &b"capability"[..])));
        for bad in [&b"user."[..], b"system.posix_acl_access.x", b"system.x", b"user", b""] {
            assert_eq!(split_xattr_name(bad), None);
        }
        assert!(
            !is_xattr_name(4, b"overlay.opaque") && !is_xattr_name(1, b"overlay.x") && is_xattr_name(6, b"overlay.x")
        );
        assert!(!is_xattr_name(5, b"x") && !is_xattr_name(2, b"x") && !is_xattr_name(1, b"a\0b"));
    }
}

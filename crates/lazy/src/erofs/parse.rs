//! The two structures that the reader and the checker understand alike: the superblock, and an inode by itself.

use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    layout::{
        BLOCK, BLOCK_BITS, CHUNK_BITS, CHUNK_INDEXES, CHUNKED, DEVICE_AT, Device, FileType, INLINE, PLAIN, RawDevice,
        RawInode, RawSuper, SUPER_AT, Timestamp, chunk_bits, crc32c, is_tag,
    },
    read::{Inode, ReadError},
};

/// Compares the first block with the profile. The checksum in it is removed on the way.
pub(crate) fn parse_super(block: &mut [u8; BLOCK], size: u64) -> Result<(RawSuper, RawDevice), ReadError> {
    let superblock = block.get(SUPER_AT..).and_then(|bytes| Some(RawSuper::read_from_prefix(bytes).ok()?.0));
    let device = block.get(DEVICE_AT..).and_then(|bytes| Some(RawDevice::read_from_prefix(bytes).ok()?.0));
    let (Some(superblock), Some(device)) = (superblock, device) else { return Err(ReadError::Super("is cut off")) };
    let fixed = RawSuper::fixed();
    if superblock.magic != fixed.magic {
        return Err(ReadError::Super("has no magic number"));
    }
    if let Some(place) = block.get_mut(SUPER_AT + 4..SUPER_AT + 8) {
        place.fill(0);
    }
    if crc32c(block.get(SUPER_AT..).unwrap_or_default()) != superblock.checksum.get() {
        return Err(ReadError::Super("does not fit its checksum"));
    }
    let expected = RawSuper {
        checksum: superblock.checksum,
        inodes: superblock.inodes,
        blocks: superblock.blocks,
        xattr_block: superblock.xattr_block,
        uuid: superblock.uuid,
        ..fixed
    };
    if superblock != expected {
        return Err(ReadError::Super("has features or values that are not of this profile"));
    }
    if u64::from(superblock.blocks.get()) << BLOCK_BITS != size {
        return Err(ReadError::Super("counts other blocks than the image has"));
    }
    if superblock.xattr_block.get() > 0 && superblock.xattr_block >= superblock.blocks {
        return Err(ReadError::Super("has shared attributes outside of the image"));
    }
    let length = device.tag.iter().take_while(|byte| **byte != 0).count();
    let (tag, zeros) = device.tag.split_at_checked(length).unwrap_or_default();
    if !is_tag(tag) || zeros.iter().any(|byte| *byte != 0) {
        return Err(ReadError::Super("has a device whose name is not 1 to 64 printable characters without '/'"));
    }
    if device.mapped.get() != 0 || device.reserved.as_bytes().iter().any(|byte| *byte != 0) {
        return Err(ReadError::Super("has a device with values that are not of this profile"));
    }
    Ok((superblock, device))
}

/// What can be said of an inode by itself.
pub(crate) fn parse_inode(nid: u64, raw: &RawInode) -> Result<Inode, ReadError> {
    let bad = |what| ReadError::Inode { nid, what };
    let file_type = FileType::from_mode(raw.mode.get()).ok_or_else(|| bad("has an unknown type"))?;
    let place = raw.place.get();
    let (format, size) = (raw.format.get(), raw.size.get());
    let empty = match file_type {
        FileType::Regular if size > 0 => {
            let expected = CHUNK_INDEXES | chunk_bits(size) & CHUNK_BITS;
            if format != CHUNKED || place != u32::from(expected) {
                return Err(bad("is a file that is not one chunk of the data device"));
            }
            false
        }
        FileType::Directory | FileType::Symlink if !matches!(format, PLAIN | INLINE) => {
            return Err(bad("is a directory or link with an unknown layout"));
        }
        FileType::Directory | FileType::Symlink if u32::try_from(size).is_err() => {
            return Err(bad("is a directory or link of more than 4 GiB"));
        }
        FileType::Directory | FileType::Symlink => false,
        _ => true,
    };
    if empty && (format != PLAIN || size != 0) {
        return Err(bad("is neither file, directory nor link, or an empty file, but has bytes"));
    }
    let is_device = matches!(file_type, FileType::CharDevice | FileType::BlockDevice);
    if empty && !is_device && place != 0 {
        return Err(bad("has a place, but no bytes"));
    }
    let xattrs = match u32::from(raw.xattr_count.get()) {
        0 => 0,
        // The header of 12 bytes counts as one.
        count => 8 + 4 * count,
    };
    Ok(Inode {
        nid,
        number: raw.number.get(),
        file_type,
        mode: raw.mode.get() & 0o7777,
        uid: raw.uid.get(),
        gid: raw.gid.get(),
        mtime: Timestamp { seconds: raw.mtime.get().cast_signed(), nanoseconds: raw.mtime_nanoseconds.get() },
        links: raw.links.get(),
        size,
        extent: None,
        device: if is_device { Device::decode(place) } else { Device { major: 0, minor: 0 } },
        inline: format == INLINE,
        block: if empty { 0 } else { place },
        xattrs,
    })
}

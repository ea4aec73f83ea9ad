//! Extended attributes: the area of shared ones, and those of an inode.

use zerocopy::FromBytes as _;

use super::{CheckError, ReadError};
use crate::erofs::{
    layout::{BLOCK, BLOCK_BITS, MOST_SHARED, RawXattr, RawXattrHeader, XATTR, is_xattr_name, xattr_entry_size},
    source::ReadAt,
};

/// Prefix, rest of the name, and value: in this order they sort.
type Parts<'a> = (u8, &'a [u8], &'a [u8]);

const DAMAGED: &str = "has an extended attribute that is cut off, or whose filling is not zero";
const NAME: &str = "has an extended attribute with a name that no image may have";
const ORDER: &str = "has extended attributes that are out of order, or one of them twice";

/// The area of shared attributes.
#[derive(Default)]
pub(super) struct Shared {
    bytes: Vec<u8>,
    /// A bit for each four bytes: whether an entry begins there.
    starts: Vec<u64>,
}

impl Shared {
    /// Reads and checks the area, from its first block to the end of the image; there is none at block 0.
    pub(super) fn read<R: ReadAt + ?Sized>(source: &R, size: u64, block: u32) -> Result<Self, CheckError> {
        if block == 0 {
            return Ok(Self::default());
        }
        let offset = u64::from(block) << BLOCK_BITS;
        let bad = |at: usize, what| CheckError::Bytes { offset: offset + at as u64, what };
        let length = size.checked_sub(offset).filter(|length| (1..=MOST_SHARED).contains(length));
        let length = length.and_then(|length| usize::try_from(length).ok());
        let length = length.ok_or_else(|| bad(0, "the area of shared attributes is empty, or larger than 16 MiB"))?;
        let mut bytes = vec![0; length];
        let read = source.read_at(offset, &mut bytes);
        read.map_err(|source| ReadError::Io { offset, count: length, source })?;
        let mut starts = vec![0u64; length.div_ceil(4 * 64)];
        let (mut at, mut last): (usize, Option<Parts<'_>>) = (0, None);
        while let Some(rest) = bytes.get(at..).filter(|rest| rest.iter().take(XATTR).any(|byte| *byte != 0)) {
            let (parts, entry) =
                parse(rest).map_err(|_| bad(at, "a shared attribute is cut off, or has no good name"))?;
            if last.is_some_and(|last| last >= parts) {
                return Err(bad(at, "shared attributes are out of order, or one of them is there twice"));
            }
            if let Some(word) = starts.get_mut(at / 4 / 64) {
                *word |= 1 << (at / 4 % 64);
            }
            last = Some(parts);
            at += entry;
        }
        let filling = bytes.get(at..).unwrap_or_default();
        if at == 0 || filling.len() >= BLOCK || filling.iter().any(|byte| *byte != 0) {
            return Err(bad(at, "the area of shared attributes goes on after its last attribute"));
        }
        Ok(Self { bytes, starts })
    }

    /// Checks what follows an inode: the header, the shared attributes' numbers, and entries.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<(), &'static str> {
        let (header, rest) = RawXattrHeader::ref_from_prefix(bytes).map_err(|_| DAMAGED)?;
        if header.filter.get() != 0 || header.reserved != [0; 7] {
            return Err("has attributes with a filter or unknown bits");
        }
        let (ids, mut entries) = rest.split_at_checked(usize::from(header.shared) * 4).ok_or(DAMAGED)?;
        if rest.is_empty() {
            return Err("has room for attributes, but none");
        }
        let (ids, _) = ids.as_chunks::<4>();
        let mut last: Option<(u8, &[u8])> = None;
        for id in ids {
            let (prefix, name, _) =
                self.get(u32::from_le_bytes(*id)).ok_or("has a shared attribute that is not there")?;
            if last.is_some_and(|last| last >= (prefix, name)) {
                return Err(ORDER);
            }
            last = Some((prefix, name));
        }
        // Those that are shared and those that are not are in order by themselves; together they are a merge.
        let mut shared = ids.iter().filter_map(|id| self.get(u32::from_le_bytes(*id))).peekable();
        let mut last: Option<(u8, &[u8])> = None;
        while !entries.is_empty() {
            let ((prefix, name, _), size) = parse(entries)?;
            if last.is_some_and(|last| last >= (prefix, name)) {
                return Err(ORDER);
            }
            while shared.next_if(|(other, rest, _)| (*other, *rest) < (prefix, name)).is_some() {}
            if shared.peek().is_some_and(|(other, rest, _)| (*other, *rest) == (prefix, name)) {
                return Err(ORDER);
            }
            last = Some((prefix, name));
            entries = entries.get(size..).ok_or(DAMAGED)?;
        }
        Ok(())
    }

    fn get(&self, id: u32) -> Option<Parts<'_>> {
        let id = usize::try_from(id).ok()?;
        let begins = self.starts.get(id / 64)? >> (id % 64) & 1 == 1;
        let (parts, _) = begins.then(|| self.bytes.get(id * 4..)).flatten().and_then(|bytes| parse(bytes).ok())?;
        Some(parts)
    }
}

/// The first entry of some, and its size.
fn parse(bytes: &[u8]) -> Result<(Parts<'_>, usize), &'static str> {
    let (raw, _) = RawXattr::ref_from_prefix(bytes).map_err(|_| DAMAGED)?;
    let (name_size, value_size) = (usize::from(raw.name), usize::from(raw.value.get()));
    let size = xattr_entry_size(name_size, value_size);
    let entry = bytes.get(XATTR..size).ok_or(DAMAGED)?;
    let (name, rest) = entry.split_at_checked(name_size).ok_or(DAMAGED)?;
    let (value, filling) = rest.split_at_checked(value_size).ok_or(DAMAGED)?;
    if filling.iter().any(|byte| *byte != 0) {
        return Err(DAMAGED);
    }
    if !is_xattr_name(raw.prefix, name) {
        return Err(NAME);
    }
    Ok(((raw.prefix, name, value), size))
}

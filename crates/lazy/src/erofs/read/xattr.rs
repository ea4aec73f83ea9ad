//! Extended attributes of an inode: those in its record, and the shared ones that it names.

use zerocopy::FromBytes as _;

use super::{Image, Inode, ReadAt, ReadError};
use crate::erofs::layout::{
    BLOCK_BITS, INODE, RawXattr, RawXattrHeader, XATTR, prefix_text, split_xattr_name, xattr_entry_size,
};

/// An extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// What its name begins with, for example `user.`.
    pub prefix: &'static [u8],
    /// The rest of its name.
    pub name: &'a [u8],
    /// Its value.
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// The whole name.
    pub fn full_name(&self) -> Vec<u8> {
        [self.prefix, self.name].concat()
    }
}

impl<R: ReadAt> Image<R> {
    /// Goes through an inode's extended attributes until `each` says `false`.
    ///
    /// # Errors
    /// They are damaged.
    pub fn xattrs(&self, inode: &Inode, mut each: impl FnMut(Xattr<'_>) -> bool) -> Result<(), ReadError> {
        let bad = |what| ReadError::Inode { nid: inode.nid, what };
        if inode.xattrs == 0 {
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(inode.xattrs).map_err(|_| bad("has too many attributes"))?];
        self.read(inode.at() + INODE as u64, &mut bytes)?;
        let (header, rest) =
            RawXattrHeader::ref_from_prefix(&bytes).map_err(|_| bad("has attributes that are cut off"))?;
        let ids = rest.split_at_checked(usize::from(header.shared) * 4);
        let (ids, mut entries) = ids.ok_or_else(|| bad("has attributes that are cut off"))?;
        let mut shared = Vec::new();
        for id in ids.as_chunks::<4>().0 {
            self.shared(u32::from_le_bytes(*id), &mut shared)?;
            let (xattr, _) = parse(&shared).ok_or_else(|| bad("has a shared attribute that is damaged"))?;
            if !each(xattr) {
                return Ok(());
            }
        }
        while !entries.is_empty() {
            let (xattr, size) = parse(entries).ok_or_else(|| bad("has an attribute that is damaged"))?;
            if !each(xattr) {
                return Ok(());
            }
            entries = entries.get(size..).unwrap_or_default();
        }
        Ok(())
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// The inode's attributes are damaged.
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        let Some((prefix, rest)) = split_xattr_name(name) else { return Ok(None) };
        let prefix = prefix_text(prefix).unwrap_or_default();
        let mut found = None;
        self.xattrs(inode, |xattr| {
            let this = xattr.prefix == prefix && xattr.name == rest;
            if this {
                found = Some(xattr.value.to_vec());
            }
            !this
        })?;
        Ok(found)
    }

    /// Reads a shared entry.
    fn shared(&self, id: u32, bytes: &mut Vec<u8>) -> Result<(), ReadError> {
        if self.xattr_block == 0 {
            return Err(ReadError::Super("has no shared attributes, but an inode names one"));
        }
        let at = (u64::from(self.xattr_block) << BLOCK_BITS) + u64::from(id) * 4;
        let mut head = [0; XATTR];
        self.read(at, &mut head)?;
        let size = RawXattr::ref_from_bytes(&head).map_or(0, entry_size);
        bytes.clear();
        bytes.resize(size, 0);
        self.read(at, bytes)
    }
}

pub(crate) fn entry_size(raw: &RawXattr) -> usize {
    xattr_entry_size(usize::from(raw.name), usize::from(raw.value.get()))
}

/// The first entry of some, and how many bytes it has.
fn parse(bytes: &[u8]) -> Option<(Xattr<'_>, usize)> {
    let (raw, rest) = RawXattr::ref_from_prefix(bytes).ok()?;
    let (name, rest) = rest.split_at_checked(usize::from(raw.name))?;
    let value = rest.get(..usize::from(raw.value.get()))?;
    Some((Xattr { prefix: prefix_text(raw.prefix)?, name, value }, entry_size(raw)))
}

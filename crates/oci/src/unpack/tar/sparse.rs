//! Sparse files: the old GNU format keeps the map of pieces in header blocks, GNU PAX 0.0 and 0.1 in PAX records, 1.0 in text in front
//! of the data (GNU tar manual, "Storing Sparse Files").

use super::{TarError, pax::unsigned};
use crate::unpack::limits::{Limits, check};

/// The `GNU.sparse.*` records of an entry.
#[derive(Default)]
pub(crate) struct PaxSparse {
    pub(crate) major: Option<u64>,
    pub(crate) minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) real_size: Option<u64>,
    pub(crate) map: Vec<(u64, u64)>,
    has_map: bool,
    offset: Option<u64>,
}

/// Where a PAX entry's map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapPlace {
    /// The entry is not sparse.
    None,
    /// 0.0 and 0.1.
    Records,
    /// 1.0.
    Data,
}

impl PaxSparse {
    pub(crate) fn apply(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Result<(), TarError> {
        match key {
            b"major" => self.major = Some(unsigned(value)?),
            b"minor" => self.minor = Some(unsigned(value)?),
            b"name" => {
                check("name_bytes", value.len() as u64, limits.name_bytes)?;
                if value.contains(&0) {
                    return Err(TarError::Pax("name contains NUL"));
                }
                self.name = Some(value.to_vec());
            }
            b"size" | b"realsize" => self.real_size = Some(unsigned(value)?),
            b"offset" => {
                let earlier = self.offset.replace(unsigned(value)?);
                earlier.map_or(Ok(()), |_| Err(TarError::Sparse("two offsets without a length between them")))?;
            }
            b"numbytes" => {
                let offset = self.offset.take().ok_or(TarError::Sparse("length without an offset"))?;
                self.push(offset, unsigned(value)?, limits)?;
            }
            b"map" => {
                self.map.clear();
                self.has_map = true;
                let mut numbers = value.split(|&byte| byte == b',');
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().ok_or(TarError::Sparse("map has an odd count of numbers"))?;
                    self.push(unsigned(offset)?, unsigned(length)?, limits)?;
                }
            }
            b"numblocks" => self.has_map = true,
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, length: u64, limits: &Limits) -> Result<(), TarError> {
        check("sparse_segments", self.map.len() as u64 + 1, limits.sparse_segments)?;
        self.has_map = true;
        self.map.push((offset, length));
        Ok(())
    }

    pub(crate) fn place(&self) -> Result<MapPlace, TarError> {
        match (self.major, self.minor) {
            (None | Some(0), _) if self.has_map => Ok(MapPlace::Records),
            (None | Some(0), _) => Ok(MapPlace::None),
            (Some(1), None | Some(0)) => Ok(MapPlace::Data),
            _ => Err(TarError::Sparse("version is not known (0.0, 0.1 and 1.0 are)")),
        }
    }
}

/// The 1.0 map in front of the data: decimal numbers, a line each: count, then offset and length of each piece.
#[derive(Default)]
pub(crate) struct DataMap {
    number: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
    map: Vec<(u64, u64)>,
}

impl DataMap {
    /// Takes one block; gives the map once it is whole (the rest of the block is padding).
    pub(crate) fn block(&mut self, block: &[u8], limits: &Limits) -> Result<Option<Vec<(u64, u64)>>, TarError> {
        for &byte in block {
            if byte != b'\n' {
                self.number.push(byte);
                if self.number.len() > 20 {
                    return Err(TarError::Sparse("map has a number of more than 20 digits"));
                }
                continue;
            }
            let number = unsigned(&self.number)?;
            self.number.clear();
            match (self.count, self.offset.take()) {
                (None, _) => {
                    check("sparse_segments", number, limits.sparse_segments)?;
                    self.count = Some(number);
                }
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.map.push((offset, number)),
            }
            if self.count == Some(self.map.len() as u64) {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

/// Checks that the pieces come in order, do not overlap, lie within the file, and are as long as what is stored.
pub(crate) fn validate(map: &[(u64, u64)], real_size: u64, stored: u64) -> Result<(), TarError> {
    let (mut end, mut sum) = (0u64, 0u64);
    for &(offset, length) in map {
        let after = offset.checked_add(length).ok_or(TarError::Sparse("piece is out of range"))?;
        if offset < end || after > real_size {
            return Err(TarError::Sparse("pieces overlap, are out of order, or lie beyond the end of the file"));
        }
        end = after;
        sum += length;
    }
    if sum == stored { Ok(()) } else { Err(TarError::Sparse("pieces are not as long together as the data stored")) }
}

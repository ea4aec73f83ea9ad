//! CBOR (RFC 8949), as signed documents have it: definite lengths, the shortest heads, no key twice in a map. Whatever else it may be, is refused.
//!
//! Bounds: items, nesting, and no length beyond the input. Numbers with fractions are read over, not into.

use std::collections::BTreeSet;

/// Items of a document at most.
const MOST_ITEMS: usize = 64 * 1024;
/// Arrays, maps and tags within each other at most.
const DEEPEST: usize = 16;

/// An item.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item<'a> {
    Int(i64),
    Bytes(&'a [u8]),
    Text(&'a str),
    Array(Vec<Self>),
    Map(Vec<(Self, Self)>),
    Tag(u64, Box<Self>),
    Null,
    /// True, false, a number with a fraction, something simple.
    Other,
}

impl<'a> Item<'a> {
    /// Reads one item, which has to be all there is.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut reader = Reader { rest: bytes, left: MOST_ITEMS };
        let item = reader.item(0)?;
        match reader.rest {
            [] => Ok(item),
            rest => Err(format!("{} bytes too many at its end", rest.len())),
        }
    }

    pub(crate) fn bytes(&self) -> Option<&'a [u8]> {
        if let Self::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    pub(crate) fn text(&self) -> Option<&'a str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(crate) fn int(&self) -> Option<i64> {
        if let Self::Int(number) = self { Some(*number) } else { None }
    }

    pub(crate) fn array(&self) -> Option<&[Self]> {
        if let Self::Array(items) = self { Some(items) } else { None }
    }

    pub(crate) fn map(&self) -> Option<Map<'_, 'a>> {
        if let Self::Map(members) = self { Some(Map(members)) } else { None }
    }

    /// What is in a tag.
    pub(crate) fn tagged(&self, tag: u64) -> Option<&Self> {
        match self {
            Self::Tag(found, item) if *found == tag => Some(item),
            _ => None,
        }
    }
}

/// The members of a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map<'m, 'a>(&'m [(Item<'a>, Item<'a>)]);

impl<'m, 'a> Map<'m, 'a> {
    /// The member with a number as its key.
    pub(crate) fn get(self, key: i64) -> Option<&'m Item<'a>> {
        self.0.iter().find(|(found, _)| *found == Item::Int(key)).map(|(_, item)| item)
    }

    pub(crate) fn members(self) -> impl Iterator<Item = (&'m Item<'a>, &'m Item<'a>)> {
        self.0.iter().map(|(key, item)| (key, item))
    }

    /// The first key that is none of these numbers.
    pub(crate) fn other_than(self, known: &[i64]) -> Option<&'m Item<'a>> {
        self.0.iter().map(|(key, _)| key).find(|key| !key.int().is_some_and(|key| known.contains(&key)))
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let parts = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let (taken, rest) = parts.ok_or("it ends within an item")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Major type and argument.
    fn head(&mut self) -> Result<(u8, u8, u64), String> {
        let first = self.take(1)?.first().copied().unwrap_or_default();
        let (major, short) = (first >> 5, first & 31);
        let length = match short {
            0..24 => return Ok((major, short, short.into())),
            24 => 1,
            25 => 2,
            26 => 4,
            27 => 8,
            _ => return Err("a length that is not definite".into()),
        };
        let argument = self.take(length)?.iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
        let least = match length {
            1 => 24,
            2 => 1 << 8,
            4 => 1 << 16,
            _ => 1 << 32,
        };
        // Numbers with fractions, major type 7, have their own lengths.
        if argument < least && major != 7 {
            return Err("a number that is longer than it has to be".into());
        }
        Ok((major, short, argument))
    }

    fn item(&mut self, depth: usize) -> Result<Item<'a>, String> {
        if depth > DEEPEST {
            return Err(format!("more than {DEEPEST} levels"));
        }
        self.left = self.left.checked_sub(1).ok_or_else(|| format!("more than {MOST_ITEMS} items"))?;
        let (major, short, argument) = self.head()?;
        let number = || i64::try_from(argument).map_err(|_| "a number beyond 63 bits".to_owned());
        Ok(match major {
            0 => Item::Int(number()?),
            1 => Item::Int(-1 - number()?),
            2 => Item::Bytes(self.take(argument)?),
            3 => Item::Text(std::str::from_utf8(self.take(argument)?).map_err(|_| "a text that is not UTF-8")?),
            4 => Item::Array(self.items(argument, depth)?),
            5 => self.map(argument, depth)?,
            6 => Item::Tag(argument, Box::new(self.item(depth + 1)?)),
            _ if short == 22 => Item::Null,
            _ => Item::Other,
        })
    }

    /// No more room is made than there are bytes left for.
    fn room(&self, count: u64) -> Result<usize, String> {
        let count = usize::try_from(count).ok().filter(|count| *count <= self.rest.len() && *count <= self.left);
        count.ok_or_else(|| "more items than there is room for".into())
    }

    fn items(&mut self, count: u64, depth: usize) -> Result<Vec<Item<'a>>, String> {
        let count = self.room(count)?;
        (0..count).map(|_| self.item(depth + 1)).collect()
    }

    fn map(&mut self, count: u64, depth: usize) -> Result<Item<'a>, String> {
        let count = self.room(count)?;
        let mut members = Vec::with_capacity(count);
        let mut keys = BTreeSet::new();
        for _ in 0..count {
            let before = self.rest;
            let key = self.item(depth + 1)?;
            let raw = before.get(..before.len() - self.rest.len()).unwrap_or_default();
            if !keys.insert(raw) {
                return Err("a map with a key twice".into());
            }
            members.push((key, self.item(depth + 1)?));
        }
        Ok(Item::Map(members))
    }
}

/// The head of an item with a length.
fn head(major: u8, length: usize, out: &mut Vec<u8>) {
    let bytes = (length as u64).to_be_bytes();
    let (short, from) = match length {
        0..24 => return out.push(major << 5 | bytes[7]),
        24..0x100 => (24, 7),
        0x100..0x1_0000 => (25, 6),
        0x1_0000..0x1_0000_0000 => (26, 4),
        _ => (27, 0),
    };
    out.push(major << 5 | short);
    out.extend_from_slice(&bytes[from..]);
}

/// What COSE_Sign1 signs: `["Signature1", protected, h'', payload]`.
pub(crate) fn to_be_signed(protected: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(protected.len() + payload.len() + 32);
    head(4, 4, &mut out);
    head(3, 10, &mut out);
    out.extend_from_slice(b"Signature1");
    for part in [protected, &[], payload] {
        head(2, part.len(), &mut out);
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
    }

    /// RFC 8949, appendix A, as far as it is of definite length and has no fractions.
    #[test]
    fn the_examples_of_the_standard_are_read() {
        let read = |text: &str| format!("{:?}", Item::read(&hex(text)).unwrap());
        for (text, item) in [
            ("00", "Int(0)"),
            ("17", "Int(23)"),
            ("1818", "Int(24)"),
            ("1903e8", "Int(1000)"),
            ("1b000000e8d4a51000", "Int(1000000000000)"),
            ("3863", "Int(-100)"),
            ("f6", "Null"),
            ("f5", "Other"),
            ("fb3ff199999999999a", "Other"),
            ("f90001", "Other"),
            ("4401020304", "Bytes([1, 2, 3, 4])"),
            ("6449455446", "Text(\"IETF\")"),
            ("8301820203820405", "Array([Int(1), Array([Int(2), Int(3)]), Array([Int(4), Int(5)])])"),
            ("a201020304", "Map([(Int(1), Int(2)), (Int(3), Int(4))])"),
            ("c11a514b67b0", "Tag(1, Int(1363896240))"),
        ] {
            assert_eq!(read(text), item, "{text}");
        }
    }

    #[test]
    fn what_is_not_strict_too_much_or_cut_is_refused() {
        let deep = "81".repeat(DEEPEST + 2) + "00";
        for text in [
            "",
            "18",
            "1817",
            "190017",
            "1a00000017",
            "1b0000000000000017",
            "1bffffffffffffffff",
            "3bffffffffffffffff",
            "5f42010243030405ff",
            "9fff",
            "bfff",
            "44010203",
            "62c328",
            "a2010203",
            "a201020103",
            "9b7fffffffffffffff",
            "bb7fffffffffffffff",
            "0000",
            "1c",
            "c1",
            &deep,
        ] {
            assert!(Item::read(&hex(text)).is_err(), "{text}");
        }
        let mut many = vec![0x9a];
        many.extend_from_slice(&70_000u32.to_be_bytes());
        many.extend_from_slice(&[0; 70_000]);
        assert!(Item::read(&many).is_err());
    }
}

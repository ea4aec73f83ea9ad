//! The names of objects, and the descriptor.

use nacre_core::BLOCK_SIZE;
use serde::{Deserialize, Serialize};

/// The descriptor's name.
pub(crate) const DESCRIPTOR: &str = "nacre.json";

/// What its `format` says.
const FORMAT: &str = "nacre-object-store";

/// What its `version` says.
const VERSION: u32 = 1;

/// The longest descriptor that is read.
pub(crate) const MAX_DESCRIPTOR: u64 = 4096;

/// The smallest and the largest chunk: an offset in a chunk has eight hexadecimal digits, and a base is one PUT.
const CHUNK_SIZES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 30;

/// The most chunks: their numbers are eight hexadecimal digits.
const MAX_CHUNKS: u64 = 1 << 32;

/// What a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) size: u64,
    pub(crate) chunk_size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u32,
    size: u64,
    chunk_size: u64,
}

impl Descriptor {
    /// Says what is wrong with it.
    pub(crate) fn check(self) -> Result<Self, String> {
        let Self { size, chunk_size } = self;
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK_SIZE as u64);
        if !CHUNK_SIZES.contains(&chunk_size) || !whole(chunk_size) {
            return Err(format!("chunks of {chunk_size} bytes: they have whole blocks of 4096, from 64 KiB to 1 GiB"));
        }
        if size == 0 || !whole(size) {
            return Err(format!("a size of {size} bytes is no number of blocks of 4096"));
        }
        if size.div_ceil(chunk_size) > MAX_CHUNKS {
            return Err(format!("{size} bytes are more than 2^32 chunks of {chunk_size}"));
        }
        Ok(self)
    }

    /// How many chunks there are.
    pub(crate) fn chunks(self) -> u64 {
        self.size.div_ceil(self.chunk_size)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|error| format!("{DESCRIPTOR} cannot be understood: {error}"))?;
        if document.format != FORMAT {
            return Err(format!("{DESCRIPTOR} is of another format: {:?}", document.format));
        }
        if document.version != VERSION {
            return Err(format!("{DESCRIPTOR} is of version {}, and only {VERSION} is known", document.version));
        }
        Self { size: document.size, chunk_size: document.chunk_size }.check()
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let Self { size, chunk_size } = self;
        // As serde_json would write it; in this way there is nothing that could fail.
        format!("{{\"format\":\"{FORMAT}\",\"version\":{VERSION},\"size\":{size},\"chunk_size\":{chunk_size}}}\n")
            .into_bytes()
    }
}

/// What an object below the prefix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    /// A chunk as a whole.
    Base { chunk: u64, generation: u64 },
    /// A part of a chunk.
    Delta { chunk: u64, generation: u64, offset: u64, length: u64 },
    /// Who opened the store for writing.
    Writer { generation: u64 },
}

impl Name {
    /// Reads a name below the prefix; `None` is a name of nothing of ours.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        if let Some(writer) = name.strip_prefix("writer/") {
            return Some(Self::Writer { generation: hex(writer, 16)? });
        }
        let (chunk, rest) = name.strip_prefix("chunk/")?.split_once('/')?;
        let chunk = hex(chunk, 8)?;
        let mut parts = rest.split('-');
        let generation = hex(parts.next()?, 16)?;
        let Some(offset) = parts.next() else { return Some(Self::Base { chunk, generation }) };
        let (offset, length) = (hex(offset, 8)?, hex(parts.next()?, 8)?);
        parts.next().is_none().then_some(Self::Delta { chunk, generation, offset, length })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Base { chunk, generation } => write!(f, "chunk/{chunk:08x}/{generation:016x}"),
            Self::Delta { chunk, generation, offset, length } => {
                write!(f, "chunk/{chunk:08x}/{generation:016x}-{offset:08x}-{length:08x}")
            }
            Self::Writer { generation } => write!(f, "writer/{generation:016x}"),
        }
    }
}

/// A number of exactly so many lowercase hexadecimal digits.
fn hex(text: &str, digits: usize) -> Option<u64> {
    let lowercase = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == digits && text.bytes().all(lowercase)).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_as_they_are_read() {
        for (text, name) in [
            ("chunk/00000012/0000000000000007", Name::Base { chunk: 18, generation: 7 }),
            (
                "chunk/000000ff/00000000000000ab-00001000-00002000",
                Name::Delta { chunk: 255, generation: 171, offset: 4096, length: 8192 },
            ),
            ("writer/000000000000000a", Name::Writer { generation: 10 }),
        ] {
            assert_eq!(Name::parse(text), Some(name));
            assert_eq!(name.to_string(), text);
        }
        for text in [
            "",
            "nacre.json",
            "chunk/00000012",
            "chunk/00000012/",
            "chunk/12/0000000000000007",
            "chunk/0000001G/0000000000000007",
            "chunk/0000001A/0000000000000007",
            "chunk/+0000012/0000000000000007",
            "chunk/00000012/0000000000000007-00001000",
            "chunk/00000012/0000000000000007-00001000-00001000-00001000",
            "chunk/00000012/0000000000000007/0000000000000007",
            "writer/1",
        ] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_descriptor_is_that_of_the_documentation() {
        let descriptor = Descriptor { size: 1 << 30, chunk_size: 4 << 20 };
        let bytes = descriptor.to_bytes();
        let page = include_str!("../../../docs/formats/object-store.md");
        assert!(page.contains(std::str::from_utf8(&bytes).unwrap()));
        assert_eq!(Descriptor::parse(&bytes), Ok(descriptor));
        let whole = String::from_utf8(bytes).unwrap();
        for (from, to) in [
            ("nacre-object-store", "other"),
            ("\"version\":1", "\"version\":2"),
            ("\"size\":1073741824", "\"size\":0"),
            ("\"size\":1073741824", "\"size\":4097"),
            ("\"size\":1073741824", "\"size\":18446744073709547520"),
            ("\"chunk_size\":4194304", "\"chunk_size\":0"),
            ("\"chunk_size\":4194304", "\"chunk_size\":4194305"),
            ("\"chunk_size\":4194304", "\"chunk_size\":2147483648"),
            ("}", ",\"more\":1}"),
        ] {
            let broken = whole.replacen(from, to, 1);
            assert_ne!(broken, whole);
            assert!(Descriptor::parse(broken.as_bytes()).is_err(), "{broken}");
        }
    }
}

//! Tar archives as containers of blobs: an index of what is where. (What is *in* a layer's tar is `unpack`'s affair.)
//!
//! The index is made by one pass over the headers, without reading contents. It takes ustar, GNU (long names, base-256 sizes) and
//! PAX (path, linkpath, size). Names are normalised (`./a//b` is `a/b`) and then unique; one that is absolute, goes up, or appears
//! twice refuses the archive, since two readers could see two images in it. Links lead to other entries of the archive.

use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::Path, sync::Arc};

use super::files::{self, Extent};
use crate::source::TransportError;

const BLOCK: u64 = 512;
/// The most entries of an archive of images.
const ENTRY_LIMIT: usize = 100_000;
/// The most bytes of a long name or a PAX header.
const EXTENSION_LIMIT: u64 = 64 << 10;
/// The longest name of an entry.
const NAME_LIMIT: usize = 4096;
/// The most bytes of all names together, so that many long ones do not fill the memory.
const NAMES_LIMIT: usize = 16 << 20;
/// How many links may follow one another.
const LINK_LIMIT: usize = 8;

/// Why bytes are not a tar archive that can be read as a container of blobs.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The bytes could not be read.
    #[error("reading failed: {0}")]
    Io(#[from] std::io::Error),
    /// What is not as it should be.
    #[error("{0}")]
    Malformed(String),
}

fn malformed<T>(problem: impl Into<String>) -> Result<T, TarError> {
    Err(TarError::Malformed(problem.into()))
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    File {
        offset: u64,
        size: u64,
    },
    /// To another entry, by its normalised name.
    Link(String),
}

/// What is where in an archive.
#[derive(Debug, Default)]
pub struct TarIndex {
    entries: HashMap<String, Entry>,
    /// How many bytes all names and link targets have.
    names: usize,
}

impl TarIndex {
    /// Indexes an archive in memory: for tests and fuzzing.
    ///
    /// # Errors
    /// [`TarError`]
    pub fn of_bytes(bytes: &[u8]) -> Result<Self, TarError> {
        let read_at = |buffer: &mut [u8], offset: u64| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let found = bytes.get(start..start.saturating_add(buffer.len()));
            buffer.copy_from_slice(found.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        Scanner { read_at, length: bytes.len() as u64 }.scan()
    }

    /// Indexes an archive in a file of `length` bytes.
    pub(super) fn of_file(file: &File, length: u64) -> Result<Self, TarError> {
        let read_at = |buffer: &mut [u8], offset: u64| file.read_exact_at(buffer, offset);
        Scanner { read_at, length }.scan()
    }

    /// Where the content of a file is, and its size; links are followed, within the archive.
    ///
    /// # Errors
    /// [`TarError::Malformed`]: a link leads nowhere, or too many follow one another.
    pub fn find(&self, name: &str) -> Result<Option<(u64, u64)>, TarError> {
        let mut name = name;
        for _ in 0..=LINK_LIMIT {
            match self.entries.get(name) {
                Some(Entry::File { offset, size }) => return Ok(Some((*offset, *size))),
                Some(Entry::Link(target)) => name = target,
                None => return Ok(None),
            }
        }
        malformed(format!("'{name:.200}' is a link at the end of more than {LINK_LIMIT} others"))
    }
}

/// An archive in a file, with its index.
#[derive(Debug)]
pub(super) struct TarFile {
    file: Arc<File>,
    index: TarIndex,
    place: String,
}

impl TarFile {
    pub(super) fn open(path: &Path) -> Result<Self, TransportError> {
        let place = path.display().to_string();
        let (file, length) = files::open_archive(path)?;
        let index = TarIndex::of_file(&file, length).map_err(|error| archive_error(&place, error))?;
        Ok(Self { file: Arc::new(file), index, place })
    }

    /// The archive's path, for messages.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The content of a file in the archive.
    pub(super) fn find(&self, name: &str) -> Result<Option<Extent>, TransportError> {
        let found = self.index.find(name).map_err(|error| archive_error(&self.place, error))?;
        Ok(found.map(|(offset, size)| Extent { file: Arc::clone(&self.file), offset, size }))
    }

    /// The whole of a small file in the archive.
    pub(super) fn read(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        self.find(name)?.map(|extent| extent.read(name, &self.place, limit)).transpose()
    }
}

fn archive_error(place: &str, error: TarError) -> TransportError {
    TransportError::Malformed { what: "the tar archive".into(), place: place.into(), reason: error.to_string() }
}

/// What an extended header says about the entry that follows it.
#[derive(Default)]
struct Extended {
    path: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

struct Scanner<F> {
    read_at: F,
    length: u64,
}

impl<F: Fn(&mut [u8], u64) -> std::io::Result<()>> Scanner<F> {
    fn scan(&self) -> Result<TarIndex, TarError> {
        let mut index = TarIndex::default();
        let mut extended = Extended::default();
        let mut at = 0u64;
        let mut count = 0usize;
        while at < self.length {
            if self.length - at < BLOCK {
                return malformed(format!("it is cut within the header at byte {at}"));
            }
            let mut block = [0u8; 512];
            (self.read_at)(&mut block, at)?;
            if block.iter().all(|byte| *byte == 0) {
                return Ok(index);
            }
            count += 1;
            if count > ENTRY_LIMIT {
                return malformed(format!("it has more than {ENTRY_LIMIT} entries"));
            }
            let header = Header::parse(&block, at)?;
            // A PAX size is the entry's own; on the headers of extensions it has no meaning.
            let is_extension = matches!(header.kind, b'x' | b'g' | b'L' | b'K');
            let size = match header.kind {
                b'x' | b'g' | b'L' | b'K' => header.size,
                // Links, directories and devices have no content, whatever their size says.
                b'1'..=b'6' => 0,
                _ => extended.size.take().unwrap_or(header.size),
            };
            let data = at + BLOCK;
            let next = size
                .checked_next_multiple_of(BLOCK)
                .and_then(|padded| data.checked_add(padded))
                .filter(|next| *next <= self.length.next_multiple_of(BLOCK) && data + size <= self.length);
            let Some(next) = next else {
                return malformed(format!("the entry at byte {at} says it has {size} bytes, which are not there"));
            };
            if is_extension {
                self.extension(&header, data, &mut extended)?;
            } else {
                let entry = std::mem::take(&mut extended);
                index.add(&header, entry, data, size)?;
            }
            at = next;
        }
        if at == 0 { malformed("it is empty") } else { Ok(index) }
    }

    fn extension(&self, header: &Header, data: u64, extended: &mut Extended) -> Result<(), TarError> {
        if header.size > EXTENSION_LIMIT {
            return malformed(format!("an extended header of {} bytes: at most {EXTENSION_LIMIT}", header.size));
        }
        let mut bytes = vec![0; usize::try_from(header.size).unwrap_or(0)];
        (self.read_at)(&mut bytes, data)?;
        match header.kind {
            b'L' => extended.path = Some(text(&bytes)?),
            b'K' => extended.link = Some(text(&bytes)?),
            b'x' => pax(&bytes, extended)?,
            // A global header of names or sizes for all entries makes no sense; `git archive` writes a comment in one.
            _ => {
                let mut global = Extended::default();
                pax(&bytes, &mut global)?;
                if global.path.is_some() || global.link.is_some() || global.size.is_some() {
                    return malformed("a global header gives every entry a name or a size");
                }
            }
        }
        Ok(())
    }
}

impl TarIndex {
    fn add(&mut self, header: &Header, extended: Extended, data: u64, size: u64) -> Result<(), TarError> {
        let name = extended.path.unwrap_or_else(|| header.name.clone());
        let link = extended.link.unwrap_or_else(|| header.link.clone());
        let normal = normalise(&name, "")?;
        let entry = match header.kind {
            b'0' | 0 | b'7' if !name.ends_with('/') => Entry::File { offset: data, size },
            // A hard link's target is counted from the archive's root, a symbolic link's from where the link is.
            b'1' => Entry::Link(normalise(&link, "")?),
            b'2' => Entry::Link(normalise(&link, normal.rsplit_once('/').map_or("", |(parent, _)| parent))?),
            b'0' | 0 | b'5' | b'7' => return Ok(()),
            kind => return malformed(format!("'{name:.200}' is of type {kind:#04x}, which an image archive has not")),
        };
        if normal.is_empty() {
            return malformed("an entry has no name");
        }
        self.names += normal.len() + if let Entry::Link(target) = &entry { target.len() } else { 0 };
        if self.names > NAMES_LIMIT {
            return malformed(format!("its names have more than {NAMES_LIMIT} bytes together"));
        }
        if self.entries.insert(normal, entry).is_some() {
            return malformed(format!("'{name:.200}' is there twice: it is ambiguous which one counts"));
        }
        Ok(())
    }
}

struct Header {
    name: String,
    link: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn parse(block: &[u8; 512], at: u64) -> Result<Self, TarError> {
        let field = |from: usize, length: usize| block.get(from..from + length).unwrap_or_default();
        let sum: u64 = field(0, 148).iter().chain(field(156, 356)).map(|byte| u64::from(*byte)).sum::<u64>() + 8 * 32;
        if octal(field(148, 8)) != Some(sum) {
            return malformed(match block {
                [0x1f, 0x8b, ..] => "it is compressed with gzip: decompress it first".into(),
                [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed with zstd: decompress it first".into(),
                _ => format!("the header at byte {at} has a wrong checksum: it is no tar archive, or a damaged one"),
            });
        }
        let Some(size) = number(field(124, 12)) else {
            return malformed(format!("the header at byte {at} has a size that is no number"));
        };
        let kind = field(156, 1).first().copied().unwrap_or(0);
        let mut name = text(field(0, 100))?;
        if field(257, 6) == b"ustar\0" && field(345, 1) != b"\0" {
            name = format!("{}/{name}", text(field(345, 155))?);
        }
        Ok(Self { name, link: text(field(157, 100))?, size, kind })
    }
}

/// Up to the first NUL, UTF-8.
fn text(field: &[u8]) -> Result<String, TarError> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    match std::str::from_utf8(field.get(..end).unwrap_or_default()) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => malformed("a name is not UTF-8"),
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// Octal digits, or GNU's base-256 for sizes of 8 GiB and more.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_first()? {
        (0x80, rest) => rest.iter().try_fold(0u64, |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte))),
        (0x81..=0xff, _) => None,
        _ => octal(field),
    }
}

/// Records of `LENGTH KEY=VALUE\n`.
fn pax(bytes: &[u8], extended: &mut Extended) -> Result<(), TarError> {
    let bad = || TarError::Malformed("a PAX header has a malformed record".into());
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest.iter().take(12).position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length: usize = std::str::from_utf8(rest.get(..space).ok_or_else(bad)?)
            .ok()
            .and_then(|t| t.parse().ok())
            .ok_or_else(bad)?;
        let record = rest.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let (key, value) = record.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        let value = || if value.contains(&0) { Err(bad()) } else { text(value) };
        match key {
            b"path" => extended.path = Some(value()?),
            b"linkpath" => extended.link = Some(value()?),
            b"size" => extended.size = Some(value()?.parse().map_err(|_| bad())?),
            _ if key.starts_with(b"GNU.sparse") => return malformed("it has sparse files, which are not read here"),
            _ => {}
        }
        rest = rest.get(length..).ok_or_else(bad)?;
    }
    Ok(())
}

/// A name as the index has it, counted from the directory `base`: without `.`, doubled slashes and `..`.
pub(super) fn normalise(name: &str, base: &str) -> Result<String, TarError> {
    if name.len() > NAME_LIMIT {
        return malformed(format!("a name of {} bytes: at most {NAME_LIMIT}", name.len()));
    }
    if name.starts_with('/') {
        return malformed(format!("'{name:.200}' is an absolute name"));
    }
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            // Only a link's target may go up, and not beyond the root.
            ".." if !base.is_empty() && parts.pop().is_some() => {}
            ".." => return malformed(format!("'{name:.200}' leads out of the archive")),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised_or_refused() {
        for (name, base, expected) in [
            ("a/b", "", "a/b"),
            ("./a//b/", "", "a/b"),
            ("../c", "a/b", "a/c"),
            ("../../c", "a/b", "c"),
            (".", "", ""),
            ("a..b/...", "", "a..b/..."),
        ] {
            assert_eq!(normalise(name, base).unwrap(), expected);
        }
        for (name, base) in [("/a", ""), ("..", ""), ("a/../b", ""), ("../../../c", "a/b"), ("//a", "b")] {
            assert!(normalise(name, base).is_err(), "{name} {base}");
        }
        assert!(normalise(&"a/".repeat(3000), "").is_err());
    }

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"00000000017\0"), Some(15));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(1 << 33));
        for bad in [b"00000000018\0", b"\x81\0\0\0\0\0\0\0\0\0\0\0", b"\x80\x01\0\0\0\0\0\0\0\0\0\0"] {
            assert_eq!(number(bad), None);
        }
    }

    #[test]
    fn pax_records_are_read_or_refused() {
        let mut found = Extended::default();
        pax(b"12 path=a/b\n17 linkpath=/c/d\n11 size=42\n21 comment=any thing\n", &mut found).unwrap();
        assert_eq!((found.path.as_deref(), found.link.as_deref(), found.size), (Some("a/b"), Some("/c/d"), Some(42)));
        for bad in [
            b"path=a\n".as_slice(),
            b"13 path=a/b\n",
            b"11 path=a/b\n",
            b"0 path=a/b\n",
            b"99999999999999999999 a=b\n",
            b"5 ab\n",
            b"12 size=-42\n",
            b"12 path=a\xffb\n",
            b"18446744073709551615 a=b\n",
        ] {
            assert!(pax(bad, &mut Extended::default()).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}

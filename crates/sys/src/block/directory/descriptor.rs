//! The descriptor of a directory of segment files: one small JSON file, replaced as a whole.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, OwnedFd},
};

use nacre_core::BLOCK_SIZE;
use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};

/// Its name.
pub(super) const NAME: &str = "nacre-segments.json";

/// Its name while it is written.
const NEW_NAME: &str = "nacre-segments.json.new";

/// What `format` says.
const FORMAT: &str = "nacre-segments";

/// What `version` says.
const VERSION: u32 = 1;

/// The longest descriptor that is read.
const MAX_BYTES: u64 = 4096;

/// The smallest and the largest segment.
pub(super) const SEGMENT_SIZES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;

/// The most segments: their numbers are eight hexadecimal digits.
const MAX_SEGMENTS: u64 = 1 << 32;

/// What a directory of segments is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Bytes of the store.
    pub(super) size: u64,
    /// Bytes of a segment.
    pub(super) segment_size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u32,
    size: u64,
    segment_size: u64,
}

impl Descriptor {
    /// Says what is wrong with it.
    pub(super) fn check(self) -> Result<Self, String> {
        let Self { size, segment_size } = self;
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK_SIZE as u64);
        if !SEGMENT_SIZES.contains(&segment_size) || !whole(segment_size) {
            return Err(format!(
                "segments of {segment_size} bytes: they have whole blocks of 4096, from 1 MiB to 1 GiB"
            ));
        }
        if super::super::check_size(size).is_err() {
            return Err(format!("a size of {size} bytes is no number of blocks of 4096"));
        }
        if size.div_ceil(segment_size) > MAX_SEGMENTS {
            return Err(format!("{size} bytes are more than 2^32 segments of {segment_size}"));
        }
        Ok(self)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|error| format!("{NAME} cannot be understood: {error}"))?;
        if document.format != FORMAT {
            return Err(format!("{NAME} is of another format: {:?}", document.format));
        }
        if document.version != VERSION {
            return Err(format!("{NAME} is of version {}, and only {VERSION} is known", document.version));
        }
        Self { size: document.size, segment_size: document.segment_size }.check()
    }

    fn to_bytes(self) -> io::Result<Vec<u8>> {
        let Self { size, segment_size } = self;
        let document = Document { format: FORMAT.to_owned(), version: VERSION, size, segment_size };
        let mut bytes = serde_json::to_vec(&document)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads it; `None` where there is none.
    pub(super) fn load(directory: &OwnedFd) -> io::Result<Option<Result<Self, String>>> {
        let Some(fd) = open(directory, NAME, OFlags::RDONLY)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let read = File::from(fd).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        if read as u64 > MAX_BYTES {
            return Ok(Some(Err(format!("{NAME} has more than {MAX_BYTES} bytes"))));
        }
        Ok(Some(Self::parse(&bytes)))
    }

    /// Writes it: after a crash it is there as a whole, the old one or the new one.
    pub(super) fn save(self, directory: &OwnedFd) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let fd = open(directory, NEW_NAME, flags)?.ok_or(Errno::NOENT)?;
        let mut file = File::from(fd);
        file.write_all(&self.to_bytes()?)?;
        file.sync_all()?;
        rustix::fs::renameat(directory, NEW_NAME, directory, NAME)?;
        rustix::fs::fsync(directory)?;
        Ok(())
    }
}

/// Opens the regular file of this name, no other kind; `None` where there is none and it is not made.
pub(super) fn open(directory: impl AsFd, name: &str, flags: OFlags) -> io::Result<Option<OwnedFd>> {
    let access = flags & (OFlags::RDONLY | OFlags::WRONLY | OFlags::RDWR);
    let guard = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(directory, name, flags | guard, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} is no regular file")));
    }
    // Only for opening: io_uring would refuse whatever has to wait.
    rustix::fs::fcntl_setfl(&fd, access)?;
    Ok(Some(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_documentation() {
        let descriptor = Descriptor { size: 1 << 30, segment_size: 64 << 20 };
        let bytes = descriptor.to_bytes().unwrap();
        let page = include_str!("../../../../../docs/formats/segment-directory.md");
        assert!(page.contains(std::str::from_utf8(&bytes).unwrap()), "{}", String::from_utf8_lossy(&bytes));
        assert_eq!(Descriptor::parse(&bytes), Ok(descriptor));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let whole = r#"{"format":"nacre-segments","version":1,"size":1048576,"segment_size":1048576}"#;
        assert!(Descriptor::parse(whole.as_bytes()).is_ok());
        for (from, to) in [
            ("nacre-segments", "other"),
            ("\"version\":1", "\"version\":2"),
            ("\"size\":1048576", "\"size\":0"),
            ("\"size\":1048576", "\"size\":4097"),
            ("\"size\":1048576", "\"size\":-4096"),
            ("\"size\":1048576", "\"size\":18446744073709547520"),
            ("\"size\":1048576", "\"size\":9007199254740992"),
            ("\"segment_size\":1048576", "\"segment_size\":4096"),
            ("\"segment_size\":1048576", "\"segment_size\":1048577"),
            ("\"segment_size\":1048576", "\"segment_size\":2147483648"),
            ("\"segment_size\":1048576", "\"segment_size\":0"),
            ("}", ",\"more\":1}"),
            ("}", ""),
        ] {
            let broken = whole.replacen(from, to, 1);
            assert_ne!(broken, whole);
            assert!(Descriptor::parse(broken.as_bytes()).is_err(), "{broken}");
        }
    }
}

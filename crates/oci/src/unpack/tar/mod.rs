//! A tar reader over bytes as they arrive: no I/O, no copies of file contents, bounded memory.
//!
//! [`Parser::next`] takes what there is of the archive and gives one [`Event`] at a time: an entry, a piece of its content (with its
//! place in the file, so that holes of sparse files stay holes), the archive's end. It keeps at most one block, and the names and
//! extended headers of the entry that it is in, which [`Limits`] bound.
//!
//! It reads V7, ustar, PAX, GNU and star archives, as Go's archive/tar reads them, because the engines that images are made for are
//! written with it, and whoever inspects an image must see what we unpack: a global PAX header is checked and not applied; an entry
//! without content has none, whatever its size field says; the archive ends with two zero blocks, or with its last byte.
//! Where Go gives up and the meaning is beyond doubt, it goes on: a hard link that carries its content, as pax(1) may write it.

use super::limits::{LimitExceeded, Limits, check};
use header::{BLOCK, Format, Header};
use pax::Pax;
use sparse::{DataMap, MapPlace};

mod header;
mod pax;
mod sparse;

/// Why bytes are no tar that we unpack.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TarError {
    /// The header's checksum is wrong: it is damaged, or no header.
    #[error("header checksum is {stored:o}, computed {computed:o}: damaged, or not a tar")]
    Checksum {
        /// As the header says.
        stored: i64,
        /// As it is.
        computed: i64,
    },
    /// A header field has a value that it must not have.
    #[error("header field {field} {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// An extended header is malformed.
    #[error("PAX header: {0}")]
    Pax(&'static str),
    /// A sparse file's map is malformed.
    #[error("sparse file: {0}")]
    Sparse(&'static str),
    /// The entry's type is none that a layer may have.
    #[error("entry type {0:#04x} is not one of a layer")]
    Type(u8),
    /// The archive ends within an entry.
    #[error("archive ends within {0}")]
    Truncated(&'static str),
    /// It is larger than it may be.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
}

impl TarError {
    fn field(field: &'static str, problem: &'static str) -> Self {
        Self::Field { field, problem }
    }
}

/// Seconds since 1970, and nanoseconds forward from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds; negative before 1970.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
}

/// One member of the archive, its names as they came: untrusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub path: Vec<u8>,
    /// What it links to.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, setuid, setgid and sticky.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last access, where the archive says.
    pub atime: Option<Timestamp>,
    /// Logical bytes of the content; 0 for what has none.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes: names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What comes next in the archive.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// An entry begins.
    Entry(Box<Entry>),
    /// A piece of the current file's content.
    Data {
        /// Where in the file it belongs.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// The current entry is whole.
    EntryEnd,
    /// The archive is over; what follows it means nothing.
    End,
}

#[derive(Clone, Copy)]
enum Extended {
    LongName,
    LongLink,
    Pax,
    GlobalPax,
}

enum State {
    Header {
        zero_blocks: u8,
    },
    Extended {
        what: Extended,
        left: u64,
    },
    /// Blocks of the old GNU sparse map.
    SparseBlocks {
        entry: Box<Entry>,
        stored: u64,
        map: Vec<(u64, u64)>,
    },
    /// Blocks of the PAX 1.0 sparse map.
    SparseData {
        entry: Box<Entry>,
        left: u64,
        map: DataMap,
    },
    /// An entry is complete but for its content.
    Begin {
        entry: Box<Entry>,
        map: Vec<(u64, u64)>,
        stored: u64,
    },
    /// After a hard link whose size field is not zero: content, or the next header.
    MaybeLinkContent {
        size: u64,
    },
    Data,
    /// Content that is not wanted.
    Skip {
        left: u64,
    },
    End,
}

/// The reader.
pub struct Parser {
    limits: Limits,
    state: State,
    block: [u8; BLOCK],
    filled: usize,
    /// The payload of the extended header that is being read.
    extended: Vec<u8>,
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    /// The pieces of the current file that are still to come, the next one last.
    pieces: Vec<(u64, u64)>,
    /// Bytes to pass over now.
    padding: u64,
    /// Bytes between the end of the current file's content and the next block.
    padding_after_content: u64,
    /// The size field of the hard link that is the current entry.
    link_content: u64,
}

impl Parser {
    /// Starts with the first byte of an archive.
    pub fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            state: State::Header { zero_blocks: 0 },
            block: [0; BLOCK],
            filled: 0,
            extended: Vec::new(),
            pax: None,
            long_name: None,
            long_link: None,
            pieces: Vec::new(),
            padding: 0,
            padding_after_content: 0,
            link_content: 0,
        }
    }

    /// Takes bytes off the front of `input` until there is something to say; `None` when it needs more bytes than there are.
    ///
    /// # Errors
    /// [`TarError`]; the parser is not to be used after it.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, TarError> {
        loop {
            if self.padding > 0 && !matches!(self.state, State::Extended { .. }) {
                self.padding -= take(input, self.padding).len() as u64;
                if self.padding > 0 {
                    return Ok(None);
                }
            }
            match std::mem::replace(&mut self.state, State::End) {
                State::Begin { entry, map, stored } => {
                    self.begin_content(&entry, map, stored);
                    return Ok(Some(Event::Entry(entry)));
                }
                State::Data => {
                    self.state = State::Data;
                    return Ok(self.data(input));
                }
                State::Skip { left } => {
                    let left = left - take(input, left).len() as u64;
                    if left > 0 {
                        self.state = State::Skip { left };
                        return Ok(None);
                    }
                    self.state = State::Header { zero_blocks: 0 };
                }
                State::Extended { what, left } => {
                    let bytes = take(input, left);
                    self.extended.extend_from_slice(bytes);
                    let left = left - bytes.len() as u64;
                    if left > 0 {
                        self.state = State::Extended { what, left };
                        return Ok(None);
                    }
                    self.state = State::Header { zero_blocks: 0 };
                    self.end_extended(what)?;
                }
                State::End => return Ok(Some(Event::End)),
                state => {
                    let Some(block) = self.gather(input) else {
                        self.state = state;
                        return Ok(None);
                    };
                    self.state = self.block_event(state, &block)?;
                }
            }
        }
    }

    /// Says that there are no more bytes.
    ///
    /// # Errors
    /// [`TarError::Truncated`]: the archive is not whole.
    pub fn finish(&self) -> Result<(), TarError> {
        match &self.state {
            State::End => Ok(()),
            State::Header { .. } if self.filled > 0 => Err(TarError::Truncated("a header")),
            State::Header { .. } if self.pax.is_some() || self.long_name.is_some() || self.long_link.is_some() => {
                Err(TarError::Truncated("an entry whose extended header came"))
            }
            // The padding of the last file may be missing with the end blocks.
            State::Header { .. } => Ok(()),
            State::MaybeLinkContent { .. } if self.filled == 0 => Ok(()),
            State::Data | State::Skip { .. } | State::Begin { .. } => Err(TarError::Truncated("a file")),
            State::Extended { .. } => Err(TarError::Truncated("an extended header")),
            State::SparseBlocks { .. } | State::SparseData { .. } | State::MaybeLinkContent { .. } => {
                Err(TarError::Truncated("a header"))
            }
        }
    }

    /// The next whole block, across the borders of what arrives.
    fn gather(&mut self, input: &mut &[u8]) -> Option<[u8; BLOCK]> {
        if self.filled == 0
            && let Some((block, rest)) = input.split_first_chunk::<BLOCK>()
        {
            *input = rest;
            return Some(*block);
        }
        let free = self.block.get_mut(self.filled..)?;
        let bytes = take(input, free.len() as u64);
        free.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.filled += bytes.len();
        if self.filled < BLOCK {
            return None;
        }
        self.filled = 0;
        Some(self.block)
    }

    fn block_event(&mut self, state: State, block: &[u8; BLOCK]) -> Result<State, TarError> {
        match state {
            State::Header { zero_blocks } => {
                if block.iter().all(|&byte| byte == 0) {
                    return Ok(if zero_blocks > 0 { State::End } else { State::Header { zero_blocks: 1 } });
                }
                if zero_blocks > 0 {
                    return Err(TarError::field("(all)", "follow a single zero block"));
                }
                self.header(block)
            }
            State::MaybeLinkContent { size } => {
                if block.iter().all(|&byte| byte == 0) || Header::new(block).is_ok() {
                    return self.block_event(State::Header { zero_blocks: 0 }, block);
                }
                let padded = size.checked_next_multiple_of(BLOCK as u64).unwrap_or(u64::MAX);
                Ok(State::Skip { left: padded.saturating_sub(BLOCK as u64) })
            }
            State::SparseBlocks { entry, stored, mut map } => {
                let (more, extended) = header::sparse_extension(block)?;
                map.extend(more);
                check("sparse_segments", map.len() as u64, self.limits.sparse_segments)?;
                if extended {
                    return Ok(State::SparseBlocks { entry, stored, map });
                }
                sparse::validate(&map, entry.size, stored)?;
                Ok(State::Begin { entry, map, stored })
            }
            State::SparseData { entry, left, map: mut parser } => {
                let left = left.checked_sub(BLOCK as u64).ok_or(TarError::Sparse("map is longer than the entry"))?;
                match parser.block(block, &self.limits)? {
                    Some(map) => {
                        sparse::validate(&map, entry.size, left)?;
                        Ok(State::Begin { entry, map, stored: left })
                    }
                    None => Ok(State::SparseData { entry, left, map: parser }),
                }
            }
            other => Ok(other),
        }
    }

    fn header(&mut self, block: &[u8; BLOCK]) -> Result<State, TarError> {
        let header = Header::new(block)?;
        let extended = match header.type_flag() {
            b'x' => Some((Extended::Pax, "pax_bytes", self.limits.pax_bytes)),
            b'g' => Some((Extended::GlobalPax, "pax_bytes", self.limits.pax_bytes)),
            b'L' => Some((Extended::LongName, "name_bytes", self.limits.name_bytes.saturating_add(1))),
            b'K' => Some((Extended::LongLink, "link_bytes", self.limits.link_bytes.saturating_add(1))),
            _ => None,
        };
        if let Some((what, limit, allowed)) = extended {
            let left = header.size()?;
            check(limit, left, allowed)?;
            self.extended.clear();
            self.padding = padding(left);
            return Ok(State::Extended { what, left });
        }
        self.entry(&header)
    }

    fn end_extended(&mut self, what: Extended) -> Result<(), TarError> {
        let nul_terminated = |bytes: &[u8]| bytes.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
        match what {
            Extended::Pax => self.pax = Some(Pax::parse(&self.extended, &self.limits)?),
            Extended::GlobalPax => {
                Pax::parse(&self.extended, &self.limits)?;
            }
            Extended::LongName => self.long_name = Some(nul_terminated(&self.extended)),
            Extended::LongLink => self.long_link = Some(nul_terminated(&self.extended)),
        }
        if self.extended.capacity() > 64 << 10 {
            self.extended = Vec::new();
        }
        Ok(())
    }

    fn entry(&mut self, header: &Header<'_>) -> Result<State, TarError> {
        let pax = self.pax.take().unwrap_or_default();
        let flag = header.type_flag();
        let mut kind = header::kind(flag).ok_or(TarError::Type(flag))?;
        let place = pax.sparse.place()?;
        let stored = match pax.size {
            Some(size) => size,
            None => header.size()?,
        };
        let path = pax.sparse.name.or(pax.path).unwrap_or_else(|| header.name());
        let path = self.long_name.take().unwrap_or(path);
        let link = self.long_link.take().or(pax.link).unwrap_or_else(|| header.link().to_vec());
        check("name_bytes", path.len() as u64, self.limits.name_bytes)?;
        check("link_bytes", link.len() as u64, self.limits.link_bytes)?;
        if flag == 0 && path.ends_with(b"/") {
            kind = Kind::Directory;
        }
        let id = |field, value| {
            u32::try_from(value).ok().filter(|&id| id != u32::MAX).ok_or(TarError::field(field, "is no id"))
        };
        let number = |field, value| u32::try_from(value).map_err(|_| TarError::field(field, "is out of range"));
        let device = match kind {
            Kind::Char | Kind::Block => {
                let (major, minor) = header.device()?;
                (number("devmajor", pax.device.0.unwrap_or(major))?, number("devminor", pax.device.1.unwrap_or(minor))?)
            }
            _ => (0, 0),
        };
        let mode = header.mode()?;
        let mut entry = Box::new(Entry {
            path,
            link,
            kind,
            mode: u32::try_from(mode & 0o7777).unwrap_or_default(),
            uid: id("uid", pax.uid.map_or_else(|| header.uid(), Ok)?)?,
            gid: id("gid", pax.gid.map_or_else(|| header.gid(), Ok)?)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok)?,
            atime: pax.atime,
            size: 0,
            device,
            xattrs: pax.xattrs,
        });
        if kind == Kind::HardLink && stored > 0 {
            // The event for the link itself comes first; then we look at what follows it.
            return Ok(State::Begin { entry, map: Vec::new(), stored });
        }
        if kind != Kind::File {
            return Ok(State::Begin { entry, map: Vec::new(), stored: 0 });
        }
        entry.size = match place {
            MapPlace::None => stored,
            _ => pax.sparse.real_size.ok_or(TarError::Sparse("real size is missing"))?,
        };
        if flag == b'S' {
            if header.format() != Format::Gnu {
                return Err(TarError::Sparse("type S in an archive that is not GNU's"));
            }
            let (real, map, extended) = header.old_sparse()?;
            entry.size = real;
            check("file_bytes", real, self.limits.file_bytes)?;
            if extended {
                return Ok(State::SparseBlocks { entry, stored, map });
            }
            sparse::validate(&map, real, stored)?;
            return Ok(State::Begin { entry, map, stored });
        }
        check("file_bytes", entry.size.max(stored), self.limits.file_bytes)?;
        match place {
            MapPlace::None => Ok(State::Begin { entry, map: vec![(0, stored)], stored }),
            MapPlace::Records => {
                sparse::validate(&pax.sparse.map, entry.size, stored)?;
                Ok(State::Begin { entry, map: pax.sparse.map, stored })
            }
            MapPlace::Data => Ok(State::SparseData { entry, left: stored, map: DataMap::default() }),
        }
    }

    fn begin_content(&mut self, entry: &Entry, mut map: Vec<(u64, u64)>, stored: u64) {
        self.link_content = if entry.kind == Kind::HardLink { stored } else { 0 };
        map.retain(|&(_, length)| length > 0);
        map.reverse();
        self.pieces = map;
        self.state = State::Data;
        self.padding_after_content = if self.link_content > 0 { 0 } else { padding(stored) };
    }

    fn data<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let Some((offset, length)) = self.pieces.last_mut() else {
            self.padding = std::mem::take(&mut self.padding_after_content);
            self.state = match std::mem::take(&mut self.link_content) {
                0 => State::Header { zero_blocks: 0 },
                size => State::MaybeLinkContent { size },
            };
            return Some(Event::EntryEnd);
        };
        let bytes = take(input, *length);
        if bytes.is_empty() {
            return None;
        }
        let at = *offset;
        *offset += bytes.len() as u64;
        *length -= bytes.len() as u64;
        if *length == 0 {
            self.pieces.pop();
        }
        Some(Event::Data { offset: at, bytes })
    }
}

/// Splits at most `most` bytes off the front.
fn take<'a>(input: &mut &'a [u8], most: u64) -> &'a [u8] {
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
    let (front, rest) = input.split_at(length);
    *input = rest;
    front
}

/// Bytes from the end of `length` bytes to the next block.
fn padding(length: u64) -> u64 {
    (BLOCK as u64 - length % BLOCK as u64) % BLOCK as u64
}

/// For fuzzing: parses `bytes` in pieces of `step` bytes; gives the entries, and how many bytes of content they have.
#[doc(hidden)]
pub fn parse_all(bytes: &[u8], step: usize, limits: &Limits) -> Result<(Vec<Entry>, u64), TarError> {
    let mut parser = Parser::new(limits);
    let (mut entries, mut content) = (Vec::new(), 0);
    for piece in bytes.chunks(step.max(1)) {
        let mut input = piece;
        while let Some(event) = parser.next(&mut input)? {
            match event {
                Event::Entry(entry) => {
                    check("entries", entries.len() as u64 + 1, limits.entries)?;
                    entries.push(*entry);
                }
                Event::Data { bytes, .. } => content += bytes.len() as u64,
                Event::EntryEnd => {}
                Event::End => return Ok((entries, content)),
            }
        }
    }
    parser.finish()?;
    Ok((entries, content))
}

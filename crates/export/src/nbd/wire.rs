//! What goes over the wire, both ways: pure functions from and to bytes. All numbers are big-endian.
//!
//! ```text
//! greeting   NBDMAGIC u64, IHAVEOPT u64, handshake flags u16          then from the client: flags u32
//! option     IHAVEOPT u64, option u32, length u32, data               (client)
//! answer     magic u64, option u32, type u32, length u32, data        (server)
//! request    magic u32, flags u16, type u16, cookie u64, offset u64, length u32, data of a write
//! simple     magic u32, error u32, cookie u64, data of a read
//! chunk      magic u32, flags u16, type u16, cookie u64, length u32, data
//! ```

/// What a server begins with, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// What an option begins with, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What the answer to an option begins with.
pub const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What a request begins with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply begins with.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The longest data of an option that is read.
pub const MAX_OPTION: u32 = 64 << 10;
/// The longest name of an export that the protocol allows.
pub const MAX_NAME: usize = 4096;
/// The most that one request may read or write, in bytes; announced to those who ask.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The longest text in an error.
pub const MAX_MESSAGE: usize = 512;

/// The server speaks fixed newstyle, the client too.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// No 124 zeroes follow the answer to `NBD_OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 2;

/// The options of the handshake.
pub mod option {
    /// Takes an export, without a way to be told why not.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the handshake.
    pub const ABORT: u32 = 2;
    /// Asks for the exports.
    pub const LIST: u32 = 3;
    /// Asks for TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks about an export.
    pub const INFO: u32 = 6;
    /// Takes an export.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks for contexts of metadata.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses contexts of metadata.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// The types of answers to options.
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// The name of an export.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// Not known here.
    pub const UNSUPPORTED: u32 = 0x8000_0001;
    /// Known, and not allowed here.
    pub const POLICY: u32 = 0x8000_0002;
    /// Badly made.
    pub const INVALID: u32 = 0x8000_0003;
    /// TLS first.
    pub const TLS_REQUIRED: u32 = 0x8000_0005;
    /// No such export.
    pub const UNKNOWN: u32 = 0x8000_0006;
    /// Too much data.
    pub const TOO_BIG: u32 = 0x8000_0009;
}

/// What can be asked about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name that the server calls it by.
    pub const NAME: u16 = 1;
    /// What it is, for people.
    pub const DESCRIPTION: u16 = 2;
    /// The sizes of requests.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do, for the transmission phase.
pub mod transmission {
    /// The other flags mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA`.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `NBD_CMD_TRIM`.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF`.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what all have written.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_FLAG_FAST_ZERO`.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// The flags of requests.
pub mod command_flag {
    /// On the medium before the reply.
    pub const FUA: u16 = 1;
    /// Zeroes that keep their room.
    pub const NO_HOLE: u16 = 1 << 1;
    /// A read in one chunk.
    pub const DF: u16 = 1 << 2;
    /// Zeroes only if that is faster than writing them.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The types of chunks, and the flag of the last.
pub mod chunk {
    /// The last chunk of a reply.
    pub const DONE: u16 = 1;
    /// Nothing to say.
    pub const NONE: u16 = 0;
    /// Data of a read.
    pub const OFFSET_DATA: u16 = 1;
    /// It failed.
    pub const ERROR: u16 = 0x8001;
    /// It failed there.
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// The errors of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The medium failed, or what it holds is not what was written.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// No room is left, or the write would reach beyond the end.
    NoSpace = 28,
    /// That cannot be done, or not fast.
    NotSupported = 95,
    /// The server is about to end.
    Shutdown = 108,
}

/// Bytes that are not what the protocol wants there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Something else is spoken there.
    #[error(
        "{what} begins with {found:#x}, not with {expected:#x}: the other side does not speak NBD, or is out of step"
    )]
    Magic {
        /// What should have begun there.
        what: &'static str,
        /// What it begins with.
        found: u64,
        /// What it should begin with.
        expected: u64,
    },
    /// The lengths inside do not add up to the length outside.
    #[error("the data of the option are {length} bytes, which is not what they say themselves")]
    Length {
        /// How much there is.
        length: usize,
    },
    /// A name that is too long or no text.
    #[error("the name of an export is not UTF-8 of at most 4096 bytes")]
    Name,
}

/// Takes a number from the front of `bytes`.
macro_rules! take {
    ($bytes:ident, $number:ty) => {{
        let (head, rest) =
            $bytes.split_first_chunk::<{ size_of::<$number>() }>().ok_or(WireError::Length { length: $bytes.len() })?;
        $bytes = rest;
        <$number>::from_be_bytes(*head)
    }};
}

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which ([`option`]).
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Its bytes.
    pub const LEN: usize = 16;

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError::Magic`]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut bytes: &[u8] = bytes;
        let magic = take!(bytes, u64);
        if magic != OPTION_MAGIC {
            return Err(WireError::Magic { what: "an option", found: magic, expected: OPTION_MAGIC });
        }
        let option = take!(bytes, u32);
        let length = take!(bytes, u32);
        let _ = bytes;
        Ok(Self { option, length })
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Which export.
    pub name: &'a str,
    /// What is asked about it ([`info`]).
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Reads it: length of the name u32, name, count u16, as many types u16.
    ///
    /// # Errors
    /// [`WireError`]
    pub fn decode(data: &'a [u8]) -> Result<Self, WireError> {
        let error = WireError::Length { length: data.len() };
        let mut rest = data;
        let length = usize::try_from(take!(rest, u32)).map_err(|_| error.clone())?;
        let (name, mut rest) = rest.split_at_checked(length).ok_or_else(|| error.clone())?;
        let name = export_name(name)?;
        let count = take!(rest, u16);
        let (wanted, []) = rest.as_chunks::<2>() else { return Err(error) };
        if wanted.len() != usize::from(count) {
            return Err(error);
        }
        Ok(Self { name, wanted: wanted.iter().map(|wanted| u16::from_be_bytes(*wanted)).collect() })
    }
}

/// The name of an export, as `NBD_OPT_EXPORT_NAME` has it.
///
/// # Errors
/// [`WireError::Name`]
pub fn export_name(data: &[u8]) -> Result<&str, WireError> {
    if data.len() > MAX_NAME {
        return Err(WireError::Name);
    }
    std::str::from_utf8(data).map_err(|_| WireError::Name)
}

/// The answer to an option.
pub fn encode_answer(option: u32, answer: u32, data: &[u8]) -> Vec<u8> {
    let data = data.get(..data.len().min(MAX_OPTION as usize)).unwrap_or_default();
    let length = u32::try_from(data.len()).unwrap_or(MAX_OPTION);
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(ANSWER_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(answer.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_DISC`
    Disconnect,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// Any other, which is not known here.
    Other(u16),
}

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How ([`command_flag`]).
    pub flags: u16,
    /// What.
    pub command: Command,
    /// What the reply is to repeat.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Bytes of the export.
    pub size: u64,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Whether structured replies were agreed on.
    pub structured: bool,
}

impl Request {
    /// Its bytes.
    pub const LEN: usize = 28;

    /// Reads one.
    ///
    /// # Errors
    /// [`WireError::Magic`]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let mut bytes: &[u8] = bytes;
        let magic = take!(bytes, u32);
        if magic != REQUEST_MAGIC {
            let (found, expected) = (magic.into(), REQUEST_MAGIC.into());
            return Err(WireError::Magic { what: "a request", found, expected });
        }
        let flags = take!(bytes, u16);
        let command = match take!(bytes, u16) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            other => Command::Other(other),
        };
        let cookie = take!(bytes, u64);
        let offset = take!(bytes, u64);
        let length = take!(bytes, u32);
        let _ = bytes;
        Ok(Self { flags, command, cookie, offset, length })
    }

    /// Bytes of data that follow.
    pub fn payload(&self) -> usize {
        if self.command == Command::Write { self.length as usize } else { 0 }
    }

    /// Whether the reply has to wait until it is durable.
    pub fn is_fua(&self) -> bool {
        self.flags & command_flag::FUA != 0
    }

    /// Whether it may be carried out.
    ///
    /// # Errors
    /// What to answer, and why.
    pub fn check(&self, terms: &Terms) -> Result<(), (Errno, &'static str)> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE};
        let allowed = match self.command {
            Command::Read if terms.structured => FUA | DF,
            Command::WriteZeroes => FUA | NO_HOLE | FAST_ZERO,
            Command::Disconnect => u16::MAX,
            Command::Read | Command::Write | Command::Flush | Command::Trim => FUA,
            Command::Other(_) => return Err((Errno::Invalid, "the command is not known, or was not offered")),
        };
        if self.flags & !allowed != 0 {
            return Err((Errno::Invalid, "the command does not go with these flags, or they were not offered"));
        }
        let writes = matches!(self.command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && terms.read_only {
            return Err((Errno::Perm, "the export is read-only"));
        }
        if matches!(self.command, Command::Flush | Command::Disconnect) {
            return Ok(());
        }
        if self.length == 0 {
            return Err((Errno::Invalid, "the length is zero"));
        }
        if matches!(self.command, Command::Read | Command::Write) && self.length > MAX_PAYLOAD {
            return Err((Errno::Invalid, "the length is more than 32 MiB"));
        }
        if self.offset.checked_add(self.length.into()).is_none_or(|end| end > terms.size) {
            let full = matches!(self.command, Command::Write | Command::WriteZeroes);
            return Err((
                if full { Errno::NoSpace } else { Errno::Invalid },
                "the request reaches beyond the end of the export",
            ));
        }
        Ok(())
    }
}

/// Bytes of a simple reply without its data.
pub const SIMPLE_LEN: usize = 16;

/// Writes a simple reply; the data of a read follow it.
pub fn encode_simple(into: &mut Vec<u8>, cookie: u64, error: u32) {
    let mut bytes = [0; SIMPLE_LEN];
    bytes[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    into.extend_from_slice(&bytes);
}

/// Bytes of the head of a chunk with the data of a read, its offset included.
pub const DATA_CHUNK_LEN: usize = 28;

/// Writes the head of the only chunk of a read that went well; `length` bytes of data follow it.
pub fn encode_data_chunk(into: &mut Vec<u8>, cookie: u64, offset: u64, length: u32) {
    let mut bytes = [0; DATA_CHUNK_LEN];
    bytes[..20].copy_from_slice(&chunk_head(cookie, chunk::OFFSET_DATA, length.saturating_add(8)));
    bytes[20..].copy_from_slice(&offset.to_be_bytes());
    into.extend_from_slice(&bytes);
}

/// Writes a chunk that says that a request failed, why, and for a read where.
pub fn encode_error_chunk(into: &mut Vec<u8>, cookie: u64, error: Errno, message: &str, offset: Option<u64>) {
    let end = (0..=message.len().min(MAX_MESSAGE)).rev().find(|end| message.is_char_boundary(*end));
    let message = message.get(..end.unwrap_or(0)).unwrap_or_default();
    let length = u16::try_from(message.len()).unwrap_or_default();
    let (kind, more) = if offset.is_some() { (chunk::ERROR_OFFSET, 8) } else { (chunk::ERROR, 0) };
    into.extend_from_slice(&chunk_head(cookie, kind, 6 + u32::from(length) + more));
    into.extend_from_slice(&(error as u32).to_be_bytes());
    into.extend_from_slice(&length.to_be_bytes());
    into.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        into.extend_from_slice(&offset.to_be_bytes());
    }
}

/// Writes the head of the last chunk of a reply.
fn chunk_head(cookie: u64, kind: u16, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&chunk::DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(flags: u16, command: u16, offset: u64, length: u32) -> Request {
        let mut bytes = Vec::new();
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        Request::decode(bytes.first_chunk().unwrap()).unwrap()
    }

    #[test]
    fn requests_are_checked_against_the_export() {
        let terms = Terms { size: 1 << 20, read_only: false, structured: true };
        let errno = |flags, command, offset, length| {
            request(flags, command, offset, length).check(&terms).err().map(|(errno, _)| errno)
        };
        assert_eq!(errno(0, 0, 0, 1 << 20), None);
        assert_eq!(errno(0, 0, 1, 1 << 20), Some(Errno::Invalid));
        assert_eq!(errno(0, 1, 1, 1 << 20), Some(Errno::NoSpace));
        assert_eq!(errno(0, 6, u64::MAX, 2), Some(Errno::NoSpace));
        assert_eq!(errno(0, 4, u64::MAX, 2), Some(Errno::Invalid));
        assert_eq!(errno(0, 0, 0, 0), Some(Errno::Invalid));
        assert_eq!(errno(0, 1, 0, MAX_PAYLOAD + 1), Some(Errno::Invalid));
        assert_eq!(errno(0, 3, 0, 0), None);
        assert_eq!(errno(0, 5, 0, 4096), Some(Errno::Invalid), "cache is not offered");
        assert_eq!(errno(command_flag::DF, 0, 0, 4096), None);
        assert_eq!(errno(command_flag::DF, 1, 0, 4096), Some(Errno::Invalid));
        assert_eq!(errno(1 << 5, 1, 0, 4096), Some(Errno::Invalid), "no such flag");
        let simple = Terms { structured: false, ..terms };
        assert!(request(command_flag::DF, 0, 0, 4096).check(&simple).is_err());
        let read_only = Terms { read_only: true, ..terms };
        for command in [1, 4, 6] {
            assert_eq!(request(0, command, 0, 4096).check(&read_only).unwrap_err().0, Errno::Perm);
        }
        assert!(request(0, 3, 0, 0).check(&read_only).is_ok());
    }

    #[test]
    fn names_and_lengths_of_options_are_checked() {
        let info = |name: &[u8], claimed: u32, count: u16, types: &[u8]| {
            [&claimed.to_be_bytes()[..], name, &count.to_be_bytes(), types].concat()
        };
        let good = info(b"disk", 4, 2, &[0, 3, 0, 1]);
        assert_eq!(InfoRequest::decode(&good).unwrap(), InfoRequest { name: "disk", wanted: vec![3, 1] });
        let bad = [
            vec![],
            info(b"disk", 5, 0, &[]),
            info(b"disk", u32::MAX, 0, &[]),
            info(b"disk", 4, 1, &[]),
            info(b"disk", 4, 0, &[0, 3]),
            info(b"disk", 4, 1, &[0]),
            info(b"\xff\xff", 2, 0, &[]),
            info(&[b'x'; 4097], 4097, 0, &[]),
        ];
        for data in bad {
            assert!(InfoRequest::decode(&data).is_err(), "{data:?}");
        }
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let mut bytes = Vec::new();
        encode_error_chunk(&mut bytes, 1, Errno::Io, &"ä".repeat(400), Some(4096));
        assert_eq!(bytes.len(), 20 + 6 + 512 + 8);
        bytes.clear();
        encode_error_chunk(&mut bytes, 1, Errno::Io, &format!("x{}", "ä".repeat(400)), None);
        assert_eq!(bytes.len(), 20 + 6 + 511);
    }
}

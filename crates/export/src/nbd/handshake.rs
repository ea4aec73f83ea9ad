//! The fixed newstyle handshake.
//!
//! ```text
//! server  NBDMAGIC IHAVEOPT flags
//! client  flags
//! client  option …            server  answers, the last of which is an acknowledgement or an error
//! …
//! client  NBD_OPT_GO          server  size and flags, acknowledgement: the transmission phase begins
//! ```
//!
//! Where TLS is forced, nothing but `NBD_OPT_STARTTLS` and `NBD_OPT_ABORT` is answered before it. What was agreed on before TLS is forgotten:
//! it came from whoever sits on the wire.

use std::io;

use super::{
    transport::Channel,
    wire::{
        FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, GREETING_MAGIC, InfoRequest, MAX_NAME, MAX_OPTION, MAX_PAYLOAD,
        OPTION_MAGIC, OptionHeader, WireError, answer, encode_answer, export_name, info, option,
    },
};

/// The most options of one handshake.
pub const MAX_OPTIONS: usize = 128;
/// The block size that is fastest, and below which blocks are read before they are written.
const PREFERRED: u32 = 4096;

/// What a server says of its export.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The name, beside the empty one, which always means this export.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What it can do ([`super::wire::transmission`]), where structured replies are agreed on.
    pub flags: u16,
    /// Whether nothing is said but under TLS.
    pub tls_required: bool,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Whether replies to reads are structured.
    pub structured: bool,
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke, or took too long.
    #[error("the handshake broke off: {0}")]
    Io(#[from] io::Error),
    /// The client does not speak NBD.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The client has flags that this server does not.
    #[error("the client sent the handshake flags {0:#x}, of which this server knows 0x1 and 0x2 only")]
    Flags(u32),
    /// Longer than [`MAX_OPTION`].
    #[error("option {option} has {length} bytes of data, more than {MAX_OPTION}")]
    OptionTooLong {
        /// Which.
        option: u32,
        /// How long.
        length: u32,
    },
    /// More than [`MAX_OPTIONS`].
    #[error("the client sent more than {MAX_OPTIONS} options and took no export")]
    TooManyOptions,
    /// `NBD_OPT_EXPORT_NAME` has no way to be refused but this.
    #[error("the client asked for the export {0:?} in the old way: {1}")]
    Refused(String, &'static str),
}

/// Carries the handshake out. `None` where the client ended it by its own wish.
///
/// # Errors
/// [`HandshakeError`]; the connection is to be closed.
pub fn negotiate<C: Channel>(channel: &mut C, offer: &Offer) -> Result<Option<Agreed>, HandshakeError> {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    greeting[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    send(channel, &greeting)?;
    let mut flags = [0; 4];
    channel.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(HandshakeError::Flags(flags));
    }
    let zeroes = flags & u32::from(FLAG_NO_ZEROES) == 0;
    let mut handshake = Handshake { channel, offer, zeroes, structured: false };
    for _ in 0..MAX_OPTIONS {
        match handshake.next()? {
            Step::Next => {}
            Step::Abort => return Ok(None),
            Step::Go => return Ok(Some(Agreed { structured: handshake.structured })),
        }
    }
    Err(HandshakeError::TooManyOptions)
}

/// Sends bytes at once.
fn send(channel: &mut impl Channel, bytes: &[u8]) -> io::Result<()> {
    channel.write_all(bytes)?;
    channel.flush()
}

struct Handshake<'a, C> {
    channel: &'a mut C,
    offer: &'a Offer,
    /// Whether 124 zeroes follow the answer to `NBD_OPT_EXPORT_NAME`.
    zeroes: bool,
    structured: bool,
}

/// Where the handshake goes after an option.
enum Step {
    Next,
    Abort,
    Go,
}

impl<C: Channel> Handshake<'_, C> {
    /// One option.
    fn next(&mut self) -> Result<Step, HandshakeError> {
        let mut header = [0; OptionHeader::LEN];
        self.channel.read_exact(&mut header)?;
        let OptionHeader { option, length } = OptionHeader::decode(&header)?;
        if length > MAX_OPTION {
            self.answer(option, answer::TOO_BIG, b"options have at most 64 KiB of data")?;
            return Err(HandshakeError::OptionTooLong { option, length });
        }
        let mut data = vec![0; length as usize];
        self.channel.read_exact(&mut data)?;
        let locked = self.offer.tls_required && !self.channel.is_tls();
        match option {
            option::ABORT => {
                // The client may have gone already.
                let _ = self.answer(option, answer::ACK, b"");
                return Ok(Step::Abort);
            }
            option::STARTTLS => self.start_tls(&data)?,
            option::EXPORT_NAME => return self.export_name(&data, locked),
            _ if locked => self.answer(option, answer::TLS_REQUIRED, b"this server speaks TLS only")?,
            option::LIST => self.list(&data)?,
            option::INFO | option::GO => return self.info(option, &data),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.answer(option, answer::ACK, b"")?;
            }
            option::STRUCTURED_REPLY => self.answer(option, answer::INVALID, b"this option has no data")?,
            // A store does not say which of its blocks are allocated, so there is no base:allocation either.
            _ => self.answer(option, answer::UNSUPPORTED, b"this server does not know that option")?,
        }
        Ok(Step::Next)
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        send(self.channel, &encode_answer(option, kind, data))
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let option = option::STARTTLS;
        if !data.is_empty() {
            self.answer(option, answer::INVALID, b"this option has no data")?;
        } else if self.channel.is_tls() {
            self.answer(option, answer::INVALID, b"this is under TLS already")?;
        } else if !self.channel.has_tls() {
            self.answer(option, answer::POLICY, b"this server has no certificate")?;
        } else {
            self.answer(option, answer::ACK, b"")?;
            self.channel.start_tls()?;
            self.structured = false;
        }
        Ok(())
    }

    fn list(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        if !data.is_empty() {
            return Ok(self.answer(option::LIST, answer::INVALID, b"this option has no data")?);
        }
        let name = self.offer.name.as_bytes();
        let length = u32::try_from(name.len()).unwrap_or_default().to_be_bytes();
        self.answer(option::LIST, answer::SERVER, &[&length, name].concat())?;
        Ok(self.answer(option::LIST, answer::ACK, b"")?)
    }

    fn is_ours(&self, name: &str) -> bool {
        name.is_empty() || name == self.offer.name
    }

    /// The flags for this client.
    fn flags(&self) -> u16 {
        use super::wire::transmission::SEND_DF;
        if self.structured { self.offer.flags } else { self.offer.flags & !SEND_DF }
    }

    fn export_name(&mut self, data: &[u8], locked: bool) -> Result<Step, HandshakeError> {
        let name = export_name(data)?;
        let refuse = |why| Err(HandshakeError::Refused(name.to_owned(), why));
        if locked {
            return refuse("TLS is required");
        }
        if !self.is_ours(name) {
            return refuse("there is no export of that name");
        }
        let mut reply = self.offer.size.to_be_bytes().to_vec();
        reply.extend(self.flags().to_be_bytes());
        if self.zeroes {
            reply.extend([0; 124]);
        }
        send(self.channel, &reply)?;
        Ok(Step::Go)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Step, HandshakeError> {
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(error) => {
                self.answer(option, answer::INVALID, error.to_string().as_bytes())?;
                return Ok(Step::Next);
            }
        };
        if !self.is_ours(request.name) {
            self.answer(option, answer::UNKNOWN, b"there is no export of that name")?;
            return Ok(Step::Next);
        }
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(self.offer.size.to_be_bytes());
        export.extend(self.flags().to_be_bytes());
        let mut answers = encode_answer(option, answer::INFO, &export);
        if request.wanted.contains(&info::NAME) {
            let name = [&info::NAME.to_be_bytes(), self.offer.name.as_bytes()].concat();
            answers.extend(encode_answer(option, answer::INFO, &name));
        }
        if request.wanted.contains(&info::BLOCK_SIZE) {
            let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [1, PREFERRED, MAX_PAYLOAD] {
                sizes.extend(size.to_be_bytes());
            }
            answers.extend(encode_answer(option, answer::INFO, &sizes));
        }
        answers.extend(encode_answer(option, answer::ACK, b""));
        send(self.channel, &answers)?;
        Ok(if option == option::GO { Step::Go } else { Step::Next })
    }
}

/// Whether a server may call its export that.
pub(super) fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
}

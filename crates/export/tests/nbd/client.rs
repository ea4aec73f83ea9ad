//! A client that says whatever it is told to.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use nacre_export::nbd::wire::{self, answer, option};

/// A connection by hand.
pub(crate) struct Client(pub(crate) UnixStream);

/// A reply: its error, and its data or text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) kind: u16,
    pub(crate) error: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

impl Client {
    /// Connected, and nothing said.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(stream)
    }

    /// Greeted.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut client = Self::connect(socket);
        let greeting = client.take::<18>();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&3_u32.to_be_bytes());
        client
    }

    /// In the transmission phase.
    pub(crate) fn open(socket: &Path, structured: bool) -> Self {
        let mut client = Self::greeted(socket);
        if structured {
            client.option(option::STRUCTURED_REPLY, b"");
            assert_eq!(client.answer(option::STRUCTURED_REPLY).0, answer::ACK);
        }
        client.option(option::GO, &info(b"", &[]));
        assert_eq!(client.answer(option::GO).0, answer::INFO);
        assert_eq!(client.answer(option::GO).0, answer::ACK);
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take_some(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has closed the connection, without another byte.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        self.send(&option_bytes(option, data));
    }

    /// The next answer, which is to that option: its type and its data.
    pub(crate) fn answer(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.take::<8>(), wire::ANSWER_MAGIC.to_be_bytes());
        assert_eq!(u32::from_be_bytes(self.take()), option);
        let kind = u32::from_be_bytes(self.take());
        let length = u32::from_be_bytes(self.take());
        (kind, self.take_some(length as usize))
    }

    pub(crate) fn request(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        let mut bytes = request(flags, command, cookie, offset, length);
        bytes.extend(data);
        self.send(&bytes);
    }

    /// A simple reply with as much data.
    pub(crate) fn simple(&mut self, length: usize) -> Reply {
        assert_eq!(self.take::<4>(), wire::SIMPLE_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(self.take());
        let cookie = u64::from_be_bytes(self.take());
        let data = self.take_some(if error == 0 { length } else { 0 });
        Reply { cookie, kind: 0, error, offset: None, data }
    }

    /// A reply where structured ones were agreed on, simple or of one chunk.
    pub(crate) fn reply(&mut self) -> Reply {
        let magic = u32::from_be_bytes(self.take());
        if magic == wire::SIMPLE_MAGIC {
            let error = u32::from_be_bytes(self.take());
            return Reply { cookie: u64::from_be_bytes(self.take()), kind: 0, error, offset: None, data: Vec::new() };
        }
        assert_eq!(magic, wire::CHUNK_MAGIC);
        assert_eq!(u16::from_be_bytes(self.take()), wire::chunk::DONE);
        let kind = u16::from_be_bytes(self.take());
        let cookie = u64::from_be_bytes(self.take());
        let length = u32::from_be_bytes(self.take()) as usize;
        let data = self.take_some(length);
        let number = |bytes: &[u8]| u64::from_be_bytes(*bytes.first_chunk().unwrap());
        match kind {
            wire::chunk::OFFSET_DATA => {
                Reply { cookie, kind, error: 0, offset: Some(number(&data)), data: data[8..].to_vec() }
            }
            wire::chunk::ERROR | wire::chunk::ERROR_OFFSET => {
                let error = u32::from_be_bytes(*data.first_chunk().unwrap());
                let text = usize::from(u16::from_be_bytes([data[4], data[5]]));
                let offset = (kind == wire::chunk::ERROR_OFFSET).then(|| number(&data[6 + text..]));
                assert_eq!(data.len(), 6 + text + if offset.is_some() { 8 } else { 0 });
                Reply { cookie, kind, error, offset, data: data[6..6 + text].to_vec() }
            }
            other => panic!("a chunk of type {other}"),
        }
    }

    /// Does one thing; its reply.
    pub(crate) fn does(&mut self, flags: u16, command: u16, offset: u64, length: u32, data: &[u8]) -> Reply {
        self.request(flags, command, 42, offset, length, data);
        let reply = self.reply();
        assert_eq!(reply.cookie, 42);
        reply
    }

    /// Does one thing; its error.
    pub(crate) fn tries(&mut self, flags: u16, command: u16, offset: u64, length: u32, data: &[u8]) -> u32 {
        self.does(flags, command, offset, length, data).error
    }
}

/// The data of `NBD_OPT_GO`.
pub(crate) fn info(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name);
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|wanted| wanted.to_be_bytes()));
    data
}

/// An option as it goes over the wire.
pub(crate) fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A request as it goes over the wire.
pub(crate) fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

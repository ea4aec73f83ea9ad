//! What an NBD server reads: a whole handshake, and requests.

use std::io::{self, Read, Write};

use nacre_export::nbd::{
    Channel,
    handshake::{Offer, negotiate},
    wire::{InfoRequest, OPTION_MAGIC, REQUEST_MAGIC, Request, Terms, encode_error_chunk, option},
};

/// A client that has said everything already. Under TLS, it goes on with what is left.
struct Scripted<'a> {
    bytes: &'a [u8],
    tls: bool,
}

impl Read for Scripted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(buffer)
    }
}

impl Write for Scripted<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Scripted<'_> {
    fn is_tls(&self) -> bool {
        self.tls
    }

    fn has_tls(&self) -> bool {
        true
    }

    fn start_tls(&mut self) -> io::Result<()> {
        self.tls = true;
        Ok(())
    }
}

/// A handshake; the first byte says whether TLS is forced. Where it is, nothing is agreed on without it.
pub(crate) fn options(bytes: &[u8]) {
    let _ = InfoRequest::decode(bytes);
    let Some((first, bytes)) = bytes.split_first() else { return };
    let tls_required = first & 1 == 1;
    let offer = Offer { name: "disk".to_owned(), size: 1 << 30, flags: 0xffff, tls_required };
    let mut client = Scripted { bytes, tls: false };
    if let Ok(Some(_)) = negotiate(&mut client, &offer) {
        assert!(client.tls || !tls_required, "an export was given away without TLS");
    }
}

pub(crate) fn handshakes() -> Vec<Vec<u8>> {
    let one = |number: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap_or_default();
        [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
    };
    let go = one(option::GO, b"\0\0\0\x04disk\0\x02\0\x03\0\x01");
    let start = |tls: u8| [&[tls][..], &3_u32.to_be_bytes()].concat();
    let all: Vec<u8> = (0..12).flat_map(|number| one(number, b"")).collect();
    vec![
        [start(0), one(option::STRUCTURED_REPLY, b""), go.clone()].concat(),
        [start(1), one(option::STARTTLS, b""), one(option::LIST, b""), go.clone()].concat(),
        [start(1), go, one(option::EXPORT_NAME, b"disk")].concat(),
        [start(0), one(option::EXPORT_NAME, b"disk")].concat(),
        [start(0), all].concat(),
        [start(0), one(option::GO, b"\xff\xff\xff\xffdisk\0\x02")].concat(),
    ]
}

/// Requests one after the other. What passes the check lies inside of the export.
pub(crate) fn requests(bytes: &[u8]) {
    for bytes in bytes.chunks(Request::LEN) {
        let Some(Ok(request)) = bytes.first_chunk().map(Request::decode) else { continue };
        for (read_only, structured) in [(false, false), (false, true), (true, true)] {
            let terms = Terms { size: 1 << 30, read_only, structured };
            match request.check(&terms) {
                Ok(()) => assert!(
                    request.payload() == 0 || request.offset + u64::from(request.length) <= terms.size && !read_only,
                    "a write beyond the end, or to what is read-only"
                ),
                Err((errno, why)) => {
                    let mut reply = Vec::new();
                    encode_error_chunk(&mut reply, request.cookie, errno, why, Some(request.offset));
                }
            }
        }
    }
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let one = |flags: u16, command: u16, offset: u64, length: u32| {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(1_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    };
    let all: Vec<u8> = (0..9).flat_map(|command| one(0, command, 4096, 4096)).collect();
    vec![all, one(1, 1, (1 << 30) - 4096, 8192), one(0, 0, u64::MAX, u32::MAX), one(0x12, 6, 0, 1 << 30), vec![0; 28]]
}

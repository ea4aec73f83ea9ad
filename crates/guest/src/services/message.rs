//! Protobuf messages whose fields are strings and bytes: all that these services exchange, so no generated code is needed.

use protobuf::{CodedInputStream, CodedOutputStream};

/// The most fields of one message.
const FIELD_LIMIT: usize = 64;

/// A decoded message: its length-delimited fields by number; of repeated ones the last, as protobuf wants it.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<(u32, Vec<u8>)>);

impl Message {
    /// Decodes a message. Fields of other kinds are passed over, since newer clients may send some.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut stream = CodedInputStream::from_bytes(bytes);
        let mut fields = Vec::new();
        let bad = |error: protobuf::Error| format!("not a protobuf message: {error}");
        while let Some(tag) = stream.read_raw_tag_or_eof().map_err(bad)? {
            if fields.len() >= FIELD_LIMIT {
                return Err(format!("more than {FIELD_LIMIT} fields"));
            }
            let (number, wire_type) = (tag >> 3, tag & 7);
            match protobuf::rt::WireType::new(wire_type) {
                Some(protobuf::rt::WireType::LengthDelimited) => {
                    fields.push((number, stream.read_bytes().map_err(bad)?));
                }
                Some(other) => stream.skip_field(other).map_err(bad)?,
                None => return Err(format!("not a protobuf message: wire type {wire_type}")),
            }
        }
        Ok(Self(fields))
    }

    /// A bytes field; empty where it is absent.
    pub(super) fn bytes(&self, number: u32) -> &[u8] {
        self.0.iter().rev().find(|(found, _)| *found == number).map(|(_, bytes)| bytes.as_slice()).unwrap_or_default()
    }

    /// A string field; empty where it is absent.
    pub(super) fn string(&self, number: u32) -> Result<&str, String> {
        std::str::from_utf8(self.bytes(number)).map_err(|_| format!("field {number} is not UTF-8"))
    }
}

/// Encodes a message of one string or bytes field, number 1.
pub(super) fn encode(field: &[u8]) -> Vec<u8> {
    encode_all(&[field])
}

/// Encodes a message of string or bytes fields, numbered from 1.
pub(super) fn encode_all(fields: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(fields.iter().map(|field| field.len() + 8).sum());
    let mut stream = CodedOutputStream::vec(&mut out);
    let written = (1..).zip(fields).try_for_each(|(number, field)| stream.write_bytes(number, field));
    let written = written.and_then(|()| stream.flush());
    drop(stream);
    debug_assert!(written.is_ok(), "writing to a vector does not fail");
    out
}

/// What a fuzzer feeds.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        let _ = (message.string(1), message.string(2), message.bytes(3));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back() {
        assert_eq!(Message::decode(&encode(b"image")).unwrap().string(1).unwrap(), "image");
        // Field 2 is a varint, field 1 comes twice.
        let message = Message::decode(&[0x10, 0x05, 0x0a, 1, b'a', 0x0a, 1, b'b']).unwrap();
        assert_eq!((message.string(1).unwrap(), message.string(2).unwrap()), ("b", ""));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let many: Vec<u8> = [0x0a, 0].repeat(FIELD_LIMIT + 1);
        for bad in [&[0x0a][..], &[0x0a, 5, b'a'], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f], &[0x0f], &[0x00], &many] {
            assert!(Message::decode(bad).is_err(), "{bad:?}");
        }
        assert!(Message::decode(&[0x0a, 1, 0xff]).unwrap().string(1).is_err());
    }
}

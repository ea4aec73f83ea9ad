//! The one protobuf shape that this protocol needs: a message with a `bytes` field of number 1.

use std::ops::Range;

/// Writes a field of wire type 2 (string, bytes, message).
pub(super) fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Writes a field of wire type 0.
pub(super) fn put_number(out: &mut Vec<u8>, field: u8, number: u64) {
    out.push(field << 3);
    put_varint(out, number);
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let [low, ..] = number.to_le_bytes();
        number >>= 7;
        if number == 0 {
            return out.push(low & 0x7f);
        }
        out.push(low | 0x80);
    }
}

/// A field of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Wire types 0, 1 and 5.
    Number(u64),
    /// Wire type 2: where its bytes are.
    Bytes(Range<usize>),
}

/// Reads all fields of a message; `None` when it is malformed.
pub(super) fn fields(message: &[u8]) -> Option<Vec<(u64, Value)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < message.len() {
        let key = take_varint(message, &mut at)?;
        let value = match key & 7 {
            0 => Value::Number(take_varint(message, &mut at)?),
            2 => {
                let length = usize::try_from(take_varint(message, &mut at)?).ok()?;
                let end = at.checked_add(length).filter(|end| *end <= message.len())?;
                let range = at..end;
                at = end;
                Value::Bytes(range)
            }
            kind @ (1 | 5) => {
                let length = if kind == 1 { 8 } else { 4 };
                let bytes = message.get(at..at.checked_add(length)?)?;
                at += length;
                Value::Number(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
            }
            _ => return None,
        };
        // Messages of this protocol have a handful of fields.
        if key >> 3 == 0 || found.len() >= 64 {
            return None;
        }
        found.push((key >> 3, value));
    }
    Some(found)
}

fn take_varint(message: &[u8], at: &mut usize) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *message.get(*at)?;
        *at += 1;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The last `bytes` field of number 1, as protobuf says; an absent one is empty. `None` when the message is malformed.
pub fn decode_field_1(message: &[u8]) -> Option<&[u8]> {
    let mut found: &[u8] = &[];
    for (number, value) in fields(message)? {
        if let (1, Value::Bytes(range)) = (number, value) {
            found = message.get(range)?;
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for length in [0, 1, 127, 128, 300, 70_000] {
            let bytes = vec![7; length];
            let mut message = Vec::new();
            put_number(&mut message, 2, u64::MAX);
            put_bytes(&mut message, 1, &bytes);
            assert_eq!(decode_field_1(&message).unwrap(), bytes);
            assert_eq!(fields(&message).unwrap()[0], (2, Value::Number(u64::MAX)));
        }
        assert_eq!(decode_field_1(b"").unwrap(), b"");
    }

    #[test]
    fn malformed_messages_are_refused() {
        for bad in [
            &b"\x0a"[..],
            b"\x0a\x05abcd",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0b",
            b"\x0f",
            b"\x02\x00",
            b"\x09\x00\x00",
            b"\x80",
            &[0x08, 0].repeat(65),
        ] {
            assert_eq!(fields(bad), None, "{bad:?}");
        }
    }
}

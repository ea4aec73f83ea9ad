//! The 512-byte header block: V7, ustar, GNU and star fields, as archive/tar of Go reads them, since the engines that images are
//! made for are written with it. Offsets are those of POSIX.1-2017 pax(1), "ustar Interchange Format".

use super::{Kind, TarError, Timestamp};

/// Bytes of a block.
pub(crate) const BLOCK: usize = 512;

/// Pieces of a sparse file: offset and length of each.
type Pieces = Vec<(u64, u64)>;

/// A header block whose checksum holds.
pub(crate) struct Header<'a>(&'a [u8; BLOCK]);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'a> Header<'a> {
    /// Checks the checksum: the sum of all bytes, its own field taken as spaces; some old writers summed signed bytes.
    pub(crate) fn new(block: &'a [u8; BLOCK]) -> Result<Self, TarError> {
        let this = Self(block);
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (at, &byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        let stored = number("checksum", this.field::<148, 8>())?;
        if stored == unsigned || stored == signed {
            Ok(this)
        } else {
            Err(TarError::Checksum { stored, computed: unsigned })
        }
    }

    fn field<const AT: usize, const LEN: usize>(&self) -> &'a [u8] {
        self.0.get(AT..AT + LEN).unwrap_or_default()
    }

    pub(crate) fn format(&self) -> Format {
        match (self.field::<257, 6>(), self.field::<263, 2>()) {
            (b"ustar\0", _) if self.field::<508, 4>() == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        }
    }

    pub(crate) fn type_flag(&self) -> u8 {
        self.field::<156, 1>().first().copied().unwrap_or_default()
    }

    /// The name, with the prefix that ustar keeps apart.
    pub(crate) fn name(&self) -> Vec<u8> {
        let name = text(self.field::<0, 100>());
        let prefix = match self.format() {
            Format::Ustar => text(self.field::<345, 155>()),
            Format::Star => text(self.field::<345, 131>()),
            Format::V7 | Format::Gnu => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(crate) fn link(&self) -> &'a [u8] {
        text(self.field::<157, 100>())
    }

    pub(crate) fn mode(&self) -> Result<i64, TarError> {
        number("mode", self.field::<100, 8>())
    }

    pub(crate) fn uid(&self) -> Result<i64, TarError> {
        number("uid", self.field::<108, 8>())
    }

    pub(crate) fn gid(&self) -> Result<i64, TarError> {
        number("gid", self.field::<116, 8>())
    }

    pub(crate) fn size(&self) -> Result<u64, TarError> {
        let size = number("size", self.field::<124, 12>())?;
        u64::try_from(size).map_err(|_| TarError::field("size", "is negative"))
    }

    pub(crate) fn mtime(&self) -> Result<Timestamp, TarError> {
        Ok(Timestamp { seconds: number("mtime", self.field::<136, 12>())?, nanoseconds: 0 })
    }

    pub(crate) fn device(&self) -> Result<(i64, i64), TarError> {
        if self.format() == Format::V7 {
            return Ok((0, 0));
        }
        Ok((number("devmajor", self.field::<329, 8>())?, number("devminor", self.field::<337, 8>())?))
    }

    /// Old GNU sparse: the real size, the first four pieces, and whether more follow.
    pub(crate) fn old_sparse(&self) -> Result<(u64, Pieces, bool), TarError> {
        let real = number("sparse real size", self.field::<483, 12>())?;
        let real = u64::try_from(real).map_err(|_| TarError::field("sparse real size", "is negative"))?;
        Ok((real, sparse_pairs(self.field::<386, 96>())?, self.field::<482, 1>() != b"\0"))
    }
}

/// An extension block of the old GNU sparse format: 21 pieces, and whether more follow.
pub(crate) fn sparse_extension(block: &[u8; BLOCK]) -> Result<(Pieces, bool), TarError> {
    let (pairs, rest) = block.split_at(504);
    Ok((sparse_pairs(pairs)?, rest.first() != Some(&0)))
}

fn sparse_pairs(bytes: &[u8]) -> Result<Pieces, TarError> {
    let mut pairs = Vec::new();
    for pair in bytes.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if offset.first() == Some(&0) {
            break;
        }
        let positive = |field: &[u8]| {
            u64::try_from(number("sparse map", field)?)
                .map_err(|_| TarError::field("sparse map", "has a negative number"))
        };
        pairs.push((positive(offset)?, positive(length)?));
    }
    Ok(pairs)
}

/// What a type flag means for an entry that is not one of the extended headers.
pub(crate) fn kind(flag: u8) -> Option<Kind> {
    Some(match flag {
        b'0' | 0 | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::Char,
        b'4' => Kind::Block,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        _ => return None,
    })
}

/// A NUL-terminated text, or one that fills its field.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Octal digits between spaces and NULs, or, where the top bit is set, a big-endian two's complement number.
fn number(name: &'static str, field: &[u8]) -> Result<i64, TarError> {
    let bad = |problem| TarError::field(name, problem);
    let Some((&first, rest)) = field.split_first() else { return Ok(0) };
    if first & 0x80 != 0 {
        // The flag bit is not part of the number; the bit below it is the sign.
        let start = if first & 0x40 != 0 { i128::from(first) - 256 } else { i128::from(first & 0x7f) };
        let mut value = start;
        for &byte in rest {
            value = value.checked_mul(256).ok_or_else(|| bad("is out of range"))? + i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| bad("is out of range"));
    }
    let padding = field.iter().take_while(|byte| matches!(byte, b' ' | 0)).count();
    let digits = text(field.get(padding..).unwrap_or_default()).trim_ascii_end();
    let mut value = 0i64;
    for &digit in digits {
        if !(b'0'..=b'7').contains(&digit) {
            return Err(bad("is not an octal number"));
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or_else(|| bad("is out of range"))?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"  644 \0\0", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"77777777", 0o77_777_777),
            (&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], 256),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], -1),
            (&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], i64::MAX),
            (&[0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], i64::MIN),
        ] {
            assert_eq!(number("n", field).unwrap(), value, "{field:?}");
        }
        for bad in [
            &b"0000648\0"[..],
            b"-1\0\0\0\0\0\0",
            b"6 4\0\0\0\0\0",
            b"0x1\0\0\0\0\0",
            &[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0xff, 0xff, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(number("n", bad).is_err(), "{bad:?}");
        }
    }
}

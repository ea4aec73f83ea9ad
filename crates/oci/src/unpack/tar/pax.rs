//! PAX extended headers (POSIX.1-2017 pax(1)): records `<length> <key>=<value>\n` that override fields of the header they precede.
//!
//! Read as Go's archive/tar does: the last record of a key wins, an empty value leaves the header's field as it is, `hdrcharset` is
//! not interpreted (names are bytes). An extended attribute comes as `SCHILY.xattr.<name>` with the raw value, or, from libarchive, as
//! `LIBARCHIVE.xattr.<percent-encoded name>` with a base64 value; the first form wins, and an empty value of it is an empty attribute.

use base64::Engine as _;

use super::{TarError, Timestamp, sparse};
use crate::unpack::limits::{Limits, check};

/// What the extended header of one entry says.
#[derive(Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<i64>,
    pub(crate) gid: Option<i64>,
    pub(crate) mtime: Option<Timestamp>,
    pub(crate) atime: Option<Timestamp>,
    pub(crate) device: (Option<i64>, Option<i64>),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    archive_xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) sparse: sparse::PaxSparse,
}

impl Pax {
    /// Parses the payload of an `x` header.
    pub(crate) fn parse(payload: &[u8], limits: &Limits) -> Result<Self, TarError> {
        let mut pax = Self::default();
        let mut rest = payload;
        while !rest.is_empty() {
            let (key, value) = record(&mut rest)?;
            pax.apply(key, value, limits)?;
        }
        for (name, value) in std::mem::take(&mut pax.archive_xattrs) {
            if !pax.xattrs.iter().any(|(known, _)| *known == name) {
                pax.xattrs.push((name, value));
            }
        }
        check("xattrs", pax.xattrs.len() as u64, limits.xattrs)?;
        Ok(pax)
    }

    fn apply(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Result<(), TarError> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            return set_xattr(&mut self.xattrs, name.to_vec(), value.to_vec(), limits);
        }
        if value.is_empty() {
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let value = base64::engine::general_purpose::STANDARD_NO_PAD
                .decode(value.trim_ascii_end().split(|&byte| byte == b'=').next().unwrap_or_default())
                .map_err(|_| TarError::Pax("LIBARCHIVE.xattr is not base64"))?;
            return set_xattr(&mut self.archive_xattrs, percent_decoded(name)?, value, limits);
        }
        match key {
            b"path" => self.path = Some(name("name_bytes", value, limits.name_bytes)?),
            b"linkpath" => self.link = Some(name("link_bytes", value, limits.link_bytes)?),
            b"size" => self.size = Some(unsigned(value)?),
            b"uid" => self.uid = Some(signed(value)?),
            b"gid" => self.gid = Some(signed(value)?),
            b"mtime" => self.mtime = Some(timestamp(value)?),
            b"atime" => self.atime = Some(timestamp(value)?),
            b"SCHILY.devmajor" => self.device.0 = Some(signed(value)?),
            b"SCHILY.devminor" => self.device.1 = Some(signed(value)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.apply(key, value, limits)?;
                }
            }
        }
        Ok(())
    }
}

/// Takes the first record off the front: key and value.
fn record<'a>(bytes: &mut &'a [u8]) -> Result<(&'a [u8], &'a [u8]), TarError> {
    let bad = TarError::Pax;
    let space = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or(bad("record has no length"))?;
    let digits = bytes.get(..space).unwrap_or_default();
    let length = usize::try_from(unsigned(digits)?).map_err(|_| bad("record is longer than its header"))?;
    if length > bytes.len() || length <= space + 1 {
        return Err(bad("record length is out of range"));
    }
    let (record, after) = bytes.split_at(length);
    *bytes = after;
    let body = record.get(space + 1..).and_then(|body| body.strip_suffix(b"\n")).ok_or(bad("record has no newline"))?;
    let equals = body.iter().position(|&byte| byte == b'=').ok_or(bad("record has no '='"))?;
    let (key, value) = body.split_at(equals);
    if key.is_empty() || key.contains(&0) {
        return Err(bad("record has no key"));
    }
    Ok((key, value.get(1..).unwrap_or_default()))
}

fn name(limit: &'static str, value: &[u8], allowed: u64) -> Result<Vec<u8>, TarError> {
    check(limit, value.len() as u64, allowed)?;
    if value.contains(&0) {
        return Err(TarError::Pax("name contains NUL"));
    }
    Ok(value.to_vec())
}

fn set_xattr(
    xattrs: &mut Vec<(Vec<u8>, Vec<u8>)>,
    name: Vec<u8>,
    value: Vec<u8>,
    limits: &Limits,
) -> Result<(), TarError> {
    check("xattr_bytes", value.len() as u64, limits.xattr_bytes)?;
    if name.is_empty() || name.len() > 255 || name.contains(&0) {
        return Err(TarError::Pax("extended attribute's name is empty, longer than 255 bytes, or contains NUL"));
    }
    if let Some(known) = xattrs.iter_mut().find(|(known, _)| *known == name) {
        known.1 = value;
    } else {
        check("xattrs", xattrs.len() as u64 + 1, limits.xattrs)?;
        xattrs.push((name, value));
    }
    Ok(())
}

fn percent_decoded(name: &[u8]) -> Result<Vec<u8>, TarError> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let Some(([high, low], after)) = rest.split_first_chunk::<2>() else {
            return Err(TarError::Pax("LIBARCHIVE.xattr name is badly encoded"));
        };
        let (Some(high), Some(low)) = (digit(*high), digit(*low)) else {
            return Err(TarError::Pax("LIBARCHIVE.xattr name is badly encoded"));
        };
        out.push(high << 4 | low);
        rest = after;
    }
    Ok(out)
}

/// A decimal number without sign.
pub(crate) fn unsigned(text: &[u8]) -> Result<u64, TarError> {
    let bad = TarError::Pax("value is not a decimal number in range");
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(bad);
    }
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(bad)
}

fn signed(text: &[u8]) -> Result<i64, TarError> {
    let (negative, digits) = text.strip_prefix(b"-").map_or((false, text), |digits| (true, digits));
    let value =
        i64::try_from(unsigned(digits)?).map_err(|_| TarError::Pax("value is not a decimal number in range"))?;
    Ok(if negative { -value } else { value })
}

/// `[-]seconds[.fraction]`; what is below a nanosecond is cut off.
fn timestamp(text: &[u8]) -> Result<Timestamp, TarError> {
    let (negative, digits) = text.strip_prefix(b"-").map_or((false, text), |digits| (true, digits));
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let bad = |_| TarError::Pax("value is not a decimal number in range");
    let seconds = i64::try_from(unsigned(parts.next().unwrap_or_default())?).map_err(bad)?;
    let mut nanoseconds = 0u32;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return Err(TarError::Pax("time is not a decimal number"));
        }
        for at in 0..9 {
            nanoseconds = nanoseconds * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0'));
        }
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds },
        // Nanoseconds count forward from the second before.
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Pax, TarError> {
        Pax::parse(bytes, &Limits::default())
    }

    #[test]
    fn times_may_be_negative_and_fractional() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1700000000.123456789999", 1_700_000_000, 123_456_789),
            ("-1.5", -2, 500_000_000),
            ("-0.000000001", -1, 999_999_999),
            ("-7", -7, 0),
            ("5.", 5, 0),
        ] {
            assert_eq!(timestamp(text.as_bytes()).unwrap(), Timestamp { seconds, nanoseconds }, "{text}");
        }
        for bad in ["", "-", ".5", "1.x", "1e3", "--1", "99999999999999999999", "1.-5"] {
            assert!(timestamp(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn attributes_of_both_spellings() {
        let pax = parse(
            b"25 SCHILY.xattr.user.a=1\n\
              32 LIBARCHIVE.xattr.user.a=Mg==\n\
              32 LIBARCHIVE.xattr.user.%62=Mw\n"
                .as_slice(),
        );
        let pax = match pax {
            Ok(pax) => pax,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(pax.xattrs, [(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), b"3".to_vec())]);
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"7 a=b\n",
            b"6 ab\n\n",
            b"0 a=b\n",
            b"3 \n",
            b"99999999999999999999 a=b\n",
            b"6 =bc\n",
            b"-6 a=b\n",
            b"12 path=a\0b\n",
            b"10 size=-1\n",
            b"9 uid=x1\n",
            b"29 GNU.sparse.map=1,2,3,4,a\n",
            b"22 SCHILY.xattr.=abc1\n",
        ] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}

//! Names of entries: from bytes of the tar to components that can be opened one by one.

use super::{Limits, UnpackError, limits::check};

/// What a whiteout's name begins with.
const WHITEOUT: &[u8] = b".wh.";

/// Splits a name into components, dropping empty ones and `.`; a leading slash means the root of the layer, as to every engine.
///
/// # Errors
/// [`UnpackError`]: a `..`, or too many components
pub fn components<'a>(path: &'a [u8], limits: &Limits) -> Result<Vec<&'a [u8]>, UnpackError> {
    let parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err(UnpackError::refused(path, "its name has a '..' component"));
    }
    check("depth", parts.len() as u64, limits.depth)
        .map_err(|source| UnpackError::Limit { path: shown(path), source })?;
    Ok(parts)
}

/// What an entry's last component means.
pub enum Meaning<'a> {
    /// The entry itself.
    Plain,
    /// `.wh.<name>`: the name is gone.
    Whiteout(&'a [u8]),
    /// `.wh..wh..opq`: the parent hides what is below it.
    Opaque,
    /// `.wh..wh.*`: bookkeeping of AUFS.
    Ignored,
}

/// Reads the whiteout names of the image specification (layer.md, "Whiteouts").
///
/// # Errors
/// [`UnpackError`]: something below a whiteout, or a whiteout of nothing
pub fn meaning<'a>(path: &[u8], parts: &[&'a [u8]]) -> Result<Meaning<'a>, UnpackError> {
    let Some((last, parents)) = parts.split_last() else { return Ok(Meaning::Plain) };
    for parent in parents {
        if parent.starts_with(b".wh..wh.") {
            return Ok(Meaning::Ignored);
        }
        if parent.starts_with(WHITEOUT) {
            return Err(UnpackError::refused(path, "it is below a whiteout"));
        }
    }
    match last.strip_prefix(WHITEOUT) {
        None => Ok(Meaning::Plain),
        Some(b".wh..opq") => Ok(Meaning::Opaque),
        Some(name) if name.starts_with(WHITEOUT) => Ok(Meaning::Ignored),
        Some(b"" | b"." | b"..") => Err(UnpackError::refused(path, "it is a whiteout of nothing")),
        Some(name) => Ok(Meaning::Whiteout(name)),
    }
}

/// A name for messages: as text, and not too long.
pub fn shown(path: &[u8]) -> String {
    const LONGEST: usize = 200;
    let text = String::from_utf8_lossy(path);
    let mut shown: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

/// Names are bytes: in records they are percent-encoded where they are not printable ASCII.
pub(crate) mod as_text {
    use std::fmt::Write as _;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(bytes.len());
        for &byte in bytes {
            if byte.is_ascii_graphic() && byte != b'%' {
                text.push(char::from(byte));
            } else {
                let _ = write!(text, "%{byte:02x}");
            }
        }
        serializer.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || D::Error::custom("a name is badly encoded");
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&byte, after)) = rest.split_first() {
            rest = after;
            if byte != b'%' {
                bytes.push(byte);
                continue;
            }
            let (digits, after) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
            rest = after;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_components_below_the_root() {
        let limits = Limits { depth: 3, ..Limits::default() };
        for (path, expected) in [
            (&b"./a//b/./c/"[..], vec![&b"a"[..], b"b", b"c"]),
            (b"/etc/passwd", vec![b"etc", b"passwd"]),
            (b"./", vec![]),
            (b"...", vec![b"..."]),
        ] {
            assert_eq!(components(path, &limits).unwrap(), expected);
        }
        for bad in [&b"../a"[..], b"a/../b", b"a/..", b"..", b"/..", b"a/b/c/d"] {
            assert!(components(bad, &limits).is_err());
        }
    }

    #[test]
    fn names_survive_the_record() {
        let link = super::super::ForeignLink { path: b"a b/%\xff\n".to_vec(), target: b"plain".to_vec() };
        let text = serde_json::to_string(&link).unwrap();
        assert_eq!(text, r#"{"path":"a%20b/%25%ff%0a","target":"plain"}"#);
        assert_eq!(serde_json::from_str::<super::super::ForeignLink>(&text).unwrap(), link);
        for bad in ["%", "%1", "%zz", "%é"] {
            assert!(serde_json::from_str::<super::super::ForeignLink>(&text.replace("plain", bad)).is_err());
        }
    }
}

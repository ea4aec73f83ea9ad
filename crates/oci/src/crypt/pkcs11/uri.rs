//! PKCS#11 URIs (RFC 7512): `pkcs11:name=value;…?name=value&…`, values percent-encoded.

use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr};

use nacre_core::SecretBytes;

use crate::crypt::{SchemeError, args};

/// The most bytes of a URI.
const LIMIT: usize = 8192;
/// Where modules are that a URI names without their directory.
const MODULE_DIRECTORIES: [&str; 6] = [
    "/usr/lib64/pkcs11",
    "/usr/lib/pkcs11",
    "/usr/local/lib/pkcs11",
    "/usr/lib/softhsm",
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
];

/// A parsed URI. Its Debug output shows no PIN.
#[derive(Clone, PartialEq, Eq)]
pub struct Uri {
    path: BTreeMap<String, Vec<u8>>,
    query: BTreeMap<String, Vec<u8>>,
}

impl FromStr for Uri {
    type Err = SchemeError;

    fn from_str(text: &str) -> Result<Self, SchemeError> {
        let malformed = |problem: &str| SchemeError::malformed(format!("the PKCS#11 URI {problem}"));
        let rest = text.strip_prefix("pkcs11:").ok_or_else(|| malformed("does not start with pkcs11:"))?;
        if text.len() > LIMIT {
            return Err(malformed("is too long"));
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let read = |part: &str, separator: char| {
            let mut found = BTreeMap::new();
            for pair in part.split(separator).filter(|pair| !pair.is_empty()) {
                let (name, value) =
                    pair.split_once('=').ok_or_else(|| malformed("has an attribute without a value"))?;
                let value = decode(value).ok_or_else(|| malformed("has a malformed percent code"))?;
                if found.insert(name.to_owned(), value).is_some() {
                    return Err(malformed("has an attribute twice"));
                }
            }
            Ok(found)
        };
        let uri = Self { path: read(path, ';')?, query: read(query, '&')? };
        if uri.path.is_empty() {
            return Err(malformed("names no object"));
        }
        Ok(uri)
    }
}

impl Uri {
    /// An attribute of the path as text.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.path.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The object's id.
    pub fn id(&self) -> Option<&[u8]> {
        self.path.get("id").map(Vec::as_slice)
    }

    /// The shared library that speaks for the token.
    ///
    /// # Errors
    /// [`SchemeError::Token`]: none is named, or it is not where modules are.
    pub fn module(&self) -> Result<PathBuf, SchemeError> {
        let text = |name: &str| self.query.get(name).and_then(|value| std::str::from_utf8(value).ok());
        if let Some(path) = text("module-path") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(path)
            } else {
                Err(SchemeError::Token("the URI's module-path is not absolute".into()))
            };
        }
        let name = text("module-name").ok_or_else(|| SchemeError::Token("the URI has no module-path".into()))?;
        if name.contains('/') {
            return Err(SchemeError::Token("the URI's module-name has a slash".into()));
        }
        MODULE_DIRECTORIES
            .iter()
            .flat_map(|directory| {
                [format!("{directory}/{name}.so"), format!("{directory}/lib{name}.so"), format!("{directory}/{name}")]
            })
            .map(PathBuf::from)
            .find(|path| path.is_file())
            .ok_or_else(|| {
                SchemeError::Token(format!("there is no module '{name:.60}' where modules are; name its module-path"))
            })
    }

    /// The PIN, from the URI or from the file that it names.
    ///
    /// # Errors
    /// [`SchemeError::Token`]: the file cannot be read.
    pub fn pin(&self) -> Result<Option<SecretBytes>, SchemeError> {
        if let Some(pin) = self.query.get("pin-value") {
            return Ok(Some(SecretBytes::new(pin.clone())));
        }
        let Some(source) = self.query.get("pin-source") else { return Ok(None) };
        let source = String::from_utf8_lossy(source);
        let path = source.strip_prefix("file:").unwrap_or(&source);
        let path = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
        let mut pin = args::read_limited(&path, 256)
            .map_err(|error| SchemeError::Token(format!("its PIN from {}: {error}", path.display())))?;
        while pin.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            pin.pop();
        }
        Ok(Some(SecretBytes::new(std::mem::take(&mut *pin))))
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uri(token {:?}, object {:?})", self.attribute("token"), self.attribute("object"))
    }
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let (digits, tail) = rest.split_first_chunk::<2>()?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        out.push(u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?);
        rest = tail;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read() {
        let uri: Uri =
            "pkcs11:token=my%20token;id=%00%ff;object=o;slot-id=3?module-path=/m.so&pin-value=12%2634".parse().unwrap();
        assert_eq!(uri.attribute("token"), Some("my token"));
        assert_eq!(uri.id(), Some(&[0, 0xff][..]));
        assert_eq!(uri.module().unwrap(), PathBuf::from("/m.so"));
        assert_eq!(uri.pin().unwrap().unwrap().expose(), b"12&34");
        assert!(!format!("{uri:?}").contains("12"));
        for bad in [
            "",
            "pkcs11:",
            "pkcs11:?module-path=/x",
            "pkcs11:a",
            "pkcs11:a=%f",
            "pkcs11:a=%zz",
            "pkcs11:a=1;a=2",
            "PKCS11:a=b",
        ] {
            assert!(bad.parse::<Uri>().is_err(), "{bad}");
        }
        for bad in [
            "pkcs11:a=b",
            "pkcs11:a=b?module-path=m.so",
            "pkcs11:a=b?module-name=../m",
            "pkcs11:a=b?module-name=nacre-none",
        ] {
            assert!(bad.parse::<Uri>().unwrap().module().is_err(), "{bad}");
        }
        assert!("pkcs11:a=b?pin-source=file:/nonexistent".parse::<Uri>().unwrap().pin().is_err());
    }
}

//! Key arguments as skopeo's users write them.
//!
//! To encrypt: `jwe:<public key file>`, `pkcs7:<certificate file>`, `pgp:<name or address>`, `pkcs11:<key file>`,
//! `provider:<name>[:<argument>]`. To decrypt: `<key file>[:pass=…|:file=…|:fd=…|:<passphrase>]`, `provider:<name>[:<argument>]`.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use nacre_core::SecretBytes;
use zeroize::Zeroizing;

use super::CryptError;

/// The most bytes of a key file.
pub(crate) const KEY_FILE_LIMIT: u64 = 4 << 20;
/// The most bytes of a passphrase.
const PASSPHRASE_LIMIT: u64 = 4096;

/// Whom to encrypt for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipientArg {
    /// A file with a public key.
    Jwe(PathBuf),
    /// A file with a certificate.
    Pkcs7(PathBuf),
    /// A name or a mail address in GnuPG's key ring.
    Pgp(String),
    /// A file with a public key, or with the URI of one in a token.
    Pkcs11(PathBuf),
    /// A key provider and what it is told.
    Provider(String, Option<String>),
}

impl FromStr for RecipientArg {
    type Err = CryptError;

    fn from_str(text: &str) -> Result<Self, CryptError> {
        let bad = |problem: &str| CryptError::KeyArgument {
            argument: text.chars().take(200).collect(),
            problem: problem.into(),
        };
        let (scheme, value) =
            text.split_once(':').ok_or_else(|| bad("expected jwe:, pkcs7:, pgp:, pkcs11: or provider: and a value"))?;
        if value.is_empty() {
            return Err(bad("there is nothing after the colon"));
        }
        match scheme {
            "jwe" => Ok(Self::Jwe(value.into())),
            "pkcs7" => Ok(Self::Pkcs7(value.into())),
            "pgp" => Ok(Self::Pgp(value.into())),
            "pkcs11" => Ok(Self::Pkcs11(value.into())),
            "provider" => provider(value)
                .map(|(name, argument)| Self::Provider(name, argument))
                .ok_or_else(|| bad("it names no provider")),
            _ => Err(bad("its scheme is none of jwe, pkcs7, pgp, pkcs11 and provider")),
        }
    }
}

/// What to decrypt with.
#[derive(Debug)]
pub enum DecryptionArg {
    /// A file with keys, and its passphrase.
    File(PathBuf, Option<SecretBytes>),
    /// A key provider and what it is told.
    Provider(String, Option<String>),
}

impl FromStr for DecryptionArg {
    type Err = CryptError;

    /// Reads the passphrase too, where the argument says where it is.
    fn from_str(text: &str) -> Result<Self, CryptError> {
        if let Some(rest) = text.strip_prefix("provider:") {
            return provider(rest)
                .map(|(name, argument)| Self::Provider(name, argument))
                .ok_or_else(|| bad_key(rest, "it names no provider"));
        }
        let (path, passphrase) = match text.split_once(':') {
            Some((path, passphrase)) => (path, Some(passphrase)),
            None => (text, None),
        };
        if path.is_empty() {
            return Err(bad_key(path, "it names no file"));
        }
        let passphrase = passphrase.map(|how| read_passphrase(path, how)).transpose()?;
        Ok(Self::File(path.into(), passphrase))
    }
}

pub(crate) fn bad_key(path: impl fmt::Display, problem: impl fmt::Display) -> CryptError {
    CryptError::KeyArgument { argument: format!("{path:.200}"), problem: problem.to_string() }
}

fn provider(text: &str) -> Option<(String, Option<String>)> {
    let (name, argument) = match text.split_once(':') {
        Some((name, argument)) => (name, Some(argument.to_owned())),
        None => (text, None),
    };
    (!name.is_empty()).then(|| (name.to_owned(), argument))
}

fn read_passphrase(path: &str, how: &str) -> Result<SecretBytes, CryptError> {
    let source = match how.split_once('=') {
        Some(("pass", passphrase)) => return Ok(SecretBytes::new(passphrase.as_bytes().to_vec())),
        Some(("file", file)) => PathBuf::from(file),
        Some(("fd", number)) => {
            let number: u32 = number.parse().map_err(|_| bad_key(path, "fd= takes a number"))?;
            // By its name: taking over a number is not for safe code.
            PathBuf::from(format!("/proc/self/fd/{number}"))
        }
        // As skopeo does, although it leaves the passphrase in plain sight.
        _ => return Ok(SecretBytes::new(how.as_bytes().to_vec())),
    };
    let mut bytes = read_limited(&source, PASSPHRASE_LIMIT)
        .map_err(|error| bad_key(path, format!("passphrase from {}: {error}", source.display())))?;
    // A file that an editor or echo made ends with a line break that is not meant.
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
    }
    Ok(SecretBytes::new(std::mem::take(&mut *bytes)))
}

/// Reads a file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut file = File::open(path)?;
    let room = file.metadata().map_or(0, |metadata| metadata.len().min(limit));
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(room).unwrap_or(0) + 1));
    file.by_ref().take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// [`read_limited`] for a key file that an argument names.
pub(crate) fn read_key_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, CryptError> {
    read_limited(path, KEY_FILE_LIMIT).map_err(|error| bad_key(path.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipients_parse_as_skopeo_spells_them() {
        for (text, expected) in [
            ("jwe:/a/pub.pem", RecipientArg::Jwe("/a/pub.pem".into())),
            ("pkcs7:c:d.pem", RecipientArg::Pkcs7("c:d.pem".into())),
            ("pgp:alice@example.com", RecipientArg::Pgp("alice@example.com".into())),
            ("pkcs11:k.yaml", RecipientArg::Pkcs11("k.yaml".into())),
            ("provider:p", RecipientArg::Provider("p".into(), None)),
            (
                "provider:attestation-agent:keyid=kbs:///a/b/c::keypath=/k",
                RecipientArg::Provider("attestation-agent".into(), Some("keyid=kbs:///a/b/c::keypath=/k".into())),
            ),
        ] {
            assert_eq!(text.parse::<RecipientArg>().unwrap(), expected);
        }
        for text in ["", "jwe", "jwe:", "JWE:x", "provider:", "provider::x", "gpg:x", "/a/pub.pem"] {
            assert!(matches!(text.parse::<RecipientArg>(), Err(CryptError::KeyArgument { .. })), "{text}");
        }
    }

    #[test]
    fn passphrases_come_from_where_they_are_said_to_be() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("p");
        std::fs::write(&file, "s3cret:x\n").unwrap();
        let fd = File::open(&file).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
        for text in [
            format!("k.pem:file={}", file.display()),
            format!("k.pem:fd={number}"),
            "k.pem:pass=s3cret:x".into(),
            "k.pem:s3cret:x".into(),
        ] {
            let DecryptionArg::File(path, Some(passphrase)) = text.parse().unwrap() else { panic!("{text}") };
            assert_eq!((path, passphrase.expose()), (PathBuf::from("k.pem"), &b"s3cret:x"[..]), "{text}");
        }
        assert!(matches!("k.pem".parse().unwrap(), DecryptionArg::File(_, None)));
        assert!(matches!("provider:p:a:b".parse().unwrap(), DecryptionArg::Provider(_, Some(a)) if a == "a:b"));
        for text in ["", ":pass=x", "provider:", "k:fd=x", "k:fd=-1", "k:fd=4000000000", "k:file=/nonexistent"] {
            assert!(matches!(text.parse::<DecryptionArg>(), Err(CryptError::KeyArgument { .. })), "{text}");
        }
        std::fs::write(&file, vec![b'x'; 5000]).unwrap();
        let error = format!("k:file={}", file.display()).parse::<DecryptionArg>().unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
        // A passphrase is never in a message.
        let error = ":pass=s3cret".parse::<DecryptionArg>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }
}

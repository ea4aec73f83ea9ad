//! Init data: the configuration that a guest is started with, and that its TEE measures.
//!
//! ```text
//! algorithm = "sha384"
//! version = "0.1.0"
//! [data]
//! "nacre.toml" = '''…'''
//! ```
//!
//! The digest is over the exact bytes of the file. A TEE's field for it has a fixed width: a longer digest is cut, a shorter one padded
//! with zeros ([`InitData::fit`]). Whoever trusts a measurement trusts what the init data says: the broker's certificate, the
//! broker's token key, the image policy; that is what makes the host unable to substitute them.

use std::collections::BTreeMap;

use nacre_core::{Algorithm, Digest};
use serde::{Deserialize, Serialize};

/// Bytes of init data at most.
pub const LONGEST: usize = 1024 * 1024;
/// Entries of `[data]` at most.
pub const MOST_ENTRIES: usize = 64;

/// Init data that is none.
#[derive(Debug, thiserror::Error)]
pub enum InitDataError {
    /// Longer than its limit.
    #[error("init data of {0} bytes: at most {LONGEST} are accepted")]
    TooLong(usize),
    /// Not the TOML that it should be.
    #[error("init data is not the TOML expected (algorithm, version, [data] of strings): {0}")]
    Malformed(String),
    /// A hash function that we do not compute.
    #[error("init data algorithm '{0}' is not supported: sha256, sha384 and sha512 are")]
    Algorithm(String),
    /// Another version of the format.
    #[error("init data version '{0}' is not supported: 0.1.x is")]
    Version(String),
    /// Too many entries.
    #[error("init data with {0} entries: at most {MOST_ENTRIES} are accepted")]
    TooMany(usize),
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    algorithm: String,
    version: String,
    data: BTreeMap<String, String>,
}

/// Init data, parsed, with the text it was parsed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitData {
    text: String,
    algorithm: Algorithm,
    data: BTreeMap<String, String>,
}

impl InitData {
    /// Makes init data of entries.
    ///
    /// # Errors
    /// [`InitDataError`]: too many or too long.
    pub fn new(algorithm: Algorithm, data: BTreeMap<String, String>) -> Result<Self, InitDataError> {
        let wire = Wire { algorithm: algorithm.name().into(), version: "0.1.0".into(), data };
        let text = toml::to_string(&wire).map_err(|e| InitDataError::Malformed(e.to_string()))?;
        Self::parse(&text)
    }

    /// Reads init data.
    ///
    /// # Errors
    /// [`InitDataError`].
    pub fn parse(text: &str) -> Result<Self, InitDataError> {
        if text.len() > LONGEST {
            return Err(InitDataError::TooLong(text.len()));
        }
        let wire: Wire = toml::from_str(text).map_err(|e| InitDataError::Malformed(e.message().to_owned()))?;
        let algorithm = match wire.algorithm.to_ascii_lowercase().replace('-', "").as_str() {
            "sha256" => Algorithm::Sha256,
            "sha384" => Algorithm::Sha384,
            "sha512" => Algorithm::Sha512,
            _ => return Err(InitDataError::Algorithm(wire.algorithm.chars().take(40).collect())),
        };
        if !wire.version.starts_with("0.1.") {
            return Err(InitDataError::Version(wire.version.chars().take(40).collect()));
        }
        if wire.data.len() > MOST_ENTRIES {
            return Err(InitDataError::TooMany(wire.data.len()));
        }
        Ok(Self { text: text.to_owned(), algorithm, data: wire.data })
    }

    /// The exact text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// An entry.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.data.get(name).map(String::as_str)
    }

    /// All entries.
    pub fn entries(&self) -> &BTreeMap<String, String> {
        &self.data
    }

    /// The digest of the exact text.
    pub fn digest(&self) -> Digest {
        Digest::of(self.algorithm, self.text.as_bytes())
    }

    /// The digest as a TEE's field of `N` bytes holds it.
    pub fn fit<const N: usize>(&self) -> [u8; N] {
        let mut field = [0; N];
        for (slot, byte) in field.iter_mut().zip(self.digest().as_bytes()) {
            *slot = *byte;
        }
        field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_over_the_exact_bytes() {
        let text = "algorithm = \"sha256\"\nversion = \"0.1.0\"\n[data]\n\"a\" = '''x'''\n";
        let data = InitData::parse(text).unwrap();
        assert_eq!(data.digest(), Digest::sha256(text.as_bytes()));
        assert_eq!(data.fit::<48>()[..32], *data.digest().as_bytes());
        assert_eq!(data.fit::<48>()[32..], [0; 16]);
        assert_eq!(data.fit::<16>(), data.digest().as_bytes()[..16]);
        assert_ne!(InitData::parse(&format!("{text}#")).unwrap().digest(), data.digest());
        let made = InitData::new(Algorithm::Sha384, [("k".into(), "v\n'''\"".into())].into()).unwrap();
        assert_eq!(InitData::parse(made.text()).unwrap(), made);
        assert_eq!(made.get("k"), Some("v\n'''\""));
    }

    #[test]
    fn malformed_init_data_is_refused() {
        let many: String = (0..65).map(|n| format!("k{n} = ''\n")).collect();
        for bad in [
            "",
            "x",
            "algorithm = 'sha384'\nversion = '0.1.0'\n",
            "algorithm = 'sha384'\n[data]\n",
            "version = '0.1.0'\n[data]\n",
            "algorithm = 'md5'\nversion = '0.1.0'\n[data]\n",
            "algorithm = 'sha384'\nversion = '0.2.0'\n[data]\n",
            "algorithm = 'sha384'\nversion = '0.1.0'\n[data]\na = 1\n",
            "algorithm = 'sha384'\nversion = '0.1.0'\n[data.a]\nb = ''\n",
            "algorithm = 'sha384'\nversion = '0.1.0'\n[data]\na = ''\na = ''\n",
            "algorithm = 'sha384'\nversion = '0.1.0'\nextra = 1\n[data]\n",
            &format!("algorithm = 'sha384'\nversion = '0.1.0'\n[data]\n{many}"),
            &" ".repeat(LONGEST + 1),
        ] {
            assert!(InitData::parse(bad).is_err(), "{bad:.80}");
        }
    }
}

//! A master key in a TPM: what it wraps is sealed by the TPM's storage root key, and opens there only, while PCRs hold what they held.

use std::{collections::BTreeMap, io::Read as _, path::PathBuf, str::FromStr, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nacre_attest::evidence::hex;
use nacre_broker::{BrokerError, MasterKey, MasterKeyError};
use nacre_core::{Digest, SecretArray, SecretBytes};
use nacre_tpm::{
    TpmAddress,
    seal::{Pcrs, SealError, Sealed, Vault},
};
use serde::{Deserialize, Serialize};

/// The most bytes of an owner authorization, and of a wrapped key.
const OWNER_LIMIT: u64 = 64;
const WRAPPED_LIMIT: usize = 16 * 1024;

/// `tpm:WHERE[,pcrs=0+2+7][,owner-file=PATH]`.
#[derive(Debug, PartialEq, Eq)]
struct Spec {
    address: TpmAddress,
    pcrs: Pcrs,
    owner: Option<PathBuf>,
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.strip_prefix("tpm:").unwrap_or(text).split(',');
        let address = match parts.next().unwrap_or_default() {
            "" => return Err("tpm: needs a device, a socket or HOST:PORT".into()),
            path if path.contains('/') => TpmAddress::Path(path.into()),
            address => match address.rsplit_once(':').map(|(host, port)| (host.is_empty(), port.parse::<u16>())) {
                Some((false, Ok(1..))) => TpmAddress::Tcp(address.to_owned()),
                _ => return Err(format!("{address:?} is neither a path (with a /) nor HOST:PORT")),
            },
        };
        let (mut pcrs, mut owner) = (None, None);
        for part in parts {
            match part.split_once('=') {
                Some(("pcrs", numbers)) if pcrs.is_none() => pcrs = Some(numbers.parse()?),
                Some(("owner-file", path)) if owner.is_none() && !path.is_empty() => owner = Some(path.into()),
                _ => return Err(format!("{part:?} is neither pcrs=0+2+7 nor owner-file=PATH, or there twice")),
            }
        }
        Ok(Self { address, pcrs: pcrs.unwrap_or_default(), owner })
    }
}

/// What the database keeps of a data key.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Wrapped {
    /// The storage root key's name, hex.
    root: String,
    /// What PCRs held, hex, by their numbers.
    pcrs: BTreeMap<u32, String>,
    /// The sealed object, base64.
    public: String,
    private: String,
}

/// A TPM's storage root key.
pub(super) struct InTpm {
    vault: Vault,
    pcrs: Pcrs,
    root: Vec<u8>,
    id: String,
    address: String,
}

impl InTpm {
    /// Asks the TPM which one it is.
    pub(super) fn new(text: &str) -> Result<Self, BrokerError> {
        let invalid = |error: String| BrokerError::Invalid(format!("master_key = '{text:.100}': {error}"));
        let Spec { address, pcrs, owner } = text.parse().map_err(invalid)?;
        let mut bytes = Vec::new();
        if let Some(path) = owner {
            let io = |source| BrokerError::Io { path: path.clone(), source };
            bytes.reserve_exact(64);
            std::fs::File::open(&path).and_then(|file| file.take(OWNER_LIMIT).read_to_end(&mut bytes)).map_err(io)?;
        }
        let named = address.to_string();
        let vault = Vault::new(address, SecretBytes::new(bytes));
        let root = vault.root().map_err(|error| MasterKeyError::Device {
            key: format!("master key in the TPM at {named}"),
            what: "make the storage root key",
            source: Arc::new(error),
        })?;
        let digest = Digest::sha256(&[&root[..], pcrs.to_string().as_bytes()].concat()).short();
        Ok(Self { vault, pcrs, root, id: format!("tpm:{digest}"), address: named })
    }

    fn fail(&self, what: &'static str) -> impl Fn(SealError) -> MasterKeyError {
        let key = self.describe();
        move |source| MasterKeyError::Device { key: key.clone(), what, source: Arc::new(source) }
    }

    fn parse(&self, bytes: &[u8]) -> Result<(Vec<u8>, Sealed), String> {
        if bytes.len() > WRAPPED_LIMIT {
            return Err(format!("{} bytes are more than {WRAPPED_LIMIT}", bytes.len()));
        }
        let wrapped: Wrapped = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let base64 = |text: &str| BASE64_STANDARD.decode(text).map_err(|error| error.to_string());
        let value =
            |(number, text): (u32, String)| bytes_of(&text).map(|value| (number, value)).ok_or("a PCR that is not hex");
        let pcrs = wrapped.pcrs.into_iter().map(value).collect::<Result<BTreeMap<_, _>, _>>()?;
        if pcrs.keys().copied().ne(self.pcrs.numbers()) || pcrs.values().any(|value| value.len() != 32) {
            return Err("it is sealed for other PCRs than the settings name".into());
        }
        let root = bytes_of(&wrapped.root).ok_or("a name that is not hex")?;
        Ok((root, Sealed { pcrs, public: base64(&wrapped.public)?, private: base64(&wrapped.private)? }))
    }
}

fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let (pairs, []) = hex.as_bytes().as_chunks::<2>() else { return None };
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.iter().map(byte).collect()
}

impl MasterKey for InTpm {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn describe(&self) -> String {
        let pcrs = if self.pcrs.is_empty() { String::new() } else { format!(", PCRs {}", self.pcrs) };
        format!("master key {} (the TPM at {}{pcrs})", self.id, self.address)
    }

    fn wrap(&self, label: &str, key: &SecretArray<32>) -> Result<Vec<u8>, MasterKeyError> {
        // The label goes in too: a sealed object has no other place for it that the TPM vouches for.
        let secret = SecretBytes::new([&key.expose()[..], Digest::sha256(label.as_bytes()).as_bytes()].concat());
        let sealed = self.vault.seal(&secret, self.pcrs).map_err(self.fail("seal a data key"))?;
        let wrapped = Wrapped {
            root: hex(&self.root),
            pcrs: sealed.pcrs.iter().map(|(number, value)| (*number, hex(value))).collect(),
            public: BASE64_STANDARD.encode(&sealed.public),
            private: BASE64_STANDARD.encode(&sealed.private),
        };
        // Strings and numbers always serialise.
        Ok(serde_json::to_vec(&wrapped).unwrap_or_default())
    }

    fn unwrap(&self, label: &str, wrapped: &[u8]) -> Result<SecretArray<32>, MasterKeyError> {
        let (root, sealed) =
            self.parse(wrapped).map_err(|why| self.fail("read a wrapped data key")(SealError::Tampered { why }))?;
        let plain = self.vault.unseal(&root, &sealed).map_err(self.fail("unseal a data key"))?;
        let wrong = || MasterKeyError::Wrong { key: self.describe() };
        let (key, bound) = plain.expose().split_first_chunk::<32>().ok_or_else(wrong)?;
        if bound != Digest::sha256(label.as_bytes()).as_bytes() {
            return Err(wrong());
        }
        Ok(SecretArray::fill(|slot| slot.copy_from_slice(key)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_are_read_and_others_named() {
        let spec = |text: &str| text.parse::<Spec>();
        let device = spec("tpm:/dev/tpmrm0").unwrap();
        assert_eq!(
            device,
            Spec { address: TpmAddress::Path("/dev/tpmrm0".into()), pcrs: Pcrs::default(), owner: None }
        );
        let all = spec("tpm:[::1]:2321,owner-file=/a,pcrs=0+7").unwrap();
        assert_eq!((all.pcrs.to_string(), all.owner), ("0+7".into(), Some("/a".into())));
        for text in [
            "tpm:",
            "tpm:tpm0",
            "tpm::1",
            "tpm:/a,pcrs=",
            "tpm:/a,pcrs=24",
            "tpm:/a,pcrs=1,pcrs=1",
            "tpm:/a,owner=b",
            "tpm:/a,",
        ] {
            assert!(spec(text).is_err(), "{text}");
        }
    }
}

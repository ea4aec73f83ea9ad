//! How people spell an anchor: `none`, `file:PATH`, `tpm:WHERE[,index=0x…][,owner-file=PATH]`, `broker:REPOSITORY/NAME`.

use std::{fmt, fs::File, io::Read as _, path::PathBuf, str::FromStr, sync::Arc};

use nacre_core::{Anchor, AnchorError, SecretArray, SecretBytes};

use crate::{
    FileAnchor, TpmAnchor,
    tpm::{NvIndex, TpmAddress},
};

/// The most bytes of a file with an owner authorization: as long as the longest digest that a TPM has.
const OWNER_LIMIT: u64 = 64;

/// Which anchor a disk has.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum AnchorSpec {
    /// None: an older copy of the disk is not told from the disk.
    #[default]
    None,
    /// A [`FileAnchor`].
    File(PathBuf),
    /// A [`TpmAnchor`].
    Tpm {
        /// Where the TPM is.
        address: TpmAddress,
        /// The index; one a disk.
        index: NvIndex,
        /// A file with the TPM's owner authorization, where it has one. It is needed for a new disk only.
        owner: Option<PathBuf>,
    },
    /// At the key broker that the guest attests to, by this name. Whoever opens it brings the client.
    Broker(String),
}

/// Opens an anchor at a key broker by its name.
pub type OpenBroker<'a> = dyn Fn(&str) -> Result<Arc<dyn Anchor>, AnchorError> + 'a;

/// Why a text spells no anchor.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is no anchor: {what}; write none, file:PATH, broker:REPOSITORY/NAME, or tpm:WHERE[,index=0x01800010][,owner-file=PATH], where WHERE is a device, swtpm's socket, or HOST:PORT"
)]
pub struct SpecError {
    text: String,
    what: String,
}

impl AnchorSpec {
    /// The anchor. `key` is for this purpose only: the disk's root key has a derivation for it. `broker` opens one at a broker.
    ///
    /// # Errors
    /// [`AnchorError::Failed`]: the file's name is none, or the owner authorization cannot be read. Nobody asks TPM or broker yet.
    pub fn open(&self, key: &SecretArray<32>, broker: &OpenBroker<'_>) -> Result<Option<Arc<dyn Anchor>>, AnchorError> {
        Ok(match self {
            Self::None => None,
            Self::File(path) => Some(Arc::new(FileAnchor::new(path)?)),
            Self::Tpm { address, index, owner } => Some(Arc::new(self.tpm(address, *index, owner.as_ref(), key)?)),
            Self::Broker(name) => Some(broker(name)?),
        })
    }

    /// Removes what the anchor holds, for a disk that is made anew where another one was.
    ///
    /// # Errors
    /// [`AnchorError`]
    pub fn forget(&self, key: &SecretArray<32>) -> Result<(), AnchorError> {
        match self {
            Self::None => Ok(()),
            Self::File(path) => FileAnchor::new(path)?.forget(),
            Self::Tpm { address, index, owner } => self.tpm(address, *index, owner.as_ref(), key)?.forget(),
            Self::Broker(name) => Err(AnchorError::Untrusted {
                anchor: self.to_string(),
                what: format!("only an administrator of the broker removes it: nacre broker anchor rm {name}"),
            }),
        }
    }

    fn tpm(
        &self,
        address: &TpmAddress,
        index: NvIndex,
        owner: Option<&PathBuf>,
        key: &SecretArray<32>,
    ) -> Result<TpmAnchor, AnchorError> {
        let owner = match owner {
            None => SecretBytes::new(Vec::new()),
            Some(path) => {
                let mut bytes = Vec::with_capacity(64);
                let read = File::open(path).and_then(|file| file.take(OWNER_LIMIT).read_to_end(&mut bytes));
                let secret = SecretBytes::new(bytes);
                read.map_err(|error| AnchorError::Failed {
                    anchor: self.to_string(),
                    what: format!("the owner authorization in {} cannot be read", path.display()),
                    source: Arc::new(error),
                })?;
                secret
            }
        };
        let address = match address {
            // Absolute, since a daemon changes its working directory.
            TpmAddress::Path(path) => TpmAddress::Path(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            address => address.clone(),
        };
        Ok(TpmAnchor::new(address, index, key, owner))
    }
}

impl FromStr for AnchorSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = |what: &str| SpecError { text: text.to_owned(), what: what.to_owned() };
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("file", "")) => Err(error("file: needs a path")),
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("broker", name)) => match name.split_once('/') {
                Some((repository, rest)) if !repository.is_empty() && !rest.is_empty() && !rest.contains('/') => {
                    Ok(Self::Broker(name.to_owned()))
                }
                _ => Err(error("broker: needs REPOSITORY/NAME")),
            },
            Some(("tpm", rest)) => tpm(rest).map_err(|what| error(&what)),
            Some((kind, _)) => Err(error(&format!("there is no kind {kind:?}"))),
            None => Err(error("it names no kind")),
        }
    }
}

fn tpm(text: &str) -> Result<AnchorSpec, String> {
    let mut parts = text.split(',');
    let address = match parts.next().unwrap_or_default() {
        "" => return Err("tpm: needs a device, a socket or HOST:PORT".into()),
        path if path.contains('/') => TpmAddress::Path(path.into()),
        address => {
            let port =
                address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
            let Some(Ok(1..)) = port else {
                return Err(format!("{address:?} is neither a path (with a /) nor HOST:PORT"));
            };
            TpmAddress::Tcp(address.to_owned())
        }
    };
    let (mut index, mut owner) = (None, None);
    for part in parts {
        match part.split_once('=') {
            Some(("index", number)) if index.is_none() => index = Some(number.parse()?),
            Some(("owner-file", path)) if owner.is_none() && !path.is_empty() => owner = Some(path.into()),
            _ => return Err(format!("{part:?} is neither index=0x… nor owner-file=PATH, or there twice")),
        }
    }
    Ok(AnchorSpec::Tpm { address, index: index.unwrap_or(NvIndex::DEFAULT), owner })
}

impl fmt::Display for AnchorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Broker(name) => write!(f, "broker:{name}"),
            Self::Tpm { address, index, owner } => {
                write!(f, "tpm:{address},index={index}")?;
                owner.as_ref().map_or(Ok(()), |path| write!(f, ",owner-file={}", path.display()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_are_printed_as_they_are_read() {
        for text in [
            "none",
            "file:/a/b,c",
            "file:a",
            "broker:team/disk",
            "tpm:/dev/tpmrm0,index=0x01800010",
            "tpm:./sock,index=0x01800011,owner-file=/a",
            "tpm:localhost:2321,index=0x01bfffff",
            "tpm:[::1]:2321,index=0x01800000",
        ] {
            assert_eq!(text.parse::<AnchorSpec>().unwrap().to_string(), text);
        }
        assert_eq!("tpm:/dev/tpm0".parse::<AnchorSpec>().unwrap().to_string(), "tpm:/dev/tpm0,index=0x01800010");
    }

    #[test]
    fn what_is_no_spelling_is_refused_and_named() {
        for (text, what) in [
            ("", "names no kind"),
            ("None", "names no kind"),
            ("/dev/tpm0", "names no kind"),
            ("broker:", "needs REPOSITORY/NAME"),
            ("broker:team", "needs REPOSITORY/NAME"),
            ("broker:a/b/c", "needs REPOSITORY/NAME"),
            ("none:", "no kind \"none\""),
            ("file:", "needs a path"),
            ("tpm:", "needs a device"),
            ("tpm:tpm0", "neither a path"),
            ("tpm::2321", "neither a path"),
            ("tpm:host:0", "neither a path"),
            ("tpm:host:70000", "neither a path"),
            ("tpm:/dev/tpm0,index=5", "no NV index"),
            ("tpm:/dev/tpm0,index=0x01c00002", "no NV index"),
            ("tpm:/dev/tpm0,index=0x01800010,index=0x01800011", "twice"),
            ("tpm:/dev/tpm0,owner-file=", "owner-file=PATH"),
            ("tpm:/dev/tpm0,", "neither index"),
        ] {
            let error = text.parse::<AnchorSpec>().unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}

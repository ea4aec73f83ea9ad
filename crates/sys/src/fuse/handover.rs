//! A session on its way to another process.
//!
//! The device's descriptor goes over a socket ([`crate::descriptors`]); what was agreed with the kernel goes along as [`Parameters`], a JSON
//! object with a version.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::wire::HAS_RESEND;

/// The version of the form that is written.
const VERSION: u32 = 1;
/// Longer ones are nobody's: a path has 4096 bytes, each of up to four digits.
const LONGEST: usize = 32 << 10;

/// A session that nobody serves: the kernel's requests wait for who resumes it. Dropping the last descriptor ends the mount.
#[derive(Debug)]
pub struct Handover {
    /// The connection.
    pub device: OwnedFd,
    /// What was agreed with the kernel.
    pub parameters: Parameters,
}

/// What a session agreed with the kernel when it was mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    version: u32,
    pub(super) minor: u32,
    pub(super) flags: u64,
    pub(super) max_write: u32,
    pub(super) max_pages: u16,
    /// The mount's device number.
    pub(super) device: (u32, u32),
    /// Bytes, since a path need not be text.
    target: Vec<u8>,
}

/// Why bytes are no parameters.
#[derive(Debug, thiserror::Error)]
pub enum ParametersError {
    /// They are none.
    #[error("the parameters of a FUSE session cannot be read; they have to be those that `to_bytes` gave")]
    Form(#[source] serde_json::Error),
    /// They are too long to be any.
    #[error("the parameters of a FUSE session have {0} bytes, more than any have")]
    Length(usize),
    /// They are of another version of this program.
    #[error(
        "the parameters of a FUSE session have version {found}, and this program knows {VERSION}: unmount, and mount again"
    )]
    Version {
        /// Theirs.
        found: u32,
    },
}

impl Parameters {
    pub(super) fn new(
        minor: u32,
        flags: u64,
        max_write: u32,
        max_pages: u16,
        device: (u32, u32),
        target: &Path,
    ) -> Self {
        let target = target.as_os_str().as_bytes().to_owned();
        Self { version: VERSION, minor, flags, max_write, max_pages, device, target }
    }

    /// Where the filesystem is mounted.
    pub fn target(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.target.clone()))
    }

    /// Whether the kernel sends again what a crashed process had read.
    pub fn can_resend(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }

    /// As bytes, for another process.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// From those bytes.
    ///
    /// # Errors
    /// [`ParametersError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParametersError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        if bytes.len() > LONGEST {
            return Err(ParametersError::Length(bytes.len()));
        }
        // First, so that fields of a later version are not what is complained about.
        let Version { version: found } = serde_json::from_slice(bytes).map_err(ParametersError::Form)?;
        if found != VERSION {
            return Err(ParametersError::Version { found });
        }
        serde_json::from_slice(bytes).map_err(ParametersError::Form)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_survive_with_any_path_and_others_are_refused() {
        let path = PathBuf::from(OsString::from_vec(b"/a b/\xff".to_vec()));
        let parameters = Parameters::new(41, u64::MAX, 4096, 256, (0, 77), &path);
        let bytes = parameters.to_bytes();
        assert_eq!(Parameters::from_bytes(&bytes).unwrap(), parameters);
        assert_eq!(parameters.target(), path);
        let newer = String::from_utf8(bytes).unwrap().replacen("\"version\":1", "\"version\":2,\"more\":1", 1);
        assert!(matches!(Parameters::from_bytes(newer.as_bytes()), Err(ParametersError::Version { found: 2 })));
        let extra = newer.replacen("\"version\":2", "\"version\":1", 1);
        assert!(matches!(Parameters::from_bytes(extra.as_bytes()), Err(ParametersError::Form(_))));
        assert!(matches!(Parameters::from_bytes(b"{}"), Err(ParametersError::Form(_))));
        assert!(matches!(Parameters::from_bytes(&vec![b' '; LONGEST + 1]), Err(ParametersError::Length(_))));
    }
}

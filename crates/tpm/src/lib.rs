//! Commands to a TPM 2.0 and its responses: by a device (`/dev/tpmrm0`) or by the socket that swtpm serves.
//!
//! | module | what |
//! |---|---|
//! | [`Tpm`] | a TPM, held alone: commands, with patience |
//! | [`session`] | commands, marshalled; HMAC sessions |
//! | [`response`] | responses, parsed: pure functions over bytes that come from anywhere |
//! | [`seal`] | secrets that one TPM opens, while its PCRs hold what they held |
//! | `transport` | how the bytes get there and back |
//!
//! Invariants: a TPM is held alone while it is talked to; whatever comes from it is parsed with limits; what counts is vouched for by an
//! HMAC of a session, or signed.

mod device;
pub mod response;
pub mod seal;
pub mod session;
mod transport;

use std::{fmt, path::PathBuf};

pub use device::{RC_AUTH_FAIL, RC_BAD_AUTH, RC_HANDLE, Tpm, TpmError, kind, malformed};
pub use response::WireError;

/// Where a TPM is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TpmAddress {
    /// A character device, or a unix socket that swtpm serves (`--server type=unixio`): what is there decides.
    Path(PathBuf),
    /// A TCP address that swtpm serves (`--server type=tcp`), as `host:port`.
    Tcp(String),
}

impl fmt::Display for TpmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

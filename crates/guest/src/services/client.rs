//! The services' other end, for people and scripts: `nacre guest`.

use std::path::{Path, PathBuf};

use nacre_core::SecretBytes;
use ttrpc::Request;
use zeroize::Zeroize as _;

use super::{
    GET_RESOURCE, PULL_IMAGE,
    message::{Message, encode_all},
};

/// Why a call did not do what it was made for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody serves at the socket, or it is not ours to open.
    #[error("{path}: no guest daemon can be reached there: {reason}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The guest's daemon refused or failed.
    #[error("{method}: {reason}")]
    Refused {
        /// The service's method.
        method: &'static str,
        /// What it says.
        reason: String,
    },
}

/// A connection to the guest's daemon.
pub struct ServicesClient {
    client: ttrpc::Client,
}

impl ServicesClient {
    /// Connects to the daemon's socket.
    ///
    /// # Errors
    /// [`CallError::Unreachable`]
    pub fn connect(socket: &Path) -> Result<Self, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { path: socket.into(), reason };
        let client = ttrpc::Client::connect(&format!("unix://{}", socket.display()))
            .map_err(|error| unreachable(error.to_string()))?;
        Ok(Self { client })
    }

    /// Has an image pulled, and a bundle made of it at an absolute path; gives the manifest's digest.
    ///
    /// # Errors
    /// [`CallError::Refused`]
    pub fn pull_image(&self, image: &str, bundle: Option<&Path>) -> Result<String, CallError> {
        let bundle = bundle.map(|path| path.as_os_str().as_encoded_bytes()).unwrap_or_default();
        let answer = self.call(PULL_IMAGE, &[image.as_bytes(), bundle])?;
        answer.string(1).map(str::to_owned).map_err(|reason| CallError::Refused { method: PULL_IMAGE.1, reason })
    }

    /// Has a broker's resource released.
    ///
    /// # Errors
    /// [`CallError::Refused`]
    pub fn resource(&self, path: &str) -> Result<SecretBytes, CallError> {
        let answer = self.call(GET_RESOURCE, &[path.as_bytes()])?;
        Ok(SecretBytes::new(answer.bytes(1).to_vec()))
    }

    /// Waits for the answer without a limit of its own: a pull takes as long as it takes.
    fn call(&self, (service, method): (&str, &'static str), fields: &[&[u8]]) -> Result<Message, CallError> {
        let refused = |reason: String| CallError::Refused { method, reason };
        let mut request = Request::new();
        request.service = service.into();
        request.method = method.into();
        request.payload = encode_all(fields);
        let mut response = self.client.request(request).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => refused(status.message),
            other => refused(other.to_string()),
        })?;
        let answer = Message::decode(&response.payload).map_err(refused);
        response.payload.zeroize();
        answer
    }
}

//! Addresses to listen at.
//!
//! A socket file is for its owner only from the moment at which it exists. One that is there already is replaced only where nobody
//! listens behind it, and taken away at the end only where it is still ours. While a server looks and replaces, it holds a lock on the
//! directory, so that of two that start at once one finds the other.

use std::{
    fs::{self, File},
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, fchmod, flock},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{NbdError, transport::Socket};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A socket file, for its owner only.
    Unix(PathBuf),
    /// An address and a port; port 0 lets the system choose.
    Tcp(SocketAddr),
}

/// A socket that is listened at.
pub(super) enum Listener {
    Unix { listener: UnixListener, path: PathBuf, identity: (u64, u64) },
    Tcp(TcpListener),
}

impl Listener {
    pub(super) fn bind(listen: &Listen) -> Result<Self, NbdError> {
        match listen {
            Listen::Unix(path) => {
                let fail = |source| NbdError::Listen { address: path.display().to_string(), source };
                let listener = bind_unix(path).map_err(fail)?;
                listener.set_nonblocking(true).map_err(fail)?;
                let identity = identity(path).map_err(fail)?;
                Ok(Self::Unix { listener, path: path.clone(), identity })
            }
            Listen::Tcp(address) => {
                let fail = |source| NbdError::Listen { address: address.to_string(), source };
                let listener = TcpListener::bind(address).map_err(fail)?;
                listener.set_nonblocking(true).map_err(fail)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// The next client, and its name.
    pub(super) fn accept(&self) -> io::Result<(Socket, String)> {
        match self {
            Self::Unix { listener, path, .. } => {
                let (socket, _) = listener.accept()?;
                Ok((Socket::Unix(socket), format!("a client of {}", path.display())))
            }
            Self::Tcp(listener) => {
                let (socket, address) = listener.accept()?;
                Ok((Socket::Tcp(socket), address.to_string()))
            }
        }
    }

    /// How clients call the export.
    pub(super) fn uri(&self, name: &str, tls: bool) -> String {
        let (scheme, name) = (if tls { "nbds" } else { "nbd" }, escape(name.as_bytes()));
        match self {
            Self::Unix { path, .. } => {
                format!("{scheme}+unix:///{name}?socket={}", escape(path.as_os_str().as_encoded_bytes()))
            }
            Self::Tcp(listener) => {
                let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
                format!("{scheme}://{address}/{name}")
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix { listener, .. } => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix { path, identity: ours, .. } = self
            && identity(path).is_ok_and(|found| found == *ours)
            && let Err(error) = fs::remove_file(&*path)
        {
            tracing::warn!(path = %path.display(), %error, "the socket could not be removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(directory)?;
    flock(&directory, FlockOperation::LockExclusive)?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is not a socket"));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            Err(error) => return Err(error),
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there")),
        },
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the file gets the mode of the socket, so there is no moment at which others could connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Percent-encodes what has a meaning in a URI.
fn escape(bytes: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(byte);
    bytes.iter().map(|byte| if plain(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

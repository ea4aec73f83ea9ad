//! Commands to a TPM and responses from it: a character device, or the socket that swtpm serves, which takes the same bytes.
//!
//! A transport is held alone: `/dev/tpmrm0` is locked with flock; `/dev/tpm0` can be open only once; swtpm takes the next connection
//! when the last one has ended. All three are waited for, with a limit.

use std::{
    fs::{File, Metadata, OpenOptions, TryLockError},
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs as _},
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use crate::{TpmAddress, TpmError, response};

/// How long we wait for our turn, and for a response. NV writes of slow chips take a second.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(10);

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// An open way to a TPM.
pub(crate) struct Transport {
    stream: Box<dyn Stream>,
    /// A device gives each response in one read, whole.
    is_device: bool,
    address: String,
}

impl Transport {
    pub(crate) fn open(address: &TpmAddress) -> Result<Self, TpmError> {
        let (stream, is_device): (io::Result<Box<dyn Stream>>, bool) = match address {
            TpmAddress::Tcp(address) => (tcp(address).map(|stream| Box::new(stream) as _), false),
            TpmAddress::Path(path) => match std::fs::metadata(path) {
                Err(error) => (Err(error), false),
                Ok(there) if there.file_type().is_socket() => (unix(path).map(|stream| Box::new(stream) as _), false),
                Ok(there) => (device(path, &there).map(|file| Box::new(file) as _), true),
            },
        };
        let address = address.to_string();
        match stream {
            Ok(stream) => Ok(Self { stream, is_device, address }),
            Err(source) => Err(TpmError::Transport { action: "open", address, source }),
        }
    }

    /// Sends a command and waits for the response.
    pub(crate) fn exchange(&mut self, command: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let failed = |action| {
            let address = self.address.clone();
            move |source| TpmError::Transport { action, address, source }
        };
        let (write, read) = (failed("send a command to"), failed("read a response from"));
        self.stream.write_all(command).and_then(|()| self.stream.flush()).map_err(write)?;
        match self.is_device {
            true => read_whole(&mut self.stream),
            false => read_framed(&mut self.stream),
        }
        .map_err(read)
    }
}

fn read_whole(stream: &mut dyn Stream) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; response::RESPONSE_LIMIT]);
    let length = stream.read(&mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

fn read_framed(stream: &mut dyn Stream) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut header = [0; response::HEADER_LEN];
    stream.read_exact(&mut header)?;
    let length = response::length(&header).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let mut bytes = Zeroizing::new(header.to_vec());
    bytes.resize(length, 0);
    stream.read_exact(bytes.get_mut(response::HEADER_LEN..).unwrap_or_default())?;
    Ok(bytes)
}

fn tcp(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn unix(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn device(path: &Path, there: &Metadata) -> io::Result<File> {
    if !there.file_type().is_char_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a character device nor a socket"));
    }
    let begin = Instant::now();
    let file = loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && begin.elapsed() < PATIENCE => {
                thread::sleep(PAUSE);
            }
            result => break result?,
        }
    };
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if begin.elapsed() < PATIENCE => thread::sleep(PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
}

//! The kernel's NBD client on our NBD server, in one process: `/dev/nbdN` on pairs of sockets (`nacre_sys::nbd_client`).
//!
//! There is nothing to negotiate: the kernel is told by ioctls what a server would have said, and the server begins with requests. There
//! is a connection for each CPU. When the server is killed, the kernel ends the device by itself; nothing is left to clean up.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    thread::{self, JoinHandle},
};

use nacre_sys::{
    blockdev,
    nbd_client::{self, NbdDevice},
};

use super::{DeviceOptions, StartError, cpus, mark_thread};
use crate::{FrontEnd, Served, nbd::Transmission};

/// More connections than this only cost memory.
const MOST_CONNECTIONS: usize = 4;

/// A store as a device of the kernel's NBD client.
///
/// Dropped, it does what [`FrontEnd::stop`] does, as far as that can be done.
pub struct KernelNbd {
    name: String,
    device: NbdDevice,
    servers: Vec<JoinHandle<()>>,
    transmission: Transmission,
    stopped: bool,
}

impl KernelNbd {
    /// Makes the device.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left.
    pub fn start(store: Served, options: &DeviceOptions) -> Result<Self, StartError> {
        let size = store.size();
        options.check(size)?;
        nbd_client::available().map_err(StartError::Unavailable)?;
        let transmission = Transmission::new(store, options.read_only);
        let (mut sockets, mut servers) = (Vec::new(), Vec::new());
        for _ in 0..cpus().min(MOST_CONNECTIONS) {
            let (ours, kernels) = UnixStream::pair().map_err(StartError::failed("make a pair of sockets"))?;
            let serving = transmission.clone();
            let serve = move || {
                mark_thread();
                if let Err(error) = serving.serve(ours) {
                    tracing::error!(%error, "a connection of the kernel's NBD client ended");
                }
            };
            let server = thread::Builder::new().name("nbd-kernel".into()).spawn(serve);
            servers.push(server.map_err(StartError::failed("start a thread"))?);
            sockets.push(OwnedFd::from(kernels));
        }
        let flags = transmission.flags();
        let client = nbd_client::Options { size, block_size: options.block_size, flags };
        // Where this fails, the sockets are closed and the servers end.
        let device = nbd_client::attach(sockets, client).map_err(StartError::failed("make an NBD device"))?;
        let name = device.path().display().to_string();
        Ok(Self { name, device, servers, transmission, stopped: false })
    }

    /// Every step may be the one that fails: what was done before is not done again.
    fn shut_down(&mut self) -> io::Result<()> {
        let ended = if self.stopped { Ok(()) } else { self.take_away()? };
        self.stopped = true;
        self.transmission.flush().map_err(io::Error::other)?;
        ended
    }

    /// What ended the device, once it is gone.
    fn take_away(&mut self) -> io::Result<io::Result<()>> {
        // What the kernel holds is written out first; and nobody can mount it meanwhile.
        let claimed = if self.device.has_ended() { None } else { Some(blockdev::claim(self.device.path())?) };
        if let Some(Err(error)) = claimed.as_ref().map(File::sync_all) {
            tracing::error!(device = self.name, %error, "not all that was written could be written out");
        }
        let ended = match self.device.disconnect() {
            // Its servers have to go on.
            Err(error) if !self.device.has_ended() => return Err(error),
            ended => ended,
        };
        drop(claimed);
        for server in self.servers.drain(..) {
            server.join().map_err(|_| io::Error::other("a thread that served NBD died"))?;
        }
        Ok(ended)
    }
}

impl FrontEnd for KernelNbd {
    fn device(&self) -> String {
        self.name.clone()
    }

    fn users(&self) -> Vec<String> {
        blockdev::users(Path::new(&self.name))
    }

    fn stop(&mut self) -> io::Result<()> {
        self.shut_down()
    }

    fn has_ended(&self) -> bool {
        self.device.has_ended()
    }

    fn resized(&self) -> io::Result<()> {
        // The server knows already: what the kernel is told here it may ask for at once.
        self.device.resize(self.transmission.size())
    }

    fn wait(&mut self) -> io::Result<()> {
        self.device.wait()
    }
}

impl Drop for KernelNbd {
    fn drop(&mut self) {
        if !self.stopped
            && let Err(error) = self.shut_down()
        {
            // Whoever uses it goes on being served as long as the process lives.
            tracing::warn!(%error, "an NBD device was not taken away");
        }
    }
}

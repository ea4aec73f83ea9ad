//! Front ends: how other programs and the kernel reach a [`BlockStore`].

mod buffer;
pub mod kernel;
pub mod nbd;
pub mod sectors;

use std::sync::Arc;

use nacre_core::BlockStore;

/// A way for others to reach a block store. It serves until it is stopped.
pub trait FrontEnd: Send {
    /// What people open: `/dev/ublkb0`, `/dev/loop3`, `nbd+unix:///?socket=/run/x.sock`.
    fn device(&self) -> String;

    /// What uses the device, for people: `mounted on /mnt`, `held by dm-0`. While there is anything, a device of the kernel is not stopped.
    fn users(&self) -> Vec<String> {
        Vec::new()
    }

    /// Serves no new requests, finishes those that were begun, flushes the store, and takes the device away. After that, or after an error,
    /// it may be called again, and does what is left to do.
    ///
    /// A device of the kernel that is in use is not taken away: it goes on being served, also where the front end is dropped, as long
    /// as the process lives.
    ///
    /// # Errors
    /// `ResourceBusy`, with what uses the device, which stays. Otherwise what could not be taken away, or not be flushed.
    fn stop(&mut self) -> std::io::Result<()>;

    /// Whether the front end has ended by itself, as [`wait`](Self::wait) would find.
    fn has_ended(&self) -> bool;

    /// Makes the device as large as the store is by now. Servers need none: whoever connects from now on is told the new size.
    ///
    /// # Errors
    /// The device keeps its size until it is made anew.
    fn resized(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Waits until the front end ends by itself: unmounted, disconnected for good, its device deleted.
    ///
    /// # Errors
    /// What ended it, where that was no wish of anybody's.
    fn wait(&mut self) -> std::io::Result<()>;
}

/// The store that front ends serve.
pub type Served = Arc<dyn BlockStore>;

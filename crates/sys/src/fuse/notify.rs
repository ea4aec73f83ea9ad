//! What a session tells the kernel unasked. Which thread may do so, [`Notifier`] says.

use std::io::IoSlice;
use std::sync::Weak;

use rustix::io::Errno;
use zerocopy::IntoBytes as _;

use super::device::Device;
use super::filesystem::Inode;
use super::wire::{InvalInodeOut, NOTIFY_INVAL_INODE, NOTIFY_RESEND, NOTIFY_STORE, StoreOut};

/// The kernel's pages are stored so many at a time.
const STORE: usize = 1 << 20;

/// Why the kernel was not told.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The session has ended or was handed over.
    #[error("the FUSE session that was to be notified has ended")]
    Ended,
    /// The kernel does not know the inode, so that it has no cache for it: nobody has looked it up, or it was dropped meanwhile.
    #[error("the kernel holds no inode {0} of this FUSE filesystem; it has to be looked up before data is stored")]
    Unknown(u64),
    /// The kernel is too old.
    #[error("this kernel cannot send FUSE requests again (Linux 6.9 or newer is needed)")]
    NoResend,
    /// The kernel refused it.
    #[error("the kernel refused the notification '{what}' of a FUSE filesystem")]
    Refused {
        /// Which.
        what: &'static str,
        /// Its answer.
        #[source]
        source: Errno,
    },
}

/// Tells the kernel about files; cheap to clone, and of no effect once its session has ended.
///
/// # Which thread may call
/// [`Notifier::store`] and [`Notifier::invalidate`] wait for the locks of the pages that they cover. A page is locked from when the kernel
/// decides to read it until that read is answered: while the request lies in the queue, too, and for pages that are read ahead of
/// anybody's wish. The wait cannot be interrupted, not even by SIGKILL; only [`Session::abort`](super::Session::abort) and its like end it.
/// So they are for a thread **that no read waits for**. What Linux 6.18 does with others:
///
/// | who stores what | |
/// |---|---|
/// | a method of the filesystem, what it is asked for, before it replies | waits for itself for ever |
/// | another thread, which such a method waits for | the same |
/// | a method, after it replied, what comes next in the file | all threads wait for requests that none of them is left to read: for ever with one thread or two, by luck not with four |
/// | a method, after it replied, what it replied with | goes well as long as nobody reads those pages anew; of no use |
/// | a thread of its own, to which methods send what they fetched and on which they do not wait | always goes on |
#[derive(Clone, Debug)]
pub struct Notifier {
    device: Weak<Device>,
}

impl Notifier {
    pub(super) fn new(device: Weak<Device>) -> Self {
        Self { device }
    }

    /// Puts data of a file into the kernel's cache, as if it had been read. Only whole pages come to count, and a part of one that ends
    /// where the file ends. **Data beyond the end makes the kernel believe in a longer file.** Blocks while a read of one of the pages
    /// is in flight: see [`Notifier`] for which thread may call.
    ///
    /// # Errors
    /// [`NotifyError`]; a part may have been stored.
    pub fn store(&self, inode: Inode, offset: u64, data: &[u8]) -> Result<(), NotifyError> {
        let device = self.device.upgrade().ok_or(NotifyError::Ended)?;
        let (mut offset, mut data) = (offset, data);
        while !data.is_empty() {
            // Up to a multiple, so that no page is split.
            let whole = STORE - usize::try_from(offset % STORE as u64).unwrap_or(0);
            let (now, later) = data.split_at(whole.min(data.len()));
            let size = u32::try_from(now.len()).unwrap_or(u32::MAX);
            let header = StoreOut { node: inode.0, offset, size, padding: 0 };
            device
                .notify(NOTIFY_STORE, &[IoSlice::new(header.as_bytes()), IoSlice::new(now)])
                .map_err(|source| refused("store", inode, source))?;
            offset += now.len() as u64;
            data = later;
        }
        Ok(())
    }

    /// Takes a range of a file out of the kernel's cache, with what it knows of the file's attributes. A length of 0 is everything from
    /// the offset on. Blocks as [`Notifier::store`] does.
    ///
    /// # Errors
    /// [`NotifyError`].
    pub fn invalidate(&self, inode: Inode, offset: u64, length: u64) -> Result<(), NotifyError> {
        let device = self.device.upgrade().ok_or(NotifyError::Ended)?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let body = InvalInodeOut { node: inode.0, offset: signed(offset), length: signed(length) };
        device
            .notify(NOTIFY_INVAL_INODE, &[IoSlice::new(body.as_bytes())])
            .map_err(|source| refused("invalidate", inode, source))
    }
}

/// Has the kernel send again what was read and not answered.
pub(super) fn resend(device: &Device) -> Result<(), NotifyError> {
    match device.notify(NOTIFY_RESEND, &[]) {
        Err(Errno::INVAL | Errno::NOSYS) => Err(NotifyError::NoResend),
        result => result.map_err(|source| NotifyError::Refused { what: "resend", source }),
    }
}

fn refused(what: &'static str, inode: Inode, source: Errno) -> NotifyError {
    match source {
        Errno::NOENT => NotifyError::Unknown(inode.0),
        // Not mounted any more.
        Errno::NODEV | Errno::PERM => NotifyError::Ended,
        source => NotifyError::Refused { what, source },
    }
}

//! Descriptors on their way from one process to another, over a Unix socket, with a message.
//!
//! A message is the number of bytes and of descriptors, each 32 bits little-endian, then the bytes. The descriptors come with its first
//! byte (`SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most bytes of one message.
pub const MAX_BYTES: usize = 64 << 10;
/// The most descriptors of one message; the kernel takes 253.
pub const MAX_DESCRIPTORS: usize = 64;

/// Begins a message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    bytes: U32,
    descriptors: U32,
}
const _: () = assert!(size_of::<Header>() == 8);

/// A message was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorsError {
    /// It is too large.
    #[error(
        "a message of {bytes} bytes and {descriptors} descriptors is too large: {MAX_BYTES} and {MAX_DESCRIPTORS} are the most"
    )]
    TooLarge {
        /// How many bytes.
        bytes: usize,
        /// How many descriptors.
        descriptors: usize,
    },
    /// Not all descriptors came: the receiver may have too many of them already.
    #[error(
        "{found} of the {sent} descriptors of a message came; the limit of open files (ulimit -n) may have been reached"
    )]
    Missing {
        /// How many came.
        found: usize,
        /// How many were sent.
        sent: usize,
    },
    /// The other side is gone, or the socket failed.
    #[error("cannot {action} a message with descriptors")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Sends a message with descriptors, which stay open here, too. One thread at a time: a long message goes in several pieces.
///
/// # Errors
/// [`DescriptorsError`].
pub fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), DescriptorsError> {
    let too_large = || DescriptorsError::TooLarge { bytes: bytes.len(), descriptors: descriptors.len() };
    if bytes.len() > MAX_BYTES || descriptors.len() > MAX_DESCRIPTORS {
        return Err(too_large());
    }
    let count = |count: usize| u32::try_from(count).map(U32::new).map_err(|_| too_large());
    let header = Header { bytes: count(bytes.len())?, descriptors: count(descriptors.len())? };
    let failed = |source| DescriptorsError::Socket { action: "send", source };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(too_large());
    }
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(bytes)];
    let sent = loop {
        match rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(|source| failed(source.into()))?,
        }
    };
    let mut socket = socket;
    socket.write_all(header.as_bytes().get(sent..).unwrap_or_default()).map_err(failed)?;
    socket.write_all(bytes.get(sent.saturating_sub(size_of::<Header>())..).unwrap_or_default()).map_err(failed)
}

/// Receives a message with descriptors, all of them closed on exec.
///
/// # Errors
/// [`DescriptorsError`]; descriptors that came are closed.
pub fn receive(socket: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>), DescriptorsError> {
    let failed = |source| DescriptorsError::Socket { action: "receive", source };
    let mut header = [0; size_of::<Header>()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(|source| failed(source.into()))?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let mut socket = socket;
    socket.read_exact(header.get_mut(received.bytes..).unwrap_or_default()).map_err(failed)?;
    let header: Header = zerocopy::transmute!(header);
    let count = |count: U32| usize::try_from(count.get()).unwrap_or(usize::MAX);
    let (length, sent) = (count(header.bytes), count(header.descriptors));
    if length > MAX_BYTES || sent > MAX_DESCRIPTORS {
        return Err(DescriptorsError::TooLarge { bytes: length, descriptors: sent });
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() != sent {
        return Err(DescriptorsError::Missing { found: descriptors.len(), sent });
    }
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes).map_err(failed)?;
    Ok((bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek as _, SeekFrom};
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn messages_and_their_descriptors_arrive_one_by_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        send(&ours, b"first", &[file.as_fd(), ours.as_fd()]).unwrap();
        send(&ours, b"", &[]).unwrap();
        send(&ours, &[7; MAX_BYTES], &[file.as_fd(); MAX_DESCRIPTORS]).unwrap();
        let (bytes, mut descriptors) = receive(&theirs).unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (b"first".as_slice(), 2));
        let mut text = String::new();
        File::from(descriptors.remove(0)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert!(rustix::io::fcntl_getfd(&descriptors[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        let (bytes, descriptors) = receive(&theirs).unwrap();
        assert!(bytes.is_empty() && descriptors.is_empty());
        let (bytes, descriptors) = receive(&theirs).unwrap();
        assert_eq!((bytes.len(), descriptors.len()), (MAX_BYTES, MAX_DESCRIPTORS));
    }

    #[test]
    fn what_is_too_large_or_cut_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let error = send(&ours, &[0; MAX_BYTES + 1], &[]).unwrap_err();
        assert!(matches!(error, DescriptorsError::TooLarge { .. }), "{error}");
        assert!(send(&ours, b"", &[ours.as_fd(); MAX_DESCRIPTORS + 1]).is_err());
        (&ours).write_all(&[255; 8]).unwrap();
        assert!(matches!(receive(&theirs), Err(DescriptorsError::TooLarge { .. })));
        // It says two descriptors and brings none.
        (&ours).write_all(&[0, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        assert!(matches!(receive(&theirs), Err(DescriptorsError::Missing { found: 0, sent: 2 })));
        (&ours).write_all(&[9, 0, 0]).unwrap();
        drop(ours);
        assert!(matches!(receive(&theirs), Err(DescriptorsError::Socket { .. })));
    }
}

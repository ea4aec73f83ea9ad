//! What commands and the daemon say to each other: one request a connection.
//!
//! ```text
//! daemon    {"nacre-lazy":1,"pid":7}                                     a frame: its length, 32 bits little-endian, and JSON
//! command   {"op":"mount",…} and files                                   a message of nacre_sys::descriptors
//! daemon    {"ok":…}, or {"error":"…","exit":5} as the command itself would have ended
//! ```
//!
//! The socket is for its owner and root only, who could mount without it as well; limits and times are there for accidents.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::Duration,
};

use nacre_guest::lazy::{Front, LazyOptions};
use nacre_sys::descriptors;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::Problem;

/// The version of all this.
pub(crate) const VERSION: u32 = 1;
/// The most bytes of a frame.
const FRAME: u32 = 16 << 20;
/// How long a peer may take to say or to hear something.
pub(crate) const PEER_TIME: Duration = Duration::from_secs(10);

/// What the daemon says first.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    #[serde(rename = "nacre-lazy")]
    pub(crate) version: u32,
    /// The process.
    pub(crate) pid: u32,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Mount the image of the grant that comes along, the first file. The answer is a [`Mounted`]. Where a second file comes, a process's
    /// (pidfd_open(2)), it is unmounted when that process has ended.
    Mount(MountRequest),
    /// Unmount what is mounted there.
    Unmount {
        /// The mount point.
        target: PathBuf,
    },
    /// Take what is mounted there out of the tree and forget its keys, whoever has files of it open.
    Cut {
        /// The mount point.
        target: PathBuf,
    },
    /// Fetch all of an image; answered when that is done.
    Complete {
        /// The mount point, or the image's name.
        what: String,
    },
    /// Tell of all mounts: a list of [`Shown`].
    List,
    /// Let another process go on.
    Restart,
}

/// A mount that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// Where: an absolute path, without links; `None` for a place of the daemon's own.
    pub target: Option<PathBuf>,
    /// The directory's device and inode, as whoever asks sees it: the daemon has to see the same.
    pub seen: Option<(u64, u64)>,
    /// How it becomes a filesystem.
    pub front: Front,
    /// Where what is read is kept, and how long is waited.
    pub options: LazyOptions,
    /// Whether all of it is fetched meanwhile.
    pub complete: bool,
    /// Whether its keys were lent to the process that comes along: when that ends, the image is [cut](Request::Cut).
    #[serde(default)]
    pub lent: bool,
}

/// A mount that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// Where.
    pub target: PathBuf,
    /// What serves it: `erofs` or `fuse`.
    pub front: String,
    /// The image.
    pub manifest: String,
    /// What to run of it.
    pub config: Value,
}

/// A mount that there is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The image, as a person named it.
    pub name: String,
    /// Its manifest.
    pub manifest: String,
    /// Where.
    pub target: PathBuf,
    /// What serves it.
    pub front: String,
    /// Since when.
    pub since: String,
    /// Stored bytes of its data blobs that are in the cache.
    pub local_bytes: u64,
    /// Stored bytes that they have.
    pub total_bytes: u64,
    /// Whether it is being fetched as a whole.
    pub completing: bool,
    /// Whether it was.
    pub complete: bool,
    /// Whether it is unmounted already, and files of it are still open.
    pub leaving: bool,
    /// The last thing that failed.
    pub failure: Option<ShownFailure>,
}

/// A read, or the fetching of all, that failed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ShownFailure {
    /// When, RFC 3339.
    pub at: String,
    /// Why.
    pub reason: String,
}

/// What comes of a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ok(Value),
    #[serde(untagged)]
    Failed {
        error: String,
        exit: u8,
    },
}

/// Sends a request.
pub(crate) fn ask(stream: &UnixStream, request: &Request, files: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(request)?;
    Ok(descriptors::send(stream, &bytes, files)?)
}

/// Receives a request, and the files that came with it.
pub(crate) fn asked(stream: &UnixStream) -> anyhow::Result<(Request, Vec<OwnedFd>)> {
    let (bytes, files) = descriptors::receive(stream)?;
    let value: Value = serde_json::from_slice(&bytes)?;
    let request: Request = serde_json::from_value(value.clone())?;
    // serde passes over what it does not know beside a tag.
    anyhow::ensure!(serde_json::to_value(&request)? == value, "it has fields that are not known");
    let allowed = if matches!(request, Request::Mount(_)) { 1..=2 } else { 0..=0 };
    anyhow::ensure!(allowed.contains(&files.len()), "it came with {} files", files.len());
    Ok((request, files))
}

/// Sends what came of a request.
pub(crate) fn answer(
    stream: &UnixStream,
    exit: fn(&anyhow::Error) -> u8,
    result: anyhow::Result<Value>,
) -> io::Result<()> {
    let answer = match result {
        Ok(value) => Answer::Ok(value),
        Err(error) => Answer::Failed { error: format!("{error:#}"), exit: exit(&error) },
    };
    write_frame(stream, &answer)
}

/// Receives what came of a request.
pub(crate) fn answered(stream: &UnixStream) -> io::Result<anyhow::Result<Value>> {
    Ok(match read_frame(stream)? {
        Answer::Ok(value) => Ok(value),
        Answer::Failed { error, exit } => Err(Problem::Refused { message: error, exit }.into()),
    })
}

pub(crate) fn write_frame(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= FRAME);
    let length = length.ok_or_else(|| io::Error::other("an answer of more than 16 MiB"))?;
    stream.write_all(&length.to_le_bytes())?;
    stream.write_all(&bytes)
}

pub(crate) fn read_frame<T: DeserializeOwned>(mut stream: &UnixStream) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    // Memory grows with what comes.
    let mut bytes = Vec::new();
    stream.take(length.into()).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != u64::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use serde_json::json;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        one.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        (one, other)
    }

    fn mount() -> Request {
        Request::Mount(MountRequest {
            target: Some("/mnt".into()),
            seen: Some((1, 2)),
            front: Front::Best,
            options: LazyOptions {
                directory: "/lazy".into(),
                cache: "/cache".into(),
                cache_limit: 7,
                patience: Duration::from_secs(3),
                bandwidth: std::num::NonZeroU64::new(1_000_000),
            },
            complete: true,
            lent: true,
        })
    }

    #[test]
    fn requests_arrive_with_their_file_and_answers_keep_their_codes() {
        let (daemon, command) = pair();
        let file = tempfile::tempfile().unwrap();
        for (request, files) in [
            (mount(), 1),
            (mount(), 2),
            (Request::List, 0),
            (Request::Unmount { target: "/mnt".into() }, 0),
            (Request::Cut { target: "/mnt".into() }, 0),
            (Request::Complete { what: "x".into() }, 0),
            (Request::Restart, 0),
        ] {
            ask(&command, &request, &vec![file.as_fd(); files]).unwrap();
            let (came, with) = asked(&daemon).unwrap();
            assert_eq!((came, with.len()), (request, files));
        }
        let exit = |_: &anyhow::Error| 6;
        answer(&daemon, exit, Ok(json!({ "a": 1 }))).unwrap();
        assert_eq!(answered(&command).unwrap().unwrap(), json!({ "a": 1 }));
        answer(&daemon, exit, Err(Problem::InUse("taken".into()).into())).unwrap();
        let error = answered(&command).unwrap().unwrap_err();
        let Some(Problem::Refused { message, exit: 6 }) = error.downcast_ref() else { panic!("{error:?}") };
        assert_eq!(message, "taken");
    }

    #[test]
    fn what_is_no_request_is_an_error() {
        let list = br#"{"op":"list"}"#.to_vec();
        let extra = br#"{"op":"list","x":1}"#.to_vec();
        for bytes in [b"".to_vec(), b"{}".to_vec(), b"\xff".to_vec(), br#"{"op":"format"}"#.to_vec(), extra] {
            let (daemon, command) = pair();
            descriptors::send(&command, &bytes, &[]).unwrap();
            assert!(asked(&daemon).is_err(), "{}", String::from_utf8_lossy(&bytes));
        }
        let (daemon, command) = pair();
        descriptors::send(&command, &list, &[command.as_fd()]).unwrap();
        assert!(asked(&daemon).is_err(), "a list needs no file");
        ask(&command, &mount(), &[command.as_fd(); 3]).unwrap();
        assert!(asked(&daemon).is_err(), "three files");
        // Whoever says nothing, or not all of it, is not waited for, nor does it fill memory.
        for bytes in [&b""[..], b"\x05\0", b"\xff\xff\xff\xff\0\0\0\0", b"\x05\0\0\0\0\0\0\0x"] {
            let (daemon, command) = pair();
            (&command).write_all(bytes).unwrap();
            assert!(asked(&daemon).is_err());
        }
    }

    #[test]
    fn frames_have_a_limit_and_an_end() {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\x05\0\0\0abc", b"\0\0\0\0", b"\x02\0"] {
            let (one, other) = pair();
            (&other).write_all(bytes).unwrap();
            drop(other);
            assert!(read_frame::<Hello>(&one).is_err());
        }
    }
}

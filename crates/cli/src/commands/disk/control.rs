//! How commands talk to a running disk: a socket file in the run directory, for its owner only.
//!
//! One request a connection: a line of JSON, answered by a line of JSON.
//!
//! ```text
//! {"op":"info"}                   {"ok":{…}}
//! {"op":"grow","size":1073741824} {"ok":{…}}
//! {"op":"close"}                  {"ok":null} once all is on the store; the connection ends when the store is free for others
//!                                 {"error":"…","exit":6}
//! ```

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{exit, output::Exit};

/// The most bytes of a request.
const REQUEST_LIMIT: u64 = 4096;
/// The most bytes of an answer.
const ANSWER_LIMIT: u64 = 4 << 20;
/// How long a peer may take to say or to hear something.
const PEER_TIME: Duration = Duration::from_secs(5);
/// How long a disk may take to carry out a request: closing writes out everything.
const WORK_TIME: Duration = Duration::from_secs(600);
/// How long a disk that is closed may take to let go of its store. What it holds then is no more than locks.
const LEAVE_TIME: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// Show yourself.
    Info,
    /// Become larger.
    Grow {
        /// The new size in bytes.
        size: u64,
    },
    /// End.
    Close,
}

/// What comes of it.
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

/// A process that serves could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refused {
    message: String,
    exit: u8,
}

impl Refused {
    /// As the error that it stands for.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        Self { message: format!("{error:#}"), exit: exit::of(error) as u8 }
    }

    /// The code that it would have ended with.
    pub(crate) fn exit(&self) -> Exit {
        Exit::of_code(self.exit)
    }
}

/// What is answered.
pub(super) struct Reply {
    pub(super) result: anyhow::Result<Value>,
    /// The disk has ended, well or not.
    pub(super) last: bool,
}

/// Answers requests at `socket` until the last, whose client then waits for the end of the connection.
pub(super) fn serve(
    socket: &Path,
    answer: impl Fn(Request) -> Reply + Send + 'static,
) -> io::Result<JoinHandle<UnixStream>> {
    let listener = UnixListener::bind(socket)?;
    thread::Builder::new().name("control".into()).spawn(move || {
        loop {
            match listener.accept().and_then(|(client, _)| serve_one(client, &answer)) {
                Ok(Some(last)) => return last,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "a request to a running disk was not answered");
                    // Where there are no descriptors, trying again at once would only burn time.
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    })
}

/// Answers one client; the last is given back.
fn serve_one(client: UnixStream, answer: &impl Fn(Request) -> Reply) -> io::Result<Option<UnixStream>> {
    client.set_read_timeout(Some(PEER_TIME))?;
    client.set_write_timeout(Some(PEER_TIME))?;
    let mut line = String::new();
    BufReader::new(&client).take(REQUEST_LIMIT).read_line(&mut line)?;
    let Reply { result, last } = match parse(&line) {
        Ok(request) => answer(request),
        Err(error) => Reply { result: Err(anyhow::anyhow!("this is no request: {error:#}")), last: false },
    };
    let mut text = serde_json::to_vec(&match result {
        Ok(value) => Answer::Ok(value),
        Err(error) => {
            let Refused { message, exit } = Refused::of(&error);
            Answer::Failed { error: message, exit }
        }
    })?;
    text.push(b'\n');
    // The disk is closed all the same where nobody waits for the answer.
    let written = (&client).write_all(&text);
    if last { Ok(Some(client)) } else { written.map(|()| None) }
}

/// Reads a request: exactly one, since serde passes over what it does not know beside a tag.
fn parse(line: &str) -> anyhow::Result<Request> {
    let value: Value = serde_json::from_str(line)?;
    let request: Request = serde_json::from_value(value.clone())?;
    anyhow::ensure!(serde_json::to_value(request)? == value, "it has fields that are not known");
    Ok(request)
}

/// Asks a running disk.
pub(super) fn ask(socket: &Path, request: Request) -> anyhow::Result<Value> {
    let mut line = String::new();
    let mut talk = || -> io::Result<()> {
        let stream = UnixStream::connect(socket)?;
        stream.set_write_timeout(Some(PEER_TIME))?;
        stream.set_read_timeout(Some(WORK_TIME))?;
        (&stream).write_all(format!("{}\n", serde_json::to_string(&request)?).as_bytes())?;
        let mut answers = BufReader::new(&stream);
        answers.by_ref().take(ANSWER_LIMIT).read_line(&mut line)?;
        if request == Request::Close {
            // The next command is to find the store free. If that takes too long, it says so itself.
            stream.set_read_timeout(Some(LEAVE_TIME))?;
            let _ = answers.read(&mut [0]);
        }
        Ok(())
    };
    talk().with_context(|| format!("{}: the running disk does not answer", socket.display()))?;
    match serde_json::from_str(&line).context("the running disk ended without an answer")? {
        Answer::Ok(value) => Ok(value),
        Answer::Failed { error, exit } => Err(Refused { message: error, exit }.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::exit::Usage;

    #[test]
    fn requests_are_answered_and_errors_keep_their_codes() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let served = serve(&socket, |request| {
            let result = match request {
                Request::Info => Ok(json!({ "size": 5 })),
                Request::Grow { size } => Err(Usage(format!("{size} is too much")).into()),
                Request::Close => Ok(Value::Null),
            };
            Reply { result, last: request == Request::Close }
        })
        .unwrap();
        assert_eq!(ask(&socket, Request::Info).unwrap(), json!({ "size": 5 }));
        let error = ask(&socket, Request::Grow { size: 7 }).unwrap_err();
        assert_eq!(error.to_string(), "7 is too much");
        assert_eq!(exit::of(&error), Exit::Usage);
        let path = socket.clone();
        let asked = thread::spawn(move || ask(&path, Request::Close).unwrap());
        let last = served.join().unwrap();
        // It waits until everything is let go of.
        thread::sleep(Duration::from_millis(50));
        assert!(!asked.is_finished());
        drop(last);
        assert_eq!(asked.join().unwrap(), Value::Null);
        assert!(ask(&socket, Request::Info).is_err());
    }

    #[test]
    fn senseless_requests_are_errors_and_disturb_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let served =
            serve(&socket, |request| Reply { result: Ok(Value::Null), last: request == Request::Close }).unwrap();
        for bytes in [
            &b""[..],
            b"\n",
            b"{}\n",
            b"{\"op\":\"format\"}\n",
            b"{\"op\":\"info\",\"x\":1}\n",
            b"\xff\n",
            &[b'x'; 5000],
        ] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            // What is too long may be refused before all of it was taken.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(!answer.contains("\"ok\""), "{answer}");
        }
        let asked = thread::spawn(move || ask(&socket, Request::Close).unwrap());
        drop(served.join().unwrap());
        asked.join().unwrap();
    }

    #[test]
    fn a_disk_that_ended_badly_is_asked_nothing_more() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let served = serve(&socket, |_| Reply { result: Err(anyhow::anyhow!("no room")), last: true }).unwrap();
        let asked = thread::spawn(move || ask(&socket, Request::Close).unwrap_err());
        drop(served.join().unwrap());
        assert_eq!(asked.join().unwrap().to_string(), "no room");
    }
}

//! What a registry may do wrong: tests decide it for each request.

use std::time::Duration;

/// What the registry does with one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Fault {
    /// Answers it.
    #[default]
    Serve,
    /// Answers it after a time.
    Delay(Duration),
    /// Sends the body in pieces of `bytes`, with a pause before each.
    Slow {
        /// The size of a piece.
        bytes: usize,
        /// The pause.
        pause: Duration,
    },
    /// Closes the connection without any answer.
    Close,
    /// Closes the connection after so many bytes of the body, whose length was announced truly.
    CutAfter(u64),
    /// Sends so many bytes of the body, then nothing more, until the client leaves or the registry ends.
    StallAfter(u64),
    /// Announces another length than the body has; then closes the connection.
    ContentLength(u64),
    /// Announces another `Content-Range`.
    ContentRange(String),
    /// Serves the whole content, status 200, where a range was asked for.
    IgnoreRange,
    /// Answers 206 and this range's headers, but the content from its first byte on.
    WrongRangeBody,
    /// Sends somewhere else; `{self}` in the location stands for this registry's URL.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: u16,
        /// The `Location`.
        location: String,
    },
    /// Answers exactly that.
    Answer {
        /// The status.
        status: u16,
        /// Headers besides `Content-Length`.
        headers: Vec<(String, String)>,
        /// The body.
        body: Vec<u8>,
    },
    /// Adds headers to the true answer, or replaces those of the same name.
    Headers(Vec<(String, String)>),
    /// Inverts the lowest bit of the byte at that offset of the whole content.
    FlipBit(u64),
}

impl Fault {
    /// An answer of this status with nothing but a line of HTML.
    pub fn html(status: u16) -> Self {
        let headers = vec![("Content-Type".into(), "text/html".into())];
        Self::Answer { status, headers, body: b"<html><body>no registry here</body></html>".to_vec() }
    }

    /// 429 with `Retry-After`.
    pub fn too_many_requests(seconds: u32) -> Self {
        let headers = vec![("Retry-After".into(), seconds.to_string())];
        Self::Answer { status: 429, headers, body: Vec::new() }
    }
}

//! The little of HTTP/1.1 that a registry needs: a request's head and body, and the pieces of an answer.
//!
//! Limits: 64 KiB of head, 128 headers. Whatever is outside of them ends the connection.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, BufRead, Read},
    os::unix::fs::FileExt as _,
    sync::Arc,
};

const HEAD_LIMIT: u64 = 64 << 10;
const HEADER_LIMIT: usize = 128;

/// One request, as the fault hook and the log see it.
#[derive(Clone)]
pub struct Request {
    /// `GET`, `PUT`, …
    pub method: String,
    /// The path, still percent-encoded, without the query.
    pub path: String,
    /// What followed the question mark, or nothing.
    pub query: String,
    /// Header names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Which request of this registry it is, from 1.
    pub number: usize,
    /// Which request for this method and path it is, from 1.
    pub attempt: usize,
}

impl Request {
    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The first value of a parameter of the query, decoded.
    pub fn parameter(&self, name: &str) -> Option<String> {
        parameter(&self.query, name)
    }

    /// Whether it fetches (a part of) a blob.
    pub fn is_blob_get(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/sha")
    }

    /// Whether it fetches a manifest.
    pub fn is_manifest_get(&self) -> bool {
        self.method == "GET" && self.path.contains("/manifests/")
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} {} {}", self.number, self.method, self.path)?;
        if !self.query.is_empty() {
            write!(f, "?{}", self.query)?;
        }
        if let Some(range) = self.header("range") {
            write!(f, " [{range}]")?;
        }
        Ok(())
    }
}

/// The first value of `name` in a query or a form, decoded.
pub(crate) fn parameter(query: &str, name: &str) -> Option<String> {
    parameters(query, name).next()
}

/// All values of `name` in a query or a form, decoded.
pub(crate) fn parameters<'a>(query: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key) == name).then(|| decode(value))
    })
}

/// Percent-decoding, and `+` for a space; what is no escape stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        let escaped = (first == b'%').then(|| tail.get(..2)).flatten().and_then(|hex| {
            let hex = std::str::from_utf8(hex).ok()?;
            u8::from_str_radix(hex, 16).ok()
        });
        match (escaped, first) {
            (Some(byte), _) => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            (None, b'+') => bytes.push(b' '),
            (None, byte) => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Reads a request's head; `None` when the peer closed the connection before it.
pub(crate) fn read_head(reader: &mut dyn BufRead) -> io::Result<Option<Request>> {
    let mut reader = reader.take(HEAD_LIMIT);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_ascii_whitespace();
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(invalid("not a request line"));
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        headers: BTreeMap::new(),
        number: 0,
        attempt: 0,
    };
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        if !line.ends_with('\n') || request.headers.len() > HEADER_LIMIT {
            return Err(invalid("head cut or too large"));
        }
        let text = line.trim_end();
        if text.is_empty() {
            return Ok(Some(request));
        }
        let (name, value) = text.split_once(':').ok_or_else(|| invalid("not a header"))?;
        request
            .headers
            .entry(name.to_ascii_lowercase())
            .and_modify(|before| *before = format!("{before}, {}", value.trim()))
            .or_insert_with(|| value.trim().to_owned());
    }
}

/// A request's body, as its length or its chunks delimit it.
pub(crate) struct Body<'a> {
    reader: &'a mut dyn BufRead,
    left: u64,
    chunked: bool,
    ended: bool,
}

impl<'a> Body<'a> {
    pub(crate) fn of(request: &Request, reader: &'a mut dyn BufRead) -> io::Result<Self> {
        let chunked = request.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let left = match request.header("content-length") {
            _ if chunked => 0,
            Some(text) => text.parse().map_err(|_| invalid("Content-Length is no number"))?,
            None => 0,
        };
        Ok(Self { reader, left, chunked, ended: !chunked && left == 0 })
    }

    /// Reads and forgets what is left, so that the connection's next request is found.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(drop)
    }

    /// All of it, if it has at most `limit` bytes.
    pub(crate) fn read_all(&mut self, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        self.take(limit + 1).read_to_end(&mut bytes)?;
        Ok((bytes.len() as u64 <= limit).then_some(bytes))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.take(HEAD_LIMIT).read_line(&mut line)?;
        if line.ends_with('\n') { Ok(line.trim_end().to_owned()) } else { Err(invalid("chunk cut")) }
    }
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 && self.chunked {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            self.left = u64::from_str_radix(size, 16).map_err(|_| invalid("chunk size is no number"))?;
            if self.left == 0 {
                while !self.line()?.is_empty() {}
                self.ended = true;
                return Ok(0);
            }
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let (window, _) = buffer.split_at_mut(most);
        let count = self.reader.read(window)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        if self.left == 0 {
            if self.chunked {
                self.line()?;
            } else {
                self.ended = true;
            }
        }
        Ok(count)
    }
}

/// Bytes to be sent: a window of something in memory or in a file.
#[derive(Debug)]
pub(crate) struct Content {
    bytes: Bytes,
    /// Where the window begins in the whole.
    pub(crate) start: u64,
    /// What is left of the window.
    pub(crate) left: u64,
}

#[derive(Debug)]
enum Bytes {
    Memory(Arc<Vec<u8>>),
    File(File),
}

impl Content {
    pub(crate) fn memory(bytes: Arc<Vec<u8>>) -> Self {
        let left = bytes.len() as u64;
        Self { bytes: Bytes::Memory(bytes), start: 0, left }
    }

    pub(crate) fn file(file: File) -> io::Result<Self> {
        let left = file.metadata()?.len();
        Ok(Self { bytes: Bytes::File(file), start: 0, left })
    }

    /// Narrows it to `start..=last`; the caller has checked both against [`Content::left`].
    pub(crate) fn window(mut self, start: u64, last: u64) -> Self {
        self.left = (last + 1).saturating_sub(start);
        self.start = start;
        self
    }

    pub(crate) fn into_vec(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let (window, _) = buffer.split_at_mut(most);
        let count = match &self.bytes {
            Bytes::Memory(bytes) => {
                let from = usize::try_from(self.start).unwrap_or(usize::MAX);
                bytes.get(from..).unwrap_or_default().read(window)?
            }
            Bytes::File(file) => file.read_at(window, self.start)?,
        };
        self.start += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Content,
}

impl Response {
    pub(crate) fn new(status: u16) -> Self {
        Self::bytes(status, Vec::new())
    }

    pub(crate) fn bytes(status: u16, body: Vec<u8>) -> Self {
        Self { status, headers: Vec::new(), body: Content::memory(Arc::new(body)) }
    }

    pub(crate) fn json(status: u16, body: &serde_json::Value) -> Self {
        Self::bytes(status, body.to_string().into_bytes()).with("Content-Type", "application/json")
    }

    /// An error as the distribution specification words it.
    pub(crate) fn error(status: u16, code: &str, message: &str) -> Self {
        Self::json(status, &serde_json::json!({ "errors": [{ "code": code, "message": message }] }))
    }

    pub(crate) fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
}

/// The reason phrase of a status, for people who watch the wire.
pub(crate) fn reason(status: u16) -> &'static str {
    match status {
        200..=299 => "OK",
        300..=399 => "Redirect",
        400..=499 => "Refused",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_outside_the_grammar_and_the_limits_are_refused() {
        let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(70_000));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", (0..200).map(|n| format!("h{n}: 1\r\n")).collect::<String>());
        for bad in
            ["GET /\r\n\r\n", "\r\n", "GET / HTTP/2\r\n\r\n", "GET / HTTP/1.1\r\nno colon\r\n\r\n", "GET", &long, &many]
        {
            assert!(read_head(&mut bad.as_bytes()).is_err(), "{bad:.60}");
        }
        assert!(read_head(&mut &b""[..]).unwrap().is_none());
        let request = read_head(&mut &b"GET /a?b=c%2Fd&e=1+2 HTTP/1.1\r\nHost: x\r\n\r\n"[..]).unwrap().unwrap();
        assert_eq!((request.path.as_str(), request.header("host")), ("/a", Some("x")));
        assert_eq!(request.parameter("b").as_deref(), Some("c/d"));
        assert_eq!(request.parameter("e").as_deref(), Some("1 2"));
    }

    #[test]
    fn bodies_end_where_their_framing_says() {
        let read = |head: &str, body: &[u8]| {
            let request = read_head(&mut format!("PUT / HTTP/1.1\r\n{head}\r\n\r\n").as_bytes()).unwrap().unwrap();
            let mut reader = body;
            let mut bytes = Vec::new();
            Body::of(&request, &mut reader)?.read_to_end(&mut bytes).map(|_| bytes)
        };
        assert_eq!(read("Content-Length: 3", b"abcdef").unwrap(), b"abc");
        assert_eq!(read("Transfer-Encoding: chunked", b"3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\nrest").unwrap(), b"abcde");
        assert!(read("Content-Length: 9", b"abc").is_err());
        assert!(read("Content-Length: x", b"abc").is_err());
        assert!(read("Transfer-Encoding: chunked", b"zz\r\n").is_err());
        assert!(read("Transfer-Encoding: chunked", b"5\r\nab").is_err());
    }
}

//! A blob as a stream that survives cut connections: it goes on by `Range` from the byte that it has, at the same endpoint or at
//! the next one.
//!
//! It gives exactly `descriptor.size` bytes or an error. The bytes are not verified; a mirror that sends other bytes is seen only
//! by the caller's digest, when they can no longer be taken back.

use std::{
    io::{self, Read},
    sync::Arc,
};

use http::{Method, header};

use super::{
    exchange::{Body, Response, describe_io, pause},
    remote::{Remote, RequestParts},
    retry::{Backoff, Failure},
    source::Endpoints,
};
use crate::{
    manifest::{BLOB_LIMIT, Descriptor},
    source::TransportError,
};

/// So many bytes after a failure, it is forgiven.
const FORGIVEN_AFTER: u64 = 1 << 20;

/// A `Content-Range` header (RFC 9110 §14.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The first byte's position.
    pub start: u64,
    /// The last byte's position.
    pub end: u64,
    /// The length of the whole, where it is said.
    pub total: Option<u64>,
}

/// Reads a `Content-Range` header of a 206 answer; `None` where it is malformed or contradicts itself.
pub fn parse_content_range(value: &[u8]) -> Option<ContentRange> {
    let text = std::str::from_utf8(value).ok()?.trim();
    let unit = text.get(..6).filter(|unit| unit.eq_ignore_ascii_case("bytes "))?;
    let (range, total) = text.get(unit.len()..)?.trim().split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let number = |text: &str| {
        let digits = !text.is_empty() && text.len() <= 19 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let total = if total == "*" { None } else { Some(number(total)?) };
    let range = ContentRange { start: number(start)?, end: number(end)?, total };
    (range.start <= range.end && range.total.is_none_or(|total| range.end < total)).then_some(range)
}

/// One answer that bytes are being taken from.
struct Current {
    body: Body,
    /// Bytes of this answer that are still to come.
    left: u64,
}

pub(crate) struct BlobStream {
    endpoints: Arc<Endpoints>,
    descriptor: Descriptor,
    offset: u64,
    index: usize,
    current: Option<Current>,
    backoff: Backoff,
    failed_at: u64,
    given_up: Vec<usize>,
    ended: bool,
}

impl BlobStream {
    /// Starts a stream; the first answer has come when this returns.
    pub(crate) fn open(endpoints: &Arc<Endpoints>, descriptor: &Descriptor) -> Result<Self, TransportError> {
        let index = endpoints.order().first().copied().unwrap_or_default();
        if descriptor.size > BLOB_LIMIT {
            return Err(TransportError::TooLarge {
                what: format!("blob {}", descriptor.digest),
                place: endpoints.remote(index).place(),
                limit: BLOB_LIMIT,
            });
        }
        let mut stream = Self {
            backoff: endpoints.backoff(index),
            endpoints: endpoints.clone(),
            descriptor: descriptor.clone(),
            offset: 0,
            index,
            current: None,
            failed_at: 0,
            given_up: Vec::new(),
            ended: false,
        };
        while stream.current.is_none() {
            match stream.request() {
                Ok(current) => stream.current = Some(current),
                Err(failure) => stream.failed(failure)?,
            }
        }
        Ok(stream)
    }

    fn remote(&self) -> &Remote {
        self.endpoints.remote(self.index)
    }

    fn what(&self) -> String {
        format!("blob {}", self.descriptor.digest)
    }

    /// Asks for what is missing.
    fn request(&self) -> Result<Current, Failure> {
        let remote = self.remote();
        let url = remote.url(&format!("blobs/{}", self.descriptor.digest))?;
        let response = remote.send(&remote.pull_scope(), &mut || {
            let parts = RequestParts::new(Method::GET, &url);
            if self.offset == 0 { parts } else { parts.header(header::RANGE, format!("bytes={}-", self.offset)) }
        })?;
        match response.status {
            200 => self.whole(response),
            206 if self.offset > 0 => self.rest(response),
            206 | 416 => Err(Failure::Protocol(format!(
                "{}: status {} to a request that does not ask for it",
                response.url, response.status
            ))),
            _ => Err(response.into_failure()),
        }
    }

    /// The whole blob: what we have of it is read and thrown away.
    fn whole(&self, mut response: Response) -> Result<Current, Failure> {
        let size = self.descriptor.size;
        check_type(&self.descriptor, &response)?;
        if let Some(length) = response.content_length().filter(|length| *length != size) {
            let reason = format!("{}: Content-Length {length}, but the manifest says {size} bytes", response.url);
            return Err(Failure::Protocol(reason));
        }
        let mut skipped = (&mut response.body).take(self.offset);
        let count = io::copy(&mut skipped, &mut io::sink())
            .map_err(|error| Failure::Network(format!("{}: {}", response.url, describe_io(&error))))?;
        if count < self.offset {
            return Err(Failure::Network(format!("{}: the blob ended at {count} of {size} bytes", response.url)));
        }
        Ok(Current { body: response.body, left: size - self.offset })
    }

    /// The part from our offset on.
    fn rest(&self, response: Response) -> Result<Current, Failure> {
        let size = self.descriptor.size;
        check_type(&self.descriptor, &response)?;
        let text = response.headers.get(header::CONTENT_RANGE).map(header::HeaderValue::as_bytes).unwrap_or_default();
        let range = parse_content_range(text).filter(|range| {
            range.start == self.offset && range.end < size && range.total.is_none_or(|total| total == size)
        });
        let Some(range) = range else {
            let text = super::exchange::printable(&String::from_utf8_lossy(text), 80);
            let reason = format!(
                "{}: Content-Range '{text}', but bytes {}-{} of {size} were asked for",
                response.url,
                self.offset,
                size - 1
            );
            return Err(Failure::Protocol(reason));
        };
        let left = range.end - range.start + 1;
        if let Some(length) = response.content_length().filter(|length| *length != left) {
            let reason = format!("{}: Content-Length {length} of a range of {left} bytes", response.url);
            return Err(Failure::Protocol(reason));
        }
        Ok(Current { body: response.body, left })
    }

    /// Waits and lets the same endpoint be asked again, or goes on to the next one, or gives up.
    fn failed(&mut self, failure: Failure) -> Result<(), TransportError> {
        self.current = None;
        if self.offset - self.failed_at >= FORGIVEN_AFTER {
            self.backoff = self.endpoints.backoff(self.index);
            self.given_up.clear();
        }
        self.failed_at = self.offset;
        let what = self.what();
        let attempts = self.backoff.attempts();
        if let Some(delay) = self.backoff.after(&failure) {
            self.remote().note_retry(&what, &failure, delay);
            pause(&what, &failure, delay);
            return Ok(());
        }
        if failure.is_transient() {
            self.endpoints.mark_broken(self.index);
        }
        self.given_up.push(self.index);
        let next = self.endpoints.order().into_iter().find(|index| !self.given_up.contains(index));
        let Some(next) = next else {
            return Err(failure.into_error(&what, &self.remote().place(), attempts));
        };
        self.endpoints.note_next(&what, self.index, next, &failure);
        self.index = next;
        self.backoff = self.endpoints.backoff(next);
        Ok(())
    }

    /// After the last byte: whether the peer has more.
    fn finish(&mut self) -> io::Result<usize> {
        if let Some(mut current) = self.current.take() {
            // A failure here is none: all bytes came.
            if current.body.read(&mut [0]).is_ok_and(|count| count > 0) {
                return Err(self.final_error(Failure::TooLarge(self.descriptor.size), 1));
            }
        }
        self.ended = true;
        Ok(0)
    }

    fn final_error(&mut self, failure: Failure, attempts: u32) -> io::Error {
        io::Error::other(failure.into_error(&self.what(), &self.remote().place(), attempts))
    }
}

/// A page of a proxy or a portal is no blob.
pub(super) fn check_type(descriptor: &Descriptor, response: &Response) -> Result<(), Failure> {
    if response.is_html() && !descriptor.media_type.starts_with("text/html") {
        return Err(Failure::Protocol(format!(
            "{}: an HTML page instead of a blob: a proxy or a portal answered",
            response.url
        )));
    }
    Ok(())
}

impl Read for BlobStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.offset == self.descriptor.size {
            return self.finish();
        }
        loop {
            let Some(current) = &mut self.current else {
                match self.request() {
                    Ok(current) => self.current = Some(current),
                    Err(failure) => self.failed(failure).map_err(io::Error::other)?,
                }
                continue;
            };
            let most = buffer.len().min(usize::try_from(current.left).unwrap_or(usize::MAX));
            let result = current.body.read(buffer.get_mut(..most).unwrap_or_default());
            match result {
                Ok(0) => {
                    let words = format!("the blob ended at {} of {} bytes", self.offset, self.descriptor.size);
                    self.failed(Failure::Network(words)).map_err(io::Error::other)?;
                }
                Ok(count) => {
                    self.offset += count as u64;
                    current.left -= count as u64;
                    if current.left == 0 && self.offset < self.descriptor.size {
                        self.current = None;
                    }
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.failed(Failure::Network(describe_io(&error))).map_err(io::Error::other)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        let range = |start, end, total| Some(ContentRange { start, end, total });
        assert_eq!(parse_content_range(b"bytes 0-0/1"), range(0, 0, Some(1)));
        assert_eq!(parse_content_range(b" Bytes  5-9/* "), range(5, 9, None));
        for text in [
            &b""[..],
            b"bytes",
            b"bytes ",
            b"bytes 0-1",
            b"bytes */10",
            b"bytes 2-1/10",
            b"bytes 0-10/10",
            b"bytes -1-2/10",
            b"bytes 0-99999999999999999999/*",
            b"bytes +0-1/2",
            b"items 0-1/2",
            b"bytes 0-1/2x",
            b"bytes 0-1/\xff",
        ] {
            assert_eq!(parse_content_range(text), None, "{text:?}");
        }
    }
}

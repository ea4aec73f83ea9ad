//! Blobs on their way to a registry (distribution specification, "Pushing Blobs").
//!
//! What fits into [`SMALL`] bytes is read first, sent by `POST` and `PUT`, and repeated when that fails. Larger content is a stream
//! that cannot be read twice: it goes out in one `PATCH`, or, with `upload_chunk`, in pieces that are repeated each. The `PUT`
//! that makes the blob visible is sent after the content's digest held; an upload that failed before is cancelled.

use std::io::{self, Read};

use http::{Method, header};
use nacre_core::{Algorithm, Digest, Hasher};

use super::{
    exchange::{Payload, Response},
    remote::{Remote, RequestParts},
    retry::Failure,
    token::Scope,
    url::Url,
};
use crate::{manifest::Descriptor, source::TransportError};

/// The most bytes of a blob that is kept in memory to be sent again.
const SMALL: usize = 4 << 20;

/// One blob's upload to one repository.
pub(crate) struct Upload<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) scope: Scope,
}

impl Upload<'_> {
    /// Sends a blob and checks it against `expected`.
    pub(crate) fn put(
        &self,
        content: &mut dyn Read,
        expected: Option<&Descriptor>,
    ) -> Result<(Digest, u64), TransportError> {
        let what = expected.map_or_else(|| "blob".to_owned(), |expected| format!("blob {}", expected.digest));
        let read_failed = |error| Failure::Content(error).into_error(&what, &self.remote.place(), 1);
        let mut start = Vec::new();
        (&mut *content).take(SMALL as u64 + 1).read_to_end(&mut start).map_err(read_failed)?;
        if start.len() <= SMALL {
            let digest = Digest::of(algorithm(expected), &start);
            check(&what, expected, digest, start.len() as u64)?;
            self.remote.retried(&what, || self.small(&start, &digest))?;
            return Ok((digest, start.len() as u64));
        }
        let mut content =
            Hashed { content: (&start[..]).chain(content), hasher: Hasher::new(algorithm(expected)), count: 0 };
        let session = self.remote.retried(&what, || self.start())?;
        let chunk = self.remote.client.config().upload_chunk;
        let result = if chunk == 0 {
            self.stream(&session, &mut content, expected.map(|expected| expected.size))
        } else {
            self.pieces(&what, &session, &mut content, chunk)
        };
        let session_now = match result {
            Ok(session) => session,
            Err(failure) => {
                self.cancel(&session);
                return Err(failure.into_error(&what, &self.remote.place(), 1));
            }
        };
        let more = content.content.read(&mut [0]).map_err(read_failed)?;
        let (digest, size) = (content.hasher.finish(), content.count + more as u64);
        if let Err(error) = check(&what, expected, digest, size) {
            self.cancel(&session_now);
            return Err(error);
        }
        self.remote.retried(&what, || self.finish(&session_now, &digest, &mut Payload::Bytes(&[])))?;
        Ok((digest, size))
    }

    /// Starts an upload session.
    fn start(&self) -> Result<Url, Failure> {
        let url = self.remote.url("blobs/uploads/")?;
        let make = &mut || RequestParts::new(Method::POST, &url);
        let response = self.remote.send_with(&self.scope, make, &mut Payload::Bytes(&[]))?;
        next_url(response, &[202])
    }

    fn small(&self, bytes: &[u8], digest: &Digest) -> Result<(), Failure> {
        let session = self.start()?;
        self.finish(&session, digest, &mut Payload::Bytes(bytes))
    }

    /// The `PUT` that makes the blob visible, with the last bytes of it.
    fn finish(&self, session: &Url, digest: &Digest, payload: &mut Payload<'_>) -> Result<(), Failure> {
        let url = session.with_query("digest", &digest.to_string());
        let make = &mut || RequestParts::new(Method::PUT, &url).header(header::CONTENT_TYPE, OCTETS);
        let response = self.remote.send_with(&self.scope, make, payload)?;
        if !matches!(response.status, 201 | 204) {
            return Err(response.into_refusal());
        }
        check_echo(&response, digest)
    }

    /// The whole content in one request.
    fn stream(&self, session: &Url, content: &mut dyn Read, length: Option<u64>) -> Result<Url, Failure> {
        let make = &mut || RequestParts::new(Method::PATCH, session).header(header::CONTENT_TYPE, OCTETS);
        let response = self.remote.send_with(&self.scope, make, &mut Payload::Stream(content, length))?;
        next_url(response, &[202, 201, 204])
    }

    /// The content in pieces, each repeated from where the registry says that it is.
    fn pieces(&self, what: &str, session: &Url, content: &mut dyn Read, chunk: usize) -> Result<Url, Failure> {
        let mut session = session.clone();
        let mut offset = 0u64;
        let mut piece = Vec::new();
        loop {
            piece.clear();
            (&mut *content).take(chunk as u64).read_to_end(&mut piece).map_err(Failure::Content)?;
            if piece.is_empty() {
                return Ok(session);
            }
            let mut sent = 0usize;
            let mut again = false;
            while sent < piece.len() {
                let result = self.remote.retrying(what, || {
                    if again {
                        // Some of the piece may have arrived.
                        let (url, have) = self.status(&session)?;
                        let have = have.checked_sub(offset).and_then(|have| usize::try_from(have).ok());
                        sent = have.filter(|have| *have <= piece.len()).ok_or_else(|| {
                            Failure::Protocol("the registry lost a part of the upload that it had taken".into())
                        })?;
                        session = url;
                    }
                    again = true;
                    let rest = piece.get(sent..).unwrap_or_default();
                    if rest.is_empty() {
                        return Ok(());
                    }
                    session = self.piece(&session, rest, offset + sent as u64)?;
                    sent = piece.len();
                    Ok(())
                });
                result.map_err(|(failure, _)| failure)?;
            }
            offset += piece.len() as u64;
        }
    }

    fn piece(&self, session: &Url, bytes: &[u8], offset: u64) -> Result<Url, Failure> {
        let end = offset + bytes.len() as u64 - 1;
        let make = &mut || {
            RequestParts::new(Method::PATCH, session)
                .header(header::CONTENT_TYPE, OCTETS)
                .header(header::CONTENT_RANGE, format!("{offset}-{end}"))
        };
        let response = self.remote.send_with(&self.scope, make, &mut Payload::Bytes(bytes))?;
        if let Some(have) = response.header("range").and_then(end_of_range).filter(|have| *have != end) {
            return Err(Failure::Protocol(format!(
                "the registry has bytes up to {have} of an upload, not up to {end}"
            )));
        }
        next_url(response, &[202])
    }

    /// How many bytes of an upload the registry has, and where to go on.
    fn status(&self, session: &Url) -> Result<(Url, u64), Failure> {
        let response = self.remote.send(&self.scope, &mut || RequestParts::new(Method::GET, session))?;
        let have = response.header("range").and_then(end_of_range).map_or(0, |end| if end == 0 { 0 } else { end + 1 });
        if !matches!(response.status, 202 | 204) {
            return Err(response.into_failure());
        }
        let url = match response.header("location") {
            Some(location) => response.url.join(location).map_err(Failure::Protocol)?,
            None => session.clone(),
        };
        Ok((url, have))
    }

    /// Asks the registry to forget an upload; whether it does is its own affair, since nothing of it is visible.
    fn cancel(&self, session: &Url) {
        let result = self.remote.send(&self.scope, &mut || RequestParts::new(Method::DELETE, session));
        if let Err(failure) = result {
            tracing::debug!(reason = failure.reason(), "an upload could not be cancelled");
        }
    }
}

const OCTETS: &str = "application/octet-stream";

fn algorithm(expected: Option<&Descriptor>) -> Algorithm {
    expected.map_or(Algorithm::Sha256, |expected| expected.digest.algorithm())
}

fn check(what: &str, expected: Option<&Descriptor>, found: Digest, size: u64) -> Result<(), TransportError> {
    let Some(expected) = expected else { return Ok(()) };
    if size > expected.size {
        let place = "what is uploaded".into();
        return Err(TransportError::TooLarge { what: what.into(), place, limit: expected.size });
    }
    if expected.digest != found {
        return Err(TransportError::DigestMismatch { what: what.into(), expected: expected.digest, found });
    }
    if size != expected.size {
        let (place, reason) =
            ("what is uploaded".into(), format!("{size} bytes, but its descriptor says {}", expected.size));
        return Err(TransportError::Protocol { what: what.into(), place, reason });
    }
    Ok(())
}

/// Checks that a registry that repeats a digest repeats ours.
pub(crate) fn check_echo(response: &Response, digest: &Digest) -> Result<(), Failure> {
    let echo = response.header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
    match echo.filter(|echo| echo.algorithm() == digest.algorithm() && echo != digest) {
        Some(echo) => Err(Failure::Protocol(format!("{}: stored as {echo}, sent as {digest}", response.url))),
        None => Ok(()),
    }
}

fn next_url(response: Response, fine: &[u16]) -> Result<Url, Failure> {
    if !fine.contains(&response.status) {
        return Err(response.into_refusal());
    }
    let location = response.header("location");
    let location =
        location.ok_or_else(|| Failure::Protocol(format!("{}: no Location to send the upload to", response.url)))?;
    response
        .url
        .join(location)
        .map_err(|why| Failure::Protocol(format!("{}: the upload's place is {why}", response.url)))
}

/// The end of `[bytes=]0-<end>`.
fn end_of_range(text: &str) -> Option<u64> {
    let (start, end) = text.trim().trim_start_matches("bytes=").split_once('-')?;
    (start == "0").then(|| end.parse().ok()).flatten()
}

/// Hashes and counts what passes.
struct Hashed<R> {
    content: R,
    hasher: Hasher,
    count: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.content.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        self.count += count as u64;
        Ok(count)
    }
}

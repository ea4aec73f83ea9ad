//! A span that is too long for memory: decoded once, from its beginning on and as far as somebody reads, into a file that has no name.
//!
//! Such spans are whole zstd frames, and deflated data without a border for megabytes. The file is where the image's metadata are, on a
//! disk that is trusted: it is plaintext, and read without being verified again.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{Mutex, PoisonError},
};

use super::{
    decode::{DecodeError, Stream},
    format::{Kind, Span},
};
use crate::reader::ReadError;

/// A span that is decoded into a file.
pub(super) struct Spool {
    head: Span,
    pieces: Vec<Span>,
    state: Mutex<State>,
}

struct State {
    file: File,
    stream: Stream,
    /// Pieces that were decoded.
    next: usize,
    /// Bytes that are there.
    there: u64,
    /// What is wrong with it, for good.
    broken: Option<ReadError>,
}

impl Spool {
    /// A span of several pieces, the first of which is its head.
    pub(super) fn new(pieces: Vec<Span>, kind: Kind, window: &[u8], file: File) -> Result<Self, DecodeError> {
        let Some(head) = pieces.first().copied() else {
            return Err(DecodeError::Length { found: 0, expected: 0 });
        };
        let stream = Stream::new(&head, kind, window)?;
        let state = State { file, stream, next: 0, there: 0, broken: None };
        Ok(Self { head, pieces, state: Mutex::new(state) })
    }

    /// Fills `out` with the span's bytes from `offset` on. `fetch` gives a piece's bytes, verified and decrypted.
    pub(super) fn read(
        &self,
        offset: u64,
        out: &mut [u8],
        mut fetch: impl FnMut(&Span) -> Result<Vec<u8>, ReadError>,
    ) -> Result<(), ReadError> {
        let end = offset.saturating_add(out.len() as u64);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.there < end || (state.there == self.head.length.get() && state.next < self.pieces.len()) {
            if let Some(broken) = &state.broken {
                return Err(broken.clone());
            }
            let Some(piece) = self.pieces.get(state.next) else {
                let error = self.wrong_length(state.there);
                return Err(state.fail(error));
            };
            // If that fails, nothing has happened, and it may be tried again.
            let stored = fetch(piece)?;
            state.next += 1;
            let decoded = state.decode(&self.head, &stored);
            let last = state.next == self.pieces.len();
            let outcome = match decoded {
                Ok(()) if last && state.there != self.head.length.get() => Err(self.wrong_length(state.there)),
                other => other,
            };
            if let Err(error) = outcome {
                return Err(state.fail(error));
            }
        }
        state.file.read_exact_at(out, offset).map_err(|error| ReadError::Spool(error.to_string()))
    }

    fn wrong_length(&self, found: u64) -> ReadError {
        span_error(&self.head, &DecodeError::Length { found, expected: self.head.length.get() })
    }
}

pub(super) fn span_error(span: &Span, error: &DecodeError) -> ReadError {
    let (layer, address) = (span.layer.get(), span.address.get());
    ReadError::Span { layer, address, reason: error.to_string() }
}

/// What may go wrong while a piece is decoded.
enum Failure {
    Decode(DecodeError),
    Write(std::io::Error),
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl State {
    fn fail(&mut self, error: ReadError) -> ReadError {
        self.broken = Some(error.clone());
        error
    }

    fn decode(&mut self, head: &Span, stored: &[u8]) -> Result<(), ReadError> {
        let Self { file, stream, there, .. } = self;
        let expected = head.length.get();
        let fed = stream.feed(stored, |bytes| {
            let found = *there + bytes.len() as u64;
            if found > expected {
                return Err(Failure::Decode(DecodeError::Length { found, expected }));
            }
            file.write_all_at(bytes, *there).map_err(Failure::Write)?;
            *there = found;
            Ok(())
        });
        fed.map_err(|failure| match failure {
            Failure::Decode(error) => span_error(head, &error),
            Failure::Write(error) => ReadError::Spool(error.to_string()),
        })
    }
}

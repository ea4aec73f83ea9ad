//! How replies go out: those of a batch in one call.

use std::{
    io::{self, IoSlice},
    ops::Range,
};

use nacre_core::BlockError;

use super::{
    transport::Transport,
    wire::{Command, Errno, Request, Terms, encode_data_chunk, encode_error_chunk, encode_simple},
};

/// Replies that were not sent yet.
#[derive(Default)]
pub(super) struct Replies {
    /// Heads, errors, acknowledgements.
    heads: Vec<u8>,
    /// Data of reads: how many bytes of `heads` go before, and where the data are.
    data: Vec<(usize, Range<usize>)>,
}

impl Replies {
    pub(super) fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// It was done.
    pub(super) fn done(&mut self, request: &Request) {
        encode_simple(&mut self.heads, request.cookie, 0);
    }

    /// It was read; the data are in `range` of what [`send`](Self::send) will be given.
    pub(super) fn read(&mut self, request: &Request, terms: &Terms, range: Range<usize>) {
        if terms.structured {
            encode_data_chunk(&mut self.heads, request.cookie, request.offset, request.length);
        } else {
            encode_simple(&mut self.heads, request.cookie, 0);
        }
        self.data.push((self.heads.len(), range));
    }

    /// It was refused, or failed.
    pub(super) fn fail(&mut self, request: &Request, terms: &Terms, errno: Errno, why: &str, at: Option<u64>) {
        if terms.structured {
            encode_error_chunk(&mut self.heads, request.cookie, errno, why, at);
        } else {
            encode_simple(&mut self.heads, request.cookie, errno as u32);
        }
    }

    /// The store did it, or did not.
    pub(super) fn outcome(&mut self, request: &Request, terms: &Terms, outcome: &Result<(), BlockError>) {
        match outcome {
            Ok(()) => self.done(request),
            Err(error) => {
                tracing::warn!(command = ?request.command, offset = request.offset, length = request.length, %error, "a request failed");
                self.fail(request, terms, errno(error), &error.to_string(), place(request, error));
            }
        }
    }

    /// Sends everything.
    pub(super) fn send(&mut self, transport: &Transport, data: &[u8]) -> io::Result<()> {
        if self.heads.is_empty() {
            return Ok(());
        }
        let mut slices = Vec::with_capacity(2 * self.data.len() + 1);
        let mut at = 0;
        for (end, range) in &self.data {
            slices.push(IoSlice::new(self.heads.get(at..*end).unwrap_or_default()));
            slices.push(IoSlice::new(data.get(range.clone()).unwrap_or_default()));
            at = *end;
        }
        slices.push(IoSlice::new(self.heads.get(at..).unwrap_or_default()));
        let sent = transport.send(&mut slices);
        self.heads.clear();
        self.data.clear();
        sent
    }
}

/// The protocol's error for ours.
fn errno(error: &BlockError) -> Errno {
    match error {
        BlockError::Io { .. } | BlockError::Integrity { .. } => Errno::Io,
        BlockError::OutOfRange { .. } => Errno::Invalid,
        BlockError::NoSpace(_) => Errno::NoSpace,
        BlockError::ReadOnly(_) => Errno::Perm,
        BlockError::Fenced(_) => Errno::Shutdown,
        BlockError::Unsupported(_) => Errno::NotSupported,
    }
}

/// Where a read failed, which is known of damage, and inside of what was asked for.
fn place(request: &Request, error: &BlockError) -> Option<u64> {
    let BlockError::Integrity { first, .. } = error else { return None };
    let end = request.offset.saturating_add(request.length.saturating_sub(1).into());
    let place = first.saturating_mul(nacre_core::BLOCK_SIZE as u64).max(request.offset);
    (request.command == Command::Read && place <= end).then_some(place)
}

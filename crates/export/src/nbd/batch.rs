//! How requests come in: as many at once as are there.
//!
//! A batch reads from the socket into its `input` and takes the requests out of it, up to the first that is not complete. Data of small
//! writes stay where they came in. Data of a large write go straight into pages of their own, together with the head of what comes next, so
//! that a sequence of large writes costs one call and no copy each. What is left over is carried to the batch that comes after,
//! which another thread may read.

use std::{
    io::{self, IoSliceMut},
    ops::Range,
};

use super::{
    transport::Transport,
    wire::{Command, MAX_PAYLOAD, Request, WireError},
};
use crate::buffer::PageBuffer;

/// Bytes that are read at once.
const INPUT: usize = 256 << 10;
/// A write of more data than this gets pages of its own.
const SMALL: usize = 32 << 10;
/// Bytes that are read at once where a large write is expected: its head, and little that has to be copied.
const EXPECTING: usize = 512;
/// The most requests of a batch.
const MAX_REQUESTS: usize = 256;
/// The most bytes that the reads of a batch ask for, but for a single one.
const MAX_READ: usize = 2 << 20;
/// Bytes of pages that a thread keeps from batch to batch.
pub(super) const KEPT: usize = 4 << 20;

/// Why no more requests are read from a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client said goodbye, or went without a word between two requests.
    #[error("the client has gone")]
    Gone,
    /// The client went in the middle of something, or the connection broke.
    #[error("the connection broke off: {0}")]
    Io(#[from] io::Error),
    /// What came is not NBD.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A write that is longer than what was announced; its data are not read.
    #[error("a write of {0} bytes is longer than the 32 MiB that are allowed")]
    TooLong(u32),
}

/// What reading threads hand to each other.
#[derive(Default)]
pub(super) struct Inbox {
    /// The beginning of a request, or requests for which there was no room in a batch.
    rest: Vec<u8>,
    /// Whether the last request was a large write, so that the next may well be one.
    expecting: bool,
    /// Nothing more is read.
    pub(super) ended: bool,
}

/// Where the data of a request are.
#[derive(Clone, Debug)]
enum Data {
    None,
    Input(Range<usize>),
    Large,
}

/// A request of a batch.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) request: Request,
    data: Data,
}

/// Requests that are to be carried out together.
#[derive(Default)]
pub(super) struct Batch {
    input: Vec<u8>,
    filled: usize,
    large: PageBuffer,
    pub(super) items: Vec<Item>,
}

/// Why the requests in the input end where they end.
enum Stop {
    /// The next one is not complete, or the batch is full.
    Incomplete,
    /// The next one has data for pages of their own.
    Large(Request),
    /// There will be none.
    End(End),
}

impl Batch {
    /// Fills the batch, waiting for the first request only. Where nothing comes after it, that is `Some`.
    pub(super) fn receive(&mut self, inbox: &mut Inbox, transport: &Transport) -> Option<End> {
        self.items.clear();
        if self.input.is_empty() {
            self.input = vec![0; INPUT];
        }
        let rest = std::mem::take(&mut inbox.rest);
        if let Some(place) = self.input.get_mut(..rest.len()) {
            place.copy_from_slice(&rest);
        }
        self.filled = rest.len();
        inbox.rest = rest;
        inbox.rest.clear();
        let end = self.fill(inbox, transport).err();
        inbox.ended = end.is_some();
        end
    }

    fn fill(&mut self, inbox: &mut Inbox, transport: &Transport) -> Result<(), End> {
        loop {
            let (at, stop) = self.parse();
            match stop {
                Stop::End(end) => return Err(end),
                Stop::Large(request) if self.items.is_empty() => return self.take_large(request, inbox, transport),
                // Nobody waits for a reply until data have come that have nothing to do with it.
                _ if !self.items.is_empty() => {
                    inbox.expecting = matches!(stop, Stop::Large(_));
                    inbox.rest.extend_from_slice(self.input.get(at..self.filled).unwrap_or_default());
                    return Ok(());
                }
                _ => {}
            }
            let most = if inbox.expecting && self.filled < EXPECTING { EXPECTING } else { INPUT };
            let room = self.input.get_mut(self.filled..most).unwrap_or_default();
            match transport.receive(&mut [IoSliceMut::new(room)])? {
                0 if self.filled == 0 => return Err(End::Gone),
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                read => self.filled += read,
            }
        }
    }

    /// Takes complete requests out of the input; where they end, and why there.
    fn parse(&mut self) -> (usize, Stop) {
        let (mut at, mut reading) = (0, 0);
        loop {
            let rest = self.input.get(at..self.filled).unwrap_or_default();
            let Some(header) = rest.first_chunk() else { return (at, Stop::Incomplete) };
            let request = match Request::decode(header) {
                Ok(request) => request,
                Err(error) => return (at, Stop::End(error.into())),
            };
            let begin = at + Request::LEN;
            let data = match request.command {
                Command::Disconnect => return (at, Stop::End(End::Gone)),
                Command::Write if request.length > MAX_PAYLOAD => {
                    self.items.push(Item { request, data: Data::None });
                    return (begin, Stop::End(End::TooLong(request.length)));
                }
                Command::Write if request.payload() > SMALL => return (at, Stop::Large(request)),
                Command::Write if rest.len() < Request::LEN + request.payload() => return (at, Stop::Incomplete),
                Command::Write => Data::Input(begin..begin + request.payload()),
                Command::Read => {
                    reading += request.length.min(MAX_PAYLOAD) as usize;
                    Data::None
                }
                _ => Data::None,
            };
            if !self.items.is_empty() && (self.items.len() >= MAX_REQUESTS || reading > MAX_READ) {
                return (at, Stop::Incomplete);
            }
            at = begin + request.payload();
            self.items.push(Item { request, data });
        }
    }

    /// Takes a large write, with which the input begins, and maybe some of its data.
    fn take_large(&mut self, request: Request, inbox: &mut Inbox, link: &Transport) -> Result<(), End> {
        let length = request.payload();
        let pages = self.large.get(length);
        let here = self.input.get(Request::LEN..self.filled).unwrap_or_default();
        let mut done = here.len().min(length);
        let (first, more) = here.split_at(done);
        if let Some(place) = pages.get_mut(..done) {
            place.copy_from_slice(first);
        }
        inbox.rest.extend_from_slice(more);
        let mut surplus = [0; EXPECTING];
        while done < length {
            let place = pages.get_mut(done..).unwrap_or_default();
            match link.receive(&mut [IoSliceMut::new(place), IoSliceMut::new(&mut surplus)])? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                read => done += read,
            }
        }
        inbox.rest.extend_from_slice(surplus.get(..done - length).unwrap_or_default());
        inbox.expecting = true;
        self.items.push(Item { request, data: Data::Large });
        Ok(())
    }

    /// The data of a write.
    pub(super) fn data(&self, item: &Item) -> &[u8] {
        match &item.data {
            Data::None => &[],
            Data::Input(range) => self.input.get(range.clone()).unwrap_or_default(),
            Data::Large => self.large.filled(item.request.payload()),
        }
    }

    /// Whether the socket stays with the thread that carries this out: nothing that is worth the handing over, or so much data that there are to
    /// be no more in memory. Of a slow store that is small writes, which it takes without waiting for its medium, as far as it can. Of a
    /// fast one it is all but large writes: those take as long to be received as to be carried out, so two threads share them.
    pub(super) fn keeps_socket(&self, slow: bool) -> bool {
        let small = |item: &Item| item.request.payload() <= SMALL;
        let quick = |item: &Item| {
            let waits = item.request.command != Command::Write || item.request.is_fua();
            small(item) && !(slow && waits)
        };
        let moves = |item: &Item| matches!(item.request.command, Command::Read | Command::Write);
        let bytes =
            self.items.iter().filter(|item| moves(item)).map(|item| item.request.length as usize).sum::<usize>();
        bytes > KEPT || self.items.iter().all(quick)
    }

    /// Gives back what the next batch should not find in memory.
    pub(super) fn shrink(&mut self) {
        self.large.shrink(KEPT);
    }
}

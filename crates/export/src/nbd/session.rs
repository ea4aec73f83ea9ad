//! The transmission phase: requests in, replies out.
//!
//! A thread takes a batch of requests from the socket, carries it out and sends the replies, with no other thread in between. Several
//! threads do so in turns where that pays: as soon as one has its batch, the next may read, so that a read that takes long holds
//! nothing up that came after it, and large writes are received while others are carried out. Of the requests that are in flight at the
//! same time NBD wants no order; a flush covers the writes that were answered before it came.

use std::{
    io, mem,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nacre_core::{BLOCK_SIZE, BlockError, ReadRequest, WriteRequest};

use super::{
    batch::{Batch, End, Inbox, Item, KEPT},
    reply::Replies,
    transport::{Transport, lock},
    wire::{Command, Errno, Request, Terms, command_flag},
};
use crate::{
    buffer::PageBuffer,
    sectors::{Sectors, is_whole},
};

/// Threads of a connection to a store that is slow. With what each of them keeps and one request of 32 MiB, a connection takes at most
/// 66 MiB.
const SLOW_THREADS: usize = 4;
/// Threads of a connection to a store that is fast: one receives a large write while the other carries one out.
const FAST_THREADS: usize = 2;
/// Bytes of zeroes that are written before it is looked whether the server is to end.
const ZEROES: u64 = 64 << 20;

/// What all connections share.
pub(super) struct Shared {
    pub(super) sectors: Sectors,
    /// Whether zeroes cost the store less than data.
    pub(super) fast_zeroes: bool,
    /// No new requests are carried out.
    pub(super) stopping: AtomicBool,
}

/// A connection whose handshake is done.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) transport: Transport,
    pub(super) terms: Terms,
    /// Whether the client hears of it when the store grows, by other means than these: then it may reach as far as the store does.
    pub(super) hears_of_growth: bool,
    pub(super) inbox: Turns,
}

impl Session {
    /// Serves until the client goes, or the server ends.
    pub(super) fn run(&self) -> Result<(), End> {
        let store = self.shared.sectors.store();
        let threads = if store.is_slow() { SLOW_THREADS } else { FAST_THREADS };
        let end = thread::scope(|scope| {
            let thread = || thread::Builder::new().name("nbd".into()).spawn_scoped(scope, || self.work());
            let others: Vec<_> = (1..threads).map_while(|_| thread().ok()).collect();
            let mut end = self.work();
            for other in others {
                end = end.and(other.join().unwrap_or(Ok(())));
            }
            end
        });
        self.transport.close();
        end
    }

    /// What requests are checked against now.
    fn terms(&self) -> Terms {
        let size = if self.hears_of_growth { self.shared.sectors.store().size() } else { self.terms.size };
        Terms { size, ..self.terms }
    }

    /// What each thread does. The one that reads the end says why; where sending fails, nobody reads on.
    fn work(&self) -> Result<(), End> {
        let mut worker = Worker { session: self, replies: Replies::default(), pages: PageBuffer::default() };
        let mut batch = Batch::default();
        let mut kept = None;
        let slow = self.shared.sectors.store().is_slow();
        let _closing = CloseOnPanic(self);
        loop {
            let mut inbox = kept.take().unwrap_or_else(|| self.inbox.take());
            if inbox.ended || self.shared.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            let end = batch.receive(&mut inbox, &self.transport);
            // Handing the socket over wakes a thread, which is more work than quick writes are.
            kept = batch.keeps_socket(slow).then_some(inbox);
            let sent = worker.carry_out(&batch);
            batch.shrink();
            worker.pages.shrink(KEPT);
            if let Err(error) = sent {
                // The thread that waits for requests is to end too.
                self.transport.close();
                return Err(error.into());
            }
            match end {
                Some(End::Gone) => return Ok(()),
                Some(end) => return Err(end),
                None => {}
            }
        }
    }
}

/// Whose turn it is to read: one thread has the inbox, and the others wait until it is handed over.
pub(super) struct Turns {
    /// `None` while a thread has it.
    inbox: Mutex<Option<Inbox>>,
    handed_over: Condvar,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self { inbox: Mutex::new(Some(Inbox::default())), handed_over: Condvar::new() }
    }

    /// Waits for the inbox; it is handed over when this is dropped.
    fn take(&self) -> Turn<'_> {
        let mut waiting = lock(&self.inbox);
        loop {
            match waiting.take() {
                Some(inbox) => return Turn { turns: self, inbox },
                None => waiting = self.handed_over.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The inbox, of the thread whose turn it is.
struct Turn<'a> {
    turns: &'a Turns,
    inbox: Inbox,
}

impl Deref for Turn<'_> {
    type Target = Inbox;

    fn deref(&self) -> &Inbox {
        &self.inbox
    }
}

impl DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut Inbox {
        &mut self.inbox
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.turns.inbox) = Some(mem::take(&mut self.inbox));
        self.turns.handed_over.notify_one();
    }
}

/// Closes the connection of a thread that panics, whose requests nobody will answer.
struct CloseOnPanic<'a>(&'a Session);

impl Drop for CloseOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.transport.close();
        }
    }
}

/// Carries batches out.
struct Worker<'a> {
    session: &'a Session,
    replies: Replies,
    /// Where reads go.
    pages: PageBuffer,
}

impl Worker<'_> {
    /// All of a batch, whose reads and writes are taken together between other requests.
    fn carry_out(&mut self, batch: &Batch) -> io::Result<()> {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let stopping = self.session.shared.stopping.load(Ordering::Acquire);
        let terms = self.session.terms();
        for item in &batch.items {
            let request = &item.request;
            if stopping {
                self.fail(request, Errno::Shutdown, "the server is about to end");
            } else if let Err((errno, why)) = request.check(&terms) {
                self.fail(request, errno, why);
            } else {
                match request.command {
                    Command::Read => reads.push(*request),
                    Command::Write => writes.push(item),
                    _ => {
                        self.write(batch, &mut writes)?;
                        self.read(&mut reads)?;
                        self.other(request)?;
                    }
                }
            }
        }
        self.write(batch, &mut writes)?;
        self.read(&mut reads)?;
        self.send()
    }

    fn fail(&mut self, request: &Request, errno: Errno, why: &str) {
        self.replies.fail(request, &self.session.terms, errno, why, None);
    }

    fn outcome(&mut self, request: &Request, outcome: &Result<(), BlockError>) {
        self.replies.outcome(request, &self.session.terms, outcome);
    }

    fn send(&mut self) -> io::Result<()> {
        self.replies.send(&self.session.transport, &[])
    }

    /// Reads together.
    fn read(&mut self, requests: &mut Vec<Request>) -> io::Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        let sectors = &self.session.shared.sectors;
        if !self.replies.is_empty() && sectors.store().is_slow() {
            self.send()?;
        }
        let room = |request: &Request| (request.length as usize).next_multiple_of(BLOCK_SIZE);
        let pages = self.pages.get(requests.iter().map(room).sum());
        let mut rest = &mut *pages;
        let mut reads = Vec::with_capacity(requests.len());
        for request in requests.iter() {
            let (page, after) = rest.split_at_mut_checked(room(request)).unwrap_or_default();
            rest = after;
            reads.push(ReadRequest::new(request.offset, page.get_mut(..request.length as usize).unwrap_or_default()));
        }
        sectors.read_many(&mut reads);
        let mut at = 0;
        for (request, read) in requests.iter().zip(reads) {
            match read.outcome {
                Ok(()) => self.replies.read(request, &self.session.terms, at..at + request.length as usize),
                failed => self.replies.outcome(request, &self.session.terms, &failed),
            }
            at += room(request);
        }
        requests.clear();
        self.replies.send(&self.session.transport, pages)
    }

    /// Writes together.
    fn write(&mut self, batch: &Batch, items: &mut Vec<&Item>) -> io::Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let sectors = &self.session.shared.sectors;
        let whole = |item: &&Item| is_whole(item.request.offset, item.request.length.into());
        let requests: Vec<_> = items
            .iter()
            .filter(|item| whole(item))
            .map(|item| WriteRequest { offset: item.request.offset, buffers: vec![batch.data(item)] })
            .collect();
        // Which of them failed is only known of one alone; doing one again that went well does no harm, as it was not answered yet.
        let together = requests.len() > 1 && sectors.write_many(&requests).is_ok();
        let (mut durable, mut flush) = (Vec::new(), None);
        for item in items.drain(..) {
            let outcome =
                if together && whole(&item) { Ok(()) } else { sectors.write(item.request.offset, batch.data(item)) };
            if item.request.is_fua() && outcome.is_ok() {
                durable.push(item.request);
            } else {
                self.outcome(&item.request, &outcome);
            }
        }
        if !durable.is_empty() {
            self.send()?;
        }
        for request in durable {
            let outcome = flush.get_or_insert_with(|| sectors.flush()).clone();
            self.outcome(&request, &outcome);
        }
        Ok(())
    }

    /// What is neither a read nor a write. Replies do not wait for it.
    fn other(&mut self, request: &Request) -> io::Result<()> {
        self.send()?;
        let sectors = &self.session.shared.sectors;
        let mut outcome = match request.command {
            Command::Trim => sectors.trim(request.offset, request.length.into()),
            Command::WriteZeroes => {
                let hole = request.flags & command_flag::NO_HOLE == 0;
                if request.flags & command_flag::FAST_ZERO != 0 && !(hole && self.session.shared.fast_zeroes) {
                    self.fail(request, Errno::NotSupported, "these zeroes are no faster than writing them");
                    return Ok(());
                }
                match self.zeroes(request.offset, request.length.into(), hole) {
                    Some(outcome) => outcome,
                    None => {
                        self.fail(request, Errno::Shutdown, "the server is about to end");
                        return Ok(());
                    }
                }
            }
            _ => sectors.flush(),
        };
        if request.is_fua() && request.command != Command::Flush && outcome.is_ok() {
            outcome = sectors.flush();
        }
        self.outcome(request, &outcome);
        Ok(())
    }

    /// Writes zeroes, as data where there is to be no hole; `None` where the server is to end before that is done.
    fn zeroes(&self, offset: u64, length: u64, hole: bool) -> Option<Result<(), BlockError>> {
        let shared = &self.session.shared;
        let zeroes = if hole { Vec::new() } else { vec![0; 1 << 20] };
        let mut done = 0;
        while done < length {
            if shared.stopping.load(Ordering::Acquire) {
                return None;
            }
            let most = if hole { ZEROES } else { zeroes.len() as u64 };
            // Pieces end at blocks, so that only the first and the last of them are partial.
            let begin = offset + done;
            let piece = (most - begin % BLOCK_SIZE as u64).min(length - done);
            let written = match usize::try_from(piece).ok().and_then(|piece| zeroes.get(..piece)) {
                Some(data) if !hole => shared.sectors.write(begin, data),
                _ => shared.sectors.write_zeroes(begin, piece),
            };
            if written.is_err() {
                return Some(written);
            }
            done += piece;
        }
        Some(Ok(()))
    }
}

//! ublk: the kernel's own way to block devices that a process serves (`nacre_sys::ublk`).
//!
//! There is a queue for each CPU, and a thread for each queue that waits, carries out and answers: no request is handed from one thread
//! to another. All requests that have come meanwhile are carried out together, the reads by one call of the store and then the
//! writes by one, each part answered as soon as it is done. A flush covers what was answered before it came, so that the rest of the batch
//! needs no order.
//!
//! Nothing is written where the kernel shows it: what a killed server leaves is a device without a disk, which [`cleanup`] deletes.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use nacre_core::{BLOCK_SIZE, BlockError, ReadRequest, WriteRequest};
use nacre_sys::{
    blockdev,
    ublk::{Channel, Control, DeviceId, MAX_REQUEST, Operation, Params, Queue, Request, Waited},
};

use super::{DeviceOptions, StartError, cpus, mark_thread, outcome};
use crate::{
    FrontEnd, Served,
    buffer::PageBuffer,
    sectors::{Sectors, is_whole},
};

/// Requests that a queue has at once.
const DEPTH: u16 = 128;
/// More queues than this only cost memory.
const MOST_QUEUES: usize = 8;
/// The data of requests that are carried out together, at most; those of one request may be as long.
const BATCH: usize = 4 * MAX_REQUEST as usize;
/// What a queue keeps of its buffer from batch to batch.
const KEPT: usize = MAX_REQUEST as usize;

/// A store as a ublk device.
///
/// Dropped, it does what [`FrontEnd::stop`] does, as far as that can be done.
pub struct Ublk {
    control: Control,
    id: DeviceId,
    queues: Vec<JoinHandle<()>>,
    living: Arc<Living>,
    sectors: Arc<Sectors>,
    stopped: bool,
}

/// How many queues are served.
#[derive(Default)]
struct Living {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Living {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_none(&self) {
        let mut count = self.count();
        while *count > 0 {
            count = self.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One that is served, until its thread ends, however that is.
struct Alive(Arc<Living>);

impl Alive {
    fn new(living: Arc<Living>) -> Self {
        *living.count() += 1;
        Self(living)
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.changed.notify_all();
    }
}

impl Ublk {
    /// Makes the device.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left.
    pub fn start(store: Served, options: &DeviceOptions) -> Result<Self, StartError> {
        let size = store.size();
        options.check(size)?;
        let mut control = Control::open().map_err(StartError::Unavailable)?;
        let count = u16::try_from(cpus().min(MOST_QUEUES)).unwrap_or(1);
        let id = control.add(count, DEPTH).map_err(StartError::failed("make a ublk device"))?;
        let sectors = Arc::new(Sectors::new(store));
        let living = Arc::new(Living::default());
        let mut device = Self { control, id, queues: Vec::new(), living, sectors, stopped: false };
        let channel = Channel::open(id).map_err(StartError::failed("open a ublk device"))?;
        for number in 0..count {
            let queue =
                device.serve(channel.clone(), number).map_err(StartError::failed("serve a queue of a ublk device"))?;
            device.queues.push(queue);
        }
        drop(channel);
        let params = Params { size, block_size: options.block_size, read_only: options.read_only };
        device.control.start(id, params).map_err(StartError::failed("start a ublk device"))?;
        Ok(device)
    }

    /// Starts the thread of a queue, and waits until it has asked for requests.
    fn serve(&self, channel: Channel, number: u16) -> io::Result<JoinHandle<()>> {
        let (tell, told) = mpsc::channel();
        let (id, sectors, living) = (self.id, self.sectors.clone(), self.living.clone());
        let thread = thread::Builder::new().name(format!("ublk-{number}")).spawn(move || {
            mark_thread();
            let queue = match Queue::open(channel, number, DEPTH) {
                Ok(queue) => queue,
                Err(error) => return drop(tell.send(Err(error))),
            };
            let _alive = Alive::new(living);
            let _ = tell.send(Ok(()));
            let device = id.block().display().to_string();
            let mut worker = Worker { queue, sectors: &sectors, device, pages: PageBuffer::default() };
            // When the queue is dropped, the kernel fails what is on it and stops the device.
            if let Err(error) = worker.run() {
                tracing::error!(device = worker.device, %error, "a queue is served no more");
            }
        })?;
        told.recv().unwrap_or_else(|_| Err(io::Error::other("the thread of a queue died")))?;
        Ok(thread)
    }

    /// Every step may be the one that fails: what was done before is not done again, or does no harm.
    fn shut_down(&mut self) -> io::Result<()> {
        if !self.stopped {
            self.take_away()?;
            self.stopped = true;
        }
        self.sectors.flush().map_err(io::Error::other)
    }

    fn take_away(&mut self) -> io::Result<()> {
        let block = self.id.block();
        // What the kernel holds is written out while the queues are served; and nobody can mount it meanwhile.
        let claimed = if block.exists() { Some(blockdev::claim(&block)?) } else { None };
        if let Some(Err(error)) = claimed.as_ref().map(File::sync_all) {
            tracing::error!(device = %block.display(), %error, "not all that was written could be written out");
        }
        self.control.stop(self.id)?;
        drop(claimed);
        for queue in self.queues.drain(..) {
            queue.join().map_err(|_| io::Error::other("the thread of a queue died"))?;
        }
        self.control.delete(self.id)
    }
}

impl FrontEnd for Ublk {
    fn device(&self) -> String {
        self.id.block().display().to_string()
    }

    fn users(&self) -> Vec<String> {
        blockdev::users(&self.id.block())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.shut_down()
    }

    fn has_ended(&self) -> bool {
        *self.living.count() == 0
    }

    fn resized(&self) -> io::Result<()> {
        // UBLK_U_CMD_UPDATE_SIZE is Linux 6.16's, which none of our tests has.
        let what = "a ublk device shows its new size when the disk is closed and opened again";
        Err(io::Error::new(io::ErrorKind::Unsupported, what))
    }

    fn wait(&mut self) -> io::Result<()> {
        self.living.wait_for_none();
        Ok(())
    }
}

impl Drop for Ublk {
    fn drop(&mut self) {
        if !self.stopped
            && let Err(error) = self.shut_down()
        {
            // Whoever uses it goes on being served as long as the process lives.
            tracing::warn!(%error, "a ublk device was not taken away");
        }
    }
}

/// Deletes devices whose servers were killed.
///
/// # Errors
/// The kernel's answer. Where the kernel has no ublk there is nothing to do.
pub fn cleanup() -> io::Result<()> {
    if !Path::new("/sys/class/ublk-char").exists() {
        return Ok(());
    }
    let mut control = Control::open()?;
    for found in control.ours()? {
        if found.dead {
            tracing::info!(device = %found.id.block().display(), server = found.server, "deleting what a killed server left");
            control.delete(found.id)?;
        }
    }
    Ok(())
}

/// The thread of a queue.
struct Worker<'a> {
    queue: Queue,
    sectors: &'a Sectors,
    device: String,
    pages: PageBuffer,
}

impl Worker<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut requests = Vec::new();
        while self.queue.wait(&mut requests)? == Waited::Requests {
            let (mut reads, mut writes, mut others) = (Vec::new(), Vec::new(), Vec::new());
            for request in requests.drain(..) {
                match request.operation {
                    Operation::Read => reads.push(request),
                    Operation::Write => writes.push(request),
                    _ => others.push(request),
                }
            }
            while !reads.is_empty() {
                let part = batch(&mut reads);
                self.read(part)?;
            }
            while !writes.is_empty() {
                let part = batch(&mut writes);
                self.write(part)?;
            }
            for request in others {
                let result = self.other(&request);
                self.answer(request, result)?;
            }
            self.pages.shrink(KEPT);
        }
        Ok(())
    }

    fn answer(&mut self, request: Request, result: Result<(), BlockError>) -> io::Result<()> {
        let result = outcome(&self.device, result);
        self.queue.complete(request, result)
    }

    /// Reads together.
    fn read(&mut self, requests: Vec<Request>) -> io::Result<()> {
        let mut rest = self.pages.get(requests.iter().map(room).sum());
        let mut reads = Vec::with_capacity(requests.len());
        for request in &requests {
            let (own, after) = rest.split_at_mut_checked(room(request)).unwrap_or_default();
            rest = after;
            let length = usize::try_from(request.length).unwrap_or_default();
            reads.push(ReadRequest::new(request.offset, own.get_mut(..length).unwrap_or_default()));
        }
        self.sectors.read_many(&mut reads);
        let data = self.queue.data();
        let give = |(request, read): (&Request, ReadRequest<'_>)| {
            read.outcome?;
            let (offset, length) = (request.offset, request.length);
            data.give(request, read.buffer).map_err(|error| BlockError::io("read", offset, length, error))
        };
        let results: Vec<_> = requests.iter().zip(reads).map(give).collect();
        for (request, result) in requests.into_iter().zip(results) {
            self.answer(request, result)?;
        }
        self.queue.submit()
    }

    /// Writes together, and makes durable what has to be.
    fn write(&mut self, requests: Vec<Request>) -> io::Result<()> {
        let mut rest = self.pages.get(requests.iter().map(room).sum());
        let (data, mut fetched) = (self.queue.data(), Vec::with_capacity(requests.len()));
        for request in &requests {
            let (own, after) = rest.split_at_mut_checked(room(request)).unwrap_or_default();
            rest = after;
            let own = own.get_mut(..usize::try_from(request.length).unwrap_or_default()).unwrap_or_default();
            let (offset, length) = (request.offset, request.length);
            let got = data.fetch(request, own).map_err(|error| BlockError::io("write", offset, length, error));
            fetched.push(got.map(|()| &*own));
        }
        let whole = |request: &Request| is_whole(request.offset, request.length);
        let many: Vec<_> = requests
            .iter()
            .zip(&fetched)
            .filter(|(request, _)| whole(request))
            .filter_map(|(request, data)| {
                Some(WriteRequest { offset: request.offset, buffers: vec![*data.as_ref().ok()?] })
            })
            .collect();
        // Which of them failed is only known of one alone; one that went well may be done again, since it was not answered.
        let together = many.len() > 1 && self.sectors.write_many(&many).is_ok();
        let mut results = Vec::with_capacity(requests.len());
        for (request, data) in requests.iter().zip(fetched) {
            let done = together && whole(request);
            results.push(data.and_then(|data| if done { Ok(()) } else { self.sectors.write(request.offset, data) }));
        }
        let durable = requests.iter().zip(&results).any(|(request, result)| request.fua && result.is_ok());
        let flushed = if durable { self.sectors.flush() } else { Ok(()) };
        for (request, result) in requests.into_iter().zip(results) {
            let result = if request.fua { result.and(flushed.clone()) } else { result };
            self.answer(request, result)?;
        }
        self.queue.submit()
    }

    fn other(&self, request: &Request) -> Result<(), BlockError> {
        let (offset, length) = (request.offset, request.length);
        match request.operation {
            Operation::Flush => return self.sectors.flush(),
            Operation::Discard => self.sectors.trim(offset, length)?,
            Operation::WriteZeroes => self.sectors.write_zeroes(offset, length)?,
            other => return Err(BlockError::Unsupported(format!("the ublk operation {other:?}"))),
        }
        if request.fua { self.sectors.flush() } else { Ok(()) }
    }
}

/// The pages that the data of a request takes.
fn room(request: &Request) -> usize {
    usize::try_from(request.length).unwrap_or_default().next_multiple_of(BLOCK_SIZE)
}

/// Takes the first requests whose data are not too much together.
fn batch(requests: &mut Vec<Request>) -> Vec<Request> {
    let mut bytes = 0;
    let count = requests.iter().take_while(|request| {
        let first = bytes == 0;
        bytes += room(request).max(1);
        first || bytes <= BATCH
    });
    let count = count.count();
    let rest = requests.split_off(count);
    std::mem::replace(requests, rest)
}

//! A store in memory that records what is done to it, and fails where it is told to.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, WriteRequest, check_range};

use super::{
    recording::{Event, Recording},
    snapshot::{Block, Snapshot},
};

/// What a trimmed block holds: nobody may rely on zeroes, nor on what was there.
const RUBBISH: Block = [0xdd; BLOCK_SIZE];

/// Which requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Reads.
    Read,
    /// Writes, and trims.
    Write,
    /// Flushes.
    Flush,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// EIO, and nothing was done.
    Io,
    /// ENOSPC, and nothing was done.
    NoSpace,
    /// Half of the blocks were written (or read), then EIO.
    Short,
}

/// A fault to come.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which requests.
    pub target: Target,
    /// How many of them go well before.
    pub after: u64,
    /// How it fails.
    pub kind: FaultKind,
    /// How many fail.
    pub times: u64,
}

/// How many requests there were, those that failed included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads; one with several buffers is one.
    pub reads: u64,
    /// Writes and trims.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Blocks that were written.
    pub blocks_written: u64,
}

struct State {
    image: Snapshot,
    recording: Option<Recording>,
    faults: Vec<Fault>,
    counts: Counts,
}

/// A store in memory. See the module.
pub struct SimStore {
    state: Mutex<State>,
}

impl SimStore {
    /// An empty store of that size, which records.
    pub fn new(size: u64) -> Arc<Self> {
        Self::of(Snapshot::zeroed(size))
    }

    /// A store that holds an image, and records from there.
    pub fn of(image: Snapshot) -> Arc<Self> {
        let recording = Some(Recording::new(image.clone()));
        let state = State { image, recording, faults: Vec::new(), counts: Counts::default() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// A store that holds an image, and remembers nothing of what is done to it: for long runs.
    pub fn forgetful(image: Snapshot) -> Arc<Self> {
        let store = Self::of(image);
        store.state().recording = None;
        store
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What it holds now.
    pub fn image(&self) -> Snapshot {
        self.state().image.clone()
    }

    /// How many events were recorded: the point at which a run is.
    pub fn position(&self) -> usize {
        self.state().recording.as_ref().map_or(0, Recording::len)
    }

    /// What was recorded up to now.
    ///
    /// # Panics
    /// It is forgetful.
    pub fn recording(&self) -> Recording {
        self.state().recording.clone().unwrap()
    }

    /// How many requests there were.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Lets requests fail from now on.
    pub fn fail(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// No more faults.
    pub fn heal(&self) {
        self.state().faults.clear();
    }
}

impl State {
    fn size(&self) -> u64 {
        self.image.size()
    }

    /// How this request fails, if it does.
    fn fault(&mut self, target: Target) -> Option<FaultKind> {
        let mut failed = None;
        for fault in self.faults.iter_mut().filter(|fault| fault.target == target && fault.times > 0) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if failed.is_none() {
                fault.times -= 1;
                failed = Some(fault.kind);
            }
        }
        failed
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let length = buffer.len() as u64;
        check_range("read", offset, length, self.size())?;
        self.counts.reads += 1;
        let fault = self.fault(Target::Read);
        for (block, part) in (offset / BLOCK_SIZE as u64..).zip(buffer.chunks_mut(BLOCK_SIZE)) {
            match self.image.get(block) {
                _ if fault.is_some() => part.fill(0xee),
                Some(content) => part.copy_from_slice(&content[..]),
                None => part.fill(0),
            }
        }
        fault.map_or(Ok(()), |fault| Err(error(fault, "read", offset, length)))
    }

    fn write(&mut self, op: &'static str, offset: u64, mut content: Vec<Arc<Block>>) -> Result<(), BlockError> {
        let length = (content.len() * BLOCK_SIZE) as u64;
        check_range(op, offset, length, self.size())?;
        self.counts.writes += 1;
        let fault = self.fault(Target::Write);
        match fault {
            None => {}
            Some(FaultKind::Short) => content.truncate(content.len() / 2),
            Some(FaultKind::Io | FaultKind::NoSpace) => content.clear(),
        }
        self.counts.blocks_written += content.len() as u64;
        let first = offset / BLOCK_SIZE as u64;
        for (block, content) in (first..).zip(&content) {
            self.image.set(block, Some(Arc::clone(content)));
        }
        if let Some(recording) = &mut self.recording
            && !content.is_empty()
        {
            recording.push(Event::Write { block: first, content });
        }
        fault.map_or(Ok(()), |fault| Err(error(fault, op, offset, length)))
    }
}

fn error(fault: FaultKind, op: &'static str, offset: u64, length: u64) -> BlockError {
    let kind = match fault {
        FaultKind::NoSpace => io::ErrorKind::StorageFull,
        FaultKind::Io | FaultKind::Short => io::ErrorKind::Other,
    };
    BlockError::io(op, offset, length, io::Error::new(kind, "a fault that the test ordered"))
}

fn blocks_of(op: &'static str, offset: u64, data: &[u8], size: u64) -> Result<Vec<Arc<Block>>, BlockError> {
    check_range(op, offset, data.len() as u64, size)?;
    Ok(data.chunks(BLOCK_SIZE).map(|block| Arc::new(block.try_into().unwrap())).collect())
}

impl BlockStore for SimStore {
    fn size(&self) -> u64 {
        self.state().size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.state().read(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let content = blocks_of("write", offset, data, self.size())?;
        self.state().write("write", offset, content)
    }

    fn flush(&self) -> Result<(), BlockError> {
        let mut state = self.state();
        state.counts.flushes += 1;
        if let Some(fault) = state.fault(Target::Flush) {
            return Err(error(fault, "flush", 0, 0));
        }
        let state = &mut *state;
        if let Some(recording) = &mut state.recording {
            recording.push(Event::Flush);
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range("trim", offset, length, self.size())?;
        let rubbish = Arc::new(RUBBISH);
        let blocks = usize::try_from(length).unwrap() / BLOCK_SIZE;
        self.state().write("trim", offset, vec![rubbish; blocks])
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        let mut state = self.state();
        if size < state.size() || !size.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(BlockError::Unsupported(format!("a store of {} bytes cannot become {size}", state.size())));
        }
        let blocks = size / BLOCK_SIZE as u64;
        state.image.resize(blocks);
        if let Some(recording) = &mut state.recording {
            recording.push(Event::Grow { blocks });
        }
        Ok(())
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        let size = self.size();
        let mut outcome = Ok(());
        for request in requests {
            let mut content = Vec::new();
            for buffer in &request.buffers {
                content.extend(blocks_of("write", request.offset, buffer, size)?);
            }
            // Later requests are carried out even so: whoever asked has to expect it.
            let written = self.state().write("write", request.offset, content);
            outcome = outcome.and(written);
        }
        outcome
    }

    fn is_slow(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        "a simulated store".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_come_when_they_are_due() {
        let store = SimStore::new(1 << 20);
        store.fail(Fault { target: Target::Write, after: 1, kind: FaultKind::Short, times: 1 });
        assert!(store.write_at(0, &[1; 8192]).is_ok());
        assert!(matches!(store.write_at(8192, &[2; 8192]), Err(BlockError::Io { .. })));
        assert!(store.write_at(16384, &[3; 8192]).is_ok());
        let image = store.image();
        assert_eq!([0, 1, 2, 3, 4].map(|block| image.bytes(block)[7]), [1, 1, 2, 0, 3]);
        store.fail(Fault { target: Target::Flush, after: 0, kind: FaultKind::NoSpace, times: u64::MAX });
        assert!(matches!(store.flush(), Err(BlockError::NoSpace(_))));
        assert!(matches!(store.flush(), Err(BlockError::NoSpace(_))));
        store.heal();
        assert!(store.flush().is_ok());
        assert_eq!(store.counts(), Counts { reads: 0, writes: 3, flushes: 3, blocks_written: 5 });
    }

    #[test]
    fn trimmed_blocks_are_rubbish() {
        let store = SimStore::new(1 << 20);
        store.trim(4096, 8192).unwrap();
        let mut block = [0; 4096];
        store.read_at(8192, &mut block).unwrap();
        assert_eq!(block, RUBBISH);
        assert!(store.read_at(1 << 20, &mut block).is_err());
    }
}

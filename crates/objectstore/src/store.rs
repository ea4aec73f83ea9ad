//! The store itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use nacre_core::{BLOCK_SIZE, BlockError, BlockStore, Page, ReadRequest, WriteRequest, check_range};
use object_store::Error;

use crate::{
    Location, ObjectStoreError,
    map::{self, BLOCK, Chunk, Source},
    name::{DESCRIPTOR, Descriptor, MAX_DESCRIPTOR, Name},
    objects::{Objects, Remote},
};

/// How often a read looks again where an object is, because it was superseded between looking and reading.
const READ_TRIES: usize = 8;

/// Bytes between two ranges of an object that are fetched along with both: less than what a request of its own costs.
const MAX_GAP: u64 = 32 << 10;

/// How much of a write is taken in before the bound of the buffer is looked at again.
const WRITE_STEP: usize = 1 << 20;

/// How an [`ObjectBlockStore`] is made or opened.
#[derive(Clone, Copy, Debug)]
pub struct ObjectOptions {
    /// Bytes of a chunk of a new store: whole blocks, from 64 KiB to 1 GiB. A store that is there keeps its own.
    pub chunk_size: u64,
    /// How many bytes of writes are kept in memory before they are PUT without a flush.
    pub buffer_bytes: u64,
    /// It takes no writes.
    pub read_only: bool,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self { chunk_size: 4 << 20, buffer_bytes: 64 << 20, read_only: false }
    }
}

/// A block store on an object store.
pub struct ObjectBlockStore {
    pub(crate) objects: Box<dyn Objects>,
    pub(crate) shown: String,
    pub(crate) chunk_size: u64,
    buffer_bytes: u64,
    read_only: bool,
    /// Which writer this is.
    pub(crate) writer: u64,
    pub(crate) state: Mutex<State>,
    /// Held while objects are made or removed.
    pub(crate) flushing: Mutex<()>,
    /// Why this store's writing has ended.
    fenced: OnceLock<String>,
}

pub(crate) struct State {
    pub(crate) size: u64,
    pub(crate) chunks: BTreeMap<u64, Chunk>,
    /// Chunks that have something dirty.
    pub(crate) dirty: BTreeSet<u64>,
    pub(crate) dirty_bytes: u64,
    /// Objects were made since it was last looked for another writer.
    pub(crate) unchecked: bool,
}

/// A read under way.
struct Read<'a> {
    offset: u64,
    buffer: &'a mut [u8],
    outcome: &'a mut Result<(), BlockError>,
}

/// A range of an object that goes to a place in the buffer of a read.
struct Fetch {
    read: usize,
    place: usize,
    name: Name,
    range: Range<u64>,
}

/// Fetches that are one request: ranges of one object that lie close together.
struct Group {
    name: Name,
    range: Range<u64>,
    members: Vec<usize>,
}

/// Puts fetches together.
fn group(fetches: &[Fetch]) -> Vec<Group> {
    let mut order: Vec<(usize, &Fetch)> = fetches.iter().enumerate().collect();
    order.sort_unstable_by_key(|(_, fetch)| (fetch.name, fetch.range.start));
    let mut groups: Vec<Group> = Vec::new();
    for (index, fetch) in order {
        match groups.last_mut() {
            Some(last) if last.name == fetch.name && fetch.range.start <= last.range.end + MAX_GAP => {
                last.range.end = last.range.end.max(fetch.range.end);
                last.members.push(index);
            }
            _ => groups.push(Group { name: fetch.name, range: fetch.range.clone(), members: vec![index] }),
        }
    }
    groups
}

impl Fetch {
    /// Copies its part of what was got to its place; an error says whether the object is missing, and what happened.
    fn deliver(
        &self,
        group: &Group,
        got: Result<&Bytes, &(bool, String)>,
        buffer: &mut [u8],
    ) -> Result<(), (bool, String)> {
        let bytes = got.map_err(Clone::clone)?;
        let count = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let (start, length) = (count(self.range.start - group.range.start), count(self.range.end - self.range.start));
        let part = bytes.get(start..start.saturating_add(length));
        match (part, buffer.get_mut(self.place..self.place.saturating_add(length))) {
            (Some(part), Some(place)) => {
                place.copy_from_slice(part);
                Ok(())
            }
            _ => Err((false, format!("it ends after {} of the bytes from {}", bytes.len(), group.range.start))),
        }
    }
}

impl ObjectBlockStore {
    /// Makes a store of `size` bytes and opens it.
    ///
    /// # Errors
    /// [`ObjectStoreError`]: there is one already, sizes that cannot be, or a request that failed.
    pub fn create(location: &Location, size: u64, options: ObjectOptions) -> Result<Self, ObjectStoreError> {
        Self::create_on(Box::new(Remote::new(location)?), location.to_string(), size, options)
    }

    /// Opens the store at `location`.
    ///
    /// # Errors
    /// [`ObjectStoreError`]: there is none, what is there is not understood, or a request failed.
    pub fn open(location: &Location, options: ObjectOptions) -> Result<Self, ObjectStoreError> {
        Self::open_on(Box::new(Remote::new(location)?), location.to_string(), options)
    }

    pub(crate) fn create_on(
        objects: Box<dyn Objects>,
        location: String,
        size: u64,
        options: ObjectOptions,
    ) -> Result<Self, ObjectStoreError> {
        let descriptor = Descriptor { size, chunk_size: options.chunk_size };
        let descriptor = match descriptor.check() {
            Ok(descriptor) => descriptor,
            Err(what) => return Err(ObjectStoreError::NotAStore { location, what }),
        };
        match objects.exists(DESCRIPTOR) {
            Ok(false) => {}
            Ok(true) => return Err(ObjectStoreError::Exists(location)),
            Err(source) => return Err(request(&location, "look for", DESCRIPTOR, source)),
        }
        let made = objects.create(vec![(DESCRIPTOR.to_owned(), descriptor.to_bytes().into())]);
        match made.into_iter().find_map(Result::err) {
            None => Self::open_on(objects, location, ObjectOptions { read_only: false, ..options }),
            Some(Error::AlreadyExists { .. }) => Err(ObjectStoreError::Exists(location)),
            Some(source) => Err(request(&location, "create", DESCRIPTOR, source)),
        }
    }

    pub(crate) fn open_on(
        objects: Box<dyn Objects>,
        location: String,
        options: ObjectOptions,
    ) -> Result<Self, ObjectStoreError> {
        let not_a_store = |what: String| ObjectStoreError::NotAStore { location: location.clone(), what };
        let read = objects.get(vec![(DESCRIPTOR.to_owned(), 0..MAX_DESCRIPTOR)]);
        let descriptor = match read.into_iter().next() {
            Some(Ok(bytes)) => Descriptor::parse(&bytes).map_err(not_a_store)?,
            Some(Err(Error::NotFound { .. })) | None => return Err(not_a_store(format!("there is no {DESCRIPTOR}"))),
            Some(Err(source)) => return Err(request(&location, "read", DESCRIPTOR, source)),
        };
        let listed = objects
            .list(map::most_objects(descriptor))
            .map_err(|source| request(&location, "list", "its objects", source))?;
        let loaded = map::load(descriptor, &listed).map_err(not_a_store)?;
        let writer = loaded.writers.last().map_or(1, |last| last + 1);
        if !options.read_only {
            claim(objects.as_ref(), &location, writer, &loaded)?;
        }
        Ok(Self {
            objects,
            shown: location,
            chunk_size: descriptor.chunk_size,
            buffer_bytes: options.buffer_bytes,
            read_only: options.read_only,
            writer,
            state: Mutex::new(State {
                size: descriptor.size,
                chunks: loaded.chunks,
                dirty: BTreeSet::new(),
                dirty_bytes: 0,
                unchecked: false,
            }),
            flushing: Mutex::new(()),
            fenced: OnceLock::new(),
        })
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u64 {
        self.chunk_size
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<(), BlockError> {
        if op != "read" {
            if self.read_only {
                return Err(BlockError::ReadOnly(format!("{} was opened so", self.shown)));
            }
            self.check_fence()?;
        }
        check_range(op, offset, length, self.size())
    }

    pub(crate) fn check_fence(&self) -> Result<(), BlockError> {
        self.fenced.get().map_or(Ok(()), |why| Err(BlockError::Fenced(why.clone())))
    }

    pub(crate) fn error(&self, op: &'static str, offset: u64, length: u64, what: impl fmt::Display) -> BlockError {
        BlockError::io(op, offset, length, io::Error::other(format!("{}: {what}", self.shown)))
    }

    /// Remembers that somebody else writes.
    pub(crate) fn fence(&self, why: &str) -> BlockError {
        let why = format!("somebody else writes to {}: {why}", self.shown);
        BlockError::Fenced(self.fenced.get_or_init(|| why).clone())
    }

    /// The chunks of a range: (chunk, first byte in it, bytes).
    fn parts(&self, mut offset: u64, length: u64) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let (size, end) = (self.chunk_size, offset + length);
        std::iter::from_fn(move || {
            let inside = offset % size;
            let part = (offset / size, inside, (size - inside).min(end - offset));
            offset += part.2;
            (part.2 > 0).then_some(part)
        })
    }

    fn read_all(&self, reads: &mut [Read<'_>]) {
        let mut waiting: Vec<usize> = Vec::new();
        for (index, read) in reads.iter_mut().enumerate() {
            *read.outcome = self.check("read", read.offset, read.buffer.len() as u64);
            if read.outcome.is_ok() {
                waiting.push(index);
            }
        }
        for attempt in 1.. {
            let fetches = self.look_up(reads, &waiting);
            waiting.clear();
            let groups = group(&fetches);
            let ranges = groups.iter().map(|group| (group.name.to_string(), group.range.clone())).collect();
            for (group, got) in groups.iter().zip(self.objects.get(ranges)) {
                let got = got.map_err(|error| (matches!(error, Error::NotFound { .. }), error.to_string()));
                for fetch in group.members.iter().filter_map(|index| fetches.get(*index)) {
                    let Some(read) = reads.get_mut(fetch.read) else { continue };
                    match fetch.deliver(group, got.as_ref(), read.buffer) {
                        Ok(()) => {}
                        // Superseded and deleted meanwhile, so by now it is elsewhere.
                        Err((true, _)) if attempt < READ_TRIES => waiting.push(fetch.read),
                        Err((_, what)) => {
                            let what = format_args!("{}: {what}", fetch.name);
                            *read.outcome = Err(self.error("read", read.offset, read.buffer.len() as u64, what));
                        }
                    }
                }
            }
            waiting.sort_unstable();
            waiting.dedup();
            if waiting.is_empty() {
                break;
            }
        }
    }

    /// Copies what is in memory, and says what is to be fetched.
    fn look_up(&self, reads: &mut [Read<'_>], which: &[usize]) -> Vec<Fetch> {
        let mut fetches: Vec<Fetch> = Vec::new();
        let state = self.state();
        for &index in which {
            let Some(read) = reads.get_mut(index) else { continue };
            let blocks = (read.offset / BLOCK..).zip(read.buffer.chunks_mut(BLOCK_SIZE)).enumerate();
            for (number, (block, target)) in blocks {
                let per_chunk = self.chunk_size / BLOCK;
                let chunk = block / per_chunk;
                match state.chunks.get(&chunk).map_or(Source::Zeroes, |found| found.find(chunk, block % per_chunk)) {
                    Source::Zeroes => target.fill(0),
                    Source::Memory(page) => target.copy_from_slice(&page.0),
                    Source::Object(name, at) => match fetches.last_mut() {
                        Some(last)
                            if last.read == index
                                && last.name == name
                                && last.range.end == at
                                && last.place as u64 + (last.range.end - last.range.start)
                                    == (number * BLOCK_SIZE) as u64 =>
                        {
                            last.range.end += BLOCK;
                        }
                        _ => {
                            let range = at..at + BLOCK;
                            fetches.push(Fetch { read: index, place: number * BLOCK_SIZE, name, range });
                        }
                    },
                }
            }
        }
        fetches
    }

    /// Takes in checked blocks.
    fn take(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let mut at = offset;
        for step in data.chunks(WRITE_STEP) {
            let mut state = self.state();
            for (block, bytes) in (at / BLOCK..).zip(step.chunks(BLOCK_SIZE)) {
                let mut page = Page::zeroed();
                page.0.copy_from_slice(bytes);
                let per_chunk = self.chunk_size / BLOCK;
                let chunk = block / per_chunk;
                let changes = &mut state.chunks.entry(chunk).or_default().dirty;
                if changes.blocks.insert(block % per_chunk, Arc::from(page)).is_none() {
                    state.dirty_bytes += BLOCK;
                }
                state.dirty.insert(chunk);
            }
            at += step.len() as u64;
            let full = state.dirty_bytes >= self.buffer_bytes;
            drop(state);
            if full {
                self.put_all()?;
            }
        }
        Ok(())
    }
}

impl BlockStore for ObjectBlockStore {
    fn size(&self) -> u64 {
        self.state().size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let mut outcome = Ok(());
        self.read_all(&mut [Read { offset, buffer, outcome: &mut outcome }]);
        outcome
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check("write", offset, data.len() as u64)?;
        self.take(offset, data)
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        self.put_all()?;
        self.check_writer()
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("trim", offset, length)?;
        self.zero_chunks(offset, length);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check("write zeroes", offset, length)?;
        let zeroes = [0; 16 * BLOCK_SIZE];
        for (start, bytes) in self.zero_chunks(offset, length) {
            let mut at = start;
            while at < start + bytes {
                let count = usize::try_from(start + bytes - at).unwrap_or(usize::MAX).min(zeroes.len());
                let part = zeroes.get(..count).unwrap_or(&zeroes);
                self.take(at, part)?;
                at += part.len() as u64;
            }
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        self.check("grow", 0, 0)?;
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.size();
        let new = Descriptor { size, chunk_size: self.chunk_size };
        let Some(new) = new.check().ok().filter(|_| size >= old) else {
            return Err(BlockError::OutOfRange { op: "grow", offset: 0, length: size, size: old });
        };
        if size > old {
            let replaced = self.objects.replace(DESCRIPTOR, new.to_bytes().into());
            replaced.map_err(|error| self.error("grow", 0, size, format_args!("{DESCRIPTOR}: {error}")))?;
            self.state().size = size;
        }
        Ok(())
    }

    fn read_many(&self, requests: &mut [ReadRequest<'_>]) {
        let mut reads: Vec<Read<'_>> = requests
            .iter_mut()
            .map(|ReadRequest { offset, buffer, outcome }| Read { offset: *offset, buffer, outcome })
            .collect();
        self.read_all(&mut reads);
    }

    fn write_many(&self, requests: &[WriteRequest<'_>]) -> Result<(), BlockError> {
        for request in requests {
            self.check("write", request.offset, request.length())?;
            for buffer in &request.buffers {
                self.check("write", request.offset, buffer.len() as u64)?;
            }
        }
        for request in requests {
            let mut offset = request.offset;
            for buffer in &request.buffers {
                self.take(offset, buffer)?;
                offset += buffer.len() as u64;
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let read_only = if self.read_only { ", read-only" } else { "" };
        format!("objects {} (chunks of {} KiB{read_only})", self.shown, self.chunk_size >> 10)
    }
}

impl ObjectBlockStore {
    /// Makes zeroes of the chunks that lie wholly in a range, for the next flush to remove; gives the rest of the range.
    fn zero_chunks(&self, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let mut rest = Vec::new();
        let mut state = self.state();
        for (number, inside, bytes) in self.parts(offset, length) {
            let here = (state.size - number * self.chunk_size).min(self.chunk_size);
            if bytes < here {
                rest.push((number * self.chunk_size + inside, bytes));
            } else if let Some(chunk) = state.chunks.get_mut(&number) {
                // A chunk of which nothing is known is zeroes already.
                let gone = std::mem::take(&mut chunk.dirty).blocks.len() as u64 * BLOCK;
                chunk.dirty.zeroed = true;
                state.dirty_bytes = state.dirty_bytes.saturating_sub(gone);
                state.dirty.insert(number);
            }
        }
        rest
    }
}

impl fmt::Debug for ObjectBlockStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectBlockStore").field(&self.describe()).finish()
    }
}

/// Takes the store over for writing, and removes what a crash left.
fn claim(objects: &dyn Objects, location: &str, writer: u64, loaded: &map::Loaded) -> Result<(), ObjectStoreError> {
    let name = Name::Writer { generation: writer }.to_string();
    // Its content is only there to be told from another's that asks at the same moment.
    let content = format!("{:?} {}", std::time::SystemTime::now(), std::process::id());
    match objects.create(vec![(name.clone(), content.into())]).into_iter().find_map(Result::err) {
        None => {}
        Some(Error::AlreadyExists { .. }) => return Err(ObjectStoreError::InUse(location.to_owned())),
        Some(source) => return Err(request(location, "create", &name, source)),
    }
    let before = loaded.writers.iter().map(|generation| Name::Writer { generation: *generation }.to_string());
    let gone: Vec<String> = loaded.superseded.iter().cloned().chain(before).collect();
    for (name, outcome) in gone.clone().into_iter().zip(objects.delete(gone)) {
        if let Err(error) = outcome {
            tracing::warn!(store = location, name, %error, "a superseded object is left for the next writer");
        }
    }
    Ok(())
}

fn request(location: &str, op: &'static str, name: &str, source: Error) -> ObjectStoreError {
    ObjectStoreError::Request { location: location.to_owned(), op, name: name.to_owned(), source }
}

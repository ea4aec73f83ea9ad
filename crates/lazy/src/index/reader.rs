//! The verified reader of an ordinary image: extents, then spans, from memory, from the cache, from the source.
//!
//! A span is fetched, verified, decrypted and decoded as a whole, by one thread while others that want it wait, and kept for a while among
//! the decoded chunks of the process: small files lie side by side in it.

use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use ring::digest::{Context, SHA256};

use super::{
    access::{Access, wanted},
    artifact::LayerKey,
    decode::decode,
    format::{Extent, Kind, SPAN_LIMIT, Span},
    metadata::IndexMetadata,
    pages::{Page, Which},
    spool::{Spool, span_error},
};
use crate::{
    device::DeviceReader,
    fetch::Wanted,
    format::{ChunkEntry, FormatError},
    pace::Urgency,
    reader::{Ahead, Failure, ReadError, Shared},
    source::{BlobId, Blobs},
};

/// Bytes of decoded spans that a process keeps, once it reads by an index.
const KEPT: usize = 16 << 20;
/// Threads that decode different spans seldom wait for each other.
const LOCKS: usize = 64;

/// Makes the file that a long span is decoded into: empty, without a name, on a disk that is trusted.
pub type MakeFile = dyn Fn() -> io::Result<File> + Send + Sync;

/// Reads one image by its index.
pub struct IndexReader {
    access: Access,
    layers: Vec<(BlobId, LayerKey, [u8; 32])>,
    device_bytes: u64,
    content_bytes: u64,
    make_file: Box<MakeFile>,
    spools: Mutex<HashMap<u64, Arc<Spool>>>,
    decoding: Vec<Mutex<()>>,
    /// Where the span ends that was decoded last, for readers that go on there.
    last: AtomicU64,
    ahead: Ahead,
    read_bytes: AtomicU64,
    failure: Mutex<Option<Failure>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The span that was decoded last within one read: many small files are in one.
#[derive(Default)]
struct Last(Option<(u64, Arc<Vec<u8>>)>);

impl IndexReader {
    /// A reader of an opened index; `keys` are those of its layers.
    pub fn new(
        shared: Arc<Shared>,
        source: Arc<dyn Blobs>,
        metadata: IndexMetadata,
        keys: Vec<LayerKey>,
        pages_blob: BlobId,
        make_file: Box<MakeFile>,
    ) -> Self {
        let IndexMetadata { summary, layers, pages } = metadata;
        shared.keep_at_least(KEPT);
        let layers = layers.iter().zip(keys);
        let layers =
            layers.map(|(entry, key)| (BlobId { digest: entry.digest, size: entry.size.get() }, key, entry.key));
        Self {
            access: Access::new(shared, source, pages, pages_blob),
            layers: layers.collect(),
            device_bytes: summary.device_bytes.get(),
            content_bytes: summary.content_bytes.get(),
            make_file,
            spools: Mutex::default(),
            decoding: (0..LOCKS).map(|_| Mutex::default()).collect(),
            last: AtomicU64::new(u64::MAX),
            ahead: Ahead::default(),
            read_bytes: AtomicU64::new(0),
            failure: Mutex::default(),
        }
    }

    fn try_read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let end = offset.saturating_add(out.len() as u64);
        if end > self.device_bytes {
            return Err(ReadError::Range { offset, end, size: self.device_bytes });
        }
        // What no extent covers.
        out.fill(0);
        let mut last = Last::default();
        let mut page = self.access.pages.find(Which::Extents, offset);
        while self.access.pages.entry(Which::Extents, page).is_some_and(|entry| entry.first.get() < end) {
            let Page::Extents(extents) = self.access.page(Which::Extents, page)? else { break };
            let first = extents.partition_point(|extent| end_of(extent) <= offset);
            for extent in extents.iter().skip(first) {
                let (start, stop) = (extent.offset.get().max(offset), end_of(extent).min(end));
                if start >= stop {
                    break;
                }
                let place = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
                let Some(piece) = out.get_mut(place(start)..place(stop)) else { break };
                self.read_tar(extent.address.get() + (start - extent.offset.get()), piece, &mut last)?;
            }
            page += 1;
        }
        Ok(())
    }

    /// Fills `out` with the tar's bytes from an address on.
    fn read_tar(&self, mut address: u64, mut out: &mut [u8], last: &mut Last) -> Result<(), ReadError> {
        while !out.is_empty() {
            if let Some((start, bytes)) = &last.0
                && let Some(from) = address.checked_sub(*start).and_then(|at| usize::try_from(at).ok())
                && let Some(rest) = bytes.get(from..).filter(|rest| !rest.is_empty())
            {
                let length = rest.len().min(out.len());
                let (now, later) = out.split_at_mut(length);
                now.copy_from_slice(rest.get(..length).unwrap_or_default());
                out = later;
                address += length as u64;
                continue;
            }
            let (head, page, number) = self.head(address)?;
            let kind = Kind::of(head.kind).unwrap_or(Kind::More);
            if head.length.get() <= SPAN_LIMIT && !self.goes_on(page, number)? {
                last.0 = Some((head.address.get(), self.decoded(&head, kind, page, number)?));
                continue;
            }
            let room = usize::try_from(head.end() - address).unwrap_or(usize::MAX).min(out.len());
            let (now, later) = out.split_at_mut(room);
            let spool = self.spool(&head, kind, page, number)?;
            spool.read(address - head.address.get(), now, |piece| self.stored(piece))?;
            out = later;
            address += room as u64;
        }
        Ok(())
    }

    /// The span of an address, and where it stands.
    fn head(&self, address: u64) -> Result<(Span, usize, usize), ReadError> {
        let page = self.access.pages.find(Which::Spans, address);
        let beyond = || ReadError::Range { offset: address, end: address + 1, size: self.access.pages.tar_bytes() };
        let Page::Spans(spans) = self.access.page(Which::Spans, page)? else { return Err(beyond()) };
        let number = spans.partition_point(|span| span.end() <= address);
        // Those that continue another end where it does.
        let span = spans.get(number).filter(|span| span.address.get() <= address).ok_or_else(beyond)?;
        Ok((*span, page, number))
    }

    /// The entry after one.
    fn after(&self, page: usize, number: usize) -> Result<Option<(Span, usize, usize)>, ReadError> {
        let Page::Spans(spans) = self.access.page(Which::Spans, page)? else { return Ok(None) };
        if let Some(span) = spans.get(number + 1) {
            return Ok(Some((*span, page, number + 1)));
        }
        if page + 1 >= self.access.pages.count(Which::Spans) {
            return Ok(None);
        }
        let Page::Spans(spans) = self.access.page(Which::Spans, page + 1)? else { return Ok(None) };
        Ok(spans.first().map(|span| (*span, page + 1, 0)))
    }

    fn goes_on(&self, page: usize, number: usize) -> Result<bool, ReadError> {
        Ok(self.after(page, number)?.is_some_and(|(next, ..)| next.kind == Kind::More.code()))
    }

    fn spool(&self, head: &Span, kind: Kind, page: usize, number: usize) -> Result<Arc<Spool>, ReadError> {
        let mut spools = lock(&self.spools);
        if let Some(spool) = spools.get(&head.address.get()) {
            return Ok(Arc::clone(spool));
        }
        let (mut pieces, mut at) = (vec![*head], (page, number));
        while let Some((next, page, number)) = self.after(at.0, at.1)?.filter(|next| next.0.kind == Kind::More.code()) {
            if next.layer != head.layer {
                let allowed = "that of the span which it continues";
                return Err(FormatError::field("span", "layer", next.layer.get().into(), allowed).into());
            }
            pieces.push(next);
            at = (page, number);
        }
        let window = self.access.window(head)?;
        let file = (self.make_file)().map_err(|error| ReadError::Spool(error.to_string()))?;
        let spool = Spool::new(pieces, kind, &window, file).map_err(|error| span_error(head, &error))?;
        let spool = Arc::new(spool);
        spools.insert(head.address.get(), Arc::clone(&spool));
        Ok(spool)
    }

    /// A span's tar.
    fn decoded(&self, span: &Span, kind: Kind, page: usize, number: usize) -> Result<Arc<Vec<u8>>, ReadError> {
        let entry = self.identity(span)?;
        if let Some(kept) = self.access.shared.kept(&entry) {
            return Ok(kept);
        }
        let number_of_lock = usize::from(span.digest[0]) % LOCKS;
        let _alone = self.decoding.get(number_of_lock).map(lock);
        if let Some(kept) = self.access.shared.kept(&entry) {
            return Ok(kept);
        }
        // What it looks back at comes in a request of its own, at the same time.
        let (mut wanted, mut ahead) = (vec![self.wanted(span)?], self.access.windows_after(page, number)?);
        wanted.extend(self.access.window_of(span));
        ahead.extend(self.following(span, page, number)?);
        let mut fetched = self.access.fetch(&wanted, &ahead, Urgency::Waited)?.into_iter();
        let stored = self.decrypt(span, fetched.next().unwrap_or_default())?;
        let window = fetched.next().map(|mut window| self.access.pages.open_window(span, &mut window)).transpose()?;
        let tar = decode(span, kind, &window.unwrap_or_default(), &stored).map_err(|error| span_error(span, &error))?;
        let tar = Arc::new(tar);
        self.access.shared.keep(&entry, Arc::clone(&tar));
        Ok(tar)
    }

    /// The spans that a sequential reader wants next, of the same page.
    fn following(&self, span: &Span, page: usize, number: usize) -> Result<Vec<Wanted>, ReadError> {
        let sequential = self.last.swap(span.end(), Ordering::Relaxed) == span.address.get();
        let (ahead, mut bytes) = (self.ahead.next(sequential), 0);
        let Page::Spans(spans) = self.access.page(Which::Spans, page)? else { return Ok(Vec::new()) };
        let following = spans.iter().skip(number + 1).take_while(|next| {
            let wanted = bytes < ahead;
            bytes += u64::from(next.stored.get());
            wanted
        });
        following.map(|next| self.wanted(next)).collect()
    }

    /// What a decoded span is kept by: it would not be the same for anybody who has another one of these.
    fn identity(&self, span: &Span) -> Result<ChunkEntry, ReadError> {
        let (blob, _, key) = self.layer(span)?;
        let mut hash = Context::new(&SHA256);
        // Counter mode makes other bytes of the same ciphertext elsewhere.
        let place = span.place.get().to_le_bytes();
        for part in [&b"span"[..], &[span.kind, span.bits, span.byte], &place, &span.window_digest, key] {
            hash.update(part);
        }
        let mut entry = wanted(*blob, span.place.get(), span.stored.get(), &span.digest).entry;
        entry.key.copy_from_slice(hash.finish().as_ref());
        entry.length = span.length;
        entry.method = u8::MAX;
        Ok(entry)
    }

    fn layer(&self, span: &Span) -> Result<&(BlobId, LayerKey, [u8; 32]), ReadError> {
        let number = span.layer.get();
        let layer = self.layers.get(usize::from(number));
        Ok(layer.ok_or_else(|| FormatError::field("span", "layer", number.into(), "one of the image's"))?)
    }

    /// A span's stored bytes, verified, then decrypted.
    fn stored(&self, span: &Span) -> Result<Vec<u8>, ReadError> {
        let fetched = self.access.fetch(&[self.wanted(span)?], &[], Urgency::Waited)?;
        self.decrypt(span, fetched.into_iter().next().unwrap_or_default())
    }

    fn decrypt(&self, span: &Span, mut stored: Vec<u8>) -> Result<Vec<u8>, ReadError> {
        if let (_, Some(key), _) = self.layer(span)? {
            key.decrypt(span.place.get(), &mut stored).map_err(|error| ReadError::Span {
                layer: span.layer.get(),
                address: span.address.get(),
                reason: error.to_string(),
            })?;
        }
        Ok(stored)
    }

    fn wanted(&self, span: &Span) -> Result<Wanted, ReadError> {
        let (blob, ..) = self.layer(span)?;
        Ok(wanted(*blob, span.place.get(), span.stored.get(), &span.digest))
    }
}

fn end_of(extent: &Extent) -> u64 {
    extent.offset.get().saturating_add(extent.length.get())
}

impl DeviceReader for IndexReader {
    fn size(&self) -> u64 {
        self.device_bytes
    }

    fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let outcome = self.try_read(offset, out);
        match &outcome {
            Ok(()) => {
                self.read_bytes.fetch_add(out.len() as u64, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!("reading bytes {offset} to {} of an image failed: {error}", offset + out.len() as u64);
                *lock(&self.failure) = Some(Failure { reason: error.to_string(), at: SystemTime::now() });
            }
        }
        outcome
    }

    fn complete(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), ReadError> {
        for page in 0..self.access.pages.count(Which::Extents) {
            self.access.page(Which::Extents, page)?;
        }
        for page in 0..self.access.pages.count(Which::Spans) {
            let Page::Spans(spans) = self.access.page(Which::Spans, page)? else { continue };
            let windows: Vec<Wanted> = spans.iter().filter_map(|span| self.access.window_of(span)).collect();
            self.access.bring(&windows)?;
            for span in spans.iter() {
                self.access.bring(&[self.wanted(span)?])?;
                if !step(span.end()) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn failure(&self) -> Option<Failure> {
        lock(&self.failure).clone()
    }

    fn blobs(&self) -> Vec<BlobId> {
        self.layers.iter().map(|(blob, ..)| *blob).collect()
    }

    fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

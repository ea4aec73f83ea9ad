//! Stored bytes of an index and its layers, verified, and the pages among them.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    format::Span,
    pages::{Page, Pages, Which},
};
use crate::{
    fetch::Wanted,
    format::{ChunkEntry, DIGEST, FormatError},
    pace::Urgency,
    reader::{ReadError, Shared},
    source::{BlobId, Blobs},
};

/// Pages that are kept in memory: 2 MiB of them.
const PAGES: usize = 96;
/// Pages that are fetched at once.
const PAGES_AHEAD: usize = 8;
/// Windows that are fetched at once: some 100 KiB.
const WINDOWS_AHEAD: usize = 16;
/// What a reader gets bytes from.
pub(super) struct Access {
    pub(super) shared: Arc<Shared>,
    source: Arc<dyn Blobs>,
    pub(super) pages: Pages,
    pages_blob: BlobId,
    kept: Mutex<VecDeque<(Which, usize, Page)>>,
}

/// Something stored, as the fetcher wants it.
pub(super) fn wanted(blob: BlobId, place: u64, stored: u32, digest: &[u8; DIGEST]) -> Wanted {
    let entry = ChunkEntry {
        offset: 0.into(),
        length: 0.into(),
        place: place.into(),
        stored: stored.into(),
        blob: 0.into(),
        method: 0,
        reserved: 0,
        digest: *digest,
        key: [0; 32],
    };
    Wanted { blob, entry }
}

impl Access {
    pub(super) fn new(shared: Arc<Shared>, source: Arc<dyn Blobs>, pages: Pages, pages_blob: BlobId) -> Self {
        Self { shared, source, pages, pages_blob, kept: Mutex::default() }
    }

    pub(super) fn window_of(&self, span: &Span) -> Option<Wanted> {
        let (place, stored) = (span.window.get(), span.window_stored.get());
        (stored > 0).then(|| wanted(self.pages_blob, place, stored, &span.window_digest))
    }

    /// A span's window; empty where it has none.
    pub(super) fn window(&self, span: &Span) -> Result<Vec<u8>, ReadError> {
        let Some(wanted) = self.window_of(span) else { return Ok(Vec::new()) };
        let mut fetched = self.fetch(&[wanted], &[], Urgency::Waited)?.into_iter();
        Ok(self.pages.open_window(span, &mut fetched.next().unwrap_or_default())?)
    }

    /// The windows of the spans after one.
    pub(super) fn windows_after(&self, page: usize, number: usize) -> Result<Vec<Wanted>, ReadError> {
        let Page::Spans(spans) = self.page(Which::Spans, page)? else { return Ok(Vec::new()) };
        Ok(spans.iter().skip(number + 1).filter_map(|span| self.window_of(span)).take(WINDOWS_AHEAD - 1).collect())
    }

    /// Stored bytes, verified. Where some have to be fetched, `ahead` is fetched into the cache with them.
    pub(super) fn fetch(
        &self,
        wanted: &[Wanted],
        ahead: &[Wanted],
        urgency: Urgency,
    ) -> Result<Vec<Vec<u8>>, ReadError> {
        let fetcher = &self.shared.fetcher;
        let mut found: Vec<Option<Vec<u8>>> = vec![None; wanted.len()];
        let _: Result<(), Infallible> = fetcher.cached(wanted, |at, stored| {
            if let Some(found) = found.get_mut(at) {
                *found = Some(stored.bytes().to_vec());
            }
            Ok(())
        });
        let mut away: Vec<Wanted> =
            wanted.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(wanted, _)| *wanted).collect();
        if !away.is_empty() {
            if fetcher.cache().is_some() {
                let here = fetcher.has(ahead);
                away.extend(ahead.iter().zip(here).filter(|(_, here)| !here).map(|(wanted, _)| *wanted));
            }
            let mut fetched = fetcher.fetch(self.source.as_ref(), &away, urgency)?.into_iter();
            for found in found.iter_mut().filter(|found| found.is_none()) {
                *found = fetched.next().map(|bytes| Arc::try_unwrap(bytes).unwrap_or_else(|shared| shared.to_vec()));
            }
        }
        Ok(found.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// Fetches what is not in the cache.
    pub(super) fn bring(&self, wanted: &[Wanted]) -> Result<(), ReadError> {
        let here = self.shared.fetcher.has(wanted);
        let away: Vec<Wanted> = wanted.iter().zip(here).filter(|(_, here)| !here).map(|(wanted, _)| *wanted).collect();
        self.shared.fetcher.fetch(self.source.as_ref(), &away, Urgency::Later)?;
        Ok(())
    }

    pub(super) fn page(&self, which: Which, number: usize) -> Result<Page, ReadError> {
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = kept.iter().position(|(kind, page, _)| (*kind, *page) == (which, number))
                && let Some(found) = kept.remove(at)
            {
                // What was used last stands in front.
                let page = found.2.clone();
                kept.push_front(found);
                return Ok(page);
            }
        }
        let of = |number| {
            let entry = self.pages.entry(which, number)?;
            Some(wanted(self.pages_blob, entry.place.get(), entry.stored.get(), &entry.digest))
        };
        let beyond = || FormatError::field("page index", "page", number as u64, "one of the index's");
        let first = of(number).ok_or_else(beyond)?;
        let ahead: Vec<Wanted> = (number + 1..number + PAGES_AHEAD).map_while(of).collect();
        let mut fetched = self.fetch(&[first], &ahead, Urgency::Waited)?.into_iter();
        let page = self.pages.open(which, number, &mut fetched.next().unwrap_or_default())?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(PAGES - 1);
        kept.push_front((which, number, page.clone()));
        Ok(page)
    }
}

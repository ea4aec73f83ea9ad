//! Pages that are used again and again, so that writes do not ask the system for memory.

use std::sync::Mutex;

use nacre_core::Page;

use crate::poison;

pub(crate) struct Pool {
    pages: Mutex<Vec<Box<Page>>>,
    most: usize,
}

impl Pool {
    /// Keeps so many pages at most.
    pub(crate) fn new(most: usize) -> Self {
        Self { pages: Mutex::default(), most }
    }

    /// So many pages, with any content (ciphertext of before).
    pub(crate) fn take(&self, count: usize) -> Vec<Box<Page>> {
        let mut taken = {
            let mut pages = poison(self.pages.lock());
            let rest = pages.len().saturating_sub(count);
            pages.split_off(rest)
        };
        taken.resize_with(count, Page::zeroed);
        taken
    }

    pub(crate) fn give(&self, given: impl IntoIterator<Item = Box<Page>>) {
        let mut pages = poison(self.pages.lock());
        let room = self.most.saturating_sub(pages.len());
        pages.extend(given.into_iter().take(room));
    }
}

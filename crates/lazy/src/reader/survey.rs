//! What an image's table says of its chunks, for people.

use std::collections::HashMap;

use super::{ReadError, Reader};
use crate::format::{ChunkEntry, DIGEST, Method};

/// The most different chunks that are told from each other: some 300 MB of memory, a quarter of a terabyte of an image.
const DIFFERENT: usize = 4 << 20;

/// Some chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How many.
    pub chunks: u64,
    /// Bytes of the device.
    pub plain: u64,
    /// Bytes that are stored for them.
    pub stored: u64,
}

impl Counts {
    fn add(&mut self, entry: &ChunkEntry) {
        self.chunks += 1;
        self.plain += entry.length.get();
        self.stored += u64::from(entry.stored.get());
    }
}

/// What there is in a table.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Chunks that are compressed.
    pub zstd: Counts,
    /// Chunks that are stored as they are.
    pub raw: Counts,
    /// Ranges of zeroes, for which nothing is stored.
    pub zeroes: Counts,
    /// Entries that name what another one of the image names as well, but for one of each; `None` where there are too many chunks to tell.
    pub repeated: Option<Counts>,
    /// Chunks that the image's trace names.
    pub trace: Counts,
    /// Of each data blob what the image has of it.
    pub blobs: Vec<Counts>,
    /// Different chunks, and how large they are.
    different: HashMap<[u8; DIGEST], (u64, u32)>,
}

impl Survey {
    /// Chunks of this image that another one has as well; `None` where there are too many to tell.
    pub fn shared_with(&self, other: &Self) -> Option<Counts> {
        if self.repeated.is_none() || other.repeated.is_none() {
            return None;
        }
        let both = self.different.iter().filter(|(digest, _)| other.different.contains_key(*digest));
        Some(both.fold(Counts::default(), |counts, (_, (plain, stored))| Counts {
            chunks: counts.chunks + 1,
            plain: counts.plain + plain,
            stored: counts.stored + u64::from(*stored),
        }))
    }

    fn add(&mut self, entry: &ChunkEntry) {
        match Method::of(entry.method) {
            Some(Method::Zeroes) => return self.zeroes.add(entry),
            Some(Method::Zstd) => self.zstd.add(entry),
            _ => self.raw.add(entry),
        }
        let full = self.different.len() == DIFFERENT;
        match self.different.get(&entry.digest) {
            Some(_) => {
                if let Some(repeated) = &mut self.repeated {
                    repeated.add(entry);
                }
                return;
            }
            None if full => self.repeated = None,
            None => {
                self.different.insert(entry.digest, (entry.length.get(), entry.stored.get()));
            }
        }
        if let Some(blob) = self.blobs.get_mut(usize::from(entry.blob.get())) {
            blob.add(entry);
        }
    }
}

impl Reader {
    /// Reads all of the table.
    ///
    /// # Errors
    /// [`ReadError`]
    pub fn survey(&self) -> Result<Survey, ReadError> {
        let blobs = vec![Counts::default(); self.blobs.len()];
        let mut survey = Survey { repeated: Some(Counts::default()), blobs, ..Survey::default() };
        let mut trace = self.table.trace();
        trace.sort_unstable();
        let mut trace = trace.into_iter().peekable();
        for leaf in 0..self.table.count() {
            for entry in self.leaf(leaf)?.iter() {
                survey.add(entry);
                // Entries go up, and so do the places.
                let mut named = false;
                while trace.next_if(|place| *place < entry.end()).is_some() {
                    named = entry.method != Method::Zeroes.code();
                }
                if named {
                    survey.trace.add(entry);
                }
            }
        }
        Ok(survey)
    }
}

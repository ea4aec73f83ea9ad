//! Which chunks of an image are used first, and in which order: recorded in one run, kept in the image's metadata, and fetched ahead of
//! the next runs ([`Reader::follow_trace`](crate::reader::Reader::follow_trace)).

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use crate::format::{ChunkEntry, FormatError, Method, Summary, TRACE_LIMIT};

/// Takes down where in the data device chunks begin, in the order in which they are first read.
#[derive(Debug)]
pub struct Recorder {
    recorded: Mutex<Recorded>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Recorded {
    order: Vec<u64>,
    seen: HashSet<u64>,
    full: bool,
}

impl Default for Recorder {
    /// One that records as much as the format holds.
    fn default() -> Self {
        Self { recorded: Mutex::default(), limit: TRACE_LIMIT as usize }
    }
}

impl Recorder {
    /// Notes chunks that are read. Zeroes are not stored, so they are no part of a trace.
    pub fn touch<'a>(&self, entries: impl Iterator<Item = &'a ChunkEntry>) {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in entries.filter(|entry| entry.method != Method::Zeroes.code()) {
            let offset = entry.offset.get();
            if recorded.seen.contains(&offset) {
                continue;
            }
            if recorded.order.len() == self.limit {
                if !std::mem::replace(&mut recorded.full, true) {
                    tracing::warn!("the trace has {} places, as many as it may; it ends here", self.limit);
                }
                return;
            }
            recorded.seen.insert(offset);
            recorded.order.push(offset);
        }
    }

    /// What was recorded so far.
    pub fn trace(&self) -> Vec<u64> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).order.clone()
    }
}

/// Checks what a metadata blob has for a trace: every place is one of the device.
///
/// # Errors
/// [`FormatError::Field`]
pub fn check(trace: &[u64], summary: &Summary) -> Result<(), FormatError> {
    let device = summary.device_bytes.get();
    match trace.iter().find(|place| **place >= device) {
        Some(place) => Err(FormatError::field("trace", "place", *place, "a byte of the data device")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    fn entry(offset: u64, method: Method) -> ChunkEntry {
        let mut entry = ChunkEntry::new_zeroed();
        (entry.offset, entry.method) = (offset.into(), method.code());
        entry
    }

    #[test]
    fn a_trace_has_each_chunk_once_in_the_order_of_first_use_and_an_end() {
        let recorder = Recorder { limit: 3, ..Recorder::default() };
        let touch = |offsets: &[u64]| {
            let entries: Vec<_> = offsets.iter().map(|offset| entry(*offset, Method::Zstd)).collect();
            recorder.touch(entries.iter());
        };
        touch(&[8, 4]);
        touch(&[4, 0, 8]);
        recorder.touch([entry(100, Method::Zeroes)].iter());
        assert_eq!(recorder.trace(), [8, 4, 0]);
        touch(&[16, 20, 8]);
        assert_eq!(recorder.trace(), [8, 4, 0], "it is full");
    }

    #[test]
    fn places_beyond_the_device_are_refused() {
        let summary = Summary { device_bytes: 4096.into(), ..Summary::default() };
        check(&[0, 4095, 0], &summary).unwrap();
        check(&[], &Summary::default()).unwrap();
        let error = check(&[0, 4096], &summary).unwrap_err().to_string();
        assert!(error.contains("trace: place is 4096"), "{error}");
    }
}

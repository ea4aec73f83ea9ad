//! Spans are noted as a reader will find them: each is decoded once more, by what the index will say of it and nothing else.
//!
//! Of a window only those bytes are kept that the span refers to; the others are zeroes, which cost nothing. Which they are is found by decoding
//! the span's beginning with three windows that give each place away.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    sync::mpsc::Receiver,
};

use nacre_core::aead::AeadKey;

use super::{IndexBuildError, scan::Job};
use crate::{
    chunk::sha256,
    format::DIGEST,
    index::{
        decode::decode,
        format::{Kind, SPAN_LIMIT, Span, WINDOW},
        gunzip::Gunzip,
    },
    keys::{MetadataKey, Part, counter},
};

/// zstd's level for windows. At 19 they would be a little smaller, and cost as much time as all else.
const LEVEL: i32 = 9;

/// The blob of windows, which pages follow.
pub(super) struct Windows {
    pub(super) file: BufWriter<File>,
    pub(super) place: u64,
    seal: Option<AeadKey>,
}

impl Windows {
    pub(super) fn new(file: BufWriter<File>, key: Option<&MetadataKey>) -> Self {
        let seal = key.map(|key| AeadKey::new(&key.derive(Part::Windows)));
        Self { file, place: 0, seal }
    }

    /// Stores a window; gives its place, stored bytes, and digest.
    fn put(&mut self, window: &[u8]) -> Result<(u64, u32, [u8; DIGEST]), IndexBuildError> {
        let mut stored = zstd::bulk::compress(window, LEVEL).map_err(IndexBuildError::Spool)?;
        let place = self.place;
        if let Some(key) = &self.seal {
            key.seal(counter(place), b"window", &mut stored);
        }
        self.file.write_all(&stored).map_err(IndexBuildError::Spool)?;
        self.place += stored.len() as u64;
        Ok((place, u32::try_from(stored.len()).unwrap_or(u32::MAX), sha256(&stored)))
    }
}

/// Notes spans as they come.
pub(super) fn note(spans: &mut Vec<Span>, windows: &mut Windows, jobs: Receiver<Job>) -> Result<(), IndexBuildError> {
    for job in jobs {
        note_one(spans, windows, &job)?;
    }
    Ok(())
}

/// Lengths of spans, and whether they are decoded into a file.
pub(super) fn lengths(spans: &[Span]) -> impl Iterator<Item = (u64, bool)> + use<'_> {
    spans.iter().enumerate().filter(|(_, span)| span.kind != Kind::More.code()).map(|(at, span)| {
        let goes_on = spans.get(at + 1).is_some_and(|next| next.kind == Kind::More.code());
        (span.length.get(), goes_on || span.length.get() > SPAN_LIMIT)
    })
}

fn note_one(spans: &mut Vec<Span>, windows: &mut Windows, job: &Job) -> Result<(), IndexBuildError> {
    for (number, piece) in job.pieces.iter().enumerate() {
        let is_head = number == 0;
        let mut span = Span {
            address: (job.address + if is_head { 0 } else { job.length }).into(),
            length: if is_head { job.length } else { 0 }.into(),
            place: piece.place.into(),
            window: 0.into(),
            stored: piece.stored.into(),
            window_stored: 0.into(),
            layer: job.layer.into(),
            kind: if is_head { job.kind } else { Kind::More }.code(),
            bits: 0,
            byte: 0,
            reserved: [0; 3],
            digest: piece.digest,
            window_digest: [0; DIGEST],
        };
        if is_head {
            let window = verified(&mut span, job).ok_or(IndexBuildError::Verify { place: piece.place })?;
            if !window.is_empty() {
                let (place, stored, digest) = windows.put(&window)?;
                (span.window, span.window_stored, span.window_digest) = (place.into(), stored.into(), digest);
            }
        }
        spans.push(span);
    }
    Ok(())
}

/// Finds the bits where the span begins and the bytes that it looks back at, and decodes it; gives the window.
fn verified(span: &mut Span, job: &Job) -> Option<Vec<u8>> {
    let whole = job.pieces.len() == 1 && job.length <= SPAN_LIMIT;
    let right = |span: &Span, window: &[u8]| match whole {
        true => decode(span, job.kind, window, &job.first).is_ok_and(|tar| tar == job.expected),
        false => job.kind != Kind::Inflate || begins(span, window, job),
    };
    if job.kind != Kind::Inflate {
        return (job.kind == Kind::Raw || right(span, &[])).then(Vec::new);
    }
    for bits in 0..8u8 {
        let unused = 8 - u32::from(bits);
        span.bits = bits;
        span.byte = job.before.checked_shr(unused).unwrap_or(0).checked_shl(unused).unwrap_or(0);
        let Some(window) = sparse(span, job) else { continue };
        if right(span, &window) {
            return Some(window);
        }
    }
    None
}

/// Whether a span that is too long to be decoded whole begins as it should.
fn begins(span: &Span, window: &[u8], job: &Job) -> bool {
    let mut out = vec![0; job.expected.len()];
    start(span, window, &job.first, &mut out).is_some_and(|given| {
        given >= job.expected.len().min(WINDOW) && job.expected.starts_with(out.get(..given).unwrap_or_default())
    })
}

/// Decodes until `out` is full or all is used.
fn start(span: &Span, window: &[u8], stored: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut gunzip = Gunzip::resume(window, span.bits, span.byte).ok()?;
    let (mut taken, mut given) = (0, 0);
    while given < out.len() {
        let (more_in, more_out, _) = gunzip.run(stored.get(taken..)?, out.get_mut(given..)?, false).ok()?;
        (taken, given) = (taken + more_in, given + more_out);
        if more_in == 0 && more_out == 0 {
            break;
        }
    }
    Some(given)
}

/// The window with zeroes where the span does not look; `None` where the span begins with other bits.
fn sparse(span: &Span, job: &Job) -> Option<Vec<u8>> {
    // What lies further on can only be copied from what is copied here.
    let mut beginning = vec![0; job.expected.len().min(WINDOW)];
    let expected = job.expected.get(..beginning.len())?;
    if start(span, &job.window, &job.first, &mut beginning)? != expected.len() || beginning != expected {
        return None;
    }
    let marks = |mark: fn(usize) -> u8| -> Option<Vec<u8>> {
        let window: Vec<u8> = (0..job.window.len()).map(mark).collect();
        let mut out = vec![0; expected.len()];
        (start(span, &window, &job.first, &mut out)? == out.len()).then_some(out)
    };
    let low = marks(|at| at.to_le_bytes()[0])?;
    let high = marks(|at| at.to_le_bytes()[1])?;
    let other = marks(|at| !at.to_le_bytes()[0])?;
    let mut window = vec![0; job.window.len()];
    let mut first = window.len();
    for ((low, high), other) in low.iter().zip(&high).zip(&other) {
        // A byte that is the same with both was never in the window.
        if low != other {
            let at = usize::from(u16::from_le_bytes([*low, *high]));
            *window.get_mut(at)? = *job.window.get(at)?;
            first = first.min(at);
        }
    }
    // Places are counted from the window's end, so its beginning can go.
    Some(window.split_off(first))
}

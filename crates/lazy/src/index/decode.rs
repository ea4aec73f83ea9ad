//! Spans: stored bytes, verified and decrypted, become tar, exactly as much as the index says.

use std::{cell::RefCell, io};

use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::{
    format::{Kind, Span, WINDOW, ZSTD_WINDOW_LOG},
    gunzip::{Gunzip, GunzipError},
};

/// What streams are decoded by at a time.
const PIECE: usize = 64 << 10;

/// Why a span is not what the index says.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Its gzip.
    #[error(transparent)]
    Gunzip(#[from] GunzipError),
    /// Its zstd.
    #[error("the zstd frame: {0}")]
    Zstd(String),
    /// Its length.
    #[error("it decodes to {found} bytes of tar or more; the index says {expected}")]
    Length {
        /// As it is.
        found: u64,
        /// As it must be.
        expected: u64,
    },
}

fn zstd_error(error: &io::Error) -> DecodeError {
    let text = error.to_string();
    DecodeError::Zstd(match text.contains("too much memory") {
        true => "its window is larger than 32 MiB".into(),
        false => text,
    })
}

thread_local! {
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decompresses zstd frames to a buffer, with this thread's decompressor.
pub(crate) fn unzstd(stored: &[u8], out: &mut [u8]) -> Result<usize, DecodeError> {
    ZSTD.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new().map_err(|error| zstd_error(&error))?),
        };
        decompressor.decompress_to_buffer(stored, out).map_err(|error| zstd_error(&error))
    })
}

/// Decodes a whole span.
///
/// # Errors
/// [`DecodeError`]: what it gives, or more, is not what is wanted.
pub(crate) fn decode(span: &Span, kind: Kind, window: &[u8], stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let expected = span.length.get();
    let length = usize::try_from(expected).unwrap_or(usize::MAX);
    let wrong = |found: usize| DecodeError::Length { found: found as u64, expected };
    let found = match kind {
        Kind::Raw => stored.to_vec(),
        Kind::Zstd => {
            let mut out = vec![0; length];
            let found = unzstd(stored, &mut out)?;
            if found != length {
                return Err(wrong(found));
            }
            out
        }
        Kind::Gzip | Kind::Inflate => {
            let mut stream = Stream::new(span, kind, window)?;
            // One byte more, so that more is noticed.
            let mut out = vec![0; length + 1];
            let given = stream.fill(stored, &mut out)?;
            out.truncate(given);
            out
        }
        Kind::More => return Err(wrong(0)),
    };
    if found.len() == length { Ok(found) } else { Err(wrong(found.len())) }
}

enum Format {
    Gzip(Box<Gunzip>),
    Zstd(Decoder<'static>),
    Raw,
}

/// Decodes a span whose stored bytes come in pieces.
pub(crate) struct Stream(Format);

impl Stream {
    pub(crate) fn new(span: &Span, kind: Kind, window: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(match kind {
            Kind::Gzip => Format::Gzip(Box::new(Gunzip::new())),
            Kind::Inflate => Format::Gzip(Box::new(Gunzip::resume(window, span.bits, span.byte)?)),
            Kind::Zstd => {
                let mut decoder = Decoder::new().map_err(|error| zstd_error(&error))?;
                let log = DParameter::WindowLogMax(ZSTD_WINDOW_LOG);
                decoder.set_parameter(log).map_err(|error| zstd_error(&error))?;
                Format::Zstd(decoder)
            }
            Kind::Raw | Kind::More => Format::Raw,
        }))
    }

    fn step(&mut self, input: &[u8], out: &mut [u8]) -> Result<(usize, usize), DecodeError> {
        match &mut self.0 {
            Format::Gzip(gunzip) => {
                let (taken, given, _) = gunzip.run(input, out, false)?;
                Ok((taken, given))
            }
            Format::Zstd(decoder) => {
                let status = decoder.run_on_buffers(input, out).map_err(|error| zstd_error(&error))?;
                Ok((status.bytes_read, status.bytes_written))
            }
            Format::Raw => {
                let length = input.len().min(out.len());
                if let (Some(to), Some(from)) = (out.get_mut(..length), input.get(..length)) {
                    to.copy_from_slice(from);
                }
                Ok((length, length))
            }
        }
    }

    /// Decodes into `out` until it is full, or nothing more comes of `input`; gives how much came.
    fn fill(&mut self, mut input: &[u8], out: &mut [u8]) -> Result<usize, DecodeError> {
        let mut given = 0;
        while given < out.len() {
            let (taken, more) = self.step(input, out.get_mut(given..).unwrap_or_default())?;
            input = input.get(taken..).unwrap_or_default();
            given += more;
            if taken == 0 && more == 0 {
                break;
            }
        }
        Ok(given)
    }

    /// Decodes a piece; `put` gets what comes of it.
    pub(crate) fn feed<E: From<DecodeError>>(
        &mut self,
        mut input: &[u8],
        mut put: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut out = vec![0; PIECE];
        loop {
            let (taken, given) = self.step(input, &mut out)?;
            input = input.get(taken..).unwrap_or_default();
            if given > 0 {
                put(out.get(..given).unwrap_or_default())?;
            }
            if taken == 0 && given == 0 {
                return Ok(());
            }
        }
    }
}

/// A window as it is stored, decompressed.
pub(crate) fn window(stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut out = vec![0; WINDOW];
    let length = unzstd(stored, &mut out)?;
    out.truncate(length);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn spans_that_lie_about_their_length_are_errors() {
        let tar: Vec<u8> = (0..50_000u32).flat_map(|at| (at / 3).to_le_bytes()).collect();
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(&tar).unwrap();
        let gzip = writer.finish().unwrap();
        let (mut two, mut members) = ([&tar[..], &tar[..]].concat(), [&gzip[..], &gzip[..]].concat());
        let zstd = zstd::bulk::compress(&tar, 3).unwrap();
        // From a member's data on, with nothing before.
        let inflate = gzip[10..].to_vec();
        for (kind, tar, stored) in [
            (Kind::Raw, tar.clone(), tar.clone()),
            (Kind::Gzip, tar.clone(), gzip),
            (Kind::Gzip, std::mem::take(&mut two), std::mem::take(&mut members)),
            (Kind::Inflate, tar.clone(), inflate),
            (Kind::Zstd, tar.clone(), zstd),
        ] {
            let mut span = Span::new_zeroed();
            let mut with = |length: usize, stored: &[u8]| {
                span.length = (length as u64).into();
                decode(&span, kind, &[], stored)
            };
            assert!(with(tar.len(), &stored) == Ok(tar.clone()), "{kind:?}");
            for length in [1, tar.len() - 1, tar.len() + 1, 2 * tar.len() + 5] {
                assert!(with(length, &stored).is_err(), "{kind:?} of {length}");
            }
            assert!(with(tar.len(), &stored[..stored.len() / 2]).is_err(), "{kind:?}, cut");
            assert!(with(tar.len(), b"").is_err(), "{kind:?} of nothing");
        }
    }

    #[test]
    fn zstd_windows_beyond_the_limit_are_said_to_be_so() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(26).unwrap();
        encoder.write_all(&vec![7; 1 << 20]).unwrap();
        let frame = encoder.finish().unwrap();
        let mut stream = Stream::new(&Span::new_zeroed(), Kind::Zstd, &[]).unwrap();
        let error = stream.feed(&frame, |_| Ok::<(), DecodeError>(())).unwrap_err();
        assert!(error.to_string().contains("larger than 32 MiB"), "{error}");
    }
}

//! The readers that a layer goes through, each of which gives an error instead of an end when its check does not hold.

use std::{
    io::{self, BufReader, Read, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use nacre_core::{Digest, Hasher, Task};

use super::CopyError;
use crate::{
    manifest::{Compression, Descriptor},
    source::TransportError,
};

/// The most memory that a zstd frame may want: 2^27, what `zstd -d` allows by default.
const ZSTD_WINDOW_LOG: u32 = 27;
const BUFFER: usize = 128 << 10;

/// A stream of a layer's bytes.
pub(super) type Stream = Box<dyn Read + Send>;

/// The error that a stream gives when another blob of the same copy failed.
#[derive(Debug, thiserror::Error)]
#[error("stopped, because another blob failed")]
pub(super) struct Stopped;

/// A blob as it comes from its source: of the size and digest of its descriptor, or an error.
pub(super) struct Checked<'a> {
    pub(super) inner: Stream,
    pub(super) hasher: Option<Hasher>,
    pub(super) left: u64,
    pub(super) descriptor: Descriptor,
    pub(super) place: String,
    pub(super) task: &'a dyn Task,
    pub(super) stop: &'a AtomicBool,
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other(Stopped));
        }
        let count = self.inner.read(buffer)?;
        let what = || format!("blob {}", self.descriptor.digest);
        let malformed = |reason: String| {
            io::Error::other(TransportError::Malformed { what: what(), place: self.place.clone(), reason })
        };
        let Some(hasher) = &mut self.hasher else { return Ok(0) };
        if count == 0 && !buffer.is_empty() {
            if self.left > 0 {
                return Err(malformed(format!("{} of its {} bytes are missing", self.left, self.descriptor.size)));
            }
            let found = self.hasher.take().map(Hasher::finish);
            return match found {
                Some(found) if found != self.descriptor.digest => {
                    let what = format!("{} at {}", what(), self.place);
                    let expected = self.descriptor.digest;
                    Err(io::Error::other(TransportError::DigestMismatch { what, expected, found }))
                }
                _ => Ok(0),
            };
        }
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| malformed(format!("it has more than its {} bytes", self.descriptor.size)))?;
        hasher.update(buffer.get(..count).unwrap_or_default());
        self.task.advance(count as u64);
        Ok(count)
    }
}

/// Checks that what flows through has a digest, and at most a number of bytes.
pub(super) struct DigestCheck<R> {
    inner: R,
    hasher: Option<Hasher>,
    expected: Digest,
    what: &'static str,
    left: u64,
}

impl<R> DigestCheck<R> {
    pub(super) fn new(inner: R, what: &'static str, expected: Digest, limit: u64) -> Self {
        Self { inner, hasher: Some(Hasher::new(expected.algorithm())), expected, what, left: limit }
    }
}

impl<R: Read> Read for DigestCheck<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count > 0 {
            self.left = self.left.checked_sub(count as u64).ok_or_else(|| io::Error::other(CopyError::Bomb))?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(buffer.get(..count).unwrap_or_default());
            }
        } else if !buffer.is_empty()
            && let Some(found) = self.hasher.take().map(Hasher::finish)
            && found != self.expected
        {
            return Err(io::Error::other(TransportError::DigestMismatch {
                what: self.what.into(),
                expected: self.expected,
                found,
            }));
        }
        Ok(count)
    }
}

/// Undoes a layer's compression.
pub(super) fn decompress<'a>(
    inner: impl Read + Send + 'a,
    compression: Compression,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(inner),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, inner))),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(BUFFER, inner))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

/// Compresses a layer; the same bytes for the same layer, level and version of the compressor.
pub(super) fn compress<'a>(
    inner: impl Read + Send + 'a,
    compression: Compression,
    level: Option<u32>,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(inner),
        Compression::Gzip => {
            let level = level.map_or(flate2::Compression::default(), |level| flate2::Compression::new(level.min(9)));
            Box::new(flate2::bufread::GzEncoder::new(BufReader::with_capacity(BUFFER, inner), level))
        }
        Compression::Zstd => {
            let level =
                level.map_or(zstd::DEFAULT_COMPRESSION_LEVEL, |level| i32::try_from(level).unwrap_or(22).min(22));
            let mut encoder = zstd::stream::read::Encoder::with_buffer(BufReader::with_capacity(BUFFER, inner), level)?;
            encoder.include_checksum(true)?;
            Box::new(encoder)
        }
    })
}

/// Checks on the side that the compressed layer that flows through has a diff_id when it is decompressed.
pub(super) struct DiffIdTee<R> {
    inner: R,
    side: Option<Side>,
    expected: Digest,
}

/// A decompressor that is pushed.
enum Side {
    None(Box<HashWriter>),
    Gzip(Box<flate2::write::MultiGzDecoder<HashWriter>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, HashWriter>>),
}

struct HashWriter {
    hasher: Hasher,
    left: u64,
}

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(|| io::Error::other(CopyError::Bomb))?;
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<R> DiffIdTee<R> {
    pub(super) fn new(inner: R, compression: Compression, expected: Digest, limit: u64) -> io::Result<Self> {
        let writer = HashWriter { hasher: Hasher::new(expected.algorithm()), left: limit };
        let side = match compression {
            Compression::None => Side::None(Box::new(writer)),
            Compression::Gzip => Side::Gzip(Box::new(flate2::write::MultiGzDecoder::new(writer))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::write::Decoder::new(writer)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Side::Zstd(Box::new(decoder))
            }
        };
        Ok(Self { inner, side: Some(side), expected })
    }
}

impl<R: Read> Read for DiffIdTee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let bytes = buffer.get(..count).unwrap_or_default();
        if count > 0 {
            match &mut self.side {
                Some(Side::None(writer)) => writer.write_all(bytes)?,
                Some(Side::Gzip(decoder)) => decoder.write_all(bytes)?,
                Some(Side::Zstd(decoder)) => decoder.write_all(bytes)?,
                None => {}
            }
        } else if !buffer.is_empty()
            && let Some(side) = self.side.take()
        {
            let writer = match side {
                Side::None(writer) => *writer,
                Side::Gzip(decoder) => decoder.finish()?,
                Side::Zstd(mut decoder) => {
                    decoder.flush()?;
                    decoder.into_inner()
                }
            };
            let found = writer.hasher.finish();
            if found != self.expected {
                let what = "the decrypted layer's uncompressed content".into();
                return Err(io::Error::other(TransportError::DigestMismatch { what, expected: self.expected, found }));
            }
        }
        Ok(count)
    }
}

/// The end of a pipeline: knows whether it was read to its end, and keeps the error that stopped it, since a sink may report it in
/// words of its own.
pub(super) struct Watched<R> {
    inner: R,
    ended: bool,
    failure: Option<io::Error>,
}

impl<R> Watched<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, ended: false, failure: None }
    }

    /// What the stream says of itself, after somebody read it; and the stream.
    pub(super) fn outcome(self, what: &str) -> Result<R, CopyError> {
        match self.failure {
            Some(error) => Err(CopyError::from_stream(what, error)),
            None if self.ended => Ok(self.inner),
            None => Err(CopyError::NotReadToEnd(what.into())),
        }
    }

    /// Whether the stream failed.
    pub(super) fn failed(&self) -> bool {
        self.failure.is_some()
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(count) => {
                self.ended |= count == 0 && !buffer.is_empty();
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let shown = io::Error::new(error.kind(), error.to_string());
                self.failure = Some(error);
                Err(shown)
            }
        }
    }
}

//! The metadata blob: a header, and frames of one stream.
//!
//! ```text
//! header (32)  { length and mark (4)  method (1)  sealed payload } …
//! ```
//!
//! Each frame holds 256 KiB of the stream, the last one the rest (which may be nothing). The word before it has the sealed
//! payload's length, and in its highest bit whether it is the last. Associated data of a frame: the header, the word, the method;
//! nonce: its number. So frames can be left out, put elsewhere, or cut off only with an error.

use std::io::{self, Read, Write};

use nacre_core::aead::AeadKey;
use zerocopy::IntoBytes as _;

use crate::{
    format::{Cipher, FRAME, FormatError, Header, Method},
    keys::{MetadataKey, Part, counter},
};

/// The bit that marks the last frame.
const LAST: u32 = 1 << 31;

/// Why a metadata blob could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream it comes from failed.
    #[error("reading the metadata blob failed: {0}")]
    Io(#[from] io::Error),
    /// It is not what it should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It is sealed, and there is no key; or the other way round.
    #[error("the metadata blob is {found}, its media type says {expected}")]
    Key {
        /// As it is.
        found: &'static str,
        /// As it was said.
        expected: &'static str,
    },
}

fn cipher_of(key: Option<&MetadataKey>) -> Cipher {
    if key.is_some() { Cipher::Aes256Gcm } else { Cipher::None }
}

fn associated(header: &Header, word: u32, method: u8) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&word.to_le_bytes());
    bytes.push(method);
    bytes
}

/// Writes the stream as frames.
pub struct FrameWriter<W> {
    out: W,
    header: Header,
    key: Option<AeadKey>,
    compressor: zstd::bulk::Compressor<'static>,
    pending: Vec<u8>,
    number: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Begins a blob. The key must never have been used for another one.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(mut out: W, key: Option<&MetadataKey>, level: i32) -> io::Result<Self> {
        let header = Header::new(cipher_of(key));
        out.write_all(header.as_bytes())?;
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        compressor.include_contentsize(false)?;
        compressor.include_checksum(false)?;
        let key = key.map(|key| AeadKey::new(&key.derive(Part::Frames)));
        Ok(Self { out, header, key, compressor, pending: Vec::with_capacity(FRAME), number: 0 })
    }

    fn frame(&mut self, last: bool) -> io::Result<()> {
        let mut payload = self.compressor.compress(&self.pending)?;
        let mut method = Method::Zstd.code();
        if payload.len() >= self.pending.len() {
            payload.clear();
            payload.extend_from_slice(&self.pending);
            method = Method::Raw.code();
        }
        let stored = payload.len() + cipher_of_aead(self.key.as_ref()).overhead();
        let word = u32::try_from(stored).map_err(io::Error::other)? | if last { LAST } else { 0 };
        if let Some(key) = &self.key {
            key.seal(counter(self.number), &associated(&self.header, word, method), &mut payload);
        }
        self.out.write_all(&word.to_le_bytes())?;
        self.out.write_all(&[method])?;
        self.out.write_all(&payload)?;
        self.number += 1;
        self.pending.clear();
        Ok(())
    }

    /// Ends the blob.
    ///
    /// # Errors
    /// Those of what it is written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.frame(true)?;
        Ok(self.out)
    }
}

fn cipher_of_aead(key: Option<&AeadKey>) -> Cipher {
    if key.is_some() { Cipher::Aes256Gcm } else { Cipher::None }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.pending.len() == FRAME {
            self.frame(false)?;
        }
        let room = FRAME - self.pending.len();
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.pending.extend_from_slice(taken);
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads the stream out of frames. In a blob without a cipher nothing is verified before the blob's own digest is.
pub struct FrameReader<R> {
    input: R,
    header: Header,
    key: Option<AeadKey>,
    decompressor: zstd::bulk::Decompressor<'static>,
    frame: Vec<u8>,
    at: usize,
    number: u64,
    ended: bool,
}

impl<R: Read> FrameReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`FrameError`]
    pub fn new(mut input: R, key: Option<&MetadataKey>) -> Result<Self, FrameError> {
        let mut bytes = [0; size_of::<Header>()];
        input.read_exact(&mut bytes)?;
        let (header, cipher) = Header::parse(&bytes)?;
        let said = |cipher| if cipher == Cipher::None { "in the clear" } else { "sealed" };
        if cipher != cipher_of(key) {
            return Err(FrameError::Key { found: said(cipher), expected: said(cipher_of(key)) });
        }
        let key = key.map(|key| AeadKey::new(&key.derive(Part::Frames)));
        let decompressor = zstd::bulk::Decompressor::new()?;
        Ok(Self { input, header, key, decompressor, frame: Vec::new(), at: 0, number: 0, ended: false })
    }

    /// The blob's cipher.
    pub fn cipher(&self) -> Cipher {
        cipher_of_aead(self.key.as_ref())
    }

    /// Fills `out`.
    ///
    /// # Errors
    /// [`FrameError`]
    pub fn fill(&mut self, mut out: &mut [u8]) -> Result<(), FrameError> {
        while !out.is_empty() {
            let piece = self.next(out.len())?;
            if piece.is_empty() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let (to, rest) = out.split_at_mut(piece.len());
            to.copy_from_slice(piece);
            out = rest;
        }
        Ok(())
    }

    /// The next bytes of the stream, at most so many; none at its end.
    ///
    /// # Errors
    /// [`FrameError`]
    pub fn next(&mut self, most: usize) -> Result<&[u8], FrameError> {
        while self.at == self.frame.len() && !self.ended {
            self.read_frame()?;
        }
        let end = self.frame.len().min(self.at.saturating_add(most));
        let piece = self.frame.get(self.at..end).unwrap_or_default();
        self.at = end;
        Ok(piece)
    }

    fn read_frame(&mut self) -> Result<(), FrameError> {
        let mut head = [0; 5];
        self.input.read_exact(&mut head)?;
        let [a, b, c, d, method] = head;
        let word = u32::from_le_bytes([a, b, c, d]);
        let length = (word & !LAST) as usize;
        let overhead = self.cipher().overhead();
        if length < overhead || length > FRAME + overhead {
            let allowed = "at most 256 KiB and the tag";
            return Err(FormatError::field("frame", "length", length as u64, allowed).into());
        }
        let mut stored = vec![0; length];
        self.input.read_exact(&mut stored)?;
        let payload: &[u8] = match &self.key {
            None => &stored,
            Some(key) => key
                .open(counter(self.number), &associated(&self.header, word, method), &mut stored)
                .map_err(|_| FormatError::Sealed { part: "metadata frame", index: self.number })?,
        };
        let wrong = FormatError::Compressed { part: "metadata frame", index: self.number, expected: FRAME as u64 };
        self.frame.clear();
        self.at = 0;
        match Method::of(method) {
            Some(Method::Raw) => self.frame.extend_from_slice(payload),
            Some(Method::Zstd) => {
                self.frame.reserve(FRAME);
                if self.decompressor.decompress_to_buffer(payload, &mut self.frame).is_err() {
                    self.frame.clear();
                    return Err(wrong.into());
                }
            }
            _ => return Err(FormatError::field("frame", "method", method.into(), "0 or 1").into()),
        }
        self.ended = word & LAST != 0;
        if self.frame.len() > FRAME || (!self.ended && self.frame.len() != FRAME) {
            return Err(wrong.into());
        }
        self.number += 1;
        Ok(())
    }

    /// Ends: nothing may follow the last frame's bytes that were read, in the stream or in the blob.
    ///
    /// # Errors
    /// [`FrameError`]
    pub fn finish(mut self) -> Result<R, FrameError> {
        let left = self.next(usize::MAX)?.len() as u64;
        if left > 0 {
            return Err(FormatError::Length { part: "the metadata stream", found: left, expected: 0 }.into());
        }
        if self.input.read(&mut [0])? > 0 {
            return Err(FormatError::Length { part: "what follows the last frame", found: 1, expected: 0 }.into());
        }
        Ok(self.input)
    }
}

#[cfg(test)]
mod tests {
    use nacre_core::SecretArray;

    use super::*;

    fn key(byte: u8) -> MetadataKey {
        MetadataKey::new(SecretArray::fill(|slot| slot.fill(byte)))
    }

    fn write(content: &[u8], key: Option<&MetadataKey>) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new(), key, 3).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap()
    }

    fn read(blob: &[u8], key: Option<&MetadataKey>, length: usize) -> Result<Vec<u8>, FrameError> {
        let mut reader = FrameReader::new(blob, key)?;
        let mut out = vec![0; length];
        reader.fill(&mut out)?;
        reader.finish()?;
        Ok(out)
    }

    fn content(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at / 7).to_le_bytes()[0]).collect()
    }

    #[test]
    fn streams_of_all_lengths_come_back() {
        for key in [None, Some(key(1))] {
            for length in [0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME] {
                let content = content(length);
                let blob = write(&content, key.as_ref());
                assert_eq!(read(&blob, key.as_ref(), length).unwrap(), content);
                assert!(read(&blob, key.as_ref(), length + 1).is_err());
                if length > 0 {
                    assert!(read(&blob, key.as_ref(), length - 1).is_err());
                }
                assert!(read(&[&blob[..], b"x"].concat(), key.as_ref(), length).is_err());
            }
        }
    }

    #[test]
    fn no_byte_of_a_sealed_blob_can_be_changed() {
        let (content, key) = (content(FRAME + 1000), key(1));
        let blob = write(&content, Some(&key));
        for at in 0..blob.len() {
            if at > 100 && at % 13 != 0 && blob.len() - at > 50 {
                continue;
            }
            let mut bad = blob.clone();
            bad[at] ^= 1;
            assert!(read(&bad, Some(&key), content.len()).is_err(), "byte {at}");
            assert!(read(&blob[..at], Some(&key), content.len()).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn keys_and_media_types_must_fit() {
        let content = content(10);
        let (sealed, clear) = (write(&content, Some(&key(1))), write(&content, None));
        assert!(matches!(read(&sealed, None, 10), Err(FrameError::Key { .. })));
        assert!(matches!(read(&clear, Some(&key(1)), 10), Err(FrameError::Key { .. })));
        let error = read(&sealed, Some(&key(2)), 10).unwrap_err();
        assert!(error.to_string().contains("metadata frame 0 cannot be decrypted"), "{error}");
    }
}

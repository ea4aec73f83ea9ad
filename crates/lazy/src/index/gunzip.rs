//! Gzip that stops at the borders of blocks and members, and starts at them.
//!
//! The library gives no access to the bits of a border, and none is needed. To start in the middle of a byte, the decoder is fed a prelude:
//! blocks without any content, whose bits leave it where the span begins. So a decoder that is set up with a window goes on as the one that
//! came from the member's first byte.

use zlib_rs::{Inflate, InflateFlush, Status};

use super::format::WINDOW;

/// The most bytes of a member's header.
const HEADER_LIMIT: usize = 128 << 10;
/// CRC-32 and length, which nobody needs who has digests.
const TRAILER: usize = 8;
/// An empty block of fixed codes: 10 bits, the first in the lowest place.
const FIXED: (u128, u32) = (0b00_0000_0010, 10);

/// Why something is no gzip, or no part of one.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum GunzipError {
    /// What follows is no member.
    #[error("bytes that are no gzip member stand where one must begin")]
    Header,
    /// The deflated data are damaged.
    #[error("the deflated data are damaged")]
    Deflate,
}

/// Why a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// There is no more input, or no more room.
    Full,
    /// A block ends here; only where it was asked for. Another one follows.
    Block,
    /// A member ended with the last byte, its trailer included.
    Member,
}

enum At {
    Header(Vec<u8>),
    Deflate,
    Trailer(usize),
}

/// Decompresses gzip.
pub(crate) struct Gunzip {
    inflate: Inflate,
    at: At,
}

impl Gunzip {
    /// From a member's first byte on.
    pub(crate) fn new() -> Self {
        Self { inflate: Inflate::new(false, 15), at: At::Header(Vec::new()) }
    }

    /// From the middle of a member on: what it looks back at, and the highest `bits` bits of the byte before.
    ///
    /// # Errors
    /// [`GunzipError::Deflate`]: the library does not take it.
    pub(crate) fn resume(window: &[u8], bits: u8, byte: u8) -> Result<Self, GunzipError> {
        let mut inflate = Inflate::new(false, 15);
        let window = window.get(window.len().saturating_sub(WINDOW)..).unwrap_or_default();
        if !window.is_empty() {
            inflate.set_dictionary(window).map_err(|_| GunzipError::Deflate)?;
        }
        let prelude = prelude(bits, byte);
        let mut nothing = [0; 1];
        // The room is never used: the blocks are empty.
        match inflate.decompress(&prelude, &mut nothing, InflateFlush::NoFlush) {
            Ok(_) if inflate.total_in() == prelude.len() as u64 && inflate.total_out() == 0 => {}
            _ => return Err(GunzipError::Deflate),
        }
        Ok(Self { inflate, at: At::Deflate })
    }

    /// Decompresses from `input` into `output`; gives how much of either was used, and why not more.
    ///
    /// # Errors
    /// [`GunzipError`]
    pub(crate) fn run(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        at_blocks: bool,
    ) -> Result<(usize, usize, Stop), GunzipError> {
        let mut taken = 0;
        loop {
            let rest = input.get(taken..).unwrap_or_default();
            match &mut self.at {
                At::Header(header) => {
                    if rest.is_empty() {
                        return Ok((taken, 0, Stop::Full));
                    }
                    // Mostly it is all there, and needs no copy.
                    if header.is_empty()
                        && let Some(length) = header_length(rest.get(..HEADER_LIMIT).unwrap_or(rest))?
                    {
                        taken += length;
                        self.at = At::Deflate;
                        continue;
                    }
                    let before = header.len();
                    header.extend_from_slice(rest.get(..HEADER_LIMIT - before).unwrap_or(rest));
                    match header_length(header)? {
                        Some(length) => {
                            taken += length - before;
                            self.at = At::Deflate;
                        }
                        None if header.len() >= HEADER_LIMIT => return Err(GunzipError::Header),
                        None => taken += header.len() - before,
                    }
                }
                At::Trailer(left) => {
                    let now = (*left).min(rest.len());
                    *left -= now;
                    taken += now;
                    if *left > 0 {
                        return Ok((taken, 0, Stop::Full));
                    }
                    self.at = At::Header(Vec::new());
                    self.inflate.reset(false);
                    return Ok((taken, 0, Stop::Member));
                }
                At::Deflate => {
                    let (in_before, out_before) = (self.inflate.total_in(), self.inflate.total_out());
                    let flush = if at_blocks { InflateFlush::Block } else { InflateFlush::NoFlush };
                    let status = self.inflate.decompress(rest, output, flush).map_err(|_| GunzipError::Deflate)?;
                    let moved = |after: u64, before: u64| usize::try_from(after - before).unwrap_or(usize::MAX);
                    taken += moved(self.inflate.total_in(), in_before);
                    let given = moved(self.inflate.total_out(), out_before);
                    if status == Status::StreamEnd {
                        self.at = At::Trailer(TRAILER);
                        if given == 0 {
                            continue;
                        }
                        return Ok((taken, given, Stop::Full));
                    }
                    let stopped = at_blocks && status == Status::Ok && taken < input.len() && given < output.len();
                    if stopped && self.is_last(output.get_mut(given..).unwrap_or_default())? {
                        self.at = At::Trailer(TRAILER);
                        return Ok((taken, given, Stop::Full));
                    }
                    return Ok((taken, given, if stopped { Stop::Block } else { Stop::Full }));
                }
            }
        }
    }

    /// Whether the block that ended was the last of its member, behind which nothing can start. Without input the decoder takes note of that
    /// at most, or of bits that it has; no block is so small that anything comes out.
    fn is_last(&mut self, room: &mut [u8]) -> Result<bool, GunzipError> {
        let status = self.inflate.decompress(&[], room, InflateFlush::NoFlush).map_err(|_| GunzipError::Deflate)?;
        Ok(status == Status::StreamEnd)
    }

    /// Whether the stream may end here.
    #[cfg(feature = "build")]
    pub(crate) fn is_between(&self) -> bool {
        matches!(&self.at, At::Header(header) if header.is_empty())
    }
}

/// The length of a member's header (RFC 1952); `None` while it is not all there.
fn header_length(bytes: &[u8]) -> Result<Option<usize>, GunzipError> {
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    const CHECK: u8 = 2;
    let magic: [u8; 3] = [0x1f, 0x8b, 8];
    if bytes.iter().zip(magic).any(|(found, expected)| *found != expected) {
        return Err(GunzipError::Header);
    }
    let Some(fixed) = bytes.first_chunk::<10>() else { return Ok(None) };
    let flags = fixed[3];
    if flags & 0xE0 != 0 {
        return Err(GunzipError::Header);
    }
    let mut length = fixed.len();
    if flags & EXTRA != 0 {
        let Some([low, high]) = bytes.get(length..).and_then(|rest| rest.first_chunk::<2>()) else { return Ok(None) };
        length += 2 + usize::from(u16::from_le_bytes([*low, *high]));
    }
    for text in [NAME, COMMENT] {
        if flags & text != 0 {
            let rest = bytes.get(length..).unwrap_or_default();
            let Some(end) = rest.iter().position(|byte| *byte == 0) else { return Ok(None) };
            length += end + 1;
        }
    }
    if flags & CHECK != 0 {
        length += 2;
    }
    Ok((length <= bytes.len()).then_some(length))
}

/// Blocks without content, that end with the highest `bits` bits of `byte`, which are the beginning of what follows.
fn prelude(bits: u8, byte: u8) -> Vec<u8> {
    if bits == 0 {
        return Vec::new();
    }
    let bits = u32::from(bits.min(7));
    let phase = 8 - bits;
    let (mut word, mut length) = (0, 0);
    if !phase.is_multiple_of(2) {
        (word, length) = odd();
    }
    while length % 8 != phase {
        word |= FIXED.0 << length;
        length += FIXED.1;
    }
    word |= u128::from(byte >> phase) << length;
    length += bits;
    word.to_le_bytes().get(..length as usize / 8).unwrap_or_default().to_vec()
}

/// An empty block of dynamic codes with an odd number of bits. The lengths' own code has 1 as 0, 0 as 10 and 18 ("many zeroes") as 11; with it
/// all lengths are 0 but that of the end of the block, which is 1.
fn odd() -> (u128, u32) {
    let (mut word, mut length) = (0u128, 0u32);
    let mut put = |value: u128, bits: u32| {
        word |= value << length;
        length += bits;
    };
    // Codes come with their first bit in the lowest place.
    let (zeroes, zero, one) = ((0b11, 2), (0b01, 2), (0b0, 1));
    put(0b100, 3);
    put(0, 5);
    put(0, 5);
    put(14, 4);
    // The order is 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1; codes of one length go up with their symbol, so 0 comes before 18.
    for symbol in [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1] {
        put(
            match symbol {
                0 | 18 => 2,
                1 => 1,
                _ => 0,
            },
            3,
        );
    }
    for run in [138, 118] {
        put(zeroes.0, zeroes.1);
        put(run - 11, 7);
    }
    put(one.0, one.1);
    put(zero.0, zero.1);
    // The end of the block.
    put(0, 1);
    (word, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut out = Vec::new();
        while out.len() < length {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            out.extend_from_slice(format!("{} words {:x}; ", state >> 60, state >> 40).as_bytes());
        }
        out.truncate(length);
        out
    }

    /// Decompresses all; gives the borders of blocks: bytes in, bytes out.
    fn borders(gzip: &[u8], length: usize) -> Vec<(usize, usize)> {
        let (mut gunzip, mut out) = (Gunzip::new(), vec![0; length + 1]);
        let (mut taken, mut given, mut borders) = (0, 0, Vec::new());
        loop {
            let (more_in, more_out, stop) = gunzip.run(&gzip[taken..], &mut out[given..], true).unwrap();
            (taken, given) = (taken + more_in, given + more_out);
            match stop {
                Stop::Block => borders.push((taken, given)),
                Stop::Member => break,
                Stop::Full => {}
            }
        }
        assert_eq!((taken, given), (gzip.len(), length));
        borders
    }

    #[test]
    fn decoding_goes_on_at_every_border_of_a_block() {
        use std::io::Write as _;
        let text = text(900_000);
        let mut phases = [false; 8];
        for level in [0, 3, 6, 9] {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
            writer.write_all(&text).unwrap();
            let gzip = writer.finish().unwrap();
            let borders = borders(&gzip, text.len());
            assert!(borders.len() > 3, "level {level}: {borders:?}");
            for (taken, given) in borders {
                let (expected, window) = (&text[given..], &text[given.saturating_sub(WINDOW)..given]);
                let goes_on = |bits: u8| {
                    let byte = u8::try_from(u16::from(gzip[taken - 1]) >> (8 - bits) << (8 - bits) & 0xFF).unwrap();
                    let Ok(mut gunzip) = Gunzip::resume(window, bits, byte) else { return false };
                    let mut out = vec![0; expected.len() + 1];
                    let run = gunzip.run(&gzip[taken..], &mut out, false);
                    run.is_ok_and(|(_, given, _)| given == expected.len() && out[..given] == *expected)
                };
                let found: Vec<u8> = (0..8).filter(|bits| goes_on(*bits)).collect();
                assert!(!found.is_empty(), "level {level}, byte {taken}");
                found.iter().for_each(|bits| phases[usize::from(*bits)] = true);
            }
        }
        assert_eq!(phases, [true; 8], "every number of bits was there");
    }

    #[test]
    fn headers_with_everything_are_skipped_and_others_refused() {
        let plain = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
        assert_eq!(header_length(&plain), Ok(Some(10)));
        let mut full = vec![0x1f, 0x8b, 8, 4 | 8 | 16 | 2, 0, 0, 0, 0, 0, 3, 3, 0];
        full.extend_from_slice(b"xyzname\0comment\0cc");
        for at in 0..full.len() {
            assert_eq!(header_length(&full[..at]), Ok(None), "{at}");
        }
        full.push(7);
        assert_eq!(header_length(&full), Ok(Some(full.len() - 1)));
        for (at, value) in [(0, 0x1e), (1, 0x8c), (2, 7), (3, 0x20)] {
            let mut bad = plain;
            bad[at] = value;
            assert_eq!(header_length(&bad), Err(GunzipError::Header));
        }
    }
}

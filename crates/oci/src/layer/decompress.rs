//! Decompression of layers: gzip of one member or several, zstd of one frame or several, or nothing.
//!
//! Members and frames follow each other without anything between or behind them; other trailing bytes are refused, as Go's readers do,
//! so that no two programs take one blob for two things.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use crate::{
    manifest::Compression,
    unpack::{LimitExceeded, Limits},
};

/// Why bytes cannot be decompressed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecompressError {
    /// They are not what they should be.
    #[error("{0}")]
    Corrupt(String),
    /// They expand to more than they may.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
}

enum Format {
    Plain,
    /// `None` between members.
    Gzip(Option<Box<Decompress>>),
    Zstd {
        decoder: Decoder<'static>,
        in_frame: bool,
        window_limit: u64,
    },
}

/// Decompresses a stream that comes in pieces, within limits.
pub struct Decompressor {
    format: Format,
    taken: u64,
    given: u64,
    expansion: u64,
    expansion_free: u64,
}

impl Decompressor {
    /// Starts with the stream's first byte.
    ///
    /// # Errors
    /// [`DecompressError::Corrupt`]: the library could not be set up.
    pub fn new(compression: Compression, limits: &Limits) -> Result<Self, DecompressError> {
        let format = match compression {
            Compression::None => Format::Plain,
            Compression::Gzip => Format::Gzip(None),
            Compression::Zstd => {
                let setup = |error: std::io::Error| DecompressError::Corrupt(format!("decoder: {error}"));
                let mut decoder = Decoder::new().map_err(setup)?;
                // Windows of less than 1 KiB do not exist.
                let log = limits.zstd_window_bytes.max(1024).ilog2().min(31);
                decoder.set_parameter(DParameter::WindowLogMax(log)).map_err(setup)?;
                Format::Zstd { decoder, in_frame: false, window_limit: 1 << log }
            }
        };
        let (expansion, expansion_free) = (limits.expansion, limits.expansion_free_bytes);
        Ok(Self { format, taken: 0, given: 0, expansion, expansion_free })
    }

    /// Decompresses from `input` into `output`; gives how much of either was used. Less than all of `output` means that more input is needed.
    ///
    /// # Errors
    /// [`DecompressError`]
    pub fn run(&mut self, input: &[u8], output: &mut [u8]) -> Result<(usize, usize), DecompressError> {
        let (mut taken, mut given) = (0, 0);
        loop {
            let rest = input.get(taken..).unwrap_or_default();
            let room = output.get_mut(given..).unwrap_or_default();
            if room.is_empty() || (rest.is_empty() && self.is_between()) {
                break;
            }
            let (more_taken, more_given) = self.step(rest, room)?;
            taken += more_taken;
            given += more_given;
            self.taken += more_taken as u64;
            self.given += more_given as u64;
            let allowed = self.taken.saturating_mul(self.expansion).saturating_add(self.expansion_free);
            if self.given > allowed {
                // The limit is a ratio; the message shows the bytes, which are what people know.
                return Err(LimitExceeded { name: "expansion", found: self.given, allowed }.into());
            }
            if more_taken == 0 && more_given == 0 {
                break;
            }
        }
        Ok((taken, given))
    }

    fn is_between(&self) -> bool {
        match &self.format {
            Format::Plain | Format::Gzip(None) => true,
            Format::Gzip(Some(_)) => false,
            Format::Zstd { in_frame, .. } => !in_frame,
        }
    }

    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<(usize, usize), DecompressError> {
        match &mut self.format {
            Format::Plain => {
                let length = input.len().min(output.len());
                if let (Some(to), Some(from)) = (output.get_mut(..length), input.get(..length)) {
                    to.copy_from_slice(from);
                }
                Ok((length, length))
            }
            Format::Gzip(member) => {
                let inflate = member.get_or_insert_with(|| Box::new(Decompress::new_gzip(15)));
                let before = (inflate.total_in(), inflate.total_out());
                let status = inflate.decompress(input, output, FlushDecompress::None).map_err(|error| {
                    DecompressError::Corrupt(error.message().map_or_else(|| error.to_string(), str::to_owned))
                })?;
                let used = (difference(inflate.total_in(), before.0), difference(inflate.total_out(), before.1));
                if status == Status::StreamEnd {
                    *member = None;
                }
                Ok(used)
            }
            Format::Zstd { decoder, in_frame, window_limit } => {
                let status = decoder.run_on_buffers(input, output).map_err(|error| {
                    let message = error.to_string();
                    if message.contains("too much memory") {
                        let allowed = *window_limit;
                        LimitExceeded { name: "zstd_window_bytes", found: allowed + 1, allowed }.into()
                    } else {
                        DecompressError::Corrupt(message)
                    }
                })?;
                if status.bytes_read > 0 || status.bytes_written > 0 {
                    *in_frame = status.remaining != 0;
                }
                Ok((status.bytes_read, status.bytes_written))
            }
        }
    }

    /// Says that there is no more input.
    ///
    /// # Errors
    /// [`DecompressError::Corrupt`]: the stream is not whole.
    pub fn finish(&self) -> Result<(), DecompressError> {
        if self.taken == 0 && !matches!(self.format, Format::Plain) {
            return Err(DecompressError::Corrupt("the blob is empty".into()));
        }
        if self.is_between() { Ok(()) } else { Err(DecompressError::Corrupt("it ends in the middle".into())) }
    }
}

fn difference(after: u64, before: u64) -> usize {
    usize::try_from(after.saturating_sub(before)).unwrap_or(usize::MAX)
}

/// For fuzzing: decompresses `bytes`, given in pieces of `step` bytes; gives the length of what comes out.
#[doc(hidden)]
pub fn decompress_all(
    compression: Compression,
    bytes: &[u8],
    step: usize,
    limits: &Limits,
) -> Result<u64, DecompressError> {
    let mut decompressor = Decompressor::new(compression, limits)?;
    let mut output = vec![0; 64 << 10];
    for mut piece in bytes.chunks(step.max(1)) {
        loop {
            let (taken, given) = decompressor.run(piece, &mut output)?;
            piece = piece.get(taken..).unwrap_or_default();
            if given < output.len() && piece.is_empty() {
                break;
            }
        }
    }
    decompressor.finish()?;
    Ok(decompressor.given)
}

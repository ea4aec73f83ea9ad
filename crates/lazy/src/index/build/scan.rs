//! A layer as it is stored, decompressed once, and cut where decoding may start again.

use std::{io::Read, sync::mpsc::SyncSender};

use nacre_oci::{crypt::LayerDecryptor, manifest::Compression};
use ring::digest::{Context, SHA256};
use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::{IndexBuildError, files::Piece as TarPiece};
use crate::{
    format::DIGEST,
    index::{
        decode::DecodeError,
        format::{Kind, SPAN_LIMIT, STORED_LIMIT, WINDOW, ZSTD_WINDOW_LOG},
        gunzip::{Gunzip, Stop},
    },
};

/// Stored bytes that are read at once, and bytes of tar that are handed on.
const PIECE: usize = 256 << 10;
/// Bytes of a span of a plain tar, which may begin anywhere.
const RAW: u64 = 256 << 10;
/// What is kept of the end of a long span, at most.
const TAIL: usize = 1 << 20;

/// Stored bytes of a span: at most [`STORED_LIMIT`].
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) place: u64,
    pub(super) stored: u32,
    pub(super) digest: [u8; DIGEST],
}

/// A span that was cut.
pub(super) struct Job {
    pub(super) layer: u16,
    pub(super) kind: Kind,
    pub(super) address: u64,
    pub(super) length: u64,
    pub(super) pieces: Vec<Piece>,
    /// The first piece, decrypted.
    pub(super) first: Vec<u8>,
    /// What it decodes to, at most [`SPAN_LIMIT`] bytes of it.
    pub(super) expected: Vec<u8>,
    /// What it looks back at.
    pub(super) window: Vec<u8>,
    /// The byte before, some of whose bits may be the span's.
    pub(super) before: u8,
}

enum Format {
    Raw,
    Gzip(Box<Gunzip>),
    Zstd { decoder: Decoder<'static>, in_frame: bool },
}

/// Where a step ended.
enum Border {
    None,
    /// Decoding may start here with a window.
    Within,
    /// Decoding may start here with nothing.
    Clean,
}

/// The span that has begun.
struct Open {
    kind: Kind,
    address: u64,
    window: Vec<u8>,
    before: u8,
    pieces: Vec<Piece>,
    first: Vec<u8>,
    expected: Vec<u8>,
    /// What came after [`Self::expected`]; its end.
    tail: Vec<u8>,
    /// The piece that has begun.
    place: u64,
    stored: u32,
    hash: Context,
}

impl Open {
    fn new(kind: Kind, address: u64, place: u64, window: Vec<u8>, before: u8) -> Self {
        Self {
            kind,
            address,
            window,
            before,
            pieces: Vec::new(),
            first: Vec::new(),
            expected: Vec::new(),
            tail: Vec::new(),
            place,
            stored: 0,
            hash: Context::new(&SHA256),
        }
    }

    fn end_piece(&mut self) {
        if self.stored == 0 {
            return;
        }
        let mut digest = [0; DIGEST];
        let hash = std::mem::replace(&mut self.hash, Context::new(&SHA256));
        digest.copy_from_slice(hash.finish().as_ref());
        self.pieces.push(Piece { place: self.place, stored: self.stored, digest });
        self.place += u64::from(self.stored);
        self.stored = 0;
    }

    /// The last bytes of its tar, at most so many.
    fn last(&self, most: u64) -> Vec<u8> {
        let most = usize::try_from(most).unwrap_or(WINDOW).min(WINDOW);
        let from_tail = self.tail.get(self.tail.len().saturating_sub(most)..).unwrap_or_default();
        let left = most - from_tail.len();
        let from_expected = self.expected.get(self.expected.len().saturating_sub(left)..).unwrap_or_default();
        let from_window = left - from_expected.len();
        let from_window = self.window.get(self.window.len().saturating_sub(from_window)..).unwrap_or_default();
        [from_window, from_expected, from_tail].concat()
    }
}

/// A pass over a layer.
pub(super) struct Scan {
    format: Format,
    layer: u16,
    target: u64,
    /// The next stored byte.
    place: u64,
    /// The one before it, decrypted.
    before: u8,
    base: u64,
    /// The next byte of tar.
    address: u64,
    /// Where the member began.
    member: u64,
    open: Open,
    tar: Vec<u8>,
}

impl Scan {
    pub(super) fn new(compression: Compression, layer: u16, base: u64, span: u64) -> Result<Self, DecodeError> {
        let zstd = |error: std::io::Error| DecodeError::Zstd(error.to_string());
        let (format, kind, target) = match compression {
            Compression::None => (Format::Raw, Kind::Raw, RAW),
            Compression::Gzip => (Format::Gzip(Box::new(Gunzip::new())), Kind::Gzip, span),
            Compression::Zstd => {
                let mut decoder = Decoder::new().map_err(zstd)?;
                decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG)).map_err(zstd)?;
                (Format::Zstd { decoder, in_frame: false }, Kind::Zstd, span)
            }
        };
        let open = Open::new(kind, base, 0, Vec::new(), 0);
        let tar = Vec::with_capacity(PIECE);
        Ok(Self { format, layer, target, place: 0, before: 0, base, address: base, member: base, open, tar })
    }

    /// Reads all; gives the bytes of the tar.
    pub(super) fn run(
        mut self,
        stored: &mut dyn Read,
        mut decryptor: Option<LayerDecryptor>,
        files: &SyncSender<TarPiece>,
        spans: &SyncSender<Job>,
    ) -> Result<u64, IndexBuildError> {
        let (mut buffer, mut plain, mut out) = (vec![0; PIECE], Vec::new(), vec![0; PIECE]);
        loop {
            let length = match stored.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(IndexBuildError::Read(error)),
            };
            let sealed = buffer.get(..length).unwrap_or_default();
            let clear = match &mut decryptor {
                None => sealed,
                Some(decryptor) => {
                    plain.clear();
                    plain.extend_from_slice(sealed);
                    decryptor.update(&mut plain)?;
                    &plain
                }
            };
            let mut at = 0;
            loop {
                let (taken, given, border) = self
                    .step(clear.get(at..).unwrap_or_default(), &mut out)
                    .map_err(|source| IndexBuildError::Compressed { place: self.place, source })?;
                let used = at..at + taken;
                let (sealed, clear) = (sealed.get(used.clone()), clear.get(used));
                self.take(sealed.unwrap_or_default(), clear.unwrap_or_default());
                at += taken;
                self.give(out.get(..given).unwrap_or_default(), files)?;
                // A border may come without another byte: the decoder had its bits before.
                self.before = clear.and_then(<[u8]>::last).copied().unwrap_or(self.before);
                self.cut(border, spans)?;
                if taken == 0 && given == 0 {
                    break;
                }
            }
        }
        let whole = match &self.format {
            Format::Raw => true,
            Format::Gzip(gunzip) => gunzip.is_between(),
            Format::Zstd { in_frame, .. } => !in_frame,
        };
        if !whole || (self.place == 0 && !matches!(self.format, Format::Raw)) {
            return Err(IndexBuildError::Truncated);
        }
        if let Some(decryptor) = decryptor {
            decryptor.finish()?;
        }
        self.close(None, spans)?;
        let rest = std::mem::take(&mut self.tar);
        files.send(TarPiece::Bytes(rest)).map_err(|_| IndexBuildError::Stopped)?;
        Ok(self.address - self.base)
    }

    fn step(&mut self, input: &[u8], out: &mut [u8]) -> Result<(usize, usize, Border), DecodeError> {
        match &mut self.format {
            Format::Raw => {
                let left = usize::try_from(RAW - (self.address - self.open.address)).unwrap_or(0);
                let length = input.len().min(out.len()).min(left);
                if let (Some(to), Some(from)) = (out.get_mut(..length), input.get(..length)) {
                    to.copy_from_slice(from);
                }
                Ok((length, length, Border::Clean))
            }
            Format::Gzip(gunzip) => {
                let (taken, given, stop) = gunzip.run(input, out, true)?;
                let border = match stop {
                    Stop::Full => Border::None,
                    Stop::Block => Border::Within,
                    Stop::Member => Border::Clean,
                };
                Ok((taken, given, border))
            }
            Format::Zstd { decoder, in_frame } => {
                if input.is_empty() && !*in_frame {
                    return Ok((0, 0, Border::None));
                }
                let status = decoder.run_on_buffers(input, out).map_err(|error| {
                    let text = error.to_string();
                    let large = text.contains("too much memory");
                    DecodeError::Zstd(if large { "its window is larger than 32 MiB".into() } else { text })
                })?;
                let moved = status.bytes_read > 0 || status.bytes_written > 0;
                if moved {
                    *in_frame = status.remaining != 0;
                }
                let border = if moved && !*in_frame { Border::Clean } else { Border::None };
                Ok((status.bytes_read, status.bytes_written, border))
            }
        }
    }

    /// Notes stored bytes, as they are and decrypted.
    fn take(&mut self, mut sealed: &[u8], clear: &[u8]) {
        let open = &mut self.open;
        self.place += sealed.len() as u64;
        if open.pieces.is_empty() {
            let room = (STORED_LIMIT - open.stored) as usize;
            open.first.extend_from_slice(clear.get(..room).unwrap_or(clear));
        }
        while !sealed.is_empty() {
            let room = (STORED_LIMIT - open.stored) as usize;
            let now = sealed.get(..room).unwrap_or(sealed);
            open.hash.update(now);
            open.stored += u32::try_from(now.len()).unwrap_or(u32::MAX);
            sealed = sealed.get(now.len()..).unwrap_or_default();
            if open.stored == STORED_LIMIT {
                open.end_piece();
            }
        }
    }

    /// Notes tar, and hands it on.
    fn give(&mut self, bytes: &[u8], files: &SyncSender<TarPiece>) -> Result<(), IndexBuildError> {
        let open = &mut self.open;
        self.address += bytes.len() as u64;
        let room = usize::try_from(SPAN_LIMIT).unwrap_or(0) - open.expected.len();
        let (now, later) = bytes.split_at(room.min(bytes.len()));
        open.expected.extend_from_slice(now);
        open.tail.extend_from_slice(later);
        if open.tail.len() > TAIL {
            open.tail.drain(..open.tail.len() - WINDOW);
        }
        self.tar.extend_from_slice(bytes);
        if self.tar.len() >= PIECE {
            let full = std::mem::replace(&mut self.tar, Vec::with_capacity(2 * PIECE));
            files.send(TarPiece::Bytes(full)).map_err(|_| IndexBuildError::Stopped)?;
        }
        Ok(())
    }

    /// Ends the span at a border, where it is long enough. A clean one is better than the next that needs a window.
    fn cut(&mut self, border: Border, spans: &SyncSender<Job>) -> Result<(), IndexBuildError> {
        let length = self.address - self.open.address;
        let next = match border {
            Border::None => return Ok(()),
            Border::Clean => {
                self.member = self.address;
                let enough = if matches!(self.format, Format::Raw) { self.target } else { self.target / 2 };
                (length >= enough).then(|| Open::new(self.open.kind.clean(), self.address, self.place, Vec::new(), 0))
            }
            Border::Within => (length >= self.target).then(|| {
                let window = self.open.last(self.address - self.member);
                Open::new(Kind::Inflate, self.address, self.place, window, self.before)
            }),
        };
        if next.is_some() { self.close(next, spans) } else { Ok(()) }
    }

    fn close(&mut self, next: Option<Open>, spans: &SyncSender<Job>) -> Result<(), IndexBuildError> {
        self.open.end_piece();
        let next = next.unwrap_or_else(|| Open::new(Kind::More, self.address, self.place, Vec::new(), 0));
        let open = std::mem::replace(&mut self.open, next);
        let length = self.address - open.address;
        if length == 0 {
            // Members and frames without content at the end: nobody needs them.
            return Ok(());
        }
        let Open { kind, address, window, before, pieces, first, expected, .. } = open;
        let job = Job { layer: self.layer, kind, address, length, pieces, first, expected, window, before };
        spans.send(job).map_err(|_| IndexBuildError::Stopped)
    }
}

impl Kind {
    /// What begins where nothing is looked back at.
    fn clean(self) -> Self {
        if self == Self::Inflate { Self::Gzip } else { self }
    }
}

//! The data device as it is laid out: file contents in, chunks of plaintext out.
//!
//! A file begins on a block and is padded with zeroes to one. Files of at most [`PACKED`] bytes are gathered in packs, each one chunk;
//! a pack ends after a file, by its size and by the content of that file, so that a changed file moves the cuts of its neighbours only.
//! Larger files are cut by their content, from their first byte, so equal files have equal chunks wherever they are. Equal small
//! files are stored, and addressed, once.
//!
//! Addresses are given out in the order of chunks, which is the order of the table.

use std::collections::HashMap;

use fastcdc::v2020::{Normalization, cut_gear, get_gear_with_seed, select_masks};

use crate::{
    chunk::sha256,
    format::{BLOCK, CHUNK_LIMIT, DIGEST},
};

/// The largest file that is packed with others.
pub(crate) const PACKED: u64 = 64 << 10;
/// A hole of a sparse file is not made into chunks from this length on.
const HOLE: u64 = 64 << 10;
/// What one piece of zeroes that is no hole is filled with.
const ZEROES: [u8; 4096] = [0; 4096];

/// A file of the device; its place is known when all is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId(pub(crate) u32);

/// What the device is made of, in the order of addresses.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Plaintext of one chunk.
    Chunk { offset: u64, bytes: Vec<u8> },
    /// Zeroes that are not stored.
    Zeroes { offset: u64, length: u64 },
}

/// Takes pieces.
pub(crate) trait Sink {
    /// Why it takes no more.
    type Error;

    /// Takes one.
    fn piece(&mut self, piece: Piece) -> Result<(), Self::Error>;
}

/// Where content is cut.
pub(crate) struct Cutter {
    average: usize,
    seed: (Vec<u64>, Vec<u64>),
    masks: (u64, u64),
}

impl Cutter {
    /// Cuts of this average size (a power of two from 16 KiB to 128 KiB) and this seed.
    pub(crate) fn new(average: u32, seed: u64) -> Self {
        let average = average as usize;
        let (gear, shifted) = get_gear_with_seed(seed);
        let masks = select_masks(average, Normalization::Level1);
        Self { average, seed: (gear.into_owned(), shifted.into_owned()), masks }
    }

    fn longest(&self) -> usize {
        self.average * 4
    }

    /// The length of the first chunk of what has begun; all of it where it is shorter than the longest.
    fn cut(&self, bytes: &[u8]) -> usize {
        let (small, large) = self.masks;
        let (gear, shifted) = (&self.seed.0, &self.seed.1);
        let (least, most) = (self.average / 4, self.longest());
        cut_gear(bytes, least, self.average, most, small, large, small << 1, large << 1, gear, shifted).1
    }

    /// Whether a pack ends after a file.
    fn ends_pack(&self, pack: usize, hash: &[u8; DIGEST]) -> bool {
        // Some eight files more after half of the average.
        pack >= self.average / 2 && hash.first().is_some_and(|byte| byte.is_multiple_of(8))
    }
}

/// A layout in the making.
pub(crate) struct Device {
    cutter: Cutter,
    /// The address of the next piece.
    next: u64,
    /// First bytes of files, by id.
    starts: Vec<u64>,
    known: HashMap<[u8; DIGEST], FileId>,
    pack: Vec<u8>,
    /// Files of the pack, and where in it they begin.
    packed: Vec<(FileId, u64)>,
}

/// The file that is being read.
pub(crate) struct OpenFile {
    size: u64,
    position: u64,
    buffer: Vec<u8>,
    /// `None` for a small one, which waits for a pack.
    id: Option<FileId>,
}

impl Device {
    pub(crate) fn new(cutter: Cutter) -> Self {
        Self { cutter, next: 0, starts: Vec::new(), known: HashMap::new(), pack: Vec::new(), packed: Vec::new() }
    }

    /// Bytes of the device so far: all of it after [`flush`](Self::flush).
    pub(crate) fn bytes(&self) -> u64 {
        self.next
    }

    /// The first block of a file, after [`flush`](Self::flush).
    pub(crate) fn start(&self, file: FileId) -> u64 {
        self.starts.get(file.0 as usize).map_or(0, |byte| byte / BLOCK)
    }

    fn new_id(&mut self, start: u64) -> FileId {
        let id = FileId(u32::try_from(self.starts.len()).unwrap_or(u32::MAX));
        self.starts.push(start);
        id
    }

    /// Begins a file that is not empty.
    pub(crate) fn begin(&mut self, size: u64) -> OpenFile {
        OpenFile { size, position: 0, buffer: Vec::new(), id: None }
    }

    /// Content of a file at a place that no earlier call went past; what is left out is zeroes.
    pub(crate) fn data<S: Sink>(
        &mut self,
        file: &mut OpenFile,
        offset: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<(), S::Error> {
        self.zeroes(file, offset, 0, sink)?;
        self.append(file, bytes, sink)
    }

    /// Ends a file; where its last bytes are left out they are zeroes.
    pub(crate) fn end<S: Sink>(&mut self, mut file: OpenFile, sink: &mut S) -> Result<FileId, S::Error> {
        let size = file.size;
        let padding = usize::try_from(size.next_multiple_of(BLOCK) - size).unwrap_or(0);
        self.zeroes(&mut file, size, padding, sink)?;
        if size <= PACKED {
            return self.small(file, padding, sink);
        }
        self.cut(&mut file, true, padding, sink)?;
        Ok(file.id.unwrap_or(FileId(u32::MAX)))
    }

    /// Ends the last pack.
    pub(crate) fn flush<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        if self.pack.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.pack);
        let start = self.next;
        for (file, offset) in self.packed.drain(..) {
            if let Some(slot) = self.starts.get_mut(file.0 as usize) {
                *slot = start + offset;
            }
        }
        self.emit(bytes, sink)
    }

    fn append<S: Sink>(&mut self, file: &mut OpenFile, mut bytes: &[u8], sink: &mut S) -> Result<(), S::Error> {
        file.position += bytes.len() as u64;
        if file.size <= PACKED {
            file.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        let longest = self.cutter.longest();
        while !bytes.is_empty() {
            let room = (2 * longest).saturating_sub(file.buffer.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            file.buffer.extend_from_slice(now);
            bytes = later;
            if file.buffer.len() >= 2 * longest {
                self.cut(file, false, 0, sink)?;
            }
        }
        Ok(())
    }

    /// Fills a file with zeroes up to a place; a hole that goes up to the file's end takes its padding as well.
    fn zeroes<S: Sink>(&mut self, file: &mut OpenFile, to: u64, padding: usize, sink: &mut S) -> Result<(), S::Error> {
        let gap = to.saturating_sub(file.position);
        if gap >= HOLE && file.size > PACKED {
            self.cut(file, true, 0, sink)?;
            self.place(file);
            let (offset, length) = (self.next, gap + padding as u64);
            self.next += length;
            file.position = to;
            return sink.piece(Piece::Zeroes { offset, length });
        }
        while file.position < to {
            let length = usize::try_from(to - file.position).unwrap_or(usize::MAX).min(ZEROES.len());
            self.append(file, ZEROES.get(..length).unwrap_or(&ZEROES), sink)?;
        }
        Ok(())
    }

    /// Gives a large file its address when its first piece goes out.
    fn place(&mut self, file: &mut OpenFile) {
        if file.id.is_none() {
            file.id = Some(self.new_id(self.next));
        }
    }

    /// Sends out chunks of a large file: those that are certain, or all that is there.
    fn cut<S: Sink>(&mut self, file: &mut OpenFile, all: bool, padding: usize, sink: &mut S) -> Result<(), S::Error> {
        let mut buffer = std::mem::take(&mut file.buffer);
        let mut at = 0;
        loop {
            let rest = buffer.get(at..).unwrap_or_default();
            // Something always stays for the end, which pads it.
            if rest.is_empty() || (!all && rest.len() <= self.cutter.longest()) {
                break;
            }
            let length = self.cutter.cut(rest).max(1);
            let mut chunk = rest.get(..length).unwrap_or(rest).to_vec();
            at += chunk.len();
            if at == buffer.len() && all {
                chunk.resize(chunk.len() + padding, 0);
            }
            self.place(file);
            self.emit(chunk, sink)?;
        }
        buffer.drain(..at);
        file.buffer = buffer;
        Ok(())
    }

    fn small<S: Sink>(&mut self, mut file: OpenFile, padding: usize, sink: &mut S) -> Result<FileId, S::Error> {
        let hash = sha256(&file.buffer);
        if let Some(known) = self.known.get(&hash) {
            return Ok(*known);
        }
        let id = self.new_id(0);
        self.known.insert(hash, id);
        file.buffer.resize(file.buffer.len() + padding, 0);
        if self.pack.len() + file.buffer.len() > self.cutter.average * 2 {
            self.flush(sink)?;
        }
        self.packed.push((id, self.pack.len() as u64));
        self.pack.append(&mut file.buffer);
        if self.cutter.ends_pack(self.pack.len(), &hash) {
            self.flush(sink)?;
        }
        Ok(id)
    }

    fn emit<S: Sink>(&mut self, bytes: Vec<u8>, sink: &mut S) -> Result<(), S::Error> {
        debug_assert!(bytes.len() <= CHUNK_LIMIT as usize, "chunks stay below the format's limit");
        let offset = self.next;
        let length = bytes.len() as u64;
        self.next += length;
        let zeroes = bytes.iter().all(|byte| *byte == 0);
        sink.piece(if zeroes { Piece::Zeroes { offset, length } } else { Piece::Chunk { offset, bytes } })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[derive(Default)]
    struct Memory(Vec<Piece>);

    impl Sink for Memory {
        type Error = Infallible;

        fn piece(&mut self, piece: Piece) -> Result<(), Infallible> {
            self.0.push(piece);
            Ok(())
        }
    }

    impl Memory {
        /// The device's bytes; checks that addresses have no gaps.
        fn bytes(&self) -> Vec<u8> {
            let mut all = Vec::new();
            for piece in &self.0 {
                match piece {
                    Piece::Chunk { offset, bytes } => {
                        assert_eq!(*offset, all.len() as u64);
                        all.extend_from_slice(bytes);
                    }
                    Piece::Zeroes { offset, length } => {
                        assert_eq!(*offset, all.len() as u64);
                        all.resize(all.len() + usize::try_from(*length).unwrap(), 0);
                    }
                }
            }
            all
        }

        fn chunks(&self) -> Vec<&[u8]> {
            self.0
                .iter()
                .filter_map(|piece| match piece {
                    Piece::Chunk { bytes, .. } => Some(bytes.as_slice()),
                    Piece::Zeroes { .. } => None,
                })
                .collect()
        }
    }

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2) | 1;
        (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state.to_le_bytes()[7]
            })
            .collect()
    }

    fn device() -> Device {
        Device::new(Cutter::new(64 << 10, 5))
    }

    fn add(device: &mut Device, sink: &mut Memory, content: &[u8]) -> FileId {
        let mut file = device.begin(content.len() as u64);
        for (at, piece) in content.chunks(10_000).enumerate() {
            device.data(&mut file, at as u64 * 10_000, piece, sink).unwrap();
        }
        device.end(file, sink).unwrap()
    }

    #[test]
    fn every_file_is_where_the_device_says() {
        let (mut device, mut sink) = (device(), Memory::default());
        let sizes = [1, 4096, 4097, 65_536, 65_537, 700_001, 20_000, 300];
        let files: Vec<Vec<u8>> = (0..120u64)
            .zip(sizes.iter().cycle())
            .map(|(at, size)| noise(at, size + usize::try_from(at % 3).unwrap()))
            .collect();
        let ids: Vec<FileId> = files.iter().map(|content| add(&mut device, &mut sink, content)).collect();
        device.flush(&mut sink).unwrap();
        let bytes = sink.bytes();
        assert_eq!(bytes.len() as u64, device.bytes());
        assert!(bytes.len().is_multiple_of(4096));
        for (content, id) in files.iter().zip(&ids) {
            let start = usize::try_from(device.start(*id) * BLOCK).unwrap();
            assert!(bytes[start..start + content.len()] == **content);
            let end = (start + content.len()).next_multiple_of(4096);
            assert!(bytes[start + content.len()..end].iter().all(|byte| *byte == 0));
        }
        assert!(
            sink.chunks().iter().all(|chunk| chunk.len() < (256 << 10) + 4096),
            "four times the average, and padding"
        );
    }

    #[test]
    fn equal_small_files_are_one_and_equal_large_ones_have_equal_chunks() {
        let (mut device, mut sink) = (device(), Memory::default());
        let (small, large) = (noise(1, 5000), noise(2, 1_000_000));
        let first = add(&mut device, &mut sink, &small);
        add(&mut device, &mut sink, &large);
        add(&mut device, &mut sink, &noise(3, 9000));
        assert_eq!(add(&mut device, &mut sink, &small), first);
        let before = sink.chunks().len();
        add(&mut device, &mut sink, &large);
        let chunks = sink.chunks();
        assert_eq!(chunks[before..], chunks[..before]);
    }

    #[test]
    fn an_insertion_changes_chunks_near_it_only() {
        let content = noise(9, 4_000_000);
        let mut changed = content.clone();
        changed.splice(1_000_000..1_000_000, noise(10, 100));
        let cut = |content: &[u8]| {
            let (mut device, mut sink) = (device(), Memory::default());
            add(&mut device, &mut sink, content);
            sink.chunks().iter().map(|chunk| sha256(chunk)).collect::<Vec<_>>()
        };
        let (before, after) = (cut(&content), cut(&changed));
        let new = after.iter().filter(|hash| !before.contains(hash)).count();
        assert!(new <= 4 && after.len() > 30, "{new} of {}", after.len());
    }

    #[test]
    fn packs_keep_their_cuts_when_a_file_changes() {
        let pack = |changed: usize| {
            let (mut device, mut sink) = (device(), Memory::default());
            for at in 0..400 {
                add(&mut device, &mut sink, &noise(if at == changed { 1000 } else { at as u64 }, 3000));
            }
            device.flush(&mut sink).unwrap();
            sink.chunks().iter().map(|chunk| sha256(chunk)).collect::<Vec<_>>()
        };
        let (before, after) = (pack(usize::MAX), pack(200));
        let new = after.iter().filter(|hash| !before.contains(hash)).count();
        assert!(new <= 4 && after.len() > 10, "{new} of {}", after.len());
    }

    #[test]
    fn holes_are_not_stored() {
        let (mut device, mut sink) = (device(), Memory::default());
        let size = (5u64 << 20) + 100;
        let mut file = device.begin(size);
        device.data(&mut file, 1 << 20, &noise(1, 100_000), &mut sink).unwrap();
        device.data(&mut file, (1 << 20) + 100_000 + 5000, b"end", &mut sink).unwrap();
        let id = device.end(file, &mut sink).unwrap();
        let next = add(&mut device, &mut sink, &noise(2, 70_000));
        device.flush(&mut sink).unwrap();
        let bytes = sink.bytes();
        let mut expected = vec![0; usize::try_from(size).unwrap().next_multiple_of(4096)];
        expected[1 << 20..(1 << 20) + 100_000].copy_from_slice(&noise(1, 100_000));
        expected[(1 << 20) + 105_000..(1 << 20) + 105_003].copy_from_slice(b"end");
        assert_eq!(device.start(id), 0);
        assert!(bytes[..expected.len()] == expected);
        assert_eq!(device.start(next) * BLOCK, expected.len() as u64);
        let stored: usize = sink.chunks().iter().map(|chunk| chunk.len()).sum();
        assert!(stored < 200_000, "{stored}");
    }
}

//! Writes tar archives of blobs.
//!
//! An entry's content is written first and its header afterwards, so that a blob can be written whose size and name are known only
//! at its end. Blobs of known size get their place at once and are written side by side. What comes out is a plain ustar archive,
//! the same bytes for the same entries in the same order (no times, no owners).

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nacre_core::Digest;

use super::files;
use crate::{manifest::Descriptor, source::TransportError};

const BLOCK: u64 = 512;

/// Writes an archive beside its final place, and puts it there at the end.
pub(super) struct TarWriter {
    dir: files::Dir,
    path: PathBuf,
    name: String,
    temp: String,
    file: File,
    state: Mutex<WriterState>,
}

#[derive(Default)]
struct WriterState {
    end: u64,
    blobs: HashMap<Digest, u64>,
    /// Blobs whose place in the archive was given away and that are not, or never will be, complete.
    unfinished: usize,
    finished: bool,
}

impl TarWriter {
    pub(super) fn create(path: &Path) -> Result<Self, TransportError> {
        let (parent, name) = files::parent_and_name(path)?;
        let dir = files::Dir::open(&parent)?;
        let (temp, file) = dir.make_temp_file(&format!("{}{name}-", files::TEMP_PREFIX))?;
        Ok(Self { dir, path: path.into(), name, temp, file, state: Mutex::default() })
    }

    /// The archive's path, for messages.
    pub(super) fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of a blob that is in the archive.
    pub(super) fn blob(&self, digest: &Digest) -> Option<u64> {
        self.state().blobs.get(digest).copied()
    }

    /// Adds a blob, under the name that `name` makes of its digest. Blobs of known size are written side by side; one of unknown
    /// size has the archive's end for itself.
    pub(super) fn put_blob(
        &self,
        content: &mut dyn Read,
        expected: Option<&Descriptor>,
        name: impl Fn(&Digest) -> String,
    ) -> Result<(Digest, u64), TransportError> {
        let place = self.place();
        let Some(blob) = expected else {
            let mut state = self.state();
            let start = state.end + BLOCK;
            let (digest, size) = files::store(content, None, &place, |piece, at| self.write_at(piece, start + at))?;
            if state.blobs.insert(digest, size).is_none() {
                self.finish_entry(&name(&digest), state.end, size)?;
                state.end = start + size.next_multiple_of(BLOCK);
            }
            return Ok((digest, size));
        };
        let start = {
            let mut state = self.state();
            if state.blobs.contains_key(&blob.digest) {
                return Ok((blob.digest, blob.size));
            }
            let start = state.end;
            state.end = start + BLOCK + blob.size.next_multiple_of(BLOCK);
            // Until it is complete it makes the archive one that cannot be committed; so it counts as being there at once.
            state.unfinished += 1;
            state.blobs.insert(blob.digest, blob.size);
            start
        };
        let stored = files::store(content, expected, &place, |piece, at| self.write_at(piece, start + BLOCK + at))
            .and_then(|(digest, size)| self.finish_entry(&name(&digest), start, size).map(|()| (digest, size)));
        let mut state = self.state();
        let (digest, size) = stored.inspect_err(|_| {
            state.blobs.remove(&blob.digest);
        })?;
        state.unfinished -= 1;
        Ok((digest, size))
    }

    /// Adds a small file.
    pub(super) fn put_file(&self, name: &str, bytes: &[u8]) -> Result<(), TransportError> {
        let mut state = self.state();
        let start = state.end;
        self.write_at(bytes, start + BLOCK)?;
        self.finish_entry(name, start, bytes.len() as u64)?;
        state.end = start + BLOCK + (bytes.len() as u64).next_multiple_of(BLOCK);
        Ok(())
    }

    /// Ends the archive, makes it durable, and gives it its name.
    pub(super) fn commit(&self) -> Result<(), TransportError> {
        let mut state = self.state();
        if state.unfinished > 0 {
            return Err(TransportError::Malformed {
                what: "the archive".into(),
                place: self.place(),
                reason: "a blob of it was not written to its end".into(),
            });
        }
        // Two empty blocks end an archive; setting the length also drops what a failed blob left behind the end.
        let failed = |error| files::io("writing", &self.path, error);
        self.file.set_len(state.end).and_then(|()| self.file.set_len(state.end + 2 * BLOCK)).map_err(failed)?;
        self.file.sync_all().map_err(failed)?;
        self.dir.rename(&self.temp, &self.dir, &self.name)?;
        state.finished = true;
        self.dir.sync()
    }

    fn finish_entry(&self, name: &str, start: u64, size: u64) -> Result<(), TransportError> {
        let header = ustar_header(name, size).ok_or_else(|| TransportError::Unsupported {
            what: format!("an entry '{name:.200}' of {size} bytes"),
            place: self.place(),
        })?;
        self.write_at(&header, start)?;
        let end = start + BLOCK + size;
        let padding = usize::try_from(size.next_multiple_of(BLOCK) - size).unwrap_or(0);
        self.write_at([0; 512].get(..padding).unwrap_or_default(), end)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), TransportError> {
        self.file.write_all_at(bytes, offset).map_err(|error| files::io("writing", &self.path, error))
    }
}

impl Drop for TarWriter {
    fn drop(&mut self) {
        if !self.state().finished {
            // Nothing more can be done about an error here; the next writer to this place removes what is left.
            let _ = self.dir.remove_file(&self.temp);
        }
    }
}

/// A header of a read-only file of nobody; `None` for a name that does not fit. A name that ends in `/` is a directory's.
fn ustar_header(name: &str, size: u64) -> Option<[u8; 512]> {
    let directory = name.ends_with('/');
    let mut header = [0u8; 512];
    let mut put =
        |at: usize, bytes: &[u8]| header.get_mut(at..at + bytes.len()).map(|slot| slot.copy_from_slice(bytes));
    if name.len() > 100 {
        return None;
    }
    put(0, name.as_bytes())?;
    put(100, if directory { b"0000755\0" } else { b"0000444\0" })?;
    put(108, b"0000000\0")?;
    put(116, b"0000000\0")?;
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes())?;
    } else {
        put(124, &[0x80, 0, 0, 0])?;
        put(128, &size.to_be_bytes())?;
    }
    put(136, b"00000000000\0")?;
    put(148, b"        ")?;
    put(156, if directory { b"5" } else { b"0" })?;
    put(257, b"ustar\x0000")?;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header.get_mut(148..156)?.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_hold_any_size_and_short_names() {
        assert!(ustar_header(&"a".repeat(101), 0).is_none());
        for size in [0, 1, (1 << 33) - 1, 1 << 33, u64::MAX >> 1] {
            let header = ustar_header("blobs/x", size).unwrap();
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            let field = std::str::from_utf8(&header[148..154]).unwrap();
            let own: u32 = header[148..156].iter().map(|byte| u32::from(*byte)).sum();
            assert_eq!(u32::from_str_radix(field, 8).unwrap(), sum - own + 8 * 32);
        }
    }

    #[test]
    fn an_archive_with_an_incomplete_blob_is_not_finished() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.tar");
        let writer = TarWriter::create(&path).unwrap();
        let blob = Descriptor::of("x", b"content");
        assert!(writer.put_blob(&mut b"cont".as_slice(), Some(&blob), Digest::hex).is_err());
        writer.put_file("other", b"y").unwrap();
        assert!(writer.commit().is_err());
        drop(writer);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}

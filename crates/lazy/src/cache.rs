//! A directory of stored chunks, on a disk that nobody trusts, shared by all who read images of one node.
//!
//! ```text
//! DIR/<first two digits>/<64 digits of the blob's SHA-256>.<n>    the n-th 4 MiB of the blob, with holes
//! ```
//!
//! What is read is verified by the reader like an answer of the registry: a hole, a torn write, or somebody's change is a wrong digest,
//! and the chunk is fetched and written again. So there is no index that could lie, no lock between processes, and no fsync. A file's
//! modification time says when it was last of use; the oldest go first when the directory is larger than it may be.
//!
//! Names and sizes tell the host which blobs, and which parts of them, were read: what the registry's traffic tells as well.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::source::BlobId;

/// Bytes of a file.
pub const SEGMENT: u64 = 4 << 20;
/// Files that are kept open.
const OPEN: usize = 128;
/// How old a file's time may be while it is in use.
const TOUCH: Duration = Duration::from_secs(60);
/// When there is too much, so much of the limit is freed.
const FREED: u64 = 8;

/// A cache in a directory.
pub struct Cache {
    directory: PathBuf,
    limit: u64,
    open: Mutex<HashMap<(BlobId, u64), Segment>>,
    clock: AtomicU64,
    /// Bytes that were written since they were last counted.
    written: AtomicU64,
    cleaning: Mutex<()>,
}

struct Segment {
    file: Arc<File>,
    used: u64,
    touched: SystemTime,
}

impl Cache {
    /// The cache in `directory`, which is made if need be, with at most about `limit` bytes.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: &Path, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let cache = Self {
            directory: directory.to_owned(),
            limit,
            open: Mutex::new(HashMap::new()),
            clock: AtomicU64::new(0),
            written: AtomicU64::new(0),
            cleaning: Mutex::new(()),
        };
        cache.clean()?;
        Ok(cache)
    }

    /// The most bytes that are kept, about.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    fn path(&self, blob: &BlobId, segment: u64) -> PathBuf {
        let hex = blob.hex();
        self.directory.join(hex.get(..2).unwrap_or("00")).join(format!("{hex}.{segment}"))
    }

    /// Reads what is there of a range of a blob. `false` where it is surely not all there; whatever comes may be wrong.
    pub fn read(&self, blob: &BlobId, offset: u64, out: &mut [u8]) -> bool {
        self.pieces(offset, out.len()).all(|(segment, at, piece)| {
            let Some(to) = out.get_mut(piece) else { return false };
            let Ok(Some(file)) = self.segment(blob, segment, false) else { return false };
            file.read_exact_at(to, at).is_ok()
        })
    }

    /// Keeps bytes of a blob. A failure is logged and changes nothing for the reader, who has the bytes.
    pub fn write(&self, blob: &BlobId, offset: u64, bytes: &[u8]) {
        for (segment, at, piece) in self.pieces(offset, bytes.len()) {
            let Some(from) = bytes.get(piece) else { return };
            let written = self.segment(blob, segment, true).and_then(|file| match file {
                Some(file) => file.write_all_at(from, at),
                None => Ok(()),
            });
            if let Err(error) = written {
                tracing::warn!("the cache {} cannot be written: {error}", self.directory.display());
                return;
            }
        }
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written > (self.limit / (2 * FREED)).max(SEGMENT) {
            self.written.store(0, Ordering::Relaxed);
            if let Err(error) = self.clean() {
                tracing::warn!("the cache {} cannot be cleaned: {error}", self.directory.display());
            }
        }
    }

    /// The segments that a range of a blob lies in: number, place in it, part of the range.
    fn pieces(&self, offset: u64, length: usize) -> impl Iterator<Item = (u64, u64, std::ops::Range<usize>)> + use<> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == length {
                return None;
            }
            let place = offset.checked_add(done as u64)?;
            let (segment, at) = (place / SEGMENT, place % SEGMENT);
            let room = usize::try_from(SEGMENT - at).unwrap_or(usize::MAX).min(length - done);
            let piece = done..done + room;
            done += room;
            Some((segment, at, piece))
        })
    }

    fn segment(&self, blob: &BlobId, number: u64, make: bool) -> io::Result<Option<Arc<File>>> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(segment) = open.get_mut(&(*blob, number)) {
            segment.used = now;
            if segment.touched.elapsed().unwrap_or(TOUCH) >= TOUCH {
                segment.touched = SystemTime::now();
                if segment.file.metadata()?.nlink() == 0 {
                    // It was removed to make room; what is written to it is for nobody else.
                    open.remove(&(*blob, number));
                    drop(open);
                    return self.segment(blob, number, make);
                }
                let _ = segment.file.set_modified(segment.touched);
            }
            return Ok(Some(Arc::clone(&segment.file)));
        }
        let path = self.path(blob, number);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !make {
                    return Ok(None);
                }
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent)?;
                }
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?
            }
            other => other?,
        };
        let file = Arc::new(file);
        if open.len() >= OPEN {
            let mut used: Vec<u64> = open.values().map(|segment| segment.used).collect();
            used.sort_unstable();
            let oldest = used.get(OPEN / 4).copied().unwrap_or(u64::MAX);
            open.retain(|_, segment| segment.used > oldest);
        }
        let touched = SystemTime::now();
        let _ = file.set_modified(touched);
        open.insert((*blob, number), Segment { file: Arc::clone(&file), used: now, touched });
        Ok(Some(file))
    }

    /// How much of a blob is there: bytes that have blocks on the disk, whatever they are.
    pub fn held(&self, blob: &BlobId) -> u64 {
        (0..blob.size.div_ceil(SEGMENT))
            .filter_map(|segment| fs::metadata(self.path(blob, segment)).ok())
            .map(|file| (file.blocks() * 512).min(file.len()))
            .sum()
    }

    /// Removes the files that were of no use for longest, until there is room.
    fn clean(&self) -> io::Result<()> {
        let Ok(_alone) = self.cleaning.try_lock() else { return Ok(()) };
        let mut files = Vec::new();
        for group in fs::read_dir(&self.directory)? {
            let group = group?;
            if !group.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(group.path())? {
                let file = file?;
                let Ok(metadata) = file.metadata() else { continue };
                if metadata.is_file() {
                    files.push((metadata.modified()?, metadata.blocks() * 512, file.path()));
                }
            }
        }
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        if total <= self.limit {
            return Ok(());
        }
        files.sort();
        let target = self.limit - self.limit / FREED;
        for (_, bytes, path) in files {
            if total <= target {
                break;
            }
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => total = total.saturating_sub(bytes),
            }
        }
        // Files that are open and gone would take what is written and keep it from others.
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, segment| segment.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(byte: u8) -> BlobId {
        BlobId { digest: [byte; 32], size: 20 << 20 }
    }

    #[test]
    fn ranges_over_segments_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 1 << 30).unwrap();
        let bytes: Vec<u8> = (0..9_000_000u32).map(|at| (at % 251) as u8).collect();
        let mut out = vec![0; 100];
        assert!(!cache.read(&blob(1), 0, &mut out));
        cache.write(&blob(1), 1000, &bytes);
        let mut out = vec![0; bytes.len()];
        assert!(cache.read(&blob(1), 1000, &mut out));
        assert!(out == bytes);
        assert!(!cache.read(&blob(1), 19 << 20, &mut [0; 10]));
        let again = Cache::open(directory.path(), 1 << 30).unwrap();
        out.fill(0);
        assert!(again.read(&blob(1), 1000, &mut out));
        assert!(out == bytes);
        assert!(again.held(&blob(1)) >= 9_000_000);
    }

    #[test]
    fn what_was_of_no_use_for_longest_goes_first() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), 40 << 20).unwrap();
        let bytes = vec![1; 4 << 20];
        for number in 0..9 {
            cache.write(&blob(number), 0, &bytes);
            let age = SystemTime::now() - Duration::from_secs(if number == 0 { 0 } else { 1000 - u64::from(number) });
            File::options().write(true).open(cache.path(&blob(number), 0)).unwrap().set_modified(age).unwrap();
        }
        for number in 20..26 {
            cache.write(&blob(number), 0, &bytes);
        }
        cache.clean().unwrap();
        let there: Vec<u8> = (0..26).filter(|number| cache.held(&blob(*number)) > 0).collect();
        assert!(there.contains(&0) && there.contains(&25) && !there.contains(&1) && !there.contains(&2), "{there:?}");
        assert!(there.len() <= 10, "{there:?}");
        // A segment that was removed while it was open is made anew.
        cache.write(&blob(1), 0, &bytes);
        assert!(cache.held(&blob(1)) > 0);
    }
}

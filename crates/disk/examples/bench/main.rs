//! Measures the secure disk in process, without a front end; `cargo xtask bench disk` runs it and judges what it prints: one JSON object
//! a line, `{"name": …, "value": …}`.
//!
//! ```text
//! bench speed STORE SIZE SECONDS FILL [CASE] writes and reads, random and sequential, on one core and on two, and the AEAD alone
//! bench sync STORE RAW SIZE SECONDS          one write and a flush, against a file's write and fdatasync; flushes of several threads
//! bench amplification STORE SIZE             bytes written to the store for each byte that was written to the disk, and space
//! bench fill STORE SIZE                      a huge disk of whose data little is kept (see `huge`)
//! bench open STORE SIZE clean|crashed        opens it, reads, writes; time, memory, reads of the index
//! ```
//! Stores are written once before anything is measured, and so are the files that they are compared with: otherwise this would measure how the
//! system finds room for a file (the first touch of a page of tmpfs costs three times as much as the next).

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program whose output is its purpose")]

mod amplification;
mod counting;
mod huge;
mod machine;
mod speed;
mod sync;

use std::{error::Error, path::Path, sync::Arc, time::Duration};

use nacre_core::{BlockStore, NoProgress};
use nacre_disk::{Disk, FormatOptions, OpenOptions, RootKey, format, store_size_for};
use nacre_sys::block::{FileOptions, FileStore};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = nacre_core::BLOCK_SIZE as u64;

fn main() -> Result<()> {
    nacre_sys::memory::share_one_heap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let seconds = |text: &str| -> Result<Duration> { Ok(Duration::try_from_secs_f64(text.parse()?)?) };
    match words.as_slice() {
        ["speed", store, size, time, fill, only @ ..] => {
            speed::speed(Path::new(store), size.parse()?, seconds(time)?, fill.parse()?, only.first().copied())
        }
        ["sync", store, raw, size, time] => sync::sync(Path::new(store), Path::new(raw), size.parse()?, seconds(time)?),
        ["amplification", store, size] => amplification::amplification(Path::new(store), size.parse()?),
        ["fill", store, size] => huge::fill(Path::new(store), size.parse()?),
        ["open", store, size, "clean"] => huge::open(Path::new(store), size.parse()?, true),
        ["open", store, size, "crashed"] => huge::open(Path::new(store), size.parse()?, false),
        _ => {
            Err("usage: bench speed|sync|amplification|fill|open … (the source's first lines have the arguments)"
                .into())
        }
    }
}

/// A figure.
pub(crate) fn say(name: &str, value: f64) {
    println!("{{\"name\": \"{name}\", \"value\": {value}}}");
}

/// The key of all disks here, so that another process opens what one made.
pub(crate) fn key() -> Result<RootKey> {
    Ok(RootKey::from_bytes(&[7; 32])?)
}

/// How all disks here are opened: as everybody does.
pub(crate) fn options() -> OpenOptions {
    OpenOptions::default()
}

/// A new store that a disk of `size` bytes fits, all of it written once where `preallocate` says so.
pub(crate) fn new_store(path: &Path, size: u64, preallocate: bool) -> Result<FileStore> {
    let format = FormatOptions { size: Some(size), ..FormatOptions::default() };
    let bytes = store_size_for(&format)?;
    let _ = std::fs::remove_file(path);
    Ok(FileStore::create(path, bytes, preallocate, FileOptions::default(), &NoProgress)?)
}

/// Makes a disk of `size` bytes and opens it.
pub(crate) fn new_disk(store: Arc<dyn BlockStore>, size: u64) -> Result<Disk> {
    let key = key()?;
    format(&*store, &key, None, &FormatOptions { size: Some(size), force: true, ..FormatOptions::default() })?;
    Ok(Disk::open(store, &key, None, &options())?)
}

/// Writes a range in sequence, in requests of 256 KiB.
pub(crate) fn write_range(disk: &Disk, from: u64, to: u64) -> Result<()> {
    let buffer = machine::noise(256 << 10);
    let mut offset = from;
    while offset < to {
        let length = (to - offset).min(buffer.len() as u64);
        disk.write_at(offset, buffer.get(..usize::try_from(length)?).ok_or("a short buffer")?)?;
        offset += length;
    }
    Ok(())
}

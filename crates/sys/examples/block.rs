//! Measures a file store by each way: `cargo run --release -p nacre-sys --example block -- DIRECTORY…`.

#![expect(clippy::print_stdout, reason = "it is a program")]

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use nacre_core::{BLOCK_SIZE, BlockStore, NoProgress, Page, ReadRequest, WriteRequest};
use nacre_sys::block::{Access, FileOptions, FileStore};

const SIZE: u64 = 512 << 20;
const ROUND: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    for directory in std::env::args().skip(1) {
        let path = Path::new(&directory).join("nacre-measure");
        let made = FileStore::create(&path, SIZE, true, FileOptions::default(), &NoProgress);
        let measured = made.map_err(Into::into).and_then(|store| {
            drop(store);
            [Access::Buffered, Access::Direct, Access::Auto].into_iter().try_for_each(|access| measure(&path, access))
        });
        std::fs::remove_file(&path)?;
        measured?;
    }
    Ok(())
}

fn measure(path: &Path, access: Access) -> Result<(), Box<dyn Error>> {
    let store = FileStore::open(path, FileOptions { access, read_only: false })?;
    let mut pages = vec![*Page::zeroed(); 64];
    let mut place = 1_u64;
    let mut anywhere = || {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (place >> 20) % (SIZE / BLOCK_SIZE as u64) * BLOCK_SIZE as u64
    };
    let scattered = rate(64, || {
        let mut requests: Vec<_> = pages.iter_mut().map(|page| ReadRequest::new(anywhere(), &mut page.0)).collect();
        store.read_many(&mut requests);
        requests.into_iter().try_for_each(|request| request.outcome)
    })?;
    let one = rate(1, || pages.iter_mut().take(1).try_for_each(|page| store.read_at(anywhere(), &mut page.0)))?;
    let synced = rate(1, || {
        pages.iter().take(1).try_for_each(|page| store.write_at(anywhere(), &page.0))?;
        store.flush()
    })?;
    let whole = 64 * BLOCK_SIZE as u64;
    let mut offset = 0;
    let mut sequential = |flush: bool| {
        rate(1, || {
            let request = WriteRequest { offset, buffers: pages.iter().map(|page| page.0.as_slice()).collect() };
            offset = (offset + whole) % SIZE;
            store.write_many(&[request])?;
            if flush && offset % (64 << 20) == 0 { store.flush() } else { Ok(()) }
        })
    };
    let (written, flushed) = (sequential(false)? / 4.0, sequential(true)? / 4.0);
    println!("{}", store.describe());
    println!("    64 scattered reads of 4 KiB: {scattered:.0}/s; one: {one:.0}/s; write and flush: {synced:.0}/s");
    println!("    256 KiB after the other: {written:.0} MiB/s; with a flush every 64 MiB: {flushed:.0} MiB/s");
    Ok(())
}

/// How often a second it is done, where a call does it `times`.
fn rate<E>(times: u32, mut call: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < ROUND {
        call()?;
        count += times;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

//! The secure disk behind the server: fio compares all that it reads with what it wrote, over closing and opening, for as long as wanted.

use std::{
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nacre_core::BlockStore;
use nacre_disk::{CheckOptions, Disk, FormatOptions, OpenOptions, RootKey};
use nacre_sys::block::MemoryStore;
use nacre_testkit::{
    require, run,
    sim::{long, seed},
};

use crate::Fixture;

fn key() -> RootKey {
    RootKey::from_bytes(&[0xd1; 32]).unwrap()
}

/// A store with a new disk of so many bytes on it.
fn formatted(size: u64) -> Arc<dyn BlockStore> {
    let options = FormatOptions { size: Some(size), ..FormatOptions::default() };
    let store = MemoryStore::new(nacre_disk::store_size_for(&options).unwrap());
    nacre_disk::format(&store, &key(), None, &options).unwrap();
    Arc::new(store)
}

fn open(store: &Arc<dyn BlockStore>) -> Arc<Disk> {
    Arc::new(Disk::open(store.clone(), &key(), None, &OpenOptions::default()).unwrap())
}

/// A new disk on memory.
pub(crate) fn fresh(size: u64) -> Arc<dyn BlockStore> {
    open(&formatted(size))
}

fn check(store: &Arc<dyn BlockStore>) {
    let progress = &nacre_core::NoProgress;
    let report = nacre_disk::check(store.clone(), &key(), None, &CheckOptions::default(), progress).unwrap();
    assert!(report.is_clean(), "{:?} {:?} {:?}", report.damaged, report.inconsistent, report.warnings);
}

/// How long fio works on the disk: some seconds, an hour with `NACRE_LONG=1`, or `NACRE_MINUTES`.
fn time() -> Duration {
    let minutes = std::env::var("NACRE_MINUTES").ok().map(|text| text.parse::<u64>().unwrap());
    match minutes {
        Some(minutes) => Duration::from_secs(60 * minutes),
        None if long() => Duration::from_secs(3600),
        None => Duration::from_secs(4),
    }
}

/// Reads, writes and trims of all sizes, each write read again and compared; then the whole disk once more after it was closed, or left
/// as a crash leaves it, and opened.
#[test]
fn fio_verifies_mixed_loads_over_closing_and_opening() {
    const SIZE: u64 = 64 << 20;
    let Some(fio) = require("fio") else { return };
    let (mut seed, start, mut rounds) = (seed(7), Instant::now(), 0u64);
    let store = formatted(SIZE);
    while rounds < 2 || start.elapsed() < time() {
        println!("fio round {rounds}, NACRE_SEED={seed}");
        let fio = |fixture: &Fixture<Disk>, arguments: &[&str]| {
            let mut command = Command::new(&fio);
            command.args(["--name=global", "--ioengine=nbd", "--verify=crc32c", "--verify_fatal=1", "--iodepth=32"]);
            command.args([format!("--uri={}", fixture.uri()), format!("--randseed={seed}"), "--name=x".to_owned()]);
            let out = run(command.args(arguments).current_dir(fixture.directory.path()));
            assert!(!String::from_utf8_lossy(&out.stderr).contains("verify:"), "seed {seed}: {out:?}");
        };
        let serve = || {
            let disk = open(&store);
            Fixture::of(disk.clone(), disk, |_| {})
        };
        let mut fixture = serve();
        // What one job trims and writes again lies beside what the other reads and writes.
        let mixed = ["--rw=randrw", "--bsrange=4k-64k", "--size=48m", "--verify_backlog=256", "--fsync=40"];
        let trims = ["--name=trims", "--rw=randtrimwrite", "--bs=16k", "--offset=48m", "--size=16m", "--io_size=32m"];
        fio(&fixture, &[&mixed[..], &trims[..]].concat());
        let whole = ["--rw=randwrite", "--bs=16k", "--size=64m", "--end_fsync=1"];
        fio(&fixture, &[&whole[..], &["--do_verify=0"]].concat());
        fixture.stop().unwrap();
        if rounds.is_multiple_of(2) {
            fixture.store.shut().unwrap();
        }
        drop(fixture);
        check(&store);
        fio(&serve(), &[&whole[..], &["--verify_only=1"]].concat());
        check(&store);
        (seed, rounds) = (seed + 1, rounds + 1);
    }
    println!("{rounds} rounds in {:?}", start.elapsed());
}

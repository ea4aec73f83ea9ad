//! Filesystems of the kernel on a secure disk whose server is killed while they are written to.
//!
//! One disk lives through all rounds of a filesystem. In each round a server opens it; the kernel replays the filesystem's journal; its
//! checker, which may repair nothing, has to find it clean; every file that was synced, in this round or an earlier one, has to be whole;
//! several threads write ([`load`]), until the server gets SIGKILL at some time. Every few rounds the disk's own checker looks too.
//!
//! `NACRE_ROUNDS` is how many rounds there are, of all filesystems together, and `NACRE_SEED` from what the load and the times of death
//! come. `TMPDIR` says on what medium the disk is.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "what fails here fails the test; the lints know only tests of the standard harness"
)]

#[path = "../common/mod.rs"]
mod common;
mod load;
mod server;

use std::{fs, path::Path, process::ExitCode, time::Duration};

use common::{sh, try_sh};
use load::{Load, Quirks};
use nacre_testkit::{Rng, require, root, sim::seed};
use server::{Place, Server};

const MIB: u64 = 1 << 20;
/// Rounds of all filesystems together.
const ROUNDS: u64 = 24;
const KINDS: u64 = 3;
/// The disk's own checker looks in every so many rounds.
const CHECKED: u64 = 4;

/// A filesystem.
struct Kind {
    name: &'static str,
    make: &'static str,
    check: &'static str,
    size: u64,
    discard: &'static str,
    /// Whether its disk has an anchor that moves with each flush.
    anchored: bool,
}

const EXT4: Kind = Kind {
    name: "ext4",
    make: "mkfs.ext4 -q",
    check: "e2fsck -fn",
    size: 96 * MIB,
    discard: "discard",
    anchored: true,
};
const XFS: Kind = Kind {
    name: "xfs",
    make: "mkfs.xfs -q",
    check: "xfs_repair -n",
    size: 300 * MIB,
    discard: "discard",
    anchored: false,
};
const BTRFS: Kind = Kind {
    name: "btrfs",
    make: "mkfs.btrfs -q",
    check: "btrfs check --force",
    size: 160 * MIB,
    discard: "discard=sync",
    anchored: false,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, command, directory, anchored] = arguments.as_slice()
        && command == "serve"
    {
        return server::serve(Path::new(directory), anchored == "anchored");
    }
    nacre_testkit::harness::run(&[
        ("ext4_survives_servers_that_are_killed", || survive(&EXT4)),
        ("xfs_survives_servers_that_are_killed", || survive(&XFS)),
        ("btrfs_survives_servers_that_are_killed", || survive(&BTRFS)),
    ])
}

fn rounds() -> u64 {
    std::env::var("NACRE_ROUNDS").map_or(ROUNDS, |text| text.parse().unwrap()).div_ceil(KINDS)
}

fn survive(kind: &Kind) {
    let programs = [kind.make, kind.check].map(|line| line.split(' ').next().unwrap());
    if !root() || programs.iter().any(|program| require(program).is_none()) {
        return;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.trim() == kind.name);
    if !known && try_sh(&format!("modprobe {}", kind.name)).is_err() {
        nacre_testkit::skip(&format!("the kernel has no {}", kind.name));
        return;
    }
    let (seed, rounds) = (seed(2026), rounds());
    println!("{}: {rounds} rounds, NACRE_SEED={seed}", kind.name);

    let directory = tempfile::tempdir().unwrap();
    let place = Place::new(directory.path(), kind.anchored);
    fs::create_dir(place.at()).unwrap();
    place.format(kind.size);
    let rng = &mut Rng::new(seed);
    let quirks = Quirks { revives: kind.name == BTRFS.name, forgets: kind.name == XFS.name };
    let mut load = Load::new(&place.at(), quirks);
    for round in 0..rounds {
        let server = Server::start(&place);
        if round == 0 {
            sh(&format!("{} {}", kind.make, server.device));
        }
        one_round(kind, &place, server, &mut load, round, rng);
        if round % CHECKED == CHECKED - 1 {
            place.check();
        }
    }
    // What the last of them left.
    let server = Server::start(&place);
    judge(kind, &place, &server, &mut load, "relatime");
    sh(&format!("umount {}", place.at().display()));
    drop(server);
    place.check();
    println!("{}: {rounds} rounds, {}", kind.name, load.totals());
    assert!(load.totals().synced > rounds, "hardly anything was written: {}", load.totals());
}

/// Judges what the last round left, and writes until the server dies. It is cleaned up after when this returns.
fn one_round(kind: &Kind, place: &Place, mut server: Server<'_>, load: &mut Load, round: u64, rng: &mut Rng) {
    judge(kind, place, &server, load, if round % 2 == 1 { kind.discard } else { "relatime" });
    // Most die in the middle of it, some at once.
    let longest = *rng.pick(&[100, 1000, 2500]);
    let time = Duration::from_millis(1 + rng.next_u64() % longest);
    let before = load.totals();
    load.run(rng.next_u64(), time, || server.kill());
    println!("{} round {round}: killed after {time:?}, {}", kind.name, load.totals().since(&before));
}

/// Replays the filesystem's journal, lets its checker judge, and compares every file; it is mounted then.
fn judge(kind: &Kind, place: &Place, server: &Server<'_>, load: &mut Load, options: &str) {
    let (device, at) = (&server.device, place.at().display().to_string());
    sh(&format!("mount -t {} {device} {at}", kind.name));
    sh(&format!("umount {at}"));
    sh(&format!("{} {device}", kind.check));
    sh(&format!("mount -t {} -o {options} {device} {at}", kind.name));
    load.judge();
}

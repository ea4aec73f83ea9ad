//! `nacre disk open` and `close` as typed, with the devices that this machine's kernel may not have: ublk and the kernel's NBD client, in a
//! guest with Debian's 6.12 kernel. One boot for all.
//!
//! This program runs in the guest too, where it starts `nacre`: what takes a ublk device away from outside is not a thing that a shell can
//! do.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what fails here fails the test; the lints know only tests of the standard harness"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::FileTypeExt as _,
    path::Path,
    process::{Command, ExitCode, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{Rng, qemu::Guest};

type Case = fn(&str);

/// What is done in the guest, with each kind of device.
const CASES: &[(&str, Case)] = &[
    ("opened_and_closed", what_is_written_is_there_after_it_was_opened_again),
    ("taken_away", a_device_that_is_taken_away_closes_its_disk),
    ("in_use", a_device_that_is_mounted_where_nobody_sees_it_stays),
    ("grows", a_disk_grows_while_it_is_open),
    ("killed", a_killed_process_leaves_a_disk_that_is_opened_again),
];
const KINDS: [&str; 2] = ["ublk", "nbd"];

const MIB: u64 = 1 << 20;
/// How long the guest may take over something that takes it a second or two.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("in-guest") => in_guest(),
        _ => nacre_testkit::harness::run(&[("disks_become_devices_of_a_guest", disks_become_devices_of_a_guest)]),
    }
}

fn disks_become_devices_of_a_guest() {
    let Some(mut guest) = Guest::new() else { return };
    guest.program("bin/nacre", Path::new(env!("CARGO_BIN_EXE_nacre")));
    guest.program("bin/test-program", &std::env::current_exe().unwrap());
    if !guest.installed("nbd-client") {
        return;
    }
    for module in ["ublk_drv", "nbd"] {
        guest.module(module);
    }
    let said = guest.run("uname -r; test-program in-guest", Duration::from_secs(420));
    println!("the guest took {:?}", said.took);
    assert_eq!(said.status, Some(0), "{}", said.console);
    for (name, _) in CASES {
        for kind in KINDS {
            assert!(said.console.contains(&format!("PASSED {name} {kind} ")), "{name} {kind}: {}", said.console);
        }
    }
}

/// Runs in the guest.
fn in_guest() -> ExitCode {
    fs::create_dir("/tmp/place").unwrap();
    std::env::set_current_dir("/tmp/place").unwrap();
    fs::write("key", [7; 32]).unwrap();
    // ublk is what is taken where nothing is asked for.
    format();
    let device = open("auto");
    assert!(device.starts_with("/dev/ublkb"), "{device}");
    close(&device);
    for (name, case) in CASES {
        for kind in KINDS {
            let began = Instant::now();
            format();
            case(kind);
            assert_eq!(fs::read_dir("run/disks").unwrap().count(), 0, "something is left in the run directory");
            println!("PASSED {name} {kind} in {:?}", began.elapsed());
        }
    }
    ExitCode::SUCCESS
}

fn nacre(verb: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("/bin/nacre");
    command.args(["disk", verb]).args(arguments).env("NACRE_RUN", "/tmp/place/run");
    command.output().unwrap()
}

/// What it printed.
#[track_caller]
fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}: {out}{err}", output.status)
}

#[track_caller]
fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "waited for {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[track_caller]
fn format() {
    good(&nacre("format", &["--force", "--size", "32M", "--key-file", "key", "store"]));
}

/// Opens the disk; its device, the only thing that is printed.
#[track_caller]
fn open(kind: &str) -> String {
    let device = good(&nacre("open", &["--device", kind, "--key-file", "key", "store"]));
    assert!(fs::metadata(&device).is_ok_and(|found| found.file_type().is_block_device()), "{device:?} is no device");
    device
}

#[track_caller]
fn close(what: &str) {
    assert_eq!(good(&nacre("close", &[what])), "");
}

fn info(what: &str) -> serde_json::Value {
    serde_json::from_str(&good(&nacre("info", &["--json", "--key-file", "key", what]))).unwrap()
}

/// Bytes of the device, as the kernel has it.
fn size(device: &str) -> u64 {
    sh(&format!("blockdev --getsize64 {device}")).trim().parse().unwrap()
}

fn noise(seed: u64) -> Vec<u8> {
    Rng::new(seed).bytes(3 << 20)
}

/// Writes at `mib`, through the kernel's page cache, and has it written out.
fn write(device: &str, mib: u64, data: &[u8]) {
    fs::write("data", data).unwrap();
    sh(&format!("dd if=data of={device} bs=1M seek={mib} conv=notrunc,fsync 2>&1"));
}

/// Reads it from the disk, not from what the kernel remembers.
#[track_caller]
fn assert_reads(device: &str, mib: u64, data: &[u8]) {
    sh(&format!("sync && blockdev --flushbufs {device} && echo 3 > /proc/sys/vm/drop_caches"));
    sh(&format!("dd if={device} of=back bs=1M skip={mib} count={} 2>&1", data.len() >> 20));
    assert!(fs::read("back").unwrap() == data, "{device} holds something else at {mib} MiB");
}

/// Whether the kernel still has a disk there.
fn is_there(device: &str) -> bool {
    let system = Path::new("/sys/class/block").join(Path::new(device).file_name().unwrap());
    // A device of NBD is always there, and has a process when it is connected.
    if device.starts_with("/dev/nbd") { system.join("pid").exists() } else { system.exists() }
}

fn what_is_written_is_there_after_it_was_opened_again(kind: &str) {
    let device = open(kind);
    assert_eq!(size(&device), 32 * MIB);
    let shown = info(&device);
    assert_eq!((&shown["state"], &shown["devices"][0]), (&"running".into(), &device.as_str().into()), "{shown}");
    write(&device, 5, &noise(1));
    assert_reads(&device, 5, &noise(1));
    // Two at once are refused, and the first is not disturbed.
    let second = nacre("open", &["--device", kind, "--key-file", "key", "store"]);
    assert_eq!(second.status.code(), Some(6), "{}", said(&second));
    assert_reads(&device, 5, &noise(1));
    // By its device, and by its store.
    close(&device);
    assert!(!is_there(&device));
    let again = open(kind);
    assert_reads(&again, 5, &noise(1));
    close("store");
    assert!(!is_there(&again));
    let third = nacre("close", &[&again]);
    assert_eq!(third.status.code(), Some(4), "{}", said(&third));
    good(&nacre("check", &["--key-file", "key", "store"]));
}

/// Ends the device without a word to its server.
fn take_away(device: &str) {
    if device.starts_with("/dev/nbd") {
        sh(&format!("nbd-client -d {device} 2>&1"));
        return;
    }
    let mut control = nacre_sys::ublk::Control::open().unwrap();
    let found = control.ours().unwrap().into_iter().find(|found| found.id.block() == Path::new(device)).unwrap();
    control.stop(found.id).unwrap();
}

fn a_device_that_is_taken_away_closes_its_disk(kind: &str) {
    let device = open(kind);
    write(&device, 0, &noise(2));
    take_away(&device);
    wait_until("the disk to be closed", || fs::read_dir("run/disks").unwrap().count() == 0);
    let shown = info("store");
    assert_eq!((&shown["state"], &shown["clean"]), (&"closed".into(), &true.into()), "{shown}");
    let again = open(kind);
    assert_reads(&again, 0, &noise(2));
    close(&again);
}

fn a_device_that_is_mounted_where_nobody_sees_it_stays(kind: &str) {
    let device = open(kind);
    sh(&format!("mke2fs -F -b 4096 {device}"));
    // Until its standard input ends, a mount namespace of its own has the device mounted.
    let script = format!("mount -t ext4 {device} /mnt && echo mounted && cat && echo kept > /mnt/file && umount /mnt");
    let mut child = Command::new("unshare");
    child.args(["-m", "sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "mounted\n");
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(&device));
    for _ in 0..2 {
        let refused = nacre("close", &[&device]);
        assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
        assert!(said(&refused).contains("cannot be seen from here"), "{}", said(&refused));
    }
    // A signal ends it no more than `close` does.
    sh(&format!("kill -TERM {}", info(&device)["pid"]));
    wait_until("the log to say so", || sh("cat run/disks/*/log").matches("it stays").count() == 3);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    close(&device);
    assert!(!is_there(&device));
    let again = open(kind);
    sh(&format!("mount -t ext4 {again} /mnt"));
    assert_eq!(fs::read_to_string("/mnt/file").unwrap(), "kept\n");
    let refused = nacre("close", &[&again]);
    assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
    assert!(said(&refused).contains("mounted on /mnt"), "{}", said(&refused));
    sh("umount /mnt");
    close(&again);
}

fn a_disk_grows_while_it_is_open(kind: &str) {
    let device = open(kind);
    write(&device, 29, &noise(4));
    good(&nacre("grow", &["--size", "64M", &device]));
    let logs = || sh("cat run/disks/*/log");
    if kind == "ublk" {
        // Not with this kernel: what to do about it is said.
        wait_until("the log to say so", || logs().contains("closed and opened again"));
        assert_eq!(size(&device), 32 * MIB);
        close(&device);
        assert_eq!(open(kind), device);
    } else {
        wait_until("the device to grow", || size(&device) == 64 * MIB);
        assert_eq!(logs(), "", "there is nothing to complain about");
    }
    assert_eq!(size(&device), 64 * MIB);
    assert_reads(&device, 29, &noise(4));
    write(&device, 61, &noise(5));
    assert_reads(&device, 61, &noise(5));
    close(&device);
    let again = open(kind);
    assert_eq!(size(&again), 64 * MIB);
    assert_reads(&again, 61, &noise(5));
    close(&again);
}

fn a_killed_process_leaves_a_disk_that_is_opened_again(kind: &str) {
    let device = open(kind);
    write(&device, 2, &noise(3));
    let process = info(&device)["pid"].as_u64().unwrap();
    sh(&format!("kill -9 {process}"));
    wait_until("the process to end", || !Path::new(&format!("/proc/{process}")).exists());
    let running = nacre("close", &[&device]);
    assert_eq!(running.status.code(), Some(4), "{}", said(&running));
    wait_until("the device to go", || !is_there(&device));
    let again = open(kind);
    assert_reads(&again, 2, &noise(3));
    close(&again);
    if kind == "ublk" {
        let left = nacre_sys::ublk::Control::open().unwrap().ours().unwrap();
        assert!(left.is_empty(), "what the killed process left was not deleted: {left:?}");
    }
}

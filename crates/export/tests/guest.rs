//! The front ends that this machine's kernel may not have, in a guest with Debian's 6.12 kernel: ublk and the kernel's NBD client, with
//! a real filesystem, trims, damage, a server that is killed, and the choice among what there is. One boot for all.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "what fails here fails the test; the lints know only tests of the standard harness"
)]

mod common;

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Command, ExitCode},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use common::{FileStore, noise, sh, try_sh};
use nacre_core::BlockStore as _;
use nacre_export::{
    FrontEnd, Served,
    kernel::{Chosen, DeviceOptions, Kind, Ublk, best, cleanup_ublk},
};
use nacre_testkit::qemu::Guest;

const MIB: u64 = 1 << 20;

/// What is done in the guest.
const CASES: &[(&str, fn())] = &[
    ("memory", threads_are_marked),
    // First, since it unloads modules.
    ("best", choice),
    ("ublk", || filesystem(Kind::Ublk)),
    ("ublk_damage", || damage(Kind::Ublk)),
    ("ublk_small", || small_blocks(Kind::Ublk)),
    ("ublk_killed", ublk_killed),
    ("nbd", || filesystem(Kind::Nbd)),
    ("nbd_damage", || damage(Kind::Nbd)),
    ("nbd_killed", nbd_killed),
    ("nbd_grows", nbd_grows),
    ("ublk_grows", ublk_does_not_grow),
    // Last, since they leave devices.
    ("ublk_dropped", || dropped(Kind::Ublk)),
    ("nbd_dropped", || dropped(Kind::Nbd)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("in-guest") => in_guest(),
        Some("serve") => serve(arguments.get(2).map_or("", String::as_str)),
        _ => nacre_testkit::harness::run(&[("devices_of_a_guests_kernel", devices_of_a_guests_kernel)]),
    }
}

fn devices_of_a_guests_kernel() {
    let Some(mut guest) = Guest::new() else { return };
    guest.program("bin/test-program", &std::env::current_exe().unwrap());
    for program in ["mkfs.ext4", "e2fsck", "resize2fs", "blkdiscard", "fstrim"] {
        if !guest.installed(program) {
            return;
        }
    }
    for module in ["ublk_drv", "nbd", "loop"] {
        guest.module(module);
    }
    let said = guest.run("uname -r; test-program in-guest", Duration::from_secs(300));
    println!("the guest took {:?}", said.took);
    assert_eq!(said.status, Some(0), "{}", said.console);
    for (name, _) in CASES {
        assert!(said.console.contains(&format!("PASSED {name} ")), "{name}: {}", said.console);
    }
}

/// Runs in the guest.
fn in_guest() -> ExitCode {
    for (name, case) in CASES {
        let began = Instant::now();
        case();
        println!("PASSED {name} in {:?}", began.elapsed());
    }
    ExitCode::SUCCESS
}

fn threads_are_marked() {
    thread::spawn(|| {
        nacre_sys::memory::become_io_flusher().unwrap();
        assert!(thread::spawn(nacre_sys::memory::is_io_flusher).join().unwrap());
    })
    .join()
    .unwrap();
}

struct Setup {
    store: Arc<FileStore>,
    front_end: Box<dyn FrontEnd>,
    device: String,
}

fn setup(kind: Kind, size: u64, block_size: u32) -> Setup {
    let _ = fs::remove_file("/tmp/store");
    let store = Arc::new(FileStore::create(Path::new("/tmp/store"), size));
    let options = DeviceOptions { block_size, ..DeviceOptions::new("/tmp/run") };
    let front_end = kind.start(store.clone(), &options).unwrap();
    let device = front_end.device();
    let name = Path::new(&device).file_name().unwrap().to_str().unwrap();
    let queue =
        |what: &str| fs::read_to_string(format!("/sys/class/block/{name}/queue/{what}")).unwrap().trim().to_owned();
    assert_eq!(queue("logical_block_size"), block_size.to_string());
    assert_eq!(queue("write_cache"), "write back");
    assert_eq!(queue("fua"), "1");
    assert_ne!(queue("discard_max_bytes"), "0");
    Setup { store, front_end, device }
}

fn filesystem(kind: Kind) {
    let Setup { store, mut front_end, device } = setup(kind, 64 * MIB, 4096);
    sh(&format!("mkfs.ext4 -q -E nodiscard {device} && mount -t ext4 {device} /mnt"));
    for file in 0..8_u64 {
        let mut written = fs::File::create(format!("/mnt/f{file}")).unwrap();
        written.write_all(&noise(file, 100_000 * file as usize + 1)).unwrap();
        written.sync_all().unwrap();
    }
    let flushes = store.flushes.load(Ordering::SeqCst);
    assert!(flushes >= 8, "{flushes}");
    sh(&format!("umount /mnt && mount -t ext4 {device} /mnt"));
    for file in 0..8_u64 {
        assert!(fs::read(format!("/mnt/f{file}")).unwrap() == noise(file, 100_000 * file as usize + 1), "file {file}");
    }
    sh("rm /mnt/f[4-7] && sync && /usr/bin/fstrim /mnt");
    let trimmed = store.trimmed.load(Ordering::SeqCst);
    assert!(trimmed > 20 * MIB, "{trimmed}");

    // What is in use is not stopped, however often that is tried, and another works beside it.
    assert_eq!(front_end.users(), ["mounted on /mnt"]);
    for round in 0..2 {
        let error = front_end.stop().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().contains("mounted on /mnt") && !front_end.has_ended(), "{error}");
        fs::write(format!("/mnt/still{round}"), noise(9, 10_000)).unwrap();
        sh("sync && echo 3 > /proc/sys/vm/drop_caches");
        assert!(fs::read(format!("/mnt/still{round}")).unwrap() == noise(9, 10_000));
    }
    requests(kind);
    // Once nobody uses it any more, it is.
    sh(&format!("umount /mnt && e2fsck -fn {device}"));
    let flushes = store.flushes.load(Ordering::SeqCst);
    front_end.stop().unwrap();
    assert!(store.flushes.load(Ordering::SeqCst) > flushes && front_end.has_ended());
    front_end.stop().unwrap();
}

/// A front end that is dropped while its device is mounted: it goes on being served until the process ends.
fn dropped(kind: Kind) {
    let Setup { store, front_end, device } = setup(kind, 16 * MIB, 4096);
    sh(&format!("mkfs.ext4 -q -E nodiscard {device} && mount -t ext4 {device} /mnt"));
    drop(front_end);
    fs::write("/mnt/still", noise(9, 10_000)).unwrap();
    let flushes = store.flushes.load(Ordering::SeqCst);
    sh(&format!("sync && umount /mnt && e2fsck -fn {device}"));
    assert!(store.flushes.load(Ordering::SeqCst) > flushes);
}

fn requests(kind: Kind) {
    let Setup { store, mut front_end, device } = setup(kind, 16 * MIB, 4096);
    let file = fs::OpenOptions::new().read(true).write(true).open(&device).unwrap();
    file.write_all_at(&noise(1, 4 << 20), 0).unwrap();
    file.sync_all().unwrap();
    sh(&format!("/usr/bin/blkdiscard -o 1048576 -l 1048576 {device}"));
    assert_eq!(store.trimmed.load(Ordering::SeqCst), MIB);
    sh(&format!("/usr/bin/blkdiscard -z -o 2097152 -l 1048576 {device}"));
    let mut expected = noise(1, 4 << 20);
    expected[1 << 20..3 << 20].fill(0);
    let mut read = vec![0; 4 << 20];
    store.read_at(0, &mut read).unwrap();
    assert!(read == expected);
    // Written and not synced: the end writes it out.
    file.write_all_at(&noise(2, 100_000), 8 << 20).unwrap();
    drop(file);
    front_end.stop().unwrap();
    let mut read = vec![0; 102_400];
    store.read_at(8 << 20, &mut read).unwrap();
    assert!(read.get(..100_000).unwrap() == noise(2, 100_000));
    if kind == Kind::Ublk {
        assert!(!Path::new(&device).exists());
    }
}

fn damage(kind: Kind) {
    let Setup { store, mut front_end, device } = setup(kind, 16 * MIB, 4096);
    store.damaged.lock().unwrap().insert(1000);
    let file = fs::File::open(&device).unwrap();
    let mut page = vec![0; 4096];
    let error = file.read_exact_at(&mut page, 1000 * 4096).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    file.read_exact_at(&mut page, 3000 * 4096).unwrap();
    drop(file);
    front_end.stop().unwrap();
}

fn small_blocks(kind: Kind) {
    let Setup { store, mut front_end, device } = setup(kind, 16 * MIB, 512);
    fs::write("/tmp/data", noise(3, 1536)).unwrap();
    sh(&format!("dd if=/tmp/data of={device} bs=512 seek=7 oflag=direct conv=notrunc 2>&1"));
    let mut read = vec![0; 8192];
    store.read_at(0, &mut read).unwrap();
    let mut expected = vec![0; 8192];
    expected[7 * 512..10 * 512].copy_from_slice(&noise(3, 1536));
    assert!(read == expected);
    front_end.stop().unwrap();
}

/// Serves until it is killed.
fn serve(kind: &str) -> ExitCode {
    let store: Served = Arc::new(FileStore::create(Path::new("/tmp/killed"), 16 * MIB));
    let kind = if kind == "ublk" { Kind::Ublk } else { Kind::Nbd };
    let mut front_end = kind.start(store, &DeviceOptions::new("/tmp/run")).unwrap();
    fs::write("/tmp/device", front_end.device()).unwrap();
    fs::rename("/tmp/device", "/tmp/ready").unwrap();
    let _ = front_end.wait();
    ExitCode::SUCCESS
}

/// Starts a server, mounts its device, and kills it; its device.
fn killed(kind: &str) -> String {
    let _ = fs::remove_file("/tmp/ready");
    let mut server = Command::new("/bin/test-program").args(["serve", kind]).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !Path::new("/tmp/ready").exists() {
        assert!(Instant::now() < end, "the server did not start");
        thread::sleep(Duration::from_millis(20));
    }
    let device = fs::read_to_string("/tmp/ready").unwrap();
    sh(&format!("mkfs.ext4 -q {device} && mount -t ext4 {device} /mnt && echo x > /mnt/x"));
    server.kill().unwrap();
    server.wait().unwrap();
    let _ = try_sh("umount /mnt || umount -l /mnt");
    device
}

fn ublk_killed() {
    let device = killed("ublk");
    let number = device.trim_start_matches("/dev/ublkb");
    let end = Instant::now() + Duration::from_secs(20);
    while Path::new(&format!("/dev/ublkc{number}")).exists() {
        assert!(Instant::now() < end, "the device of the killed server stays");
        cleanup_ublk().unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    // A living one is none of its business.
    let Setup { mut front_end, device, .. } = setup(Kind::Ublk, 16 * MIB, 4096);
    cleanup_ublk().unwrap();
    assert_eq!(fs::read(device).unwrap().len() as u64, 16 * MIB);
    front_end.stop().unwrap();
}

fn nbd_killed() {
    let device = killed("nbd");
    let name = Path::new(&device).file_name().unwrap().to_owned();
    let end = Instant::now() + Duration::from_secs(20);
    while Path::new("/sys/class/block").join(&name).join("pid").exists() {
        assert!(Instant::now() < end, "the device of the killed server stays connected");
        thread::sleep(Duration::from_millis(50));
    }
    let Setup { mut front_end, device: again, .. } = setup(Kind::Nbd, 16 * MIB, 4096);
    assert_eq!(fs::read(again).unwrap().len() as u64, 16 * MIB);
    front_end.stop().unwrap();
}

/// Bytes of the device, as the kernel has it.
fn size(device: &str) -> u64 {
    let name = Path::new(device).file_name().unwrap().to_str().unwrap();
    512 * fs::read_to_string(format!("/sys/class/block/{name}/size")).unwrap().trim().parse::<u64>().unwrap()
}

fn nbd_grows() {
    for block_size in [4096, 512] {
        let Setup { store, mut front_end, device } = setup(Kind::Nbd, 16 * MIB, block_size);
        sh(&format!("mkfs.ext4 -q -E nodiscard {device} && mount -t ext4 {device} /mnt && echo before > /mnt/before"));
        store.grow(48 * MIB);
        front_end.resized().unwrap();
        assert_eq!(size(&device), 48 * MIB);
        // A filesystem that is mounted grows into it, and what is written there comes back from the store.
        sh(&format!("resize2fs {device} 2>&1"));
        fs::write("/mnt/large", noise(7, 17 << 20)).unwrap();
        sh("sync && echo 3 > /proc/sys/vm/drop_caches");
        assert!(fs::read("/mnt/large").unwrap() == noise(7, 17 << 20));
        assert_eq!(fs::read_to_string("/mnt/before").unwrap(), "before\n");
        sh(&format!("umount /mnt && e2fsck -fn {device}"));
        let file = fs::OpenOptions::new().read(true).write(true).open(&device).unwrap();
        file.write_all_at(&noise(8, 4096), 48 * MIB - 4096).unwrap();
        file.sync_all().unwrap();
        let mut read = [0; 4096];
        store.read_at(48 * MIB - 4096, &mut read).unwrap();
        assert!(read == *noise(8, 4096));
        drop(file);
        // As many sectors as 32 bits do not count.
        store.grow(1 << 42);
        front_end.resized().unwrap();
        assert_eq!(size(&device), 1 << 42);
        front_end.stop().unwrap();
    }
}

fn ublk_does_not_grow() {
    let Setup { store, mut front_end, device } = setup(Kind::Ublk, 16 * MIB, 4096);
    store.grow(48 * MIB);
    let error = front_end.resized().unwrap_err();
    assert!(error.kind() == io::ErrorKind::Unsupported && error.to_string().contains("opened again"), "{error}");
    assert_eq!(size(&device), 16 * MIB);
    assert_eq!(fs::read(&device).unwrap().len() as u64, 16 * MIB);
    front_end.stop().unwrap();
    let mut front_end = Kind::Ublk.start(store, &DeviceOptions::new("/tmp/run")).unwrap();
    assert_eq!(size(&front_end.device()), 48 * MIB);
    front_end.stop().unwrap();
}

/// What has a front end keeps its module loaded.
fn end(mut chosen: Chosen) {
    chosen.front_end.stop().unwrap();
}

fn choice() {
    let store: Served = Arc::new(FileStore::create(Path::new("/tmp/chosen"), 16 * MIB));
    let chosen = best(&store, &DeviceOptions::new("/tmp/run")).unwrap();
    assert_eq!((chosen.kind, chosen.passed_over.len()), (Kind::Ublk, 0));
    end(chosen);
    sh("rmmod ublk_drv");
    assert!(Ublk::start(store.clone(), &DeviceOptions::new("/tmp/run")).is_err());
    cleanup_ublk().unwrap();
    let chosen = best(&store, &DeviceOptions::new("/tmp/run")).unwrap();
    let reason = chosen.passed_over.first().unwrap().to_string();
    assert!(chosen.kind == Kind::Nbd && reason.contains("modprobe ublk_drv"), "{reason}");
    end(chosen);
    sh("rmmod nbd");
    let chosen = best(&store, &DeviceOptions::new("/tmp/run")).unwrap();
    let reasons: Vec<_> = chosen.passed_over.iter().map(ToString::to_string).collect();
    assert!(chosen.kind == Kind::FuseLoop && reasons.get(1).unwrap().contains("modprobe nbd"), "{reasons:?}");
    assert_eq!(fs::read(chosen.front_end.device()).unwrap().len() as u64, 16 * MIB);
    end(chosen);
    sh("insmod /modules/ublk_drv.ko && insmod /modules/nbd.ko");
}

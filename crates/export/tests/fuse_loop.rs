//! FUSE and loop on this machine's kernel: real filesystems, their checkers, trims, damage, and servers that are killed.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "what fails here fails the test; the lints know only tests of the standard harness"
)]

mod common;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use common::{FileStore, noise, sh, try_sh};
use nacre_export::{
    FrontEnd as _,
    kernel::{DeviceOptions, FuseLoop, StartError, cleanup_fuse},
};
use nacre_testkit::{require, root};

const MIB: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, command, run, file, size] = arguments.as_slice()
        && command == "serve"
    {
        return serve(Path::new(run), Path::new(file), size.parse().unwrap());
    }
    nacre_testkit::harness::run(&[
        ("ext4_is_made_used_trimmed_and_checked", ext4_is_made_used_trimmed_and_checked),
        ("xfs_and_btrfs_are_made_used_and_checked", xfs_and_btrfs_are_made_used_and_checked),
        ("a_flush_and_a_discard_reach_the_store", a_flush_and_a_discard_reach_the_store),
        ("requests_of_512_bytes_are_served", requests_of_512_bytes_are_served),
        ("a_damaged_block_is_an_io_error", a_damaged_block_is_an_io_error),
        ("a_device_in_use_is_not_taken_away", a_device_in_use_is_not_taken_away),
        (
            "a_device_in_use_is_served_after_its_front_end_was_dropped",
            a_device_in_use_is_served_after_its_front_end_was_dropped,
        ),
        ("a_killed_server_is_cleaned_up_after", a_killed_server_is_cleaned_up_after),
        ("a_detached_device_ends_the_wait", a_detached_device_ends_the_wait),
        ("two_servers_do_not_share_a_directory", two_servers_do_not_share_a_directory),
        ("a_read_only_device_takes_no_writes", a_read_only_device_takes_no_writes),
        ("without_root_there_is_a_clean_error", without_root_there_is_a_clean_error),
    ])
}

/// What a killed server is: it prints its device and waits.
fn serve(run: &Path, file: &Path, size: u64) -> ExitCode {
    let store = Arc::new(FileStore::create(file, size));
    match FuseLoop::start(store, &DeviceOptions::new(run)) {
        Ok(mut front_end) => {
            println!("device {}", front_end.device());
            front_end.wait().unwrap();
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("error {error}");
            ExitCode::FAILURE
        }
    }
}

struct Setup {
    directory: tempfile::TempDir,
    store: Arc<FileStore>,
    front_end: Option<FuseLoop>,
}

impl Setup {
    fn new(size: u64) -> Self {
        Self::with(size, |_| {})
    }

    fn with(size: u64, change: impl Fn(&mut DeviceOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FileStore::create(&directory.path().join("store"), size));
        let mut options = DeviceOptions::new(directory.path().join("run"));
        change(&mut options);
        let front_end = FuseLoop::start(store.clone(), &options).unwrap();
        fs::create_dir(directory.path().join("at")).unwrap();
        Self { directory, store, front_end: Some(front_end) }
    }

    fn device(&self) -> String {
        self.front_end.as_ref().unwrap().device()
    }

    fn at(&self) -> PathBuf {
        self.directory.path().join("at")
    }

    fn stop(mut self) {
        let flushes = self.store.flushes.load(Ordering::SeqCst);
        self.front_end.take().unwrap().stop().unwrap();
        assert!(self.store.flushes.load(Ordering::SeqCst) > flushes, "stopping flushes");
        assert!(!self.directory.path().join("run/mount").exists());
    }
}

/// `mkfs.btrfs` looks at every loop device of the machine, and another test may just have killed the server of one.
fn make_filesystem(line: &str) {
    for _ in 0..20 {
        match try_sh(line) {
            Err(error) if error.to_string().contains("cannot check mount status") => {
                std::thread::sleep(Duration::from_millis(500));
            }
            other => return drop(other.unwrap()),
        }
    }
    sh(line);
}

/// Makes a filesystem, writes files, mounts again, compares, and lets `check` judge.
fn round(setup: &Setup, make: &str, check: &str) {
    let (device, at) = (setup.device(), setup.at());
    make_filesystem(&format!("{make} {device}"));
    sh(&format!("mount {device} {}", at.display()));
    for file in 0..20_u64 {
        let mut written = fs::File::create(at.join(format!("f{file}"))).unwrap();
        written.write_all(&noise(file, 100_000 * file as usize + 1)).unwrap();
        written.sync_all().unwrap();
    }
    let flushes = setup.store.flushes.load(Ordering::SeqCst);
    assert!(flushes >= 20, "each fsync is a flush of the store: {flushes}");
    sh(&format!("umount {0} && mount {device} {0}", at.display()));
    for file in 0..20_u64 {
        let read = fs::read(at.join(format!("f{file}"))).unwrap();
        assert!(read == noise(file, 100_000 * file as usize + 1), "file {file}");
    }
    sh(&format!("umount {} && {check} {device}", at.display()));
}

fn ext4_is_made_used_trimmed_and_checked() {
    if !root() || require("mkfs.ext4").is_none() || require("fstrim").is_none() {
        return;
    }
    let setup = Setup::new(256 * MIB);
    round(&setup, "mkfs.ext4 -q -E nodiscard", "e2fsck -fn");
    let (device, at) = (setup.device(), setup.at());
    sh(&format!("mount {device} {0} && rm {0}/f1*", at.display()));
    let before = setup.store.trimmed.load(Ordering::SeqCst);
    let said = sh(&format!("sync -f {0} && fstrim -v {0}", at.display()));
    let trimmed = setup.store.trimmed.load(Ordering::SeqCst) - before;
    assert!(trimmed > 100 * MIB, "{trimmed} bytes were trimmed: {said}");
    sh(&format!("umount {} && e2fsck -fn {device}", at.display()));
    setup.stop();
}

fn xfs_and_btrfs_are_made_used_and_checked() {
    if !root() {
        return;
    }
    for (program, make, check, mounts) in [
        ("mkfs.xfs", "mkfs.xfs -q -f", "xfs_repair -n", "xfs"),
        ("mkfs.btrfs", "mkfs.btrfs -q -f", "btrfs check --force", "btrfs"),
    ] {
        if require(program).is_none() {
            continue;
        }
        // --force: it would look at all mounts of the machine, and fail for one that died in another test.
        // Whether this kernel can mount it is another question; making and checking it is a test of its own.
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default().contains(mounts)
            || try_sh(&format!("modprobe {mounts}")).is_ok();
        let setup = Setup::new(400 * MIB);
        if known {
            round(&setup, make, check);
        } else {
            sh(&format!("{make} {0} && {check} {0}", setup.device()));
        }
        setup.stop();
    }
}

fn a_flush_and_a_discard_reach_the_store() {
    if !root() || require("blkdiscard").is_none() {
        return;
    }
    let setup = Setup::new(64 * MIB);
    let device = setup.device();
    let mode = fs::metadata(setup.directory.path().join("run/mount")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "nobody else looks in");

    let mut file = fs::OpenOptions::new().read(true).write(true).open(&device).unwrap();
    file.write_all(&noise(1, 8 << 20)).unwrap();
    let before = setup.store.flushes.load(Ordering::SeqCst);
    file.sync_all().unwrap();
    assert!(setup.store.flushes.load(Ordering::SeqCst) > before);
    let mut read = vec![0; 8 << 20];
    nacre_core::BlockStore::read_at(&*setup.store, 0, &mut read).unwrap();
    assert!(read == noise(1, 8 << 20), "what was synced is in the store");

    sh(&format!("blkdiscard -o 1048576 -l 2097152 {device}"));
    assert_eq!(setup.store.trimmed.load(Ordering::SeqCst), 2 * MIB);
    sh(&format!("blkdiscard -z -o 4194304 -l 1048576 {device}"));
    let asked = setup.store.trimmed.load(Ordering::SeqCst) + setup.store.zeroed.load(Ordering::SeqCst);
    assert_eq!(asked, 3 * MIB, "zeroes are no data");
    file.read_exact_at(&mut read, 0).unwrap();
    let mut expected = noise(1, 8 << 20);
    expected[1 << 20..3 << 20].fill(0);
    expected[4 << 20..5 << 20].fill(0);
    assert!(read == expected);
    drop(file);
    setup.stop();
}

fn requests_of_512_bytes_are_served() {
    if !root() {
        return;
    }
    let setup = Setup::with(16 * MIB, |options| options.block_size = 512);
    let device = setup.device();
    assert_eq!(sh(&format!("blockdev --getss {device}")).trim(), "512");
    let data = setup.directory.path().join("data");
    fs::write(&data, noise(3, 1536)).unwrap();
    sh(&format!("dd if={} of={device} bs=512 seek=7 oflag=direct conv=notrunc status=none", data.display()));
    let mut read = vec![0; 8192];
    nacre_core::BlockStore::read_at(&*setup.store, 0, &mut read).unwrap();
    let mut expected = vec![0; 8192];
    expected[7 * 512..10 * 512].copy_from_slice(&noise(3, 1536));
    assert!(read == expected);
    setup.stop();
}

fn a_damaged_block_is_an_io_error() {
    if !root() {
        return;
    }
    let setup = Setup::new(16 * MIB);
    let device = setup.device();
    setup.store.damaged.lock().unwrap().insert(100);
    let read = |block: u64| try_sh(&format!("dd if={device} bs=4096 skip={block} count=1 iflag=direct of=/dev/null"));
    let error = read(100).unwrap_err().to_string();
    assert!(error.contains("Input/output error"), "{error}");
    read(99).unwrap();
    read(101).unwrap();
    setup.stop();
}

fn a_device_in_use_is_not_taken_away() {
    if !root() || require("mkfs.ext4").is_none() {
        return;
    }
    let mut setup = Setup::new(64 * MIB);
    let (device, at) = (setup.device(), setup.at());
    sh(&format!("mkfs.ext4 -q {device} && mount {device} {}", at.display()));
    let front_end = setup.front_end.as_mut().unwrap();
    assert_eq!(front_end.users(), [format!("mounted on {}", at.display())]);
    for round in 0..2 {
        let error = front_end.stop().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy);
        assert!(error.to_string().contains(&format!("mounted on {}", at.display())), "{error}");
        // It is served as before.
        fs::write(at.join(format!("x{round}")), noise(1, 100_000)).unwrap();
        sh(&format!("sync -f {}", at.display()));
    }
    sh(&format!("umount {} && e2fsck -fn {device}", at.display()));
    // Tried again, it goes; and then there is nothing left to do.
    front_end.stop().unwrap();
    front_end.stop().unwrap();
    assert!(front_end.has_ended());
    assert!(!setup.directory.path().join("run/mount").exists());
}

fn a_device_in_use_is_served_after_its_front_end_was_dropped() {
    if !root() || require("mkfs.ext4").is_none() {
        return;
    }
    let mut setup = Setup::new(64 * MIB);
    let (device, at) = (setup.device(), setup.at());
    sh(&format!("mkfs.ext4 -q {device} && mount {device} {}", at.display()));
    drop(setup.front_end.take());
    fs::write(at.join("x"), noise(1, 100_000)).unwrap();
    sh(&format!("sync -f {0} && umount {0} && e2fsck -fn {device}", at.display()));
    // And can be taken away by whoever comes next, once the process is gone: here it lives, and says so.
    let run = setup.directory.path().join("run");
    let error = cleanup_fuse(&run).unwrap_err().to_string();
    assert!(error.contains("another server runs in"), "{error}");
    sh(&format!("losetup -d {device} && umount {}/mount", run.display()));
    let end = Instant::now() + Duration::from_secs(5);
    while cleanup_fuse(&run).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    cleanup_fuse(&run).unwrap();
}

/// A server, killed when the test is done with it, however it went.
struct Server(Child);

impl Server {
    fn kill(&mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn child(run: &Path, file: &Path, size: u64) -> (Server, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg("serve")
        .args([run, file])
        .arg(size.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (Server(child), line.trim().to_owned())
}

fn a_killed_server_is_cleaned_up_after() {
    if !root() || require("mkfs.ext4").is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (run, file, at) = (directory.path().join("run"), directory.path().join("store"), directory.path().join("at"));
    fs::create_dir(&at).unwrap();
    let start = || {
        let (child, line) = child(&run, &file, 64 * MIB);
        let device = line.strip_prefix("device ").unwrap_or_else(|| panic!("{line}")).to_owned();
        (child, device)
    };
    let (mut first, device) = start();
    sh(&format!("mkfs.ext4 -q {device} && mount {device} {}", at.display()));
    fs::write(at.join("kept"), noise(5, 1_000_000)).unwrap();
    sh(&format!("sync -f {}", at.display()));
    fs::write(at.join("lost"), noise(6, 1_000_000)).unwrap();
    first.kill();

    // While the filesystem is mounted, nothing can be taken away, and the message says by whom.
    let error = cleanup_fuse(&run).unwrap_err().to_string();
    assert!(error.contains(&format!("{device} is in use: mounted on {}", at.display())), "{error}");
    let (second, line) = child(&run, &file, 64 * MIB);
    assert!(line.contains("error") && line.contains("mounted on"), "{line}");
    drop(second);
    sh(&format!("umount {}", at.display()));
    cleanup_fuse(&run).unwrap();
    assert!(!run.join("mount").exists());
    cleanup_fuse(&run).unwrap();
    cleanup_fuse(&directory.path().join("never was")).unwrap();

    // The next start cleans up by itself, and finds what was synced.
    let (mut third, _) = start();
    third.kill();
    let (mut fourth, device) = start();
    sh(&format!("e2fsck -fp {device}; mount {device} {}", at.display()));
    assert!(fs::read(at.join("kept")).unwrap() == noise(5, 1_000_000));
    sh(&format!("umount {}", at.display()));
    fourth.kill();
    cleanup_fuse(&run).unwrap();
    let left = sh("losetup -a; cat /proc/self/mounts");
    assert!(!left.contains(&*directory.path().to_string_lossy()), "{left}");
}

fn a_detached_device_ends_the_wait() {
    if !root() {
        return;
    }
    let mut setup = Setup::new(16 * MIB);
    let device = setup.device();
    let detach = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        sh(&format!("losetup -d {device}"));
    });
    assert!(!setup.front_end.as_ref().unwrap().has_ended());
    setup.front_end.as_mut().unwrap().wait().unwrap();
    assert!(setup.front_end.as_ref().unwrap().has_ended());
    detach.join().unwrap();
    setup.stop();
}

fn two_servers_do_not_share_a_directory() {
    if !root() {
        return;
    }
    let setup = Setup::new(16 * MIB);
    let options = DeviceOptions::new(setup.directory.path().join("run"));
    let error = FuseLoop::start(setup.store.clone(), &options).err().unwrap();
    assert!(error.to_string().contains("another server runs in"), "{error}");
    let read = fs::read(setup.device()).unwrap();
    assert_eq!(read.len() as u64, 16 * MIB);
    setup.stop();
}

fn a_read_only_device_takes_no_writes() {
    if !root() {
        return;
    }
    let setup = Setup::with(16 * MIB, |options| options.read_only = true);
    let device = setup.device();
    assert!(
        fs::OpenOptions::new()
            .write(true)
            .open(&device)
            .and_then(|mut file| file.write_all(&[1; 4096]).and_then(|()| file.sync_all()))
            .is_err()
    );
    assert_eq!(fs::read(&device).unwrap().len() as u64, 16 * MIB);
    setup.stop();
}

fn without_root_there_is_a_clean_error() {
    if !root() || require("setpriv").is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The program has to be where nobody may read it, too.
    let program = directory.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .arg("serve")
        .args([directory.path().join("run"), directory.path().join("store")])
        .arg((16 * MIB).to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("/dev/loop-control") && said.contains("needs root"), "{said}{output:?}");
    assert!(!directory.path().join("run").exists());
    let shape = FuseLoop::start(
        Arc::new(FileStore::create(&directory.path().join("odd"), 4096)),
        &DeviceOptions { block_size: 1024, ..DeviceOptions::new(directory.path().join("run")) },
    );
    assert!(matches!(shape.err().unwrap(), StartError::Shape { .. }));
}

//! Who reads from a filesystem does not see that it goes from one session to another, or from one process to another, or that the
//! process that serves it is killed.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod memory_tree;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use memory_tree::{MemoryTree, expected, fuse};
use nacre_sys::descriptors;
use nacre_sys::fuse::{Handover, Inode, Kind, Options, Parameters, ReadOnly, Session};
use nacre_testkit::harness;
use rustix::mount::UnmountFlags;

/// Makes a copy of this program serve what comes over the socket that is its standard input.
const SERVE: &str = "NACRE_TEST_SERVE";
/// The value of it with which reads of `slow` are never answered.
const STALL: &str = "stall";
/// Makes a copy of this program read from the mount that is its value, until the file that the second names is there.
const READ: &str = "NACRE_TEST_READ";
const STOP: &str = "NACRE_TEST_READ_STOP";
const NUMBER: &str = "NACRE_TEST_READ_NUMBER";

const SIZE: usize = 1 << 20;
const FILE: Inode = Inode(2);
const SLOW: Inode = Inode(3);
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);

fn main() -> ExitCode {
    if let Ok(how) = std::env::var(SERVE) {
        return serve(how == STALL);
    }
    if let Some(dir) = std::env::var_os(READ) {
        return read(Path::new(&dir));
    }
    harness::run(&[
        ("sessions_of_one_process_take_turns_unnoticed", sessions_of_one_process_take_turns_unnoticed),
        ("processes_take_turns_unnoticed", processes_take_turns_unnoticed),
        ("a_read_that_is_under_way_is_answered_first", a_read_that_is_under_way_is_answered_first),
        (
            "what_a_killed_process_had_read_is_answered_by_its_successor",
            what_a_killed_process_had_read_is_answered_by_its_successor,
        ),
        ("processes_are_killed_again_and_again_unnoticed", processes_are_killed_again_and_again_unnoticed),
        ("a_mount_dies_with_the_last_who_holds_it", a_mount_dies_with_the_last_who_holds_it),
    ])
}

/// The same in every process.
fn tree() -> MemoryTree {
    let mut tree = MemoryTree::new();
    assert_eq!(tree.file("file", SIZE as u64), FILE);
    assert_eq!(tree.file("slow", SIZE as u64), SLOW);
    let many = tree.directory(Inode::ROOT, "many");
    for number in 0..500 {
        tree.add(many, &format!("entry-{number}"), Kind::File, number);
    }
    tree
}

/// The other process: serves until it is told to hand over, or is killed.
fn serve(stall: bool) -> ExitCode {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (bytes, mut received) = descriptors::receive(&socket).unwrap();
    let parameters = Parameters::from_bytes(&bytes).unwrap();
    let handover = Handover { device: received.pop().unwrap(), parameters };
    let mut tree = tree();
    if stall {
        let socket = Mutex::new(socket.try_clone().unwrap());
        tree.hook = Box::new(move |read| {
            if read.inode == SLOW {
                descriptors::send(&socket.lock().unwrap(), b"arrived", &[]).unwrap();
                loop {
                    thread::park();
                }
            }
            Ok(())
        });
    }
    let session = Session::resume(&handover, THREADS, Arc::new(tree)).unwrap();
    drop(handover);
    descriptors::send(&socket, b"ready", &[]).unwrap();
    let (command, _) = descriptors::receive(&socket).unwrap();
    assert_eq!(command, b"hand over");
    let handover = session.hand_over();
    descriptors::send(&socket, &handover.parameters.to_bytes(), &[handover.device.as_fd()]).unwrap();
    ExitCode::SUCCESS
}

/// Another process that serves.
struct Server {
    child: Child,
    socket: UnixStream,
}

impl Server {
    fn start(handover: &Handover, how: &str) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut command = Command::new("/proc/self/exe");
        command.env(SERVE, how).stdin(std::os::fd::OwnedFd::from(theirs));
        let child = command.spawn().unwrap();
        descriptors::send(&socket, &handover.parameters.to_bytes(), &[handover.device.as_fd()]).unwrap();
        assert_eq!(descriptors::receive(&socket).unwrap().0, b"ready");
        Self { child, socket }
    }

    fn hand_over(mut self) -> Handover {
        descriptors::send(&self.socket, b"hand over", &[]).unwrap();
        let (bytes, mut received) = descriptors::receive(&self.socket).unwrap();
        assert!(self.child.wait().unwrap().success());
        Handover { device: received.pop().unwrap(), parameters: Parameters::from_bytes(&bytes).unwrap() }
    }

    fn kill(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already where it handed over.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mount(dir: &Path) -> Session {
    let options = Options { threads: THREADS, ..Options::default() };
    Session::mount(dir, &options, Arc::new(tree()) as Arc<dyn ReadOnly>).unwrap()
}

fn resume(handover: &Handover) -> Session {
    Session::resume(handover, THREADS, Arc::new(tree())).unwrap()
}

/// Processes that read and never rest, and fail at the first error. Not threads of this one: what forks while files of the mount are
/// open closes them in the child before it becomes another program, and a close may ask who serves.
struct Readers {
    children: Vec<(Child, ChildStdout)>,
    control: tempfile::TempDir,
}

impl Readers {
    fn start(dir: &Path) -> Self {
        let control = tempfile::tempdir().unwrap();
        let children = (0..3).map(|number| {
            let mut command = Command::new("/proc/self/exe");
            command.env(READ, dir).env(STOP, control.path().join("stop")).env(NUMBER, number.to_string());
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            let output = child.stdout.take().unwrap();
            (child, output)
        });
        Self { children: children.collect(), control }
    }

    /// Lets each of them go on for so many rounds.
    fn go_on(&mut self, rounds: usize) {
        for (_, output) in &mut self.children {
            output.read_exact(&mut vec![0; rounds]).expect("a reader failed");
        }
    }

    fn end(mut self) {
        fs::write(self.control.path().join("stop"), "").unwrap();
        for (child, output) in &mut self.children {
            std::io::copy(output, &mut std::io::sink()).unwrap();
            assert!(child.wait().unwrap().success(), "a reader failed");
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // Not waited for: after a test that failed, nobody may serve what they wait for.
        self.children.iter_mut().for_each(|(child, _)| _ = child.kill());
    }
}

/// One of them: a byte a round.
fn read(dir: &Path) -> ExitCode {
    let number = std::env::var(NUMBER).unwrap().parse().unwrap();
    let stop = PathBuf::from(std::env::var_os(STOP).unwrap());
    let right = expected(FILE, 0, SIZE);
    while !stop.exists() {
        read_once(dir, number, &right);
        std::io::stdout().write_all(b".").unwrap();
        std::io::stdout().flush().unwrap();
    }
    ExitCode::SUCCESS
}

fn read_once(dir: &Path, number: usize, right: &[u8]) {
    // One past the cache; the others drop what is in it.
    let direct = if number == 0 { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).custom_flags(direct).open(dir.join("file")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut bytes = vec![0; SIZE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == right, "other content than there should be");
    assert!(fs::metadata(dir.join(format!("absent-{number}"))).is_err());
    assert_eq!(fs::read_dir(dir.join("many")).unwrap().filter(|entry| entry.as_ref().is_ok()).count(), 500);
    assert_eq!(fs::metadata(dir.join("many/entry-77")).unwrap().size(), 77);
}

/// A directory to mount on. A test that fails leaves nobody waiting for answers.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Option<Self> {
        fuse().then(|| Self(tempfile::tempdir().unwrap()))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), UnmountFlags::FORCE | UnmountFlags::DETACH);
    }
}

fn sessions_of_one_process_take_turns_unnoticed() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let mut session = mount(path);
    let mut readers = Readers::start(path);
    for _ in 0..50 {
        readers.go_on(2);
        let handover = session.hand_over();
        session = resume(&handover);
    }
    readers.end();
    session.unmount().unwrap();
}

fn processes_take_turns_unnoticed() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let mut handover = mount(path).hand_over();
    let mut readers = Readers::start(path);
    for _ in 0..10 {
        let server = Server::start(&handover, "");
        readers.go_on(5);
        handover = server.hand_over();
    }
    let mut session = resume(&handover);
    readers.go_on(5);
    readers.end();
    session.unmount().unwrap();
}

fn a_read_that_is_under_way_is_answered_first() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let mut slow = tree();
    let arrived = Arc::new(AtomicBool::new(false));
    let tell = arrived.clone();
    slow.hook = Box::new(move |_| {
        tell.store(true, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    let session = Session::mount(path, &Options::default(), Arc::new(slow)).unwrap();
    let file = File::open(path.join("file")).unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = vec![0; 4096];
        file.read_exact_at(&mut bytes, 0).map(|()| (bytes, file))
    });
    while !arrived.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    let handover = session.hand_over();
    // Nobody serves now, not even the file's close.
    let (bytes, file) = reader.join().unwrap().unwrap();
    assert_eq!(bytes, expected(FILE, 0, 4096));
    let mut session = resume(&handover);
    drop(file);
    session.unmount().unwrap();
}

fn what_a_killed_process_had_read_is_answered_by_its_successor() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let handover = mount(path).hand_over();
    if !handover.parameters.can_resend() {
        nacre_testkit::skip("this kernel does not send FUSE requests again (Linux 6.9)");
        resume(&handover).unmount().unwrap();
        return;
    }
    let server = Server::start(&handover, STALL);
    // More than there are threads, so that some lie in the kernel's queue; through the cache and past it.
    let readers: Vec<_> = (0..8_usize)
        .map(|number| {
            let path = path.join("slow");
            thread::spawn(move || {
                let direct = if number % 2 == 0 { libc::O_DIRECT } else { 0 };
                let file = File::options().read(true).custom_flags(direct).open(path).unwrap();
                let offset = number * 100_000 / 4096 * 4096;
                let mut bytes = vec![0; 100_000];
                file.read_exact_at(&mut bytes, offset as u64).unwrap();
                assert!(bytes == expected(SLOW, offset as u64, 100_000), "reader {number} got something else");
            })
        })
        .collect();
    for _ in 0..THREADS.get() {
        assert_eq!(descriptors::receive(&server.socket).unwrap().0, b"arrived");
    }
    server.kill();
    thread::sleep(Duration::from_millis(200));
    assert!(readers.iter().all(|reader| !reader.is_finished()), "readers wait while nobody serves");
    let mut session = resume(&handover);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    session.unmount().unwrap();
}

fn processes_are_killed_again_and_again_unnoticed() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let handover = mount(path).hand_over();
    if handover.parameters.can_resend() {
        let mut readers = Readers::start(path);
        let mut rng = nacre_testkit::Rng::new(1);
        for _ in 0..20 {
            let server = Server::start(&handover, "");
            thread::sleep(Duration::from_millis(rng.below(60) as u64));
            server.kill();
        }
        let session = resume(&handover);
        readers.go_on(5);
        readers.end();
        drop(session.hand_over());
    }
    resume(&handover).unmount().unwrap();
}

fn a_mount_dies_with_the_last_who_holds_it() {
    let Some(place) = Place::new() else { return };
    let path = place.path();
    let session = mount(path);
    let kept = session.keep().unwrap();
    let parameters = session.parameters().clone();
    // As if the process had gone.
    drop(session.hand_over());
    let session = resume(&Handover { device: kept, parameters });
    assert_eq!(fs::read(path.join("file")).unwrap(), expected(FILE, 0, SIZE));
    drop(session.hand_over());
    let error = fs::read_dir(path.join("many")).map(drop).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    nacre_sys::fs::unmount(path).unwrap();
}

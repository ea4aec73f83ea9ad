//! What goes wrong in a filesystem reaches who asked and nobody else; what is in use is unmounted as it should be; the kernel keeps what
//! it was told.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod memory_tree;

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use memory_tree::{MemoryTree, Place, expected, fuse};
use nacre_sys::fs::is_mount_point;
use nacre_sys::fuse::{Ended, Errno, FuseError, Inode, Notifier, NotifyError, Open, Options};

/// Holds reads up until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<(bool, usize)>, Condvar)>);

impl Gate {
    fn pass(&self) {
        let mut state = self.0.0.lock().unwrap();
        state.1 += 1;
        self.0.1.notify_all();
        while !state.0 {
            state = self.0.1.wait(state).unwrap();
        }
    }

    /// Waits until so many have come.
    fn await_arrivals(&self, count: usize) {
        let mut state = self.0.0.lock().unwrap();
        while state.1 < count {
            let (next, result) = self.0.1.wait_timeout(state, Duration::from_secs(20)).unwrap();
            assert!(!result.timed_out(), "{} of {count} reads came", next.1);
            state = next;
        }
    }

    fn open(&self) {
        self.0.0.lock().unwrap().0 = true;
        self.0.1.notify_all();
    }
}

/// A tree with a file `slow`, whose reads wait for the gate, and `file`.
fn gated(open: Open) -> (MemoryTree, Gate, Inode, Inode) {
    let mut tree = MemoryTree::new();
    tree.open = open;
    let slow = tree.file("slow", 1 << 20);
    let file = tree.file("file", 1 << 20);
    let gate = Gate::default();
    let held = gate.clone();
    tree.hook = Box::new(move |read| {
        if read.inode == slow {
            held.pass();
        }
        Ok(())
    });
    (tree, gate, slow, file)
}

fn within(limit: Duration, what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn read_all(file: &File, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn cat(place: &Place, name: &str) -> Child {
    Command::new("cat").arg(place.path(name)).stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn errors_and_panics_reach_the_reader_and_nobody_else() {
    if !fuse() {
        return;
    }
    for open in [Open::Unneeded, Open::Direct] {
        let mut tree = MemoryTree::new();
        tree.open = open;
        let (bad, stale, panics) = (tree.file("bad", 1 << 20), tree.file("stale", 4096), tree.file("panics", 4096));
        let good = tree.file("good", 1 << 20);
        tree.hook = Box::new(move |read| match read.inode {
            inode if inode == bad && read.offset >= 1 << 19 => Err(Errno::IO),
            inode if inode == stale => Err(Errno::STALE),
            inode if inode == panics => panic!("as it should"),
            _ => Ok(()),
        });
        let place = Place::new(tree);
        let file = place.open("bad");
        assert_eq!(read_all(&file, 4096).unwrap(), expected(bad, 0, 4096));
        let error = file.read_at(&mut [0; 4096], 1 << 19).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let error = place.open("stale").read_at(&mut [0; 4096], 0).unwrap_err();
        // The cache knows one error only.
        let code = if open == Open::Direct { libc::ESTALE } else { libc::EIO };
        assert_eq!(error.raw_os_error().map(|found| found == code || found == libc::ESTALE), Some(true), "{error}");
        // More often than there are threads: each survives.
        for _ in 0..10 {
            let error = place.open("panics").read_at(&mut [0; 4096], 0).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
        assert_eq!(fs::read(place.path("good")).unwrap(), expected(good, 0, 1 << 20));
    }
}

#[test]
fn eight_readers_at_once_get_what_is_there() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let files: Vec<_> = (0..4).map(|number| (number, tree.file(&format!("file-{number}"), 8 << 20))).collect();
    let place = Place::new(tree);
    thread::scope(|scope| {
        for seed in 0..8 {
            let (files, place) = (&files, &place);
            scope.spawn(move || {
                let mut rng = nacre_testkit::Rng::new(seed);
                for _ in 0..200 {
                    let (number, inode) = *rng.pick(files);
                    let (offset, length) = (rng.below(8 << 20), 1 + rng.below(200_000));
                    let there = length.min((8 << 20) - offset);
                    let mut bytes = vec![0; there];
                    place.open(&format!("file-{number}")).read_exact_at(&mut bytes, offset as u64).unwrap();
                    assert!(bytes == expected(inode, offset as u64, there), "file-{number} at {offset}");
                }
            });
        }
    });
}

#[test]
fn a_slow_read_holds_up_no_other() {
    if !fuse() {
        return;
    }
    let (tree, gate, slow, file) = gated(Open::Unneeded);
    let place = Place::new(tree);
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(place.path("slow")).unwrap());
        gate.await_arrivals(1);
        assert_eq!(fs::read(place.path("file")).unwrap(), expected(file, 0, 1 << 20));
        assert!(!reader.is_finished());
        gate.open();
        assert_eq!(reader.join().unwrap(), expected(slow, 0, 1 << 20));
    });
}

#[test]
fn a_killed_reader_ends_before_its_answer_comes() {
    if !fuse() {
        return;
    }
    // Past the cache the request itself is waited for, which only its INTERRUPT ends; through it, a page.
    for open in [Open::Direct, Open::Unneeded] {
        let (tree, gate, slow, file) = gated(open);
        let place = Place::new(tree);
        let mut child = cat(&place, "slow");
        gate.await_arrivals(1);
        child.kill().unwrap();
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(10), "a killed reader waits on ({open:?})");
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(fs::read(place.path("file")).unwrap(), expected(file, 0, 1 << 20));
        gate.open();
        assert_eq!(fs::read(place.path("slow")).unwrap(), expected(slow, 0, 1 << 20));
    }
}

#[test]
fn a_signal_that_does_not_kill_fails_no_read() {
    if !fuse() {
        return;
    }
    let (tree, gate, _, _) = gated(Open::Direct);
    let place = Place::new(tree);
    // dd reports on SIGUSR1 and goes on, or fails if its read did.
    let mut command = Command::new("dd");
    command.arg(format!("if={}", place.path("slow").display())).args(["of=/dev/null", "bs=1M", "count=1"]);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    gate.await_arrivals(1);
    for _ in 0..3 {
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    gate.open();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1+0 records in"), "{said}");
}

#[test]
fn what_is_in_use_is_not_unmounted_unless_lazily() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let inode = tree.file("file", 1 << 20);
    let mut place = Place::new(tree);
    let file = place.open("file");
    let error = place.session.unmount().unwrap_err();
    assert!(
        matches!(&error, FuseError::Unmount { source, .. } if source.kind() == io::ErrorKind::ResourceBusy),
        "{error}"
    );
    assert_eq!(read_all(&file, 4096).unwrap(), expected(inode, 0, 4096));
    place.session.detach().unwrap();
    assert!(!is_mount_point(place.dir.path()).unwrap());
    assert_eq!(read_all(&file, 1 << 20).unwrap(), expected(inode, 0, 1 << 20));
    assert!(!place.session.is_ended());
    drop(file);
    assert_eq!(place.session.wait(), Ended::Unmounted);

    let mut place = Place::new(MemoryTree::new());
    place.session.unmount().unwrap();
    assert!(place.session.is_ended() && !is_mount_point(place.dir.path()).unwrap());
}

#[test]
fn an_unmount_by_others_ends_a_session_and_a_drop_unmounts() {
    if !fuse() {
        return;
    }
    let mut place = Place::new(MemoryTree::new());
    nacre_sys::fs::unmount(place.dir.path()).unwrap();
    assert_eq!(place.session.wait(), Ended::Unmounted);

    let mut tree = MemoryTree::new();
    tree.file("file", 1 << 20);
    let Place { session, dir, .. } = Place::new(tree);
    let file = File::open(dir.path().join("file")).unwrap();
    drop(session);
    assert!(!is_mount_point(dir.path()).unwrap());
    let error = read_all(&file, 1 << 20).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error}");
}

#[test]
fn what_was_stored_is_read_from_the_cache() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let size = (2 << 20) + 100;
    let inode = tree.file("file", size);
    let unseen = tree.file("unseen", 4096);
    let place = Place::new(tree);
    let notifier = place.session.notifier();
    let error = notifier.store(unseen, 0, &[0; 4096]).unwrap_err();
    assert!(matches!(error, NotifyError::Unknown(number) if number == unseen.0), "{error}");

    let file = place.open("file");
    let length = usize::try_from(size).unwrap();
    // Not aligned to what is stored at a time.
    notifier.store(inode, 4096, &expected(inode, 4096, length - 4096)).unwrap();
    notifier.store(inode, 0, &expected(inode, 0, 4096)).unwrap();
    assert_eq!(read_all(&file, length).unwrap(), expected(inode, 0, length));
    assert_eq!((place.tree.reads(), file.metadata().unwrap().len()), (0, size));
    notifier.invalidate(inode, 0, 0).unwrap();
    assert_eq!(read_all(&file, length).unwrap(), expected(inode, 0, length));
    assert!(place.tree.reads() > 0);

    drop(file);
    drop(place);
    assert!(matches!(notifier.store(inode, 0, &[0; 4096]), Err(NotifyError::Ended)));
}

#[test]
fn a_store_waits_for_the_read_of_its_pages_and_for_no_other() {
    if !fuse() {
        return;
    }
    let (tree, gate, slow, file) = gated(Open::Unneeded);
    let place = Place::new(tree);
    let notifier = place.session.notifier();
    let other = place.open("file");
    thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(place.path("slow")).unwrap());
        gate.await_arrivals(1);
        let start = Instant::now();
        notifier.store(file, 0, &expected(file, 0, 1 << 20)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(read_all(&other, 1 << 20).unwrap(), expected(file, 0, 1 << 20));
        let store = scope.spawn(|| notifier.store(slow, 0, &expected(slow, 0, 1 << 20)).unwrap());
        thread::sleep(Duration::from_millis(300));
        assert!(!store.is_finished(), "pages that are being read were not locked");
        gate.open();
        within(Duration::from_secs(10), "the store goes on", || store.is_finished());
        assert_eq!(reader.join().unwrap(), expected(slow, 0, 1 << 20));
    });
}

#[test]
fn a_thread_that_no_read_waits_for_may_store_what_is_read_next() {
    if !fuse() {
        return;
    }
    // Each read has the rest of the file stored, of which more is being read ahead: by one thread that serves, and one that stores.
    let mut tree = MemoryTree::new();
    let size = 16 << 20;
    let inode = tree.file("file", size);
    let (fetched, to_store) = mpsc::channel::<(Notifier, u64)>();
    tree.hook = Box::new(move |read| {
        let _ = fetched.send((read.notifier.unwrap().clone(), read.offset + read.size as u64));
        Ok(())
    });
    let storing = thread::spawn(move || {
        for (notifier, offset) in to_store {
            let length = usize::try_from(size.saturating_sub(offset)).unwrap().min(1 << 20);
            notifier.store(inode, offset, &expected(inode, offset, length)).unwrap();
        }
    });
    let place = Place::with(tree, Options { threads: NonZeroUsize::MIN, ..Options::default() });
    let bytes = fs::read(place.path("file")).unwrap();
    assert!(bytes == expected(inode, 0, usize::try_from(size).unwrap()));
    let Place { session, tree, .. } = place;
    drop(session);
    drop(tree);
    storing.join().unwrap();
}

#[test]
fn a_thread_that_stores_what_it_is_asked_for_waits_until_an_abort() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    let inode = tree.file("file", 1 << 20);
    tree.hook =
        Box::new(move |read| read.notifier.unwrap().store(inode, read.offset, &[0; 4096]).map_err(|_| Errno::IO));
    let mut place = Place::new(tree);
    thread::scope(|scope| {
        let path = place.path("file");
        let reader = scope.spawn(|| fs::read(path));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished(), "the page was not locked");
        place.session.abort().unwrap();
        assert!(reader.join().unwrap().is_err());
    });
    place.session.wait();
}

#[test]
fn files_that_are_read_past_the_cache_stay_out_of_it() {
    if !fuse() {
        return;
    }
    let mut tree = MemoryTree::new();
    tree.open = Open::Cached;
    let inode = tree.file("file", 1 << 20);
    let place = Place::new(tree);
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(place.path("file")).unwrap();
    for round in 1..3 {
        assert_eq!(read_all(&direct, 1 << 20).unwrap(), expected(inode, 0, 1 << 20));
        // A MiB is one request, or two where the reader's memory does not begin a page.
        assert!((round..=2 * round).contains(&place.tree.reads()), "{} reads", place.tree.reads());
    }
}

#[test]
fn an_abort_gives_who_waits_an_error() {
    if !fuse() {
        return;
    }
    let (tree, gate, _, _) = gated(Open::Unneeded);
    let mut place = Place::new(tree);
    thread::scope(|scope| {
        let path = place.path("slow");
        let reader = scope.spawn(|| fs::read(path));
        gate.await_arrivals(1);
        place.session.abort().unwrap();
        assert!(reader.join().unwrap().is_err());
        gate.open();
    });
    assert!(matches!(place.session.wait(), Ended::Aborted | Ended::Unmounted));
    assert!(!is_mount_point(place.dir.path()).unwrap());
}

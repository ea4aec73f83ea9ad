//! What several threads do to a filesystem, and what has to be there afterwards.
//!
//! Each thread has a directory. The content of a file follows from its number, which is its name up to the point, so whoever finds a file
//! knows what it has to hold. What may be there after a crash is remembered here, outside of the disk:
//!
//! - written and synced, or moved to its place and the directory synced: it is there, and whole
//! - renamed, and the directory not synced yet: one of its names is there, and whole
//! - removed, and the directory not synced yet: it is not there, or whole
//! - anything before: it may be anything
//!
//! A sync of a directory counts when it returned before the server was killed. After that it may return without an error and mean
//! nothing: XFS gives up its log when it fails, and finds then that it has nothing of the directory left to write. A sync of a file that
//! returns counts in any case, but on XFS, where the same was seen of a file: there it counts when it returned before the kill, and one
//! that returned after it is told where it was in vain.
//!
//! On btrfs a file that was renamed and removed was seen to come back under its first name, although the directory had been synced: with Linux
//! 6.18, and on a plain file instead of a disk, too. Whether its log replay does that, or something here expects too much, is not known. So
//! there a removed file has to be whole, and need not be gone.
//!
//! Beside its files each thread has one of many blocks, as a database has, which it overwrites in place: a block shows the version that
//! was last synced, or a later one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nacre_testkit::Rng;

use crate::common::noise;

const THREADS: u64 = 4;
/// Bytes that the files of a thread may have, roughly.
const QUOTA: u64 = 7 << 20;
/// The largest file.
const LONGEST: u64 = 1 << 20;
/// Blocks of the file that is overwritten in place.
const BLOCKS: u64 = 128;
const BLOCK: usize = 4096;
const DATABASE: &str = "database";

/// Where a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// There and whole, under this name.
    There(String),
    /// There and whole, under one of these names.
    Either(String, String),
    /// Gone, or whole under this name.
    Going(String),
    /// Anything.
    Anything,
}

/// What was done and found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    /// Times that fsync of a file or directory returned.
    pub(crate) synced: u64,
    files: u64,
    renamed: u64,
    removed: u64,
    blocks: u64,
    bytes: u64,
    /// Files and blocks that were compared after a crash.
    compared: u64,
}

impl Totals {
    fn each(&mut self, other: &Self, of: impl Fn(u64, u64) -> u64) {
        let Self { synced, files, renamed, removed, blocks, bytes, compared } = self;
        for (mine, theirs) in [
            (synced, other.synced),
            (files, other.files),
            (renamed, other.renamed),
            (removed, other.removed),
            (blocks, other.blocks),
            (bytes, other.bytes),
            (compared, other.compared),
        ] {
            *mine = of(*mine, theirs);
        }
    }

    /// What there is more than there was before.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        self.each(before, |now, before| now - before);
        self
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { synced, files, renamed, removed, blocks, bytes, compared } = self;
        write!(
            f,
            "{synced} syncs, {files} files, {renamed} renamed, {removed} removed, {blocks} blocks overwritten, {} MiB, {compared} compared",
            bytes >> 20
        )
    }
}

/// What filesystems do after a crash that they should not, whatever is beneath them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quirks {
    /// Removed files may come back, if whole.
    pub(crate) revives: bool,
    /// A sync of a file that returns after the kill may have been in vain.
    pub(crate) forgets: bool,
}

/// One thread's directory and what it has to hold.
struct Worker {
    directory: PathBuf,
    quirks: Quirks,
    /// Files whose sync returned after the kill.
    late: BTreeSet<u64>,
    files: BTreeMap<u64, State>,
    next: u64,
    live: u64,
    /// Of each block of the database the version that was synced, and those that were written since.
    versions: Vec<Vec<u64>>,
    /// The last version of any of them: none is written twice, whatever was lost.
    version: u64,
    totals: Totals,
}

/// An open directory.
struct Directory<'a> {
    file: File,
    stop: &'a AtomicBool,
}

impl Directory<'_> {
    /// An error also where nothing can be said of it, since the server was killed meanwhile.
    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()?;
        if self.stop.load(Ordering::SeqCst) { Err(io::Error::other("the server is gone")) } else { Ok(()) }
    }
}

/// All of them.
pub(crate) struct Load {
    workers: Vec<Worker>,
}

impl Load {
    pub(crate) fn new(at: &Path, quirks: Quirks) -> Self {
        let worker = |thread| Worker {
            directory: at.join(format!("thread{thread}")),
            quirks,
            late: BTreeSet::new(),
            files: BTreeMap::new(),
            // Numbers of several threads do not meet.
            next: thread << 32,
            live: 0,
            versions: Vec::new(),
            version: 1,
            totals: Totals::default(),
        };
        Self { workers: (0..THREADS).map(worker).collect() }
    }

    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for worker in &self.workers {
            totals.each(&worker.totals, |sum, more| sum + more);
        }
        totals
    }

    /// Writes for some time, and goes on until nothing can be written because of what `kill` did.
    pub(crate) fn run(&mut self, seed: u64, time: Duration, kill: impl FnOnce()) {
        let stop = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (thread, worker) in (0..).zip(&mut self.workers) {
                scope.spawn(move || {
                    let rng = &mut Rng::new(seed ^ thread);
                    let outcome = worker.work(rng, stop);
                    // The first error has to be the kill's.
                    if let Err(error) = outcome {
                        assert!(stop.load(Ordering::SeqCst), "{}: {error}", worker.directory.display());
                    }
                });
            }
            std::thread::sleep(time);
            // Before the kill: whoever sees an error then asks this.
            stop.store(true, Ordering::SeqCst);
            kill();
        });
    }

    /// Compares everything with what it has to be, and settles what could have been either.
    pub(crate) fn judge(&mut self) {
        self.workers.iter_mut().for_each(Worker::judge);
    }
}

impl Worker {
    fn work(&mut self, rng: &mut Rng, stop: &AtomicBool) -> io::Result<()> {
        if self.versions.is_empty() {
            self.found()?;
        }
        let directory = &Directory { file: File::open(&self.directory)?, stop };
        let database = OpenOptions::new().write(true).open(self.directory.join(DATABASE))?;
        // A thread goes on after the server was killed until it is told: a sync that returns has to be right even then.
        let mut after = 20;
        while after > 0 {
            match rng.below(12) {
                0..=2 => self.create(rng, None, stop)?,
                3..=5 => self.create(rng, Some(directory), stop)?,
                6 | 7 => self.rename(rng, directory)?,
                8 => self.remove(rng, directory)?,
                _ => self.overwrite(rng, &database)?,
            }
            while self.live > QUOTA {
                self.remove(rng, directory)?;
            }
            after -= i32::from(stop.load(Ordering::SeqCst));
        }
        Ok(())
    }

    /// Makes the directory and the database.
    fn found(&mut self) -> io::Result<()> {
        match fs::create_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        let mut file = File::create(self.directory.join(DATABASE))?;
        for number in 0..BLOCKS {
            file.write_all(&block(number, 1))?;
        }
        file.sync_all()?;
        File::open(&self.directory)?.sync_all()?;
        if let Some(parent) = self.directory.parent() {
            File::open(parent)?.sync_all()?;
        }
        self.versions = vec![vec![1]; usize::try_from(BLOCKS).unwrap()];
        Ok(())
    }

    fn create(&mut self, rng: &mut Rng, moved: Option<&Directory<'_>>, stop: &AtomicBool) -> io::Result<()> {
        let number = self.next;
        self.next += 1;
        let name = format!("{number}.0");
        let (first, data) = (if moved.is_some() { format!("{number}.new") } else { name.clone() }, content(number));
        self.files.insert(number, State::Anything);
        let mut file = File::create(self.directory.join(&first))?;
        for piece in data.chunks(1 + rng.below(200_000)) {
            file.write_all(piece)?;
        }
        file.sync_all()?;
        if stop.load(Ordering::SeqCst) {
            self.late.insert(number);
        }
        self.totals.synced += 1;
        self.files.insert(number, State::There(first.clone()));
        if let Some(directory) = moved {
            self.files.insert(number, State::Either(first.clone(), name.clone()));
            fs::rename(self.directory.join(first), self.directory.join(&name))?;
            self.sync(directory)?;
            self.files.insert(number, State::There(name));
        }
        self.totals.files += 1;
        self.totals.bytes += data.len() as u64;
        self.live += data.len() as u64;
        Ok(())
    }

    /// One of the files that are there.
    fn any(&self, rng: &mut Rng) -> Option<(u64, String)> {
        let there = self.files.iter().filter_map(|(number, state)| match state {
            State::There(name) => Some((*number, name.clone())),
            _ => None,
        });
        let there: Vec<_> = there.collect();
        (!there.is_empty()).then(|| rng.pick(&there).clone())
    }

    fn rename(&mut self, rng: &mut Rng, directory: &Directory<'_>) -> io::Result<()> {
        let Some((number, old)) = self.any(rng) else { return Ok(()) };
        let new = format!("{number}.{}", rng.below(1 << 20));
        if new == old {
            return Ok(());
        }
        self.files.insert(number, State::Either(old.clone(), new.clone()));
        fs::rename(self.directory.join(old), self.directory.join(&new))?;
        self.sync(directory)?;
        self.files.insert(number, State::There(new));
        self.totals.renamed += 1;
        Ok(())
    }

    fn remove(&mut self, rng: &mut Rng, directory: &Directory<'_>) -> io::Result<()> {
        let Some((number, name)) = self.any(rng) else { return Ok(()) };
        self.files.insert(number, State::Going(name.clone()));
        fs::remove_file(self.directory.join(name))?;
        self.live = self.live.saturating_sub(length(number));
        self.totals.removed += 1;
        // The next sync of the directory tells of it too.
        if rng.below(3) == 0 {
            self.sync(directory)?;
        }
        Ok(())
    }

    /// Whatever was removed is gone from now on.
    fn sync(&mut self, directory: &Directory<'_>) -> io::Result<()> {
        let going = |state: &State| matches!(state, State::Going(_));
        let removed: Vec<u64> =
            self.files.iter().filter(|(_, state)| going(state)).map(|(number, _)| *number).collect();
        directory.sync()?;
        self.totals.synced += 1;
        for number in removed {
            // Nobody knows it any more: were it there, it would be found as what should not be there.
            self.files.remove(&number);
        }
        Ok(())
    }

    fn overwrite(&mut self, rng: &mut Rng, database: &File) -> io::Result<()> {
        for _ in 0..1 + rng.below(16) {
            let number = rng.below(self.versions.len());
            let Some(versions) = self.versions.get_mut(number) else { continue };
            self.version += 1;
            versions.push(self.version);
            database.write_all_at(&block(number as u64, self.version), (number * BLOCK) as u64)?;
            self.totals.blocks += 1;
        }
        database.sync_data()?;
        self.totals.synced += 1;
        self.versions.iter_mut().for_each(|versions| _ = versions.drain(..versions.len() - 1));
        Ok(())
    }

    /// Compares, and leaves what is certain: what was not whole is removed, as a program would do that starts again.
    fn judge(&mut self) {
        let mut found: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        let listed = match fs::read_dir(&self.directory) {
            Ok(listed) => listed,
            Err(error) => return assert!(self.versions.is_empty(), "{}: {error}", self.directory.display()),
        };
        for entry in listed {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name != DATABASE {
                let number = name.split('.').next().unwrap().parse().unwrap();
                found.entry(number).or_default().push(name);
            }
        }
        self.live = 0;
        let late = std::mem::take(&mut self.late);
        for (number, state) in std::mem::take(&mut self.files) {
            let names = found.remove(&number).unwrap_or_default();
            if self.quirks.forgets && late.contains(&number) && !self.is_whole(number, &names) {
                println!("file {number} ({state:?}): its sync returned after the kill, and it is not whole");
                names.iter().for_each(|name| fs::remove_file(self.directory.join(name)).unwrap());
                continue;
            }
            if let Some(name) = self.settle(number, &state, &names) {
                self.live += length(number);
                self.files.insert(number, State::There(name));
            }
        }
        if self.quirks.revives {
            for (number, names) in std::mem::take(&mut found) {
                for name in names {
                    self.compare(number, &name, "removed");
                    fs::remove_file(self.directory.join(name)).unwrap();
                }
            }
        }
        // What was removed just now is forgotten, so it may not come back: all of the filesystem is written out, not a journal of it.
        rustix::fs::syncfs(File::open(&self.directory).unwrap()).unwrap();
        assert!(found.is_empty(), "{}: these were removed, and that was synced: {found:?}", self.directory.display());
        self.judge_database();
    }

    /// Where a file is now.
    fn settle(&mut self, number: u64, state: &State, names: &[String]) -> Option<String> {
        let at = self.directory.display();
        let name = match (state, names) {
            (State::There(expected), [name]) if name == expected => name,
            (State::Either(old, new), [name]) if name == old || name == new => name,
            (State::Going(old), [name]) if name == old => name,
            (State::Going(_), []) => return None,
            // Its removal was under way: it comes back as those do that are gone.
            (State::Going(_), [name]) if self.quirks.revives && *name == format!("{number}.new") => {
                self.compare(number, name, "removed");
                fs::remove_file(self.directory.join(name)).unwrap();
                return None;
            }
            (State::Anything, _) => {
                names.iter().for_each(|name| fs::remove_file(self.directory.join(name)).unwrap());
                return None;
            }
            _ => panic!("{at}: file {number} has to be {state:?}, and these are there: {names:?}"),
        };
        self.compare(number, name, &format!("{state:?}"));
        Some(name.clone())
    }

    /// Whether a file is there under one name, and whole.
    fn is_whole(&self, number: u64, names: &[String]) -> bool {
        let [name] = names else { return false };
        fs::read(self.directory.join(name)).unwrap() == content(number)
    }

    /// The file is whole.
    fn compare(&mut self, number: u64, name: &str, state: &str) {
        let at = self.directory.display();
        let (read, expected) = (fs::read(self.directory.join(name)).unwrap(), content(number));
        let differs = read.iter().zip(&expected).position(|(read, expected)| read != expected);
        assert!(
            read.len() == expected.len() && differs.is_none(),
            "{at}/{name} ({state}) has {} bytes of {}, and differs from byte {differs:?} on",
            read.len(),
            expected.len()
        );
        self.totals.compared += 1;
    }

    fn judge_database(&mut self) {
        if self.versions.is_empty() {
            return;
        }
        let file = File::open(self.directory.join(DATABASE)).unwrap();
        for (number, versions) in (0..).zip(&mut self.versions) {
            let mut read = vec![0; BLOCK];
            file.read_exact_at(&mut read, number * BLOCK as u64).unwrap();
            let shown = u64::from_le_bytes(*read.first_chunk().unwrap());
            assert!(
                versions.contains(&shown) && read == block(number, shown),
                "{}: block {number} of the database shows version {shown}; the first of these was synced, the others written: {versions:?}",
                self.directory.display()
            );
            // What was written and lost has no place in the next round.
            *versions = vec![shown];
        }
        self.totals.compared += BLOCKS;
    }
}

/// Most files are small.
fn length(number: u64) -> u64 {
    let rng = &mut Rng::new(number);
    let longest = *rng.pick(&[100, 5000, 50_000, 50_000, 300_000, LONGEST]);
    1 + rng.next_u64() % longest
}

fn content(number: u64) -> Vec<u8> {
    noise(number, usize::try_from(length(number)).unwrap())
}

/// A block of the database: its version, and what follows from both.
fn block(number: u64, version: u64) -> Vec<u8> {
    let mut block = noise((number << 32) ^ version, BLOCK);
    block.splice(..8, version.to_le_bytes());
    block
}

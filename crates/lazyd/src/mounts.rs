//! The mounts of a daemon: made, shown, completed, unmounted, and gone on with.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nacre_guest::lazy::{self, Clients, Grant, Kept, KeptRecord, LazyImage, LazyMount, LazyOptions, LazyStore};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    Problem,
    completion::Completion,
    link::{Held, Link},
    protocol::{MountRequest, Mounted, Shown, ShownFailure},
};

/// How long the kernel may take to let go of what is unmounted and not in use.
const LET_GO: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(10);
/// Threads that hand mounts over.
const HAND_OVER: usize = 16;

/// What a successor needs to know of a mount, beside its files.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    name: String,
    options: LazyOptions,
    complete: bool,
    /// Its keys are its owner's only for a time. An earlier version's mounts had none that were.
    #[serde(default)]
    lent: bool,
    since: String,
    kept: KeptRecord,
}

struct Entry {
    record: Record,
    store: Arc<LazyStore>,
    mount: LazyMount,
    completion: Arc<Completion>,
    /// The process that it ends with.
    owner: Option<OwnedFd>,
    /// It is out of the tree, and served as long as somebody has files of it open.
    leaving: bool,
}

/// All of them.
pub(crate) struct Mounts {
    directory: PathBuf,
    clients: Arc<Clients>,
    link: Arc<Link>,
    next: AtomicU64,
    entries: Mutex<BTreeMap<u64, Entry>>,
    /// Where somebody is mounting just now.
    reserved: Mutex<Vec<PathBuf>>,
    /// Mounts with the same options share one.
    stores: Mutex<Vec<Weak<LazyStore>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mounts {
    pub(crate) fn new(directory: &Path, link: Arc<Link>) -> Self {
        Self {
            directory: directory.to_owned(),
            clients: Arc::default(),
            link,
            next: AtomicU64::new(1),
            entries: Mutex::default(),
            reserved: Mutex::default(),
            stores: Mutex::default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.entries).is_empty()
    }

    /// Mounts the image of a grant. Gives its number, and a [`Mounted`].
    pub(crate) fn mount(&self, request: MountRequest, files: Vec<OwnedFd>) -> anyhow::Result<(u64, Value)> {
        let mut files = files.into_iter();
        let grant = files.next().context("no grant came along")?;
        let owner = files.next();
        // Our own copy: whoever sent it may still have it open.
        let grant = Grant::from_file(&File::from(grant))?;
        let _reserved = request.target.as_deref().map(|target| self.reserve(target)).transpose()?;
        if let Some(target) = &request.target {
            see(target, request.seen)?;
        }
        anyhow::ensure!(request.options.directory == self.directory, "the request is for another store's daemon");
        // What an earlier daemon could not go on with, for one.
        lazy::clean(&self.directory)?;
        let store = self.store(request.options)?;
        let image = store.granted(&grant, &self.clients)?;
        let target = match request.target {
            Some(target) => target,
            None => image.own_target()?,
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let since = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let config = serde_json::to_value(&image.config)?;
        let held = || -> anyhow::Result<File> { Ok(grant.to_file()?) };
        anyhow::ensure!(!request.lent || owner.is_some(), "keys that were lent, and no process that they were lent to");
        let (options, complete, lent) = (store.options().clone(), request.complete, request.lent);
        let mut record = None;
        let mut keep = |kept: Kept| {
            let Kept { device, metadata, record: kept } = kept;
            let made = Record {
                name: grant.reference.clone(),
                options: options.clone(),
                complete,
                lent,
                since: since.clone(),
                kept,
            };
            let owner = owner.as_ref().map(OwnedFd::try_clone).transpose()?;
            let hold = || {
                let files = [held()?.into(), device, metadata].into_iter().chain(owner).collect();
                self.link.hold(id, Held { record: serde_json::to_value(&made)?, files })
            };
            hold().map_err(std::io::Error::other)?;
            record = Some(made);
            Ok(())
        };
        let mount = store.mount_kept(image, &target, request.front, &mut keep).inspect_err(|_| self.link.forget(id))?;
        let record = record.context("the mount was not kept")?;
        let mounted = Mounted {
            target: mount.target().to_owned(),
            front: mount.served().name().to_owned(),
            manifest: mount.image.manifest.to_string(),
            config,
        };
        let entry = Entry { record, store, mount, completion: Arc::default(), owner, leaving: false };
        if entry.record.complete {
            entry.completion.start(&entry.mount.image.reader)?;
        }
        lock(&self.entries).insert(id, entry);
        Ok((id, serde_json::to_value(mounted)?))
    }

    /// Nobody else mounts there meanwhile, and nothing of ours is mounted there.
    fn reserve(&self, target: &Path) -> anyhow::Result<Reserved<'_>> {
        let mut reserved = lock(&self.reserved);
        let here = lock(&self.entries).values().any(|entry| !entry.leaving && entry.mount.target() == target);
        if here || reserved.iter().any(|other| other == target) {
            return Err(Problem::InUse(format!("{}: a lazy image is mounted there already", target.display())).into());
        }
        reserved.push(target.to_owned());
        Ok(Reserved { mounts: self, target: target.to_owned() })
    }

    /// The store with these options.
    fn store(&self, options: LazyOptions) -> anyhow::Result<Arc<LazyStore>> {
        let mut stores = lock(&self.stores);
        stores.retain(|store| store.strong_count() > 0);
        if let Some(store) = stores.iter().filter_map(Weak::upgrade).find(|store| *store.options() == options) {
            return Ok(store);
        }
        let store = Arc::new(LazyStore::open(options)?);
        stores.push(Arc::downgrade(&store));
        Ok(store)
    }

    /// Goes on with what a predecessor left.
    pub(crate) fn resume(&self, held: BTreeMap<u64, Held>) {
        self.next.store(held.keys().next_back().map_or(1, |last| last + 1), Ordering::Relaxed);
        for (id, held) in held {
            let name = held.record.pointer("/kept/target").and_then(Value::as_str).unwrap_or("?").to_owned();
            match self.resume_one(id, held) {
                Ok(entry) => drop(lock(&self.entries).insert(id, entry)),
                Err(error) => {
                    tracing::error!("{name}: a mount of the daemon that ended is given up: {error:#}");
                    self.link.forget(id);
                }
            }
        }
    }

    fn resume_one(&self, id: u64, held: Held) -> anyhow::Result<Entry> {
        let record: Record = serde_json::from_value(held.record.clone())?;
        let copies = held.borrowed().iter().map(|file| file.try_clone_to_owned()).collect::<Result<Vec<_>, _>>()?;
        // First of all: what fails from here on leaves it to us to forget.
        self.link.hold(id, held)?;
        let mut files = copies.into_iter();
        let mut next = || files.next().context("a file of it is missing");
        let (grant, device, metadata) = (next()?, next()?, next()?);
        let grant = Grant::from_file(&File::from(grant))?;
        let store = self.store(record.options.clone())?;
        let kept = Kept { device, metadata, record: record.kept.clone() };
        let mount = store.resume(&grant, &self.clients, kept)?;
        let completion = Arc::<Completion>::default();
        if record.complete {
            completion.start(&mount.image.reader)?;
        }
        Ok(Entry { record, store, mount, completion, owner: files.next(), leaving: false })
    }

    /// Takes what is mounted there out of the tree.
    pub(crate) fn unmount(&self, target: &Path) -> anyhow::Result<()> {
        self.take_away(self.at(target)?)
    }

    fn at(&self, target: &Path) -> anyhow::Result<u64> {
        let entries = lock(&self.entries);
        let mut here = entries.iter().filter(|(_, entry)| !entry.leaving && entry.mount.target() == target);
        let missing = || Problem::Missing(format!("{}: no lazy image is mounted there", target.display()));
        Ok(here.next().map(|(id, _)| *id).ok_or_else(missing)?)
    }

    /// The same, and serves it no more: its keys go, whoever has files of it open.
    pub(crate) fn cut(&self, target: &Path) -> anyhow::Result<()> {
        self.cut_one(self.at(target)?)
    }

    fn cut_one(&self, id: u64) -> anyhow::Result<()> {
        let Some(mut entry) = lock(&self.entries).remove(&id) else { return Ok(()) };
        let left = entry.leave();
        tracing::warn!("{}: its keys are given up", entry.mount.target().display());
        self.end(id, Some(entry));
        left
    }

    pub(crate) fn unmount_one(&self, id: u64) {
        if let Err(error) = self.take_away(id) {
            tracing::error!("{error:#}; it stays mounted");
        }
    }

    fn take_away(&self, id: u64) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            {
                let mut entries = lock(&self.entries);
                let Some(entry) = entries.get_mut(&id) else { return Ok(()) };
                entry.leave()?;
                if entry.mount.is_ended() {
                    let entry = entries.remove(&id);
                    drop(entries);
                    self.end(id, entry);
                    return Ok(());
                }
            }
            if begin.elapsed() >= LET_GO {
                // In use: it is served until nobody has a file of it open any more.
                return Ok(());
            }
            thread::sleep(STEP);
        }
    }

    fn end(&self, id: u64, entry: Option<Entry>) {
        drop(entry);
        self.link.forget(id);
    }

    /// Sees what others took away, and what nobody uses any more.
    pub(crate) fn look(&self) {
        let (mut ended, mut lost) = (Vec::new(), Vec::new());
        {
            let mut entries = lock(&self.entries);
            for (id, entry) in entries.iter_mut() {
                let orphaned = entry.owner.as_ref().is_some_and(has_ended);
                if orphaned && entry.record.lent {
                    lost.push(*id);
                    continue;
                }
                if !entry.leaving
                    && (orphaned || !entry.mount.is_mounted())
                    && let Err(error) = entry.leave()
                {
                    tracing::warn!("{}: {error:#}", entry.mount.target().display());
                }
                if entry.leaving && entry.mount.is_ended() {
                    ended.push(*id);
                }
            }
        }
        for id in lost {
            if let Err(error) = self.cut_one(id) {
                tracing::warn!("{error:#}");
            }
        }
        for id in ended {
            let entry = lock(&self.entries).remove(&id);
            self.end(id, entry);
        }
    }

    /// At the end of the process: who still has files open gets errors.
    pub(crate) fn unmount_all(&self) {
        let all: Vec<u64> = lock(&self.entries).keys().copied().collect();
        for id in &all {
            if let Some(entry) = lock(&self.entries).get_mut(id)
                && let Err(error) = entry.leave()
            {
                tracing::error!("{}: {error:#}", entry.mount.target().display());
            }
        }
        let begin = Instant::now();
        while begin.elapsed() < LET_GO && !lock(&self.entries).values().all(|entry| entry.mount.is_ended()) {
            thread::sleep(STEP);
        }
        for id in all {
            let entry = lock(&self.entries).remove(&id);
            self.end(id, entry);
        }
    }

    /// Fetches all of an image.
    pub(crate) fn complete(&self, what: &str) -> anyhow::Result<()> {
        let found: Vec<_> = {
            let entries = lock(&self.entries);
            let is = |entry: &&Entry| {
                !entry.leaving && (entry.mount.target() == Path::new(what) || entry.record.name == what)
            };
            let parts = |entry: &Entry| (Arc::clone(&entry.completion), Arc::clone(&entry.mount.image.reader));
            entries.values().filter(is).map(parts).collect()
        };
        if found.is_empty() {
            return Err(Problem::Missing(format!("{what}: no lazy image is mounted there, nor by that name")).into());
        }
        found.iter().try_for_each(|(completion, reader)| completion.run(&**reader))
    }

    /// All mounts, as [`Shown`].
    pub(crate) fn list(&self) -> anyhow::Result<Value> {
        // What was unmounted a moment ago is not shown, unless it is in use.
        self.look();
        if lock(&self.entries).values().any(|entry| entry.leaving) {
            thread::sleep(STEP);
            self.look();
        }
        let entries = lock(&self.entries);
        let shown: Vec<Shown> = entries.values().map(Entry::show).collect();
        Ok(serde_json::to_value(shown)?)
    }

    /// Whether the kernel would send again what this process has not answered.
    pub(crate) fn can_be_killed(&self) -> bool {
        lock(&self.entries).values().all(|entry| entry.record.kept.parameters.can_resend())
    }

    /// Leaves all mounts to a successor.
    pub(crate) fn hand_over(&self) {
        let entries = Mutex::new(std::mem::take(&mut *lock(&self.entries)));
        lock(&entries).values().for_each(|entry| entry.completion.stop());
        let one = || {
            let next = lock(&entries).pop_first();
            next.map(|(_, entry)| entry.mount.hand_over())
        };
        thread::scope(|scope| {
            // Each waits for its slowest answer. Where there are no threads, one after the other does.
            for _ in 0..HAND_OVER {
                let _ = thread::Builder::new().spawn_scoped(scope, || while one().is_some() {});
            }
            while one().is_some() {}
        });
    }
}

impl Entry {
    /// Takes it out of the tree.
    fn leave(&mut self) -> anyhow::Result<()> {
        if !self.leaving {
            self.mount.detach()?;
            self.completion.stop();
            self.leaving = true;
        }
        Ok(())
    }

    fn show(&self) -> Shown {
        let image: &LazyImage = &self.mount.image;
        let local = image.local(self.store.shared());
        let read = image.reader.failure().map(|failure| ShownFailure {
            at: OffsetDateTime::from(failure.at).format(&Rfc3339).unwrap_or_default(),
            reason: failure.reason,
        });
        Shown {
            name: self.record.name.clone(),
            manifest: image.manifest.to_string(),
            target: self.mount.target().to_owned(),
            front: self.mount.served().name().to_owned(),
            since: self.record.since.clone(),
            local_bytes: local.bytes,
            total_bytes: local.total,
            completing: self.completion.is_running(),
            complete: self.completion.is_done(),
            leaving: self.leaving,
            // RFC 3339 of one zone sorts by time.
            failure: read.max(self.completion.failure()),
        }
    }
}

/// Whether this program understands what its predecessor left.
pub(crate) fn readable(held: &BTreeMap<u64, Held>) -> anyhow::Result<()> {
    for held in held.values() {
        Record::deserialize(&held.record).context("what the daemon that ended says of a mount")?;
        let grant = held.files.first().context("a grant is missing")?.try_clone()?;
        Grant::from_file(&File::from(grant))?;
    }
    Ok(())
}

/// A place where somebody is mounting.
struct Reserved<'a> {
    mounts: &'a Mounts,
    target: PathBuf,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(&self.mounts.reserved).retain(|other| *other != self.target);
    }
}

/// Whether a path leads this process to where it leads whoever asks, who may be in another root directory.
fn see(target: &Path, seen: Option<(u64, u64)>) -> anyhow::Result<()> {
    let here = fs::metadata(target).with_context(|| target.display().to_string())?;
    if seen == Some((here.dev(), here.ino())) {
        return Ok(());
    }
    let text = "is another directory to the daemon that serves lazy images: use --foreground";
    Err(Problem::Usage(format!("{} {text}", target.display())).into())
}

/// Whether a process has.
fn has_ended(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    matches!(rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
}

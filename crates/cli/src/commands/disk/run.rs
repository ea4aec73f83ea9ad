//! A disk that this process runs, until it is told to end: by a signal, or by `close`.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::Context as _;
use nacre_anchor::AnchorSpec;
use nacre_attest::{
    client::{Agent, ClientError},
    eventlog::story::{Happening, Volume},
    evidence,
};
use nacre_core::BlockStore as _;
use nacre_disk::{AnchorWindow, Disk, OpenOptions};
use nacre_export::{FrontEnd, Served};
use nacre_sys::end::EndSignals;
use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;

use super::{
    control::{self, Refused, Reply, Request},
    info,
    key::{self, Lent, Source},
    metrics,
    rundir::{Record, RunDir, Slot},
    store::StoreName,
};
use crate::{
    args::{
        Global,
        disk::{RunDiskArgs, Window},
    },
    exit::{Damaged, InUse},
};

/// How often it is looked whether the device is still there, and as large as the disk.
const LOOK: Duration = Duration::from_millis(500);

/// A front end that was started.
pub(super) struct Started {
    pub(super) front_end: Box<dyn FrontEnd>,
    /// What people open.
    pub(super) devices: Vec<String>,
    /// Who uses the devices so that they cannot be taken away now.
    pub(super) users: fn(&[String]) -> Vec<String>,
}

/// Runs the disk on `store`: opens it, starts a front end, says that it is `ready`, and serves until the end.
pub(super) fn run(
    global: &Global,
    store: &str,
    args: &RunDiskArgs,
    start: impl FnOnce(Served, &Slot) -> anyhow::Result<Started>,
    ready: impl FnOnce(&[String], &Slot) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    // Before there are threads.
    nacre_sys::memory::share_one_heap();
    let end = EndSignals::hold()?;
    let run = RunDir::of(&args.run)?;
    let name = StoreName::parse(store)?;
    let slot = run.take(&name)?;
    let (disk, lent) = open(global, &name, args)?;
    let disk = Arc::new(disk);
    let lost = Lost::default();
    let agent = lent.map(|lent| lost.watch(lent)).transpose()?;
    let Started { front_end, devices, users } = start(disk.clone(), &slot)?;
    let record = Record { store: name.to_string(), devices, pid: std::process::id() };
    let closing = Arc::new(AtomicBool::new(false));
    let (tell, outcome) = mpsc::channel();
    let service = Service { disk: disk.clone(), record: record.clone(), users, closing: closing.clone(), outcome };
    let service = control::serve(&slot.socket(), move |request| service.answer(request))
        .with_context(|| format!("{}: the control socket", slot.socket().display()))?;
    if let Some(address) = args.metrics {
        // It is asked for as long as the process lives, which does not have to keep the store.
        let (disk, store) = (Arc::downgrade(&disk), record.store.clone());
        let text = move || disk.upgrade().map(|disk| text(&disk, &store)).unwrap_or_default();
        let address = metrics::serve(address, text).with_context(|| format!("--metrics {address}"))?;
        tracing::info!(%address, "metrics");
    }
    slot.announce(&record)?;
    ready(&record.devices, &slot)?;
    let running = Running { front_end, disk, record, users, closing: closing.clone(), tell: tell.clone(), lost };
    let result = running.until_end(&end, args.read_only);
    // Gives the lease back.
    drop(agent);
    let told = result.as_ref().map_err(Refused::of).copied();
    let heard = tell.send(Outcome { result: told, ended: true }).is_ok();
    // Whoever asked hears of it before the process ends, and that it has ended when the store is free again.
    let last = if heard && closing.load(Ordering::SeqCst) { service.join().ok() } else { None };
    drop(slot);
    drop(last);
    result
}

/// A disk with its front end.
struct Running {
    front_end: Box<dyn FrontEnd>,
    disk: Arc<Disk>,
    record: Record,
    users: fn(&[String]) -> Vec<String>,
    /// Somebody waits for the outcome of `close`.
    closing: Arc<AtomicBool>,
    tell: mpsc::Sender<Outcome>,
    lost: Lost,
}

/// Why the key has to be given up, when its lease has ended.
#[derive(Clone, Default)]
struct Lost(Arc<Mutex<Option<String>>>);

impl Lost {
    /// Keeps a lease, until it ends.
    fn watch(&self, lent: Lent) -> anyhow::Result<Agent> {
        let agent = Agent::start(lent.client).context("the thread that renews the key's lease")?;
        let lost = self.0.clone();
        let ended = move |error: &ClientError| {
            *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        };
        agent.keep(lent.lease, Box::new(ended));
        Ok(agent)
    }

    fn why(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Running {
    /// Serves until it is told to end and nobody uses the devices, or until they are taken away; then brings the disk into good order.
    fn until_end(mut self, end: &EndSignals, read_only: bool) -> anyhow::Result<()> {
        let mut size = self.disk.size();
        let stopped = loop {
            let told = end.wait_for(LOOK)?;
            if let Some(why) = self.lost.why() {
                // Also from under its users: whoever is not trusted any more keeps no key.
                tracing::error!("{}: {why}; the disk is closed and its key forgotten", self.devices());
                let stopped = self.front_end.stop();
                break Err(anyhow::Error::new(Damaged(why)).context(match stopped {
                    Ok(()) => "the disk was closed".to_owned(),
                    Err(error) => format!("the disk was closed under its users ({error})"),
                }));
            }
            if !told && !self.front_end.has_ended() {
                self.follow(&mut size);
                continue;
            }
            let gone = self.front_end.has_ended();
            if gone {
                tracing::warn!("{} was taken away; the disk is closed", self.devices());
            } else if let busy = (self.users)(&self.record.devices)
                && !busy.is_empty()
            {
                self.stay(format!("{} is in use: {}", self.devices(), busy.join(", ")));
                continue;
            }
            match self.front_end.stop() {
                // By what cannot be seen from here: another mount namespace has it mounted, or somebody did so this instant.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && !gone => self.stay(error.to_string()),
                stopped => break stopped.context("the front end did not end well"),
            }
        };
        drop(self.front_end);
        // Also after that: what was acknowledged is brought into good order.
        if !read_only {
            self.disk.shut()?;
        }
        stopped
    }

    fn devices(&self) -> String {
        self.record.devices.join(", ")
    }

    /// Makes the device as large as the disk.
    fn follow(&self, size: &mut u64) {
        let now = self.disk.size();
        if now != *size
            && let Err(error) = self.front_end.resized()
        {
            tracing::warn!(%error, "the disk has grown to {now} bytes, and its device has not");
        }
        *size = now;
    }

    /// Does not end: whoever has the device mounted would lose what is not written yet.
    fn stay(&self, why: String) {
        tracing::warn!("{why}; it stays");
        // Somebody mounted it after `close` had looked.
        if self.closing.swap(false, Ordering::SeqCst) {
            let _ = self.tell.send(Outcome { result: Err(Refused::of(&InUse(why).into())), ended: false });
        }
    }
}

fn open(global: &Global, name: &StoreName, args: &RunDiskArgs) -> anyhow::Result<(Disk, Option<Lent>)> {
    // What is not there is said before a key is asked for.
    let store = name.open(args.read_only)?;
    let source = Source::from(&args.key);
    let client = source.client(global)?;
    let (root, lent) = source.read_to_run(global, client.as_ref())?;
    let anchor = key::anchor(&args.anchor.anchor, &root, client.as_ref())?;
    let options = OpenOptions {
        memory: args.memory.0,
        read_only: args.read_only,
        window: match args.anchor_window {
            Window::EveryFlush => AnchorWindow::EveryFlush,
            Window::Every(time) => AnchorWindow::Every(time),
            Window::OnClose => AnchorWindow::OnClose,
        },
        discard: args.discard,
        accept_rollback: args.accept_rollback,
        ..OpenOptions::default()
    };
    let disk = Disk::open(store, &root, anchor, &options)?;
    if let Some(log) = client.as_ref().and_then(|client| client.runtime_log()) {
        log.record(&opened(&disk, &args.anchor.anchor))?;
    }
    Ok((disk, lent))
}

/// What a guest measures before the disk can be read by anybody.
fn opened(disk: &Disk, anchor: &AnchorSpec) -> Happening {
    let anchor = match anchor {
        AnchorSpec::None => "none",
        AnchorSpec::File(_) => "file",
        AnchorSpec::Tpm { .. } => "tpm",
        AnchorSpec::Broker(_) => "broker",
    };
    let (id, root) = (disk.info().uuid, evidence::hex(&disk.opened_at()));
    Happening::VolumeOpened(Volume { anchor: anchor.into(), id, protection: "disk".into(), root })
}

fn text(disk: &Disk, store: &str) -> String {
    let statistics = serde_json::to_value(disk.statistics()).unwrap_or_default();
    metrics::text(store, disk.size(), disk.info().used_blocks * 4096, &statistics)
}

/// What came of `close`.
struct Outcome {
    result: Result<(), Refused>,
    /// The disk does not run any more.
    ended: bool,
}

/// Answers commands.
struct Service {
    disk: Arc<Disk>,
    record: Record,
    users: fn(&[String]) -> Vec<String>,
    closing: Arc<AtomicBool>,
    outcome: mpsc::Receiver<Outcome>,
}

impl Service {
    fn answer(&self, request: Request) -> Reply {
        let result = match request {
            Request::Info => info::running(&self.disk, &self.record),
            Request::Grow { size } => self.grow(size),
            Request::Close => return self.close(),
        };
        Reply { result, last: false }
    }

    fn grow(&self, size: u64) -> anyhow::Result<Value> {
        self.disk.resize(size)?;
        info::running(&self.disk, &self.record)
    }

    fn close(&self) -> Reply {
        let users = (self.users)(&self.record.devices);
        if !users.is_empty() {
            let what = format!("{} is in use: {}", self.record.devices.join(", "), users.join(", "));
            return Reply { result: Err(InUse(what).into()), last: false };
        }
        self.closing.store(true, Ordering::SeqCst);
        // To the thread that waits for the end, which is the one that ends everything.
        if let Err(error) = kill_process(getpid(), Signal::TERM) {
            return Reply { result: Err(error).context("the process cannot be told to end"), last: false };
        }
        match self.outcome.recv() {
            Ok(Outcome { result, ended }) => {
                Reply { result: result.map(|()| Value::Null).map_err(Into::into), last: ended }
            }
            Err(_) => Reply { result: Err(anyhow::anyhow!("the process ends")), last: true },
        }
    }
}

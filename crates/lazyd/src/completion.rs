//! Fetching all of an image while it is in use.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use nacre_lazy::device::DeviceReader;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{Problem, protocol::ShownFailure};

/// How far that is.
#[derive(Default)]
pub(crate) struct Completion {
    running: AtomicUsize,
    stop: AtomicBool,
    done: AtomicBool,
    failure: Mutex<Option<ShownFailure>>,
}

impl Completion {
    /// In the background.
    pub(crate) fn start(self: &Arc<Self>, reader: &Arc<dyn DeviceReader>) -> anyhow::Result<()> {
        let (completion, reader) = (Arc::clone(self), Arc::clone(reader));
        let fetching = move || {
            if let Err(error) = completion.run(&*reader) {
                tracing::warn!("an image stays incomplete: {error:#}");
            }
        };
        Ok(thread::Builder::new().name("complete".into()).spawn(fetching).map(drop)?)
    }

    /// Until it is done.
    pub(crate) fn run(&self, reader: &dyn DeviceReader) -> anyhow::Result<()> {
        self.running.fetch_add(1, Ordering::SeqCst);
        let fetched = reader.complete(&mut |_| !self.stop.load(Ordering::SeqCst));
        self.running.fetch_sub(1, Ordering::SeqCst);
        if let Err(error) = fetched {
            let at = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
            let failure = ShownFailure { at, reason: error.to_string() };
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
            return Err(error.into());
        }
        if self.stop.load(Ordering::SeqCst) {
            return Err(Problem::InUse("the image was unmounted before all of it was fetched".into()).into());
        }
        self.done.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    pub(crate) fn failure(&self) -> Option<ShownFailure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

//! Layers, several at a time: what is in the store is kept, the rest is fetched, checked, applied and committed.

use std::{
    io::{self, Read},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use nacre_core::Digest;
use nacre_oci::{
    crypt::{LayerSecret, PublicOptions},
    layer::{LayerKey, LayerPlan, apply_layer},
    manifest::{Descriptor, MANIFEST_LIMIT},
    source::{ImageSource, TransportError},
    trust::Admission,
};
use rustix::fs::{Mode, OFlags};

use super::{Images, PullError, committer::Committer, now};
use crate::store::{Acquired, LayerGuard, LayerId, LayerRecord, Staging, StoreError, StoredLayer};

/// One layer of an image, and what it takes to get it.
pub(super) struct Plan {
    index: usize,
    descriptor: Descriptor,
    diff_id: Digest,
    key: Option<(LayerSecret, PublicOptions)>,
}

impl Plan {
    pub(super) fn new(
        index: usize,
        descriptor: &Descriptor,
        diff_id: Digest,
        key: Option<(LayerSecret, PublicOptions)>,
    ) -> Self {
        Self { index, descriptor: descriptor.clone(), diff_id, key }
    }

    /// The layer's name in the store.
    fn id(&self) -> LayerId {
        match &self.key {
            Some((secret, _)) => LayerId::Sealed(secret.bind(&self.diff_id)),
            None => LayerId::Content(self.diff_id),
        }
    }

    pub(super) fn stored(&self) -> StoredLayer {
        StoredLayer {
            digest: self.descriptor.digest,
            size: self.descriptor.size,
            media_type: self.descriptor.media_type.clone(),
            diff_id: self.diff_id,
            id: self.id(),
        }
    }

    fn error(&self, source: nacre_oci::layer::LayerError) -> PullError {
        PullError::Layer { index: self.index, digest: self.descriptor.digest, source }
    }
}

/// Brings all layers into the store, each once. Gives guards in the order of `plans`, and how many were fetched.
///
/// The admission is the licence to do so; the caller made `plans` of the manifest that it names.
pub(super) fn layers(
    images: &Images,
    source: &dyn ImageSource,
    plans: &[Plan],
    _admission: &Admission,
) -> Result<(Vec<LayerGuard>, usize), PullError> {
    let todo = work(plans);
    let job = Job {
        images,
        source,
        todo: &todo,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        error: Mutex::default(),
    };
    let mut present: Vec<(usize, LayerGuard)> = Vec::new();
    let workers = images.options.parallel.clamp(1, 16).min(todo.len());
    let fetched = thread::scope(|scope| {
        let committer = Committer::start(scope, &images.store);
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                let (job, sender) = (&job, committer.sender());
                scope.spawn(move || job.work(&sender))
            })
            .collect();
        for handle in handles {
            present.extend(handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        committer.finish()
    });
    if let Some(error) = job.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let fetched = fetched?;
    let count = fetched.len();
    present.extend(fetched);
    present.sort_by_key(|(index, _)| *index);
    Ok((present.into_iter().map(|(_, guard)| guard).collect(), count))
}

/// Each layer once, the largest blob first: the last thread to end should end early.
fn work(plans: &[Plan]) -> Vec<&Plan> {
    let mut todo: Vec<&Plan> = Vec::new();
    for plan in plans {
        if !todo.iter().any(|other| other.id() == plan.id()) {
            todo.push(plan);
        }
    }
    todo.sort_by_key(|plan| std::cmp::Reverse(plan.descriptor.size));
    todo
}

struct Job<'a> {
    images: &'a Images,
    source: &'a dyn ImageSource,
    todo: &'a [&'a Plan],
    next: AtomicUsize,
    stop: AtomicBool,
    error: Mutex<Option<PullError>>,
}

impl Job<'_> {
    /// One thread's work; gives the layers that were there already.
    fn work(&self, commit: &mpsc::Sender<(usize, Staging, LayerRecord)>) -> Vec<(usize, LayerGuard)> {
        let mut present = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let Some(plan) = self.todo.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            match self.layer(plan) {
                Ok(Layer::Present(guard)) => present.push((plan.index, guard)),
                Ok(Layer::Applied(staging, record)) => {
                    // Where the committer has gone, it says why itself.
                    if commit.send((plan.index, staging, record)).is_err() {
                        break;
                    }
                }
                Err(error) => self.fail(error),
            }
        }
        present
    }

    /// The first error counts: the others are mostly of threads that were told to stop.
    fn fail(&self, error: PullError) {
        self.stop.store(true, Ordering::Relaxed);
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn layer(&self, plan: &Plan) -> Result<Layer, PullError> {
        let id = plan.id();
        let task = self.images.progress.begin(&plan.descriptor.digest.short(), Some(plan.descriptor.size));
        let staging = match self.images.store.acquire(&id)? {
            Acquired::Present(guard) => {
                task.done("in the store");
                return Ok(Layer::Present(guard));
            }
            Acquired::Missing(staging) => staging,
        };
        let key = plan.key.as_ref().map(|(secret, public)| LayerKey { secret, public });
        let layer_plan = LayerPlan::new(&plan.descriptor, plan.diff_id, key, &self.images.options.unpack)?;
        let path = staging.fs_dir();
        let target = rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| StoreError::Io { what: "open the staging directory", path, source: errno.into() })?;
        let stream = Stoppable { inner: self.source.blob(&plan.descriptor)?, stop: &self.stop };
        let applied = apply_layer(stream, &layer_plan, target, &*task).map_err(|source| plan.error(source))?;
        task.done("unpacked");
        let record = LayerRecord { id, applied: applied.into_inner(), created: now() };
        Ok(Layer::Applied(staging, record))
    }
}

enum Layer {
    Present(LayerGuard),
    Applied(Staging, LayerRecord),
}

/// A stream that ends with an error when another layer of the image failed.
struct Stoppable<'a, R> {
    inner: R,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped, since another layer of the image failed"));
        }
        self.inner.read(buffer)
    }
}

/// Reads a config. Its digest is the caller's to check.
pub(super) fn small_blob(source: &dyn ImageSource, descriptor: &Descriptor) -> Result<Vec<u8>, TransportError> {
    let mut bytes = Vec::new();
    let mut stream = source.blob(descriptor)?.take(MANIFEST_LIMIT as u64 + 1);
    stream.read_to_end(&mut bytes).map_err(|error| TransportError::Protocol {
        what: format!("blob {}", descriptor.digest),
        place: source.location().to_string(),
        reason: error.to_string(),
    })?;
    if bytes.len() > MANIFEST_LIMIT {
        return Err(TransportError::TooLarge {
            what: format!("blob {}", descriptor.digest),
            place: source.location().to_string(),
            limit: MANIFEST_LIMIT as u64,
        });
    }
    Ok(bytes)
}

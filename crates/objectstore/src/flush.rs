//! How what was written becomes objects.

use bytes::Bytes;
use nacre_core::{BlockError, BlockStore as _};
use object_store::Error;
use std::sync::PoisonError;

use crate::{
    map::{BLOCK, Base, Changes, Delta, MAX_DELTAS},
    name::Name,
    store::ObjectBlockStore,
};

/// Chunks that are made into objects at once: it bounds the memory of bases that are being folded.
const WAVE: usize = 16;

/// What a chunk's changes become.
struct Plan {
    chunk: u64,
    /// The base or the deltas; for a base that is folded the content comes later.
    objects: Vec<(Name, Bytes)>,
    /// A base of its whole content.
    fold: bool,
}

impl ObjectBlockStore {
    /// Makes objects of everything that is dirty now.
    pub(crate) fn put_all(&self) -> Result<(), BlockError> {
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_fence()?;
        let chunks: Vec<u64> = self.state().dirty.iter().copied().collect();
        let mut first = Ok(());
        for wave in chunks.chunks(WAVE) {
            first = first.and(self.put_wave(wave));
        }
        first
    }

    fn put_wave(&self, chunks: &[u64]) -> Result<(), BlockError> {
        let mut plans: Vec<Plan> = chunks.iter().filter_map(|chunk| self.plan(*chunk)).collect();
        let mut first = Ok(());
        for plan in &mut plans {
            if plan.fold {
                match self.whole(plan.chunk) {
                    Ok(content) => plan.objects.iter_mut().for_each(|object| object.1 = content.clone()),
                    Err(error) => {
                        plan.objects.clear();
                        first = first.and(Err(error));
                    }
                }
            }
        }
        let puts =
            plans.iter().flat_map(|plan| &plan.objects).map(|(name, content)| (name.to_string(), content.clone()));
        let mut outcomes = self.objects.create(puts.collect()).into_iter();
        let (mut superseded, mut cleared) = (Vec::new(), Vec::new());
        for plan in plans {
            let outcomes: Vec<_> = outcomes.by_ref().take(plan.objects.len()).collect();
            let empty = plan.objects.iter().find_map(|(name, content)| content.is_empty().then(|| name.to_string()));
            match self.settle(plan, outcomes) {
                Ok((names, certain)) => {
                    superseded.extend(names);
                    cleared.extend(empty.filter(|_| certain));
                }
                Err(error) => first = first.and(Err(error)),
            }
        }
        // What replaces them is there. What cannot be deleted now is for the next writer.
        if self.delete(superseded) && self.delete(cleared.clone()) {
            let mut state = self.state();
            for name in cleared {
                if let Some(Name::Base { chunk, .. }) = Name::parse(&name)
                    && let Some(chunk) = state.chunks.get_mut(&chunk)
                {
                    chunk.base = None;
                }
            }
        }
        first
    }

    /// Sends the changes of a chunk on their way, and says as which objects; `None` where there is nothing to make.
    fn plan(&self, number: u64) -> Option<Plan> {
        let mut state = self.state();
        state.dirty.remove(&number);
        let chunk = state.chunks.get_mut(&number)?;
        chunk.flying = std::mem::take(&mut chunk.dirty);
        let bytes = chunk.flying.blocks.len() as u64 * BLOCK;
        let mut objects = Vec::new();
        let mut fold = false;
        if chunk.flying.blocks.is_empty() {
            if chunk.flying.zeroed && (chunk.has_objects() || chunk.uncertain) {
                chunk.last += 1;
                objects.push((Name::Base { chunk: number, generation: chunk.last }, Bytes::new()));
            } else {
                chunk.flying = Changes::default();
            }
        } else {
            let runs = chunk.flying.runs();
            let held: u64 = chunk.deltas.iter().map(|delta| delta.length).sum();
            let over = chunk.flying.zeroed && (chunk.has_objects() || chunk.uncertain);
            fold = over || chunk.deltas.len() + runs.len() > MAX_DELTAS || held + bytes > self.chunk_size / 2;
            if fold {
                chunk.last += 1;
                objects.push((Name::Base { chunk: number, generation: chunk.last }, Bytes::new()));
            } else {
                for (first, content) in runs {
                    chunk.last += 1;
                    let (offset, length) = (first * BLOCK, content.len() as u64);
                    let name = Name::Delta { chunk: number, generation: chunk.last, offset, length };
                    objects.push((name, content.into()));
                }
            }
        }
        state.dirty_bytes = state.dirty_bytes.saturating_sub(bytes);
        state.unchecked |= !objects.is_empty();
        (!objects.is_empty()).then_some(Plan { chunk: number, objects, fold })
    }

    /// All of a chunk, with its changes.
    fn whole(&self, chunk: u64) -> Result<Bytes, BlockError> {
        let start = chunk * self.chunk_size;
        let length = self.size().saturating_sub(start).min(self.chunk_size);
        let mut content = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read_at(start, &mut content)?;
        Ok(content.into())
    }

    /// Takes in how the PUTs of a chunk went: the names that are superseded, and whether nothing unseen can come after.
    fn settle(&self, plan: Plan, outcomes: Vec<Result<(), Error>>) -> Result<(Vec<String>, bool), BlockError> {
        let mut state = self.state();
        let Some(chunk) = state.chunks.get_mut(&plan.chunk) else { return Ok((Vec::new(), false)) };
        // Without any, what was to be folded could not be read.
        let mut failed = plan.objects.is_empty();
        let mut result = Ok(());
        let mut superseded = Vec::new();
        for ((name, content), outcome) in plan.objects.iter().zip(outcomes) {
            match (*name, outcome) {
                (Name::Base { generation, .. }, Ok(())) => {
                    superseded = chunk.names(plan.chunk);
                    chunk.base = Some(Base { generation, length: content.len() as u64 });
                    chunk.deltas.clear();
                }
                (Name::Delta { generation, offset, length, .. }, Ok(())) => {
                    chunk.deltas.push(Delta { generation, offset, length });
                }
                (Name::Writer { .. }, Ok(())) => {}
                (name, Err(error)) => {
                    failed = true;
                    chunk.uncertain = true;
                    let error = match error {
                        Error::AlreadyExists { .. } => self.fence(&format!("{name} is there with other content")),
                        error => self.error(
                            "flush",
                            plan.chunk * self.chunk_size,
                            content.len() as u64,
                            format_args!("{name}: {error}"),
                        ),
                    };
                    result = result.and(Err(error));
                }
            }
        }
        let certain = !chunk.uncertain;
        if failed {
            let before = chunk.dirty.blocks.len();
            chunk.take_back();
            let more = chunk.dirty.blocks.len().saturating_sub(before) as u64 * BLOCK;
            state.dirty.insert(plan.chunk);
            state.dirty_bytes += more;
        } else {
            chunk.flying = Changes::default();
        }
        result.map(|()| (superseded, certain))
    }

    /// Deletes objects; says whether all are gone.
    fn delete(&self, names: Vec<String>) -> bool {
        let mut all = true;
        for (name, outcome) in names.clone().into_iter().zip(self.objects.delete(names)) {
            if let Err(error) = outcome {
                tracing::warn!(store = self.shown, name, %error, "a superseded object is left for the next writer");
                all = false;
            }
        }
        all
    }

    /// Looks whether somebody opened the store for writing after this one.
    pub(crate) fn check_writer(&self) -> Result<(), BlockError> {
        if !std::mem::take(&mut self.state().unchecked) {
            return Ok(());
        }
        let next = Name::Writer { generation: self.writer + 1 }.to_string();
        match self.objects.exists(&next) {
            Ok(false) => Ok(()),
            Ok(true) => Err(self.fence(&format!("{next} is there"))),
            Err(error) => {
                self.state().unchecked = true;
                Err(self.error("flush", 0, 0, format_args!("{next}: {error}")))
            }
        }
    }
}

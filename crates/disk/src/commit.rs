//! Flushes: what was written since the last commit becomes durable, all of it or nothing.
//!
//! One thread leads a commit, and all who came before it began wait for it: flushes from several threads commit together. A commit is
//! one round of writes (blocks that are still in memory, and the journal's records) and one flush of the store. The order of the
//! writes does not matter: recovery counts a last commit only when all of its blocks are there.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nacre_core::{AnchorState, BLOCK_SIZE, BlockError, Page, WriteRequest};

use crate::{
    AnchorWindow, DiskError,
    delta::Delta,
    journal::{self, Change, MOST_BLOCKS, Record, capacity},
    layout::BLOCK,
    poison,
    shared::{Batch, Frozen, Log, Shared},
    stats::add,
};

/// A record as it is written.
type Pages = Vec<Box<Page>>;

/// A commit that is to be written.
struct Plan {
    changes: Vec<Change>,
    /// Where in the ring the records go.
    positions: Vec<u64>,
    claimed: Vec<Arc<Batch>>,
    /// The last batch that was on its way then.
    last: u64,
    sequence: u64,
    chain: [u8; 32],
    froze: bool,
}

impl Shared {
    /// A flush of a user.
    pub(crate) fn flush(&self) -> Result<(), BlockError> {
        let begin = Instant::now();
        self.check_failed()?;
        add(&self.counters.flushes, 1);
        let committed = self.lock().is_committed();
        if committed && !poison(self.commits.lock()).running {
            return Ok(());
        }
        let result = self.commit(false);
        self.counters.flush_latency.add(begin.elapsed());
        result
    }

    /// Commits, and where `freeze` says so begins a checkpoint. Returns when everything that was written before is durable.
    pub(crate) fn commit(&self, freeze: bool) -> Result<(), BlockError> {
        let mut commits = poison(self.commits.lock());
        let target = commits.started + 1;
        while commits.running {
            if commits.done >= target {
                return Ok(());
            }
            self.check_failed()?;
            commits = poison(self.committed.wait(commits));
        }
        if commits.done >= target {
            return Ok(());
        }
        self.check_failed()?;
        commits.running = true;
        commits.started += 1;
        drop(commits);
        let result = self.lead(freeze);
        let mut commits = poison(self.commits.lock());
        commits.running = false;
        if result.is_ok() {
            commits.done = commits.started;
        }
        drop(commits);
        self.committed.notify_all();
        if result? && !self.options.background {
            self.merge().map_err(|error| self.fail(error))?;
        }
        Ok(())
    }

    /// Leads a commit; whether a checkpoint is to be made of it.
    fn lead(&self, freeze: bool) -> Result<bool, BlockError> {
        let plan = self.plan(freeze)?;
        let chain = self.carry_out(&plan).map_err(|error| self.fail(error))?;
        let mut log = self.lock();
        log.sequence = plan.sequence;
        log.chain = chain;
        let froze = plan.froze;
        if let Some(frozen) = log.frozen.as_mut().filter(|_| froze) {
            frozen.chain = chain;
            frozen.ready = true;
        }
        drop(log);
        if froze {
            self.work.notify_all();
        }
        Ok(froze)
    }

    fn plan(&self, freeze: bool) -> Result<Plan, BlockError> {
        loop {
            self.check_failed()?;
            let mut log = self.lock();
            let need = if log.changes.is_empty() { 0 } else { journal::blocks_for(log.changes.len()) };
            if log.ring.free() < need {
                if log.frozen.is_none() {
                    drop(log);
                    return Err(self.fail(BlockError::NoSpace("the journal is too small for a transaction".into())));
                }
                drop(poison(self.changed.wait_timeout(log, Duration::from_millis(50))));
                continue;
            }
            log.send();
            let claimed = log.claim(usize::MAX);
            let last = log.last_sent();
            let changes = std::mem::take(&mut log.changes);
            let mut positions = Vec::new();
            for part in changes.chunks(capacity(MOST_BLOCKS)) {
                let blocks = (1..MOST_BLOCKS).find(|blocks| capacity(*blocks) >= part.len()).unwrap_or(MOST_BLOCKS);
                let Some(position) = log.ring.take(blocks as u64) else {
                    drop(log);
                    return Err(self.fail(BlockError::NoSpace("the journal has less room than it had".into())));
                };
                positions.push(position);
            }
            let sequence = log.sequence + u64::from(!changes.is_empty());
            let froze = self.freeze(&mut log, freeze, sequence);
            let chain = log.chain;
            return Ok(Plan { changes, positions, claimed, last, sequence, chain, froze });
        }
    }

    /// Sets aside what is committed for a checkpoint, where it is time for one.
    fn freeze(&self, log: &mut Log, wanted: bool, sequence: u64) -> bool {
        let floor = self.limits.floor;
        let worn = log.period_began_with.saturating_sub(floor) / 2;
        let due = wanted
            || log.delta.len() >= self.limits.delta / 8 * 7
            || log.delta.trimmed() >= self.limits.trimmed / 8 * 7
            || log.ring.used > log.ring.length / 2
            || log.allocator.available() < floor + worn;
        if !due || log.frozen.is_some() || log.delta.is_empty() {
            return false;
        }
        let fresh = Delta::with_capacity(self.limits.delta);
        self.merged.store(0, Ordering::Relaxed);
        log.frozen = Some(Frozen {
            delta: Arc::new(std::mem::replace(&mut log.delta, fresh)),
            period: log.allocator.freeze(),
            sequence,
            chain: log.chain,
            position: log.ring.head,
            release: log.ring.used,
            ready: false,
        });
        true
    }

    /// Writes a commit and makes it durable; the chain after it.
    fn carry_out(&self, plan: &Plan) -> Result<[u8; 32], DiskError> {
        let (records, chain) = self.records(plan)?;
        let geometry = self.geometry();
        let journal = records.iter().zip(&plan.positions).map(|(pages, position)| WriteRequest {
            offset: (geometry.journal_start() + position) * BLOCK,
            buffers: pages.iter().map(|page| page.0.as_slice()).collect(),
        });
        let journal: Vec<_> = journal.collect();
        add(&self.counters.journal_bytes, journal.iter().map(WriteRequest::length).sum());
        self.write_claimed(plan.claimed.clone(), journal)?;
        self.pool.give(records.into_iter().flatten());
        // What others carried when this began.
        let mut log = self.lock();
        while log.is_on_its_way(plan.last) {
            self.check_failed()?;
            log = poison(self.changed.wait(log));
        }
        drop(log);
        self.store.flush()?;
        if !plan.changes.is_empty() {
            add(&self.counters.commits, 1);
            self.anchor_commit(plan.sequence, chain, false)?;
        }
        Ok(chain)
    }

    /// The records of a commit, in pages, which direct I/O takes as they are; and the chain after it.
    fn records(&self, plan: &Plan) -> Result<(Vec<Pages>, [u8; 32]), DiskError> {
        let mut chain = plan.chain;
        let mut records = Vec::with_capacity(plan.positions.len());
        if plan.changes.is_empty() {
            return Ok((records, chain));
        }
        let keys = self.writer()?;
        let generation = self.generation.load(Ordering::Acquire);
        let parts: Vec<_> = plan.changes.chunks(capacity(MOST_BLOCKS)).collect();
        for (number, changes) in (1..).zip(&parts) {
            let record = Record {
                sequence: plan.sequence,
                synced: plan.sequence - 1,
                checkpoint: generation,
                chain,
                commit: number == parts.len(),
                changes: changes.to_vec(),
            };
            let (bytes, next) = record.encode(&keys, &self.auditor)?;
            let mut pages = self.pool.take(bytes.len() / BLOCK_SIZE);
            for (page, block) in pages.iter_mut().zip(bytes.chunks_exact(BLOCK_SIZE)) {
                page.0.copy_from_slice(block);
            }
            records.push(pages);
            chain = next;
        }
        Ok((records, chain))
    }

    /// Moves the anchor on, where the window says that it is time.
    pub(crate) fn anchor_commit(&self, sequence: u64, root: [u8; 32], now: bool) -> Result<(), DiskError> {
        let Some(anchored) = &self.anchored else { return Ok(()) };
        let mut state = poison(anchored.state.lock());
        let due = match self.options.window {
            AnchorWindow::EveryFlush => true,
            AnchorWindow::Every(window) => state.1.elapsed() >= window,
            AnchorWindow::OnClose => false,
        };
        if !(due || now) || state.0.sequence >= sequence {
            return Ok(());
        }
        let next = AnchorState { disk: self.uuid, fence: self.fence, sequence, root };
        anchored.anchor.advance(Some(&state.0), &next)?;
        *state = (next, Instant::now());
        add(&self.counters.anchored, 1);
        Ok(())
    }
}

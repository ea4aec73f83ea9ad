//! What a disk has to hold, at each step of its history.
//!
//! Every block that is written gets a content of its own, made from a number that is never used twice, so a block that is read says
//! which write it comes from. A step is the change of one block. The states that a disk may show after a crash are steps: that of the
//! last flush that was acknowledged, and that of a flush that had begun; never one in between, never a mixture.

use std::collections::BTreeMap;

use nacre_core::{BLOCK_SIZE, BlockError, BlockStore};

use super::snapshot::Block;

/// Blocks that a judgement reads at once.
const RUN: usize = 16;

/// The content with that number; 0 is all zeroes.
pub fn content(token: u64) -> Block {
    let mut block = [0; BLOCK_SIZE];
    if token != 0 {
        let mut word = token;
        for piece in block.chunks_exact_mut(8) {
            piece.copy_from_slice(&word.to_le_bytes());
            word = word.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(token);
        }
    }
    block
}

/// The number of a content; `None` where the bytes are nobody's.
fn token(bytes: &[u8]) -> Option<u64> {
    let (first, _) = bytes.split_first_chunk()?;
    let token = u64::from_le_bytes(*first);
    (content(token)[..] == *bytes).then_some(token)
}

/// What a judgement makes of blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// There has to be none.
    Unexpected,
    /// An error that names the block is right: somebody changed the store.
    Named,
}

/// What a disk shows.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The states that fit, the oldest first; at least one.
    pub steps: Vec<u64>,
    /// The blocks that cannot be read.
    pub damaged: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Commit {
    /// What it makes durable.
    step: u64,
    /// At which point of the recording it began.
    begun: usize,
    /// At which point it was acknowledged.
    done: Option<usize>,
}

/// The model of a disk.
#[derive(Clone, Debug)]
pub struct Model {
    step: u64,
    tokens: u64,
    /// What each block was changed to, by step; zeroes before.
    history: BTreeMap<u64, Vec<(u64, u64)>>,
    /// Its number of blocks, by step.
    sizes: Vec<(u64, u64)>,
    commits: Vec<Commit>,
    /// What the disk committed on its own: from which point of the recording on, and the first and the last step that may be durable.
    own: Vec<(usize, u64, u64)>,
}

impl Model {
    /// A new disk: zeroes, which are durable.
    pub fn new(blocks: u64) -> Self {
        let commits = vec![Commit { step: 0, begun: 0, done: Some(0) }];
        let (history, sizes) = (BTreeMap::new(), vec![(0, blocks)]);
        Self { step: 0, tokens: 0, history, sizes, commits, own: Vec::new() }
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.sizes.last().map_or(0, |(_, blocks)| *blocks)
    }

    /// The step it is at.
    pub fn step(&self) -> u64 {
        self.step
    }

    fn set(&mut self, lba: u64, token: u64) {
        self.step += 1;
        self.history.entry(lba).or_default().push((self.step, token));
    }

    /// A write: what has to be written.
    pub fn write(&mut self, lba: u64, count: u64) -> Vec<u8> {
        let mut data = Vec::new();
        for lba in lba..lba + count {
            self.tokens += 1;
            // Far from any number that a disk would have a reason to store.
            let token = self.tokens.wrapping_mul(0xd134_2543_de82_ef95) | 1;
            self.set(lba, token);
            data.extend_from_slice(&content(token));
        }
        data
    }

    /// Blocks become zeroes.
    pub fn zero(&mut self, lba: u64, count: u64) {
        for lba in lba..lba + count {
            self.set(lba, 0);
        }
    }

    /// The disk gets larger.
    pub fn grow(&mut self, blocks: u64) {
        self.step += 1;
        self.sizes.push((self.step, blocks));
    }

    /// A flush begins.
    pub fn flush_begins(&mut self, point: usize) {
        self.commits.push(Commit { step: self.step, begun: point, done: None });
    }

    /// It was acknowledged.
    pub fn flush_done(&mut self, point: usize) {
        if let Some(commit) = self.commits.last_mut() {
            commit.done = Some(point);
        }
    }

    /// The state that a crash at a point may not lose.
    pub fn acknowledged(&self, point: usize) -> u64 {
        let done = |commit: &&Commit| commit.done.is_some_and(|done| done <= point);
        self.commits.iter().rev().find(done).map_or(0, |commit| commit.step)
    }

    /// The disk says that it committed on its own while it carried out the last request, which began at that point and step: any of
    /// the states since may be durable.
    pub fn committed_itself(&mut self, point: usize, step: u64) {
        self.own.push((point, step, self.step));
    }

    /// The states that a crash at a point may leave: the one that was acknowledged, those of flushes that had begun, and what the disk
    /// committed on its own.
    pub fn candidates(&self, point: usize) -> Vec<u64> {
        let acknowledged = self.acknowledged(point);
        let mut steps = vec![acknowledged];
        let begun = self.commits.iter().filter(|commit| commit.begun < point);
        steps.extend(begun.map(|commit| commit.step));
        let own = self.own.iter().filter(|(begun, _, _)| *begun < point);
        steps.extend(own.flat_map(|(_, first, last)| *first..=*last));
        steps.retain(|step| *step >= acknowledged);
        steps.sort_unstable();
        steps.dedup();
        steps
    }

    /// The states of all flushes that were ever acknowledged, or had begun: what a host that rolls back can choose from.
    pub fn commits(&self) -> Vec<u64> {
        let mut steps: Vec<u64> = self.commits.iter().map(|commit| commit.step).collect();
        steps.dedup();
        steps
    }

    /// What a block holds at a step.
    pub fn at(&self, lba: u64, step: u64) -> u64 {
        let history = self.history.get(&lba).map(Vec::as_slice).unwrap_or_default();
        history.iter().rev().find(|(at, _)| *at <= step).map_or(0, |(_, token)| *token)
    }

    /// The bytes that it holds now.
    pub fn expected(&self, lba: u64) -> Block {
        content(self.at(lba, self.step))
    }

    /// The blocks that were ever changed, and the one after each.
    pub fn touched(&self) -> Vec<u64> {
        let mut lbas: Vec<u64> = self.history.keys().flat_map(|lba| [*lba, lba + 1]).collect();
        lbas.sort_unstable();
        lbas.dedup();
        lbas.retain(|lba| *lba < self.blocks());
        lbas
    }

    /// Everything after a step never happened; what is recorded from now on begins at point 0, and what is there is durable.
    pub fn crash_to(&mut self, step: u64) {
        self.history.values_mut().for_each(|changes| changes.retain(|(at, _)| *at <= step));
        self.sizes.retain(|(at, _)| *at <= step);
        self.step = step;
        self.commits = vec![Commit { step, begun: 0, done: Some(0) }];
        self.own.clear();
    }

    /// What of a range differs from what a disk gave for it, as a text.
    pub fn compare(&self, lba: u64, data: &[u8]) -> Result<(), String> {
        for (lba, bytes) in (lba..).zip(data.chunks(BLOCK_SIZE)) {
            if bytes[..] != self.expected(lba)[..] {
                return Err(format!("LBA {lba} has to hold {}, not {}", self.name(lba, self.step), self.found(bytes)));
            }
        }
        Ok(())
    }

    fn name(&self, lba: u64, step: u64) -> String {
        match self.at(lba, step) {
            0 => format!("zeroes (at step {step})"),
            token => format!("{} (at step {step})", self.origin(token)),
        }
    }

    fn origin(&self, token: u64) -> String {
        for (lba, changes) in &self.history {
            if let Some((step, _)) = changes.iter().find(|(_, other)| *other == token) {
                return format!("what step {step} wrote to LBA {lba}");
            }
        }
        format!("what a write that did not survive wrote ({token:#x})")
    }

    fn found(&self, bytes: &[u8]) -> String {
        match token(bytes) {
            Some(0) => "zeroes".to_owned(),
            Some(token) => self.origin(token),
            None => "bytes that nobody wrote".to_owned(),
        }
    }

    /// Which of the candidates the disk shows, all of it.
    ///
    /// # Errors
    /// None of them: what was found where. Or a block cannot be read, and that is not expected, or the error does not name it.
    pub fn judge(&self, disk: &dyn BlockStore, candidates: &[u64], damage: Damage) -> Result<Verdict, String> {
        let mut fitting = candidates.to_vec();
        let mut damaged = Vec::new();
        let size = disk.size() / BLOCK_SIZE as u64;
        let blocks_at = |step| self.sizes.iter().rev().find(|(at, _)| *at <= step).map_or(0, |(_, blocks)| *blocks);
        fitting.retain(|step| blocks_at(*step) <= size);
        let mut reasons = vec![format!("the disk has {size} blocks; steps left: {fitting:?}")];
        let run = if damage == Damage::Unexpected { RUN } else { 1 };
        let mut buffer = vec![0; run * BLOCK_SIZE];
        for lbas in self.touched().chunk_by(|a, b| a + 1 == *b).flat_map(|lbas| lbas.chunks(run)) {
            let lbas: Vec<u64> = lbas.iter().copied().filter(|lba| *lba < size).collect();
            let Some(first) = lbas.first() else { continue };
            let buffer = &mut buffer[..lbas.len() * BLOCK_SIZE];
            if let Err(error) = disk.read_at(first * BLOCK_SIZE as u64, buffer) {
                if damage == Damage::Unexpected || !names(&error, *first) {
                    return Err(format!("LBA {first} (of {}) cannot be read: {error}", lbas.len()));
                }
                damaged.push(*first);
                continue;
            }
            for (lba, bytes) in lbas.iter().zip(buffer.chunks(BLOCK_SIZE)) {
                let before = fitting.len();
                let found = token(bytes);
                fitting.retain(|step| found == Some(self.at(*lba, *step)));
                if fitting.len() < before && reasons.len() < 40 {
                    reasons.push(format!("LBA {lba} holds {}; steps left: {fitting:?}", self.found(bytes)));
                }
            }
        }
        if fitting.is_empty() {
            return Err(format!("no state of {candidates:?} is there:\n  {}", reasons.join("\n  ")));
        }
        Ok(Verdict { steps: fitting, damaged })
    }
}

/// Whether an error says that this block is damaged.
fn names(error: &BlockError, lba: u64) -> bool {
    matches!(error, BlockError::Integrity { first, count, .. } if (*first..first.saturating_add(*count)).contains(&lba))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimStore;

    #[test]
    fn mixtures_are_seen() {
        let store = SimStore::new(1 << 20);
        let mut model = Model::new(256);
        let first = model.write(3, 2);
        store.write_at(3 * 4096, &first).unwrap();
        model.flush_begins(1);
        model.flush_done(2);
        let second = model.write(4, 2);
        assert_eq!(model.candidates(2), [2]);
        model.flush_begins(3);
        assert_eq!((model.candidates(3), model.candidates(4)), (vec![2], vec![2, 4]));
        let mut own = model.clone();
        own.committed_itself(2, 2);
        assert_eq!((own.candidates(2), own.candidates(3)), (vec![2], vec![2, 3, 4]));
        let judge = |steps: &[u64]| model.judge(&*store, steps, Damage::Unexpected).map(|verdict| verdict.steps);
        assert_eq!(judge(&[2, 4]).unwrap(), [2]);
        store.write_at(4 * 4096, &second[..4096]).unwrap();
        assert_eq!(judge(&[2, 3, 4]).unwrap(), [3]);
        let text = judge(&[2, 4]).unwrap_err();
        assert!(text.contains("LBA 4 holds what step 3 wrote to LBA 4"), "{text}");
        store.write_at(5 * 4096, &second[4096..]).unwrap();
        assert_eq!(judge(&[2, 4]).unwrap(), [4]);
        store.write_at(3 * 4096, &[7; 4096]).unwrap();
        assert!(judge(&[2, 4]).unwrap_err().contains("bytes that nobody wrote"));
    }

    #[test]
    fn what_did_not_survive_is_forgotten() {
        let mut model = Model::new(16);
        model.write(0, 1);
        model.grow(32);
        let gone = model.write(0, 1);
        model.crash_to(1);
        assert_eq!((model.blocks(), model.step()), (16, 1));
        assert!(model.compare(0, &gone).unwrap_err().contains("did not survive"));
        assert_eq!(token(&content(model.at(0, 1))), Some(model.at(0, 1)));
        assert_eq!(token(&[0; 4096]), Some(0));
    }
}

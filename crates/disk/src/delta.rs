//! What changed since a checkpoint, in memory: the part of the index that is not in the tree yet.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

use crate::node::Entry;

/// LBAs that stay together.
const NEAR: u64 = 8;

/// Hashes LBAs: one multiplication, and neighbours stay neighbours in groups of [`NEAR`], so that a sequence of writes does not touch memory
/// all over the table. Whoever finds collisions slows down nobody but the guest that they are part of.
#[derive(Default)]
pub(crate) struct LbaHasher(u64);

impl Hasher for LbaHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let product = (self.0.rotate_left(5) ^ (value / NEAR)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let group = product ^ (product >> 32);
        // The low bits choose the place in the table; the high ones tell apart what is there.
        let near = value % NEAR;
        self.0 = ((group & !(NEAR - 1)) | near) ^ near.rotate_right(NEAR.trailing_zeros());
    }
}

pub(crate) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<LbaHasher>>;

/// A write: LBA, and what the index says of it.
pub(crate) type Written<'a> = (u64, &'a Entry);

/// A trimmed range: (first, end).
pub(crate) type Trimmed = (u64, u64);

/// Changes, newest only. A write in `blocks` goes before a range in `trims`: a trim takes out what it covers.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    blocks: FastMap<u64, Entry>,
    /// first → end, neither overlapping nor touching.
    trims: BTreeMap<u64, u64>,
    trimmed: u64,
}

impl Delta {
    /// For so many changes, without growing.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { blocks: FastMap::with_capacity_and_hasher(capacity, BuildHasherDefault::default()), ..Self::default() }
    }

    /// What is known of a block; a hole where it was trimmed.
    pub(crate) fn get(&self, lba: u64) -> Option<Entry> {
        if let Some(entry) = self.blocks.get(&lba) {
            return Some(*entry);
        }
        if self.trims.is_empty() {
            return None;
        }
        let (_, end) = self.trims.range(..=lba).next_back()?;
        (lba < *end).then_some(Entry::HOLE)
    }

    pub(crate) fn write(&mut self, lba: u64, entry: Entry) {
        self.blocks.insert(lba, entry);
    }

    pub(crate) fn trim(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        if count < self.blocks.len() as u64 {
            for lba in first..end {
                self.blocks.remove(&lba);
            }
        } else {
            self.blocks.retain(|lba, _| !(first..end).contains(lba));
        }
        self.trimmed += count;
        let (mut from, mut to) = (first, end);
        if let Some((start, stop)) = self.trims.range(..first).next_back().map(|(start, stop)| (*start, *stop))
            && stop >= first
        {
            (from, to) = (start, to.max(stop));
        }
        while let Some((start, stop)) = self.trims.range(from..=to).next().map(|(start, stop)| (*start, *stop)) {
            to = to.max(stop);
            self.trims.remove(&start);
        }
        self.trims.insert(from, to);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.trims.is_empty()
    }

    /// How many entries it holds in memory.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len() + self.trims.len()
    }

    /// Blocks that were trimmed, those trimmed twice counted twice: what a merge has to walk through at most.
    pub(crate) fn trimmed(&self) -> u64 {
        self.trimmed
    }

    /// The writes, by LBA, and the trimmed ranges (first, end).
    pub(crate) fn sorted(&self) -> (Vec<Written<'_>>, Vec<Trimmed>) {
        let mut blocks: Vec<_> = self.blocks.iter().map(|(lba, entry)| (*lba, entry)).collect();
        blocks.sort_unstable_by_key(|(lba, _)| *lba);
        (blocks, self.trims.iter().map(|(first, end)| (*first, *end)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "the numbers are below 200")]
    fn it_is_like_an_array() {
        let mut rng = 7_u64;
        let mut next = |bound: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (rng >> 33) % bound
        };
        let (mut delta, mut model) = (Delta::default(), [None; 200]);
        for step in 1..20_000 {
            let lba = next(200);
            if next(3) == 0 {
                let count = next(200 - lba) + 1;
                delta.trim(lba, count);
                (lba..lba + count).for_each(|lba| model[lba as usize] = Some(Entry::HOLE));
            } else {
                let entry = Entry::new(step, 1, step, [0; 16]);
                delta.write(lba, entry);
                model[lba as usize] = Some(entry);
            }
            let lba = next(200);
            assert_eq!(delta.get(lba), model[lba as usize]);
            if next(500) == 0 {
                delta = Delta::default();
                model = [None; 200];
            }
        }
        let (blocks, trims) = delta.sorted();
        assert!(blocks.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(trims.windows(2).all(|pair| pair[0].1 < pair[1].0));
    }
}

//! Index nodes and bitmap pages that were read and verified. Each is known by what no other version has, so nothing here is ever stale.

use std::sync::{Arc, Mutex};

use crate::{delta::FastMap, node::Node, poison};

const SHARDS: usize = 8;

type Version = (u32, u64);

/// A shard: second chance.
#[derive(Default)]
struct Shard {
    map: FastMap<Version, usize>,
    slots: Vec<(Version, Arc<Node>, bool)>,
    hand: usize,
}

pub(crate) struct Cache {
    shards: Vec<Mutex<Shard>>,
    /// Nodes of a shard, at most.
    capacity: usize,
}

impl Cache {
    /// For so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        // With its entry in the map and its counters, a node takes some 100 bytes more than a block.
        let nodes = usize::try_from(bytes / 4200).unwrap_or(usize::MAX);
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), capacity: (nodes / SHARDS).max(4) }
    }

    /// Nodes that it holds at most.
    pub(crate) fn nodes(&self) -> usize {
        self.capacity * SHARDS
    }

    fn shard(&self, version: Version) -> &Mutex<Shard> {
        let mixed = version.1 ^ (version.1 >> 7) ^ u64::from(version.0);
        &self.shards[usize::try_from(mixed).unwrap_or(0) % SHARDS]
    }

    pub(crate) fn get(&self, version: Version) -> Option<Arc<Node>> {
        self.look(version, Arc::clone)
    }

    /// What `look` sees in a node, without taking a share of it.
    pub(crate) fn look<T>(&self, version: Version, look: impl FnOnce(&Arc<Node>) -> T) -> Option<T> {
        let mut shard = poison(self.shard(version).lock());
        let slot = *shard.map.get(&version)?;
        let (_, node, used) = shard.slots.get_mut(slot)?;
        *used = true;
        Some(look(node))
    }

    pub(crate) fn put(&self, version: Version, node: Arc<Node>) {
        let mut shard = poison(self.shard(version).lock());
        let shard = &mut *shard;
        if shard.map.contains_key(&version) {
            return;
        }
        if shard.slots.len() < self.capacity {
            shard.map.insert(version, shard.slots.len());
            shard.slots.push((version, node, false));
            return;
        }
        loop {
            let hand = shard.hand;
            shard.hand = (hand + 1) % shard.slots.len();
            let Some(slot) = shard.slots.get_mut(hand) else { return };
            if slot.2 {
                slot.2 = false;
                continue;
            }
            shard.map.remove(&slot.0);
            *slot = (version, node, false);
            shard.map.insert(version, hand);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_size_is_bounded() {
        let cache = Cache::new(8 * 16 * 4200);
        let node = || Arc::new(Node { entries: [crate::node::Entry::HOLE; 128] });
        cache.put((1, 0), node());
        for count in 1..10_000 {
            cache.put((1, count), node());
            assert!(cache.get((1, 0)).is_some());
        }
        let held: usize = cache.shards.iter().map(|shard| shard.lock().unwrap().slots.len()).sum();
        assert_eq!(held, 128);
        assert_eq!((0..10_000).filter(|count| cache.get((1, *count)).is_some()).count(), 128);
    }
}

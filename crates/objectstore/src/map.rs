//! What the store knows of each chunk: which objects have it, and what is in memory and not there yet.

use std::{collections::BTreeMap, sync::Arc};

use nacre_core::{BLOCK_SIZE, Page};

use crate::name::{Descriptor, Name};

/// Bytes of a block, where bytes are counted.
pub(crate) const BLOCK: u64 = BLOCK_SIZE as u64;

/// Objects beyond those that a store needs that are put up with at opening: what many crashes left.
const SPARE_OBJECTS: u64 = 100_000;

/// The most deltas of a chunk; one more, and they are folded into a base.
pub(crate) const MAX_DELTAS: usize = 8;

/// Content of a chunk that is newer than its objects.
#[derive(Default)]
pub(crate) struct Changes {
    /// All blocks that are not in `blocks` are zeroes.
    pub(crate) zeroed: bool,
    /// By number in the chunk.
    pub(crate) blocks: BTreeMap<u64, Arc<Page>>,
}

impl Changes {
    /// The runs of blocks that lie together: (first block, content).
    pub(crate) fn runs(&self) -> Vec<(u64, Vec<u8>)> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (&block, page) in &self.blocks {
            match runs.last_mut() {
                Some((first, bytes)) if *first + bytes.len() as u64 / BLOCK == block => {
                    bytes.extend_from_slice(&page.0)
                }
                _ => runs.push((block, page.0.to_vec())),
            }
        }
        runs
    }
}

/// A base object.
#[derive(Clone, Copy)]
pub(crate) struct Base {
    pub(crate) generation: u64,
    pub(crate) length: u64,
}

/// A delta object.
#[derive(Clone, Copy)]
pub(crate) struct Delta {
    pub(crate) generation: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Where a block's content is.
pub(crate) enum Source {
    Zeroes,
    Memory(Arc<Page>),
    /// In this object, from this byte on.
    Object(Name, u64),
}

/// A chunk.
#[derive(Default)]
pub(crate) struct Chunk {
    pub(crate) base: Option<Base>,
    /// In the order of their generations, all above the base's.
    pub(crate) deltas: Vec<Delta>,
    /// The last generation that was used.
    pub(crate) last: u64,
    /// Written, and not on its way yet.
    pub(crate) dirty: Changes,
    /// On its way.
    pub(crate) flying: Changes,
    /// A PUT failed, and may have been carried out all the same, unseen, now or later.
    pub(crate) uncertain: bool,
}

impl Chunk {
    /// Where the content of a block is; the newest wins.
    pub(crate) fn find(&self, chunk: u64, block: u64) -> Source {
        for changes in [&self.dirty, &self.flying] {
            if let Some(page) = changes.blocks.get(&block) {
                return Source::Memory(Arc::clone(page));
            }
            if changes.zeroed {
                return Source::Zeroes;
            }
        }
        let at = block * BLOCK;
        for &Delta { generation, offset, length } in self.deltas.iter().rev() {
            if at >= offset && at < offset + length {
                return Source::Object(Name::Delta { chunk, generation, offset, length }, at - offset);
            }
        }
        match self.base {
            Some(Base { generation, length }) if at < length => Source::Object(Name::Base { chunk, generation }, at),
            _ => Source::Zeroes,
        }
    }

    /// The names of all its objects.
    pub(crate) fn names(&self, chunk: u64) -> Vec<String> {
        let base = self.base.map(|Base { generation, .. }| Name::Base { chunk, generation }.to_string());
        let deltas = self
            .deltas
            .iter()
            .map(|&Delta { generation, offset, length }| Name::Delta { chunk, generation, offset, length }.to_string());
        base.into_iter().chain(deltas).collect()
    }

    pub(crate) fn has_objects(&self) -> bool {
        self.base.is_some() || !self.deltas.is_empty()
    }

    /// Takes back what was on its way and did not arrive; what was written since is newer.
    pub(crate) fn take_back(&mut self) {
        let flying = std::mem::take(&mut self.flying);
        if self.dirty.zeroed {
            return;
        }
        self.dirty.zeroed = flying.zeroed;
        for (block, page) in flying.blocks {
            self.dirty.blocks.entry(block).or_insert(page);
        }
    }
}

/// What a LIST shows.
pub(crate) struct Loaded {
    pub(crate) chunks: BTreeMap<u64, Chunk>,
    /// Objects that are superseded.
    pub(crate) superseded: Vec<String>,
    /// Who opened it for writing, ascending.
    pub(crate) writers: Vec<u64>,
}

/// The most objects that a store of this size may have.
pub(crate) fn most_objects(descriptor: Descriptor) -> u64 {
    descriptor.chunks() * (2 * MAX_DELTAS as u64 + 2) + SPARE_OBJECTS
}

/// Makes the map out of names and sizes of objects.
pub(crate) fn load(descriptor: Descriptor, objects: &[(String, u64)]) -> Result<Loaded, String> {
    let mut loaded = Loaded { chunks: BTreeMap::new(), superseded: Vec::new(), writers: Vec::new() };
    let mut deltas: Vec<(u64, Delta)> = Vec::new();
    for (text, size) in objects {
        let (Some(name), size) = (Name::parse(text), *size) else { continue };
        match name {
            Name::Writer { generation } => loaded.writers.push(generation),
            Name::Base { chunk, .. } | Name::Delta { chunk, .. } if chunk >= descriptor.chunks() => {}
            Name::Base { chunk, generation } => {
                if size > descriptor.chunk_size || !size.is_multiple_of(BLOCK) {
                    return Err(format!("{text} has {size} bytes, which no base has"));
                }
                let entry = loaded.chunks.entry(chunk).or_default();
                entry.last = entry.last.max(generation);
                let (mut older, mut newer) = (entry.base, Base { generation, length: size });
                if let Some(other) = older.filter(|other| other.generation > generation) {
                    (older, newer) = (Some(newer), other);
                }
                let gone = older.map(|base| Name::Base { chunk, generation: base.generation }.to_string());
                loaded.superseded.extend(gone);
                entry.base = Some(newer);
            }
            Name::Delta { chunk, generation, offset, length } => {
                let inside = offset + length <= descriptor.chunk_size && length > 0;
                if !inside || !offset.is_multiple_of(BLOCK) || !length.is_multiple_of(BLOCK) || size != length {
                    return Err(format!("{text} has {size} bytes, which this delta has not"));
                }
                deltas.push((chunk, Delta { generation, offset, length }));
            }
        }
    }
    deltas.sort_unstable_by_key(|(chunk, delta)| (*chunk, delta.generation));
    for (chunk, delta) in deltas {
        let entry = loaded.chunks.entry(chunk).or_default();
        entry.last = entry.last.max(delta.generation);
        if entry.base.is_some_and(|base| base.generation > delta.generation) {
            let Delta { generation, offset, length } = delta;
            loaded.superseded.push(Name::Delta { chunk, generation, offset, length }.to_string());
        } else {
            entry.deltas.push(delta);
        }
    }
    loaded.writers.sort_unstable();
    let last = loaded.chunks.values().map(|chunk| chunk.last).chain(loaded.writers.last().copied()).max();
    if last.is_some_and(|last| last > u64::MAX / 2) {
        return Err("a generation is so large that none can follow".to_owned());
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESCRIPTOR: Descriptor = Descriptor { size: 10 << 20, chunk_size: 4 << 20 };

    fn loaded(objects: &[(&str, u64)]) -> Result<Loaded, String> {
        let objects: Vec<_> = objects.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect();
        load(DESCRIPTOR, &objects)
    }

    #[test]
    fn the_highest_base_and_what_is_above_it_count() {
        let map = loaded(&[
            ("chunk/00000001/0000000000000009-00000000-00001000", 4096),
            ("chunk/00000001/0000000000000005", 4 << 20),
            ("chunk/00000001/0000000000000003", 4 << 20),
            ("chunk/00000001/0000000000000004-00001000-00001000", 4096),
            ("chunk/00000001/0000000000000006-00000000-00002000", 8192),
            ("chunk/00000007/0000000000000006", 4 << 20),
            ("writer/0000000000000002", 0),
            ("somebody/else", 1),
        ])
        .unwrap();
        assert_eq!(
            map.superseded,
            ["chunk/00000001/0000000000000003", "chunk/00000001/0000000000000004-00001000-00001000"]
        );
        assert_eq!(map.writers, [2]);
        assert_eq!(map.chunks.len(), 1, "a chunk beyond the end is none");
        let chunk = &map.chunks[&1];
        assert_eq!((chunk.last, chunk.deltas.len()), (9, 2));
        let generation = |block| match chunk.find(1, block) {
            Source::Object(Name::Base { generation, .. } | Name::Delta { generation, .. }, _) => generation,
            _ => 0,
        };
        assert_eq!([generation(0), generation(1), generation(2)], [9, 6, 5]);
    }

    #[test]
    fn objects_that_cannot_be_are_refused() {
        for (name, size) in [
            ("chunk/00000001/0000000000000005", (4 << 20) + 4096),
            ("chunk/00000001/0000000000000005", 100),
            ("chunk/00000001/0000000000000005-00000000-00001000", 8192),
            ("chunk/00000001/0000000000000005-00000000-00000000", 0),
            ("chunk/00000001/0000000000000005-00000001-00001000", 4096),
            ("chunk/00000001/0000000000000005-003ff000-00002000", 8192),
            ("chunk/00000001/ffffffffffffffff", 4096),
        ] {
            assert!(loaded(&[(name, size)]).is_err(), "{name}");
        }
    }
}

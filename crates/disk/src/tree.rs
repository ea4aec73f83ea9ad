//! Reading the index: from the root down, each node verified against the entry that led to it.

use std::sync::Arc;

use nacre_core::{BlockError, Page, ReadRequest};
use zerocopy::IntoBytes as _;

use crate::{
    checkpoint::Root,
    keys::Purpose,
    layout::BLOCK,
    node::{Entry, FANOUT_BITS, Node},
    shared::Shared,
    stats::add,
};

/// Which tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tree {
    /// LBA → block of data.
    Index,
    /// Number of a bitmap page → the page.
    Space,
}

/// A place in a tree: level 0 nodes lead to what the tree is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) tree: Tree,
    pub(crate) level: u8,
    pub(crate) number: u64,
}

/// The level of what is no node: bitmap pages.
pub(crate) const PAGE: u8 = 0xff;

impl Position {
    /// The associated data: tree, level, zeroes, number.
    pub(crate) fn aad(&self) -> [u8; 16] {
        let mut aad = [0; 16];
        aad[0] = match self.tree {
            Tree::Index => 1,
            Tree::Space => 2,
        };
        aad[1] = self.level;
        aad[8..].copy_from_slice(&self.number.to_le_bytes());
        aad
    }

    /// The keys below: (first, how many).
    pub(crate) fn span(&self) -> (u64, u64) {
        let bits = FANOUT_BITS * (u32::from(self.level) + 1);
        (self.number << bits, 1 << bits)
    }

    fn describe(&self) -> String {
        match (self.tree, self.level) {
            (Tree::Index, level) => format!("index node {} of level {level}", self.number),
            (Tree::Space, PAGE) => format!("bitmap page {}", self.number),
            (Tree::Space, level) => format!("node {} of level {level} of the bitmap's tree", self.number),
        }
    }

    /// The error for a node that is not what it has to be.
    pub(crate) fn damaged(&self, entry: &Entry, why: &str, blocks: u64) -> BlockError {
        let (first, count) = if self.tree == Tree::Index { self.span() } else { (0, blocks) };
        let first = first.min(blocks.saturating_sub(1));
        let what = format!("{} at block {} of the store {why}", self.describe(), entry.place());
        BlockError::Integrity { first, count: count.min(blocks - first), what }
    }
}

impl Shared {
    /// Reads and verifies what an entry leads to.
    pub(crate) fn load(&self, entry: &Entry, at: Position) -> Result<Arc<Node>, BlockError> {
        if let Some(node) = self.cached(entry) {
            return Ok(node);
        }
        let mut page = Page::zeroed();
        self.store.read_at(entry.place() * BLOCK, &mut page.0)?;
        self.admit(entry, at, &mut page)
    }

    pub(crate) fn cached(&self, entry: &Entry) -> Option<Arc<Node>> {
        let node = self.cache.get(entry.version());
        let counter = if node.is_some() { &self.counters.cache_hits } else { &self.counters.cache_misses };
        add(counter, 1);
        node
    }

    /// Verifies what was read, and keeps it.
    fn admit(&self, entry: &Entry, at: Position, page: &mut Page) -> Result<Arc<Node>, BlockError> {
        self.verify(entry, at, page).map_err(|why| {
            add(&self.counters.integrity_errors, 1);
            at.damaged(entry, &why, self.lock().blocks)
        })?;
        let node = Arc::new(Node::of(page).clone());
        self.cache.put(entry.version(), Arc::clone(&node));
        Ok(node)
    }

    /// Decrypts and verifies a node or bitmap page in place.
    pub(crate) fn verify(&self, entry: &Entry, at: Position, page: &mut Page) -> Result<(), String> {
        let keys =
            self.keys.epoch(entry.epoch()).ok_or_else(|| format!("names an unknown epoch, {}", entry.epoch()))?;
        if !keys.sealer(Purpose::Index).open(entry.count(), &at.aad(), entry.tag(), &mut page.0) {
            return Err("is not what was written there".into());
        }
        if at.level == PAGE {
            return Ok(());
        }
        let geometry = self.geometry();
        Node::of(page)
            .validate(geometry.data_start(), geometry.store_blocks())
            .map_err(|what| format!("is authentic and makes no sense: {what}"))
    }

    /// Reads several nodes at once; an answer for each.
    pub(crate) fn load_many(&self, wanted: &[(Entry, Position)]) -> Vec<Result<Arc<Node>, BlockError>> {
        let mut answers: Vec<Option<Result<Arc<Node>, BlockError>>> =
            wanted.iter().map(|(entry, _)| self.cached(entry).map(Ok)).collect();
        let missing: Vec<usize> =
            (0..wanted.len()).filter(|at| answers.get(*at).is_some_and(Option::is_none)).collect();
        let mut pages = self.pool.take(missing.len());
        let mut requests: Vec<ReadRequest<'_>> = missing
            .iter()
            .zip(&mut pages)
            .filter_map(|(at, page)| Some(ReadRequest::new(wanted.get(*at)?.0.place() * BLOCK, &mut page.0)))
            .collect();
        self.store.read_many(&mut requests);
        let outcomes: Vec<_> = requests.into_iter().map(|request| request.outcome).collect();
        for ((at, page), outcome) in missing.iter().zip(&mut pages).zip(outcomes) {
            if let (Some((entry, position)), Some(answer)) = (wanted.get(*at), answers.get_mut(*at)) {
                *answer = Some(outcome.and_then(|()| self.admit(entry, *position, page)));
            }
        }
        self.wipe(pages);
        answers.into_iter().flatten().collect()
    }

    /// Pages that held plaintext go back without it.
    pub(crate) fn wipe(&self, mut pages: Vec<Box<Page>>) {
        pages.iter_mut().for_each(|page| page.0.as_mut_bytes().fill(0));
        self.pool.give(pages);
    }

    /// What the tree says of one key.
    fn look_up_one(&self, tree: Tree, root: &Root, key: u64) -> Result<Entry, BlockError> {
        let mut entry = root.entry;
        for level in (0..root.height).rev() {
            if entry.is_hole() {
                break;
            }
            let shift = FANOUT_BITS * u32::from(level);
            let slot = (key >> shift) & 127;
            entry = match self.cache.look(entry.version(), |node| node.entry(slot)) {
                Some(below) => {
                    add(&self.counters.cache_hits, 1);
                    below
                }
                None => {
                    let position = Position { tree, level, number: key >> shift >> FANOUT_BITS };
                    self.load(&entry, position)?.entry(slot)
                }
            };
        }
        Ok(entry)
    }

    /// What the tree says of some keys, in ascending order for speed. Nodes that are not in memory are read level by level, all of a
    /// level at once.
    pub(crate) fn look_up(&self, tree: Tree, root: &Root, keys: &[u64]) -> Vec<Result<Entry, BlockError>> {
        // A disk that grew has keys that the tree is not high enough for: holes.
        let beyond = |key: &u64| root.height < 9 && key >> (FANOUT_BITS * u32::from(root.height)) > 0;
        let start = |key: &u64| if beyond(key) { Entry::HOLE } else { root.entry };
        if let [key] = keys {
            return vec![if beyond(key) { Ok(Entry::HOLE) } else { self.look_up_one(tree, root, *key) }];
        }
        let mut found: Vec<Result<Entry, BlockError>> = keys.iter().map(|key| Ok(start(key))).collect();
        for level in (0..root.height).rev() {
            let shift = FANOUT_BITS * u32::from(level);
            let mut wanted: Vec<(Entry, Position)> = Vec::new();
            let mut which = vec![usize::MAX; keys.len()];
            for ((key, entry), which) in keys.iter().zip(&found).zip(&mut which) {
                let Ok(entry) = entry else { continue };
                if entry.is_hole() {
                    continue;
                }
                let position = Position { tree, level, number: key >> shift >> FANOUT_BITS };
                if wanted.last().is_none_or(|(last, _)| last != entry) {
                    wanted.push((*entry, position));
                }
                *which = wanted.len() - 1;
            }
            let nodes = match wanted.as_slice() {
                [] => return found,
                [(entry, position)] => vec![self.load(entry, *position)],
                many => self.load_many(many),
            };
            for ((key, found), which) in keys.iter().zip(&mut found).zip(which) {
                if let Some(node) = nodes.get(which) {
                    *found = node.clone().map(|node| node.entry((key >> shift) & 127));
                }
            }
        }
        found
    }
}

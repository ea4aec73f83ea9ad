//! Extended attributes of a tree: each pair of name and value once, and each set of pairs once.

use std::{collections::HashMap, sync::Arc};

use super::{TreeError, shown};
use crate::erofs::layout::{XATTR_HEADER, is_xattr_name, prefix_text, split_xattr_name, xattr_entry_size};

/// The most bytes of an inode's attributes: the header's 12, and 65,534 times 4.
const MOST_BYTES: usize = XATTR_HEADER + 65_534 * 4;

/// A name and a value. They sort as the profile has them.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Pair {
    pub(crate) prefix: u8,
    pub(crate) name: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

impl Pair {
    pub(crate) fn full_name(&self) -> Vec<u8> {
        [prefix_text(self.prefix).unwrap_or_default(), &self.name].concat()
    }

    pub(crate) fn size(&self) -> usize {
        xattr_entry_size(self.name.len(), self.value.len())
    }
}

/// All pairs and sets. What nobody uses any longer is not removed: there are few, and they go with the tree.
#[derive(Default)]
pub(crate) struct Xattrs {
    pub(crate) pairs: Vec<Arc<Pair>>,
    by_pair: HashMap<Arc<Pair>, u32>,
    /// Numbers of pairs, in the order of names. Set 1 is the first.
    sets: Vec<Arc<[u32]>>,
    by_set: HashMap<Arc<[u32]>, u32>,
}

impl Xattrs {
    /// The pairs of a set, as numbers.
    pub(crate) fn numbers(&self, set: u32) -> &[u32] {
        let at = usize::try_from(set).ok().and_then(|set| set.checked_sub(1));
        at.and_then(|at| self.sets.get(at)).map_or(&[], |set| set)
    }

    /// The highest number of a set.
    pub(crate) fn sets(&self) -> usize {
        self.sets.len()
    }

    pub(crate) fn pair(&self, number: u32) -> Option<&Pair> {
        self.pairs.get(usize::try_from(number).ok()?).map(|pair| &**pair)
    }

    /// The pairs of a set.
    pub(crate) fn set(&self, set: u32) -> impl Iterator<Item = &Pair> {
        self.numbers(set).iter().filter_map(|number| self.pair(*number))
    }

    pub(super) fn intern(&mut self, path: &[&[u8]], xattrs: &[(&[u8], &[u8])]) -> Result<u32, TreeError> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        let bad = |name: &[u8]| TreeError::Xattr { path: shown(path), name: shown(&[name]) };
        let mut pairs = Vec::with_capacity(xattrs.len());
        for (name, value) in xattrs {
            let parts = split_xattr_name(name).filter(|(prefix, rest)| is_xattr_name(*prefix, rest));
            let (prefix, rest) = parts.filter(|_| u16::try_from(value.len()).is_ok()).ok_or_else(|| bad(name))?;
            pairs.push(Pair { prefix, name: rest.into(), value: (*value).into() });
        }
        pairs.sort_unstable();
        let twice = pairs.iter().zip(pairs.iter().skip(1)).find(|(a, b)| a.prefix == b.prefix && a.name == b.name);
        if let Some((one, _)) = twice {
            return Err(bad(&one.full_name()));
        }
        // As if none were shared: which are is only known when the tree is complete.
        if XATTR_HEADER + pairs.iter().map(Pair::size).sum::<usize>() > MOST_BYTES {
            return Err(TreeError::Xattrs { path: shown(path) });
        }
        let mut set = Vec::with_capacity(pairs.len());
        for pair in pairs {
            set.push(self.intern_pair(pair)?);
        }
        if let Some(number) = self.by_set.get(&set[..]) {
            return Ok(*number);
        }
        let set: Arc<[u32]> = set.into();
        self.sets.push(Arc::clone(&set));
        let number = u32::try_from(self.sets.len()).map_err(|_| TreeError::Full)?;
        self.by_set.insert(set, number);
        Ok(number)
    }

    fn intern_pair(&mut self, pair: Pair) -> Result<u32, TreeError> {
        if let Some(number) = self.by_pair.get(&pair) {
            return Ok(*number);
        }
        let number = u32::try_from(self.pairs.len()).map_err(|_| TreeError::Full)?;
        let pair = Arc::new(pair);
        self.pairs.push(Arc::clone(&pair));
        self.by_pair.insert(pair, number);
        Ok(number)
    }
}

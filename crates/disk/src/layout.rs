//! Where things are on the store.
//!
//! ```text
//! block 0          superblock
//! block 1          its copy
//! 2 …              checkpoint slot A, checkpoint slot B     (checkpoint_blocks each)
//! …                journal ring                             (journal_blocks)
//! data_start …     segments                                 (segment_blocks each, whole ones only)
//! ```
//! Data, index nodes and bitmap pages all live in segments, wherever there is room. Growing adds segments at the end.

use nacre_core::BLOCK_SIZE;

use crate::{DiskError, node};

/// Bytes of a block, as a number for offsets.
pub(crate) const BLOCK: u64 = BLOCK_SIZE as u64;
/// The smallest disk: 16 MiB.
pub const SMALLEST: u64 = 16 << 20;
/// The largest disk: 64 TiB.
pub const LARGEST: u64 = 64 << 40;
/// The smallest reserve, in percent.
pub const LEAST_RESERVE: u8 = 3;
/// The largest.
pub const MOST_RESERVE: u8 = 100;
/// Epochs that a checkpoint has room for.
pub const MOST_EPOCHS: usize = 512;
/// Segments of a new disk, at most.
const SEGMENTS: u64 = 32_768;
/// Segments of a disk that grew, at most.
pub(crate) const MOST_SEGMENTS: u64 = 65_536;
/// The smallest segment: 1 MiB.
const LEAST_SEGMENT: u64 = 256;
/// Segments beyond what blocks, metadata and reserve need: slots that were freed in an open segment, or in one that the last merge
/// wrote index nodes to, cannot be had before it is closed and the next checkpoint is durable.
const SPARE: u64 = 2;
/// Slots that a bitmap page tells of.
pub(crate) const PAGE_SLOTS: u64 = BLOCK * 8;
/// The journal's bounds, in blocks.
const JOURNAL: (u64, u64) = (64, 8192);

/// The numbers of a layout, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Geometry {
    /// Of a segment.
    pub segment_blocks: u64,
    /// Of each of the two checkpoint slots.
    pub checkpoint_blocks: u64,
    /// Of the journal ring.
    pub journal_blocks: u64,
    /// How many segments there are.
    pub segments: u64,
    /// How much is kept free for cleaning, in percent of the disk.
    pub reserve_percent: u8,
}

impl Geometry {
    /// The layout of a disk of `blocks` blocks.
    pub(crate) fn plan(blocks: u64, reserve_percent: u8) -> Self {
        let physical = Self::physical(blocks, reserve_percent);
        let mut segment_blocks = LEAST_SEGMENT;
        while physical.div_ceil(segment_blocks) + SPARE > SEGMENTS {
            segment_blocks *= 2;
        }
        let segments = physical.div_ceil(segment_blocks) + SPARE;
        let most_segments = (segments * 16).clamp(1024, MOST_SEGMENTS);
        Self {
            segment_blocks,
            checkpoint_blocks: crate::checkpoint::blocks_for(most_segments, most_segments * segment_blocks),
            journal_blocks: (blocks / 128).clamp(JOURNAL.0, JOURNAL.1),
            segments,
            reserve_percent,
        }
    }

    /// Blocks that a disk needs for its data, its metadata and its reserve.
    fn physical(blocks: u64, reserve_percent: u8) -> u64 {
        let reserve = (blocks / 100 * u64::from(reserve_percent)).max(128);
        // Twice the metadata in the reserve: the next checkpoint is written before the last one is freed.
        let metadata = Self::metadata(blocks, blocks + blocks / 4 + reserve);
        blocks + metadata + reserve.max(2 * metadata + 128)
    }

    /// Index nodes and bitmap pages of a disk with so many logical and physical blocks, at most.
    pub(crate) fn metadata(blocks: u64, physical: u64) -> u64 {
        let pages = physical.div_ceil(PAGE_SLOTS);
        node::nodes(blocks) + pages + node::nodes(pages)
    }

    /// The segments that a disk of this layout needs for `blocks` logical blocks.
    pub(crate) fn segments_for(&self, blocks: u64) -> u64 {
        Self::physical(blocks, self.reserve_percent).div_ceil(self.segment_blocks) + SPARE
    }

    /// The most segments that this layout's checkpoints have room for.
    pub(crate) fn most_segments(&self) -> u64 {
        (0..=MOST_SEGMENTS.ilog2())
            .map(|bits| 1 << bits)
            .filter(|segments| {
                crate::checkpoint::blocks_for(*segments, segments * self.segment_blocks) <= self.checkpoint_blocks
            })
            .max()
            .unwrap_or(0)
            .max(self.segments)
    }

    pub(crate) fn checkpoint_slot(&self, generation: u64) -> u64 {
        2 + (generation % 2) * self.checkpoint_blocks
    }

    pub(crate) fn journal_start(&self) -> u64 {
        2 + 2 * self.checkpoint_blocks
    }

    /// The first block of the first segment.
    pub fn data_start(&self) -> u64 {
        self.journal_start() + self.journal_blocks
    }

    /// Blocks in segments.
    pub fn slots(&self) -> u64 {
        self.segments * self.segment_blocks
    }

    /// Blocks of the store that the disk uses.
    pub fn store_blocks(&self) -> u64 {
        self.data_start() + self.slots()
    }

    /// Bitmap pages.
    pub(crate) fn pages(&self) -> u64 {
        self.slots().div_ceil(PAGE_SLOTS)
    }

    /// The segment of a block of the store.
    pub(crate) fn segment_of(&self, place: u64) -> usize {
        usize::try_from(place.saturating_sub(self.data_start()) / self.segment_blocks).unwrap_or(usize::MAX)
    }

    /// What is wrong with numbers that were read from a superblock.
    pub(crate) fn validate(&self, store_blocks: u64) -> Result<(), String> {
        let sane = self.segment_blocks.is_power_of_two()
            && (LEAST_SEGMENT..=1 << 24).contains(&self.segment_blocks)
            && (1..=MOST_SEGMENTS).contains(&self.segments)
            && (JOURNAL.0..=JOURNAL.1).contains(&self.journal_blocks)
            && (1..=1 << 20).contains(&self.checkpoint_blocks)
            && (LEAST_RESERVE..=MOST_RESERVE).contains(&self.reserve_percent);
        if !sane {
            return Err(format!("its layout makes no sense: {self:?}"));
        }
        if self.store_blocks() > store_blocks {
            return Err(format!(
                "the store has {store_blocks} blocks, the disk was made on {}: it was cut short",
                self.store_blocks()
            ));
        }
        Ok(())
    }
}

/// A disk's size in blocks, or why it cannot be one.
pub(crate) fn check_size(size: u64) -> Result<u64, DiskError> {
    if !(SMALLEST..=LARGEST).contains(&size) || !size.is_multiple_of(BLOCK) {
        return Err(DiskError::Setting(format!(
            "a disk of {size} bytes cannot be: it has 16 MiB to 64 TiB, in whole blocks of 4096 bytes"
        )));
    }
    Ok(size / BLOCK)
}

/// The largest disk that fits a store of `store_blocks` blocks.
pub(crate) fn largest_on(store_blocks: u64, reserve_percent: u8) -> Result<u64, DiskError> {
    let fits = |blocks: u64| Geometry::plan(blocks, reserve_percent).store_blocks() <= store_blocks;
    let (mut low, mut high) = (SMALLEST / BLOCK, LARGEST / BLOCK);
    if !fits(low) {
        let least = Geometry::plan(low, reserve_percent).store_blocks() * BLOCK;
        return Err(DiskError::Setting(format!(
            "the store has {} bytes; the smallest disk needs {least}",
            store_blocks * BLOCK
        )));
    }
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_hold_their_promises_of_size() {
        for size in [SMALLEST, 64 << 20, 1 << 30, 4 << 30, 100 << 30, 1 << 40, LARGEST] {
            let blocks = size / BLOCK;
            let plan = Geometry::plan(blocks, 10);
            plan.validate(plan.store_blocks()).unwrap();
            assert!(plan.segments <= SEGMENTS && plan.segments <= plan.most_segments());
            let metadata = Geometry::metadata(blocks, plan.slots()) + plan.data_start();
            if size >= 1 << 30 {
                assert!(metadata * 50 <= blocks, "{size}: {metadata} of {blocks}");
                let all = plan.store_blocks() * 1000 / blocks;
                assert!(all <= 1125, "{size}: {all}");
            }
            assert!(plan.slots() >= blocks + blocks / 10 + Geometry::metadata(blocks, plan.slots()));
            assert!(largest_on(plan.store_blocks(), 10).unwrap() >= blocks);
        }
        assert!(largest_on(100, 10).is_err());
    }

    #[test]
    fn a_store_that_was_cut_short_is_seen() {
        let plan = Geometry::plan(4096, 10);
        assert!(plan.validate(plan.store_blocks() - 1).unwrap_err().contains("cut short"));
        assert!(Geometry { segment_blocks: 300, ..plan }.validate(1 << 40).is_err());
    }
}

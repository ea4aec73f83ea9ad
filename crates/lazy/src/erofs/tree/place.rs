//! Files get their places when all of them are known.

use super::{Data, Tree};

impl Tree {
    /// Changes the first block of every file that has bytes: `place` gets what [`put`](Self::put) was given.
    pub fn place_files(&mut self, mut place: impl FnMut(u32) -> u32) {
        for inode in &mut self.inodes {
            if let Data::File { size: 1.., block } = &mut inode.data {
                *block = place(*block);
            }
        }
    }
}

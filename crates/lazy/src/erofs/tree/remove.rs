//! What takes names away: whiteouts, opaque directories, and what others replace.

use super::{Attributes, Child, Data, Inode, ROOT, Tree, TreeError, check_path, shown};

impl Tree {
    /// A whiteout: removes what lower layers have at a path and below. What this layer put below it stays, in directories that have
    /// the attributes of implied ones unless this layer has entries for them. `false` where lower layers have nothing there.
    ///
    /// # Errors
    /// The path is the root's, or no path.
    pub fn whiteout(&mut self, path: &[&[u8]]) -> Result<bool, TreeError> {
        let Some((name, parents)) = path.split_last() else { return Err(TreeError::Root) };
        check_path(path)?;
        let Some(parent) = self.find(parents) else { return Ok(false) };
        let Some(child) = self.child(parent, name) else { return Ok(false) };
        let (kept, removed) = self.prune(child)?;
        let Data::Directory(children) = &mut self.inode_mut(parent)?.data else { return Ok(false) };
        match kept {
            Some(child) => {
                children.insert((*name).into(), child);
            }
            None => {
                children.remove(*name);
                self.lost(parent, child.inode)?;
            }
        }
        Ok(removed)
    }

    /// An opaque directory: removes what lower layers put into it, at any depth. Where it is not there, it is made.
    ///
    /// # Errors
    /// The path leads to or through something that is no directory.
    pub fn opaque(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        check_path(path)?;
        let directory = if path.is_empty() { ROOT } else { self.make(path)? };
        self.empty(directory)?;
        Ok(())
    }

    /// A name of a directory no longer leads to an inode.
    pub(super) fn lost(&mut self, directory: u32, inode: u32) -> Result<(), TreeError> {
        if self.inode(inode).is_some_and(Inode::is_directory) {
            let parent = self.inode_mut(directory)?;
            parent.links = parent.links.saturating_sub(1);
        }
        let mut gone = vec![inode];
        while let Some(number) = gone.pop() {
            let inode = self.inode_mut(number)?;
            inode.links = if inode.is_directory() { 0 } else { inode.links.saturating_sub(1) };
            if inode.links > 0 {
                continue;
            }
            if let Data::Directory(children) = std::mem::replace(&mut inode.data, Data::Free) {
                gone.extend(children.values().map(|child| child.inode));
            }
            self.free.push(number);
        }
        Ok(())
    }

    /// What stays of a name when lower layers no longer count, and whether something went.
    fn prune(&mut self, child: Child) -> Result<(Option<Child>, bool), TreeError> {
        let ours = child.layer == self.layer;
        if !self.inode(child.inode).is_some_and(Inode::is_directory) {
            return Ok((ours.then_some(child), !ours));
        }
        let (left, removed) = self.empty(child.inode)?;
        if ours {
            return Ok((Some(child), removed));
        }
        if !left {
            return Ok((None, true));
        }
        self.inode_mut(child.inode)?.set(&Attributes::IMPLIED, 0);
        Ok((Some(Child { layer: self.layer, ..child }), true))
    }

    /// Removes what lower layers put into a directory: whether something is left, and whether something went. It is as deep as the
    /// tree, which is bounded.
    fn empty(&mut self, directory: u32) -> Result<(bool, bool), TreeError> {
        let Data::Directory(children) = &mut self.inode_mut(directory)?.data else {
            return Err(TreeError::NotADirectory { path: shown(&[]) });
        };
        let mut children = std::mem::take(children);
        let (mut gone, mut removed, mut error) = (Vec::new(), false, None);
        children.retain(|_, child| match self.prune(*child) {
            Ok((kept, some)) => {
                removed |= some;
                match kept {
                    Some(kept) => *child = kept,
                    None => gone.push(child.inode),
                }
                kept.is_some()
            }
            Err(found) => {
                error = Some(found);
                true
            }
        });
        let left = !children.is_empty();
        if let Data::Directory(place) = &mut self.inode_mut(directory)?.data {
            *place = children;
        }
        for inode in gone {
            self.lost(directory, inode)?;
        }
        error.map_or(Ok((left, removed)), Err)
    }
}

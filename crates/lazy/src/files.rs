//! An image as files: paths, attributes, contents. For those who serve it themselves, where no kernel mounts it.
//!
//! Paths are resolved within the image: whatever a symbolic link says, its root is `/`, and `..` does not lead out of it.

use std::{fs::File, sync::Arc};

use crate::{
    device::DeviceReader,
    erofs::{self, Dirent, FileType, Image, Inode},
    format::BLOCK,
    reader,
};

/// The most symbolic links that a path may lead through.
pub const LINKS_LIMIT: u32 = 40;
/// The most bytes of a path.
pub const PATH_LIMIT: usize = 4095;
/// The most bytes of a name.
pub const NAME_LIMIT: usize = 255;

/// The most bytes that are asked of the reader at once.
const PIECE: usize = 1 << 20;

/// Why something of an image's files is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such name.
    #[error("there is no such file")]
    NotFound,
    /// What stands before a name is no directory, or what should be one is none.
    #[error("it is no directory")]
    NotDirectory,
    /// It is a directory.
    #[error("it is a directory")]
    IsDirectory,
    /// Neither a file nor a directory, or not a symbolic link where one is wanted.
    #[error("it is {0}")]
    Kind(&'static str),
    /// More than 40 symbolic links.
    #[error("it leads through more than {LINKS_LIMIT} symbolic links")]
    Links,
    /// A path of more than 4095 bytes, or a name of more than 255.
    #[error("the path, or a name in it, is too long")]
    Long,
    /// There is no such attribute.
    #[error("it has no such attribute")]
    NoAttribute,
    /// The image's tree.
    #[error(transparent)]
    Tree(#[from] erofs::ReadError),
    /// The content.
    #[error(transparent)]
    Read(#[from] reader::ReadError),
}

/// The files of an opened image.
pub struct Files {
    tree: Image<File>,
    reader: Arc<dyn DeviceReader>,
}

impl Files {
    /// The files of a tree, which was checked, and of its data device.
    pub fn new(tree: Image<File>, reader: Arc<dyn DeviceReader>) -> Self {
        Self { tree, reader }
    }

    /// The data device.
    pub fn reader(&self) -> &dyn DeviceReader {
        &*self.reader
    }

    /// What a path leads to, from the root on whether it begins with `/` or not. `follow`: a symbolic link at its end leads on.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn find(&self, path: &[u8], follow: bool) -> Result<Inode, FileError> {
        let root = self.tree.inode(self.tree.root())?;
        // The directories above where we are, and it.
        let (mut above, mut here) = (Vec::new(), root);
        let mut todo = Vec::new();
        push(path, &mut todo)?;
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if here.file_type != FileType::Directory {
                return Err(FileError::NotDirectory);
            }
            match name.as_slice() {
                b"." => continue,
                b".." => {
                    here = above.pop().unwrap_or(root);
                    continue;
                }
                _ => {}
            }
            let (nid, _) = self.tree.lookup(&here, &name)?.ok_or(FileError::NotFound)?;
            let next = self.tree.inode(nid)?;
            if next.file_type != FileType::Symlink || (todo.is_empty() && !follow) {
                above.push(std::mem::replace(&mut here, next));
                continue;
            }
            links += 1;
            if links > LINKS_LIMIT {
                return Err(FileError::Links);
            }
            let target = self.tree.read_link(&next)?;
            push(&target, &mut todo)?;
            if target.starts_with(b"/") {
                above.clear();
                here = root;
            }
        }
        Ok(here)
    }

    /// Reads a file's content from an offset on; how much came is less than wanted at the file's end only.
    ///
    /// # Errors
    /// [`FileError`]: then `out` has nothing to be used.
    pub fn read(&self, file: &Inode, offset: u64, out: &mut [u8]) -> Result<usize, FileError> {
        match file.file_type {
            FileType::Regular => {}
            FileType::Directory => return Err(FileError::IsDirectory),
            other => return Err(FileError::Kind(other.text())),
        }
        let left = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = left.min(out.len());
        let (Some(out), Some(extent)) = (out.get_mut(..length).filter(|out| !out.is_empty()), file.extent) else {
            return Ok(0);
        };
        let start = u64::from(extent.block) * BLOCK + offset;
        for (number, piece) in (0..).zip(out.chunks_mut(PIECE)) {
            self.reader.read_at(start + number * PIECE as u64, piece)?;
        }
        Ok(length)
    }

    /// Goes through a directory from a place on, 0 or a [`Dirent::next`], until `each` says `false` or it ends; `.` and `..` are among
    /// its entries.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn list(&self, directory: &Inode, from: u64, each: impl FnMut(Dirent<'_>) -> bool) -> Result<(), FileError> {
        if directory.file_type != FileType::Directory {
            return Err(FileError::NotDirectory);
        }
        Ok(self.tree.read_dir(directory, from, each)?)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read_link(&self, link: &Inode) -> Result<Vec<u8>, FileError> {
        if link.file_type != FileType::Symlink {
            return Err(FileError::Kind(link.file_type.text()));
        }
        Ok(self.tree.read_link(link)?)
    }

    /// The value of an extended attribute.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Result<Vec<u8>, FileError> {
        self.tree.xattr(inode, name)?.ok_or(FileError::NoAttribute)
    }

    /// The names of the extended attributes.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn xattr_names(&self, inode: &Inode) -> Result<Vec<Vec<u8>>, FileError> {
        let mut names = Vec::new();
        self.tree.xattrs(inode, |xattr| {
            names.push(xattr.full_name());
            true
        })?;
        Ok(names)
    }
}

/// Puts the names of a path on a stack, the first on top. One that ends with a slash has to lead to a directory.
fn push(path: &[u8], todo: &mut Vec<Vec<u8>>) -> Result<(), FileError> {
    if path.is_empty() {
        return Err(FileError::NotFound);
    }
    if path.len() > PATH_LIMIT {
        return Err(FileError::Long);
    }
    if path.ends_with(b"/") {
        todo.push(b".".to_vec());
    }
    for name in path.split(|byte| *byte == b'/').rev().filter(|name| !name.is_empty()) {
        if name.len() > NAME_LIMIT {
            return Err(FileError::Long);
        }
        todo.push(name.to_vec());
    }
    Ok(())
}

//! The directories from the layer's root to where the current entry goes, open.
//!
//! Tars go depth first, so a stack of open directories makes an entry cost no path walk. A directory's times are set when it leaves
//! the stack, since making things in it changes them; one that is entered again gets back the times that it had. So memory and open
//! files are bounded by the depth, however many directories a layer has.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags, Timespec, Timestamps},
    io::Errno,
};

use super::{UnpackError, WhiteoutMode, names};

/// The most links that are followed for one name, as in the kernel.
const LINKS: usize = 40;

/// An open directory on the stack.
pub(crate) struct Dir {
    name: Vec<u8>,
    pub(crate) fd: OwnedFd,
    /// Its group, which new files may inherit.
    pub(crate) gid: u32,
    /// Its mode as it was opened.
    pub(crate) mode: u32,
    /// Whether it is known to have the attribute that directories with whiteouts have.
    pub(crate) has_origin: bool,
    /// Its times, as they are to be in the end.
    times: Timestamps,
    changed: bool,
}

impl Dir {
    fn open(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::new(name, fs::openat(parent, name, flags, Mode::empty())?)
    }

    fn new(name: &[u8], fd: OwnedFd) -> Result<Self, Errno> {
        let stat = fs::fstat(&fd)?;
        let times = Timestamps {
            last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec.cast_signed() },
            last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.cast_signed() },
        };
        Ok(Self {
            name: name.to_vec(),
            fd,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o7777,
            has_origin: false,
            times,
            changed: false,
        })
    }

    /// Something is about to be made or removed in it.
    pub(crate) fn touch(&mut self) -> BorrowedFd<'_> {
        self.changed = true;
        self.fd.as_fd()
    }

    /// The times and the group that its entry gives it.
    pub(crate) fn set(&mut self, gid: u32, times: Timestamps) {
        self.gid = gid;
        self.times = times;
        self.changed = true;
    }

    fn close(&self) -> Result<(), UnpackError> {
        if self.changed {
            fs::futimens(&self.fd, &self.times).map_err(|errno| UnpackError::io("set times of", &self.name, errno))?;
        }
        Ok(())
    }
}

/// What became of a directory that was asked for.
pub(crate) enum Made {
    /// It was there.
    Found,
    /// It is new.
    New,
    /// It is new, where the layer's whiteout was.
    InPlaceOfWhiteout,
}

/// The stack.
pub(crate) struct Dirs {
    root: Dir,
    below: Vec<Dir>,
    whiteouts: WhiteoutMode,
}

impl Dirs {
    pub(crate) fn new(root: OwnedFd, whiteouts: WhiteoutMode) -> Result<Self, UnpackError> {
        let root = Dir::new(b"/", root).map_err(|errno| UnpackError::io("stat", b"/", errno))?;
        Ok(Self { root, below: Vec::new(), whiteouts })
    }

    /// The directory that the stack ends in.
    pub(crate) fn current(&mut self) -> &mut Dir {
        self.below.last_mut().unwrap_or(&mut self.root)
    }

    /// The group of the directory above the one that the stack ends in.
    pub(crate) fn parent_gid(&self) -> u32 {
        self.below.iter().rev().nth(1).unwrap_or(&self.root).gid
    }

    /// The path of the directory that the stack ends in.
    pub(crate) fn path(&self) -> Vec<u8> {
        self.below.iter().map(|dir| dir.name.as_slice()).collect::<Vec<_>>().join(&b'/')
    }

    /// Leaves every directory and sets its times.
    pub(crate) fn finish(mut self) -> Result<(), UnpackError> {
        self.leave_to(0)?;
        self.root.close()
    }

    fn leave_to(&mut self, depth: usize) -> Result<(), UnpackError> {
        while self.below.len() > depth {
            if let Some(dir) = self.below.pop() {
                dir.close()?;
            }
        }
        Ok(())
    }

    /// Goes to the directory of these components. Missing ones are made, and `implied` is told their path, and whether it was the layer's
    /// whiteout before. Symbolic links of the layer among them are resolved within its root.
    pub(crate) fn go(
        &mut self,
        entry: &[u8],
        components: &[&[u8]],
        mut implied: impl FnMut(&[u8], bool) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        if !self.go_without_links(entry, components, &mut implied)? {
            let resolved = self.resolve(entry, components)?;
            let resolved: Vec<&[u8]> = resolved.iter().map(Vec::as_slice).collect();
            if !self.go_without_links(entry, &resolved, &mut implied)? {
                return Err(UnpackError::refused(entry, "a parent directory is a symbolic link that does not settle"));
            }
        }
        Ok(())
    }

    /// `false` where a component is a symbolic link.
    fn go_without_links(
        &mut self,
        entry: &[u8],
        components: &[&[u8]],
        implied: &mut impl FnMut(&[u8], bool) -> Result<(), UnpackError>,
    ) -> Result<bool, UnpackError> {
        let common = self.below.iter().zip(components).take_while(|(dir, part)| dir.name == **part).count();
        self.leave_to(common)?;
        for part in components.iter().skip(common) {
            match self.enter(part) {
                Ok(Made::Found) => {}
                Ok(Made::New) => implied(&self.path(), false)?,
                Ok(Made::InPlaceOfWhiteout) => implied(&self.path(), true)?,
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    return match kind_of(self.current().fd.as_fd(), part) {
                        Ok(Some(FileType::Symlink)) => Ok(false),
                        _ => Err(UnpackError::Conflict {
                            path: names::shown(entry),
                            reason: format!("its parent '{}' is not a directory", names::shown(part)),
                        }),
                    };
                }
                Err(errno) => return Err(UnpackError::io("open the parent directory of", entry, errno)),
            }
        }
        Ok(true)
    }

    /// Enters a directory of the current one, and makes it where there is none, or a whiteout.
    pub(crate) fn enter(&mut self, name: &[u8]) -> Result<Made, Errno> {
        let parent = self.current();
        match Dir::open(parent.fd.as_fd(), name) {
            Ok(dir) => {
                self.below.push(dir);
                Ok(Made::Found)
            }
            Err(Errno::NOENT) => {
                self.make(name, false)?;
                Ok(Made::New)
            }
            Err(Errno::NOTDIR) if is_whiteout(parent.fd.as_fd(), name)? => {
                fs::unlinkat(parent.touch(), name, AtFlags::empty())?;
                self.make(name, true)?;
                Ok(Made::InPlaceOfWhiteout)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Makes a directory in the current one and enters it. Its owner is ours, its mode 0755 and its time 1970, until an entry says
    /// otherwise, so that what a tar leaves open is the same everywhere.
    pub(crate) fn make(&mut self, name: &[u8], opaque: bool) -> Result<(), Errno> {
        let whiteouts = self.whiteouts;
        let parent = self.current();
        fs::mkdirat(parent.touch(), name, Mode::from_bits_truncate(0o755))?;
        let mut dir = Dir::open(parent.fd.as_fd(), name)?;
        let epoch = Timespec { tv_sec: 0, tv_nsec: 0 };
        dir.times = Timestamps { last_access: epoch, last_modification: epoch };
        dir.changed = true;
        if opaque {
            set_opaque(dir.fd.as_fd(), whiteouts)?;
        }
        self.below.push(dir);
        Ok(())
    }

    /// Resolves symbolic links among the components as if the layer's root were `/`. Components that do not exist stay as they are.
    fn resolve(&self, entry: &[u8], components: &[&[u8]]) -> Result<Vec<Vec<u8>>, UnpackError> {
        let io = |errno| UnpackError::io("resolve the parent directory of", entry, errno);
        let mut todo: Vec<Vec<u8>> = components.iter().rev().map(|part| part.to_vec()).collect();
        let mut done: Vec<Vec<u8>> = Vec::new();
        // The directories of `done`, as far as they exist.
        let mut open: Vec<OwnedFd> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                done.pop();
                open.truncate(done.len());
                continue;
            }
            let exists = open.len() == done.len();
            let parent = open.last().map_or(self.root.fd.as_fd(), |fd| fd.as_fd());
            match if exists { kind_of(parent, &part).map_err(io)? } else { None } {
                Some(FileType::Symlink) => {
                    links += 1;
                    let target = fs::readlinkat(parent, part.as_slice(), Vec::new()).map_err(io)?.into_bytes();
                    if links > LINKS || todo.len() + target.len() / 2 > 1 << 16 {
                        return Err(UnpackError::refused(
                            entry,
                            "too many symbolic links among its parent directories",
                        ));
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                        open.clear();
                    }
                    let parts = target.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
                    todo.extend(parts.rev().map(<[u8]>::to_vec));
                }
                Some(FileType::Directory) => {
                    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let fd = fs::openat(parent, part.as_slice(), flags, Mode::empty()).map_err(io)?;
                    open.push(fd);
                    done.push(part);
                }
                _ => done.push(part),
            }
        }
        Ok(done)
    }

    /// Opens a directory for a hard link's target; `None` where it is not in the layer. Does not move the stack.
    pub(crate) fn find(&self, entry: &[u8], components: &[&[u8]]) -> Result<Option<OwnedFd>, UnpackError> {
        let resolved = self.resolve(entry, components)?;
        let mut at = self.root.fd.try_clone().map_err(|error| UnpackError::io("open", entry, error))?;
        for part in resolved {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match fs::openat(&at, part.as_slice(), flags, Mode::empty()) {
                Ok(fd) => at = fd,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                Err(errno) => return Err(UnpackError::io("open the target's directory of link", entry, errno)),
            }
        }
        Ok(Some(at))
    }
}

/// What `name` is, links not followed; `None` where it is nothing.
pub(crate) fn kind_of(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<FileType>, Errno> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether `name` is overlayfs' whiteout.
pub(crate) fn is_whiteout(parent: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Makes a directory hide what is below it.
pub(crate) fn set_opaque(dir: BorrowedFd<'_>, mode: WhiteoutMode) -> Result<(), Errno> {
    fs::fsetxattr(dir, mode.opaque(), b"y", fs::XattrFlags::empty())
}

/// Whether a directory hides what is below it.
pub(crate) fn is_opaque(dir: BorrowedFd<'_>, mode: WhiteoutMode) -> Result<bool, Errno> {
    let mut value = [0u8; 8];
    match fs::fgetxattr(dir, mode.opaque(), &mut value[..]) {
        Ok(length) => Ok(value.get(..length) == Some(b"y")),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

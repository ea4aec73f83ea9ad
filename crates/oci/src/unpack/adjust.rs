//! What a layer leaves to the layers below it, settled for one stack of layers.
//!
//! Engines unpack a layer into the tree that the layers below have made; we unpack it alone. The result is the same but for two things,
//! which [`AppliedLayer`] records, and which are put into a small directory that is stacked directly above the layer:
//! - A directory that the layer uses without an entry of its own. Where lower layers have it, theirs are the owner, mode, times and
//!   attributes: it is made again with these. Where they have a symbolic link, the layer's files belong where it leads: the link is
//!   made again, and the files are linked there. Where they have nothing and only whiteouts are in it, it is whited out.
//! - A hard link to a file of a lower layer: file and link are made again, as links to the lower layer's file.
//!
//! Files are hard links to those of the layers (layers are never written to), so this must be on the same file system.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags},
    io::Errno,
};

use super::{
    AppliedLayer, ForeignLink, ImpliedDirectory, UnpackError, WhiteoutMode, attributes,
    dirs::{is_opaque, is_whiteout, kind_of, set_opaque},
    names,
};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// The most links that are followed for one name, as in the kernel.
const LINKS: usize = 40;
/// The deepest that directories are copied.
const DEPTH: usize = 512;

type Path = Vec<Vec<u8>>;

/// Writes to `out`, a new, empty directory, what must be stacked directly above `layer` where it lies on `below` (the topmost first,
/// earlier adjustments included). Gives `false` when that is nothing.
///
/// # Errors
/// [`UnpackError`]: what the layer says contradicts the layers below, or the system refused. `out` is then to be removed.
pub fn adjust_layer(
    below: &[BorrowedFd<'_>],
    layer: BorrowedFd<'_>,
    record: &AppliedLayer,
    out: BorrowedFd<'_>,
    mode: WhiteoutMode,
) -> Result<bool, UnpackError> {
    if !record.needs_adjustment() {
        return Ok(false);
    }
    let implied = record.implied.iter().map(|dir| (split(&dir.path), dir)).collect();
    let mut adjustment = Adjustment { below, layer, out, mode, implied, times: BTreeMap::new(), wrote: false };
    let mut settled: Vec<Path> = Vec::new();
    for (path, directory) in adjustment.implied.clone() {
        if !settled.iter().any(|done| path.starts_with(done)) && adjustment.directory(&path, directory)? {
            settled.push(path);
        }
    }
    for link in &record.foreign_links {
        adjustment.link(link)?;
    }
    adjustment.finish()
}

/// Gives `to` the owner, attributes, mode and times of `from`: for the root of a stack, whose attributes are those of the topmost
/// layer that has an entry for it ([`AppliedLayer::root`]).
///
/// # Errors
/// [`UnpackError::Io`]
pub fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), UnpackError> {
    let times = copy_all_but_times(from, to).map_err(|errno| UnpackError::io("copy attributes to", b"/", errno))?;
    fs::futimens(to, &times).map_err(|errno| UnpackError::io("set times of", b"/", errno))
}

fn copy_all_but_times(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<Timestamps, Errno> {
    let stat = fs::fstat(from)?;
    let (user, group) = attributes::owner(stat.st_uid, stat.st_gid);
    fs::fchown(to, user, group)?;
    let mut value = vec![0u8; 64 << 10];
    for name in attributes::list_xattrs(from)? {
        if attributes::is_wanted(&name) {
            let length = fs::fgetxattr(from, name.as_slice(), &mut value[..])?;
            fs::fsetxattr(to, name.as_slice(), value.get(..length).unwrap_or_default(), XattrFlags::empty())?;
        }
    }
    fs::fchmod(to, attributes::mode(stat.st_mode))?;
    Ok(Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec.cast_signed() },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec.cast_signed() },
    })
}

struct Adjustment<'a> {
    below: &'a [BorrowedFd<'a>],
    layer: BorrowedFd<'a>,
    out: BorrowedFd<'a>,
    mode: WhiteoutMode,
    implied: BTreeMap<Path, &'a ImpliedDirectory>,
    /// Directories of `out`, and the times that they get in the end.
    times: BTreeMap<Path, Timestamps>,
    wrote: bool,
}

impl Adjustment<'_> {
    /// Settles an implied directory; `true` where nothing below it is left to settle.
    fn directory(&mut self, path: &Path, directory: &ImpliedDirectory) -> Result<bool, UnpackError> {
        let below = if directory.hidden { &[] } else { self.below };
        match lookup(below, path, false, self.mode).map_err(io("look up", path))? {
            (_, Found::Directory(_)) => {
                self.ensure(path)?;
                Ok(false)
            }
            (_, Found::Nothing) if directory.whiteouts_only => {
                let (name, parent) = self.parent(path)?;
                fs::fsetxattr(&parent, self.mode.origin(), b"", XattrFlags::empty()).map_err(io("mark", path))?;
                fs::mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(io("white out", path))?;
                Ok(true)
            }
            (_, Found::Nothing) => Ok(false),
            (_, Found::Other { directory, kind: FileType::Symlink }) => {
                let (name, parent) = self.parent(path)?;
                fs::linkat(&directory, name, &parent, name, AtFlags::empty()).map_err(io("link", path))?;
                self.relocate(path, path, 0)?;
                Ok(true)
            }
            (_, Found::Other { .. }) => Err(UnpackError::Conflict {
                path: shown(path),
                reason: "a lower layer has it as a file, and this layer uses it as a directory".into(),
            }),
        }
    }

    /// Links what the layer has below `from` to where `to` leads in the lower layers.
    fn relocate(&mut self, from: &Path, to: &Path, depth: usize) -> Result<(), UnpackError> {
        if depth > DEPTH {
            return Err(UnpackError::Conflict { path: shown(from), reason: "its directories are too deep".into() });
        }
        let (to, found) = lookup(self.below, to, true, self.mode).map_err(io("look up", from))?;
        if let Found::Other { .. } = found {
            return Err(UnpackError::Conflict {
                path: shown(from),
                reason: "a lower layer has a link to a file there, and this layer uses it as a directory".into(),
            });
        }
        let target = self.ensure(&to)?;
        let source = open_path(self.layer, from).map_err(io("open", from))?;
        if is_opaque(source.as_fd(), self.mode).map_err(io("read", from))? {
            set_opaque(target.as_fd(), self.mode).map_err(io("make opaque", &to))?;
        }
        for child in Dir::read_from(&source).map_err(io("read", from))? {
            let child = child.map_err(io("read", from))?;
            let name = child.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let (inner_from, inner_to) = (joined(from, name), joined(&to, name));
            if kind_of(source.as_fd(), name).map_err(io("read", &inner_from))? == Some(FileType::Directory) {
                if !self.implied.contains_key(&inner_from) {
                    // It has an entry, so it replaces whatever is there that is no directory.
                    let dir = open_path(source.as_fd(), &vec![name.to_vec()]).map_err(io("open", &inner_from))?;
                    self.make(&inner_to, target.as_fd(), name, Some(dir.as_fd()))?;
                }
                self.relocate(&inner_from, &inner_to, depth + 1)?;
                continue;
            }
            if is_whiteout(source.as_fd(), name).map_err(io("read", &inner_from))? {
                fs::fsetxattr(&target, self.mode.origin(), b"", XattrFlags::empty()).map_err(io("mark", &to))?;
            }
            match fs::linkat(&source, name, &target, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(io("link", &inner_to)(errno)),
            }
        }
        Ok(())
    }

    /// Makes a hard link to a lower layer's file, and that file's own name, so that both are one file in the stack, too.
    fn link(&mut self, link: &ForeignLink) -> Result<(), UnpackError> {
        let (path, target) = (split(&link.path), split(&link.target));
        let stack: Vec<BorrowedFd<'_>> = [self.out, self.layer].into_iter().chain(self.below.iter().copied()).collect();
        let missing = || UnpackError::Conflict {
            path: shown(&path),
            reason: format!("it is a hard link to '{}', which is not in this layer nor in one below", shown(&target)),
        };
        let Some((target_name, target_parents)) = target.split_last() else { return Err(missing()) };
        let (mut real, _) =
            lookup(&stack, &target_parents.to_vec(), true, self.mode).map_err(io("look up", &target))?;
        real.push(target_name.clone());
        // When the tar came to the link, the layer did not have the target. What it says of that name afterwards is another file.
        let lower: Vec<BorrowedFd<'_>> = [self.out].into_iter().chain(self.below.iter().copied()).collect();
        let (_, found) = lookup(&lower, &real, false, self.mode).map_err(io("look up", &target))?;
        let Found::Other { directory, .. } = found else { return Err(missing()) };
        let (_, seen) = lookup(&stack, &real, false, self.mode).map_err(io("look up", &target))?;
        let stays = match &seen {
            Found::Other { directory: other, .. } => {
                let id = |at: &OwnedFd| {
                    let stat = fs::statat(at, target_name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
                    stat.map(|stat| (stat.st_dev, stat.st_ino)).map_err(io("look at", &target))
                };
                id(other)? == id(&directory)?
            }
            _ => false,
        };
        for place in stays.then_some(&real).into_iter().chain([&path]) {
            let (name, parent) = self.parent(place)?;
            match fs::linkat(&directory, target_name.as_slice(), &parent, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(io("link", place)(errno)),
            }
        }
        Ok(())
    }

    /// Where a path's last component goes: its name, and its parent in `out`.
    fn parent<'p>(&mut self, path: &'p Path) -> Result<(&'p [u8], OwnedFd), UnpackError> {
        let Some((name, parents)) = path.split_last() else {
            return Err(UnpackError::Conflict {
                path: "/".into(),
                reason: "the root directory cannot be replaced".into(),
            });
        };
        self.wrote = true;
        Ok((name, self.ensure(&parents.to_vec())?))
    }

    /// Makes a directory and its parents in `out`, as they are in the stack.
    fn ensure(&mut self, path: &Path) -> Result<OwnedFd, UnpackError> {
        let mut at = fs::openat(self.out, c".", DIRECTORY, Mode::empty()).map_err(io("open", path))?;
        let mut here = Path::new();
        for part in path {
            here.push(part.clone());
            at = match fs::openat(&at, part.as_slice(), DIRECTORY, Mode::empty()) {
                Ok(next) => next,
                Err(Errno::NOENT) => {
                    let ours = open_path(self.layer, &here).ok();
                    let theirs = match lookup(self.below, &here, false, self.mode).map_err(io("look up", &here))? {
                        (_, Found::Directory(fds)) => fds.into_iter().next(),
                        _ => None,
                    };
                    let lower = self.implied.get(&here).is_some_and(|directory| !directory.hidden);
                    let model = if lower { theirs.or(ours) } else { ours.or(theirs) };
                    self.make(&here, at.as_fd(), part, model.as_ref().map(AsFd::as_fd))?;
                    fs::openat(&at, part.as_slice(), DIRECTORY, Mode::empty()).map_err(io("open", &here))?
                }
                Err(errno) => return Err(io("open", &here)(errno)),
            };
        }
        Ok(at)
    }

    fn make(
        &mut self,
        path: &Path,
        parent: BorrowedFd<'_>,
        name: &[u8],
        model: Option<BorrowedFd<'_>>,
    ) -> Result<(), UnpackError> {
        self.wrote = true;
        match fs::mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(io("make directory", path)(errno)),
        }
        let made = fs::openat(parent, name, DIRECTORY, Mode::empty()).map_err(io("open", path))?;
        let epoch = Timespec { tv_sec: 0, tv_nsec: 0 };
        let times = match model {
            Some(model) => copy_all_but_times(model, made.as_fd()).map_err(io("copy attributes to", path))?,
            None => Timestamps { last_access: epoch, last_modification: epoch },
        };
        self.times.insert(path.clone(), times);
        Ok(())
    }

    fn finish(self) -> Result<bool, UnpackError> {
        for (path, times) in &self.times {
            let dir = open_path(self.out, path).map_err(io("open", path))?;
            fs::futimens(&dir, times).map_err(io("set times of", path))?;
        }
        Ok(self.wrote)
    }
}

enum Found {
    Nothing,
    /// The directories that are merged here, the topmost first.
    Directory(Vec<OwnedFd>),
    /// Anything else, and the layer's directory that it is in.
    Other {
        directory: OwnedFd,
        kind: FileType,
    },
}

/// Looks a path up in a stack of layers as overlayfs would, in its root as chroot would: parents that are links are followed, and the
/// last component where `follow` says so. Gives the path without links, and what is there.
fn lookup(layers: &[BorrowedFd<'_>], path: &Path, follow: bool, mode: WhiteoutMode) -> Result<(Path, Found), Errno> {
    let root = || -> Result<Vec<OwnedFd>, Errno> {
        layers.iter().map(|layer| fs::openat(layer, c".", DIRECTORY, Mode::empty())).collect()
    };
    let mut todo: Vec<Vec<u8>> = path.iter().rev().cloned().collect();
    let mut done = Path::new();
    let mut levels = vec![root()?];
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == b".." {
            if done.pop().is_some() {
                levels.truncate(done.len() + 1);
            }
            continue;
        }
        let found = match levels.get(done.len()) {
            Some(level) => step(level, &part, mode)?,
            None => Found::Nothing,
        };
        match found {
            Found::Directory(fds) => {
                done.push(part);
                levels.push(fds);
            }
            Found::Other { directory, kind: FileType::Symlink } if follow || !todo.is_empty() => {
                links += 1;
                let target = fs::readlinkat(&directory, part.as_slice(), Vec::new())?.into_bytes();
                if links > LINKS {
                    return Err(Errno::LOOP);
                }
                if target.starts_with(b"/") {
                    done.clear();
                    levels.truncate(1);
                }
                todo.extend(
                    target
                        .split(|&byte| byte == b'/')
                        .rev()
                        .filter(|p| !p.is_empty() && *p != b".")
                        .map(<[u8]>::to_vec),
                );
            }
            other if todo.is_empty() => {
                done.push(part);
                return Ok((done, other));
            }
            _ => done.push(part),
        }
    }
    match levels.pop() {
        Some(level) if levels.len() == done.len() => Ok((done, Found::Directory(level))),
        _ => Ok((done, Found::Nothing)),
    }
}

/// One component in a merged directory.
fn step(level: &[OwnedFd], name: &[u8], mode: WhiteoutMode) -> Result<Found, Errno> {
    let mut merged = Vec::new();
    for parent in level {
        match kind_of(parent.as_fd(), name)? {
            None => {}
            Some(FileType::Directory) => {
                let fd = fs::openat(parent, name, DIRECTORY, Mode::empty())?;
                let opaque = is_opaque(fd.as_fd(), mode)?;
                merged.push(fd);
                if opaque {
                    break;
                }
            }
            Some(kind) => {
                if merged.is_empty() && !is_whiteout(parent.as_fd(), name)? {
                    return Ok(Found::Other { directory: fs::openat(parent, c".", DIRECTORY, Mode::empty())?, kind });
                }
                break;
            }
        }
    }
    Ok(if merged.is_empty() { Found::Nothing } else { Found::Directory(merged) })
}

fn open_path(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let mut at = fs::openat(root, c".", DIRECTORY, Mode::empty())?;
    for part in path {
        at = fs::openat(&at, part.as_slice(), DIRECTORY, Mode::empty())?;
    }
    Ok(at)
}

fn split(path: &[u8]) -> Path {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect()
}

fn joined(path: &Path, name: &[u8]) -> Path {
    path.iter().cloned().chain([name.to_vec()]).collect()
}

fn shown(path: &Path) -> String {
    names::shown(&path.join(&b'/'))
}

fn io(operation: &'static str, path: &Path) -> impl Fn(Errno) -> UnpackError {
    let path = path.join(&b'/');
    move |errno| UnpackError::io(operation, &path, errno)
}

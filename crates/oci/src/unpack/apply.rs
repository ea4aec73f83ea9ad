//! The applier: entries of the parser become files.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    AppliedLayer, DevicePolicy, ForeignLink, ImpliedDirectory, UnpackError, UnpackOptions,
    attributes::{self, Creator},
    dirs::{Dirs, Made, is_whiteout, kind_of, set_opaque},
    limits::{LimitExceeded, check},
    names::{self, Meaning},
    remove_tree,
    tar::{Entry, Event, Kind, Parser},
};

/// Applies a tar, given in pieces, to a directory.
pub struct Applier {
    parser: Parser,
    tree: Tree,
    file: Option<OpenFile>,
    ended: bool,
}

/// A regular file that is being written.
struct OpenFile {
    fd: OwnedFd,
    entry: Box<Entry>,
    owner: (u32, u32),
    parent_gid: u32,
    position: u64,
}

impl Applier {
    /// Starts to apply a layer to `root`, a new, empty directory that nobody else can reach.
    ///
    /// # Errors
    /// [`UnpackError::Io`]
    pub fn new(root: OwnedFd, options: UnpackOptions) -> Result<Self, UnpackError> {
        attributes::strip_acls(&root).map_err(|errno| UnpackError::io("remove the ACL of", b"/", errno))?;
        Ok(Self {
            parser: Parser::new(&options.limits),
            tree: Tree {
                dirs: Dirs::new(root, options.whiteouts)?,
                creator: Creator::this_process(),
                record: AppliedLayer::default(),
                implied: BTreeMap::new(),
                opaque: HashMap::new(),
                record_bytes: 0,
                default_acls: false,
                current: Vec::new(),
                options,
            },
            file: None,
            ended: false,
        })
    }

    /// Takes the next bytes of the tar. What follows its end means nothing.
    ///
    /// # Errors
    /// [`UnpackError`]; the applier is not to be used after it.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), UnpackError> {
        self.tree.record.tar_bytes += bytes.len() as u64;
        let allowed = self.tree.options.limits.layer_bytes;
        self.tree.check("layer_bytes", self.tree.record.tar_bytes, allowed)?;
        while !self.ended {
            match self.parser.next(&mut bytes) {
                Ok(None) => break,
                Ok(Some(Event::Entry(entry))) => {
                    self.tree.current.clear();
                    self.tree.current.extend_from_slice(entry.path.get(..200).unwrap_or(&entry.path));
                    self.file = self.tree.entry(entry)?;
                }
                Ok(Some(Event::Data { offset, bytes })) => {
                    if let Some(file) = &mut self.file {
                        file.write(offset, bytes)?;
                        self.tree.record.content_bytes += bytes.len() as u64;
                    }
                }
                Ok(Some(Event::EntryEnd)) => {
                    if let Some(file) = self.file.take() {
                        self.tree.finish_file(&file)?;
                    }
                }
                Ok(Some(Event::End)) => self.ended = true,
                Err(source) => {
                    return Err(UnpackError::Tar { near: names::shown(&self.tree.current), source });
                }
            }
        }
        Ok(())
    }

    /// The tar is over: checks that it is whole, sets the times of directories that are still open.
    ///
    /// # Errors
    /// [`UnpackError`]
    pub fn finish(self) -> Result<AppliedLayer, UnpackError> {
        self.parser.finish().map_err(|source| UnpackError::Tar { near: names::shown(&self.tree.current), source })?;
        self.tree.finish()
    }
}

impl OpenFile {
    fn write(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), UnpackError> {
        let failed = |errno: Errno| UnpackError::io("write", &self.entry.path, errno);
        if offset != self.position {
            fs::seek(&self.fd, fs::SeekFrom::Start(offset)).map_err(failed)?;
            self.position = offset;
        }
        while !bytes.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, bytes)).map_err(failed)?;
            self.position += written as u64;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

/// What is known of a directory without an entry.
struct Implied {
    /// Only whiteouts need it.
    whiteouts_only: bool,
    /// When the layer came to need it, it had removed what lower layers have there.
    hidden: bool,
}

struct Tree {
    dirs: Dirs,
    options: UnpackOptions,
    creator: Creator,
    record: AppliedLayer,
    /// Directories without an entry.
    implied: BTreeMap<Vec<u8>, Implied>,
    /// Directories that this layer made opaque: what is implied below them owes nothing to lower layers. `true` where the layer
    /// removes the lower directory itself, so that not even its attributes stay.
    opaque: HashMap<Vec<u8>, bool>,
    record_bytes: u64,
    /// Whether some directory has a default ACL, so that new files inherit what the tar does not give them.
    default_acls: bool,
    /// The beginning of the current entry's name, for messages.
    current: Vec<u8>,
}

impl Tree {
    fn check(&self, name: &'static str, found: u64, allowed: u64) -> Result<(), UnpackError> {
        check(name, found, allowed).map_err(|source: LimitExceeded| self.limit(source))
    }

    fn limit(&self, source: LimitExceeded) -> UnpackError {
        UnpackError::Limit { path: names::shown(&self.current), source }
    }

    /// Makes what an entry says; a regular file comes back to be filled.
    fn entry(&mut self, entry: Box<Entry>) -> Result<Option<OpenFile>, UnpackError> {
        self.record.entries += 1;
        self.check("entries", self.record.entries, self.options.limits.entries)?;
        let parts = names::components(&entry.path, &self.options.limits)?;
        let meaning = names::meaning(&entry.path, &parts)?;
        let Some((name, parents)) = parts.split_last() else {
            if entry.path.is_empty() {
                return Err(UnpackError::refused(&entry.path, "it has no name"));
            }
            if entry.kind != Kind::Directory {
                return Err(UnpackError::refused(&entry.path, "the layer's root can only be a directory"));
            }
            self.dirs.go(&entry.path, &[], |_, _| Ok(()))?;
            self.record.root = true;
            self.finish_directory(&entry, false)?;
            return Ok(None);
        };
        if matches!(meaning, Meaning::Ignored) {
            return Ok(None);
        }
        self.go_to_parent(&entry, parents, matches!(meaning, Meaning::Plain))?;
        match meaning {
            Meaning::Opaque => self.opaque_current(&entry)?,
            Meaning::Whiteout(hidden) => self.whiteout(&entry, hidden)?,
            Meaning::Ignored => {}
            Meaning::Plain => match entry.kind {
                Kind::File => {
                    let name = name.to_vec();
                    return self.open_file(entry, &name).map(Some);
                }
                Kind::Directory => self.directory(&entry, name)?,
                Kind::HardLink => self.hard_link(&entry, name)?,
                Kind::Symlink => self.symlink(&entry, name)?,
                Kind::Char | Kind::Block | Kind::Fifo => self.node(&entry, name)?,
            },
        }
        Ok(None)
    }

    fn go_to_parent(&mut self, entry: &Entry, parents: &[&[u8]], plain: bool) -> Result<(), UnpackError> {
        let mut made: Vec<(Vec<u8>, bool)> = Vec::new();
        self.dirs.go(&entry.path, parents, |path, removed| {
            made.push((path.to_vec(), removed));
            Ok(())
        })?;
        for (path, removed) in made {
            self.remember(path.len())?;
            if removed {
                self.remember(path.len())?;
                self.opaque.insert(path.clone(), true);
            }
            let hidden = self.hides(&path);
            self.implied.insert(path, Implied { whiteouts_only: !plain, hidden });
        }
        if plain && !self.implied.is_empty() {
            let path = self.dirs.path();
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
            for end in ends.chain([path.len()]) {
                if let Some(implied) = path.get(..end).and_then(|path| self.implied.get_mut(path)) {
                    implied.whiteouts_only = false;
                }
            }
        }
        Ok(())
    }

    /// Counts what stays in memory until the layer is done.
    fn remember(&mut self, bytes: usize) -> Result<(), UnpackError> {
        self.record_bytes += bytes as u64 + 64;
        self.check("record_bytes", self.record_bytes, self.options.limits.record_bytes)
    }

    /// The resolved path of a name in the current directory.
    fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.dirs.path();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    /// Removes what has the name of an entry that is no directory: the last entry of a name wins.
    fn clear(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        if !self.implied.is_empty() {
            let path = self.path_of(name);
            self.implied.retain(|known, _| {
                !known.strip_prefix(path.as_slice()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
            });
        }
        match remove_tree(self.dirs.current().touch(), name) {
            Err(UnpackError::Remove { source, .. }) => Err(UnpackError::io("replace", &entry.path, source)),
            other => other,
        }
    }

    fn opaque_current(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        let path = self.dirs.path();
        if path.is_empty() {
            // Overlayfs does not look at the attribute on a layer's root, so whoever stacks the layers must know.
            self.record.hides_lower = true;
        }
        set_opaque(self.dirs.current().fd.as_fd(), self.options.whiteouts)
            .map_err(|errno| UnpackError::io("make opaque the directory of", &entry.path, errno))?;
        self.remember(path.len())?;
        self.opaque.entry(path).or_insert(false);
        Ok(())
    }

    /// Whether the layer itself hides what lower layers have at a path.
    fn hides(&self, path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        !self.opaque.is_empty()
            && (self.opaque.get(path) == Some(&true)
                || ends.chain([0]).any(|end| self.opaque.contains_key(path.get(..end).unwrap_or_default())))
    }

    /// A whiteout hides what lower layers have, never what this layer has, in whatever order they come.
    fn whiteout(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        let io = |errno: Errno| UnpackError::io("make whiteout", &entry.path, errno);
        let mode = self.options.whiteouts;
        let parent = self.dirs.current();
        match kind_of(parent.fd.as_fd(), name).map_err(io)? {
            None => {
                if !parent.has_origin {
                    fs::fsetxattr(&parent.fd, mode.origin(), b"", fs::XattrFlags::empty()).map_err(io)?;
                    parent.has_origin = true;
                }
                fs::mknodat(parent.touch(), name, FileType::CharacterDevice, Mode::empty(), 0).map_err(io)
            }
            Some(FileType::Directory) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let dir = fs::openat(&parent.fd, name, flags, Mode::empty()).map_err(io)?;
                set_opaque(dir.as_fd(), mode).map_err(io)?;
                let path = self.path_of(name);
                self.remember(path.len())?;
                self.opaque.insert(path, true);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    fn directory(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        let io = |errno: Errno| UnpackError::io("make directory", &entry.path, errno);
        let existed = match self.dirs.make(name, false) {
            Ok(()) => false,
            Err(Errno::EXIST) => {
                let parent = self.dirs.current();
                if kind_of(parent.fd.as_fd(), name).map_err(io)? == Some(FileType::Directory) {
                    let _: Made = self.dirs.enter(name).map_err(io)?;
                    true
                } else {
                    // What it replaces has already hidden the directory that a lower layer may have.
                    fs::unlinkat(parent.touch(), name, AtFlags::empty()).map_err(io)?;
                    self.dirs.make(name, true).map_err(io)?;
                    let path = self.dirs.path();
                    self.remember(path.len())?;
                    self.opaque.insert(path, true);
                    false
                }
            }
            Err(errno) => return Err(io(errno)),
        };
        if existed && !self.implied.is_empty() {
            self.implied.remove(&self.dirs.path());
        }
        self.finish_directory(entry, !existed)
    }

    /// Gives the directory that the stack ends in what its entry says.
    fn finish_directory(&mut self, entry: &Entry, new: bool) -> Result<(), UnpackError> {
        let io = |operation| move |errno: Errno| UnpackError::io(operation, &entry.path, errno);
        let (uid, gid) = self.options.ids.owner(entry)?;
        let strip = self.default_acls;
        let parent_gid = self.dirs.parent_gid();
        let dir = self.dirs.current();
        if !new {
            for name in attributes::list_xattrs(&dir.fd).map_err(io("read attributes of"))? {
                if attributes::is_wanted(&name) {
                    fs::fremovexattr(&dir.fd, name.as_slice()).map_err(io("remove attributes of"))?;
                }
            }
        } else if strip {
            attributes::strip_acls(&dir.fd).map_err(io("remove the ACL of"))?;
        }
        let chown = !new || !self.creator.owns(uid, gid, parent_gid);
        if chown {
            let (user, group) = attributes::owner(uid, gid);
            fs::fchown(&dir.fd, user, group).map_err(io("change owner of"))?;
        }
        self.record.ignored_xattrs += attributes::set_xattrs(&dir.fd, entry)?;
        self.default_acls |= entry.xattrs.iter().any(|(name, _)| name == b"system.posix_acl_default");
        if chown || strip || dir.mode != entry.mode || !entry.xattrs.is_empty() {
            fs::fchmod(&dir.fd, attributes::mode(entry.mode)).map_err(io("change mode of"))?;
        }
        dir.set(gid, attributes::times(entry));
        Ok(())
    }

    fn open_file(&mut self, entry: Box<Entry>, name: &[u8]) -> Result<OpenFile, UnpackError> {
        let owner = self.options.ids.owner(&entry)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = attributes::mode(entry.mode & 0o777);
        let parent = self.dirs.current();
        let parent_gid = parent.gid;
        let fd = match fs::openat(parent.touch(), name, flags, mode) {
            Err(Errno::EXIST) => {
                self.clear(&entry, name)?;
                fs::openat(self.dirs.current().touch(), name, flags, mode)
            }
            other => other,
        }
        .map_err(|errno| UnpackError::io("create", &entry.path, errno))?;
        Ok(OpenFile { fd, entry, owner, parent_gid, position: 0 })
    }

    fn finish_file(&mut self, file: &OpenFile) -> Result<(), UnpackError> {
        let entry = &file.entry;
        let io = |operation| move |errno: Errno| UnpackError::io(operation, &entry.path, errno);
        if file.position != entry.size {
            // The file ends with a hole.
            fs::ftruncate(&file.fd, entry.size).map_err(io("set the size of"))?;
        }
        let (uid, gid) = file.owner;
        let mut chmod = !self.creator.gives(entry.mode) || !entry.xattrs.is_empty();
        if self.default_acls {
            attributes::strip_acls(&file.fd).map_err(io("remove the ACL of"))?;
            chmod = true;
        }
        if !self.creator.owns(uid, gid, file.parent_gid) {
            let (user, group) = attributes::owner(uid, gid);
            fs::fchown(&file.fd, user, group).map_err(io("change owner of"))?;
        }
        self.record.ignored_xattrs += attributes::set_xattrs(&file.fd, entry)?;
        if chmod {
            fs::fchmod(&file.fd, attributes::mode(entry.mode)).map_err(io("change mode of"))?;
        }
        fs::futimens(&file.fd, &attributes::times(entry)).map_err(io("set times of"))
    }

    /// Makes something that is not opened; in the way of what is there already, the new entry wins.
    fn make(
        &mut self,
        entry: &Entry,
        name: &[u8],
        make: impl Fn(std::os::fd::BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<(), UnpackError> {
        match make(self.dirs.current().touch()) {
            Err(Errno::EXIST) => {
                self.clear(entry, name)?;
                make(self.dirs.current().touch())
            }
            other => other,
        }
        .map_err(|errno| UnpackError::io("create", &entry.path, errno))
    }

    fn symlink(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        if entry.link.is_empty() {
            return Err(UnpackError::refused(&entry.path, "it is a symbolic link to nothing"));
        }
        self.make(entry, name, |parent| fs::symlinkat(entry.link.as_slice(), parent, name))?;
        self.finish_path(entry, name)
    }

    fn node(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        let kind = match entry.kind {
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        if kind != FileType::Fifo {
            if kind == FileType::CharacterDevice && entry.device == (0, 0) {
                return Err(UnpackError::refused(&entry.path, "a character device 0:0 is overlayfs' whiteout"));
            }
            match self.options.devices {
                DevicePolicy::Create => {}
                DevicePolicy::Skip => {
                    self.record.skipped_devices += 1;
                    return self.clear(entry, name);
                }
                DevicePolicy::Refuse => {
                    return Err(UnpackError::refused(
                        &entry.path,
                        "it is a device node, which the settings do not allow",
                    ));
                }
            }
        }
        let device = fs::makedev(entry.device.0, entry.device.1);
        let mode = attributes::mode(entry.mode & 0o777);
        self.make(entry, name, |parent| fs::mknodat(parent, name, kind, mode, device))?;
        self.finish_path(entry, name)
    }

    fn finish_path(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        let owner = self.options.ids.owner(entry)?;
        let strip = self.default_acls && entry.kind != Kind::Symlink;
        let parent = self.dirs.current().fd.as_fd();
        self.record.ignored_xattrs += attributes::finish_path(parent, name, entry, owner, strip)?;
        Ok(())
    }

    /// The target is a name in the layer, or else in the layers below.
    fn hard_link(&mut self, entry: &Entry, name: &[u8]) -> Result<(), UnpackError> {
        let target = names::components(&entry.link, &self.options.limits)?;
        let Some((target_name, target_parents)) = target.split_last() else {
            return Err(UnpackError::refused(&entry.path, "it is a hard link to the root directory"));
        };
        let io = |errno: Errno| UnpackError::io("link", &entry.path, errno);
        let Some(directory) = self.dirs.find(&entry.path, target_parents)? else {
            return self.foreign_link(entry, name, &target);
        };
        match kind_of(directory.as_fd(), target_name).map_err(io)? {
            None => return self.foreign_link(entry, name, &target),
            Some(FileType::Directory) => {
                return Err(UnpackError::refused(&entry.path, "it is a hard link to a directory"));
            }
            Some(FileType::CharacterDevice) if is_whiteout(directory.as_fd(), target_name).map_err(io)? => {
                return Err(UnpackError::refused(&entry.path, "it is a hard link to a file that its layer removes"));
            }
            Some(_) => {}
        }
        let linked =
            self.make(entry, name, |parent| fs::linkat(&directory, *target_name, parent, name, AtFlags::empty()));
        match linked {
            // It was a link to itself, and is gone now.
            Err(UnpackError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                self.foreign_link(entry, name, &target)
            }
            other => other,
        }
    }

    fn foreign_link(&mut self, entry: &Entry, name: &[u8], target: &[&[u8]]) -> Result<(), UnpackError> {
        if self.hides(&target.join(&b'/')) {
            return Err(UnpackError::refused(&entry.path, "it is a hard link to a file that its layer removes"));
        }
        self.clear(entry, name)?;
        let link = ForeignLink { path: self.path_of(name), target: target.join(&b'/') };
        self.remember(link.path.len() + link.target.len())?;
        self.record.foreign_links.push(link);
        Ok(())
    }

    fn finish(mut self) -> Result<AppliedLayer, UnpackError> {
        self.implied.retain(|path, _| !path.is_empty());
        self.record.implied = std::mem::take(&mut self.implied)
            .into_iter()
            .map(|(path, Implied { whiteouts_only, hidden })| ImpliedDirectory { path, whiteouts_only, hidden })
            // What owes nothing to lower layers is as it is to be, unless it is not to be.
            .filter(|directory| directory.whiteouts_only || !directory.hidden)
            .collect();
        let mut links = std::mem::take(&mut self.record.foreign_links);
        let mut failed = Ok(());
        links.retain(|link| match self.was_replaced(link) {
            Ok(replaced) => !replaced,
            Err(error) => {
                failed = Err(error);
                true
            }
        });
        failed?;
        self.record.foreign_links = links;
        self.dirs.finish()?;
        Ok(self.record)
    }

    /// Whether a later entry of the layer has the name of a link into a lower one.
    fn was_replaced(&self, link: &ForeignLink) -> Result<bool, UnpackError> {
        let parts: Vec<&[u8]> = link.path.split(|&byte| byte == b'/').collect();
        let Some((name, parents)) = parts.split_last() else { return Ok(false) };
        let io = |errno: Errno| UnpackError::io("look at", &link.path, errno);
        let Some(parent) = self.dirs.find(&link.path, parents)? else { return Ok(true) };
        Ok(kind_of(parent.as_fd(), name).map_err(io)?.is_some() && !is_whiteout(parent.as_fd(), name).map_err(io)?)
    }
}

//! A layer's tar, from the first byte to the last: entries go to the tree, contents to the device.

use std::io::{self, Read};

use nacre_oci::unpack::{
    Limits, UnpackError, is_wanted,
    names::{self, Meaning},
    tar::{Entry, Event, Kind, Parser},
};

use super::{
    BuildError,
    device::{Device, FileId, OpenFile, Sink},
    pipeline::Closed,
};
use crate::erofs::{Attributes, Device as Numbers, Node, Timestamp, Tree};

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

/// What a layer had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerContent {
    /// Entries of its tar.
    pub entries: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Attributes that no image may set, and that were left out.
    pub ignored_xattrs: u64,
}

/// What becomes of the files' contents.
pub(crate) trait Contents {
    /// A file whose content is coming.
    type Open;

    /// Begins a file that is not empty.
    fn begin(&mut self, size: u64) -> Self::Open;

    /// Content at a place in the file, which stands at a place in the tar.
    fn data(&mut self, file: &mut Self::Open, offset: u64, tar: u64, bytes: &[u8]) -> Result<(), Closed>;

    /// Ends a file; gives what its inode has as its first block.
    fn end(&mut self, file: Self::Open) -> Result<u32, Closed>;
}

/// Contents that go to a device, and on.
pub(super) struct OnDevice<'a, S> {
    pub(super) device: &'a mut Device,
    pub(super) sink: &'a mut S,
}

impl<S: Sink<Error = Closed>> Contents for OnDevice<'_, S> {
    type Open = OpenFile;

    fn begin(&mut self, size: u64) -> OpenFile {
        self.device.begin(size)
    }

    fn data(&mut self, file: &mut OpenFile, offset: u64, _tar: u64, bytes: &[u8]) -> Result<(), Closed> {
        self.device.data(file, offset, bytes, self.sink)
    }

    /// A number: the block is known when all is laid out.
    fn end(&mut self, file: OpenFile) -> Result<u32, Closed> {
        self.device.end(file, self.sink).map(|FileId(number)| number)
    }
}

/// Reads a layer.
pub(crate) struct LayerReader<'a, C: Contents> {
    tree: &'a mut Tree,
    contents: C,
    limits: &'a Limits,
    content: LayerContent,
    /// The file whose content comes next.
    open: Option<Current<C::Open>>,
}

/// The entry that content comes for, its resolved path, and its place on the device.
struct Current<F> {
    entry: Box<Entry>,
    path: Vec<Vec<u8>>,
    file: Option<F>,
}

impl<'a, C: Contents> LayerReader<'a, C> {
    pub(crate) fn new(tree: &'a mut Tree, contents: C, limits: &'a Limits) -> Self {
        tree.begin_layer();
        Self { tree, contents, limits, content: LayerContent::default(), open: None }
    }

    /// Reads a tar to its end, and whatever follows in the stream, so that who checks its digest has seen it all.
    pub(crate) fn read<E>(mut self, tar: &mut dyn Read) -> Result<LayerContent, BuildError<E>> {
        let mut parser = Parser::new(self.limits);
        let (mut buffer, mut total, mut ended) = (vec![0; PIECE], 0u64, false);
        let mut near = Vec::new();
        loop {
            let length = match tar.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(BuildError::Read(error)),
            };
            total += length as u64;
            self.check("layer_bytes", total, self.limits.layer_bytes, &near)?;
            let mut bytes = buffer.get(..length).unwrap_or_default();
            while !ended {
                let event = parser.next(&mut bytes);
                match event.map_err(|source| UnpackError::Tar { near: names::shown(&near), source })? {
                    None => break,
                    Some(Event::Entry(entry)) => {
                        near.clear();
                        near.extend_from_slice(entry.path.get(..200).unwrap_or(&entry.path));
                        self.entry(entry)?;
                    }
                    Some(Event::Data { offset, bytes: data }) => {
                        // The parser gives pieces of what it was given, and takes nothing behind them.
                        let tar = total - (bytes.len() + data.len()) as u64;
                        self.data(offset, tar, data)?;
                    }
                    Some(Event::EntryEnd) => self.finish_file()?,
                    Some(Event::End) => ended = true,
                }
            }
        }
        parser.finish().map_err(|source| UnpackError::Tar { near: names::shown(&near), source })?;
        Ok(self.content)
    }

    fn check(&self, name: &'static str, found: u64, allowed: u64, path: &[u8]) -> Result<(), UnpackError> {
        if found <= allowed {
            return Ok(());
        }
        let source = nacre_oci::unpack::LimitExceeded { name, found, allowed };
        Err(UnpackError::Limit { path: names::shown(path), source })
    }

    fn entry<E>(&mut self, entry: Box<Entry>) -> Result<(), BuildError<E>> {
        self.content.entries += 1;
        self.check("entries", self.content.entries, self.limits.entries, &entry.path)?;
        let parts = names::components(&entry.path, self.limits)?;
        let meaning = names::meaning(&entry.path, &parts)?;
        if parts.is_empty() && (entry.path.is_empty() || entry.kind != Kind::Directory) {
            return Err(refused(&entry, "the layer's root can only be a directory"));
        }
        let wrong = |source| BuildError::Tree { path: names::shown(&entry.path), source };
        match meaning {
            Meaning::Ignored => {}
            Meaning::Opaque => {
                let parents =
                    self.tree.resolve(parts.split_last().map_or(&[], |(_, parents)| parents)).map_err(wrong)?;
                self.tree.opaque(&slices(&parents)).map_err(wrong)?;
            }
            Meaning::Whiteout(name) => {
                let mut path: Vec<&[u8]> = parts.split_last().map_or(&[][..], |(_, parents)| parents).to_vec();
                path.push(name);
                let path = self.tree.resolve(&path).map_err(wrong)?;
                self.tree.whiteout(&slices(&path)).map_err(wrong)?;
            }
            Meaning::Plain => {
                let path = self.tree.resolve(&parts).map_err(wrong)?;
                return self.plain(entry, path);
            }
        }
        Ok(())
    }

    fn plain<E>(&mut self, entry: Box<Entry>, path: Vec<Vec<u8>>) -> Result<(), BuildError<E>> {
        let numbers = Numbers { major: entry.device.0, minor: entry.device.1 };
        let node = match entry.kind {
            Kind::File => {
                self.content.bytes += entry.size;
                let file = (entry.size > 0).then(|| self.contents.begin(entry.size));
                self.open = Some(Current { entry, path, file });
                return Ok(());
            }
            Kind::HardLink => {
                let target = names::components(&entry.link, self.limits)?;
                let wrong = |source| BuildError::Tree { path: names::shown(&entry.path), source };
                let target = self.tree.resolve(&target).map_err(wrong)?;
                return self.tree.link(&slices(&path), &slices(&target)).map_err(wrong);
            }
            Kind::Symlink => Node::Symlink(&entry.link),
            Kind::Char => Node::CharDevice(numbers),
            Kind::Block => Node::BlockDevice(numbers),
            Kind::Directory => Node::Directory,
            Kind::Fifo => Node::Fifo,
        };
        put(self.tree, &path, node, &entry, &mut self.content)
    }

    fn data<E>(&mut self, offset: u64, tar: u64, bytes: &[u8]) -> Result<(), BuildError<E>> {
        let Some(Current { file: Some(file), .. }) = &mut self.open else { return Ok(()) };
        self.contents.data(file, offset, tar, bytes).map_err(|Closed| BuildError::Stopped)
    }

    fn finish_file<E>(&mut self) -> Result<(), BuildError<E>> {
        let Some(Current { entry, path, file }) = self.open.take() else { return Ok(()) };
        let block = match file {
            Some(file) => self.contents.end(file).map_err(|Closed| BuildError::Stopped)?,
            None => 0,
        };
        put(self.tree, &path, Node::File { size: entry.size, block }, &entry, &mut self.content)
    }
}

/// Puts an entry with the attributes of the tar.
fn put<E>(
    tree: &mut Tree,
    path: &[Vec<u8>],
    node: Node<'_>,
    entry: &Entry,
    content: &mut LayerContent,
) -> Result<(), BuildError<E>> {
    let attributes = Attributes {
        mode: u16::try_from(entry.mode & 0o7777).unwrap_or_default(),
        uid: entry.uid,
        gid: entry.gid,
        mtime: Timestamp { seconds: entry.mtime.seconds, nanoseconds: entry.mtime.nanoseconds },
    };
    let xattrs: Vec<(&[u8], &[u8])> =
        entry.xattrs.iter().filter(|(name, _)| is_wanted(name)).map(|(name, value)| (&name[..], &value[..])).collect();
    content.ignored_xattrs += (entry.xattrs.len() - xattrs.len()) as u64;
    tree.put(&slices(path), node, &attributes, &xattrs)
        .map_err(|source| BuildError::Tree { path: names::shown(&entry.path), source })
}

fn refused<E>(entry: &Entry, reason: &'static str) -> BuildError<E> {
    BuildError::Layer(UnpackError::Refused { path: names::shown(&entry.path), reason })
}

fn slices(path: &[Vec<u8>]) -> Vec<&[u8]> {
    path.iter().map(Vec::as_slice).collect()
}

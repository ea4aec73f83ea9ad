//! Layers: tar archives of entries that a test lists, in the order in which it lists them.
//!
//! Headers are ustar; what does not fit there goes into a PAX header before them, or into GNU's `L` and `K` entries if the entry
//! wants that. [`Entry::header`] changes the header's bytes afterwards, [`Layer::raw`] takes any bytes: for broken archives.

use std::sync::Arc;

type Patch = Arc<dyn Fn(&mut [u8; 512]) + Send + Sync>;

/// An entry of a [`Layer`]. Owned by 0:0, changed at the epoch, mode 0644 (directories 0755, links 0777) unless told otherwise.
#[derive(Clone)]
pub struct Entry {
    path: Vec<u8>,
    kind: u8,
    link: Vec<u8>,
    content: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
    mtime: (i64, u32),
    device: (u32, u32),
    records: Vec<(String, Vec<u8>)>,
    gnu: bool,
    patch: Option<Patch>,
}

impl Entry {
    fn new(path: impl AsRef<[u8]>, kind: u8, mode: u32) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            link: Vec::new(),
            content: Vec::new(),
            mode,
            owner: (0, 0),
            mtime: (0, 0),
            device: (0, 0),
            records: Vec::new(),
            gnu: false,
            patch: None,
        }
    }

    /// A regular file.
    pub fn file(path: impl AsRef<[u8]>, content: impl Into<Vec<u8>>) -> Self {
        Self { content: content.into(), ..Self::new(path, b'0', 0o644) }
    }

    /// A directory.
    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'5', 0o755)
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, b'2', 0o777) }
    }

    /// A hard link to the entry with the path `target`.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, b'1', 0o644) }
    }

    /// A character device.
    pub fn char_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'3', 0o666) }
    }

    /// A block device.
    pub fn block_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'4', 0o660) }
    }

    /// A named pipe.
    pub fn fifo(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'6', 0o644)
    }

    /// The mark that removes `path` of the layers below.
    pub fn whiteout(path: &str) -> Self {
        let (directory, name) =
            path.rsplit_once('/').map_or((String::new(), path), |(dir, name)| (format!("{dir}/"), name));
        Self::new(format!("{directory}.wh.{name}"), b'0', 0)
    }

    /// The mark that hides what the layers below have in `directory`.
    pub fn opaque(directory: &str) -> Self {
        Self::new(format!("{directory}/.wh..wh..opq"), b'0', 0)
    }

    /// A file of `size` bytes with holes (PAX sparse format 1.0): `pieces` are offsets and what is there.
    pub fn sparse(path: &str, size: u64, pieces: &[(u64, &[u8])]) -> Self {
        let mut map = format!("{}\n", pieces.len());
        for (offset, bytes) in pieces {
            map.push_str(&format!("{offset}\n{}\n", bytes.len()));
        }
        let mut content = map.into_bytes();
        content.resize(content.len().next_multiple_of(512), 0);
        for (_, bytes) in pieces {
            content.extend_from_slice(bytes);
        }
        Self::file(format!("GNUSparseFile.0/{path}"), content)
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", path)
            .pax("GNU.sparse.realsize", size.to_string())
    }

    /// An entry of any type.
    pub fn of_type(path: impl AsRef<[u8]>, kind: u8, content: impl Into<Vec<u8>>) -> Self {
        Self { content: content.into(), ..Self::new(path, kind, 0o644) }
    }

    /// Permission bits, set-id and sticky bits included.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// User and group id.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// When it was changed: seconds since the epoch, and nanoseconds.
    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    /// An extended attribute.
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }

    /// A PAX record.
    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.records.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// Long names go into GNU's `L` and `K` entries, and large numbers into base 256.
    pub fn gnu(mut self) -> Self {
        self.gnu = true;
        self
    }

    /// Changes the header's bytes, whose checksum is then made right again.
    pub fn header(mut self, change: impl Fn(&mut [u8; 512]) + Send + Sync + 'static) -> Self {
        self.patch = Some(Arc::new(change));
        self
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut records = self.records.clone();
        if self.gnu {
            for (name, kind) in [(&self.path, b'L'), (&self.link, b'K')] {
                if name.len() > 100 {
                    let mut content = name.clone();
                    content.push(0);
                    block(out, b"././@LongLink", &Self::of_type("", kind, content), true);
                }
            }
        } else {
            let mut need = |key: &str, value: Vec<u8>| records.push((key.to_owned(), value));
            for (key, value) in [("path", &self.path), ("linkpath", &self.link)] {
                if value.len() > 100 || !value.is_ascii() {
                    need(key, value.clone());
                }
            }
            for (key, value) in [("uid", self.owner.0), ("gid", self.owner.1)] {
                if value >= 1 << 21 {
                    need(key, value.to_string().into_bytes());
                }
            }
            let (seconds, nanoseconds) = self.mtime;
            if nanoseconds != 0 || !(0..1 << 33).contains(&seconds) {
                need("mtime", decimal_time(seconds, nanoseconds).into_bytes());
            }
        }
        if !records.is_empty() {
            let content = records.iter().flat_map(|(key, value)| record(key, value)).collect::<Vec<u8>>();
            block(out, b"PaxHeaders.0/entry", &Self::of_type("", b'x', content), false);
        }
        block(out, &self.path, self, self.gnu);
    }
}

fn decimal_time(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        // -1.25 s is -2 s and 750,000,000 ns.
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
    }
}

/// `length key=value\n`, where the length counts its own digits.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A number into a field: octal, or base 256 where it is too large and GNU's extension is wanted, or zero.
fn number(field: &mut [u8], value: i128, gnu: bool) {
    let digits = field.len() - 1;
    if (0..1i128 << (3 * digits)).contains(&value) {
        let text = format!("{value:0digits$o}\0");
        field.copy_from_slice(text.as_bytes());
    } else if gnu {
        let bytes = value.to_be_bytes();
        let skip = bytes.len().saturating_sub(field.len());
        field.copy_from_slice(bytes.get(skip..).unwrap());
        if let Some(first) = field.first_mut() {
            *first |= 0x80;
        }
    }
}

fn block(out: &mut Vec<u8>, path: &[u8], entry: &Entry, gnu: bool) {
    let mut header = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| {
        let bytes = bytes.get(..bytes.len().min(100)).unwrap();
        header.get_mut(at..at + bytes.len()).unwrap().copy_from_slice(bytes);
    };
    put(0, path);
    put(156, &[entry.kind]);
    put(157, &entry.link);
    put(257, if gnu { b"ustar  \0" } else { b"ustar\x0000" });
    let mut set = |at: usize, length: usize, value: i128| number(header.get_mut(at..at + length).unwrap(), value, gnu);
    set(100, 8, entry.mode.into());
    set(108, 8, entry.owner.0.into());
    set(116, 8, entry.owner.1.into());
    set(124, 12, entry.content.len() as i128);
    set(136, 12, entry.mtime.0.into());
    if matches!(entry.kind, b'3' | b'4') {
        set(329, 8, entry.device.0.into());
        set(337, 8, entry.device.1.into());
    }
    if let Some(patch) = &entry.patch {
        patch(&mut header);
    }
    seal(&mut header);
    out.extend_from_slice(&header);
    out.extend_from_slice(&entry.content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// Computes a header's checksum.
fn seal(header: &mut [u8; 512]) {
    header.get_mut(148..156).unwrap().fill(b' ');
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header.get_mut(148..156).unwrap().copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A layer's tar archive.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    bytes: Vec<u8>,
}

impl Layer {
    /// An archive of these entries, ended by two empty blocks.
    pub fn of(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut bytes = Vec::new();
        for entry in entries {
            entry.write(&mut bytes);
        }
        bytes.resize(bytes.len() + 1024, 0);
        Self { bytes }
    }

    /// Any bytes.
    pub fn raw(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into() }
    }

    /// The archive.
    pub fn tar(&self) -> &[u8] {
        &self.bytes
    }
}

//! Other implementations read what we write: the kernel and erofs-utils.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use nacre_core::Digest;
use nacre_lazy::erofs::{Attributes, Device, Limits, Node, Tree, WriteOptions, check, write};
use nacre_testkit::{Rng, require, root, run, skip, tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    listing::{attributes, list_tree},
    random::{self, Wild},
};

/// An image and its data device in files.
struct Files {
    directory: tempfile::TempDir,
    data: Vec<u8>,
}

impl Files {
    fn new(tree: &Tree, blocks: u32) -> Self {
        let files = Self { directory: tempfile::tempdir().unwrap(), data: Rng::new(1).bytes(blocks as usize * 4096) };
        let options = WriteOptions { uuid: [7; 16], device_tag: "data", device_blocks: blocks };
        write(tree, &options, File::create(files.meta()).unwrap()).unwrap();
        check(&File::open(files.meta()).unwrap(), &Limits::default()).unwrap();
        fs::write(files.device(), &files.data).unwrap();
        files
    }

    fn meta(&self) -> PathBuf {
        self.directory.path().join("meta")
    }

    fn device(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn digest(&self, size: u64, block: u32) -> String {
        let start = block as usize * 4096;
        Digest::sha256(&self.data[start..start + usize::try_from(size).unwrap()]).to_string()
    }

    /// `None`, after a loud skip, where the kernel does not mount an EROFS in a file.
    fn mount(&self) -> Option<Mount> {
        if !root() {
            return None;
        }
        let at = self.directory.path().join("mnt");
        fs::create_dir(&at).unwrap();
        let option = CString::new(format!("device={}", self.device().display())).unwrap();
        match mount(self.meta(), &at, "erofs", MountFlags::RDONLY, option.as_c_str()) {
            Ok(()) => Some(Mount(at)),
            // It knows no EROFS, or none in files.
            Err(error @ (rustix::io::Errno::NODEV | rustix::io::Errno::NOTBLK)) => {
                skip(&format!("the kernel does not mount an EROFS image that is in a file: {error}"));
                None
            }
            Err(error) => panic!("the kernel refuses the image: {error}"),
        }
    }
}

struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn put(tree: &mut Tree, path: &[&[u8]], node: Node<'_>, xattrs: &[(&[u8], &[u8])]) {
    tree.put(path, node, &attributes(0o644), xattrs).unwrap();
}

/// All kinds of entries, and what is at the edges.
fn samples() -> Tree {
    let mut tree = Tree::new();
    let of = attributes(0o644);
    put(&mut tree, &[b"file"], Node::File { size: 5, block: 1 }, &[(b"user.a", b"b"), (b"trusted.b", b"")]);
    put(&mut tree, &[b"blocks"], Node::File { size: 8192, block: 3 }, &[(b"user.a", b"b")]);
    put(&mut tree, &[b"empty"], Node::File { size: 0, block: 0 }, &[]);
    put(
        &mut tree,
        &[b"setuid"],
        Node::File { size: 1, block: 0 },
        &[(b"security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])],
    );
    put(&mut tree, &[b"a", b"b", b"link"], Node::Symlink(b"../x"), &[(b"trusted.x", b"y")]);
    for size in [1, 4031, 4032, 4033, 4095] {
        let name = format!("link{size}");
        put(&mut tree, &[b"a", name.as_bytes()], Node::Symlink(&vec![b'x'; size]), &[]);
    }
    put(&mut tree, &[b"dev", b"char"], Node::CharDevice(Device { major: 4095, minor: 0xF_FFFF }), &[]);
    put(&mut tree, &[b"dev", b"block"], Node::BlockDevice(Device { major: 0, minor: 256 }), &[]);
    put(&mut tree, &[b"dev", b"fifo"], Node::Fifo, &[]);
    put(&mut tree, &[b"dev", b"socket"], Node::Socket, &[]);
    put(&mut tree, &[b"names", &[b'n'; 255]], Node::Directory, &[]);
    put(&mut tree, &[b"names", b"\xff\xfe\x01\n"], Node::File { size: 7, block: 2 }, &[]);
    put(&mut tree, &[b"names", b"..."], Node::Directory, &[]);
    put(&mut tree, &[b"names", b"!before the dot"], Node::Directory, &[]);
    put(&mut tree, &[b"names", b".-between the dots"], Node::Directory, &[]);
    // The end of a directory at the end of a block, and around it: 27 bytes for the dots, and entries of 12 and a name.
    for last in [60, 61, 62] {
        let directory = format!("full{last}");
        for number in 0..15 {
            let name = format!("{number:0243}");
            put(&mut tree, &[directory.as_bytes(), name.as_bytes()], Node::Fifo, &[]);
        }
        put(
            &mut tree,
            &[directory.as_bytes(), &vec![b'z'; 4096 - 27 - 15 * 255 - 12 - 61 + last][..]],
            Node::Fifo,
            &[],
        );
    }
    let large = vec![b'l'; 65_535];
    put(&mut tree, &[b"xattrs", b"large"], Node::Directory, &[(b"user.large", &large), (b"user.small", b"s")]);
    put(
        &mut tree,
        &[b"xattrs", b"again"],
        Node::File { size: 9, block: 5 },
        &[(b"user.large", &large), (b"user.own", &[b'o'; 60_000])],
    );
    let name = [&b"user."[..], &[b'n'; 250]].concat();
    put(&mut tree, &[b"xattrs", b"name"], Node::Directory, &[(&name, b"v")]);
    let many: Vec<_> = (0..300).map(|n| format!("trusted.n{n:03}").into_bytes()).collect();
    let many: Vec<(&[u8], &[u8])> = many.iter().map(|name| (&name[..], &b"v"[..])).collect();
    put(&mut tree, &[b"xattrs", b"many"], Node::Directory, &many);
    put(&mut tree, &[b"xattrs", b"many too"], Node::Fifo, &many);
    tree.link(&[b"a", b"file"], &[b"file"]).unwrap();
    tree.link(&[b"a", b"fifo"], &[b"dev", b"fifo"]).unwrap();
    let mut path = Vec::new();
    for _ in 0..200 {
        path.push(&b"deep"[..]);
    }
    tree.put(&path, Node::Directory, &of, &[]).unwrap();
    let before = Attributes {
        mode: 0o1777,
        mtime: nacre_lazy::erofs::Timestamp { seconds: -1, nanoseconds: 999_999_999 },
        ..of
    };
    tree.put(&[], Node::Directory, &before, &[(b"user.root", b"yes")]).unwrap();
    tree
}

fn trees() -> impl Iterator<Item = Tree> {
    let random = |seed| random::tree(&mut Rng::new(seed), 1500, Wild { bytes: seed % 2 == 0, blocks: 64 });
    [Tree::new(), samples()].into_iter().chain((0..6).map(random))
}

#[test]
fn the_kernel_mounts_what_is_written() {
    for source in trees() {
        let files = Files::new(&source, 64);
        let Some(mounted) = files.mount() else { return };
        let ours = list_tree(&source, &|size, block| files.digest(size, block));
        let theirs = tree::list(&mounted.0);
        tree::assert_same(&without_targets(ours), &without_targets(theirs), "ours against the kernel's");
        links(&source, &mounted.0);
    }
}

/// Paths are escaped in two ways; [`links`] compares the targets.
fn without_targets(lines: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let without = |line: String| {
        let Some((before, rest)) = line.split_once(" -> \"") else { return line };
        let mut escaped = false;
        let is_end = |byte: char| {
            let end = byte == '"' && !escaped;
            escaped = byte == '\\' && !escaped;
            end
        };
        let end = rest.find(is_end).unwrap();
        format!("{before} ->{}", &rest[end + 1..])
    };
    lines.into_iter().map(|(path, line)| (path, without(line))).collect()
}

/// Compares the targets of all symbolic links, and link counts.
fn links(source: &Tree, mounted: &Path) {
    use std::os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _};
    let mut todo = vec![(mounted.to_owned(), source.get(&[]).unwrap())];
    while let Some((path, entry)) = todo.pop() {
        assert_eq!(fs::symlink_metadata(&path).unwrap().nlink(), u64::from(entry.links()), "{}", path.display());
        if let Node::Symlink(target) = entry.node() {
            assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), target, "{}", path.display());
        }
        todo.extend(entry.children().map(|(name, child)| (path.join(std::ffi::OsStr::from_bytes(name)), child)));
    }
}

#[test]
fn fsck_accepts_what_is_written() {
    let Some(fsck) = require("fsck.erofs") else { return };
    for tree in trees() {
        let files = Files::new(&tree, 64);
        run(Command::new(&fsck)
            .arg(format!("--device={}", files.device().display()))
            .arg("--extract")
            .arg(files.meta()));
    }
}

#[test]
fn dump_reads_what_is_written() {
    let Some(dump) = require("dump.erofs") else { return };
    let tree = samples();
    let files = Files::new(&tree, 64);
    let ask = |arguments: &[&str]| {
        let device = format!("--device={}", files.device().display());
        let output = run(Command::new(&dump).arg(device).args(arguments).arg(files.meta()));
        String::from_utf8(output.stdout).unwrap()
    };
    let superblock = ask(&["-s"]);
    let inodes = tree.inodes();
    for line in [
        "Filesystem root nid:                          40",
        "Filesystem features:                          sb_csum mtime chunked_file device_table",
        &format!("Filesystem inode count:                       {inodes}"),
        "Filesystem UUID:                              07070707-0707-0707-0707-070707070707",
    ] {
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(superblock.lines().any(|found| words(found).contains(&words(line))), "{line} is not in\n{superblock}");
    }
    let file = ask(&["--path=/a/file", "-e"]);
    assert!(file.contains("Size: 5") && file.contains("Links: 2") && file.contains("4096"), "{file}");
}

/// Two chunks, and a device larger than most filesystems take.
#[test]
fn the_kernel_reads_files_of_many_gigabytes() {
    const BLOCKS: u32 = 9 * (1 << 28) + 1;
    let mut tree = Tree::new();
    let sizes = [(1u64 << 32) - 9, 1 << 32, (1 << 32) + 9, 5 << 30, 1 << 43, (1 << 43) + 9, 9 << 40];
    for size in sizes {
        let node = Node::File { size, block: 1 };
        tree.put(&[size.to_string().as_bytes()], node, &attributes(0o644), &[]).unwrap();
    }
    let files = Files::new(&Tree::new(), 1);
    let options = WriteOptions { uuid: [7; 16], device_tag: "data", device_blocks: BLOCKS };
    write(&tree, &options, File::create(files.meta()).unwrap()).unwrap();
    let limits = Limits { file_bytes: 1 << 44, ..Limits::default() };
    check(&File::open(files.meta()).unwrap(), &limits).unwrap();
    let device = File::create(files.device()).unwrap();
    if let Err(error) = device.set_len(u64::from(BLOCKS) * 4096) {
        return skip(&format!("no sparse file of 9 TiB can be made: {error}"));
    }
    for size in sizes {
        device.write_all_at(b"end", 4096 + size - 3).unwrap();
    }
    device.write_all_at(b"begin", 4096).unwrap();
    let Some(mounted) = files.mount() else { return };
    for size in sizes {
        let file = File::open(mounted.0.join(size.to_string())).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"begin");
        let end = io::Result::unwrap(file.read_at(&mut bytes, size - 3));
        assert_eq!((end, &bytes[..3]), (3, &b"end"[..]), "{size}");
    }
}

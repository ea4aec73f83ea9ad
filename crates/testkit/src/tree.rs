//! What a directory tree is, in a form that tests compare, like mtree(5): names, types, modes, owners, times, attributes, links, contents.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
};

use nacre_core::Digest;

/// Describes everything below `root`, by path; the root itself is `.`. What must not differ between two unpackers is in the texts;
/// hard links name the first path of their file.
pub fn list(root: &Path) -> BTreeMap<String, String> {
    let mut tree = BTreeMap::new();
    let mut files = HashMap::new();
    walk(root, root, &mut tree, &mut files);
    tree
}

/// Compares two trees and panics with the lines that differ.
pub fn assert_same(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>, what: &str) {
    let mut differences = String::new();
    for path in ours.keys().chain(theirs.keys().filter(|path| !ours.contains_key(*path))) {
        let (our, their) = (ours.get(path), theirs.get(path));
        if our != their {
            writeln!(differences, "{path}\n   ours: {our:?}\n  other: {their:?}").unwrap();
        }
    }
    assert!(differences.is_empty(), "{what}: trees differ\n{differences}");
}

fn walk(root: &Path, path: &Path, tree: &mut BTreeMap<String, String>, files: &mut HashMap<(u64, u64), String>) {
    let stat = fs::symlink_metadata(path).unwrap();
    let kind = stat.file_type();
    let relative = path.strip_prefix(root).unwrap();
    let name = if relative.as_os_str().is_empty() {
        ".".to_owned()
    } else {
        relative.as_os_str().as_bytes().escape_ascii().to_string()
    };
    let mut line =
        format!("{:o} {}:{} mtime={}.{:09}", stat.mode(), stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec());
    if kind.is_symlink() {
        write!(line, " -> {:?}", fs::read_link(path).unwrap()).unwrap();
    } else if kind.is_file() {
        write!(line, " size={} {}", stat.size(), Digest::sha256(&fs::read(path).unwrap())).unwrap();
    } else if kind.is_char_device() || kind.is_block_device() {
        write!(line, " device={}:{}", rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())).unwrap();
    }
    for (name, value) in attributes(path) {
        write!(line, " {}={}", name.escape_ascii(), value.escape_ascii()).unwrap();
    }
    if !kind.is_dir() && stat.nlink() > 1 {
        let first = files.entry((stat.dev(), stat.ino())).or_insert_with(|| name.clone());
        if *first != name {
            write!(line, " same file as {first}").unwrap();
        }
    }
    tree.insert(name, line);
    if kind.is_dir() {
        let mut children: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        children.sort();
        for child in children {
            walk(root, &child, tree, files);
        }
    }
}

fn attributes(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    names.truncate(length);
    names
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty() && *name != b"security.selinux")
        .filter_map(|name| {
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
            value.truncate(length);
            Some((name.to_vec(), value))
        })
        .collect()
}

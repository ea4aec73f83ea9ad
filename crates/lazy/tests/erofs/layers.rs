//! What operations do to a tree, against a model that is a flat list of paths.

use std::collections::BTreeMap;

use nacre_lazy::erofs::{Attributes, Node, Tree, TreeError};
use nacre_testkit::tree::assert_same;
use proptest::prelude::*;

use crate::listing::{attributes, list_tree, place};

type Path = Vec<&'static [u8]>;

#[derive(Clone, Debug)]
enum Operation {
    Layer,
    Directory(Path, u16),
    File(Path, u32),
    Link(Path, Path),
    Whiteout(Path),
    Opaque(Path),
}

fn path() -> impl Strategy<Value = Path> {
    let name = prop_oneof![Just(&b"a"[..]), Just(&b"b"[..]), Just(&b"c"[..])];
    prop::collection::vec(name, 1..5)
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        1 => Just(Operation::Layer),
        3 => (path(), 0u16..0o1000).prop_map(|(path, mode)| Operation::Directory(path, mode)),
        4 => (path(), 1u32..1000).prop_map(|(path, block)| Operation::File(path, block)),
        3 => (path(), path()).prop_map(|(path, target)| Operation::Link(path, target)),
        2 => path().prop_map(Operation::Whiteout),
        1 => path().prop_map(Operation::Opaque),
    ];
    prop::collection::vec(one, 1..60)
}

#[derive(Clone, Copy)]
struct Found {
    layer: u32,
    /// Index of its inode: `None` for directories.
    file: Option<usize>,
    mode: u16,
}

/// All paths but the root's, and the files' blocks.
#[derive(Default)]
struct Model {
    layer: u32,
    paths: BTreeMap<Path, Found>,
    files: Vec<u32>,
}

impl Model {
    fn parents(&mut self, path: &Path) -> bool {
        for length in 1..path.len() {
            let implied = Found { layer: self.layer, file: None, mode: 0o755 };
            if self.paths.entry(path[..length].to_vec()).or_insert(implied).file.is_some() {
                return false;
            }
        }
        true
    }

    fn replace(&mut self, path: &Path, file: usize) {
        self.paths.retain(|other, _| !other.starts_with(path));
        self.paths.insert(path.clone(), Found { layer: self.layer, file: Some(file), mode: 0o644 });
    }

    /// Removes what lower layers have at and below a path.
    fn prune(&mut self, path: &Path, itself: bool) -> bool {
        let concerned = |other: &Path| other.starts_with(path) && (itself || other.len() > path.len());
        let layer = self.layer;
        let ours: Vec<Path> = self
            .paths
            .iter()
            .filter(|(other, found)| concerned(other) && found.layer == layer)
            .map(|(path, _)| path.clone())
            .collect();
        let mut removed = false;
        self.paths.retain(|other, found| {
            if !concerned(other) || found.layer == layer {
                return true;
            }
            removed = true;
            *found = Found { layer, file: None, mode: 0o755 };
            ours.iter().any(|ours| ours.starts_with(other))
        });
        removed
    }

    fn apply(&mut self, operation: &Operation) -> bool {
        match operation {
            Operation::Layer => self.layer += 1,
            Operation::Directory(path, mode) => {
                if !self.parents(path) {
                    return false;
                }
                if self.paths.get(path).is_some_and(|found| found.file.is_some()) {
                    self.paths.remove(path);
                }
                self.paths.insert(path.clone(), Found { layer: self.layer, file: None, mode: *mode });
            }
            Operation::File(path, block) => {
                if !self.parents(path) {
                    return false;
                }
                self.files.push(*block);
                self.replace(path, self.files.len() - 1);
            }
            Operation::Link(path, target) => {
                let Some(file) = self.paths.get(target).and_then(|found| found.file) else { return false };
                if (target.len() > path.len() && target.starts_with(path)) || !self.parents(path) {
                    return false;
                }
                self.replace(path, file);
            }
            Operation::Whiteout(path) => return self.prune(path, true),
            Operation::Opaque(path) => {
                let mut below = path.clone();
                below.push(b"x");
                if !self.parents(&below) {
                    return false;
                }
                self.prune(path, false);
            }
        }
        true
    }

    fn list(&self) -> BTreeMap<String, String> {
        let mut lines = BTreeMap::from([(".".to_owned(), "40755 0:0 mtime=0.000000000".to_owned())]);
        let mut first: BTreeMap<usize, String> = BTreeMap::new();
        for (path, found) in &self.paths {
            let name = path.join(&b'/').escape_ascii().to_string();
            let implied =
                if found.mode == 0o755 { "0:0 mtime=0.000000000" } else { "1000:70000 mtime=1700000000.123456789" };
            let line = match found.file {
                None => format!("{:o} {implied}", 0o40000 | found.mode),
                Some(file) => {
                    let line =
                        format!("100644 1000:70000 mtime=1700000000.123456789 size=10 block={}", self.files[file]);
                    let first = first.entry(file).or_insert_with(|| name.clone());
                    if *first == name { line } else { format!("{line} same file as {first}") }
                }
            };
            lines.insert(name, line);
        }
        lines
    }
}

fn apply(tree: &mut Tree, operation: &Operation) -> bool {
    match operation {
        Operation::Layer => {
            tree.begin_layer();
            true
        }
        Operation::Directory(path, mode) => {
            let of = if *mode == 0o755 { Attributes::IMPLIED } else { attributes(*mode) };
            tree.put(path, Node::Directory, &of, &[]).is_ok()
        }
        Operation::File(path, block) => {
            tree.put(path, Node::File { size: 10, block: *block }, &attributes(0o644), &[]).is_ok()
        }
        Operation::Link(path, target) => tree.link(path, target).is_ok(),
        Operation::Whiteout(path) => tree.whiteout(path).unwrap(),
        Operation::Opaque(path) => tree.opaque(path).is_ok(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_does_what_the_model_does(operations in operations()) {
        let (mut tree, mut model) = (Tree::new(), Model::default());
        for operation in &operations {
            prop_assert_eq!(apply(&mut tree, operation), model.apply(operation), "{:?}", operation);
        }
        assert_same(&list_tree(&tree, &place), &model.list(), "tree against model");
        // Links are counted right, or the image is refused.
        nacre_lazy::erofs::check(&crate::listing::image(&tree), &nacre_lazy::erofs::Limits::default()).unwrap();
    }
}

fn names(tree: &Tree) -> Vec<String> {
    list_tree(tree, &place).into_keys().collect()
}

const FILE: Node<'_> = Node::File { size: 1, block: 1 };

fn file(tree: &mut Tree, path: &[&[u8]]) {
    tree.put(path, FILE, &attributes(0o644), &[]).unwrap();
}

#[test]
fn a_whiteout_spares_its_own_layer() {
    let mut tree = Tree::new();
    file(&mut tree, &[b"d", b"lower"]);
    file(&mut tree, &[b"d", b"e", b"lower"]);
    tree.put(&[b"d"], Node::Directory, &attributes(0o700), &[]).unwrap();
    tree.begin_layer();
    file(&mut tree, &[b"d", b"e", b"upper"]);
    assert!(tree.whiteout(&[b"d"]).unwrap());
    assert!(!tree.whiteout(&[b"d"]).unwrap());
    assert_eq!(names(&tree), [".", "d", "d/e", "d/e/upper"]);
    assert_eq!(tree.get(&[b"d"]).unwrap().attributes(), Attributes::IMPLIED);
    tree.begin_layer();
    assert!(tree.whiteout(&[b"d", b"e"]).unwrap());
    assert_eq!(names(&tree), [".", "d"]);
    assert!(!tree.whiteout(&[b"d", b"e"]).unwrap() && !tree.whiteout(&[b"x", b"y"]).unwrap());
}

#[test]
fn a_link_keeps_what_its_target_was() {
    let mut tree = Tree::new();
    file(&mut tree, &[b"a"]);
    tree.link(&[b"b"], &[b"a"]).unwrap();
    tree.begin_layer();
    tree.put(&[b"a"], Node::Symlink(b"x"), &attributes(0o777), &[]).unwrap();
    let b = tree.get(&[b"b"]).unwrap();
    assert_eq!((b.node(), b.links()), (FILE, 1));
    tree.link(&[b"b"], &[b"b"]).unwrap();
    assert_eq!(tree.get(&[b"b"]).unwrap().links(), 1);
    tree.begin_layer();
    assert!(tree.whiteout(&[b"b"]).unwrap() && tree.whiteout(&[b"a"]).unwrap());
    assert_eq!(tree.inodes(), 1);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut tree = Tree::new();
    let of = attributes(0o644);
    file(&mut tree, &[b"f"]);
    file(&mut tree, &[b"d", b"f"]);
    let mut bad = |path: &[&[u8]], node, of: &Attributes, xattrs: &[(&[u8], &[u8])]| {
        tree.put(path, node, of, xattrs).unwrap_err()
    };
    assert!(matches!(bad(&[b"f", b"x"], FILE, &of, &[]), TreeError::NotADirectory { path } if path == "f"));
    assert_eq!(bad(&[], FILE, &of, &[]), TreeError::Root);
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'n'; 256]] {
        assert!(matches!(bad(&[b"d", name], FILE, &of, &[]), TreeError::Name { .. }));
    }
    let long = [b'x'; 4096];
    for node in [
        Node::Symlink(b""),
        Node::Symlink(b"a\0b"),
        Node::Symlink(&long),
        Node::CharDevice(nacre_lazy::erofs::Device { major: 0, minor: 0 }),
        Node::BlockDevice(nacre_lazy::erofs::Device { major: 4096, minor: 0 }),
        Node::File { size: (1 << 44) + 1, block: 0 },
    ] {
        assert!(matches!(bad(&[b"x"], node, &of, &[]), TreeError::Value { .. }));
    }
    assert!(matches!(bad(&[b"x"], FILE, &Attributes { mode: 0o10000, ..of }, &[]), TreeError::Value { .. }));
    let late = nacre_lazy::erofs::Timestamp { seconds: 0, nanoseconds: 1_000_000_000 };
    assert!(matches!(bad(&[b"x"], FILE, &Attributes { mtime: late, ..of }, &[]), TreeError::Value { .. }));
    for name in [&b"user."[..], b"system.nfs4_acl", b"trusted.overlay.opaque", b"user.overlay.x", b"x", b"user.a\0"] {
        assert!(matches!(bad(&[b"x"], FILE, &of, &[(name, b"")]), TreeError::Xattr { .. }), "{}", name.escape_ascii());
    }
    assert!(matches!(bad(&[b"x"], FILE, &of, &[(b"user.a", b"1"), (b"user.a", b"2")]), TreeError::Xattr { .. }));
    assert!(matches!(bad(&[b"x"], FILE, &of, &[(b"user.a", &vec![0; 65_536])]), TreeError::Xattr { .. }));
    let large = vec![0; 65_535];
    let many: Vec<(&[u8], &[u8])> =
        [b"user.a", b"user.b", b"user.c", b"user.d"].iter().map(|name| (&name[..], &large[..])).collect();
    assert_eq!(bad(&[b"x"], FILE, &of, &many), TreeError::Xattrs { path: "x".to_owned() });
    assert!(matches!(tree.link(&[b"x"], &[b"no"]), Err(TreeError::LinkTarget { .. })));
    assert!(matches!(tree.link(&[b"x"], &[b"d"]), Err(TreeError::LinkTo { .. })));
    assert!(matches!(tree.link(&[b"d"], &[b"d", b"f"]), Err(TreeError::LinkTo { .. })));
    assert_eq!(tree.whiteout(&[]), Err(TreeError::Root));
    assert_eq!(names(&tree), [".", "d", "d/f", "f"]);
}

#[test]
fn links_among_parents_are_resolved_within_the_root() {
    let mut tree = Tree::new();
    let of = attributes(0o777);
    for (name, target) in
        [(&b"lib"[..], &b"usr/lib"[..]), (b"abs", b"/usr/./lib//x"), (b"up", b"../../../usr/lib"), (b"loop", b"loop")]
    {
        tree.put(&[name], Node::Symlink(target), &of, &[]).unwrap();
    }
    tree.put(&[b"usr", b"lib"], Node::Directory, &of, &[]).unwrap();
    let resolve = |path: &[&[u8]]| tree.resolve(path).map(|parts| parts.join(&b'/'));
    assert_eq!(resolve(&[b"lib", b"a"]).unwrap(), b"usr/lib/a");
    assert_eq!(resolve(&[b"abs", b"a", b"b"]).unwrap(), b"usr/lib/x/a/b");
    assert_eq!(resolve(&[b"usr", b"lib", b"lib"]).unwrap(), b"usr/lib/lib");
    assert_eq!(resolve(&[b"up", b"lib"]).unwrap(), b"usr/lib/lib");
    assert_eq!(resolve(&[b"lib"]).unwrap(), b"lib");
    assert_eq!(resolve(&[b"new", b"a"]).unwrap(), b"new/a");
    assert_eq!(resolve(&[]).unwrap(), b"");
    assert!(matches!(resolve(&[b"loop", b"a"]), Err(TreeError::Loop { .. })));
}

#[test]
fn roots_of_every_size_are_where_they_must_be() {
    use nacre_lazy::erofs::{Image, Limits, WriteOptions, check, write};
    let mut tree = Tree::new();
    let options = WriteOptions { uuid: [1; 16], device_tag: "data", device_blocks: 0 };
    for count in 0..450u32 {
        let mut bytes = Vec::new();
        write(&tree, &options, &mut bytes).unwrap();
        let summary = check(&bytes, &Limits::default()).unwrap_or_else(|error| panic!("{count} names: {error}"));
        assert_eq!(summary.directories, 1);
        let image = Image::open(&bytes[..]).unwrap();
        let root = image.inode(image.root()).unwrap();
        let mut found = 0;
        let more = |_: nacre_lazy::erofs::Dirent<'_>| {
            found += 1;
            true
        };
        image.read_dir(&root, 0, more).unwrap();
        assert_eq!(found, count + 2);
        let name = format!("name-{count}");
        tree.put(&[name.as_bytes()], Node::Fifo, &attributes(0o644), &[]).unwrap();
    }
}

//! Stacks of layers that nobody would think of, from a seed: where umoci and we accept them, we make the same of them.

use std::{collections::BTreeMap, path::Path};

use nacre_testkit::{Compression, Entry, Image, Layer, Rng, require, root, run, tree};

use crate::support::Place;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn path(rng: &mut Rng) -> String {
    let parts: Vec<_> = (0..=rng.below(3)).map(|_| *rng.pick(&NAMES)).collect();
    parts.join("/")
}

/// What is at a name, as far as this generator follows it.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Dir,
    File,
    Link,
}

/// Layers that an unpacker does not refuse, more often than not.
struct Maker {
    rng: Rng,
    number: u32,
    tree: BTreeMap<String, Kind>,
}

impl Maker {
    /// A name that is not below a file.
    fn path(&mut self) -> String {
        loop {
            let path = path(&mut self.rng);
            let mut parents = path.match_indices('/').map(|(at, _)| path.split_at(at).0);
            if parents.all(|parent| self.tree.get(parent).is_none_or(|kind| *kind == Kind::Dir)) {
                return path;
            }
        }
    }

    fn forget(&mut self, path: &str) {
        let below = format!("{path}/");
        self.tree.retain(|name, _| name != path && !name.starts_with(&below));
    }

    fn layer(&mut self) -> Layer {
        let mut own = std::collections::BTreeSet::new();
        let mut entries = Vec::new();
        for _ in 0..=self.rng.below(8) {
            let at = self.path();
            let touched = own.iter().any(|name: &String| name == &at || name.starts_with(&format!("{at}/")));
            self.number += 1;
            let number = self.number;
            let time = i64::from(number) * 100;
            let mode = number & 0o77;
            let (entry, kind) = match self.rng.below(12) {
                0..=2 => {
                    (Entry::dir(&at).mode(0o700 + mode).owner(number.into(), 1).mtime(time, number), Some(Kind::Dir))
                }
                3..=5 if !touched => (
                    Entry::file(&at, format!("content {number}")).mode(0o600 + mode).mtime(time, number),
                    Some(Kind::File),
                ),
                6 if !touched => (Entry::symlink(&at, path(&mut self.rng)).mtime(time, 1), Some(Kind::Link)),
                7 if !touched => {
                    let files = self.tree.iter().filter(|(name, kind)| **kind == Kind::File && **name != at);
                    let files: Vec<String> = files.map(|(name, _)| name.clone()).collect();
                    if files.is_empty() {
                        continue;
                    }
                    (Entry::hard_link(&at, self.rng.pick(&files)), Some(Kind::File))
                }
                8 if !touched => (Entry::opaque(&at), Some(Kind::Dir)),
                9.. if !touched => (Entry::whiteout(&at), None),
                _ => continue,
            };
            if self.tree.get(&at).is_some_and(|old| Some(*old) != kind) || kind.is_none() {
                self.forget(&at);
            }
            for (end, _) in at.match_indices('/') {
                self.tree.insert(at.split_at(end).0.to_owned(), Kind::Dir);
            }
            self.tree.extend(kind.map(|kind| (at.clone(), kind)));
            own.insert(at);
            entries.push(entry);
        }
        Layer::of(entries)
    }
}

fn image(seed: u64) -> Image {
    let mut maker = Maker { rng: Rng::new(seed), number: 0, tree: BTreeMap::new() };
    let layers = 2 + maker.rng.below(4);
    (0..layers).fold(Image::builder(), |builder, _| builder.layer_of(maker.layer(), Compression::None)).build()
}

/// A tree without the times of directories: umoci has its own for those that something was made or removed in.
fn list(root: &Path) -> BTreeMap<String, String> {
    let mut tree = tree::list(root);
    tree.remove(".");
    for line in tree.values_mut().filter(|line| line.starts_with('4')) {
        *line = line.split(" mtime=").next().unwrap().to_owned();
    }
    tree
}

#[test]
fn stacks_that_nobody_thought_of() {
    if !root() || require("umoci").is_none() {
        return;
    }
    let place = Place::new();
    let mut compared = 0;
    for seed in 1..=30 {
        let tag = format!("seed-{seed}");
        image(seed).write_layout(&place.at(&tag), "t");
        let (ours, theirs) = (place.at(&format!("{tag}-ours")), place.at(&format!("{tag}-umoci")));
        let layout = format!("{}:t", place.text(&tag));
        let mut nacre = place.nacre("store", &["image", "pull", "--insecure-policy", "--allow-unsigned", "--bundle"]);
        let our = nacre.arg(&ours).arg(format!("oci:{layout}")).output().unwrap();
        let their = place.program("umoci").args(["unpack", "--image", &layout]).arg(&theirs).output().unwrap();
        // Who accepts layers that contradict those below is another matter: containerd is stricter than umoci, too.
        if our.status.success() && their.status.success() {
            tree::assert_same(&list(&ours.join("rootfs")), &list(&theirs.join("rootfs")), &tag);
            compared += 1;
        }
        if our.status.success() {
            run(place.nacre("store", &["image", "umount"]).arg(&ours));
        }
    }
    assert!(compared > 20, "only {compared} images were accepted by both");
}

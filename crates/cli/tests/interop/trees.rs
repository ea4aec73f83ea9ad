//! The same images, unpacked by `nacre` and by umoci, are the same trees.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use nacre_testkit::{Compression, Entry, Image, Layer, require, root, run, tree};

use crate::support::{Bundle, Place};

/// Unpacks `ours` with `nacre` and `theirs`, an OCI layout, with umoci. Directories of `untimed` are in no layer, or something was made
/// in them that is in none: umoci leaves them with the time of unpacking. So is the root, where `root` is not set.
struct Case<'a> {
    name: &'a str,
    ours: String,
    theirs: String,
    untimed: &'a [&'a str],
    root: bool,
}

impl Case<'_> {
    fn compare(&self, place: &Place) {
        let bundle = Bundle::pull(place, &format!("{}-ours", self.name), &self.ours);
        let theirs = place.at(&format!("{}-umoci", self.name));
        run(place.program("umoci").args(["unpack", "--image", &self.theirs]).arg(&theirs));
        let ours = self.list(&bundle.rootfs());
        assert!(ours.len() > 1, "{}: nothing there", self.name);
        tree::assert_same(&ours, &self.list(&theirs.join("rootfs")), self.name);
    }

    fn list(&self, root: &Path) -> BTreeMap<String, String> {
        let mut tree = tree::list(root);
        for path in self.untimed.iter().chain((!self.root).then_some(&".")) {
            if let Some(line) = tree.get_mut(*path) {
                *line = line.split(" mtime=").next().unwrap().to_owned();
            }
        }
        tree
    }
}

/// Has the layers' tars in gzip for umoci, which knows no zstd, and as they are for us.
fn built(place: &Place, name: &'static str, layers: Vec<(Layer, Compression)>, untimed: &[&str]) {
    let make = |kind: &str, compression: Option<Compression>| {
        let image = layers.iter().fold(Image::builder(), |builder, (layer, own)| {
            builder.layer_of(layer.clone(), compression.unwrap_or(*own))
        });
        image.build().write_layout(&place.at(&format!("{name}-{kind}")), "t");
        format!("{}:t", place.text(&format!("{name}-{kind}")))
    };
    let ours = format!("oci:{}", make("own", None));
    let theirs = make("gzip", Some(Compression::Gzip));
    Case { name, ours, theirs, untimed, root: true }.compare(place);
}

fn gzip(entries: impl IntoIterator<Item = Entry>) -> (Layer, Compression) {
    (Layer::of(entries.into_iter().collect::<Vec<_>>()), Compression::Gzip)
}

fn top() -> Entry {
    Entry::dir("./").mtime(777, 5)
}

fn base() -> Vec<Entry> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        top(),
        Entry::dir("bin").mtime(100, 7),
        Entry::file("bin/su", "su").mode(0o4755).mtime(1_700_000_000, 123_456_789),
        Entry::file("bin/wall", "wall").mode(0o2555).owner(0, 5),
        Entry::file("bin/ping", "ping").mode(0o755).xattr("security.capability", capability).owner(5, 6),
        Entry::dir("tmp").mode(0o1777).mtime(-100, 250_000_000),
        Entry::dir("srv").mode(0o2775).owner(1000, 1001).mtime(4, 4).xattr("user.note", b"\0\xff".as_slice()),
        Entry::file("srv/a", "a").mtime(9, 0).xattr("user.note", "kept"),
        Entry::hard_link("srv/b", "srv/a"),
        Entry::symlink("lib", "srv").owner(7, 8).mtime(12, 13),
        Entry::symlink("dangling", "/no/where"),
        Entry::dir("dev").mtime(3, 3),
        Entry::char_device("dev/null", 1, 3).mtime(5, 5),
        Entry::block_device("dev/sda", 8, 300).owner(0, 6),
        Entry::fifo("dev/pipe").mode(0o622).mtime(6, 6),
    ]
}

/// Whether these tests can run here.
fn ready(programs: &[&str]) -> bool {
    root() && programs.iter().chain(&["umoci"]).all(|program| require(program).is_some())
}

#[test]
fn every_kind_of_entry_in_every_compression() {
    if !ready(&[]) {
        return;
    }
    let place = Place::new();
    for (name, compression) in [("plain", Compression::None), ("gz", Compression::Gzip), ("zstd", Compression::Zstd)] {
        built(&place, name, vec![(Layer::of(base()), compression)], &[]);
    }
    let long = |part: &str, times: usize| vec![part; times].join("/");
    let pax = [
        top(),
        Entry::dir("d"),
        Entry::file(format!("d/{}", "n".repeat(255)), "1").mtime(1, 1),
        Entry::symlink("l", long("target", 200)),
        Entry::file(format!("d/{}", "g".repeat(200)), "2").gnu().owner(1 << 30, 1 << 22),
        Entry::file("d/sp\u{e9}cial \n\t\u{1F980}", "3"),
        Entry::file("d/big-owner", "4").owner(3_000_000_000, 2_999_999_999).mtime(1 << 33, 7),
    ];
    built(&place, "long-names", vec![gzip(pax)], &[]);
    let sparse = [
        top(),
        Entry::sparse("holes", 3 << 20, &[(4096, b"one"), (1 << 20, b"two")]),
        Entry::sparse("all-hole", 1 << 20, &[]),
    ];
    built(&place, "sparse", vec![gzip(sparse)], &[]);
}

#[test]
fn what_layers_do_to_those_below() {
    if !ready(&[]) {
        return;
    }
    let place = Place::new();
    let whiteouts = gzip([
        top(),
        Entry::whiteout("bin/su"),
        Entry::whiteout("dev"),
        Entry::whiteout("nothing"),
        Entry::dir("bin").mtime(50, 1),
        Entry::file("bin/new", "new"),
    ]);
    let again = gzip([Entry::file("bin/su", "again").mode(0o700), Entry::whiteout("lib"), top()]);
    built(&place, "whiteouts", vec![gzip(base()), whiteouts, again], &["bin"]);
    let opaque = gzip([
        top(),
        Entry::dir("srv").mtime(70, 0),
        Entry::file("srv/new", "n"),
        Entry::opaque("srv"),
        Entry::dir("bin").mtime(71, 0),
        Entry::opaque("bin"),
    ]);
    built(&place, "opaque", vec![gzip(base()), opaque], &[]);
    let links = gzip([Entry::hard_link("srv/c", "srv/a"), Entry::hard_link("srv/d", "srv/c"), top()]);
    built(&place, "hard-links", vec![gzip(base()), links], &["srv"]);
    let implied = gzip([Entry::file("srv/new", "n"), Entry::file("not/there/yet", "n"), top()]);
    built(&place, "implied", vec![gzip(base()), implied], &["srv", "not", "not/there"]);
    let layer = |content: &str| gzip([top(), Entry::dir("x").mtime(1, 0), Entry::file("x/y", content)]);
    built(&place, "a-b-a", vec![layer("a"), layer("b"), layer("a")], &[]);
    let changes =
        gzip([Entry::file("srv", "now a file"), Entry::dir("lib").mtime(2, 2), Entry::file("lib/x", "x"), top()]);
    built(&place, "kinds", vec![gzip(base()), changes], &[]);
}

#[test]
fn a_hundred_and_thirty_layers() {
    if !ready(&[]) {
        return;
    }
    let place = Place::new();
    let layer = |number: i64| {
        let mut entries = vec![top(), Entry::dir("d").mtime(number, 0), Entry::file(format!("d/{number}"), "x")];
        entries.extend((number % 3 == 2).then(|| Entry::whiteout(&format!("d/{}", number - 1))));
        gzip(entries)
    };
    built(&place, "many", (0..130).map(layer).collect(), &[]);
}

/// A tree on this disk for builders to copy: hard links, modes, a link, an attribute, a hole.
fn tree_to_copy(place: &Place) -> String {
    let at = place.at("tree");
    fs::create_dir_all(at.join("sub/deep")).unwrap();
    fs::write(at.join("sub/file"), "content").unwrap();
    fs::hard_link(at.join("sub/file"), at.join("sub/deep/link")).unwrap();
    std::os::unix::fs::symlink("sub/file", at.join("symlink")).unwrap();
    fs::write(at.join("setuid"), "s").unwrap();
    fs::set_permissions(at.join("setuid"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(at.join("sub/deep"), fs::Permissions::from_mode(0o1750)).unwrap();
    fs::File::create(at.join("hole")).unwrap().set_len(1 << 20).unwrap();
    if let Some(setcap) = require("setcap") {
        run(Command::new(setcap).arg("cap_net_raw=ep").arg(at.join("sub/file")));
    }
    at.display().to_string()
}

#[test]
fn images_that_buildah_made() {
    if !ready(&["buildah"]) {
        return;
    }
    let place = Place::new();
    let tree = tree_to_copy(&place);
    let (root, run_root) = (place.text("buildah"), place.text("buildah-run"));
    let buildah = |arguments: &[&str]| {
        let mut command = place.program("buildah");
        command.args(["--root", &root, "--runroot", &run_root, "--storage-driver", "vfs"]).args(arguments);
        String::from_utf8(run(&mut command).stdout).unwrap().trim().to_owned()
    };
    let first = buildah(&["from", "scratch"]);
    buildah(&["copy", &first, &tree, "/srv/tree"]);
    let base = buildah(&["commit", "--quiet", &first, "base"]);
    // A second layer: files that go, come and change, done in the container's own file system.
    let second = buildah(&["from", "--pull-never", &base]);
    let mounted = buildah(&["mount", &second]);
    let inside = Path::new(&mounted);
    fs::remove_file(inside.join("srv/tree/setuid")).unwrap();
    fs::remove_dir_all(inside.join("srv/tree/sub/deep")).unwrap();
    fs::write(inside.join("srv/tree/sub/file"), "changed").unwrap();
    fs::write(inside.join("srv/tree/added"), "added").unwrap();
    buildah(&["umount", &second]);
    buildah(&["config", "--cmd", "/x", "--user", "7:8", &second]);
    let middle = buildah(&["commit", "--quiet", &second, "middle"]);
    let third = buildah(&["from", "--pull-never", &middle]);
    buildah(&["copy", "--chown", "12:34", "--chmod", "0640", &third, &format!("{tree}/hole"), "/owned/hole"]);
    let layout = place.text("buildah-layout");
    buildah(&["commit", "--quiet", &third, &format!("oci:{layout}:three")]);
    buildah(&["commit", "--quiet", "--squash", &third, &format!("oci:{layout}:squashed")]);
    buildah(&["push", "--quiet", "--format", "v2s2", &middle, &format!("dir:{}", place.text("buildah-dir"))]);
    for (name, ours) in [
        ("three", format!("oci:{layout}:three")),
        ("squashed", format!("oci:{layout}:squashed")),
        ("docker-manifest", format!("dir:{}", place.text("buildah-dir"))),
    ] {
        let theirs = match name {
            "docker-manifest" => {
                let to = format!("{layout}:two");
                buildah(&["push", "--quiet", "--format", "oci", &middle, &format!("oci:{to}")]);
                to
            }
            _ => format!("{layout}:{name}"),
        };
        Case { name, ours, theirs, untimed: &[], root: false }.compare(&place);
    }
}

#[test]
fn images_that_umoci_and_skopeo_made() {
    if !ready(&["skopeo"]) {
        return;
    }
    let place = Place::new();
    let tree = tree_to_copy(&place);
    let layout = place.text("layout");
    let image = format!("{layout}:t");
    let umoci = |arguments: &[&str]| {
        run(place.program("umoci").args(arguments));
    };
    umoci(&["init", "--layout", &layout]);
    umoci(&["new", "--image", &image]);
    umoci(&["insert", "--image", &image, &tree, "/opt/tree"]);
    let raw = place.write("raw.tar", Layer::of(base()).tar());
    umoci(&["raw", "add-layer", "--image", &image, &raw]);
    umoci(&["insert", "--image", &image, "--whiteout", "/opt/tree/setuid"]);
    umoci(&["insert", "--image", &image, "--opaque", &format!("{tree}/sub"), "/opt/tree/sub"]);
    // What was changed in an unpacked bundle, as a layer.
    let bundle = place.text("umoci-edit");
    umoci(&["unpack", "--image", &image, &bundle]);
    let rootfs = place.at("umoci-edit/rootfs");
    fs::remove_dir_all(rootfs.join("srv")).unwrap();
    fs::write(rootfs.join("bin/su"), "changed").unwrap();
    fs::create_dir(rootfs.join("made")).unwrap();
    umoci(&["repack", "--image", &image, &bundle]);
    umoci(&["config", "--image", &image, "--config.cmd", "/x"]);
    let untimed = ["opt", "opt/tree", "bin"];
    Case { name: "umoci", ours: format!("oci:{image}"), theirs: image.clone(), untimed: &untimed, root: false }
        .compare(&place);

    // Other forms of the same image, by skopeo.
    let archive = place.text("docker.tar");
    let forms = [
        ("docker-archive", format!("docker-archive:{archive}"), format!("docker-archive:{archive}:x/y:z"), vec![]),
        ("oci-archive", format!("oci-archive:{}", place.text("oci.tar")), String::new(), vec![]),
        ("dir", format!("dir:{}", place.text("dir")), String::new(), vec!["--format", "v2s2"]),
        ("skopeo-zstd", format!("oci:{}:t", place.text("zstd")), String::new(), vec!["--dest-compress-format", "zstd"]),
    ];
    for (name, ours, to, options) in forms {
        let to = if to.is_empty() { &ours } else { &to };
        run(place
            .program("skopeo")
            .args(["--insecure-policy", "copy"])
            .args(options)
            .args([&format!("oci:{image}"), to]));
        Case { name, ours, theirs: image.clone(), untimed: &untimed, root: false }.compare(&place);
    }
}

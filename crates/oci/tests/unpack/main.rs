//! Layers become the trees that umoci makes of them, and nothing else becomes anything.
#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod forms;
mod limits;
mod unprivileged;

use std::{
    ffi::CString,
    fs::{self, File},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
};

use nacre_core::{Digest, NoProgress};
use nacre_oci::{
    crypt::{LayerEncryptor, LayerSecret, PublicOptions},
    layer::{LayerError, LayerKey, LayerPlan, apply_layer},
    manifest::Descriptor,
    unpack::{
        AppliedLayer, DevicePolicy, IdMap, IdRange, UnpackOptions, WhiteoutMode, adjust::adjust_layer, remove_tree,
    },
};
use nacre_testkit::{Compression, Entry, Image, Layer, SmallDisk, require, root, run, tree};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// Layers, the bottom one first.
type Stack = Vec<(Layer, Compression)>;

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

/// Applies a blob as a pull would.
fn apply_blob(
    media_type: &str,
    blob: &[u8],
    tar: &[u8],
    options: &UnpackOptions,
    target: &Path,
) -> Result<AppliedLayer, LayerError> {
    let descriptor = Descriptor::of(media_type, blob);
    let plan = LayerPlan::new(&descriptor, Digest::sha256(tar), None, options).unwrap();
    apply_layer(blob, &plan, open(target), &NoProgress).map(nacre_core::Verified::into_inner)
}

fn apply(tar: &[u8], options: &UnpackOptions) -> Result<(tempfile::TempDir, AppliedLayer), LayerError> {
    let target = tempfile::tempdir().unwrap();
    let record = apply_blob(TAR, tar, tar, options, target.path())?;
    Ok((target, record))
}

/// A mounted stack of layers, as a store composes it.
struct Mounted {
    path: PathBuf,
    _holder: tempfile::TempDir,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

fn mount(layers: &[(Layer, Compression)]) -> Result<Mounted, LayerError> {
    let holder = tempfile::tempdir().unwrap();
    let make = |name: String| {
        let path = holder.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let mut stack = vec![make("bottom".into())];
    let mut top = None;
    for (index, (layer, compression)) in layers.iter().enumerate() {
        let target = make(format!("l{index}"));
        let suffix = match compression {
            Compression::None => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        let blob = compression.apply(layer.tar());
        let record = apply_blob(&format!("{TAR}{suffix}"), &blob, layer.tar(), &UnpackOptions::default(), &target)?;
        let record: AppliedLayer = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        if record.hides_lower {
            stack.truncate(1);
        }
        let below: Vec<OwnedFd> = stack.iter().rev().map(|path| open(path)).collect();
        let below: Vec<_> = below.iter().map(|fd| fd.as_fd()).collect();
        let adjustment = make(format!("a{index}"));
        let adjusted =
            adjust_layer(&below, open(&target).as_fd(), &record, open(&adjustment).as_fd(), WhiteoutMode::Trusted)
                .unwrap_or_else(|error| panic!("{error}"));
        if record.root {
            top = Some(target.clone());
        }
        stack.push(target);
        if adjusted {
            stack.push(adjustment);
        }
    }
    let root = make("top".into());
    if let Some(model) = top {
        nacre_oci::unpack::adjust::copy_attributes(open(&model).as_fd(), open(&root).as_fd()).unwrap();
    }
    stack.push(root);
    let path = make("merged".into());
    let lower: Vec<_> = stack.iter().rev().map(|path| path.to_str().unwrap()).collect();
    let options = CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
    rustix::mount::mount("overlay", &path, "overlay", rustix::mount::MountFlags::RDONLY, Some(options.as_c_str()))
        .unwrap_or_else(|error| panic!("mount {options:?}: {error}"));
    Ok(Mounted { path, _holder: holder })
}

fn umoci(layers: &[(Layer, Compression)]) -> (tempfile::TempDir, PathBuf) {
    let holder = tempfile::tempdir().unwrap();
    // The peer does not read zstd, so it gets the same tars in gzip.
    let builder =
        layers.iter().fold(Image::builder(), |builder, (layer, _)| builder.layer_of(layer.clone(), Compression::Gzip));
    builder.build().write_layout(&holder.path().join("layout"), "t");
    let bundle = holder.path().join("bundle");
    run(Command::new("umoci").arg("unpack").arg("--image").arg(holder.path().join("layout:t")).arg(&bundle));
    (holder, bundle.join("rootfs"))
}

/// Directories that no layer has an entry for, and those that they are made in, get the time of unpacking from umoci; that is not compared.
fn compare(name: &str, layers: Stack, untimed: &[&str]) {
    let ours = mount(&layers).unwrap_or_else(|error| panic!("{name}: {error}"));
    let (_holder, theirs) = umoci(&layers);
    let listed = |path: &Path| {
        let mut tree = tree::list(path);
        for path in untimed {
            if let Some(line) = tree.get_mut(*path) {
                *line = line.split(" mtime=").next().unwrap().to_owned();
            }
        }
        tree
    };
    let mut ours = listed(&ours.path);
    let mut theirs = listed(&theirs);
    if !theirs.get(".").unwrap().contains("mtime=777") {
        ours.remove(".");
        theirs.remove(".");
    }
    assert!(theirs.len() > 1, "{name}: umoci made nothing");
    tree::assert_same(&ours, &theirs, name);
}

fn gzip(entries: Vec<Entry>) -> (Layer, Compression) {
    (Layer::of(entries), Compression::Gzip)
}

fn base() -> Vec<Entry> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        Entry::dir("./").mode(0o755).mtime(777, 5),
        Entry::dir("bin").mtime(100, 7),
        Entry::file("bin/su", "su").mode(0o4755).mtime(1_700_000_000, 123_456_789),
        Entry::file("bin/ping", "ping").mode(0o755).xattr("security.capability", capability).owner(5, 6),
        Entry::file("bin/wall", "wall").mode(0o2555).owner(0, 5),
        Entry::dir("tmp").mode(0o1777).mtime(-100, 250_000_000),
        Entry::dir("srv").mode(0o2775).owner(1000, 1001).mtime(4, 4),
        Entry::file("srv/a", "a").mtime(9, 0),
        Entry::file("srv/b", "b").owner(3_000_000_000, 2_999_999_999).mode(0),
        Entry::dir("srv/sub").mode(0o700).mtime(11, 1),
        Entry::hard_link("srv/sub/a2", "srv/a"),
        Entry::hard_link("srv/a3", "srv/sub/a2"),
        Entry::symlink("lib", "usr/lib").owner(7, 8).mtime(12, 13),
        Entry::hard_link("lib2", "lib"),
        Entry::symlink("dangling", "/no/where"),
        Entry::dir("usr").mtime(1, 0),
        Entry::dir("usr/lib").mode(0o711).mtime(2, 3).owner(9, 9).xattr("user.note", "kept"),
        Entry::file("usr/lib/libc", "libc").xattr("user.note", b"\x00\xff binary".as_slice()),
        Entry::dir("dev").mtime(3, 3),
        Entry::char_device("dev/null", 1, 3).mode(0o666).mtime(5, 5),
        Entry::block_device("dev/sda", 8, 300).mode(0o660).owner(0, 6),
        Entry::fifo("dev/pipe").mode(0o622).owner(1, 2).mtime(6, 6),
        Entry::file("empty", ""),
    ]
}

#[test]
fn trees_are_those_of_umoci() {
    if !root() || require("umoci").is_none() {
        return;
    }
    let long = |part: &str, times: usize| vec![part; times].join("/");
    let cases: Vec<(&str, Stack, Vec<&str>)> = vec![
        ("every kind of entry", vec![gzip(base())], vec![]),
        ("zstd", vec![(Layer::of(base()), Compression::Zstd)], vec![]),
        ("plain tar", vec![(Layer::of(base()), Compression::None)], vec![]),
        (
            "long names",
            vec![gzip(vec![
                Entry::dir("d"),
                Entry::file(format!("d/{}", "n".repeat(255)), "1").mtime(1, 1),
                Entry::symlink("l", long("target", 200)),
                Entry::file(format!("d/{}", "g".repeat(200)), "2").gnu().owner(1 << 30, 1 << 22).mtime(-5, 0),
                Entry::symlink("l2", long("gnu", 200)).gnu(),
                Entry::file("d/sp\u{e9}cial \n\t\u{1F980}", "3"),
            ])],
            vec![],
        ),
        (
            "sparse files",
            vec![gzip(vec![
                Entry::sparse("holes", 3 << 20, &[(4096, b"one"), (1 << 20, b"two")]),
                Entry::sparse("all hole", 1 << 20, &[]),
                Entry::sparse("full", 5, &[(0, b"12345")]),
            ])],
            vec![],
        ),
        (
            "duplicates: the last one wins",
            vec![gzip(vec![
                Entry::file("a", "first").xattr("user.x", "1"),
                Entry::file("a", "second"),
                Entry::dir("b"),
                Entry::file("b/c", "gone"),
                Entry::symlink("b", "a"),
                Entry::file("e", "file"),
                Entry::dir("e").mode(0o700).mtime(8, 8),
                Entry::file("e/f", "in"),
                Entry::dir("e").mode(0o711).mtime(9, 9),
                Entry::symlink("s", "a"),
                Entry::file("s", "no link"),
                Entry::hard_link("a", "s"),
            ])],
            vec![],
        ),
        (
            "whiteouts",
            vec![
                gzip(base()),
                gzip(vec![
                    Entry::whiteout("bin/su"),
                    Entry::whiteout("srv/a"),
                    Entry::whiteout("usr"),
                    Entry::dir("usr").mtime(50, 0),
                    Entry::file("usr/new", "new"),
                    Entry::dir("tmp").mtime(60, 0),
                    Entry::file("tmp/after", "1"),
                    Entry::whiteout("tmp/after"),
                    Entry::whiteout("nothing"),
                ]),
                gzip(vec![Entry::whiteout("dev"), Entry::whiteout("lib"), Entry::file("bin/su", "again").mode(0o700)]),
            ],
            vec![],
        ),
        (
            "opaque directories, in any order",
            vec![
                gzip(base()),
                gzip(vec![
                    Entry::dir("srv").mtime(70, 0),
                    Entry::file("srv/new", "n"),
                    Entry::opaque("srv"),
                    Entry::dir("bin").mtime(71, 0),
                    Entry::opaque("bin"),
                    Entry::file("bin/new", "n"),
                    Entry::opaque("usr/lib"),
                    Entry::file("usr/lib/only", "o"),
                ]),
            ],
            vec![],
        ),
        (
            "kinds change between layers",
            vec![
                gzip(vec![
                    Entry::dir("x"),
                    Entry::file("x/lower", "l"),
                    Entry::file("y", "y"),
                    Entry::symlink("z", "x"),
                ]),
                gzip(vec![
                    Entry::file("x", "file"),
                    Entry::dir("y").mtime(2, 2),
                    Entry::file("y/in", "i"),
                    Entry::dir("z").mtime(3, 3),
                ]),
                gzip(vec![Entry::dir("x").mtime(4, 4), Entry::file("x/upper", "u"), Entry::symlink("y", "z")]),
            ],
            vec![],
        ),
        (
            "directories without an entry keep what the lower layer gave them",
            vec![
                gzip(base()),
                gzip(vec![Entry::file("srv/sub/deep/new", "n"), Entry::file("usr/lib/x", "x")]),
                gzip(vec![Entry::dir("usr/lib").mode(0o700).mtime(80, 8), Entry::whiteout("srv/sub/a2")]),
                gzip(vec![Entry::file("usr/lib/y", "y"), Entry::whiteout("not/there/at/all")]),
            ],
            vec!["srv/sub", "srv/sub/deep"],
        ),
        (
            "removed, and there again without an entry",
            vec![
                gzip(vec![
                    Entry::dir("d").mode(0o700).owner(5, 5),
                    Entry::dir("d/x").mode(0o711),
                    Entry::file("d/x/old", "o"),
                    Entry::dir("u").mode(0o700).owner(5, 5),
                    Entry::dir("u/x").mode(0o711),
                    Entry::file("u/x/old", "o"),
                    Entry::file("f", "f"),
                    Entry::symlink("k", "d"),
                    Entry::dir("g/z"),
                ]),
                gzip(vec![
                    Entry::whiteout("d"),
                    Entry::file("d/x/new", "n"),
                    Entry::file("u/x/new", "n"),
                    Entry::whiteout("u"),
                    Entry::whiteout("f"),
                    Entry::file("f/in", "i"),
                    Entry::whiteout("k"),
                    Entry::file("k/y/in", "i"),
                    Entry::whiteout("g"),
                    Entry::whiteout("g/z/a"),
                ]),
            ],
            vec!["d", "d/x", "u", "u/x", "f", "k", "k/y"],
        ),
        (
            "hard links to what a lower layer has, which then changes",
            vec![
                gzip(vec![Entry::file("a", "a"), Entry::file("b", "b"), Entry::file("c", "c")]),
                gzip(vec![
                    Entry::hard_link("to-a", "a"),
                    Entry::file("a", "another"),
                    Entry::hard_link("to-b", "b"),
                    Entry::hard_link("to-b2", "to-b"),
                    Entry::whiteout("b"),
                    Entry::hard_link("to-c", "c"),
                ]),
            ],
            vec![],
        ),
        (
            "parents that are links of a lower layer",
            vec![
                gzip(base()),
                gzip(vec![
                    Entry::file("lib/added", "a").mtime(1, 1),
                    Entry::dir("lib/dir").mode(0o750).mtime(2, 2),
                    Entry::file("lib/dir/inner", "i"),
                    Entry::whiteout("lib/libc"),
                ]),
            ],
            vec![],
        ),
        (
            "parents that are links of the same layer",
            vec![gzip(vec![
                Entry::dir("real").mtime(5, 5),
                Entry::symlink("abs", "/real"),
                Entry::symlink("out", "../../../real"),
                Entry::symlink("chain", "abs/../abs"),
                Entry::file("abs/1", "1"),
                Entry::file("out/2", "2"),
                Entry::dir("chain/3").mode(0o700).mtime(6, 6),
                Entry::hard_link("chain/4", "out/2"),
            ])],
            vec![],
        ),
        (
            "hard links into a lower layer",
            vec![gzip(base()), gzip(vec![Entry::hard_link("srv/a4", "srv/a"), Entry::hard_link("srv/a5", "srv/a4")])],
            vec![],
        ),
        (
            "names as builders write them",
            vec![gzip(vec![
                Entry::dir("/opt").mtime(1, 0),
                Entry::file("/opt/absolute", "a"),
                Entry::file("./opt/./dotted", "d"),
                Entry::dir("opt//double/").mtime(2, 0),
            ])],
            vec![],
        ),
        (
            "many layers",
            (0..40)
                .map(|index| {
                    let mut entries = vec![Entry::dir("d").mtime(index, 0), Entry::file(format!("d/{index}"), "x")];
                    if index % 3 == 2 {
                        entries.push(Entry::whiteout(&format!("d/{}", index - 1)));
                    }
                    gzip(entries)
                })
                .collect(),
            vec![],
        ),
    ];
    for (name, layers, untimed) in cases {
        compare(name, layers, &untimed);
    }
}

#[test]
fn whiteouts_are_not_listed_even_where_nothing_is_below() {
    if !root() {
        return;
    }
    let merged = mount(&[gzip(vec![Entry::dir("d"), Entry::whiteout("d/x"), Entry::file("d/y", "y")])]).unwrap();
    let names: Vec<_> = fs::read_dir(merged.path.join("d")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["y"]);
}

#[test]
fn what_no_layer_may_have_is_refused() {
    let refused = |entries: Vec<Entry>, expected: &str| {
        let error = apply(Layer::of(entries).tar(), &UnpackOptions::default()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "expected '{expected}' in: {error}");
    };
    refused(vec![Entry::file("../escape", "x")], "'..'");
    refused(vec![Entry::file("a/../../escape", "x")], "'..'");
    refused(vec![Entry::dir("a"), Entry::hard_link("a/b", "../../etc/passwd")], "'..'");
    refused(vec![Entry::file("", "x")], "no name");
    refused(vec![Entry::file("./", "x")], "root can only be a directory");
    refused(vec![Entry::symlink("/", "/etc")], "root can only be a directory");
    refused(vec![Entry::hard_link("a", "/")], "hard link to the root");
    refused(vec![Entry::dir("d"), Entry::hard_link("a", "d")], "hard link to a directory");
    refused(vec![Entry::whiteout("a"), Entry::hard_link("b", "a")], "its layer removes");
    refused(vec![Entry::file("f", "x"), Entry::file("f/below", "x")], "not a directory");
    refused(vec![Entry::symlink("l", "l"), Entry::file("l/x", "x")], "too many symbolic links");
    refused(
        vec![Entry::symlink("a", "b"), Entry::symlink("b", "a"), Entry::file("a/x", "x")],
        "too many symbolic links",
    );
    refused(vec![Entry::char_device("null", 0, 0)], "overlayfs' whiteout");
    refused(vec![Entry::file(".wh.", "")], "whiteout of nothing");
    refused(vec![Entry::file("a/.wh...", "")], "whiteout of nothing");
    refused(vec![Entry::file(".wh.a/b", "")], "below a whiteout");
    refused(vec![Entry::symlink("s", "")], "link to nothing");
    refused(vec![Entry::of_type("m", b'M', "x")], "type 0x4d");
    refused(vec![Entry::file("a", "x").pax("size", "18446744073709551615")], "file_bytes");
    refused(vec![Entry::file("a", "x").pax("path", "n\0ul")], "NUL");
    refused(vec![Entry::file("a", "x").pax("uid", "-1")], "uid");
    refused(vec![Entry::file("a", "x").pax("gid", "4294967295")], "gid");
    refused(vec![Entry::file("a", "x").pax("mtime", "tomorrow")], "PAX");
    refused(vec![Entry::sparse("s", 4, &[(2, b"abc")])], "sparse");
    refused(vec![Entry::sparse("s", 99, &[(5, b"abc"), (6, b"d")])], "sparse");
    refused(vec![Entry::file("a", "x").header(|header| header[124..135].copy_from_slice(b"9999999999z"))], "size");
    refused(vec![Entry::file("a", "x").header(|header| header[100..107].copy_from_slice(b"notoct\0"))], "mode");
}

#[test]
fn what_overlayfs_would_take_for_its_own_is_left_out() {
    if !root() {
        return;
    }
    let entry = Entry::dir("d")
        .xattr("trusted.overlay.opaque", "y")
        .xattr("user.overlay.redirect", "/etc")
        .xattr("user.ok", "1");
    let (target, record) = apply(Layer::of([entry]).tar(), &UnpackOptions::default()).unwrap();
    assert_eq!(record.ignored_xattrs, 2);
    assert!(tree::list(target.path()).get("d").unwrap().ends_with(" user.ok=1"));
}

#[test]
fn devices_and_owners_follow_the_settings() {
    if !root() {
        return;
    }
    let layer = Layer::of([Entry::char_device("n", 1, 3), Entry::file("f", "x").owner(3, 4)]);
    let options = |devices, count| UnpackOptions {
        devices,
        ids: IdMap {
            uids: vec![IdRange { inside: 0, outside: 100_000, count }],
            gids: vec![IdRange { inside: 0, outside: 200_000, count }],
        },
        ..UnpackOptions::default()
    };
    let (target, record) = apply(layer.tar(), &options(DevicePolicy::Skip, 10)).unwrap();
    assert_eq!(record.skipped_devices, 1);
    let tree = tree::list(target.path());
    assert!(tree.get("f").unwrap().contains("100003:200004") && !tree.contains_key("n"), "{tree:?}");
    let error = apply(layer.tar(), &options(DevicePolicy::Refuse, 10)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("settings do not allow"), "{error}");
    let error = apply(layer.tar(), &options(DevicePolicy::Create, 2)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("uid 3"), "{error}");
}

#[test]
fn several_members_and_frames_are_one_layer() {
    let layer = Layer::of([Entry::file("a", vec![7u8; 100_000]), Entry::file("b", "b")]);
    let (front, back) = layer.tar().split_at(50_000);
    for (compression, suffix) in [(Compression::Gzip, "+gzip"), (Compression::Zstd, "+zstd")] {
        let blob = [compression.apply(front), compression.apply(b""), compression.apply(back)].concat();
        let target = tempfile::tempdir().unwrap();
        apply_blob(&format!("{TAR}{suffix}"), &blob, layer.tar(), &UnpackOptions::default(), target.path()).unwrap();
        assert_eq!(fs::read(target.path().join("a")).unwrap(), vec![7u8; 100_000]);
        for cut in 1..blob.len() {
            let blob = &blob[..blob.len() - cut];
            let target = tempfile::tempdir().unwrap();
            let result =
                apply_blob(&format!("{TAR}{suffix}"), blob, layer.tar(), &UnpackOptions::default(), target.path());
            assert!(result.is_err(), "cut by {cut}");
        }
        for tail in [&b"\0"[..], b"garbage", &blob[..5]] {
            let blob = [&blob, tail].concat();
            let target = tempfile::tempdir().unwrap();
            let error =
                apply_blob(&format!("{TAR}{suffix}"), &blob, layer.tar(), &UnpackOptions::default(), target.path());
            assert!(matches!(error, Err(LayerError::Corrupt { .. })), "{error:?}");
        }
    }
}

#[test]
fn each_digest_is_checked_and_named() {
    let layer = Layer::of([Entry::file("a", vec![3u8; 300_000])]);
    let blob = Compression::Gzip.apply(layer.tar());
    let options = UnpackOptions::default();
    let attempt = |descriptor: &Descriptor, diff_id, blob: &[u8]| {
        let target = tempfile::tempdir().unwrap();
        let plan = LayerPlan::new(descriptor, diff_id, None, &options).unwrap();
        apply_layer(blob, &plan, open(target.path()), &NoProgress).map(|_| ()).unwrap_err()
    };
    let good = Descriptor::of(&format!("{TAR}+gzip"), &blob);
    let diff_id = Digest::sha256(layer.tar());
    assert!(matches!(attempt(&good, Digest::sha256(b""), &blob), LayerError::DiffId { .. }));
    assert!(matches!(attempt(&good, diff_id, &blob[..blob.len() - 1]), LayerError::Size { .. }));
    assert!(matches!(attempt(&good, diff_id, &[&blob[..], b"x"].concat()), LayerError::Size { .. }));
    for at in [0, 3, 20, blob.len() / 2, blob.len() - 8, blob.len() - 1] {
        let mut bad = blob.clone();
        bad[at] ^= 1;
        let error = attempt(&good, diff_id, &bad);
        assert!(matches!(error, LayerError::Digest { .. }), "byte {at}: {error}");
        assert!(error.is_integrity());
    }
    // The same content in a blob whose own checksum is wrong, named by its own digest.
    let mut bad = blob.clone();
    let last = bad.len() - 6;
    bad[last] ^= 1;
    assert!(matches!(attempt(&Descriptor::of(&good.media_type, &bad), diff_id, &bad), LayerError::Corrupt { .. }));
    let cut = &layer.tar()[..layer.tar().len() - 2048];
    let error = attempt(&Descriptor::of(TAR, cut), Digest::sha256(cut), cut);
    assert!(error.to_string().contains("ends within a file"), "{error}");
}

fn encrypted(tar: &[u8], compression: Compression) -> (Vec<u8>, LayerSecret, PublicOptions) {
    let mut blob = compression.apply(tar);
    let mut encryptor = LayerEncryptor::new().unwrap();
    encryptor.update(&mut blob).unwrap();
    let (secret, public) = encryptor.finish();
    (blob, secret, public)
}

#[test]
fn encrypted_layers_are_authenticated_to_the_last_byte() {
    let layer = Layer::of([Entry::file("a", vec![3u8; 300_000]), Entry::file("b", "b")]);
    let options = UnpackOptions::default();
    for (compression, suffix) in [(Compression::None, ""), (Compression::Gzip, "+gzip"), (Compression::Zstd, "+zstd")] {
        let (blob, secret, public) = encrypted(layer.tar(), compression);
        let (_, other, _) = encrypted(b"other", compression);
        let attempt = |blob: &[u8], secret: &LayerSecret| {
            let descriptor = Descriptor::of(&format!("{TAR}{suffix}+encrypted"), blob);
            let key = LayerKey { secret, public: &public };
            let plan = LayerPlan::new(&descriptor, Digest::sha256(layer.tar()), Some(key), &options).unwrap();
            let target = tempfile::tempdir().unwrap();
            let result = apply_layer(blob, &plan, open(target.path()), &NoProgress);
            result.map(|_| fs::read(target.path().join("b")).unwrap())
        };
        assert_eq!(attempt(&blob, &secret).unwrap(), b"b");
        assert!(matches!(attempt(&blob, &other), Err(LayerError::Decrypt { .. })), "wrong key");
        for at in [0, blob.len() / 2, blob.len() - 1] {
            let mut bad = blob.clone();
            bad[at] ^= 0x80;
            let error = attempt(&bad, &secret).unwrap_err();
            assert!(matches!(error, LayerError::Decrypt { .. }), "byte {at}: {error}");
        }
        let descriptor = Descriptor::of(&format!("{TAR}{suffix}+encrypted"), &blob);
        let plan = LayerPlan::new(&descriptor, Digest::sha256(layer.tar()), None, &options).unwrap();
        let target = tempfile::tempdir().unwrap();
        let error = apply_layer(&blob[..], &plan, open(target.path()), &NoProgress).unwrap_err();
        assert!(matches!(error, LayerError::Key { .. }), "{error}");
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }
}

#[test]
fn damaged_tars_never_panic_and_never_leave_their_directory() {
    let good = Layer::of(base());
    let mut rng = nacre_testkit::Rng::new(42);
    let outer = tempfile::tempdir().unwrap();
    for round in 0..400 {
        let mut bad = good.tar().to_vec();
        for _ in 0..=round % 5 {
            let at = usize::try_from(rng.next_u64() % bad.len() as u64).unwrap();
            bad[at] ^= 1 << (rng.next_u64() % 8);
        }
        bad.truncate(bad.len() - usize::try_from(rng.next_u64() % 3000).unwrap());
        let target = outer.path().join("t");
        fs::create_dir(&target).unwrap();
        let _ = apply_blob(TAR, &bad, &bad, &UnpackOptions::default(), &target);
        let names: Vec<_> = fs::read_dir(outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["t"]);
        remove_tree(open(outer.path()).as_fd(), b"t").unwrap();
    }
}

#[test]
fn a_full_or_read_only_disk_is_an_error_that_says_so() {
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let layer = Layer::of([Entry::file("large", vec![1u8; 2 << 20])]);
    let error = apply_blob(TAR, layer.tar(), layer.tar(), &UnpackOptions::default(), disk.path()).unwrap_err();
    assert!(error.to_string().contains("file system is full") && !error.is_integrity(), "{error}");
    fs::remove_file(disk.path().join("large")).unwrap();
    disk.set_read_only(true);
    let error = apply_blob(TAR, layer.tar(), layer.tar(), &UnpackOptions::default(), disk.path()).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}

#[test]
fn trees_are_removed_whatever_is_in_them() {
    let outer = tempfile::tempdir().unwrap();
    let kept = outer.path().join("kept");
    fs::create_dir(&kept).unwrap();
    let mut entries: Vec<Entry> = (0..300).map(|index| Entry::file(format!("d{}/f{index}", index % 7), "x")).collect();
    entries.push(Entry::symlink("d1/link", kept.to_str().unwrap()));
    entries.push(Entry::dir(vec!["deep"; 200].join("/")).mode(0));
    entries.push(Entry::fifo("d2/pipe"));
    let target = outer.path().join("target");
    fs::create_dir(&target).unwrap();
    let layer = Layer::of(entries);
    apply_blob(TAR, layer.tar(), layer.tar(), &UnpackOptions::default(), &target).unwrap();
    remove_tree(open(outer.path()).as_fd(), b"target").unwrap();
    remove_tree(open(outer.path()).as_fd(), b"target").unwrap();
    assert!(!target.exists() && kept.exists());
}

#[test]
fn large_streams_keep_holes_and_bytes() {
    let (target, record) =
        apply(Layer::of([Entry::sparse("s", 64 << 20, &[(32 << 20, b"middle")])]).tar(), &UnpackOptions::default())
            .unwrap();
    let stat = fs::metadata(target.path().join("s")).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&stat) < 64, "holes are holes");
    assert_eq!(record.content_bytes, 6);
}

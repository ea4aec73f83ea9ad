//! Other implementations read what we write: the kernel's and erofs-utils.

use std::{
    ffi::CString,
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use nacre_lazy::erofs::{Attributes, Device, Node, Timestamp, Tree, WriteOptions, write};
use nacre_testkit::{require, run, tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

fn attributes(mode: u16) -> Attributes {
    Attributes { mode, uid: 1000, gid: 70_000, mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 123_456_789 } }
}

#[test]
fn a_simple_tree() {
    let directory = tempfile::tempdir().unwrap();
    let (meta, data) = (directory.path().join("meta"), directory.path().join("data"));
    let mut tree = Tree::new();
    tree.put(&[b"hello"], Node::File { size: 5, block: 1 }, &attributes(0o644), &[(b"user.a", b"b")]).unwrap();
    tree.put(&[b"a", b"b", b"c"], Node::Symlink(b"../x"), &attributes(0o777), &[]).unwrap();
    tree.put(&[b"dev"], Node::CharDevice(Device { major: 1, minor: 259 }), &attributes(0o600), &[]).unwrap();
    tree.link(&[b"a", b"hello"], &[b"hello"]).unwrap();
    let options = WriteOptions { uuid: [7; 16], device_tag: "data", device_blocks: 16 };
    write(&tree, &options, File::create(&meta).unwrap()).unwrap();
    let device = File::create(&data).unwrap();
    device.set_len(16 * 4096).unwrap();
    device.write_all_at(b"hello", 4096).unwrap();
    let out = run(std::process::Command::new(require("fsck.erofs").unwrap())
        .arg("-d9")
        .arg(format!("--device={}", data.display()))
        .arg(&meta));
    println!("{}", String::from_utf8_lossy(&out.stdout));
    let at = directory.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let option = CString::new(format!("device={}", data.display())).unwrap();
    mount(&meta, &at, "erofs", MountFlags::RDONLY, option.as_c_str()).unwrap();
    println!("{:#?}", tree::list(&at));
    unmount(&at, UnmountFlags::empty()).unwrap();
}

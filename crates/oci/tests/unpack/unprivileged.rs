//! Layers for mounts without privileges: overlayfs reads `user.overlay.*` there.

use std::{
    env,
    ffi::{CString, OsStr},
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    process::{Command, Stdio},
};

use nacre_oci::unpack::{DevicePolicy, UnpackOptions, WhiteoutMode};
use nacre_testkit::{Entry, Layer, require, root, run, skip};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{TAR, apply_blob};

fn options() -> UnpackOptions {
    UnpackOptions { whiteouts: WhiteoutMode::User, devices: DevicePolicy::Skip, ..UnpackOptions::default() }
}

/// Applies two layers below `place`, mounts them with `userxattr`, and looks at what the upper one hides.
fn stack_and_look(place: &Path) {
    let lower = Layer::of([Entry::dir("d"), Entry::file("d/gone", "x"), Entry::dir("o"), Entry::file("o/hidden", "x")]);
    let upper = Layer::of([
        Entry::dir("d").mode(0o2750),
        Entry::whiteout("d/gone"),
        Entry::file("d/new", "n").xattr("user.ok", "1").mode(0o4755),
        Entry::dir("o"),
        Entry::opaque("o"),
        Entry::char_device("null", 1, 3),
    ]);
    let mut directories = Vec::new();
    for (name, layer, skipped) in [("lower", lower, 0), ("upper", upper, 1)] {
        let target = place.join(name);
        fs::create_dir(&target).unwrap();
        let record = apply_blob(TAR, layer.tar(), layer.tar(), &options(), &target).unwrap();
        assert_eq!(record.skipped_devices, skipped);
        directories.insert(0, target.to_str().unwrap().to_owned());
    }
    let mut value = [0u8; 8];
    let upper = place.join("upper");
    let mut attribute = |path: &str, name: &str| {
        rustix::fs::getxattr(upper.join(path), name, &mut value[..]).map(|length| value[..length].to_vec())
    };
    assert_eq!(attribute("o", "user.overlay.opaque").unwrap(), b"y");
    assert_eq!(attribute("d", "user.overlay.origin").unwrap(), b"");
    let merged = place.join("merged");
    fs::create_dir(&merged).unwrap();
    let lowers = CString::new(format!("lowerdir={},userxattr", directories.join(":"))).unwrap();
    mount("overlay", &merged, "overlay", MountFlags::RDONLY, Some(lowers.as_c_str())).unwrap();
    let names = |path: &str| -> Vec<_> {
        fs::read_dir(merged.join(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    let found = (names("d"), names("o").len());
    unmount(&merged, UnmountFlags::DETACH).unwrap();
    assert_eq!(found, (vec![OsStr::new("new").to_owned()], 0));
    assert_eq!(fs::metadata(upper.join("d")).unwrap().permissions().mode() & 0o7777, 0o2750);
    assert_eq!(fs::metadata(upper.join("d/new")).unwrap().permissions().mode() & 0o7777, 0o4755);
}

#[test]
fn attributes_may_be_those_of_mounts_without_privileges() {
    if !root() {
        return;
    }
    let holder = tempfile::tempdir().unwrap();
    stack_and_look(holder.path());
}

/// Set for the part that runs within the namespace: where it may write.
const INSIDE: &str = "NACRE_TEST_UNPRIVILEGED";

/// This program runs itself in a namespace that an unprivileged user made, which maps one id.
#[test]
fn a_user_namespace_with_one_id_is_enough() {
    if let Some(place) = env::var_os(INSIDE) {
        return inside(Path::new(&place));
    }
    let (Some(unshare), Some(setpriv)) = (require("unshare"), require("setpriv")) else { return };
    if !root() {
        return;
    }
    let nobody = || {
        let mut command = Command::new(&setpriv);
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&unshare);
        command.args(["--user", "--map-root-user", "--mount"]);
        command
    };
    if !nobody().arg("true").stderr(Stdio::null()).status().unwrap().success() {
        return skip("the kernel does not let unprivileged users make user namespaces");
    }
    let holder = tempfile::tempdir().unwrap();
    fs::set_permissions(holder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, place) = (holder.path().join("program"), holder.path().join("place"));
    fs::copy(env::current_exe().unwrap(), &program).unwrap(); // nobody may have no way to where it is built
    fs::create_dir(&place).unwrap();
    chown(&place, Some(65534), Some(65534)).unwrap();
    let output = run(nobody()
        .arg(program)
        .args(["--exact", "unprivileged::a_user_namespace_with_one_id_is_enough"])
        .env(INSIDE, &place)
        .current_dir(&place));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
    assert!(place.join("done").exists());
}

fn inside(place: &Path) {
    stack_and_look(place);
    let foreign = Layer::of([Entry::file("f", "x").owner(1000, 1000)]);
    let target = place.join("foreign");
    fs::create_dir(&target).unwrap();
    let error = apply_blob(TAR, foreign.tar(), foreign.tar(), &options(), &target).unwrap_err().to_string();
    assert!(error.contains("subuid"), "{error}");
    fs::write(place.join("done"), "").unwrap();
}

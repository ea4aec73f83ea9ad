//! A process that is not root becomes root of a user namespace, mounts there, and runs containers.

#![expect(clippy::panic, clippy::unwrap_used, clippy::print_stdout, reason = "what fails here fails the test")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use nacre_sys::overlay::{Method, Overlay, Writable};
use nacre_sys::privilege::Privilege;
use nacre_sys::userns::{self, MappedIds};
use nacre_testkit::harness;

const ROLE: &str = "NACRE_TEST_ROLE";
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    nacre_sys::stage::enter();
    match std::env::var(ROLE).as_deref() {
        Ok("detect") => {
            println!("{:?}", Privilege::detect());
            return ExitCode::SUCCESS;
        }
        Ok("mount") => return mount_as_root(Path::new(&std::env::args_os().nth(1).unwrap())),
        Ok(role) => panic!("no such role: {role}"),
        Err(_) => {}
    }
    harness::run(&[
        ("root_needs_no_namespace", root_needs_no_namespace),
        ("others_can_make_one_or_are_told_why_not", others_can_make_one_or_are_told_why_not),
        ("overlays_are_mounted_in_a_namespace", overlays_are_mounted_in_a_namespace),
        ("subordinate_ids_are_mapped_where_there_are_some", subordinate_ids_are_mapped_where_there_are_some),
    ])
}

/// Runs as nobody; the second time, after becoming root of a namespace, it mounts.
fn mount_as_root(dir: &Path) -> ExitCode {
    if Privilege::detect() != Privilege::Full {
        assert!(!userns::is_inside());
        let error = userns::become_root().unwrap_err();
        panic!("{error}");
    }
    assert!(userns::is_inside() && rustix::process::geteuid().is_root());
    let ids = MappedIds::of_this_process().unwrap();
    println!("0:{} 1:{} 1000:{}", ids.has_uid(0), ids.has_gid(1), ids.has_uid(1000));
    let make = |name: &str| {
        let path = dir.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };
    let lower = [make("one"), make("two")];
    fs::create_dir(lower[0].join("replaced")).unwrap();
    fs::write(lower[0].join("replaced/old"), "").unwrap();
    fs::write(lower[0].join("gone"), "").unwrap();
    fs::create_dir(lower[1].join("replaced")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(lower[1].join("replaced"), "user.overlay.opaque", b"y", flags).unwrap();
    let whiteout = lower[1].join("gone");
    rustix::fs::mknodat(rustix::fs::CWD, whiteout, rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty(), 0)
        .unwrap();
    let (target, upper, work, scratch) = (make("target"), make("upper"), make("work"), make("scratch"));
    for method in [Method::Probe, Method::Classic] {
        let writable = Some(Writable { upper: &upper, work: &work });
        Overlay { lower: &lower, writable, target: &target, scratch: &scratch, user_xattr: true, method }
            .mount()
            .unwrap();
        assert!(
            target.join("replaced").exists() && !target.join("replaced/old").exists() && !target.join("gone").exists()
        );
        fs::write(target.join("written"), "x").unwrap();
        nacre_sys::fs::unmount(&target).unwrap();
        assert!(upper.join("written").exists() && !target.join("written").exists());
    }
    println!("mounted");
    ExitCode::from(42)
}

fn root_needs_no_namespace() {
    if nacre_testkit::root() {
        assert_eq!(Privilege::detect(), Privilege::Full);
        assert!(MappedIds::of_this_process().unwrap().has_uid(NOBODY));
        assert!(userns::may_set_groups());
    }
}

/// This program as nobody, in a directory of nobody's.
struct AsNobody {
    dir: tempfile::TempDir,
}

impl AsNobody {
    fn new() -> Option<Self> {
        if !nacre_testkit::root() {
            return None;
        }
        nacre_testkit::require("setpriv")?;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        // Where the build directory is may be closed to others.
        fs::copy(std::env::current_exe().unwrap(), dir.path().join("program")).unwrap();
        Some(Self { dir })
    }

    fn run(&self, role: &str) -> Output {
        let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        Command::new("setpriv")
            .args(ids)
            .args(["--clear-groups", "--"])
            .arg(self.dir.path().join("program"))
            .arg(self.dir.path())
            .env(ROLE, role)
            .output()
            .unwrap()
    }

    fn allowed(&self) -> bool {
        let said = String::from_utf8(self.run("detect").stdout).unwrap();
        if said.trim() != "UserNamespace" {
            nacre_testkit::skip(&format!("user namespaces are not allowed here: {said}"));
            return false;
        }
        true
    }
}

fn others_can_make_one_or_are_told_why_not() {
    let Some(nobody) = AsNobody::new() else { return };
    let said = String::from_utf8(nobody.run("detect").stdout).unwrap();
    assert!(said.starts_with("UserNamespace") || said.starts_with("Missing("), "{said}");
}

fn overlays_are_mounted_in_a_namespace() {
    let Some(nobody) = AsNobody::new() else { return };
    if !nobody.allowed() {
        return;
    }
    let output = nobody.run("mount");
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert!(said.starts_with("0:true") && said.ends_with("mounted\n"), "{said}");
}

/// Gives nobody subordinate ids in a mount namespace where /etc/subuid is another file.
fn subordinate_ids_are_mapped_where_there_are_some() {
    let Some(nobody) = AsNobody::new() else { return };
    for program in ["newuidmap", "newgidmap", "unshare"] {
        if nacre_testkit::require(program).is_none() {
            return;
        }
    }
    if !nobody.allowed() {
        return;
    }
    let ids = nobody.dir.path().join("subids");
    fs::write(&ids, "nobody:200000:2000\n").unwrap();
    let script = format!(
        "touch /etc/subuid /etc/subgid && mount --bind {0} /etc/subuid && mount --bind {0} /etc/subgid && exec setpriv \
         --reuid={NOBODY} --regid={NOBODY} --clear-groups -- {1}/program {1}",
        ids.display(),
        nobody.dir.path().display()
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).env(ROLE, "mount").output().unwrap();
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert!(said.starts_with("0:true 1:true 1000:true"), "{said}");
}

//! runc, crun and the built-in runner do the same with our images and bundles.

use std::{
    fs,
    process::{Command, Output},
};

use nacre_testkit::{require, root, run};

use crate::support::{Bundle, Place, runnable, said};

const SCRIPT: &str = "id; pwd; echo $GREETING $MORE; cat /second /third; exit 42";

fn runtimes() -> Vec<&'static str> {
    let mut runtimes = vec!["builtin"];
    runtimes.extend(["runc", "crun"].into_iter().filter(|name| require(name).is_some()));
    runtimes
}

fn run_image(place: &Place, runtime: &str, options: &[&str], command: &[&str]) -> Output {
    let image = format!("oci:{}:v1", place.text("layout"));
    let mut nacre =
        place.nacre("store", &["run", "--quiet", "--insecure-policy", "--allow-unsigned", "--runtime", runtime]);
    nacre.args(options).arg(image);
    if !command.is_empty() {
        nacre.arg("--").args(command);
    }
    nacre.output().unwrap()
}

#[test]
fn every_runtime_runs_an_image_as_it_is_told() {
    if !root() {
        return;
    }
    let place = Place::new();
    runnable(&place, SCRIPT).write_layout(&place.at("layout"), "v1");
    for runtime in runtimes() {
        let out = |options: &[&str], command: &[&str]| {
            let output = run_image(&place, runtime, options, command);
            (output.status.code(), said(&output))
        };
        let expected = "uid=0(root) gid=0(root) groups=0(root)\n/\nhello\nzstd\ngzip\n";
        assert_eq!(out(&[], &[]), (Some(42), expected.into()), "{runtime}");
        let told = ["--user", "app", "--workdir", "/work", "--env", "MORE=more", "--env", "GREETING=bye"];
        let expected = "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n/work\nbye more\nzstd\ngzip\n";
        assert_eq!(out(&told, &[]), (Some(42), expected.into()), "{runtime}");
        let command = ["sh", "-c", "echo \"$0|$1|$2\"; touch mine; stat -c %u:%g mine", "a b", "", "--user"];
        let expected = "a b||--user\n1000:7\n";
        assert_eq!(out(&["--user", "1000:7", "--workdir", "/work"], &command), (Some(0), expected.into()), "{runtime}");
        let (code, text) = out(&["--read-only"], &["touch", "/x"]);
        assert!(code == Some(1) && text.contains("Read-only file system"), "{runtime}: {text}");
        assert_eq!(out(&[], &["ls", "/work"]), (Some(0), String::new()), "{runtime}: what a run writes goes with it");
        let (code, text) = out(&[], &["/no/such"]);
        assert!(code != Some(0) && text.contains("/no/such"), "{runtime}: {code:?} {text}");
    }
    let left: Vec<_> = fs::read_dir(place.at("store/bundles")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn runtimes_run_our_bundles_by_themselves() {
    if !root() {
        return;
    }
    let place = Place::new();
    runnable(&place, SCRIPT).write_layout(&place.at("layout"), "v1");
    for runtime in ["runc", "crun"] {
        let Some(program) = require(runtime) else { continue };
        let bundle = Bundle::pull(&place, runtime, &format!("oci:{}:v1", place.text("layout")));
        // crun refuses machines with both kinds of cgroups, unless it does not see the second.
        let hide = "test ! -d /sys/fs/cgroup/unified || umount -l /sys/fs/cgroup/unified; exec \"$@\"";
        let mut command = match runtime {
            "crun" => Command::new("unshare"),
            _ => Command::new(&program),
        };
        if runtime == "crun" {
            command.args(["-m", "sh", "-c", hide, "sh"]).arg(program).arg("--cgroup-manager=disabled");
        }
        let name = format!("nacre-test-{}", std::process::id());
        command.arg("--root").arg(place.at("state")).args(["run", "--bundle"]).arg(bundle.path()).arg(name);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{runtime}: {}", said(&output));
        assert!(said(&output).ends_with("/\nhello\nzstd\ngzip\n"), "{runtime}: {}", said(&output));
        fs::write(bundle.rootfs().join("written"), "").unwrap();
        run(place.nacre(Bundle::STORE, &["image", "umount"]).arg(bundle.path()));
        assert!(!bundle.rootfs().exists(), "{runtime}");
    }
}

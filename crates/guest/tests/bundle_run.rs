//! Bundles are composed, run by runc, crun and the built-in runner alike, and taken apart without a trace.

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "what fails here fails the test")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};

use nacre_guest::bundle::{BindMount, ComposeError, Network, Overrides, Plan, Runtime, UpperDir, teardown};
use nacre_oci::manifest::{ImageConfig, ProcessConfig};
use nacre_sys::privilege::Privilege;
use nacre_testkit::harness;

/// `RUNTIME` here makes a copy of this program compose the plan in the file of its argument, run it, and take it apart.
const RUN: &str = "NACRE_TEST_RUNTIME";
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    nacre_sys::stage::enter();
    if let Ok(runtime) = std::env::var(RUN) {
        return ExitCode::from(compose_and_run(&runtime, Path::new(&std::env::args_os().nth(1).unwrap())));
    }
    harness::run(&[
        ("every_runtime_runs_the_same_container_alike", every_runtime_runs_the_same_container_alike),
        ("a_read_only_container_cannot_write", a_read_only_container_cannot_write),
        ("signals_reach_the_container", signals_reach_the_container),
        ("teardown_ends_a_container_whose_runner_was_killed", teardown_ends_a_container_whose_runner_was_killed),
        ("a_container_that_cannot_start_is_an_error", a_container_that_cannot_start_is_an_error),
        ("who_is_not_root_runs_containers_in_a_user_namespace", who_is_not_root_runs_containers_in_a_user_namespace),
        ("a_failed_composition_leaves_nothing", a_failed_composition_leaves_nothing),
        ("a_bundle_is_composed_and_taken_apart", a_bundle_is_composed_and_taken_apart),
        ("images_of_no_layer_and_of_many_are_composed", images_of_no_layer_and_of_many_are_composed),
        ("links_in_an_image_lead_no_runtime_out_of_it", links_in_an_image_lead_no_runtime_out_of_it),
    ])
}

fn compose_and_run(runtime: &str, plan: &Path) -> u8 {
    if Privilege::detect() == Privilege::UserNamespace {
        let error = nacre_sys::userns::become_root().unwrap_err();
        eprintln!("refused: {error}");
        return 98;
    }
    let plan: Plan = serde_json::from_slice(&fs::read(plan).unwrap()).unwrap();
    let composed = match plan.carry_out() {
        Ok(composed) => composed,
        Err(error) => {
            eprintln!("not composed: {error}");
            return 97;
        }
    };
    let code =
        Runtime::find(Some(runtime)).and_then(|runtime| runtime.run(composed.bundle())).unwrap_or_else(|error| {
            eprintln!("refused: {error}");
            99
        });
    teardown(composed.bundle()).unwrap();
    u8::try_from(code).unwrap()
}

/// Two layers with a small system in them, and a place for bundles.
struct Place {
    dir: tempfile::TempDir,
    image: ImageConfig,
    want: Overrides,
    user_xattr: bool,
}

impl Place {
    fn new(script: &str) -> Option<Self> {
        if !nacre_testkit::root() {
            return None;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Some(Self::in_directory(dir, script))
    }

    fn in_directory(dir: tempfile::TempDir, script: &str) -> Self {
        let layers = dir.path().join("layers");
        nacre_testkit::tiny_rootfs(&layers.join("0"));
        fs::create_dir_all(layers.join("1/etc")).unwrap();
        fs::set_permissions(layers.join("1"), fs::Permissions::from_mode(0o751)).unwrap();
        fs::write(layers.join("0/etc/release"), "one").unwrap();
        fs::write(layers.join("1/etc/release"), "two").unwrap();
        let config = ProcessConfig {
            entrypoint: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["PATH=/bin".into(), "GREETING=hello".into()],
            ..Default::default()
        };
        Self { dir, image: ImageConfig { config, ..Default::default() }, want: Overrides::default(), user_xattr: false }
    }

    fn layers(&self) -> Vec<PathBuf> {
        ["0", "1"].map(|name| self.dir.path().join("layers").join(name)).into()
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    fn plan(&self) -> Plan {
        Plan::new(&self.bundle(), &self.layers(), &UpperDir::InBundle, &self.image, &self.want, self.user_xattr)
            .unwrap()
    }

    fn command(&self, runtime: &str) -> Command {
        let plan = self.dir.path().join("plan");
        fs::write(&plan, serde_json::to_vec(&self.plan()).unwrap()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(plan).env(RUN, runtime);
        command
    }

    fn run(&self, runtime: &str) -> Output {
        let output = self.command(runtime).output().unwrap();
        assert!(!self.bundle().exists(), "{runtime}: the bundle is still there");
        output
    }
}

fn runtimes() -> Vec<&'static str> {
    let mut runtimes = vec!["builtin"];
    runtimes.extend(["runc", "crun"].into_iter().filter(|name| nacre_testkit::require(name).is_some()));
    runtimes
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn every_runtime_runs_the_same_container_alike() {
    let script = "id; pwd; echo $GREETING $HOME $MORE; cat /etc/release /data/file /proc/sys/kernel/hostname; cat; \
                  stat -c '%a %u' / /dev/null /dev/shm; ls /dev; touch made && stat -c %u made; echo oops >&2; exit 42";
    let Some(mut place) = Place::new(script) else { return };
    place.image.config.user = "app".into();
    place.image.config.working_dir = "/tmp/work".into();
    // The working directory is the user's in the image; runtimes make one that is missing as root.
    let work = place.dir.path().join("layers/1/tmp/work");
    fs::create_dir_all(&work).unwrap();
    chown(&work, Some(1000), Some(1000)).unwrap();
    let data = place.dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "data\n").unwrap();
    place.want.mounts.push(BindMount { source: data, destination: "/data".into(), read_only: true });
    place.want.env.push("MORE=more".into());
    place.want.hostname = Some("oyster".into());
    for network in [Network::Host, Network::None] {
        place.want.network = network;
        for runtime in runtimes() {
            let mut command = place.command(runtime);
            let mut child =
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"input\n").unwrap();
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(42), "{runtime}: {output:?}");
            let said = text(&output.stdout);
            let expected = "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n/tmp/work\nhello /home/app more\n\
                            twodata\noyster\ninput\n751 0\n666 0\n1777 0\n";
            assert!(said.starts_with(expected), "{runtime}: {said}");
            for device in [
                "null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr", "ptmx", "pts",
                "shm", "mqueue",
            ] {
                assert!(said.lines().any(|line| line == device), "{runtime}: {device}: {said}");
            }
            assert!(said.ends_with("\n1000\n"), "{runtime}: {said}");
            assert!(text(&output.stderr).contains("oops"), "{runtime}: {output:?}");
            assert!(!place.bundle().exists());
        }
    }
}

fn a_read_only_container_cannot_write() {
    let Some(mut place) =
        Place::new("touch /x 2>&1; touch /dev/shm/ok && echo 1 > /proc/sys/kernel/domainname; echo done")
    else {
        return;
    };
    place.want.read_only = true;
    for runtime in runtimes() {
        let output = place.run(runtime);
        assert_eq!(output.status.code(), Some(0), "{runtime}: {output:?}");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(out.contains("'/x': Read-only file system") && out.ends_with("done\n"), "{runtime}: {out}");
        assert!(err.contains("/proc/sys/kernel/domainname: Read-only file system"), "{runtime}: {err}");
    }
}

fn signals_reach_the_container() {
    let Some(place) = Place::new("trap 'echo got it; exit 7' TERM; echo ready; while :; do sleep 0.05; done") else {
        return;
    };
    for runtime in runtimes() {
        let mut child = place.command(runtime).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{runtime}");
        rustix::process::kill_process(nacre_sys::container::pid_of(&child), rustix::process::Signal::TERM).unwrap();
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("got it\n", Some(7)), "{runtime}");
        assert!(!place.bundle().exists());
    }
}

fn teardown_ends_a_container_whose_runner_was_killed() {
    let Some(place) = Place::new("echo ready; sleep 1000") else { return };
    for runtime in runtimes() {
        let mut child = place.command(runtime).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{runtime}");
        child.kill().unwrap();
        child.wait().unwrap();
        teardown(&place.bundle()).unwrap();
        assert!(!place.bundle().exists(), "{runtime}");
        // The pipe ends when everything that could write to it is gone.
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "", "{runtime}");
    }
}

fn a_container_that_cannot_start_is_an_error() {
    let Some(mut place) = Place::new("") else { return };
    place.image.config.entrypoint = vec!["/no/such/program".into()];
    for runtime in runtimes() {
        let output = place.run(runtime);
        assert_eq!(output.status.code(), Some(99), "{runtime}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("refused: ") && said.contains("/no/such/program"), "{runtime}: {said}");
    }
    // An exit code that runtimes use themselves is the program's where it ran.
    place.image.config.entrypoint = vec!["sh".into(), "-c".into(), "exit 1".into()];
    for runtime in runtimes() {
        assert_eq!(place.run(runtime).status.code(), Some(1), "{runtime}");
    }
}

fn who_is_not_root_runs_containers_in_a_user_namespace() {
    if !nacre_testkit::root() || nacre_testkit::require("setpriv").is_none() {
        return;
    }
    // The build directory may be closed to others.
    let dir = tempfile::tempdir().unwrap();
    let mut place =
        Place::in_directory(dir, "id; echo $$; cat /etc/release; ls /sys/class >/dev/null && touch /x && exit 42");
    place.user_xattr = true;
    let program = place.dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let own = Command::new("chown").args(["-R", &format!("{NOBODY}:{NOBODY}")]).arg(place.dir.path()).status().unwrap();
    assert!(own.success());
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let plan = place.dir.path().join("plan");
    let run = |place: &Place, runtime: &str| {
        fs::write(&plan, serde_json::to_vec(&place.plan()).unwrap()).unwrap();
        Command::new("setpriv")
            .args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")])
            .args(["--clear-groups", "--"])
            .args([&program, &plan])
            .env(RUN, runtime)
            .output()
            .unwrap()
    };
    for runtime in runtimes() {
        let output = run(&place, runtime);
        if text(&output.stderr).contains("not composed") && runtime == "builtin" {
            nacre_testkit::skip(&format!("user namespaces are not allowed here: {}", text(&output.stderr)));
            return;
        }
        assert_eq!(output.status.code(), Some(42), "{runtime}: {output:?}");
        assert!(text(&output.stdout).starts_with("uid=0(root) gid=0(root)"), "{runtime}: {output:?}");
        assert!(text(&output.stdout).contains("\n1\ntwo"), "{runtime}: {output:?}");
        assert!(!place.bundle().exists(), "{runtime}");
    }
    place.image.config.user = "app".into();
    let output = run(&place, "builtin");
    assert_eq!(output.status.code(), Some(97), "{output:?}");
    assert!(text(&output.stderr).contains("user 1000 does not exist in this user namespace"), "{output:?}");
}

fn a_failed_composition_leaves_nothing() {
    let Some(mut place) = Place::new("exit 0") else { return };
    // In the last step, after the mount.
    place.image.config.user = "nobody".into();
    let error = place.plan().carry_out().unwrap_err();
    assert!(error.to_string().contains("no user 'nobody'"), "{error}");
    assert!(!place.bundle().exists());
    // In the mount, beside what was there before.
    place.image.config.user.clear();
    fs::create_dir(place.bundle()).unwrap();
    fs::write(place.bundle().join("theirs"), "").unwrap();
    let mut layers = place.layers();
    layers.push(place.dir.path().join("absent"));
    let upper = place.dir.path().join("rw");
    let plan =
        Plan::new(&place.bundle(), &layers, &UpperDir::At(upper.clone()), &place.image, &place.want, false).unwrap();
    let error = plan.carry_out().unwrap_err();
    assert!(matches!(error, ComposeError::Directory { .. }) && error.to_string().contains("absent"), "{error}");
    layers.swap(1, 2);
    let plan =
        Plan::new(&place.bundle(), &layers, &UpperDir::At(upper.clone()), &place.image, &place.want, false).unwrap();
    assert!(matches!(plan.carry_out(), Err(ComposeError::Overlay(_))));
    assert!(!upper.exists());
    let left: Vec<_> = fs::read_dir(place.bundle()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["theirs"]);
    let relative = Plan::new(Path::new("bundle"), &layers, &UpperDir::InBundle, &place.image, &place.want, false);
    assert!(relative.unwrap_err().to_string().contains("not absolute"));
}

fn a_bundle_is_composed_and_taken_apart() {
    let Some(place) = Place::new("exit 0") else { return };
    let bundle = place.bundle();
    teardown(&bundle).unwrap();
    let plan = place.plan();
    assert!(plan.to_string().contains("mount 2 layers writable on"), "{plan}");
    let composed = plan.carry_out().unwrap();
    assert_eq!(fs::read_to_string(composed.rootfs().join("etc/release")).unwrap(), "two");
    assert_eq!(fs::metadata(composed.rootfs()).unwrap().mode() & 0o7777, 0o751);
    assert!(bundle.join("config.json").is_file());
    fs::write(composed.rootfs().join("written"), "").unwrap();
    assert!(matches!(plan.carry_out(), Err(ComposeError::InUse(_))));
    assert!(bundle.join("config.json").is_file(), "a second composition must not harm the first");
    // Whoever dropped it, the bundle stays until it is taken apart; and layers are never written.
    drop(composed);
    assert!(nacre_sys::fs::is_mount_point(&bundle.join("rootfs")).unwrap());
    fs::write(bundle.join("theirs"), "").unwrap();
    teardown(&bundle).unwrap();
    let left: Vec<_> = fs::read_dir(&bundle).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["theirs"]);
    assert!(!place.dir.path().join("layers/1/written").exists());
    teardown(&bundle).unwrap();
    // Changes outlive a bundle that keeps them elsewhere.
    let upper = UpperDir::At(place.dir.path().join("rw"));
    let plan = Plan::new(&bundle, &place.layers(), &upper, &place.image, &place.want, false).unwrap();
    for _ in 0..2 {
        let composed = plan.carry_out().unwrap();
        fs::OpenOptions::new().create(true).append(true).open(composed.rootfs().join("kept")).unwrap();
        teardown(&bundle).unwrap();
    }
    assert!(place.dir.path().join("rw/upper/kept").exists());
    let composed = plan.carry_out().unwrap();
    assert!(composed.rootfs().join("kept").exists());
    composed.undo();
    assert!(bundle.join("theirs").exists() && !bundle.join("rootfs").exists());
}

fn images_of_no_layer_and_of_many_are_composed() {
    let Some(place) = Place::new("exit 0") else { return };
    let mut layers: Vec<PathBuf> = Vec::new();
    for number in 0..700 {
        let layer = place.dir.path().join(format!("many/{number}"));
        fs::create_dir_all(&layer).unwrap();
        fs::write(layer.join("top"), number.to_string()).unwrap();
        layers.push(layer);
    }
    for upper in [UpperDir::InBundle, UpperDir::ReadOnly] {
        for count in [0, 1, 2, 130, 700] {
            let plan = Plan::new(&place.bundle(), &layers[..count], &upper, &place.image, &place.want, false).unwrap();
            let composed = plan.carry_out().unwrap();
            let top = fs::read_to_string(composed.rootfs().join("top")).unwrap_or_default();
            assert_eq!(top, if count == 0 { String::new() } else { (count - 1).to_string() });
            assert_eq!(fs::write(composed.rootfs().join("x"), "").is_ok(), upper == UpperDir::InBundle);
            teardown(composed.bundle()).unwrap();
            assert!(!place.bundle().exists());
        }
    }
}

fn links_in_an_image_lead_no_runtime_out_of_it() {
    let Some(mut place) = Place::new("echo in; exit 0") else { return };
    let outside = place.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    // Mount points of the runtime, and of ours: if a link cannot be followed inside, the container does not start.
    std::os::unix::fs::symlink(&outside, place.dir.path().join("layers/1/data")).unwrap();
    std::os::unix::fs::symlink(outside.join("hosts"), place.dir.path().join("layers/1/etc/hosts")).unwrap();
    place.want.mounts.push(BindMount { source: "/etc".into(), destination: "/data/deep".into(), read_only: true });
    for runtime in runtimes() {
        place.run(runtime);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{runtime}");
    }
    let passwd = place.dir.path().join("layers/1/etc/passwd");
    fs::write(outside.join("passwd"), "evil:x:0:0::/:\n").unwrap();
    std::os::unix::fs::symlink(outside.join("passwd"), passwd).unwrap();
    place.image.config.user = "evil".into();
    assert!(place.plan().carry_out().unwrap_err().to_string().contains("no user 'evil'"));
}

//! The built-in runner runs a container as its config says, and nothing of the machine is within its reach.

#![expect(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "what fails here fails the test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use nacre_sys::spec::{
    Capabilities, Linux, Mount, Namespace, NamespaceKind, Process, Rlimit, Root, Spec, User, VERSION,
};
use nacre_testkit::harness;

/// A copy of this program is started with the bundle's path here: it is the caller of the runner.
const RUN: &str = "NACRE_TEST_RUN_BUNDLE";
/// Makes this program tell whether its own file can be written, by the mount that it was started from.
const SHOW: &str = "NACRE_TEST_SHOW_EXECUTABLE";

fn main() -> ExitCode {
    nacre_sys::stage::enter();
    if std::env::var_os(SHOW).is_some() {
        let flags = rustix::fs::statvfs("/proc/self/exe").unwrap().f_flag;
        println!("read-only: {}", flags.contains(rustix::fs::StatVfsMountFlags::RDONLY));
        return ExitCode::SUCCESS;
    }
    if let Some(bundle) = std::env::var_os(RUN) {
        let code = nacre_sys::container::run(Path::new(&bundle)).unwrap_or_else(|error| {
            eprintln!("refused: {error}");
            99
        });
        return ExitCode::from(u8::try_from(code).unwrap());
    }
    harness::run(&[
        ("exit_code_streams_and_environment_pass_through", exit_code_streams_and_environment_pass_through),
        ("the_container_sees_its_own_namespaces", the_container_sees_its_own_namespaces),
        ("ids_capabilities_and_limits_are_those_of_the_config", ids_capabilities_and_limits_are_those_of_the_config),
        ("a_read_only_root_and_masked_paths_hold", a_read_only_root_and_masked_paths_hold),
        ("signals_are_passed_on", signals_are_passed_on),
        ("the_container_dies_with_who_runs_it", the_container_dies_with_who_runs_it),
        ("what_cannot_be_started_is_an_error_of_ours", what_cannot_be_started_is_an_error_of_ours),
        ("configs_that_ask_for_more_are_refused", configs_that_ask_for_more_are_refused),
        ("links_do_not_lead_out_of_the_container", links_do_not_lead_out_of_the_container),
        ("the_program_that_runs_it_cannot_be_overwritten", the_program_that_runs_it_cannot_be_overwritten),
    ])
}

struct Bundle {
    dir: tempfile::TempDir,
    spec: Spec,
}

impl Bundle {
    fn new(script: &str) -> Option<Self> {
        if !nacre_testkit::root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        nacre_testkit::tiny_rootfs(&dir.path().join("rootfs"));
        let mount = |destination: &str, kind: &str, options: &[&str]| Mount {
            destination: destination.into(),
            kind: Some(kind.into()),
            source: Some(kind.into()),
            options: options.iter().map(|&option| option.into()).collect(),
        };
        let kinds = [NamespaceKind::Pid, NamespaceKind::Mount, NamespaceKind::Ipc, NamespaceKind::Uts];
        let spec = Spec {
            oci_version: VERSION.into(),
            process: Process {
                terminal: false,
                user: User::default(),
                args: vec!["sh".into(), "-c".into(), script.into()],
                env: vec!["PATH=/bin".into(), "GREETING=hello world".into()],
                cwd: "/".into(),
                capabilities: Capabilities::default(),
                rlimits: Vec::new(),
                no_new_privileges: true,
            },
            root: Root { path: "rootfs".into(), readonly: false },
            hostname: Some("oyster".into()),
            mounts: vec![
                mount("/proc", "proc", &[]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount(
                    "/dev/pts",
                    "devpts",
                    &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
                ),
                mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
                mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            annotations: Default::default(),
            linux: Linux {
                namespaces: kinds.map(|kind| Namespace { kind }).into(),
                masked_paths: vec![
                    "/proc/version".into(),
                    "/proc/acpi".into(),
                    "/proc/no-such".into(),
                    "/sys/firmware".into(),
                ],
                readonly_paths: vec!["/proc/sys".into(), "/proc/no-such".into()],
                resources: None,
            },
        };
        Some(Self { dir, spec })
    }

    fn command(&self) -> Command {
        fs::write(self.dir.path().join("config.json"), serde_json::to_vec(&self.spec).unwrap()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(RUN, self.dir.path());
        command
    }

    #[track_caller]
    fn run(&self) -> Output {
        self.command().output().unwrap()
    }

    /// What it wrote, after it ended well.
    #[track_caller]
    fn output(&self) -> String {
        let output = self.run();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts it and waits for its first line.
    fn start(&self) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut child = self.command().stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        (child, lines)
    }
}

fn exit_code_streams_and_environment_pass_through() {
    let Some(mut bundle) =
        Bundle::new("cat; echo \"$GREETING $(env | cat | ls /no 2>/dev/null) $PWD\"; echo err >&2; exit 42")
    else {
        return;
    };
    bundle.spec.process.cwd = "/made/for it".into();
    let mut child =
        bundle.command().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"input\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "input\nhello world  /made/for it\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
    bundle.spec.process.args[2] = "kill -9 $$".into();
    // Even SIGKILL: pid 1 is safe from its own namespace, so the shell ends by itself.
    assert_eq!(bundle.run().status.code(), Some(0));
    bundle.spec.process.args = vec!["env".into()];
    let environment = bundle.output();
    assert_eq!(environment, "GREETING=hello world\nPATH=/bin\n", "nothing else of the caller's environment");
}

fn the_container_sees_its_own_namespaces() {
    let Some(bundle) =
        Bundle::new("echo $$; cat /proc/sys/kernel/hostname; ls /proc/self/fd; ls -d /proc/[0-9]*; ls /dev /")
    else {
        return;
    };
    let output = bundle.output();
    let mut lines = output.lines();
    assert_eq!(lines.next(), Some("1"));
    assert_eq!(lines.next(), Some("oyster"));
    // 3 is what ls itself has open.
    assert_eq!(lines.by_ref().take(4).collect::<Vec<_>>(), ["0", "1", "2", "3"], "{output}");
    assert!(output.matches("/proc/").count() <= 2, "{output}");
    for device in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "pts", "mqueue"] {
        assert!(output.lines().any(|line| line == device), "{device}: {output}");
    }
    assert!(!output.contains("vda") && !output.contains("home"), "{output}");
    assert_ne!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim(), "oyster");
}

fn ids_capabilities_and_limits_are_those_of_the_config() {
    let Some(mut bundle) = Bundle::new("id; cat /proc/self/status; ulimit -n; touch /bin/no 2>&1") else { return };
    bundle.spec.process.user = User { uid: 1000, gid: 1000, additional_gids: vec![1000, 2000] };
    let some: Vec<String> = vec!["CAP_CHOWN".into(), "CAP_KILL".into()];
    bundle.spec.process.capabilities = Capabilities { bounding: some.clone(), ..Default::default() };
    bundle.spec.process.rlimits = vec![Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 77, soft: 66 }];
    let output = String::from_utf8(bundle.run().stdout).unwrap();
    assert!(output.contains("uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)"), "{output}");
    let status =
        |name: &str| output.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let none = "0000000000000000";
    assert_eq!([status("CapInh:"), status("CapPrm:"), status("CapEff:"), status("CapAmb:")], [none; 4]);
    assert_eq!(status("CapBnd:"), "0000000000000021");
    assert_eq!(status("NoNewPrivs:"), "1");
    assert!(output.contains("\n66\n") && output.contains("Permission denied"), "{output}");

    bundle.spec.process.user = User::default();
    bundle.spec.process.capabilities = Capabilities {
        bounding: some.clone(),
        effective: some.clone(),
        permitted: some.clone(),
        inheritable: some.clone(),
        ambient: some,
    };
    let output = bundle.output();
    assert!(
        output.contains("CapEff:\t0000000000000021\n") && output.contains("CapAmb:\t0000000000000021\n"),
        "{output}"
    );
    bundle.spec.process.capabilities.effective = vec!["CAP_NO".into()];
    assert!(String::from_utf8_lossy(&bundle.run().stderr).contains("no capability 'CAP_NO'"));
}

fn a_read_only_root_and_masked_paths_hold() {
    let script = "touch /x; touch /dev/shm-like && echo dev-ok; cat /proc/version; ls /sys/firmware; \
                  echo 1 > /proc/sys/kernel/domainname; echo done";
    let Some(mut bundle) = Bundle::new(script) else { return };
    bundle.spec.root.readonly = true;
    let some = vec!["CAP_DAC_OVERRIDE".to_owned()];
    bundle.spec.process.capabilities =
        Capabilities { bounding: some.clone(), effective: some.clone(), permitted: some, ..Default::default() };
    let output = bundle.run();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "dev-ok\ndone\n", "{errors}");
    assert_eq!(errors.matches("Read-only file system").count(), 2, "{errors}");
    assert!(!bundle.dir.path().join("rootfs/x").exists());
    bundle.spec.root.readonly = false;
    bundle.run();
    assert!(bundle.dir.path().join("rootfs/x").exists());
}

fn signals_are_passed_on() {
    let Some(bundle) = Bundle::new("trap 'echo got it; exit 7' TERM; echo ready; while :; do sleep 0.05; done") else {
        return;
    };
    let (mut child, mut lines) = bundle.start();
    rustix::process::kill_process(nacre_sys::container::pid_of(&child), rustix::process::Signal::TERM).unwrap();
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "got it\n");
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

fn the_container_dies_with_who_runs_it() {
    let Some(mut bundle) = Bundle::new("echo ready; sleep 1000") else { return };
    for uid in [0, 1000] {
        bundle.spec.process.user.uid = uid;
        let (mut child, lines) = bundle.start();
        child.kill().unwrap();
        child.wait().unwrap();
        // The pipe ends when everything that could write to it is gone.
        let begun = Instant::now();
        assert_eq!(lines.lines().count(), 0);
        assert!(begun.elapsed() < Duration::from_secs(20), "uid {uid}");
    }
}

fn what_cannot_be_started_is_an_error_of_ours() {
    let Some(mut bundle) = Bundle::new("") else { return };
    let failure = |bundle: &Bundle, words: &str| {
        let output = bundle.run();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(99), "{output:?}");
        assert!(said.contains("did not start") && said.contains(words), "{said} / {words}");
    };
    let good = bundle.spec.clone();
    bundle.spec.process.args = vec!["no-such".into()];
    failure(&bundle, "'no-such' is not in the image's PATH (/bin)");
    bundle.spec.process.args = vec!["/etc/passwd".into()];
    failure(&bundle, "no file that may be executed");
    bundle.spec.process.args = vec!["/bin".into()];
    failure(&bundle, "no file that may be executed");
    bundle.spec = good.clone();
    bundle.spec.process.cwd = "/bin/sh".into();
    failure(&bundle, "working directory /bin/sh");
    bundle.spec = good.clone();
    bundle.spec.process.env.push("no equals sign".into());
    failure(&bundle, "NAME=value");
    bundle.spec = good.clone();
    bundle.spec.mounts[0].kind = Some("nofs".into());
    failure(&bundle, "mount /proc");
    bundle.spec = good.clone();
    bundle.spec.process.rlimits = vec![Rlimit { kind: "RLIMIT_NO".into(), hard: 0, soft: 0 }];
    failure(&bundle, "RLIMIT_NO");
    bundle.spec = good;
    fs::remove_dir_all(bundle.dir.path().join("rootfs")).unwrap();
    failure(&bundle, "rootfs");
}

fn configs_that_ask_for_more_are_refused() {
    let Some(bundle) = Bundle::new("exit 0") else { return };
    let good = serde_json::to_value(&bundle.spec).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut config = good.clone();
        change(&mut config);
        let mut command = bundle.command();
        fs::write(bundle.dir.path().join("config.json"), config.to_string()).unwrap();
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(99), "{config}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--runtime runc"), "{output:?}");
    };
    refused(&|config| config["linux"]["seccomp"] = serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO"}));
    refused(&|config| config["hooks"] = serde_json::json!({}));
    refused(&|config| config["process"]["apparmorProfile"] = "x".into());
    refused(&|config| config["linux"]["namespaces"] = serde_json::json!([]));
    refused(&|config| config["linux"]["namespaces"][0]["type"] = "user".into());
    refused(&|config| config["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into());
    refused(&|config| config["linux"]["resources"] = serde_json::json!({"memory": {"limit": 1}}));
    refused(&|config| config["process"]["args"] = serde_json::json!([]));
    refused(&|config| *config = serde_json::json!("no config"));
}

fn links_do_not_lead_out_of_the_container() {
    let Some(mut bundle) = Bundle::new("echo inside") else { return };
    let outside = tempfile::tempdir().unwrap();
    let root = bundle.dir.path().join("rootfs");
    let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, root.join(name)).unwrap();
    // Mount points, the working directory and the program, each through a link that would lead to the machine.
    link(outside.path(), "proc");
    link(&outside.path().join("../.."), "sys");
    fs::create_dir(outside.path().join("seen")).unwrap();
    let output = bundle.run();
    assert!(String::from_utf8_lossy(&output.stderr).contains("mount /proc"), "{output:?}");
    fs::remove_file(root.join("proc")).unwrap();
    fs::remove_file(root.join("sys")).unwrap();
    let refused = |bundle: &Bundle| {
        let output = bundle.run();
        assert_eq!(output.status.code(), Some(99), "{output:?}");
        assert_eq!(output.stdout, b"");
    };
    for number in 3..12 {
        bundle.spec.process.cwd = format!("/proc/self/fd/{number}");
        refused(&bundle);
    }
    bundle.spec.process.cwd = "/".into();
    for program in ["/proc/self/exe", "/proc/self/root/bin/sh", "/proc/self/fd/3"] {
        bundle.spec.process.args[0] = program.into();
        refused(&bundle);
    }
    let left: Vec<_> = fs::read_dir(outside.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["seen"]);
}

fn the_program_that_runs_it_cannot_be_overwritten() {
    let Some(mut bundle) = Bundle::new("") else { return };
    let root = bundle.dir.path().join("rootfs");
    // What this program needs to run in there.
    let libraries = Command::new("ldd").arg(std::env::current_exe().unwrap()).output().unwrap();
    for library in String::from_utf8(libraries.stdout).unwrap().split_whitespace().filter(|word| word.starts_with('/'))
    {
        let copy = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
    // Executing it makes the kernel execute the runner once more, in the container.
    let script = root.join("bin/script");
    fs::write(&script, "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    bundle.spec.process.args = vec!["/bin/script".into()];
    bundle.spec.process.env = vec![format!("{SHOW}=1")];
    assert_eq!(bundle.output(), "read-only: true\n");
}

//! The daemon that serves lazy images: one for all mounts, whose death, restart and end nobody who reads notices.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{require, run};
use serde_json::Value;

use crate::{
    lazy::{Mounted, PULL, Scene, noise, rich},
    support::{Place, runnable, said},
};

impl Scene {
    /// One with an image `v1` at the registry.
    fn with_image() -> Option<Self> {
        let scene = Self::new(&rich())?;
        let output = scene.copy("v1", &[]);
        assert!(output.status.success(), "{}", said(&output));
        Some(scene)
    }

    #[track_caller]
    fn mounted(&self, name: &str, options: &[&str]) -> Mounted<'_> {
        self.mount_at(name, &self.name("v1"), options).map_err(|output| said(&output)).unwrap()
    }

    /// The processes of the store's daemon with this command.
    pub(crate) fn processes(&self, command: &str) -> Vec<i32> {
        processes(&self.place.at("store/lazy"), command)
    }

    /// The daemon, when it is another one than that.
    #[track_caller]
    pub(crate) fn daemon_but(&self, other: i32) -> i32 {
        within("another daemon", || self.processes("serve").into_iter().find(|process| *process != other))
    }

    #[track_caller]
    fn nacre(&self, arguments: &[&str]) -> Output {
        let output = self.place.nacre("store", arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        output
    }

    /// What `ls` shows of the mounts.
    pub(crate) fn shown(&self) -> Vec<Value> {
        let listed: Value = serde_json::from_slice(&self.nacre(&["image", "ls", "--json"]).stdout).unwrap();
        let images = listed.as_array().unwrap().iter();
        images.flat_map(|image| image["mounts"].as_array().unwrap().clone()).collect()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.at("store/lazy/log")).unwrap()
    }
}

fn processes(lazy: &Path, command: &str) -> Vec<i32> {
    let wanted = format!("image\0daemon\0{command}\0");
    let directory = format!("\0{}\0", lazy.display());
    let is = |process: &i32| {
        let said = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        said.contains(&wanted) && said.contains(&directory)
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is).collect()
}

#[track_caller]
fn within<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{what} does not come");
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn signal(signal: &str, process: i32) {
    run(Command::new("kill").args([signal, &process.to_string()]));
}

#[track_caller]
fn gone(process: i32) {
    let path = format!("/proc/{process}/exe");
    within("its end", || fs::read_link(&path).is_err().then_some(()));
}

/// A program that reads all the time, past what the kernel has cached, and ends at the first error or wrong byte.
struct Reader {
    child: Child,
    stop: PathBuf,
    rounds: PathBuf,
}

impl Reader {
    fn start(scene: &Scene, mounted: &Mounted<'_>) -> Self {
        let name = mounted.target.file_name().unwrap().to_str().unwrap();
        let (stop, rounds) = (scene.place.at(&format!("stop-{name}")), scene.place.at(&format!("rounds-{name}")));
        let expected = scene.place.at(&format!("expected-{name}"));
        fs::write(&expected, noise()).unwrap();
        // Of EROFS the kernel has the data device cached as well.
        let script = r#"
            while [ ! -e "$STOP" ]; do
                cmp "$EXPECTED" "$MOUNTED/noise" || exit 1
                cmp "$EXPECTED" "$MOUNTED/copy" || exit 1
                [ "$(cat "$MOUNTED/opaque/upper")" = upper ] || exit 1
                for file in "$MOUNTED/noise" "$MOUNTED/copy" "$MOUNTED/opaque/upper" "$DEVICES"/*/device/data; do
                    if [ -e "$file" ]; then dd if="$file" iflag=nocache count=0 status=none || exit 1; fi
                done
                echo >> "$ROUNDS"
            done"#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("STOP", &stop).env("EXPECTED", expected).env("ROUNDS", &rounds);
        command.env("MOUNTED", &mounted.target).env("DEVICES", scene.place.at("store/lazy/mounts"));
        let reader = Self { child: command.spawn().unwrap(), stop, rounds };
        reader.goes_on();
        reader
    }

    fn count(&self) -> u64 {
        fs::metadata(&self.rounds).map_or(0, |rounds| rounds.len())
    }

    #[track_caller]
    fn goes_on(&self) {
        let before = self.count();
        within("a round of reading", || (self.count() > before + 2).then_some(()));
    }

    #[track_caller]
    fn end(mut self) {
        self.goes_on();
        fs::write(&self.stop, "").unwrap();
        assert!(self.child.wait().unwrap().success(), "a reader failed");
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = fs::write(&self.stop, "");
    }
}

#[test]
fn all_mounts_of_a_store_share_one_daemon_which_ends_when_it_is_idle() {
    let Some(scene) = Scene::with_image() else { return };
    let one = scene.mounted("one", &[]);
    let two = scene.mounted("two", &["--front", "fuse"]);
    let three = scene.mounted("three", &["--cache", &scene.place.text("elsewhere"), "--patience", "3"]);
    for mounted in [&one, &two, &three] {
        assert_eq!(fs::read(mounted.target.join("noise")).unwrap(), noise());
    }
    let (daemons, keepers) = (scene.processes("serve"), scene.processes("keep"));
    assert_eq!((daemons.len(), keepers.len()), (1, 1), "{}", scene.log());
    let shown = scene.shown();
    let listed: Value = serde_json::from_slice(&scene.nacre(&["image", "ls", "--json"]).stdout).unwrap();
    let fields: Vec<_> = listed[0].as_object().unwrap().keys().collect();
    assert_eq!(fields, ["admitted", "bytes", "chain", "layers", "lazy", "manifest", "mounts", "name", "pulled"]);
    let targets: Vec<_> = shown.iter().map(|mount| mount["target"].as_str().unwrap().to_owned()).collect();
    assert_eq!(targets, ["one", "two", "three"].map(|name| scene.place.text(name)));
    assert!(shown.iter().all(|mount| mount["name"] == scene.name("v1") && mount["local_bytes"].as_u64() > Some(0)));
    assert!(fs::read_dir(scene.place.at("elsewhere")).unwrap().next().is_some());
    // What is in use is served until it is not.
    let mut open = File::open(two.target.join("copy")).unwrap();
    drop(two);
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, noise());
    assert!(scene.shown().iter().any(|mount| mount["leaving"] == true));
    drop(open);
    within("its end", || (scene.shown().len() == 2).then_some(()));
    // The same place cannot be taken twice, and comes free.
    let again = scene.mount_at("one", &scene.name("v1"), &[]).err().unwrap();
    assert_eq!(again.status.code(), Some(6), "{}", said(&again));
    drop((one, three));
    assert_eq!(fs::read_dir(scene.place.at("store/lazy/mounts")).unwrap().count(), 0);
    drop(scene.mounted("one", &[]));
    assert_eq!(scene.processes("serve"), daemons);
    gone(daemons[0]);
    gone(keepers[0]);
    assert!(fs::read_dir(scene.place.at("store/lazy/daemon")).unwrap().count() == 1, "only the lock stays");
}

#[test]
fn nobody_notices_that_the_daemon_is_killed_even_without_registry_and_key() {
    let Some(scene) = Scene::with_image() else { return };
    let (erofs, fuse) = (scene.mounted("erofs", &[]), scene.mounted("fuse", &["--front", "fuse"]));
    let readers = [Reader::start(&scene, &erofs), Reader::start(&scene, &fuse)];
    let mut daemon = scene.daemon_but(0);
    for round in 0..6 {
        // Only deaths in quick succession count as a daemon that cannot go on.
        thread::sleep(Duration::from_millis(if round % 3 == 2 { 2200 } else { 150 }));
        signal("-9", daemon);
        daemon = scene.daemon_but(daemon);
    }
    readers.iter().for_each(Reader::goes_on);
    scene.nacre(&["image", "complete", erofs.target.to_str().unwrap()]);
    // From here on nobody can ask for anything again.
    let Scene { place, registry } = &scene;
    fs::remove_file(place.at("key.pem")).unwrap();
    run(Command::new("kill").args(["-9", &registry_process(registry.host()).to_string()]));
    signal("-9", daemon);
    scene.daemon_but(daemon);
    readers.iter().for_each(Reader::goes_on);
    readers.into_iter().for_each(Reader::end);
    assert_eq!(scene.log().matches("go to its successor").count(), 7, "{}", scene.log());
}

/// Who listens at an address of the loopback device.
pub(crate) fn registry_process(host: &str) -> i32 {
    let port = host.rsplit(':').next().unwrap();
    let said = run(Command::new("ss").args(["-Hltnp", &format!("sport = :{port}")])).stdout;
    let said = String::from_utf8(said).unwrap();
    said.split("pid=").nth(1).unwrap().split(',').next().unwrap().parse().unwrap()
}

#[test]
fn another_program_takes_over_and_nobody_notices() {
    let Some(scene) = Scene::with_image() else { return };
    let program = scene.place.at("nacre");
    let install = || {
        let new = scene.place.at("nacre.new");
        fs::copy(env!("CARGO_BIN_EXE_nacre"), &new).unwrap();
        fs::rename(new, &program).unwrap();
        fs::metadata(&program).unwrap().ino()
    };
    let first = install();
    let target = scene.place.at("mounted");
    fs::create_dir(&target).unwrap();
    let mut mount = scene.place.program(&program);
    mount.env("NACRE_ROOT", scene.place.at("store")).args(["image", "mount", "--decryption-key", "key.pem"]);
    run(mount.args(PULL).arg(scene.name("v1")).arg(&target));
    let mounted = scene.adopted(target);
    let reader = Reader::start(&scene, &mounted);
    let daemon = scene.daemon_but(0);
    let runs = |daemon: i32| fs::metadata(format!("/proc/{daemon}/exe")).unwrap().ino();
    assert_eq!(runs(daemon), first);
    let second = install();
    scene.nacre(&["image", "daemon", "restart"]);
    let next = scene.daemon_but(daemon);
    assert_eq!((runs(next), first == second), (second, false));
    reader.goes_on();
    // One that does not run is not left to it.
    fs::remove_file(&program).unwrap();
    fs::write(&program, "#!/bin/false\n").unwrap();
    run(Command::new("chmod").arg("755").arg(&program));
    scene.nacre(&["image", "daemon", "restart"]);
    assert_eq!(runs(scene.daemon_but(next)), first, "the keeper's own");
    reader.end();
}

impl Scene {
    fn adopted(&self, target: PathBuf) -> Mounted<'_> {
        Mounted::new(&self.place, target)
    }
}

#[test]
fn a_keeper_that_dies_is_replaced() {
    let Some(scene) = Scene::with_image() else { return };
    let mounted = scene.mounted("mounted", &[]);
    let reader = Reader::start(&scene, &mounted);
    let (daemon, keeper) = (scene.daemon_but(0), scene.processes("keep")[0]);
    signal("-9", keeper);
    let next = within("another keeper", || scene.processes("keep").into_iter().find(|process| *process != keeper));
    reader.goes_on();
    assert_eq!(scene.processes("serve"), [daemon]);
    // It does what the first one did.
    signal("-9", daemon);
    let daemon = scene.daemon_but(daemon);
    reader.goes_on();
    scene.nacre(&["image", "daemon", "restart"]);
    scene.daemon_but(daemon);
    reader.end();
    drop(mounted);
    // Told to end, it has the daemon end.
    signal("-TERM", next);
    gone(next);
    assert!(scene.processes("serve").is_empty() && scene.processes("keep").is_empty());
}

#[test]
fn a_killed_server_gives_errors_and_what_it_left_is_removed() {
    let Some(scene) = Scene::with_image() else { return };
    let (erofs, fuse) = (scene.mounted("erofs", &[]), scene.mounted("fuse", &["--front", "fuse"]));
    let (daemon, keeper) = (scene.daemon_but(0), scene.processes("keep")[0]);
    // Both, so that neither can help the other.
    signal("-STOP", daemon);
    signal("-9", keeper);
    signal("-9", daemon);
    gone(daemon);
    let (erofs, fuse) = (erofs.forget(), fuse.forget());
    for target in [&erofs, &fuse] {
        within("an error", || fs::read(target.join("noise")).err());
    }
    let other = scene.mounted("other", &[]);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    for target in [&erofs, &fuse] {
        assert!(!mounts.contains(target.to_str().unwrap()), "{mounts}");
    }
    drop(other);
    assert_eq!(fs::read_dir(scene.place.at("store/lazy/mounts")).unwrap().count(), 0);
    // umount does as well, by itself.
    let mounted = scene.mounted("fuse", &["--front", "fuse"]);
    let (daemon, keeper) = (scene.daemon_but(daemon), scene.processes("keep")[0]);
    signal("-STOP", daemon);
    signal("-9", keeper);
    signal("-9", daemon);
    gone(daemon);
    drop(mounted);
    assert_eq!(fs::read_dir(scene.place.at("store/lazy/mounts")).unwrap().count(), 0);
}

#[test]
fn a_daemon_that_dies_again_and_again_is_given_up() {
    let Some(scene) = Scene::with_image() else { return };
    let target = scene.mounted("mounted", &[]).forget();
    let keeper = scene.processes("keep")[0];
    thread::sleep(Duration::from_millis(2200));
    let start = Instant::now();
    while fs::read_link(format!("/proc/{keeper}/exe")).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(30), "{}", scene.log());
        for daemon in scene.processes("serve") {
            let _ = Command::new("kill").args(["-9", &daemon.to_string()]).status();
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(scene.log().contains("are given up"), "{}", scene.log());
    within("an error", || fs::read(target.join("noise")).err());
    run(scene.place.nacre("store", &["image", "umount"]).arg(&target));
}

#[test]
fn strangers_and_nonsense_at_the_socket_are_turned_away() {
    let (Some(scene), Some(perl), Some(setpriv)) = (Scene::with_image(), require("perl"), require("setpriv")) else {
        return;
    };
    let mounted = scene.mounted("mounted", &[]);
    let daemon = scene.daemon_but(0);
    let directory = scene.place.at("store/lazy/daemon");
    let name = fs::read_dir(&directory).unwrap().flatten().map(|entry| entry.file_name());
    let name = name.map(|name| name.into_string().unwrap()).find(|name| name.ends_with(".socket")).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&directory), mode(&directory.join(&name))), (0o700, 0o600));
    // Even where it could be reached, another user is not listened to.
    let open = [("", "711"), ("store", "711"), ("store/lazy", "711"), ("store/lazy/daemon", "711")];
    for (path, mode) in open {
        run(Command::new("chmod").arg(mode).arg(scene.place.at(path)));
    }
    run(Command::new("chmod").arg("666").arg(directory.join(&name)));
    let script = "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die; read($s, my $b, 5); print length $b";
    for (user, heard) in [("0", "5"), ("65534", "0")] {
        let mut command = Command::new(&setpriv);
        command.args(["--reuid", user, "--regid", user, "--clear-groups"]).arg(&perl).args(["-e", script, &name]);
        let said = run(command.current_dir(&directory)).stdout;
        assert_eq!(String::from_utf8(said).unwrap(), heard, "user {user}");
    }
    // Its owner's nonsense is an error, or the end of the connection.
    let here = File::open(&directory).unwrap();
    let socket = format!("/proc/self/fd/{}/{name}", here.as_raw_fd());
    for nonsense in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 70_000], b"\x02\0\0\0\0\0\0\0{}", &[0; 9]] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // It may have been cut off before it has said all of it.
        let _ = stream.write_all(nonsense);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!String::from_utf8_lossy(&answer).contains("\"ok\""));
    }
    assert_eq!((scene.shown().len(), scene.processes("serve")), (1, vec![daemon]));
    assert_eq!(fs::read(mounted.target.join("noise")).unwrap(), noise());
}

#[test]
fn another_mount_namespace_has_its_own_daemon() {
    let Some(scene) = Scene::with_image() else { return };
    let here = scene.mounted("here", &[]);
    let there = scene.place.at("there");
    fs::create_dir(&there).unwrap();
    let mut mount = scene.place.program("unshare");
    mount.args(["--mount", env!("CARGO_BIN_EXE_nacre"), "image", "mount", "--decryption-key", "key.pem"]).args(PULL);
    run(mount.env("NACRE_ROOT", scene.place.at("store")).arg(scene.name("v1")).arg(&there));
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0, "it is not mounted here");
    assert_eq!((scene.processes("serve").len(), scene.shown().len()), (2, 2));
    let other = *scene.processes("serve").iter().max().unwrap();
    let inside = format!("/proc/{other}/root{}/noise", there.display());
    assert_eq!(fs::read(inside).unwrap(), noise());
    signal("-TERM", other);
    gone(other);
    assert_eq!(fs::read(here.target.join("noise")).unwrap(), noise());
}

#[test]
fn ls_tells_why_reads_failed_and_how_much_is_local() {
    let Some(scene) = Scene::with_image() else { return };
    let whole = scene.mounted("whole", &["--complete"]);
    let of = |mounted: &Mounted<'_>| {
        let is = |mount: &Value| mount["target"].as_str() == mounted.target.to_str();
        scene.shown().into_iter().find(is).unwrap()
    };
    let shown = within("the rest", || Some(of(&whole)).filter(|mount| mount["complete"] == true));
    assert_eq!((&shown["local_bytes"], &shown["failure"]), (&shown["total_bytes"], &Value::Null));
    let part = scene.mounted("part", &["--patience", "1", "--cache", &scene.place.text("other")]);
    assert_eq!(of(&part)["local_bytes"], 0);
    signal("-9", registry_process(scene.registry.host()));
    let error = fs::read(part.target.join("noise")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO");
    let failure = &of(&part)["failure"];
    assert!(failure["reason"].as_str().unwrap().contains(scene.registry.host()), "{failure}");
    assert!(failure["at"].as_str().unwrap().ends_with('Z'), "{failure}");
    let listed = String::from_utf8(scene.nacre(&["image", "ls"]).stdout).unwrap();
    assert!(listed.contains(scene.registry.host()) && listed.contains("complete"), "{listed}");
    let output = scene.place.nacre("store", &["image", "complete"]).arg(&part.target).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_eq!(fs::read(whole.target.join("noise")).unwrap(), noise());
}

#[test]
fn the_mount_of_a_run_ends_with_it_and_survives_the_daemon() {
    let place = Place::new();
    let image = runnable(&place, "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; cat /second");
    let Some(scene) = Scene::new(&image) else { return };
    let output = scene.copy("v1", &[]);
    assert!(output.status.success(), "{}", said(&output));
    let key = scene.place.text("key.pem");
    let mut nacre = scene.place.nacre("store", &["run", "--lazy", "--runtime", "builtin", "--decryption-key", &key]);
    let mut child = nacre.args(PULL).arg(scene.name("v1")).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut begun).unwrap();
    let daemon = scene.daemon_but(0);
    signal("-9", daemon);
    scene.daemon_but(daemon);
    assert_eq!(scene.shown().len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    within("its end", || (scene.shown()[0]["leaving"] == true).then_some(()));
    // The bundle had it in use.
    scene.nacre(&["image", "gc"]);
    within("its end", || scene.shown().is_empty().then_some(()));
    within("its directory's", || {
        fs::read_dir(scene.place.at("store/lazy/mounts")).unwrap().next().is_none().then_some(())
    });
}

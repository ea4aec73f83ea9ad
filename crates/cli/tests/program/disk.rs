//! `nacre disk`: what is typed, what is printed, and the codes; a disk that runs, as other programs see it.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{require, root, run};
use serde_json::Value;

use crate::{
    commands::code,
    support::{Place, said},
};

/// A place with a key and a disk.
struct Disk {
    place: Place,
    store: &'static str,
    environment: Vec<(String, String)>,
}

/// A server that is killed where a test fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Disk {
    fn new() -> Self {
        let place = Place::new();
        place.write("key", [7; 32]);
        Self { place, store: "store", environment: Vec::new() }
    }

    fn formatted(more: &[&str]) -> Self {
        let disk = Self::new();
        run(disk.keyed("format").args(["--size", "32M", "store"]).args(more));
        disk
    }

    fn nacre(&self, verb: &str) -> Command {
        let mut command = self.place.nacre("images", &["--quiet", "disk", verb]);
        command.env("NACRE_RUN", self.place.at("run")).envs(self.environment.iter().cloned());
        command
    }

    fn keyed(&self, verb: &str) -> Command {
        let mut command = self.nacre(verb);
        command.args(["--key-file", "key"]);
        command
    }

    /// Serves at `socket`; the second line that it prints is the TCP address, if one was asked for.
    fn serve(&self, more: &[&str]) -> Server {
        let child =
            self.keyed("serve").args(["--socket", "socket", self.store]).args(more).stdout(Stdio::null()).spawn();
        let mut server = Server(child.unwrap());
        let begin = Instant::now();
        // The record is what other commands look for.
        while !self.nacre("info").arg(self.store).output().unwrap().status.success() {
            assert!(server.0.try_wait().unwrap().is_none(), "the server ended");
            assert!(begin.elapsed() < Duration::from_secs(30), "the server does not serve");
            thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn info(&self, what: &str) -> Value {
        serde_json::from_slice(&run(self.nacre("info").args(["--json", what])).stdout).unwrap()
    }
}

const URI: &str = "nbd+unix:///?socket=socket";

#[test]
fn disk_commands_end_with_the_codes_of_what_happened() {
    let disk = Disk::new();
    // 2: usage
    code(disk.keyed("format").arg("store"), 2, &["--size"]);
    code(disk.keyed("format").args(["--size", "1GB", "store"]), 2, &["powers of 1024"]);
    code(disk.keyed("format").args(["--size", "1M", "store"]), 2, &[]);
    code(disk.keyed("format").args(["--size", "32M", "ftp://a/b"]), 2, &["ftp"]);
    code(disk.keyed("format").args(["--size", "32M", "--anchor", "floppy", "store"]), 2, &["floppy", "tpm:WHERE"]);
    code(disk.nacre("format").args(["--size", "32M", "store"]), 2, &["--key-file"]);
    code(disk.keyed("format").args(["--size", "32M", "--key-fd", "0", "store"]), 2, &["--key-fd"]);
    disk.place.write("short", [7; 31]);
    code(disk.nacre("format").args(["--size", "32M", "--key-file", "short", "store"]), 2, &["32", "31"]);
    code(disk.keyed("serve").args(["--listen", "127.0.0.1:0", "store"]), 2, &["--insecure-tcp"]);
    assert!(!disk.place.at("store").exists(), "nothing is left of what failed");
    // 5: I/O
    code(disk.nacre("format").args(["--size", "32M", "--key-file", "absent", "store"]), 5, &["absent"]);
    // 4: not found
    code(disk.keyed("info").arg("store"), 4, &["store"]);
    code(disk.keyed("check").arg("store"), 4, &["store"]);
    code(disk.nacre("close").arg("store"), 4, &["store"]);
    disk.place.write("empty", vec![0; 64 << 20]);
    code(disk.keyed("info").arg("empty"), 4, &["no Nacre disk"]);
    // 0, and then 6: something is there.
    let uuid = run(disk.keyed("format").args(["--size", "32M", "store"])).stdout;
    assert_eq!(uuid.len(), 33, "a name of 32 digits");
    code(disk.keyed("format").args(["--size", "32M", "store"]), 6, &["force"]);
    run(disk.keyed("format").args(["--size", "32M", "--force", "store"]));
    // 3: not trusted
    disk.place.write("key", [8; 32]);
    code(disk.keyed("info").arg("store"), 3, &["key does not open"]);
    // Closed, it is not shown without a key.
    code(disk.nacre("info").arg("store"), 2, &["--key-file"]);
}

#[test]
fn a_preallocated_store_is_full_of_noise_and_becomes_a_disk_all_the_same() {
    let disk = Disk::formatted(&["--preallocate"]);
    let store = fs::read(disk.place.at("store")).unwrap();
    let zeroes = store.chunks(4096).filter(|block| block.iter().all(|byte| *byte == 0)).count();
    assert!(zeroes < 128, "{zeroes} blocks of {} are zeroes, more than the journal has", store.len() / 4096);
    run(disk.keyed("check").arg("store"));
    // From now on it is somebody's.
    code(disk.keyed("format").args(["--preallocate", "--size", "32M", "store"]), 6, &["force"]);
}

#[test]
fn a_key_may_come_from_a_descriptor_or_standard_input() {
    let disk = Disk::formatted(&[]);
    let key = fs::File::open(disk.place.at("key")).unwrap();
    run(disk.nacre("info").args(["--key-file", "-", "store"]).stdin(key));
    // A shell passes it on as descriptor 9.
    let script = format!("exec {} --quiet disk info --key-fd 9 store 9< key", env!("CARGO_BIN_EXE_nacre"));
    run(disk.place.program("sh").args(["-c", &script]));
}

#[test]
fn a_served_disk_is_shown_grown_measured_and_closed() {
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let Some(nbdinfo) = require("nbdinfo") else { return };
    let disk = Disk::formatted(&["--anchor", "file:anchor"]);
    let metrics = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut server = disk.serve(&["--anchor", "file:anchor", "--metrics", &metrics]);
    let size = || String::from_utf8(run(disk.place.program(&nbdinfo).args(["--size", URI])).stdout).unwrap();
    assert_eq!(size().trim(), (32 << 20).to_string());
    disk.place.write("data", vec![0x5a; 4 << 20]);
    run(disk.place.program(&nbdcopy).args(["--flush", "data", URI]));
    // Two at once are refused; what can be found has no need of a key.
    code(disk.keyed("serve").args(["--anchor", "file:anchor", "--socket", "other", "store"]), 6, &["runs already"]);
    code(disk.keyed("check").args(["--anchor", "file:anchor", "store"]), 6, &["in use"]);
    run(disk.nacre("grow").args(["--size", "48M", "store"]));
    code(disk.nacre("grow").args(["--size", "16M", "store"]), 2, &["smaller"]);
    assert_eq!(size().trim(), (48 << 20).to_string());
    let info = disk.info("store");
    assert_eq!((&info["state"], info["size"].as_u64()), (&Value::from("running"), Some(48 << 20)));
    assert!(info["statistics"]["user_written_bytes"].as_u64().unwrap() >= 4 << 20, "{info}");
    let words = String::from_utf8(run(disk.nacre("info").arg("store")).stdout).unwrap();
    for word in ["running in process", "anchor file", "guaranteed", "99 % within", "socket"] {
        assert!(words.contains(word), "{word} is not in {words}");
    }
    let text = get(&metrics);
    for word in
        ["nacre_disk_size_bytes", "nacre_disk_user_written_bytes_total", "nacre_disk_write_latency_seconds_bucket"]
    {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    run(disk.nacre("close").arg("store"));
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
    assert!(!disk.place.at("socket").exists() && fs::read_dir(disk.place.at("run/disks")).unwrap().next().is_none());
    let checked = run(disk.keyed("check").args(["--json", "--anchor", "file:anchor", "store"])).stdout;
    let checked: Value = serde_json::from_slice(&checked).unwrap();
    assert_eq!(checked["data_blocks"], 1024);
}

#[test]
fn a_disk_is_served_over_tls_and_to_nobody_without() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let (Some(nbdcopy), Some(nbdinfo)) = (require("nbdcopy"), require("nbdinfo")) else { return };
    let disk = Disk::formatted(&[]);
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (certificate, key) = (path(&tls.certificate()), path(&tls.key()));
    let server = disk.serve(&["--listen", "127.0.0.1:0", "--tls-cert", &certificate, "--tls-key", &key]);
    let devices = disk.info("store")["devices"].clone();
    let mut uris = devices.as_array().unwrap().iter().filter_map(Value::as_str);
    let uri = uris.find(|uri| uri.starts_with("nbds://")).unwrap();
    fs::create_dir(disk.place.at("certificates")).unwrap();
    fs::copy(tls.ca(), disk.place.at("certificates/ca-cert.pem")).unwrap();
    let secure = format!("{uri}?tls-certificates=certificates");
    let data: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    disk.place.write("data", &data);
    run(disk.place.program(&nbdcopy).args(["--flush", "data", &secure]));
    run(disk.place.program(&nbdcopy).args([&secure, "back"]));
    assert!(fs::read(disk.place.at("back")).unwrap()[..data.len()] == data);
    let plain = uri.replace("nbds://", "nbd://");
    assert!(!disk.place.program(&nbdinfo).arg(plain).output().unwrap().status.success());
    drop(server);
}

fn get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_killed_server_leaves_a_disk_that_is_served_again() {
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let disk = Disk::formatted(&[]);
    let mut server = disk.serve(&[]);
    disk.place.write("data", vec![0x5a; 1 << 20]);
    run(disk.place.program(&nbdcopy).args(["--flush", "data", URI]));
    server.0.kill().unwrap();
    server.0.wait().unwrap();
    code(disk.nacre("close").arg("store"), 4, &["no disk of that name runs"]);
    let mut server = disk.serve(&[]);
    run(disk.place.program(&nbdcopy).args([URI, "back"]));
    assert!(fs::read(disk.place.at("back")).unwrap().starts_with(&[0x5a; 1 << 20]));
    // A signal ends it as `close` does.
    run(Command::new("kill").arg(server.0.id().to_string()));
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
    let info = run(disk.keyed("info").args(["--json", "store"])).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&info).unwrap()["clean"], true);
}

#[test]
fn damage_and_rollback_end_with_code_3_and_are_named() {
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let disk = Disk::formatted(&["--anchor", "file:anchor"]);
    let write = |byte: u8| {
        disk.place.write("data", vec![byte; 1 << 20]);
        let mut server = disk.serve(&["--anchor", "file:anchor"]);
        run(disk.place.program(&nbdcopy).args(["--flush", "data", URI]));
        run(disk.nacre("close").arg("store"));
        assert!(server.0.wait().unwrap().success());
    };
    write(1);
    fs::copy(disk.place.at("store"), disk.place.at("older")).unwrap();
    write(2);
    code(disk.keyed("check").args(["--anchor", "file:anchor", "older"]), 3, &["rolled back"]);
    code(disk.keyed("check").arg("store"), 3, &["anchor"]);
    run(disk.keyed("check").args(["--accept-rollback", "store"]));
    // One byte of every block of the data area, behind the journal.
    let mut store = fs::OpenOptions::new().read(true).write(true).open(disk.place.at("store")).unwrap();
    let layout = run(disk.keyed("check").args(["--json", "--dump-layout", "--accept-rollback", "store"])).stdout;
    let layout: Value = serde_json::from_slice(&layout).unwrap();
    let segments = layout["layout"].as_array().unwrap().iter();
    let segment = segments.max_by_key(|region| region["used"].as_u64()).unwrap();
    assert!(segment["used"].as_u64().unwrap() > 100, "{segment}");
    for block in 0..segment["blocks"].as_u64().unwrap() {
        let at = (segment["first"].as_u64().unwrap() + block) * 4096;
        let mut byte = [0];
        store.seek(SeekFrom::Start(at)).unwrap();
        store.read_exact(&mut byte).unwrap();
        store.seek(SeekFrom::Start(at)).unwrap();
        store.write_all(&[byte[0] ^ 1]).unwrap();
    }
    code(
        disk.keyed("check").args(["--anchor", "file:anchor", "store"]),
        3,
        &["damaged: LBA 0 to 255", "cannot be read"],
    );
}

#[test]
fn a_disk_gets_another_key_and_its_anchor_follows() {
    let disk = Disk::formatted(&["--anchor", "file:anchor"]);
    disk.place.write("new", [9; 32]);
    code(disk.keyed("rekey").args(["--anchor", "file:anchor", "store"]), 2, &["--new-key-file"]);
    run(disk.keyed("rekey").args(["--new-key-file", "new", "--rotate", "--anchor", "file:anchor", "store"]));
    code(disk.keyed("info").args(["--anchor", "file:anchor", "store"]), 3, &[]);
    run(disk.nacre("info").args(["--key-file", "new", "--anchor", "file:anchor", "store"]));
}

#[test]
fn a_tpm_anchors_a_disk_and_moves_to_a_new_index_with_a_new_key() {
    let Some(tpm) = nacre_testkit::Swtpm::start() else { return };
    let (first, second) = (format!("tpm:{}", tpm.address()), format!("tpm:{},index=0x01800011", tpm.address()));
    let disk = Disk::formatted(&["--anchor", &first]);
    let server = disk.serve(&["--anchor", &first]);
    run(disk.nacre("close").arg("store"));
    drop(server);
    let words = said(&run(disk.keyed("info").args(["--anchor", &first, "store"])));
    assert!(words.contains("NV index 0x01800010") && words.contains("turn back the TPM"), "{words}");
    disk.place.write("new", [9; 32]);
    let rekey = || {
        let mut command = disk.keyed("rekey");
        command.args(["--new-key-file", "new", "--anchor", &first, "store"]);
        command
    };
    code(&mut rekey(), 2, &["--new-anchor"]);
    code(rekey().args(["--new-anchor", &first]), 2, &["another anchor"]);
    run(rekey().args(["--new-anchor", &second]));
    run(disk.nacre("info").args(["--key-file", "new", "--anchor", &second, "store"]));
    code(disk.nacre("info").args(["--key-file", "new", "--anchor", &first, "store"]), 3, &["holds nothing"]);
    // Made anew with another key, where an index of the old one is.
    code(disk.keyed("format").args(["--anchor", &second, "--force", "store"]), 0, &[]);
    run(disk.keyed("info").args(["--anchor", &second, "store"]));
}

#[test]
fn a_directory_is_a_store_as_good_as_a_file() {
    let disk = Disk::new();
    run(disk.keyed("format").args(["--size", "32M", "segments/"]));
    assert!(disk.place.at("segments").is_dir());
    run(disk.keyed("check").arg("segments"));
    run(disk.keyed("grow").args(["--size", "40M", "segments"]));
    let info = run(disk.keyed("info").args(["--json", "segments"])).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&info).unwrap()["size"], 40 << 20);
}

#[test]
fn an_s3_bucket_is_a_store_as_good_as_a_file() {
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let Some(server) = nacre_testkit::MotoServer::start() else { return };
    server.make_bucket("disks");
    let mut disk = Disk::new();
    disk.environment = server.environment();
    disk.store = "s3://disks/one";
    code(disk.keyed("info").arg(disk.store), 4, &["no store"]);
    run(disk.keyed("format").args(["--size", "32M", disk.store]));
    code(disk.keyed("format").args(["--size", "32M", disk.store]), 6, &["force"]);
    let mut server = disk.serve(&[]);
    disk.place.write("data", vec![0x5a; 4 << 20]);
    run(disk.place.program(&nbdcopy).args(["--flush", "data", URI]));
    assert_eq!(disk.info(disk.store)["state"], "running");
    run(disk.nacre("close").arg(disk.store));
    assert!(server.0.wait().unwrap().success());
    run(disk.keyed("check").arg(disk.store));
}

#[test]
fn an_opened_disk_is_a_device_until_it_is_closed() {
    if !root() || !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        return nacre_testkit::skip("there is neither FUSE nor a loop device to be had");
    }
    let Some(mkfs) = require("mkfs.ext4") else { return };
    let disk = Disk::formatted(&[]);
    // The error of the process in the background, and its code, are those of the command.
    code(disk.nacre("open").args(["--device", "fuse", "store"]), 2, &["--key-file"]);
    let output = disk.keyed("open").args(["--device", "fuse", "store"]).output().unwrap();
    if !output.status.success() {
        return nacre_testkit::skip(&said(&output));
    }
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    assert_eq!(disk.info(&device)["devices"][0], device.as_str());
    run(Command::new(mkfs).args(["-q", &device]));
    fs::create_dir(disk.place.at("mnt")).unwrap();
    run(Command::new("mount").arg(&device).arg(disk.place.at("mnt")));
    fs::write(disk.place.at("mnt/file"), "content").unwrap();
    let refused = disk.nacre("close").arg(&device).output().unwrap();
    run(Command::new("umount").arg(disk.place.at("mnt")));
    assert_eq!(refused.status.code(), Some(6), "{}", said(&refused));
    run(disk.nacre("close").arg(&device));
    code(disk.nacre("close").arg(&device), 4, &[]);
    run(disk.keyed("check").arg("store"));
    assert!(fs::read_dir(disk.place.at("run/disks")).unwrap().next().is_none(), "nothing is left");
}

#[test]
fn a_device_that_another_mount_namespace_uses_stays_until_it_is_free() {
    if !root() || !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        return nacre_testkit::skip("there is neither FUSE nor a loop device to be had");
    }
    let (Some(mkfs), Some(unshare)) = (require("mkfs.ext4"), require("unshare")) else { return };
    let disk = Disk::formatted(&[]);
    let output = disk.keyed("open").args(["--device", "fuse", "store"]).output().unwrap();
    if !output.status.success() {
        return nacre_testkit::skip(&said(&output));
    }
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    run(Command::new(mkfs).args(["-q", &device]));
    fs::create_dir(disk.place.at("mnt")).unwrap();
    let script = format!("mount {device} mnt && echo mounted && cat && echo kept > mnt/file && umount mnt");
    let mut elsewhere = disk.place.program(unshare);
    elsewhere.args(["-m", "sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut elsewhere = Server(elsewhere.spawn().unwrap());
    let mut said = [0; 8];
    elsewhere.0.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"mounted\n");
    for _ in 0..2 {
        code(disk.nacre("close").arg(&device), 6, &["is in use", "cannot be seen from here"]);
        assert_eq!(disk.info(&device)["state"], "running");
    }
    drop(elsewhere.0.stdin.take());
    assert!(elsewhere.0.wait().unwrap().success());
    run(disk.nacre("close").arg(&device));
    run(disk.keyed("check").arg("store"));
}

#[test]
fn a_device_grows_with_its_disk_and_may_be_taken_away_from_outside() {
    if !root() || !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        return nacre_testkit::skip("there is neither FUSE nor a loop device to be had");
    }
    let disk = Disk::formatted(&[]);
    let output = disk.keyed("open").args(["--device", "fuse", "store"]).output().unwrap();
    if !output.status.success() {
        return nacre_testkit::skip(&said(&output));
    }
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    run(disk.nacre("grow").args(["--size", "48M", &device]));
    let size = || run(Command::new("blockdev").args(["--getsize64", &device])).stdout;
    wait_until("the device to grow", || size() == b"50331648\n");
    run(Command::new("losetup").args(["-d", &device]));
    wait_until("the disk to be closed", || !disk.nacre("info").arg("store").output().unwrap().status.success());
    wait_until("its place to be free", || fs::read_dir(disk.place.at("run/disks")).unwrap().next().is_none());
    let info = run(disk.keyed("info").args(["--json", "store"])).stdout;
    let info: Value = serde_json::from_slice(&info).unwrap();
    assert_eq!((&info["clean"], &info["size"]), (&Value::from(true), &Value::from(48 << 20)));
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited for {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

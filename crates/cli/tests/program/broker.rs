//! The broker by the command line: made, administered by its files and by its address, and asked for a key by a guest that it
//! expects, and by one that it does not.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nacre_registry::Registry;
use nacre_testkit::{require, root, run};
use serde_json::{Value, json};

use crate::support::{Place, assert_refused, runnable, said};

/// `nacre broker serve`, ended with the value.
pub(crate) struct Served {
    child: Child,
    pub(crate) url: String,
}

impl Served {
    fn start(place: &Place) -> Self {
        Self::start_with(place, |_| ())
    }

    fn start_with(place: &Place, change: impl FnOnce(&mut Command)) -> Self {
        let arguments = ["broker", "serve", "--listen", "127.0.0.1:0", "--dir", &place.text("broker")];
        let mut command = place.nacre("unused", &arguments);
        change(&mut command);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("serving at ").unwrap().to_owned();
        assert!(url.starts_with("https://"), "{url}");
        Self { child, url }
    }

    /// It ends by SIGTERM, in its own way.
    fn end(mut self) {
        run(Command::new("kill").arg(self.child.id().to_string()));
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn init(place: &Place) {
    let output = run(&mut place.nacre(
        "unused",
        &["broker", "init", "--allow-simulated", "--name", "127.0.0.1", "--dir", &place.text("broker")],
    ));
    assert!(String::from_utf8_lossy(&output.stdout).contains("admin.key"));
    for secret in ["admin.key", "token.key", "master.key"] {
        let path = place.at("broker").join(secret);
        if path.exists() {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "{secret}");
        }
    }
}

/// `nacre broker …` on the files, or at an address.
fn admin(place: &Place, url: Option<&str>, arguments: &[&str]) -> Command {
    let mut command = place.nacre("unused", &["broker"]);
    command.args(arguments).args(["--dir", &place.text("broker")]);
    if let Some(url) = url {
        command.args(["--url", url]);
    }
    command
}

pub(crate) fn text(command: &mut Command) -> String {
    String::from_utf8(run(command).stdout).unwrap()
}

/// Everything that an administrator does, the same in both ways.
fn administer(place: &Place, url: Option<&str>) {
    let secret = place.write("secret", "s3cret");
    let put = |path: &str| run(&mut admin(place, url, &["resource", "put", path, &secret]));
    put("one/key/1");
    put("two/key/1");
    assert_eq!(text(&mut admin(place, url, &["resource", "ls"])), "one/key/1\ntwo/key/1\n");
    run(&mut admin(place, url, &["resource", "rm", "two/key/1"]));
    let listed: Value = serde_json::from_str(&text(&mut admin(place, url, &["resource", "ls", "--json"]))).unwrap();
    assert_eq!((listed[0]["path"].as_str(), listed.as_array().unwrap().len()), (Some("one/key/1"), 1));
    let key = place.write("volume.key", "k".repeat(32));
    run(&mut admin(place, url, &["resource", "put", "--kind", "volume-key", "--lease", "60", "one/volume/1", &key]));
    assert_eq!(text(&mut admin(place, url, &["resource", "rotate", "one/volume/1"])), "version 2\n");
    assert!(
        text(&mut admin(place, url, &["resource", "ls", "-l"])).contains("one/volume/1  volume-key  2        60 s")
    );
    for (arguments, code) in [
        (&["resource", "rm", "no/such/thing"][..], 4),
        (&["resource", "put", "not-a-path", &secret], 2),
        (&["resource", "put", "a/b/c", "/no/such/file"], 5),
        (&["reference", "show", "no.such"], 4),
        (&["policy", "show-resource", "--scope", "nowhere"], 4),
        (&["policy", "set-resource", &secret], 2),
    ] {
        let output = admin(place, url, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{url:?} {arguments:?}: {}", said(&output));
    }
    let policy = "package policy\nimport rego.v1\ndefault allow := false\n";
    let file = place.write("policy.rego", policy);
    run(&mut admin(place, url, &["policy", "set-resource", "--scope", "closed", &file]));
    assert_eq!(text(&mut admin(place, url, &["policy", "show-resource", "--scope", "closed"])), policy);
    assert!(text(&mut admin(place, url, &["policy", "show-resource"])).contains("default allow := false"));
    run(&mut admin(place, url, &["policy", "rm-resource", "--scope", "closed"]));
    assert_eq!(
        admin(place, url, &["policy", "rm-resource", "--scope", "closed"]).output().unwrap().status.code(),
        Some(4)
    );
    let public =
        place.write("tina.pub", text(&mut place.nacre("unused", &["attest", "sim-key", &place.text("tina.key")])));
    run(&mut admin(place, url, &["admin", "add", "--role", "operator", "--repository", "team", "tina", &public]));
    assert!(text(&mut admin(place, url, &["admin", "ls"])).contains("tina  operator  team"));
    run(&mut admin(place, url, &["admin", "rm", "tina"]));
    fs::remove_file(place.at("tina.key")).unwrap();
    assert_eq!(text(&mut admin(place, url, &["lease", "ls", "--json"])).trim(), "[]");
    assert_eq!(text(&mut admin(place, url, &["anchor", "ls", "--json"])).trim(), "[]");
    for list in [&["guest", "ls", "--json"][..], &["guest", "ls", "--refused", "--json"]] {
        assert_eq!(text(&mut admin(place, url, list)).trim(), "[]");
    }
    assert_eq!(admin(place, url, &["guest", "show", "a0"]).output().unwrap().status.code(), Some(4));
    assert_eq!(admin(place, url, &["guest", "ls", "--before", "r0"]).output().unwrap().status.code(), Some(2));
    for missing in [&["lease", "revoke", "no-such"][..], &["anchor", "rm", "no/such"], &["admin", "rm", "nobody"]] {
        assert_eq!(admin(place, url, missing).output().unwrap().status.code(), Some(4), "{missing:?}");
    }
    let verified = text(&mut admin(place, url, &["audit", "verify"]));
    let head = verified.lines().nth(1).unwrap();
    run(&mut admin(place, url, &["audit", "verify", "--head", head]));
    let other = format!("{}0", &head[..head.len() - 1]);
    let output = admin(
        place,
        url,
        &["audit", "verify", "--head", &if other == head { format!("{}1", &head[..head.len() - 1]) } else { other }],
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    run(&mut admin(place, url, &["reference", "set", "sim.svn", "7", "8", "--expires", "2099-01-01T00:00:00Z"]));
    let shown: Value = serde_json::from_str(&text(&mut admin(place, url, &["reference", "show", "sim.svn"]))).unwrap();
    assert_eq!(shown, json!(["7", 7, "8", 8]));
    let entries: Value = serde_json::from_str(&text(&mut admin(place, url, &["audit", "--json"]))).unwrap();
    let entries = entries.as_array().unwrap();
    assert!(entries.len() >= 5, "{entries:?}");
    let last = entries.len().to_string();
    assert_eq!(text(&mut admin(place, url, &["audit", "--json", "--after", &last])).trim(), "[]");
    assert!(text(&mut admin(place, url, &["audit"])).starts_with("NUMBER"));
    assert_eq!(text(&mut admin(place, url, &["token"])).trim().split('.').count(), 3);
    assert_eq!(text(&mut admin(place, url, &["token", "--seconds", "3600"])).trim().split('.').count(), 3);
    assert_eq!(admin(place, url, &["token", "--seconds", "3601"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn a_broker_is_administered_by_its_files() {
    let place = Place::new();
    init(&place);
    let again = place.nacre("unused", &["broker", "init", "--dir", &place.text("broker")]).output().unwrap();
    assert_eq!(again.status.code(), Some(6), "{}", said(&again));
    administer(&place, None);
}

#[test]
fn a_master_key_is_rotated_and_the_old_one_opens_nothing() {
    let place = Place::new();
    init(&place);
    let secret = place.write("secret", "s3cret");
    run(&mut admin(&place, None, &["resource", "put", "one/key/1", &secret]));
    let old = fs::read(place.at("broker").join("master.key")).unwrap();
    run(&mut admin(&place, None, &["master", "rotate", "--keep-old", "file:second.key"]));
    let names = text(&mut admin(&place, None, &["master", "ls"]));
    assert_eq!((names.lines().count(), names.matches("(in use)").count()), (2, 1), "{names}");
    let first = names.lines().find(|line| !line.contains("in use")).unwrap();
    run(&mut admin(&place, None, &["master", "forget", first]));
    run(&mut admin(&place, None, &["master", "rotate", "--reseal", "file:third.key"]));
    assert!(fs::read_to_string(place.at("broker").join("broker.toml")).unwrap().contains("third.key"));
    fs::write(place.at("broker").join("third.key"), old).unwrap();
    let output = admin(&place, None, &["resource", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
}

#[test]
fn a_master_key_is_in_a_token() {
    let (Some(softhsm), Some(openssl)) = (require("softhsm2-util"), require("openssl")) else { return };
    let module = "/usr/lib/softhsm/libsofthsm2.so";
    if !std::path::Path::new(module).exists() {
        return nacre_testkit::skip("libsofthsm2.so is not where Debian has it");
    }
    let place = Place::new();
    fs::create_dir(place.at("tokens")).unwrap();
    let config = place.write("softhsm.conf", format!("directories.tokendir = {}\n", place.text("tokens")));
    let util = |arguments: &str| run(Command::new(&softhsm).env("SOFTHSM2_CONF", &config).args(arguments.split(' ')));
    run(Command::new(openssl).args(["genpkey", "-quiet", "-algorithm", "RSA", "-out", &place.text("rsa.pem")]));
    util("--init-token --free --label nacre --pin 1234 --so-pin 1234");
    util(&format!("--import {} --token nacre --label key --id a1 --pin 1234", place.text("rsa.pem")));
    let uri = format!("pkcs11:token=nacre;object=key;id=%a1?module-path={module}&pin-value=1234");
    let nacre = |arguments: &[&str]| {
        let mut command = place.nacre("unused", arguments);
        // SoftHSM knows no other hash for OAEP.
        command
            .args(["--dir", &place.text("broker")])
            .env("SOFTHSM2_CONF", &config)
            .env("OCICRYPT_OAEP_HASHALG", "sha1");
        command
    };
    run(&mut nacre(&["broker", "init", "--master-key", &uri]));
    assert!(!place.at("broker").join("master.key").exists());
    let secret = place.write("secret", "s3cret");
    run(&mut nacre(&["broker", "resource", "put", "one/key/1", &secret]));
    assert_eq!(text(&mut nacre(&["broker", "resource", "ls"])), "one/key/1\n");
    run(&mut nacre(&["broker", "master", "rotate", "file:master.key"]));
    assert_eq!(
        text(&mut place.nacre("unused", &["broker", "resource", "ls", "--dir", &place.text("broker")])),
        "one/key/1\n"
    );
}

#[test]
fn a_replica_that_is_killed_loses_nothing() {
    let Some(database) = nacre_testkit::Postgres::start(None) else { return };
    let place = Place::new();
    let init = ["broker", "init", "--allow-simulated", "--database", &database.url(), "--dir", &place.text("broker")];
    run(&mut place.nacre("unused", &init));
    let secret = place.write("secret", "s3cret");
    run(&mut admin(&place, None, &["resource", "put", "one/key/1", &secret]));
    let program = place.write("program", "a guest");
    let platform = place.write("p.pub", text(&mut place.nacre("unused", &["attest", "sim-key", &place.text("p.key")])));
    run(&mut admin(&place, None, &["trust-sim", &platform]));
    let measurement = text(&mut place.nacre("unused", &["attest", "measure", &program]));
    run(&mut admin(&place, None, &["reference", "set", "sim.measurement", measurement.trim()]));
    let (mut one, two) = (Served::start(&place), Served::start(&place));
    let key = nacre_core::jose::PrivateKey::from_bytes(&fs::read(place.at("p.key")).unwrap()).unwrap();
    let attester = nacre_attest::sim::SimAttester::measuring(key, None, program.as_ref()).unwrap();
    let pem = |name: &str| fs::read_to_string(place.at("broker").join(name)).unwrap();
    let config = |url: &str| {
        nacre_attest::client::BrokerConfig::new(url).pin(Some(&pem("tls.crt")), Some(&pem("token.pub"))).unwrap()
    };
    let channel = |served: &Served| nacre_attest::client::Transport::new(&config(&served.url)).unwrap();
    // A challenge of one, which is killed before it is answered: the other takes the answer.
    use nacre_attest::{
        client::{Call, Credential},
        evidence::Attester as _,
        rcar,
    };
    let post = |served: &Served, path: &str, credential: Credential<'_>, body: Vec<u8>| {
        channel(served).call("test", path, credential, Call::Post("application/json", &body), 1 << 20).unwrap()
    };
    let request = serde_json::to_vec(&rcar::Request::new("sim")).unwrap();
    let reply = post(&one, "/kbs/v0/auth", Credential::None, request);
    let (session, challenge) = (reply.session.unwrap(), rcar::Challenge::parse(&reply.body).unwrap());
    one.child.kill().unwrap();
    one.child.wait().unwrap();
    let tee_key = nacre_core::jose::PrivateKey::generate_p256();
    let runtime_data = rcar::RuntimeData {
        nonce: challenge.nonce,
        tee_pubkey: serde_json::to_value(nacre_core::jose::Jwk::from_public(&tee_key.public())).unwrap(),
    };
    let bound = rcar::report_data(&runtime_data, "").unwrap();
    let message = rcar::Attestation {
        init_data: None,
        runtime_data,
        tee_evidence: rcar::CompositeEvidence {
            primary_evidence: attester.evidence(&bound).unwrap(),
            additional_evidence: String::new(),
        },
    };
    let reply = post(&two, "/kbs/v0/attest", Credential::Session(&session), serde_json::to_vec(&message).unwrap());
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    let path = "/kbs/v0/resource/one/key/1";
    let reply = channel(&two).call("test", path, Credential::Session(&session), Call::Get, 1 << 20).unwrap();
    let jwe = nacre_core::jose::Jwe::parse(&reply.body).unwrap();
    assert_eq!(jwe.decrypt(&[tee_key]).unwrap().expose(), b"s3cret");
    two.end();
    assert!(text(&mut admin(&place, None, &["audit"])).contains("released"));
}

#[test]
fn a_broker_is_administered_by_its_address() {
    let place = Place::new();
    init(&place);
    let served = Served::start(&place);
    administer(&place, Some(&served.url));
    // Its files are its own meanwhile.
    let output = admin(&place, None, &["resource", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    assert!(said(&output).contains("--url"), "{}", said(&output));
    // Another administrator's key opens nothing.
    let stranger = place.text("stranger.key");
    run(&mut place.nacre("unused", &["attest", "sim-key", &stranger]));
    let output = admin(&place, Some(&served.url), &["resource", "ls", "--admin-key", &stranger]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    served.end();
    run(&mut admin(&place, None, &["resource", "ls"]));
}

/// An image in a registry, encrypted with a key at a broker, and what a guest needs to get at it.
pub(crate) struct Scene {
    pub(crate) place: Place,
    registry: Registry,
    pub(crate) served: Served,
}

impl Scene {
    pub(crate) const KEY: &str = "default/image-key/app";

    pub(crate) fn new() -> Self {
        let (place, registry) = (Place::new(), Registry::memory().unwrap());
        init(&place);
        let served = Served::start(&place);
        let scene = Self { place, registry, served };
        let key = scene.place.write("image.key", nacre_testkit::Rng::new(42).bytes(32));
        scene.admin(&["resource", "put", Self::KEY, &key]);
        let platform =
            text(&mut scene.place.nacre("unused", &["attest", "sim-key", &scene.place.text("platform.key")]));
        let platform = scene.place.write("platform.pub", platform);
        scene.admin(&["trust-sim", &platform]);
        scene.init_data("one");
        runnable(&scene.place, "cat /second").write_layout(&scene.place.at("layout"), "v1");
        let recipient =
            format!("provider:attestation-agent:keyid=kbs:///{}::keypath={key}::algorithm=A256GCM", Self::KEY);
        let source = format!("oci:{}:v1", scene.place.text("layout"));
        let copy =
            ["image", "copy", "--quiet", "--insecure-registry", "--encrypt", &recipient, &source, &scene.image()];
        run(&mut scene.place.nacre("unused", &copy));
        scene
    }

    /// Starts the broker again, with the settings that it has now.
    pub(crate) fn serve_again(&mut self) {
        self.serve_again_with(|_| ());
    }

    /// The same, of a program that is run in another way.
    pub(crate) fn serve_again_with(&mut self, change: impl FnOnce(&mut Command)) {
        let _ = (self.served.child.kill(), self.served.child.wait());
        self.served = Served::start_with(&self.place, change);
    }

    pub(crate) fn admin(&self, arguments: &[&str]) {
        run(&mut admin(&self.place, Some(&self.served.url), arguments));
    }

    pub(crate) fn admin_command(&self, arguments: &[&str]) -> Command {
        admin(&self.place, Some(&self.served.url), arguments)
    }

    pub(crate) fn image(&self) -> String {
        format!("docker://{}/t/secret:1", self.registry.host())
    }

    /// Writes init data, and gives their digest.
    pub(crate) fn init_data(&self, content: &str) -> String {
        let data = format!("algorithm = \"sha384\"\nversion = \"0.1.0\"\n[data]\n\"note\" = '{content}'\n");
        let path = self.place.write("initdata.toml", data);
        text(&mut self.place.nacre("unused", &["attest", "init-data", &path])).trim().to_owned()
    }

    pub(crate) fn guest(&self, arguments: &[&str]) -> Command {
        let mut command = self.place.nacre("store", arguments);
        command.args(["--broker", &self.served.url]);
        for (flag, file) in [
            ("--broker-cert", "broker/tls.crt"),
            ("--broker-token-key", "broker/token.pub"),
            ("--sim-platform-key", "platform.key"),
            ("--init-data", "initdata.toml"),
        ] {
            command.args([flag, &self.place.text(file)]);
        }
        command
    }

    fn pull(&self) -> Command {
        self.guest(&["image", "pull", "--quiet", "--insecure-policy", "--insecure-registry", &self.image()])
    }
}

#[test]
fn a_key_is_released_to_the_guest_that_is_expected_and_to_no_other() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    // Nobody said yet what is expected.
    assert_refused(&scene.pull().output().unwrap(), &["executables"]);
    let other = scene.place.write("program", "another program");
    for (program, expected) in [(other.as_str(), false), (env!("CARGO_BIN_EXE_nacre"), true)] {
        let measurement = text(&mut scene.place.nacre("unused", &["attest", "measure", program]));
        scene.admin(&["reference", "set", "sim.measurement", measurement.trim()]);
        let output = scene.pull().output().unwrap();
        if expected {
            assert!(output.status.success(), "{}", said(&output));
        } else {
            assert_refused(&output, &["executables", &measurement_of_us()[..24]]);
            scene.place.assert_empty("store");
        }
    }
    let options = ["--insecure-policy", "--insecure-registry", &scene.image()];
    let output = run(scene.guest(&["run", "--quiet"]).args(options));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "zstd\n");
    assert_eq!(text(&mut scene.guest(&["attest", "token"])).trim().split('.').count(), 3);

    // Init data that are expected, and others.
    let digest = scene.init_data("one");
    scene.admin(&["reference", "set", "sim.init_data", &digest]);
    // Evidence has it as a number.
    scene.admin(&["reference", "set", "sim.svn", "2"]);
    assert_refused(&scene.pull().output().unwrap(), &["hardware"]);
    scene.admin(&["reference", "set", "sim.svn", "1"]);
    run(&mut scene.pull());
    scene.init_data("two");
    // The layers are in the store, and still their key is asked for.
    assert_refused(&scene.pull().output().unwrap(), &["configuration"]);
    scene.init_data("one");

    let audit = text(&mut admin(&scene.place, Some(&scene.served.url), &["audit"]));
    for part in ["attested (simulated)", "released (simulated)", "release refused (simulated)", Scene::KEY] {
        assert!(audit.contains(part), "'{part}' is not in: {audit}");
    }

    // The same, guest by guest: the newest is the one with other init data.
    let guests: Value = serde_json::from_str(&text(&mut scene.admin_command(&["guest", "ls", "--json"]))).unwrap();
    let names: Vec<&str> = guests[0].as_object().unwrap().keys().map(String::as_str).collect();
    let members = ["id", "time", "tee", "guest", "measurement", "simulated", "verdict", "claims", "policy", "tenants"];
    assert!(members.iter().all(|name| names.contains(name)) && names.len() == members.len(), "{names:?}");
    assert_eq!((guests[0]["verdict"].as_str(), guests[0]["tee"].as_str()), (Some("warning"), Some("sim")));
    let id = guests[0]["id"].as_str().unwrap();
    let chain: Value = serde_json::from_str(&text(&mut scene.admin_command(&["guest", "show", id, "--json"]))).unwrap();
    let stages: Vec<_> =
        chain["chain"].as_array().unwrap().iter().map(|stage| (&stage["id"], &stage["verdict"])).collect();
    assert_eq!(
        (stages.len(), stages[2], stages[3]),
        (8, (&json!("firmware"), &json!("passed")), (&json!("configuration"), &json!("failed")))
    );
    let shown = text(&mut scene.admin_command(&["guest", "show", id]));
    for part in ["4. Init data and policy: failed", &format!("expected: {digest}"), "found:    ", "release refused"] {
        assert!(shown.contains(part), "'{part}' is not in: {shown}");
    }
    assert!(text(&mut scene.admin_command(&["guest", "ls"])).contains("executables=3"));

    // A broker that cannot be reached is another matter than one that refuses.
    let mut command = scene.pull();
    let mut scene = scene;
    scene.served.child.kill().unwrap();
    scene.served.child.wait().unwrap();
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
}

pub(crate) fn measurement_of_us() -> String {
    let digest = nacre_attest::sim::measure(env!("CARGO_BIN_EXE_nacre").as_ref()).unwrap();
    digest.hex()
}

#[test]
fn a_broker_with_another_certificate_or_token_key_is_not_asked() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let measurement = measurement_of_us();
    scene.admin(&["reference", "set", "sim.measurement", &measurement]);
    let other = Place::new();
    init(&other);
    for file in ["broker/tls.crt", "broker/token.pub"] {
        let kept = fs::read(scene.place.at(file)).unwrap();
        fs::copy(other.at(file), scene.place.at(file)).unwrap();
        let output = scene.pull().output().unwrap();
        assert!([Some(3), Some(5)].contains(&output.status.code()), "{file}: {}", said(&output));
        assert!(said(&output).contains("pinned"), "{file}: {}", said(&output));
        fs::File::create(scene.place.at(file)).unwrap().write_all(&kept).unwrap();
    }
    run(&mut scene.pull());
}

#[test]
fn a_disks_key_is_released_to_the_guest_that_is_expected() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let key = format!("kbs:///{}", Scene::KEY);
    let format = || scene.guest(&["disk", "format", "--quiet", "--size", "32M", "--key-resource", &key, "disk"]);
    let refused = format().output().unwrap();
    assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
    assert!(!scene.place.at("disk").exists());
    let measurement = text(&mut scene.place.nacre("unused", &["attest", "measure", env!("CARGO_BIN_EXE_nacre")]));
    scene.admin(&["reference", "set", "sim.measurement", measurement.trim()]);
    run(&mut format());
    run(&mut scene.guest(&["disk", "info", "--key-resource", &key, "disk"]));
    // The resource is the key itself.
    run(&mut scene.place.nacre("unused", &["disk", "info", "--key-file", &scene.place.text("image.key"), "disk"]));
}

#[test]
fn a_disk_is_anchored_at_the_broker_and_closed_when_its_key_is_revoked() {
    if !root() {
        return;
    }
    let Some(nbdcopy) = require("nbdcopy") else { return };
    let scene = Scene::new();
    scene.admin(&["reference", "set", "sim.measurement", &measurement_of_us()]);
    scene.admin(&["resource", "put", "--lease", "6", Scene::KEY, &scene.place.text("image.key")]);
    let key = format!("kbs:///{}", Scene::KEY);
    let disk = |verb: &str, more: &[&str]| {
        let mut command = scene.guest(&["disk", verb, "--key-resource", &key, "--anchor", "broker:t/disk"]);
        command.args(more);
        command
    };
    run(&mut disk("format", &["--quiet", "--size", "32M", "disk"]));
    fs::copy(scene.place.at("disk"), scene.place.at("older")).unwrap();
    let socket = scene.place.text("nbd.sock");
    let serve = || {
        let mut child = disk("serve", &["--socket", &socket, "disk"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("serving at"), "{line}");
        child
    };
    let mut child = serve();
    assert!(text(&mut scene.admin_command(&["anchor", "ls"])).contains("t/disk"));
    assert!(text(&mut scene.admin_command(&["lease", "ls"])).contains("until"));
    let data = scene.place.write("data", nacre_testkit::Rng::new(7).bytes(1 << 20));
    run(Command::new(nbdcopy).args(["--flush", &data, &format!("nbd+unix:///?socket={socket}")]));
    // Longer than a lease: it is renewed.
    std::thread::sleep(Duration::from_secs(8));
    assert!(child.try_wait().unwrap().is_none());
    scene.admin(&["lease", "revoke", "--resource", Scene::KEY]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("revoked"), "{}", said(&output));
    // An older copy is a rollback, wherever it is.
    fs::copy(scene.place.at("older"), scene.place.at("disk")).unwrap();
    let output = disk("info", &["disk"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("broker"), "{}", said(&output));
}

#[test]
fn a_policy_is_tested_on_a_token_and_signed_values_are_taken() {
    let scene = Scene::new();
    let token = scene.place.write("token", text(&mut scene.guest(&["attest", "token"])));
    let test = |more: &[&str]| {
        let mut command = scene.admin_command(&["policy", "test", "--token", &token]);
        command.args(more);
        command.output().unwrap()
    };
    let output = test(&[]);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(shown.lines().any(|line| line.starts_with('!') && line.contains("sim.measurement")), "{shown}");
    let output = test(&["--resource", Scene::KEY]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.lines().any(|line| line.starts_with('!')) && shown.contains("false"), "{shown}");
    let open = scene.place.write("open.rego", "package policy\nallow := true\n");
    assert_eq!(test(&["--resource", Scene::KEY, "--policy", &open]).status.code(), Some(0));
    // Values by a signer, in place of an administrator's.
    let public = scene
        .place
        .write("b.pub", text(&mut scene.place.nacre("unused", &["attest", "sim-key", &scene.place.text("b.key")])));
    scene.admin(&["reference", "signer", "add", "--prefix", "sim.", "builder", &public]);
    let value = format!("sim.measurement={}", measurement_of_us());
    let sign = ["broker", "reference", "sign", "--issuer", "builder", "--expires", "2099-01-01T00:00:00Z", "--key"];
    let document = text(scene.place.nacre("unused", &sign).args([&scene.place.text("b.key"), &value]));
    let document = scene.place.write("document", &document);
    scene.admin(&["reference", "import", &document]);
    let again = scene.admin_command(&["reference", "import", &document]).output().unwrap();
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    // What begins as a CoRIM is read as one.
    let unsigned = scene.place.write("values.corim", [0xd2, 0x84, 0x40, 0xa0, 0xf6, 0x40]);
    let refused = scene.admin_command(&["reference", "import", &unsigned]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("CoRIM: its payload is elsewhere"), "{}", said(&refused));
    assert!(text(&mut scene.admin_command(&["reference", "ls"])).contains("builder"));
    assert!(text(&mut scene.admin_command(&["reference", "signer", "ls"])).contains("builder"));
    let token = scene.place.write("token", text(&mut scene.guest(&["attest", "token"])));
    run(&mut scene.admin_command(&["policy", "test", "--token", &token, "--resource", Scene::KEY]));
    assert!(text(&mut scene.admin_command(&["policy", "show-attestation"])).contains("package policy"));
    scene.admin(&["reference", "rm", "sim.measurement"]);
    scene.admin(&["reference", "signer", "rm", "--values", "builder"]);
}

#[test]
fn a_lazy_images_key_is_released_to_the_guest_that_is_expected() {
    if !root() {
        return;
    }
    let mut scene = Scene::new();
    let key = scene.place.text("image.key");
    let recipient = format!("provider:attestation-agent:keyid=kbs:///{}::keypath={key}::algorithm=A256GCM", Scene::KEY);
    let image = format!("docker://{}/t/lazy:1", scene.registry.host());
    let source = format!("oci:{}:v1", scene.place.text("layout"));
    let copy = ["image", "copy", "--lazy", "--quiet", "--insecure-registry", "--encrypt", &recipient, &source, &image];
    run(&mut scene.place.nacre("unused", &copy));
    let (target, other) = (scene.place.at("mounted"), scene.place.at("other"));
    fs::create_dir(&target).unwrap();
    fs::create_dir(&other).unwrap();
    let policy = ["--insecure-policy", "--insecure-registry"];
    let mount = |scene: &Scene| scene.guest(&["image", "mount", &image]).args(policy).arg(&target).output().unwrap();
    assert_refused(&mount(&scene), &["executables"]);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    scene.admin(&["reference", "set", "sim.measurement", &measurement_of_us()]);
    let output = mount(&scene);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read_to_string(target.join("second")).unwrap(), "zstd\n");
    let output = run(scene.guest(&["run", "--quiet", "--runtime", "builtin", &image]).args(policy));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "zstd\n");
    // The broker is not asked again by what is mounted already, nor by the daemon's successor.
    scene.served.child.kill().unwrap();
    scene.served.child.wait().unwrap();
    run(&mut scene.place.nacre("store", &["image", "daemon", "restart"]));
    assert_eq!(fs::read_to_string(target.join("third")).unwrap(), "gzip\n");
    let output = scene.guest(&["image", "mount", &image]).args(policy).arg(&other).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "a new mount asks for the key: {}", said(&output));
    run(scene.place.nacre("store", &["image", "umount"]).arg(&target));
}

/// The key is lent: who mounts has to run on to renew its lease, and the image goes with it.
#[test]
fn a_lazy_image_whose_key_was_lent_goes_with_its_lease() {
    if !root() {
        return;
    }
    let scene = Scene::new();
    let key = scene.place.text("image.key");
    let recipient = format!("provider:attestation-agent:keyid=kbs:///{}::keypath={key}::algorithm=A256GCM", Scene::KEY);
    let image = format!("docker://{}/t/lazy:1", scene.registry.host());
    let source = format!("oci:{}:v1", scene.place.text("layout"));
    let copy = ["image", "copy", "--lazy", "--quiet", "--insecure-registry", "--encrypt", &recipient, &source, &image];
    run(&mut scene.place.nacre("unused", &copy));
    scene.admin(&["resource", "put", "--lease", "5", Scene::KEY, &key]);
    scene.admin(&["reference", "set", "sim.measurement", &measurement_of_us()]);
    let target = scene.place.at("mounted");
    fs::create_dir(&target).unwrap();
    let policy = ["--insecure-policy", "--insecure-registry"];
    let mount = |more: &[&str]| {
        let mut command = scene.guest(&["image", "mount", &image]);
        command.args(policy).args(more).arg(&target);
        command
    };
    let output = mount(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--foreground"), "{}", said(&output));
    let child = mount(&["--foreground"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !target.join("second").exists() {
        assert!(Instant::now() < deadline, "nothing is mounted");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(fs::read_to_string(target.join("second")).unwrap(), "zstd\n", "the lease is renewed");
    let output = run(scene.guest(&["run", "--quiet", "--lazy", "--runtime", "builtin", &image]).args(policy));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "zstd\n");
    scene.admin(&["lease", "revoke", "--resource", Scene::KEY]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("revoked"), "{}", said(&output));
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

//! What a guest's programs measure before they do it, as the broker sees it: by the replay of the log against what the TEE signed.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use nacre_attest::eventlog::tcg;
use nacre_core::Digest;
use nacre_testkit::{Rng, Swtpm, TpmMaker, root, run};
use serde_json::{Value, json};

use crate::{
    broker::{Scene, measurement_of_us, text},
    support::{assert_refused, said},
};

/// A guest with an event log, of a simulated TEE or of a TPM.
struct Guest {
    scene: Scene,
    tpm: Option<Swtpm>,
}

impl Guest {
    fn new(tpm: Option<Swtpm>) -> Self {
        let guest = Self { scene: Scene::new(), tpm };
        let place = &guest.scene.place;
        place.write("accept.json", r#"{"default":[{"type":"insecureAcceptAnything"}]}"#);
        place.write("disk.key", [7; 32]);
        let tee = match &guest.tpm {
            Some(tpm) => format!("tee = 'tpm'\ntpm = '{}'\n", tpm.address()),
            None => format!("tee = 'sim'\nsim_platform_key = '{}'\n", place.text("platform.key")),
        };
        let config = format!(
            "[broker]\nurl = '{}'\ncertificate = '{}'\ntoken_key = '{}'\nevents = '{}'\ninit_data = '{}'\n{tee}\
             [trust]\npolicy = '{}'\n",
            guest.scene.served.url,
            place.text("broker/tls.crt"),
            place.text("broker/token.pub"),
            place.text("events"),
            place.text("initdata.toml"),
            place.text("accept.json"),
        );
        place.write("nacre.toml", config);
        guest
    }

    fn nacre(&self, arguments: &[&str]) -> Command {
        let mut command = self.scene.place.nacre("store", &["--config", "nacre.toml"]);
        command.env("NACRE_RUN", self.scene.place.at("run")).args(arguments);
        command
    }

    /// With the broker started again, at another port.
    fn restarted(mut self) -> Self {
        let before = self.scene.served.url.clone();
        self.scene.serve_again();
        let config = fs::read_to_string(self.scene.place.at("nacre.toml")).unwrap();
        self.scene.place.write("nacre.toml", config.replace(&before, &self.scene.served.url));
        self
    }

    /// A disk with a key of its own.
    fn disk(&self, name: &str) {
        run(&mut self.nacre(&["disk", "format", "--quiet", "--size", "32M", "--key-file", "disk.key", name]));
    }

    fn serve(&self, name: &str) -> Child {
        let (socket, file) = (format!("{name}.sock"), ["--key-file", "disk.key", name]);
        let mut command = self.nacre(&["disk", "serve", "--socket", &socket]);
        command.args(file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// What the broker made of the guest, as it is in the token.
    fn appraised(&self) -> Value {
        let token = text(&mut self.nacre(&["attest", "token"]));
        let claims = BASE64_URL_SAFE_NO_PAD.decode(token.trim().split('.').nth(1).unwrap()).unwrap();
        serde_json::from_slice::<Value>(&claims).unwrap()["submods"]["cpu0"].clone()
    }

    /// What it did, by the replay of its log.
    fn runtime(&self, appraised: &Value) -> Value {
        let tee = if self.tpm.is_some() { "tpm" } else { "sim" };
        appraised["ear.veraison.annotated-evidence"][tee]["runtime"].clone()
    }
}

/// Waits until it serves.
fn serving(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("serving at"), "{line}");
}

fn ended(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_guests_programs_measure_what_they_do_and_the_broker_fills_its_claims_from_that() {
    if !root() {
        return;
    }
    let guest = Guest::new(None);
    let scene = &guest.scene;
    let policy = fs::read(scene.place.at("accept.json")).unwrap();
    scene.admin(&["reference", "set", "sim.measurement", &measurement_of_us()]);
    scene.admin(&["reference", "set", "image_policy", &Digest::sha256(&policy).to_string()]);
    let output = run(&mut guest.nacre(&["run", "--quiet", "--insecure-registry", &scene.image()]));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "zstd\n");
    // Whoever looks at an image judges none.
    run(&mut guest.nacre(&["image", "inspect", "--json", "--insecure-registry", &scene.image()]));
    guest.disk("disk");
    let mut child = guest.serve("disk");
    serving(&mut child);
    ended(child);

    let appraised = guest.appraised();
    let runtime = guest.runtime(&appraised);
    assert_eq!(runtime["replayed"], true, "{appraised}");
    assert_eq!(runtime["policies"], json!([Digest::sha256(&policy).to_string()]));
    assert_eq!(runtime["keys"], json!([Scene::KEY]));
    let init_data =
        nacre_attest::initdata::InitData::parse(&fs::read_to_string(scene.place.at("initdata.toml")).unwrap());
    assert_eq!(runtime["init_data"], nacre_attest::evidence::hex(init_data.unwrap().digest().as_bytes()));
    let (image, workload) = (&runtime["images"][0], &runtime["workloads"][0]);
    assert_eq!((&image["image"], &image["digest"]), (&json!(scene.image()), &workload["digest"]));
    let info = run(&mut guest.nacre(&["disk", "info", "--json", "--key-file", "disk.key", "disk"]));
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let volume = &runtime["volumes"][0];
    assert_eq!(
        (&volume["id"], &volume["anchor"], &volume["protection"]),
        (&info["uuid"], &json!("none"), &json!("disk"))
    );
    assert_eq!(volume["root"].as_str().map(str::len), Some(64));
    for (list, count) in [("policies", 1), ("images", 1), ("volumes", 1), ("keys", 1), ("workloads", 1)] {
        assert_eq!(runtime["counts"][list], count, "{list}");
    }
    let vector = &appraised["ear.trustworthiness-vector"];
    assert_eq!((&vector["file-system"], &vector["storage-opaque"]), (&json!(2), &json!(2)));

    // Another policy than the one that is expected.
    scene.place.write("accept.json", r#"{ "default": [{"type":"insecureAcceptAnything"}] }"#);
    let pull = ["image", "pull", "--quiet", "--insecure-registry", &scene.image()];
    assert_refused(&guest.nacre(&pull).output().unwrap(), &["file-system"]);
    assert_eq!(guest.appraised()["ear.trustworthiness-vector"]["file-system"], 32);
    // A log that somebody shortened is nobody's: neither is more measured, nor anything done that has to be.
    let log = scene.place.at("events/sim.events");
    let bytes = fs::read(&log).unwrap();
    let (_, rest) = tcg::parse_entry(&bytes, nacre_attest::eventlog::Bank::Sha384).unwrap().unwrap();
    fs::write(&log, rest).unwrap();
    for arguments in [&["attest", "token"][..], &["disk", "serve", "--socket", "s", "--key-file", "disk.key", "disk"]] {
        let output = guest.nacre(arguments).output().unwrap();
        assert!(!output.status.success() && said(&output).contains("started anew"), "{}", said(&output));
    }
    fs::write(&log, &bytes).unwrap();
    guest.appraised();
}

#[test]
fn programs_side_by_side_on_one_tpm_measure_into_one_log_whoever_is_killed() {
    if !root() {
        return;
    }
    let Some(tpm) = Swtpm::start() else { return };
    let guest = Guest::new(Some(tpm));
    let disks: Vec<String> = (0..4).map(|number| format!("disk{number}")).collect();
    disks.iter().for_each(|disk| guest.disk(disk));
    let mut random = Rng::new(11);
    for _ in 0..3 {
        // The last two are killed at any instant.
        let mut children: Vec<Child> = disks.iter().map(|disk| guest.serve(disk)).collect();
        let tokens: Vec<Child> = (0..2)
            .map(|_| guest.nacre(&["attest", "token"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
            .collect();
        thread::sleep(Duration::from_millis(50 + random.next_u64() % 400));
        children.drain(2..).for_each(ended);
        for child in &mut children {
            serving(child);
        }
        children.into_iter().for_each(ended);
        for child in tokens {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", said(&output));
        }
    }
    let appraised = guest.appraised();
    let runtime = guest.runtime(&appraised);
    assert_eq!(runtime["replayed"], true, "{appraised}");
    let volumes = runtime["volumes"].as_array().unwrap();
    assert!(volumes.len() >= 2 && runtime["unknown"] == 0, "{runtime}");
    for disk in ["disk0", "disk1"] {
        let info = run(&mut guest.nacre(&["disk", "info", "--json", "--key-file", "disk.key", disk]));
        let info: Value = serde_json::from_slice(&info.stdout).unwrap();
        assert!(volumes.iter().any(|volume| volume["id"] == info["uuid"]), "{disk}: {runtime}");
    }
    assert_eq!(appraised["ear.trustworthiness-vector"]["storage-opaque"], 2);
}

#[test]
fn a_tpms_key_is_enrolled_listed_and_revoked_by_the_programs() {
    if !root() {
        return;
    }
    let Some(maker) = TpmMaker::new() else { return };
    let Some(tpm) = Swtpm::made_by(&maker) else { return };
    let guest = Guest::new(Some(tpm));
    let (place, enrol) = (&guest.scene.place, ["attest", "enrol"]);
    let output = guest.nacre(&enrol).output().unwrap();
    assert!(!output.status.success() && said(&output).contains("ek_roots"), "{}", said(&output));
    // The operator says whom he trusts, and starts the broker again.
    place.write("broker/ek-roots.pem", maker.authorities());
    let settings = fs::read_to_string(place.at("broker/broker.toml")).unwrap();
    place.write("broker/broker.toml", format!("ek_roots = 'ek-roots.pem'\n{settings}"));
    let guest = guest.restarted();
    let hardware = || guest.appraised()["ear.trustworthiness-vector"]["hardware"].clone();
    assert_eq!(hardware(), 97);
    let name = text(&mut guest.nacre(&enrol)).trim().to_owned();
    assert_eq!(hardware(), 2);
    assert!(text(&mut guest.scene.admin_command(&["enrolment", "ls"])).contains(&name));
    guest.scene.admin(&["enrolment", "revoke", &name]);
    assert_eq!(hardware(), 97);
    let listed = text(&mut guest.scene.admin_command(&["enrolment", "ls", "--json"]));
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert!(listed[0]["revoked"].is_i64() && listed[0]["name"] == name.as_str(), "{listed}");
    assert_refused(&guest.nacre(&enrol).output().unwrap(), &["revoked"]);
    guest.scene.admin(&["enrolment", "forget", &name]);
    let output = guest.scene.admin_command(&["enrolment", "forget", &name]).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    assert_eq!(text(&mut guest.nacre(&enrol)).trim(), name);
}

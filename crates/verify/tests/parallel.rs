//! Many processes of a guest use one event log, and some are killed: what they recorded replays, and quotes that are taken meanwhile hold.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    thread,
    time::Duration,
};

use nacre_attest::{
    attesters::tpm::{Ak, TpmAttester, TpmOptions, address},
    eventlog::story::Happening,
    evidence::{Attester, Expected, Verifier as _},
    sim::{SimAttester, SimVerifier, read_platform_key},
};
use nacre_core::jose::PrivateKey;
use nacre_testkit::{Rng, Swtpm};
use nacre_verify::{TpmRules, tpm::TpmVerifier};
use serde_json::Value;

/// Tells this program that it is a process of the guest: `TEE DIRECTORY TPM NAME EVENTS`.
const CHILD: &str = "NACRE_TEST_EVENTS";

/// A guest: its TEE, and where its log is.
struct Guest {
    tpm: Option<Swtpm>,
    directory: tempfile::TempDir,
}

impl Guest {
    fn simulated() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = PrivateKey::generate_p256();
        std::fs::write(directory.path().join("platform.key"), key.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
        Self { tpm: None, directory }
    }

    fn with_tpm() -> Option<Self> {
        Some(Self { tpm: Some(Swtpm::start()?), directory: tempfile::tempdir().unwrap() })
    }

    fn tpm(&self) -> String {
        self.tpm.as_ref().map(Swtpm::address).unwrap_or_default()
    }

    fn attester(&self) -> Arc<dyn Attester> {
        attester(self.directory.path(), &self.tpm())
    }

    /// A process that records events of that name.
    fn process(&self, name: &str, events: usize) -> Child {
        let what = format!("{} {} {name} {events}", self.directory.path().display(), self.tpm());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_process_of_the_guest"]).env(CHILD, what).stdout(std::process::Stdio::null());
        command.spawn().unwrap()
    }

    /// The keys that a quote of now says were asked for.
    fn quoted(&self, attester: &dyn Attester, number: u8) -> Vec<String> {
        let evidence = attester.evidence(&[number; 64]).unwrap();
        let expected = Expected { report_data: &[number; 64], init_data: None, now: 0 };
        let claims = match self.tpm {
            Some(_) => {
                let rules = TpmRules { require_log: true, ..TpmRules::default() };
                TpmVerifier::new(rules).verify(&evidence, &expected)
            }
            None => {
                let mut verifier = SimVerifier::new();
                let key = read_platform_key(&self.directory.path().join("platform.key")).unwrap();
                verifier.trust(key.public()).unwrap();
                verifier.verify(&evidence, &expected)
            }
        };
        let claims = claims.unwrap().into_inner();
        let runtime = claims.logs.get("runtime").cloned().unwrap_or_default();
        let keys = runtime["keys"].as_array().cloned().unwrap_or_default();
        keys.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

fn attester(directory: &Path, tpm: &str) -> Arc<dyn Attester> {
    if tpm.is_empty() {
        let key = read_platform_key(&directory.join("platform.key")).unwrap();
        return Arc::new(SimAttester::new(key, None).unwrap().events(directory).unwrap());
    }
    let options = TpmOptions {
        address: address(tpm),
        ak: Ak::Primary,
        firmware_log: directory.join("no-firmware-log"),
        log_dir: directory.to_owned(),
    };
    Arc::new(TpmAttester::new(&options, None).unwrap())
}

/// Not a test of its own: what the processes of the others do.
#[test]
fn a_process_of_the_guest() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let mut words = what.split(' ');
    let mut word = || words.next().unwrap().to_owned();
    let (directory, tpm, name) = (PathBuf::from(word()), word(), word());
    let events: usize = word().parse().unwrap();
    let attester = attester(&directory, &tpm);
    for number in 0..events {
        let resource = format!("of/{name}/{number}");
        attester.runtime_log().unwrap().record(&Happening::KeyReleased { resource }).unwrap();
    }
}

/// Processes side by side, quotes meanwhile, and some processes killed at any instant.
fn side_by_side(guest: &Guest, processes: usize, events: usize, victims: usize) {
    let attester = guest.attester();
    let mut lasting: Vec<Child> = (0..processes).map(|number| guest.process(&format!("p{number}"), events)).collect();
    let mut random = Rng::new(7);
    for victim in 0..victims {
        let mut child = guest.process(&format!("v{victim}"), 10_000);
        thread::sleep(Duration::from_millis(200 + random.next_u64() % 300));
        child.kill().unwrap();
        child.wait().unwrap();
        guest.quoted(&*attester, 7);
    }
    for child in &mut lasting {
        assert!(child.wait().unwrap().success());
    }
    let keys = guest.quoted(&*attester, 8);
    for process in 0..processes {
        let of: Vec<&str> = keys.iter().filter_map(|key| key.strip_prefix(&format!("of/p{process}/"))).collect();
        let expected: Vec<String> = (0..events).map(|number| number.to_string()).collect();
        assert_eq!(of, expected, "all of them, in their order");
    }
    for victim in 0..victims {
        let of = keys.iter().filter_map(|key| key.strip_prefix(&format!("of/v{victim}/")));
        assert!(of.enumerate().all(|(position, number)| *number == position.to_string()), "no gap");
    }
    assert!(keys.iter().any(|key| key.starts_with("of/v")), "somebody was killed at work");
}

#[test]
fn processes_of_a_simulated_guest_share_its_log_and_survive_each_others_deaths() {
    side_by_side(&Guest::simulated(), 8, 40, 10);
}

#[test]
fn processes_of_a_guest_with_a_tpm_share_its_log_and_survive_each_others_deaths() {
    let Some(guest) = Guest::with_tpm() else { return };
    side_by_side(&guest, 6, 15, 8);
}

//! Attesters of TEEs that this machine does not have, by directories that a thread serves as the kernel and Gramine do.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nacre_attest::{
    attesters::{Places, detect, sgx::SgxAttester, snp::SnpAttester, tdx::TdxAttester},
    eventlog::{Bank, aael, replay::extended, story::Happening, tcg},
    evidence::{Attester as _, AttesterError},
    initdata::InitData,
};
use nacre_core::Algorithm;

/// `configfs-tsm`: entries get their files when they are made, and the report when the report data were written.
struct Tsm {
    root: PathBuf,
    ended: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Tsm {
    fn serve(
        root: &Path,
        provider: &'static str,
        report: impl Fn(&[u8]) -> Vec<u8> + Send + 'static,
        generation: &'static str,
    ) -> Self {
        fs::create_dir_all(root).unwrap();
        let (served, ended) = (root.to_owned(), Arc::new(AtomicBool::new(false)));
        let end = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                for entry in fs::read_dir(&served).unwrap().flatten() {
                    let _ = step(&entry.path(), provider, &report, generation);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { root: root.to_owned(), ended, thread: Some(thread) }
    }
}

fn step(entry: &Path, provider: &str, report: &dyn Fn(&[u8]) -> Vec<u8>, generation: &str) -> std::io::Result<()> {
    let file = |name: &str| entry.join(name);
    if !file("inblob").exists() {
        fs::write(file("inblob"), b"")?;
        fs::write(file("provider.new"), format!("{provider}\n"))?;
        return fs::rename(file("provider.new"), file("provider"));
    }
    let data = fs::read(file("inblob"))?;
    if data.len() == 64 && !file("outblob").exists() {
        fs::write(file("generation"), generation)?;
        fs::write(file("auxblob"), b"")?;
        fs::write(file("outblob.new"), report(&data))?;
        fs::rename(file("outblob.new"), file("outblob"))?;
    }
    Ok(())
}

impl Drop for Tsm {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn init_data(text: &str) -> InitData {
    InitData::new(Algorithm::Sha384, [("a".into(), text.into())].into()).unwrap()
}

fn places(root: &Path) -> Places {
    Places {
        tsm: root.join("tsm"),
        tdx_registers: root.join("registers"),
        ccel: root.join("CCEL"),
        gramine: root.join("gramine"),
        tpm: root.join("tpmrm0"),
        tpm_log: root.join("log"),
    }
}

fn bytes_of(value: &serde_json::Value) -> Vec<u8> {
    base64::Engine::decode(&base64::prelude::BASE64_STANDARD, value.as_str().unwrap()).unwrap()
}

#[test]
fn snp_reports_come_from_configfs() {
    let directory = tempfile::tempdir().unwrap();
    let places = places(directory.path());
    assert_eq!(detect(&places), None);
    let report = |data: &[u8]| {
        let mut report = vec![0; 1184];
        report[0] = 3;
        report[0x50..0x90].copy_from_slice(data);
        report[0xc0..0xe0].copy_from_slice(&init_data("b").fit::<32>());
        report[0x188..0x18a].copy_from_slice(&[0x19, 1]);
        report
    };
    let _tsm = Tsm::serve(&places.tsm, "sev_guest", report, "1\n");
    assert_eq!(detect(&places), Some("snp"));
    let attester = SnpAttester::new(places.tsm.clone(), Some(init_data("b"))).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    assert_eq!(evidence["attestation_report"]["report_data"][63], 7);
    assert_eq!(evidence["cert_chain"], serde_json::Value::Null);
    assert!(attester.runtime_log().is_none());
    let error = SnpAttester::new(places.tsm, Some(init_data("c"))).unwrap_err();
    assert!(matches!(error, AttesterError::InitData { .. }), "{error}");
}

#[test]
fn a_report_that_somebody_else_asked_for_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let places = places(directory.path());
    let _tsm = Tsm::serve(&places.tsm, "sev_guest", |_| vec![3; 1184], "2\n");
    let error = SnpAttester::new(places.tsm, None).unwrap_err();
    assert!(error.to_string().contains("somebody else"), "{error}");
}

#[test]
fn tdx_quotes_and_their_log_are_of_one_moment() {
    let directory = tempfile::tempdir().unwrap();
    let places = places(directory.path());
    let quote = |data: &[u8]| {
        let mut quote = vec![0; 632];
        quote[0] = 4;
        quote[48 + 184..48 + 232].copy_from_slice(&init_data("b").fit::<48>());
        quote[48 + 520..].copy_from_slice(data);
        quote
    };
    let _tsm = Tsm::serve(&places.tsm, "tdx_guest", quote, "1\n");
    assert_eq!(detect(&places), Some("tdx"));
    // A kernel without the registers: no log, and no events.
    let without = TdxAttester::new(&places, directory.path(), Some(init_data("b"))).unwrap();
    assert!(without.runtime_log().is_none());
    assert_eq!(without.evidence(&[7; 64]).unwrap()["cc_eventlog"], serde_json::Value::Null);

    let register = places.tdx_registers.join("rtmr3:sha384");
    fs::create_dir_all(&places.tdx_registers).unwrap();
    fs::write(&register, [0; 48]).unwrap();
    let firmware = aael::RuntimeEvent::new("d", "o", "firmware").unwrap().entry(1, Bank::Sha384).unwrap();
    fs::write(&places.ccel, [aael::header(&[Bank::Sha384]), firmware, vec![0xff; 100]].concat()).unwrap();
    let attester = TdxAttester::new(&places, directory.path(), Some(init_data("b"))).unwrap();
    let happening = Happening::KeyReleased { resource: "a/b/c".into() };
    // The kernel's file extends; a plain one has what was written, which is the digest.
    let digest = happening.events().unwrap()[0].digest(Bank::Sha384).unwrap();
    attester.runtime_log().unwrap().record(&happening).unwrap();
    assert_eq!(fs::read(&register).unwrap(), digest);
    fs::write(&register, extended(Bank::Sha384, &[0; 48], &digest).unwrap()).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    assert_eq!(&bytes_of(&evidence["quote"])[48 + 520..], [7; 64]);
    let log = bytes_of(&evidence["cc_eventlog"]);
    let log = tcg::parse(&log).unwrap();
    assert_eq!(log.events.iter().map(|event| event.register).collect::<Vec<_>>(), [1, 4]);
    // Another process takes the log up again. Where the register holds something else, nobody does.
    TdxAttester::new(&places, directory.path(), None).unwrap();
    fs::write(&register, &digest).unwrap();
    assert!(matches!(TdxAttester::new(&places, directory.path(), None), Err(AttesterError::Log(_))));
    assert!(matches!(attester.evidence(&[7; 64]), Err(AttesterError::Log(_))));
}

#[test]
fn enclaves_attest_by_gramines_files() {
    let directory = tempfile::tempdir().unwrap();
    let places = places(directory.path());
    let file = |name: &str| places.gramine.join(name);
    fs::create_dir_all(&places.gramine).unwrap();
    let quote = |report_data: u8| {
        let mut quote = vec![0; 48 + 384];
        quote[0] = 3;
        quote[48 + 192..48 + 256].copy_from_slice(&init_data("b").fit::<64>());
        quote[48 + 320..].fill(report_data);
        quote
    };
    for (name, content) in
        [("user_report_data", vec![0; 64]), ("attestation_type", b"dcap".to_vec()), ("quote", quote(0))]
    {
        fs::write(file(name), content).unwrap();
    }
    assert_eq!(detect(&places), Some("sgx"));
    let attester = SgxAttester::new(places.gramine.clone(), Some(init_data("b"))).unwrap();
    fs::write(file("quote"), quote(7)).unwrap();
    let evidence = attester.evidence(&[7; 64]).unwrap();
    assert_eq!(fs::read(file("user_report_data")).unwrap(), [7; 64]);
    assert_eq!(bytes_of(&evidence["quote"]), quote(7));
    // A quote for somebody else, other init data, another kind of attestation.
    assert!(matches!(attester.evidence(&[8; 64]), Err(AttesterError::Refused { .. })));
    fs::write(file("quote"), quote(0)).unwrap();
    let error = SgxAttester::new(places.gramine.clone(), Some(init_data("c"))).unwrap_err();
    assert!(matches!(error, AttesterError::InitData { .. }), "{error}");
    fs::write(file("attestation_type"), "none").unwrap();
    let error = SgxAttester::new(places.gramine.clone(), None).unwrap_err();
    assert!(error.to_string().contains("dcap"), "{error}");
}

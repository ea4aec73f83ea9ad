//! The log of run-time events, cut by crashes at every place, and attacked.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use nacre_attest::eventlog::{
    Bank, LogError,
    aael::RuntimeEvent,
    replay::extended,
    runtime::{Register, RuntimeLog, RuntimeLogError, joined},
    tcg,
};

/// A register in memory, which may fail.
#[derive(Clone)]
struct Memory {
    value: Arc<Mutex<Vec<u8>>>,
    fails: Arc<Mutex<bool>>,
}

impl Memory {
    fn new() -> Self {
        Self { value: Arc::new(Mutex::new(vec![0; 48])), fails: Arc::default() }
    }

    fn value(&self) -> Vec<u8> {
        self.value.lock().unwrap().clone()
    }
}

impl Register for Memory {
    fn tee(&self) -> &'static str {
        "test"
    }

    fn number(&self) -> u32 {
        4
    }

    fn bank(&self) -> Bank {
        Bank::Sha384
    }

    fn read(&self) -> Result<Vec<u8>, RuntimeLogError> {
        Ok(self.value())
    }

    fn extend(&self, digest: &[u8]) -> Result<(), RuntimeLogError> {
        if *self.fails.lock().unwrap() {
            let why = "it was told to fail".to_owned();
            return Err(RuntimeLogError::Register { tee: "test", register: 4, action: "extend it", why });
        }
        let mut value = self.value.lock().unwrap();
        *value = extended(Bank::Sha384, &value, digest).unwrap();
        Ok(())
    }
}

fn event(content: &str) -> RuntimeEvent {
    RuntimeEvent::new("d", "o", content).unwrap()
}

fn open(path: &Path, register: &Memory) -> Result<RuntimeLog, RuntimeLogError> {
    RuntimeLog::open(path, Box::new(register.clone()), &[0; 48])
}

fn count(log: &RuntimeLog) -> usize {
    tcg::parse(&joined(None, Bank::Sha384, &log.entries().unwrap()).unwrap()).unwrap().events.len()
}

#[test]
fn what_is_recorded_is_in_the_file_and_in_the_register() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    log.record_event(&event("b")).unwrap();
    assert_eq!(count(&log), 2);
    // One process has it.
    assert!(matches!(open(&path, &register), Err(RuntimeLogError::Io { .. })));
    drop(log);
    let log = open(&path, &register).unwrap();
    log.record_event(&event("c")).unwrap();
    assert_eq!(count(&log), 3);
}

#[test]
fn a_crash_at_any_byte_is_repaired_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let register = Memory::new();
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    let (one, after_one) = (log.entries().unwrap().len(), register.value());
    log.record_event(&event("b")).unwrap();
    let (bytes, after_two) = (log.entries().unwrap(), register.value());
    drop(log);
    for length in 0..=bytes.len() {
        // The crash came before the register was extended with the second event, or after it.
        for (value, was_extended) in [(&after_one, false), (&after_two, true)] {
            fs::write(&path, &bytes[..length]).unwrap();
            let register = Memory::new();
            register.value.lock().unwrap().clone_from(value);
            let result = open(&path, &register);
            let whole = length == bytes.len();
            match (was_extended, length >= one) {
                // Logged and not extended, or torn: repaired.
                (false, true) => {
                    let log = result.unwrap();
                    assert_eq!(register.value(), if whole { after_two.clone() } else { after_one.clone() });
                    assert_eq!(log.entries().unwrap().len(), if whole { length } else { one });
                    log.record_event(&event("c")).unwrap();
                }
                (true, _) if whole => drop(result.unwrap()),
                // Extended and not logged.
                _ => assert!(matches!(result, Err(RuntimeLogError::Unlogged { .. })), "{length} {was_extended}"),
            }
        }
    }
}

#[test]
fn a_log_that_is_not_the_registers_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    let bytes = log.entries().unwrap();
    drop(log);
    // Removed, emptied, replaced by another event, lengthened by two.
    let other = event("x").entry(4, Bank::Sha384).unwrap();
    for wrong in [Vec::new(), other.clone(), [&bytes[..], &other, &other].concat()] {
        fs::write(&path, wrong).unwrap();
        assert!(matches!(open(&path, &register), Err(RuntimeLogError::Unlogged { .. })));
    }
    // Entries of another register, and with digests that are not of their data.
    let elsewhere = event("a").entry(3, Bank::Sha384).unwrap();
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    for wrong in [elsewhere, changed] {
        fs::write(&path, wrong).unwrap();
        assert!(matches!(open(&path, &register), Err(RuntimeLogError::Log(LogError::Malformed { .. }))));
    }
    fs::write(&path, bytes).unwrap();
    open(&path, &register).unwrap();
}

#[test]
fn nothing_is_recorded_after_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    *register.fails.lock().unwrap() = true;
    assert!(matches!(log.record_event(&event("a")), Err(RuntimeLogError::Register { .. })));
    *register.fails.lock().unwrap() = false;
    assert!(matches!(log.record_event(&event("b")), Err(RuntimeLogError::Broken)));
    drop(log);
    // At the next start it is made good.
    let log = open(&path, &register).unwrap();
    log.record_event(&event("b")).unwrap();
}

//! The log of run-time events, cut by crashes at every place, and attacked.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use nacre_attest::eventlog::{
    Bank, LogError,
    aael::RuntimeEvent,
    replay::{Registers, extended, replay},
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
    tcg::parse(&joined(None, Bank::Sha384, &entries(log)).unwrap()).unwrap().events.len()
}

fn entries(log: &RuntimeLog) -> Vec<u8> {
    log.with_entries(|entries| Ok::<_, RuntimeLogError>(entries.to_vec())).unwrap()
}

#[test]
fn what_is_recorded_is_in_the_file_and_in_the_register() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    log.record_event(&event("b")).unwrap();
    assert_eq!(count(&log), 2);
    // Others use it as well, and each knows what they recorded.
    let other = open(&path, &register).unwrap();
    other.record_event(&event("c")).unwrap();
    log.record_event(&event("c")).unwrap();
    log.record_event(&event("d")).unwrap();
    assert_eq!((count(&log), count(&other)), (4, 4));
}

#[test]
fn a_log_that_somebody_does_not_let_go_of_is_waited_for_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap().patience(Duration::from_millis(50));
    let held = fs::File::open(&path).unwrap();
    held.lock().unwrap();
    let error = log.record_event(&event("a")).unwrap_err();
    assert!(matches!(error, RuntimeLogError::Busy { .. }) && error.to_string().contains("another program"), "{error}");
    assert_eq!(register.value(), [0; 48]);
    drop(held);
    log.record_event(&event("a")).unwrap();
}

#[test]
fn what_somebody_was_killed_over_is_made_good_by_whoever_comes_next() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    // Another process wrote an event and was killed before it extended the register; and one within an event.
    let logged = event("b").entry(4, Bank::Sha384).unwrap();
    let torn = &logged[..logged.len() - 3];
    let bytes = [&entries(&log)[..], &logged, torn].concat();
    fs::write(&path, &bytes).unwrap();
    log.record_event(&event("c")).unwrap();
    let replayed = ["a", "b", "c"].iter().fold(vec![0; 48], |value, content| {
        extended(Bank::Sha384, &value, &event(content).digest(Bank::Sha384).unwrap()).unwrap()
    });
    assert_eq!((count(&log), register.value()), (3, replayed));
    // Something was extended without it: nothing more is recorded, and no evidence is made.
    register.extend(&event("x").digest(Bank::Sha384).unwrap()).unwrap();
    assert!(matches!(log.record_event(&event("d")), Err(RuntimeLogError::Unlogged { .. })));
    assert!(log.with_entries(|_| Ok::<_, RuntimeLogError>(())).is_err());
}

#[test]
fn nothing_is_recorded_while_a_quote_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (path, register) = (path.clone(), register.clone());
            scope.spawn(move || {
                let log = open(&path, &register).unwrap();
                (0..25).for_each(|number| log.record_event(&event(&format!("{thread} {number}"))).unwrap());
            });
        }
        for _ in 0..25 {
            let work = |entries: &[u8]| {
                let before = register.value();
                std::thread::yield_now();
                assert_eq!(register.value(), before);
                let bytes = joined(None, Bank::Sha384, entries).unwrap();
                let values = replay(&tcg::parse(&bytes).unwrap(), Bank::Sha384, Registers::Tee).unwrap();
                assert_eq!(values.get(&4).cloned().unwrap_or_else(|| vec![0; 48]), before);
                Ok::<_, RuntimeLogError>(())
            };
            log.with_entries(work).unwrap();
        }
    });
    assert_eq!(count(&log), 100);
}

#[test]
fn a_crash_at_any_byte_is_repaired_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let register = Memory::new();
    let log = open(&path, &register).unwrap();
    log.record_event(&event("a")).unwrap();
    let (one, after_one) = (entries(&log).len(), register.value());
    log.record_event(&event("b")).unwrap();
    let (bytes, after_two) = (entries(&log), register.value());
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
                    assert_eq!(entries(&log).len(), if whole { length } else { one });
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
    let bytes = entries(&log);
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
fn what_could_not_be_measured_must_not_be_done_and_is_measured_before_anything_else() {
    let directory = tempfile::tempdir().unwrap();
    let (path, register) = (directory.path().join("log"), Memory::new());
    let log = open(&path, &register).unwrap();
    *register.fails.lock().unwrap() = true;
    for content in ["a", "b"] {
        assert!(matches!(log.record_event(&event(content)), Err(RuntimeLogError::Register { .. })));
    }
    *register.fails.lock().unwrap() = false;
    log.record_event(&event("b")).unwrap();
    assert_eq!(count(&log), 2, "a, which was logged, and b");
}

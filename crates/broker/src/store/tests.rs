use std::sync::Arc;

use nacre_core::{ResourcePath, SecretArray};

use super::*;
use crate::{master::FileKey, storage::embedded::Embedded};

fn master() -> Arc<dyn MasterKey> {
    Arc::new(FileKey::new("master.key".into(), &SecretArray::random()))
}

fn put(store: &Store, path: &ResourcePath, value: &[u8]) -> u32 {
    let value = SecretBytes::new(value.to_vec());
    store.put_resource(path, value, resources::PutOptions::default(), 2, AuditEntry::default()).unwrap()
}

fn value(store: &Store, path: &ResourcePath, version: Option<u32>) -> Option<Vec<u8>> {
    store.resource(path, version).unwrap().map(|(_, value)| value.expose().to_vec())
}

#[test]
fn a_sealed_resource_cannot_be_moved_or_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("x.redb"), master());
    let store = Store::open(Embedded::create(&file).unwrap(), key.clone()).unwrap();
    let [a, b]: [ResourcePath; 2] = ["r/k/a", "r/k/b"].map(|text| text.parse().unwrap());
    put(&store, &a, b"hunter2");
    put(&store, &b, b"other");
    assert_eq!(value(&store, &a, None).unwrap(), b"hunter2");
    let tamper = |change: fn(&mut Tx<'_>)| {
        store
            .database
            .update(Lane::Log, move |tx| {
                change(tx);
                Ok(())
            })
            .unwrap();
    };
    // To another path, to another version, with a bit changed, with a policy made of a resource.
    tamper(|tx| {
        let sealed = tx.get(Table::Values, "r/k/a@0000000001").unwrap().unwrap();
        tx.put(Table::Values, "r/k/b@0000000001", sealed.clone());
        tx.put(Table::Policies, "resource", sealed);
    });
    assert!(matches!(store.resource(&b, None), Err(BrokerError::Sealed(_))));
    assert!(matches!(store.set_policy("resource", "x", AuditEntry::default()), Ok(())));
    tamper(|tx| {
        let mut sealed = tx.get(Table::Values, "r/k/a@0000000001").unwrap().unwrap();
        *sealed.last_mut().unwrap() ^= 1;
        tx.put(Table::Values, "r/k/a@0000000001", sealed);
    });
    assert!(matches!(store.resource(&a, None), Err(BrokerError::Sealed(_))));
    drop(store);
    assert!(!std::fs::read(&file).unwrap().windows(7).any(|window| window == b"hunter2"));
    let other = Store::open(Embedded::open(&file).unwrap(), master()).map(drop).unwrap_err();
    assert!(matches!(&other, BrokerError::OtherMasterKey { others, .. } if *others == key.id()), "{other}");
}

#[test]
fn versions_come_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap();
    let path: ResourcePath = "r/k/a".parse().unwrap();
    for (number, text) in [(1, "one"), (2, "two"), (3, "three")] {
        assert_eq!(put(&store, &path, text.as_bytes()), number);
    }
    assert_eq!(value(&store, &path, None).unwrap(), b"three");
    assert_eq!(value(&store, &path, Some(2)).unwrap(), b"two");
    assert_eq!((value(&store, &path, Some(1)), value(&store, &path, Some(4))), (None, None));
    assert!(store.delete_resource(&path, AuditEntry::default()).unwrap());
    assert!(!store.delete_resource(&path, AuditEntry::default()).unwrap());
    assert_eq!(value(&store, &path, Some(2)), None);
    assert_eq!(store.resources("", &Page::ALL).unwrap(), []);
}

#[test]
fn the_audit_log_is_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap();
    for event in ["a", "b", "c"] {
        store.audit(AuditEntry { event: event.into(), ..AuditEntry::default() }).unwrap();
    }
    let events = |after| store.audit_entries(after, 10).unwrap().into_iter().map(|e| e.event).collect::<String>();
    assert_eq!((events(0), events(1), events(3)), ("abc".into(), "bc".into(), String::new()));
    let entry = |number| store.database.view(|tx| Ok(tx.get(Table::Audit, audit::key(number))?)).unwrap();
    let change = |number, text: Option<Vec<u8>>| {
        store
            .database
            .update(Lane::Log, move |tx| {
                match &text {
                    Some(text) => tx.put(Table::Audit, audit::key(number), text.as_slice()),
                    None => tx.delete(Table::Audit, audit::key(number)),
                }
                Ok(())
            })
            .unwrap();
    };
    let refused = || assert!(matches!(store.audit_entries(0, 10), Err(BrokerError::Damaged { .. })));
    // One in the middle, the last one: changed, and gone.
    for number in [2, 3] {
        let kept = entry(number);
        let text = String::from_utf8(kept.clone().unwrap()).unwrap();
        change(number, Some(text.replace(r#""event":""#, r#""event":"x"#).into_bytes()));
        refused();
        change(number, None);
        refused();
        change(number, kept);
    }
    assert_eq!(events(0), "abc");
}

#[test]
fn master_and_data_keys_are_rotated() {
    let dir = tempfile::tempdir().unwrap();
    let (file, old, new) = (dir.path().join("x.redb"), master(), master());
    let path: ResourcePath = "r/k/a".parse().unwrap();
    let store = Store::open(Embedded::create(&file).unwrap(), old.clone()).unwrap();
    put(&store, &path, b"one");
    assert!(store.remove_master(&old.id(), AuditEntry::default()).is_err(), "the one in use");
    store.add_master(&new, AuditEntry::default()).unwrap();
    assert_eq!(store.masters().unwrap().len(), 2);
    assert!(store.new_data_key(AuditEntry::default()).is_err(), "while the old master key still opens everything");
    store.remove_master(&old.id(), AuditEntry::default()).unwrap();
    store.new_data_key(AuditEntry::default()).unwrap();
    assert_eq!(value(&store, &path, None).unwrap(), b"one");
    put(&store, &path, b"two");
    drop(store);
    assert!(matches!(Store::open(Embedded::open(&file).unwrap(), old), Err(BrokerError::OtherMasterKey { .. })));
    let store = Store::open(Embedded::open(&file).unwrap(), new).unwrap();
    assert_eq!(
        (value(&store, &path, None).unwrap(), value(&store, &path, Some(1)).unwrap()),
        (b"two".into(), b"one".into())
    );
}

#[test]
fn changes_of_many_threads_share_commits_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let store = &store;
            scope.spawn(move || {
                for number in 0..10 {
                    let event = format!("{thread}.{number}");
                    store.audit(AuditEntry { event, ..AuditEntry::default() }).unwrap();
                    // One that fails leaves nothing.
                    let failed = store
                        .change(AuditEntry::default(), |_| -> Result<(), _> { Err(BrokerError::Invalid("no".into())) });
                    assert!(matches!(failed, Err(BrokerError::Invalid(_))));
                }
            });
        }
    });
    let entries = store.audit_entries(0, 1000).unwrap();
    assert_eq!(entries.len(), 160);
    let of_one: Vec<_> = entries.iter().filter(|entry| entry.event.starts_with("7.")).map(|e| &e.event).collect();
    assert!(of_one.is_sorted(), "in the order of their acknowledgements: {of_one:?}");
}

#[test]
fn nonces_work_once_and_the_oldest_session_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap());
    let sessions = sessions::Sessions::new(store.clone(), std::time::Duration::from_secs(60), 2);
    let first = sessions.open("sim").unwrap();
    let second = sessions.open("sim").unwrap();
    assert_ne!(first.nonce, second.nonce);
    assert_eq!(sessions.spend(&first.id).unwrap(), ("sim".into(), first.nonce));
    assert_eq!(sessions.spend(&first.id).unwrap_err().status, 409);
    assert_eq!(sessions.ear(&second.id).unwrap_err().status, 401);
    std::thread::sleep(std::time::Duration::from_millis(2));
    let third = sessions.open("sim").unwrap();
    assert_eq!(sessions.spend(&first.id).unwrap_err().status, 401);
    assert!(sessions.spend(&second.id).is_ok() && sessions.spend(&third.id).is_ok());
    sessions.close(&third.id).unwrap();
    assert_eq!(sessions.spend(&third.id).unwrap_err().status, 401);
    assert_eq!(sessions.count().unwrap(), 1);
    let ended = sessions::Sessions::new(store, std::time::Duration::ZERO, 10);
    let opened = ended.open("sim").unwrap();
    assert_eq!(ended.spend(&opened.id).unwrap_err().status, 401);
}

/// A record of a guest that was refused, for so many bytes of reasons.
fn refused(reason: &str, most: usize) -> guests::Kept {
    let error = ApiError::new(401, "EvidenceVerification", reason);
    guests::GuestRecord {
        time: 1,
        tee: "sim".into(),
        guest: String::new(),
        measurement: String::new(),
        simulated: true,
        outcome: guests::Outcome::Refused(crate::chain::Refused::from(error).refusal),
    }
    .kept(most)
    .unwrap()
}

#[test]
fn records_of_guests_are_bounded_sealed_and_leave_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap();
    let keep = |most| store.audit_refusal(AuditEntry::default(), Some(refused("reason-of-a-refusal", most))).unwrap();
    let numbers = |store: &Store| {
        let found = store.guests(guests::GuestList::Refused, None, 100).unwrap();
        found.iter().map(|(id, audit, _)| (id.number, *audit)).collect::<Vec<_>>()
    };
    for _ in 0..5 {
        keep(3);
    }
    // The newest first, each with its audit entry.
    assert_eq!(numbers(&store), [(4, 5), (3, 4), (2, 3)]);
    let before = |before, most| store.guests(guests::GuestList::Refused, Some(before), most).unwrap().len();
    assert_eq!((before(4, 1), before(3, 10), before(2, 10), before(u64::MAX, 10)), (1, 1, 0, 3));
    // A limit that was lowered holds from the next record on, and 0 keeps none.
    keep(1);
    assert_eq!(numbers(&store), [(5, 6)]);
    keep(0);
    assert_eq!(numbers(&store), []);
    keep(10);
    assert_eq!(numbers(&store), [(6, 8)]);
    assert!(store.guests(guests::GuestList::Attested, None, 100).unwrap().is_empty());
    // They are sealed, with the new data key too.
    let raw = || store.database.view(|tx| Ok(tx.list(Table::Guests, "", None, 10)?)).unwrap();
    let is_plain =
        |rows: &[(Vec<u8>, Vec<u8>)]| rows.iter().any(|(_, value)| value.windows(10).any(|part| part == b"reason-of-"));
    let old = raw();
    assert!(old.len() == 1 && !is_plain(&old));
    store.new_data_key(AuditEntry::default()).unwrap();
    assert_ne!(raw(), old);
    assert_eq!(numbers(&store), [(6, 8)]);
    // One that is put in another's place is none.
    let (_, sealed) = raw().remove(0);
    store
        .database
        .update(Lane::Log, move |tx| {
            tx.put(Table::Guests, "r00000000000000000007", sealed.clone());
            tx.put(Table::Meta, "guests", r#"{"attested":{"first":0,"next":0},"refused":{"first":7,"next":8}}"#);
            Ok(())
        })
        .unwrap();
    assert!(matches!(store.guests(guests::GuestList::Refused, None, 10), Err(BrokerError::Sealed(_))));
}

#[test]
fn a_flood_of_refusals_keeps_as_few_guests_as_it_logs() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Embedded::create(&dir.path().join("x.redb")).unwrap(), master()).unwrap();
    for _ in 0..200 {
        store.audit_refusal(AuditEntry::default(), Some(refused(&"long ".repeat(100_000), 1000))).unwrap();
    }
    let kept = store.guests(guests::GuestList::Refused, None, 1000).unwrap();
    assert_eq!(kept.len(), 120);
    let rows = store.database.view(|tx| Ok(tx.list(Table::Guests, "", None, 1000)?)).unwrap();
    assert!(rows.iter().all(|(_, value)| value.len() < 4096));
}

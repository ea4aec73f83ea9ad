//! Several replicas on one PostgreSQL: any of them serves any session, and nothing that was acknowledged is lost with one of them.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{SECRET, Wire, attestation, path, policy, refusal, refused};
use nacre_attest::{
    client::{Credential, Transport as Channel},
    rcar::TokenReply,
};
use nacre_broker::{Broker, BrokerError, GuestList, Handle, InitOptions, Settings, Transport, serve};
use nacre_core::jose::PrivateKey;
use nacre_testkit::{Postgres, Tls};

struct Replica {
    broker: Arc<Broker>,
    handle: Handle,
}

impl Replica {
    fn start(dir: &Path) -> Self {
        let broker = Arc::new(Broker::open(dir).unwrap());
        let handle = serve(broker.clone(), "127.0.0.1:0".parse().unwrap(), Transport::Tls).unwrap();
        Self { broker, handle }
    }

    fn wire(&self) -> Wire {
        Wire(Channel::new(&common::config(&self.broker, &self.handle)).unwrap())
    }
}

/// Directories of replicas of one broker: copies, as an operator makes them.
fn directories(url: &str, count: usize) -> (tempfile::TempDir, common::Guests) {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings { allow_simulated: true, database: Some(url.into()), ..Settings::default() };
    let first = root.path().join("0");
    let broker = Broker::init(&first, &InitOptions { names: Vec::new(), settings }).unwrap();
    let guests = common::Guests::trusted_by(&broker, root.path());
    broker.put_resource(&path("default/key/1"), SECRET).unwrap();
    for number in 1..count {
        let copy = root.path().join(number.to_string());
        std::fs::create_dir(&copy).unwrap();
        for file in std::fs::read_dir(&first).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
    }
    (root, guests)
}

#[test]
fn any_replica_serves_any_session() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, guests) = directories(&database.url(), 2);
    let [a, b] = ["0", "1"].map(|name| Replica::start(&dirs.path().join(name)));
    let key = PrivateKey::generate_p256();
    // Challenged by one, attested at the other, served by both, by cookie and by token.
    let (session, nonce) = a.wire().auth();
    let message = attestation(&guests.attester(None), &nonce, &key);
    let reply = b.wire().attest(&session, &message);
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    let token = TokenReply::parse(&reply.body).unwrap().token;
    for replica in [&a, &b] {
        for credential in [Credential::Session(&session), Credential::Bearer(&token)] {
            let reply = replica.wire().get("/kbs/v0/resource/default/key/1", credential);
            let jwe = nacre_core::jose::Jwe::parse(&reply.body).unwrap();
            assert_eq!(jwe.decrypt(std::slice::from_ref(&key)).unwrap().expose(), SECRET);
        }
        // The nonce is spent everywhere.
        assert_eq!(refusal(&replica.wire().attest(&session, &message)), refused(409, "NonceUsed"));
    }
    // What one is told, the other knows at once.
    a.broker.set_resource_policy("default", &policy("default allow := false")).unwrap();
    let reply = b.wire().get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token));
    assert_eq!(refusal(&reply), refused(403, "PolicyDeny"));
    // One log, in one order, whoever wrote.
    let log = b.broker.audit(0, 1000).unwrap();
    assert_eq!(log, a.broker.audit(0, 1000).unwrap());
    assert_eq!(log.iter().filter(|entry| entry.event == "released").count(), 4);
}

#[test]
fn one_nonce_at_many_replicas_at_once_works_once() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, guests) = directories(&database.socket_url(), 2);
    let replicas = ["0", "1"].map(|name| Replica::start(&dirs.path().join(name)));
    for _ in 0..5 {
        let (session, nonce) = replicas[0].wire().auth();
        let message = attestation(&guests.attester(None), &nonce, &PrivateKey::generate_p256());
        let good = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|number| {
                    let (replica, session, message) = (&replicas[number % 2], &session, &message);
                    scope.spawn(move || replica.wire().attest(session, message).status)
                })
                .collect();
            tries.into_iter().map(|one| one.join().unwrap()).filter(|status| *status == 200).count()
        });
        assert_eq!(good, 1);
    }
}

#[test]
fn replicas_append_to_one_log_without_losing_entries() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, guests) = directories(&database.url(), 2);
    let replicas = ["0", "1"].map(|name| Replica::start(&dirs.path().join(name)));
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (replica, guests) = (&replicas[number % 2], &guests);
            scope.spawn(move || {
                for _ in 0..5 {
                    replica.wire().token(&guests.attester(None));
                }
            });
        }
    });
    let log = replicas[0].broker.audit(0, 1000).unwrap();
    assert_eq!(log.iter().filter(|entry| entry.event == "attested").count(), 40);
}

#[test]
fn a_database_that_goes_and_comes_back_is_waited_for() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, guests) = directories(&database.url(), 1);
    let replica = Replica::start(&dirs.path().join("0"));
    let wire = replica.wire();
    let (key, attester) = (PrivateKey::generate_p256(), guests.attester(None));
    let (session, nonce) = wire.auth();
    let token = wire.token(&attester);
    database.stop();
    // No answer is better than a wrong one; nothing is released that cannot be logged.
    let reply = wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token));
    assert_eq!(refusal(&reply), refused(503, "StorageError"));
    assert_eq!(wire.attest(&session, &attestation(&attester, &nonce, &key)).status, 503);
    assert!(matches!(Broker::open(&dirs.path().join("0")), Err(BrokerError::Storage(_))));
    database.start_again();
    // The session was not spent by a try that could not be written down, and is still there.
    assert_eq!(wire.attest(&session, &attestation(&attester, &nonce, &key)).status, 200);
    assert_eq!(wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token)).status, 200);
    // One that is only away for a moment is not even noticed.
    let (statuses, took) = std::thread::scope(|scope| {
        let away = scope.spawn(|| {
            let start = Instant::now();
            database.stop();
            database.start_again();
            start.elapsed()
        });
        let statuses = (0..20).map(|_| wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token)).status);
        (statuses.collect::<Vec<_>>(), away.join().unwrap())
    });
    // A machine that takes longer than the broker waits gets the honest answer meanwhile.
    let short = took < Duration::from_secs(2);
    assert!(statuses.iter().all(|status| *status == 200 || (!short && *status == 503)), "{statuses:?} in {took:?}");
    assert_eq!(wire.get("/kbs/v0/resource/default/key/1", Credential::Bearer(&token)).status, 200);
}

#[test]
fn other_keys_do_not_open_the_database_and_newer_schemas_are_refused() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, _) = directories(&database.url(), 1);
    let settings = Settings { database: Some(database.url()), ..Settings::default() };
    let error = Broker::init(&dirs.path().join("x"), &InitOptions { names: Vec::new(), settings }).unwrap_err();
    assert!(matches!(error, BrokerError::OtherMasterKey { .. }), "{error}");
    // Nothing in it can be read, and what was put there by SQL is believed by nobody.
    assert!(!database.sql("SELECT string_agg(encode(value, 'escape'), '') FROM nacre_values").contains("hunter2"));
    let policy = "convert_to('package policy allow := true', 'UTF8')";
    database.sql(&format!("UPDATE nacre_policies SET value = {policy}"));
    database.sql("UPDATE nacre_meta SET value = '99' WHERE key = 'revision'");
    let broker = Broker::open(&dirs.path().join("0")).unwrap();
    assert!(matches!(broker.resource_policy(""), Err(BrokerError::Sealed(_))));
    drop(broker);
    database.sql("INSERT INTO nacre_schema VALUES (1000)");
    let error = Broker::open(&dirs.path().join("0")).unwrap_err();
    assert!(error.to_string().contains("newer"), "{error}");
}

#[test]
fn the_database_is_reached_by_tls() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tls) = Tls::new() else { return };
    let Some(database) = Postgres::start(Some(&tls)) else { return };
    let url = format!("{}?sslmode=require", database.url());
    let init = |name: &str, ca: &Path| {
        let settings =
            Settings { database: Some(url.clone()), database_ca: Some(ca.to_owned()), ..Settings::default() };
        Broker::init(&dir.path().join(name), &InitOptions { names: Vec::new(), settings })
    };
    let other = dir.path().join("other.pem");
    let made = Broker::init(&dir.path().join("other"), &InitOptions::default()).unwrap();
    std::fs::write(&other, made.certificate_pem()).unwrap();
    assert!(matches!(init("b", &other), Err(BrokerError::Storage(_))));
    let broker = init("c", &tls.ca()).unwrap();
    broker.put_resource(&path("a/b/c"), b"x").unwrap();
    assert_eq!(database.sql("SELECT count(*) > 0 FROM pg_stat_ssl WHERE ssl AND pid <> pg_backend_pid()"), "t");
}

#[test]
fn guests_are_kept_by_all_replicas_together_and_a_schema_before_them_is_migrated() {
    let Some(database) = Postgres::start(None) else { return };
    let (dirs, guests) = directories(&database.url(), 2);
    // As a broker before there were records of guests left it.
    database.sql("DROP TABLE nacre_guests; DELETE FROM nacre_schema WHERE version > 1");
    let [a, b] = ["0", "1"].map(|name| Replica::start(&dirs.path().join(name)));
    for replica in [&a, &b, &a] {
        replica.wire().token(&guests.attester(None));
    }
    let ids = |replica: &Replica| {
        let found = replica.broker.guests(GuestList::Attested, None, 10).unwrap();
        found.into_iter().map(|guest| guest.id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&a), ["a2", "a1", "a0"]);
    assert_eq!(ids(&b), ids(&a));
    let chain = b.broker.guest_chain("a2").unwrap().unwrap();
    assert_eq!(chain.guest.verdict, "affirming");
    assert_eq!(database.sql("SELECT max(version) FROM nacre_schema").trim(), "2");
}

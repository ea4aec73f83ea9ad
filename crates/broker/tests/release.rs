//! What is released beyond a value: versions, leases, anchors; and by whom it is administered.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use common::{Rig, SECRET, path, policy, refusal, refused};
use nacre_attest::client::{Agent, BrokerAnchor, BrokerClient, Call, ClientError, Credential, Tenancy};
use nacre_broker::{
    AdminClient, Administrator, PutOptions, ResourceKind, ResourceScope, Revocation, Role, Settings, Transport,
};
use nacre_core::{Anchor as _, AnchorError, AnchorState, KeySource as _, jose::PrivateKey};

fn lent(seconds: u32) -> PutOptions {
    PutOptions { lease_seconds: Some(seconds), ..PutOptions::default() }
}

#[test]
fn versions_are_kept_rotated_and_asked_for() {
    let rig = Rig::new();
    let (admin, client) = (rig.admin(), rig.client());
    let key = path("team/volume/db");
    let options = PutOptions { kind: Some(ResourceKind::VolumeKey), ..PutOptions::default() };
    assert_eq!(admin.put_resource_with(&key, &[1; 32], options).unwrap(), 1);
    assert_eq!(admin.rotate_resource(&key).unwrap(), 2);
    let current = client.borrow(&key, None).unwrap();
    assert_eq!((current.version, current.secret.len(), current.lease.is_none()), (Some(2), 32, true));
    assert_ne!(current.secret.expose(), [1; 32]);
    assert_eq!(client.borrow(&key, Some(1)).unwrap().secret.expose(), [1; 32]);
    assert!(matches!(client.borrow(&key, Some(3)), Err(ClientError::Refused { status: 404, .. })));
    // A value has to be one of its kind, and only keys are made of random bytes.
    assert!(matches!(admin.put_resource(&key, b"short"), Err(ClientError::Refused { status: 400, .. })));
    assert!(matches!(admin.rotate_resource(&path("default/key/1")), Err(ClientError::Refused { status: 400, .. })));
    let listed = admin.resources().unwrap();
    let found = listed.iter().find(|resource| resource.path == key.to_string()).unwrap();
    assert_eq!((found.kind, found.version, found.versions.as_slice()), (ResourceKind::VolumeKey, 2, &[1, 2][..]));
}

#[test]
fn a_lease_is_renewed_by_attesting_again_only() {
    let rig = Rig::new();
    rig.broker.put_resource_with(&path("a/key/1"), SECRET, lent(60)).unwrap();
    let wire = rig.wire();
    let token = wire.token(&rig.attester(None));
    let reply = wire.get("/kbs/v0/resource/a/key/1", Credential::Bearer(&token));
    let (id, seconds) = reply.lease.unwrap();
    assert_eq!(seconds, 60);
    let renew = |token: &str, id: &str| wire.post(&format!("/kbs/v0/lease/{id}"), Credential::Bearer(token), b"{}");
    assert_eq!(refusal(&renew(&token, &id)), refused(401, "LeaseNeedsAttestation"));
    let fresh = wire.token(&rig.attester(None));
    assert_eq!(renew(&fresh, &id).status, 200);
    assert_eq!(refusal(&renew(&fresh, &id)), refused(401, "LeaseNeedsAttestation"));
    assert_eq!(refusal(&renew(&fresh, "guessed")), refused(404, "LeaseNotFound"));
    // Not for a guest that measures something else, nor for one that the policy has come to refuse.
    let other = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(other.path(), "another program").unwrap();
    let attester = nacre_attest::sim::SimAttester::measuring(rig.platform(), None, other.path()).unwrap();
    assert_eq!(refusal(&renew(&wire.token(&attester), &id)), refused(403, "LeaseForeign"));
    rig.broker.set_resource_policy("a", &policy("default allow := false")).unwrap();
    assert_eq!(refusal(&renew(&wire.token(&rig.attester(None)), &id)), refused(403, "PolicyDeny"));
}

#[test]
fn a_revoked_lease_is_not_renewed() {
    let rig = Rig::new();
    for name in ["a/key/1", "a/key/2"] {
        rig.broker.put_resource_with(&path(name), SECRET, lent(60)).unwrap();
    }
    let (admin, client) = (rig.admin(), rig.client());
    let mut leases: Vec<_> =
        ["a/key/1", "a/key/1", "a/key/2"].map(|name| client.borrow(&path(name), None).unwrap().lease.unwrap()).into();
    let listed = admin.leases().unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(admin.revoke(&Revocation::Resource("a/key/2".into())).unwrap(), 1);
    let error = client.renew(&mut leases[2]).unwrap_err();
    assert!(matches!(&error, ClientError::LeaseEnded { why, .. } if why.contains("revoked")), "{error}");
    for lease in &mut leases[..2] {
        client.renew(lease).unwrap();
    }
    let one = listed.iter().find(|lease| lease.path == "a/key/1").unwrap();
    assert_eq!(admin.revoke(&Revocation::Lease(one.name.clone())).unwrap(), 1);
    assert_eq!(admin.revoke(&Revocation::Lease(String::new())).unwrap(), 0);
    // All guests with a measurement; what is removed is revoked too.
    assert_eq!(admin.revoke(&Revocation::Measurement(one.measurement.clone())).unwrap(), 1);
    let mut lease = client.borrow(&path("a/key/1"), None).unwrap().lease.unwrap();
    admin.delete_resource(&path("a/key/1")).unwrap();
    assert!(matches!(client.renew(&mut lease), Err(ClientError::LeaseEnded { .. })));
    let log = rig.broker.audit(0, 1000).unwrap();
    for event in ["leases revoked", "lease renewed", "renewal refused"] {
        assert!(log.iter().any(|entry| entry.event == event), "{event}");
    }
}

#[test]
fn a_guest_notices_a_revocation_within_a_lease() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    for name in ["a/key/1", "a/key/2"] {
        rig.broker.put_resource_with(&path(name), SECRET, lent(6)).unwrap();
    }
    let client = Arc::new(rig.client());
    let agent = Agent::start(client.clone()).unwrap();
    let (told, tells) = mpsc::channel();
    for name in ["a/key/1", "a/key/2"] {
        let lease = client.borrow(&path(name), None).unwrap().lease.unwrap();
        let told = told.clone();
        agent.keep(lease, Box::new(move |error| told.send((name, error.to_string())).unwrap()));
    }
    // Longer than a lease: both are still held.
    assert!(tells.recv_timeout(Duration::from_secs(8)).is_err());
    rig.broker.revoke(&Revocation::Resource("a/key/1".into())).unwrap();
    let since = Instant::now();
    let (name, why) = tells.recv_timeout(Duration::from_secs(6)).unwrap();
    assert!(name == "a/key/1" && why.contains("revoked") && since.elapsed() < Duration::from_secs(6), "{why}");
    // A guest that ends gives up what it has left.
    drop(agent);
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    assert!(rig.broker.leases("").unwrap().iter().all(|lease| lease.ends <= now || lease.revoked.is_some()));
}

#[test]
fn a_lease_ends_when_no_broker_answers() {
    let rig = Rig::new();
    rig.broker.put_resource_with(&path("a/key/1"), SECRET, lent(5)).unwrap();
    let client = Arc::new(rig.client());
    let agent = Agent::start(client.clone()).unwrap();
    let (told, tells) = mpsc::channel();
    let lease = client.borrow(&path("a/key/1"), None).unwrap().lease.unwrap();
    let since = Instant::now();
    agent.keep(lease, Box::new(move |error| told.send(error.to_string()).unwrap()));
    rig.handle.shutdown();
    tells.recv_timeout(Duration::from_secs(6)).unwrap();
    assert!(since.elapsed() < Duration::from_secs(6), "{:?}", since.elapsed());
}

/// Leases that hold, by the broker's own clock.
fn held(rig: &Rig) -> usize {
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    rig.broker.leases("").unwrap().iter().filter(|lease| lease.ends > now && lease.revoked.is_none()).count()
}

fn until(what: &str, reached: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_part_of_a_guest_was_lent_is_its_own_for_as_long_as_it_needs_it() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings, Transport::Tls);
    rig.broker.put_resource_with(&path("a/key/1"), SECRET, lent(5)).unwrap();
    rig.broker.put_resource(&path("a/key/2"), SECRET).unwrap();
    let tenancy = Tenancy::new(Arc::new(rig.client()));
    let uri = |name: &str| nacre_core::ResourceUri::from_path(path(name));
    // Used and forgotten: given back when the last use is over.
    tenancy.spend(|| {
        tenancy.spend(|| tenancy.fetch(&uri("a/key/1")).unwrap());
        assert_eq!(held(&rig), 1);
    });
    until("it is given back", || held(&rig) == 0);
    let (_, none) = tenancy.lend(|| tenancy.fetch(&uri("a/key/2")).unwrap());
    assert!(none.is_none(), "what is given for good is not lent");
    // Kept: renewed while the tenure, or who it was given to, is there.
    let (_, tenure) = tenancy.lend(|| tenancy.fetch(&uri("a/key/1")).unwrap());
    let tenure = tenure.unwrap();
    let used = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let (told, tells) = mpsc::channel();
    let (is_used, told_of_it) = (used.clone(), told.clone());
    let load = move || is_used.load(std::sync::atomic::Ordering::SeqCst);
    tenure.give_to(load, move |why| told_of_it.send(why.to_owned()).unwrap());
    drop(tenure);
    assert!(tells.recv_timeout(Duration::from_secs(7)).is_err());
    assert_eq!(held(&rig), 1);
    used.store(false, std::sync::atomic::Ordering::SeqCst);
    until("it is given back", || held(&rig) == 0);
    assert!(tells.try_recv().is_err(), "nobody is told of what was given back");
    // Revoked: everybody is told, also who comes later.
    let (_, tenure) = tenancy.lend(|| tenancy.fetch(&uri("a/key/1")).unwrap());
    let tenure = tenure.unwrap();
    assert_eq!(tenure.ended(), None);
    let told_of_it = told.clone();
    tenure.give_to(|| true, move |why| told_of_it.send(why.to_owned()).unwrap());
    rig.broker.revoke(&Revocation::Resource("a/key/1".into())).unwrap();
    assert!(tells.recv_timeout(Duration::from_secs(5)).unwrap().contains("revoked"));
    assert!(tenure.ended().unwrap().contains("revoked"));
    tenure.give_to(|| true, move |why| told.send(why.to_owned()).unwrap());
    assert!(tells.try_recv().unwrap().contains("revoked"));
}

#[test]
fn a_guest_attests_anew_on_a_schedule() {
    let rig = Rig::new();
    let attested = || rig.broker.audit(0, 1000).unwrap().iter().filter(|entry| entry.event == "attested").count();
    let agent = Agent::start(Arc::new(rig.client())).unwrap();
    agent.attest_every(Duration::from_millis(300));
    until("three times", || attested() >= 3);
    drop(agent);
    let now = attested();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(attested(), now);
}

fn state(fence: u64, sequence: u64) -> AnchorState {
    AnchorState { disk: [7; 16], fence, sequence, root: [9; 32] }
}

fn anchor(client: &Arc<BrokerClient>, name: &str) -> BrokerAnchor {
    BrokerAnchor::new(client.clone(), name).unwrap()
}

#[test]
fn an_anchor_is_moved_on_by_one_guest_at_a_time() {
    let rig = Rig::new();
    let (one, two) = (Arc::new(rig.client()), Arc::new(rig.client()));
    let (a, b) = (anchor(&one, "team/disk"), anchor(&two, "team/disk"));
    assert_eq!(a.read().unwrap(), None);
    a.advance(None, &state(1, 0)).unwrap();
    a.advance(Some(&state(1, 0)), &state(1, 5)).unwrap();
    assert_eq!(b.read().unwrap(), Some(state(1, 5)));
    // The other takes over; the first is fenced.
    b.advance(Some(&state(1, 5)), &state(2, 5)).unwrap();
    let fenced = a.advance(Some(&state(1, 5)), &state(1, 6)).unwrap_err();
    assert!(matches!(fenced, AnchorError::Fenced { found_fence: 2, found_sequence: 5, .. }), "{fenced}");
    // Not backwards, not to another disk, not from nothing; other anchors are others.
    for next in [state(2, 4), state(1, 9), AnchorState { disk: [8; 16], ..state(3, 9) }] {
        assert!(matches!(b.advance(Some(&state(2, 5)), &next), Err(AnchorError::Untrusted { .. })));
    }
    assert!(matches!(b.advance(None, &state(3, 0)), Err(AnchorError::Fenced { .. })));
    assert_eq!(anchor(&one, "team/other").read().unwrap(), None);
    assert_eq!(b.read().unwrap(), Some(state(2, 5)));
    let log = rig.broker.audit(0, 1000).unwrap();
    assert_eq!(log.iter().filter(|entry| entry.event == "volume taken over").count(), 2);
    // An administrator removes it, for a disk that is made anew.
    rig.admin().delete_anchor("team/disk").unwrap();
    assert!(matches!(b.advance(Some(&state(2, 5)), &state(2, 6)), Err(AnchorError::Untrusted { .. })));
}

#[test]
fn many_guests_move_one_anchor_on_and_each_step_has_one_winner() {
    let rig = Rig::new();
    let clients: Vec<_> = (0..4).map(|_| Arc::new(rig.client())).collect();
    anchor(&clients[0], "a/x").advance(None, &state(1, 0)).unwrap();
    let won: u64 = std::thread::scope(|scope| {
        let tries: Vec<_> = clients
            .iter()
            .map(|client| {
                scope.spawn(move || {
                    let anchor = anchor(client, "a/x");
                    (0..10)
                        .filter(|_| {
                            let found = anchor.read().unwrap().unwrap();
                            anchor.advance(Some(&found), &state(1, found.sequence + 1)).is_ok()
                        })
                        .count() as u64
                })
            })
            .collect();
        tries.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert_eq!(rig.broker.anchors("").unwrap(), [("a/x".to_owned(), state(1, won))]);
}

#[test]
fn who_may_not_have_a_volume_does_not_see_its_anchor() {
    let rig = Rig::new();
    rig.broker.set_resource_policy("a/anchor", &policy("default allow := false")).unwrap();
    let error = anchor(&Arc::new(rig.client()), "a/disk").read().unwrap_err();
    assert!(matches!(error, AnchorError::Failed { .. }), "{error}");
    let only_keys = policy("default allow := false\nallow if data.plugin == \"resource\"");
    rig.broker.set_resource_policy("", &only_keys).unwrap();
    assert!(anchor(&Arc::new(rig.client()), "b/disk").read().is_err());
    assert!(BrokerAnchor::new(Arc::new(rig.client()), "nodisk").is_err());
    for bad in ["..", "a%2fb", "a%00"] {
        let wire = rig.wire();
        let token = wire.token(&rig.attester(None));
        let reply = wire.get(&format!("/kbs/v0/anchor/a/{bad}"), Credential::Bearer(&token));
        assert!(matches!(reply.status, 400 | 404), "{bad}: {}", reply.status);
    }
}

fn administrator(rig: &Rig, name: &str, role: Role, repository: Option<&str>) -> AdminClient {
    let key = PrivateKey::generate_p256();
    let admin = Administrator {
        name: name.into(),
        role,
        repository: repository.map(str::to_owned),
        key: key.public().to_pem().unwrap(),
    };
    rig.admin().set_admin(&admin).unwrap();
    AdminClient::new(&rig.config(), key, "whoever").unwrap()
}

fn forbidden<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let error = result.unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status: 403, kind, .. } if kind == "AdminRole"), "{error}");
}

#[test]
fn a_tenants_administrator_stays_in_its_repository() {
    let rig = Rig::new();
    rig.broker.put_resource_with(&path("other/key/1"), SECRET, lent(60)).unwrap();
    rig.client().borrow(&path("other/key/1"), None).unwrap();
    let tenant = administrator(&rig, "tina", Role::Operator, Some("team"));
    tenant.put_resource(&path("team/key/1"), b"x").unwrap();
    tenant.set_resource_policy(&ResourceScope::Repository("team"), &policy("allow := true")).unwrap();
    assert_eq!(tenant.resources().unwrap().len(), 1, "its own only");
    assert_eq!((tenant.leases().unwrap().len(), tenant.anchors().unwrap().len()), (0, 0));
    assert_eq!(tenant.revoke(&Revocation::Resource("other/key/1".into())).unwrap(), 0);
    for other in ["other/key/1", "team2/key/1", "teams/key/1"] {
        forbidden(tenant.put_resource(&path(other), b"x"));
        forbidden(tenant.delete_resource(&path(other)));
        forbidden(tenant.rotate_resource(&path(other)));
    }
    forbidden(tenant.set_resource_policy(&ResourceScope::All, &policy("allow := true")));
    forbidden(tenant.set_resource_policy(&ResourceScope::Repository("other"), &policy("allow := true")));
    forbidden(tenant.set_resource_policy(&ResourceScope::Resource(&path("other/key/1")), &policy("allow := true")));
    forbidden(tenant.delete_anchor("other/disk"));
    forbidden(tenant.add_reference_value("sim.measurement", &[], None));
    forbidden(tenant.add_sim_platform_key(&PrivateKey::generate_p256().public()));
    forbidden(tenant.set_attestation_policy("default_cpu", &common::trust(2)));
    forbidden(tenant.audit(0));
    forbidden(tenant.admins());
    forbidden(tenant.rotate_token_key());
    // Paths are compared after they were parsed, not as they were written.
    let token = |client: &AdminClient| client.token().unwrap();
    for trick in
        ["team%2F..%2Fother/key/1", "team/../other/key/1", "%74eam%2fx/key/1", "team//key/1", "other/../team/x/y"]
    {
        let target = format!("/kbs/v0/resource/{trick}");
        let call = Call::Post("text/plain", b"x");
        let reply = rig.wire().0.call("test", &target, Credential::Bearer(&token(&tenant)), call, 1 << 20).unwrap();
        assert!((400..500).contains(&reply.status), "{trick}: {}", reply.status);
    }
    let log = rig.broker.audit(0, 1000).unwrap();
    assert!(log.iter().any(|entry| entry.actor == "operator:tina" && entry.event == "resource set"));
}

#[test]
fn an_auditor_looks_and_changes_nothing() {
    let rig = Rig::new();
    let auditor = administrator(&rig, "otto", Role::Auditor, None);
    assert!(!auditor.audit(0).unwrap().is_empty() && !auditor.resources().unwrap().is_empty());
    auditor.resource_policy(&ResourceScope::All).unwrap();
    forbidden(auditor.put_resource(&path("a/b/c"), b"x"));
    forbidden(auditor.revoke(&Revocation::Lease("x".into())));
    forbidden(auditor.set_resource_policy(&ResourceScope::All, &policy("allow := true")));
    forbidden(auditor.delete_admin("otto"));
    // Who is removed is removed at once, and a key is one administrator's only.
    let key = PrivateKey::generate_p256().public().to_pem().unwrap();
    let admin = |name: &str| Administrator { name: name.into(), role: Role::Admin, repository: None, key: key.clone() };
    rig.admin().set_admin(&admin("a")).unwrap();
    assert!(rig.admin().set_admin(&admin("b")).is_err());
    assert!(rig.admin().set_admin(&Administrator { key: "x".into(), ..admin("c") }).is_err());
    rig.admin().delete_admin("otto").unwrap();
    assert!(matches!(auditor.audit(0), Err(ClientError::Refused { status: 401, .. })));
}

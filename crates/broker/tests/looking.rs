//! What people see of guests, leases, resources and the audit log, by HTTP: in pages, by role, and with headers that browsers heed.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::io::{Read as _, Write as _};

use common::{Rig, SECRET, attestation, path, token_of};
use nacre_attest::client::Credential;
use nacre_broker::{PutOptions, Role, Settings, Transport};
use nacre_core::jose::PrivateKey;
use serde_json::{Value, json};

/// An answer over plain HTTP: status, headers in lower case, body.
fn raw(rig: &Rig, method: &str, target: &str, more: &str) -> (u16, String, String) {
    let mut stream = std::net::TcpStream::connect(rig.handle.address()).unwrap();
    let request = format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
}

#[test]
fn the_consoles_files_have_strict_headers_and_can_be_turned_off() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    let rig = Rig::with(settings.clone(), Transport::PlainHttp);
    assert_eq!(raw(&rig, "GET", "/console", "").0, 308);
    let (_, _, page) = raw(&rig, "GET", "/console/", "");
    let names =
        page.split(['"']).filter(|part| part.ends_with(".js") || part.ends_with(".css") || part.ends_with(".svg"));
    let names: std::collections::BTreeSet<&str> =
        names.chain(["", "api.js", "dom.js", "guests.js", "guest.js", "lists.js", "audit.js"]).collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        let (status, head, body) = raw(&rig, "GET", &format!("/console/{name}"), "");
        assert_eq!(status, 200, "{name}");
        for header in [
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
            "cross-origin-opener-policy: same-origin",
        ] {
            assert!(head.contains(&format!("\r\n{header}\r\n")) || head.ends_with(header), "{name}: {header}\n{head}");
        }
        // Nothing inline, nothing from elsewhere, nothing that makes markup of strings.
        let inline = ["<style", " style=", " onclick=", "innerHTML", "insertAdjacentHTML", "document.write", "eval("];
        for bad in inline {
            assert!(!body.contains(bad), "{name}: {bad}");
        }
        let elsewhere = body.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://"), "{name}");
    }
    assert_eq!(raw(&rig, "GET", "/console/../broker.toml", "").0, 404);
    assert_eq!(raw(&rig, "GET", "/console/none.js", "").0, 404);
    assert_eq!(raw(&rig, "POST", "/console/", "content-length: 0\r\n").0, 405);
    // Data: nobody keeps them, and nobody without a token gets any.
    for path in ["whoami", "guests", "guests/a0", "resources", "leases", "audit-page", "audit-check"] {
        let (status, head, _) = raw(&rig, "GET", &format!("/kbs/v0/{path}"), "");
        assert_eq!(status, 401, "{path}");
        assert!(head.contains("cache-control: no-store") && head.contains("x-content-type-options: nosniff"), "{head}");
    }
    let off = Rig::with(Settings { console: false, ..settings }, Transport::PlainHttp);
    assert_eq!(raw(&off, "GET", "/console/", "").0, 404);
}

#[test]
fn guests_are_listed_in_pages_for_who_reads_everything_and_the_oldest_goes() {
    let rig = Rig::with(Settings { allow_simulated: true, most_guests: 4, ..Settings::default() }, Transport::Tls);
    let wire = rig.wire();
    for _ in 0..6 {
        wire.token(&rig.attester(None));
    }
    for _ in 0..6 {
        let (session, _) = wire.auth();
        let message = attestation(&rig.attester(None), "another nonce", &PrivateKey::generate_p256());
        assert_eq!(wire.attest(&session, &message).status, 401);
    }
    let auditor = token_of(&rig, "ada", Role::Auditor, None);
    let tenant = token_of(&rig, "tina", Role::Admin, Some("team"));
    let get = |path: &str, token: &str| {
        let reply = wire.get(&format!("/kbs/v0/{path}"), Credential::Bearer(token));
        (reply.status, serde_json::from_slice::<Value>(&reply.body).unwrap())
    };
    let ids = |path: &str| {
        let (status, list) = get(path, &auditor);
        assert_eq!(status, 200, "{path}: {list}");
        list.as_array().unwrap().iter().map(|guest| guest["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("guests"), ["a5", "a4", "a3", "a2"]);
    assert_eq!(ids("guests?most=2"), ["a5", "a4"]);
    assert_eq!(ids("guests?most=2&before=a4"), ["a3", "a2"]);
    assert_eq!(ids("guests?before=a2"), [""; 0]);
    assert_eq!(ids("guests?list=refused&most=1"), ["r5"]);
    let (_, refused) = get("guests/r5", &auditor);
    assert_eq!(
        (refused["verdict"].as_str(), refused["chain"][0]["verdict"].as_str()),
        (Some("refused"), Some("failed"))
    );
    assert_eq!(refused["chain"][0]["checks"][0]["found"], "another nonce");
    for (path, status) in [
        ("guests/a1", 404),
        ("guests/a", 404),
        ("guests/%00", 404),
        ("guests?before=r1", 400),
        ("guests?list=all", 400),
        ("guests?most=0", 400),
        ("guests?most=100000", 400),
        ("audit-page?before=x", 400),
        ("resources?most=0", 400),
    ] {
        assert_eq!(get(path, &auditor).0, status, "{path}");
    }
    // A tenant's administrator, whatever else it may do, is none of all guests.
    for path in ["guests", "guests/a5", "audit-page", "audit-check"] {
        assert_eq!(get(path, &tenant).0, 403, "{path}");
    }
    assert_eq!(
        get("whoami", &tenant).1,
        json!({"name": "admin:tina", "role": "admin", "repository": "team", "reads_all": false})
    );
    // The log from its end, page by page, down to its beginning.
    let (mut before, mut numbers) = (String::new(), Vec::new());
    loop {
        let (_, page) = get(&format!("audit-page?most=7{before}"), &auditor);
        assert_eq!(page["verified"], true);
        numbers.extend(page["entries"].as_array().unwrap().iter().map(|entry| entry["number"].as_u64().unwrap()));
        match page["next"].as_u64() {
            Some(next) => before = format!("&before={next}"),
            None => break,
        }
    }
    let last = rig.broker.audit_head().unwrap().number;
    assert_eq!(numbers, (1..=last).rev().collect::<Vec<_>>());
    // Resources and leases in pages.
    for name in ["team/a/1", "team/a/2", "team/a/3"] {
        rig.broker.put_resource(&path(name), SECRET).unwrap();
    }
    let paths = |path: &str, token: &str| {
        get(path, token)
            .1
            .as_array()
            .unwrap()
            .iter()
            .map(|found| found["path"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(paths("resources?most=2", &tenant), ["team/a/1", "team/a/2"]);
    assert_eq!(paths("resources?most=2&after=team/a/2", &tenant), ["team/a/3"]);
    assert_eq!(paths("resources", &auditor), ["default/key/1", "team/a/1", "team/a/2", "team/a/3"]);
    let lent = PutOptions { lease_seconds: Some(60), ..PutOptions::default() };
    rig.broker.put_resource_with(&path("team/lent/1"), SECRET, lent).unwrap();
    for _ in 0..3 {
        rig.client().borrow(&path("team/lent/1"), None).unwrap();
    }
    let leases = |path: &str| {
        get(path, &tenant)
            .1
            .as_array()
            .unwrap()
            .iter()
            .map(|lease| lease["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let all = leases("leases");
    assert_eq!(all.len(), 3);
    assert_eq!(leases("leases?most=2"), all[..2]);
    assert_eq!(leases(&format!("leases?most=2&after={}", all[1])), all[2..]);
}

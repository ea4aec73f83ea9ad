//! The console, as people use it: in a browser, by hand and by keyboard alone, with guests that try to be more than text.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Rig, SECRET, attestation, init_data, path, token_of};
use nacre_attest::{
    client::BrokerConfig,
    eventlog::story::{Happening, Image, Volume},
    evidence::Attester,
    initdata::InitData,
    rcar::{Attestation, CompositeEvidence, RuntimeData},
    sim::SimAttester,
};
use nacre_broker::{AdminClient, Broker, PutOptions, Role, Transport, admin_token, serve};
use nacre_core::{
    Algorithm, Digest,
    jose::{PrivateKey, sign_compact},
};
use nacre_testkit::{Browser, Key};
use serde_json::{Value, json};

/// Columns of the lists of guests.
const VERDICT: usize = 1;
const TEE: usize = 3;
/// Whatever a guest can name.
const HOSTILE: &str = "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>";

fn open(browser: &Browser, rig: &Rig, page: &str) {
    browser.open(&format!("{}/console/{page}", rig.handle.url()));
}

fn sign_in(browser: &Browser, rig: &Rig, token: &str, page: &str) {
    open(browser, rig, page);
    browser.find("#token").enter(token);
    browser.find("#sign-in-form button").click();
    browser.wait("navigation", || browser.find("#nav").is_shown().then_some(()));
}

/// Follows an entry of the navigation.
fn go(browser: &Browser, entry: &str) {
    browser.all("#nav a").iter().find(|link| link.text() == entry).unwrap().click();
    browser.heading(entry);
}

/// A picture for whoever works on the page: where `NACRE_SCREENSHOTS` names a directory.
fn picture(browser: &Browser, name: &str) {
    let Some(directory) = std::env::var_os("NACRE_SCREENSHOTS").map(std::path::PathBuf::from) else { return };
    let scheme = |name: &str| {
        let features = json!([{"name": "prefers-color-scheme", "value": name}]);
        browser.chromium("Emulation.setEmulatedMedia", &json!({"features": features}));
    };
    let size = |width: u32| {
        let height = browser.script("return document.documentElement.scrollHeight").as_u64().unwrap().clamp(700, 4000);
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        browser.chromium("Emulation.setDeviceMetricsOverride", &metrics);
    };
    for (kind, color, width) in [("light", "light", 1280), ("dark", "dark", 1280), ("narrow", "light", 400)] {
        scheme(color);
        // Twice: how high it is depends on how wide it is.
        size(width);
        size(width);
        let png = BASE64_STANDARD.decode(browser.screenshot()).unwrap();
        std::fs::write(directory.join(format!("{name}-{kind}.png")), png).unwrap();
    }
    scheme("light");
    browser.chromium("Emulation.clearDeviceMetricsOverride", &json!({}));
}

/// The texts of a table's rows, cell by cell.
fn rows(browser: &Browser) -> Vec<Vec<String>> {
    let script = "return [...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))";
    serde_json::from_value(browser.script(script)).unwrap()
}

/// The stages of the chain that is shown: name, verdict, text.
fn stages(browser: &Browser) -> Vec<(String, String, String)> {
    browser.find(".stage");
    let script = "return [...document.querySelectorAll('.stage')].map(stage => [stage.dataset.stage, stage.dataset.verdict, stage.innerText])";
    serde_json::from_value(browser.script(script)).unwrap()
}

fn stage<'a>(stages: &'a [(String, String, String)], name: &str) -> (&'a str, &'a str) {
    stages.iter().find(|(id, ..)| id == name).map(|(_, verdict, text)| (verdict.as_str(), text.as_str())).unwrap()
}

/// Nothing ran that should not, and nothing was blocked that should run.
fn quiet(browser: &Browser) {
    assert_eq!(browser.script("return window.hacked ?? null"), Value::Null);
    assert_eq!(browser.log(), [""; 0]);
}

/// A guest that did everything, and attests after it.
fn busy_guest(rig: &Rig, log: &std::path::Path, name: &str, init: Option<InitData>) -> SimAttester {
    let attester = rig.attester(init).events(log).unwrap();
    let digest = Digest::sha256(b"manifest").to_string();
    for happening in [
        Happening::Policy { digest: Digest::sha256(b"policy") },
        Happening::ImageAdmitted(Image {
            digest: digest.clone(),
            image: format!("docker://registry.example/{name}"),
            signers: vec![format!("key {name}")],
        }),
        Happening::VolumeOpened(Volume {
            anchor: "tpm".into(),
            id: format!("data {name}"),
            protection: "disk".into(),
            root: "aa".repeat(16),
        }),
        Happening::KeyReleased { resource: "team/image-key/1".into() },
        Happening::WorkloadStarted { id: format!("web {name}"), digest },
    ] {
        attester.runtime_log().unwrap().record(&happening).unwrap();
    }
    attester
}

#[test]
fn the_console_takes_no_false_token_and_a_reading_role_is_enough() {
    let Some(browser) = Browser::start() else { return };
    let rig = Rig::new();
    open(&browser, &rig, "");
    browser.heading("Sign in");
    picture(&browser, "sign-in");
    let error = || browser.find("#sign-in-error").text();
    let try_with = |token: &str, wanted: &str| {
        browser.script("document.getElementById('token').value = ''");
        browser.find("#token").enter(token);
        browser.find("#sign-in-form button").click();
        browser.wait(wanted, || error().contains(wanted).then_some(()));
        assert!(!browser.find("#nav").is_shown() && browser.all("table").is_empty());
    };
    try_with("hunter2", "This is no token");
    try_with("a.b.c", "admin access denied");
    let stranger = PrivateKey::generate_p256();
    try_with(&admin_token(&stranger, &rig.broker.token_key(), "me", 60).unwrap(), "admin access denied");
    // A refused call is one that the browser logs; nothing else is.
    assert!(browser.log().iter().all(|line| line.contains("401")));

    rig.wire().token(&rig.attester(None));
    let auditor = token_of(&rig, "ada", Role::Auditor, None);
    browser.script("document.getElementById('token').value = ''");
    browser.find("#token").enter(&auditor);
    browser.find("#sign-in-form button").click();
    browser.heading("Guests");
    assert_eq!(rows(&browser).len(), 1);
    assert!(browser.find("#who-name").text().contains("auditor:ada"));
    // The token is in no address, no cookie, no storage and no field, and gone with the page.
    let places = browser.script(
        "return [location.href, document.cookie, document.getElementById('token').value, \
         JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.documentElement.outerHTML, \
         performance.getEntriesByType('resource').map(entry => entry.name).join()].join()",
    );
    assert!(!places.as_str().unwrap().contains(&auditor[auditor.len() - 40..]), "{places}");
    browser.find("#sign-out").click();
    browser.heading("Sign in");
    assert!(!browser.page().contains("affirming"));

    // One of a tenant sees what is its own.
    rig.broker.put_resource(&path("team/key/1"), SECRET).unwrap();
    let tenant = token_of(&rig, "tina", Role::Auditor, Some("team"));
    sign_in(&browser, &rig, &tenant, "");
    browser.heading("Resources");
    assert_eq!(rows(&browser).iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), ["team/key/1"]);
    quiet(&browser);
    browser.all("#nav a").iter().find(|link| link.text() == "Guests").unwrap().click();
    browser.heading("Not for this role");
    assert!(browser.find("#view [role=alert]").text().contains("belong to no repository"));
}

#[test]
fn a_guests_chain_is_shown_stage_by_stage() {
    let Some(browser) = Browser::start() else { return };
    let rig = Rig::new();
    let log = tempfile::tempdir().unwrap();
    rig.broker.add_reference_value("image_policy", vec![Digest::sha256(b"policy").to_string().into()], None).unwrap();
    let init = init_data("[guest]\n");
    let client = rig.client_of(busy_guest(&rig, log.path(), "web:1", Some(init)));
    client.attest().unwrap();
    client.get(&path("default/key/1")).unwrap();
    let _ = client.get(&path("default/key/none"));
    // One with another program, which gets a token that says so; one of a platform that nobody trusts; one whose init data are not its own.
    let other = log.path().join("other");
    std::fs::write(&other, "another program").unwrap();
    let wrong = SimAttester::measuring(rig.platform(), None, &other).unwrap();
    let wrong_measurement = wrong.measurement().hex();
    assert!(rig.client_of(wrong).get(&path("default/key/1")).is_err());
    let foreign = SimAttester::measuring(PrivateKey::generate_p256(), None, &other).unwrap();
    let wire = rig.wire();
    let attest = |message: &dyn Fn(&str) -> Attestation| {
        let (session, nonce) = wire.auth();
        assert_eq!(wire.attest(&session, &message(&nonce)).status, 401);
    };
    attest(&|nonce| attestation(&foreign, nonce, &PrivateKey::generate_p256()));
    attest(&|nonce| {
        let mut message = attestation(&rig.attester(Some(init_data("a"))), nonce, &PrivateKey::generate_p256());
        message.init_data.as_mut().unwrap().body = init_data("b").text().into();
        message
    });

    let auditor = token_of(&rig, "ada", Role::Auditor, None);
    sign_in(&browser, &rig, &auditor, "");
    browser.heading("Guests");
    let found = rows(&browser);
    let verdicts: Vec<&str> = found.iter().map(|row| row[VERDICT].as_str()).collect();
    assert_eq!(verdicts.last(), Some(&"affirming"), "{found:?}");
    assert!(verdicts.contains(&"warning") && found.iter().all(|row| row[TEE] == "sim simulated"), "{found:?}");
    assert!(found.last().unwrap()[6].contains("team"), "{found:?}");
    picture(&browser, "guests");

    browser.all("tbody a").last().unwrap().click();
    browser.heading("Guest a0");
    let good = stages(&browser);
    let names: Vec<&str> = good.iter().map(|(id, ..)| id.as_str()).collect();
    assert_eq!(names, ["session", "hardware", "firmware", "configuration", "images", "volumes", "keys", "workload"]);
    for (id, verdict, text) in &good {
        assert_eq!(verdict, "passed", "{id}: {text}");
    }
    let measurement = rig.attester(None).measurement().hex();
    let (_, firmware) = stage(&good, "firmware");
    // Expected and found: the same value twice.
    assert_eq!(firmware.matches(&measurement).count(), 2, "{firmware}");
    assert!(firmware.contains("reference value sim.measurement, good until"), "{firmware}");
    let policy = Digest::sha256(b"policy").to_string();
    assert_eq!(stage(&good, "configuration").1.matches(&policy).count(), 2);
    for (id, part) in [
        ("images", "docker://registry.example/web:1"),
        ("images", "vouched for by key web:1"),
        ("volumes", "disk, anchored by tpm"),
        ("keys", "default/key/1"),
        ("keys", "released"),
        ("workload", "web web:1"),
        ("hardware", "no hardware protects this guest"),
    ] {
        let (_, text) = stage(&good, id);
        assert!(text.contains(part), "{part} is not in {id}: {text}");
    }
    // A mark is a shape and a word.
    assert!(browser.all(".stage .badge").iter().all(|badge| !badge.text().is_empty()));
    assert_eq!(browser.all(".stage > svg[aria-hidden=true]").len(), names.len());
    picture(&browser, "chain");

    browser.find(".back").click();
    browser.heading("Guests");
    let at = rows(&browser).iter().position(|row| row[VERDICT] == "warning").unwrap();
    browser.all("tbody a")[at].click();
    browser.find(".stage.failed-line");
    let bad = stages(&browser);
    let (verdict, firmware) = stage(&bad, "firmware");
    assert_eq!(verdict, "failed");
    assert!(firmware.contains(&measurement) && firmware.contains(&wrong_measurement), "{firmware}");
    let (verdict, keys) = stage(&bad, "keys");
    assert!(verdict == "failed" && keys.contains("release refused"), "{keys}");
    assert_eq!(stage(&bad, "images").0, "not-checked");
    picture(&browser, "chain-failed");

    // Those that were refused to attest.
    browser.find(".back").click();
    browser.heading("Guests");
    browser.all(".tabs a").iter().find(|tab| tab.text() == "Refused").unwrap().click();
    browser.wait("refused guests", || (rows(&browser).first()?.len() == 5).then_some(()));
    let found = rows(&browser);
    assert_eq!(found.iter().map(|row| row[VERDICT].as_str()).collect::<Vec<_>>(), ["refused"; 2]);
    picture(&browser, "refused");
    browser.find("tbody a").click();
    browser.heading("Guest r1");
    let refused = stages(&browser);
    let (verdict, configuration) = stage(&refused, "configuration");
    let digests = ["a", "b"].map(|text| hex(&init_data(text).fit::<48>()));
    assert_eq!(verdict, "failed");
    assert!(digests.iter().all(|digest| configuration.contains(digest)), "{configuration}");
    assert!(refused.iter().all(|(id, verdict, _)| id == "configuration" || verdict == "not-checked"));
    picture(&browser, "chain-refused");
    open(&browser, &rig, "#/guests/r0");
    // Opened anew, so signed in anew, and then where one wanted to be.
    browser.script("location.reload()");
    browser.wait("sign-in", || browser.find("#token").is_shown().then_some(()));
    browser.find("#token").enter(&auditor);
    browser.find("#sign-in-form button").click();
    browser.heading("Guest r0");
    let (verdict, hardware) = {
        let shown = stages(&browser);
        let (verdict, text) = stage(&shown, "hardware");
        (verdict.to_owned(), text.to_owned())
    };
    let trusted = nacre_core::jose::Jwk::from_public(&rig.platform().public()).thumbprint().unwrap();
    assert!(verdict == "failed" && hardware.contains(&trusted), "{hardware}");
    quiet(&browser);
    open(&browser, &rig, "#/guests/a999");
    browser.heading("Not found");
}

fn hex(bytes: &[u8]) -> String {
    nacre_attest::evidence::hex(bytes)
}

#[test]
fn what_a_guest_says_of_itself_never_becomes_markup() {
    let Some(browser) = Browser::start() else { return };
    let rig = Rig::new();
    let log = tempfile::tempdir().unwrap();
    // Names of images, volumes, signers, containers and of init data; a platform's name in evidence that nobody signed; who signs in.
    let init = InitData::new(Algorithm::Sha384, [(HOSTILE.to_owned(), HOSTILE.to_owned())].into()).unwrap();
    let wire = rig.wire();
    wire.token(&busy_guest(&rig, log.path(), HOSTILE, Some(init)));
    let name = "<img src=x onerror=\"window.hacked=1\">";
    let report = sign_compact(&PrivateKey::generate_p256(), Some(name), &json!({})).unwrap();
    let (session, nonce) = wire.auth();
    let message = Attestation {
        init_data: None,
        runtime_data: RuntimeData { nonce, tee_pubkey: common::pubkey(&PrivateKey::generate_p256()) },
        tee_evidence: CompositeEvidence {
            primary_evidence: json!({"simulated": true, "report": report}),
            additional_evidence: String::new(),
        },
    };
    assert_eq!(wire.attest(&session, &message).status, 401);
    let admin = admin_token(&rig.broker.admin_key().unwrap(), &rig.broker.token_key(), HOSTILE, 600).unwrap();
    let client = AdminClient::new(&rig.config(), rig.broker.admin_key().unwrap(), HOSTILE).unwrap();
    client.put_resource(&path("a/b/c"), b"x").unwrap();

    sign_in(&browser, &rig, &admin, "");
    browser.heading("Guests");
    assert!(browser.find("#who-name").text().contains("<script>"));
    let elements = || browser.all("main img, main script, main iframe, #view a[href^='javascript']").len();
    for (page, heading, part) in [
        ("#/guests/a0", "Guest a0", HOSTILE),
        ("#/refused", "Guests", name),
        ("#/guests/r0", "Guest r0", name),
        ("#/audit", "Audit", name),
        ("#/resources", "Resources", "a/b/c"),
    ] {
        open(&browser, &rig, page);
        browser.heading(heading);
        browser.wait(part, || browser.page().contains(part).then_some(()));
        assert_eq!(elements(), 0, "{page}");
    }
    // An address is nobody's markup either.
    open(&browser, &rig, "#/guests/%3Cimg%20src=x%20onerror=window.hacked=1%3E");
    browser.heading("Not found");
    assert_eq!(elements(), 0);
    assert!(browser.log().iter().all(|line| line.contains("404")));
    // Behind all that, a string does not become markup at all, and what is inline does not run.
    let blocked = browser
        .script("try { document.body.innerHTML = '<b>x</b>'; return 'markup' } catch (error) { return error.name }");
    assert_eq!(blocked, "TypeError");
    for script in [
        "document.createElement('img').setAttribute('onerror', 'window.hacked=1')",
        "document.createElement('script').text = 'window.hacked=1'",
        "document.createElement('script').src = 'https://elsewhere.example/'",
    ] {
        let script = format!("try {{ {script}; return 'done' }} catch (error) {{ return error.name }}");
        assert_ne!(browser.script(&script), "done", "{script}");
    }
    browser.script("fetch('https://elsewhere.example/').catch(() => {})");
    browser.wait("violation", || browser.log().iter().any(|line| line.contains("connect-src")).then_some(()));
    assert_eq!(browser.script("return window.hacked ?? null"), Value::Null);
}

#[test]
fn resources_leases_and_the_audit_log_are_shown_without_values() {
    let Some(browser) = Browser::start() else { return };
    let rig = Rig::new();
    let lent = PutOptions { lease_seconds: Some(3600), ..PutOptions::default() };
    rig.broker.put_resource_with(&path("team/key/lent"), SECRET, lent).unwrap();
    rig.client().borrow(&path("team/key/lent"), None).unwrap();
    let auditor = token_of(&rig, "ada", Role::Auditor, None);
    sign_in(&browser, &rig, &auditor, "");
    go(&browser, "Resources");
    let found = rows(&browser);
    assert_eq!(found.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), ["default/key/1", "team/key/lent"]);
    assert_eq!(found[1][1..5], ["opaque", "1", "1", "for 1 hour at a time"]);
    picture(&browser, "resources");
    go(&browser, "Leases");
    let found = rows(&browser);
    assert_eq!((found[0][1].as_str(), found[0][2].as_str()), ("held", "team/key/lent"));
    picture(&browser, "leases");
    go(&browser, "Audit");
    browser.find("#chain-state .badge.passed");
    let events: Vec<String> = rows(&browser).iter().map(|row| row[2].clone()).collect();
    assert_eq!(events[0], "administrator set");
    assert!(events.iter().any(|event| event == "released simulated"), "{events:?}");
    picture(&browser, "audit");
    browser.find("#chain-state button").click();
    browser.wait("the whole chain", || browser.find("#chain-state").text().contains("each follows").then_some(()));
    assert!(!browser.page().contains(std::str::from_utf8(SECRET).unwrap()));
    quiet(&browser);

    // Somebody writes to the database: the console says so, and where.
    let (dir, config) = (rig.dir(), rig.config());
    let (handle, broker) = (rig.handle, rig.broker);
    handle.shutdown();
    drop(broker);
    tamper(&dir.join("broker.redb"), 3);
    let broker = std::sync::Arc::new(Broker::open(&dir).unwrap());
    let handle = serve(broker.clone(), "127.0.0.1:0".parse().unwrap(), Transport::Tls).unwrap();
    let config = BrokerConfig { url: handle.url(), ..config };
    let token = AdminClient::new(&config, broker.admin_key().unwrap(), "me").unwrap().token().unwrap();
    browser.open(&format!("{}/console/#/audit", handle.url()));
    browser.find("#token").enter(&token);
    browser.find("#sign-in-form button").click();
    browser.find("#chain-state .badge.failed");
    let text = browser.find("#chain-state").text();
    assert!(text.contains("Chain is broken") && text.contains("audit entry 4"), "{text}");
    picture(&browser, "audit-broken");
}

/// Changes an entry of the audit log behind the broker's back.
fn tamper(file: &std::path::Path, number: u64) {
    use redb::ReadableTable as _;

    let table = redb::TableDefinition::<&[u8], &[u8]>::new("2.audit");
    let database = redb::Database::open(file).unwrap();
    let write = database.begin_write().unwrap();
    {
        let mut table = write.open_table(table).unwrap();
        let key = number.to_be_bytes();
        let text = String::from_utf8(table.get(&key[..]).unwrap().unwrap().value().to_vec()).unwrap();
        table.insert(&key[..], text.replace("\"actor\":\"local\"", "\"actor\":\"lokal\"").as_bytes()).unwrap();
    }
    write.commit().unwrap();
}

#[test]
fn the_console_is_used_by_keyboard_and_screen_reader() {
    let Some(browser) = Browser::start() else { return };
    let rig = Rig::new();
    rig.client().get(&path("default/key/1")).unwrap();
    let auditor = token_of(&rig, "ada", Role::Auditor, None);
    open(&browser, &rig, "");
    // The field has the focus, and says what it is for.
    let field = browser.focused();
    assert_eq!((field.role().as_str(), field.label().as_str()), ("textbox", "Administrator’s token"));
    field.enter(&auditor);
    browser.press(&[Key::Enter]);
    browser.heading("Guests");
    assert_eq!(browser.title(), "Guests – Nacre key broker");
    let focused = browser.focused();
    assert_eq!((focused.role().as_str(), focused.text().as_str()), ("heading", "Guests"));
    browser.wait("status", || (browser.find("#status").attribute("role") == "status").then_some(()));
    let status = browser.script("return document.getElementById('status').textContent");
    assert_eq!(status, "1 guest");
    // Landmarks and names.
    for (css, role, label) in [
        ("#nav", "navigation", "Pages"),
        (".tabs", "navigation", "Lists of guests"),
        ("main", "main", ""),
        ("header", "banner", ""),
        ("table", "table", "Attested guests, the newest first"),
        (".scroll", "region", "Attested guests, the newest first"),
        ("thead th", "columnheader", "Guest"),
        ("#sign-out", "button", "Sign out"),
    ] {
        let found = browser.find(css);
        assert_eq!((found.role().as_str(), found.label().as_str()), (role, label), "{css}");
    }
    assert_eq!(browser.find("#nav [aria-current=page]").label(), "Guests");
    assert_eq!(browser.find("tbody th").role(), "rowheader");
    // From the top: the way past the navigation, then into a guest, by Tab and Enter only.
    browser.script("document.activeElement.blur()");
    browser.tab_to(".skip");
    assert_eq!(browser.focused().label(), "Skip to the content");
    browser.press(&[Key::Enter]);
    assert_eq!(browser.focused().text(), "Guests");
    browser.tab_to("tbody a");
    // What has the focus can be seen to have it.
    let outline = browser.script("return getComputedStyle(document.activeElement).outlineStyle");
    assert_eq!(outline, "solid");
    browser.press(&[Key::Enter]);
    browser.heading("Guest a0");
    assert_eq!(browser.focused().role(), "heading");
    let chain = browser.find("ol.chain");
    assert_eq!((chain.role().as_str(), chain.label().as_str()), ("list", "Chain of trust"));
    assert_eq!(browser.find(".stage").role(), "listitem");
    assert_eq!(browser.find(".stage .checks").label(), "Checks of stage Session");
    let heads: Vec<String> = browser.all(".stage h3").iter().map(nacre_testkit::Element::text).collect();
    assert_eq!(heads[1], "2 Hardware and TCB");
    // Back out of it, and through all pages.
    browser.press(&[Key::BackTab]);
    assert_eq!(browser.focused().text(), "All guests");
    browser.press(&[Key::Enter]);
    browser.heading("Guests");
    for page in ["Resources", "Leases", "Audit"] {
        browser.tab_to(&format!("#nav a[href='#/{}']", page.to_lowercase()));
        browser.press(&[Key::Enter]);
        browser.heading(page);
        assert_eq!(browser.find("#nav [aria-current=page]").text(), page);
        assert_eq!(browser.focused().text(), page);
    }
    browser.tab_to("#chain-state button");
    browser.press(&[Key::Space]);
    browser.wait("the whole chain", || browser.find("#chain-state").text().contains("each follows").then_some(()));
    assert_eq!(browser.focused().label(), "Check the whole chain");
    quiet(&browser);
    browser.tab_to("#sign-out");
    browser.press(&[Key::Enter]);
    browser.heading("Sign in");
    assert_eq!(browser.focused().label(), "Administrator’s token");
}

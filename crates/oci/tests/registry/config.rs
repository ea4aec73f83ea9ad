//! `registries.conf`: which endpoints, in which order.

use std::{fs, path::Path};

use nacre_oci::{
    reference::ImageRef,
    registry::{ClientConfig, CredentialStore, RegistriesConf},
    source::{ImageSource as _, TransportError},
};
use nacre_testkit::{
    registry::{Fault, Registry},
    shared,
};

use crate::support::{client_with, descriptor, fetch, manifest, noise, quick, source};

const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn resolve(conf: &str, name: &str) -> Result<Vec<(String, bool)>, TransportError> {
    let conf = RegistriesConf::parse(conf.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{conf}"));
    let endpoints = conf.resolve(&name.parse::<ImageRef>().unwrap())?;
    Ok(endpoints.into_iter().map(|endpoint| (endpoint.reference.to_string(), endpoint.insecure)).collect())
}

fn names(conf: &str, name: &str) -> Vec<String> {
    resolve(conf, name).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn the_fixture_of_the_field_is_read() {
    let Some(path) = shared("fixtures/registries/registry-configuration.toml") else { return };
    let conf = fs::read_to_string(path).unwrap();
    let blocked = resolve(&conf, "example.com/banned/x:1").unwrap_err();
    assert!(matches!(&blocked, TransportError::Blocked { .. }), "{blocked}");
    assert!(blocked.to_string().contains("example.com/banned"), "{blocked}");
    assert_eq!(names(&conf, "example.com/bannedx"), ["example.com/bannedx"]);
    assert_eq!(
        resolve(&conf, "mirror-test.com/a:1").unwrap(),
        [("127.0.0.1:5000/a:1".to_owned(), true), ("mirror-test.com/a:1".to_owned(), false)]
    );
    assert_eq!(resolve(&conf, "remapping-test.com/a/b:1").unwrap(), [("127.0.0.1:5000/a/b:1".to_owned(), true)]);
    assert_eq!(resolve(&conf, "127.0.0.1:5000/x").unwrap(), [("127.0.0.1:5000/x".to_owned(), true)]);
    let parsed = RegistriesConf::parse(conf.as_bytes()).unwrap();
    let candidates: Vec<String> = parsed.candidates("busybox:1").unwrap().iter().map(ImageRef::to_string).collect();
    assert_eq!(candidates, ["docker.io/library/busybox:1", "example1.com/busybox:1"]);
}

#[test]
fn prefixes_match_on_boundaries_and_the_longest_wins() {
    let conf = r#"
        [[registry]]
        location = "r.example"
        [[registry]]
        prefix = "r.example/team"
        location = "s.example:5000/mirror"
        [[registry]]
        prefix = "r.example/team/app:v1"
        location = "pinned.example/app:v2"
        [[registry]]
        prefix = "*.wild.example"
        insecure = true
        [[registry]]
        prefix = "*.moved.example"
        location = "new.example/old"
        [[registry]]
        prefix = "x.wild.example/secret"
        blocked = true
    "#;
    assert_eq!(names(conf, "r.example/teamwork/a:1"), ["r.example/teamwork/a:1"]);
    assert_eq!(names(conf, "r.example/team/a:1"), ["s.example:5000/mirror/a:1"]);
    assert_eq!(names(conf, "r.example/team:1"), ["s.example:5000/mirror:1"]);
    assert_eq!(names(conf, "r.example/team/app:v1"), ["pinned.example/app:v2"]);
    assert_eq!(names(conf, "r.example/team/app:v11"), ["s.example:5000/mirror/app:v11"]);
    assert_eq!(names(conf, "r.example:5000/team/a"), ["r.example:5000/team/a"]);
    assert_eq!(resolve(conf, "a.b.wild.example/x").unwrap(), [("a.b.wild.example/x".to_owned(), true)]);
    assert_eq!(resolve(conf, "wild.example/x").unwrap(), [("wild.example/x".to_owned(), false)]);
    assert_eq!(resolve(conf, "notwild.example/x").unwrap(), [("notwild.example/x".to_owned(), false)]);
    assert_eq!(
        resolve(conf, "evil.example/x.wild.example").unwrap(),
        [("evil.example/x.wild.example".to_owned(), false)]
    );
    assert_eq!(names(conf, "a.moved.example/x/y:1"), ["new.example/old/x/y:1"]);
    assert!(resolve(conf, "x.wild.example/secret/a").is_err());
}

#[test]
fn mirrors_apply_by_digest_or_tag() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let conf = r#"
        [[registry]]
        location = "r.example"
        [[registry.mirror]]
        location = "all.example"
        [[registry.mirror]]
        location = "digest.example"
        pull-from-mirror = "digest-only"
        [[registry.mirror]]
        location = "tag.example/x"
        pull-from-mirror = "tag-only"
        [[registry]]
        location = "d.example"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "all.example"
    "#;
    assert_eq!(names(conf, "r.example/a:1"), ["all.example/a:1", "tag.example/x/a:1", "r.example/a:1"]);
    let by_digest = |host: &str| format!("{host}/a@{digest}");
    assert_eq!(names(conf, &by_digest("r.example")), ["all.example", "digest.example", "r.example"].map(by_digest));
    assert_eq!(names(conf, "d.example/a:1"), ["d.example/a:1"]);
    assert_eq!(names(conf, &by_digest("d.example")), ["all.example", "d.example"].map(by_digest));
}

#[test]
fn short_names_have_aliases_and_search_registries() {
    let conf = RegistriesConf::parse(
        br#"
        unqualified-search-registries = ["one.example", "two.example:5000"]
        short-name-mode = "permissive"
        [aliases]
        "app" = "r.example/team/app"
        "team/tool" = "r.example/tool"
        "#,
    )
    .unwrap();
    let candidates = |name: &str| conf.candidates(name).unwrap().iter().map(ImageRef::to_string).collect::<Vec<_>>();
    assert_eq!(candidates("app:v1"), ["r.example/team/app:v1"]);
    assert_eq!(candidates("team/tool"), ["r.example/tool"]);
    assert_eq!(candidates("other/x:1"), ["one.example/other/x:1", "two.example:5000/other/x:1"]);
    assert_eq!(candidates("q.example/x"), ["q.example/x"]);
    let strict = RegistriesConf::parse(
        b"unqualified-search-registries = ['a.example','b.example']\nshort-name-mode = 'enforcing'",
    )
    .unwrap();
    assert!(strict.candidates("x").unwrap_err().to_string().contains("ambiguous"));
    let error = RegistriesConf::empty().candidates("busybox").unwrap_err().to_string();
    assert!(error.contains("docker.io/library/busybox"), "{error}");
}

#[test]
fn drop_ins_override_in_the_order_of_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write(
        "10-a.conf",
        "unqualified-search-registries = ['a.example']\n[[registry]]\nlocation = 'r.example'\ninsecure = true\n[aliases]\n'x' = 'r.example/x'\n'y' = 'r.example/y'\n",
    );
    write("20-b.conf", "[[registry]]\nlocation = 'r.example'\nblocked = true\n[aliases]\n'x' = ''\n");
    write("30-c.txt", "not read [");
    let mut conf = RegistriesConf::parse(b"unqualified-search-registries = ['main.example']").unwrap();
    conf.add_drop_ins(dir.path()).unwrap();
    conf.add_drop_ins(Path::new("/nonexistent")).unwrap();
    assert!(conf.resolve(&"r.example/a".parse().unwrap()).unwrap_err().to_string().contains("20-b.conf"));
    assert_eq!(conf.candidates("x").unwrap()[0].to_string(), "a.example/x");
    assert_eq!(conf.candidates("y").unwrap()[0].to_string(), "r.example/y");
    write("40-d.conf", "[");
    assert!(conf.add_drop_ins(dir.path()).unwrap_err().to_string().contains("40-d.conf"));
}

#[test]
fn files_that_are_not_valid_are_refused() {
    for (text, words) in [
        ("[registries.search]\nregistries = ['docker.io']", "version 1"),
        ("[registries.block]\nregistries = ['docker.io']", "version 1"),
        ("[[registry]]", "neither prefix nor location"),
        ("[[registry]]\nlocation = 'r.example'\nblcoked = true", "blcoked"),
        ("[[registry]]\nlocation = 'r.example'\nblocked = 'yes'", "blocked"),
        ("[[registry]]\nprefix = '*.example/foo'", "wildcard"),
        ("[[registry]]\nprefix = 'a.*.example'", "no name"),
        ("[[registry]]\nprefix = '*.a.example'\nlocation = '*.b.example'", "must not be a wildcard"),
        ("[[registry]]\nlocation = 'https://r.example'", "no scheme"),
        ("[[registry]]\nlocation = 'r.example/../x'", "no name"),
        ("[[registry]]\nlocation = 'r.example:port'", "host"),
        ("[[registry]]\nlocation = 'r.example'\n[[registry]]\nlocation = 'r.example'\nblocked = true", "two different"),
        (
            "[[registry]]\nlocation = 'r.example'\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = 'm.example'\npull-from-mirror = 'tag-only'",
            "exclude",
        ),
        ("[[registry]]\nlocation = 'r.example'\n[[registry.mirror]]\nlocation = ''", "location"),
        (
            "[[registry]]\nlocation = 'r.example'\n[[registry.mirror]]\nlocation = 'm.example'\npull-from-mirror = 'never'",
            "never",
        ),
        ("short-name-mode = 'maybe'", "maybe"),
        ("unqualified-search-registries = ['a b']", "search"),
        ("[aliases]\n'a.example/x' = 'b.example/x'", "short name"),
        ("[aliases]\n'x' = 'y'", "must name a registry"),
        ("[aliases]\n'x' = 'b.example/y:1'", "without tag"),
        ("x = [", "not valid"),
    ] {
        let error = RegistriesConf::parse(text.as_bytes()).err().unwrap_or_else(|| panic!("{text}"));
        assert!(error.contains(words), "{text}: {error}");
    }
    assert!(RegistriesConf::parse(&vec![b'#'; 2 << 20]).is_err());
    assert!(RegistriesConf::parse(b"\xff").is_err());
    RegistriesConf::parse(b"some-future-setting = true\ncredential-helpers = ['x']\n").unwrap();
}

fn mirrored(registries: &[&Registry]) -> String {
    let [mirrors @ .., primary] = registries else { panic!() };
    let mut conf = format!("[[registry]]\nprefix = 'r.example'\nlocation = '{}'\ninsecure = true\n", primary.host());
    for mirror in mirrors {
        conf.push_str(&format!("[[registry.mirror]]\nlocation = '{}/m'\ninsecure = true\n", mirror.host()));
    }
    conf
}

#[test]
fn mirrors_are_tried_in_order() {
    let blob = noise(500_000);
    let (dead, empty, good, primary) = (
        Registry::memory().unwrap(),
        Registry::memory().unwrap(),
        Registry::memory().unwrap(),
        Registry::memory().unwrap(),
    );
    dead.set_faults(|_| Fault::Answer { status: 503, headers: vec![], body: vec![] });
    good.put_manifest("m/a", Some("1"), TYPE, &manifest()).unwrap();
    good.put_blob(&blob).unwrap();
    let conf = mirrored(&[&dead, &empty, &good, &primary]);
    let config = ClientConfig { insecure: false, ..quick() };
    let (client, notes) = client_with(config, &conf, CredentialStore::anonymous());
    let source = source(&client, "r.example/a:1");
    source.manifest(None).unwrap();
    assert_eq!(fetch(&source, &descriptor(&blob)).unwrap(), blob);
    assert!(notes.all().contains("going on at"), "{}", notes.all());
    // The dead one is asked for the manifest and its one repetition, and then comes last.
    assert!(dead.count(|request| request.path != "/v2/") <= 2, "{:?}", dead.requests());
    assert_eq!(primary.requests().len(), 0);
    // What none has is the primary's to deny.
    let error = crate::support::source(&client, "r.example/missing:1").manifest(None).unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains(&primary.host()), "{error}");
}

#[test]
fn a_mirror_that_dies_in_the_middle_is_replaced() {
    let blob = noise(1_000_000);
    let (mirror, primary) = (Registry::memory().unwrap(), Registry::memory().unwrap());
    for registry in [&mirror, &primary] {
        registry.put_blob(&blob).unwrap();
    }
    mirror.set_faults(|request| match (request.is_blob_get(), request.attempt) {
        (true, 1) => Fault::CutAfter(600_000),
        (true, _) => Fault::Close,
        _ => Fault::Serve,
    });
    let (client, _) = client_with(
        ClientConfig { insecure: false, ..quick() },
        &mirrored(&[&mirror, &primary]),
        CredentialStore::anonymous(),
    );
    assert_eq!(fetch(&source(&client, "r.example/a:1"), &descriptor(&blob)).unwrap(), blob);
    let ranges: Vec<_> =
        primary.requests().into_iter().filter_map(|request| request.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges.len(), 1);
    assert!(primary.body_bytes_sent() < 900_000);
}

#[test]
fn a_mirror_that_lies_is_replaced() {
    let blob = noise(100_000);
    for lie in [
        Fault::html(200),
        Fault::ContentLength(5),
        Fault::Answer { status: 200, headers: vec![], body: b"short".to_vec() },
    ] {
        let (mirror, primary) = (Registry::memory().unwrap(), Registry::memory().unwrap());
        mirror.put_blob(&blob).unwrap();
        primary.put_blob(&blob).unwrap();
        mirror.set_faults(move |request| if request.path == "/v2/" { Fault::Serve } else { lie.clone() });
        let (client, _) = client_with(quick(), &mirrored(&[&mirror, &primary]), CredentialStore::anonymous());
        assert_eq!(fetch(&source(&client, "r.example/a:1"), &descriptor(&blob)).unwrap(), blob);
    }
}

#[test]
fn plain_http_is_for_registries_that_were_named() {
    let registry = Registry::memory().unwrap();
    registry.put_manifest("a", Some("1"), TYPE, &manifest()).unwrap();
    let name = format!("{}/a:1", registry.host());
    let secure = ClientConfig { insecure: false, system_roots: true, retries: 0, ..quick() };
    let try_with = |config: ClientConfig, conf: &str| {
        let (client, _) = client_with(config, conf, CredentialStore::anonymous());
        source(&client, &name).manifest(None).map(drop)
    };
    // Loopback is no exception, and nothing but a handshake reaches the registry.
    try_with(secure.clone(), "").unwrap_err();
    assert_eq!(registry.requests().len(), 0);
    let other = ClientConfig { insecure_registries: vec!["127.0.0.1:1".into(), "*.example".into()], ..secure.clone() };
    try_with(other, "").unwrap_err();
    let named = ClientConfig { insecure_registries: vec![registry.host()], ..secure.clone() };
    try_with(named, "").unwrap();
    try_with(secure, &format!("[[registry]]\nlocation = '{}'\ninsecure = true", registry.host())).unwrap();
}

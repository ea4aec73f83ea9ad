//! Both directions of the protocol against Trustee's own programs, where they are on PATH: `kbs-client` attests to this broker, and our guest
//! attests to `kbs`. What these found is also tested without them, by what their programs sent.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

mod common;

use std::{process::Command, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Rig, SECRET, path};
use nacre_attest::{
    client::{BrokerClient, BrokerConfig, ClientError},
    sample::SampleAttester,
};
use nacre_broker::{Settings, Transport};
use nacre_core::{
    Clock as _, KeySource as _, KeySourceError,
    jose::{PrivateKey, PublicKey},
};
use nacre_testkit::{Tls, TrusteeClient, TrusteeKbs, require, run};

fn config(url: String) -> BrokerConfig {
    BrokerConfig { backoff: std::time::Duration::from_millis(5), attempts: 3, ..BrokerConfig::new(url) }
}

fn guest(config: BrokerConfig) -> BrokerClient {
    BrokerClient::new(config, Arc::new(SampleAttester::new(None).unwrap())).unwrap()
}

#[test]
fn trustees_client_attests_to_this_broker_and_gets_what_it_may() {
    let settings = Settings { allow_simulated: true, ..Settings::default() };
    for transport in [Transport::PlainHttp, Transport::Tls] {
        let rig = Rig::with(settings.clone(), transport);
        let certificate = rig.dir().join("tls.crt");
        let certificate = (transport == Transport::Tls).then_some(certificate);
        let Some(client) = TrusteeClient::new(rig.handle.url(), certificate) else { return };
        let get = ["get-resource", "--path", "default/key/1"];
        // Nobody recognises it.
        let refused = client.fail(&get);
        assert!(refused.contains("PolicyDeny"), "{refused}");
        rig.broker.add_reference_value("sample.svn", vec!["1".into()], None).unwrap();
        assert_eq!(BASE64_STANDARD.decode(client.run(&get)).unwrap(), SECRET);
        let missing = client.fail(&["get-resource", "--path", "default/key/none"]);
        assert!(missing.contains("ResourceNotFound"), "{missing}");
        // Each kind of key that its guests have: made by itself (P-256), and from files.
        let Some(openssl) = require("openssl") else { return };
        let keys = tempfile::tempdir().unwrap();
        for (name, arguments) in [
            ("rsa", "genrsa -traditional -out rsa 2048"),
            ("p256", "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out p256"),
            ("p521", "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-521 -out p521"),
        ] {
            run(Command::new(&openssl).args(arguments.split(' ')).current_dir(keys.path()));
            let key = keys.path().join(name).display().to_string();
            let secret = client.run(&[&get[..], &["--tee-key-file", &key]].concat());
            assert_eq!(BASE64_STANDARD.decode(secret).unwrap(), SECRET, "{name}");
            // By the token, without a session.
            let token = keys.path().join("token");
            std::fs::write(&token, client.run(&["attest", "--tee-key-file", &key])).unwrap();
            let token =
                ["--tee-key-file", &key, "--attestation-token", &token.display().to_string()].map(str::to_owned);
            let token: Vec<&str> = token.iter().map(String::as_str).collect();
            assert_eq!(BASE64_STANDARD.decode(client.run(&[&get[..], &token].concat())).unwrap(), SECRET, "{name}");
        }
        // All of it is marked.
        let entries = rig.broker.audit(0, 1000).unwrap();
        assert!(entries.iter().filter(|entry| entry.event == "released").all(|entry| entry.simulated));
        // Init data that nothing binds are not believed.
        let init = "algorithm = \"sha384\"\nversion = \"0.1.0\"\n[data]\n";
        let refused = client.fail(&["get-resource", "--path", "default/key/1", init]);
        assert!(refused.contains("it has no place for any"), "{refused}");
    }
}

#[test]
fn trustees_client_gets_nothing_where_simulation_is_not_allowed() {
    let rig = Rig::with(Settings::default(), Transport::PlainHttp);
    let Some(client) = TrusteeClient::new(rig.handle.url(), None) else { return };
    rig.broker.add_reference_value("sample.svn", vec!["1".into()], None).unwrap();
    let refused = client.fail(&["get-resource", "--path", "default/key/1"]);
    assert!(refused.contains("SimulatedTee"), "{refused}");
}

#[test]
fn our_guest_attests_to_trustees_broker_and_gets_what_it_may() {
    let Some(tls) = Tls::new() else { return };
    for tls in [None, Some(&tls)] {
        let Some(kbs) = TrusteeKbs::start(tls) else { return };
        let certificate = tls.map(Tls::ca);
        let Some(admin) = TrusteeClient::new(kbs.url(), certificate.clone()) else { return };
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, SECRET).unwrap();
        admin.run(&["config", "set-resource", "--path", "a/b/c", "--resource-file", &file.display().to_string()]);
        let pinned = |key: Option<PublicKey>| BrokerConfig {
            certificate: certificate.as_ref().map(|path| std::fs::read_to_string(path).unwrap()),
            token_key: key,
            ..config(kbs.url())
        };
        // By default it gives nothing to a sample of a TEE; that is its policy's word, and final.
        let client = guest(pinned(None));
        let denied = client.fetch(&"kbs:///a/b/c".parse().unwrap()).unwrap_err();
        assert!(matches!(denied, KeySourceError::Denied { .. }), "{denied}\n{}", kbs.log());
        admin.run(&["config", "set-resource-policy", "--allow-all"]);
        assert_eq!(client.get(&path("a/b/c")).unwrap().expose(), SECRET);
        let missing = client.get(&path("a/b/none")).unwrap_err();
        assert!(missing.to_string().contains("does its path exist there?"), "{missing}");
        assert_eq!(client.now(), None, "nobody pinned who signs the time");

        let client = guest(pinned(Some(kbs.token_key().public())));
        assert_eq!(client.get(&path("a/b/c")).unwrap().expose(), SECRET);
        let attested = client.attest().unwrap();
        let claims = attested.claims().unwrap();
        assert!(claims.is_simulation() && !claims.simulated && claims.nbf.is_none());
        assert!(client.now().is_some());
        let other = guest(pinned(Some(PrivateKey::generate_p256().public())));
        assert!(matches!(other.get(&path("a/b/c")), Err(ClientError::Token(_))));

        // What its policy appraises, it appraises.
        admin.run(&["config", "set-resource-policy", "--affirming"]);
        let denied = guest(pinned(None)).get(&path("a/b/c")).unwrap_err();
        assert!(matches!(&denied, ClientError::Refused { status: 401, kind, .. } if kind == "PolicyDeny"), "{denied}");
        for (name, value, flags) in [
            ("svn", "1", &[][..]),
            ("launch_digest", "abcde", &[]),
            ("major_version", "1", &["--as-integer", "--as-single-value"]),
            ("minimum_minor_version", "1", &["--as-integer", "--as-single-value"]),
        ] {
            admin.run(&[&["config", "set-sample-reference-value", name, value], flags].concat());
        }
        assert_eq!(guest(pinned(None)).get(&path("a/b/c")).unwrap().expose(), SECRET);
    }
}

//! A broker on loopback, a simulated platform it trusts, and guests on it.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::sync::Arc;

use nacre_attest::{
    client::{BrokerClient, BrokerConfig, Call, Credential, Reply, Transport as Channel},
    evidence::Attester,
    initdata::InitData,
    rcar::{
        Attestation, Challenge, CompositeEvidence, ErrorBody, InitDataMessage, Request, RuntimeData, TokenReply,
        report_data,
    },
    sim::SimAttester,
};
use nacre_broker::{
    AdminClient, Administrator, Broker, Handle, InitOptions, Role, Settings, Transport, admin_token, serve,
};
use nacre_core::{
    Algorithm, ResourcePath,
    jose::{Jwk, PrivateKey},
};
use serde_json::{Value, json};

pub(crate) const SECRET: &[u8] = b"hunter2-hunter2-hunter2-hunter2!";

pub(crate) struct Rig {
    pub(crate) broker: Arc<Broker>,
    pub(crate) handle: Handle,
    pub(crate) guests: Guests,
    dir: tempfile::TempDir,
}

/// A simulated platform and a program on it.
pub(crate) struct Guests {
    platform_pem: String,
    program: std::path::PathBuf,
}

impl Guests {
    pub(crate) fn trusted_by(broker: &Broker, dir: &std::path::Path) -> Self {
        let platform = PrivateKey::generate_p256();
        broker.add_sim_platform_key(&platform.public()).unwrap();
        let platform_pem = platform.to_pkcs8_pem().unwrap().to_string();
        // A small program in place of this test's binary, which takes a while to hash; one test does measure the binary.
        let program = dir.join("program");
        std::fs::write(&program, "a guest").unwrap();
        let measurement = SimAttester::measuring(platform, None, &program).unwrap().measurement().hex();
        broker.add_reference_value("sim.measurement", vec![measurement.into()], None).unwrap();
        Self { platform_pem, program }
    }

    pub(crate) fn platform(&self) -> PrivateKey {
        PrivateKey::from_pem(&self.platform_pem).unwrap()
    }

    pub(crate) fn attester(&self, init: Option<InitData>) -> SimAttester {
        SimAttester::measuring(self.platform(), init, &self.program).unwrap()
    }
}

/// What a guest is configured with for a broker.
pub(crate) fn config(broker: &Broker, handle: &Handle) -> BrokerConfig {
    BrokerConfig {
        certificate: Some(broker.certificate_pem().to_owned()),
        token_key: Some(broker.token_key()),
        backoff: std::time::Duration::from_millis(5),
        attempts: 3,
        ..BrokerConfig::new(handle.url())
    }
}

pub(crate) fn path(text: &str) -> ResourcePath {
    text.parse().unwrap()
}

pub(crate) fn init_data(text: &str) -> InitData {
    InitData::new(Algorithm::Sha384, [("nacre.toml".to_owned(), text.to_owned())].into()).unwrap()
}

impl Rig {
    /// A broker that trusts one program on a simulated platform, and holds one secret.
    pub(crate) fn new() -> Self {
        Self::with(Settings { allow_simulated: true, ..Settings::default() }, Transport::Tls)
    }

    pub(crate) fn with(settings: Settings, transport: Transport) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let broker = Broker::init(&dir.path().join("broker"), &InitOptions { names: Vec::new(), settings }).unwrap();
        let guests = Guests::trusted_by(&broker, dir.path());
        broker.put_resource(&path("default/key/1"), SECRET).unwrap();
        let broker = Arc::new(broker);
        let handle = serve(broker.clone(), "127.0.0.1:0".parse().unwrap(), transport).unwrap();
        Self { broker, handle, guests, dir }
    }

    /// The broker's directory.
    pub(crate) fn dir(&self) -> std::path::PathBuf {
        self.dir.path().join("broker")
    }

    pub(crate) fn platform(&self) -> PrivateKey {
        self.guests.platform()
    }

    pub(crate) fn config(&self) -> BrokerConfig {
        config(&self.broker, &self.handle)
    }

    pub(crate) fn attester(&self, init: Option<InitData>) -> SimAttester {
        self.guests.attester(init)
    }

    pub(crate) fn client(&self) -> BrokerClient {
        self.client_of(self.attester(None))
    }

    pub(crate) fn client_of(&self, attester: SimAttester) -> BrokerClient {
        BrokerClient::new(self.config(), Arc::new(attester)).unwrap()
    }

    pub(crate) fn admin(&self) -> AdminClient {
        AdminClient::new(&self.config(), self.broker.admin_key().unwrap(), "tester").unwrap()
    }

    pub(crate) fn wire(&self) -> Wire {
        Wire(Channel::new(&self.config()).unwrap())
    }
}

/// The protocol by hand, for what no client of ours would do.
pub(crate) struct Wire(pub(crate) Channel);

impl Wire {
    pub(crate) fn post(&self, path: &str, credential: Credential<'_>, body: &[u8]) -> Reply {
        self.0.call("test", path, credential, Call::Post("application/json", body), 1 << 24).unwrap()
    }

    pub(crate) fn get(&self, path: &str, credential: Credential<'_>) -> Reply {
        self.0.call("test", path, credential, Call::Get, 1 << 24).unwrap()
    }

    pub(crate) fn auth(&self) -> (String, String) {
        let reply = self.post("/kbs/v0/auth", Credential::None, &serde_json::to_vec(&Request::new("sim")).unwrap());
        assert_eq!(reply.status, 200);
        (reply.session.unwrap(), Challenge::parse(&reply.body).unwrap().nonce)
    }

    pub(crate) fn attest(&self, session: &str, attestation: &Attestation) -> Reply {
        self.post("/kbs/v0/attest", Credential::Session(session), &serde_json::to_vec(attestation).unwrap())
    }

    pub(crate) fn token(&self, attester: &dyn Attester) -> String {
        let (session, nonce) = self.auth();
        let reply = self.attest(&session, &attestation(attester, &nonce, &PrivateKey::generate_p256()));
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        TokenReply::parse(&reply.body).unwrap().token
    }
}

pub(crate) fn pubkey(key: &PrivateKey) -> Value {
    serde_json::to_value(Jwk::from_public(&key.public())).unwrap()
}

/// What an honest guest sends.
pub(crate) fn attestation(attester: &dyn Attester, nonce: &str, key: &PrivateKey) -> Attestation {
    let runtime_data = RuntimeData { nonce: nonce.into(), tee_pubkey: pubkey(key) };
    let bound = report_data(&runtime_data, "").unwrap();
    Attestation {
        init_data: attester.init_data().map(|init| InitDataMessage { format: "toml".into(), body: init.text().into() }),
        runtime_data,
        tee_evidence: CompositeEvidence {
            primary_evidence: attester.evidence(&bound).unwrap(),
            additional_evidence: String::new(),
        },
    }
}

/// The status and the kind of error of a refusal.
pub(crate) fn refusal(reply: &Reply) -> (u16, String) {
    let error = ErrorBody::parse(&reply.body).unwrap();
    assert!(error.kind.starts_with("https://github.com/confidential-containers/kbs/errors/"));
    (reply.status, error.variant().to_owned())
}

pub(crate) fn refused(status: u16, kind: &str) -> (u16, String) {
    (status, kind.to_owned())
}

pub(crate) fn policy(body: &str) -> String {
    format!("package policy\nimport rego.v1\n{body}")
}

pub(crate) fn trust(executables: i64) -> String {
    policy(&format!("trust_claims := {}", json!({"executables": executables, "hardware": 2, "configuration": 2})))
}

/// A token of somebody with a role.
pub(crate) fn token_of(rig: &Rig, name: &str, role: Role, repository: Option<&str>) -> String {
    let key = PrivateKey::generate_p256();
    let admin = Administrator {
        name: name.into(),
        role,
        repository: repository.map(str::to_owned),
        key: key.public().to_pem().unwrap(),
    };
    rig.broker.set_admin(&admin).unwrap();
    admin_token(&key, &rig.broker.token_key(), name, 600).unwrap()
}

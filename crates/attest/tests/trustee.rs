//! What Trustee's programs sent, recorded (August 2026, protocol 0.4.0, TEE `sample`): both of our ends read it, and refuse it changed.
//!
//! The keys in `trustee/` were made for the recording and are good for nothing else. Their programs themselves: `crates/broker/tests/trustee.rs`.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use nacre_attest::{
    client::{BrokerClient, BrokerConfig, ClientError},
    ear::Ear,
    evidence::{EvidenceError, Expected, Verifier as _},
    rcar::{Attestation, Request, TokenReply, report_data},
    sample::{self, SampleAttester, SampleVerifier},
};
use nacre_core::{
    KeySource as _, KeySourceError,
    jose::{Jwe, Jwk, PrivateKey, PublicKey},
};
use serde_json::Value;

const CHALLENGE: &str = include_str!("trustee/challenge.json");
const TOKEN: &str = include_str!("trustee/token.json");
const VERSION: &str = include_str!("trustee/version.json");
const POLICY_DENY: &str = include_str!("trustee/policy-deny.json");
const MISSING: &str = include_str!("trustee/missing.json");

#[test]
fn what_trustees_client_sends_is_read_and_bound() {
    let request = Request::parse(include_bytes!("trustee/request.json")).unwrap();
    assert_eq!((request.version.as_str(), request.tee.as_str()), ("0.4.0", sample::TEE));
    for (bytes, kind) in [
        (include_str!("trustee/attestation-p256.json"), "EC P-256"),
        (include_str!("trustee/attestation-p521.json"), "EC P-521"),
        (include_str!("trustee/attestation-rsa.json"), "RSA"),
    ] {
        let message = Attestation::parse(bytes.as_bytes()).unwrap();
        let key: Jwk = serde_json::from_value(message.runtime_data.tee_pubkey.clone()).unwrap();
        let key: PublicKey = key.to_public().unwrap();
        assert_eq!(key.kind(), kind);
        let verify = |message: &Attestation| {
            let bound = report_data(&message.runtime_data, &message.tee_evidence.additional_evidence).unwrap();
            let expected = Expected { report_data: &bound, init_data: None, now: 0 };
            SampleVerifier.verify(&message.tee_evidence.primary_evidence, &expected).map(|_| ())
        };
        verify(&message).unwrap();
        let changes: [fn(&mut Attestation); 3] = [
            |message| message.runtime_data.nonce.push('='),
            |message| message.runtime_data.tee_pubkey["use"] = Value::from("enc"),
            |message| message.tee_evidence.additional_evidence.push_str("{}"),
        ];
        for change in changes {
            let mut changed = message.clone();
            change(&mut changed);
            assert!(matches!(verify(&changed), Err(EvidenceError::ReportData { .. })), "{kind}");
        }
    }
}

#[test]
fn trustees_token_is_believed_by_its_key_without_nbf_and_mark() {
    let token = TokenReply::parse(TOKEN.as_bytes()).unwrap().token;
    let key = PublicKey::from_pem(include_str!("trustee/token-key.pem")).unwrap();
    let ear = Ear::verify(&token, &key).unwrap().into_inner();
    assert!(ear.nbf.is_none() && !ear.simulated);
    assert!(ear.is_simulation(), "its evidence is of a sample of a TEE");
    assert!(ear.check_time(ear.iat).is_ok() && ear.check_time(ear.exp - 1).is_ok());
    assert!(ear.check_time(ear.iat - 1).is_err() && ear.check_time(ear.exp).is_err());
    let sent = Attestation::parse(include_bytes!("trustee/token-attestation.json")).unwrap();
    assert_eq!(ear.tee_pubkey(), Some(&sent.runtime_data.tee_pubkey));
    assert!(Ear::verify(&token, &PrivateKey::generate_p256().public()).is_err());
}

#[test]
fn what_trustees_broker_encrypts_opens_with_each_kind_of_tee_key() {
    for (key, resource) in [
        (include_str!("trustee/p256.pem"), include_bytes!("trustee/resource-p256.json").as_slice()),
        (include_str!("trustee/p521.pem"), include_bytes!("trustee/resource-p521.json")),
        (include_str!("trustee/rsa.pem"), include_bytes!("trustee/resource-rsa.json")),
    ] {
        let key = PrivateKey::from_pem(key).unwrap();
        let jwe = Jwe::parse(resource).unwrap();
        assert_eq!(jwe.decrypt_with([&key]).unwrap().expose(), b"hunter2");
        assert!(jwe.decrypt_with([&PrivateKey::generate_p256()]).is_err());
    }
}

/// Answers as Trustee's broker did; a call for a resource is answered by `resource`. Which paths were asked for is noted.
fn trustee(auth: (u16, &'static str), resource: &'static str) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let path = read_call(&stream);
            let (status, body) = match path.as_str() {
                "/kbs/v0/auth" => auth,
                "/kbs/v0/attest" => (200, TOKEN),
                _ => (401, resource),
            };
            noted.lock().unwrap().push(path);
            let cookie =
                "set-cookie: kbs-session-id=a075269755184bbe8ba844aad324dc3b; Expires=Sat, 28 Nov 2026 19:16:59 GMT";
            let head = format!(
                "HTTP/1.1 {status} X\r\nconnection: close\r\n{cookie}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _ = (&stream).write_all(format!("{head}{body}").as_bytes());
        }
    });
    (url, asked)
}

/// The path of a call, which is read to its end.
fn read_call(mut stream: &TcpStream) -> String {
    let mut call = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&call).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return head.split(' ').nth(1).unwrap().to_owned();
            }
        }
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "cut: {text}");
        call.extend_from_slice(&buffer[..count]);
    }
}

fn guest(url: String) -> BrokerClient {
    let config = BrokerConfig { backoff: Duration::from_millis(1), attempts: 2, ..BrokerConfig::new(url) };
    BrokerClient::new(config, Arc::new(SampleAttester::new(None).unwrap())).unwrap()
}

#[test]
fn trustees_401_is_final_where_it_is_about_the_resource() {
    let (url, asked) = trustee((200, CHALLENGE), POLICY_DENY);
    let denied = guest(url).fetch(&"kbs:///a/b/c".parse().unwrap()).unwrap_err();
    assert!(
        matches!(&denied, KeySourceError::Denied { reason, .. } if reason == "Access denied by policy"),
        "{denied}"
    );
    // Not attested again, and so not denied again.
    assert_eq!(*asked.lock().unwrap(), ["/kbs/v0/auth", "/kbs/v0/attest", "/kbs/v0/resource/a/b/c"]);

    let (url, asked) = trustee((200, CHALLENGE), MISSING);
    let missing = guest(url).get(&"a/b/c".parse().unwrap()).unwrap_err().to_string();
    assert!(missing.contains("does its path exist there?"), "{missing}");
    assert_eq!(asked.lock().unwrap().len(), 3);
}

#[test]
fn trustees_refusal_of_a_version_is_passed_on() {
    let (url, asked) = trustee((401, VERSION), MISSING);
    let refused = guest(url).attest().unwrap_err();
    assert!(matches!(&refused, ClientError::Refused { step: "auth", status: 401, .. }), "{refused}");
    assert!(refused.to_string().contains("expect =0.4.0 while the request is 0.3.0"), "{refused}");
    assert_eq!(asked.lock().unwrap().len(), 1);
}

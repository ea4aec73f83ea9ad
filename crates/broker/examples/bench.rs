//! What the parts of `cargo xtask bench broker` are made of: a broker that is served, and guests that attest to it.
//!
//! `bench init DIR [DATABASE]`, `bench serve DIR` (until its input ends; prints its URL), `bench load DIR SECONDS THREADS keep|new URL…`,
//! `bench sessions DIR COUNT URL`: figures go to standard output, a JSON object a line.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that cannot go on may panic, and prints")]

use std::{
    io::Read as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nacre_attest::{
    client::{BrokerConfig, Call, Credential, Transport as Channel},
    evidence::Attester as _,
    rcar::{Attestation, Challenge, CompositeEvidence, Request, RuntimeData, TokenReply, report_data},
    sim::SimAttester,
};
use nacre_broker::{Broker, InitOptions, Settings, Transport, serve};
use nacre_core::jose::{Jwe, Jwk, PrivateKey, PublicKey};

const SECRET: &[u8; 32] = b"a key of thirty-two bytes, as is";

fn init(dir: &Path, database: Option<&String>) {
    // All guests have one address here.
    let settings = Settings {
        allow_simulated: true,
        calls_per_second: 0,
        most_calls: 256,
        database: database.cloned(),
        ..Settings::default()
    };
    let broker = Broker::init(dir, &InitOptions { names: Vec::new(), settings }).unwrap();
    let platform = PrivateKey::generate_p256();
    std::fs::write(dir.join("platform.pem"), platform.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
    std::fs::write(dir.join("program"), "a guest").unwrap();
    broker.add_sim_platform_key(&platform.public()).unwrap();
    let measurement = attester(dir).measurement().hex();
    broker.add_reference_value("sim.measurement", vec![measurement.into()], None).unwrap();
    broker.put_resource(&"bench/key/1".parse().unwrap(), SECRET).unwrap();
}

fn attester(dir: &Path) -> SimAttester {
    let platform = PrivateKey::from_bytes(&std::fs::read(dir.join("platform.pem")).unwrap()).unwrap();
    SimAttester::measuring(platform, None, &dir.join("program")).unwrap()
}

fn serve_until_input_ends(dir: &Path) {
    let broker = Arc::new(Broker::open(dir).unwrap());
    let handle = serve(broker, "127.0.0.1:0".parse().unwrap(), Transport::Tls).unwrap();
    println!("{}", handle.url());
    let _ = std::io::stdin().read(&mut [0]);
    handle.shutdown();
}

fn config(dir: &Path, url: &str) -> BrokerConfig {
    let certificate = std::fs::read_to_string(dir.join("tls.crt")).unwrap();
    let token_key = PublicKey::from_bytes(&std::fs::read(dir.join("token.pub")).unwrap()).unwrap();
    BrokerConfig { certificate: Some(certificate), token_key: Some(token_key), ..BrokerConfig::new(url) }
}

/// One guest: challenge, evidence, token, key.
fn exchange(channel: &Channel, attester: &SimAttester) {
    let post = |path: &str, credential: Credential<'_>, body: Vec<u8>| {
        let reply = channel.call("bench", path, credential, Call::Post("application/json", &body), 1 << 20).unwrap();
        assert_eq!(reply.status, 200, "{path}: {}", String::from_utf8_lossy(&reply.body));
        reply
    };
    let reply = post("/kbs/v0/auth", Credential::None, serde_json::to_vec(&Request::new("sim")).unwrap());
    let (session, nonce) = (reply.session.unwrap(), Challenge::parse(&reply.body).unwrap().nonce);
    let key = PrivateKey::generate_p256();
    let tee_pubkey = serde_json::to_value(Jwk::from_public(&key.public())).unwrap();
    let runtime_data = RuntimeData { nonce, tee_pubkey };
    let bound = report_data(&runtime_data, "").unwrap();
    let primary_evidence = attester.evidence(&bound).unwrap();
    let tee_evidence = CompositeEvidence { primary_evidence, additional_evidence: String::new() };
    let message = Attestation { init_data: None, runtime_data, tee_evidence };
    let reply = post("/kbs/v0/attest", Credential::Session(&session), serde_json::to_vec(&message).unwrap());
    let token = TokenReply::parse(&reply.body).unwrap().token;
    let path = "/kbs/v0/resource/bench/key/1";
    let reply = channel.call("bench", path, Credential::Bearer(&token), Call::Get, 1 << 20).unwrap();
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    assert_eq!(Jwe::parse(&reply.body).unwrap().decrypt(&[key]).unwrap().expose(), SECRET);
}

fn load(dir: &Path, seconds: u64, threads: usize, keep: bool, urls: &[String]) {
    let (count, stop, attester) = (AtomicU64::new(0), AtomicBool::new(false), attester(dir));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..threads {
            let (count, stop, attester, url) = (&count, &stop, &attester, &urls[number % urls.len()]);
            let config = config(dir, url);
            scope.spawn(move || {
                let mut channel = Channel::new(&config).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    if !keep {
                        // No connection and no session of TLS to resume: a guest that has just started.
                        channel = Channel::new(&config).unwrap();
                    }
                    exchange(&channel, attester);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(seconds));
        stop.store(true, Ordering::Relaxed);
    });
    figure("exchanges", count.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64());
}

fn sessions(dir: &Path, count: usize, url: &str) {
    let (attester, threads) = (attester(dir), 8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (attester, config) = (&attester, config(dir, url));
            scope.spawn(move || {
                let channel = Channel::new(&config).unwrap();
                (0..count / threads).for_each(|_| exchange(&channel, attester));
            });
        }
    });
}

fn figure(name: &str, value: f64) {
    println!("{}", serde_json::json!({"name": name, "value": value}));
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let dir = Path::new(&words[1]);
    match words[0].as_str() {
        "init" => init(dir, words.get(2)),
        "serve" => serve_until_input_ends(dir),
        "load" => load(dir, words[2].parse().unwrap(), words[3].parse().unwrap(), words[4] == "keep", &words[5..]),
        _ => sessions(dir, words[2].parse().unwrap(), &words[3]),
    }
}

//! Key providers: a program, a gRPC service, a ttrpc service; good ones, and such as hang, lie or talk without end.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Read as _,
    net::TcpListener,
    os::unix::net::UnixListener,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nacre_core::{Digest, KeySource, KeySourceError, ResourceUri, SecretArray, SecretBytes};
use nacre_oci::{
    crypt::{
        Attempt, CryptError, Keyring, PUBOPTS_ANNOTATION, Recipients, SchemeError, encrypt_layer, provider::Providers,
    },
    manifest::Descriptor,
};
use nacre_testkit::Tls;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};

const NAME: &str = "org.opencontainers.image.enc.keys.provider.p";

fn providers(endpoint: &Value) -> Providers {
    let config = json!({ "key-providers": { "p": endpoint } });
    Providers::parse(config.to_string().as_bytes()).unwrap().with_timeout(Duration::from_secs(20))
}

fn encrypt(recipients: &Recipients) -> Result<Descriptor, CryptError> {
    let plain = Descriptor::of("application/vnd.oci.image.layer.v1.tar+zstd", b"layer");
    let mut reader = encrypt_layer(&plain, &b"layer"[..], recipients)?;
    let mut data = Vec::new();
    reader.read_to_end(&mut data).unwrap();
    reader.finish(Digest::sha256(&data), data.len() as u64)
}

fn round_trip(providers: Providers) -> Descriptor {
    let mut recipients = Recipients::new().with_providers(providers.clone());
    recipients.add_arg("provider:p:an:argument".parse().unwrap()).unwrap();
    let layer = encrypt(&recipients).unwrap();
    Keyring::new().with_providers(providers).unwrap(&layer).unwrap();
    layer
}

/// What a keyring with these providers makes of a layer for `p`.
fn failures(providers: Providers) -> Vec<Attempt> {
    let mut layer = Descriptor::of("application/vnd.oci.image.layer.v1.tar+encrypted", b"");
    layer.annotations.insert(PUBOPTS_ANNOTATION.into(), STANDARD.encode("{}"));
    layer.annotations.insert(NAME.into(), "AQ==,Ag==,Aw==".into());
    match Keyring::new().with_providers(providers).unwrap(&layer) {
        Err(CryptError::NoKey(attempts)) => attempts,
        other => panic!("{other:?}"),
    }
}

/// The provider of these tests: it turns each byte.
fn answer(question: &[u8]) -> Vec<u8> {
    let json: Value = serde_json::from_slice(question).unwrap();
    let turn = |text: &Value| -> Vec<u8> {
        STANDARD.decode(text.as_str().unwrap()).unwrap().iter().map(|b| b ^ 0x55).collect()
    };
    let answer = match json["op"].as_str().unwrap() {
        "keywrap" => {
            assert_eq!(json["keywrapparams"]["ec"]["Parameters"]["p"][0], STANDARD.encode("an:argument"));
            json!({ "keywrapresults": { "annotation": turn(&json["keywrapparams"]["optsdata"]) } })
        }
        "keyunwrap" => json!({ "keyunwrapresults": { "optsdata": turn(&json["keyunwrapparams"]["annotation"]) } }),
        other => panic!("{other}"),
    };
    answer.to_string().into_bytes()
}

fn shell(script: &str) -> Providers {
    providers(&json!({ "cmd": { "path": "/bin/sh", "args": ["-c", script] } }))
}

#[test]
fn the_configuration_of_another_library() {
    let Some(path) = nacre_testkit::shared("fixtures/ocicrypt/ocicrypt_config.json") else { return };
    let providers = Providers::from_file(&path).unwrap();
    for name in ["keyprovider1", "keyprovider2", "keyprovider4"] {
        assert!(providers.has(name), "{name}");
    }
}

#[test]
fn a_program_wraps_and_unwraps() {
    // It "wraps" by turning the letters by thirteen.
    let layer = round_trip(shell(
        r#"input=$(cat)
        case $input in
        *'"op":"keywrap"'*) results=keywrapresults; from=optsdata; to=annotation ;;
        *) results=keyunwrapresults; from=annotation; to=optsdata ;;
        esac
        value=$(printf %s "$input" | sed "s/.*\"$from\":\"\([^\"]*\)\".*/\1/" | base64 -d | tr A-Za-z N-ZA-Mn-za-m | base64 -w0)
        printf '{"%s":{"%s":"%s"}}' "$results" "$to" "$value""#,
    ));
    // A layer for another provider is not given to this one.
    let mut other = layer.clone();
    let packet = other.annotations.remove(NAME).unwrap();
    other.annotations.insert(NAME.replace("provider.p", "provider.q"), packet);
    let ring = Keyring::new().with_providers(shell("exit 1"));
    let error = ring.unwrap(&other).unwrap_err().to_string();
    assert!(error.contains("provider.q: no key provider 'q' is configured"), "{error}");
    assert!(Recipients::new().add_arg("provider:p".parse().unwrap()).is_err(), "not configured");
}

#[test]
fn programs_that_fail_say_why() {
    for (script, problem) in [
        ("echo no key here >&2; exit 3", "no key here"),
        ("kill -9 $$", "ended with signal: 9"),
        ("true", "not what the protocol says"),
        ("echo oops", "not what the protocol says"),
        (r#"echo '{"keyunwrapresults":{}}'"#, "an answer without a result"),
        (r#"echo '{"keywrapresults":{"annotation":"AQ=="}}'"#, "an answer without a result"),
        (r#"echo '{"keyunwrapresults":{"optsdata":"AQ=="}}'"#, "the unwrapped layer key is not valid"),
        ("head -c 5000000 /dev/zero", "wrote more than 4194304 bytes"),
    ] {
        let attempts = failures(shell(script));
        assert_eq!(attempts.len(), 3, "each packet is tried");
        let text = attempts[0].error.to_string();
        assert!(text.contains(problem), "{script}: {text}");
    }
    let missing = failures(providers(&json!({ "cmd": { "path": "/nonexistent/provider" } })));
    assert!(missing[0].error.to_string().contains("/nonexistent/provider"), "{}", missing[0].error);
}

#[test]
fn whoever_hangs_is_named_and_not_asked_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("silent");
    let silent = UnixListener::bind(&socket).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    for endpoint in [
        json!({ "cmd": { "path": "/bin/sh", "args": ["-c", "sleep 1000 & sleep 1000"] } }),
        json!({ "ttrpc": format!("unix://{}", socket.display()) }),
        json!({ "grpc": tcp.local_addr().unwrap().to_string() }),
        json!({ "grpc": format!("unix://{}", socket.display()) }),
    ] {
        let start = Instant::now();
        let attempts = failures(providers(&endpoint).with_timeout(Duration::from_millis(300)));
        assert!(start.elapsed() < Duration::from_secs(10), "{endpoint}");
        let [Attempt { scheme, error: error @ SchemeError::ProviderTimeout { .. } }] = attempts.as_slice() else {
            panic!("{endpoint}: {attempts:?}");
        };
        assert_eq!(scheme, "provider.p");
        assert!(error.to_string().contains("key provider 'p'"), "{error}");
    }
    drop(silent);
}

#[test]
fn a_ttrpc_service_of_another_library() {
    struct Method;
    impl ttrpc::MethodHandler for Method {
        fn handler(&self, context: ttrpc::TtrpcContext, request: ttrpc::Request) -> ttrpc::Result<()> {
            let mut response = ttrpc::Response::new();
            response.set_status(ttrpc::get_status(ttrpc::Code::OK, String::new()));
            // Field 1, its length as a varint of two bytes or three, its bytes.
            let question = request.payload.split_at(1 + varint_len(&request.payload[1..])).1;
            response.payload = field_1(&answer(question));
            context.respond(context.mh.stream_id, response)
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let address = format!("unix://{}", directory.path().join("s").display());
    let methods = ["WrapKey", "UnWrapKey"].map(|name| {
        (
            format!("/keyprovider.KeyProviderService/{name}"),
            Box::new(Method) as Box<dyn ttrpc::MethodHandler + Send + Sync>,
        )
    });
    let mut server = ttrpc::Server::new().bind(&address).unwrap().register_service(HashMap::from(methods));
    server.start().unwrap();
    round_trip(providers(&json!({ "ttrpc": address })));
    server.shutdown();
}

#[test]
fn ttrpc_services_that_misbehave() {
    let frame = |kind: u8, data: &[u8]| {
        [&u32::try_from(data.len()).unwrap().to_be_bytes()[..], &[0, 0, 0, 1, kind, 0], data].concat()
    };
    for (bytes, problem) in [
        (Vec::new(), "cut the connection"),
        (frame(2, b"")[..7].to_vec(), "cut the connection"),
        (frame(2, b""), "not what the protocol says"),
        (frame(2, b"\xff"), "malformed ttrpc response"),
        (frame(2, b"\x0a\x02\x08\x05"), "refused:  (code 5)"),
        (frame(2, b"\x0a\x09\x08\x05\x12\x05no!!!"), "refused: no!!! (code 5)"),
        ([frame(3, b"xyz"), frame(2, b"\x12\x01\xff")].concat(), "malformed ttrpc response"),
        (vec![0xff; 10], "announced an answer of 4294967295 bytes"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let server = thread::spawn(move || {
            while let Ok((mut peer, _)) = listener.accept() {
                let mut header = [0; 10];
                if peer.read_exact(&mut header).is_err() {
                    return;
                }
                let length = u32::from_be_bytes(header[..4].try_into().unwrap());
                peer.read_exact(&mut vec![0; length as usize]).unwrap();
                std::io::Write::write_all(&mut peer, &bytes).unwrap();
            }
        });
        let address = directory.path().join("s");
        let text = failures(providers(&json!({ "ttrpc": address })))[0].error.to_string();
        assert!(text.contains(problem), "{problem}: {text}");
        drop(std::os::unix::net::UnixStream::connect(address));
        server.join().unwrap();
    }
    for bad in ["vsock://1:2", "unix:///nonexistent/socket", "relative"] {
        failures(providers(&json!({ "ttrpc": bad })));
    }
}

/// What a gRPC service of these tests does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Grpc {
    Answer,
    Refuse,
    Status500,
    Endless,
    Cut,
    Compressed,
}

/// Serves gRPC on a free port until the test ends; gives the address.
fn grpc(what: Grpc, tls: Option<&Tls>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    listener.set_nonblocking(true).unwrap();
    let acceptor = tls.map(|tls| {
        let chain = CertificateDer::pem_file_iter(tls.certificate()).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(tls.key()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        tokio_rustls::TlsAcceptor::from(Arc::new(config))
    });
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                match &acceptor {
                    None => drop(tokio::spawn(serve(what, socket))),
                    Some(acceptor) => {
                        if let Ok(socket) = acceptor.accept(socket).await {
                            drop(tokio::spawn(serve(what, socket)));
                        }
                    }
                }
            }
        });
    });
    address
}

async fn serve<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(what: Grpc, socket: S) {
    let mut connection = h2::server::handshake(socket).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let path = request.uri().path().to_owned();
        assert!(path.starts_with("/keyprovider.KeyProviderService/"), "{path}");
        let mut body = request.into_body();
        let work = async {
            let mut question = Vec::new();
            while let Some(Ok(chunk)) = body.data().await {
                question.extend_from_slice(&chunk);
            }
            let head =
                |status: u16| http::Response::builder().status(status).header("content-type", "application/grpc");
            match what {
                Grpc::Refuse => {
                    let head =
                        head(200).header("grpc-status", "7").header("grpc-message", "not for you").body(()).unwrap();
                    respond.send_response(head, true).unwrap();
                }
                Grpc::Status500 => drop(respond.send_response(head(500).body(()).unwrap(), true).unwrap()),
                _ => {
                    let mut stream = respond.send_response(head(200).body(()).unwrap(), false).unwrap();
                    let message = match what {
                        Grpc::Endless => vec![0; (4 << 20) + 4096],
                        _ => field_1(&answer(&question[6 + varint_len(&question[6..])..])),
                    };
                    let length = u32::try_from(message.len() + usize::from(what == Grpc::Cut)).unwrap().to_be_bytes();
                    let prefix = [&[u8::from(what == Grpc::Compressed)][..], &length].concat();
                    stream.send_data([prefix, message].concat().into(), false).unwrap();
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    stream.send_trailers(trailers).unwrap();
                }
            }
        };
        // The connection has to be driven while the request is answered.
        tokio::select! { () = work => {}, _ = std::future::poll_fn(|context| connection.poll_closed(context)) => return }
    }
}

#[test]
fn a_grpc_service_wraps_and_unwraps() {
    let address = grpc(Grpc::Answer, None);
    for address in [address.clone(), format!("http://{address}"), format!("tcp://{address}")] {
        round_trip(providers(&json!({ "grpc": address })));
    }
}

#[test]
fn a_grpc_service_over_tls() {
    let Some(tls) = Tls::new() else { return };
    let address = grpc(Grpc::Answer, Some(&tls));
    let with = |options: Value| providers(&json!({ "grpc": address, "grpc-tls": options }));
    round_trip(with(json!({ "root-ca-file": tls.ca() })));
    round_trip(with(json!({ "root-ca-file": tls.ca(), "server-name": "localhost" })));
    round_trip(with(json!({ "insecure-skip-verify": true })));
    for (options, problem) in [
        (json!({}), "handshake"),
        (json!({ "root-ca-file": tls.ca(), "server-name": "other.example" }), "handshake"),
        (json!({ "root-ca-file": "/nonexistent" }), "/nonexistent"),
        (json!({ "root-ca-file": tls.key() }), "no root certificate"),
        (json!({ "root-ca-file": tls.ca(), "cert-file": tls.ca(), "key-file": "/nonexistent" }), "/nonexistent"),
    ] {
        let text = failures(with(options))[0].error.to_string();
        assert!(text.contains(problem), "{problem}: {text}");
    }
}

#[test]
fn grpc_services_that_misbehave() {
    for (what, problem) in [
        (Grpc::Refuse, "refused: not for you (gRPC status 7)"),
        (Grpc::Status500, "HTTP status 500"),
        (Grpc::Endless, "more than 4194304 bytes"),
        (Grpc::Cut, "cut gRPC message"),
        (Grpc::Compressed, "compressed or cut gRPC message"),
    ] {
        let text = failures(providers(&json!({ "grpc": grpc(what, None) })))[0].error.to_string();
        assert!(text.contains(problem), "{what:?}: {text}");
    }
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for bad in [closed.as_str(), "", "localhost", "127.0.0.1:99999", "unix:///nonexistent"] {
        let text = failures(providers(&json!({ "grpc": bad })))[0].error.to_string();
        assert!(text.contains("cannot be reached"), "{bad}: {text}");
    }
}

struct Broker(BTreeMap<String, Vec<u8>>);

impl KeySource for Broker {
    fn fetch(&self, uri: &ResourceUri) -> Result<SecretBytes, KeySourceError> {
        self.0.get(&uri.to_string()).map(|key| SecretBytes::new(key.clone())).ok_or_else(|| KeySourceError::Denied {
            uri: uri.clone(),
            source_name: "the broker".into(),
            reason: "not attested".into(),
        })
    }
}

#[test]
fn a_key_of_the_broker_opens_the_layer_in_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    fs::write(&path, [9; 32]).unwrap();
    let argument = |path: &Path, tail: &str| {
        format!("provider:attestation-agent:keyid=kbs:///default/key/1::keypath={}{tail}", path.display())
    };
    let mut by_argument = Recipients::new();
    by_argument.add_arg(argument(&path, "::algorithm=A256GCM").parse().unwrap()).unwrap();
    let mut by_hand = Recipients::new();
    by_hand.add_broker_key("kbs:///default/key/1".parse().unwrap(), SecretArray::fill(|slot| slot.fill(9)));
    for recipients in [by_argument, by_hand] {
        let layer = encrypt(&recipients).unwrap();
        let broker = |key: &[u8]| Arc::new(Broker(BTreeMap::from([("kbs:///default/key/1".into(), key.to_vec())])));
        Keyring::new().with_broker(broker(&[9; 32])).unwrap(&layer).unwrap();
        for (ring, problem) in [
            (Keyring::new(), "no key provider 'attestation-agent' is configured"),
            (Keyring::new().with_broker(broker(&[8; 32])), "was changed"),
            (Keyring::new().with_broker(broker(&[9; 31])), "has 31 bytes; 32 are needed"),
            (Keyring::new().with_broker(Arc::new(Broker(BTreeMap::new()))), "refused to release it: not attested"),
        ] {
            let error = ring.unwrap(&layer).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
    let short = directory.path().join("short");
    fs::write(&short, [9; 31]).unwrap();
    for bad in [
        argument(&short, ""),
        argument(Path::new("/nonexistent"), ""),
        argument(&path, "::algorithm=A256CTR"),
        argument(&path, "::sample=true"),
        argument(&path, "::keyid=kbs:///a/b/c"),
        argument(&path, "::x=y"),
        argument(&path, "::"),
        format!("provider:attestation-agent:keypath={}", path.display()),
        format!("provider:attestation-agent:keyid=x::keypath={}", path.display()),
        "provider:attestation-agent:keyid=kbs:///a/b/c".into(),
        "provider:attestation-agent".into(),
    ] {
        Recipients::new().add_arg(bad.parse().unwrap()).expect_err(&bad);
    }
}

fn field_1(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x0a];
    let mut length = bytes.len();
    while length > 0x7f {
        out.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    out.push(u8::try_from(length).unwrap());
    out.extend_from_slice(bytes);
    out
}

fn varint_len(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| **byte & 0x80 != 0).count() + 1
}

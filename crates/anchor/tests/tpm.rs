//! Anchors in a TPM: swtpm, judged by tpm2-tools, and attacked from each place that an attacker may have.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use nacre_anchor::{
    TpmAnchor,
    tpm::{NvIndex, TpmAddress},
};
use nacre_core::{Anchor as _, AnchorError, AnchorState, SecretArray, SecretBytes};
use nacre_testkit::{Swtpm, run};

const INDEX: &str = "0x01800010";

fn state(sequence: u64) -> AnchorState {
    AnchorState { disk: [7; 16], fence: 1, sequence, root: [3; 32] }
}

fn key(byte: u8) -> SecretArray<32> {
    SecretArray::fill(|slot| *slot = [byte; 32])
}

fn anchor_at(address: String, key_byte: u8) -> TpmAnchor {
    TpmAnchor::new(TpmAddress::Tcp(address), NvIndex::DEFAULT, &key(key_byte), SecretBytes::new(vec![]))
}

fn anchor(tpm: &Swtpm) -> TpmAnchor {
    anchor_at(tpm.address(), 1)
}

fn tool(tpm: &Swtpm, program: &str, arguments: &str) -> Option<Command> {
    let mut command = tpm.tool(program)?;
    command.args(arguments.split(' '));
    Some(command)
}

#[test]
fn a_state_is_kept_over_power_cycles() {
    let Some(mut tpm) = Swtpm::start() else { return };
    let anchor = anchor(&tpm);
    assert_eq!(anchor.read().unwrap(), None);
    anchor.advance(None, &state(1)).unwrap();
    assert_eq!(anchor.read().unwrap(), Some(state(1)));
    for sequence in 1..20 {
        anchor.advance(Some(&state(sequence)), &state(sequence + 1)).unwrap();
    }
    tpm.power_cycle(|_| {});
    assert_eq!(anchor.read().unwrap(), Some(state(20)));
    anchor.forget().unwrap();
    anchor.forget().unwrap();
    assert_eq!(anchor.read().unwrap(), None);
}

#[test]
fn who_believes_something_else_is_fenced_by_the_tpm() {
    let Some(tpm) = Swtpm::start() else { return };
    let anchor = anchor(&tpm);
    anchor.advance(None, &state(1)).unwrap();
    for expected in [None, Some(state(0)), Some(AnchorState { fence: 2, ..state(1) })] {
        let error = anchor.advance(expected.as_ref(), &state(9)).unwrap_err();
        assert!(matches!(error, AnchorError::Fenced { found_fence: 1, found_sequence: 1, .. }), "{error}");
    }
    assert_eq!(anchor.read().unwrap(), Some(state(1)));
}

#[test]
fn several_writers_take_turns() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(0)).unwrap();
    let wins: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (1..=3_u64)
            .map(|who| {
                let anchor = anchor(&tpm);
                scope.spawn(move || {
                    let mut wins = 0;
                    for _ in 0..10 {
                        let now = anchor.read().unwrap().unwrap();
                        let next = AnchorState { fence: who, sequence: now.sequence + 1, ..now };
                        match anchor.advance(Some(&now), &next) {
                            Ok(()) => wins += 1,
                            Err(AnchorError::Fenced { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                    wins
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(anchor(&tpm).read().unwrap().unwrap().sequence, wins);
}

#[test]
fn tpm2_tools_see_the_index() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(5)).unwrap();
    let Some(mut public) = tool(&tpm, "tpm2_nvreadpublic", INDEX) else { return };
    let public = String::from_utf8(run(&mut public).stdout).unwrap();
    assert!(public.contains("authwrite|writeall|authread|no_da|written"), "{public}");
    assert!(public.contains("size: 104") && public.contains("0x22041004"), "{public}");
    // Neither without its authorization nor as the owner is it read.
    for auth in ["-C o", "-C 0x01800010"] {
        let output = tool(&tpm, "tpm2_nvread", &format!("{auth} {INDEX}")).unwrap().output().unwrap();
        assert!(!output.status.success());
    }
    // authValue = HMAC-SHA256(key, label), as docs/formats/anchor.md says.
    let hmac_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key(1).expose());
    let auth = ring::hmac::sign(&hmac_key, b"nacre tpm anchor 1: authValue");
    let auth: String = auth.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let content = run(&mut tool(&tpm, "tpm2_nvread", &format!("-C {INDEX} -P hex:{auth} {INDEX}")).unwrap()).stdout;
    assert_eq!(content.len(), 104);
    assert_eq!(&content[..8], b"nacrenv1");
    assert_eq!(content[8..72], state(5).to_bytes());
}

#[test]
fn an_index_that_the_owner_defined_anew_is_refused() {
    let Some(tpm) = Swtpm::start() else { return };
    let anchor = anchor(&tpm);
    anchor.advance(None, &state(1)).unwrap();
    let (file, auth) = (tpm.state().join("content"), "ab".repeat(32));
    fs::write(&file, [0x55; 104]).unwrap();
    let Some(mut undefine) = tool(&tpm, "tpm2_nvundefine", &format!("-C o {INDEX}")) else { return };
    run(&mut undefine);
    // Gone: whoever knows that there was a state is told so.
    assert!(matches!(anchor.advance(Some(&state(1)), &state(2)), Err(AnchorError::Untrusted { .. })));
    let ours = "authwrite|writeall|authread|no_da";
    for (attributes, size, what) in [
        (ours, 104, "does not accept this disk's key"),
        ("authwrite|writeall|authread|no_da|ownerwrite", 104, "other attributes"),
        ("authwrite|writeall|authread|no_da|ownerwrite|ownerread", 104, "other attributes"),
        (ours, 64, "another size"),
    ] {
        let define = format!("-C o -s {size} -a {attributes} -p hex:{auth} {INDEX}");
        run(&mut tool(&tpm, "tpm2_nvdefine", &define).unwrap());
        // Not written yet, it is refused as soon as its key counts, and never used as it is.
        assert!(anchor.advance(Some(&state(1)), &state(2)).is_err());
        assert!(anchor.advance(None, &state(2)).is_err());
        fs::write(&file, vec![0x55; size]).unwrap();
        run(&mut tool(&tpm, "tpm2_nvwrite", &format!("-C {INDEX} -P hex:{auth} -i {} {INDEX}", file.display()))
            .unwrap());
        let error = anchor.read().unwrap_err();
        assert!(matches!(error, AnchorError::Untrusted { .. }) && error.to_string().contains(what), "{error}");
        run(&mut tool(&tpm, "tpm2_nvundefine", &format!("-C o {INDEX}")).unwrap());
    }
}

#[test]
fn an_index_of_another_disk_is_refused() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    let other = anchor_at(tpm.address(), 2);
    for error in [other.read().unwrap_err(), other.advance(None, &state(1)).unwrap_err()] {
        assert!(matches!(error, AnchorError::Untrusted { .. }), "{error}");
    }
    // Who learned the authorization can write, but nothing that passes for a state.
    let hmac_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key(1).expose());
    let auth = ring::hmac::sign(&hmac_key, b"nacre tpm anchor 1: authValue");
    let auth: String = auth.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let file = tpm.state().join("content");
    fs::write(&file, [&b"nacrenv1"[..], &state(9).to_bytes(), &[0; 32]].concat()).unwrap();
    let write = format!("-C {INDEX} -P hex:{auth} -i {} {INDEX}", file.display());
    let Some(mut write) = tool(&tpm, "tpm2_nvwrite", &write) else { return };
    run(&mut write);
    let error = anchor(&tpm).read().unwrap_err();
    assert!(error.to_string().contains("MAC does not match"), "{error}");
}

#[test]
fn an_owner_with_an_authorization_is_asked_for_it() {
    let Some(tpm) = Swtpm::start() else { return };
    let Some(mut change) = tool(&tpm, "tpm2_changeauth", "-c owner secret") else { return };
    run(&mut change);
    let error = anchor(&tpm).advance(None, &state(1)).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("owner authorization"), "{error}");
    let with = |owner: &[u8]| {
        let address = TpmAddress::Tcp(tpm.address());
        TpmAnchor::new(address, NvIndex::DEFAULT, &key(1), SecretBytes::new(owner.to_vec()))
    };
    with(b"secret").advance(None, &state(1)).unwrap();
    // From then on nobody needs the owner.
    anchor(&tpm).advance(Some(&state(1)), &state(2)).unwrap();
    assert!(with(b"wrong").forget().is_err());
    with(b"secret").forget().unwrap();
}

/// What docs/formats/anchor.md and `promise` say: the state of a software TPM is files, and who copies them back is not seen.
#[test]
fn a_software_tpm_that_was_turned_back_is_not_seen() {
    let Some(mut tpm) = Swtpm::start() else { return };
    let anchor = anchor(&tpm);
    anchor.advance(None, &state(1)).unwrap();
    let mut old = vec![];
    tpm.power_cycle(|directory| old = files(directory));
    anchor.advance(Some(&state(1)), &state(2)).unwrap();
    tpm.power_cycle(|directory| old.iter().for_each(|(name, bytes)| fs::write(directory.join(name), bytes).unwrap()));
    assert_eq!(anchor.read().unwrap(), Some(state(1)), "the older state, and no error");
    assert!(anchor.promise().contains("turn back the TPM"));
}

fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("tpm2"));
    files.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn sessions_that_killed_processes_left_do_not_stop_us() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    // TPM2_StartAuthSession, unbound, unsalted, HMAC, SHA-256; and nobody gives them back.
    let body = [&[0x40, 0, 0, 7, 0x40, 0, 0, 7, 0, 16][..], &[1; 16], &[0, 0, 0, 0, 0x10, 0, 0x0b]].concat();
    let command = [&[0x80, 1, 0, 0, 0, 10 + 33, 0, 0, 1, 0x76][..], &body].concat();
    let refused = (0..4).any(|_| {
        let mut stream = TcpStream::connect(tpm.address()).unwrap();
        stream.write_all(&command).unwrap();
        let mut header = [0; 10];
        stream.read_exact(&mut header).unwrap();
        header[6..] == [0, 0, 9, 3]
    });
    assert!(refused, "the TPM has room for fewer sessions than we left");
    anchor(&tpm).advance(Some(&state(1)), &state(2)).unwrap();
}

/// Somebody between us and the TPM, who sees each command and its response and may give another one.
struct Bus {
    address: String,
}

type Attack = dyn Fn(&[u8], Vec<u8>) -> Vec<u8> + Send + Sync;

impl Bus {
    fn between(tpm: &Swtpm, attack: Arc<Attack>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, tpm) = (listener.local_addr().unwrap().to_string(), tpm.address());
        thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, mut tpm) = (client.unwrap(), TcpStream::connect(&tpm).unwrap());
                while let Some(command) = message(&mut client) {
                    tpm.write_all(&command).unwrap();
                    let Some(response) = message(&mut tpm) else { break };
                    let response = attack(&command, response);
                    if response.is_empty() || client.write_all(&response).is_err() {
                        break;
                    }
                }
            }
        });
        Self { address }
    }
}

fn message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 10];
    stream.read_exact(&mut bytes).ok()?;
    bytes.resize(u32::from_be_bytes(bytes[2..6].try_into().unwrap()) as usize, 0);
    stream.read_exact(&mut bytes[10..]).ok()?;
    Some(bytes)
}

fn is(command: &[u8], code: u8) -> bool {
    command[6..10] == [0, 0, 1, code]
}

const READ: u8 = 0x4e;
const WRITE: u8 = 0x37;
const DEFINE: u8 = 0x2a;

#[test]
fn a_state_that_is_replayed_on_the_bus_is_refused() {
    let Some(tpm) = Swtpm::start() else { return };
    let recorded = Arc::new(Mutex::new(None::<Vec<u8>>));
    let memory = recorded.clone();
    let replay = move |command: &[u8], response: Vec<u8>| match is(command, READ) {
        true => memory.lock().unwrap().get_or_insert(response).clone(),
        false => response,
    };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    let bus = Bus::between(&tpm, Arc::new(replay));
    assert_eq!(anchor_at(bus.address.clone(), 1).read().unwrap(), Some(state(1)));
    anchor(&tpm).advance(Some(&state(1)), &state(2)).unwrap();
    let error = anchor_at(bus.address, 1).read().unwrap_err();
    assert!(matches!(error, AnchorError::Untrusted { .. }) && error.to_string().contains("HMAC"), "{error}");
}

#[test]
fn a_write_that_the_bus_swallows_is_seen() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    // It answers "written" with the HMAC of nobody.
    let swallow = |command: &[u8], response: Vec<u8>| match is(command, WRITE) {
        true => [&response[..response.len() - 32], &[7; 32]].concat(),
        false => response,
    };
    let bus = Bus::between(&tpm, Arc::new(swallow));
    let error = anchor_at(bus.address, 1).advance(Some(&state(1)), &state(2)).unwrap_err();
    assert!(matches!(error, AnchorError::Untrusted { .. }), "{error}");
}

#[test]
fn every_changed_byte_of_a_response_is_refused_or_changes_nothing() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    let place = Arc::new(Mutex::new((READ, 0)));
    let at = place.clone();
    let flip = move |command: &[u8], mut response: Vec<u8>| {
        let (code, at) = *at.lock().unwrap();
        // A longer length would only make us wait.
        if is(command, code) && !(2..6).contains(&at) && at < response.len() {
            response[at] ^= 0x11;
        }
        response
    };
    let bus = Bus::between(&tpm, Arc::new(flip));
    let anchor = anchor_at(bus.address, 1);
    // The answer to TPM2_NV_Read has 189 bytes, that to TPM2_NV_ReadPublic 62, that to TPM2_StartAuthSession 48.
    for (code, length) in [(READ, 189), (0x69, 62), (0x76, 48)] {
        for at in (0..length).filter(|at| !(2..6).contains(at)) {
            *place.lock().unwrap() = (code, at);
            assert!(anchor.read().is_err(), "{code:#x}, byte {at}");
        }
    }
    *place.lock().unwrap() = (0, 0);
    assert_eq!(anchor.read().unwrap(), Some(state(1)));
}

#[test]
fn cut_and_senseless_responses_are_errors() {
    let Some(tpm) = Swtpm::start() else { return };
    anchor(&tpm).advance(None, &state(1)).unwrap();
    for garbage in [
        &b""[..],
        &[0; 10],
        &[0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0],
        &[0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[0x80, 2, 0, 0, 0, 14, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[0, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e],
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ] {
        for code in [READ, 0x69, 0x76] {
            let answer = move |command: &[u8], response: Vec<u8>| match is(command, code) {
                true => garbage.to_vec(),
                false => response,
            };
            let bus = Bus::between(&tpm, Arc::new(answer));
            assert!(anchor_at(bus.address, 1).read().is_err(), "{garbage:?} for {code:#x}");
        }
    }
}

#[test]
fn the_authorization_is_hidden_where_the_owner_has_one() {
    let Some(tpm) = Swtpm::start() else { return };
    let Some(mut change) = tool(&tpm, "tpm2_changeauth", "-c owner secret") else { return };
    run(&mut change);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let memory = seen.clone();
    let listen = move |command: &[u8], response: Vec<u8>| {
        if is(command, DEFINE) {
            *memory.lock().unwrap() = command.to_vec();
        }
        response
    };
    let bus = Bus::between(&tpm, Arc::new(listen));
    let owner = SecretBytes::new(b"secret".to_vec());
    TpmAnchor::new(TpmAddress::Tcp(bus.address), NvIndex::DEFAULT, &key(1), owner).advance(None, &state(1)).unwrap();
    let hmac_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key(1).expose());
    let auth = ring::hmac::sign(&hmac_key, b"nacre tpm anchor 1: authValue");
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 100 && !seen.windows(32).any(|window| window == auth.as_ref()));
    assert!(!seen.windows(6).any(|window| window == b"secret"));
}

#[test]
fn a_tpm_that_is_not_there_is_named() {
    let absent =
        TpmAnchor::new(TpmAddress::Path("/no such thing".into()), NvIndex::DEFAULT, &key(1), SecretBytes::new(vec![]));
    let error = absent.read().unwrap_err();
    assert!(matches!(error, AnchorError::Failed { .. }) && error.to_string().contains("/no such thing"), "{error}");
    for path in ["/dev", "/etc/passwd"] {
        let address = TpmAddress::Path(path.into());
        assert!(TpmAnchor::new(address, NvIndex::DEFAULT, &key(1), SecretBytes::new(vec![])).read().is_err());
    }
}

#[test]
fn a_unix_socket_is_as_good_as_a_port() {
    let Some(program) = nacre_testkit::require("swtpm") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (state_dir, socket) = (format!("dir={}", dir.path().display()), dir.path().join("socket"));
    let server = format!("type=unixio,path={}", socket.display());
    let mut swtpm = Command::new(program)
        .args([
            "socket",
            "--tpm2",
            "--flags",
            "not-need-init,startup-clear",
            "--tpmstate",
            &state_dir,
            "--server",
            &server,
        ])
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !socket.exists() && begin.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(10));
    }
    let anchor = TpmAnchor::new(TpmAddress::Path(socket), NvIndex::DEFAULT, &key(1), SecretBytes::new(vec![]));
    let result = anchor.advance(None, &state(1)).and_then(|()| anchor.read());
    swtpm.kill().unwrap();
    swtpm.wait().unwrap();
    assert_eq!(result.unwrap(), Some(state(1)));
    // A TPM that went away is an error, and soon.
    assert!(matches!(anchor.read(), Err(AnchorError::Failed { .. })));
}

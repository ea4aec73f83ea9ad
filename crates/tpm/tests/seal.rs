//! Secrets that a TPM seals: swtpm, and attacks from the places that an attacker may have.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail the test")]

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use nacre_core::SecretBytes;
use nacre_testkit::{Swtpm, run};
use nacre_tpm::{
    TpmAddress, TpmError,
    seal::{Pcrs, SealError, Sealed, Vault},
};

const SECRET: &[u8] = b"thirty-two bytes that are secret, and as many of a label of them";

fn vault_at(address: String) -> Vault {
    Vault::new(TpmAddress::Tcp(address), SecretBytes::new(Vec::new()))
}

fn vault(tpm: &Swtpm) -> Vault {
    vault_at(tpm.address())
}

fn secret() -> SecretBytes {
    SecretBytes::new(SECRET.to_vec())
}

fn pcrs(text: &str) -> Pcrs {
    text.parse().unwrap()
}

fn extend(tpm: &Swtpm, pcr: u32) -> bool {
    let Some(mut tool) = tpm.tool("tpm2_pcrextend") else { return false };
    run(tool.arg(format!("{pcr}:sha256={}", "ab".repeat(32))));
    true
}

#[test]
fn a_sealed_secret_is_opened_after_power_cycles() {
    let Some(mut tpm) = Swtpm::start() else { return };
    let root = vault(&tpm).root().unwrap();
    for selected in [Pcrs::default(), pcrs("7"), pcrs("0+1+2+3+4+5+6+7+8+9+11+16")] {
        let sealed = vault(&tpm).seal(&secret(), selected).unwrap();
        assert_eq!(vault(&tpm).unseal(&root, &sealed).unwrap().expose(), SECRET);
        tpm.power_cycle(|_| {});
        assert_eq!(vault(&tpm).root().unwrap(), root);
        assert_eq!(vault(&tpm).unseal(&root, &sealed).unwrap().expose(), SECRET);
    }
    // Each is sealed with other random numbers; what is too long is no secret of a TPM's.
    let [one, other] = [0, 1].map(|_| vault(&tpm).seal(&secret(), Pcrs::default()).unwrap());
    assert_ne!(one, other);
    let long = SecretBytes::new(vec![1; 129]);
    assert!(matches!(vault(&tpm).seal(&long, Pcrs::default()), Err(SealError::TooLong(129))));
    vault(&tpm).seal(&SecretBytes::new(vec![1; 128]), Pcrs::default()).unwrap();
    // Nothing is left in the TPM, which has room for three.
    for _ in 0..8 {
        vault(&tpm).unseal(&root, &one).unwrap();
    }
}

#[test]
fn a_pcr_that_changed_keeps_a_secret_sealed_and_is_named() {
    let Some(mut tpm) = Swtpm::start() else { return };
    let root = vault(&tpm).root().unwrap();
    let sealed = vault(&tpm).seal(&secret(), pcrs("0+7")).unwrap();
    let free = vault(&tpm).seal(&secret(), Pcrs::default()).unwrap();
    let other = vault(&tpm).seal(&secret(), pcrs("8")).unwrap();
    if !extend(&tpm, 7) {
        return;
    }
    let error = vault(&tpm).unseal(&root, &sealed).unwrap_err();
    assert!(matches!(error, SealError::Pcrs { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("PCR 7 holds") && !text.contains("PCR 0") && text.contains("held 000000000000"), "{text}");
    for one in [&free, &other] {
        vault(&tpm).unseal(&root, one).unwrap();
    }
    // Somebody writes down what PCRs hold now, or none: the TPM is not deceived.
    let mut forged = sealed.clone();
    *forged.pcrs.get_mut(&7).unwrap() = vault(&tpm).seal(&secret(), pcrs("7")).unwrap().pcrs[&7].clone();
    assert!(matches!(vault(&tpm).unseal(&root, &forged), Err(SealError::Pcrs { .. })));
    forged.pcrs.clear();
    assert!(matches!(vault(&tpm).unseal(&root, &forged), Err(SealError::Tampered { .. })));
    tpm.power_cycle(|_| {});
    assert_eq!(vault(&tpm).unseal(&root, &sealed).unwrap().expose(), SECRET);
}

#[test]
fn what_was_sealed_and_changed_is_refused() {
    let Some(tpm) = Swtpm::start() else { return };
    let root = vault(&tpm).root().unwrap();
    let sealed = vault(&tpm).seal(&secret(), Pcrs::default()).unwrap();
    let refused = |sealed: &Sealed, what: &str| {
        let error = vault(&tpm).unseal(&root, sealed).unwrap_err();
        assert!(matches!(error, SealError::Tampered { .. }), "{what}: {error}");
    };
    for at in 0..sealed.private.len() {
        let mut changed = sealed.clone();
        changed.private[at] ^= 1;
        refused(&changed, &format!("private, byte {at}"));
    }
    for at in 0..sealed.public.len() {
        let mut changed = sealed.clone();
        changed.public[at] ^= 1;
        refused(&changed, &format!("public, byte {at}"));
    }
    refused(&Sealed { private: Vec::new(), ..sealed.clone() }, "nothing");
    refused(&Sealed { private: vec![0; 1 << 20], ..sealed.clone() }, "a million zeros");
    let other = vault(&tpm).seal(&secret(), Pcrs::default()).unwrap();
    refused(&Sealed { public: other.public, ..sealed.clone() }, "put together");
    vault(&tpm).unseal(&root, &sealed).unwrap();
}

#[test]
fn another_tpm_and_one_that_was_cleared_open_nothing() {
    let (Some(tpm), Some(second)) = (Swtpm::start(), Swtpm::start()) else { return };
    let root = vault(&tpm).root().unwrap();
    let sealed = vault(&tpm).seal(&secret(), Pcrs::default()).unwrap();
    let error = vault(&second).unseal(&root, &sealed).unwrap_err();
    assert!(matches!(error, SealError::OtherTpm { .. }) && error.to_string().contains("another TPM"), "{error}");
    // Who believes the other TPM's key gets nothing either.
    let theirs = vault(&second).root().unwrap();
    assert!(matches!(vault(&second).unseal(&theirs, &sealed), Err(SealError::Tampered { .. })));
    let Some(mut clear) = tpm.tool("tpm2_clear") else { return };
    run(&mut clear);
    assert!(matches!(vault(&tpm).unseal(&root, &sealed), Err(SealError::OtherTpm { .. })));
}

#[test]
fn an_owners_authorization_is_needed_where_there_is_one() {
    let Some(tpm) = Swtpm::start() else { return };
    let Some(mut change) = tpm.tool("tpm2_changeauth") else { return };
    run(change.args(["-c", "owner", "owner's"]));
    let error = vault(&tpm).root().unwrap_err();
    assert!(
        matches!(error, SealError::Tpm(TpmError::Refused { .. })) && error.to_string().contains("owner"),
        "{error}"
    );
    let owner = Vault::new(TpmAddress::Tcp(tpm.address()), SecretBytes::new(b"owner's".to_vec()));
    let sealed = owner.seal(&secret(), Pcrs::default()).unwrap();
    assert_eq!(owner.unseal(&owner.root().unwrap(), &sealed).unwrap().expose(), SECRET);
}

/// Bytes between us and the TPM: kept, and answers changed.
struct Bus {
    address: String,
    seen: Arc<Mutex<Vec<u8>>>,
}

/// Which command's answer is changed, and at which byte.
type Change = Arc<Mutex<Option<(u32, usize)>>>;

impl Bus {
    fn between(tpm: &Swtpm, change: Change) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (target, seen) = (tpm.address(), Arc::new(Mutex::new(Vec::new())));
        let log = seen.clone();
        // It ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let _ = relay(client, &target, &log, &change);
            }
        });
        Self { address, seen }
    }
}

fn relay(mut client: TcpStream, target: &str, log: &Mutex<Vec<u8>>, change: &Change) -> std::io::Result<()> {
    let mut tpm = TcpStream::connect(target)?;
    let mut buffer = [0; 4096];
    loop {
        let length = client.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        let command = &buffer[..length];
        log.lock().unwrap().extend_from_slice(command);
        tpm.write_all(command)?;
        let code = u32::from_be_bytes(command[6..10].try_into().unwrap());
        let mut answer = [0; 4096];
        let length = tpm.read(&mut answer)?;
        let answer = &mut answer[..length];
        log.lock().unwrap().extend_from_slice(answer);
        if let Some((which, at)) = *change.lock().unwrap()
            && which == code
            && let Some(byte) = answer.get_mut(at)
        {
            *byte ^= 0x11;
        }
        client.write_all(answer)?;
    }
}

#[test]
fn the_bus_sees_no_secret_and_changes_none() {
    let Some(tpm) = Swtpm::start() else { return };
    let change = Change::default();
    let bus = Bus::between(&tpm, change.clone());
    let vault = vault_at(bus.address.clone());
    let root = vault.root().unwrap();
    let sealed = vault.seal(&secret(), pcrs("0")).unwrap();
    assert_eq!(vault.unseal(&root, &sealed).unwrap().expose(), SECRET);
    let seen = bus.seen.lock().unwrap().clone();
    assert!(seen.len() > 1000 && !seen.windows(8).any(|window| SECRET.windows(8).any(|part| part == window)));
    // The answers to TPM2_StartAuthSession and TPM2_Unseal: what is not hidden in them is vouched for.
    for (code, length) in [(0x176, 48), (0x15e, 150)] {
        for at in (0..length).filter(|at| !(2..6).contains(at)) {
            *change.lock().unwrap() = Some((code, at));
            assert!(vault.unseal(&root, &sealed).is_err() || at >= 149, "{code:#x}, byte {at}");
        }
    }
    // Others: an error, or the secret all the same.
    for (code, length) in [(0x131, 150), (0x157, 100), (0x17f, 10)] {
        for at in (0..length).filter(|at| !(2..6).contains(at)).step_by(3) {
            *change.lock().unwrap() = Some((code, at));
            if let Ok(secret) = vault.unseal(&root, &sealed) {
                assert_eq!(secret.expose(), SECRET, "{code:#x}, byte {at}");
            }
        }
    }
    *change.lock().unwrap() = None;
    assert_eq!(vault.unseal(&root, &sealed).unwrap().expose(), SECRET);
}

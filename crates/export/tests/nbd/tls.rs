//! TLS, forced and not, with and without certificates of clients.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nacre_export::nbd::{
    Listen, Tls,
    wire::{answer, option},
};
use nacre_testkit::{Rng, require, run};

use crate::{
    Fixture,
    client::{Client, info},
    memory::Memory,
};

/// A server under TLS at a socket file and a port, and a directory of certificates as libnbd and QEMU want it.
fn fixture(tls: &nacre_testkit::Tls, clients: bool, required: bool) -> (Fixture, PathBuf) {
    let read = |path| fs::read(path).unwrap();
    let authorities = clients.then(|| read(tls.ca()));
    let settings = Tls::from_pem(&read(tls.certificate()), &read(tls.key()), authorities.as_deref()).unwrap();
    let fixture = Fixture::with(Memory::new(8 << 20), |server| {
        server.tls = Some(if required { settings } else { settings.optional() });
        server.listen = vec![Listen::Tcp("127.0.0.1:0".parse().unwrap()), server.listen[0].clone()];
    });
    let directory = fixture.directory.path().join("certificates");
    fs::create_dir(&directory).unwrap();
    fs::copy(tls.ca(), directory.join("ca-cert.pem")).unwrap();
    (fixture, directory)
}

/// The address by a name that the certificate has.
fn with(uri: &str, directory: &Path) -> String {
    format!("{uri}?tls-certificates={}", directory.display())
}

#[test]
fn nbdcopy_and_qemu_img_go_through_tls() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let (Some(nbdcopy), Some(nbdinfo), Some(qemu)) = (require("nbdcopy"), require("nbdinfo"), require("qemu-img"))
    else {
        return;
    };
    let (fixture, certificates) = fixture(&tls, false, true);
    let uri = with(&fixture.uri(), &certificates);
    assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
    let info = run(Command::new(nbdinfo).arg(&uri)).stdout;
    assert!(String::from_utf8_lossy(&info).contains("with TLS"));
    let (there, back) = (fixture.directory.path().join("there"), fixture.directory.path().join("back"));
    fs::write(&there, Rng::new(5).bytes(8 << 20)).unwrap();
    run(Command::new(&nbdcopy).arg(&there).arg(&uri));
    run(Command::new(&nbdcopy).arg(&uri).arg(&back));
    assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap());

    let port = fixture.uri().trim_end_matches('/').rsplit(':').next().unwrap().to_owned();
    let out = run(Command::new(qemu)
        .args(["compare", "--object"])
        .arg(format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", certificates.display()))
        .args(["--image-opts", &format!("driver=raw,file.driver=file,file.filename={}", there.display())])
        .arg(format!("driver=nbd,host=127.0.0.1,port={port},tls-creds=tls0")));
    assert!(String::from_utf8_lossy(&out.stdout).contains("Images are identical"));
}

#[test]
fn where_tls_is_forced_nothing_is_said_in_the_clear() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let (fixture, _) = fixture(&tls, false, true);
    let mut client = Client::greeted(&fixture.socket());
    for (asked, data) in [
        (option::LIST, Vec::new()),
        (option::INFO, info(b"", &[])),
        (option::GO, info(b"", &[])),
        (option::STRUCTURED_REPLY, Vec::new()),
        (99, Vec::new()),
    ] {
        client.option(asked, &data);
        assert_eq!(client.answer(asked).0, answer::TLS_REQUIRED);
    }
    client.option(option::STARTTLS, b"x");
    assert_eq!(client.answer(option::STARTTLS).0, answer::INVALID);
    client.option(option::EXPORT_NAME, b"");
    assert!(client.is_closed());

    // What follows STARTTLS in the clear is no TLS, and is not taken for an option either.
    let mut client = Client::greeted(&fixture.socket());
    let smuggled = crate::client::option_bytes(option::GO, &info(b"", &[]));
    client.send(&[crate::client::option_bytes(option::STARTTLS, b""), smuggled].concat());
    assert_eq!(client.answer(option::STARTTLS).0, answer::ACK);
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.0, &mut rest);
    assert!(rest.len() < 20, "an alert at most: {rest:?}");
}

#[test]
fn where_tls_is_offered_clients_may_do_without() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let Some(nbdinfo) = require("nbdinfo") else { return };
    let (fixture, certificates) = fixture(&tls, false, false);
    assert!(fixture.uri().starts_with("nbd://"));
    run(Command::new(&nbdinfo).arg(fixture.uri()));
    run(Command::new(&nbdinfo).arg(with(&fixture.uri().replace("nbd://", "nbds://"), &certificates)));
}

#[test]
fn where_clients_need_certificates_others_are_sent_away() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let Some(nbdinfo) = require("nbdinfo") else { return };
    let (fixture, certificates) = fixture(&tls, true, true);
    let uri = with(&fixture.uri(), &certificates);
    assert!(!Command::new(&nbdinfo).arg(&uri).output().unwrap().status.success(), "without a certificate");
    fs::copy(tls.certificate(), certificates.join("client-cert.pem")).unwrap();
    fs::copy(tls.key(), certificates.join("client-key.pem")).unwrap();
    run(Command::new(&nbdinfo).arg(&uri));

    let other = nacre_testkit::Tls::new().unwrap();
    fs::copy(other.certificate(), certificates.join("client-cert.pem")).unwrap();
    fs::copy(other.key(), certificates.join("client-key.pem")).unwrap();
    assert!(!Command::new(&nbdinfo).arg(&uri).output().unwrap().status.success(), "of another authority");
}

#[test]
fn certificates_that_are_of_no_use_are_refused() {
    let Some(tls) = nacre_testkit::Tls::new() else { return };
    let (chain, key) = (fs::read(tls.certificate()).unwrap(), fs::read(tls.key()).unwrap());
    let other = nacre_testkit::Tls::new().unwrap();
    for (chain, key, clients) in [
        (&b""[..], &key[..], None),
        (&chain, b"", None),
        (&chain, &fs::read(other.key()).unwrap(), None),
        (&chain, &key, Some(&b"nothing"[..])),
    ] {
        assert!(Tls::from_pem(chain, key, clients).is_err());
    }
}
